"""The commands that set a repository up, ready to be copied. Runs none of them."""

import json
from typing import Any

TAGS = ("refs/tags/run/*", "refs/tags/retry/*", "refs/tags/mergetune/*")


def protect_main(name: str) -> str:
    """The command that lets main change by pull requests alone, whose `gate` is green."""
    rules: list[dict[str, Any]] = [
        {"type": "deletion"},
        {"type": "non_fast_forward"},
        {
            "type": "pull_request",
            "parameters": {
                "required_approving_review_count": 0,
                "dismiss_stale_reviews_on_push": True,
                "require_code_owner_review": True,
                "require_last_push_approval": False,
                "required_review_thread_resolution": False,
            },
        },
        {
            "type": "required_status_checks",
            "parameters": {
                "strict_required_status_checks_policy": False,
                "required_status_checks": [{"context": "gate"}],
            },
        },
    ]
    return _ruleset(name, "main", "branch", ["~DEFAULT_BRANCH"], rules)


def protect_tags(name: str) -> str:
    """The command after which nobody moves or deletes a tag of the run book."""
    rules = [{"type": "deletion"}, {"type": "update"}]
    return _ruleset(name, "mergetune tags", "tag", list(TAGS), rules)


def least_permissions(name: str) -> str:
    """The command that makes a workflow's token read-only unless its file says more."""
    path = f"repos/{name}/actions/permissions/workflow"
    return f"gh api --method PUT {path} -f default_workflow_permissions=read -F can_approve_pull_request_reviews=true"


def set_secret(name: str) -> str:
    """The command that stores the token; it asks for it, so that no shell keeps it."""
    return f"gh secret set HF_TOKEN --repo {name}"


def _ruleset(name: str, title: str, target: str, include: list[str], rules: list[dict[str, Any]]) -> str:
    body = {
        "name": title,
        "target": target,
        "enforcement": "active",
        "conditions": {"ref_name": {"include": include, "exclude": []}},
        "rules": rules,
    }
    return f"echo '{json.dumps(body)}' | gh api --method POST repos/{name}/rulesets --input -"
