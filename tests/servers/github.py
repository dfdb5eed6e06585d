"""The loopback GitHub: one repository, its pull requests and its conversations, over HTTP on 127.0.0.1. For tests only.

    with LoopbackGitHub(tmp_path, people={"alice": "write"}) as github:
        token = github.actions_token()
        number = github.open_pull("try", "alice", files={"experiments/a.yaml": "..."})
        sha = github.merge(number, method="squash", by="alice")

Its git side is a real bare repository (`github.git_dir`), which other programs may clone and push to by path.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from servers.github_events import (
    issue_comment_event,
    merge_group_event,
    pull_request_event,
    push_event,
    queue_branch,
    schedule_event,
    workflow_dispatch_event,
)
from servers.github_git import init_git
from servers.github_http import Exchange, GitHubFront, GitHubServer, answer_call
from servers.github_issue_views import issue_routes
from servers.github_pull_views import pull_routes
from servers.github_setup_views import setup_routes
from servers.github_state import BOT, Comment, Dispatch, GitHubWorld, Issue, Pull, Review, Status, Token, Workflow
from servers.hub_faults import Faults
from servers.hub_http import Answer, Call

Files = Mapping[str, str | bytes | None]
WRITE = {"contents": "write", "pull-requests": "write", "issues": "write", "statuses": "write", "actions": "write"}
FORK = {"contents": "read", "pull-requests": "read", "issues": "read"}


class LoopbackGitHub:
    """A GitHub with one repository."""

    def __init__(
        self,
        root: Path,
        *,
        repository: str = "acme/models",
        people: Mapping[str, str] | None = None,
        files: Files | None = None,
        prefix: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder = root / "loopback-github" / f"{repository}.git"
        git = init_git(folder, files or {"README.md": "models\n"}, repository.partition("/")[0], clock())
        self.world = GitHubWorld(repository, git, clock, prefix, people=dict(people or {}))
        self.faults = Faults()
        self.on_request: Callable[[Exchange], None] | None = None
        world = self.world
        self._front = GitHubFront(self._perform, world.login_of, prefix, self.faults, clock, self._heard)
        self.routes = [*pull_routes(), *issue_routes(), *setup_routes()]
        self._server = GitHubServer(self._front)
        world.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackGitHub":
        threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._front.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()

    @property
    def api_url(self) -> str:
        """What GITHUB_API_URL holds."""
        return self.world.api

    @property
    def git_dir(self) -> Path:
        """The bare repository."""
        return self.world.git.path

    @property
    def repository(self) -> str:
        """Owner and name."""
        return self.world.repository

    @property
    def requests(self) -> list[Exchange]:
        """Every request so far, oldest first, without its Authorization header."""
        return list(self._front.requests)

    def _perform(self, call: Call) -> Answer:
        owner = f"/repos/{self.repository}".lower()
        path = call.path.removeprefix(self.world.prefix).lower()
        known = path == "/rate_limit" or path == owner or path.startswith(f"{owner}/")
        return answer_call(self.routes if known else [], self.world, call)

    def _heard(self, exchange: Exchange) -> None:
        if self.on_request:
            self.on_request(exchange)

    # People.

    def add_person(self, login: str, permission: str = "read") -> None:
        """An account: `none`, `read`, `triage`, `write`, `maintain` or `admin` here."""
        self.world.people[login] = permission

    def actions_token(self, rights: Mapping[str, str] = WRITE, value: str = "ghs_loopback") -> str:
        """A GITHUB_TOKEN with these `permissions:`."""
        self.world.tokens[value] = Token(BOT, {**rights, "metadata": "read"})
        return value

    def fork_token(self, value: str = "ghs_fork") -> str:
        """What a workflow run of a fork's pull request gets: it only reads."""
        return self.actions_token(FORK, value)

    def person_token(self, login: str, value: str | None = None) -> str:
        """A personal access token."""
        made = value or f"ghp_loopback_{login}"
        self.world.tokens[made] = Token(login)
        return made

    # The story.

    def push(
        self,
        branch: str,
        files: Files,
        by: str,
        message: str = "Change",
        *,
        base: str = "main",
        number: int | None = None,
    ) -> str:
        """Commit to a branch (to a fork's by the `number` of its pull request); a new branch starts at `base`."""
        world, pull = self.world, self.world.pulls.get(number or 0)
        ref = f"refs/pull/{number}/head" if pull else f"refs/heads/{branch}"
        with world.lock:
            parent = world.git.sha(ref) or world.commit(f"refs/heads/{base}")
            sha = world.git.commit(ref, parent, files, by, message, world.clock())
            if pull:
                pull.head_sha = sha
        return sha

    def open_pull(
        self,
        branch: str,
        author: str,
        *,
        files: Files | None = None,
        fork: bool = False,
        body: str = "",
        title: str = "Try something",
        base: str = "main",
        draft: bool = False,
    ) -> int:
        """A pull request of a branch, which `files` creates or continues; its number."""
        world, number = self.world, self.world.next_number()
        with world.lock:
            ref = f"refs/pull/{number}/head" if fork else f"refs/heads/{branch}"
            tip = world.commit(f"refs/heads/{base}")
            head = world.git.sha(ref) or tip
            if files is not None:
                head = world.git.commit(ref, head, files, author, title, world.clock())
            home = f"{author}/{world.repository.partition('/')[2]}" if fork else world.repository
            root = world.git.merge_base(tip, head)
            pull = Pull(number, title, body, author, branch, home, base, head, root, world.clock(), draft)
            world.pulls[number] = pull
            world.follow(pull)
        return number

    def enqueue(self, number: int) -> str:
        """Put a pull request into the merge queue: the commit that its checks run on."""
        world, pull = self.world, self.world.pull(number)
        base = world.commit(f"refs/heads/{pull.base}")
        sha = world.git.join(base, pull.head_sha, self._merge_message(pull), world.clock())
        world.git.set(f"refs/heads/{queue_branch(pull.base, number, base)}", sha)
        return sha

    def merge(self, number: int, method: str = "merge", by: str = "alice") -> str:
        """Merge by `merge`, `squash`, `rebase` or `queue`; the commit that the base branch has then."""
        world, pull = self.world, self.world.pull(number)
        with world.lock:
            git, now = world.git, world.clock()
            base = world.commit(f"refs/heads/{pull.base}")
            own = git.commits(base, pull.head_sha)
            match method:
                case "merge":
                    made = [*own, git.join(base, pull.head_sha, self._merge_message(pull), now, by=by)]
                case "squash":
                    made = [git.join(base, pull.head_sha, f"{pull.title} (#{number})", now, squash=True, by=by)]
                case "rebase":
                    made = git.replay(base, pull.head_sha, now)
                case "queue":
                    made = [*own, self.enqueue(number)]
                case _:
                    raise ValueError(method)
            git.set(f"refs/heads/{pull.base}", made[-1])
            pull.open, pull.merged_at, pull.merged_by = False, now, by
            pull.merge_commit_sha, pull.brought = made[-1], made
        return made[-1]

    def _merge_message(self, pull: Pull) -> str:
        owner = (pull.head_repo or "ghost").partition("/")[0]
        return f"Merge pull request #{pull.number} from {owner}/{pull.branch}\n\n{pull.title}"

    def close(self, number: int) -> None:
        """Close without merging."""
        self.world.pull(number).open = False

    def review(self, number: int, login: str | None, state: str = "APPROVED", sha: str | None = None) -> Review:
        """A review: `APPROVED`, `CHANGES_REQUESTED`, `COMMENTED` or `DISMISSED`, of the head unless `sha` says else."""
        world, pull = self.world, self.world.pull(number)
        review = Review(world.new_id(), number, login, state, sha or pull.head_sha, "", world.clock())
        world.reviews.append(review)
        return review

    def approve(self, number: int, login: str, sha: str | None = None) -> Review:
        """An approval of the head, or of another commit."""
        return self.review(number, login, "APPROVED", sha)

    def comment(self, number: int, login: str | None, body: str, minimized: str | None = None) -> int:
        """Somebody's comment; its id."""
        world, now = self.world, self.world.clock()
        made = Comment(world.new_id(), world.conversation(number).number, login, body, now, now, minimized)
        world.comments[made.id] = made
        return made.id

    def add_workflow(self, name: str, state: str = "active") -> None:
        """A workflow file of the default branch."""
        made = Workflow(self.world.new_id(), f".github/workflows/{name}", state)
        self.world.workflows[made.id] = made

    # What there is.

    def comments(self, number: int) -> list[Comment]:
        """The conversation, oldest first."""
        return [comment for comment in self.world.comments.values() if comment.number == number]

    def issues(self) -> list[Issue]:
        """Issues that are no pull requests, oldest first."""
        return list(self.world.issues.values())

    def statuses(self, sha: str) -> dict[str, Status]:
        """The latest commit status by context."""
        return {status.context: status for status in self.world.statuses if status.sha == sha}

    def reactions(self, comment_id: int) -> list[tuple[str, str]]:
        """Who reacted how."""
        return [(row.user, row.content) for row in self.world.reactions if row.comment_id == comment_id]

    @property
    def dispatches(self) -> list[Dispatch]:
        """Workflows that were started by hand, oldest first."""
        return list(self.world.dispatches)

    def event(self, name: str, number: int = 0, action: str = "opened", **facts: Any) -> dict[str, Any]:
        """The payload of an event; `number` is a pull request's, or a comment's id for `issue_comment`."""
        world = self.world
        match name:
            case "pull_request":
                return pull_request_event(world, number, action, facts.get("by"), facts.get("before"))
            case "merge_group":
                return merge_group_event(world, number, facts["sha"], facts.get("by"))
            case "push":
                ref = facts.get("ref", "refs/heads/main")
                return push_event(world, facts["before"], facts["after"], ref, facts.get("by", "alice"))
            case "issue_comment":
                return issue_comment_event(world, number, "created" if action == "opened" else action)
            case "workflow_dispatch":
                inputs, by = facts.get("inputs", {}), facts.get("by", "alice")
                return workflow_dispatch_event(world, facts["workflow"], inputs, "refs/heads/main", by)
            case "schedule":
                return schedule_event(world, facts.get("cron", "13,43 * * * *"))
        raise ValueError(name)
