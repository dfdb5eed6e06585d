"""Tokens to duration to dollars, expected and worst case. Pure: rates are constants with their source, or past runs.

Utilisation, launch time and dequantisation were fitted on the table "Profiling of Memory and Speed" in the README of
QwenLM/Qwen (commit 03cd81f): LoRA, Q-LoRA and full training of 1.8 to 72 B parameters at 256 to 8,192 tokens with
gradient checkpointing on one A100; tests/test_cost.py compares. Its Q-LoRA is GPTQ, not NF4. Other GPUs are assumed to
reach the same part of their vendor's dense bf16 rate, which is why a band is wide until finished runs correct it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.attention import FLASH, attention_of
from pipeline.dataset_facts import DatasetFacts
from pipeline.experiment import Experiment, Method, Train
from pipeline.facts import FinishedRun
from pipeline.fields import rows_at_once
from pipeline.flavors import CONTAINER_START_S, FLAVORS, Flavor
from pipeline.models import ModelShape
from pipeline.parallel import ALONE, Parallel, Sharing, parallel_of

BAND, CORRECTED_BAND = 0.5, 0.25  # The expected duration may be off by this part, each way.
SEVERAL_BAND = 0.7  # … on several GPUs, whose links nobody measured for us
# Dense bf16 rate of the vendors' data sheets, TFLOP/s. A T4 has no bf16 tensor cores: its fp32 rate.
TFLOPS = {"T4": 8.1, "L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H200": 989, "RTX PRO 6000": 500}
GB_PER_S = {"T4": 320, "L4": 300, "A10G": 600, "L40S": 864, "A100": 2039, "H200": 4800, "RTX PRO 6000": 1792}
CPU_TFLOPS_PER_VCPU = 0.03  # what fp32 training of a small model reaches on one AVX2 thread
# Part of the rate that adapters reach, by billions of parameters; full training has larger matrix products to do.
UTILISATION = ((3, 0.31), (10, 0.45), (math.inf, 0.52))
UTILISATION_FULL = 0.52
LAUNCH_S_PER_LAYER = 0.005  # a micro-batch never takes less: the GPU waits for Python; a third of it to recompute
DEQUANT_S_PER_WEIGHT = 32e-12  # 4-bit to bf16, three times a micro-batch, at the A100's memory bandwidth
PACKED = 0.97  # part of a packed row that best-fit-decreasing fills
STAGE_BYTES_PER_S = {"merge": 100e6, "gguf": 45e6, "evaluate": 30e6}  # of base weights in bf16, on 8 vCPUs
# Part of N times the speed that N GPUs reach: Li et al. 2020, "PyTorch Distributed" (PVLDB 13), found nearly all for
# DDP; Mark III Systems measured a little over 6 times with 8 V100 under DeepSpeed ZeRO 2. They also wait for the
# longest rows among them.
SEVERAL = 0.8
# What sharded layers travel over, each way, from the vendors' data sheets: NVLink, or PCIe of the card's generation.
# Half of it is taken to be reached.
LINK_GB_PER_S = {"A100": 300, "H200": 450, "RTX PRO 6000": 64, "L4": 32, "A10G": 32, "L40S": 32}
LINK_REACHED = 0.5
# Nobody says what lies between the machines of two jobs: 25 Gbit/s, the least that clouds sell with such GPUs. All GPUs
# of a machine share it, and reach all of it.
NODES_GB_PER_S = 25 / 8
DOWNLOAD_BYTES_PER_S = 200e6  # from the Hub into a job, loading included
CORRECTION_LIMITS = (0.2, 5.0)


@dataclass(frozen=True)
class CostEstimate:
    """Seconds and US dollars of one stage. `expected_*` is None when the data or the model is unknown."""

    expected_s: float | None
    worst_s: float
    expected_usd: float | None
    worst_usd: float
    band: float = BAND
    needed_s: float | None = None  # what the work takes, also where that is longer than the timeout


def estimate_tokens(experiment: Experiment, data: DatasetFacts) -> float:
    """Tokens one pass reads: as counted, or every row as long as `max_length`."""
    train = experiment.train
    return data.tokens.total if data.tokens else data.training_rows * _answers(train) * train.max_length


def estimate_train_seconds(
    experiment: Experiment,
    shape: ModelShape,
    data: DatasetFacts,
    flavor: Flavor,
    finished: Sequence[FinishedRun] = (),
) -> float:
    """Seconds of training on the GPUs of a flavor, corrected by runs of the same kind."""
    train, parallel = experiment.train, parallel_of(experiment, shape, flavor)
    batches, length = count_batches(experiment, data, padded=attention_of(train, shape, flavor) != FLASH)
    each = _micro_batch_seconds(train, shape, length, flavor)
    if parallel.gpus > 1:
        each = max(each, _link_seconds(train.method, shape, flavor, parallel)) / (parallel.gpus * SEVERAL)
    ratio = correction(finished, "train", train.method, gpus_of(flavor, train.nodes))
    return batches * each * (ratio or 1.0)


def count_batches(experiment: Experiment, data: DatasetFacts, padded: bool = True) -> tuple[float, float]:
    """Micro-batches of the whole training, evaluating included, and the tokens each row of them is long."""
    train = experiment.train
    per_pass, length = _micro_batches(experiment, data, padded)
    batches = per_pass * train.epochs if train.max_steps is None else train.max_steps * train.gradient_accumulation
    return batches + _evaluating(experiment, data, per_pass, batches), length


def estimate_cost(
    seconds: float | None,
    timeout_s: int,
    flavor: Flavor,
    setup_s: float = 0.0,
    corrected: bool = False,
    parallel: Parallel = ALONE,
) -> CostEstimate:
    """Price of one stage: expected from `seconds` of work, worst case from its timeout.

    `CONTAINER_START_S` covers the image pull and the install of the script's dependencies, `setup_s` what the stage
    does before its work. Every node of `parallel` is paid for.
    """
    needed = None if seconds is None else seconds + setup_s + CONTAINER_START_S
    total = None if needed is None else min(needed, timeout_s)
    nodes = parallel.nodes
    expected = None if total is None else nodes * billed_usd(total, flavor)
    band = CORRECTED_BAND if corrected else SEVERAL_BAND if parallel.gpus > 1 else BAND
    return CostEstimate(total, timeout_s, expected, nodes * billed_usd(timeout_s, flavor), band, needed)


def setup_seconds(shape: ModelShape) -> float:
    """Seconds to download and load the base in bf16."""
    return 2 * shape.parameters / DOWNLOAD_BYTES_PER_S


def stage_seconds(stage: str, shape: ModelShape | None, files: int = 1) -> float | None:
    """Seconds of a stage that reads every weight `files` times; None when the model is unknown."""
    return None if shape is None else 2 * shape.parameters * files / STAGE_BYTES_PER_S[stage]


def finished_run(manifest: Mapping[str, Any]) -> FinishedRun | None:
    """What an artifact's manifest says about the estimate it was launched with; None when it says nothing."""
    predicted, actual = manifest.get("predicted") or {}, manifest.get("duration_s")
    flavor, seconds = FLAVORS.get(str(predicted.get("flavor"))), predicted.get("duration_s")
    if flavor is None or not isinstance(seconds, int | float) or not isinstance(actual, int | float):
        return None
    work = seconds - CONTAINER_START_S  # a manifest's duration begins when the script starts
    if work <= 0 or actual <= 0 or manifest.get("attempt", 1) != 1:  # a resumed attempt did only a part
        return None
    rows = manifest.get("sweep")
    if isinstance(rows, list) and any(not isinstance(r, Mapping) or r.get("state") != "trained" for r in rows):
        return None  # fewer variants than were planned
    nodes = predicted.get("nodes", 1)
    gpus = gpus_of(flavor, nodes if isinstance(nodes, int) else 1)
    return FinishedRun(str(manifest.get("stage")), str(predicted.get("method", "")), gpus, work, actual)


def gpus_of(flavor: Flavor, nodes: int = 1) -> str | None:
    """The GPUs of a flavor, `A100`, `4x A100` or `2 nodes of 4x A100`: what a finished run says, it says of as many."""
    gpus = f"{flavor.gpus}x {flavor.gpu}" if flavor.gpus > 1 else flavor.gpu
    return f"{nodes} nodes of {gpus}" if nodes > 1 and gpus else gpus


def correction(finished: Iterable[FinishedRun], stage: str, method: str, gpu: str | None) -> float | None:
    """Median of actual over predicted seconds of runs with this stage, method and GPU, or None without any."""
    ratios = [
        run.actual_s / run.predicted_s
        for run in finished
        if (run.stage, run.method, run.gpu) == (stage, method, gpu) and run.predicted_s > 0
    ]
    if not ratios:
        return None
    low, high = CORRECTION_LIMITS
    return min(max(statistics.median(ratios), low), high)


def _micro_batches(experiment: Experiment, data: DatasetFacts, padded: bool) -> tuple[float, float]:
    """Micro-batches of one pass, and the tokens each row of them is long, padding included where there is any."""
    train, at_once = experiment.train, rows_at_once(experiment.train.batch_size)
    tokens = estimate_tokens(experiment, data)
    counted = data.tokens
    rows = counted.sequences if counted else data.training_rows
    if train.packing:
        return math.ceil(tokens / (train.max_length * PACKED)) / at_once, train.max_length
    mean, together = tokens / max(rows * _answers(train), 1), at_once * _answers(train)
    longest = min(counted.longest if counted else 2 * mean, train.max_length)
    # The longest of n rows, were their lengths spread evenly between 0 and twice the mean; capped at the longest row.
    longest = min(mean * 2 * together / (together + 1), longest)
    return rows / at_once, max(mean, longest) if padded else mean


def _evaluating(experiment: Experiment, data: DatasetFacts, per_pass: float, batches: float) -> float:
    """Held-out micro-batches, as training ones: forward alone is a third, of pairs two of four passes.

    As often as `Reporter` of the script asks.
    """
    train = experiment.train
    rows = data.eval_file.training_rows if data.eval_file else data.rows - data.training_rows
    epoch = math.ceil(per_pass / train.gradient_accumulation)
    steps = math.ceil(batches / train.gradient_accumulation)
    every = max(1, min(epoch, train.save_steps * math.ceil(steps / train.save_steps / 10)))
    return (steps // every) * rows / rows_at_once(train.batch_size) / (2 if train.is_dpo else 3)


def _answers(train: Train) -> int:
    """Sequences that one row becomes: of a pair, each answer with its prompt."""
    return 2 if train.is_dpo else 1


def _micro_batch_seconds(train: Train, shape: ModelShape, length: float, flavor: Flavor) -> float:
    """Seconds of forward, recomputed forward (unless checkpointing is off) and backward of one micro-batch.

    6 FLOP per weight and token (8 where the weights have gradients too). An attended pair costs 8 per query element;
    fused attention keeps the GPU twice as busy as the matrix products do, so it counts half. Preference tuning runs
    all rows forward once more, through the base alone: 8 FLOP instead of 6, four passes over the layers for three.
    """
    applied = shape.layers * (shape.attention + shape.mlp_matrices * shape.hidden * shape.active_intermediate)
    weights = applied + shape.vocab * shape.hidden
    full, rows = train.method is Method.FULL, rows_at_once(train.batch_size) * _answers(train)
    kept = train.sft.get("gradient_checkpointing") is False
    passes = 4 / 3 if train.is_dpo else 1.0
    per_token = ((8 if full else 6) - 2 * kept) * weights + 4 * length * shape.query * shape.layers
    flop = passes * per_token * length * rows
    if flavor.gpu is None:
        return flop / (CPU_TFLOPS_PER_VCPU * flavor.vcpus * 1e12)
    part = UTILISATION_FULL if full else next(u for limit, u in UTILISATION if shape.parameters < limit * 1e9)
    launched = LAUNCH_S_PER_LAYER * shape.layers * passes * (2 / 3 if kept else 1)
    seconds = max(flop / (TFLOPS[flavor.gpu] * 1e12 * part), launched)
    if train.quantised:
        quantised = shape.linear - shape.expert_linear - shape.other_linear
        seconds += passes * quantised * DEQUANT_S_PER_WEIGHT * GB_PER_S["A100"] / GB_PER_S[flavor.gpu]
    return seconds


def _link_seconds(method: Method, shape: ModelShape, flavor: Flavor, parallel: Parallel) -> float:
    """Seconds in which the layers of a sharded model travel: gathered twice and, where all learn, reduced once.

    Work and travel go on side by side, so a micro-batch takes the longer of the two. The gradients of copies are small.
    """
    if parallel.sharing is not Sharing.PARTS or flavor.gpu is None:
        return 0.0
    trips = 3 if method is Method.FULL else 2
    sent = trips * 2 * shape.parameters * (parallel.gpus - 1) / parallel.gpus
    within = LINK_GB_PER_S.get(flavor.gpu, math.inf) if parallel.per_node > 1 else math.inf
    between = NODES_GB_PER_S if parallel.nodes > 1 else math.inf
    return sent / (min(within * LINK_REACHED, between) * 1e9)


def billed_usd(seconds: float, flavor: Flavor) -> float:
    """Dollars of a job that ran for `seconds`: whole minutes begun are billed."""
    minutes = -(-seconds // 60)
    return float(minutes * flavor.usd_per_minute)
