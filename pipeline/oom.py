"""What an out-of-memory message tells: how much the GPU would have had to hold, and for which tensors. Pure."""

import re
from collections.abc import Sequence

UNITS = {"GiB": 1.0, "MiB": 1 / 1024, "KiB": 1 / 1024**2}
AMOUNT = r"(\d{1,7}(?:\.\d{1,4})?) ([GMK]iB)"
TRIED = re.compile(rf"Tried to allocate {AMOUNT}")
# torch 2.1 and later; before, what torch itself had reserved.
IN_USE = re.compile(rf"this process has {AMOUNT} memory in use|{AMOUNT} reserved in total by PyTorch")
# What stands in the innermost frames when these tensors are made.
PARTS = (
    ("the logits", ("logits", "lm_head", "cross_entropy", "loss_utils", "log_softmax", "chunked_logprob")),
    ("the optimizer's state", ("torch/optim/", "bitsandbytes/optim", "optimizer.step(")),
    ("the attention's scores", ("eager_attention_forward", "attn_weights", "scaled_dot_product_attention")),
    ("the base's weights", ("core_model_loading", "from_pretrained(", "_load_state_dict", "caching_allocator_warmup")),
    ("the gradients", ("backward(", "_engine_run_backward")),
    ("the activations", ("modeling_", "forward(", "peft/tuners")),
)
INNERMOST = 24  # frame lines


def part_of(frames: Sequence[str]) -> str:
    """The tensors that did not fit, by the frames of the traceback, innermost last; empty when they do not tell."""
    for line in reversed(frames[-INNERMOST:]):
        for part, words in PARTS:
            if any(word in line for word in words):
                return part
    return ""


def needed_gib(message: str) -> float | None:
    """What was in use plus what was asked for, GiB; None when the message does not say."""
    tried, used = TRIED.search(message), IN_USE.search(message)
    if not tried or not used:
        return None
    amount, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
    return float(tried[1]) * UNITS[tried[2]] + float(amount) * UNITS[unit]
