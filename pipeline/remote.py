"""A place where stages run as paid jobs and artifacts are repositories: its values and its port, no implementation.

`backends/hf_jobs.py` is the Hub; the simulation in the tests is another. Every method may raise HubError: with
`Access.UNREACHABLE` when nobody can say whether it happened, with any other answer when it surely did not.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from pipeline.plan import StageName

FOLDER = ".mergetune"
CLAIM, WINNER, MANIFEST, REQUEST = "claim.json", "winner.json", "manifest.json", "run.json"
VIEWED = (CLAIM, WINNER, MANIFEST, REQUEST)
NOBODY = "nobody"  # the job id of a fence that was closed so that no job passes
LOCAL = "local-"  # how the name begins that an adapter trained on somebody's machine has in place of a job's id


class JobState(StrEnum):
    """What became of a job, whatever the backend calls it."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


LIVE = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class SeenJob:
    """One job as a listing shows it. `message` is the server's own reason; times are seconds (`created_at`: epoch).

    `node` is which of the machines of its attempt it is, `revision` the commit of `repo` that it mounts.
    """

    id: str
    experiment: str
    run_id: str
    stage: StageName
    attempt: int
    state: JobState
    created_at: float
    running_s: float
    flavor: str
    repo: str
    finished_at: float | None = None
    message: str = ""
    url: str = ""
    node: int = 0
    revision: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it costs money now or soon."""
        return self.state in LIVE


@dataclass(frozen=True)
class Claim:
    """`claim.json`: whose submit this is. `by` is drawn anew for every submit; `job_id` is written after it.

    `more_ids` are the jobs of an attempt on several nodes that were started after the first; `ended` says why the
    controller itself ended them: without it, a job that was cancelled was cancelled by a person.
    """

    attempt: int
    at: float
    by: str
    posts: int = 0
    job_id: str | None = None
    more_ids: tuple[str, ...] = ()
    ended: str = ""

    @property
    def job_ids(self) -> tuple[str, ...]:
        """Every job that is named."""
        return (*([self.job_id] if self.job_id else []), *self.more_ids)

    def with_job(self, job_id: str) -> "Claim":
        """The claim with one more job in it."""
        if job_id in self.job_ids:
            return self
        return replace(self, more_ids=(*self.more_ids, job_id)) if self.job_id else replace(self, job_id=job_id)

    def as_bytes(self) -> bytes:
        """The file; of one job it is what it was before there were nodes."""
        new = ("more_ids", "ended")
        return as_json({key: value for key, value in vars(self).items() if value or key not in new})


UNREADABLE = Claim(1, math.inf, "unreadable")  # a lease that never ends


@dataclass(frozen=True)
class Winner:
    """`winner.json`: the job that passed the fence, and so the only one that works on this stage."""

    attempt: int
    job_id: str


@dataclass(frozen=True)
class StageView:
    """What a stage's repository says: `head` None when there is no repository, `claim` None when nobody submitted.

    `request` is the claim's `run.json`.
    """

    head: str | None = None
    claim: Claim | None = None
    winner: Winner | None = None
    manifest: Mapping[str, Any] | None = None
    request: Mapping[str, Any] | None = None

    @property
    def attempt(self) -> int:
        """The latest attempt that left a trace; 0 when there is none."""
        return max(self.claim.attempt if self.claim else 0, self.winner.attempt if self.winner else 0)

    @property
    def job_ids(self) -> set[str]:
        """The jobs that claim and fence name."""
        named = (*(self.claim.job_ids if self.claim else ()), self.winner and self.winner.job_id)
        return {job_id for job_id in named if job_id and not job_id.startswith(LOCAL)}


@dataclass(frozen=True)
class Load:
    """One sample of a job's machine: memory in GiB, and the busy part of its GPUs (0 to 1; none without one)."""

    memory_gib: float
    memory_total_gib: float
    gpu_busy: float | None = None
    gpu_memory_gib: float | None = None

    def __str__(self) -> str:
        text = f"memory {self.memory_gib:.1f} of {self.memory_total_gib:.0f} GiB"
        if self.gpu_busy is None or self.gpu_memory_gib is None:
            return text
        return f"{text}, GPU {self.gpu_busy:.0%} busy with {self.gpu_memory_gib:.1f} GiB"


@dataclass(frozen=True)
class JobSpec:
    """One job to submit: what runs where, for how long at most, and under which labels it is found again.

    Jobs of one network group reach each other, by the aliases that each of them takes.
    """

    namespace: str
    flavor: str
    timeout_s: int
    command: tuple[str, ...]
    repo: str
    revision: str
    mount: str
    labels: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    network_group: str | None = None
    network_aliases: tuple[str, ...] = ()


class Clock(Protocol):
    """Time, so that a test can own it."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""
        ...


class Remote(Protocol):
    """What the controller asks of the world."""

    def view(self, repo: str, folder: str) -> StageView:
        """The small files of one stage's folder, at the repository's head."""
        ...

    def create_repo(self, repo: str, private: bool) -> None:
        """Make the repository if it is not there."""
        ...

    def commit(self, repo: str, parent: str, message: str, files: Mapping[str, bytes | Path]) -> str:
        """Commit on top of `parent` or raise `Access.MOVED`; returns the new commit."""
        ...

    def submit(self, spec: JobSpec) -> str:
        """Start a paid job; returns its id."""
        ...

    def jobs(self, namespace: str, labels: Mapping[str, str], live: bool) -> tuple[SeenJob, ...]:
        """The jobs with these labels; all of them, or only the live ones."""
        ...

    def inspect(self, namespace: str, job_id: str) -> SeenJob | None:
        """One job by its id, None when the server knows no such job."""
        ...

    def log(self, namespace: str, job_id: str, *, whole: bool = False) -> str:
        """The last part of a job's log, or all of it."""
        ...

    def logs(self, namespace: str, job_ids: Collection[str]) -> Mapping[str, str]:
        """The logs of several jobs by id, read side by side; one that is not to be had is left out."""
        ...

    def follow(self, namespace: str, job_id: str) -> Iterator[str]:
        """A job's log from its beginning, line by line, until it ends."""
        ...

    def load(self, namespace: str, job_id: str) -> Load | None:
        """What a job's machine does at this moment, None when it does not run."""
        ...

    def cancel(self, namespace: str, job_id: str) -> None:
        """Ask a job to stop; one that has ended stays as it is."""
        ...

    def resolve(self, repo: str, kind: str, revision: str | None) -> str:
        """The commit that a revision names now."""
        ...


def stage_folder(run_id: str, stage: StageName) -> str:
    """Where a stage keeps its claim, its winner and its manifest in its repository."""
    return f"{FOLDER}/{run_id}/{stage}"


def read_view(head: str | None, files: Mapping[str, bytes]) -> StageView:
    """A view of the files of one stage folder by name. A file that is not ours to read counts as the safe case.

    A claim or winner that cannot be parsed is one that nobody may pass: it blocks, it never frees.
    """
    claim, winner, manifest, request = (_object(files.get(name)) for name in VIEWED)
    return StageView(head, _claim(claim), _winner(winner), manifest, request)


def read_load(sample: Mapping[str, Any]) -> Load:
    """One event of the Hub's metrics stream: bytes, and percents by GPU."""
    gpus = [gpu for gpu in dict(sample.get("gpus") or {}).values() if isinstance(gpu, dict)]
    busy = sum(float(gpu.get("utilization", 0)) for gpu in gpus) / 100 / len(gpus) if gpus else None
    held = sum(float(gpu.get("memory_used_bytes", 0)) for gpu in gpus) / 2**30 if gpus else None
    used, total = (float(sample.get(f"memory_{name}_bytes", 0)) / 2**30 for name in ("used", "total"))
    return Load(used, total, busy, held)


def as_json(value: object) -> bytes:
    """Readable JSON with a line end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _object(content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _claim(value: dict[str, Any] | None) -> Claim | None:
    if value is None:
        return None
    try:
        claim = Claim(int(value["attempt"]), float(value["at"]), str(value["by"]), int(value["posts"]), value["job_id"])
        more = tuple(str(job_id) for job_id in value.get("more_ids", ()))
        claim = replace(claim, more_ids=more, ended=str(value.get("ended", "")))
    except (KeyError, TypeError, ValueError, OverflowError):
        return UNREADABLE
    return claim if math.isfinite(claim.at) else UNREADABLE


def _winner(value: dict[str, Any] | None) -> Winner | None:
    if value is None:
        return None
    try:
        return Winner(int(value["attempt"]), str(value["job_id"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return Winner(1, NOBODY)
