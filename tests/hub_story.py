"""A whole mergetune repository beside a loopback Hub: a bare remote, a clone, and ticks as the workflows run them.

A tick is the real command in a process of its own (`tick`), or the same in this one under a clock that a test moves
(`tick_here`), which makes many replays cheap. Jobs run the real scripts, or stand-ins for them that do no work.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from huggingface_hub import close_session
from servers.hub import LoopbackHub
from servers.hub_jobs import Job

from pipeline.book import Book, Closed, since_message
from pipeline.controller import tick
from pipeline.hf_world import open_world
from pipeline.repository import Repository
from pipeline.world import Report

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"train": "train_sft", "merge": "merge_adapter", "gguf": "convert_gguf", "evaluate": "evaluate"}
TOKEN = "hf_" + "StoryStoryStoryStoryStoryStoryStor"
BASE = ROOT / "experiments/examples/tiny-docs-llama"
GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}
EXPERIMENT = """\
name: tiny
hypothesis: the whole chain runs on loopback
base: {{model: acme/tiny-base, revision: {revision}}}
data: {{dataset: data/rows.jsonl, eval: {{fraction: 0.2}}}}
train:
  method: lora
  flavor: cpu-upgrade
  timeout: 45m
  max_steps: 6
  max_length: 256
  gradient_accumulation: 1
  learning_rate: 1e-3
  save_steps: 2
  lora: {{r: 4, alpha: 8}}
merge: {{timeout: 20m}}
gguf: {{timeout: 20m, quants: [Q8_0]}}
output: {{repo: acme/tiny}}
budget: {{max_usd: 1}}
"""
ROWS = [
    {"messages": [{"role": "user", "content": f"what is {n} plus one?"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(40)
]


@dataclass
class Clock:
    """This machine's clock, as much ahead as was slept: nobody waits."""

    ahead_s: float = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self.ahead_s

    def sleep(self, seconds: float) -> None:
        """Skip so many seconds."""
        self.ahead_s += seconds


@dataclass
class Story:
    """One repository, one Hub, one person's token."""

    root: Path
    hub: LoopbackHub
    base_revision: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    @property
    def clone(self) -> Path:
        """The checkout that ticks run in."""
        return self.root / "clone"

    def git(self, *arguments: str) -> str:
        """Run git in the clone."""
        done = subprocess.run(
            ["git", *arguments], cwd=self.clone, env={**os.environ, **GIT_IDENTITY}, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def merge(self, name: str = "tiny", text: str | None = None) -> None:
        """Put an experiment on main, as a merged pull request does."""
        content = text if text is not None else EXPERIMENT.format(revision=self.base_revision)
        (self.clone / f"experiments/{name}.yaml").write_text(content)
        self.publish(f"Add {name}")

    def remove(self, name: str = "tiny") -> None:
        """Delete an experiment's file on main."""
        (self.clone / f"experiments/{name}.yaml").unlink()
        self.publish(f"Remove {name}")

    def publish(self, message: str) -> None:
        """Commit everything and push it to main."""
        self.git("add", "-A")
        self.git("commit", "-qm", message)
        self.git("push", "-q", "origin", "HEAD:main")

    def command_environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What the command gets: the loopback Hub and a token, nothing of this process's own set-up."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        mine = {
            "HOME": str(self.root / "home"),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_COLOR": "1",
        }
        return {**kept, **GIT_IDENTITY, **mine, **self.environment, **({"HF_TOKEN": token} if token else {})}

    def start(self, *arguments: str, token: str | None = TOKEN) -> "subprocess.Popen[str]":
        """Start `mergetune ARGUMENTS` in the clone."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=self.clone,
            env=self.command_environment(token),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: str, token: str | None = TOKEN) -> "subprocess.CompletedProcess[str]":
        """Run `mergetune ARGUMENTS` to its end."""
        process = self.start(*arguments, token=token)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def tick(self) -> list[dict[str, Any]]:
        """One `mergetune reconcile`; returns its reports."""
        done = self.call("reconcile", "--format", "json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def tick_here(self) -> list[Report]:
        """One tick in this process, by the story's clock; the caller is in `here`."""
        return tick(open_world(self.clone, "main", self.clock))

    def live_on(self, ticks: int = 40) -> Closed:
        """Ticks until nothing is open, half an hour apart; returns the last round that was closed."""
        for _ in range(ticks):
            if not self.tick_here():
                return max(self.book().closed, key=lambda one: one.at)
            self.hub.wait_jobs(60)
            self.clock.sleep(1800)
        raise AssertionError(f"still open after {ticks} ticks")

    def worked(self, stage: str = "train") -> list[Job]:
        """The jobs of a stage that passed the fence: what is paid for."""
        return [job for job in self.hub.jobs.values() if job.labels["stage"] == stage and "works\n" in job.log]

    def book(self) -> Book:
        """The tags of the remote."""
        return Repository(self.clone).read_book()

    def install(self) -> None:
        """Write the marker of a first install, as the first tick does."""
        repository = Repository(self.clone)
        repository.push_tag("mergetune/since", repository.head_commit(), since_message(datetime.now(UTC)))


def make_story(root: Path, hub: LoopbackHub, *, stand_ins: bool = False) -> Story:
    """A repository with the real job scripts or stand-ins, an account with a token, and a tiny base on the Hub."""
    hub.add_user("alice", orgs={"acme": "admin"})
    hub.add_token(TOKEN, "alice")
    revision = hub.add_repo("acme/tiny-base", {p.name: p.read_bytes() for p in BASE.iterdir() if p.is_file()})
    story = Story(root, hub, revision)
    (root / "home").mkdir()
    bare = root / "acme/tunes.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(bare)], check=True)
    # As GitHub has it: whoever asks for tags alone gets tags alone.
    subprocess.run(["git", "-C", str(bare), "config", "uploadpack.allowFilter", "true"], check=True)
    subprocess.run(["git", "init", "-q", "-b", "main", str(story.clone)], check=True)
    story.git("remote", "add", "origin", str(root / "acme/tunes.git"))
    for folder in ("experiments", "data"):
        (story.clone / folder).mkdir()
    shutil.copytree(ROOT / "scripts", story.clone / "scripts", ignore=shutil.ignore_patterns("dev", "__pycache__"))
    if stand_ins:
        for script in STAGES.values():
            shutil.copy(ROOT / "tests/stand_in_stage.py", story.clone / f"scripts/{script}.py")
    (story.clone / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n')
    (story.clone / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    story.publish("Start from the template")
    # The jobs use the llama.cpp that this machine has built already.
    cache = os.environ.get("MERGETUNE_CACHE") or str(Path.home() / ".cache/mergetune")
    hub.job_environment = {"MERGETUNE_CACHE": cache, "OMP_NUM_THREADS": "1"}
    return story


@contextmanager
def story_told(root: Path, *, stand_ins: bool = False) -> Iterator[Story]:
    """A story whose Hub shares its clock, with one experiment to launch."""
    clock = Clock()
    with LoopbackHub(root, clock=clock.now) as hub:
        story = make_story(root, hub, stand_ins=stand_ins)
        story.clock = clock
        story.install()
        yield story


@contextmanager
def here(story: Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    """This process as the command's: its environment, and a client that may ask."""
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("HF_", "MERGETUNE_")):
                patch.delenv(name)
        for name, value in story.command_environment().items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(story.root / "home/cache"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.utils._http, "time", story.clock)  # the client waits between its own retries
        close_session()
        yield story
        close_session()
