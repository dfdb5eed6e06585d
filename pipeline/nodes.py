"""An attempt on several nodes, judged as one: what its jobs say together. Pure; decides nothing.

One node that fails ends the others, and they say only that it is gone. What counts is the cause that none of them has
from another.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pipeline.diagnose import Diagnosis, diagnose_message
from pipeline.live import Live
from pipeline.plan import Stage
from pipeline.remote import Claim, JobState, SeenJob, StageView

GONE = "the job is not known to the server any more"
ECHOES = ("peer-lost", "peer-missing")  # causes that say only that another node is not there
NO_WORDS = "no-log"
AFTER_TRAINING = ("save", "publish")  # phases of the first node in which it does not need the others any more


@dataclass(frozen=True)
class Group:
    """The jobs of one attempt, the claim that started them (None: it is another attempt's by now), and whose fence the
    first node's is."""

    jobs: tuple[SeenJob, ...]
    nodes: int
    claim: Claim | None = None
    winner: str = ""

    @property
    def first(self) -> SeenJob | None:
        """The first node's job: of two, the one that passed the fence, else the latest."""
        first = [job for job in self.jobs if job.node == 0]
        return max(first, key=lambda job: (job.id == self.winner, job.created_at), default=None)

    @property
    def has_succeeded(self) -> bool:
        """Whether the first node did all of its work: what a later one failed of does not matter then."""
        return any(job.id == self.winner and job.state is JobState.SUCCEEDED for job in self.jobs)

    @property
    def missing(self) -> tuple[int, ...]:
        """The nodes of which no job was ever seen."""
        return tuple(sorted(set(range(self.nodes)) - {job.node for job in self.jobs}))

    @property
    def gone(self) -> str:
        """A job that was started and that nobody knows any more."""
        return min(set(self.claim.job_ids if self.claim else ()) - {job.id for job in self.jobs}, default="")

    @property
    def ended(self) -> list[SeenJob]:
        """The jobs that failed or were stopped, of nodes that have no other job: a second one left at the fence."""
        held = {job.node for job in self.jobs if job.is_live or job.state is JobState.SUCCEEDED}
        return [job for job in self.jobs if job.node not in held]

    def stopped(self) -> tuple[str, Diagnosis | None] | None:
        """Why this must not be bought again: one was cancelled, not by us and not by a lost machine."""
        if self.claim and self.claim.ended:
            return None
        for job in self.ended:
            said = diagnose_message(job.message) if job.state is JobState.CANCELLED else None
            if job.state is JobState.CANCELLED and not (said and said.transient):
                return said.cause if said else "it was cancelled", said
        return None

    def why_to_stop(self, told: Live | None) -> str:
        """Why the nodes that live cannot go on; empty where they can. `told` is what the first one says."""
        if self.claim and self.claim.ended:
            return self.claim.ended
        if self.gone:
            return f"{GONE}: {self.gone}"
        if not self.ended or (told is not None and told.progress.phase in AFTER_TRAINING):
            return ""
        how = "has failed" if self.ended[0].state is JobState.FAILED else "was stopped"
        return f"node {self.ended[0].node + 1} of {self.nodes} {how}"

    def why_ended(self) -> str:
        """Why it ended, where no job says it."""
        return GONE if self.gone else self.claim.ended if self.claim else ""


def group_of(stage: Stage, view: StageView, jobs: Iterable[SeenJob], attempt: int) -> Group:
    """An attempt at a stage."""
    mine = tuple(job for job in jobs if (job.stage, job.attempt) == (stage.name, attempt))
    claim = view.claim if view.claim and view.claim.attempt == attempt else None
    return Group(mine, stage.parallel.nodes, claim, view.winner.job_id if view.winner else "")


def is_whole(jobs: Collection[SeenJob], nodes: int) -> bool:
    """Whether these live jobs are all nodes of one attempt at one stage: then there is nothing else to look at."""
    attempts = {(job.stage, job.attempt) for job in jobs}
    return len(attempts) == 1 and len({job.node for job in jobs}) == nodes


def has_met(told: Live | None) -> bool:
    """Whether the first node trains: then all are there, though a listing may not show one yet."""
    return told is not None and (bool(told.points) or told.progress.phase in ("train", *AFTER_TRAINING))


def most_telling(found: Sequence[tuple[SeenJob, Diagnosis]]) -> Diagnosis | None:
    """The failure that the others follow from: a cause of its own before an echo, and of equals the first."""

    def order(pair: tuple[SeenJob, Diagnosis]) -> tuple[int, float, int]:
        job, diagnosis = pair
        rank = 3 if diagnosis.id in ECHOES else 2 if diagnosis.id == NO_WORDS else 0 if diagnosis.is_known else 1
        return rank, job.finished_at or job.created_at, job.node

    return min(found, key=order)[1] if found else None
