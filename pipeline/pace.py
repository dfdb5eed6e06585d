"""How fast a training went, from its log: for how long it would have had to run. Pure."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.events import EVENT_PREFIX, parse_event

CLOCK = r"(\d{1,3}(?::\d\d){1,2})"
# A bar of training steps counts seconds or iterations; bars of rows and files count examples and bytes.
BAR = re.compile(rf"\| *(\d{{1,9}})/(\d{{1,9}}) \[{CLOCK}<{CLOCK}, *[\d.]{{1,9}} ?(?:s/it|it/s)")


@dataclass(frozen=True)
class Pace:
    """Steps done of a total, the seconds until then, and the seconds that the rest would take."""

    done: int
    total: int
    elapsed_s: float
    left_s: float

    @property
    def needed_s(self) -> float:
        """All of it."""
        return self.elapsed_s + self.left_s


def read_pace(log: str) -> Pace | None:
    """The pace at the end of a log; None when it shows none."""
    return _from_events(log) or _from_bar(log)


def _from_events(log: str) -> Pace | None:
    """From our own events: the last step, the first one, and the time of the start when the log has it."""
    events = [event for line in log.splitlines() if line.startswith(EVENT_PREFIX) and (event := parse_event(line))]
    times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
    steps = [event for event in events if event["event"] == "step" and _is_counted(event)]
    if len(steps) < 2 or not times:
        return None
    first, last = steps[0], steps[-1]
    (begun, _), (done, total) = _of_whole(first), _of_whole(last)
    if done <= begun or total < done:
        return None
    per_step = (last["time"] - first["time"]) / (done - begun)
    return Pace(done, total, last["time"] - times[0], per_step * (total - done))


def _of_whole(event: dict[str, Any]) -> tuple[int, int]:
    """Steps done and to do; those of a sweep count through its variants, as if each had as many."""
    step, total, variant, variants = event["step"], event["total"], event.get("variant"), event.get("variants")
    if not isinstance(variant, int) or not isinstance(variants, int):
        return step, total
    return (variant - 1) * total + step, variants * total


def _is_counted(event: dict[str, object]) -> bool:
    return all(isinstance(event.get(key), int | float) for key in ("step", "total", "time"))


def _from_bar(log: str) -> Pace | None:
    """From the last progress bar of training."""
    found = max(BAR.finditer(log), key=lambda match: match.start(), default=None)
    if found is None or int(found[1]) == 0:
        return None
    return Pace(int(found[1]), int(found[2]), _seconds(found[3]), _seconds(found[4]))


def _seconds(clock: str) -> float:
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return float(total)
