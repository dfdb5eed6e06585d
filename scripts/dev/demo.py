"""A pull request becomes a model, for a person to watch: no account, no GPU, no network.

    make demo
    python scripts/dev/demo.py --into demo --no-pictures

Starts the loopback GitHub and Hub of the tests, runs the verbs that the workflows run, and lets the jobs really train,
merge, convert and compare a tiny model. Every version of every comment is printed and written to demo/NN-what.md, and
drawn beside it where Chromium and npm are there. Ctrl-C stops servers and jobs. Exit code: 0 a model came out, 1 none
did, 130 stopped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts/dev")]

from demo_screen import Screen  # noqa: E402
from hub_story import GIT_IDENTITY, TOKEN  # noqa: E402
from render_markdown import Unable, draw, renderer  # noqa: E402
from rich.console import Console  # noqa: E402
from servers.github import LoopbackGitHub  # noqa: E402
from servers.hub import LoopbackHub  # noqa: E402
from servers.hub_jobs import Job  # noqa: E402
from workflow_story import PEOPLE, READ_TOKEN, Workplace, make_workplace, template_files  # noqa: E402

NAME = "harbour-pilot"
FILE = f"experiments/{NAME}.yaml"
EXAMPLES = ROOT / "experiments/examples/data"
DATA = ("quickstart-train.jsonl", "quickstart-heldout.jsonl", "quickstart-prompts.jsonl")
EXPERIMENT = """\
name: {name}
hypothesis: >-
  LoRA on 260 hand-written answers of an old harbour pilot lowers the held-out loss on his words by at least 20 %
  and makes the model answer in his voice.
base: {{model: acme/tiny-base, revision: {revision}}}
data:
  dataset: data/quickstart-train.jsonl
  eval: {{dataset: data/quickstart-heldout.jsonl}}
train:
  method: lora
  flavor: cpu-upgrade
  timeout: 45m
  epochs: {epochs}
  max_length: 256
  batch_size: 4
  gradient_accumulation: 1
  learning_rate: 1e-3
  loss_on: assistant
  lora: {{r: 32, alpha: 64, targets: all-linear}}
merge: {{flavor: cpu-upgrade, timeout: 10m}}
gguf: {{flavor: cpu-upgrade, timeout: 30m, quants: [Q8_0]}}
evaluate: {{flavor: cpu-upgrade, timeout: 10m, prompts: data/quickstart-prompts.jsonl, max_new_tokens: 40}}
output: {{repo: acme/{name}, private: true}}
budget: {{max_usd: 1}}
"""
TICKS, VERB_S, JOB_S = 12, 400, 400  # more than any of it takes, building llama.cpp included


@dataclass
class Stage:
    """Where the story is told, and on which screen."""

    screen: Screen
    place: Workplace

    def heading(self, text: str) -> None:
        """What happens next."""
        self.screen.heading(text)

    def line(self, text: str) -> None:
        """A remark."""
        self.screen.line(text)

    def show_new(self, number: int) -> None:
        """The comments of a pull request that are new or were edited."""
        self.screen.show_new(self.place.comments(number))


def tell(stage: Stage) -> int:
    """The story from the pull request to the results; the exit code."""
    place, github = stage.place, stage.place.github
    place.install()
    stage.heading("alice opens a pull request with one file, experiments/harbour-pilot.yaml")
    body = (ROOT / ".github/pull_request_template.md").read_text(encoding="utf-8")
    number = github.open_pull("pilot", "alice", files={FILE: experiment(place, 3)}, body=body, title="Try a pilot")
    if preflight(stage, number):
        return 1
    stage.heading("bob thinks that two passes are enough: alice pushes again, and the same comment is edited")
    github.push("pilot", {FILE: experiment(place, 2)}, "alice", "Two passes")
    if preflight(stage, number):
        return 1
    stage.heading("the rehearsal: the whole chain in miniature, on this CPU, before any money is spent")
    tree = checkout(place, place.merge_ref(number), "proposed")
    if verb(stage, tree, {}, "rehearse", FILE):
        return 1
    stage.line("the rehearsal is green: the pull request may be merged")
    stage.heading("bob approves and merges")
    github.approve(number, "bob")
    before = place.github.world.commit("refs/heads/main")
    event = github.event("push", before=before, after=github.merge(number, "squash", "bob"))
    return watch(stage, number, event)


def watch(stage: Stage, number: int, push: Mapping[str, Any]) -> int:
    """The tick after the merge, and one more whenever a job has ended, until nothing is in flight."""
    place, told = stage.place, ("push", push)
    for _ in range(TICKS):
        tree = checkout(place, "refs/heads/main", "main", branch="main")
        if tick(stage, tree, *told):
            return 1
        stage.show_new(number)
        if place.github.world.workflow("watch.yml").state == "disabled_manually":
            return finish(stage, number)
        for job in [job for job in place.hub.jobs.values() if not job.over]:
            wait(stage, job)
        told = ("schedule", place.github.event("schedule"))
        stage.heading("the clock of the workflow `watch` ticks")
    stage.line(f"still in flight after {TICKS} ticks")
    return 1


def finish(stage: Stage, number: int) -> int:
    """What there is at the end; 0 where the results were told."""
    place = stage.place
    sha = place.github.world.pull(number).merge_commit_sha or ""
    status = place.github.statuses(sha)[f"train/{NAME}"]
    stage.heading(f"commit status `train/{NAME}` is {status.state}: {status.description}")
    for _, repo, seen in place.hub.repos():
        stage.line(f"on the Hub: {repo} ({seen}), {len(place.hub.files(repo))} files")
    return int(status.state != "success" or not place.comments(number, "result:"))


def preflight(stage: Stage, number: int) -> int:
    """What the workflow `preflight` does first: check and plan, from the base's code."""
    place = stage.place
    proposed = checkout(place, place.merge_ref(number), "proposed")
    base = checkout(place, "refs/heads/main", "main", branch="main")
    environment = workflow(place, "pull_request", place.github.event("pull_request", number))
    options = ("--tree", str(proposed), "--base-tree", str(base))
    code = verb(stage, base, {**environment, "HF_READ_TOKEN": READ_TOKEN}, "preflight", *options)
    stage.show_new(number)
    ticked = place.github.world.pull(number).body.count("[x]")
    stage.line(f"the checklist in the description: {ticked} of 5 ticked by preflight itself")
    return code


def tick(stage: Stage, tree: Path, name: str, event: Mapping[str, Any]) -> int:
    """What the workflows `launch` and `watch` do."""
    environment = {**workflow(stage.place, name, event), "HF_TOKEN": TOKEN}
    return verb(stage, tree, environment, "reconcile", "--github")


def wait(stage: Stage, job: Job) -> None:
    """Until a job is over, in steps short enough for Ctrl-C."""
    label, began = job.labels["stage"], time.monotonic()
    stage.line(f"job {label} runs on {job.flavor}, played by this machine …")
    while not job.over and time.monotonic() < began + JOB_S:
        with job.changed:
            job.changed.wait_for(lambda: job.over, 0.5)
    stage.line(f"job {label} ended as {job.stage} after {time.monotonic() - began:.0f} s")
    if job.stage != "COMPLETED":
        stage.line(job.log[-1500:])


def verb(stage: Stage, tree: Path, environment: Mapping[str, str], *arguments: str) -> int:
    """Run `mergetune ARGUMENTS` in a checkout as a workflow step does; its exit code."""
    stage.line(f"$ mergetune {' '.join(a if len(a) < 60 else Path(a).name for a in arguments)}")
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    mine = {"HF_ENDPOINT": stage.place.hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    mine |= {"PYTHONPATH": str(ROOT), "HOME": str(stage.place.root / "home"), "NO_COLOR": "1", "OMP_NUM_THREADS": "2"}
    env = {**kept, **GIT_IDENTITY, **mine, **stage.place.environment, **environment}
    command = [sys.executable, "-m", "pipeline", *arguments]
    # A session of its own: Ctrl-C reaches it once, through `stop`, and not a second time while it tidies up.
    with subprocess.Popen(
        command, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=VERB_S)
        except BaseException:
            stop(process)
            raise
    if process.returncode:
        stage.line(f"{out[-3000:]}\n   exit code {process.returncode}")
    return process.returncode


def stop(process: "subprocess.Popen[str]") -> None:
    """As Ctrl-C, so that it ends what it started; by force where it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()


def workflow(place: Workplace, name: str, event: Mapping[str, Any]) -> dict[str, str]:
    """What GitHub Actions tells a step."""
    payload = place.root / "event.json"
    payload.write_text(json.dumps(event), encoding="utf-8")
    return {
        "GITHUB_EVENT_NAME": name,
        "GITHUB_EVENT_PATH": str(payload),
        "GITHUB_REPOSITORY": place.github.repository,
        "GITHUB_API_URL": place.github.api_url,
        "GITHUB_TOKEN": place.github.actions_token(),
    }


def checkout(place: Workplace, ref: str, name: str, branch: str = "proposed") -> Path:
    """A clone at a ref, with the whole history."""
    folder, quiet = place.root / name, {"capture_output": True, "check": True, "timeout": 60}
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", str(place.github.git_dir), str(folder)], **quiet)
    subprocess.run(["git", "fetch", "-q", "origin", ref], cwd=folder, **quiet)
    subprocess.run(["git", "checkout", "-q", "--force", "-B", branch, "FETCH_HEAD"], cwd=folder, **quiet)
    return folder


def experiment(place: Workplace, epochs: int) -> str:
    """The file that is proposed."""
    return EXPERIMENT.format(name=NAME, revision=place.revision, epochs=epochs)


def perform(console: Console, into: Path) -> tuple[int, list[Path]]:
    """The story with everything it needs, and nothing left of it but the comments; exit code and their files."""
    files = {**template_files(), **{f"data/{name}": (EXAMPLES / name).read_bytes() for name in DATA}}
    with tempfile.TemporaryDirectory(prefix="mergetune-demo-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        with LoopbackHub(root) as hub, LoopbackGitHub(root, people=PEOPLE, files=files) as github:
            place = make_workplace(root, hub, github)
            hub.job_environment["OMP_NUM_THREADS"] = "2"
            stage = Stage(Screen(console, into), place)
            code = tell(stage)
        return code, stage.screen.written


def pictures(console: Console, paths: list[Path]) -> None:
    """Draw the comments, or say in one line why not."""
    try:
        drawn = draw(renderer(), paths, paths[0].parent)
    except Unable as reason:
        console.print(f"no pictures: {reason}", markup=False)
        return
    console.print(f"{len(drawn)} pictures: {paths[0].parent}/*.png", markup=False)


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Parse, perform, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "demo", help="folder for the comments; default: demo/")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    options.into.mkdir(parents=True, exist_ok=True)
    for old in options.into.glob("[0-9][0-9]-*.*"):  # of the demo before
        old.unlink()
    console = Console()
    try:
        code, written = perform(console, options.into)
        if written and not options.no_pictures:
            pictures(console, written)
    except KeyboardInterrupt:
        console.print("stopped: servers and jobs are gone")
        return 130
    console.print(f"{len(written)} comments: {options.into}/*.md", markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
