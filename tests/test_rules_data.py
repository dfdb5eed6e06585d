"""Every DAT rule: rows that pass, rows that fail, with the place, the message and the edit that mends them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from examples import GOOD, changed

from pipeline.dataset import read_dataset
from pipeline.dataset_facts import DatasetFacts, Issues, Lines, Problem, RowIssue, TokenFacts
from pipeline.errors import Severity
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.rules import data
from pipeline.rules.rule import Subject, Verdict
from pipeline.settings import Settings

TOKENS = TokenFacts(sequences=950, total=950_000, trained=400_000, longest=1900)
FINE = DatasetFacts("coach.jsonl", 1000, 950, "messages", is_chat=True, tokens=TOKENS, exact=True, has_template=True)
TEXT = changed("dataset: acme/coach", "dataset: data/coach.jsonl", changed("  revision: 5d2\n", ""))
TWO_FILES = changed("fraction: 0.05", "dataset: data/held.jsonl", TEXT)
HELD = replace(FINE, path="held.jsonl", rows=40, training_rows=40)
Rule = Callable[[Subject], Verdict | None]
RULES = (
    data.rows_are_json,
    data.rows_have_a_format,
    data.rows_share_a_format,
    data.rows_have_roles,
    data.rows_have_content,
    data.base_has_a_chat_template,
    data.rows_fit_max_length,
    data.rows_keep_their_loss,
    data.loss_has_turns,
    data.answers_differ,
    data.rows_are_unique,
    data.eval_rows_are_unseen,
    data.rows_fill_a_batch,
    data.split_leaves_rows,
)
PAIRS = changed("learning_rate: 2e-4", "learning_rate: 5e-6", changed("method: qlora", "method: dpo", TEXT))


@dataclass(frozen=True)
class WithDataset(Facts):
    dataset: DatasetFacts | None = None


def verdict(rule: Rule, facts: DatasetFacts | None, text: str = TEXT) -> Verdict | None:
    file = replace(parse_experiment(text), path=Path("experiments/coach.yaml"))
    return rule(Subject(file, WithDataset(dataset=facts), Settings()))


def issue(problem: Problem, message: str = "broken", count: int = 1, hint: str = "mend it") -> tuple[Issues, ...]:
    return (Issues(problem, count, tuple(RowIssue(3 + i, message, hint) for i in range(min(count, 5)))),)


def counted(**changes: Any) -> DatasetFacts:
    return replace(FINE, tokens=replace(TOKENS, **changes))


BAD = [
    (data.rows_are_json, replace(FINE, issues=issue(Problem.JSON)), TEXT, "data.dataset", "`coach.jsonl:3`: broken"),
    (
        data.rows_have_content,
        replace(FINE, issues=issue(Problem.CONTENT, count=9)),
        TEXT,
        "data.dataset",
        "broken (9 rows in all: also 4, 5, 6, 7 and 4 more)",
    ),
    (
        data.rows_have_a_format,
        replace(FINE, issues=issue(Problem.FORMAT, count=2)),
        TEXT,
        "data.dataset",
        "`coach.jsonl:3`: broken (2 rows in all: also 4)",
    ),
    (
        data.rows_have_a_format,
        replace(FINE, rows=0, training_rows=0, tokens=None),
        TEXT,
        "data.dataset",
        "`coach.jsonl` holds no rows",
    ),
    (data.rows_share_a_format, replace(FINE, issues=issue(Problem.MIXED)), TEXT, "data.dataset", "broken"),
    (data.rows_have_roles, replace(FINE, issues=issue(Problem.ROLES)), TEXT, "data.dataset", "broken"),
    (data.rows_have_roles, replace(FINE, issues=issue(Problem.TEMPLATE)), TEXT, "data.dataset", "broken"),
    (
        data.rows_have_roles,
        replace(FINE, estimated="no tokenizer", not_alternating=Lines(1, (4,))),
        TEXT,
        "data.dataset",
        "`coach.jsonl:4` is not in turns of user and assistant",
    ),
    (
        data.rows_have_content,
        replace(FINE, eval_file=replace(HELD, issues=issue(Problem.CONTENT))),
        TWO_FILES,
        "data.eval.dataset",
        "`held.jsonl:3`: broken",
    ),
    (
        data.base_has_a_chat_template,
        replace(FINE, has_template=False),
        TEXT,
        "base.model",
        "the base has no chat template",
    ),
    (
        data.rows_fit_max_length,
        counted(over_limit=Lines(7, (1, 2, 3, 4, 5)), lost=50_000, longest=5000),
        TEXT,
        "train.max_length",
        "7 rows of `coach.jsonl` (1, 2, 3, 4, 5 and 2 more) are longer than `max_length: 2048`: "
        "50,000 tokens are lost (5 %)",
    ),
    (
        data.rows_fit_max_length,
        counted(over_limit=Lines(900, (1,)), lost=2_000_000, longest=9000),
        TEXT,
        "train.max_length",
        "2,000,000 tokens are lost (68 %)",
    ),
    (
        data.rows_keep_their_loss,
        counted(dropped=Lines(1, (8,)), longest=5000),
        TEXT,
        "train.max_length",
        "`coach.jsonl:8` is dropped: no token with a loss (`loss_on: assistant`) is left within `max_length: 2048`",
    ),
    (
        data.rows_keep_their_loss,
        counted(dropped=Lines(950, (1, 2)), longest=5000, sequences=0),
        TEXT,
        "train.max_length",
        "950 rows of `coach.jsonl` (1, 2 and 948 more) are dropped",
    ),
    (
        data.loss_has_turns,
        replace(FINE, format="text", is_chat=False),
        TEXT,
        "train.loss_on",
        "`loss_on: assistant` cannot be honoured",
    ),
    (
        data.rows_have_a_format,
        replace(FINE, rows=0, training_rows=0, tokens=None),
        PAIRS,
        "data.dataset",
        "`coach.jsonl` holds no rows",
    ),
    (
        data.rows_keep_their_loss,
        counted(dropped=Lines(1, (8,)), longest=5000),
        PAIRS,
        "train.max_length",
        "`coach.jsonl:8` is dropped: an answer of the pair has no token left within `max_length: 2048`",
    ),
    (
        data.answers_differ,
        replace(FINE, same=Lines(2, (4, 9))),
        PAIRS,
        "data.dataset",
        "2 rows of `coach.jsonl` (4, 9) are left out: `chosen` and `rejected` are the same",
    ),
    (
        data.answers_differ,
        replace(FINE, eval_file=replace(HELD, same=Lines(40, (1, 2, 3, 4, 5)))),
        TWO_FILES,
        "data.eval.dataset",
        "40 rows of `held.jsonl` (1, 2, 3, 4, 5 and 35 more) are left out",
    ),
    (
        data.rows_are_unique,
        replace(FINE, duplicates=Lines(2, (4, 9))),
        TEXT,
        "data.dataset",
        "2 rows of `coach.jsonl` (4, 9) are the same as an earlier row",
    ),
    (
        data.eval_rows_are_unseen,
        replace(FINE, eval_file=HELD, leaked=Lines(1, (6,))),
        TWO_FILES,
        "data.eval.dataset",
        "`coach.jsonl:6` is also in `held.jsonl`",
    ),
    (
        data.rows_fill_a_batch,
        replace(FINE, training_rows=5, tokens=None),
        TEXT,
        "train.gradient_accumulation",
        "`coach.jsonl` gives 5 training rows, a step takes 8 (`batch_size: 1` x `gradient_accumulation: 8`)",
    ),
    (
        data.rows_fill_a_batch,
        replace(FINE, training_rows=5, tokens=None),
        changed("  epochs: 3", "  epochs: 3\n  batch_size: 16", TEXT),
        "train.batch_size",
        "a step takes 128",
    ),
    (
        data.rows_fill_a_batch,
        counted(total=10_000),
        changed("  epochs: 3", "  epochs: 3\n  packing: true", TEXT),
        "train.gradient_accumulation",
        "gives 4 packed training rows",
    ),
    (
        data.split_leaves_rows,
        replace(FINE, rows=1, training_rows=0, tokens=None),
        TEXT,
        "data.eval.fraction",
        "`fraction: 0.05` of 1 rows leaves nothing to train on",
    ),
    (
        data.split_leaves_rows,
        FINE,
        changed("fraction: 0.05", "split: validation", TEXT),
        "data.eval.split",
        "`split: validation`, but `coach.jsonl` is one file without splits",
    ),
]
WARNINGS = {"is not in turns", "(5 %)", "is dropped", "same as an earlier row", "(4, 9) are left out"}


@pytest.mark.parametrize(("rule", "facts", "text", "key", "message"), BAD, ids=[f"{b[0].__name__}" for b in BAD])
def test_bad(rule: Rule, facts: DatasetFacts, text: str, key: str, message: str) -> None:
    found = verdict(rule, facts, text)
    assert found is not None
    assert found.key == key
    assert message in found.message
    assert found.hint
    warning = any(part in found.message for part in WARNINGS)
    assert found.severity is (Severity.WARNING if warning else Severity.ERROR)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("facts", [None, FINE, replace(FINE, eval_file=HELD)], ids=["unknown", "one", "two"])
def test_ok(rule: Rule, facts: DatasetFacts | None) -> None:
    assert verdict(rule, facts) is None
    assert verdict(rule, facts, GOOD) is None


def test_every_rule_has_a_bad_case_and_says_why_and_what_to_do() -> None:
    assert {row[0] for row in BAD} == set(RULES)
    for rule in RULES:
        assert "Why:" in (rule.__doc__ or "")
        assert "Fix:" in (rule.__doc__ or "")


def test_hints_are_edits_of_the_callers_values() -> None:
    found = verdict(data.rows_fit_max_length, counted(over_limit=Lines(1, (4,)), lost=9, longest=5000))
    assert found is not None
    assert found.hint == "write `max_length: 5000`, or split those rows"
    found = verdict(data.rows_fill_a_batch, replace(FINE, training_rows=5, tokens=None))
    assert found is not None
    assert found.hint == "write `gradient_accumulation: 5`"
    mended = changed("  epochs: 3", "  epochs: 3\n  gradient_accumulation: 5", TEXT)
    assert verdict(data.rows_fill_a_batch, replace(FINE, training_rows=5, tokens=None), mended) is None
    found = verdict(data.eval_rows_are_unseen, replace(FINE, eval_file=HELD, leaked=Lines(2, (6, 7))), TWO_FILES)
    assert found is not None
    assert found.hint == "remove those rows from `coach.jsonl`"


def test_an_estimate_is_called_one() -> None:
    facts = replace(counted(over_limit=Lines(1, (4,)), lost=9, longest=5000), estimated="`tokenizers` is not installed")
    found = verdict(data.rows_fit_max_length, facts)
    assert found is not None
    assert found.message.endswith("(0 %, estimated: `tokenizers` is not installed)")


def test_pairs_from_a_file_to_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pair = '{"prompt": "%d?", "chosen": "Yes.", "rejected": "No."}'
    lines = [pair % 1, '{"messages": [{"role": "user", "content": "Hi"}]}', pair.replace("No.", "Yes.") % 3]
    lines += [pair.replace("Yes.", " ") % 4, pair % 1]
    (tmp_path / "data/coach.jsonl").write_text("\n".join(lines), encoding="utf-8")
    facts = read_dataset(parse_experiment(PAIRS).experiment, tmp_path)
    found = {rule: one for rule in RULES if (one := verdict(rule, facts, PAIRS))}
    assert {rule.__name__: one.message.partition("`: ")[2] for rule, one in found.items()} == {
        "rows_have_a_format": "no pair of answers: the row has `messages`",
        "rows_have_content": "`chosen` is empty",
        "answers_differ": "",
        "rows_are_unique": "",
    }
    assert found[data.answers_differ].message.startswith("`coach.jsonl:3` is left out")
    assert found[data.rows_are_unique].message.startswith("`coach.jsonl:5` is the same")


def test_from_a_file_to_the_verdict(tmp_path: Path) -> None:
    """The front door: a file with one of each fault, read and judged."""
    (tmp_path / "data").mkdir()
    good = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "Yes."}]}'
    lines = [good % 1, "{", '{"instruction": "x"}', '{"text": "x"}', good.replace("assistant", "bot") % 2]
    lines += [good.replace("Yes.", "") % 3, good % 1]
    (tmp_path / "data/coach.jsonl").write_text("\n".join(lines), encoding="utf-8")
    facts = read_dataset(parse_experiment(TEXT).experiment, tmp_path)
    found = {rule: verdict(rule, facts) for rule in RULES}
    shown = [one.message.partition(":")[2].split("`")[0] for one in found.values() if one]
    assert shown[:5] == ["2", "3", "4", "5", "6"]
    assert [rule for rule in RULES if found[rule]][5:] == [data.rows_are_unique]
