"""Where a rehearsal's time goes: each step beside the bare imports that it cannot do without. Prints a Markdown table.

    python benchmarks/rehearse.py [EXPERIMENT]

One rehearsal of the quickstart (or of any experiment, with the imports of a Llama), and for every step the same
libraries imported in as many fresh interpreters as the step starts, once before it and once after; the faster time
counts. Wall time is what one waits; CPU time is steadier on a busy machine. llama.cpp is built first if it was not:
that is paid once on a machine. Target: under 90 s on 2 cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "experiments/examples/quickstart.yaml"
TARGET_S = 90
LLAMA = "from transformers.models.llama import modeling_llama"


@dataclass(frozen=True, order=True)
class Cost:
    """Seconds of a clock, and of the processors."""

    wall: float
    cpu: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall - other.wall, self.cpu - other.cpu)


def spent() -> Cost:
    """The clock, and what all ended child processes have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(time.monotonic(), children.ru_utime + children.ru_stime)


@dataclass
class Meter:
    """A display of progress that shows nothing and notes when each step began."""

    began: dict[str, Cost] = field(default_factory=dict)

    def show(self, progress: Any, *, important: bool = False) -> None:
        """Note a step that is new."""
        if progress.current is not None:
            self.began.setdefault(progress.current.value, spent())

    def say(self, message: str) -> None:
        """The twin is no stage: it is only spoken of."""
        if message.startswith("twin:"):
            self.began.setdefault("twin", spent())

    def close(self) -> None:
        """Note the end."""
        self.began["end"] = spent()

    def steps(self) -> dict[str, Cost]:
        """What each step cost, up to the beginning of the next."""
        names, marks = list(self.began), list(self.began.values())
        return {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}


def main() -> None:
    """Floors, rehearsal, floors; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, nargs="?", default=ROOT / EXAMPLE)
    path = parser.parse_args().experiment.resolve()
    sys.path.insert(0, str(ROOT))
    # As the local backend sets it for the job scripts: a thread that waits must not spin.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from pipeline.loader import load_experiment
    from pipeline.rehearse import rehearse
    from pipeline.workspace import read_facts

    file, meter = load_experiment(path, path.name), Meter()
    gguf = file.experiment.gguf
    imports = imports_of(llama_cpp(), len(gguf.quants) if gguf else 0)
    load = os.getloadavg()[0]
    before = {step: cost_of(programs) for step, programs in imports.items()}
    start = spent()
    result = rehearse(file, read_facts(file.experiment, ROOT), ROOT, meter)
    whole = spent() - start
    if result.failure:
        sys.exit(result.failure.as_text())
    floor = {step: min(cost, cost_of(imports[step])) for step, cost in before.items()}
    print(table(meter.steps(), floor, whole))
    print(f"\n{os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after; target {TARGET_S} s")


def llama_cpp() -> Path:
    """The folder of the pinned llama.cpp, built now if it was not there."""
    command = [sys.executable, str(ROOT / "scripts/convert_gguf.py"), "prepare"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return Path(json.loads(lines[-1].partition(" ")[2])["folder"])


def imports_of(tools: Path, quants: int) -> dict[str, list[str]]:
    """What each step imports, a program for every interpreter that it starts."""
    paths = f"import sys; sys.path[:0] = [{str(tools)!r}, {str(tools / 'gguf-py')!r}, {str(tools / 'bindings')!r}]; "
    convert = f"{paths} import torch, gguf, conversion.llama; from conversion.base import TextModel"
    inspect = f"{paths} import gguf"
    probe = f"{paths} import numpy"
    return {
        "twin": [f"import torch, transformers, sentencepiece, tokenizers; {LLAMA}"],
        "train": [
            "import torch, datasets, peft, bitsandbytes; from trl import SFTConfig, SFTTrainer; "
            f"from transformers import AutoTokenizer; {LLAMA}"
        ],
        "merge": ["import torch, safetensors"],
        # The converter, and for each file one look at its header and one load of it.
        "gguf": ["from transformers import AutoTokenizer", convert, inspect, probe, *[paths, probe] * quants],
        "evaluate": [
            "import torch; from trl.trainer.utils import add_fused_lm_head; "
            f"from transformers import AutoTokenizer, GenerationConfig; {LLAMA}"
        ],
    }


def cost_of(programs: list[str]) -> Cost:
    """The programs, one after the other."""
    before = spent()
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return spent() - before


def table(steps: dict[str, Cost], floor: dict[str, Cost], whole: Cost) -> str:
    """A row per step, the rest (reading, hashing, starting), and the sum."""
    lines = ["| step | wall s | imports alone | ratio | CPU s | imports alone | ratio |", "|---" * 7 + "|"]

    def row(name: str, took: Cost, least: Cost) -> str:
        wall = f"{took.wall:.1f} | {least.wall:.1f} | {took.wall / least.wall:.2f}"
        return f"| {name} | {wall} | {took.cpu:.1f} | {least.cpu:.1f} | {took.cpu / least.cpu:.2f} |"

    lines += [row(name, took, floor[name]) for name, took in steps.items()]
    least = Cost(sum(floor[name].wall for name in steps), sum(floor[name].cpu for name in steps))
    around = whole.wall - sum(took.wall for took in steps.values())
    lines.append(f"| around them | {around:.1f} | | | | | |")
    return "\n".join([*lines, row("whole chain", whole, least)])


if __name__ == "__main__":
    main()
