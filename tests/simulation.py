"""A world in memory for the real controller: repositories, jobs and tags under a virtual clock, with faults.

Jobs follow the job scripts' contract (fence first, manifest last) without doing any work. Everything is driven by one
random generator: the same seed gives the same history.
"""

import json
import random
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.book import Book, Tag, make_book
from pipeline.hub_facts import Access, HubError
from pipeline.plan import StageName
from pipeline.remote import MANIFEST, VIEWED, WINNER, JobSpec, JobState, SeenJob, StageView, read_view

SAVE_S = 60.0  # a training job looks at the fence again this often
STALL_S = 3600.0
WRITES = ("create_repo", "commit", "submit", "cancel", "push_tag")


class Killed(BaseException):
    """The controller's process is gone: nothing of it runs any more, no `except` sees it."""


@dataclass
class Faults:
    """How likely each misfortune is, per call or per job."""

    unreachable: float = 0.0  # a call fails, and nothing happened
    lost: float = 0.0  # it happened, and the answer is lost
    killed: float = 0.0  # the controller dies, before or after the call
    list_lag_s: float = 0.0  # a job shows in listings only so much later
    node_lost: float = 0.0  # a job dies at some moment, through no fault of its own
    broken: float = 0.0  # a job fails for good
    stalled: float = 0.0  # the controller stands still for an hour before a call, and then goes on
    skew_s: float = 0.0  # how far a controller's clock may be off, to either side


@dataclass
class Job:
    """One simulated job; `trained_s` is how long it worked after the fence, which is what must not be paid twice."""

    id: str
    spec: JobSpec
    created_at: float
    starts_at: float
    state: JobState = JobState.QUEUED
    passed_at: float | None = None
    trained_s: float = 0.0
    finished_at: float | None = None
    dies_at: float | None = None
    broken: bool = False
    message: str = ""

    @property
    def stage(self) -> str:
        return self.spec.labels["stage"]

    @property
    def folder(self) -> str:
        return f".mergetune/{self.spec.labels['run']}/{self.stage}"

    @property
    def attempt(self) -> int:
        return int(self.spec.labels["attempt"])


@dataclass
class SimWorld:
    """Everything outside the controller. `fence` and `claims` off are the weaker designs that are compared."""

    random: random.Random
    faults: Faults = field(default_factory=Faults)
    work_s: float = 1800.0
    queue_s: float = 30.0  # at most so long a job waits for its machine,
    queue_least_s: float = 0.0  # and after this
    fence: bool = True
    time: float = 1_800_000_000.0
    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    job_list: list[Job] = field(default_factory=list)
    tags: dict[str, Tag] = field(default_factory=dict)
    calls: int = 0
    writes: list[str] = field(default_factory=list)  # every call that would change something, made or failed

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass; jobs start, work and end in it."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + SAVE_S)
            for job in self.job_list:
                self._step(job)

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]

    def _step(self, job: Job) -> None:
        if job.state is JobState.QUEUED and self.time > job.starts_at:
            job.state = JobState.RUNNING
            if self.fence and not self._pass_fence(job):
                self._end(job, JobState.SUCCEEDED, "superseded")
                return
            job.passed_at = self.time
        if job.state is not JobState.RUNNING or job.passed_at is None:
            return
        job.trained_s = self.time - job.passed_at
        if self.fence and self._winner(job) != job.id:
            self._end(job, JobState.SUCCEEDED, "superseded")
        elif job.dies_at is not None and self.time >= job.dies_at:
            self._end(job, JobState.FAILED, "node lost")
        elif job.trained_s >= self.work_s:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        if job.broken or job.spec.repo not in self.repos:
            self._end(job, JobState.FAILED, "")
            return
        manifest = {"run_id": job.spec.labels["run"], "stage": job.stage, "attempt": job.attempt}
        self.put(job.spec.repo, {f"{job.folder}/{MANIFEST}": json.dumps(manifest).encode()})
        self._end(job, JobState.SUCCEEDED, "")

    def _end(self, job: Job, state: JobState, message: str) -> None:
        job.state, job.message, job.finished_at = state, message, self.time

    def _winner(self, job: Job) -> str:
        if f"{job.folder}/{WINNER}" not in self.repos.get(job.spec.repo, [{}])[-1]:
            return ""  # somebody deleted the repository
        return str(json.loads(self.files(job.spec.repo)[f"{job.folder}/{WINNER}"])["job_id"])

    def _pass_fence(self, job: Job) -> bool:
        path = f"{job.folder}/{WINNER}"
        if job.spec.repo not in self.repos or f"{job.folder}/{MANIFEST}" in self.files(job.spec.repo):
            return False
        if path in self.files(job.spec.repo):
            winner = json.loads(self.files(job.spec.repo)[path])
            if winner["attempt"] >= job.attempt and winner["job_id"] != job.id:
                return False
        self.put(job.spec.repo, {path: json.dumps({"attempt": job.attempt, "job_id": job.id}).encode()})
        return True

    def put(self, repo: str, files: Mapping[str, bytes]) -> str:
        self.repos[repo].append({**self.repos[repo][-1], **files})
        return f"{repo}@{len(self.repos[repo]) - 1}"

    # What happened, for the checks.

    def trainings(self, stage: str = "train") -> list[Job]:
        """The jobs that passed the fence and worked."""
        return [job for job in self.job_list if job.stage == stage and job.passed_at is not None]

    def overlaps(self) -> list[tuple[Job, Job]]:
        """Pairs of jobs that worked on the same stage of the same run at the same time, for longer than one look."""
        found = []
        for index, one in enumerate(self.job_list):
            for other in self.job_list[index + 1 :]:
                if one.folder == other.folder and _shared_s(one, other) > SAVE_S:
                    found.append((one, other))
        return found


def _shared_s(one: Job, other: Job) -> float:
    if one.passed_at is None or other.passed_at is None:
        return 0.0
    starts = max(one.passed_at, other.passed_at)
    return min(one.passed_at + one.trained_s, other.passed_at + other.trained_s) - starts


class SimClock:
    """One controller's clock, which may be off."""

    def __init__(self, world: SimWorld) -> None:
        self.world = world
        self.off_s = world.random.uniform(-1, 1) * world.faults.skew_s

    def now(self) -> float:
        return self.world.time + self.off_s

    def sleep(self, seconds: float) -> None:
        self.world.advance(seconds)


LOST = HubError(Access.UNREACHABLE, "the answer was lost")
DOWN = HubError(Access.UNREACHABLE, "503")


class SimRemote:
    """One controller's way into the world: each call may fail, lose its answer or be the last one of the process.

    `troubles` are the next answers of a call by its name: None is the true one, LOST the true one that gets lost.
    `before` is told every call's name before it is made.
    """

    def __init__(self, world: SimWorld, step: Callable[[], None] = lambda: None, kill_at: int | None = None) -> None:
        self.world = world
        self.step = step
        self.kill_at = kill_at
        self.calls = 0
        self.clock = SimClock(world)
        self.troubles: dict[str, list[HubError | None]] = {}
        self.before: Callable[[str], None] = lambda name: None

    def _do(self, action: Callable[[], Any], name: str) -> Any:
        self.step()
        world, chance = self.world, self.world.random.random
        self.calls += 1
        world.calls += 1
        if name in WRITES:
            world.writes.append(name)
        self.before(name)
        if world.faults.stalled and chance() < world.faults.stalled:
            world.advance(STALL_S)
        trouble = self.troubles[name].pop(0) if self.troubles.get(name) else None
        if trouble is LOST:
            action()
        if trouble is not None:
            raise trouble
        before = self.kill_at == 2 * self.calls - 1 or chance() < world.faults.killed / 2
        if before:
            raise Killed
        if chance() < world.faults.unreachable:
            raise HubError(Access.UNREACHABLE, "no answer")
        try:
            answer = action()
        finally:
            if self.kill_at == 2 * self.calls or chance() < world.faults.killed / 2:
                raise Killed
        if chance() < world.faults.lost:
            raise HubError(Access.UNREACHABLE, "the answer was lost")
        return answer

    def _ask(self, action: Callable[[], Any], name: str) -> Any:
        """A read: asked three times, as the Hub's client here does."""
        for _ in range(2):
            try:
                return self._do(action, name)
            except HubError as error:
                if error.access is not Access.UNREACHABLE:
                    raise
        return self._do(action, name)

    def view(self, repo: str, folder: str) -> StageView:
        def look() -> StageView:
            if repo not in self.world.repos:
                return StageView()
            files, head = self.world.files(repo), f"{repo}@{len(self.world.repos[repo]) - 1}"
            return read_view(head, {n: files[f"{folder}/{n}"] for n in VIEWED if f"{folder}/{n}" in files})

        return self._ask(look, "view")

    def create_repo(self, repo: str, private: bool) -> None:
        self._do(lambda: self.world.repos.setdefault(repo, [{}]), "create_repo")

    def commit(self, repo: str, parent: str, message: str, files: Mapping[str, bytes | Path]) -> str:
        def write() -> str:
            if repo not in self.world.repos:
                raise HubError(Access.MISSING, "there is no such repository")
            if parent != f"{repo}@{len(self.world.repos[repo]) - 1}":
                raise HubError(Access.MOVED, "the head is another")
            return self.world.put(repo, {path: c if isinstance(c, bytes) else b"" for path, c in files.items()})

        return self._do(write, "commit")

    def submit(self, spec: JobSpec) -> str:
        def start() -> str:
            world = self.world
            starts_at = world.time + world.queue_least_s + world.random.random() * world.queue_s
            job = Job(f"job{len(world.job_list)}", spec, world.time, starts_at)
            if world.random.random() < world.faults.node_lost:
                job.dies_at = job.starts_at + world.random.random() * world.work_s
            job.broken = world.random.random() < world.faults.broken
            world.job_list.append(job)
            return job.id

        return self._do(start, "submit")

    def jobs(self, namespace: str, labels: Mapping[str, str], live: bool) -> tuple[SeenJob, ...]:
        def listing() -> tuple[SeenJob, ...]:
            world = self.world
            shown = [job for job in world.job_list if world.time - job.created_at >= world.faults.list_lag_s]
            shown = [job for job in shown if all(job.spec.labels.get(k) == v for k, v in labels.items())]
            seen = (self._seen(job) for job in shown if job.spec.namespace == namespace)
            return tuple(job for job in seen if job.is_live or not live)

        return self._ask(listing, "jobs")

    def inspect(self, namespace: str, job_id: str) -> SeenJob | None:
        found = lambda: next((self._seen(job) for job in self.world.job_list if job.id == job_id), None)  # noqa: E731
        return self._ask(found, "inspect")

    def log(self, namespace: str, job_id: str, *, whole: bool = False) -> str:
        return self._ask(lambda: "ValueError: bad data\n", "log")

    def logs(self, namespace: str, job_ids: Collection[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for job_id in job_ids:
            with suppress(HubError):
                found[job_id] = self._ask(lambda: "", "log")
        return found

    def cancel(self, namespace: str, job_id: str) -> None:
        def stop() -> None:
            job = next(job for job in self.world.job_list if job.id == job_id)
            if job.state in (JobState.QUEUED, JobState.RUNNING):
                job.state, job.finished_at = JobState.CANCELLED, self.world.time

        self._do(stop, "cancel")

    def resolve(self, repo: str, kind: str, revision: str | None) -> str:
        return self._ask(lambda: "a" * 40, "resolve")

    def _seen(self, job: Job) -> SeenJob:
        labels, world = job.spec.labels, self.world
        ran = max(0.0, (job.finished_at or world.time) - job.starts_at) if job.state is not JobState.QUEUED else 0.0
        stage = StageName(labels["stage"])
        return SeenJob(
            id=job.id,
            experiment=labels["experiment"],
            run_id=labels["run"],
            stage=stage,
            attempt=job.attempt,
            state=job.state,
            created_at=job.created_at,
            running_s=ran,
            flavor=job.spec.flavor,
            repo=job.spec.repo,
            finished_at=job.finished_at,
            message=job.message,
        )


class SimBook:
    """The tags, behind the same misfortunes as everything else."""

    def __init__(self, remote: SimRemote) -> None:
        self.remote = remote

    def read_book(self) -> Book:
        return self.remote._ask(lambda: make_book(self.remote.world.tags.values()), "read_book")

    def push_tag(self, name: str, commit: str, message: str) -> None:
        self.remote._do(lambda: self.remote.world.tags.setdefault(name, Tag(name, commit, message)), "push_tag")

    def push_tags(self, commit: str, messages: Mapping[str, str]) -> None:
        # One by one: a push of many may have been carried out in part when its answer is lost.
        for name, message in messages.items():
            self.push_tag(name, commit, message)


class Interleaved:
    """Runs several controllers as threads, of which exactly one moves at a time, chosen at every call."""

    def __init__(self, world: SimWorld) -> None:
        self.world = world
        self.turn: int | None = None
        self.waiting: set[int] = set()
        self.changed = threading.Condition()

    def run(self, bodies: list[Callable[[Callable[[], None]], None]]) -> None:
        """Run every body to its end; each gets the function that hands over the turn."""
        threads = [threading.Thread(target=self._body, args=(n, body), daemon=True) for n, body in enumerate(bodies)]
        alive = set(range(len(bodies)))
        self.alive = alive
        for thread in threads:
            thread.start()
        with self.changed:
            while alive:
                self.changed.wait_for(lambda: self.turn is None and self.waiting >= alive, timeout=30)
                if not alive:
                    break
                self.turn = self.world.random.choice(sorted(alive))
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn is None, timeout=30)
        for thread in threads:
            thread.join(timeout=30)

    def _body(self, number: int, body: Callable[[Callable[[], None]], None]) -> None:
        def hand_over() -> None:
            with self.changed:
                if self.turn == number:
                    self.turn = None
                self.waiting.add(number)
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn == number, timeout=30)
                self.waiting.discard(number)

        hand_over()
        try:
            body(hand_over)
        finally:
            with self.changed:
                self.alive.discard(number)
                self.turn = None
                self.changed.notify_all()
