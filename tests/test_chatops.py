"""Commands on a pull request: who is answered, with what, and what is handed to the workflow that holds the token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pull_story import SMALL, checkout, client, experiment, loopback, workflow_run
from servers.github import LoopbackGitHub
from servers.hub_faults import status

from pipeline.chatops import Place, carry_out_dispatched, read_command, run_command
from pipeline.comments import COMMANDS


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    with loopback(tmp_path) as server:
        yield server


def say(github: LoopbackGitHub, root: Path, number: int, login: str, text: str) -> int:
    """Somebody comments and the workflow runs; the comment's id."""
    made = github.comment(number, login, text)
    given = read_command(workflow_run(github, root, "issue_comment", github.event("issue_comment", made)))
    assert given is not None
    tree = root / "proposed"
    if github.world.pull(number).open:
        checkout(github, f"refs/pull/{number}/head", tree)
    base = checkout(github, "refs/heads/main", root / "base")
    assert run_command(given, Place(client(github), tree, base)) == 0
    return made


def answers(github: LoopbackGitHub, number: int) -> list[str]:
    return [c.body for c in github.comments(number) if c.body.startswith("<!-- mergetune:answer:")]


def marks(github: LoopbackGitHub, comment: int) -> set[str]:
    return {content for _, content in github.reactions(comment)}


@pytest.mark.parametrize("text", ["/help", "/plan", "/status", "/cancel small", "/retry small", "/nonsense"])
def test_an_outsider_gets_a_thumb_down_and_nothing_else(github: LoopbackGitHub, tmp_path: Path, text: str) -> None:
    number = github.open_pull("try", "mallory", files={SMALL: experiment()}, fork=True)
    asked = say(github, tmp_path, number, "mallory", text)
    assert marks(github, asked) == {"-1"}
    assert len(github.comments(number)) == 1
    assert github.dispatches == []


def test_help_lists_every_command(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    asked = say(github, tmp_path, number, "bob", "/help")
    (answer,) = answers(github, number)
    assert all(command in answer for command, _ in COMMANDS)
    assert marks(github, asked) == {"eyes", "+1"}


def test_an_unknown_command_is_answered_with_help(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    say(github, tmp_path, number, "bob", "/launch @everyone <!-- x")
    (answer,) = answers(github, number)
    assert "There is no command `/launch @everyone" in answer
    assert "<!-- x" not in answer.partition("-->")[2]


@pytest.mark.parametrize("text", ["hello", "", "see /help", "/ help", "//", "/1"])
def test_other_comments_are_none_of_ours(github: LoopbackGitHub, tmp_path: Path, text: str) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    made = github.comment(number, "bob", text)
    run = workflow_run(github, tmp_path, "issue_comment", github.event("issue_comment", made))
    assert read_command(run) is None


def test_plan_on_a_forks_pull_request_posts_what_preflight_could_not(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "mallory", files={SMALL: experiment()}, fork=True)
    say(github, tmp_path, number, "bob", "/plan")
    assert any(c.body.startswith("<!-- mergetune:plan:small ") for c in github.comments(number))
    assert "planned" in answers(github, number)[0]


def test_plan_of_a_closed_pull_request_is_refused_with_a_way_out(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    github.close(number)
    asked = say(github, tmp_path, number, "bob", "/plan")
    assert "reopen it" in answers(github, number)[0]
    assert "-1" in marks(github, asked)


def test_status_before_and_after_the_merge(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    say(github, tmp_path, number, "bob", "/status")
    assert "not merged" in answers(github, number)[-1]
    sha = github.merge(number)
    client(github).api.ask(
        "POST",
        f"statuses/{sha}",
        body={"context": "train/small", "state": "pending", "description": "train is running"},
    )
    say(github, tmp_path, number, "bob", "/status")
    assert "train is running" in answers(github, number)[-1]


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_what_needs_the_token_is_dispatched(github: LoopbackGitHub, tmp_path: Path, verb: str) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    github.merge(number)
    asked = say(github, tmp_path, number, "bob", f"/{verb}")
    (sent,) = github.dispatches
    assert (sent.workflow, sent.ref) == ("launch.yml", "main")
    wanted = {"command": verb, "experiment": "small", "by": "bob", "pull": str(number), "comment": str(asked)}
    assert sent.inputs == wanted
    assert "Handed to `launch`" in answers(github, number)[0]


def test_which_of_two_experiments_has_to_be_said(github: LoopbackGitHub, tmp_path: Path) -> None:
    files = {SMALL: experiment(), "experiments/other.yaml": experiment("other")}
    number = github.open_pull("try", "alice", files=files)
    say(github, tmp_path, number, "bob", "/cancel")
    assert "`/cancel other`" in answers(github, number)[0]
    assert github.dispatches == []


@pytest.mark.parametrize("name", ["../x", "$(id)", "A", "x;y", "-x"])
def test_a_name_that_none_can_have_goes_nowhere(github: LoopbackGitHub, tmp_path: Path, name: str) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    say(github, tmp_path, number, "bob", f"/cancel {name}")
    assert github.dispatches == []
    assert "is not the name" in answers(github, number)[0]


def test_a_dispatch_that_github_refuses_is_said(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    github.merge(number)
    github.faults.add(action=status(422, '{"message": "disabled"}'), path="/dispatches", times=9)
    say(github, tmp_path, number, "bob", "/cancel small")
    assert "could not be started" in answers(github, number)[0]


def test_launch_without_a_command_asks_for_nothing(github: LoopbackGitHub, tmp_path: Path) -> None:
    inputs = {"command": "reconcile", "experiment": "", "pull": "", "comment": "", "by": ""}
    event = github.event("workflow_dispatch", workflow="launch.yml", inputs=inputs)

    def never() -> None:
        raise AssertionError("no world is needed")

    run = workflow_run(github, tmp_path, "workflow_dispatch", event)
    assert carry_out_dispatched(run, client(github), never) == 0  # type: ignore[arg-type]


def test_a_dispatched_name_is_checked_before_anything_is_opened(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    inputs = {"command": "cancel", "experiment": "a b", "pull": str(number), "comment": "77", "by": "x y"}
    event = github.event("workflow_dispatch", workflow="launch.yml", inputs=inputs)

    def never() -> None:
        raise AssertionError("no world is needed")

    run = workflow_run(github, tmp_path, "workflow_dispatch", event)
    assert carry_out_dispatched(run, client(github), never) == 1  # type: ignore[arg-type]
    assert "`somebody`" in answers(github, number)[0]
