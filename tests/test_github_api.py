"""Our GitHub client when GitHub fails, limits or refuses: what is asked again, what is not, and what is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.github import LoopbackGitHub
from servers.github_faults import bad_gateway, next_page, primary_limit, secondary_limit
from servers.github_scene import KEY, MARK, NOW, RESULT, RUN, Clock, bodies, opened, populated_github, refusal
from servers.hub_faults import Action, drop, hang, lose_response, status, truncate_list

from pipeline.github import GitHub, open_github
from pipeline.pull_request import Access, Reaction, StatusState

pytestmark = pytest.mark.slow


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


@pytest.fixture
def number(github: LoopbackGitHub) -> int:
    return github.open_pull("try", "alice", files={"experiments/a.yaml": "a\n"})


# Bad moments.

MOMENTS: list[Action] = [bad_gateway(), status(503), drop(), lose_response(), truncate_list(cut_body=True)]


@pytest.mark.parametrize("action", MOMENTS)
def test_a_question_is_asked_again_after_a_bad_moment(github, client, clock, number, action):
    github.faults.add(action=action, method="GET", times=2)
    assert client.pull_request(number).number == number
    assert clock.slept == [1.0, 2.0]


@pytest.mark.parametrize("action", MOMENTS)
def test_an_outage_is_never_an_empty_list(github, client, number, action):
    github.faults.add(action=action, method="GET", path="commits|comments|reviews|files", times=100)
    for act in (
        lambda: client.comments(number),
        lambda: client.pull_request_of("main"),
        lambda: client.changed_files(number),
        lambda: client.sticky_comment(number, KEY, MARK),
    ):
        assert refusal(act).access is Access.UNREACHABLE
    assert bodies(github, number) == []


def test_a_server_that_says_nothing_is_left(github, clock, number):
    github.faults.add(action=hang(), method="GET", times=9)
    error = refusal(lambda: opened(github, clock, timeout_s=0.1).comments(number))
    assert str(error) == "unreachable: no answer in time"
    assert clock.slept == [1.0, 2.0, 4.0]


def test_a_server_that_is_not_there_is_an_outage(clock):
    client = open_github("http://127.0.0.1:1", None, "acme/models", sleep=clock.sleep)
    assert refusal(lambda: client.pull_request(1)).access is Access.UNREACHABLE


LOST = [lose_response(), bad_gateway(performed=True), drop(), bad_gateway()]


@pytest.mark.parametrize("action", LOST)
def test_a_comment_whose_answer_is_lost_is_looked_for_before_it_is_posted_again(github, client, number, action):
    github.faults.add(action=action, path="comments")
    address = client.sticky_comment(number, KEY, MARK)
    assert bodies(github, number) == [MARK]
    assert address.endswith(f"-{github.comments(number)[0].id}")
    github.faults.add(action=action, path="comments")
    client.final_comment(number, RUN, RESULT)
    assert bodies(github, number) == [MARK, RESULT]


def test_a_comment_is_posted_twice_at_most(github, client, number):
    github.faults.add(action=drop(), path="comments", times=9)
    assert refusal(lambda: client.sticky_comment(number, KEY, MARK)).access is Access.UNREACHABLE
    assert github.faults.left() == 7
    github.faults.clear()
    client.sticky_comment(number, KEY, MARK)
    assert bodies(github, number) == [MARK]


@pytest.mark.parametrize("action", LOST)
def test_an_issue_whose_answer_is_lost_is_not_opened_twice(github, client, action):
    github.faults.add(action=action, path="issues")
    client.issue("pushed:coach", "Not launched", "<!-- mergetune:pushed:coach -->")
    assert len(github.issues()) == 1


# Rate limits.


@pytest.mark.parametrize(
    ("action", "slept"),
    [
        (secondary_limit(7), [7.0, 7.0]),
        (secondary_limit(7, code=429), [7.0, 7.0]),
        (secondary_limit(None), [60.0, 60.0]),
        (primary_limit(int(NOW) + 30), [31.0, 1.0]),
        (primary_limit(int(NOW) - 30), [1.0, 1.0]),
    ],
)
def test_a_limit_is_waited_for(github, client, clock, number, action, slept):
    github.faults.add(action=action, method="GET")
    github.faults.add(action=action, method="POST")
    client.sticky_comment(number, KEY, MARK)
    assert clock.slept == slept
    assert bodies(github, number) == [MARK]


@pytest.mark.parametrize("action", [secondary_limit(121), primary_limit(int(NOW) + 3600)])
def test_a_long_limit_is_an_error(github, client, clock, number, action):
    github.faults.add(action=action, method="GET")
    error = refusal(lambda: client.comments(number))
    assert (error.access, clock.slept) == (Access.LIMITED, [])
    assert "no longer than 120 s" in error.detail


def test_limits_together_are_not_waited_for_longer_than_one(github, client, clock, number):
    github.faults.add(action=secondary_limit(50), method="GET", times=9)
    assert refusal(lambda: client.comments(number)).access is Access.LIMITED
    assert clock.slept == [50.0, 50.0]


# Refusals.


def test_a_forks_token_may_not_write(github, clock, number):
    fork = opened(github, clock, github.fork_token())
    assert fork.pull_request(number).number == number
    for act in (
        lambda: fork.sticky_comment(number, KEY, MARK),
        lambda: fork.final_comment(number, RUN, RESULT),
        lambda: fork.set_status(github.world.git.sha("main"), "coach", StatusState.PENDING, "x"),
        lambda: fork.react(github.comment(number, "bob", "x"), Reaction.SEEN),
        lambda: fork.dispatch("watch.yml"),
        lambda: fork.disable("watch.yml"),
    ):
        error = refusal(act)
        assert str(error) == "forbidden: 403 Resource not accessible by integration"
    assert clock.slept == []


def test_refusals_have_their_kind(github, client, clock):
    assert refusal(lambda: opened(github, clock, "ghp_wrong").pull_request(1)).access is Access.UNAUTHORIZED
    assert refusal(lambda: client.pull_request(99)).access is Access.MISSING
    assert refusal(lambda: client.set_status("1" * 40, "coach", StatusState.PENDING, "x")).access is Access.MISSING
    assert refusal(lambda: open_github("http://127.0.0.1:1", None, "acme/../x")).access is Access.REFUSED
    github.faults.add(action=status(301, "Moved Permanently"), method="GET")
    moved = refusal(lambda: client.pull_request(1))
    assert str(moved) == "refused: 301 Moved Permanently; `acme/models` may have a new name"


def test_a_next_page_elsewhere_is_not_asked(github, client, number):
    for url in ("http://127.0.0.1:1/x", github.api_url.replace("127.0.0.1", "user@127.0.0.1"), f"{github.api_url}0/x"):
        github.faults.add(action=next_page(url), method="GET")
        assert refusal(lambda: client.comments(number)).access is Access.UNREACHABLE
    github.faults.add(
        action=next_page(f"{github.api_url}/repos/acme/models/issues/{number}/comments"), method="GET", times=999
    )
    assert refusal(lambda: client.comments(number)).access is Access.INCOMPLETE


def test_an_answer_of_something_else_is_an_outage(github, client, number):
    github.faults.add(action=status(200, "a page of a proxy"), method="GET", times=3)
    for act in (lambda: client.pull_request(number), lambda: client.comments(number), lambda: client.permission("bob")):
        assert refusal(act).access is Access.UNREACHABLE


def test_the_token_stands_nowhere(github, clock, number):
    token = "an-unusual-token-of-some-proxy"
    client = opened(github, clock, github.actions_token(value=token))
    github.faults.add(action=status(422, f"who sent {token} and ghp_{'a' * 36}?"), method="GET")
    error = refusal(lambda: client.comments(number))
    assert str(error) == "refused: 422 who sent <token> and <token>?"
    for shown in (repr(client), repr(error), str(github.requests[0].headers)):
        assert token not in shown
    assert refusal(lambda: opened(github, clock, "ghp_\nx")).access is Access.UNAUTHORIZED


def test_requests_say_who_we_are_and_which_version_we_speak(github, client, number):
    client.comments(number)
    headers = github.requests[0].headers
    assert headers["user-agent"].startswith("mergetune/")
    assert (headers["x-github-api-version"], headers["accept"]) == ("2022-11-28", "application/vnd.github+json")


def test_an_enterprise_server_has_a_prefix(tmp_path, clock):
    with populated_github(tmp_path, prefix="/api/v3") as github:
        number = github.open_pull("try", "alice", files={"experiments/a.yaml": "a\n"})
        client = opened(github, clock)
        for index in range(120):
            github.comment(number, "eve", str(index))
        client.sticky_comment(number, KEY, MARK)
        client.sticky_comment(number, KEY, f"{MARK}\nagain")
        assert bodies(github, number)[120:] == [f"{MARK}\nagain"]
        sha = github.merge(number, "rebase", by="mia")
        found = open_github(f"{github.api_url}/", None, github.repository, sleep=clock.sleep).pull_request_of(sha)
        assert found is not None
        assert found.merged_by == "mia"
