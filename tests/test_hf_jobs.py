"""The adapter to Hugging Face Jobs: every call about jobs, by the real client against the loopback Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_scene import LABELS, TOKEN, claimed_hub, jobs_of, refused, spec
from servers.hub import LoopbackHub
from servers.hub_faults import drop, hang, lose_response, status, truncate_list

from pipeline.diagnose import diagnose
from pipeline.hub_facts import Access
from pipeline.plan import StageName
from pipeline.remote import JobState, read_load

SUBMIT = r"/api/jobs/acme$"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with claimed_hub(tmp_path, monkeypatch) as hub:
        yield hub


def asked(hub: LoopbackHub, method: str, path: str) -> int:
    return sum((request.method, request.path.partition("?")[0]) == (method, path) for request in hub.requests)


# Submit.


def test_what_a_submit_sends(hub: LoopbackHub) -> None:
    job_id = jobs_of(hub).submit(spec(hub, environment={"STEPS": 1, "EMPTY": ""}))
    (sent,) = [json.loads(request.body) for request in hub.requests if request.path == "/api/jobs/acme"]
    assert sent["command"] == list(spec(hub).command)
    assert (sent["timeoutSeconds"], sent["flavor"]) == (5400, "a10g-small")
    assert sent["environment"].keys() >= {"STEPS", "EMPTY", "PYTHONUNBUFFERED"}
    assert all(isinstance(value, str) for value in sent["environment"].values())
    assert sent["labels"].items() >= LABELS.items()
    assert sent["labels"]["name"] == "tiny-0a1b2c3d-train"
    (volume,) = sent["volumes"]
    pinned = {"type": "model", "source": "acme/tiny-adapter", "revision": hub.head("acme/tiny-adapter")}
    assert volume.items() >= {**pinned, "mountPath": "/mergetune", "readOnly": True}.items()
    assert sent["secrets"] == {"HF_TOKEN": "***"}
    assert hub.jobs[job_id].secrets == {"HF_TOKEN": TOKEN}
    assert not any(TOKEN.encode() in request.body for request in hub.requests)


@pytest.mark.parametrize(
    ("fault", "started"), [(lose_response(), 1), (drop(), 0), (status(500, performed=True), 1), (status(503), 0)]
)
def test_a_submit_is_asked_once_whatever_becomes_of_its_answer(hub: LoopbackHub, fault: Any, started: int) -> None:
    hub.faults.add(method="POST", path=SUBMIT, action=fault)
    assert refused(jobs_of(hub).submit, spec(hub)).access is Access.UNREACHABLE
    assert asked(hub, "POST", "/api/jobs/acme") == 1
    assert len(hub.jobs) == started


def test_a_node_of_an_attempt(hub: LoopbackHub) -> None:
    remote, given = jobs_of(hub), {"network_group": "mt-1", "network_aliases": ("node-1",)}
    job_id = remote.submit(spec(hub, labels={**LABELS, "node": "1"}, environment={"MERGETUNE_NODE": "1"}, **given))
    job = hub.jobs[job_id]
    assert job.spec["network"] == {"group": "mt-1", "aliases": ["node-1"]}
    assert job.labels["name"] == "tiny-0a1b2c3d-train-1"
    assert job.environment["MERGETUNE_NODE"] == "1"
    found = remote.inspect("acme", job_id)
    assert found is not None and (found.node, found.revision) == (1, hub.head("acme/tiny-adapter"))
    alone = remote.inspect("acme", remote.submit(spec(hub)))
    assert alone is not None and alone.node == 0
    assert "network" not in hub.jobs[alone.id].spec


def test_a_submit_that_hangs_ends_with_the_timeout(hub: LoopbackHub) -> None:
    hub.faults.add(method="POST", path=SUBMIT, action=hang(5))
    error = refused(jobs_of(hub, timeout_s=0.3).submit, spec(hub))
    assert (error.access, error.detail) == (Access.UNREACHABLE, "no answer within 0.3 s")


def test_refusals_of_a_submit(hub: LoopbackHub) -> None:
    hub.set_credit("acme", False)
    error = refused(jobs_of(hub).submit, spec(hub))
    assert error.access is Access.NO_CREDIT
    assert "add more credits" in error.detail
    hub.add_token("hf_readreadreadreadread", "alice", "read")
    error = refused(jobs_of(hub, "hf_readreadreadreadread").submit, spec(hub))
    assert error.access is Access.FORBIDDEN
    assert "job.write" in error.detail
    assert refused(jobs_of(hub, "hf_nobodynobodynobody").submit, spec(hub)).access is Access.UNAUTHORIZED
    assert refused(jobs_of(hub).submit, spec(hub, labels={**LABELS, "run": "a b"})).access is Access.REFUSED
    # A 404 without the Hub's own error code may come from something else than a Hub: it is no answer.
    assert refused(jobs_of(hub).submit, spec(hub, namespace="nowhere")).access is Access.UNREACHABLE
    assert refused(jobs_of(hub).submit, spec(hub, revision="0" * 40)).access is Access.NO_REVISION
    assert hub.jobs == {}


# Jobs as they are seen.


@pytest.mark.parametrize(
    ("stage", "message", "state"),
    [
        ("COMPLETED", None, JobState.SUCCEEDED),
        ("ERROR", "Job failed with exit code: 1. Reason: Error", JobState.FAILED),
        ("ERROR", "Job timeout", JobState.FAILED),
        ("CANCELED", None, JobState.CANCELLED),
        ("DELETED", None, JobState.CANCELLED),
    ],
)
def test_how_a_job_ended(hub: LoopbackHub, stage: str, message: str | None, state: JobState) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    hub.finish_job(job_id, stage, message=message)
    listed, seen = remote.jobs("acme", {"run": LABELS["run"]}, live=False), remote.inspect("acme", job_id)
    assert listed == (seen,)
    assert seen is not None
    assert (seen.state, seen.message, seen.is_live) == (state, message or "", False)
    assert seen.finished_at is not None
    if message == "Job timeout":
        assert diagnose("", seen.message).cause == "the job ran into its timeout"


def test_a_live_job(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    (seen,) = remote.jobs("acme", {"repo": "acme--tunes"}, live=True)
    assert (seen.id, seen.state, seen.running_s, seen.finished_at) == (job_id, JobState.QUEUED, 0.0, None)
    assert (seen.experiment, seen.run_id, seen.stage, seen.attempt) == ("tiny", LABELS["run"], StageName.TRAIN, 1)
    assert (seen.flavor, seen.repo) == ("a10g-small", "acme/tiny-adapter")
    assert abs(seen.created_at - hub.jobs[job_id].created) < 0.01
    assert job_id in seen.url
    hub.start_job(job_id)
    assert [job.state for job in remote.jobs("acme", {}, live=True)] == [JobState.RUNNING]
    hub.finish_job(job_id, "COMPLETED")
    assert remote.jobs("acme", {}, live=True) == ()


def test_the_reason_of_a_cancel_is_kept(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    hub.jobs[job_id].end("CANCELED", 0.0, None, "NO_CREDITS")
    (seen,) = remote.jobs("acme", {}, live=False)
    assert (seen.state, seen.message) == (JobState.CANCELLED, "NO_CREDITS")
    assert diagnose("", seen.message).cause == "no credit is left"


def test_what_a_job_cost_is_its_running_time(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    job = hub.jobs[job_id]
    job.begin(job.created + 100)
    job.end("COMPLETED", job.created + 700)
    seen = remote.inspect("acme", job_id)
    assert seen is not None
    assert seen.running_s == 600


def test_jobs_of_others_are_left_out(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    remote.submit(spec(hub))
    for labels in (
        {"run": "x", "stage": "train"},
        {**LABELS, "repo": "acme--other"},
        {**LABELS, "attempt": "one"},
        {**LABELS, "stage": "sing"},
    ):
        remote.submit(spec(hub, labels=labels))
    assert len(remote.jobs("acme", {"repo": "acme--tunes"}, live=False)) == 1
    assert len(remote.jobs("acme", {}, live=False)) == 2


def test_a_listing_is_read_to_its_last_page(hub: LoopbackHub) -> None:
    hub.world.page_size = 3
    remote = jobs_of(hub)
    ids = {remote.submit(spec(hub, labels={**LABELS, "attempt": str(n)})) for n in range(1, 11)}
    assert {job.id for job in remote.jobs("acme", LABELS | {"attempt": "1"}, live=True)} < ids
    assert {job.id for job in remote.jobs("acme", {"run": LABELS["run"]}, live=True)} == ids


def test_a_listing_lags_and_the_id_does_not(hub: LoopbackHub) -> None:
    hub.list_lag_s = 60
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    assert remote.jobs("acme", {}, live=False) == ()
    seen = remote.inspect("acme", job_id)
    assert seen is not None
    assert seen.id == job_id


def test_an_outage_is_no_empty_list_and_no_unknown_job(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    assert remote.inspect("acme", "0" * 24) is None
    for fault in (status(503), status(404, "<html>not a Hub</html>"), drop(), truncate_list(cut_body=True)):
        hub.faults.add(method="GET", path="/api/jobs/acme", action=fault, times=60)
        assert refused(remote.jobs, "acme", {}, live=False).access is Access.UNREACHABLE
        hub.faults.clear()
    for fault in (status(503), drop()):
        hub.faults.add(method="GET", path="/api/jobs/acme", action=fault, times=60)
        assert refused(remote.inspect, "acme", job_id).access is Access.UNREACHABLE
        hub.faults.clear()
    assert refused(jobs_of(hub).jobs, "mallory", {}, live=True).access is Access.FORBIDDEN


# Logs and cancel.


def test_logs(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    hub.finish_job(job_id, "ERROR", log="\n".join(f"line {n}" for n in range(3000)))
    text = remote.log("acme", job_id).splitlines()
    assert (text[0], text[-1], len(text)) == ("line 1000", "line 2999", 2000)
    assert remote.log("acme", job_id, whole=True).splitlines() == [f"line {n}" for n in range(3000)]
    assert list(remote.follow("acme", job_id)) == [f"line {n}" for n in range(3000)]
    assert refused(remote.log, "acme", "0" * 24).access is Access.MISSING


def test_an_outage_while_following_is_a_hub_error(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    hub.revoke(TOKEN)
    assert refused(lambda: list(remote.follow("acme", job_id))).access is Access.UNAUTHORIZED


def test_the_load_of_a_machine(hub: LoopbackHub) -> None:
    jobs = jobs_of(hub)
    job_id = jobs.submit(spec(hub))
    hub.start_job(job_id)
    load = jobs.load("acme", job_id)
    assert load is not None
    assert 0 <= load.memory_gib <= load.memory_total_gib
    hub.finish_job(job_id, "COMPLETED")
    assert jobs.load("acme", job_id) is None


def test_a_sample_of_two_gpus() -> None:
    gpu = {"utilization": 80, "memory_used_bytes": 10 * 2**30, "memory_total_bytes": 24 * 2**30}
    sample = {
        "memory_used_bytes": 2**31,
        "memory_total_bytes": 2**35,
        "gpus": {"a": gpu, "b": {**gpu, "utilization": 40}},
    }
    assert str(read_load(sample)) == "memory 2.0 of 32 GiB, GPU 60% busy with 20.0 GiB"
    assert str(read_load({**sample, "gpus": {}})) == "memory 2.0 of 32 GiB"


def test_cancel(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    first, second = remote.submit(spec(hub)), remote.submit(spec(hub))
    remote.cancel("acme", first)
    assert hub.jobs[first].stage == "CANCELED"
    remote.cancel("acme", first)  # again: it has ended, which is what was wanted
    hub.finish_job(second, "COMPLETED")
    hub.faults.add(method="POST", path="/cancel", action=status(400, "Job is not running"))
    remote.cancel("acme", second)
    assert hub.jobs[second].stage == "COMPLETED"
    remote.cancel("acme", "0" * 24)


def test_a_cancel_that_did_not_work_is_told(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    job_id = remote.submit(spec(hub))
    hub.faults.add(method="POST", path="/cancel", action=status(503), times=3)
    assert refused(remote.cancel, "acme", job_id).access is Access.UNREACHABLE
    hub.faults.add(method="POST", path="/cancel", action=lose_response())
    remote.cancel("acme", job_id)
    assert hub.jobs[job_id].stage == "CANCELED"
