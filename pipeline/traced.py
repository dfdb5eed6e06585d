"""What a trace of one training step found: the bytes of its peak, by part. Traces nothing; `pipeline.trace` does."""

from dataclasses import dataclass
from typing import Any

from pipeline.flavors import Flavor


@dataclass(frozen=True)
class TracedMemory:
    """GiB on one device at the peak of a step; `phase` says where in it. The parts add up to `allocated`.

    `allocated` is what `torch.cuda.max_memory_allocated` would report. `scratch` is one layer's backward pass.
    """

    allocated: float
    weights: float
    adapter: float  # trained parameters beside the base, and all gradients
    optimizer: float
    activations: float
    head: float
    scratch: float
    phase: str
    layers: int
    traced_layers: tuple[int, ...]  # of each trace; the others follow from the straight line through them
    fragmentation: float
    context: float

    @property
    def total(self) -> float:
        """What the device must have: allocated, fragmentation, context."""
        return self.allocated * (1 + self.fragmentation) + self.context

    def fits(self, flavor: Flavor) -> bool:
        """Whether one GPU of the flavor has that. A trace has no band: it counts what is allocated."""
        return self.total <= flavor.vram_gib

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, in GiB."""
        parts = ("weights", "adapter", "optimizer", "activations", "head", "scratch")
        return {
            "allocated_gib": round(self.allocated, 2),
            "memory_gib": round(self.total, 2),
            "parts": {part: round(getattr(self, part), 3) for part in parts},
            "phase": self.phase,
            "layers": self.layers,
            "traced_layers": list(self.traced_layers),
        }
