"""What scripts/train_sft.py costs over a bare TRL script that does the same training. Prints a Markdown table.

    python benchmarks/train_overhead.py [--rounds 3] [--rows 640]

Both train the same tiny Llama (QLoRA, NF4, 8-bit Adam) on the same rows on the CPU, with the same log and checkpoint
intervals, each in a child process: bare, ours, bare, ours, … so that a change of the machine's load hits both. Wall
time is what one waits; CPU time is steadier on a busy machine. Ours also checks its input, marks checkpoints, verifies
the adapter and writes the manifest. Target: a ratio of at most 1.05.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETTINGS = {"max_length": 512, "batch_size": 1, "gradient_accumulation": 4, "learning_rate": 2e-4, "save_steps": 40}
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear", "exclude": None, "rslora": False, "dora": False}
LORA |= {"modules_to_save": [], "rank_pattern": {}, "alpha_pattern": {}}


def main() -> None:
    """Make the base and the rows, time both scripts in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each of the two runs")
    parser.add_argument("--rows", type=int, default=640, help="rows to train on, four to a step")
    parser.add_argument("--bare", nargs=3, metavar=("BASE", "DATA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return bare(*arguments.bare)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, data = make_base(folder / "base"), make_rows(folder / "data.jsonl", arguments.rows)
        times: dict[str, list[tuple[float, ...]]] = {"bare": [], "ours": []}
        for number in range(arguments.rounds):
            out = folder / f"bare{number}"
            times["bare"].append(timed([sys.executable, __file__, "--bare", base, data, out], folder))
            run = write_run(folder / f"ours{number}", base, data)
            times["ours"].append(timed([sys.executable, ROOT / "scripts" / "train_sft.py", run], folder))
            spent = "; ".join(f"{name} {[round(x, 1) for x in runs[-1]]}" for name, runs in times.items())
            print(f"round {number + 1}: {spent}", file=sys.stderr)
        print(table(times, steps=-(-arguments.rows // SETTINGS["gradient_accumulation"])))
    return None


def bare(base: str, data: str, out: str) -> None:
    """The shortest TRL script for the same training."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=out,
            model_init_kwargs={"dtype": "bfloat16"},
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=SETTINGS["batch_size"],
            gradient_accumulation_steps=SETTINGS["gradient_accumulation"],
            learning_rate=SETTINGS["learning_rate"],
            max_length=SETTINGS["max_length"],
            assistant_only_loss=True,
            optim="adamw_8bit",
            logging_steps=1,
            save_steps=SETTINGS["save_steps"],
            save_total_limit=2,
            disable_tqdm=True,
            report_to="none",
            seed=42,
        ),
        train_dataset=load_dataset("json", data_files=data, split="train", cache_dir=out),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear"
        ),
    )
    trainer.train()
    trainer.save_model(out)


def make_base(folder: Path) -> Path:
    """A Llama of 128 x 2, made in a process of its own: torch stays out of this one."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tiny_models import make_tiny; "
    code += "make_tiny(Path(sys.argv[2]), 'llama', hidden_size=128, intermediate_size=256)"
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def make_rows(path: Path, count: int) -> Path:
    """Conversations of 5 to 40 words a turn."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "sailors", "watch", "harbour"]
    chosen = random.Random(0)

    def text() -> str:
        return " ".join(chosen.choices(words, k=chosen.randint(5, 40)))

    rows = [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(folder: Path, base: Path, data: Path) -> Path:
    """The run.json of the same training."""
    folder.mkdir()
    train: dict[str, Any] = {
        "method": "qlora",
        "flavor": "cpu-basic",
        "timeout": 3600,
        "epochs": 1.0,
        "max_steps": None,
    }
    train |= SETTINGS | {"loss_on": "assistant", "packing": False, "seed": 42, "lora": LORA, "sft": {}}
    train |= {"tracking": "none", "script": None}
    no_eval = {"fraction": None, "split": None, "dataset": None}
    experiment: dict[str, Any] = {
        "name": "overhead",
        "hypothesis": "It costs little.",
        "base": {"model": "a/b", "revision": "c"},
    }
    experiment["data"] = {"dataset": "a/d", "revision": None, "subset": None, "split": "train", "eval": no_eval}
    experiment |= {"train": train, "merge": None, "gguf": None, "evaluate": None}
    run = {"schema": 1, "run_id": "overhead-00000000", "fingerprint": "0" * 64, "stage": "train", "attempt": 1}
    run |= {"experiment": experiment, "inputs": {"base": {"path": str(base)}, "data": {"path": str(data)}}}
    run |= {"output": {"path": str(folder / "out")}, "work": str(folder / "work"), "device": "cpu", "predicted": {}}
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def timed(command: list[Any], folder: Path) -> tuple[float, ...]:
    """Wall seconds, CPU seconds and peak resident MB of a child process that must succeed."""
    started = time.monotonic()
    # As `mergetune run` does: OpenMP threads that spin would measure the machine's other load, not the two scripts.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "log").open("w") as log:
        child = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit((folder / "log").read_text()[-3000:])
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def table(times: dict[str, list[tuple[float, ...]]], steps: int) -> str:
    """Medians and fastest runs, with their ratios."""
    rows = [f"| {steps} steps, {len(times['bare'])} runs each | bare TRL | train_sft.py | ratio |", "|---|---|---|---|"]
    lines = (("wall s", 0), ("CPU s", 1), ("peak resident MB", 2))
    for (name, place), (what, pick) in product(lines, (("median", statistics.median), ("least", min))):
        before, ours = (pick([run[place] for run in times[which]]) for which in ("bare", "ours"))
        rows.append(f"| {name}, {what} | {before:.1f} | {ours:.1f} | {ours / before:.3f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
