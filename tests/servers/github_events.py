"""Event payloads as GitHub sends them to a workflow: the fields that we and act read. Changes nothing."""

from typing import Any

from servers.github_bodies import comment_body, issue_body, pull_body, repository_body, user_body
from servers.github_git import ZERO
from servers.github_state import GitHubWorld, stamp

Json = dict[str, Any]


def pull_request_event(world: GitHubWorld, number: int, action: str, by: str | None, before: str | None) -> Json:
    """`before` is the head that a `synchronize` replaced."""
    pull = world.pull(number)
    body = {"action": action, "number": number, "pull_request": pull_body(world, pull)}
    if action == "synchronize":
        body |= {"before": before or ZERO, "after": pull.head_sha}
    return {**body, **_common(world, by or pull.author)}


def merge_group_event(world: GitHubWorld, number: int, sha: str, by: str | None) -> Json:
    """The queue asks for its checks on the commit it made."""
    pull = world.pull(number)
    base = world.commit(f"refs/heads/{pull.base}")
    group = {"head_sha": sha, "head_ref": f"refs/heads/{queue_branch(pull.base, number, base)}", "base_sha": base}
    group |= {"base_ref": f"refs/heads/{pull.base}", "head_commit": _commit(world, sha)}
    return {"action": "checks_requested", "merge_group": group, **_common(world, by or pull.author)}


def push_event(world: GitHubWorld, before: str, after: str, ref: str, by: str) -> Json:
    """A push to a branch or a tag."""
    gone, new = after == ZERO, before == ZERO
    shas = [] if gone else [after] if new else world.git.commits(before, after)
    forced = not gone and not new and world.git.merge_base(before, after) != before
    body = {"ref": ref, "before": before, "after": after, "created": new, "deleted": gone, "forced": forced}
    body |= {"base_ref": None, "commits": [_commit(world, sha) for sha in shas]}
    body |= {"head_commit": None if gone else _commit(world, after), "pusher": {"name": by, "email": None}}
    body |= {"compare": f"{world.url}/{world.repository}/compare/{before[:12]}...{after[:12]}"}
    return {**body, **_common(world, by)}


def issue_comment_event(world: GitHubWorld, comment_id: int, action: str) -> Json:
    """Somebody wrote under a pull request or an issue."""
    comment = world.comment(comment_id)
    found = world.conversation(comment.number)
    body = {"action": action, "issue": issue_body(world, found), "comment": comment_body(world, comment)}
    return {**body, **_common(world, comment.author or "ghost")}


def workflow_dispatch_event(world: GitHubWorld, workflow: str, inputs: dict[str, Any], ref: str, by: str) -> Json:
    """Somebody started a workflow by hand, or a workflow did."""
    body = {"inputs": inputs, "ref": ref, "workflow": f".github/workflows/{workflow}"}
    return {**body, **_common(world, by)}


def schedule_event(world: GitHubWorld, cron: str) -> Json:
    """The clock started a workflow."""
    return {"schedule": cron, "workflow": None, "repository": repository_body(world)}


def queue_branch(base: str, number: int, sha: str) -> str:
    """The branch on which a merge queue tries a pull request."""
    return f"gh-readonly-queue/{base}/pr-{number}-{sha}"


def _common(world: GitHubWorld, login: str) -> Json:
    return {"repository": repository_body(world), "sender": user_body(world, login)}


def _commit(world: GitHubWorld, sha: str) -> Json:
    git = world.git
    parent = git.sha(f"{sha}^")
    rows = git.files(parent, sha) if parent else [{"status": "added", "filename": row["path"]} for row in git.tree(sha)]
    name, email, at = git.run("log", "-1", "--format=%an%n%ae%n%at", sha).split("\n")
    person = {"name": name, "email": email, "username": name}
    body: Json = {"id": sha, "tree_id": git.run("rev-parse", f"{sha}^{{tree}}"), "message": git.message(sha)}
    body |= {"distinct": True, "timestamp": stamp(float(at)), "author": person, "committer": person}
    body |= {"url": f"{world.url}/{world.repository}/commit/{sha}"}
    for status in ("added", "removed", "modified"):
        body[status] = [row["filename"] for row in rows if row["status"] == status]
    for row in rows:
        if row["status"] == "renamed":  # a push event knows no renames
            body["removed"].append(row["previous_filename"])
            body["added"].append(row["filename"])
    return body
