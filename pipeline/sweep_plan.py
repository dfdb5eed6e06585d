"""Memory, time and cost of a sweep's variants, one by one and together. Pure: arithmetic over the estimates of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cost import estimate_train_seconds
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.flavors import CONTAINER_START_S, Flavor
from pipeline.memory import MemoryEstimate
from pipeline.models import ModelShape
from pipeline.parallel import Parallel, estimate_memory, parallel_of
from pipeline.settled import Settled, settle
from pipeline.variants import variants_of

# A variant has a process of its own, with memory as on a fresh machine: it imports the libraries again, and reads the
# base from the job's own disk.
IMPORT_S, READ_BYTES_PER_S = 40.0, 500e6


@dataclass(frozen=True)
class VariantEstimate:
    """One variant of a sweep: what differs, its need, its seconds from start to end and their share of the price."""

    number: int
    words: str
    settled: Settled  # for the GPU of its flavor
    memory: MemoryEstimate | None = None
    seconds: float | None = None
    usd: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        memory = self.memory and round(self.memory.total, 2)
        cost = {"expected_s": self.seconds, "expected_usd": self.usd}
        return {"variant": self.number, "differs": self.words, "memory_gib": memory, **cost}


def estimate_variants(experiment: Experiment, facts: Facts, flavor: Flavor) -> tuple[VariantEstimate, ...]:
    """Every variant of an experiment on a flavor."""
    shape, data, found = facts.shape, facts.dataset, []
    for variant in variants_of(experiment):
        settled = settle(variant.experiment, shape, flavor)
        carried_out = settled.of(variant.experiment)
        memory = estimate_memory(carried_out, shape, flavor) if shape else None
        seconds = usd = None
        if shape and data:
            lanes = parallel_of(experiment, shape, flavor).lanes
            seconds = estimate_train_seconds(carried_out, shape, data, flavor, facts.finished)
            seconds += IMPORT_S + 2 * shape.parameters / READ_BYTES_PER_S
            usd = float(seconds / 60 * flavor.usd_per_minute) / lanes
        found.append(VariantEstimate(variant.number, variant.words, settled, memory, seconds, usd))
    return tuple(found)


def sweep_seconds(variants: Sequence[VariantEstimate], lanes: int) -> float | None:
    """How long they take, each begun in its turn on the first lane that is free; None when one is unknown."""
    ends = [0.0] * lanes
    for variant in variants:
        if variant.seconds is None:
            return None
        first = ends.index(min(ends))
        ends[first] += variant.seconds
    return max(ends)


def affordable_seconds(usd: float, flavor: Flavor) -> float:
    """How long a job may work after its start for so many dollars; a flavor without a price works for ever."""
    price = float(flavor.usd_per_minute)
    return max(0.0, usd / price * 60 - CONTAINER_START_S) if price else float("inf")


def heaviest(experiment: Experiment, shape: ModelShape | None, flavor: Flavor | None = None) -> Experiment:
    """The variant that needs the most memory: where it fits, all do. The experiment itself without a sweep.

    As they are carried out on a flavor, where one that keeps all layers may need more than a larger one that does not;
    without a flavor, of the least that each can do with.
    """
    variants = [variant.experiment for variant in variants_of(experiment)] or [experiment]
    if shape is None or len(variants) == 1:
        return variants[0]

    def need(one: Experiment) -> float:
        carried_out = settle(one, shape, flavor).of(one) if flavor else one
        return estimate_memory(carried_out, shape, flavor).total

    return max(variants, key=need)


def shares(experiment: Experiment, shape: ModelShape | None, processes: int) -> list[dict[str, Any]]:
    """How the variants share `processes` GPUs, one after the other: what differs by method differs here too."""
    shared = [parallel_of(variant.experiment, shape) for variant in variants_of(experiment)]
    return [Parallel(processes, one.sharing).request() for one in shared]
