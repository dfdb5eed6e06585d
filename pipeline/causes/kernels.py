"""Causes of failure in how training computes: attention, checkpointing, compiled kernels."""

from pipeline.causes.cause import Cause, Weight

STRONG = Weight.STRONG
CAUSES = (
    Cause(
        "attention-kernel",
        "the chosen attention cannot be used here",
        (
            "FlashAttention2 has been toggled on, but it cannot be used",
            "FlashAttention3 has been toggled on, but it cannot be used",
            "the package flash_attn seems to be not installed",
            "the package for FlashAttention",
            "FlashAttention only supports Ampere GPUs or newer",
            "FlashAttention only support fp16 and bf16 data type",
            "FlashAttention only supports ",
            "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention",
            "does not support Flash Attention 2.0",
            "Flash Attention 2 is not available",
            "Kernels are not available",
            "No operator found for `memory_efficient_attention",
            "xFormers can't load C++/CUDA extensions",
            "flash_attn_2_cuda",
            "requires `flash_attn` to be installed",
            "Flash attention backward",
        ),
        "`train.sft.model_init_kwargs: {attn_implementation: sdpa}` (`eager` for Gemma 2)",
        rule="TRN015",
        weight=STRONG,
    ),
    Cause(
        "packing-attention",
        "packed or padding-free rows need a flash-attention kernel",
        (
            "When `padding_free=True` without packing",
            "Padding-free training is enabled, but the attention implementation is not set to",
            "passing `max_length` is not supported",
            "padding_free*is only supported with",
        ),
        "`train.packing: false`",
        rule="TRN014",
    ),
    Cause(
        "checkpointing",
        "gradient checkpointing and this model or these settings do not go together",
        (
            "Recomputed values for the following tensors have different metadata",
            "A different number of tensors was saved during the original forward and recomputation",
            "does not support gradient checkpointing",
            "Trying to backward through the graph a second time",
        ),
        "`train.sft: {gradient_checkpointing_kwargs: {use_reentrant: false}}`, or `{gradient_checkpointing: false}`",
        weight=STRONG,
    ),
    Cause(
        "in-place",
        "an operation overwrites a tensor that the gradient still needs",
        (
            "is being used in an in-place operation",
            "has been modified by an inplace operation",
            "is being modified inplace",
            "Inplace update to inference tensor",
        ),
        "`train.sft: {gradient_checkpointing_kwargs: {use_reentrant: false}}`, and the versions that the scripts pin",
        weight=STRONG,
    ),
    Cause(
        "compile-failed",
        "torch.compile or a kernel of Triton could not be built",
        (
            "BackendCompilerFailed",
            "triton.compiler.errors.",
            "triton.runtime.errors.",
            "torch._inductor.exc.",
            "torch._dynamo.exc.",
            "PassManager::run failed",
        ),
        "`train.sft: {torch_compile: false}`, no custom kernels, or a newer GPU",
    ),
)
