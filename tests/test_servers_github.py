"""The loopback GitHub itself: its git side, who may do what, its pages, its faults and the events it sends."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers.github import LoopbackGitHub
from servers.github_faults import bad_gateway, primary_limit, secondary_limit
from servers.github_git import ZERO, Conflict
from servers.hub_faults import drop, lose_response

REPO = "/repos/acme/models"


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    people = {"alice": "admin", "bob": "write", "eve": "read"}
    with LoopbackGitHub(tmp_path, people=people) as github:
        github.add_workflow("watch.yml")
        yield github


def ask(github: LoopbackGitHub, method: str, path: str, token: str | None = None, **body: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    more = {"json": body} if body else {}
    return httpx2.request(method, github.api_url + REPO + path, headers=headers, timeout=10, **more)


@pytest.mark.parametrize(
    ("method", "parents", "commits"), [("merge", 2, 3), ("squash", 1, 1), ("rebase", 1, 2), ("queue", 2, 3)]
)
def test_each_way_to_merge_leaves_its_own_history(github, method, parents, commits):
    git, before = github.world.git, github.world.git.sha("main")
    number = github.open_pull("try", "alice", files={"a": "1"})
    head = github.push("try", {"b": "2"}, "alice")
    github.push("main", {"c": "3"}, "bob")
    sha = github.merge(number, method, by="bob")
    assert git.sha("main") == sha
    assert len(git.run("rev-list", "--parents", "-n1", sha).split()) == parents + 1
    assert len(git.commits(before, sha)) == commits + 1
    assert {row["path"] for row in git.tree(sha)} == {"README.md", "a", "b", "c"}
    assert (head in git.commits(before, sha)) == (method in ("merge", "queue"))
    for brought in github.world.pulls[number].brought:
        found = ask(github, "GET", f"/commits/{brought}/pulls").json()
        assert [(row["number"], row["merge_commit_sha"]) for row in found] == [(number, sha)]


def test_a_clone_sees_and_moves_what_the_api_shows(github, tmp_path):
    number, clone = github.open_pull("try", "alice", files={"a": "1"}), tmp_path / "clone"

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=alice", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    git("clone", "--quiet", "--branch", "try", str(github.git_dir), str(clone))
    (clone / "b").write_text("2")
    git("-C", str(clone), "add", "b")
    git("-C", str(clone), "commit", "--quiet", "-m", "more")
    git("-C", str(clone), "push", "--quiet", "origin", "try")
    pull = ask(github, "GET", f"/pulls/{number}").json()
    assert pull["head"]["sha"] == git("-C", str(clone), "rev-parse", "HEAD")
    assert github.world.git.sha(f"refs/pull/{number}/head") == pull["head"]["sha"]
    assert github.world.git.sha(f"refs/pull/{number}/merge") == pull["merge_commit_sha"]


def test_what_conflicts_is_not_merged(github):
    number = github.open_pull("try", "alice", files={"README.md": "one"})
    github.push("main", {"README.md": "other"}, "bob")
    with pytest.raises(Conflict):
        github.merge(number)


@pytest.mark.parametrize(
    ("rights", "status"),
    [({"issues": "write"}, 201), ({"pull-requests": "write"}, 201), ({"issues": "read", "contents": "write"}, 403)],
)
def test_an_actions_token_may_what_its_permissions_say(github, rights, status):
    number = github.open_pull("try", "alice", files={"a": "1"})
    answer = ask(github, "POST", f"/issues/{number}/comments", github.actions_token(rights), body="hello")
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["message"] == "Resource not accessible by integration"


def test_a_forks_token_reads_and_writes_nothing(github):
    number = github.open_pull("try", "eve", files={"a": "1"}, fork=True)
    sha, token = github.world.pulls[number].head_sha, github.fork_token()
    assert github.world.git.sha("refs/heads/try") is None
    assert ask(github, "GET", f"/pulls/{number}", token).json()["head"]["repo"]["full_name"] == "eve/models"
    for method, path, body in [
        ("POST", f"/issues/{number}/comments", {"body": "x"}),
        ("POST", f"/statuses/{sha}", {"state": "success"}),
        ("POST", "/issues", {"title": "x"}),
        ("PUT", "/actions/workflows/watch.yml/disable", {}),
    ]:
        assert ask(github, method, path, token, **body).status_code == 403


@pytest.mark.parametrize(("login", "status"), [("alice", 204), ("bob", 204), ("eve", 403)])
def test_a_person_may_what_their_permission_says(github, login, status):
    token = github.person_token(login)
    assert ask(github, "POST", "/actions/workflows/watch.yml/dispatches", token, ref="main").status_code == status
    assert [row.by for row in github.dispatches] == ([login] if status == 204 else [])


def test_unknown_tokens_other_repositories_and_wrong_bodies_are_refused(github):
    assert ask(github, "GET", "", "ghp_nobody").status_code == 401
    assert httpx2.get(f"{github.api_url}/repos/acme/other").status_code == 404
    assert ask(github, "POST", "/issues", github.actions_token(), oops=1).status_code == 422
    github.world.private = True
    assert ask(github, "GET", "").status_code == 404


def test_lists_come_in_pages_with_their_links(github):
    number = github.open_pull("try", "alice", files={"a": "1"})
    for index in range(70):
        github.comment(number, "bob", str(index))
    first = ask(github, "GET", f"/issues/{number}/comments")
    assert [row["body"] for row in first.json()] == [str(index) for index in range(30)]
    assert set(first.links) == {"next", "last"}
    last = httpx2.get(first.links["last"]["url"])
    assert [row["body"] for row in last.json()] == [str(index) for index in range(60, 70)]
    assert set(last.links) == {"prev"}


def test_planted_faults_happen_once_and_in_order(github):
    number = github.open_pull("try", "alice", files={"a": "1"})
    path, token = f"/issues/{number}/comments", github.actions_token()
    for action in [secondary_limit(7), primary_limit(1_800_000_000), bad_gateway(), bad_gateway(performed=True)]:
        github.faults.add(action=action, path="comments")
    limited, exhausted, failed, late = (ask(github, "POST", path, token, body=str(n)) for n in range(4))
    assert (limited.status_code, limited.headers["Retry-After"]) == (403, "7")
    assert exhausted.headers["X-RateLimit-Reset"] == "1800000000"
    assert (failed.status_code, late.status_code) == (502, 502)
    assert [comment.body for comment in github.comments(number)] == ["3"]
    github.faults.add(action=lose_response())
    github.faults.add(action=drop())
    for text in ("lost", "dropped"):
        with pytest.raises(httpx2.RemoteProtocolError):
            ask(github, "POST", path, token, body=text)
    assert [comment.body for comment in github.comments(number)] == ["3", "lost"]
    assert github.faults.left() == 0


def test_requests_are_remembered_without_the_token(github):
    ask(github, "GET", "/pulls?state=all", github.person_token("bob"))
    (exchange,) = github.requests
    assert (exchange.method, exchange.path, exchange.status, exchange.user) == (
        "GET",
        f"{REPO}/pulls?state=all",
        200,
        "bob",
    )
    assert "authorization" not in exchange.headers
    assert "ghp_" not in repr(exchange)


def test_a_lock_keeps_the_bot_out_and_lets_writers_in(github):
    number = github.open_pull("try", "alice", files={"a": "1"})
    github.world.pulls[number].locked = True
    statuses = [
        ask(github, "POST", f"/issues/{number}/comments", token, body="x").status_code
        for token in (github.actions_token(), github.person_token("eve"), github.person_token("bob"))
    ]
    assert statuses == [403, 403, 201]


def test_pull_request_events(github):
    number = github.open_pull("try", "eve", files={"a": "1"}, fork=True, title="Try it")
    event = github.event("pull_request", number)
    assert (event["action"], event["number"], event["sender"]["login"]) == ("opened", number, "eve")
    assert event["pull_request"]["head"]["repo"]["fork"] is True
    assert event["pull_request"]["base"]["ref"] == event["repository"]["default_branch"] == "main"
    before = event["pull_request"]["head"]["sha"]
    github.push("try", {"a": "2"}, "eve", number=number)
    again = github.event("pull_request", number, "synchronize", before=before)
    assert (again["before"], again["after"]) == (before, github.world.pulls[number].head_sha)
    github.merge(number, by="bob")
    closed = github.event("pull_request", number, "closed", by="bob")["pull_request"]
    assert (closed["merged"], closed["merged_by"]["login"], closed["state"]) == (True, "bob", "closed")


def test_push_and_queue_events(github):
    before = github.world.git.sha("main")
    number = github.open_pull("try", "alice", files={"a": "1", "b": "2"})
    queued = github.enqueue(number)
    group = github.event("merge_group", number, sha=queued)["merge_group"]
    assert group["head_ref"].startswith("refs/heads/gh-readonly-queue/main/pr-")
    assert (group["head_sha"], group["base_sha"]) == (queued, before)
    github.push("main", {"README.md": None, "c": "models\n"}, "bob", "Move")
    event = github.event("push", before=before, after=github.world.git.sha("main"), by="bob")
    assert (event["ref"], event["created"], event["forced"]) == ("refs/heads/main", False, False)
    (commit,) = event["commits"]
    assert (commit["message"], commit["added"], commit["removed"]) == ("Move", ["c"], ["README.md"])
    assert github.event("push", before=ZERO, after=before)["created"] is True
    assert github.event("push", before=before, after=ZERO)["head_commit"] is None


def test_other_events(github):
    number = github.open_pull("try", "alice", files={"a": "1"})
    event = github.event("issue_comment", github.comment(number, "eve", "/retry"))
    assert (event["action"], event["comment"]["body"], event["sender"]["login"]) == ("created", "/retry", "eve")
    assert event["issue"]["number"] == number
    assert "pull_request" in event["issue"]
    assert (event["comment"]["author_association"], event["comment"]["user"]["type"]) == ("COLLABORATOR", "User")
    run = github.event("workflow_dispatch", workflow="watch.yml", inputs={"experiment": "coach"})
    assert (run["inputs"], run["workflow"]) == ({"experiment": "coach"}, ".github/workflows/watch.yml")
    assert github.event("schedule")["schedule"] == "13,43 * * * *"
