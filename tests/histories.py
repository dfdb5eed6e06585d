"""Lives of a repository in the simulated world: experiments merged, edited, deleted and retried while things fail.

A history is its seed: the same seed gives the same one, fault for fault.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from examples import GOOD, changed
from simulation import SAVE_S, Faults, Interleaved, Job, Killed, SimBook, SimRemote, SimWorld

from pipeline.actions import Limits, Seen, Submit
from pipeline.book import Book, Tag, Verdict, make_book, retry_message, since_message
from pipeline.controller import tick
from pipeline.errors import UserError
from pipeline.facts import Facts
from pipeline.hub_facts import HubError
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.plan import Plan, make_plan
from pipeline.settings import Settings
from pipeline.tree import make_order
from pipeline.world import Report, Tree, Wanted, World

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "c" * 40
LABEL = "acme--tunes"
HALF_HOUR = 1800.0
LIMITS = Limits()
NAMES = ("coach", "guide", "tutor")
NO_STEP: Callable[[], None] = lambda: None  # noqa: E731


def plan_named(name: str = "coach", version: int = 0, max_usd: float = 40, nodes: int = 1) -> Plan:
    """The good experiment under a name; each version has another learning rate and so is another run."""
    text = changed("name: coach", f"name: {name}", GOOD)
    text = changed("acme/coach-12b", f"acme/{name}-12b", text)
    text = changed("2e-4", f"{version + 2}e-4", text)
    text = changed("max_usd: 10", f"max_usd: {nodes * max_usd:g}", text)
    text = changed("flavor: a10g-large", f"flavor: a10g-large\n  nodes: {nodes}", text) if nodes > 1 else text
    return make_plan(parse_experiment(text).experiment, Facts(shape=CATALOGUE["google/gemma-3-12b-it"]))


PLAN = plan_named()
TWO = plan_named(nodes=2)
VERSIONS = {name: [plan_named(name, version) for version in range(3)] for name in NAMES}
ON_NODES = {n: {name: [plan_named(name, v, nodes=n) for v in range(3)] for name in NAMES} for n in (2, 3)} | {
    1: VERSIONS
}


def start(seed: int = 0, faults: Faults | None = None, **more: Any) -> SimWorld:
    """A world in which mergetune is installed and nothing has run yet."""
    sim = SimWorld(random.Random(seed), faults or Faults(), **more)
    message = since_message(datetime.fromtimestamp(sim.time, UTC))
    sim.tags["mergetune/since"] = Tag("mergetune/since", COMMIT, message)
    return sim


def wanted(plan: Plan) -> Wanted:
    """An experiment on main."""
    return Wanted(plan.experiment.name, plan.run_id, plan.experiment.output.repo.split("/")[0], lambda: plan)


def world_of(remote: SimRemote, plans: tuple[Plan, ...] = (PLAN,), **more: Any) -> World:
    """What one controller's tick sees."""

    def order(plan: Plan, submit: Submit, seen: Seen, attempt: int) -> Any:
        return make_order(ROOT, remote, LABEL, {}, plan, submit, seen)

    tree = Tree(COMMIT, tuple(map(wanted, plans)), more.pop("broken", frozenset()))
    given: dict[str, Any] = {
        "settings": Settings(),
        "tree": tree,
        "preflight": lambda plan: (),
        "order": order,
        "limits": LIMITS,
        "namespaces": frozenset({"acme"}),
        **more,
    }
    return World(remote=remote, book=SimBook(remote), clock=remote.clock, label=LABEL, **given)


def one_tick(
    sim: SimWorld, step: Callable[[], None] = NO_STEP, kill_at: int | None = None, **more: Any
) -> list[Report]:
    """A controller's life: it may die, or end its tick because something could not be read."""
    try:
        return tick(world_of(SimRemote(sim, step, kill_at), **more))
    except (Killed, HubError):
        return []


def book_of(sim: SimWorld) -> Book:
    """What the tags say."""
    return make_book(sim.tags.values())


def run_until_closed(sim: SimWorld, ticks: int = 400, plan: Plan = PLAN, **more: Any) -> str:
    """Tick every half hour until the run is closed; returns the verdict, or `open` when it never was."""
    for _ in range(ticks):
        one_tick(sim, plans=(plan,), **more)
        book = book_of(sim)
        if not book.is_open(plan.run_id):
            return book.rounds[plan.run_id][-1].verdict
        sim.advance(HALF_HOUR)
    return "open"


def reopen(sim: SimWorld, run_id: str) -> None:
    """What `mergetune retry` does."""
    name = book_of(sim).next_retry(run_id)
    sim.tags[name] = Tag(name, COMMIT, retry_message(name, "ada", datetime.fromtimestamp(sim.time, UTC)))


def check(sim: SimWorld, note: str = "") -> None:
    """What must hold in every world with the fence."""
    assert not sim.overlaps(), f"two jobs worked on one stage at the same time {note}"
    passed = [(job.folder, job.attempt, job.node) for job in sim.job_list if job.passed_at is not None]
    assert len(passed) == len(set(passed)), f"two jobs worked on one attempt {note}"
    for one in sim.job_list:
        for other in sim.job_list if one.began_at is not None else ():
            if other.began_at is not None and other.folder == one.folder and other.attempt > one.attempt:
                is_over = one.began_at + one.trained_s <= other.began_at + SAVE_S
                assert is_over, f"attempts {one.attempt} and {other.attempt} trained at a time {note}"


@dataclass
class History:
    """One life of a repository with up to three experiments, drawn from its seed."""

    seed: int
    faults: Faults
    sim: SimWorld
    main: dict[str, Plan] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()
    events: list[str] = field(default_factory=list)
    reopened: list[str] = field(default_factory=list)
    nodes: int = 1

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What is on main and can be read."""
        return tuple(plan for name, plan in sorted(self.main.items()) if name not in self.broken)

    def tick(self) -> None:
        """One, two or three controllers at once."""
        controllers = self.sim.random.choice((1, 1, 1, 1, 2, 3))
        plans, broken = self.plans, self.broken
        bodies = [lambda step: one_tick(self.sim, step, plans=plans, broken=broken)] * controllers
        if controllers == 1:
            bodies[0](NO_STEP)
        else:
            Interleaved(self.sim).run(bodies)

    def happen(self) -> None:
        """Somebody merges a change, or asks for a retry."""
        chance, name = self.sim.random.random(), self.sim.random.choice(NAMES)
        self.broken = frozenset()
        if chance < 0.08:
            self.main[name] = self.sim.random.choice(ON_NODES[self.nodes][name])
            self.events.append(f"merge {self.main[name].run_id}")
        elif chance < 0.11:
            self.main.pop(name, None)
            self.events.append(f"delete {name}")
        elif chance < 0.14:
            self.broken = frozenset({name})
            self.events.append(f"break {name}")
        elif chance < 0.22 and name in self.main:
            try:
                reopen(self.sim, self.main[name].run_id)
            except UserError:
                return  # open, or never closed: the verb says so
            self.reopened.append(self.main[name].run_id)
            self.events.append(f"retry {self.main[name].run_id}")

    def live(self) -> None:
        """Events for a day, then quiet until everything on main is closed and no job lives."""
        for _ in range(48):
            self.happen()
            self.tick()
            self.sim.advance(HALF_HOUR)
        self.broken = frozenset()
        for _ in range(2000):
            if self.is_quiet():
                break
            self.tick()
            self.sim.advance(HALF_HOUR)

    def is_quiet(self) -> bool:
        """Whether every run on main is closed and no job is live."""
        book = book_of(self.sim)
        return not any(book.is_open(plan.run_id) for plan in self.main.values()) and not self.live_jobs()

    def live_jobs(self) -> list[Job]:
        """The jobs that still cost money."""
        return [job for job in self.sim.job_list if job.finished_at is None]

    def judge(self) -> None:
        """Never two trainings at a time, never a lost run, always an end that is told."""
        note = f"(seed {self.seed}, {self.faults}, {self.events})"
        check(self.sim, note)
        assert self.is_quiet(), f"not at an end {note}"
        book = book_of(self.sim)
        for run_id, rounds in book.rounds.items():
            retries = self.reopened.count(run_id)
            assert len(rounds) <= 1 + retries, f"{run_id} was closed {len(rounds)} times {note}"
            trained = [job for job in self.sim.trainings() if job.spec.labels["run"] == run_id]
            most = (1 + retries) * (LIMITS.attempts if self.faults.node_lost or self.faults.lost else 1)
            assert len(trained) <= most, f"{run_id} was trained {len(trained)} times {note}"
            given_up = [one.text for one in rounds if one.verdict is Verdict.FAILED]
            if not self.faults.node_lost and not self.faults.broken:
                told = (
                    ("can be found", "did not come", "was lost") if self.nodes > 1 else ("no job of them can be found",)
                )
                assert all(any(words in text for words in told) for text in given_up), f"{run_id}: {given_up} {note}"
            if rounds[-1].verdict is Verdict.DONE:
                assert trained, f"{run_id} is done and nothing was trained {note}"


def make_history(seed: int, nodes: int = 1) -> History:
    """A history with its faults, both drawn from the seed; every training is on so many nodes."""
    draw = random.Random(seed)
    faults = Faults(
        unreachable=draw.choice((0.0, 0.02, 0.1, 0.3)),
        lost=draw.choice((0.0, 0.02, 0.1, 0.3)),
        killed=draw.choice((0.0, 0.01, 0.05)),
        list_lag_s=draw.choice((0.0, 5.0, 60.0, 200.0, 1200.0, 4000.0)),
        node_lost=draw.choice((0.0, 0.0, 0.2)),
        broken=draw.choice((0.0, 0.0, 0.1)),
        stalled=draw.choice((0.0, 0.0, 0.005, 0.02)),
        skew_s=draw.choice((0.0, 120.0)),
    )
    history = History(seed, faults, start(seed, faults, queue_s=draw.choice((30.0, 30.0, 1500.0))))
    history.nodes = nodes
    history.main["coach"] = ON_NODES[nodes]["coach"][0]
    return history
