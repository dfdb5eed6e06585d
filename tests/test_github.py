"""Our GitHub client against the loopback GitHub: what it answers and what it posts."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.github import LoopbackGitHub
from servers.github_git import ZERO
from servers.github_scene import KEY, MARK, RESULT, RUN, Clock, bodies, opened, populated_github, refusal
from servers.hub_faults import truncate_list

from pipeline.github import GitHub
from pipeline.pull_request import Access, ChangedFile, FileStatus, Permission

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


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


# What changed.


def test_changed_files_come_from_every_page(github, client):
    files = {f"experiments/e{index:03}.yaml": f"{index}\n" * 5 for index in range(150)}
    number = github.open_pull("try", "alice", files=files)
    github.push("try", {"README.md": None, "docs/README.md": "models\n"}, "alice")
    found = client.changed_files(number)
    assert {file.path for file in found} == {*files, "docs/README.md"}
    assert ChangedFile("docs/README.md", FileStatus.RENAMED, "README.md") in found


def test_a_list_without_its_end_is_an_error(github, client):
    number = github.open_pull("try", "alice", files={f"e{index}": str(index) for index in range(120)})
    github.faults.add(action=truncate_list(), method="GET", path="files")
    assert refusal(lambda: client.changed_files(number)).access is Access.INCOMPLETE


def test_more_files_than_github_lists_are_an_error(github, client):
    number = github.open_pull("try", "alice", files={f"e{index}": "" for index in range(3001)})
    error = refusal(lambda: client.changed_files(number))
    assert str(error) == f"incomplete: pull request #{number} changes 3,001 files, GitHub lists 3,000"


def test_files_of_a_push(github, client):
    before = github.world.git.sha("main")
    github.push("main", {"a": "1", "README.md": "new"}, "bob")
    after = github.push("main", {"b": "2"}, "bob")
    added = FileStatus.ADDED
    assert set(client.pushed_files(before, after)) == {
        ChangedFile("README.md", FileStatus.MODIFIED),
        ChangedFile("a", added),
        ChangedFile("b", added),
    }
    assert {file.path for file in client.pushed_files(ZERO, after)} == {"README.md", "a", "b"}
    assert client.pushed_files(after, ZERO) == ()
    assert client.pushed_files(after, after) == ()


def test_a_push_that_cannot_be_listed_is_an_error(github, client):
    before = github.world.git.sha("main")
    after = github.push("main", {"a": "1"}, "bob")
    side = github.push("side", {f"e{index}": "" for index in range(300)}, "bob")
    assert refusal(lambda: client.pushed_files(after, before)).access is Access.INCOMPLETE
    assert refusal(lambda: client.pushed_files(after, side)).access is Access.INCOMPLETE
    assert refusal(lambda: client.pushed_files("1" * 40, after)).access is Access.MISSING


# Who brought it, who approved it.


@pytest.mark.parametrize("method", ["merge", "squash", "rebase", "queue"])
def test_the_pull_request_of_a_commit(github, client, number, method):
    github.push("try", {"b": "2"}, "alice")
    sha = github.merge(number, method, by="mia")
    for commit in github.world.pulls[number].brought:
        found = client.pull_request_of(commit)
        assert found is not None
        assert (found.number, found.merge_sha, found.merged_by, found.open) == (number, sha, "mia", False)
    pushed = github.push("main", {"direct": "1"}, "bob")
    assert client.pull_request_of(pushed) is None
    assert client.pull_request_of(sha, branch="release") is None


def test_a_commit_of_an_open_pull_request_was_brought_by_none(github, client, number):
    assert client.pull_request_of(github.world.pulls[number].head_sha) is None


def test_a_stacked_pull_request_did_not_bring_the_commit(github, client, number):
    stacked = github.open_pull("more", "alice", files={"more": "1"}, base="try")
    inner = github.merge(stacked, by="alice")
    github.merge(number, by="bob")
    found = client.pull_request_of(inner)
    assert found is not None
    assert found.number == number


def test_approvals_are_of_writers_on_the_merged_head(github, client, number):
    stale = github.world.pulls[number].head_sha
    github.approve(number, "mia")
    github.add_person("helper[bot]", "write")
    head = github.push("try", {"b": "2"}, "alice")
    for login in ("alice", "bob", "tim", "eve", "out", "ghost", "helper[bot]"):
        github.approve(number, login)
    github.review(number, None)
    pull = client.pull_request(number)
    assert (pull.head_sha, client.approvals(pull)) == (head, ("bob",))
    github.merge(number, "squash", by="bob")
    github.approve(number, "mia", stale)
    assert client.approvals(client.pull_request(number)) == ("bob",)
    github.approve(number, "mia")
    assert client.approvals(client.pull_request(number)) == ("bob", "mia")


def test_reviews_come_from_every_page(github, client, number):
    for _ in range(120):
        github.review(number, "bob", "COMMENTED")
    github.approve(number, "bob")
    assert client.approvals(client.pull_request(number)) == ("bob",)


@pytest.mark.parametrize(
    ("login", "expected", "writes"),
    [
        ("alice", Permission.ADMIN, True),
        ("mia", Permission.MAINTAIN, True),
        ("bob", Permission.WRITE, True),
        ("tim", Permission.TRIAGE, False),
        ("eve", Permission.READ, False),
        ("nobody", Permission.NONE, False),
    ],
)
def test_permissions(client, login, expected, writes):
    assert (client.permission(login), client.permission(login).writes) == (expected, writes)


def test_a_fork_is_known_as_one(github, client):
    number = github.open_pull("try", "eve", files={"a": "1"}, fork=True)
    assert client.pull_request(number).from_fork
    github.world.pulls[number].head_repo = None
    assert client.pull_request(number).from_fork


# The sticky comment.


def test_a_sticky_comment_is_made_once_and_edited_when_it_differs(github, client, number):
    first = client.sticky_comment(number, KEY, f"{MARK}\none")
    assert first.startswith(f"{github.world.url}/acme/models/pull/{number}#issuecomment-")
    assert client.sticky_comment(number, KEY, f"{MARK}\none\n") == first
    assert github.comments(number)[0].edits == 0
    assert client.sticky_comment(number, KEY, f"{MARK}\ntwo") == first
    client.sticky_comment(number, "plan:coach-2", "<!-- mergetune:plan:coach-2 -->")
    assert bodies(github, number) == [f"{MARK}\ntwo", "<!-- mergetune:plan:coach-2 -->"]


def test_a_sticky_comment_is_found_beyond_a_hundred_others(github, client, number):
    for index in range(150):
        github.comment(number, "eve", str(index))
    client.sticky_comment(number, KEY, MARK)
    client.sticky_comment(number, KEY, f"{MARK}\nagain")
    assert bodies(github, number)[150:] == [f"{MARK}\nagain"]


def test_a_marker_counts_only_from_the_bot_and_only_up_front(github, client, number):
    forged = [f"{MARK}\nplan=mine", f"quoted\n{MARK}", "<!-- mergetune:plan:coachman -->"]
    for login, body in zip(("eve", "github-actions[bot]", "github-actions[bot]"), forged, strict=True):
        github.comment(number, login, body)
    github.comment(number, "github-actions", MARK)
    github.comment(number, None, MARK)
    client.sticky_comment(number, KEY, f"{MARK}\nreal")
    assert bodies(github, number) == [*forged, MARK, MARK, f"{MARK}\nreal"]


def test_a_minimized_sticky_comment_is_replaced(github, client, number):
    github.comment(number, "github-actions[bot]", MARK, minimized="outdated")
    client.sticky_comment(number, KEY, MARK)
    client.sticky_comment(number, KEY, MARK)
    assert bodies(github, number) == [MARK, MARK]


def test_a_second_copy_is_cleared_away(github, client, number):
    for _ in range(2):
        github.comment(number, "github-actions[bot]", MARK)
    client.sticky_comment(number, KEY, f"{MARK}\nlater")
    assert bodies(github, number) == [f"{MARK}\nlater"]


PROCESS = """
import sys
from pipeline.github import open_github
url, number, text = sys.argv[1:]
print(open_github(url, "ghs_loopback", "acme/models").sticky_comment(int(number), "plan:coach", text))
"""


def test_two_processes_leave_one_sticky_comment(github, number):
    github.actions_token()
    both_looked = threading.Barrier(2)

    def meet(exchange: object) -> None:
        if github.requests.index(exchange) < 2:  # nobody posts before both have seen that there is none
            both_looked.wait(60)

    github.on_request = meet
    texts = [f"{MARK}\n{name}" for name in ("one", "two")]
    command = [sys.executable, "-c", PROCESS, github.api_url, str(number)]
    running = [subprocess.Popen([*command, text], cwd=ROOT, stdout=subprocess.PIPE, text=True) for text in texts]
    addresses = {process.communicate(timeout=90)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(addresses) == 1
    assert sum(exchange.method == "POST" for exchange in github.requests) == 2
    assert len(bodies(github, number)) == 1
    assert bodies(github, number)[0] in texts


@pytest.mark.parametrize("text", ["x" * 60_001, "no marker", f" {MARK}"])
def test_a_text_that_cannot_be_posted_or_found_again_is_refused(github, client, number, text):
    assert refusal(lambda: client.sticky_comment(number, KEY, text)).access is Access.REFUSED
    assert github.requests == []
    assert str(refusal(lambda: client.final_comment(number, RUN, f"{RESULT}{'x' * 60_000}"))) == (
        "refused: the comment `result:coach-12345678` has 60,045 characters; at most 60,000 are posted"
    )


# The final comment.


def test_a_final_comment_is_posted_once_for_a_run(github, client, number):
    github.comment(number, "eve", RESULT)
    first = client.final_comment(number, RUN, RESULT)
    github.world.comments[max(github.world.comments)].minimized = "resolved"
    assert client.final_comment(number, RUN, f"{RESULT} again") == first
    other = RESULT.replace(RUN, "coach-87654321")
    client.final_comment(number, "coach-87654321", other)
    assert bodies(github, number) == [RESULT, RESULT, other]


def test_a_locked_conversation_is_answered_in_an_issue(github, client, number):
    github.world.pulls[number].locked = True
    first = client.final_comment(number, RUN, RESULT)
    assert client.final_comment(number, RUN, RESULT) == first
    client.sticky_comment(number, KEY, MARK)
    client.sticky_comment(number, KEY, f"{MARK}\nmore")
    assert bodies(github, number) == []
    found = [(issue.title, issue.body, issue.labels) for issue in github.issues()]
    assert found == [
        (f"mergetune: result:{RUN} (#{number})", RESULT, ["mergetune"]),
        (f"mergetune: plan:coach (#{number})", f"{MARK}\nmore", ["mergetune"]),
    ]


def test_the_issue_of_a_direct_push(github, client):
    mark = "<!-- mergetune:pushed:coach -->"
    assert client.issue("pushed:coach", "Not launched", mark) == client.issue("pushed:coach", "Not launched", mark)
    assert len(github.issues()) == 1
