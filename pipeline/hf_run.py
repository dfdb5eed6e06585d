"""`mergetune run --backend hf_jobs`: tick after tick about one experiment until it ends, showing its jobs' progress."""

from collections.abc import Iterator
from typing import Any

from pipeline.controller import tick
from pipeline.errors import UserError
from pipeline.events import parse_event
from pipeline.hub_facts import Access, HubError
from pipeline.plan import Plan
from pipeline.progress import Display, StageState, advance, begin_stage, mark_stage, progress_of
from pipeline.run_verbs import ended_report
from pipeline.world import Outcome, Report, World

POLL_S = 15.0
GOING_ON = (Outcome.SUBMITTED, Outcome.WAITING)


def run_on_hub(world: World, display: Display) -> Report:
    """Carry the world's one experiment to its end; returns its last report.

    An outage is waited out: the job does not need this process.

    Raises:
        UserError: the run is closed, blocked or failed.
        KeyboardInterrupt: the job goes on without this process.
    """
    (run,) = world.tree.wanted
    if not (book := world.book.read_book()).is_open(run.run_id):
        last = book.rounds[run.run_id][-1]
        raise UserError(f"`{run.run_id}` is {last.verdict}: {last.text}", f"`mergetune retry {run.name}` reopens it")
    watcher = _Watcher(world, run.plan(), display)
    try:
        while (report := _tick(world, display)) is None or report.outcome in GOING_ON:
            if report is not None:
                watcher.look(report)
            world.clock.sleep(POLL_S)
        watcher.read()
    finally:
        display.close()
    if report.outcome is not Outcome.FINISHED:
        raise UserError(report.text, report.hint)
    return report


def _tick(world: World, display: Display) -> Report | None:
    """The run's report, None while the Hub or the repository's remote does not answer."""
    try:
        reports = tick(world)
        return reports[0] if reports else _ended_elsewhere(world)
    except HubError as error:
        if error.access is not Access.UNREACHABLE:
            raise
        display.say(f"the Hub does not answer, trying again: {error.detail}")
    except UserError as error:  # the tags cannot be read
        display.say(f"trying again: {error.message}")
    return None


def _ended_elsewhere(world: World) -> Report:
    """The end of a run that somebody closed while it was watched here: a workflow's tick, or a person's cancel."""
    (run,) = world.tree.wanted
    return ended_report(world.book.read_book(), run)


class _Watcher:
    """Shows the newest job's events, each once."""

    def __init__(self, world: World, plan: Plan, display: Display) -> None:
        self.world, self.display = world, display
        self.progress = progress_of(plan.run_id, [stage.name for stage in plan.stages], [])
        self.namespace = plan.experiment.output.repo.split("/")[0]
        self.job = ""
        self.seen = 0.0

    def look(self, report: Report) -> None:
        """Show what is new since the last look."""
        if report.job and report.job != self.job:
            self.read()  # what the job before this one said last
            self._begin(report)
        self.read()

    def read(self) -> None:
        """Show the newest job's events that were not shown yet."""
        if not self.job:
            return
        try:
            log = self.world.remote.log(self.namespace, self.job)
        except HubError:
            return  # nothing is decided from a log here; the next look reads it again
        for event in _events(log):
            if event["time"] > self.seen:
                self.seen = event["time"]
                self._show(event)
        self.display.show(self.progress)

    def _show(self, event: dict[str, Any]) -> None:
        try:
            self.progress = advance(self.progress, event)
        except (KeyError, TypeError, ValueError):
            return  # a custom script's own event: it must not end the watching of a paid job
        if event["event"] == "warning":
            self.display.say(f"{self.progress.current}: warning: {event.get('message', '')}")

    def _begin(self, report: Report) -> None:
        for name, state in self.progress.stages:
            if state is StageState.RUNNING:
                self.progress = mark_stage(self.progress, name, StageState.DONE)
        self.job, self.seen = report.job, 0.0
        assert report.stage is not None  # a report with a job names its stage
        self.progress = begin_stage(self.progress, report.stage)
        self.display.say(f"{report.stage}: job {report.job}: {report.text}")


def _events(log: str) -> Iterator[dict[str, Any]]:
    """The events of a log that say when they were: what was shown already is told by that."""
    parsed = (parse_event(line) for line in log.splitlines())
    yield from (event for event in parsed if event is not None and isinstance(event.get("time"), float))
