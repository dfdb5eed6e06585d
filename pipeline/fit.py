"""Which hardware a training fits, and how long its rows may be. Decides from shapes and prices; measures nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.experiment import Experiment
from pipeline.flavors import FLAVORS, Flavor, gpu_flavors
from pipeline.memory import MemoryEstimate, MemorySpec, estimate_need, spec_of
from pipeline.models import ModelShape
from pipeline.parallel import ALONE, Parallel, estimate_memory, need_of, parallel_of

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
STEP, LONGEST = 64, 1_048_576  # tokens: a hint is a round number, and no row may be longer than the schema allows


@dataclass(frozen=True)
class Fit:
    """One flavor with the needs of every length in a table, and the longest rows that surely fit."""

    flavor: Flavor
    needs: tuple[tuple[int, MemoryEstimate], ...]  # by `max_length`
    largest: int | None  # None: not even the shortest

    def verdict(self, length: int) -> bool | None:
        """True or False when the whole band says so, None when capacity lies inside it."""
        return dict(self.needs)[length].fits(self.flavor)


def fit_table(
    spec: Callable[[Flavor], MemorySpec], shape: ModelShape, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Fit, ...]:
    """Every single-GPU flavor, cheapest first, with what training needs at each length."""
    return tuple(_fit(replace(spec(flavor), gpus=1), shape, flavor, lengths) for flavor in gpu_flavors())


def largest_max_length(experiment: Experiment, shape: ModelShape, flavor: Flavor) -> int | None:
    """The largest `max_length` with which this experiment surely fits the flavor; None when none does."""
    return _largest(spec_of(experiment, shape, flavor), shape, flavor, parallel_of(experiment, shape, flavor))


def cheapest_flavor(experiment: Experiment, shape: ModelShape) -> Flavor | None:
    """The cheapest single-GPU flavor that this experiment surely fits; else the cheapest with several; or None."""
    for flavor in gpu_flavors():
        if estimate_need(replace(spec_of(experiment, shape, flavor), gpus=1), shape).fits(flavor):
            return flavor
    batches, nodes, one_only = experiment.train.gradient_accumulation, experiment.train.nodes, experiment.train.is_dpo
    several = [f for f in FLAVORS.values() if f.gpus > 1 and batches % (f.gpus * nodes) == 0 and not one_only]
    fitting = [f for f in several if estimate_memory(experiment, shape, f).fits(f)]
    return min(fitting, key=lambda flavor: flavor.usd_per_hour, default=None)


def _fit(spec: MemorySpec, shape: ModelShape, flavor: Flavor, lengths: tuple[int, ...]) -> Fit:
    needs = tuple((length, estimate_need(replace(spec, seq=length), shape)) for length in lengths)
    return Fit(flavor, needs, _largest(spec, shape, flavor, ALONE))


def _largest(spec: MemorySpec, shape: ModelShape, flavor: Flavor, parallel: Parallel) -> int | None:
    """Search by halves: more tokens never need less."""
    low, high = 0, LONGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if need_of(replace(spec, seq=middle * STEP), shape, parallel).fits(flavor):
            low = middle
        else:
            high = middle - 1
    return low * STEP or None
