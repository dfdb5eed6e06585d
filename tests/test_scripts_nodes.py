"""scripts/train_sft.py as one of several nodes: its fence, its wait for the others, what it says when it is alone."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers.hub import LoopbackHub
from test_scripts_evaluate import load
from test_scripts_hub import REPO, RUN_ID, WINNER, Job, hub, nothing, put, put_winner, titles, winner

from pipeline.diagnose import diagnose
from pipeline.remote import NOBODY

pytestmark = pytest.mark.slow
__all__ = ["hub"]  # the fixture
SECOND = f".mergetune/{RUN_ID}/train/winner-1.json"


def node(hub: LoopbackHub, folder: Path, number: int, job_id: str, attempt: int = 1, **more: Any) -> Job:
    """A node's container; what it should read is not there, so past fence and wait it ends with exit code 2."""
    run = nothing(folder / job_id, "train", attempt=attempt, **{"nodes": 2, "processes": 2, "join_s": 60, **more})
    return Job(hub, run, job_id, MERGETUNE_NODE=str(number))


def second(hub: LoopbackHub) -> dict[str, Any]:
    return json.loads(hub.files(REPO)[SECOND])


def put_second(hub: LoopbackHub, attempt: int, job_id: str) -> None:
    put(hub, SECOND, json.dumps({"attempt": attempt, "job_id": job_id}).encode())


def test_each_node_passes_a_fence_of_its_own_and_they_wait_for_each_other(hub: LoopbackHub, tmp_path: Path) -> None:
    late = node(hub, tmp_path, 1, "job-b")
    late.wait_for("phase", name="wait for the other nodes")
    assert (second(hub)["attempt"], second(hub)["job_id"]) == (1, "job-b")
    first = node(hub, tmp_path, 0, "job-a")
    assert [job.end() for job in (first, late)] == [2, 2], first.log + late.log  # at its inputs, after the wait
    assert winner(hub, "train")["job_id"] == "job-a"
    assert sum("starts" in title for title in titles(hub)) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_second_job_of_a_node_leaves(hub: LoopbackHub, tmp_path: Path, number: int) -> None:
    put_winner(hub, "train", 1, "job-a")
    put_second(hub, 1, "job-b")
    head = hub.head(REPO)
    again = node(hub, tmp_path, number, "job-c")
    assert again.end() == 0, again.log
    assert again.events("superseded")[0]["winner"]["job_id"] == ("job-a", "job-b")[number]
    assert hub.head(REPO) == head


@pytest.mark.parametrize("number", [0, 1])
def test_a_fence_that_is_shut_is_shut_for_every_node(hub: LoopbackHub, tmp_path: Path, number: int) -> None:
    put_winner(hub, "train", 1, NOBODY)
    stopped = node(hub, tmp_path, number, "job-a")
    assert stopped.end() == 0, stopped.log
    assert SECOND not in hub.files(REPO)
    if number:
        reopened = node(hub, tmp_path, 1, "job-b", attempt=2, join_s=0)
        assert reopened.end() == 3, reopened.log
        assert second(hub)["job_id"] == "job-b"


@pytest.mark.parametrize(("number", "other"), [(0, 1), (1, 0)])
def test_a_later_attempt_of_one_node_shuts_the_earlier_out_of_all(
    hub: LoopbackHub, tmp_path: Path, number: int, other: int
) -> None:
    (put_second(hub, 2, "job-z") if other else put_winner(hub, "train", 2, "job-z"))
    late = node(hub, tmp_path, number, "job-a")
    assert late.end() == 0, late.log
    assert late.events("superseded")


def test_a_node_that_nobody_joins_says_so_and_a_retry_may_pass(hub: LoopbackHub, tmp_path: Path) -> None:
    alone = node(hub, tmp_path, 0, "job-a", join_s=1.5)
    assert alone.end() == 3, alone.log
    (event,) = alone.events("error")
    assert (event["message"], event["transient"]) == ("node 2 of 2 did not come within 0 minutes", True)
    found = diagnose(alone.log)
    assert (found.id, found.transient) == ("peer-missing", True)


def test_an_earlier_attempts_node_is_not_the_one_that_is_waited_for(hub: LoopbackHub, tmp_path: Path) -> None:
    put_second(hub, 1, "job-old")
    alone = node(hub, tmp_path, 0, "job-a", attempt=2, join_s=0)
    assert alone.end() == 3, alone.log


def test_a_node_that_waits_leaves_when_the_stage_is_stopped(hub: LoopbackHub, tmp_path: Path) -> None:
    waiting = node(hub, tmp_path, 1, "job-b")
    waiting.wait_for("phase", name="wait for the other nodes")
    put_winner(hub, "train", 1, NOBODY)
    assert waiting.end() == 0, waiting.log
    assert waiting.events("superseded")
    assert WINNER.format("train") in hub.files(REPO)


@pytest.mark.parametrize(
    ("code", "note", "cause"),
    [
        (1, "5 connection", "peer-lost"),
        (-signal.SIGABRT, "", "peer-lost"),  # by NCCL's watchdog
        (-signal.SIGKILL, "", "script"),
        (1, "5 ", ""),
    ],
)
def test_what_a_process_of_a_node_died_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int, note: str, cause: str
) -> None:
    """The second of two processes of this node failed first; what it said is in a file."""
    script, run = load("train_sft"), {"work": str(tmp_path), "nodes": 2, "processes": 4}
    said = tmp_path / "processes/attempt_0/1/stderr.log"
    said.parent.mkdir(parents=True)
    said.write_text("KeyError: 'rows'\n")
    if note:
        (tmp_path / "processes/failed-1").write_text(note)
        (tmp_path / "processes/failed-0").write_text("9 connection")
    failures = {0: SimpleNamespace(exitcode=-signal.SIGTERM), 1: SimpleNamespace(exitcode=code)}
    assert script.explain_failure(run, failures) == 1
    log = "".join(capfd.readouterr())
    found = diagnose(log)
    assert found.id == cause
    assert ("on node 1 of 2" in log) and ("KeyError" in log) == (code != -signal.SIGKILL)
    assert found.transient == (cause == "peer-lost")
