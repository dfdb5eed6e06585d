"""What each verb costs in a large repository, beside one of a thousand experiments: seconds, memory, requests, git.

    python benchmarks/large_repository.py

Each repository has a bare remote whose `run/` tags close ninety-nine of a hundred experiments. Of the others five were
just merged, which is as many as one tick may start, and the rest has a queued job. Every call is the real command in a
process of its own, against the loopback Hub. "Each" is what an experiment adds to the same call in a repository of ten,
and the ratio compares that with the first large repository: 1.0 is linear.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SMALL, IDLE, SHARE = 10, 5, 100  # experiments of the repository to subtract; just merged ones; one open of so many
ROWS, TRIES = 1000, 3
TAGGER = "bench <bench@example.invalid> 1800000000 +0000"
EXPERIMENT = """\
name: {name}
hypothesis: a rank of {rank} and a learning rate of {rate:.2e} lower the held-out loss below 1.2
base: {base}
data: {{dataset: data/all.jsonl, eval: {{fraction: 0.1}}}}
train:
  method: lora
  flavor: a10g-large
  timeout: 2h
  epochs: 3
  max_length: 512
  learning_rate: {rate:.6e}
  lora: {{r: {rank}, alpha: 32, targets: [q_proj, k_proj, v_proj, o_proj]}}
merge: {{flavor: cpu-upgrade, timeout: 1h}}
gguf: {{flavor: cpu-upgrade, timeout: 1h, quants: [Q4_K_M, Q8_0]}}
output: {{repo: acme/{name}}}
budget: {{max_usd: 20}}
"""
REVIEW = """\
from pathlib import Path
from pipeline.preflight import review
from pipeline.pull_request import ChangedFile, FileStatus
seen = review([ChangedFile("experiments/run-0.yaml", FileStatus.MODIFIED)], Path(), Path())
assert len(seen.previews) == 1 and seen.is_good, seen.findings
"""
# Between us and the command: a process is charged the memory of the one that started it, and ours holds the Hub.
WATCH = """\
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
sys.exit(code)
"""
VERBS = {
    "check": ("-m", "pipeline", "check"),
    "check, base and tokenizer here": ("-m", "pipeline", "check", "local"),
    "tick": ("-m", "pipeline", "reconcile", "--format", "json"),
    "status": ("-m", "pipeline", "status"),
    "board": ("-m", "pipeline", "board", "--format", "json"),
    "preflight of one file": ("-c", REVIEW),
}


@dataclass(frozen=True)
class Cost:
    """One call of one verb."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    requests: int
    git: int


@dataclass(frozen=True)
class Place:
    """A repository beside its Hub, and the folder whose `git` counts."""

    story: Any
    counter: Path

    def call(self, arguments: tuple[str, ...]) -> Cost:
        """Run the command to its end."""
        log = self.counter / "calls"
        environment = self.story.command_environment()
        environment |= {"PATH": f"{self.counter}:{environment['PATH']}", "HF_HUB_DISABLE_TELEMETRY": "1"}
        log.write_text("")
        before, began = len(self.story.hub.requests), time.perf_counter()
        command = [sys.executable, "-c", WATCH, *arguments]
        done = subprocess.run(
            command, cwd=self.story.clone, env=environment, capture_output=True, text=True, timeout=600
        )
        wall = time.perf_counter() - began
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
        made, calls = len(self.story.hub.requests) - before, len(log.read_text().splitlines())
        cpu_s, peak_mb = map(float, done.stdout.split())
        return Cost(wall, cpu_s, peak_mb, made, calls)


def make_place(folder: Path, hub: Any, count: int) -> Place:
    """A repository of so many experiments, most of them finished, and jobs for the others."""
    from check_many import _row
    from hub_story import BASE, make_story

    story = make_story(folder, hub, stand_ins=True)
    hub.execute_jobs = False
    shutil.copytree(BASE, story.clone / "base")
    (story.clone / "data/all.jsonl").write_text("".join(_row(0, number) for number in range(ROWS)))
    (story.clone / "local").mkdir()
    hub_base = f"{{model: acme/tiny-base, revision: {story.base_revision}}}"
    for number in range(count):
        words = {"name": f"run-{number}", "rank": 8 + number % 64, "rate": 1e-4 * (1 + number / count)}
        (story.clone / f"experiments/run-{number}.yaml").write_text(EXPERIMENT.format(base=hub_base, **words))
        here = EXPERIMENT.format(base="{model: ./base}", **words)
        (story.clone / f"local/run-{number}.yaml").write_text(here)
    story.publish("experiments")
    story.install()
    finish_most(story, count)
    counter = folder / "counter"
    counter.mkdir()
    (counter / "git").write_text(f'#!/bin/sh\necho >> "{counter}/calls"\nexec {shutil.which("git")} "$@"\n')
    (counter / "git").chmod(0o755)
    return Place(story, counter)


def finish_most(story: Any, count: int) -> None:
    """Close all but the share of open ones, and give those a queued job but for five."""
    from hub_story import TOKEN
    from huggingface_hub import HfApi
    from reconcile import finish

    from pipeline.repository import Repository
    from pipeline.tree import read_tree

    repository = Repository(story.clone)
    commit = repository.head_commit()
    runs = [run.run_id for run in read_tree(story.clone, commit).wanted]
    closed = runs[: count - max(IDLE, count // SHARE)]
    messages = [(run, finish(run, datetime.now(UTC))) for run in closed]
    tags = (
        f"tag run/{run}\nfrom {commit}\ntagger {TAGGER}\ndata {len(said.encode())}\n{said}\n" for run, said in messages
    )
    command = ["git", "fast-import", "--quiet"]
    subprocess.run(command, cwd=story.root / "acme/tunes.git", input="".join(tags).encode(), check=True)
    api = HfApi(endpoint=story.hub.url, token=TOKEN)
    for run in runs[len(closed) + IDLE :]:
        labels = {"experiment": run.rpartition("-")[0], "run": run, "stage": "train", "attempt": "1"}
        labels["repo"] = repository.label()
        api.run_job(image="x", command=["true"], labels=labels, namespace="acme", flavor="a10g-large")


def measure(count: int) -> dict[str, Cost]:
    """Every verb in a repository of so many experiments."""
    from servers.hub import LoopbackHub

    with tempfile.TemporaryDirectory() as folder, LoopbackHub(Path(folder)) as hub:
        place = make_place(Path(folder), hub, count)
        return {verb: place.call(arguments) for verb, arguments in VERBS.items()}


def least(verb: str, seen: list[dict[str, Cost]]) -> Cost:
    """The cheapest of several calls: what is subtracted must not hold the noise of a busy machine."""
    return min((one[verb] for one in seen), key=lambda cost: cost.cpu_s)


HEAD = ("call", "experiments", "wall s", "CPU s", "peak MB", "requests", "git")
HEAD += ("ms CPU each", "kB each", "requests each", "git each", "CPU ratio", "memory ratio")


def row(verb: str, count: int, cost: Cost, small: Cost, first: tuple[int, Cost]) -> str:
    """One line: the call, what an experiment adds to it, and that beside the first large repository's."""
    cpu_ms, memory_kb, requests, git = _each(cost, small, count)
    was_cpu, was_memory, *_ = _each(first[1], small, first[0])
    cells = [verb, f"{count:,}", f"{cost.wall_s:.1f}", f"{cost.cpu_s:.1f}", f"{cost.peak_mb:.0f}"]
    cells += [str(cost.requests), str(cost.git)]
    cells += [f"{cpu_ms:.2f}", f"{memory_kb:.1f}", f"{requests:.3f}", f"{git:.3f}"]
    cells += [f"{cpu_ms / was_cpu:.2f}", f"{memory_kb / was_memory:.2f}" if was_memory > 0 else ""]
    return f"| {' | '.join(cells)} |"


def _each(cost: Cost, small: Cost, count: int) -> tuple[float, float, float, float]:
    """What one experiment adds: milliseconds of CPU, kilobytes, requests, git processes."""
    more = max(count - SMALL, 1)
    cpu_ms, memory_kb = 1000 * (cost.cpu_s - small.cpu_s), 1024 * (cost.peak_mb - small.peak_mb)
    return cpu_ms / more, memory_kb / more, (cost.requests - small.requests) / more, (cost.git - small.git) / more


def main() -> None:
    """Measure every repository in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 10_000], help="experiments of each")
    counts = parser.parse_args().counts
    print(f"| {' | '.join(HEAD)} |\n|---{'|--:' * (len(HEAD) - 1)}|")
    tries = [measure(SMALL) for _ in range(TRIES)]
    small = {verb: least(verb, tries) for verb in VERBS}
    for verb, cost in small.items():
        start = f"{cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.peak_mb:.0f} | {cost.requests} | {cost.git}"
        print(f"| {verb} | {SMALL} | {start} |" + " |" * 6, flush=True)
    first: tuple[int, dict[str, Cost]] | None = None
    for count in counts:
        seen = measure(count)
        first = first or (count, seen)
        for verb in VERBS:
            print(row(verb, count, seen[verb], small[verb], (first[0], first[1][verb])), flush=True)


if __name__ == "__main__":
    main()
