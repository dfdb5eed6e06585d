"""What is decided about an attempt on several nodes: the second table of reconcile's docstring, line by line."""

from dataclasses import replace

import pytest
from histories import TWO
from test_reconcile import (
    FAILED,
    LIMITS,
    LOST,
    NOW,
    OK,
    QUEUED,
    RUNNING,
    STOPPED,
    TRAIN,
    brief,
    claim,
    done,
    seen,
    view,
)
from test_reconcile import job as any_job

from pipeline.actions import Seen, StopNodes, Submit
from pipeline.cost import billed_usd
from pipeline.flavors import FLAVORS
from pipeline.nodes import GONE
from pipeline.reconcile import decide, so_far_usd, spent_usd
from pipeline.remote import NOBODY, Claim, JobState, SeenJob, StageView, Winner, read_view

TRAINS = 'MERGETUNE {"event": "step", "step": 3, "total": 9, "loss": 2.0}\n'
SAVES = 'MERGETUNE {"event": "phase", "name": "save"}\n'
PEER = 'MERGETUNE {"event": "error", "message": "the connection to another node was lost", "transient": true}\n'
ALONE = 'MERGETUNE {"event": "error", "message": "node 2 of 2 did not come within 20 minutes", "transient": true}\n'
FULL = "torch.OutOfMemoryError: CUDA out of memory\n"
ODD = 'Traceback (most recent call last):\n  File "a.py", line 1, in b\nZeroDivisionError: division by zero\n'


def node(number: int, state: JobState, attempt: int = 1, **more: object) -> SeenJob:
    return replace(any_job(state, attempt, id=f"{attempt}-{number}", **more), node=number)


def claimed(attempt: int = 1, **more: object) -> StageView:
    """The claim that names both, with the first as winner."""
    one = replace(claim(attempt, job_id=f"{attempt}-0"), more_ids=(f"{attempt}-1",), **more)
    return view(one, Winner(attempt, f"{attempt}-0"))


def told(action: object) -> str:
    if isinstance(action, StopNodes):
        return f"stop {', '.join(action.jobs)} of attempt {action.attempt}: {action.why}"
    if isinstance(action, Submit) and action.nodes:
        return f"{brief(action)} {action.nodes}"
    return brief(action)


def failures(first: str, second: str) -> Seen:
    """Both failed, the first one first."""
    jobs = node(0, FAILED, finished_at=NOW - 2000), node(1, FAILED, finished_at=NOW - 1000)
    return seen(*jobs, logs={"1-0": first, "1-1": second}, train=claimed())


HALF = claim(job_id="1-0")
MISSING = "submit train 1: node 2 was not started (1,)"
TABLE: dict[str, tuple[Seen, str]] = {
    "no trace": (seen(), "submit train 1: first attempt"),
    "both run": (seen(node(0, RUNNING), node(1, RUNNING)), "wait: train is running"),
    "one waits for a machine": (seen(node(0, RUNNING), node(1, QUEUED)), "wait: train is running"),
    "for a day": (
        seen(node(0, RUNNING), node(1, QUEUED, created_at=NOW - LIMITS.queue_patience_s - 1)),
        "give up train: no machine came in 24 h",
    ),
    # A node that was never started.
    "a young claim": (
        seen(node(0, QUEUED), train=view(claim(at=NOW - 1, job_id="1-0"))),
        "wait: train is being submitted elsewhere",
    ),
    "an old claim": (seen(node(0, QUEUED), train=view(HALF)), MISSING),
    "an old claim that notes nothing": (seen(node(0, RUNNING), train=view(claim())), MISSING),
    "the first is the missing one": (
        seen(node(1, RUNNING), train=view(claim())),
        "submit train 1: node 1 was not started (0,)",
    ),
    "not listed, but they train": (
        seen(node(0, RUNNING), logs={"1-0": TRAINS}, train=view(HALF)),
        "wait: train is running",
    ),
    "the posts are up": (
        seen(node(0, QUEUED), train=view(replace(HALF, posts=LIMITS.posts))),
        "give up train: no job of node 2 of 2 can be found after 3 submits",
    ),
    "a claim that cannot be read": (
        seen(node(0, QUEUED), train=read_view("head", {"claim.json": b"<html>"})),
        "give up train: no job of node 2 of 2 can be found after 0 submits",
    ),
    # One has ended, the other lives.
    "one has failed": (
        seen(node(0, RUNNING), node(1, FAILED), train=claimed()),
        "stop 1-0 of attempt 1: node 2 of 2 has failed",
    ),
    "a second job of the node lives": (
        seen(node(0, RUNNING), node(1, FAILED), node(1, RUNNING), train=claimed()),
        "wait: train is running",
    ),
    "a second job of the node left at the fence": (
        seen(node(0, RUNNING), node(1, OK), node(1, RUNNING), train=claimed()),
        "wait: train is running",
    ),
    "the first is past training": (
        seen(node(0, RUNNING), node(1, FAILED), logs={"1-0": TRAINS + SAVES}, train=claimed()),
        "wait: train is running",
    ),
    "the later one has done its part": (seen(node(0, RUNNING), node(1, OK), train=claimed()), "wait: train is running"),
    "a person has stopped one": (
        seen(node(0, RUNNING), node(1, STOPPED), train=claimed()),
        "cancelled train: it was cancelled",
    ),
    "a lost machine has stopped one": (
        seen(node(0, RUNNING), node(1, STOPPED, message=LOST), train=claimed()),
        "stop 1-0 of attempt 1: node 2 of 2 was stopped",
    ),
    "one is gone": (seen(node(0, RUNNING), train=claimed()), f"stop 1-0 of attempt 1: {GONE}: 1-1"),
    "the controller ends them": (
        seen(node(0, RUNNING), node(1, STOPPED), train=claimed(ended="node 3 was refused")),
        "stop 1-0 of attempt 1: node 3 was refused",
    ),
    "the artifact is there": (
        seen(node(0, OK, finished_at=NOW - 1), node(1, RUNNING), **done(TRAIN)),
        "wait: train is running",
    ),
    "the artifact is there for long": (
        seen(node(0, OK), node(1, RUNNING), **done(TRAIN)),
        "stop 1-1 of attempt 1: the first node has ended",
    ),
    # None lives.
    "the cause before its echo": (
        failures(PEER, FULL),
        "give up train: the GPU ran out of memory: torch.OutOfMemoryError: CUDA out of memory",
    ),
    "what nobody knows before an echo": (
        failures(PEER, ODD),
        "give up train: not known: ZeroDivisionError: division by zero",
    ),
    "two echoes": (
        failures(PEER, PEER),
        f"submit train 2: the connection to another node was lost: {PEER.strip()}",
    ),
    "the other did not come": (
        seen(node(0, FAILED), logs={"1-0": ALONE}, train=view(HALF, Winner(1, "1-0"))),
        f"submit train 2: node 2 of 2 did not come within 20 minutes: {ALONE.strip()}",
    ),
    "a lost machine and its echo": (
        seen(node(0, FAILED), node(1, FAILED, message=LOST), logs={"1-0": PEER, "1-1": TRAINS}, train=claimed()),
        f"submit train 2: the machine was lost: {LOST}",
    ),
    "we have ended one for the other": (
        seen(node(0, STOPPED), node(1, FAILED), logs={"1-1": FULL}, train=claimed(ended="node 2 of 2 has failed")),
        "give up train: the GPU ran out of memory: torch.OutOfMemoryError: CUDA out of memory",
    ),
    "we have ended all": (
        seen(node(0, STOPPED), train=claimed(ended="node 2 of 2 was refused: 402")),
        f"submit train 2: {GONE}",
    ),
    "a person has ended one, and its end the other": (
        seen(node(0, FAILED), node(1, STOPPED), logs={"1-0": PEER}, train=claimed()),
        "cancelled train: it was cancelled",
    ),
    "the first has succeeded, the later one failed at its end": (
        seen(node(0, OK, finished_at=NOW - 1), node(1, FAILED), logs={"1-1": PEER}, train=claimed()),
        "wait: train has ended, its artifact is not visible yet",
    ),
    "nobody may pass": (
        seen(node(0, FAILED), node(1, FAILED), train=view(claim(), Winner(1, NOBODY))),
        "cancelled train: it was cancelled",
    ),
    "the third time": (
        seen(node(0, FAILED, 3), node(1, FAILED, 3, message=LOST), logs={"3-0": PEER}, train=claimed(3)),
        f"give up train: the machine was lost: {LOST} (3 attempts)",
    ),
    "refused before anything was started": (
        seen(train=view(claim(at=0.0, posts=0))),
        "submit train 1: an earlier submit came to nothing",
    ),
    "another stage has one job": (seen(**done(TRAIN)), "submit merge 1: first attempt"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    world, expected = TABLE[name]
    assert told(decide(TWO, world, NOW, LIMITS)) == expected


def test_refused_with_no_job_left_of_it() -> None:
    """Every started job was ended and is known: what the claim says is the reason."""
    one = replace(claim(job_id="1-0"), ended="node 2 of 2 was refused: 402")
    world = seen(node(0, STOPPED), train=view(one))
    assert told(decide(TWO, world, NOW, LIMITS)) == "submit train 2: node 2 of 2 was refused: 402"


def test_dollars_of_all_nodes_are_counted() -> None:
    jobs = node(0, RUNNING), node(1, RUNNING)
    assert spent_usd(jobs) == pytest.approx(2 * billed_usd(600, FLAVORS["a10g-large"]))
    assert so_far_usd(seen(*jobs), NOW) == pytest.approx(spent_usd(jobs))
    assert so_far_usd(seen(node(0, QUEUED)), NOW) is None
    budget = TWO.experiment.model_copy(update={"budget": TWO.experiment.budget.model_copy(update={"max_usd": 14.5})})
    assert TWO.worst_usd > 14
    refused = decide(replace(TWO, experiment=budget), failures(PEER, PEER), NOW, LIMITS)
    assert told(refused).startswith("give up train: the connection to another node was lost")


def test_a_claim_keeps_every_job_and_reads_what_was_written_before_there_were_nodes() -> None:
    old = b'{"attempt": 1, "at": 5.0, "by": "a", "posts": 1, "job_id": "x"}'
    read = read_view("head", {"claim.json": old}).claim
    assert read == Claim(1, 5.0, "a", 1, "x")
    assert b"more_ids" not in read.as_bytes() and b"ended" not in read.as_bytes()
    two = read.with_job("y").with_job("y")
    assert read_view("head", {"claim.json": two.as_bytes()}).claim == two
    assert two.job_ids == ("x", "y")
    assert Claim(1, 5.0, "a").with_job("z").job_id == "z"
    odd = read_view("head", {"claim.json": old[:-1] + b', "more_ids": 7}'}).claim
    assert odd is not None and odd.by == "unreadable"
