"""The memory estimate against published measurements: errors by source, and whether the verdicts hold.

    python benchmarks/memory.py
    python benchmarks/memory.py --csv MEASUREMENTS.csv --rows

Each row of the CSV is one measured training. A row is compared with the kind of peak its source reports: allocated,
reserved (plus the default allocator's fragmentation) or nvidia-smi (plus the CUDA context). `GB` is 1e9 bytes, `MB` is
2**20 bytes as nvidia-smi means it. Rows that leave open what decides memory are listed as skipped, with the reason.
The peer is the loading size that `accelerate estimate-memory` prints for the row's weight type. Loads no model.
"""

import argparse
import csv
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.experiment import Method
from pipeline.flavors import A10G, A100, H200, L4, L40S, T4
from pipeline.memory import CUDA_CONTEXT_GIB, GIB, Loss, MemoryEstimate, MemorySpec, estimate_need
from pipeline.models import CATALOGUE, ModelShape

ROWS = Path(__file__).with_name("memory_rows.csv")
UNITS = {"bytes": 1.0, "MiB": 2.0**20, "MB": 2.0**20, "GB": 1e9, "GiB": 2.0**30}
CAPACITY = {"T4": T4, "A10G": A10G, "L4": L4, "L40S": L40S, "A100-40GB": 39.4, "A100-80GB": A100, "H100": 79.1}
CAPACITY |= {"H200": H200, "A100": A100, "H100-80GB": 79.1, "2x3090": 23.6, "3090": 23.6}
SHORT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "c_attn": "qkv_proj"}
SHORT |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# Sources whose stack is not one this estimate models: own model code, sharded weights, own kernels. Scored apart.
OTHER_CODE = ("litgpt", "remote modeling", "torchtune", "Unsloth", "autogptq", "DeepSpeed")
FROM_CATALOGUE = {
    "llama-3-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
}
# From the config.json of each; remote-code Qwen has half its `intermediate_size` per MLP matrix.
SHAPES = {
    "mistral-7b": ModelShape("mistral", 32, 4096, 14336, 4096, 1024, 32000, False, heads=32),
    "mixtral-8x7b": ModelShape("mixtral", 32, 4096, 14336, 4096, 1024, 32000, False, 8, heads=32, experts_per_token=2),
    "mistral-small-24b": ModelShape("mistral", 40, 5120, 32768, 4096, 1024, 131072, False, heads=32),
    "llama-2-7b": ModelShape("llama", 32, 4096, 11008, 4096, 4096, 32000, False, heads=32),
    "llama-2-13b": ModelShape("llama", 40, 5120, 13824, 5120, 5120, 32000, False, heads=40),
    "llama-2-70b": ModelShape("llama", 80, 8192, 28672, 8192, 1024, 32000, False, heads=64),
    "llama-3-70b": ModelShape("llama", 80, 8192, 28672, 8192, 1024, 128256, False, heads=64),
    "codellama-34b": ModelShape("llama", 48, 8192, 22016, 8192, 1024, 32000, False, heads=64),
    "tinyllama-1.1b": ModelShape("llama", 22, 2048, 5632, 2048, 256, 32000, False, heads=32),
    "powerlm-3b": ModelShape("granite", 40, 2304, 9216, 2304, 2304, 49152, True, heads=36),
    "qwen-1.8b": ModelShape("qwen", 24, 2048, 5504, 2048, 2048, 151936, False, heads=16),
    "qwen-7b": ModelShape("qwen", 32, 4096, 11008, 4096, 4096, 151936, False, heads=32),
    "qwen-14b": ModelShape("qwen", 40, 5120, 13696, 5120, 5120, 152064, False, heads=40),
    "qwen-72b": ModelShape("qwen", 80, 8192, 24576, 8192, 8192, 152064, False, heads=64),
    "qwen2.5-7b": ModelShape("qwen2", 28, 3584, 18944, 3584, 512, 152064, False, heads=28),
    "qwen2.5-14b": ModelShape("qwen2", 48, 5120, 13824, 5120, 1024, 152064, False, heads=40),
    "qwen2.5-32b": ModelShape("qwen2", 64, 5120, 27648, 5120, 1024, 152064, False, heads=40),
    "qwen2.5-72b": ModelShape("qwen2", 80, 8192, 29568, 8192, 1024, 152064, False, heads=64),
    "gemma-2b": ModelShape("gemma", 18, 2048, 16384, 2048, 256, 256000, True, heads=8),
    "gemma-7b": ModelShape("gemma", 28, 3072, 24576, 4096, 4096, 256000, True, heads=16),
    "gemma2-2b": ModelShape("gemma2", 26, 2304, 9216, 2048, 1024, 256000, True, heads=8, window=4096),
    "gemma2-9b": ModelShape("gemma2", 42, 3584, 14336, 4096, 2048, 256000, True, heads=16, window=4096),
    **{name: CATALOGUE[model] for name, model in FROM_CATALOGUE.items()},
}


class Unclear(Exception):
    """A row that does not say what decides its memory."""


@dataclass(frozen=True)
class Scored:
    """A row with its prediction; sizes in GiB. `measured` is None where only the verdict is known."""

    row: dict[str, str]
    group: str
    modelled: bool
    estimate: MemoryEstimate
    predicted: float
    measured: float | None
    peer: float

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.measured - 1 if self.measured else 0.0

    @property
    def peer_error(self) -> float:
        """Of `accelerate estimate-memory`."""
        return self.peer / self.measured - 1 if self.measured else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROWS, help="measurements (default: the committed extract)")
    parser.add_argument("--rows", action="store_true", help="also print every row")
    arguments = parser.parse_args()
    scored, skipped = [], []
    for row in csv.DictReader(arguments.csv.open(encoding="utf-8")):
        try:
            scored.append(score(row))
        except Unclear as reason:
            skipped.append((row["id"], str(reason)))
    report(scored, arguments.rows)
    verdicts(scored)
    print(f"\n{len(skipped)} rows skipped:")
    for reason, count in Counter(reason for _, reason in skipped).most_common():
        names = [name for name, why in skipped if why == reason]
        print(f"- {reason}: {count} ({', '.join(names[:4])}{', …' if count > 4 else ''})")
    return 0


def score(row: dict[str, str]) -> Scored:
    """The prediction for a row.

    Raises:
        Unclear: it leaves open what decides memory.
    """
    measured = float(row["peak"]) * UNITS[row["unit"]] / GIB if row["peak"] else None
    if row["real_or_estimate"] != "measured":
        raise Unclear("an estimate of its own, or a head alone")
    if measured is None and not row["verdict"].startswith(("fits", "OOM")):
        raise Unclear("neither a peak nor a verdict")
    shape = SHAPES.get(row["cfg"])
    if shape is None:
        raise Unclear(f"no shape for `{row['cfg']}`" if row["cfg"] else "no shape for its model")
    if "int8" in row["quant"]:
        raise Unclear("int8 base, which no method of ours trains")
    spec = spec_of_row(row, measured is None)
    estimate = estimate_need(spec, shape)
    kind, predicted = row["peak_kind"].lower(), estimate.allocated
    if "reserved" in kind or "smi" in kind:
        predicted *= 1 + estimate.fragmentation
    if "smi" in kind:
        predicted += CUDA_CONTEXT_GIB
    modelled = not any(name in row["framework"] for name in OTHER_CODE) or "HF" in row["framework"].split()[:1]
    modelled = modelled and "gptq" not in row["quant"] and "remote" not in row["framework"]
    peer = shape.parameters * (2 if spec.linear == "bf16" else 1 if spec.linear == "int8" else 0.5) / GIB
    group = row["eval"] or ("other smi" if "smi" in kind else "other")
    return Scored(row, group, modelled, estimate, predicted, measured, peer)


def spec_of_row(row: dict[str, str], verdict_only: bool) -> MemorySpec:
    """The columns of a row as a MemorySpec.

    Raises:
        Unclear: a column that decides memory is empty, or says what is not modelled.
    """
    if not row["seq"].isdigit() or "longest batch unknown" in row["notes"]:
        raise Unclear("the real length of its rows is not stated")
    if "offload" in row["grad_ckpt"] or "FSDP" in row["framework"]:
        raise Unclear("activations offloaded or weights sharded")
    if not (row["lora_r"] and row["targets"]) and not verdict_only:
        raise Unclear("rank or targets not stated")
    batch = int(row["micro_batch"] or 1)
    attention = next((name for name in ("flash", "eager", "sdpa") if name in row["attn"]), "sdpa")
    lora, optimizer = row["method"].startswith("LoRA"), row["optimizer"]
    moments = "adamw_8bit" if "8bit" in optimizer else "adamw_torch"
    loss, logit_bytes = loss_of(row, batch)
    return MemorySpec(
        seq=int(row["seq"]),
        micro_batch=batch,
        method=Method.LORA if lora else Method.QLORA,
        linear=linear_of(row["quant"]),
        # The blog's table of verdicts leaves both to a gist: rank 64 on q and v, as its script has.
        rank=int(row["lora_r"] or 64),
        targets=targets_of(row["targets"] or "q,v"),
        adapter_bytes=2 if "bf16" in optimizer or ("8bit" in optimizer and not lora) else 4,
        optimizer=f"paged_{moments}" if "paged" in optimizer else moments,
        checkpointing=not row["grad_ckpt"].startswith("no"),
        attention=attention,
        padded=batch > 1,
        loss=loss,
        logit_bytes=logit_bytes,
        other_bytes=4 if row["nonquant_dtype"].startswith(("fp32", "float32")) else 2,
        quantised_experts=True,  # all rows with experts are of transformers 4
        autocast=not row["framework"].startswith("PEFT"),  # its own loop, in plain bf16
        expandable="axolotl" in row["framework"].lower(),
    )


def linear_of(quant: str) -> str:
    """A key of LINEAR_BYTES."""
    if "gptq" in quant:
        return "gptq"
    if quant.startswith(("nf4", "fp4", "4")):
        return "nf4-dq" if "dq" in quant else "nf4"
    return "int8" if "int8" in quant else "bf16"


def targets_of(said: str) -> tuple[str, ...] | None:
    """Module names of the short ones in the CSV; None: all linear layers."""
    text = said.split("(")[0].strip()
    if text.startswith("all") or "(all)" in said:
        return None
    names = list(text) if text == "qv" else [name.strip().removesuffix("_proj") for name in text.split(",")]
    unknown = [name for name in names if name not in SHORT]
    if unknown:
        raise Unclear(f"unknown target `{unknown[0]}`")
    return tuple(SHORT[name] for name in names)


def loss_of(row: dict[str, str], batch: int) -> tuple[Loss, float]:
    """The loss path, and the bytes per logit of the copies that stack keeps alive."""
    said, stack = row["loss_impl"].lower(), row["framework"]
    if "liger" in said:
        return Loss.LIGER, 0
    if "cce" in said or "cut cross" in said or "fused" in said:
        return Loss.FUSED, 0
    if "fast-ce" in said:  # bf16 logits, fp32 ones in which the kernel writes the gradient, and that in bf16
        return Loss.LOGITS, 8
    if "all chunk logits kept" in said:  # bf16 logits, log-softmax and gradient, no autocast
        return Loss.LOGITS, 6
    if "full logits" not in said:
        raise Unclear("loss path not stated")
    if stack.startswith("HF + FA2") or "context" in row["peak_kind"]:
        return Loss.LOGITS, 16  # the trainer keeps the model's outputs
    # 4.48 keeps the bf16 logits beside three fp32 copies; 4.45 gave their name to the first copy.
    return Loss.LOGITS, 14 if batch > 1 and "transformers 4.48" in stack else 12


def report(scored: list[Scored], every: bool) -> None:
    """Errors by group, then pooled."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        if one.measured is not None:
            groups[f"{one.group}{'' if one.modelled else ' (other code)'} {one.row['method']}"].append(one)
    measured = [one for one in scored if one.measured is not None]
    stated = [one for one in measured if one.modelled and "smi" not in one.row["peak_kind"]]
    qlora = [one for one in stated if one.row["method"] == "QLoRA"]
    print("| group | n | MAPE | bias | worst | worst row | accelerate MAPE |\n|---|--:|--:|--:|--:|---|--:|")
    pooled = [("**well-specified QLoRA**", qlora), ("**well-specified QLoRA and LoRA**", stated), ("**all**", measured)]
    for name, members in [*sorted(groups.items()), *pooled]:
        print(line(name, members))
    band = statistics.median(one.estimate.band for one in scored)
    print(f"\n{sum(abs(one.error) <= band for one in stated)} of {len(stated)} inside the band of {band:.0%}")
    if every:
        for one in measured:
            print(f"{one.error:+7.1%} {one.predicted:7.2f} {one.measured:7.2f} GiB  {one.group:8} {one.row['id']}")


def line(name: str, members: list[Scored]) -> str:
    """One row of the table."""
    if not members:
        return f"| {name} | 0 | | | | | |"
    worst = max(members, key=lambda one: abs(one.error))
    mean = statistics.mean(abs(one.error) for one in members)
    bias, peer = statistics.mean(one.error for one in members), statistics.mean(abs(o.peer_error) for o in members)
    return (
        f"| {name} | {len(members)} | {mean:.1%} | {bias:+.1%} | {worst.error:+.1%} | {worst.row['id']} | {peer:.0%} |"
    )


def verdicts(scored: list[Scored]) -> None:
    """Does it fit? Each run once: rows of nvidia-smi that repeat an allocation row are left out."""
    right, unsure, wrong, late = 0, 0, [], []
    for one in scored:
        oom = one.row["verdict"].startswith("OOM")
        capacity = CAPACITY.get(one.row["gpu"])
        if capacity is None or not (oom or one.row["verdict"].startswith("fits")):
            continue
        if one.measured is not None and "smi" in one.row["peak_kind"]:
            continue
        need = one.estimate.allocated * 1.03 + CUDA_CONTEXT_GIB  # what is freed can be used again: no more is lost
        band = one.estimate.band
        right += (need > capacity) == oom
        unsure += need * (1 - band) <= capacity < need * (1 + band)
        if (need > capacity) != oom:
            assumed = "" if one.row["lora_r"] else ", rank and targets not stated"
            wrong.append(f"{one.row['id']} ({need:.1f} of {capacity:g} GiB, {one.row['verdict']}{assumed})")
        if oom and need * (1 + band) <= capacity:
            late.append(one.row["id"])
    print(f"\nverdicts: {right} of {right + len(wrong)} right; capacity inside the band for {unsure}")
    print(f"wrong: {', '.join(wrong) or 'none'}")
    print(f"predicted to fit with the whole band, but ran out of memory: {', '.join(late) or 'none'}")


if __name__ == "__main__":
    raise SystemExit(main())
