"""No text makes the loader raise anything but its own error, and none takes long."""

import time

from examples import GOOD
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidExperiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.plan import make_fingerprint

LINES = GOOD.splitlines()
FRAGMENTS = [
    "{",
    "[",
    "]",
    "}",
    ":",
    "- ",
    "\t",
    "&a ",
    "*a",
    "!!x",
    "'",
    '"',
    "|",
    ">",
    "%",
    "@",
    "\u202e",
    "💥",
    "1e999",
    "~",
]
words = st.one_of(st.text(max_size=30), st.sampled_from(FRAGMENTS), st.floats().map(str), st.integers().map(str))


def outcome(text: str) -> str:
    """`ok`, or the first message; anything but InvalidExperiment fails the test, as does slowness."""
    started = time.monotonic()
    try:
        make_fingerprint(parse_experiment(text, "fuzz.yaml").experiment, Facts())
        said = "ok"
    except InvalidExperiment as error:
        assert error.findings
        assert all(finding.message and finding.at.path == "fuzz.yaml" for finding in error.findings)
        said = error.as_text()
    assert time.monotonic() - started < 2
    return said


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text(text: str) -> None:
    outcome(text)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(LINES) - 1), st.integers(0, 60), words)
def test_a_good_experiment_with_something_in_it(line: int, column: int, word: str) -> None:
    mutated = LINES.copy()
    mutated[line] = mutated[line][:column] + word + mutated[line][column:]
    outcome("\n".join(mutated) + "\n")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(LINES) - 1), words)
def test_a_good_experiment_with_another_value(line: int, word: str) -> None:
    mutated = LINES.copy()
    mutated[line] = f"{mutated[line].split(':')[0]}: {word}"
    outcome("\n".join(mutated) + "\n")


@settings(max_examples=200, deadline=None)
@given(st.recursive(words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)))
def test_any_structure(value: object) -> None:
    import yaml

    outcome(yaml.safe_dump({"name": value, "train": value, "data": {"eval": value}}, allow_unicode=True))
