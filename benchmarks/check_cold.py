"""How long a cold `mergetune check` takes, beside what its two libraries take alone.

    python benchmarks/check_cold.py --rounds 15

Prints CPU seconds (user + system, whole process) and ratios of medians from one interleaved run. `import pydantic` is
lazy and loads next to nothing; the second row loads what any model needs, which is the floor of a pydantic program.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONE_MODEL = "import pydantic, yaml\nclass Model(pydantic.BaseModel):\n    x: int\nModel(x=1)"
COMMANDS = {
    "`python -c 'import pydantic, yaml'`": [sys.executable, "-c", "import pydantic, yaml"],
    "the same, and one model used": [sys.executable, "-c", ONE_MODEL],
    "`mergetune check` of one experiment": [
        *(sys.executable, "-m", "pipeline", "check"),
        "experiments/examples/chat-qlora.yaml",
    ],
}


def measure(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of one run."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {command} failed with status {status}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def main() -> None:
    """Run the commands in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="runs of each command (default: 15)")
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():
        measure(command)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            seen[name].append(measure(command))
    cpu = {name: statistics.median(run[0] for run in runs) for name, runs in seen.items()}
    wall = {name: statistics.median(run[1] for run in runs) for name, runs in seen.items()}
    bare, model, _ = cpu.values()
    print("| command | CPU s | wall s | ratio to bare | ratio to one model |\n|---|--:|--:|--:|--:|")
    for name in COMMANDS:
        print(f"| {name} | {cpu[name]:.3f} | {wall[name]:.3f} | {cpu[name] / bare:.2f} | {cpu[name] / model:.2f} |")


if __name__ == "__main__":
    main()
