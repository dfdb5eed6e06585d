"""Useful tokens per second, peak memory and longest context: the SOP's script, `trl sft` and ours. Prints tables.

    python benchmarks/train_throughput.py               # small models on a CPU, full-size ones on a GPU
    python benchmarks/train_throughput.py --context     # on a GPU also: the longest rows under 22 and 79 GiB, measured
    python benchmarks/train_throughput.py --axolotl ~/axolotl/bin/python  # Axolotl too, in an environment of its own

Every contender trains QLoRA (r=64 on attention) for one pass over the same conversations, whose lengths are spread as
coaching dialogues are, each in a process of its own, in turn. A token is useful when an assistant said it: what the
experiment wants to learn. On a GPU seconds are those inside of optimizer steps. On a CPU they are seconds of CPU, less
those of a run on a quarter of the rows: starting does not count, and other work on the machine hardly does. The SOP's
script stands in benchmarks/sop_script.py with what had to be repaired. Ours runs with what a plan settles where all
layers fit: no recomputing. benchmarks/longest_context.py says how the longest rows are found.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import longest_context

from pipeline.attention import FLASH
from pipeline.fit import LONGEST
from pipeline.models import ATTENTION, CATALOGUE

ROOT = Path(__file__).resolve().parents[1]
BASES = {
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma3_text": "google/gemma-3-12b-it",
    "qwen3": "Qwen/Qwen3-14B",
}
SMALL = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 5}
SMALL |= {"num_key_value_heads": 5, "head_dim": 64, "max_position_embeddings": 4096}
LORA = {"r": 64, "alpha": 128, "dropout": 0.05, "targets": list(ATTENTION), "exclude": None, "rslora": False}
LORA |= {"dora": False, "modules_to_save": [], "rank_pattern": {}, "alpha_pattern": {}}
HEAD = "| model | contender | useful tokens/s | against the SOP | seconds | peak, GiB |"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "sailors",
    "watch",
    "from",
    "harbour",
    "wall",
]


@dataclass(frozen=True)
class Scale:
    """How large everything is on a device. Lengths in tokens."""

    device: str
    vocab: int
    rows: int
    median: int  # of a conversation's length, which is spread log-normally
    max_length: int
    spread: float = 0.7  # of the logarithm


# A CPU computes about a ten-thousandth of what a GPU does: an eighth of the length, a thousandth of the model.
CPU = Scale("cpu", 8192, 48, 64, 512)
GPU = Scale("cuda", 0, 256, 512, 4096)


@dataclass(frozen=True)
class Work:
    """One model and its rows."""

    family: str
    base: Path
    data: Path
    scale: Scale


@dataclass(frozen=True)
class Result:
    """What a contender took; `why` instead where it could not run."""

    busy_s: float = 0.0  # inside of steps, by the wall's clock
    peak_gib: float = 0.0
    cpu_s: float = 0.0  # of the whole process
    useful: int = 0  # assistant tokens that it learned from
    why: str = ""


Contenders = dict[str, Callable[[Work, Path], Result]]


def main() -> None:
    """Time every contender on every model, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender runs; the median counts")
    parser.add_argument("--rows", type=int, help="conversations to train on")
    parser.add_argument("--without-trl", action="store_true", help="leave `trl sft` out")
    parser.add_argument("--axolotl", type=Path, metavar="PYTHON", help="of an environment that has Axolotl installed")
    parser.add_argument("--length", type=int, help="tokens of the median conversation")
    parser.add_argument("--context", action="store_true", help="on a GPU: measure the longest rows that fit")
    arguments = parser.parse_args()
    scale = GPU if has_gpu() else CPU
    scale = replace(scale, rows=arguments.rows or scale.rows, median=arguments.length or scale.median)
    print(f"{HEAD}\n|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as temporary:
        for family in arguments.models:
            folder = Path(temporary) / family
            work = Work(family, make_base(folder / "base", family, scale), make_rows(folder, scale), scale)
            print_rows(work, contend(work, folder, arguments.rounds, others(arguments)))
            if arguments.context and scale.device == "cuda":
                print(measured_context(work, folder))
            shutil.rmtree(folder)
    print("\n" + longest_context.predicted({family: CATALOGUE[BASES[family]] for family in arguments.models}))


def contend(work: Work, folder: Path, rounds: int, more: Contenders) -> dict[str, Result]:
    """Every contender, in turn, `rounds` times; of each the median by time."""
    runs: dict[str, list[Result]] = {}
    few = None
    if work.scale.device == "cpu":
        scale = replace(work.scale, rows=work.scale.rows // 4)
        few = replace(work, data=make_rows(folder / "few", scale), scale=scale)
    for number in range(rounds):
        for name, train in (ALWAYS | more).items():
            result = train(work, folder / f"{number}-{len(runs)}-{name[:4]}")
            if few and not result.why:
                result = less(result, train(few, folder / f"{number}-{len(runs)}-{name[:4]}-few"))
            runs.setdefault(name, []).append(result)
    return {name: sorted(results, key=lambda r: r.busy_s)[len(results) // 2] for name, results in runs.items()}


def others(arguments: argparse.Namespace) -> Contenders:
    """Who trains besides the SOP's script and ours, by name."""
    found: Contenders = {} if arguments.without_trl else {"`trl sft`": trl_sft}
    return found | ({"Axolotl": partial(axolotl, arguments.axolotl)} if arguments.axolotl else {})


def less(all_rows: Result, few_rows: Result) -> Result:
    """What the rows that the second run did not have took, in seconds of CPU."""
    cpu_s, useful = all_rows.cpu_s - few_rows.cpu_s, all_rows.useful - few_rows.useful
    return replace(all_rows, busy_s=cpu_s, useful=useful)


def measured_context(work: Work, folder: Path) -> str:
    """The longest rows of both scripts on this GPU, each found by trainings of two steps."""

    def peak(contender: str, length: int) -> float:
        place = Path(tempfile.mkdtemp(dir=folder))
        scale = replace(work.scale, rows=2, median=length, spread=0.0, max_length=length)
        probe = replace(work, data=make_rows(place, scale), scale=scale)
        if contender == "ours":
            return ours(probe, place / "run", packing=True, accumulation=1).peak_gib
        return sop(probe, place / "run", accumulation=1).peak_gib

    return longest_context.measured(work.family, ("the SOP's script", "ours"), peak)


def print_rows(work: Work, results: dict[str, Result]) -> None:
    """One row a contender. All have the same useful tokens: those that ours counted, row by row."""
    useful = results["ours, a row at a time"].useful
    before = useful / results["the SOP's script"].busy_s
    for name, result in results.items():
        if result.why:
            print(f"| {work.family} | {name} | {result.why} | | | |", flush=True)
            continue
        speed, peak = useful / result.busy_s, f"{result.peak_gib:.2f}" if result.peak_gib else "not told"
        numbers = f"{speed:,.0f} | {speed / before:.2f} | {result.busy_s:.1f} | {peak}"
        print(f"| {work.family} | {name} | {numbers} |", flush=True)


# Contenders


def sop(work: Work, folder: Path, accumulation: int = 8) -> Result:
    """benchmarks/sop_script.py."""
    folder.mkdir(parents=True)
    command = [ROOT / "benchmarks/sop_script.py", work.base, work.data, folder / "out", work.scale.max_length]
    command += ["--accumulation", accumulation, *(["--cpu"] if work.scale.device == "cpu" else [])]
    text, peak, cpu_s = finished([sys.executable, *command], folder)
    said = json.loads(text.strip().splitlines()[-1])
    return Result(said["busy_s"], said["peak_gib"] or peak, cpu_s)


def ours(work: Work, folder: Path, packing: bool, accumulation: int | None = None) -> Result:
    """scripts/train_sft.py, by its front door."""
    folder.mkdir(parents=True)
    # Eight rows of the SOP hold about as many tokens as two full packs.
    run = write_run(work, folder, packing, accumulation or (2 if packing else 8))
    *_, cpu_s = finished([sys.executable, ROOT / "scripts/train_sft.py", run], folder)
    manifest = json.loads((folder / "out/manifest.json").read_text(encoding="utf-8"))
    metrics = manifest["metrics"]
    busy_s = metrics["tokens_seen"] / metrics["tokens_per_s"]
    return Result(busy_s, manifest["measured"]["peak_memory_gib"], cpu_s, metrics["tokens_trained"])


def trl_sft(work: Work, folder: Path) -> Result:
    """The command line of TRL, with the SOP's choices in its YAML. It tells seconds of training, saving left out."""
    folder.mkdir(parents=True)
    config = {"model_name_or_path": str(work.base), "dataset_name": str(work.data.parent), "output_dir": str(folder)}
    config |= {"use_peft": True, "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
    config |= {"lora_target_modules": ATTENTION}
    config |= {"load_in_4bit": True, "use_bnb_nested_quant": True, "bnb_4bit_quant_type": "nf4", "dtype": "bfloat16"}
    config |= {"max_length": work.scale.max_length, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    config |= {"gradient_accumulation_steps": 8, "optim": "adamw_8bit", "save_strategy": "no", "report_to": "none"}
    config |= {"use_cpu": work.scale.device == "cpu", "disable_tqdm": True, "packing": work.scale.device == "cuda"}
    (folder / "trl.yaml").write_text(json.dumps(config, default=list), encoding="utf-8")
    text, peak, cpu_s = finished(
        [Path(sys.executable).with_name("trl"), "sft", "--config", folder / "trl.yaml"], folder
    )
    return told(text, peak if work.scale.device == "cpu" else 0.0, cpu_s)


def axolotl(python: Path, work: Work, folder: Path) -> Result:
    """Axolotl with the SOP's choices. It pins other libraries than ours, so `python` is of its own environment."""
    folder.mkdir(parents=True)
    on_gpu = work.scale.device == "cuda"
    config: dict[str, Any] = {"base_model": str(work.base), "load_in_4bit": True, "adapter": "qlora"}
    config |= {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05, "lora_target_modules": list(ATTENTION)}
    config |= {"datasets": [{"path": str(work.data), "ds_type": "json", "type": "chat_template"}]}
    config |= {"dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out")}
    config |= {"sequence_len": work.scale.max_length, "micro_batch_size": 1, "gradient_accumulation_steps": 8}
    config |= {"num_epochs": 1, "optimizer": "adamw_8bit", "learning_rate": 2e-4, "save_strategy": "no"}
    config |= {"bf16": on_gpu, "sample_packing": on_gpu, "use_cpu": not on_gpu}
    if not on_gpu:  # its own kernels ask CUDA for a stream
        config |= dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), False)
    (folder / "axolotl.yaml").write_text(json.dumps(config), encoding="utf-8")
    text, peak, cpu_s = finished([python, "-m", "axolotl.cli.train", folder / "axolotl.yaml"], folder)
    return told(text, 0.0 if on_gpu else peak, cpu_s)


def told(text: str, peak_gib: float, cpu_s: float) -> Result:
    """What the summary of transformers' Trainer says of its time."""
    found = re.findall(r"'train_runtime': '?([0-9.]+)", text)
    return Result(float(found[-1]), peak_gib, cpu_s) if found else Result(why="told no time")


def finished(command: list[Any], folder: Path) -> tuple[str, float, float]:
    """Standard output, peak resident GiB and CPU seconds of a process that must succeed, with its children."""
    # One thread: threads that wait for each other would measure the machine's other load.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["AXOLOTL_DO_NOT_TRACK"] = "1"
    with (folder / "log").open("w") as log, (folder / "errors").open("w") as errors:
        child = subprocess.Popen([str(part) for part in command], stdout=log, stderr=errors, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit((folder / "log").read_text()[-1500:] + (folder / "errors").read_text()[-3000:])
    return (folder / "log").read_text(), usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime


def write_run(work: Work, folder: Path, packing: bool, accumulation: int) -> Path:
    """The run.json of our contender: what `mergetune plan` would settle where all layers fit."""
    train: dict[str, Any] = {"method": "qlora", "flavor": "h200", "timeout": 3600, "epochs": 1.0, "max_steps": None}
    train |= {"max_length": work.scale.max_length, "batch_size": 1, "gradient_accumulation": accumulation}
    train |= {"learning_rate": 2e-4, "save_steps": 1000, "loss_on": "assistant", "packing": packing, "seed": 42}
    train |= {"lora": LORA, "sft": {}, "tracking": "none", "script": None}
    data = {"dataset": "a/d", "revision": None, "subset": None, "split": "train", "eval": None}
    experiment = {"name": "throughput", "hypothesis": "It is fast.", "base": {"model": "a/b", "revision": "c"}}
    experiment |= {"data": data, "train": train, "merge": None, "gguf": None, "evaluate": None}
    run = {"schema": 1, "run_id": "throughput-00000000", "fingerprint": "0" * 64, "stage": "train", "attempt": 1}
    run |= {"experiment": experiment, "inputs": {"base": {"path": str(work.base)}, "data": {"path": str(work.data)}}}
    run |= {"output": {"path": str(folder / "out")}, "work": str(folder / "work"), "device": work.scale.device}
    run |= {"predicted": {}, "checkpointing": False, "attention": FLASH if packing else ""}
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


# Models and rows


def has_gpu() -> bool:
    """Asked in a process of its own: torch stays out of this one, which must not hold memory of the GPU."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def sizes_of(family: str, scale: Scale) -> dict[str, Any]:
    """The fields of a config.json: of the real base on a GPU, of a small model of its family on a CPU."""
    if scale.device == "cpu":
        return {**SMALL, "vocab_size": scale.vocab}
    shape = CATALOGUE[BASES[family]]
    head = shape.query // shape.head_count
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    sizes |= {"num_attention_heads": shape.head_count, "num_key_value_heads": shape.key_value // head, "head_dim": head}
    return {**sizes, "vocab_size": shape.vocab, "max_position_embeddings": LONGEST}


def make_base(folder: Path, family: str, scale: Scale) -> Path:
    """A random base of the family, made in a process of its own, on the device that will train it."""
    code = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, transformers
from tiny_models import CLASSES, config_of, save_tokenizer
folder, family, sizes = Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
config = config_of(family, **sizes)
torch.set_default_dtype(torch.bfloat16)
with torch.device(sys.argv[5]):
    model = getattr(transformers, CLASSES[family])(config)
model.save_pretrained(folder, max_shard_size="4GB")
save_tokenizer(folder, family)
"""
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(folder), family]
    command += [json.dumps(sizes_of(family, scale)), scale.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return folder


def make_rows(folder: Path, scale: Scale) -> Path:
    """Conversations of two to eight turns, an assistant's three times as long; about a word is a token."""
    chosen, rows = random.Random(0), []
    for _ in range(scale.rows):
        length = round(scale.median * chosen.lognormvariate(0, scale.spread))
        turns = chosen.randint(1, 4) if scale.spread else 1
        share = max(1, length // (4 * turns))
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": " ".join(chosen.choices(WORDS, k=share))})
            messages.append({"role": "assistant", "content": " ".join(chosen.choices(WORDS, k=3 * share))})
        rows.append(json.dumps({"messages": messages}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    path = folder / "data/train.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


ALWAYS: Contenders = {
    "the SOP's script": sop,
    "ours, a row at a time": partial(ours, packing=False),
    "ours, packed": partial(ours, packing=True),
}

if __name__ == "__main__":
    main()
