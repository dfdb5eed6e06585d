"""Where a run stands, from its events, and how that reads on one line or a live screen. Starts nothing."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, TextIO, TypeVar

from pipeline.charts import BAR_WIDTH, bar, sparkline
from pipeline.plan import StageName


class StageState(StrEnum):
    """How far a stage is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


MARKS = {StageState.WAITING: "○", StageState.RUNNING: "◐", StageState.DONE: "●", StageState.FAILED: "✗"}
PLAIN_EVERY_S = 10.0
MANY = 200  # experiments: above this a check takes longer than a person waits without a sign
Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """A run's progress. Times are seconds of the events' own clock (since 1970).

    Of a sweep: `variant` is the one that began last (0: none trains), and counts and losses are its own.
    """

    run_id: str
    stages: tuple[tuple[StageName, StageState], ...]
    current: StageName | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = "step"
    loss: float | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    first: tuple[float, int] | None = None  # time and count of the first progress seen, the base of the ETA
    last: float | None = None
    variant: int = 0
    variants: int = 0

    @property
    def sweep_words(self) -> str:
        """`variant 2 of 6 (25 %)`, of the whole sweep; empty while no variant trains."""
        if not self.variant:
            return ""
        stepped = self.done / self.total if self.total and self.unit == "step" else 0.0
        part = (self.variant - 1 + (1.0 if self.phase == "save" else stepped)) / self.variants
        return f"variant {self.variant} of {self.variants} ({100 * part:.0f} % of the sweep)"

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of the current loop at its pace so far; None before there is a pace."""
        if self.first is None or self.last is None or self.done <= self.first[1]:
            return None
        pace = (self.last - self.first[0]) / (self.done - self.first[1])
        return max(self.total - self.done, 0) * pace


def begin_stage(progress: Progress, stage: StageName) -> Progress:
    """The progress when `stage` starts."""
    marked = mark_stage(progress, stage, StageState.RUNNING)
    return replace(marked, current=stage, phase="start", done=0, total=0, first=None, last=None)


def mark_stage(progress: Progress, stage: StageName, state: StageState) -> Progress:
    """The progress with one stage in another state."""
    stages = tuple((name, state if name is stage else old) for name, old in progress.stages)
    return replace(progress, stages=stages)


def advance(progress: Progress, event: dict[str, Any]) -> Progress:
    """The progress after one event of the current stage; unknown events change nothing."""
    if (number := _variant(event)) < progress.variant and number:
        return progress  # beside the one that is shown
    if number > progress.variant:
        fresh = replace(progress, variant=number, variants=int(event["variants"]), losses=(), loss=None, eval_loss=None)
        return advance(replace(fresh, tokens_per_s=None, done=0, total=0, first=None, last=None), event)
    match event["event"]:
        case "phase":
            progress = replace(progress, variant=number)
            return replace(progress, phase=str(event.get("name", "")), done=0, total=0, first=None, last=None)
        case "step":
            loss = _number(event.get("loss"))
            losses = progress.losses if loss is None else (*progress.losses, loss)
            speed = _number(event.get("tokens_per_s"))
            counted = _count(progress, event, int(event["step"]), "step")
            return replace(counted, phase="train", loss=loss, losses=losses, tokens_per_s=speed)
        case "progress":
            return _count(progress, event, int(event["done"]), str(event.get("unit", "")))
        case "eval":
            return replace(progress, eval_loss=_number(event.get("eval_loss")))
        case _:
            return progress


def stage_strip(progress: Progress) -> str:
    """`● train  ◐ merge  ○ gguf`."""
    return "  ".join(f"{MARKS[state]} {name}" for name, state in progress.stages)


def status_line(progress: Progress) -> str:
    """The current stage in words: phase, count, loss, speed, time left."""
    parts = [f"{progress.current}: {progress.phase}"]
    if progress.variant:
        parts.append(progress.sweep_words)
    if progress.total:
        parts.append(f"{progress.unit} {progress.done}/{progress.total}")
    if progress.current is StageName.TRAIN and progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
        if progress.eval_loss is not None:
            parts.append(f"held-out {progress.eval_loss:.3f}")
        if progress.tokens_per_s:
            parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.eta_s is not None:
        parts.append(f"{duration(progress.eta_s)} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Display(Protocol):
    """Shows progress to a person."""

    def show(self, progress: Progress, *, important: bool = False) -> None:
        """Show the state; `important` means a reader of a plain log should see this one."""

    def say(self, message: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the screen tidy."""


class PlainDisplay:
    """Lines for a log: at every change of phase, and at most every ten seconds in a loop."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.last = 0.0

    def show(self, progress: Progress, *, important: bool = False) -> None:
        """Print the status line if it is worth a line."""
        now = time.monotonic()
        finished = progress.total > 0 and progress.done == progress.total
        if important or finished or now - self.last >= PLAIN_EVERY_S:
            self.last = now
            self.say(status_line(progress))

    def say(self, message: str) -> None:
        """Print one line."""
        print(message, file=self.out, flush=True)

    def close(self) -> None:
        """Nothing to tidy."""


class LiveDisplay:
    """A few lines that redraw themselves: the stage strip, the status, the loss so far."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=out, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=8, transient=True)
        self.live.start()

    def show(self, progress: Progress, *, important: bool = False) -> None:
        """Redraw."""
        from rich.console import Group
        from rich.text import Text

        lines: list[Any] = [Text(f"{progress.run_id}   {stage_strip(progress)}", style="bold")]
        lines.append(Text(status_line(progress)))
        if progress.total:
            lines.append(Text(bar(progress.done, progress.total), style="magenta"))
        if progress.current is StageName.TRAIN and len(progress.losses) > 1:
            lines.append(Text(f"{sparkline(progress.losses, BAR_WIDTH)} loss", style="cyan"))
        self.live.update(Group(*lines))

    def say(self, message: str) -> None:
        """A line above the live part."""
        self.live.console.print(message, markup=False)

    def close(self) -> None:
        """Take the live part off the screen."""
        self.live.stop()


def make_display(out: TextIO) -> Display:
    """Live on a terminal, plain lines anywhere else."""
    return LiveDisplay(out) if out.isatty() else PlainDisplay(out)


def watched(items: Sequence[Item], words: str, out: TextIO) -> Iterable[Item]:
    """The same items, one after the other; with a bar on a terminal where they are many."""
    if len(items) < MANY or not out.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, words, console=Console(file=out), transient=True)


def _count(progress: Progress, event: dict[str, Any], done: int, unit: str) -> Progress:
    when = float(event.get("time", 0.0))
    first = progress.first or (when, done)
    return replace(progress, done=done, total=int(event.get("total", 0)), unit=unit, first=first, last=when)


def _variant(event: dict[str, Any]) -> int:
    """Which variant of a sweep an event is about, from 1; 0 for any other event."""
    number, count = event.get("variant"), event.get("variants")
    known = isinstance(number, int) and isinstance(count, int) and 0 < number <= count
    return number if known and isinstance(number, int) else 0


def _number(value: Any) -> float | None:
    """A finite or infinite number of an event; scripts write NaN as text."""
    return float(value) if isinstance(value, int | float | str) and value != "" else None


def progress_of(run_id: str, names: Sequence[StageName], done: Sequence[StageName]) -> Progress:
    """The progress a run starts from."""
    states = tuple((name, StageState.DONE if name in done else StageState.WAITING) for name in names)
    return Progress(run_id, states)
