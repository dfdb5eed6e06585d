"""What the loopback GitHub's answers look like: the published examples with our own facts put in. Changes nothing."""

import json
import zlib
from functools import cache
from typing import Any

from servers.github_description import example_text
from servers.github_state import BOT, BOT_ID, RANKS, Comment, GitHubWorld, Issue, Pull, Reaction, Review, Status, stamp

Json = dict[str, Any]


@cache
def _text(name: str, api: str, html: str, repository: str) -> str:
    text = example_text(name).replace("octocat/Hello-World", repository)
    return text.replace("https://api.github.com", api).replace("https://github.com", html)


def seed(world: GitHubWorld, name: str) -> Any:
    """A published example, as if it were about this repository on this server."""
    return json.loads(_text(name, world.api, world.url, world.repository))


def user_body(world: GitHubWorld, login: str) -> Json:
    """An account."""
    body: Json = seed(world, "reaction")["user"]
    text = json.dumps(body).replace("/octocat", f"/{login}")
    number = BOT_ID if login == BOT else zlib.crc32(login.encode())
    kind = "Bot" if login.endswith("[bot]") else "User"
    return {**json.loads(text), "login": login, "id": number, "type": kind}


def maybe_user(world: GitHubWorld, login: str | None) -> Json | None:
    """An account that may be gone."""
    return None if login is None else user_body(world, login)


def repository_body(world: GitHubWorld, full_name: str | None = None) -> Json:
    """This repository, or a fork of it."""
    name = full_name or world.repository
    owner, _, short = name.partition("/")
    text = json.dumps(seed(world, "pull-request")["base"]["repo"]).replace(world.repository, name)
    own = {"name": short, "full_name": name, "owner": user_body(world, owner), "default_branch": "main"}
    body = {**json.loads(text), **own, "fork": name != world.repository, "private": world.private}
    return {**body, "id": zlib.crc32(name.encode())}


def association(world: GitHubWorld, login: str | None) -> str:
    """How GitHub calls somebody's part in the repository."""
    rank = RANKS.index(world.people.get(login or "", "none"))
    return "NONE" if rank == 0 else "OWNER" if rank == len(RANKS) - 1 else "COLLABORATOR"


def simple_pull_body(world: GitHubWorld, pull: Pull) -> Json:
    """A pull request in a list."""
    full = pull_body(world, pull)
    known = seed(world, "pull-request-simple-items")[0]
    return {key: value for key, value in full.items() if key in known}


def pull_body(world: GitHubWorld, pull: Pull) -> Json:
    """A pull request by its number."""
    body: Json = json.loads(json.dumps(seed(world, "pull-request")).replace("/1347", f"/{pull.number}"))
    changed = world.git.files(world.git.merge_base(pull.base_sha, pull.head_sha), pull.head_sha)
    owner = (pull.head_repo or world.repository).partition("/")[0]
    head = {"label": f"{owner}:{pull.branch}", "ref": pull.branch, "sha": pull.head_sha}
    head |= {"user": user_body(world, owner), "repo": None}
    head |= {"repo": repository_body(world, pull.head_repo)} if pull.head_repo else {}
    base = {"label": f"{world.repository.partition('/')[0]}:{pull.base}", "ref": pull.base, "sha": pull.base_sha}
    base |= {"user": user_body(world, world.repository.partition("/")[0]), "repo": repository_body(world)}
    merged = pull.merged_at is not None
    body |= {"id": 10_000 + pull.number, "number": pull.number, "state": "open" if pull.open else "closed"}
    body |= {"title": pull.title, "body": pull.body or None, "user": user_body(world, pull.author), "head": head}
    body |= {"base": base, "locked": pull.locked, "active_lock_reason": None, "draft": pull.draft, "merged": merged}
    body |= {"merged_at": stamp(pull.merged_at), "merged_by": maybe_user(world, pull.merged_by)}
    body |= {"created_at": stamp(pull.at), "updated_at": stamp(pull.at), "closed_at": stamp(pull.merged_at)}
    body |= {"merge_commit_sha": pull.merge_commit_sha, "author_association": association(world, pull.author)}
    body |= {"changed_files": len(changed), "commits": len(world.git.commits(pull.base_sha, pull.head_sha))}
    body |= {"labels": [], "assignee": None, "assignees": [], "milestone": None, "requested_reviewers": []}
    return {**body, "requested_teams": [], "comments": sum(c.number == pull.number for c in world.comments.values())}


def file_body(world: GitHubWorld, row: dict[str, str]) -> Json:
    """A changed file."""
    seeded = {key: value for key, value in seed(world, "diff-entry-items")[0].items() if key != "patch"}
    return {**seeded, **row, "additions": 1, "deletions": 0, "changes": 1}


def issue_body(world: GitHubWorld, found: Issue | Pull) -> Json:
    """An issue; a pull request is one with a `pull_request` key."""
    body: Json = json.loads(json.dumps(seed(world, "issue")).replace("/1347", f"/{found.number}"))
    pull = body.pop("pull_request")
    labels = [] if isinstance(found, Pull) else found.labels
    described = [{**body["labels"][0], "id": zlib.crc32(name.encode()), "name": name} for name in labels]
    body |= {"number": found.number, "title": found.title, "body": found.body or None, "locked": found.locked}
    body |= {"user": user_body(world, found.author), "state": "open" if found.open else "closed", "labels": described}
    body |= {"assignee": None, "assignees": [], "milestone": None, "closed_by": None, "active_lock_reason": None}
    body |= {"created_at": stamp(found.at), "updated_at": stamp(found.at), "closed_at": None, "state_reason": None}
    return {**body, "pull_request": pull} if isinstance(found, Pull) else body


def comment_body(world: GitHubWorld, comment: Comment) -> Json:
    """A comment."""
    text = json.dumps(seed(world, "issue-comment")).replace("/1347", f"/{comment.number}")
    text = text.replace("comments/1", f"comments/{comment.id}").replace("comment-1", f"comment-{comment.id}")
    if comment.number in world.pulls:
        text = text.replace(
            f"{world.repository}/issues/{comment.number}#", f"{world.repository}/pull/{comment.number}#"
        )
    body: Json = json.loads(text)
    body |= {"id": comment.id, "body": comment.body, "user": maybe_user(world, comment.author)}
    body |= {"created_at": stamp(comment.at), "updated_at": stamp(comment.updated_at)}
    body |= {"author_association": association(world, comment.author)}
    return {**body, "minimized": {"reason": comment.minimized} if comment.minimized else None}


def review_body(world: GitHubWorld, review: Review) -> Json:
    """A review."""
    body: Json = seed(world, "pull-request-review-items")[0]
    body |= {"id": review.id, "user": maybe_user(world, review.author), "body": review.body, "state": review.state}
    return {**body, "commit_id": review.sha, "submitted_at": stamp(review.at)}


def status_body(world: GitHubWorld, status: Status, *, with_creator: bool = True) -> Json:
    """A commit status."""
    body: Json = seed(world, "status")
    body |= {"id": status.id, "state": status.state, "description": status.description, "context": status.context}
    body |= {"target_url": status.target_url, "created_at": stamp(status.at), "updated_at": stamp(status.at)}
    body |= {"url": f"{world.api}/repos/{world.repository}/statuses/{status.sha}"}
    body["creator"] = user_body(world, status.creator)
    return body if with_creator else {key: value for key, value in body.items() if key != "creator"}


def reaction_body(world: GitHubWorld, reaction: Reaction) -> Json:
    """A reaction."""
    body: Json = seed(world, "reaction")
    body |= {"id": reaction.id, "user": user_body(world, reaction.user), "content": reaction.content}
    return {**body, "created_at": stamp(reaction.at)}


def commit_body(world: GitHubWorld, sha: str) -> Json:
    """A commit in a comparison."""
    body: Json = seed(world, "commit-comparison")["base_commit"]
    body["commit"]["message"] = world.git.message(sha)
    return {**body, "sha": sha, "url": f"{world.api}/repos/{world.repository}/commits/{sha}"}
