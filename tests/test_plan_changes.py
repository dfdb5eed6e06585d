"""What differs between two versions of an experiment: the fields say exactly what the fingerprint says."""

from dataclasses import replace

import pytest
from examples import GOOD, changed
from rule_cases import facts
from test_plan_comment import LOCAL, preview

from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.plan import make_fingerprint, make_plan
from pipeline.plan_changes import Changes, FieldChange, Version, compare, flat, shown
from pipeline.plan_preview import Preview
from pipeline.plan_sections import changes_section


def version(text: str, content: dict[str, str] | None = None) -> Version:
    experiment = parse_experiment(text).experiment
    return Version(experiment, make_plan(experiment, facts(content=content or {})), content)


def changes(before: str, after: str = GOOD) -> Changes:
    return compare(version(before), version(after))


# As in tests/test_plan.py: what enters the fingerprint, and what does not.
EDITS = [
    ("flavor: a10g-large", "flavor: a100-large"),
    ("timeout: 4h", "timeout: 6h"),
    ("max_usd: 10", "max_usd: 20"),
    ("hypothesis: .*", "hypothesis: another expectation"),
    ("name: coach", "name: coach-two"),
    ("repo: acme/coach-12b", "repo: acme/other"),
    ("max_new_tokens: 100", "max_new_tokens: 50"),
    ("learning_rate: 2e-4", "learning_rate: 0.0002"),
    ("  epochs: 3", "  epochs: 3\n  save_steps: 10"),
    ("  epochs: 3", "  epochs: 3\n  tracking: trackio"),
    ("merge: .*", "merge: {flavor: cpu-xl}"),
    ("gguf: {", "gguf: {timeout: 2h, "),
    ("gemma-3-12b-it", "gemma-3-4b-it"),
    ("revision: 96b6f1e", "revision: 96b6f1f"),
    ("fraction: 0.05", "fraction: 0.1"),
    ("eval: {fraction: 0.05}", "eval: {split: test}"),
    ("2e-4", "1e-4"),
    ("r: 64", "r: 32"),
    ("Q4_K_M, Q8_0", "Q4_K_M"),
    ("  epochs: 3", "  epochs: 3\n  seed: 7"),
    ("  epochs: 3", "  epochs: 3\n  seed: 42"),
    ("  epochs: 3", "  epochs: 3\n  sft: {}"),
    ("  epochs: 3", "  epochs: 3\n  sft: {warmup_steps: 10}"),
    ("  epochs: 3", '  epochs: 3\n  sft: {warmup_steps: "10"}'),
    ("^gguf: .*\n", ""),
    ("^evaluate: .*\n", ""),
    ("  lora: .*\n", ""),
    ("  split: .*|  revision: 5d2\n", "  revision: 5d2\n  split: train\n"),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_a_field_decides_exactly_when_the_fingerprint_differs(edit: tuple[str, str]) -> None:
    edited = changed(*edit)
    differ = make_fingerprint(parse_experiment(edited).experiment, Facts()) != make_fingerprint(
        parse_experiment(GOOD).experiment, Facts()
    )
    for found in (changes(edited), changes(GOOD, edited)):
        assert found.same_run is not differ
        assert any(change.decides for change in found.fields) is differ
        assert bool(found.fields) is (edit[1] != "learning_rate: 0.0002")


def test_no_change() -> None:
    found = changes(GOOD)
    assert found.fields == ()
    assert found.same_run is True
    text = changes_section(preview_with(found))
    assert "**The same run**: nothing that decides the result changes." in text
    assert "No estimate changes." in text


def test_fields_stand_in_the_order_of_the_schema() -> None:
    before = changed("max_usd: 10", "max_usd: 9", changed("revision: 5d2", "revision: 5d3", changed("r: 64", "r: 8")))
    assert [change.field for change in changes(before).fields] == ["data.revision", "train.lora.r", "budget.max_usd"]


def test_a_default_that_is_written_out_is_a_new_run_with_the_same_value() -> None:
    written = changed("  epochs: 3", "  epochs: 3\n  seed: 42")
    assert changes(GOOD, written).fields == (FieldChange("train.seed", "42", "42", True, "now"),)
    text = changes_section(preview_with(changes(written, GOOD)))
    assert "| `train.seed` | `42` written | `42` by default | same value, new run |" in text
    (empty,) = changes(GOOD, changed("  epochs: 3", "  epochs: 3\n  sft: {}")).fields
    assert (empty.field, empty.before, empty.after, empty.written) == ("train.sft", None, None, "now")


def test_what_a_mapping_is_filled_with_is_said_once() -> None:
    empty = changed("  epochs: 3", "  epochs: 3\n  sft: {}")
    filled = changed("  epochs: 3", "  epochs: 3\n  sft: {warmup_steps: 10}")
    assert [change.field for change in changes(empty, filled).fields] == ["train.sft.warmup_steps"]


def test_text_and_number_do_not_look_alike() -> None:
    one = changed("  epochs: 3", "  epochs: 3\n  sft: {warmup_steps: 10}")
    two = changed("  epochs: 3", '  epochs: 3\n  sft: {warmup_steps: "10"}')
    (change,) = changes(one, two).fields
    assert (change.before, change.after) == ("10", '"10"')
    assert shown(("timeout",), 5400) == "1h30m"
    assert shown(("targets",), ["a", "b"]) == '["a", "b"]'
    assert flat({"a": {"b.c": 1, "d": {}}}) == {("a", "b.c"): 1, ("a", "d"): {}}


def test_content_of_files_is_compared_where_it_is_known() -> None:
    one, two = ({"data/coach.jsonl": letter * 64} for letter in "ab")
    (change,) = compare(version(LOCAL, one), version(LOCAL, two)).fields
    assert change == FieldChange(
        "content of data/coach.jsonl", "sha256 aaaaaaaaaaaa", "sha256 bbbbbbbbbbbb", decides=True
    )
    assert compare(version(LOCAL, one), version(LOCAL, one)).same_run is True
    unknown = compare(version(LOCAL), version(LOCAL, two))
    assert unknown.same_run is None
    assert "what `data/coach.jsonl` held before is not known here" in changes_section(preview_with(unknown))
    assert compare(version(LOCAL), version(GOOD)).same_run is False


def test_estimates_before_and_now() -> None:
    found = changes(changed("r: 64", "r: 16", changed("timeout: 4h", "timeout: 2h")))
    numbers = {estimate.name: (estimate.before, estimate.after) for estimate in found.estimates}
    assert list(numbers) == ["memory_gib", "expected_s", "expected_usd", "worst_usd"]
    memory, worst = numbers["memory_gib"], numbers["worst_usd"]
    assert memory[0] is not None and memory[1] is not None and memory[0] < memory[1]
    assert worst == (pytest.approx(5.2), pytest.approx(8.2))
    assert numbers["expected_s"] == (None, None)
    without = compare(Version(parse_experiment(GOOD).experiment), version(GOOD))
    assert without.estimates == () and without.before is None
    assert "estimate" not in changes_section(preview_with(without))


def test_as_dict() -> None:
    document = changes(changed("r: 64", "r: 16")).as_dict()
    assert document["same_run"] is False
    assert document["before"].startswith("coach-")
    assert document["fields"] == [{"field": "train.lora.r", "before": "16", "after": "64", "decides": True}]


def preview_with(found: Changes) -> Preview:

    return replace(preview(), changes=found)
