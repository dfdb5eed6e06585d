"""Every request of ours and every answer of the loopback GitHub against the API description that GitHub publishes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from servers.github import LoopbackGitHub
from servers.github_description import description, find, operations, request_faults, response_faults
from servers.github_git import ZERO
from servers.github_http import Exchange
from servers.github_setup_views import protection_body, ruleset_body

from pipeline.github import GitHub, open_github
from pipeline.pull_request import GitHubError, Reaction, StatusState
from scripts.dev.cut_github_openapi import cut

pytestmark = pytest.mark.slow

REPO = "/repos/acme/models"
# What GitHub does and its description does not list: an answer that a limit, a lock or a missing right gives.
UNDESCRIBED = {401, 403, 404, 422, 429, 502}
ERROR = {"message", "documentation_url", "status"}
BODY = "<!-- mergetune:plan:coach -->\nhello"
RESULT = "<!-- mergetune:result:coach-12345678 -->\ndone"


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    people = {"alice": "admin", "bob": "maintain", "eve": "read"}
    with LoopbackGitHub(tmp_path, people=people) as github:
        github.add_workflow("watch.yml")
        yield github


@pytest.fixture
def client(github: LoopbackGitHub) -> GitHub:
    return open_github(github.api_url, github.actions_token(), github.repository, sleep=lambda seconds: None)


def against(exchange: Exchange) -> list[str]:
    """What the description says against one exchange."""
    asked = f"{exchange.method} {exchange.path}"
    faults = [f"{asked}: {fault}" for fault in request_faults(exchange.method, exchange.path, exchange.body)]
    if exchange.status in UNDESCRIBED:
        return faults + ([] if json.loads(exchange.answer).keys() == ERROR else [f"{asked}: not an error's body"])
    answered = response_faults(exchange.method, exchange.path, exchange.status, exchange.answer)
    return faults + [f"{asked} -> {exchange.status}: {fault}" for fault in answered]


def faults_of(github: LoopbackGitHub) -> list[str]:
    assert github.requests
    return [fault for exchange in github.requests for fault in against(exchange)]


def comment_story(github: LoopbackGitHub, client: GitHub) -> None:
    number = github.open_pull("try", "alice", files={"a": "1"}, body="Closes nothing")
    github.comment(number, None, "from an account that is gone")
    github.comment(number, "eve", BODY, minimized="spam")
    client.sticky_comment(number, "plan:coach", BODY)
    client.sticky_comment(number, "plan:coach", f"{BODY} again")
    client.final_comment(number, "coach-12345678", RESULT)
    for reaction in Reaction:
        client.react(github.comment(number, "bob", "/plan"), reaction)
    github.world.pulls[number].locked = True
    client.final_comment(number, "other-12345678", "<!-- mergetune:result:other-12345678 -->\ndone")
    client.issue("pushed:abc", "A direct push", "<!-- mergetune:pushed:abc -->")
    client.issue("pushed:abc", "A direct push", "<!-- mergetune:pushed:abc -->\nmore")


def merge_story(github: LoopbackGitHub, client: GitHub) -> None:
    for index, method in enumerate(["merge", "squash", "rebase", "queue"]):
        before = github.world.git.sha("main") or ""
        number = github.open_pull(method, "alice", files={f"{method}.yaml": "x\n" * 9}, fork=index == 1)
        github.push(
            method, {f"{method}.yaml": None, "README.md": "new"}, "alice", number=number if index == 1 else None
        )
        github.approve(number, "bob")
        github.review(number, "eve", "COMMENTED")
        client.changed_files(number)
        sha = github.merge(number, method, by="bob")
        found = client.pull_request_of(sha)
        assert found is not None
        client.approvals(found)
        client.pushed_files(before, sha)
    client.pushed_files(ZERO, sha)


def mark_story(github: LoopbackGitHub, client: GitHub) -> None:
    sha = github.world.git.sha("main") or ""
    client.set_status(sha, "coach", StatusState.PENDING, "waiting")
    client.set_status(sha, "coach", StatusState.SUCCESS, "done", "https://example.invalid/job")
    client.set_status(sha, "coach", StatusState.SUCCESS, "done", "https://example.invalid/job")
    client.enable("watch.yml")
    client.dispatch("watch.yml")
    client.dispatch("watch.yml", {"experiment": "coach"})
    client.disable("watch.yml")


def refused_story(github: LoopbackGitHub, client: GitHub) -> None:
    number = github.open_pull("try", "eve", files={"a": "1"}, fork=True)
    fork = open_github(github.api_url, github.fork_token(), github.repository)
    stranger = open_github(github.api_url, "ghp_nobody", github.repository)
    for act in [
        lambda: fork.sticky_comment(number, "plan:coach", BODY),
        lambda: stranger.pull_request(number),
        lambda: client.pull_request(999),
        lambda: client.dispatch("absent.yml"),
    ]:
        with pytest.raises(GitHubError):
            act()
    client.permission("nobody")


@pytest.mark.parametrize("story", [comment_story, merge_story, mark_story, refused_story])
def test_the_story_obeys_the_description(github, client, story: Callable[[LoopbackGitHub, GitHub], None]):
    story(github, client)
    assert faults_of(github) == []


def test_what_doctor_asks_obeys_the_description(github):
    world = github.world
    world.secrets = {None: ["HF_TOKEN"], "launch": ["HF_TOKEN"]}
    world.environments = {"launch": ["main"], "open": []}
    world.rulesets = {42: ruleset_body(world, 42, "runs", "tag", "refs/tags/run/*", "creation", "deletion")}
    world.protection = {"main": protection_body(world, ["gate"], 1)}
    headers = {"Authorization": f"token {github.person_token('alice')}"}
    for path in [
        *("/actions/secrets", "/actions/workflows", "/actions/workflows/watch.yml", "/actions/permissions/workflow"),
        *("/environments", "/environments/launch/secrets", "/environments/launch/deployment-branch-policies"),
        *("/rulesets", "/rulesets/42", "/branches/main/protection", "/pulls?state=all", "/issues?creator=eve"),
    ]:
        assert httpx2.get(github.api_url + REPO + path, headers=headers).status_code == 200, path
    assert httpx2.get(f"{github.api_url}/rate_limit").json()["rate"]["limit"] == 1000
    assert faults_of(github) == []


def test_what_else_is_served_obeys_the_description(github):
    number = github.open_pull("try", "alice", files={"a": "1"})
    comment, headers = github.comment(number, "bob", "x"), {"Authorization": f"Bearer {github.actions_token()}"}
    where = github.api_url + REPO
    issue = httpx2.post(f"{where}/issues", json={"title": "t"}, headers=headers).json()["number"]
    assert httpx2.get(f"{where}/issues/{issue}").status_code == 200
    assert (
        httpx2.patch(f"{where}/issues/{issue}", json={"state": "closed"}, headers=headers).json()["state"] == "closed"
    )
    assert httpx2.get(f"{where}/issues/comments/{comment}").status_code == 200
    assert httpx2.get(f"{where}/issues/comments/{comment}/reactions").json() == []
    assert httpx2.delete(f"{where}/issues/comments/{comment}", headers=headers).status_code == 204
    assert faults_of(github) == []


def test_every_operation_of_the_cut_is_served_and_nothing_else(github):
    served = {(route.method.lower(), template_of(route.method, route.pattern.pattern)) for route in github.routes}
    described = {(method, template) for method, template, _pattern in operations()}
    assert served == described


def test_the_cut_holds_nothing_else():
    assert cut(description()) == description()


def template_of(method: str, pattern: str) -> str:
    """The described path that a route's pattern stands for."""
    path = pattern
    while "(?P<" in path:
        start = path.index("(?P<")
        path = f"{path[:start]}1{path[path.index(')', start) + 1 :]}"
    return find(method, path)[0]


def test_the_description_refuses_what_is_wrong():
    comments = f"{REPO}/issues/1/comments"
    assert request_faults("POST", comments, b"{}") == ["$: 'body' is a required property"]
    assert request_faults("POST", comments, b"") == ["no body"]
    assert request_faults("GET", f"{comments}?oops=1", b"") == ["no such parameter: oops"]
    assert request_faults("GET", f"{REPO}/issues/x/comments", b"") != []
    assert response_faults("GET", comments, 200, b'[{"id": 1}]') != []
    assert response_faults("GET", comments, 203, b"[]") == ["status 203 is not one of 200, 404, 410"]
    with pytest.raises(KeyError):
        request_faults("GET", f"{REPO}/oops", b"")
