"""What is seen of a run at one moment, and what may be done next: the values that `decide` takes and gives. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.live import Live, read_live
from pipeline.plan import Plan, Stage, StageName
from pipeline.remote import SeenJob, StageView
from pipeline.settings import Stop


@dataclass(frozen=True)
class Limits:
    """Bounds in seconds and counts. `lease_s` must exceed what a submit takes plus the lag of the job listing.

    `early_stop` are the proofs of waste that end a job, `idle_s` how long its GPU may do nothing.
    """

    attempts: int = 3
    posts: int = 3
    lease_s: float = 900
    lag_s: float = 600
    queue_patience_s: float = 24 * 3600
    early_stop: tuple[Stop, ...] = (Stop.NAN,)
    idle_s: float = 1800


@dataclass(frozen=True)
class Seen:
    """One look at a run: each stage's repository, every job with its label, and the log of jobs that run or failed."""

    views: Mapping[StageName, StageView] = field(default_factory=dict)
    jobs: tuple[SeenJob, ...] = ()
    logs: Mapping[str, str] = field(default_factory=dict)

    def done(self, plan: Plan) -> set[StageName]:
        """The stages whose artifact exists with this run's id."""
        return {
            stage
            for stage, view in self.views.items()
            if view.manifest and (view.manifest.get("run_id"), view.manifest.get("stage")) == (plan.run_id, stage)
        }

    def live(self, job: SeenJob) -> Live | None:
        """What a job's log says so far; None when it was not to be had."""
        log = self.logs.get(job.id)
        return None if log is None else read_live(job.stage, log)


@dataclass(frozen=True)
class Submit:
    """Start an attempt at a stage; `nodes` are those of an attempt under way that were never started."""

    stage: Stage
    attempt: int
    why: str = ""
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class StopNodes:
    """One node of an attempt cannot go on, so the others must not: end these jobs, then judge the attempt."""

    stage: StageName
    attempt: int
    jobs: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""

    why: str


@dataclass(frozen=True)
class Ask:
    """A person has to do the next stage: nothing happens by itself until then."""

    stage: StageName
    why: str
    hint: str


@dataclass(frozen=True)
class GiveUp:
    """The run cannot go on by itself. `lines` are the most telling ones of a log whose cause is not known."""

    stage: StageName
    why: str
    hint: str = ""
    cancelled: bool = False
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finish:
    """Every artifact is there."""


Action = Submit | Wait | StopNodes | Ask | GiveUp | Finish
