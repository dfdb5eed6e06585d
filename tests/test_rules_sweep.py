"""Rules about a sweep as a whole: each passes a good sweep and fails a bad one."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run
from test_plan_comment import COUNTED, ROOMY

from pipeline.errors import Severity
from pipeline.rules.sweep import lanes_have_gpus, limit_leaves_variants

SWEEP = "sweep:\n  grid: {learning_rate: [1e-4, 2e-4], lora.r: [16, 64]}\n"
FOUR = changed("a10g-large", "a10g-largex4", ROOMY) + SWEEP


@pytest.mark.parametrize("rule", [lanes_have_gpus, limit_leaves_variants])
def test_ok(rule) -> None:
    for text in (GOOD, ROOMY + SWEEP, FOUR, f"{FOUR}  concurrency: 4\n  max_usd: 20\n"):
        assert run(rule, text, dataset=COUNTED) is None


@pytest.mark.parametrize(
    ("flavor", "lanes", "message", "hint", "severity"),
    [
        ("a10g-large", 2, "`concurrency: 2`, and `a10g-large` has 1 GPU", "write `concurrency: 1`", "error"),
        ("cpu-xl", 2, "`concurrency: 2`, and `cpu-xl` has no GPU", "write `concurrency: 1`", "error"),
        ("a10g-largex2", 4, "`concurrency: 4`, and `a10g-largex2` has 2 GPUs", "write `concurrency: 2`", "error"),
        ("a10g-largex4", 3, "leaves 1 of the 4 GPUs of `a10g-largex4` idle", "write `concurrency: 4`, or 1", "warning"),
        ("l40sx8", 6, "`concurrency: 6` for 4 variants", "write `concurrency: 4`", "warning"),
    ],
)
def test_bad_lanes(flavor: str, lanes: int, message: str, hint: str, severity: str) -> None:
    text = changed("flavor: a10g-large", f"flavor: {flavor}", ROOMY) + f"{SWEEP}  concurrency: {lanes} # lanes\n"
    finding = run(lanes_have_gpus, text)
    expect(finding, message, hint, place(text, f"{lanes} # lanes"))
    assert finding is not None and finding.severity == severity
    fixed = hint.partition("`concurrency: ")[2].partition("`")[0]
    assert run(lanes_have_gpus, text.replace(f"{lanes} # lanes", fixed)) is None or severity == "warning"


def test_bad_limit() -> None:
    text = f"{ROOMY}{SWEEP}  max_usd: 6.5\n"
    finding = run(limit_leaves_variants, text, dataset=COUNTED)
    expect(finding, "`max_usd: 6.5` is enough for about 2 of 4 variants", "or remove it", place(text, "6.5"))
    assert finding is not None and finding.severity is Severity.WARNING
    enough = finding.hint.partition("max_usd: ")[2].partition("`")[0]
    assert run(limit_leaves_variants, text.replace("6.5", enough), dataset=COUNTED) is None


def test_a_limit_says_nothing_where_no_duration_is_known() -> None:
    assert run(limit_leaves_variants, f"{ROOMY}{SWEEP}  max_usd: 1\n") is None
