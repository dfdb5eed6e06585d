"""`mergetune run` on this machine: look, run what is missing, show progress, report."""

import errno
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipeline.backends import local
from pipeline.backends.process import stop_group
from pipeline.errors import UserError
from pipeline.plan import Stage, StageName
from pipeline.progress import Display, Progress, StageState, advance, begin_stage, mark_stage, progress_of
from pipeline.report import RunResult, render_report

# What a full, read-only or foreign disk answers; anything else is a bug and flies.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)
QUIET_EVENTS = ("start", "step", "progress", "end")


def run_locally(run: local.LocalRun, display: Display) -> RunResult:
    """Carry a run to its end, from wherever an earlier attempt left it; returns what there is to report.

    Raises:
        UserError: a stage failed, the folder is locked, or its disk cannot be written.
        KeyboardInterrupt: the current stage has stopped; running again continues.
    """
    try:
        done = local.look(run)
        if pending := run.plan.pending(done):
            if (nodes := run.plan.stages[0].parallel.nodes) > 1 and StageName.TRAIN not in done:
                display.say(f"train: one process here instead of {nodes} nodes: a step sees the same rows")
            with local.locked(run) as lock, interruptible():
                done = _run_pending(run, lock, display)
        result = RunResult(run.plan, done, run.folder)
        if pending or not (run.folder / "report.md").exists():
            (run.folder / "report.md").write_text(render_report(result), encoding="utf-8")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"`{run.folder}` cannot be written: {error.strerror}"
        raise UserError(message, "free some space, or pass a folder you can write: `--runs-dir DIR`") from error
    finally:
        display.close()
    return result


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a run as tidily as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_pending(run: local.LocalRun, lock: TextIO, display: Display) -> dict[StageName, local.Manifest]:
    # Look again under the lock: another process may have finished a stage since.
    done = local.look(run)
    pending = run.plan.pending(done)
    shown = _Shown(progress_of(run.plan.run_id, [stage.name for stage in run.plan.stages], list(done)), display)
    builder = local.start_preparing(run, pending)
    try:
        for stage in pending:
            shown.begin(stage)
            done[stage.name] = local.run_stage(run, stage, lock, shown.event)
            shown.end(stage)
    finally:
        _stop(builder)
    return done


def _stop(builder: "subprocess.Popen[bytes] | None") -> None:
    if builder is not None and builder.poll() is None:
        stop_group(builder, patience_s=3)


class _Shown:
    """Keeps the progress of this run and passes it to the display."""

    def __init__(self, progress: Progress, display: Display) -> None:
        self.progress = progress
        self.display = display

    def begin(self, stage: Stage) -> None:
        self.progress = begin_stage(self.progress, stage.name)
        self.display.show(self.progress, important=True)

    def event(self, event: dict[str, Any]) -> None:
        self.progress = advance(self.progress, event)
        if event["event"] == "warning":
            self.display.say(f"{self.progress.current}: warning: {event.get('message', '')}")
        self.display.show(self.progress, important=event["event"] not in QUIET_EVENTS)

    def end(self, stage: Stage) -> None:
        self.progress = mark_stage(self.progress, stage.name, StageState.DONE)
        self.display.show(self.progress)


def open_run(plan: Any, facts: Any, root: Path, runs_dir: Path) -> local.LocalRun:
    """The place of a plan's run under `runs_dir`."""
    return local.LocalRun(plan, facts, root, runs_dir.resolve() / plan.run_id, local.find_device())
