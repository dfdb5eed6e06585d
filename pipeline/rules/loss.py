"""Rules about what the loss counts: can the base's chat template be asked where the assistant speaks, and at what cost?

TRL marks the assistant's words itself only in chat templates that it knows by their exact text, and fails on others.
Our training script does not: for an unknown template it finds an answer as what the conversation gains by it. That
costs nothing as long as a longer conversation begins with the text of a shorter one. A template that rewrites earlier
turns (drops thoughts, marks the last one) gets one sequence for each answer, and the history is computed again and
again; that is what a user must know, and all there is to warn about.
"""

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

from pipeline.chat_template import ChatTemplate
from pipeline.errors import Severity, excerpt
from pipeline.experiment import LossOn
from pipeline.rules.rule import Subject, Verdict

# sha256, first 16 digits, of the templates that rewrite history and that TRL 1.16 replaces with a marked copy that
# does not; tests/test_rules_loss.py reads them from the installed TRL.
REPLACED_BY_TRL: frozenset[str] = frozenset(
    {
        "56a1447ad31926fd",  # deepseek_r1_distill
        "563b1ce7d61d50a9",  # deepseekv3
        "a4c9919cbbd4acdd",  # gptoss
        "58933db77d3099b4",  # nemotron_3_5_lightning
        "ab7813c3abdd9cb6",  # nemotron_3_nano
        "575fb74f54ed264d",  # nemotron_3_super
        "82753bef5cedc493",  # nemotron_3_ultra
        "dcaee66df77bfbb7",  # phi3
        "78d976a442bcde2f",  # phi3_5
        "a55ee1b1660128b7",  # qwen3
        "273d8e0e683b8850",  # qwen3_5_nothink
        "a4aee8afcf2e0711",  # qwen3_5_think
        "e84f32a23fdda276",  # qwen3_6
    }
)
# The tokens that templates name; their real texts do not matter here.
SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
NOW = datetime(2026, 1, 1)  # some templates write the date
QUESTION, ANSWER = "what the user asks", "an answer to be learned"  # nothing alike at their start
ASKED = [{"role": "user", "content": QUESTION}]
ANSWERED = [*ASKED, {"role": "assistant", "content": ANSWER}]


class Marking(StrEnum):
    """How the training script can find the assistant's words."""

    WHOLE = "whole"  # all answers in one sequence
    TURNS = "turns"  # one sequence for each answer
    NO_JINJA = "is not Jinja"
    REFUSES = "refuses a question with its answer"
    SILENT = "does not show the assistant's answer after the question"


def answers_can_be_found(subject: Subject) -> Verdict | None:
    """The base's chat template shows where the assistant speaks

    Why: `loss_on: assistant` learns what a conversation gains by each answer. A template that refuses a question with
    its answer, or leaves the answer out, has nothing to learn from; training stops at the first row.
    Fix: A base with a chat template for conversations, or rows of `text` with `loss_on: all`.
    """
    if not _asks_for_answers(subject):
        return None
    marking, said = _marking(subject.facts.chat_template or "")
    if marking in (Marking.WHOLE, Marking.TURNS):
        return None
    base = subject.file.experiment.base.model
    message = f"the chat template of `{base}` {marking}" + (f": {excerpt(said)}" if said else "")
    hint = "use a base whose chat template takes conversations, or write `text` rows and `loss_on: all`"
    return Verdict("train.loss_on", message, hint)


def history_is_read_once(subject: Subject) -> Verdict | None:
    """A conversation of several answers is one sequence

    Why: Some chat templates write earlier turns differently once another follows. TRL cannot mark the answers of those
    it does not know; our script then makes a sequence of every answer, which reads the turns before it again: tokens,
    time and price grow with the square of the turns.
    Fix: `loss_on: completion` learns the last answer alone; or rows of one answer each.
    """
    facts = subject.facts
    if not _asks_for_answers(subject) or _marking(facts.chat_template or "")[0] is not Marking.TURNS:
        return None
    counted = facts.dataset.tokens if facts.dataset and facts.dataset.exact else None
    if facts.dataset and counted and counted.sequences <= facts.dataset.training_rows:
        return None  # every row has one answer
    message = "the base's chat template rewrites earlier turns, so a row of several answers becomes as many sequences"
    if facts.dataset and counted:
        rows = facts.dataset.training_rows
        message += f": {rows:,} rows become {counted.sequences:,} sequences of {counted.total:,} tokens"
    hint = "write `loss_on: completion` to learn the last answer of each row, or keep it and pay for the repetition"
    return Verdict("train.loss_on", message, hint, Severity.WARNING)


def _asks_for_answers(subject: Subject) -> bool:
    """Our script will look for answers in conversations, as far as that is known."""
    train, data = subject.file.experiment.train, subject.facts.dataset
    if train.is_dpo or train.loss_on is not LossOn.ASSISTANT or train.script or not subject.facts.chat_template:
        return False
    return data is None or data.is_chat


@lru_cache(maxsize=256)
def _marking(text: str) -> tuple[Marking, str]:
    """How answers are found in this template, and what it says when it refuses."""
    config = json.dumps(SPECIAL)
    try:
        template = ChatTemplate({"chat_template.jinja": text, "tokenizer_config.json": config}, NOW)
    except ImportError:
        return Marking.WHOLE, ""  # without jinja2 nothing can be said
    except ValueError as error:
        return Marking.NO_JINJA, str(error).partition("not Jinja: ")[2]
    try:
        asked, answered = template.render(ASKED, None, True), template.render(ANSWERED, None, False)
    except template.refusals as error:
        return Marking.REFUSES, str(error)
    shared = next((i for i, pair in enumerate(zip(asked, answered, strict=False)) if pair[0] != pair[1]), len(asked))
    if ANSWER not in answered[shared:]:
        return Marking.SILENT, ""
    known = hashlib.sha256(text.encode()).hexdigest()[:16] in REPLACED_BY_TRL
    return (Marking.WHOLE if known or _keeps_history(template) else Marking.TURNS), ""


def _keeps_history(template: ChatTemplate) -> bool:
    """A conversation of two answers begins with the texts of its beginnings; or the template marks its answers."""
    whole: list[dict[str, Any]] = [*ANSWERED, *ASKED, {"role": "assistant", "content": "another answer"}]
    try:
        if template.marks_turns:
            return len(template.render_marked(whole, None)[1]) > 1
        text = template.render(whole, None, False)
        starts = [template.render(whole[:turn], None, turn % 2 == 1) for turn in (1, 2, 3)]
    except template.refusals:
        return True  # a template for one question and one answer: the rules about data name the rows it refuses
    return all(text.startswith(start) for start in starts)
