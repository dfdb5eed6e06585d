"""Jobs of the loopback Hub: what was asked, how far it is, what it printed. Starts no process and serves no route."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from servers.hub_accounts import object_id
from servers.hub_world import moment

DEFAULT_TIMEOUT_S = 30 * 60  # The Hub's own, where the request names none.
TERMINAL = {"COMPLETED", "ERROR", "CANCELED", "DELETED"}
TIMEOUT_MESSAGE = "Job timeout"  # There is no stage of that name: the message is all that tells.


@dataclass
class Job:
    """One job. `spec` is the request's body without its secrets; `changed` is notified of every line and stage."""

    id: str
    namespace: str
    owner_type: str
    creator: str
    created: float
    spec: dict[str, Any]
    labels: dict[str, str]
    secrets: dict[str, str] = field(repr=False)
    stage: str = "SCHEDULING"
    message: str | None = None
    cancel_reason: str | None = None
    failures: int = 0
    started: float | None = None
    finished: float | None = None
    lines: list[tuple[float, str]] = field(default_factory=list, repr=False)
    pid: int | None = None
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def flavor(self) -> str:
        """The hardware asked for."""
        return self.spec["flavor"]

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        return [*self.spec.get("command", []), *self.spec.get("arguments", [])]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that everybody may see."""
        return self.spec.get("environment", {})

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """What is mounted, and where."""
        return self.spec.get("volumes", [])

    @property
    def secret_names(self) -> list[str]:
        """Names only; the values never leave the Hub."""
        return sorted(self.secrets)

    @property
    def attempts(self) -> int:
        """How often the command may be started."""
        return self.spec.get("attempts", 1)

    @property
    def timeout_s(self) -> float:
        """How long one attempt may run."""
        return self.spec.get("timeoutSeconds") or DEFAULT_TIMEOUT_S

    @property
    def log(self) -> str:
        """Everything printed."""
        return "".join(f"{text}\n" for _, text in self.lines)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.stage in TERMINAL

    def begin(self, now: float) -> bool:
        """SCHEDULING to RUNNING; False where somebody was faster and ended it."""
        with self.changed:
            if self.over:
                return False
            self.stage, self.started = "RUNNING", self.started or now
            self.changed.notify_all()
        return True

    def end(self, stage: str, now: float, message: str | None = None, cancel_reason: str | None = None) -> bool:
        """To a terminal stage, once; False where it is in one already."""
        with self.changed:
            if self.over:
                return False
            self.stage, self.message, self.cancel_reason, self.finished = stage, message, cancel_reason, now
            self.changed.notify_all()
        return True

    def say(self, text: str, now: float) -> None:
        """One more line of its log."""
        with self.changed:
            self.lines.append((now, text))
            self.changed.notify_all()


def job_json(job: Job, now: float) -> dict[str, Any]:
    """The job as the Hub describes it."""
    copied = ("dockerImage", "spaceId", "command", "arguments", "volumes", "arch", "resourceGroupId", "network")
    facts = {key: job.spec[key] for key in copied if job.spec.get(key) is not None}
    times = {"startedAt": job.started, "finishedAt": job.finished}
    creator = {"id": object_id(job.creator), "name": job.creator}
    owner = {"id": object_id(job.namespace), "name": job.namespace, "avatarUrl": f"/avatars/{job.namespace}.svg"}
    return {
        **facts,
        **{key: moment(at) for key, at in times.items() if at is not None},
        "type": "job",
        "id": job.id,
        "createdAt": moment(job.created),
        "environment": job.environment,
        "secrets": job.secret_names,
        "flavor": job.flavor,
        "timeout": job.timeout_s,
        "retry": job.attempts - 1,
        "labels": job.labels,
        "createdBy": creator,
        "owner": {**owner, "type": job.owner_type},
        "initiator": {**creator, "type": "user", "avatarUrl": f"/avatars/{job.creator}.svg"},
        "durations": _durations(job, now),
        "status": _status(job),
    }


def _durations(job: Job, now: float) -> dict[str, int]:
    end = job.finished or now
    total = {"totalSecs": int(end - job.created)}
    if job.started is None:
        return total
    return {"schedulingSecs": int(job.started - job.created), "runningSecs": int(end - job.started), **total}


def _status(job: Job) -> dict[str, Any]:
    status = {"stage": job.stage, "message": job.message, "failureCount": job.failures}
    return status | ({"cancelReason": job.cancel_reason} if job.cancel_reason else {})


class JobBoard:
    """All jobs, in the order of their submission."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.list_lag_s = 0.0

    def listed(self, namespace: str, stages: list[str], labels: list[str], now: float) -> list[Job]:
        """Newest first: those old enough to be in the index, in one of the stages, with all of the labels."""
        return [
            job
            for job in reversed(list(self.jobs.values()))
            if job.namespace == namespace
            and now - job.created >= self.list_lag_s
            and (not stages or job.stage in stages)
            and all(_has_label(job, label) for label in labels)
        ]


def _has_label(job: Job, label: str) -> bool:
    key, _, value = label.partition("=")
    return job.labels.get(key) == value


def follow(job: Job, stop: threading.Event, tail: int | None, keep_alive_s: float = 30.0) -> Iterator[bytes]:
    """The log as server-sent events: what there is, then what comes, until the job is over.

    The keep-alive must stay rarer than 5 s: a client that does not follow leaves after 5 silent seconds.
    """
    if job.started is not None:
        yield _event(job.started, f"===== Job started at {moment(job.started)[:19].replace('T', ' ')} =====")
    sent, silent_s = max(0, len(job.lines) - tail) if tail is not None else 0, 0.0
    while not stop.is_set():
        with job.changed:
            fresh, over = job.lines[sent:], job.over
            if not fresh and not over:
                silent_s = 0.0 if job.changed.wait(0.5) else silent_s + 0.5
        if fresh:
            sent += len(fresh)
            yield b"".join(_event(at, text) for at, text in fresh)
        elif over:
            return
        elif silent_s >= keep_alive_s:
            silent_s = 0.0
            yield b": keep-alive\n\n"


def _event(at: float, text: str) -> bytes:
    return f"data: {json.dumps({'data': text, 'timestamp': moment(at)})}\n\n".encode()


def measure(job: Job, stop: threading.Event) -> Iterator[bytes]:
    """Usage once a second while the job runs, as server-sent events; the numbers are the idle container's."""
    idle = {"cpu_usage_pct": 0, "cpu_millicores": 2000, "memory_used_bytes": 0, "memory_total_bytes": 16 << 30}
    while not stop.is_set() and not job.over:
        yield f"data: {json.dumps({**idle, 'rx_bps': 0, 'tx_bps': 0, 'gpus': {}, 'replica': '0'})}\n\n".encode()
        with job.changed:
            job.changed.wait(1.0)
