"""The loopback Hub's faults, met by the real client."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from servers.hub import LoopbackHub
from servers.hub_faults import delay, drop, hang, lose_response, status, truncate_list
from servers.hub_http import Request
from servers.hub_scene import WRITE, client, populated_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with populated_hub(tmp_path, monkeypatch) as hub:
        hub.execute_jobs = False
        yield hub


def submit(hub: LoopbackHub) -> str:
    return client(hub).run_job(image="python", command=["true"], namespace="acme", flavor="cpu-basic").id


def test_a_status_comes_instead_of_the_work_so_many_times(hub):
    hub.faults.add(path="/api/jobs/acme$", times=2, skip=1, action=status(500, "Internal Error"))
    submit(hub)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            submit(hub)
        assert (caught.value.response.status_code, caught.value.server_message) == (500, "Internal Error")
    submit(hub)
    assert len(hub.jobs) == 2


def test_a_500_can_hide_a_job_that_was_started(hub):
    hub.faults.add(path="/api/jobs/", action=status(500, performed=True))
    with pytest.raises(HfHubHTTPError):
        submit(hub)
    assert len(hub.jobs) == 1 and hub.requests[-1].status == 500


def test_a_lost_response_was_performed_and_a_dropped_request_was_not(hub):
    first = hub.add_repo("acme/m", {})
    operation = CommitOperationAdd("claim.json", b"{}")
    hub.faults.add(path="/commit/main", action=lose_response())
    with pytest.raises(httpx2.RemoteProtocolError):
        client(hub).create_commit("acme/m", [operation], commit_message="claim", parent_commit=first)
    assert list(hub.files("acme/m")) == ["claim.json"]
    hub.faults.add(path="/api/jobs/", action=drop())
    with pytest.raises(httpx2.RemoteProtocolError):
        submit(hub)
    assert hub.jobs == {} and hub.requests[-1].status == 0


def test_a_delay_is_a_late_answer_and_a_hang_is_none(hub):
    hub.faults.add(path="/api/jobs/", action=delay(0.2))
    start = time.monotonic()
    submit(hub)
    assert time.monotonic() - start >= 0.2
    hub.faults.add(path="/api/jobs/", action=hang(bound_s=0.2))
    with pytest.raises(httpx2.RemoteProtocolError):
        submit(hub)
    assert len(hub.jobs) == 1


def test_a_hang_ends_with_the_server(tmp_path, monkeypatch):
    with populated_hub(tmp_path, monkeypatch) as hub:
        hub.faults.add(method="GET", path="whoami", action=hang(bound_s=30))
        code = "import huggingface_hub as h; h.whoami()"
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HOME": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=settings, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while hub.faults.left() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert process.wait(5) != 0


def test_a_truncated_listing_lacks_the_link_or_half_the_body(hub):
    hub.world.page_size = 2
    jobs = [submit(hub) for _ in range(3)]
    hub.faults.add(method="GET", path="/api/jobs/acme", action=truncate_list())
    assert len(list(client(hub).list_jobs(namespace="acme"))) == 2
    hub.faults.add(method="GET", path=f"/api/jobs/acme/{jobs[0]}", action=truncate_list(cut_body=True))
    with pytest.raises(httpx2.RemoteProtocolError):
        client(hub).inspect_job(job_id=jobs[0], namespace="acme")


def test_a_client_can_be_killed_before_it_hears_the_answer(hub, tmp_path):
    hub.add_repo("acme/m", {})
    code = "import huggingface_hub as h\nfor n in range(9): h.create_tag('acme/m', tag=f't{n}')"
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=settings)

    def kill(request: Request) -> None:
        if b'"t2"' in request.body:
            os.kill(process.pid, signal.SIGKILL)

    hub.on_request = kill
    assert process.wait(20) == -signal.SIGKILL
    assert [tag.name for tag in client(hub).list_repo_refs("acme/m").tags] == ["t0", "t1", "t2"]


def test_a_stopped_hub_serves_nobody_any_more(tmp_path, monkeypatch):
    with populated_hub(tmp_path, monkeypatch) as hub:
        api = client(hub)
        api.whoami()
    with pytest.raises(httpx2.TransportError):
        api.whoami()
    assert len(hub.requests) == 1
