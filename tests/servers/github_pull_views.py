"""The loopback GitHub's answers about pull requests, commits and what changed. Changes nothing but statuses."""

from servers.github_bodies import (
    commit_body,
    file_body,
    pull_body,
    repository_body,
    review_body,
    seed,
    simple_pull_body,
    status_body,
)
from servers.github_http import Refused, page
from servers.github_state import RANKS, GitHubWorld, Pull, Status
from servers.hub_http import Answer, Call, Route, json_answer, route

FILES_OF_A_PULL = 3000  # GitHub lists no more of a pull request
FILES_OF_A_COMPARISON = 300
STATUSES_OF_A_CONTEXT = 1000
ROOT = "/repos/{owner}/{repo}"


def pull_routes() -> list[Route]:
    """What is served here."""
    return [
        route("GET", ROOT, lambda world, call, **_: json_answer(repository_body(world))),
        route("GET", ROOT + "/pulls", _pulls),
        route("GET", ROOT + "/pulls/{number}", _pull),
        route("GET", ROOT + "/pulls/{number}/files", _files),
        route("GET", ROOT + "/pulls/{number}/reviews", _reviews),
        route("GET", ROOT + "/commits/{sha}/pulls", _pulls_of_commit),
        route("GET", ROOT + "/commits/{ref}/status", _combined),
        route("POST", ROOT + "/statuses/{sha}", _set_status),
        route("GET", ROOT + "/compare/{basehead}", _compare),
        route("GET", ROOT + "/git/trees/{sha}", _tree),
        route("GET", ROOT + "/collaborators/{login}/permission", _permission),
    ]


def _pulls(world: GitHubWorld, call: Call, **_: str) -> Answer:
    for pull in world.pulls.values():
        world.follow(pull)
    state = call.first("state", "open")
    rows = [pull for pull in world.pulls.values() if state in ("all", "open" if pull.open else "closed")]
    return page(world, call, [simple_pull_body(world, pull) for pull in reversed(rows)])


def _pull(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    return json_answer(pull_body(world, world.pull(number)))


def _files(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    pull = world.pull(number)
    rows = world.git.files(world.git.merge_base(pull.base_sha, pull.head_sha), pull.head_sha)
    return page(world, call, [file_body(world, row) for row in rows[:FILES_OF_A_PULL]])


def _reviews(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    pull = world.pull(number)
    return page(world, call, [review_body(world, review) for review in world.reviews if review.number == pull.number])


def _pulls_of_commit(world: GitHubWorld, call: Call, sha: str, **_: str) -> Answer:
    commit = world.git.sha(sha)
    if commit is None:
        raise Refused(422, f"No commit found for SHA: {sha}")
    merged = [pull for pull in world.pulls.values() if commit in pull.brought]
    rows = merged or [pull for pull in world.pulls.values() if pull.open and _has(world, pull, commit)]
    return page(world, call, [simple_pull_body(world, pull) for pull in rows])


def _has(world: GitHubWorld, pull: Pull, commit: str) -> bool:
    world.follow(pull)
    return commit in world.git.commits(pull.base_sha, pull.head_sha)


def _combined(world: GitHubWorld, call: Call, ref: str, **_: str) -> Answer:
    sha = world.commit(ref)
    latest = {status.context: status for status in world.statuses if status.sha == sha}
    states = {status.state for status in latest.values()}
    failed = states & {"failure", "error"}
    state = "failure" if failed else "pending" if "pending" in states or not states else "success"
    rows = [status_body(world, status, with_creator=False) for status in latest.values()]
    base = f"{world.api}/repos/{world.repository}/commits/{sha}"
    more = {"state": state, "sha": sha, "commit_url": base, "url": f"{base}/status"}
    more["repository"] = seed(world, "combined-commit-status")["repository"]
    return page(world, call, rows, "statuses", **more)


def _set_status(world: GitHubWorld, call: Call, sha: str, **_: str) -> Answer:
    login = world.need(call, "write", "statuses")
    body = call.json()
    if world.git.sha(sha) != sha:
        raise Refused(422, f"No commit found for SHA: {sha}")
    if len(body.get("description") or "") > 140:
        raise Refused(422, "Validation Failed: description is too long (maximum is 140 characters)")
    context = body.get("context", "default")
    if sum(status.sha == sha and status.context == context for status in world.statuses) >= STATUSES_OF_A_CONTEXT:
        raise Refused(422, "This SHA and context has reached the maximum number of statuses.")
    words = (body["state"], body.get("description"), body.get("target_url"))
    status = Status(world.new_id(), sha, context, *words, login, world.clock())
    world.statuses.append(status)
    return json_answer(status_body(world, status), 201)


def _compare(world: GitHubWorld, call: Call, basehead: str, **_: str) -> Answer:
    before, _, after = basehead.partition("...")
    base, head = world.commit(before), world.commit(after)
    ancestor = world.git.merge_base(base, head)
    ahead, behind = world.git.commits(base, head), world.git.commits(head, base)
    words = {(False, False): "identical", (True, False): "ahead", (False, True): "behind", (True, True): "diverged"}
    rows = [file_body(world, row) for row in world.git.files(ancestor, head)][:FILES_OF_A_COMPARISON]
    body = seed(world, "commit-comparison")
    body |= {"status": words[bool(ahead), bool(behind)], "ahead_by": len(ahead), "behind_by": len(behind)}
    body |= {"base_commit": commit_body(world, base), "merge_base_commit": commit_body(world, ancestor)}
    size = min(int(call.first("per_page", "250")), 250)
    shown = [commit_body(world, sha) for sha in ahead[:size]]
    first = call.first("page", "1") == "1"  # files stand on the first page only
    return json_answer({**body, "total_commits": len(ahead), "commits": shown, "files": rows if first else []})


def _tree(world: GitHubWorld, call: Call, sha: str, **_: str) -> Answer:
    commit = world.commit(sha)
    url = f"{world.api}/repos/{world.repository}/git"
    rows = [{**row, "size": 1, "url": f"{url}/blobs/{row['sha']}"} for row in world.git.tree(commit)]
    return json_answer({"sha": commit, "url": f"{url}/trees/{commit}", "tree": rows, "truncated": False})


def _permission(world: GitHubWorld, call: Call, login: str, **_: str) -> Answer:
    world.need(call, "read", "metadata")
    rank = world.people.get(login)
    if rank is None:
        raise Refused(404, f"{login} is not a user")
    coarse = {"maintain": "write", "triage": "read"}.get(rank, rank)
    body = seed(world, "repository-collaborator-permission-response-if-user-has-admin-permissions")
    user = {**body["user"], "login": login, "role_name": rank}
    user["permissions"] = {
        name: RANKS.index(rank) >= RANKS.index(least)
        for name, least in zip(("pull", "triage", "push", "maintain", "admin"), RANKS[1:], strict=True)
    }
    return json_answer({"permission": coarse, "role_name": rank, "user": user})
