"""Peak GPU memory of training, from a model's shape alone. Measures nothing and loads nothing.

Predicted is what the device must have: the peak that `torch.cuda.max_memory_allocated` reports, plus what the
allocator loses to fragmentation, plus the CUDA context. It is not what `nvidia-smi` shows: that includes freed blocks
the allocator keeps, which it gives back before it runs out.

    peak = weights + adapter, gradients, optimizer + checkpoints + max(output head, one layer's backward)

Coefficients in bytes per token were read off allocation traces of transformers 5.23, PEFT 0.21, bitsandbytes 0.50 and
TRL 1.16, and checked against published measurements: `benchmarks/memory.py` prints the errors.
"""

from dataclasses import dataclass
from enum import StrEnum

from pipeline.attention import FLASH, attention_of
from pipeline.experiment import Experiment, Method
from pipeline.fields import rows_at_once
from pipeline.flavors import FLAVORS, Flavor
from pipeline.models import MLP, ModelShape
from pipeline.train_sections import Lora

GIB = 2**30
BAND = 0.10  # Each way: 26 of the 27 well-specified measurements of benchmarks/memory.py lie inside it
CUDA_CONTEXT_GIB = 0.55  # nvidia-smi minus torch's reserved memory, CUDA 12 on A100: context, cuBLAS workspaces
EXPANDABLE, DEFAULT_ALLOCATOR = 0.03, 0.11  # lost to fragmentation; our script sets expandable segments
# NF4: half a byte, an absmax per 64 weights: fp32, or (double quantisation) 8 bits and one fp32 per 256 of those.
LINEAR_BYTES = {"nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256), "nf4": 0.5 + 4 / 64, "int8": 1.0, "bf16": 2.0}
LINEAR_BYTES["gptq"] = 0.5 + 2 / 128 + 0.5 / 128  # groups of 128: an fp16 scale and a 4-bit zero
# Optimizer state per trained parameter, from the optimizers' own state: two 8-bit moments with an fp32 absmax per 256
# values; two fp32 moments; paged ones live in host memory. torch's AdamW keeps moments in the parameter's own type.
STATE_BYTES = {"adamw_8bit": 2.03, "adamw_bnb_8bit": 2.03, "ademamix_8bit": 3.05, "lion_8bit": 1.02}
STATE_BYTES |= {"rmsprop_bnb_8bit": 1.02, "adafactor": 0.02, "sgd": 0.0, "lion_32bit": 4.0, "adamw_fp32": 8.0}
MOMENTS_OF_PARAMETER = ("adamw_torch", "adamw_torch_fused")
HEAD_CHUNK = 4096  # tokens; TRL 1.16 trl/kernels/chunked_logprob.py, times 32,768 logits of its vocabulary tile
HEAD_TILE = 32_768
CHUNK_OF_256 = 14 * 256  # bytes per vocabulary entry of the chunked loss of TRL 1.4 to 1.9


class Loss(StrEnum):
    """How the output head and its loss are computed."""

    FUSED = "fused"  # TRL 1.16: tiles of the vocabulary, no logits
    CHUNKED = "chunked"  # TRL 1.4 to 1.9: 256 tokens at a time
    LIGER = "liger"  # fused linear cross-entropy: chunks of the tokens
    LOGITS = "logits"  # all logits at once: label smoothing, a custom loss, older TRL


@dataclass(frozen=True)
class MemorySpec:
    """One training configuration, as far as memory is concerned. The defaults are our script's for QLoRA."""

    seq: int
    micro_batch: int = 1
    method: Method = Method.QLORA
    linear: str = "nf4-dq"  # a key of LINEAR_BYTES
    rank: int = 16
    targets: tuple[str, ...] | None = None  # None: every linear layer
    adapter_bytes: int = 2  # TRL casts adapters on a 4-bit base to bf16; on a bf16 base PEFT keeps them in fp32
    optimizer: str = "adamw_8bit"
    checkpointing: bool = True
    offload: bool = False  # activations wait in host memory
    attention: str = "sdpa"  # sdpa, eager, or a flash kernel
    padded: bool = False  # rows of different lengths in one batch: sdpa gets a mask
    flat: bool = False  # packed, or end to end without padding: one sequence, and sdpa gets a mask as large
    loss: Loss = Loss.FUSED
    logit_bytes: float = 12  # of full logits alive at once: log-softmax, its gradient, the gradient of the pick
    other_bytes: int = 2  # of embeddings, norms, head and the residual stream: 4 when `dtype` is left unset
    dropout: bool = False
    dora: bool = False
    whole: tuple[str, ...] = ()  # `modules_to_save`
    quantised_experts: bool = False  # before transformers 5 experts were linear layers
    gpus: int = 1  # data parallel: every GPU holds everything, and DDP a second copy of the gradients
    expandable: bool = True
    autocast: bool = True  # the Trainer's `bf16: true`

    @property
    def tokens(self) -> int:
        """In one forward pass."""
        return self.seq * self.micro_batch

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attention writes a number for, where it does."""
        return self.tokens**2 if self.flat else self.seq * self.tokens

    @property
    def casts(self) -> bool:
        """Adapters are wider than the residual stream that enters them."""
        return self.method is not Method.FULL and self.adapter_bytes > self.other_bytes

    @property
    def on_mlp(self) -> bool:
        """The weights of the MLP, or adapters on it, learn: its inputs must be kept."""
        return self.targets is None or any(name in self.targets for name in (*MLP, "gate_up_proj"))


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on one device, by part; `low` and `high` are the band around `total`.

    `activations` are those alive at the peak. `head` is zero when the peak is in a layer's backward pass.
    """

    weights: float
    adapter: float  # trained parameters beside the base, and all gradients
    optimizer: float
    activations: float
    head: float
    context: float
    fragmentation: float = EXPANDABLE
    band: float = BAND

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` reports."""
        return self.weights + self.adapter + self.optimizer + self.activations + self.head

    @property
    def total(self) -> float:
        """What the device must have: allocated, fragmentation, context."""
        return self.allocated * (1 + self.fragmentation) + self.context

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


def estimate_need(spec: MemorySpec, shape: ModelShape) -> MemoryEstimate:
    """Predicted need of one GPU that holds all of the model, in GiB; pipeline/parallel.py knows those that do not."""
    kept, layer, head = _checkpoints(spec, shape), _layer(spec, shape), _head(spec, shape)
    weights, trained, state = _weights(spec, shape), _trained(spec, shape), _state(spec, shape)
    return MemoryEstimate(
        weights=weights / GIB,
        adapter=trained / GIB,
        optimizer=state / GIB,
        activations=(kept if head > layer else kept + layer) / GIB,
        head=(head if head > layer else 0) / GIB,
        context=CUDA_CONTEXT_GIB,
        fragmentation=EXPANDABLE if spec.expandable else DEFAULT_ALLOCATOR,
    )


def spec_of(experiment: Experiment, shape: ModelShape, flavor: Flavor | None = None) -> MemorySpec:
    """What an experiment says about memory, on a flavor; the defaults are those of scripts/train_sft.py."""
    train, sft = experiment.train, experiment.train.sft
    lora, qlora = train.lora or Lora(), train.quantised
    flavor, rows = flavor or FLAVORS.get(train.flavor), rows_at_once(train.batch_size)
    attention = attention_of(train, shape, flavor)
    flat = train.packing or (rows > 1 and (sft.get("padding_free") is True or attention == FLASH))
    full_logits = bool(sft.get("label_smoothing_factor")) and not train.is_dpo
    return MemorySpec(
        seq=train.max_length,
        micro_batch=rows * (2 if train.is_dpo else 1),  # chosen and rejected in one pass
        method=train.method,
        linear="nf4-dq" if qlora else "bf16",
        rank=max([lora.r, *lora.rank_pattern.values()]),
        targets=None if isinstance(lora.targets, str) or train.method is Method.FULL else tuple(lora.targets),
        adapter_bytes=2 if qlora else 4,
        optimizer=str(sft.get("optim", "adamw_8bit" if qlora else "adamw_torch_fused")),
        checkpointing=sft.get("gradient_checkpointing") is not False,
        offload=sft.get("activation_offloading") is True,
        attention=attention,
        padded=train.is_dpo or (rows > 1 and not flat),
        flat=flat and not train.is_dpo,
        loss=Loss.LOGITS if full_logits else Loss.FUSED,
        dropout=lora.dropout > 0 and (not train.is_dpo or sft.get("disable_dropout") is False),
        dora=lora.dora,
        whole=tuple(lora.modules_to_save) if train.method is not Method.FULL else (),
        gpus=flavor.gpus * train.nodes if flavor else 1,
    )


def _weights(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes of the base. A vision tower's linear layers are quantised too; the output head never is."""
    experts = 0 if spec.quantised_experts else shape.expert_linear
    linear = shape.linear - experts
    rest = shape.parameters - shape.linear
    return LINEAR_BYTES[spec.linear] * linear + 2 * experts + spec.other_bytes * rest


def _trained(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes of what is trained beside the base, of all gradients, and of the buckets that add them up across GPUs."""
    buckets = 1 if spec.gpus > 1 else 0
    if spec.method is Method.FULL:
        return (1 + buckets) * spec.other_bytes * shape.parameters
    adapter = spec.adapter_bytes * shape.lora_parameters(spec.rank, spec.targets)
    return (2 + buckets) * (adapter + spec.other_bytes * _whole(spec, shape))


def _whole(spec: MemorySpec, shape: ModelShape) -> int:
    """Parameters of the embeddings or head that are trained whole."""
    return shape.vocab * shape.hidden * sum(name.endswith(("embed_tokens", "lm_head")) for name in spec.whole)


def _state(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes of optimizer state on the GPU."""
    full = spec.method is Method.FULL
    count = shape.parameters if full else shape.lora_parameters(spec.rank, spec.targets)
    if spec.optimizer.startswith("paged"):
        return 0.0
    if spec.optimizer in MOMENTS_OF_PARAMETER:
        sizes = (spec.other_bytes if full else spec.adapter_bytes, spec.other_bytes)
        return 2 * (sizes[0] * count + sizes[1] * _whole(spec, shape))
    return STATE_BYTES.get(spec.optimizer, 8.0) * (count + _whole(spec, shape))


def _checkpoints(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes kept from the forward pass: the residual stream per layer, or without checkpointing all of its inputs."""
    if spec.offload:
        return 2 * spec.tokens * shape.hidden * spec.other_bytes
    if spec.checkpointing:
        return shape.layers * spec.tokens * shape.hidden * spec.other_bytes
    h, i, attention = shape.hidden, shape.active_intermediate, shape.query + shape.key_value
    # Gate, its activation, up; both norms in fp32; queries, keys, values and what attention makes of them.
    per_token = 6 * i + 8 * h + 4 * attention
    per_token += (4 * attention if shape.qk_norm else 0) + (8 * h if shape.post_norm else 0)
    per_token += 4 * h if spec.method is Method.FULL else 0  # the norms learn
    if spec.casts:  # each adapter keeps a copy of its own of what enters it
        per_token += (2 if spec.autocast else 4) * shape.lora_inputs(spec.targets)
    else:
        per_token += 2 * h + (2 * h + 2 * i if spec.on_mlp else 0)
    scores = 6 * shape.head_count * spec.pairs if spec.attention == "eager" else 0
    return shape.layers * (spec.tokens * (per_token + _dropout(spec, shape)) * _wider(spec) + scores)


def _layer(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes of one layer's backward pass: recomputed activations, their gradients, one weight dequantised.

    The peak is where the gated product is differentiated: gate, its activation, up, and the gradients of all three,
    2 bytes each. Gemma 3 normalises behind the MLP too, in fp32: there the peak comes before the product.
    """
    h, i, q, kv = shape.hidden, shape.active_intermediate, shape.query, shape.key_value
    if shape.post_norm:
        per_token = 8 * i + 42 * h + 8 * (q + kv) if spec.on_mlp else 8.4 * i + 37 * h + 5.4 * (q + kv)
    else:
        per_token = 12 * i + (16 if spec.on_mlp else 12) * h + (8 if shape.qk_norm else 4) * (q + kv)
    per_token += 4 * h if spec.method is Method.FULL else 0
    if spec.casts:  # what enters the adapters is cast, and kept, once more for each
        per_token += 2 * i + 12 * h + 2 * q if spec.on_mlp else 4 * h + 2 * q
    if _masked(spec, shape):  # sdpa cannot share key/value heads under a mask: it repeats them
        per_token += 4 * (q - kv)
    if not spec.checkpointing:  # what the layer keeps is counted with the others: gradients remain, or the last norm's
        per_token = max(6 * i + 8 * h, 26 * h)
    per_token = (per_token + _dropout(spec, shape)) * _wider(spec)
    largest = h * (i if not shape.experts else max(q, shape.intermediate))
    scratch = 0.0 if spec.linear == "bf16" else 2 * largest * 1.03 * (3 if spec.other_bytes == 4 else 1)
    if spec.dora:  # the norm of weight plus update, in fp32
        scratch += 8 * largest
    # A weight is dequantised before the gradients of its inputs exist: the two do not meet.
    inside = max(per_token * spec.tokens, (per_token - 4 * i) * spec.tokens + scratch)
    return inside + _scores(spec, shape)


def _dropout(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes per token of each adapter's dropped input and its mask of booleans; recomputed, `down_proj`'s is gone."""
    return 3.0 * shape.lora_inputs(spec.targets, down=not spec.checkpointing) if spec.dropout else 0.0


def _wider(spec: MemorySpec) -> float:
    """An fp32 residual stream makes a layer this much larger; its matrices still compute in bf16."""
    return 1.7 if spec.other_bytes == 4 else 1.0


def _masked(spec: MemorySpec, shape: ModelShape) -> bool:
    """sdpa gets a mask: several rows in a batch, padded or end to end, or a window shorter than the row."""
    return spec.attention == "sdpa" and (spec.padded or spec.flat or 0 < shape.window <= spec.seq)


def _scores(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes that grow with the square of the length: eager scores in bf16 and fp32 with gradients, or sdpa's mask."""
    if spec.attention == "eager":
        return 10.0 * shape.head_count * spec.pairs
    return 4.0 * spec.pairs if _masked(spec, shape) else 0.0


def _head(spec: MemorySpec, shape: ModelShape) -> float:
    """Bytes of the output head, its loss and the gradient of both."""
    tokens, vocab, h = spec.tokens, shape.vocab, shape.hidden
    learns = spec.method is Method.FULL or bool(spec.whole)
    match spec.loss:
        case Loss.FUSED:  # one bf16 tile of logits, an fp32 gradient of the hidden states (and of the weight)
            size = 2 * min(tokens, HEAD_CHUNK) * min(HEAD_TILE, vocab) + 13 * h * tokens
            return size + (4 * vocab * h if learns else 0)
        case Loss.CHUNKED:
            return CHUNK_OF_256 * vocab + 13 * h * tokens
        case Loss.LIGER:  # as many tokens at a time as make a chunk of logits the size of the hidden states
            return 8 * h * tokens + 6 * h * tokens
        case Loss.LOGITS:
            return tokens * (spec.logit_bytes * vocab + 6 * h)
