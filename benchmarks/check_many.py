"""How long `mergetune check` takes for many experiments in one call, beside one.

    python benchmarks/check_many.py --count 1000

Writes the experiments into a temporary repository: of the Hub, with one data file for all, and each with a small data
file of its own. Prints wall and CPU seconds and the peak memory of the whole process, and the ratio to one file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "experiments/examples/tiny-docs-llama"
EXPERIMENT = """\
name: {name}
hypothesis: a rank of {rank} and a learning rate of {rate:.2e} lower the held-out loss below 1.2
base: {base}
data: {data}
train:
  method: qlora
  flavor: a10g-large
  timeout: 2h
  epochs: 3
  max_length: 2048
  learning_rate: {rate:.6e}
  lora: {{r: {rank}, alpha: {alpha}, targets: [q_proj, k_proj, v_proj, o_proj]}}
merge: {{flavor: cpu-upgrade, timeout: 1h}}
gguf: {{flavor: cpu-upgrade, timeout: 1h, quants: [Q4_K_M, Q8_0]}}
output: {{repo: acme/{name}}}
budget: {{max_usd: 10}}
"""
HUB_BASE = "{model: Qwen/Qwen3-4B, revision: 1cfa9a7208912126459214e8b04321603b3df60c}"
HUB_DATA = "{dataset: acme/chats, revision: 5d2f0c1e7c3b4a5968778695a4b3c2d1e0f9a8b7}"
ROWS = 20  # of a small data file; the shared one has fifty times as many


@dataclass(frozen=True)
class Variant:
    """A kind of repository: what the base and the data of experiment number `n` are, and the rows to write there."""

    words: str
    base: str
    data: Callable[[int], str]
    rows: Callable[[int], tuple[str, int] | None]


VARIANTS = (
    Variant("base and data on the Hub", HUB_BASE, lambda n: HUB_DATA, lambda n: None),
    Variant(
        "one data file for all",
        HUB_BASE,
        lambda n: "{dataset: data/all.jsonl}",
        lambda n: ("data/all.jsonl", 50 * ROWS),
    ),
    Variant(
        "a data file each",
        HUB_BASE,
        lambda n: f"{{dataset: data/{n}.jsonl, eval: {{fraction: 0.1}}}}",
        lambda n: (f"data/{n}.jsonl", ROWS),
    ),
    Variant(
        "a data file each, base here",
        "{model: ./base}",
        lambda n: f"{{dataset: data/{n}.jsonl, eval: {{fraction: 0.1}}}}",
        lambda n: (f"data/{n}.jsonl", ROWS),
    ),
)


@dataclass(frozen=True)
class Measured:
    """One call: seconds, megabytes, and what it printed last."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    said: str


def write_repository(root: Path, variant: Variant, count: int) -> None:
    """`count` experiments that differ in rank and learning rate."""
    for folder in ("experiments", "data", "base"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n', encoding="utf-8")
    for path in BASE.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, root / "base")
    for n in range(count):
        rank = 2 ** (3 + n % 4)
        text = EXPERIMENT.format(
            name=f"run-{n}",
            base=variant.base,
            data=variant.data(n),
            rank=rank,
            alpha=2 * rank,
            rate=1e-4 * (1 + n / count),
        )
        (root / f"experiments/run-{n}.yaml").write_text(text, encoding="utf-8")
        wanted = variant.rows(n)
        if wanted and not (root / wanted[0]).exists():
            (root / wanted[0]).write_text("".join(_row(n, i) for i in range(wanted[1])), encoding="utf-8")


def _row(n: int, i: int) -> str:
    asked = {"role": "user", "content": f"What does the pilot say about berth {n} on day {i}?"}
    told = {"role": "assistant", "content": f"That berth {n} is dry at low water, and that day {i} will be no better."}
    return json.dumps({"messages": [asked, told]}) + "\n"


def measure(root: Path, *paths: str) -> Measured:
    """One `mergetune check` in a process of its own."""
    command = [sys.executable, "-m", "pipeline", "check", *paths]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (root / "said").open("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=said, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        said.seek(0)
        last = said.read().strip()
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"error: {command} failed with status {status}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, last)


def main() -> None:
    """Run every variant in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="experiments of one call (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each kind, interleaved (default: 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(number) for number in range(len(VARIANTS))]
        for root, variant in zip(roots, VARIANTS, strict=True):
            write_repository(root, variant, arguments.count)
        seen: list[list[tuple[Measured, Measured]]] = [[] for _ in VARIANTS]
        for _ in range(arguments.rounds):
            for runs, root in zip(seen, roots, strict=True):
                runs.append((measure(root, "experiments/run-0.yaml"), measure(root, "experiments")))
    print(
        f"| {arguments.count:,} experiments | wall s | CPU s | peak MB | ms CPU each | one file, CPU s | ratio | said |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for runs, variant in zip(seen, VARIANTS, strict=True):
        one = statistics.median(run.cpu_s for run, _ in runs)
        wall, cpu = (statistics.median(getattr(run, name) for _, run in runs) for name in ("wall_s", "cpu_s"))
        peak, each = max(run.peak_mb for _, run in runs), 1000 * (cpu - one) / max(arguments.count - 1, 1)
        print(
            f"| {variant.words} | {wall:.2f} | {cpu:.2f} | {peak:.0f} | {each:.2f} | {one:.2f} | {cpu / one:.1f} |",
            end="",
        )
        print(f" {runs[0][1].said} |")


if __name__ == "__main__":
    main()
