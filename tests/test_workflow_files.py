"""The workflow files as files: four linters, and what they may do, when, with which secrets, read from the YAML."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
ACTIONS = sorted((ROOT / ".github/actions").rglob("action.yml"))
READ = {"contents": "read"}
TICK = {"actions": "write", "contents": "write", "issues": "write", "pull-requests": "write", "statuses": "write"}
# Every job there is and everything it may do. A permission that is added here is a decision.
PERMISSIONS = {
    ("preflight", "plan"): {"contents": "read", "pull-requests": "write"},
    ("preflight", "rehearse"): READ,
    ("preflight", "gate"): {},
    ("launch", "launch"): TICK,
    ("watch", "watch"): TICK,
    ("commands", "command"): {"actions": "write", "contents": "read", "pull-requests": "write"},
    ("ci", "lint"): READ,
    ("ci", "test"): READ,
    ("catalogue", "refresh"): {"contents": "write", "pull-requests": "write"},
    ("pages", "board"): {"contents": "write"},
}
EVENTS = {
    "preflight": {"pull_request", "merge_group"},
    "launch": {"push", "workflow_dispatch"},
    "watch": {"schedule", "workflow_dispatch"},
    "commands": {"issue_comment"},
    "ci": {"push", "pull_request"},
    "catalogue": {"schedule", "workflow_dispatch"},
    "pages": {"schedule", "workflow_dispatch"},
}
# Text that an outsider can choose. None of it may be pasted into a script.
UNTRUSTED = re.compile(r"\$\{\{.*?\b(github\.event|github\.head_ref|inputs|matrix|needs|steps|secrets)\b.*?\}\}")


def load(name: str) -> dict[str, Any]:
    document = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in document.items()}


JOBS = [(name, key, job) for name in WORKFLOWS for key, job in load(name)["jobs"].items()]
STEPS = [(name, key, step) for name, key, job in JOBS for step in job["steps"]]
COMPOSITE = [step for path in ACTIONS for step in yaml.safe_load(path.read_text())["runs"]["steps"]]


def lint(*command: str) -> str:
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(ROOT / ".cache"), "LANG": "C.UTF-8"}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_zizmor_finds_nothing() -> None:
    lint("zizmor", "--offline", "--persona=pedantic", "--no-progress", ".github")


def test_actionlint_finds_nothing() -> None:
    lint("actionlint", *map(str, WORKFLOWS.values()))


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", list(WORKFLOWS.values())),
        ("github-actions", ACTIONS),
        ("dependabot", [ROOT / ".github/dependabot.yml"]),
        (
            "github-issue-forms",
            [p for p in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if p.stem != "config"],
        ),
    ],
)
def test_files_follow_their_schema(schema: str, paths: list[Path]) -> None:
    assert paths
    lint("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths))


def test_act_accepts_the_folder() -> None:
    lint("act", "--validate", "--strict", "-P", "ubuntu-24.04=-self-hosted")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_named_for_its_file_and_triggered_by_little(name: str) -> None:
    workflow = load(name)
    assert workflow["name"] == name
    assert set(workflow["on"]) == EVENTS[name]
    assert workflow["permissions"] == {}
    assert "concurrency" in workflow


@pytest.mark.parametrize(("name", "key", "job"), JOBS, ids=[f"{name}-{key}" for name, key, _ in JOBS])
def test_a_job_may_do_what_it_needs_and_ends(name: str, key: str, job: dict[str, Any]) -> None:
    assert job["permissions"] == PERMISSIONS[name, key]
    assert job["timeout-minutes"] <= 60
    assert job["runs-on"] == "ubuntu-24.04"


def test_every_permission_in_the_table_is_of_a_job_that_exists() -> None:
    assert PERMISSIONS.keys() == {(name, key) for name, key, _ in JOBS}


def test_only_pinned_actions_of_github_itself() -> None:
    for step in [step for _, _, step in STEPS] + COMPOSITE:
        if "uses" in step and step["uses"] != "./.github/actions/setup":
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
    text = "".join(path.read_text() for path in [*WORKFLOWS.values(), *ACTIONS])
    assert len(re.findall(r"uses: actions/\S+ # v\d+\.\d+\.\d+$", text, re.MULTILINE)) == len(
        re.findall(r"uses: actions/", text)
    )


def test_a_pin_is_the_same_everywhere() -> None:
    text = "".join(path.read_text() for path in [*WORKFLOWS.values(), *ACTIONS])
    pins = set(re.findall(r"uses: (actions/[a-z-]+)@(\S+)", text))
    assert len(pins) == len({action for action, _ in pins})


def test_no_checkout_keeps_a_token() -> None:
    for _, _, step in STEPS:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_no_expression_of_untrusted_text_in_a_script() -> None:
    for step in [step for _, _, step in STEPS] + COMPOSITE:
        assert not UNTRUSTED.search(step.get("run", "")), step["run"]


def test_who_sees_which_secret() -> None:
    seen: dict[str, set[str]] = {}
    for name, path in WORKFLOWS.items():
        seen[name] = set(re.findall(r"secrets\.(\w+)", path.read_text()))
    assert seen == {
        "preflight": {"HF_READ_TOKEN"},
        "launch": {"HF_TOKEN"},
        "watch": {"HF_TOKEN"},
        "commands": set(),
        "ci": set(),
        "catalogue": set(),
        "pages": set(),
    }
    holders = [step["run"] for name, _, step in STEPS if "secrets.HF_READ_TOKEN" in str(step)]
    verb = "mergetune preflight --tree proposed --base-tree ."
    assert holders == [f"{verb} --trace-follows", verb]


def test_a_job_with_a_secret_has_no_cache() -> None:
    for name, key, job in JOBS:
        if "secrets." in str(job) or "write" in str(job["permissions"]):
            caches = [step for step in job["steps"] if step.get("with", {}).get("cache")]
            assert not caches, (name, key)


def test_where_the_token_is_only_main_runs_and_one_at_a_time() -> None:
    for name in ("launch", "watch"):
        workflow = load(name)
        assert workflow["concurrency"] == {"group": "mergetune", "cancel-in-progress": False}
        (job,) = workflow["jobs"].values()
        assert job["if"] == "github.ref == 'refs/heads/main'"
        (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert checkout["with"] == {"ref": "main", "fetch-depth": 0, "persist-credentials": False}
    assert load("launch")["on"]["push"] == {"branches": ["main"]}


def test_the_job_that_may_comment_runs_the_base_and_reads_the_proposal() -> None:
    for name, key in (("preflight", "plan"), ("commands", "command")):
        job = load(name)["jobs"][key]
        first, second = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert "path" not in first["with"]
        assert "base" in first["with"]["ref"] or first["with"]["ref"] == "main"
        assert second["with"]["path"] == "proposed"
        scripts = [step["run"] for step in job["steps"] if "run" in step]
        assert all(script.startswith(f"mergetune {key if key == 'command' else name}") for script in scripts)


def test_memory_is_traced_only_where_it_is_in_question() -> None:
    job = load("preflight")["jobs"]["plan"]
    conditions = [step.get("if") for step in job["steps"]]
    assert conditions[-2:] == ["steps.preflight.outputs.trace == 'true'"] * 2
    assert not any(conditions[:-2])
    assert job["outputs"]["rehearse"].startswith("${{ steps.traced.outputs.rehearse || ")


def test_preflight_has_no_filter_and_one_gate_that_always_runs() -> None:
    workflow = load("preflight")
    assert workflow["on"] == {"pull_request": None, "merge_group": None}
    gate = workflow["jobs"]["gate"]
    assert gate["if"] == "always()"
    assert set(gate["needs"]) == set(workflow["jobs"]) - {"gate"}


@pytest.mark.parametrize("plan", ["success", "failure", "cancelled", "skipped"])
@pytest.mark.parametrize("rehearse", ["success", "failure", "cancelled", "skipped"])
def test_the_gate_opens_only_when_all_passed(plan: str, rehearse: str) -> None:
    (step,) = load("preflight")["jobs"]["gate"]["steps"]
    environment = {"PATH": os.environ["PATH"], "PLAN": plan, "REHEARSE": rehearse}
    done = subprocess.run(["bash", "-e", "-c", step["run"]], env=environment, timeout=10)
    assert (done.returncode == 0) == (plan == "success" and rehearse in ("success", "skipped"))


def test_the_board_is_published_only_where_a_person_switched_it_on() -> None:
    (job,) = load("pages")["jobs"].values()
    assert job["if"] == "github.ref == 'refs/heads/main' && vars.MERGETUNE_BOARD == 'on'"
    page = (ROOT / "docs/board.md").read_text(encoding="utf-8")
    assert "gh variable set MERGETUNE_BOARD --repo OWNER/REPO --body on\n" in page
    assert "private repository are public" in page
    (branch,) = re.findall(r"source\[branch\]=([a-z-]+)", page)
    assert [step["run"].split()[-1] for step in job["steps"] if "git push" in step.get("run", "")] == [branch]


def test_secret_runs_are_named_verbs() -> None:
    runs = [step["run"] for name, _, step in STEPS if name in ("launch", "watch") and "run" in step]
    assert runs == ["mergetune dispatched", "mergetune reconcile --github", "mergetune reconcile --github"]
