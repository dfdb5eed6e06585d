"""What the log of a job says so far: its progress, its curve, whether its GPU works. Pure; judges nothing.

A custom script may print events of its own under our names: what cannot be read counts as not said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.events import parse_event
from pipeline.plan import StageName
from pipeline.progress import Progress, advance, begin_stage, progress_of


@dataclass(frozen=True)
class Point:
    """One logged training step; NaN where the script said so, None where it said nothing.

    Only preference tuning has a `reward_margin`; its loss has another scale.
    """

    step: int
    loss: float
    grad_norm: float | None = None
    lr: float | None = None
    reward_margin: float | None = None


@dataclass(frozen=True)
class Beat:
    """One sign of life: seconds since the epoch, and the busy part of the GPUs (0 to 1, None without one)."""

    time: float
    gpu_busy: float | None = None


@dataclass(frozen=True)
class Live:
    """One job, from its log: `held_out` are (step, held-out loss), `since` is when its first event came."""

    progress: Progress
    points: tuple[Point, ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()
    beats: tuple[Beat, ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    since: float | None = None
    last: float | None = None

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(step, training loss), in the order they were logged."""
        return tuple((point.step, point.loss) for point in self.points)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN as text, as the events have it."""
        progress = self.progress
        loss = self.points[-1].loss if self.points else None
        shown = {
            "phase": progress.phase,
            "variant": progress.variant or None,
            "variants": progress.variants or None,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "loss": loss if loss is None or math.isfinite(loss) else str(loss),
            "eval_loss": self.held_out[-1][1] if self.held_out else None,
            "tokens_per_s": progress.tokens_per_s,
            "eta_s": None if progress.eta_s is None else round(progress.eta_s),
        }
        return {key: value for key, value in shown.items() if value not in (None, "")}


def read_live(stage: StageName, log: str) -> Live:
    """The state of a stage's job after the last line of its log (its end is enough: a tail says less, not wrong)."""
    live = Live(begin_stage(progress_of("", [stage], []), stage))
    for line in log.splitlines():
        event = parse_event(line)
        if event is not None:
            live = _after(live, event)
    return live


def _after(live: Live, event: Mapping[str, Any]) -> Live:
    """The state after one event."""
    try:
        before, live = live.progress, replace(_timed(live, event), progress=advance(live.progress, dict(event)))
        if "variant" in event and live.progress.variant > before.variant:
            live = replace(live, points=(), held_out=())  # a curve is one variant's
        if "variant" in event and live.progress.variant != event["variant"]:
            return live  # it trains beside the one that is shown
        match event["event"]:
            case "step":
                told = (_number(event, key) for key in ("grad_norm", "lr", "reward_margin"))
                point = Point(int(event["step"]), float(event["loss"]), *told)
                return replace(live, points=(*live.points, point))
            case "eval":
                return replace(live, held_out=(*live.held_out, (int(event["step"]), float(event["eval_loss"]))))
            case "heartbeat":
                return replace(live, beats=(*live.beats, Beat(float(event["time"]), _number(event, "gpu_busy"))))
            case "warning":
                return replace(live, warnings=(*live.warnings, str(event.get("message", ""))))
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # a custom script's own event: it says nothing that we can read, and is no reason to stop reading
    return live


def _timed(live: Live, event: Mapping[str, Any]) -> Live:
    when = _number(event, "time")
    if when is None or not math.isfinite(when):
        return live
    return replace(live, since=when if live.since is None else live.since, last=when)


def _number(event: Mapping[str, Any], key: str) -> float | None:
    value = event.get(key)
    return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
