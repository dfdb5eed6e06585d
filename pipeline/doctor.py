"""Is this repository set up: secrets, token, protection of main and of the tags, tools. Looks; changes nothing."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.github import GitHub, open_github
from pipeline.hub_facts import Access, HubError, TokenFacts, TokenKind
from pipeline.hub_token import token_shape
from pipeline.online import ENDPOINT
from pipeline.pull_request import GitHubError
from pipeline.repository import Repository
from pipeline.settings import Settings, load_settings
from pipeline.setup_recipes import TAGS, least_permissions, protect_main, protect_tags, set_secret

GITHUB_API = "https://api.github.com"
WORKFLOWS = ("preflight", "launch", "watch", "commands")
PERMISSIONS = ("repo.write", "job.write")


class Grade(StrEnum):
    """How much a line matters. `SKIPPED`: it was not looked at, and the line says why."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One line: what was found, and the command or edit that mends it."""

    grade: Grade
    name: str
    text: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {"grade": self.grade.value, "name": self.name, "text": self.text, "mend": self.mend}


def examine(root: Path, environment: Mapping[str, str], repository: str | None, *, offline: bool) -> list[Check]:
    """Everything that can be looked at from here."""
    settings = load_settings(root)
    checks = [*_files(root), *_settings(settings), *_tools()]
    token = environment.get("HF_TOKEN", "")
    if offline:
        return [*checks, _shape(token), _skipped("github", "`--offline` was given")]
    checks += _hub(token, environment.get("HF_ENDPOINT") or ENDPOINT, settings)
    name = repository or environment.get("GITHUB_REPOSITORY") or _remote(root)
    secret = environment.get("GITHUB_TOKEN") or environment.get("GH_TOKEN")
    if not name or not secret:
        why = "no GitHub token" if name else "the remote `origin` is not on GitHub"
        return [*checks, _skipped("github", why, "GITHUB_TOKEN=$(gh auth token) mergetune doctor")]
    github = open_github(environment.get("GITHUB_API_URL") or GITHUB_API, secret, name, patience_s=20)
    return [*checks, *examine_github(github, name)]


def examine_github(github: GitHub, name: str) -> list[Check]:
    """What GitHub says of the repository; what it does not tell this token is skipped, not bad."""
    asked: tuple[tuple[str, Callable[[GitHub, str], Check]], ...] = (
        ("secret", _secret),
        ("default permissions", _permissions),
        ("main", _main),
        ("tags", _tags),
    )
    checks = []
    for about, look in asked:
        try:
            checks.append(look(github, name))
        except GitHubError as error:
            hint = "ask with a token of an administrator: `GITHUB_TOKEN=$(gh auth token) mergetune doctor`"
            checks.append(_skipped(about, f"GitHub does not say ({error.access}): {error.detail}", hint))
    return checks


def render(checks: Iterable[Check]) -> str:
    """One line each; under it how to mend what is not ok."""
    lines = []
    for check in checks:
        lines.append(f"{check.grade.value:<8}{check.name}: {check.text}")
        if check.mend and check.grade is not Grade.OK:
            lines.append(f"        {check.mend}")
    return "\n".join(lines) + "\n"


def _files(root: Path) -> list[Check]:
    there = [name for name in WORKFLOWS if (root / f".github/workflows/{name}.yml").is_file()]
    gone = [name for name in WORKFLOWS if name not in there]
    checks = [
        Check(Grade.BAD, "workflows", f"missing: {', '.join(gone)}", "take .github/workflows/ from the template")
        if gone
        else Check(Grade.OK, "workflows", ", ".join(there))
    ]
    owners = next((root / p for p in (".github/CODEOWNERS", "CODEOWNERS") if (root / p).is_file()), None)
    text = owners.read_text(encoding="utf-8") if owners else ""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return [
            *checks,
            Check(Grade.WARN, "owners", "no CODEOWNERS: nobody is asked to review", "add a CODEOWNERS file"),
        ]
    if "@acme/" in "".join(lines):
        mend = "sed -i 's|@acme/[a-z-]*|@YOUR-LOGIN|' CODEOWNERS"
        return [*checks, Check(Grade.WARN, "owners", "CODEOWNERS still names @acme, who is nobody here", mend)]
    return [*checks, Check(Grade.OK, "owners", f"{len(lines)} rules in CODEOWNERS")]


def _settings(settings: Settings) -> list[Check]:
    if settings.namespaces == ("acme",):
        mend = 'write your Hub namespace in pyproject.toml: `namespaces = ["YOUR-NAMESPACE"]`'
        checks = [Check(Grade.WARN, "namespaces", "`acme` is the template's, not yours", mend)]
    elif not settings.namespaces:
        checks = [Check(Grade.WARN, "namespaces", "any namespace may be written to", "set `namespaces`")]
    else:
        checks = [Check(Grade.OK, "namespaces", ", ".join(settings.namespaces))]
    if not settings.approvals:
        text = "a merge launches without anybody's approval: right for one person alone"
        return [*checks, Check(Grade.WARN, "approvals", text, "set `approvals = 1` in `[tool.mergetune]`")]
    return [*checks, Check(Grade.OK, "approvals", f"{settings.approvals} before a launch")]


def _tools() -> list[Check]:
    found = {tool: shutil.which(tool) for tool in ("git", "gh")}
    checks = [] if found["git"] else [Check(Grade.BAD, "git", "not installed", "install git 2.31 or newer")]
    if not found["gh"]:
        checks.append(Check(Grade.WARN, "gh", "not installed: the commands below need it", "https://cli.github.com"))
    return checks or [Check(Grade.OK, "tools", "git, gh")]


def _shape(token: str) -> Check:
    if not token:
        return _skipped("token", "HF_TOKEN is not set here", "HF_TOKEN=… mergetune doctor")
    shape = token_shape(token)
    if shape:
        return Check(Grade.BAD, "token", f"no personal token ({shape.kind}): {shape.probe.detail}", "set its value")
    return _skipped("token", "it has a token's shape; the Hub was not asked")


def _hub(token: str, endpoint: str, settings: Settings) -> list[Check]:
    """The token as the Hub describes it. It never leaves this process but to the Hub."""
    shape = _shape(token)
    if not token or shape.grade is Grade.BAD:
        return [shape]
    from pipeline.hub import open_hub

    try:
        facts = open_hub(endpoint, token).token_facts()
    except HubError as error:
        if error.access is Access.UNREACHABLE:
            return [_skipped("token", f"the Hub did not answer: {error.detail}")]
        return [Check(Grade.BAD, "token", f"the Hub does not accept it: {error.detail}", _token_recipe(settings))]
    return [judge_token(facts, settings)]


def judge_token(facts: TokenFacts, settings: Settings) -> Check:
    """Whether a token can do what a launch needs, and no more than it should."""
    recipe, names = _token_recipe(settings), settings.namespaces or ((facts.user,) if facts.user else ())
    match facts.kind:
        case TokenKind.FINE_GRAINED:
            lacks = [f"`{p}` on `{name}`" for name in names for p in PERMISSIONS if not facts.may(p, name)]
            if lacks:
                return Check(Grade.BAD, "token", f"it lacks {', '.join(lacks)}", recipe)
            return Check(Grade.OK, "token", f"fine-grained, of `{facts.user}`, may write and start jobs")
        case TokenKind.WRITE:
            text = f"of `{facts.user}`, may write everywhere: a fine-grained one can do less harm"
            return Check(Grade.WARN, "token", text, recipe)
        case TokenKind.READ:
            return Check(Grade.BAD, "token", "it may only read: a launch writes and starts jobs", recipe)
        case TokenKind.OAUTH:
            return Check(Grade.BAD, "token", "it is of a browser login, and dies under a running job", recipe)
        case _:
            return Check(Grade.WARN, "token", "the Hub does not say what it may do", recipe)


def _token_recipe(settings: Settings) -> str:
    names = ", ".join(settings.namespaces) or "your namespace"
    return f"make one at {ENDPOINT}/settings/tokens: fine-grained, {' and '.join(PERMISSIONS)} on {names}"


def _secret(github: GitHub, name: str) -> Check:
    of_repository = {row["name"] for row in github.api.items("actions/secrets", key="secrets")}
    for row in github.api.items("environments", key="environments"):
        environment = row["name"]
        held = {s["name"] for s in github.api.items(f"environments/{environment}/secrets", key="secrets")}
        if "HF_TOKEN" in held and "HF_TOKEN" not in of_repository:
            path = f"environments/{environment}/deployment-branch-policies"
            policies = {p["name"] for p in github.api.items(path, key="branch_policies")}
            if policies == {"main"}:
                return Check(Grade.OK, "secret", f"HF_TOKEN is in the environment `{environment}`, for main alone")
            text = f"HF_TOKEN is in the environment `{environment}`, which is not limited to main"
            return Check(Grade.WARN, "secret", text, f"gh api --method POST repos/{name}/{path} -f name=main")
    if "HF_TOKEN" in of_repository:
        text = "HF_TOKEN is a secret of the repository: whoever may push a branch can read it"
        return Check(
            Grade.WARN, "secret", text, "docs/setup-github.md: move it into an environment, if your plan has them"
        )
    return Check(Grade.BAD, "secret", "there is no secret HF_TOKEN: nothing can be launched", set_secret(name))


def _permissions(github: GitHub, name: str) -> Check:
    if github.api.get("actions/permissions/workflow")["default_workflow_permissions"] == "read":
        return Check(Grade.OK, "default permissions", "a workflow's token only reads unless its file says more")
    text = "a workflow that names no permissions gets all of them"
    return Check(Grade.WARN, "default permissions", text, least_permissions(name))


def _main(github: GitHub, name: str) -> Check:
    checks, pulls = _protected_by_rules(github)
    if not (checks and pulls):
        try:
            body = github.api.get("branches/main/protection")
        except GitHubError as error:
            if str(error.access) != "missing":
                raise
            body = {}
        contexts = (body.get("required_status_checks") or {}).get("contexts") or []
        checks, pulls = checks or "gate" in contexts, pulls or bool(body.get("required_pull_request_reviews"))
    if checks and pulls:
        return Check(Grade.OK, "main", "changes by pull requests alone, whose `gate` is green")
    missing = "a pull request is not required" if not pulls else "the check `gate` is not required"
    return Check(Grade.WARN, "main", missing, protect_main(name))


def _protected_by_rules(github: GitHub) -> tuple[bool, bool]:
    rules = [
        rule for body in _rulesets(github, "branch", {"~DEFAULT_BRANCH", "~ALL", "refs/heads/main"}) for rule in body
    ]
    named = [rule.get("parameters", {}).get("required_status_checks", []) for rule in rules]
    contexts = {check["context"] for checks in named for check in checks}
    return "gate" in contexts, any(rule["type"] == "pull_request" for rule in rules)


def _tags(github: GitHub, name: str) -> Check:
    found = {rule["type"] for body in _rulesets(github, "tag", {TAGS[0], "refs/tags/run/**", "~ALL"}) for rule in body}
    if {"deletion", "update"} <= found:
        return Check(Grade.OK, "tags", "run/* can be neither moved nor deleted")
    text = "whoever may push can delete `run/*` tags, and a run whose tag is gone starts again"
    return Check(Grade.WARN, "tags", text, protect_tags(name))


def _rulesets(github: GitHub, target: str, covering: set[str]) -> list[list[dict[str, Any]]]:
    """The rules of every active ruleset over one of these refs."""
    found = []
    for row in github.api.items("rulesets"):
        if row["target"] == target and row["enforcement"] == "active":
            body = github.api.get(f"rulesets/{row['id']}")
            included = set(((body.get("conditions") or {}).get("ref_name") or {}).get("include") or [])
            if included & covering:
                found.append(list(body.get("rules") or []))
    return found


def _remote(root: Path) -> str:
    try:
        address = Repository(root).web_address()
    except UserError:
        return ""
    match = re.fullmatch(r"https://[^/]+/([^/]+/[^/]+)", address)
    return match[1] if match else ""


def _skipped(name: str, why: str, hint: str = "") -> Check:
    return Check(Grade.SKIPPED, name, why, hint)
