"""What GitHub says about a pull request, as values, and what follows from them. Asks nothing, posts nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.errors import Finding, Severity, redact

BOT = "github-actions[bot]"  # whose comments a workflow's GITHUB_TOKEN makes; nobody can register a name with brackets
LONGEST_COMMENT = 60_000  # characters; GitHub refuses more than 65,536
LONGEST_DESCRIPTION = 140  # characters of a commit status
ANNOTATIONS = 10  # that GitHub shows of each kind for one step
ZERO = "0" * 40  # in a push event: there was no commit before, or there is none after


class Access(StrEnum):
    """How GitHub answered; an outage or a limit is an answer of its own, never taken for absence.

    `MISSING` is all GitHub says of what is not there or may not be seen. `INCOMPLETE`: there is more than it lists.
    """

    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    LOCKED = "locked"
    MISSING = "missing"
    LIMITED = "rate limited"
    INCOMPLETE = "incomplete"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


class GitHubError(Exception):
    """GitHub did not do what was asked: what kind of answer it was, and its words without any token."""

    def __init__(self, access: Access, detail: str) -> None:
        super().__init__(f"{access}: {detail}")
        self.access = access
        self.detail = detail


class Permission(StrEnum):
    """What somebody may do in the repository."""

    NONE = "none"
    READ = "read"
    TRIAGE = "triage"
    WRITE = "write"
    MAINTAIN = "maintain"
    ADMIN = "admin"

    @property
    def writes(self) -> bool:
        """Whether it includes pushing, and with it merging and commanding."""
        return self in (Permission.WRITE, Permission.MAINTAIN, Permission.ADMIN)


class FileStatus(StrEnum):
    """What a change did to a file."""

    ADDED = "added"
    MODIFIED = "modified"
    REMOVED = "removed"
    RENAMED = "renamed"
    COPIED = "copied"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


class ReviewState(StrEnum):
    """What a review says."""

    APPROVED = "APPROVED"
    CHANGES_REQUESTED = "CHANGES_REQUESTED"
    COMMENTED = "COMMENTED"
    DISMISSED = "DISMISSED"
    PENDING = "PENDING"


class StatusState(StrEnum):
    """The state of a commit status."""

    ERROR = "error"
    FAILURE = "failure"
    PENDING = "pending"
    SUCCESS = "success"


class Reaction(StrEnum):
    """How a command is answered at once."""

    DONE = "+1"
    REFUSED = "-1"
    SEEN = "eyes"
    LAUNCHED = "rocket"


@dataclass(frozen=True)
class ChangedFile:
    """A file of a pull request or push; `previous` is where a renamed one was."""

    path: str
    status: FileStatus
    previous: str | None = None


@dataclass(frozen=True)
class PullRequest:
    """A pull request. `head_sha` of a merged one stays what it was at the merge; `head_repo` is None when deleted.

    `merged_by` and `changed_files` are None where it was found in a list, which does not say.
    """

    number: int
    title: str
    url: str
    author: str | None
    base: str
    base_repo: str
    head: str
    head_sha: str
    head_repo: str | None
    open: bool
    merged_at: str | None = None
    merge_sha: str | None = None
    merged_by: str | None = None
    changed_files: int | None = None

    @property
    def from_fork(self) -> bool:
        """Whether its branch is not in this repository, so that its workflows run without secrets."""
        return self.head_repo is None or self.head_repo.lower() != self.base_repo.lower()


@dataclass(frozen=True)
class Comment:
    """A comment or, with its number as id, an issue's own text. `author` is None when the account is gone."""

    id: int
    author: str | None
    body: str
    url: str
    minimized: bool = False


@dataclass(frozen=True)
class Review:
    """A review by an account, of the commit it looked at."""

    author: str | None
    state: ReviewState
    sha: str | None
    by_bot: bool = False


def read_pull(body: Mapping[str, Any]) -> PullRequest:
    """A pull request of GitHub's answer or of an event's payload."""
    head, base = body["head"], body["base"]
    return PullRequest(
        number=body["number"],
        title=body["title"],
        url=body["html_url"],
        author=_login(body["user"]),
        base=base["ref"],
        base_repo=base["repo"]["full_name"],
        head=head["ref"],
        head_sha=head["sha"],
        head_repo=head["repo"]["full_name"] if head["repo"] else None,
        open=body["state"] == "open",
        merged_at=body["merged_at"],
        merge_sha=body["merge_commit_sha"],
        merged_by=_login(body.get("merged_by")),
        changed_files=body.get("changed_files"),
    )


def read_file(body: Mapping[str, Any]) -> ChangedFile:
    """One row of a list of changed files."""
    return ChangedFile(body["filename"], FileStatus(body["status"]), body.get("previous_filename"))


def read_comment(body: Mapping[str, Any]) -> Comment:
    """A comment; servers that do not say whether it is minimized have it shown."""
    minimized = body.get("minimized") is not None
    return Comment(body["id"], _login(body["user"]), body.get("body") or "", body["html_url"], minimized)


def read_issue(body: Mapping[str, Any]) -> Comment:
    """An issue by its number, as a thing that has an author and a text."""
    return Comment(body["number"], _login(body["user"]), body.get("body") or "", body["html_url"])


def read_review(body: Mapping[str, Any]) -> Review:
    """A review."""
    bot = (body["user"] or {}).get("type") == "Bot"
    return Review(_login(body["user"]), ReviewState(body["state"]), body["commit_id"], bot)


def _login(user: Mapping[str, Any] | None) -> str | None:
    return str(user["login"]) if user else None


def marker_of(key: str) -> str:
    """How a comment under this key begins; facts and ` -->` follow. `plan:<name>`, `result:<run_id>`."""
    return f"<!-- mergetune:{key}"


def carries(body: str, key: str) -> bool:
    """Whether a text begins with the marker of exactly this key."""
    start = marker_of(key)
    return body.startswith(start) and body[len(start) :].startswith((" ", "-->"))


def ours(comments: Iterable[Comment], key: str, login: str) -> list[Comment]:
    """Comments under the key by this account, oldest first: anyone can type a marker, and it counts only up front."""
    found = [comment for comment in comments if comment.author == login and carries(comment.body, key)]
    return sorted(found, key=lambda comment: comment.id)


def same_text(one: str, other: str) -> bool:
    """Whether two comments read the same: GitHub may keep line ends of its own and drop blanks at the end."""
    return one.replace("\r\n", "\n").strip() == other.replace("\r\n", "\n").strip()


def brought_by(pulls: Iterable[PullRequest], sha: str, repository: str, branch: str) -> PullRequest | None:
    """Which of the pull requests with this commit brought it to the branch; None: nobody asked, it was pushed.

    Stacked pull requests share commits: one that was merged elsewhere, or not at all, brought nothing here.
    """
    merged = [
        pull
        for pull in pulls
        if pull.merged_at and pull.base == branch and pull.base_repo.lower() == repository.lower()
    ]
    exact = [pull for pull in merged if pull.merge_sha == sha]
    return min(exact or merged, key=lambda pull: (pull.merged_at or "", pull.number), default=None)


def approvers(reviews: Iterable[Review], author: str | None, head_sha: str) -> tuple[str, ...]:
    """People, not the author, whose last word is an approval of exactly this commit. Permission is another question.

    A comment takes nothing back; a dismissal and a request for changes do. Reviews come oldest first.
    """
    last: dict[str, Review] = {}
    for review in reviews:
        if review.author and not review.by_bot and review.state not in (ReviewState.COMMENTED, ReviewState.PENDING):
            last.pop(review.author, None)  # so that the order is that of the last words
            last[review.author] = review
    return tuple(
        login
        for login, review in last.items()
        if review.state is ReviewState.APPROVED and review.sha == head_sha and login != author
    )


def short_description(text: str) -> str:
    """One line of at most 140 characters, as a commit status wants it."""
    line = " ".join(redact(text).split())
    return line if len(line) <= LONGEST_DESCRIPTION else f"{line[: LONGEST_DESCRIPTION - 1]}…"


def annotation(finding: Finding) -> str:
    """One workflow command; its grammar wants `%`, line ends, and in properties `:` and `,` escaped."""
    at = finding.at
    where = f"file={_property(at.path)},line={max(at.line, 1)},col={max(at.column, 1)}"
    text = finding.message + (f"\nhint: {finding.hint}" if finding.hint else "")
    return f"::{finding.severity} {where},title={_property(finding.rule)}::{_data(text)}"


def annotations(findings: Iterable[Finding]) -> str:
    """Workflow commands for a step's output, with a word about those beyond the ten of a kind that GitHub shows."""
    rows = list(findings)
    lines: list[str] = []
    for severity in Severity:
        same = [finding for finding in rows if finding.severity is severity]
        lines += [annotation(finding) for finding in same[:ANNOTATIONS]]
        if len(same) > ANNOTATIONS:
            more = len(same) - ANNOTATIONS
            lines.append(f"::notice title=mergetune::{more} more {severity}s: see the summary of this workflow run")
    return "\n".join(lines)


def _data(text: str) -> str:
    return redact(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
