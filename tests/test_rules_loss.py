"""Rules about what the loss counts: each passes a good experiment and fails a bad one, on templates of real models."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run, with_script

from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.errors import Severity
from pipeline.rules.loss import REPLACED_BY_TRL, Marking, _marking, answers_can_be_found, history_is_read_once

TEMPLATES = Path(sysconfig.get_paths()["purelib"]) / "trl/chat_templates"
RULES = (answers_can_be_found, history_is_read_once)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<assistant>{% endif %}"
# The last answer alone keeps its mark, so a longer conversation does not begin with the shorter one.
REWRITES = "{% for m in messages %}<{{ m.role }}>{{ '*' if loop.last }}{{ m.content }}</>{% endfor %}"
TEXT = changed("learning_rate: 2e-4", "learning_rate: 2e-4\n  loss_on: assistant")
LOSS = place(TEXT, "loss_on: assistant")
LOSS = (LOSS[0], LOSS[1] + len("loss_on: "))


def rows(sequences: int, *, exact: bool = True, chat: bool = True) -> DatasetFacts:
    tokens = TokenFacts(sequences=sequences, total=123_456, trained=5, longest=900)
    return DatasetFacts("rows.jsonl", 100, 100, "messages", is_chat=chat, tokens=tokens, exact=exact)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("template", [PLAIN, None, ""])
def test_ok(rule, template: str | None) -> None:
    assert run(rule, TEXT, chat_template=template) is None


@pytest.mark.parametrize("rule", RULES)
def test_only_where_our_script_looks_for_answers(rule) -> None:
    for text in (TEXT.replace("loss_on: assistant", "loss_on: completion"), with_script()):
        assert run(rule, text, chat_template=REWRITES) is None
        assert run(rule, text, chat_template="{{ raise_exception('no') }}") is None
    assert run(rule, TEXT, chat_template="{% broken", dataset=rows(100, chat=False)) is None


@pytest.mark.parametrize("name", ["gemma3", "gemma4_v5", "llama3_1", "llama3_2", "qwen3_training", "qwen3"])
def test_known_templates_cost_nothing(name: str) -> None:
    """Gemma 4 and Llama 3.1 are unknown to TRL and still fine; Qwen 3 rewrites history and TRL replaces it."""
    for rule in RULES:
        assert run(rule, TEXT, chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in", "is not Jinja"),
        ("{{ raise_exception('only for completions') }}", "refuses a question with its answer: only for completions"),
        ("{{ messages[0].content }}", "does not show the assistant's answer after the question"),
    ],
)
def test_no_answer_can_be_found(template: str, message: str) -> None:
    finding = run(answers_can_be_found, TEXT, chat_template=template)
    expect(finding, message, "write `text` rows and `loss_on: all`", LOSS)
    assert finding is not None
    assert finding.severity is Severity.ERROR
    assert run(history_is_read_once, TEXT, chat_template=template) is None


def test_history_that_is_rewritten() -> None:
    finding = run(history_is_read_once, TEXT, chat_template=REWRITES)
    expect(finding, "rewrites earlier turns", "write `loss_on: completion`", LOSS)
    assert finding is not None
    assert finding.severity is Severity.WARNING
    qwen = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    assert run(history_is_read_once, TEXT, chat_template=qwen + "\n") is not None  # no longer the text that TRL knows


def test_counted_rows_say_what_it_costs() -> None:
    finding = run(history_is_read_once, TEXT, chat_template=REWRITES, dataset=rows(340))
    assert finding is not None
    assert "100 rows become 340 sequences of 123,456 tokens" in finding.message
    assert run(history_is_read_once, TEXT, chat_template=REWRITES, dataset=rows(100)) is None  # one answer each
    assert run(history_is_read_once, TEXT, chat_template=REWRITES, dataset=rows(100, exact=False)) is not None


def test_the_table_is_what_the_installed_trl_replaces() -> None:
    """Every template with a marked copy beside it that would otherwise become one sequence for each answer."""
    replaced = set()
    for marked in TEMPLATES.glob("*_training.jinja"):
        text = (TEMPLATES / marked.name.replace("_training", "")).read_text(encoding="utf-8")
        if _marking(text + "{# not the known text #}")[0] is Marking.TURNS:
            replaced.add(hashlib.sha256(text.encode()).hexdigest()[:16])
        assert _marking(text)[0] is not Marking.TURNS, marked.name
    assert replaced == REPLACED_BY_TRL


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_templates_that_want_lists_of_parts(name: str) -> None:
    """Rows hold text; these templates show text only inside a list of parts."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    assert run(answers_can_be_found, TEXT, chat_template=template) is not None


def test_the_good_experiment_passes() -> None:
    for rule in RULES:
        assert run(rule, GOOD, chat_template=PLAIN) is None
