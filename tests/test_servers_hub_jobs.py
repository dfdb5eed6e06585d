"""The loopback Hub's jobs, driven by the real client; they really run."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import JobInfo, Volume
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, JobNotFoundError
from huggingface_hub.utils import get_session
from servers.hub import LoopbackHub
from servers.hub_job_process import real_command
from servers.hub_scene import READ, SCOPED, STRANGER, WRITE, client, populated_hub

from pipeline.flavors import FLAVORS

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with populated_hub(tmp_path, monkeypatch) as hub:
        yield hub


def submit(hub: LoopbackHub, *command: str, token: str = WRITE, **more) -> JobInfo:
    defaults = {"image": "python:3.12", "namespace": "acme", "flavor": "cpu-basic"}
    return client(hub, token).run_job(command=list(command), **(defaults | more))


def python(hub: LoopbackHub, code: str, **more) -> JobInfo:
    return submit(hub, "python", "-c", code, **more)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(call: Callable, *args, **kwargs) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_a_job_runs_in_a_clean_environment_of_its_own(hub, monkeypatch):
    monkeypatch.setenv("LEAK", "me")
    hub.job_environment["EXTRA"] = "1"
    code = "import os; print(sorted(os.environ)); print(os.environ['HF_TOKEN'], os.environ['JOB_ID'], os.getcwd())"
    job = python(hub, code, env={"RUN_ID": "r1"}, secrets={"HF_TOKEN": WRITE})
    hub.wait_jobs(10)
    log = hub.jobs[job.id].log
    assert "LEAK" not in log and all(name in log for name in ("EXTRA", "RUN_ID", "HF_ENDPOINT", "HF_HOME"))
    assert f"{WRITE} {job.id} {hub.world.root}" in log
    info = client(hub).inspect_job(job_id=job.id, namespace="acme")
    assert (info.status.stage, info.status.message, info.secrets) == ("COMPLETED", None, ["HF_TOKEN"])
    assert (info.owner.name, info.owner.type, info.initiator.name) == ("acme", "org", "alice")
    assert info.created_at <= info.started_at <= info.finished_at and info.durations.running_secs == 0


def test_a_job_can_use_the_hub_that_runs_it(hub):
    hub.add_repo("acme/out", {})
    code = (
        "import huggingface_hub as h; h.upload_file(path_or_fileobj=b'{}', path_in_repo='m.json', repo_id='acme/out')"
    )
    python(hub, code, secrets={"HF_TOKEN": SCOPED})
    hub.wait_jobs(20)
    assert hub.files("acme/out") == {"m.json": b"{}"}


def test_a_volume_is_the_pinned_revision_at_its_mount_path(hub):
    script = b"import sys, pathlib\nprint(*[pathlib.Path(a).read_text() for a in sys.argv[1:]])\n"
    first = hub.add_repo("acme/src", {"job.py": script, "a/run.json": b"one", "data": b"d"}, kind="dataset")
    later = client(hub).upload_file(
        path_or_fileobj=b"two", path_in_repo="a/run.json", repo_id="acme/src", repo_type="dataset"
    )
    volumes = [
        Volume(type="dataset", source="acme/src", mount_path="/src", revision=first),
        Volume(type="dataset", source="acme/src", mount_path="/src2", revision=later.oid, path="a"),
    ]
    job = submit(hub, "uv", "run", "--with", "x", "/src/job.py", "/src/a/run.json", "/src2/run.json", volumes=volumes)
    hub.wait_jobs(10)
    assert hub.jobs[job.id].log == "one two\n"


def test_a_mount_path_is_replaced_on_path_boundaries_only(hub):
    sha = hub.add_repo("acme/src", {"f": b""})
    volumes = [Volume(type="model", source="acme/src", mount_path="/src", revision=sha)]
    job = submit(hub, "echo", "/src", "/srcs", "x/src", "--in=/src/f", "/src.py", volumes=volumes)
    hub.wait_jobs(10)
    where = str(hub.world.root / "jobs" / f"{job.id}-0" / "volume-0")
    assert hub.jobs[job.id].log == f"{where} /srcs x/src --in={where}/f /src.py\n"
    assert not (hub.world.root / "jobs" / f"{job.id}-0").exists()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["uv", "run", "/s/a.py", "x"], ["PY", "/s/a.py", "x"]),
        (["uv", "run", "--with", "trl==1", "--python", "3.12", "--script", "a.py"], ["PY", "a.py"]),
        (["uv", "run", "--no-project", "accelerate", "launch"], ["accelerate", "launch"]),
        (["bash", "-c", "true"], ["bash", "-c", "true"]),
    ],
)
def test_uv_run_becomes_the_prepared_interpreter(command, expected):
    assert real_command(command, "PY") == expected


def test_a_failed_job_says_its_exit_code(hub):
    job = python(hub, "import sys; print('no'); sys.exit(3)")
    hub.wait_jobs(10)
    status = client(hub).inspect_job(job_id=job.id, namespace="acme").status
    assert (status.stage, status.message) == ("ERROR", "Job failed with exit code: 3. Reason: Error")


def test_attempts_start_the_command_again(hub):
    volume = Volume(type="bucket", source="acme/state", mount_path="/state")
    code = "import pathlib as p, sys; f = p.Path(sys.argv[1]); n = f.exists(); f.touch(); sys.exit(not n)"
    job = submit(hub, "python", "-c", code, "/state/mark", attempts=3, volumes=[volume])
    hub.wait_jobs(10)
    assert (hub.jobs[job.id].stage, hub.jobs[job.id].failures) == ("COMPLETED", 1)


def test_a_timeout_is_a_message_and_not_a_stage(hub):
    job = python(hub, "import time; print('on', flush=True); time.sleep(60)", timeout=1)
    hub.wait_jobs(10)
    assert (hub.jobs[job.id].stage, hub.jobs[job.id].message) == ("ERROR", "Job timeout")


def test_cancel_kills_the_whole_process_group(hub, tmp_path):
    code = """import subprocess, sys
child = subprocess.Popen(["sleep", "60"])
open(sys.argv[1], "w").write(str(child.pid))
child.wait()"""
    job = submit(hub, "python", "-c", code, str(tmp_path / "pid"))
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    client(hub).cancel_job(job_id=job.id, namespace="acme")
    assert hub.jobs[job.id].stage == "CANCELED"
    child = Path("/proc") / (tmp_path / "pid").read_text()
    until(lambda: not child.exists() or " Z " in (child / "stat").read_text())


def test_a_job_can_be_cancelled_before_it_runs(hub):
    hub.scheduling_s = 30
    job = submit(hub, "true")
    client(hub).cancel_job(job_id=job.id, namespace="acme")
    assert (hub.jobs[job.id].stage, hub.jobs[job.id].started) == ("CANCELED", None)


def test_a_lost_node_is_an_error_with_a_message(hub):
    job = submit(hub, "sleep", "60")
    until(lambda: hub.jobs[job.id].stage == "RUNNING")
    hub.kill_job(job.id)
    assert (hub.jobs[job.id].stage, hub.jobs[job.id].message) == ("ERROR", "node lost")


def test_logs_can_be_followed_and_read_afterwards(hub):
    code = "import time\nfor n in range(3): print('line', n, flush=True); time.sleep(0.05)"
    job = python(hub, code)
    lines = list(client(hub).fetch_job_logs(job_id=job.id, namespace="acme", follow=True))
    assert lines == ["line 0", "line 1", "line 2"]
    assert list(client(hub).fetch_job_logs(job_id=job.id, namespace="acme", tail=1)) == ["line 2"]


def test_metrics_stream_while_a_job_runs(hub):
    job = submit(hub, "sleep", "0.5")
    until(lambda: hub.jobs[job.id].stage == "RUNNING")
    metrics = client(hub).fetch_job_metrics(job_id=job.id, namespace="acme")
    assert next(iter(metrics))["memory_total_bytes"] == 16 << 30


def test_listing_filters_by_stage_and_labels_in_pages(hub):
    hub.execute_jobs = False
    hub.world.page_size = 2
    jobs = [submit(hub, "true", labels={"run": "r1", "n": str(n)}) for n in range(5)]
    other = submit(hub, "true", labels={"run": "r2"})
    hub.finish_job(jobs[0].id, "ERROR", log="boom\nCUDA out of memory", message="Job failed with exit code: 1")
    hub.start_job(jobs[1].id)
    listed = client(hub).list_jobs(namespace="acme", labels={"run": "r1"})
    assert [job.id for job in listed] == [job.id for job in reversed(jobs)]
    assert [job.id for job in client(hub).list_jobs(namespace="acme", labels={"run": "r1", "n": "3"})] == [jobs[3].id]
    assert [job.id for job in client(hub).list_jobs(namespace="acme", status=["ERROR", "RUNNING"])] == [
        jobs[1].id,
        jobs[0].id,
    ]
    client(hub).update_job_labels(job_id=other.id, namespace="acme", labels={"run": "r1"})
    assert len(list(client(hub).list_jobs(namespace="acme", labels={"run": "r1"}))) == 6
    assert list(client(hub).fetch_job_logs(job_id=jobs[0].id, namespace="acme")) == ["boom", "CUDA out of memory"]


def test_a_new_job_is_found_by_id_before_it_is_listed(hub):
    hub.list_lag_s = 60
    job = submit(hub, "true")
    assert list(client(hub).list_jobs(namespace="acme")) == []
    assert client(hub).inspect_job(job_id=job.id, namespace="acme").id == job.id


def test_hardware_is_our_catalogue(hub):
    listed = {hardware.name: hardware for hardware in client(hub).list_jobs_hardware()}
    assert listed.keys() == FLAVORS.keys()
    double = listed["a10g-largex2"]
    assert (double.accelerator.quantity, double.accelerator.vram, double.unit_cost_micro_usd) == ("2", "48 GB", 50000)


# Refusals.


def test_the_right_to_start_jobs_is_checked_before_the_credit(hub):
    hub.set_credit("acme", False)
    error = refused(submit, hub, "true", token=STRANGER)
    assert error.response.status_code == 403 and "missing permissions: job.write" in error.server_message
    error = refused(submit, hub, "true")
    assert error.response.status_code == 402 and error.server_message.startswith("Pre-paid credit balance")
    hub.set_credit("acme", True)
    submit(hub, "true", token=SCOPED)
    assert len(hub.jobs) == 1


@pytest.mark.parametrize(("token", "namespace"), [(READ, "acme"), (SCOPED, "alice"), (STRANGER, "acme")])
def test_jobs_need_job_write_on_the_namespace(hub, token, namespace):
    assert refused(submit, hub, "true", token=token, namespace=namespace).response.status_code == 403
    check = f"{hub.url}/api/jobs/{namespace}/auth-check/write"
    assert get_session().post(check, headers={"Authorization": f"Bearer {token}"}).status_code == 403
    assert get_session().post(check, headers={"Authorization": f"Bearer {WRITE}"}).json()["user"]["name"] == "alice"


@pytest.mark.parametrize(
    "wrong",
    [
        {"env": {"N": 1}},
        {"env": {"_UNDER": "1"}},
        {"timeout": "0s"},
        {"timeout": "-5m"},
        {"labels": {"run": "a/b"}},
        {"labels": {"run": "x" * 101}},
        {"flavor": "t4-tiny"},
        {"attempts": 0},
        {"command": ["echo", ""]},
        {"resource_group_id": "short"},
    ],
)
def test_a_body_against_the_schema_is_refused(hub, wrong):
    defaults = {"image": "python", "namespace": "acme", "flavor": "cpu-basic", "command": ["true"]}
    with pytest.raises(BadRequestError):
        client(hub).run_job(**(defaults | wrong))
    assert hub.jobs == {}


def test_a_volume_must_be_readable(hub):
    hub.add_repo("bob/secret", {}, private=True)
    for source, revision in (("bob/secret", "main"), ("acme/none", "main")):
        volume = Volume(type="model", source=source, mount_path="/v", revision=revision)
        assert refused(submit, hub, "true", volumes=[volume]).response.status_code == 404


def test_an_unknown_job_is_not_found(hub):
    with pytest.raises(JobNotFoundError):
        client(hub).inspect_job(job_id="0" * 24, namespace="acme")


def test_leaving_the_hub_kills_what_runs(tmp_path, monkeypatch):
    with populated_hub(tmp_path, monkeypatch) as hub:
        job = submit(hub, sys.executable, "-c", "import time; time.sleep(60)")
        until(lambda: hub.jobs[job.id].pid is not None)
        process = Path("/proc") / str(hub.jobs[job.id].pid)
    until(lambda: not process.exists() or " Z " in (process / "stat").read_text())


def resolved(hub: LoopbackHub, alias: str, group: str | None, **more) -> str:
    """What a job finds under an alias of its group, or of none."""
    code = (
        "import os, socket\n"
        f"name = os.environ.get('HF_NETWORK_GROUP_PREFIX', 'mt-1-') + '{alias}'\n"
        "try: print('found', socket.getaddrinfo(name, 80)[0][4][0])\n"
        "except OSError: print('unknown')\n"
    )
    job = python(hub, code, network_group=group, **more)
    until(lambda: hub.jobs[job.id].over)
    return hub.jobs[job.id].log.strip()


def test_members_of_a_network_group_find_each_other_while_they_run(hub):
    first = python(hub, "import time; time.sleep(30)", network_group="mt-1", network_aliases=["node-0"])
    until(lambda: hub.jobs[first.id].pid is not None)
    assert first.network.group == "mt-1" and first.network.aliases == ["node-0"]
    assert resolved(hub, "node-0", "mt-1") == "found 127.0.0.1"
    assert resolved(hub, "node-1", "mt-1") == "unknown"
    assert resolved(hub, "node-1", "mt-1", network_aliases=["node-1"]) == "found 127.0.0.1"
    assert resolved(hub, "node-0", "mt-2") == "unknown"
    assert resolved(hub, "node-0", None) == "unknown"
    client(hub).cancel_job(job_id=first.id, namespace="acme")
    until(lambda: resolved(hub, "node-0", "mt-1") == "unknown")


@pytest.mark.parametrize(
    ("group", "aliases"), [("Mt", []), ("m" * 47, []), ("mt", ["a_b"]), ("mt", ["a" * 35]), ("mt", ["a", "a"])]
)
def test_a_group_that_the_hub_does_not_take(hub, group, aliases):
    assert isinstance(refused(python, hub, "pass", network_group=group, network_aliases=aliases), BadRequestError)
