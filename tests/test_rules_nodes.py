"""Rules about trainings on several machines, each with what it lets pass and what it finds."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run

from pipeline.rules.nodes import nodes_are_needed


def on(flavor: str, nodes: int) -> str:
    """The good experiment on so many machines."""
    return changed("flavor: a10g-large", f"flavor: {flavor}\n  nodes: {nodes}", GOOD)


@pytest.mark.parametrize(("flavor", "nodes"), [("a100x8", 2), ("a100x4", 1), ("h200", 2), ("cpu-xl", 2), ("l4x4", 2)])
def test_no_machine_has_as_many(flavor: str, nodes: int) -> None:
    assert run(nodes_are_needed, on(flavor, nodes)) is None


def test_one_machine_has_as_many() -> None:
    text = on("a100x4", 2)
    hint = "write `flavor: a100x8` and remove `nodes`: $20.00 an hour, not $20.00"
    message = "`nodes: 2` of `a100x4` are 8 A100, `a100x8` has 8 in one machine"
    line, column = place(text, "nodes: 2")
    expect(run(nodes_are_needed, text), message, hint, (line, column + len("nodes: ")))
    assert "`flavor: a10g-largex4`" in run(nodes_are_needed, on("a10g-large", 3)).hint
