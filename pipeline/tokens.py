"""Tokens of data rows, counted with the base's own tokenizer and chat template, or estimated. Opens no file.

Needs `tokenizers` and `jinja2`; without them, or without the base's files, a count is characters over four and says so.
What it labels agrees with `encode_rows` of scripts/train_sft.py. One difference remains: for chat templates that TRL
knows by their text the script uses TRL's marked copy, which may label a turn's closing newline differently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from pipeline.chat_template import BadTemplate, ChatTemplate, Spent
from pipeline.dataset_facts import Lines, TokenFacts
from pipeline.rows import DataRow

CHARACTERS_PER_TOKEN = 4  # English text under a vocabulary of 30,000 to 260,000
TOKENS_PER_MESSAGE = 4  # role and markers of an average chat template
BATCH = 64  # rows tokenized at once


@dataclass(frozen=True)
class Counted:
    """One sequence: its tokens, and the stretches of them that carry loss."""

    length: int
    spans: tuple[tuple[int, int], ...]

    def trained(self, limit: int) -> int:
        """Tokens in the loss after a cut at `limit`. The first token of a sequence is never predicted."""
        return sum(max(0, min(end, limit) - max(start, 1)) for start, end in self.spans)


@dataclass(frozen=True)
class RowCount:
    """The sequences of one row, or why the chat template refuses it. `pair`: they are learned from together."""

    sequences: tuple[Counted, ...] = ()
    fault: str = ""
    pair: bool = False

    @property
    def examples(self) -> list[tuple[Counted, ...]]:
        """What the loss is computed on: each sequence, or both together."""
        return [self.sequences] if self.pair else [(one,) for one in self.sequences]


class Counter(Protocol):
    """Counts rows; `estimated` is empty, or says why the counts are not exact. `broken`: the base is at fault."""

    estimated: str
    broken: bool

    def count(self, rows: Sequence[DataRow], loss_on: str) -> list[RowCount]:
        """One count per row, in their order, or of the first ones."""


class RoughCounter:
    """Characters over four."""

    def __init__(self, estimated: str, broken: bool = False) -> None:
        self.estimated = estimated
        self.broken = broken

    def count(self, rows: Sequence[DataRow], loss_on: str) -> list[RowCount]:
        """One count per row, in their order."""
        return [RowCount((self._row(row, loss_on),)) for row in rows]

    def _row(self, row: DataRow, loss_on: str) -> Counted:
        parts = [str(m["content"]) for m in row.messages] if row.is_chat else [row.prompt, row.completion]
        extra = TOKENS_PER_MESSAGE if row.is_chat else 0
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + max(len(part) // CHARACTERS_PER_TOKEN, bool(part)) + extra)  # `No.` is a token too
        if loss_on == "all":
            return Counted(ends[-1], ((0, ends[-1]),))
        turns = row.assistant_turns if row.is_chat else [1]
        if loss_on == "completion":
            first = len(row.prompt) if row.is_chat and row.prompt else turns[-1]
            return Counted(ends[-1], ((ends[first], ends[-1]),))
        return Counted(ends[-1], tuple((ends[turn], ends[turn + 1]) for turn in turns))


class ExactCounter:
    """The base's tokenizer and chat template, as transformers runs them."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, eos: str) -> None:
        self.estimated, self.broken = "", False
        self.tokenizer, self.template, self.eos = tokenizer, template, eos
        self.marked = template.marks_turns and self._marks_can_be_used()

    def count(self, rows: Sequence[DataRow], loss_on: str) -> list[RowCount]:
        """One count per row, in their order; of the first rows alone where the template's work for all is too much."""
        counts: list[RowCount] = []
        self.template.renew()
        for start in range(0, len(rows), BATCH):
            try:
                counts += self._batch(rows[start : start + BATCH], loss_on)
            except Spent:
                break
        return counts

    def _batch(self, rows: Sequence[DataRow], loss_on: str) -> list[RowCount]:
        plans = [self._plan(row, loss_on) for row in rows]
        # A chat template writes its own special tokens; plain text gets those of the tokenizer.
        texts = [text for plan in plans for text in plan.texts]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=not rows[0].is_chat))
        counts = []
        for plan in plans:
            sequences = plan.resolve([next(encoded) for _ in plan.texts]) if not plan.fault else ()
            counts.append(RowCount(tuple(sequences), plan.fault))
        return counts

    def _plan(self, row: DataRow, loss_on: str) -> "_Plan":
        """The texts to tokenize for a row, and what their tokens mean."""
        if not row.is_chat:
            return self._plan_text(row, loss_on)
        try:
            return self._plan_chat(row, loss_on)
        except self.template.refusals as error:
            return _Plan([], lambda _: [], str(error) or type(error).__name__)

    def _plan_text(self, row: DataRow, loss_on: str) -> "_Plan":
        text = row.prompt + row.completion
        text += "" if row.completion.endswith(self.eos) else self.eos
        if loss_on == "all":
            return _Plan([text], _everything)
        return _Plan([text, row.prompt], _after_prompt)

    def _plan_chat(self, row: DataRow, loss_on: str) -> "_Plan":
        def text(messages: list[dict[str, Any]], prompt: bool = False) -> str:
            return self.template.render(messages, row.tools, prompt) if messages else ""

        messages = row.messages
        if loss_on == "all":
            return _Plan([text(messages)], _everything)
        if loss_on == "completion" and row.prompt:
            return _Plan([text(messages), text(row.prompt, prompt=True)], _after_prompt)
        if loss_on == "assistant" and self.marked:
            rendered, marks = self.template.render_marked(messages, row.tools)
            return _Plan([rendered], lambda done: [_marked(done[0], marks)])
        turns = row.assistant_turns if loss_on == "assistant" else row.assistant_turns[-1:]
        pairs = [(text(messages[:turn], prompt=True), text(messages[: turn + 1])) for turn in turns]
        return _Plan([side for pair in pairs for side in pair], _turns)

    def _marks_can_be_used(self) -> bool:
        """TRL uses a template's own marks if they hold the token that ends a turn, and tools do not change history."""
        said = [{"role": role, "content": "dummy"} for role in ("user", "assistant", "user")]
        try:
            text, marks = self.template.render_marked(said, None)
        except self.template.refusals:
            return False
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        spans = _marked(encoded, marks).spans
        ids = [encoded.ids[index] for start, end in spans for index in range(start, end)]
        last = next((i for i in reversed(ids) if self.tokenizer.decode([i], skip_special_tokens=False).strip()), None)
        return last in self.tokenizer.get_added_tokens_decoder() and self._tools_keep_history()

    def _tools_keep_history(self) -> bool:
        """False for a template that can show tools and then writes an earlier turn differently."""
        words = {"name": "sought_name", "arguments": {"sought_key": "sought_value"}}
        asked: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
        asked += [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": words}]}]
        told = [*asked, {"role": "tool", "name": "sought_name", "content": "sought_answer"}]
        try:
            before, after = self.template.render(asked, None, False), self.template.render(told, None, True)
        except self.template.refusals:
            return True
        shown = all(word in after for word in ("sought_name", "sought_key", "sought_value", "sought_answer"))
        left, right = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after))
        return not shown or bool(right[: len(left)] == left)


@dataclass(frozen=True)
class _Plan:
    texts: list[str]
    resolve: Callable[[list[Any]], list[Counted]]
    fault: str = ""


def _everything(encoded: list[Any]) -> list[Counted]:
    length = len(encoded[0])
    return [Counted(length, ((0, length),))]


def _after_prompt(encoded: list[Any]) -> list[Counted]:
    whole, prompt = encoded[0].ids, encoded[1].ids
    return [Counted(len(whole), ((_common_prefix(prompt, whole), len(whole)),))]


def _turns(encoded: list[Any]) -> list[Counted]:
    """One sequence with all turns where every prompt begins the whole conversation; otherwise one for each turn."""
    ids = [one.ids for one in encoded]
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    whole = pairs[-1][1]
    if all(whole[: len(upto)] == upto and upto[: len(prompt)] == prompt for prompt, upto in pairs):
        return [Counted(len(whole), tuple((len(prompt), len(upto)) for prompt, upto in pairs))]
    return [Counted(len(upto), ((_common_prefix(prompt, upto), len(upto)),)) for prompt, upto in pairs]


def _marked(encoded: Any, marks: list[tuple[int, int]]) -> Counted:
    """Character stretches as token stretches."""
    spans = []
    for start, end in marks:
        first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
        if first is None:
            break
        spans.append((first, last + 1 if last else len(encoded)))
    return Counted(len(encoded), tuple(spans))


def _common_prefix(left: list[int], right: list[int]) -> int:
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


def make_counter(files: Mapping[str, str], now: datetime) -> Counter:
    """A counter from the texts of a base's `FILES`; `now` is the date that some chat templates write."""
    if "tokenizer.json" not in files:
        return RoughCounter("the base's tokenizer is not at hand")
    try:
        from tokenizers import Tokenizer

        template = ChatTemplate(files, now)
    except ImportError as error:
        return RoughCounter(f"`{error.name}` is not installed")
    except ValueError as error:
        return RoughCounter(str(error), broken=isinstance(error, BadTemplate))
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # what the binding raises for a broken file has no class of its own
        return RoughCounter(f"the base's tokenizer.json cannot be read: {error}", broken=True)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ExactCounter(tokenizer, template, template.special.get("eos_token", ""))


def token_facts(counted: Sequence[tuple[int, RowCount]], limit: int) -> TokenFacts:
    """Statistics of counted rows, each with its line, after a cut at `limit`; dropped examples give nothing."""
    examples = [(line, example) for line, count in counted for example in count.examples]
    kept = [example for _, example in examples if all(one.trained(limit) for one in example)]
    total = sum(min(one.length, limit) for example in kept for one in example)
    lengths = [(line, one.length) for line, example in examples for one in example]
    return TokenFacts(
        sequences=len(kept),
        total=total,
        trained=sum(one.trained(limit) for example in kept for one in example),
        longest=max(length for _, length in lengths),
        lost=sum(length for _, length in lengths) - total,
        over_limit=Lines.of([line for line, length in lengths if length > limit]),
        dropped=Lines.of([line for line, example in examples if not all(one.trained(limit) for one in example)]),
    )


def count_pairs(counter: Counter, rows: Sequence[DataRow]) -> list[RowCount]:
    """One count per pair, of both its answers, in their order, or of the first ones."""
    both = counter.count([one for row in rows for one in (row, row.with_rejected())], "completion")
    return [
        RowCount((*chosen.sequences, *rejected.sequences), chosen.fault or rejected.fault, pair=True)
        for chosen, rejected in zip(both[::2], both[1::2], strict=False)
    ]


def scaled(facts: TokenFacts, by: float) -> TokenFacts:
    """The statistics of a sample, for `by` times as many rows."""

    def lines(found: Lines) -> Lines:
        return Lines(round(found.count * by), found.first)

    return TokenFacts(
        sequences=round(facts.sequences * by),
        total=round(facts.total * by),
        trained=round(facts.trained * by),
        longest=facts.longest,
        lost=round(facts.lost * by),
        over_limit=lines(facts.over_limit),
        dropped=lines(facts.dropped),
    )
