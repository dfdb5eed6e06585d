"""What a loss curve says in plain words, and when a job only wastes money. Pure: reads no log and stops nothing.

The expected course is that of the SOP's own project (a chat model, three epochs): it starts near 2 to 3, is about 1.5
to 2 in the first epoch, 1.0 to 1.5 in the second and 0.8 to 1.2 in the third. Another task may rightly lie elsewhere,
so a note speaks of the shape of the curve, and of its height only where it lies far outside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pipeline.live import Live, Point
from pipeline.settings import Stop

ENOUGH = 12  # logged steps before the shape of a curve means something: at 200 a run, 6 % of it
WINDOW = 4  # the fewest points whose mean is compared with that of others
FLAT = 0.01  # a change of the loss that is none
RISE = 0.25  # above the lowest window so far: more than the noise of small batches
OVERFIT = 0.02  # above the lowest held-out loss, twice in a row
HIGH_START = 6.0  # twice the upper end of the SOP's start; guessing blindly among 128,000 tokens is 11.8
MEMORISED = 0.1  # far below the SOP's last epoch
EXPLODING = 100.0  # times the median gradient norm of the steps before
IN_A_ROW = 5
ENDING = ("save", "publish")  # an upload needs no GPU, and what it uploads is paid for


@dataclass(frozen=True)
class Waste:
    """Proof that a job spends money for nothing: what was seen, and what to change."""

    kind: Stop
    why: str
    hint: str


def notes(live: Live, rate: float | None = None) -> tuple[str, ...]:
    """What a person should know of a job's curve so far; `rate` is `train.learning_rate`, which a sweep may vary."""
    return notes_on(live.points, live.held_out, None if live.progress.variants else rate)


def notes_on(
    points: Sequence[Point], held_out: Sequence[tuple[int, float]] = (), rate: float | None = None
) -> tuple[str, ...]:
    """What a curve says, the most serious first; nothing where it looks as a training's curve should."""
    points = [point for point in points if math.isfinite(point.loss)]
    found = [_shape(points, rate), _overfitting(points, held_out)]
    if all(point.reward_margin is None for point in points):  # the height of a chat model's loss
        found = [_high_start(points), *found, _memorised(points)]
    return tuple(note for note in found if note)


def find_waste(live: Live, now: float, idle_s: float, rate: float | None = None) -> Waste | None:
    """Why every further minute of the job is lost; None while it may still be worth its price.

    `now` is in epoch seconds, `idle_s` how long a GPU may do nothing. A variant of a sweep that goes wrong is ended by
    the script, and the others are worth their price.
    """
    if live.progress.variants:
        return _idle(live, now, idle_s)
    return (
        _not_a_number(live.points, rate)
        or _masked(live.points)
        or _exploding(live.points, rate)
        or _idle(live, now, idle_s)
    )


def _high_start(points: Sequence[Point]) -> str:
    if len(points) < WINDOW or _mean(points[:WINDOW]) < HIGH_START:
        return ""
    return (
        f"The loss began at {_mean(points[:WINDOW]):.1f}; a chat model usually begins at 2 to 3. "
        "Look whether `base.model` is the instruction-tuned one and whether the chat template suits the data."
    )


def _shape(points: Sequence[Point], rate: float | None) -> str:
    """Rising, or flat from the start. What has fallen and then stays is how a good training ends."""
    if len(points) < ENOUGH:
        return ""
    size = max(WINDOW, len(points) // 6)
    first, last = _mean(points[:size]), _mean(points[-size:])
    lowest, at = min((_mean(points[i : i + size]), points[i + size - 1].step) for i in range(len(points) - size + 1))
    if last > lowest * (1 + RISE):
        lower = f": try `train.learning_rate: {rate / 4:.0e}`" if rate else ""
        return (
            f"The loss is rising: {lowest:.2f} at step {at}, {last:.2f} now. The learning rate may be too high{lower}."
        )
    if abs(last / first - 1) < FLAT and lowest > first * (1 - 2 * FLAT):
        higher = f" (`train.learning_rate: {rate:.0e}` now)" if rate else ""
        return (
            f"The loss has not moved: {first:.2f} at the start, {last:.2f} now. "
            f"The learning rate may be too low{higher}, or the rows teach what the base knows already."
        )
    return ""


def _overfitting(points: Sequence[Point], held_out: Sequence[tuple[int, float]]) -> str:
    """Held-out loss rising while the training loss falls: from its lowest point on, the adapter memorises."""
    if len(held_out) < 3 or len(points) < 2 * WINDOW:
        return ""
    lowest, at = min((value, step) for step, value in held_out)
    rising = all(value > lowest * (1 + OVERFIT) for _, value in held_out[-2:])
    since = [point for point in points if point.step >= at]
    before = [point for point in points if point.step <= at]
    if not rising or len(since) < 2 or _mean(since[-WINDOW:]) >= _mean(before[-WINDOW:]):
        return ""
    return (
        f"Held-out loss was lowest at step {at} ({lowest:.3f}) and is {held_out[-1][1]:.3f} now, while training loss "
        f"still falls: it learns its rows by heart. `train.max_steps: {at}` would have stopped there."
    )


def _memorised(points: Sequence[Point]) -> str:
    if len(points) < ENOUGH or _mean(points[-WINDOW:]) > MEMORISED:
        return ""
    return (
        f"The training loss is {_mean(points[-WINDOW:]):.2f}: it knows its rows by heart. "
        "Fewer `train.epochs` or more rows would teach more."
    )


def _not_a_number(points: Sequence[Point], rate: float | None) -> Waste | None:
    """A loss that stays no number. A single gradient that is none is how float16 training finds its scale."""
    losses = [point for point in points[-2:] if not math.isfinite(point.loss)]
    if len(losses) == 2:
        return Waste(Stop.NAN, f"the loss is {losses[-1].loss} at step {losses[-1].step}", _lower(rate))
    norms = [point.grad_norm for point in points[-IN_A_ROW:] if point.grad_norm is not None]
    if len(norms) < IN_A_ROW or any(math.isfinite(norm) for norm in norms):
        return None
    return Waste(Stop.NAN, f"the gradient norm is {norms[-1]} in {IN_A_ROW} logged steps", _lower(rate))


def _masked(points: Sequence[Point]) -> Waste | None:
    """A loss of exactly 0 with no gradient: every label is masked, so nothing can be learned.

    Not where answers are compared: a margin wide enough for every pair leaves a loss of 0, and is what was wanted.
    """
    last = points[-IN_A_ROW:]
    if len(last) < IN_A_ROW or any(point.loss or point.grad_norm or point.reward_margin for point in last):
        return None
    why = f"loss and gradient are exactly 0 in {IN_A_ROW} logged steps: no token carries loss"
    return Waste(Stop.MASKED, why, "look at `train.loss_on` and `train.max_length`: every label is masked")


def _exploding(points: Sequence[Point], rate: float | None) -> Waste | None:
    """Gradients a hundred times the usual, several in a row, and a loss that has got worse with them."""
    norms = [point.grad_norm for point in points if point.grad_norm is not None]
    if len(norms) < ENOUGH + IN_A_ROW or len(norms) != len(points):
        return None
    usual, last = median(norms[:-IN_A_ROW]), min(norms[-IN_A_ROW:])
    worse = _mean(points[-IN_A_ROW:]) > _mean(points[:WINDOW])
    if usual <= 0 or last < EXPLODING * usual or not worse:
        return None
    why = f"gradients explode: norm {last:.3g} and more in {IN_A_ROW} logged steps, {usual:.3g} before"
    return Waste(Stop.EXPLODING, why, _lower(rate))


def _idle(live: Live, now: float, idle_s: float) -> Waste | None:
    """No GPU work in any sign of life for so long; one that is missing proves nothing."""
    recent = [beat for beat in live.beats if now - beat.time <= idle_s]
    spans = bool(recent) and recent[-1].time - recent[0].time >= 0.8 * idle_s
    phase = live.progress.phase or "start"
    if not spans or phase in ENDING or any(beat.gpu_busy is None or beat.gpu_busy > 0.01 for beat in recent):
        return None
    return Waste(
        Stop.IDLE,
        f"the GPU did nothing for {idle_s / 60:.0f} minutes (`{phase}`)",
        "look at the end of its log: a download or a data loader may hang",
    )


def _lower(rate: float | None) -> str:
    return (
        f"use `train.learning_rate: {rate / 10:.0e}`, or look for broken rows" if rate else "use a lower learning rate"
    )


def _mean(points: Sequence[Point]) -> float:
    return fmean(point.loss for point in points)
