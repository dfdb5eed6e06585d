"""What many experiments cost, counted: files opened, git processes, requests, all of the real commands. No times."""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hub_story import Story, story_told

from pipeline.book import Closed, Verdict, finish_message
from pipeline.preflight import review
from pipeline.progress import MANY
from pipeline.pull_request import ChangedFile, FileStatus
from pipeline.tree import read_tree

pytestmark = pytest.mark.slow

FEW, SOME = 30, 300
EXPERIMENT = """\
name: {name}
hypothesis: a learning rate of {rate} lowers the held-out loss below 1.2
base: {{model: acme/tiny-base, revision: {revision}}}
data: {{dataset: data/rows.jsonl, eval: {{fraction: 0.2}}}}
train:
  method: lora
  flavor: cpu-upgrade
  timeout: 45m
  max_steps: 6
  max_length: 256
  learning_rate: {rate}
  lora: {{r: 4, alpha: 8}}
output: {{repo: acme/{name}}}
budget: {{max_usd: 1}}
"""
# Python tells every file that is opened to a hook of this module, which every process of the command loads.
COUNTS_FILES = """\
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith({root!r}):
        os.write(log, (arguments[0][len({root!r}):] + chr(10)).encode())
sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Cost:
    """One command: requests, git's subcommands, and how often each file of the clone was opened; what it printed."""

    requests: int
    git: list[str]
    files: Counter[str]
    out: str

    @property
    def experiments(self) -> list[int]:
        """How often each experiment was read."""
        return [count for path, count in self.files.items() if path.startswith("experiments/")]

    @property
    def others(self) -> dict[str, int]:
        """How often every other file was read."""
        return {path: count for path, count in self.files.items() if not path.startswith("experiments/")}


def measured(story: Story, *arguments: str, code: int = 0) -> Cost:
    """Run `mergetune ARGUMENTS` with a `git` that counts and a Python that tells which files it opens."""
    place = story.root / "counter"
    place.mkdir(exist_ok=True)
    for name in ("git", "files"):
        (place / f"{name}.log").write_text("")
    # The subcommand is what follows the settings: `git -c key=value … SUBCOMMAND`.
    words = 'while [ "$1" = -c ]; do shift 2; done; echo "$1"'
    (place / "git").write_text(f'#!/bin/sh\n({words}) >> {place}/git.log\nexec {shutil.which("git")} "$@"\n')
    (place / "git").chmod(0o755)
    hook = COUNTS_FILES.format(log=str(place / "files.log"), root=f"{story.clone}/")
    (place / "sitecustomize.py").write_text(hook)
    plain = story.command_environment()
    story.environment |= {"PATH": f"{place}:{os.environ['PATH']}", "PYTHONPATH": f"{place}:{plain['PYTHONPATH']}"}
    before = len(story.hub.requests)
    done = story.call(*arguments)
    story.environment.clear()
    assert done.returncode == code, done.stdout + done.stderr
    files = Counter((place / "files.log").read_text().splitlines())
    return Cost(len(story.hub.requests) - before, (place / "git.log").read_text().split(), files, done.stdout)


def grow(story: Story, count: int, *, finished: bool = True) -> None:
    """Put experiments on main until there are so many, all finished or all of them just merged."""
    for number in range(count):
        text = EXPERIMENT.format(name=f"run-{number}", rate=f"1.{number:04}e-4", revision=story.base_revision)
        (story.clone / f"experiments/run-{number}.yaml").write_text(text)
    story.publish(f"{count} experiments")
    if finished:
        close_all(story)


def close_all(story: Story) -> None:
    """Tag every run of main as done, in one process of git."""
    commit, now = story.git("rev-parse", "HEAD"), datetime.now(UTC)
    stream = []
    for run in read_tree(story.clone, commit).wanted:
        said = finish_message(Closed(run.run_id, 1, Verdict.DONE, "1 of 1 stages are done", now, 0.5))
        head = f"tag run/{run.run_id}\nfrom {commit}\ntagger Ada <ada@example.org> 1800000000 +0000\n"
        stream.append(f"{head}data {len(said.encode())}\n{said}\n")
    command = ["git", "fast-import", "--quiet", "--force"]
    remote = story.root / "acme/tunes.git"
    subprocess.run(command, cwd=remote, input="".join(stream).encode(), check=True, timeout=60)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        story.hub.execute_jobs = False
        yield story


@pytest.mark.parametrize("command", [("reconcile",), ("status",), ("status", "run-3"), ("board", "--format", "json")])
def test_a_finished_experiment_costs_no_request_and_no_git(story: Story, command: tuple[str, ...]) -> None:
    grow(story, FEW)
    few = measured(story, *command)
    grow(story, SOME)
    some = measured(story, *command)
    assert (few.requests, few.git) == (some.requests, some.git)
    assert few.requests > 0
    assert "log" not in some.git
    assert (few.experiments, some.experiments) == ([1] * FEW, [1] * SOME)
    assert few.files["data/rows.jsonl"] == some.files["data/rows.jsonl"] == 1
    scripts = [path for path in some.files if path.startswith("scripts/")]
    assert scripts == []  # nobody has made a plan


def test_the_tags_of_one_call_are_read_once(story: Story) -> None:
    grow(story, FEW)
    assert [measured(story, verb).git.count("fetch") for verb in ("reconcile", "status")] == [1, 1]


def test_a_tick_reads_the_others_for_none_of_its_submits(story: Story) -> None:
    grow(story, FEW, finished=False)
    made = measured(story, "reconcile", code=1)  # the others wait: this tick has started enough
    started = made.out.count(": submitted: ")
    assert started == 5
    # Once for the tree, and once more each to be checked with the place of every word.
    assert sorted(made.experiments) == [1] * (FEW - started) + [2] * started
    assert made.git.count("log") == started


def test_one_live_job_among_the_finished(story: Story) -> None:
    grow(story, FEW)
    story.merge("run-0", EXPERIMENT.format(name="run-0", rate="2e-4", revision=story.base_revision))
    assert "run-0-" in measured(story, "reconcile").out
    few = measured(story, "reconcile")
    grow(story, SOME)
    close_all(story)
    story.merge("run-0", EXPERIMENT.format(name="run-0", rate="2e-4", revision=story.base_revision))
    some = measured(story, "reconcile")
    assert (few.requests, few.git) == (some.requests, some.git)
    assert some.out.count("\n") == 1


def test_a_check_reads_every_file_once_and_starts_no_git(story: Story) -> None:
    grow(story, FEW, finished=False)
    few = measured(story, "check")
    grow(story, SOME, finished=False)
    some = measured(story, "check")
    assert few.git == some.git == []
    assert (few.experiments, some.experiments) == ([1] * FEW, [1] * SOME)
    others = [
        Counter({p: n for p, n in cost.files.items() if not p.startswith("experiments/")}) for cost in (few, some)
    ]
    assert others[0] == others[1]


def test_preflight_of_one_file_reads_the_others_once(story: Story) -> None:
    grow(story, FEW, finished=False)
    opened: Counter[str] = Counter()
    watching = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            opened[str(arguments[0])] += 1

    sys.addaudithook(hook)
    changed = ChangedFile("experiments/run-3.yaml", FileStatus.MODIFIED)
    reviewed = review([changed], story.clone, story.clone)
    watching.clear()
    assert [one.path for one, _ in reviewed.previews] == ["experiments/run-3.yaml"]
    assert reviewed.is_good
    counts = {Path(path).stem: count for path, count in opened.items() if path.startswith(f"{story.clone}/experiments")}
    assert len(counts) == FEW
    assert {name: count for name, count in counts.items() if count > 1}.keys() == {"run-3"}


def check_at_a_terminal(story: Story) -> tuple["subprocess.Popen[bytes]", int]:
    """Start `mergetune check` with a terminal as its standard error."""
    ours, theirs = pty.openpty()
    environment = {**story.command_environment(), "TERM": "xterm"}
    command = [sys.executable, "-m", "pipeline", "check"]
    process = subprocess.Popen(command, cwd=story.clone, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    return process, ours


def read_terminal(ours: int) -> bytes:
    """Until the last one who could write is gone."""
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    return b"".join(parts)


def test_a_long_check_shows_at_a_terminal_how_far_it_is(story: Story) -> None:
    grow(story, MANY, finished=False)
    process, ours = check_at_a_terminal(story)
    shown = read_terminal(ours)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{MANY} checked, 0 errors, 0 warnings\n".encode())
    assert b"reading" in shown
    assert b"checking" in shown
    assert b"100%" in shown
    assert story.call("check").stderr == ""  # and nowhere else


def test_ctrl_c_ends_a_long_check_and_leaves_nothing(story: Story) -> None:
    grow(story, 5 * MANY, finished=False)
    before = story.git("status", "--porcelain", "--ignored")
    process, ours = check_at_a_terminal(story)
    seen = b""
    while b"reading" not in seen:
        seen += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    shown = read_terminal(ours)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"stopped; nothing was changed" in shown
    assert b"Traceback" not in shown
    assert story.git("status", "--porcelain", "--ignored") == before
