"""How attention is computed: by a flash kernel where rows share a batch and the GPU has one. Loads nothing.

No choice here lets a row read its neighbour: a flash kernel is told where each row begins, and without one
transformers makes a mask of the same, as large as the square of the batch.
"""

from pipeline.experiment import Backend, Train
from pipeline.fields import rows_at_once
from pipeline.flavors import Flavor
from pipeline.models import ModelShape

# Built for Ampere and later, and fetched from the Hub by the `kernels` package; nothing is compiled on the machine.
FLASH = "kernels-community/flash-attn2"
# Families whose heads the kernel can hold (256 at most) and whose attention has no other parts.
FLASH_FAMILIES = ("gemma3", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def said_attention(train: Train) -> str:
    """The `attn_implementation` that the file writes; empty when it writes none."""
    loading = train.sft.get("model_init_kwargs")
    return str(loading.get("attn_implementation") or "") if isinstance(loading, dict) else ""


def attention_of(train: Train, shape: ModelShape, flavor: Flavor | None) -> str:
    """What computes attention on a flavor: what the file says, a flash kernel, or what PyTorch has.

    A row alone in its batch gains nothing from the kernel, and need not wait for its download. Pairs of answers are
    padded: TRL 1.16's DPOTrainer turns its `padding_free` off.
    """
    if said := said_attention(train):
        return said
    ours = train.script is None and train.backend is Backend.TORCH and not train.is_dpo
    shared = train.packing or rows_at_once(train.batch_size) > 1
    if ours and shared and flavor is not None and flavor.has_flash and shape.model_type in FLASH_FAMILIES:
        return FLASH
    return own_attention(shape)


def own_attention(shape: ModelShape) -> str:
    """What PyTorch and transformers have for a base by themselves."""
    return "eager" if shape.refuses_sdpa else "sdpa"
