"""Peak memory of training from a model's shape. A first closed form: use it within its stated band.

Terms and coefficients were fitted on allocation traces of the pinned stack (TRL 1.16, transformers 5.23,
bitsandbytes 0.50) with gradient checkpointing and the fused output head that this TRL always installs.
"""

from dataclasses import dataclass

from pipeline.experiment import Experiment, Lora, Method
from pipeline.flavors import Flavor
from pipeline.models import ModelShape

GIB = 2**30
BAND = 0.20  # What the estimate may be off by, each way, until it is calibrated per family.
# NF4 with double quantisation: half a byte, one 8-bit absmax per 64 weights, one fp32 per 256 absmax values.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
HEAD_TILE_BYTES = 64 * 1024  # per token of a 4,096-token chunk: 32,768 logits in bf16
CUDA_CONTEXT_GIB = 0.55
FRAGMENTATION = 1.03  # with expandable segments


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on one device, by part; `low` and `high` are the band around `total`."""

    weights: float
    adapter: float
    optimizer: float
    activations: float
    head: float
    context: float
    band: float = BAND

    @property
    def total(self) -> float:
        """Sum of the parts, with allocator overhead."""
        parts = self.weights + self.adapter + self.optimizer + self.activations + self.head
        return parts * FRAGMENTATION + self.context

    @property
    def low(self) -> float:
        """Lower end of the band."""
        return self.total * (1 - self.band)

    @property
    def high(self) -> float:
        """Upper end of the band."""
        return self.total * (1 + self.band)

    def fits(self, flavor: Flavor) -> bool | None:
        """True or False when the whole band says so, None when capacity lies inside it."""
        if self.high <= flavor.vram_gib:
            return True
        return False if self.low > flavor.vram_gib else None


def estimate_memory(experiment: Experiment, shape: ModelShape) -> MemoryEstimate:
    """Predicted peak allocation of the train stage on one GPU, in GiB."""
    train = experiment.train
    tokens = train.max_length * train.batch_size
    lora = train.lora or Lora()
    full = train.method is Method.FULL
    targets = None if isinstance(lora.targets, str) else tuple(lora.targets)
    trained = shape.parameters if full else shape.lora_parameters(lora.r, targets)
    # A 4-bit base trains bf16 adapters with 8-bit moments; a bf16 base keeps fp32 adapters (PEFT) and full moments.
    weight_bytes, moment_bytes = (2, 2.03) if train.method is Method.QLORA else (4, 8)
    adapter = 2 * trained if full else 2 * weight_bytes * trained
    return MemoryEstimate(
        weights=_weights(shape, train.method) / GIB,
        adapter=adapter / GIB,
        optimizer=(4 if full else moment_bytes) * trained / GIB,
        activations=_activations(shape, tokens) / GIB,
        head=(min(tokens, 4096) * HEAD_TILE_BYTES + 13 * shape.hidden * tokens) / GIB,
        context=CUDA_CONTEXT_GIB,
    )


def _weights(shape: ModelShape, method: Method) -> float:
    """Bytes of the base: bf16, or NF4 for linear layers (mixture-of-experts weights are not quantised)."""
    if method is not Method.QLORA or shape.experts:
        return 2 * shape.parameters
    return NF4_BYTES * shape.linear + 2 * (shape.parameters - shape.linear)


def _activations(shape: ModelShape, tokens: int) -> float:
    """Bytes: one checkpoint of the residual stream per layer, one layer recomputed, one weight dequantised."""
    saved = shape.layers * tokens * shape.hidden * 2
    if shape.model_type.startswith(("qwen3", "gemma3", "gemma4")):
        layer = tokens * (16.5 * shape.intermediate + 4 * shape.hidden + 8 * shape.query)
    else:
        layer = tokens * (9.2 * shape.intermediate + 6 * shape.hidden + 18 * shape.query)
    return saved + layer + 2 * shape.hidden * shape.intermediate * 1.03
