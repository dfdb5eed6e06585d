"""Time and memory of training with MLX on a Mac, from a model's shape alone. Measures nothing and loads nothing.

    seconds = tokens x FLOP per token / (PART of the chip's FP16 rate)

PART is what four trainings with mlx-lm say of themselves, each by the arithmetic below:

| training                                                       | said          | part of the rate |
|----------------------------------------------------------------|---------------|------------------|
| Gemma 3 12B in 8 bits, 1,000 rows, 16 layers, M3 Max: the SOP  | 4 to 6 h      | 0.35             |
| Mistral 7B, 4 layers, M1 Max: mlx-lm's LORA.md                 | 250 tokens/s  | 0.4              |
| Qwen3 0.6B, 1,024 tokens, 16 layers, M4 Pro: mlx-tune's page   | 2.2 batches/s | 0.6              |
| the same with 4,096 tokens and all layers                      | 0.3 batches/s | 0.46             |

The SOP names no length of its rows: 900 tokens, three times over, are what its 2 to 3 hours on an A10G mean by
`cost.py` (docs/worked-example.md). That, short rows that leave the GPU waiting, and laptops that slow down when they
are hot are why the band is wide.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.apple import CHIPS, MEMORY_GB, WIRED, Chip
from pipeline.cost import count_batches
from pipeline.dataset_facts import DatasetFacts
from pipeline.experiment import Experiment
from pipeline.fields import rows_at_once
from pipeline.memory import GIB, MemoryEstimate
from pipeline.models import ModelShape
from pipeline.train_sections import Lora

PART = 0.45
BAND = 0.6  # of the duration, each way
# Each way: scripts/train_mlx.py reported at most 3 % more or less for five trainings of a 42 M Llama on a CPU, which
# tests/test_mac.py repeats. None was measured on a Mac.
MEMORY_BAND = 0.25
GROUP_BITS = 32 / 64  # a scale and a bias of 16 bits for each 64 weights
ADAPTER_BYTES = 8  # fp32 weights and gradients
MOMENT_BYTES = 8
# Found in the same trainings: bytes of a logit at the peak, and of one attention score in a backward pass, of all
# layers at once where they are not recomputed.
LOGIT_BYTES, SCORE_BYTES = 8, 3
RUNTIME_GIB = 1.0  # assumed: Python, Metal and MLX's cache of freed buffers
_BITS = re.compile(r"(?<![a-z0-9])(?:q?([2-8])[-_]?bit|mxfp([48])|nvfp([4])|q([2-8]))(?![a-z0-9])", re.IGNORECASE)
_FLOAT = re.compile(r"(?<![a-z0-9])(?:bf16|fp16|f16|bfloat16|float16)(?![a-z0-9])", re.IGNORECASE)


def mlx_bits(experiment: Experiment, config: Mapping[str, Any] | None) -> int | None:
    """Bits of a weight of the model that MLX trains on: of its config.json, else by its name; None: not known."""
    mlx = experiment.train.mlx
    if mlx is None or mlx.base is None:
        return 16
    if config is not None:
        said = config.get("quantization")
        bits = said.get("bits") if isinstance(said, Mapping) else 16
        return bits if isinstance(bits, int) else None
    return bits_by_name(mlx.base)


def bits_by_name(model: str) -> int | None:
    """What a repository's name says, as `mlx-community/gemma-3-12b-it-8bit` does."""
    found = _BITS.search(model)
    if found:
        return int(next(group for group in found.groups() if group))
    return 16 if _FLOAT.search(model) else None


def learning_layers(experiment: Experiment, shape: ModelShape) -> int:
    """How many layers have an adapter."""
    mlx = experiment.train.mlx
    return min(mlx.num_layers, shape.layers) if mlx and mlx.num_layers else shape.layers


def estimate_mac_seconds(
    experiment: Experiment, shape: ModelShape, data: DatasetFacts, chip: Chip, bits: int | None
) -> float:
    """Seconds of training on one chip. A batch of few tokens takes as long as reading the weights does."""
    batches, length = count_batches(experiment, data)
    rows = rows_at_once(experiment.train.batch_size)
    computing = rows * length * _flop(experiment, shape, length) / (chip.tflops * 1e12 * PART)
    times = 1 + learning_layers(experiment, shape) / shape.layers  # forward, and back to the first layer that learns
    reading = times * _weight_bytes(shape, bits or 16) / (chip.gb_per_s * 1e9)
    return batches * max(computing, reading)


def seconds_by_chip(
    experiment: Experiment, shape: ModelShape, data: DatasetFacts, bits: int | None
) -> dict[str, float]:
    """Seconds of training by the chip's name, in the order of the catalogue."""
    return {name: estimate_mac_seconds(experiment, shape, data, chip, bits) for name, chip in CHIPS.items()}


def estimate_mac_memory(experiment: Experiment, shape: ModelShape, bits: int) -> MemoryEstimate:
    """Unified memory that training needs, GiB, by part; the vision tower of a base is not loaded.

    Activations of the layers that learn are all kept, or one layer's where they are recomputed.
    """
    train = experiment.train
    lora, learning = train.lora or Lora(), learning_layers(experiment, shape)
    targets = None if isinstance(lora.targets, str) else tuple(lora.targets)
    tokens = rows_at_once(train.batch_size) * train.max_length
    trained = shape.lora_parameters(lora.r, targets) * learning / shape.layers
    layer = tokens * _kept_bytes(shape, targets)
    scores = SCORE_BYTES * shape.head_count * train.max_length**2 * rows_at_once(train.batch_size)
    alive, inputs = (1, 2 * learning * tokens * shape.hidden) if recomputes(experiment) else (learning, 0)
    return MemoryEstimate(
        weights=_weight_bytes(shape, bits) / GIB,
        adapter=ADAPTER_BYTES * trained / GIB,
        optimizer=MOMENT_BYTES * trained / GIB,
        activations=(alive * (layer + scores) + inputs) / GIB,
        head=LOGIT_BYTES * tokens * shape.vocab / GIB,
        context=RUNTIME_GIB,
        fragmentation=0.0,
        band=MEMORY_BAND,
    )


def smallest_mac(memory: MemoryEstimate, surely: bool = True) -> int | None:
    """GB of the smallest common Mac that has so much for its GPU; None: no common one has."""
    need = memory.high if surely else memory.total
    return next((size for size in MEMORY_GB if need <= WIRED * size), None)


def recomputes(experiment: Experiment) -> bool:
    """Whether layers are computed again in the backward pass, as scripts/train_mlx.py does where it can."""
    lora = experiment.train.lora or Lora()
    return bool(experiment.train.sft.get("gradient_checkpointing", not lora.dropout))


def _weight_bytes(shape: ModelShape, bits: int) -> float:
    """Bytes of the decoder's weights."""
    return (shape.parameters - shape.other_linear) * (bits if bits >= 16 else bits + GROUP_BITS) / 8


def _flop(experiment: Experiment, shape: ModelShape, length: float) -> float:
    """FLOP of one token: forward through everything, gradients of activations through the layers that learn.

    Frozen weights have no gradients of their own. An attended pair counts half, as in `cost.py`.
    """
    learning = learning_layers(experiment, shape)
    layer = 2.0 * (shape.attention + shape.mlp_matrices * shape.hidden * shape.active_intermediate)
    layer += 2 * length * shape.query
    passes = shape.layers + learning * (2 if recomputes(experiment) else 1)
    return layer * passes + 4 * shape.vocab * shape.hidden


def _kept_bytes(shape: ModelShape, targets: tuple[str, ...] | None) -> float:
    """Bytes that one token leaves in one layer for the backward pass: as in `memory.py`, and fp32 copies for LoRA."""
    h, i, attention = shape.hidden, shape.active_intermediate, shape.query + shape.key_value
    per_token = 6 * i + 8 * h + 4 * attention
    per_token += (4 * attention if shape.qk_norm else 0) + (8 * h if shape.post_norm else 0)
    return per_token + 4 * shape.lora_inputs(targets)
