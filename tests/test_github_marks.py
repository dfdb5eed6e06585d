"""Our GitHub client's marks and nudges, which may all be sent twice: statuses, reactions, workflows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from servers.github import LoopbackGitHub
from servers.github_scene import Clock, opened, populated_github, refusal
from servers.hub_faults import lose_response

from pipeline.github import GitHub
from pipeline.pull_request import Access, Reaction, StatusState


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    with populated_github(tmp_path) as github:
        yield github


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(github: LoopbackGitHub, clock: Clock) -> GitHub:
    return opened(github, clock)


def test_a_status_is_set_once_and_kept_short(github, client):
    sha = github.world.git.sha("main")
    assert client.set_status(sha, "coach", StatusState.PENDING, "line\none", "https://example.invalid/job")
    assert not client.set_status(sha, "coach", StatusState.PENDING, "line one", "https://example.invalid/job")
    assert client.set_status(sha, "other", StatusState.PENDING, "line one")
    assert client.set_status(sha, "coach", StatusState.FAILURE, "é" * 200)
    assert not client.set_status(sha, "coach", StatusState.FAILURE, "é" * 200)
    found = github.statuses(sha)
    assert set(found) == {"train/coach", "train/other"}
    assert (found["train/coach"].state, found["train/coach"].description) == ("failure", "é" * 139 + "…")
    assert len(github.world.statuses) == 3


def test_a_status_is_found_beyond_a_hundred_others(github, client):
    sha = github.world.git.sha("main")
    client.set_status(sha, "e", StatusState.SUCCESS, "done")
    (one,) = github.world.statuses
    github.world.statuses[:] = [replace(one, context=f"train/e{index}") for index in range(120)]
    assert not client.set_status(sha, "e119", StatusState.SUCCESS, "done")


def test_reactions_may_be_repeated(github, client):
    number = github.open_pull("try", "alice", files={"a": "1"})
    comment = github.comment(number, "bob", "/plan")
    github.faults.add(action=lose_response())
    for reaction in (Reaction.SEEN, Reaction.SEEN, Reaction.DONE, Reaction.REFUSED, Reaction.LAUNCHED):
        client.react(comment, reaction)
    assert [content for _user, content in github.reactions(comment)] == ["eyes", "+1", "-1", "rocket"]


def test_workflows_are_started_stopped_and_allowed_again(github, client):
    client.disable("watch.yml")
    error = refusal(lambda: client.dispatch("watch.yml"))
    assert (error.access, "disabled" in error.detail) == (Access.REFUSED, True)
    client.enable("watch.yml")
    client.dispatch("watch.yml", {"experiment": "coach"})
    assert [(row.workflow, row.inputs) for row in github.dispatches] == [("watch.yml", {"experiment": "coach"})]
    assert refusal(lambda: client.enable("absent.yml")).access is Access.MISSING
