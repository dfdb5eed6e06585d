"""Ways out of a full GPU: shorter rows, fewer at once, a larger one. The estimates, corrected by what happened. Pure.

A failure shows that what grows with the tokens was larger than predicted: that part is scaled until the prediction
agrees with the message. Where the estimator had been sure that it fits, rows are at least halved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.experiment import Experiment
from pipeline.fields import rows_at_once
from pipeline.fit import STEP
from pipeline.flavors import Flavor, gpu_flavors
from pipeline.memory import BAND
from pipeline.models import ModelShape
from pipeline.oom import needed_gib
from pipeline.parallel import estimate_memory

OVER = 1.02  # a message without figures: the need was at least this much of what the GPU has


@dataclass(frozen=True)
class Measured:
    """Needs of one experiment and its variants on one GPU, as far as a failure has shown them."""

    experiment: Experiment
    shape: ModelShape
    flavor: Flavor
    ratio: float = 1.0  # of what grows with the tokens, to its estimate
    surprised: bool = False  # it had been sure to fit

    def fits(self, flavor: Flavor, **train: Any) -> bool:
        """Whether the experiment, with these keys of `train` changed, surely fits a flavor."""
        changed = self.experiment.train.model_copy(update=train)
        fixed, growing = _parts(self.experiment.model_copy(update={"train": changed}), self.shape)
        return (fixed + growing * self.ratio) * (1 + BAND) <= flavor.vram_gib


def measured(experiment: Experiment, shape: ModelShape, flavor: Flavor, message: str) -> Measured:
    """What an out-of-memory message says about the estimates."""
    fixed, growing = _parts(experiment, shape)
    needed = needed_gib(message) or flavor.vram_gib * OVER
    ratio = max(1.0, (needed - fixed) / growing) if growing > 0 else 1.0
    return Measured(experiment, shape, flavor, ratio, estimate_memory(experiment, shape).fits(flavor) is True)


def shorter_rows(seen: Measured) -> str:
    """The longest `max_length` that surely fits, if one does."""
    now = seen.experiment.train.max_length
    most = now // 2 if seen.surprised else now - 1
    steps = _largest(most // STEP, lambda count: seen.fits(seen.flavor, max_length=count * STEP))
    return f"`train.max_length: {now} → {steps * STEP}`" if steps else ""


def fewer_rows(seen: Measured) -> str:
    """The most rows at once that fit and divide the batch, so that each update still sees as many."""
    train = seen.experiment.train
    rows, steps = rows_at_once(train.batch_size), train.gradient_accumulation
    for fewer in range(rows - 1, 0, -1):
        if rows * steps % fewer == 0 and seen.fits(seen.flavor, batch_size=fewer):
            accumulate = f"`train.gradient_accumulation: {steps} → {rows * steps // fewer}`"
            return f"`train.batch_size: {rows} → {fewer}` with {accumulate}"
    return ""


def larger_gpu(seen: Measured) -> Flavor | None:
    """The cheapest flavor with a larger GPU that the experiment surely fits as it is."""
    larger = (flavor for flavor in gpu_flavors() if flavor.vram_gib > seen.flavor.vram_gib)
    return next((flavor for flavor in larger if seen.fits(flavor)), None)


def _parts(experiment: Experiment, shape: ModelShape) -> tuple[float, float]:
    """GiB that do not depend on the rows, and GiB that do."""
    estimate = estimate_memory(experiment, shape)
    held = (estimate.weights + estimate.adapter + estimate.optimizer) * (1 + estimate.fragmentation) + estimate.context
    return held, estimate.total - held


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; more never needs less."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low
