"""GitHub's questions and posts about one repository: pull requests, comments, statuses, workflows. Decides nothing.

Nothing appears twice: a post whose answer was lost is looked for before it is posted again, and where two processes
posted the same, the first comment stays.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pipeline.github_api import Api, open_api
from pipeline.pull_request import (
    BOT,
    LONGEST_COMMENT,
    ZERO,
    Access,
    ChangedFile,
    Comment,
    FileStatus,
    GitHubError,
    Permission,
    PullRequest,
    Reaction,
    StatusState,
    approvers,
    brought_by,
    carries,
    marker_of,
    ours,
    read_comment,
    read_file,
    read_issue,
    read_pull,
    read_review,
    same_text,
    short_description,
)

FILES_OF_A_PULL = 3000  # GitHub lists no more (docs: "List pull requests files")
FILES_OF_A_PUSH = 300  # GitHub lists no more (docs: "Compare two commits")
LABEL = "mergetune"  # on issues of ours, so that they are found again


@dataclass(frozen=True)
class GitHub:
    """One repository as one account sees it; every method raises `GitHubError` for an answer that is not yes."""

    api: Api
    login: str  # whose comments are ours

    # Questions.

    def pull_request(self, number: int) -> PullRequest:
        """A pull request by its number."""
        return self.api.read(read_pull, self.api.get(f"pulls/{number}"))

    def changed_files(self, number: int) -> tuple[ChangedFile, ...]:
        """Every file that a pull request changes; an error where GitHub does not list them all."""
        expected = self.pull_request(number).changed_files
        if expected is None:
            raise GitHubError(Access.INCOMPLETE, f"it is not said how many files pull request #{number} changes")
        if expected > FILES_OF_A_PULL:
            words = f"pull request #{number} changes {expected:,} files, GitHub lists {FILES_OF_A_PULL:,}"
            raise GitHubError(Access.INCOMPLETE, words)
        files = tuple(self.api.read(read_file, row) for row in self.api.items(f"pulls/{number}/files"))
        if len(files) < expected:
            raise GitHubError(Access.INCOMPLETE, f"{len(files)} of the {expected} files of pull request #{number}")
        return files

    def pushed_files(self, before: str, after: str) -> tuple[ChangedFile, ...]:
        """Every file that a push changed; all there are where the branch is new."""
        if after == ZERO:
            return ()
        if before == ZERO:
            return self._all_files(after)
        body = self.api.get(
            f"compare/{quote(before, safe='')}...{quote(after, safe='')}", {"per_page": "1", "page": "1"}
        )
        status, rows = self.api.read(lambda found: (found["status"], found["files"]), body)
        # A comparison starts at the common ancestor: after a forced push it says nothing of what went away.
        if status not in ("ahead", "identical"):
            raise GitHubError(
                Access.INCOMPLETE, f"`{after[:12]}` does not follow `{before[:12]}`: history was rewritten"
            )
        if len(rows) >= FILES_OF_A_PUSH:
            raise GitHubError(
                Access.INCOMPLETE, f"the push changes {FILES_OF_A_PUSH} files or more: not all are listed"
            )
        return tuple(self.api.read(read_file, row) for row in rows)

    def _all_files(self, sha: str) -> tuple[ChangedFile, ...]:
        body = self.api.get(f"git/trees/{quote(sha, safe='')}", {"recursive": "1"})
        cut, rows = self.api.read(lambda found: (found["truncated"], found["tree"]), body)
        if cut:
            raise GitHubError(Access.INCOMPLETE, f"the tree of `{sha[:12]}` is too large to be listed")
        paths = self.api.read(lambda found: [row["path"] for row in found if row["type"] == "blob"], rows)
        return tuple(ChangedFile(path, FileStatus.ADDED) for path in paths)

    def pull_request_of(self, sha: str, branch: str = "main") -> PullRequest | None:
        """The pull request that brought a commit to the branch, however it was merged; None for a direct push."""
        rows = self.api.items(f"commits/{quote(sha, safe='')}/pulls")
        found = brought_by([self.api.read(read_pull, row) for row in rows], sha, self.api.repository, branch)
        return found and self.pull_request(found.number)  # only by its number GitHub says who merged it

    def permission(self, login: str) -> Permission:
        """What somebody may do here; nothing, for an account that is gone."""
        try:
            body = self.api.get(f"collaborators/{quote(login, safe='')}/permission")
        except GitHubError as error:
            if error.access is Access.MISSING:
                return Permission.NONE
            raise
        # A role of an organisation's own making has a name of its own; `permission` says what it amounts to.
        role, coarse = self.api.read(lambda found: (found.get("role_name"), found["permission"]), body)
        return self.api.read(Permission, role if role in set(Permission) else coarse)

    def approvals(self, pull: PullRequest) -> tuple[str, ...]:
        """Who approved exactly the head commit and may write, in the order of their reviews; the author never."""
        reviews = [self.api.read(read_review, row) for row in self.api.items(f"pulls/{pull.number}/reviews")]
        return tuple(login for login in approvers(reviews, pull.author, pull.head_sha) if self.permission(login).writes)

    def comments(self, number: int) -> tuple[Comment, ...]:
        """The whole conversation of a pull request or issue."""
        return tuple(self.api.read(read_comment, row) for row in self.api.items(f"issues/{number}/comments"))

    # Words.

    def sticky_comment(self, number: int, key: str, body: str) -> str:
        """The one comment under the key says this from now on; its address. On a locked conversation, an issue does."""
        _check(key, body)
        try:
            return self._kept(number, key, body)
        except GitHubError as error:
            if error.access is not Access.LOCKED:
                raise
            return self.issue(key, f"mergetune: {key} (#{number})", body)

    def final_comment(self, number: int, run_id: str, body: str) -> str:
        """A new comment, once for a run, since edits notify nobody; its address. An issue on a locked conversation."""
        key = f"result:{run_id}"
        _check(key, body)
        for known in ours(self.comments(number), key, self.login):  # a minimized one was read, too
            return known.url
        try:
            return self._created(number, key, body).url
        except GitHubError as error:
            if error.access is not Access.LOCKED:
                raise
            return self.issue(key, f"mergetune: {key} (#{number})", body)

    def issue(self, key: str, title: str, body: str) -> str:
        """The one issue under the key and title says this from now on; its address."""
        _check(key, body)
        title = " ".join(title.split())

        def look() -> Comment | None:
            rows = self.api.items("issues", {"labels": LABEL, "state": "all"})
            same = [
                self.api.read(read_issue, row) for row in rows if "pull_request" not in row and row["title"] == title
            ]
            return next(iter(ours(same, key, self.login)), None)

        known = look()
        if known is None:
            return self._post_once("issues", {"title": title, "body": body, "labels": [LABEL]}, read_issue, look).url
        if not same_text(known.body, body):
            self.api.ask("PATCH", f"issues/{known.id}", body={"body": body})
        return known.url

    def _kept(self, number: int, key: str, body: str) -> str:
        shown = self._shown(number, key)
        first = shown[0] if shown else self._created(number, key, body)
        for later in shown[1:]:  # of a process that stopped between its post and its second look
            self._delete(later)
        if not same_text(first.body, body):
            self.api.ask("PATCH", f"issues/comments/{first.id}", body={"body": body})
        return first.url

    def _shown(self, number: int, key: str) -> list[Comment]:
        return [comment for comment in ours(self.comments(number), key, self.login) if not comment.minimized]

    def _created(self, number: int, key: str, body: str) -> Comment:
        """A new comment; somebody else's under the key where theirs came first, and then not ours."""

        def look() -> Comment | None:
            return next(iter(self._shown(number, key)), None)

        made = self._post_once(f"issues/{number}/comments", {"body": body}, read_comment, look)
        first = look() or made
        if first.id < made.id:
            self._delete(made)
            return first
        return made

    def _delete(self, comment: Comment) -> None:
        try:
            self.api.ask("DELETE", f"issues/comments/{comment.id}")
        except GitHubError as error:
            if error.access is not Access.MISSING:  # somebody was as quick as we
                raise

    def _post_once(
        self, path: str, body: object, read: Callable[[Any], Comment], look: Callable[[], Comment | None]
    ) -> Comment:
        """What was posted; after a lost answer it is looked for before it is posted again, and that only once."""
        try:
            return self.api.read(read, self.api.json(self.api.ask("POST", path, body=body, repeat=False)))
        except GitHubError as error:
            if error.access is not Access.UNREACHABLE:
                raise
        self.api.sleep(1.0)  # a post whose answer was lost may still be under way
        return look() or self.api.read(read, self.api.json(self.api.ask("POST", path, body=body, repeat=False)))

    # Marks and nudges. All may be sent twice: the last status counts, a reaction is there or not, a run only looks.

    def set_status(self, sha: str, name: str, state: StatusState, description: str, url: str = "") -> bool:
        """The commit status `train/<name>`; False where it says so already (GitHub keeps 1,000 of one context)."""
        wanted = {"state": str(state), "description": short_description(description), "target_url": url or None}
        context = f"train/{name}"
        for row in self.api.items(f"commits/{quote(sha, safe='')}/status", key="statuses"):
            if row["context"] == context and all((row.get(part) or None) == wanted[part] for part in wanted):
                return False
        given = {key: value for key, value in wanted.items() if value is not None}
        self.api.ask("POST", f"statuses/{quote(sha, safe='')}", body={**given, "context": context})
        return True

    def react(self, comment_id: int, reaction: Reaction) -> None:
        """Answer a comment by a reaction."""
        self.api.ask("POST", f"issues/comments/{comment_id}/reactions", body={"content": str(reaction)})

    def dispatch(self, workflow: str, inputs: Mapping[str, str] | None = None, ref: str = "main") -> None:
        """Start a workflow by its file name."""
        body = {"ref": ref, **({"inputs": dict(inputs)} if inputs else {})}
        self.api.ask("POST", f"actions/workflows/{quote(workflow, safe='')}/dispatches", body=body)

    def enable(self, workflow: str) -> None:
        """Let a workflow run again, on its schedule too."""
        self.api.ask("PUT", f"actions/workflows/{quote(workflow, safe='')}/enable")

    def disable(self, workflow: str) -> None:
        """Stop a workflow's schedule."""
        self.api.ask("PUT", f"actions/workflows/{quote(workflow, safe='')}/disable")


def open_github(
    api_url: str,
    token: str | None,
    repository: str,
    *,
    login: str = BOT,
    timeout_s: float = 30.0,
    attempts: int = 4,
    patience_s: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> GitHub:
    """A repository at `api_url` (GITHUB_API_URL). `login` is the token's own account: whose markers are believed."""
    more: dict[str, Any] = {"timeout_s": timeout_s, "attempts": attempts, "patience_s": patience_s}
    return GitHub(open_api(api_url, token, repository, sleep=sleep, clock=clock, **more), login)


def _check(key: str, body: str) -> None:
    """A text that GitHub would refuse, or that would never be found again, is not posted."""
    if len(body) > LONGEST_COMMENT:
        words = f"the comment `{key}` has {len(body):,} characters; at most {LONGEST_COMMENT:,} are posted"
        raise GitHubError(Access.REFUSED, words)
    if not carries(body, key):
        raise GitHubError(Access.REFUSED, f"the comment `{key}` does not begin with its marker `{marker_of(key)} -->`")
