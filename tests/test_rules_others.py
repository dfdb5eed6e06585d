"""Rules about one experiment among others: each passes different ones and fails a copy."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run

from pipeline.errors import Severity
from pipeline.loader import parse_experiment
from pipeline.rules.others import not_done_before, output_is_its_own, relatives


def other(text: str = GOOD, name: str = "coach-two", repo: str = "acme/coach-two"):
    """Another experiment of the same check."""
    text = changed("^name: .*$", f"name: {name}", text)
    return parse_experiment(changed("acme/coach-12b", repo, text)).experiment


@pytest.mark.parametrize("rule", [output_is_its_own, not_done_before])
def test_ok(rule) -> None:
    different = changed("learning_rate: 2e-4", "learning_rate: 1e-4")
    assert run(rule, others=()) is None
    assert run(rule, others=(other(different), other(changed("acme/coach$", "acme/teach")))) is None
    assert run(rule, others=(other(changed("r: 64", "r: 32")), other(changed("Q4_K_M, ", "")))) is None


def test_bad_same_output() -> None:
    finding = run(output_is_its_own, others=(other(repo="Acme/Coach-12b"),))
    expect(finding, "`coach-two` writes to `Acme/Coach-12b`", "write `repo: acme/coach`", place(GOOD, "acme/coach-12b"))


def test_bad_but_for_the_seed() -> None:
    text = changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  seed: 7")
    finding = run(not_done_before, text, others=(other(),))
    expect(
        finding, "same as `coach-two` but for the seed (42 there, 7 here)", "say in `hypothesis`", place(text, "7\n")
    )
    assert finding.severity is Severity.WARNING


def test_bad_same_whatever_the_hardware_and_the_names() -> None:
    same = changed("timeout: 4h", "timeout: 2h", changed("a10g-large", "a100-large"))
    finding = run(not_done_before, others=(other(same),))
    expect(finding, "same as `coach-two`: base, data and training are equal", "change what", place(GOOD, "coach\n"))


def test_an_experiment_is_not_its_own_copy() -> None:
    from rule_cases import facts

    from pipeline.rules import Subject
    from pipeline.settings import Settings

    file = parse_experiment(GOOD)
    subject = Subject(file, facts(others=(file.experiment,)), Settings())
    assert output_is_its_own(subject) is None
    assert not_done_before(subject) is None


def test_relatives_are_those_that_could_clash() -> None:
    mine, copy = other(name="mine", repo="acme/mine"), other(name="copy", repo="acme/copy")
    sweep = other(changed("r: 64", "r: 32"), name="sweep", repo="acme/sweep")
    taken = other(changed("r: 64", "r: 8"), name="taken", repo="acme/Mine")
    found = [{one.name for one in group} for group in relatives([mine, copy, sweep, taken])]
    assert found == [{"mine", "copy", "taken"}, {"mine", "copy"}, {"sweep"}, {"mine", "taken"}]


def warm(steps: object) -> str:
    """The good experiment with a field of TRL's."""
    return changed("^  learning_rate: 2e-4$", f"  learning_rate: 2e-4\n  sft: {{warmup_steps: {steps}}}")


def test_a_sweep_over_one_field_of_trl_has_no_relatives() -> None:
    sweep = [other(warm(n), f"x-{n}", f"acme/x-{n}") for n in range(9)]
    assert all(set(map(id, group)) == {id(one)} for one, group in zip(sweep, relatives(sweep), strict=True))


def test_of_many_of_a_kind_each_hears_of_one() -> None:
    many = [other(name=f"copy-{n}", repo="acme/one") for n in range(50)]
    groups = relatives(many)
    assert max(map(len, groups)) == 4
    for experiment, group in zip(many, groups, strict=True):
        assert {one.name for one in group if one is not experiment} <= {"copy-0", "copy-1"}
        assert any(one is not experiment for one in group)


def test_equal_is_equal_however_it_is_written() -> None:
    whole, point, text = (other(warm(value), f"x-{n}", f"acme/x-{n}") for n, value in enumerate(("1", "1.0", "'1'")))
    found = [{one.name for one in group} for group in relatives([whole, point, text])]
    assert found == [{"x-0", "x-1"}, {"x-0", "x-1"}, {"x-2"}]
