"""What follows from GitHub's answers: who brought and approved a change, which comment is ours, how texts are kept."""

from dataclasses import replace

import pytest

from pipeline.errors import Finding, Place, Severity
from pipeline.pull_request import (
    PullRequest,
    Review,
    ReviewState,
    annotation,
    annotations,
    approvers,
    brought_by,
    carries,
    short_description,
)

KEY = "plan:coach"
PULL = PullRequest(1, "t", "u", "alice", "main", "acme/models", "try", "aaa", "acme/models", False, "2026-01-02", "mmm")


@pytest.mark.parametrize(
    ("pulls", "expected"),
    [
        ([], None),
        ([replace(PULL, merged_at=None)], None),
        ([replace(PULL, base="other")], None),
        ([replace(PULL, base_repo="eve/models")], None),
        ([replace(PULL, base_repo="Acme/Models")], 1),
        ([PULL, replace(PULL, number=2, merge_sha="sha", merged_at="2026-01-03")], 2),
        ([PULL, replace(PULL, number=2, merge_sha="other", merged_at="2026-01-01")], 2),
    ],
)
def test_which_pull_request_brought_a_commit(pulls, expected):
    found = brought_by(pulls, "sha", "acme/models", "main")
    assert (found and found.number) == expected


YES, NO, GONE, SAID = ReviewState.APPROVED, ReviewState.CHANGES_REQUESTED, ReviewState.DISMISSED, ReviewState.COMMENTED


@pytest.mark.parametrize(
    ("states", "counts"),
    [([YES], True), ([YES, SAID], True), ([YES, NO], False), ([NO, YES], True), ([YES, GONE], False), ([SAID], False)],
)
def test_the_last_word_of_a_reviewer_counts(states, counts):
    reviews = [Review("bob", state, "aaa") for state in states]
    assert approvers(reviews, "alice", "aaa") == (("bob",) if counts else ())


def test_an_annotation_keeps_to_its_line():
    at = Place("experiments/a,b:c.yaml", 3, 5)
    finding = Finding("EXP001", Severity.ERROR, at, "100% wrong\n::error::forged", "write `a: 1`")
    assert annotation(finding) == (
        "::error file=experiments/a%2Cb%3Ac.yaml,line=3,col=5,title=EXP001::"
        "100%25 wrong%0A::error::forged%0Ahint: write `a: 1`"
    )


def test_annotations_beyond_ten_are_counted():
    finding = Finding("EXP001", Severity.WARNING, Place("a.yaml"), "odd")
    lines = annotations([finding] * 12 + [replace(finding, severity=Severity.ERROR)]).split("\n")
    assert [line.split(" ")[0] for line in lines] == ["::error", *["::warning"] * 10, "::notice"]
    assert lines[-1].endswith("::2 more warnings: see the summary of this workflow run")
    assert annotations([]) == ""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<!-- mergetune:plan:coach -->", True),
        ("<!-- mergetune:plan:coach-->\nx", True),
        ("<!-- mergetune:plan:coach-2 -->", False),
        ("<!-- mergetune:plan:coach", False),
        (" <!-- mergetune:plan:coach -->", False),
    ],
)
def test_what_carries_a_marker(body, expected):
    assert carries(body, KEY) is expected


def test_a_description_is_one_line():
    assert short_description(" a\n b ") == "a b"
    assert len(short_description("x" * 141)) == 140
