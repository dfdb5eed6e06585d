"""A mergetune repository on the loopback GitHub: its files, its pull requests and checkouts of them."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repository import EXPERIMENT
from servers.github import LoopbackGitHub

from pipeline.github import GitHub, open_github
from pipeline.workflow_run import WorkflowRun

ROWS = "".join(json.dumps({"prompt": f"what is {n}?", "completion": f"it is {n}"}) + "\n" for n in range(40))
FILES = {
    "pyproject.toml": '[tool.mergetune]\nnamespaces = ["acme"]\n',
    "data.jsonl": ROWS,
    "prompts.jsonl": '{"prompt": "a"}\n',
    "base/config.json": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
    "base/chat_template.jinja": "{{ messages }}",
    **{f"scripts/{name}.py": "" for name in ("train_sft", "merge_adapter", "convert_gguf", "evaluate")},
}
PEOPLE = {"alice": "write", "bob": "write", "mallory": "read", "owner": "admin"}
SMALL = "experiments/small.yaml"


def experiment(name: str = "small", **changes: str) -> str:
    """The experiment under another name, with some of its lines' words replaced."""
    text = EXPERIMENT.replace("small", name)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def loopback(root: Path, **more: Any) -> LoopbackGitHub:
    """A GitHub with the repository and the people of these tests."""
    github = LoopbackGitHub(root, people=PEOPLE, files={**FILES, **more})
    for name in ("launch", "watch", "preflight", "commands"):
        github.add_workflow(f"{name}.yml")
    return github


def client(github: LoopbackGitHub, token: str | None = None) -> GitHub:
    """The real client as a workflow has it."""
    return open_github(github.api_url, token or github.actions_token(), github.repository)


def checkout(github: LoopbackGitHub, ref: str, folder: Path) -> Path:
    """The files of a ref, as `actions/checkout` leaves them."""
    quiet = {"capture_output": True, "check": True, "timeout": 30}
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", str(github.git_dir), str(folder)], **quiet)
    subprocess.run(["git", "fetch", "-q", "origin", ref], cwd=folder, **quiet)
    subprocess.run(["git", "checkout", "-q", "--force", "FETCH_HEAD"], cwd=folder, **quiet)
    return folder


def workflow_run(
    github: LoopbackGitHub, folder: Path, name: str, event: Mapping[str, Any], token: str | None = None
) -> WorkflowRun:
    """What the verb is told by the environment."""
    secret = token or github.actions_token()
    return WorkflowRun(name, event, github.repository, github.api_url, secret, folder / "summary.md", folder / "output")
