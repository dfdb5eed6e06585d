"""What `doctor` finds, offline and against the loopback GitHub, and that what it tells people to type works."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pull_story import client, loopback
from repository import make_repository
from servers.github import LoopbackGitHub
from servers.github_setup_views import protection_body, ruleset_body
from servers.hub import LoopbackHub
from servers.hub_scene import go_online

from pipeline.doctor import Check, Grade, examine, examine_github, render
from pipeline.hub_facts import Access, Probe, Scope, TokenFacts, TokenKind
from pipeline.settings import Settings
from pipeline.setup_recipes import least_permissions, protect_main, protect_tags, set_secret

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs/setup-github.md"
RIGHTS = {"contents": "read", "secrets": "read", "administration": "read", "actions": "read"}


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    with loopback(tmp_path) as server:
        yield server


def asked(github: LoopbackGitHub) -> dict[str, Check]:
    token = github.actions_token(RIGHTS)
    return {check.name: check for check in examine_github(client(github, token), github.repository)}


def offline(root: Path, **environment: str) -> dict[str, Check]:
    return {check.name: check for check in examine(root, environment, None, offline=True)}


def test_a_bare_repository_is_told_what_is_missing(github: LoopbackGitHub) -> None:
    found = asked(github)
    assert found["secret"].grade is Grade.BAD
    assert found["secret"].mend == "gh secret set HF_TOKEN --repo acme/models"
    assert found["main"].grade is Grade.WARN
    assert found["tags"].grade is Grade.WARN
    assert found["default permissions"].grade is Grade.OK


def test_a_repository_that_is_set_up_is_ok(github: LoopbackGitHub) -> None:
    world = github.world
    world.environments["launch"] = ["main"]
    world.secrets["launch"] = ["HF_TOKEN"]
    world.rulesets = {
        1: ruleset_body(world, 1, "main", "branch", "~DEFAULT_BRANCH", "pull_request", "required_status_checks"),
        2: ruleset_body(world, 2, "tags", "tag", "refs/tags/run/*", "deletion", "update"),
    }
    checks = [{"context": "gate", "integration_id": None}]
    world.rulesets[1]["rules"][1]["parameters"] = {"required_status_checks": checks}
    assert {check.grade for check in asked(github).values()} == {Grade.OK}


def test_classic_branch_protection_counts_too(github: LoopbackGitHub) -> None:
    github.world.protection["main"] = protection_body(github.world, ["gate"], 1)
    assert asked(github)["main"].grade is Grade.OK
    github.world.protection["main"] = protection_body(github.world, ["something else"], 1)
    assert "gate" in asked(github)["main"].text


def test_where_the_secret_lies_matters(github: LoopbackGitHub) -> None:
    github.world.secrets[None] = ["HF_TOKEN"]
    assert asked(github)["secret"].grade is Grade.WARN
    github.world.secrets = {"launch": ["HF_TOKEN"]}
    github.world.environments["launch"] = []
    assert "not limited to main" in asked(github)["secret"].text


def test_write_permissions_by_default_are_named(github: LoopbackGitHub) -> None:
    github.world.workflow_permissions = "write"
    assert asked(github)["default permissions"].mend == least_permissions("acme/models")


def test_what_github_does_not_tell_is_not_called_bad(github: LoopbackGitHub) -> None:
    token = github.actions_token({"contents": "read"})
    found = examine_github(client(github, token), github.repository)
    assert Grade.BAD not in {check.grade for check in found}
    assert Grade.SKIPPED in {check.grade for check in found}


def test_offline_it_looks_at_files_and_settings(tmp_path: Path) -> None:
    make_repository(tmp_path)
    found = offline(tmp_path)
    assert found["workflows"].grade is Grade.BAD
    assert found["namespaces"].grade is Grade.WARN  # acme
    assert found["owners"].grade is Grade.WARN
    assert found["github"].grade is Grade.SKIPPED


def test_this_template_has_its_workflows_and_says_what_to_replace() -> None:
    found = offline(ROOT)
    assert found["workflows"].grade is Grade.OK
    assert "@acme" in found["owners"].text


@pytest.mark.parametrize("value", ["$HF_TOKEN", "${{ secrets.HF_TOKEN }}", "hf_xxx"])
def test_the_name_of_a_token_is_no_token(tmp_path: Path, value: str) -> None:
    make_repository(tmp_path)
    assert offline(tmp_path, HF_TOKEN=value)["token"].grade is Grade.BAD


@pytest.mark.parametrize(
    ("kind", "scopes", "grade"),
    [
        (TokenKind.FINE_GRAINED, {"repo.write", "job.write"}, Grade.OK),
        (TokenKind.FINE_GRAINED, {"repo.write"}, Grade.BAD),
        (TokenKind.WRITE, set(), Grade.WARN),
        (TokenKind.READ, set(), Grade.BAD),
        (TokenKind.OAUTH, set(), Grade.BAD),
        (TokenKind.UNKNOWN, set(), Grade.WARN),
    ],
)
def test_a_token_is_judged_by_what_a_launch_needs(kind: TokenKind, scopes: set[str], grade: Grade) -> None:
    from pipeline.doctor import judge_token

    scope = Scope("org", "acme", frozenset(scopes))
    facts = TokenFacts(kind, Probe(Access.READABLE), "alice", {}, (scope,))
    assert judge_token(facts, Settings(namespaces=("acme",))).grade is grade


def test_the_token_is_looked_up_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_repository(tmp_path)
    go_online(tmp_path, monkeypatch)
    secret = "hf_" + "Doctor" * 6
    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "admin"})
        hub.add_token(secret, "alice")
        environment: Mapping[str, Any] = {"HF_TOKEN": secret, "HF_ENDPOINT": hub.url}
        checks = examine(tmp_path, environment, None, offline=False)
        (token,) = [check for check in checks if check.name == "token"]
        assert (token.grade, "alice" in token.text) == (Grade.WARN, True)
        hub.revoke(secret)
        checks += examine(tmp_path, environment, None, offline=False)
    assert secret not in render(checks) + json.dumps([check.as_dict() for check in checks])


def test_every_recipe_is_one_shell_command_with_json_that_reads() -> None:
    for command in (protect_main("o/r"), protect_tags("o/r")):
        echo, gh = command.split(" | ")
        body = json.loads(shlex.split(echo)[1])
        assert {"name", "target", "enforcement", "conditions", "rules"} <= body.keys()
        assert shlex.split(gh)[:4] == ["gh", "api", "--method", "POST"]
    assert subprocess.run(["bash", "-n", "-c", protect_main("o/r")], timeout=10).returncode == 0


def test_the_page_shows_the_commands_as_doctor_prints_them() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for command in (protect_main, protect_tags, least_permissions, set_secret):
        assert command("OWNER/REPO") in page
    assert not re.search(r"\bacme/[a-z]", page)
