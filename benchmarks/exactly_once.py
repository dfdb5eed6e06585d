"""How often the designs of a submit pay twice: the same random misfortunes for each, in the simulated world.

    python benchmarks/exactly_once.py --plans 2000           # the table of docs/decisions/0003-exactly-once.md
    python benchmarks/exactly_once.py --histories 3000       # whole repositories, our design alone: must all hold
    python benchmarks/exactly_once.py --histories 1 --seed 381   # one of them again
    python benchmarks/exactly_once.py --histories 3000 --nodes 2   # the same, every training on two nodes

A plan is a seed: how often calls fail or lose their answer, how late listings are, how often a controller dies or
stands still for an hour, and how many controllers tick at once. No job of these plans fails by itself, so a second
training is always waste.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from histories import HALF_HOUR, LABEL, PLAN, book_of, make_history, one_tick, start, world_of  # noqa: E402
from simulation import SAVE_S, Faults, Interleaved, Killed, SimRemote, SimWorld  # noqa: E402

from pipeline.actions import Seen  # noqa: E402
from pipeline.controller import tick  # noqa: E402
from pipeline.flavors import FLAVORS  # noqa: E402
from pipeline.hub_facts import HubError  # noqa: E402
from pipeline.plan import StageName  # noqa: E402
from pipeline.remote import JobSpec, stage_folder  # noqa: E402

TICKS = 200  # a run that is not finished after four days of ticks is lost


class WithoutId(SimRemote):
    """A way into the world in which the job's id is never written into the claim."""

    def commit(self, repo: str, parent: str, message: str, files: Mapping[str, bytes | Path]) -> str:
        return parent if message.startswith("Note") else super().commit(repo, parent, message, files)


def label_only(sim: SimWorld, step: Callable[[], None]) -> None:
    """The design most people write first: list the jobs by label, post when there is none."""
    remote = SimRemote(sim, step)
    try:
        views = {s.name: remote.view(PLAN.repo(s.name), stage_folder(PLAN.run_id, s.name)) for s in PLAN.stages}
        pending = PLAN.pending(Seen(views).done(PLAN))
        if not pending:
            return
        stage = pending[0]
        if remote.jobs("acme", {"run": PLAN.run_id, "stage": stage.name}, live=False):
            return
        repo = PLAN.repo(stage.name)
        remote.create_repo(repo, private=True)
        labels = {"experiment": "coach", "run": PLAN.run_id, "stage": stage.name.value, "attempt": "1", "repo": LABEL}
        remote.submit(JobSpec("acme", stage.flavor.name, stage.timeout_s, (), repo, "main", "/", labels))
    except (Killed, HubError):
        return


def claim_only(sim: SimWorld, step: Callable[[], None]) -> None:
    """The controller, with claims that never learn their job."""
    try:
        tick(world_of(WithoutId(sim, step)))
    except (Killed, HubError):
        return


def controller(sim: SimWorld, step: Callable[[], None]) -> None:
    """The controller as it is."""
    one_tick(sim, step)


@dataclass(frozen=True)
class Design:
    """A way to submit, and whether its jobs pass a fence."""

    words: str
    tick: Callable[[SimWorld, Callable[[], None]], None]
    fence: bool


DESIGNS = (
    Design("label only: list, then post", label_only, fence=False),
    Design("claim", claim_only, fence=False),
    Design("claim + id", controller, fence=False),
    Design("claim + id + fence (ours)", controller, fence=True),
)


@dataclass(frozen=True)
class Result:
    """What one plan cost in one design."""

    trainings: int
    overlaps: bool
    wasted_usd: float
    hours: float | None
    told: bool


def faults_of(seed: int) -> tuple[Faults, int]:
    """The misfortunes of a plan, and how many controllers tick at once in its first hour."""
    draw = random.Random(seed)
    faults = Faults(
        unreachable=draw.choice((0.0, 0.02, 0.1)),
        lost=draw.choice((0.0, 0.02, 0.1)),
        killed=draw.choice((0.0, 0.01, 0.03)),
        list_lag_s=draw.choice((0.0, 5.0, 60.0, 600.0, 4000.0)),
        stalled=draw.choice((0.0, 0.0, 0.01)),
        skew_s=draw.choice((0.0, 120.0)),
    )
    return faults, draw.choice((1, 1, 2, 3))


def live(design: Design, seed: int) -> Result:
    """One plan in one design, from the merge to the last artifact."""
    faults, controllers = faults_of(seed)
    sim = start(seed, faults, fence=design.fence, work_s=2.5 * 3600)
    began, ended = sim.time, None
    for number in range(TICKS):
        bodies = [lambda step: design.tick(sim, step)] * (controllers if number < 2 else 1)
        if len(bodies) == 1:
            bodies[0](lambda: None)
        else:
            Interleaved(sim).run(bodies)
        if finished(sim):
            ended = max(job.finished_at or sim.time for job in sim.job_list)
            break
        if not book_of(sim).is_open(PLAN.run_id):
            break
        sim.advance(HALF_HOUR)
    sim.advance(4 * 3600)  # what still runs is paid, too
    return judge(sim, None if ended is None else (ended - began) / 3600)


def finished(sim: SimWorld) -> bool:
    """Whether every artifact is there."""
    for stage in (StageName.GGUF, StageName.EVALUATE):
        repo = PLAN.repo(stage)
        if f"{stage_folder(PLAN.run_id, stage)}/manifest.json" not in sim.repos.get(repo, [{}])[-1]:
            return False
    return True


def judge(sim: SimWorld, hours: float | None) -> Result:
    """Trainings that worked for longer than one look at the fence, and what all but the longest cost.

    A job that finds the fence passed is billed for a minute all the same.
    """
    started = [job for job in sim.job_list if job.stage == "train" and job.finished_at != job.created_at]
    worked = [job for job in started if job.trained_s > SAVE_S]
    paid_s = sorted(max(job.trained_s, 60.0) for job in started)
    usd_per_s = FLAVORS[PLAN.stages[0].flavor.name].usd_per_minute / 60
    together = any(one.stage == "train" for one, _ in sim.overlaps())
    return Result(len(worked), together, sum(paid_s[:-1]) * usd_per_s, hours, not book_of(sim).is_open(PLAN.run_id))


def compare(plans: int, first: int) -> None:
    """The table."""
    head = "runs | trained twice or more | at the same time | dollars wasted | given up, told | lost | median hours"
    print(f"| design | {head} |")
    print("|---" * 8 + "|")
    for design in DESIGNS:
        results = [live(design, seed) for seed in range(first, first + plans)]
        twice = sum(result.trainings > 1 for result in results)
        hours = [result.hours for result in results if result.hours is not None]
        row = [
            design.words,
            str(plans),
            f"{twice} ({twice / plans:.1%})",
            str(sum(result.overlaps for result in results)),
            f"{sum(result.wasted_usd for result in results):,.2f}",
            str(sum(result.hours is None and result.told for result in results)),
            str(sum(result.hours is None and not result.told for result in results)),
            f"{statistics.median(hours):.1f}" if hours else "",
        ]
        print("| " + " | ".join(row) + " |", flush=True)


def live_histories(count: int, first: int, nodes: int) -> int:
    """Whole repositories with edits, deletions and retries; returns how many broke a promise."""
    broken, trainings, rounds, began = 0, 0, 0, time.monotonic()
    for seed in range(first, first + count):
        history = make_history(seed, nodes)
        history.live()
        try:
            history.judge()
        except AssertionError as error:
            broken += 1
            print(str(error).splitlines()[0], flush=True)
        trainings += len(history.sim.trainings())
        rounds += sum(len(one) for one in book_of(history.sim).rounds.values())
    seconds = time.monotonic() - began
    print(
        f"{count} histories, {rounds} rounds closed, {trainings} trainings, {broken} broken promises, {seconds:.0f} s"
    )
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=2000, help="fault plans per design")
    parser.add_argument("--histories", type=int, default=0, help="live so many whole repositories instead")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2, 3), help="of every training of a history")
    given = parser.parse_args()
    if given.histories:
        return int(bool(live_histories(given.histories, given.seed, given.nodes)))
    compare(given.plans, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
