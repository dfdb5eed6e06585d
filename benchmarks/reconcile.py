"""What one tick over many experiments costs: requests to the Hub, seconds and memory, by how many of them are live.

    python benchmarks/reconcile.py --experiments 1000

Files in a temporary repository with a bare remote, whose `run/` tags close nine of ten. Of the open tenth some have a
live job; of the others every second one was just merged and every other one waits for its next stage. The tick is a
process of its own (the real client against the loopback Hub; seconds and memory are of the whole process) and takes
its actions: it starts as many jobs as one tick may. The bound is (live + 5) requests per 100 experiments.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOKEN, LABEL, BRANCH = "hf_bench", "acme--bench", "main"
EXPERIMENT = """\
name: {name}
hypothesis: a rank of {rank} lowers the held-out loss below 1.2
base: {{model: Qwen/Qwen3-4B}}
data: {{dataset: acme/chats}}
train:
  method: qlora
  flavor: a10g-large
  timeout: 2h
  epochs: 3
  max_length: 2048
  learning_rate: 2e-4
  lora: {{r: {rank}, alpha: 32, targets: [q_proj, k_proj, v_proj, o_proj]}}
merge: {{flavor: cpu-upgrade, timeout: 1h}}
gguf: {{flavor: cpu-upgrade, timeout: 1h, quants: [Q4_K_M, Q8_0]}}
evaluate: {{flavor: cpu-upgrade, timeout: 1h}}
output: {{repo: acme/{name}}}
budget: {{max_usd: 20}}
"""
LIMIT_S, LIMIT_MB = 10, 200
LOG_S, READERS = 6, 32  # a live job's log stays open: the client waits for more, of so many logs at once


def git(*arguments: str, cwd: Path, stdin: bytes = b"") -> str:
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@example.invalid")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, check=True, capture_output=True, timeout=120).stdout.decode()


def make_repository(folder: Path, count: int) -> tuple[Path, list[str]]:
    """A clone with `count` experiments whose remote has closed the first nine tenths; the open run ids."""
    from pipeline.book import SINCE, since_message
    from pipeline.tree import read_tree

    remote, root = folder / "remote.git", folder / "clone"
    git("init", "--bare", "--quiet", f"--initial-branch={BRANCH}", str(remote), cwd=folder)
    git("config", "uploadpack.allowFilter", "true", cwd=remote)  # as GitHub has it
    git("clone", "--quiet", str(remote), str(root), cwd=folder)
    git("checkout", "--quiet", "-b", BRANCH, cwd=root)
    (root / "experiments").mkdir()
    (root / "pyproject.toml").write_text("[tool.mergetune]\n")
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for number in range(count):
        name = f"exp-{number:04}"
        (root / f"experiments/{name}.yaml").write_text(EXPERIMENT.format(name=name, rank=8 + number % 64))
    git("add", ".", cwd=root)
    git("commit", "--quiet", "-m", "experiments", cwd=root)
    git("push", "--quiet", "origin", BRANCH, cwd=root)
    commit = git("rev-parse", "HEAD", cwd=root).strip()
    runs = [run.run_id for run in read_tree(root, commit).wanted]
    now = datetime.now(UTC)
    tags = [(SINCE, since_message(now)), *((f"run/{run}", finish(run, now)) for run in runs[: count * 9 // 10])]
    stream = "".join(
        f"tag {name}\nfrom {commit}\ntagger bench <b@example.invalid> 1800000000 +0000\n"
        f"data {len(message.encode())}\n{message}\n"
        for name, message in tags
    )
    git("fast-import", "--quiet", cwd=remote, stdin=stream.encode())
    return root, runs[count * 9 // 10 :]


def finish(run_id: str, now: datetime) -> str:
    """The message of a finish tag with a summary of the usual size."""
    from pipeline.book import Closed, Verdict, finish_message

    metrics = {"train_loss": 1.234, "eval_loss": 1.345, "tokens_per_s": 1234.5, "rows": 1000}
    stages = {s: {"repo": f"acme/{run_id}", "revision": "a" * 40, "metrics": metrics} for s in ("train", "merge")}
    attempts = {"train": 1, "merge": 1, "gguf": 1, "evaluate": 1}
    summary = {"experiment": run_id[:8], "stages": stages}
    return finish_message(Closed(run_id, 1, Verdict.DONE, "4 of 4 stages are done", now, 3.21, attempts, summary))


def populate(hub: Any, runs: list[str], live: int) -> None:
    """Jobs and repositories of the open runs."""
    from huggingface_hub import HfApi

    hub.execute_jobs = False
    hub.add_user("alice", orgs={"acme": "admin"})
    hub.add_token(TOKEN, "alice")
    hub.add_repo("Qwen/Qwen3-4B", {"config.json": b"{}"})
    hub.add_repo("acme/chats", {"train.jsonl": b"{}"}, kind="dataset")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for number, run in enumerate(runs):
        if number >= live and number % 2:
            continue  # just merged
        name = run.rpartition("-")[0]
        labels = {"experiment": name, "run": run, "stage": "train", "attempt": "1", "repo": LABEL}
        job = api.run_job(image="x", command=["true"], labels=labels, namespace="acme", flavor="a10g-large")
        if number < live:
            hub.start_job(job.id)
            continue
        hub.finish_job(job.id, "COMPLETED")
        claim = {"attempt": 1, "at": time.time() - 9000, "by": "x", "posts": 1, "job_id": job.id}
        files = {
            "claim.json": claim,
            "winner.json": {"attempt": 1, "job_id": job.id},
            "run.json": {"inputs": {}},
            "manifest.json": {"run_id": run, "stage": "train", "attempt": 1},
        }
        content = {f".mergetune/{run}/train/{path}": json.dumps(value).encode() for path, value in files.items()}
        hub.add_repo(f"acme/{name}-adapter", content, private=True)


def one_tick(root: Path, url: str) -> None:
    """The child: one tick, as the command makes it."""
    from pipeline.backends.hf_jobs import HfJobs
    from pipeline.controller import tick
    from pipeline.hub import open_hub
    from pipeline.repository import Repository
    from pipeline.settings import load_settings
    from pipeline.tree import make_order, read_tree
    from pipeline.world import World

    class Clock:
        now = staticmethod(time.time)
        sleep = staticmethod(time.sleep)

    repository = Repository(root)
    remote = HfJobs(open_hub(url, TOKEN), TOKEN)
    tree = read_tree(root, repository.head_commit())

    def order(plan: Any, submit: Any, seen: Any, attempt: int) -> Any:
        return make_order(root, remote, LABEL, {}, plan, submit, seen)

    world = World(remote, repository, Clock(), load_settings(root), tree, LABEL, lambda plan: (), order)
    reports = tick(world)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"outcomes": Counter(report.outcome.value for report in reports), "peak_mb": peak_mb}))


@dataclass(frozen=True)
class Row:
    """What one tick cost."""

    live: int
    requests: int
    seconds: float
    peak_mb: float
    outcomes: dict[str, int]
    paths: Counter[str]


def measure(root: Path, runs: list[str], live: int) -> Row:
    """One tick with so many live runs."""
    from servers.hub import LoopbackHub

    with tempfile.TemporaryDirectory() as folder, LoopbackHub(Path(folder)) as hub:
        populate(hub, runs, live)
        before, began = len(hub.requests), time.monotonic()
        command = [sys.executable, __file__, "--tick", str(root), hub.url]
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        seconds = time.monotonic() - began
        if child.returncode:
            raise SystemExit(child.stderr[-4000:])
        said = json.loads(child.stdout.splitlines()[-1])
        made = hub.requests[before:]
        kinds = Counter(f"{request.method} {kind(request.path)}" for request in made)
        return Row(live, len(made), seconds, said["peak_mb"], said["outcomes"], kinds)


def kind(path: str) -> str:
    """What a request asks for, without names."""
    parts = path.partition("?")[0].strip("/").split("/")
    if "resolve" in parts or "raw" in parts:
        return "a file"
    return "/".join(parts[:2] + parts[4:5])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--kinds", action="store_true", help="also print what was asked for, and how often")
    parser.add_argument("--tick", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tick:
        one_tick(Path(given.tick[0]), given.tick[1])
        return 0
    met = True
    with tempfile.TemporaryDirectory() as folder:
        root, runs = make_repository(Path(folder), given.experiments)
        print("| experiments | open | live | requests | bound | seconds | peak MB | done |")
        print("|---|---|---|---|---|---|---|---|")
        for live in (len(runs), len(runs) // 2, len(runs) // 10):
            row = measure(root, runs, live)
            bound = (live + 5) * given.experiments // 100
            done = ", ".join(f"{count} {word}" for word, count in sorted(row.outcomes.items()))
            numbers = f"{row.requests} | {bound} | {row.seconds:.1f} | {row.peak_mb:.0f}"
            print(f"| {given.experiments} | {len(runs)} | {live} | {numbers} | {done} |", flush=True)
            if given.kinds:
                print(row.paths.most_common(20))
            patience_s = LIMIT_S + LOG_S * -(-live // READERS)  # the log of a live job stays open
            met &= row.requests <= bound and row.seconds < patience_s and row.peak_mb < LIMIT_MB
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
