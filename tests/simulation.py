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
from pipeline.remote import MANIFEST, NOBODY, REQUEST, VIEWED, WINNER, JobSpec, JobState, SeenJob, StageView, read_view

JOIN_S = 1200.0  # a node waits so long for the others of its attempt
TRAINS = 'MERGETUNE {"event": "phase", "name": "train"}\n'
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
    """One simulated job; `trained_s` is how long it worked, which is what must not be paid twice.

    It works from the fence on; of several nodes each works from when all of them have passed theirs (`began_at`).
    """

    id: str
    spec: JobSpec
    created_at: float
    starts_at: float
    state: JobState = JobState.QUEUED
    passed_at: float | None = None
    began_at: float | None = None
    trained_s: float = 0.0
    log: str = "ValueError: bad data\n"
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

    @property
    def node(self) -> int:
        return int(self.spec.labels.get("node", 0))

    @property
    def winner_path(self) -> str:
        return f"{self.folder}/winner-{self.node}.json" if self.node else f"{self.folder}/{WINNER}"


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
            job.began_at = self.time if self._nodes(job) == 1 else None
        if job.state is not JobState.RUNNING or job.passed_at is None:
            return
        job.trained_s = self.time - job.began_at if job.began_at is not None else 0.0
        if self.fence and self._is_shut_out(job):
            self._end(job, JobState.SUCCEEDED, "superseded")
        elif job.dies_at is not None and self.time >= job.dies_at:
            self._end(job, JobState.FAILED, "node lost")
        elif job.began_at is None:
            self._meet(job)
        elif job.trained_s >= self.work_s:
            self._finish(job)
        elif any(peer.state is not JobState.RUNNING and not self._has_worked(peer) for peer in self._peers(job)):
            job.log = "the connection to another node was lost\n"
            self._end(job, JobState.FAILED, "")

    def _meet(self, job: Job) -> None:
        """Begin together with all nodes of the attempt, or wait for them a while."""
        there = [peer for peer in self._peers(job) if peer.passed_at is not None]
        is_whole = len({peer.node for peer in there}) == self._nodes(job) - 1
        if is_whole and all(peer.state is JobState.RUNNING for peer in there):
            job.began_at = self.time
        if job.began_at is None and job.passed_at is not None and self.time - job.passed_at > JOIN_S:
            job.log = "node 2 of 2 did not come within 20 minutes\n"
            self._end(job, JobState.FAILED, "")

    def _has_worked(self, job: Job) -> bool:
        return job.began_at is not None and job.trained_s >= self.work_s

    def _nodes(self, job: Job) -> int:
        """How many nodes its run.json asks for; without a repository it is alone."""
        request = self.repos.get(job.spec.repo, [{}])[-1].get(f"{job.folder}/{REQUEST}", b"")
        return int(json.loads(request).get("nodes", 1)) if request else 1

    def _peers(self, job: Job) -> list[Job]:
        """The jobs of the attempt's other nodes that passed their fences."""
        group = [other for other in self.job_list if (other.folder, other.attempt) == (job.folder, job.attempt)]
        return [other for other in group if other.node != job.node and other.passed_at is not None]

    def _finish(self, job: Job) -> None:
        if job.node:
            self._end(job, JobState.SUCCEEDED, "")
            return
        if job.broken or job.spec.repo not in self.repos:
            self._end(job, JobState.FAILED, "")
            return
        manifest = {"run_id": job.spec.labels["run"], "stage": job.stage, "attempt": job.attempt}
        self.put(job.spec.repo, {f"{job.folder}/{MANIFEST}": json.dumps(manifest).encode()})
        self._end(job, JobState.SUCCEEDED, "")

    def _end(self, job: Job, state: JobState, message: str) -> None:
        job.state, job.message, job.finished_at = state, message, self.time

    def _winners(self, job: Job) -> dict[str, dict[str, Any]]:
        """The winner of every node, by its path; none where somebody deleted the repository."""
        files = self.repos.get(job.spec.repo, [{}])[-1]
        return {path: json.loads(files[path]) for path in files if path.startswith(f"{job.folder}/winner")}

    def _is_shut_out(self, job: Job) -> bool:
        """What a node sees when it looks at the fence again: the first when it saves, another when it waits."""
        winners = self._winners(job)
        if job.node and job.began_at is not None:
            return False  # it ends when the first one does
        return winners.get(job.winner_path, {}).get("job_id") != job.id or self._is_over(job, winners)

    def _is_over(self, job: Job, winners: dict[str, dict[str, Any]]) -> bool:
        if job.node == 0 and job.began_at is not None:
            return False
        first = winners.get(f"{job.folder}/{WINNER}", {"attempt": 0, "job_id": ""})
        shut = first["job_id"] == NOBODY and first["attempt"] >= job.attempt
        return shut or any(winner["attempt"] > job.attempt for winner in winners.values())

    def _pass_fence(self, job: Job) -> bool:
        if job.spec.repo not in self.repos or f"{job.folder}/{MANIFEST}" in self.files(job.spec.repo):
            return False
        winners = self._winners(job)
        winner = winners.get(job.winner_path, {"attempt": 0, "job_id": ""})
        if self._is_over(job, winners) or (winner["attempt"] >= job.attempt and winner["job_id"] != job.id):
            return False
        self.put(job.spec.repo, {job.winner_path: json.dumps({"attempt": job.attempt, "job_id": job.id}).encode()})
        return True

    def put(self, repo: str, files: Mapping[str, bytes]) -> str:
        self.repos[repo].append({**self.repos[repo][-1], **files})
        return f"{repo}@{len(self.repos[repo]) - 1}"

    # What happened, for the checks.

    def log_of(self, job_id: str) -> str:
        """What a job has said: nothing before it works, and its error last."""
        job = next(job for job in self.job_list if job.id == job_id)
        said = TRAINS if job.began_at is not None else ""
        return said + job.log if job.finished_at is not None else said

    def trainings(self, stage: str = "train") -> list[Job]:
        """The jobs that passed the fence and worked; of several nodes that worked together, the first one's."""
        return [job for job in self.job_list if job.stage == stage and job.began_at is not None and job.node == 0]

    def overlaps(self) -> list[tuple[Job, Job]]:
        """Pairs of jobs that worked on the same stage of the same run at the same time, for longer than one look.

        Other nodes are no such pair: they work only together with the first of their attempt.
        """
        found = []
        for index, one in enumerate(self.job_list):
            for other in self.job_list[index + 1 :]:
                if (one.folder, one.node) == (other.folder, other.node) and _shared_s(one, other) > SAVE_S:
                    found.append((one, other))
        return found


def _shared_s(one: Job, other: Job) -> float:
    if one.began_at is None or other.began_at is None:
        return 0.0
    starts = max(one.began_at, other.began_at)
    return min(one.began_at + one.trained_s, other.began_at + other.trained_s) - starts


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
        return self._ask(lambda: self.world.log_of(job_id), "log")

    def logs(self, namespace: str, job_ids: Collection[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for job_id in job_ids:
            with suppress(HubError):
                found[job_id] = self._ask(lambda job_id=job_id: self.world.log_of(job_id), "log")
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
            node=job.node,
            revision=job.spec.revision,
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
