"""What the loopback GitHub remembers beside git, and who may do what. Answers no request itself."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from servers.github_git import Conflict, Git
from servers.github_http import Refused
from servers.hub_http import Call

BOT = "github-actions[bot]"
BOT_ID = 41898282
RANKS = ["none", "read", "triage", "write", "maintain", "admin"]
INTEGRATION = "Resource not accessible by integration"


@dataclass(frozen=True)
class Token:
    """A token: a person's (with their permission) or an installation's, which has rights by area instead."""

    login: str
    rights: Mapping[str, str] | None = None


@dataclass
class Pull:
    """A pull request. `brought` are the commits that its merge put on the base branch."""

    number: int
    title: str
    body: str
    author: str
    branch: str
    head_repo: str | None
    base: str
    head_sha: str
    base_sha: str
    at: float
    draft: bool = False
    locked: bool = False
    open: bool = True
    merged_at: float | None = None
    merged_by: str | None = None
    merge_commit_sha: str | None = None
    brought: list[str] = field(default_factory=list)


@dataclass
class Issue:
    """An issue that is no pull request."""

    number: int
    title: str
    body: str
    author: str
    labels: list[str]
    at: float
    open: bool = True
    locked: bool = False


@dataclass
class Comment:
    """A comment in a conversation."""

    id: int
    number: int
    author: str | None  # None: the account is gone
    body: str
    at: float
    updated_at: float
    minimized: str | None = None
    edits: int = 0


@dataclass
class Review:
    """A review of a pull request at a commit."""

    id: int
    number: int
    author: str | None
    state: str
    sha: str | None
    body: str
    at: float


@dataclass(frozen=True)
class Status:
    """A commit status."""

    id: int
    sha: str
    context: str
    state: str
    description: str | None
    target_url: str | None
    creator: str
    at: float


@dataclass(frozen=True)
class Reaction:
    """A reaction to a comment."""

    id: int
    comment_id: int
    content: str
    user: str
    at: float


@dataclass
class Workflow:
    """A workflow file of the default branch."""

    id: int
    path: str
    state: str = "active"


@dataclass(frozen=True)
class Dispatch:
    """A workflow that somebody started by hand."""

    workflow: str
    ref: str
    inputs: Mapping[str, Any]
    by: str


@dataclass
class GitHubWorld:
    """Everything there is."""

    repository: str
    git: Git
    clock: Callable[[], float]
    prefix: str = ""
    url: str = ""
    private: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    people: dict[str, str] = field(default_factory=dict)  # login to permission
    tokens: dict[str, Token] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    issues: dict[int, Issue] = field(default_factory=dict)
    comments: dict[int, Comment] = field(default_factory=dict)
    reviews: list[Review] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)
    reactions: list[Reaction] = field(default_factory=list)
    workflows: dict[int, Workflow] = field(default_factory=dict)
    dispatches: list[Dispatch] = field(default_factory=list)
    secrets: dict[str | None, list[str]] = field(default_factory=dict)  # by environment; None: the repository's
    environments: dict[str, list[str]] = field(default_factory=dict)  # name to branch policies
    rulesets: dict[int, dict[str, Any]] = field(default_factory=dict)
    protection: dict[str, dict[str, Any]] = field(default_factory=dict)
    workflow_permissions: str = "read"
    _ids: int = 1000

    @property
    def api(self) -> str:
        """What GITHUB_API_URL holds."""
        return self.url + self.prefix

    def new_id(self) -> int:
        """An id nobody else has."""
        with self.lock:
            self._ids += 1
            return self._ids

    def next_number(self) -> int:
        """Issues and pull requests share one count."""
        return max([0, *self.pulls, *self.issues]) + 1

    def login_of(self, secret: str | None) -> str | None:
        """Whose token this is."""
        return self.tokens[secret].login if secret in self.tokens else None

    def require_known(self, call: Call) -> None:
        """A 401 for a token nobody has; without one everybody may read what is public."""
        if call.secret is None and self.private:
            raise Refused(404, "Not Found")
        if call.secret is not None and call.secret not in self.tokens:
            raise Refused(401, "Bad credentials")

    def need(self, call: Call, right: str, *areas: str, rank: str = "write") -> str:
        """Who asks, when they may: an installation by any of the areas, a person by their rank."""
        if call.secret is None:
            raise Refused(401, "Requires authentication")
        token = self.tokens[call.secret]
        if token.rights is not None:
            if not any(token.rights.get(area) in ("write", right) for area in areas):
                raise Refused(403, INTEGRATION)
        elif RANKS.index(self.people.get(token.login, "none")) < RANKS.index(rank):
            raise Refused(403, f"Must have {rank} rights to Repository.")
        return token.login

    def pull(self, number: str | int) -> Pull:
        """A pull request with the head that its branch has now; 404."""
        found = self.pulls.get(int(number)) if str(number).isdigit() else None
        if found is None:
            raise Refused(404, "Not Found")
        self.follow(found)
        return found

    def follow(self, pull: Pull) -> None:
        """The head of an open pull request is the tip of its branch, whoever pushed it; refs/pull/ follow."""
        if not pull.open:
            return
        if pull.head_repo == self.repository:
            pull.head_sha = self.git.sha(f"refs/heads/{pull.branch}") or pull.head_sha
        if self.git.sha(f"refs/pull/{pull.number}/head") != pull.head_sha or pull.merge_commit_sha is None:
            self.git.set(f"refs/pull/{pull.number}/head", pull.head_sha)
            self._try_merge(pull)

    def _try_merge(self, pull: Pull) -> None:
        """Keep refs/pull/N/merge: what a `pull_request` workflow checks out. An open one's merge commit is this."""
        try:
            base = self.commit(f"refs/heads/{pull.base}")
            sha = self.git.join(base, pull.head_sha, f"Merge {pull.head_sha} into {base}", self.clock())
        except Conflict:
            return
        pull.merge_commit_sha = sha
        self.git.set(f"refs/pull/{pull.number}/merge", sha)

    def conversation(self, number: str | int) -> Pull | Issue:
        """An issue or a pull request; 404."""
        key = int(number) if str(number).isdigit() else 0
        found = self.issues.get(key) or self.pulls.get(key)
        if found is None:
            raise Refused(404, "Not Found")
        return found

    def comment(self, comment_id: str | int) -> Comment:
        """A comment by its id; 404."""
        found = self.comments.get(int(comment_id)) if str(comment_id).isdigit() else None
        if found is None:
            raise Refused(404, "Not Found")
        return found

    def commit(self, ref: str) -> str:
        """A commit of this repository; 404 in GitHub's words."""
        sha = self.git.sha(ref)
        if sha is None:
            raise Refused(404, "Not Found")
        return sha

    def workflow(self, name: str) -> Workflow:
        """By id or file name; 404."""
        for workflow in self.workflows.values():
            if name in (str(workflow.id), workflow.path.rsplit("/", 1)[-1]):
                return workflow
        raise Refused(404, "Not Found")


def stamp(at: float | None) -> str | None:
    """Time as GitHub writes it."""
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
