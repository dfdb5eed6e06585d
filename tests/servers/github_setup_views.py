"""The loopback GitHub's answers about workflows and about how the repository is set up: what `doctor` asks."""

import time
from typing import Any

from servers.github_bodies import seed
from servers.github_http import Refused, page
from servers.github_state import Dispatch, GitHubWorld, Workflow
from servers.hub_http import Answer, Call, Route, json_answer, route

ROOT = "/repos/{owner}/{repo}"
ACTIONS = ROOT + "/actions"
LIMIT = 1000  # requests an hour for an Actions token in one repository


def setup_routes() -> list[Route]:
    """What is served here."""
    return [
        route("GET", ACTIONS + "/workflows", _workflows),
        route("GET", ACTIONS + "/workflows/{name}", _workflow),
        route("POST", ACTIONS + "/workflows/{name}/dispatches", _dispatch),
        route("PUT", ACTIONS + "/workflows/{name}/enable", _enable),
        route("PUT", ACTIONS + "/workflows/{name}/disable", _disable),
        route("GET", ACTIONS + "/secrets", _secrets),
        route("GET", ACTIONS + "/permissions/workflow", _workflow_permissions),
        route("GET", ROOT + "/environments", _environments),
        route("GET", ROOT + "/environments/{name}/secrets", _secrets),
        route("GET", ROOT + "/environments/{name}/deployment-branch-policies", _branch_policies),
        route("GET", ROOT + "/rulesets", _rulesets),
        route("GET", ROOT + "/rulesets/{ruleset_id}", _ruleset),
        route("GET", ROOT + "/branches/{branch}/protection", _protection),
        route("GET", "/rate_limit", _rate_limit),
    ]


def ruleset_body(world: GitHubWorld, number: int, name: str, target: str, include: str, *rules: str) -> dict[str, Any]:
    """A ruleset in force: `target` is `branch` or `tag`, `include` a ref pattern, a rule its type."""
    body: dict[str, Any] = {**seed(world, "repository-ruleset"), "id": number, "name": name, "target": target}
    body |= {"bypass_actors": [], "conditions": {"ref_name": {"include": [include], "exclude": []}}}
    return {**body, "enforcement": "active", "rules": [{"type": rule} for rule in rules]}


def protection_body(world: GitHubWorld, checks: list[str], approvals: int) -> dict[str, Any]:
    """A protected branch. (The published example lacks the `checks` that its schema demands.)"""
    body: dict[str, Any] = seed(world, "branch-protection")
    required = [{"context": check, "app_id": None} for check in checks]
    body["required_status_checks"] |= {"contexts": checks, "checks": required}
    del body["restrictions"]  # both are left out where nobody is named
    del body["required_pull_request_reviews"]["dismissal_restrictions"]
    body["required_pull_request_reviews"]["required_approving_review_count"] = approvals
    return body


def _body(world: GitHubWorld, workflow: Workflow) -> dict[str, Any]:
    seeded = seed(world, "workflow-paginated")["workflows"][0]
    name = workflow.path.rsplit("/", 1)[-1].removesuffix(".yml")
    return {**seeded, "id": workflow.id, "name": name, "path": workflow.path, "state": workflow.state}


def _workflows(world: GitHubWorld, call: Call, **_: str) -> Answer:
    return page(world, call, [_body(world, workflow) for workflow in world.workflows.values()], "workflows")


def _workflow(world: GitHubWorld, call: Call, name: str, **_: str) -> Answer:
    return json_answer(_body(world, world.workflow(name)))


def _dispatch(world: GitHubWorld, call: Call, name: str, **_: str) -> Answer:
    login, workflow, body = world.need(call, "write", "actions"), world.workflow(name), call.json()
    if workflow.state != "active":
        raise Refused(422, "Cannot trigger a 'workflow_dispatch' on a disabled workflow")
    if world.git.sha(f"refs/heads/{body['ref'].removeprefix('refs/heads/')}") is None:
        raise Refused(422, f"No ref found for: {body['ref']}")
    world.dispatches.append(Dispatch(workflow.path.rsplit("/", 1)[-1], body["ref"], body.get("inputs", {}), login))
    return Answer(204)


def _enable(world: GitHubWorld, call: Call, name: str, **_: str) -> Answer:
    world.need(call, "write", "actions")
    world.workflow(name).state = "active"
    return Answer(204)


def _disable(world: GitHubWorld, call: Call, name: str, **_: str) -> Answer:
    world.need(call, "write", "actions")
    world.workflow(name).state = "disabled_manually"
    return Answer(204)


def _secrets(world: GitHubWorld, call: Call, name: str | None = None, **_: str) -> Answer:
    world.need(call, "read", "secrets", rank="write" if name is None else "read")
    if name is not None and name not in world.environments:
        raise Refused(404, "Not Found")
    seeded = seed(world, "actions-secret-paginated")["secrets"][0]
    return page(world, call, [{**seeded, "name": secret} for secret in world.secrets.get(name, [])], "secrets")


def _workflow_permissions(world: GitHubWorld, call: Call, **_: str) -> Answer:
    world.need(call, "read", "administration", rank="admin")
    answer = {"default_workflow_permissions": world.workflow_permissions, "can_approve_pull_request_reviews": False}
    return json_answer(answer)


def _environments(world: GitHubWorld, call: Call, **_: str) -> Answer:
    seeded = seed(world, "environments")["environments"][0]
    rows = []
    for name, policies in world.environments.items():
        policy = {"protected_branches": False, "custom_branch_policies": True} if policies else None
        body = {**seeded, "name": name, "protection_rules": [], "deployment_branch_policy": policy}
        rows.append(body)
    return page(world, call, rows, "environments")


def _branch_policies(world: GitHubWorld, call: Call, name: str, **_: str) -> Answer:
    if name not in world.environments:
        raise Refused(404, "Not Found")
    seeded = seed(world, "deployment-branch-policies-list")["branch_policies"][0]
    return page(world, call, [{**seeded, "name": branch} for branch in world.environments[name]], "branch_policies")


def _rulesets(world: GitHubWorld, call: Call, **_: str) -> Answer:
    rows = [{k: v for k, v in body.items() if k not in ("rules", "conditions")} for body in world.rulesets.values()]
    return page(world, call, rows)


def _ruleset(world: GitHubWorld, call: Call, ruleset_id: str, **_: str) -> Answer:
    if int(ruleset_id) not in world.rulesets:
        raise Refused(404, "Not Found")
    return json_answer(world.rulesets[int(ruleset_id)])


def _protection(world: GitHubWorld, call: Call, branch: str, **_: str) -> Answer:
    world.need(call, "read", "administration", rank="admin")
    if branch not in world.protection:
        raise Refused(404, "Branch not protected")
    return json_answer(world.protection[branch])


def _rate_limit(world: GitHubWorld, call: Call, **_: str) -> Answer:
    body = seed(world, "rate-limit-overview")
    rate = {"limit": LIMIT, "used": 0, "remaining": LIMIT, "reset": int(time.time()) + 3600}
    return json_answer({**body, "rate": rate, "resources": {**body["resources"], "core": rate}})
