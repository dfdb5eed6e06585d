"""The longest rows that train under a memory cap: predicted by the closed form, or found on a GPU by trainings.

    python benchmarks/longest_context.py

Predicted is the longest `max_length` whose estimated need is within the cap, without the band of the estimate, so that
both sides are treated alike. The SOP's script is counted twice: on the stack of its day, whose loss wrote out all
logits, and repaired on ours, where its unset `dtype` leaves everything beside the 4-bit weights in fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.attention import FLASH
from pipeline.fit import LONGEST
from pipeline.flavors import A10G, A100
from pipeline.memory import CUDA_CONTEXT_GIB, EXPANDABLE, Loss, MemorySpec, estimate_need
from pipeline.models import ATTENTION, CATALOGUE, ModelShape

CAPS = {"22 GiB (A10G)": A10G, "79 GiB (A100)": A100}
STEP = 1024  # tokens; nobody chooses a length more finely
OURS = MemorySpec(seq=STEP, rank=64, targets=ATTENTION, dropout=True, attention=FLASH, flat=True)
# transformers 4.45 upcast everything beside the 4-bit weights as peft's preparation told it to.
IN_ITS_DAY = replace(OURS, attention="sdpa", flat=False, loss=Loss.LOGITS, logit_bytes=12, adapter_bytes=4)
REPAIRED = replace(OURS, attention="sdpa", flat=False, other_bytes=4)
SPECS = {"the SOP's script in its day": IN_ITS_DAY, "the SOP's script, repaired": REPAIRED, "ours": OURS}
SPECS["ours, `activation_offloading: true`"] = replace(OURS, offload=True)


def predicted(shapes: dict[str, ModelShape]) -> str:
    """A table of the longest rows by the closed form."""
    lines = ["| model | contender | " + " | ".join(f"longest rows, {cap}, **predicted**" for cap in CAPS) + " |"]
    lines.append("|---|---|" + "--:|" * len(CAPS))
    for name, shape in shapes.items():
        found = {who: [longest(_need(spec, shape), cap) for cap in CAPS.values()] for who, spec in SPECS.items()}
        lines += [f"| {name} | {row} |" for row in _rows(found)]
    return "\n".join(lines)


def measured(name: str, contenders: Sequence[str], peak: Callable[[str, int], float]) -> str:
    """Rows of such a table, found by trainings: `peak` trains a contender at a length and tells what it allocated."""

    def need(who: str) -> Callable[[int], float]:
        known: dict[int, float] = {}

        def at(length: int) -> float:
            known[length] = known.get(length) or peak(who, length) * (1 + EXPANDABLE) + CUDA_CONTEXT_GIB
            return known[length]

        return at

    needs = {who: need(who) for who in contenders}
    found = {who: [longest(needs[who], cap) for cap in CAPS.values()] for who in contenders}
    return "\n".join(f"| {name} | {row}, measured |" for row in _rows(found))


def longest(need: Callable[[int], float], cap_gib: float) -> int:
    """The most tokens, in steps of `STEP`, whose need is within the cap; 0 when none is. More never needs less."""
    low, high = 0, 1
    while high * STEP < LONGEST and need(high * STEP) <= cap_gib:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle * STEP) <= cap_gib else (low, middle)
    return low * STEP


def _need(spec: MemorySpec, shape: ModelShape) -> Callable[[int], float]:
    return lambda length: estimate_need(replace(spec, seq=length), shape).total


def _rows(found: dict[str, list[int]]) -> list[str]:
    """Contender and lengths, with what each is against the first."""
    first = next(iter(found.values()))

    def cell(length: int, before: int) -> str:
        return f"{length:,} ({length / before:.1f}x)" if before else f"{length:,}"

    return [" | ".join([who, *map(cell, lengths, first)]) for who, lengths in found.items()]


if __name__ == "__main__":
    names = ("meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-12b-it", "Qwen/Qwen3-14B")
    print(predicted({name: CATALOGUE[name] for name in names}))
