"""What a tick looks at: live jobs, what they say, and as much of a backlog as can be acted on. Acts on nothing."""

from collections.abc import Collection, Mapping
from hashlib import sha256

from pipeline.hub_facts import Access, HubError
from pipeline.remote import JobState, SeenJob
from pipeline.world import Wanted, World

# A look at a run without a live job is about eight requests; a thousand of them at once would be refused by the Hub.
LEAST_LOOKS, LOOKS_PER_SUBMIT = 10, 2
MOST_LOGS = 128  # of live jobs in one tick: about twenty seconds


def live_jobs(world: World) -> tuple[dict[str, tuple[SeenJob, ...]], dict[str, HubError]]:
    """The live jobs of this repository by run, and the namespaces whose jobs we may not see."""
    namespaces = {run.namespace for run in world.tree.wanted} | world.namespaces
    found: dict[str, tuple[SeenJob, ...]] = {}
    refused: dict[str, HubError] = {}
    for namespace in sorted(namespaces):
        try:
            jobs = world.remote.jobs(namespace, {"repo": world.label}, live=True)
        except HubError as error:
            if error.access is Access.UNREACHABLE:
                raise
            refused[namespace] = error
            continue
        for job in jobs:
            found[job.run_id] = (*found.get(job.run_id, ()), job)
    return found, refused


def live_logs(world: World, runs: Collection[Wanted], live: Mapping[str, tuple[SeenJob, ...]]) -> dict[str, str]:
    """What the jobs that run have said; of very many, by lot, those of some: nothing is decided without a log."""
    now = world.clock.now()
    running = [(run.namespace, job.id) for run in runs for job in live.get(run.run_id, ()) if _is_running(job)]
    asked = sorted(running, key=lambda pair: _lot(now, pair[1]))[:MOST_LOGS]
    found: dict[str, str] = {}
    for namespace in sorted({namespace for namespace, _ in asked}):
        found |= world.remote.logs(namespace, [job_id for where, job_id in asked if where == namespace])
    return found


def chosen_runs(world: World, runs: list[Wanted], live: Collection[str]) -> set[str]:
    """The runs to look at: those with a live job, which costs nothing, and of a backlog as many as can be acted on.

    By lot, so that no blocked run keeps another from its turn for good. A monthly budget has to know all of them.
    """
    idle = [run.run_id for run in runs if run.run_id not in live]
    if world.settings.max_usd_per_month is None:
        now = world.clock.now()
        idle.sort(key=lambda run_id: _lot(now, run_id))
        idle = idle[: max(LEAST_LOOKS, LOOKS_PER_SUBMIT * world.settings.submits_per_tick)]
    return {*idle, *live}


def _is_running(job: SeenJob) -> bool:
    return job.state is JobState.RUNNING


def _lot(now: float, name: str) -> bytes:
    """A number that is another one in every tick."""
    return sha256(f"{now} {name}".encode()).digest()
