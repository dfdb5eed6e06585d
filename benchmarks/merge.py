"""Streaming merge against PEFT's `merge_and_unload`: seconds, CPU seconds and peak memory, from one run.

    python benchmarks/merge.py --params 600e6 --pairs 3

Builds a random bf16 Llama-shaped model in several files and a rank-64 adapter on all its linear layers in a temporary
folder (about 3.5 times the model's size, in $TMPDIR), merges it with scripts/merge_adapter.py and with PEFT, each time
in a process of its own and in turns, compares every tensor, and prints one Markdown table. Needs torch, transformers
and peft. Exit code 1: the two results differ.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "scripts" / "merge_adapter.py"
TARGETS = {"wall": 0.6, "peak": 0.25}  # ours at most this many times PEFT's
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, RANK, SHARDS = 1536, 4096, 12, 4, 32000, 64, 4
KV = HIDDEN // HEADS * KV_HEADS
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# The parent imports no torch: a child's peak memory, as the kernel counts it, is never below its parent's.
MERGE_WITH_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


@dataclass(frozen=True)
class Cost:
    """What one process took: wall and CPU seconds, peak resident memory in MB."""

    wall: float
    cpu: float
    peak: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=600e6, help="about how many parameters (default 600e6)")
    parser.add_argument("--pairs", type=int, default=3, help="how often each side runs (default 3)")
    parser.add_argument("--step", choices=["build", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "build":
        build(arguments.folder, arguments.params)
        return 0
    if arguments.step == "compare":
        return compare(arguments.folder)
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as name:
        return benchmark(Path(name), arguments.params, arguments.pairs)


def benchmark(folder: Path, params: float, pairs: int) -> int:
    this_file = str(Path(__file__).resolve())
    measure([this_file, "--step", "build", "--folder", str(folder), "--params", str(params)])
    (folder / "run.json").write_text(json.dumps(make_run(folder)))
    paths = [str(folder / name) for name in ("base", "adapter", "peft")]
    commands = {"ours": [str(SCRIPT), str(folder / "run.json")], "peft": ["-c", MERGE_WITH_PEFT, *paths]}
    costs: dict[str, list[Cost]] = {"ours": [], "peft": []}
    for pair in range(pairs):
        for side in sorted(commands, reverse=pair % 2 == 1):
            shutil.rmtree(folder / side, ignore_errors=True)
            os.sync()  # what the run before left to write is not this run's cost
            costs[side].append(measure(commands[side]))
            print(f"pair {pair + 1}, {side}: {costs[side][-1]}", file=sys.stderr, flush=True)
    compared = subprocess.run(
        [sys.executable, this_file, "--step", "compare", "--folder", str(folder)], capture_output=True, text=True
    )
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    print(table(costs, size, compared.stdout.strip() or compared.stderr.strip()[-300:]))
    return compared.returncode


def measure(arguments: list[str]) -> Cost:
    """Run Python with `arguments` and wait for it. Raises RuntimeError with its last words when it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(log.read().decode()[-2000:])
    kib = used.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return Cost(wall, used.ru_utime + used.ru_stime, kib * 1024 / 1e6)


def make_run(folder: Path) -> dict[str, Any]:
    experiment = {
        "name": "benchmark",
        "hypothesis": "The streaming merge is faster and smaller.",
        "base": {"model": str(folder / "base"), "revision": None},
        "data": {"dataset": "none.jsonl", "revision": None},
        "train": {"method": "lora"},
    }
    return {
        "schema": 1,
        "run_id": "benchmark-00000000",
        "fingerprint": "0" * 64,
        "stage": "merge",
        "attempt": 1,
        "experiment": experiment,
        "inputs": {name: {"path": str(folder / name)} for name in ("base", "adapter")},
        "output": {"path": str(folder / "ours")},
        "work": str(folder / "work"),
        "device": "cpu",
        "predicted": {},
    }


def build(folder: Path, params: float) -> None:
    """Write `base` and `adapter` below `folder`, one weight file in memory at a time."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    per_layer = sum(rows * columns for rows, columns in LINEAR.values())
    layers = max(SHARDS, round((params - 2 * VOCAB * HIDDEN) / per_layer))
    shapes = list(base_shapes(layers))
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    placed: dict[str, str] = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = shapes[number * len(shapes) // SHARDS : (number + 1) * len(shapes) // SHARDS]
        tensors = {tensor: (torch.randn(shape) * 0.02).bfloat16() for tensor, shape in part}
        save_file(tensors, folder / "base" / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "base" / "config.json").write_text(json.dumps(model_config(layers)))
    lora = {}
    for layer in range(layers):
        for module, (rows, columns) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            lora[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            lora[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(lora, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 128, "bias": "none"}
    settings |= {"target_modules": [module.split(".")[1] for module in LINEAR]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def base_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        for module, shape in LINEAR.items():
            yield f"model.layers.{layer}.{module}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def model_config(layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"} | sizes | heads


def compare(folder: Path) -> int:
    """Print how many tensors of the two results are the same; 1 when not all of them."""
    import torch
    from safetensors import safe_open

    ours: dict[str, Path] = {}
    theirs: dict[str, Path] = {}
    for side, found in (("ours", ours), ("peft", theirs)):
        for path in sorted((folder / side).glob("*.safetensors")):
            with safe_open(path, framework="pt") as reader:
                found |= dict.fromkeys(reader.keys(), path)
    same = 0
    for name in set(ours) & set(theirs):
        with safe_open(ours[name], framework="pt") as one, safe_open(theirs[name], framework="pt") as other:
            a, b = one.get_tensor(name), other.get_tensor(name)
            same += a.dtype == b.dtype and torch.equal(a, b)
    total = len(set(ours) | set(theirs))
    print(f"{same} of {total} tensors bit-identical")
    return int(same != total)


def table(costs: dict[str, list[Cost]], size: int, verdict: str) -> str:
    """One Markdown table: medians, the range of the single runs, and the ratios against the targets."""
    lines = [
        f"Model {size / 1e9:.2f} GB in {SHARDS} files, rank {RANK} on all linear layers, {len(costs['ours'])} pairs"
    ]
    lines[0] += f", {os.cpu_count()} cores. {verdict}."
    lines += ["", "| | wall, s | CPU, s | peak RSS, MB |", "|---|---|---|---|"]
    middle = {side: [statistics.median(values) for values in columns(costs[side])] for side in costs}
    for side, label in (("ours", "merge_adapter.py (checksums included)"), ("peft", "PEFT merge_and_unload + save")):
        ranges = [(min(values), max(values)) for values in columns(costs[side])]
        cells = [f"{m:.1f} ({low:.1f} to {high:.1f})" for m, (low, high) in zip(middle[side], ranges, strict=True)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    ratios = [ours / theirs for ours, theirs in zip(middle["ours"], middle["peft"], strict=True)]
    lines.append(f"| **ratio of medians** | {' | '.join(f'**{ratio:.2f}**' for ratio in ratios)} |")
    goals = [TARGETS["wall"], None, TARGETS["peak"]]
    verdicts = [
        "" if goal is None else f"≤ {goal}: {'met' if ratio <= goal else 'missed'}"
        for ratio, goal in zip(ratios, goals, strict=True)
    ]
    return "\n".join([*lines, f"| target | {' | '.join(verdicts)} |"])


def columns(costs: list[Cost]) -> list[list[float]]:
    return [[cost.wall for cost in costs], [cost.cpu for cost in costs], [cost.peak for cost in costs]]


if __name__ == "__main__":
    raise SystemExit(main())
