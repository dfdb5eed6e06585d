"""An attempt on several nodes, judged as one: what its jobs say together. Pure; decides nothing.

One node that fails ends the others, and they say only that it is gone. What counts is the cause that none of them has
from another.
"""

from collections.abc import Collection, Iterable, Sequence

from pipeline.diagnose import Diagnosis
from pipeline.live import Live
from pipeline.remote import JobState, SeenJob

ECHOES = ("peer-lost", "peer-missing")  # causes that say only that another node is not there
NO_WORDS = "no-log"
AFTER_TRAINING = ("save", "publish")  # phases of the first node in which it does not need the others any more


def is_whole(jobs: Collection[SeenJob], nodes: int) -> bool:
    """Whether these live jobs are all nodes of one attempt at one stage: then there is nothing else to look at."""
    attempts = {(job.stage, job.attempt) for job in jobs}
    return len(attempts) == 1 and len({job.node for job in jobs}) == nodes


def missing_nodes(jobs: Iterable[SeenJob], nodes: int) -> tuple[int, ...]:
    """The nodes of which no job was ever seen."""
    return tuple(sorted(set(range(nodes)) - {job.node for job in jobs}))


def ended_nodes(jobs: Sequence[SeenJob]) -> list[SeenJob]:
    """The jobs that failed or were stopped, of nodes that have no other job: a second one left at the fence."""
    held = {job.node for job in jobs if job.is_live or job.state is JobState.SUCCEEDED}
    return [job for job in jobs if job.node not in held]


def has_met(live: Live | None) -> bool:
    """Whether the first node trains: then all are there, though a listing may not show one yet."""
    return live is not None and (bool(live.points) or live.progress.phase in ("train", *AFTER_TRAINING))


def has_trained(live: Live | None) -> bool:
    """Whether the first node is past its training: what becomes of the others does not matter any more."""
    return live is not None and live.progress.phase in AFTER_TRAINING


def most_telling(found: Sequence[tuple[SeenJob, Diagnosis]]) -> Diagnosis | None:
    """The failure that the others follow from: a cause of its own before an echo, and of equals the first."""

    def order(pair: tuple[SeenJob, Diagnosis]) -> tuple[int, float, int]:
        job, diagnosis = pair
        rank = 3 if diagnosis.id in ECHOES else 2 if diagnosis.id == NO_WORDS else 0 if diagnosis.is_known else 1
        return rank, job.finished_at or job.created_at, job.node

    return min(found, key=order)[1] if found else None
