"""RAM and disk that each stage's machine must have, and the GPU memory of evaluating. Measures and loads nothing.

Derived from what the job scripts write and hold. "Measured" below is a random Llama of 378 M parameters (131,072 tokens
x 1,024, 16 layers) taken through the real scripts on a CPU, sampling their processes and folders; the sum of a folder's
files agreed with the arithmetic here to 3 %. Memory-mapped weights are counted where they are computed with (training
and evaluating on a CPU), not where they are only read once: the kernel takes such pages back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.experiment import Experiment, Method
from pipeline.flavors import FLAVORS, Flavor
from pipeline.memory import CUDA_CONTEXT_GIB, GIB
from pipeline.models import ModelShape
from pipeline.parallel import Sharing, estimate_memory, parallel_of

STAGES = ("train", "merge", "gguf", "evaluate")
# Installed packages: 1.7 GB measured with torch's CPU build (docs/benchmarks.md). A job gets PyPI's torch, which brings
# NVIDIA's libraries: 7 GB is assumed, and only warned about.
PACKAGES_LEAST_GB, PACKAGES_LIKELY_GB = 1.7, 7.0
# Bits per weight of each quant, as scripts/convert_gguf.py counts when it asks for disk; a test compares.
QUANT_BITS = {"BF16": 16.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q5_K_S": 5.6, "Q5_0": 5.6}
QUANT_BITS |= {"Q4_K_M": 4.9, "Q4_K_S": 4.7, "Q4_0": 4.7, "Q3_K_L": 4.3, "Q3_K_M": 4.0, "Q3_K_S": 3.7, "Q2_K": 3.2}
GGUF_SPARE, KL_TOKENS = 1.1, 256  # scripts/convert_gguf.py `check_disk`
MERGE_SPARE_GB = (64 << 20) / 1e9  # scripts/merge_adapter.py `merge`
TRAIN_SPARE, TRAIN_SPARE_FULL = 0.25, 13  # of the base's weights, scripts/train_sft.py `main`
# Resident memory beside tensors, measured: training or evaluating 0.8 GiB, merging 0.25, the converter 0.3.
LIBRARIES_GIB = {"train": 0.8, "merge": 0.25, "gguf": 0.3, "evaluate": 0.8}
CUDA_HOST_GIB = 2.0  # assumed: driver and kernels in host memory once CUDA is in use
# A tensor is written as bf16 by way of float32, and packed in numpy: 7.7 bytes an element measured in the converter,
# 5.0 in the quantiser, which runs after it.
CONVERT_BYTES_PER_ELEMENT = 8
LOADING_TENSORS = 4  # transformers 5.23, core_model_loading.py: threads that each hold one tensor on its way to the GPU
SHARD_GB = 50.0  # transformers 5.23 `save_pretrained`: safetensors copies one whole shard from the GPU before it writes
SPARE = 1.1  # between "cannot work" and "works": a need of this much more is only warned about


@dataclass(frozen=True)
class Need:
    """What a stage needs of one resource: below `least` it cannot work, from `likely` on it should."""

    least: float
    likely: float


def disk_gb(stage: str, experiment: Experiment, shape: ModelShape) -> Need:
    """Disk of a stage on Hugging Face Jobs, GB: what it downloads and writes at its fullest, and its packages."""
    files = _files_gb(stage, experiment, shape)
    return Need(files + PACKAGES_LEAST_GB, files + PACKAGES_LIKELY_GB)


def ram_gib(stage: str, experiment: Experiment, shape: ModelShape, on_gpu: bool) -> Need:
    """Host memory of a stage, GiB. `on_gpu`: its flavor has a GPU, which then holds the model.

    Each process that trains has libraries, and the one that started them. TRL 1.16 loads a bf16 base for copies in host
    memory, in every process; of a sharded one the first process alone holds all.
    """
    held, tensors = LIBRARIES_GIB[stage], _tensors_gib(stage, experiment, shape, on_gpu)
    if on_gpu and stage in ("train", "evaluate"):
        held += CUDA_HOST_GIB
    parallel = parallel_of(experiment, shape)
    if stage == "train" and on_gpu and parallel.gpus > 1:
        held = parallel.per_node * held + LIBRARIES_GIB[stage]
        if parallel.sharing is Sharing.PARTS or not experiment.train.quantised:
            tensors = weights_gb(shape) * 1e9 / GIB
        tensors *= 1 if parallel.sharing is Sharing.PARTS else parallel.per_node
    if stage == "train" and parallel.lanes > 1:  # variants of a sweep, each in a process of its own
        held, tensors = parallel.lanes * held + LIBRARIES_GIB[stage], parallel.lanes * tensors
    return Need(held + tensors, (held + tensors) * SPARE)


def evaluate_vram_gib(shape: ModelShape) -> Need:
    """GPU memory of evaluating, GiB: scripts/evaluate.py loads one model at a time in bf16, on one GPU."""
    weights = weights_gb(shape) * 1e9 / GIB + CUDA_CONTEXT_GIB
    return Need(weights, weights * SPARE)


def weights_gb(shape: ModelShape) -> float:
    """Every weight in bf16, GB."""
    return 2 * shape.parameters / 1e9


def adapter_gb(experiment: Experiment, shape: ModelShape) -> float:
    """The adapter in fp32, GB: `lora` on a bf16 base saves it so, `qlora` in half of it."""
    lora = experiment.train.lora
    rank = lora.r if lora else 16
    targets = tuple(lora.targets) if lora and not isinstance(lora.targets, str) else None
    return 4 * shape.lora_parameters(rank, targets) / 1e9


def stages_of(experiment: Experiment) -> Iterator[tuple[str, Flavor]]:
    """The stages that our own scripts carry out, each with its flavor where the catalogue has it."""
    for stage in STAGES:
        section = getattr(experiment, stage)
        if section is None or (stage == "train" and experiment.train.script):
            continue
        if flavor := FLAVORS.get(section.flavor):
            yield stage, flavor


def cheapest_host(stage: str, experiment: Experiment, shape: ModelShape, now: Flavor) -> Flavor | None:
    """The cheapest flavor with enough of everything for a stage; with a GPU if `now`, its flavor, has one."""
    able = [flavor for flavor in FLAVORS.values() if _suits(stage, experiment, shape, flavor, now)]
    return min(able, key=lambda flavor: flavor.usd_per_hour, default=None)


def _suits(stage: str, experiment: Experiment, shape: ModelShape, flavor: Flavor, now: Flavor) -> bool:
    on_gpu = flavor.gpu is not None
    computes = stage in ("train", "evaluate")
    if computes and on_gpu != (now.gpu is not None):
        return False
    if stage == "train" and on_gpu and (flavor.gpus > 1 or not estimate_memory(experiment, shape).fits(flavor)):
        return False
    if stage == "evaluate" and on_gpu and evaluate_vram_gib(shape).likely > flavor.vram_gib:
        return False
    disk, ram = disk_gb(stage, experiment, shape), ram_gib(stage, experiment, shape, on_gpu)
    return disk.likely <= flavor.disk_gb and ram.likely <= flavor.ram_gib


def _files_gb(stage: str, experiment: Experiment, shape: ModelShape) -> float:
    """Downloads and output of a stage together: the cache of the Hub and the work folder share a job's one disk."""
    weights = weights_gb(shape)
    match stage:
        case "train":  # the base, and what the script demands for checkpoints and result
            return weights * (1 + (TRAIN_SPARE_FULL if experiment.train.method is Method.FULL else TRAIN_SPARE))
        case "merge":
            return 2 * weights + adapter_gb(experiment, shape) + MERGE_SPARE_GB
        case (
            "gguf"
        ):  # the merged model; a bf16 GGUF of it with the logits to compare with; a quant, until it is uploaded
            quants = experiment.gguf.quants if experiment.gguf else []
            written = weights + KL_TOKENS * shape.vocab * 4 / 1e9
            written += max((shape.parameters * QUANT_BITS[quant] / 8e9 for quant in quants), default=0)
            return weights + GGUF_SPARE * written
        case _:  # evaluate: base and tuned model, both downloaded before the first is loaded
            return 2 * weights


def _tensors_gib(stage: str, experiment: Experiment, shape: ModelShape, on_gpu: bool) -> float:
    """What a stage holds in host memory at its fullest, without libraries."""
    weights_gib = weights_gb(shape) * 1e9 / GIB
    widest = max(shape.vocab * shape.hidden, shape.experts * shape.hidden * shape.intermediate)
    match stage:
        case "merge":  # the update of one adapted matrix in float32, beside its two factors
            matrix = shape.hidden * max(shape.intermediate, shape.shared_intermediate, shape.query)
            return 4 * matrix / GIB
        case "gguf":
            return CONVERT_BYTES_PER_ELEMENT * widest / GIB
        case "evaluate":
            return LOADING_TENSORS * 2 * widest / GIB if on_gpu else weights_gib
        case _ if not on_gpu:
            return estimate_memory(experiment, shape).allocated
        case _ if experiment.train.method is Method.FULL:
            return min(weights_gib, SHARD_GB * 1e9 / GIB)
        case _:
            return LOADING_TENSORS * 2 * widest / GIB
