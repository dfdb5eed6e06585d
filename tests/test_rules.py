"""Every rule: one experiment that passes, one that fails, with its place, message and hint."""

from dataclasses import replace
from pathlib import Path

import pytest
from examples import GOOD, changed

from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.errors import Finding
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.rules import ALL_RULES, Subject
from pipeline.settings import Settings
from pipeline.traced import TracedMemory

FACTS = Facts(shape=CATALOGUE["google/gemma-3-12b-it"])
HUGE = Facts(shape=replace(CATALOGUE["google/gemma-3-27b-it"], layers=200))
COUNTED = TokenFacts(1000, 1_000_000, 500_000, 2048)
ROWS = DatasetFacts("rows.jsonl", 1000, 1000, "messages", is_chat=True, tokens=COUNTED)
SETTINGS = Settings(namespaces=("acme",), max_usd_per_run=50)


def finding_of(rule_id: str, text: str, facts: Facts = FACTS, shown: str = "experiments/coach.yaml") -> Finding | None:
    file = replace(parse_experiment(text, shown), path=Path(shown))
    rule = next(rule for rule in ALL_RULES if rule.id == rule_id)
    return rule.run(Subject(file, facts, SETTINGS))


BAD = [
    (
        "EXP002",
        "name: coach",
        "name: coach-two",
        FACTS,
        "`name: coach-two` in a file called `coach`",
        "write `name: coach`",
    ),
    ("EXP003", ", revision: 96b6f1e", "", FACTS, "`google/gemma-3-12b-it` is not pinned", "add `revision: <commit>`"),
    (
        "EXP003",
        "  flavor: a10g-large\n  timeout: 4h\n",
        "  backend: mlx\n  mlx: {base: mlx-community/gemma-3-12b-it-4bit}\n",
        FACTS,
        "`mlx-community/gemma-3-12b-it-4bit` is not pinned",
        "under `train.mlx`",
    ),
    ("EXP003", "  revision: 5d2\n", "", FACTS, "`acme/coach` is not pinned", "under `data`"),
    (
        "EXP009",
        "  eval: {fraction: 0.05}\n",
        "",
        FACTS,
        "`held-out loss below 1.2` will not be measured: no rows are held out",
        "add `eval: {fraction: 0.05}` under `data`",
    ),
    (
        "EXP009",
        "falls below 1.2",
        "and training perplexity below 3",
        FACTS,
        "`training perplexity below 3` will not be measured: no stage gives it",
        "name a held-out one instead",
    ),
    (
        "EXP009",
        "^hypothesis: (.*)\n((?:.*\n)*?)evaluate: .*\n",
        r"hypothesis: the loss falls by 10 %\n\2",
        FACTS,
        "`held-out loss falls by 10 %` will not be measured: nothing compares with the base",
        "add `evaluate: {timeout: 1h}`",
    ),
    (
        "EXP009",
        "held-out loss falls below 1.2",
        "the reward margin rises above 0.5",
        FACTS,
        "`held-out reward margin above 0.5` will not be measured: only `method: dpo` has rewards",
        "name a held-out loss instead",
    ),
    (
        "EXP009",
        "^hypothesis: (.*)\n((?:.*\n)*?)  method: qlora\n((?:.*\n)*?)  learning_rate: 2e-4",
        r"hypothesis: the loss falls by 10 %\n\2  method: dpo\n\3  learning_rate: 5e-6",
        FACTS,
        "`held-out loss falls by 10 %` will not be measured: no stage gives it after `method: dpo`",
        "name a reward margin or accuracy",
    ),
    (
        "EXP004",
        "dataset: acme/coach",
        "dataset: data/x.jsonl",
        Facts(missing=("data/x.jsonl",)),
        "`data/x.jsonl` is no file of this repository",
        "commit that file",
    ),
    (
        "HUB001",
        "acme/coach-12b",
        "acne/coach-12b",
        FACTS,
        "namespace `acne` is not allowed",
        "write `repo: acme/coach-12b`",
    ),
    ("MEM001", "flavor: a10g-large", "flavor: a10-large", FACTS, "no flavor `a10-large`", "write `flavor: a10g-large`"),
    ("MEM001", "flavor: cpu-xl", "flavor: cpu", FACTS, "there is no flavor `cpu`", "write `flavor: cpu-"),
    ("MEM002", "max_length: 2048", "max_length: 16384", FACTS, "training may need", "write `flavor: "),
    ("MEM002", "max_length: 2048", "max_length: 65536", FACTS, "training needs", "write `flavor: "),
    (
        "MEM006",
        "flavor: a10g-large",
        "flavor: l40sx8",
        HUGE,
        "is not shared: it needs",
        "write `flavor: a100-large` or `method: lora`",
    ),
    (
        "MEM007",
        "flavor: a10g-large",
        "batch_size: 3\n  gradient_accumulation: 2\n  flavor: l4x4",
        FACTS,
        "`gradient_accumulation: 2` batches cannot be shared evenly by the 4 GPUs of `l4x4`",
        "write `gradient_accumulation: 4`",
    ),
    (
        "MEM007",
        "flavor: a10g-large",
        "batch_size: 4\n  gradient_accumulation: 1\n  flavor: a10g-largex2",
        FACTS,
        "by the 2 GPUs of `a10g-largex2`",
        "write `gradient_accumulation: 2` and `batch_size: 2`: a step sees the same 4 rows",
    ),
    (
        "MEM007",
        "flavor: a10g-large",
        "gradient_accumulation: 2\n  nodes: 2\n  flavor: a100x8",
        FACTS,
        "cannot be shared evenly by the 16 GPUs of 2 `a100x8`",
        "write `gradient_accumulation: 16`",
    ),
    ("MEM008", "flavor: cpu-xl", "flavor: l40sx4", FACTS, "uses one GPU, `l40sx4` has 4", "write `flavor: l40sx1`"),
    (
        "MEM010",
        "max_length: 2048",
        "batch_size: auto",
        Facts(),
        "needs the sizes of `google/gemma-3-12b-it`",
        "write `batch_size: 1`, or add `--online`",
    ),
    (
        "MEM010",
        "max_length: 2048",
        "batch_size: auto\n  script: my/train.py",
        FACTS,
        "not known for `my/train.py`",
        "`batch_size: 1`",
    ),
    (
        "TIM001",
        "max_usd: 10",
        "max_usd: 5",
        FACTS,
        "costs $8.20, the budget is $5.00",
        "write `timeout: 112m` under `train`",
    ),
    (
        "TIM003",
        "timeout: 4h",
        "timeout: 1h",
        Facts(shape=CATALOGUE["google/gemma-3-12b-it"], dataset=ROWS),
        "`train` takes about ",
        "under `train`",
    ),
    ("TIM002", "max_usd: 10", "max_usd: 100", FACTS, "$100.00 is above this repository's cap", "write `max_usd: 50`"),
]


@pytest.mark.parametrize(("rule", "pattern", "replacement", "facts", "message", "hint"), BAD)
def test_bad(rule: str, pattern: str, replacement: str, facts: Facts, message: str, hint: str) -> None:
    finding = finding_of(rule, changed(pattern, replacement), facts)
    assert finding is not None
    assert finding.rule == rule
    assert message in finding.message
    assert hint in finding.hint
    assert finding.at.line > 0


@pytest.mark.parametrize("rule", [rule.id for rule in ALL_RULES])
def test_ok(rule: str) -> None:
    assert finding_of(rule, GOOD) is None


def test_every_rule_has_a_bad_case_and_a_page() -> None:
    here = {rule.id for rule in ALL_RULES if rule.check.__module__.endswith((".experiment", ".hardware"))}
    assert {row[0] for row in BAD} == here
    for rule in ALL_RULES:
        text = rule.check.__doc__ or ""
        assert "Why:" in text, rule.id
        assert "Fix:" in text, rule.id


def test_the_timeout_of_the_budget_hint_is_accepted() -> None:
    assert finding_of("TIM001", changed("max_usd: 10", "max_usd: 5", changed("timeout: 4h", "timeout: 112m"))) is None


def test_the_flavor_of_the_memory_hint_is_accepted() -> None:
    finding = finding_of("MEM002", changed("max_length: 2048", "max_length: 16384"))
    assert finding is not None
    flavor = finding.hint.split("`")[1].removeprefix("flavor: ")
    assert finding_of("MEM002", changed("a10g-large", flavor, changed("max_length: 2048", "max_length: 16384"))) is None


def test_the_timeout_of_the_duration_hint_is_accepted() -> None:
    facts = replace(FACTS, dataset=ROWS)
    finding = finding_of("TIM003", changed("timeout: 4h", "timeout: 1h"), facts)
    assert finding is not None
    timeout = finding.hint.split("`")[1]
    assert finding_of("TIM003", changed("timeout: 4h", timeout), facts) is None


TRACED = TracedMemory(9.0, 7.2, 0.3, 0.2, 0.7, 0.0, 0.6, "backward", 48, (4, 5, 5), fragmentation=0.03, context=0.55)
NOT_BY_CLOSED_FORM = ("max_length: 2048", "max_length: 65536")


@pytest.mark.parametrize(
    ("changes", "allocated", "severity", "message"),
    [
        ((), 9.0, None, ""),
        (("max_length: 2048", "max_length: 16384"), 19.4, None, ""),  # the closed form is not sure, the trace is
        (
            NOT_BY_CLOSED_FORM,
            20.0,
            "warning",
            "by the closed form training needs 61.0 to 74.6 GiB, by the trace 21.2 GiB",
        ),
        ((), 21.0, "error", "training needs 22.2 GiB (traced), `a10g-large` has 22.06"),
        (NOT_BY_CLOSED_FORM, 200.0, "error", "training needs 206.6 GiB (traced)"),
    ],
)
def test_a_trace_decides_about_memory(
    changes: tuple[str, str], allocated: float, severity: str | None, message: str
) -> None:
    facts = replace(FACTS, traced=replace(TRACED, allocated=allocated))
    finding = finding_of("MEM002", changed(*changes) if changes else GOOD, facts)
    assert (finding and finding.severity) == severity
    if finding is not None:
        assert message in finding.message
        larger = "a smaller `max_length`" if allocated > 100 else "`flavor: l40sx1`, or a smaller `max_length`"
        assert finding.hint == (f"write {larger}" if severity == "error" else finding.hint)


def test_a_trace_decides_where_no_closed_form_is_known() -> None:
    facts = replace(FACTS, shape=None, traced=replace(TRACED, allocated=29.97))
    finding = finding_of("MEM002", GOOD, facts)
    assert finding is not None
    assert "training needs 31.4 GiB (traced)" in finding.message
