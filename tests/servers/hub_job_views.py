"""Views on jobs: submit, inspect, list, follow, cancel, label, hardware and rights."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.flavors import FLAVORS, Flavor
from servers.hub_accounts import NO_CREDIT, Token, object_id
from servers.hub_description import require_body
from servers.hub_http import Answer, Call, HubError, Route, json_answer, route
from servers.hub_job_process import kill_group
from servers.hub_jobs import Job, JobBoard, follow, job_json, measure
from servers.hub_network import check_network
from servers.hub_repo_views import paged
from servers.hub_world import World, readable_repo

SUBMIT = "/api/jobs/{namespace}"
# What the Hub lists for one accelerator, GB; our catalogue holds what a process can allocate.
NOMINAL_GB = {"T4": 16, "L4": 24, "A10G": 24, "L40S": 48, "A100": 80, "H200": 141, "RTX PRO 6000": 96}
LABELS = "/api/jobs/{namespace}/{jobId}/labels"


@dataclass(frozen=True)
class JobViews:
    """The views with the board they show; `start` sets a submitted job going."""

    board: JobBoard
    start: Callable[[Job], None]
    stop: threading.Event

    def routes(self) -> list[Route]:
        """Fixed words come before `{job_id}`."""
        return [
            route("GET", "/api/jobs/hardware", hardware),
            route("POST", "/api/jobs/{namespace}/auth-check/{need}", auth_check),
            route("POST", "/api/jobs/{namespace}", self.submit),
            route("GET", "/api/jobs/{namespace}", self.list),
            route("GET", "/api/jobs/{namespace}/count", self.count),
            route("GET", "/api/jobs/{namespace}/{job_id}", self.inspect),
            route("POST", "/api/jobs/{namespace}/{job_id}/auth-check/{need}", self.auth_check_job),
            route("GET", "/api/jobs/{namespace}/{job_id}/logs", self.logs),
            route("GET", "/api/jobs/{namespace}/{job_id}/metrics", self.metrics),
            route("POST", "/api/jobs/{namespace}/{job_id}/cancel", self.cancel),
            route("PUT", "/api/jobs/{namespace}/{job_id}/labels", self.labels),
        ]

    def submit(self, world: World, call: Call, namespace: str) -> Answer:
        """Rights first (403), then the body (400), then credit (402), as the Hub does."""
        token = world.accounts.require_jobs(world.accounts.token(call.secret), namespace)
        body = require_body("post", SUBMIT, call.json())
        if not (body.get("dockerImage") or body.get("spaceId")) or not body.get("command"):
            raise HubError(400, "Invalid input: dockerImage or spaceId, and command, are required")
        check_network(body)
        for volume in body.get("volumes", []):
            if volume["type"] != "bucket":
                repo = readable_repo(world, call, volume["type"], volume["source"])
                repo.resolve(volume.get("revision") or "main")
        if namespace in world.accounts.without_credit:
            raise HubError(402, NO_CREDIT)
        job = self._store(world, namespace, token, body)
        self.start(job)
        return json_answer(job_json(job, world.clock()))

    def _store(self, world: World, namespace: str, token: Token, body: dict[str, Any]) -> Job:
        now = world.clock()
        spec = {key: value for key, value in body.items() if key not in ("secrets", "labels")}
        kind = "org" if namespace in world.accounts.orgs else "user"
        with world.lock:
            number = len(self.board.jobs)
            job_id = hashlib.sha1(f"{world.url} {number}".encode()).hexdigest()[:24]
            labels, secrets = dict(body.get("labels") or {}), dict(body.get("secrets") or {})
            job = Job(job_id, namespace, kind, token.user, now, spec, labels, secrets)
            self.board.jobs[job_id] = job
        return job

    def _find(self, world: World, call: Call, namespace: str, job_id: str, need: str = "read") -> Job:
        world.accounts.require_jobs(world.accounts.token(call.secret), namespace, need)
        job = self.board.jobs.get(job_id)
        if job is None or job.namespace != namespace:
            raise HubError(404, "Job not found")
        return job

    def list(self, world: World, call: Call, namespace: str) -> Answer:
        """Filters by any of the stages and all of the labels; pages end with a Link header."""
        world.accounts.require_jobs(world.accounts.token(call.secret), namespace, "read")
        now = world.clock()
        found = self.board.listed(namespace, call.query.get("stage", []), call.query.get("label", []), now)
        return paged(world, call, [job_json(job, now) for job in found], "id")

    def count(self, world: World, call: Call, namespace: str) -> Answer:
        """How many are in the stages."""
        world.accounts.require_jobs(world.accounts.token(call.secret), namespace, "read")
        found = self.board.listed(namespace, call.query.get("stage", []), [], world.clock())
        return json_answer({"count": len(found)})

    def inspect(self, world: World, call: Call, namespace: str, job_id: str) -> Answer:
        """One job, also where the listing does not have it yet."""
        return json_answer(job_json(self._find(world, call, namespace, job_id), world.clock()))

    def auth_check_job(self, world: World, call: Call, namespace: str, job_id: str, need: str) -> Answer:
        """The right to one job."""
        self._find(world, call, namespace, job_id, need)
        return auth_check(world, call, namespace, need)

    def logs(self, world: World, call: Call, namespace: str, job_id: str) -> Answer:
        """Server-sent events: history, then what comes."""
        job = self._find(world, call, namespace, job_id)
        tail = int(call.first("tail")) if call.first("tail") else None
        return Answer(headers={"Content-Type": "text/event-stream"}, stream=follow(job, self.stop, tail))

    def metrics(self, world: World, call: Call, namespace: str, job_id: str) -> Answer:
        """Live only: 406 where the job is over, which the client takes for that."""
        job = self._find(world, call, namespace, job_id)
        if job.over:
            raise HubError(406, "Job is not running")
        return Answer(headers={"Content-Type": "text/event-stream"}, stream=measure(job, self.stop))

    def cancel(self, world: World, call: Call, namespace: str, job_id: str) -> Answer:
        """Ends the job and all its processes."""
        job = self._find(world, call, namespace, job_id, "write")
        job.end("CANCELED", world.clock())
        kill_group(job)
        return json_answer(job_json(job, world.clock()))

    def labels(self, world: World, call: Call, namespace: str, job_id: str) -> Answer:
        """Replaces all labels."""
        job = self._find(world, call, namespace, job_id, "write")
        job.labels = dict(require_body("put", LABELS, call.json())["labels"])
        return json_answer(job_json(job, world.clock()))


def without_secrets(call: Call) -> bytes:
    """The body as `hub.requests` keeps it: a token may stand in a job's `secrets` and nowhere else, masked there."""
    if call.method != "POST" or not re.fullmatch(r"/api/jobs/[^/]+", call.path):
        return call.start_of_body()
    try:
        body = call.json()
    except HubError:
        return call.start_of_body()
    return json.dumps(body | {"secrets": dict.fromkeys(body.get("secrets") or {}, "***")}).encode()


def auth_check(world: World, call: Call, namespace: str, need: str) -> Answer:
    """`POST .../auth-check/{read|write}`: the right alone, not the credit."""
    token = world.accounts.require_jobs(world.accounts.token(call.secret), namespace, need)
    named = {"namespace": namespace, "user": token.user}
    return json_answer({key: {"id": object_id(name), "name": name} for key, name in named.items()})


def hardware(world: World, call: Call) -> Answer:
    """`GET /api/jobs/hardware`: our own dated catalogue in the Hub's words."""
    return json_answer([_hardware_row(flavor) for flavor in FLAVORS.values()])


def _hardware_row(flavor: Flavor) -> dict[str, Any]:
    """Quantity and memory of the accelerators are strings, and the memory is the total of all of them."""
    accelerator = None
    if flavor.gpu:
        vram = f"{NOMINAL_GB[flavor.gpu] * flavor.gpus} GB"
        facts = {"type": "gpu", "model": flavor.gpu, "quantity": str(flavor.gpus), "vram": vram}
        accelerator = {**facts, "manufacturer": "Nvidia"}
    return {
        "name": flavor.name,
        "prettyName": flavor.name.replace("-", " ").title(),
        "cpu": f"{flavor.vcpus} vCPU",
        "ram": f"{flavor.ram_gib} GB",
        "ephemeralStorage": f"{flavor.disk_gb} GB",
        "accelerator": accelerator,
        "unitCostMicroUSD": round(flavor.usd_per_minute * 1e6),
        "unitCostUSD": round(flavor.usd_per_minute, 6),
        "unitLabel": "minute",
    }
