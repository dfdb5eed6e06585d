"""Tokens to duration to dollars, expected and worst case. A first version: its band is wide and said."""

from dataclasses import dataclass

from pipeline.experiment import Experiment, Method
from pipeline.facts import DataFacts
from pipeline.flavors import CONTAINER_START_S, Flavor
from pipeline.models import ModelShape

CHARACTERS_PER_TOKEN = 4.0  # English text under a 30k-260k vocabulary; counted exactly by a later version.
BAND = 0.5  # The expected duration may be off by this part, each way.
# Dense bf16 matmul rate the vendor publishes, in TFLOP/s; a CPU flavor by core (AVX2 fp32 fused multiply-add).
TFLOPS = {"T4": 65, "L4": 121, "A10G": 125, "L40S": 362, "A100": 312, "H200": 989, "RTX PRO 6000": 500}
CPU_TFLOPS_PER_VCPU = 0.03
UTILISATION = 0.25  # part of that rate a single-GPU LoRA run reaches; 4-bit weights are dequantised on the way
STAGE_BYTES_PER_S = {"merge": 100e6, "gguf": 45e6, "evaluate": 30e6}  # of base weights in bf16, on 8 vCPUs


@dataclass(frozen=True)
class CostEstimate:
    """Seconds and US dollars of one stage. `expected_*` is None when the data or the model is unknown."""

    expected_s: float | None
    worst_s: float
    expected_usd: float | None
    worst_usd: float
    band: float = BAND


def estimate_tokens(experiment: Experiment, data: DataFacts) -> float:
    """Tokens one pass reads: characters over four, no row longer than `max_length`."""
    return min(data.characters / CHARACTERS_PER_TOKEN, data.rows * experiment.train.max_length)


def estimate_train_seconds(experiment: Experiment, shape: ModelShape, data: DataFacts, flavor: Flavor) -> float:
    """Seconds of training: 6 FLOP per weight and token, 8 with the recomputed forward of checkpointing.

    A frozen base needs no gradient of its weights, which takes a third of the backward off.
    """
    train = experiment.train
    flop_per_weight = 8 if train.method is Method.FULL else 6
    tokens = estimate_tokens(experiment, data) * train.epochs
    if train.max_steps is not None:
        rows = train.max_steps * train.batch_size * train.gradient_accumulation
        tokens = estimate_tokens(experiment, data) / max(data.rows, 1) * rows
    rate = TFLOPS[flavor.gpu] * flavor.gpus * UTILISATION if flavor.gpu else CPU_TFLOPS_PER_VCPU * flavor.vcpus
    return flop_per_weight * shape.parameters * tokens / (rate * 1e12)


def estimate_cost(seconds: float | None, timeout_s: int, flavor: Flavor) -> CostEstimate:
    """Price of one stage: expected from `seconds` of work, worst case from its timeout."""
    total = None if seconds is None else min(seconds + CONTAINER_START_S, timeout_s)
    expected = None if total is None else _billed(total, flavor)
    return CostEstimate(total, timeout_s, expected, _billed(timeout_s, flavor))


def stage_seconds(stage: str, shape: ModelShape | None, files: int = 1) -> float | None:
    """Seconds of a stage that reads every weight `files` times; None when the model is unknown."""
    return None if shape is None else 2 * shape.parameters * files / STAGE_BYTES_PER_S[stage]


def _billed(seconds: float, flavor: Flavor) -> float:
    """Dollars for whole minutes begun."""
    minutes = -(-seconds // 60)
    return float(minutes * flavor.usd_per_minute)
