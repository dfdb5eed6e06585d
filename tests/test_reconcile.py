"""What is decided about a run, from what is seen of it: the table of reconcile's docstring, line by line."""

import math
from typing import Any

import pytest
from histories import PLAN, plan_named

from pipeline.actions import Finish, GiveUp, Limits, Seen, Submit, Wait
from pipeline.nodes import GONE
from pipeline.plan import StageName
from pipeline.reconcile import decide, spent_usd
from pipeline.remote import NOBODY, Claim, JobState, SeenJob, StageView, Winner, read_view

NOW = 1_800_000_000.0
LIMITS = Limits()
TRAIN, MERGE, GGUF, EVALUATE = StageName
OLD = NOW - LIMITS.lease_s - 1
LOST = "the node was lost"


def job(state: JobState, attempt: int = 1, stage: StageName = TRAIN, **more: Any) -> SeenJob:
    """A job that was made an hour ago, ran 10 minutes and ended long enough ago."""
    given: dict[str, Any] = {
        "id": f"{stage}-{attempt}",
        "created_at": NOW - 3600,
        "running_s": 600,
        "flavor": "a10g-large",
        "finished_at": NOW - LIMITS.lag_s - 1,
        **more,
    }
    return SeenJob(
        experiment="coach", run_id=PLAN.run_id, stage=stage, attempt=attempt, state=state, repo="acme/x", **given
    )


def claim(attempt: int = 1, at: float = OLD, posts: int = 1, job_id: str | None = None) -> Claim:
    return Claim(attempt, at, "somebody", posts, job_id)


def view(
    claimed: Claim | None = None, winner: Winner | None = None, made: StageName | None = None, run_id: str = PLAN.run_id
) -> StageView:
    """A stage's repository; `made`: with the manifest of that stage."""
    return StageView("head", claimed, winner, {"run_id": run_id, "stage": made} if made else None)


def seen(*jobs: SeenJob, logs: dict[str, str] | None = None, **views: StageView) -> Seen:
    return Seen({StageName(name): one for name, one in views.items()}, jobs, logs or {})


def done(*stages: StageName) -> dict[str, StageView]:
    return {stage.value: view(made=stage) for stage in stages}


def brief(action: object) -> str:
    """An action in a line: what a table can hold."""
    match action:
        case Submit(stage, attempt, why):
            return f"submit {stage.name} {attempt}: {why}"
        case Wait(why):
            return f"wait: {why}"
        case GiveUp(stage, why, _, cancelled):
            return f"{'cancelled' if cancelled else 'give up'} {stage}: {why}"
    return "finish"


FAILED, RUNNING, QUEUED, OK, STOPPED = (
    JobState.FAILED,
    JobState.RUNNING,
    JobState.QUEUED,
    JobState.SUCCEEDED,
    JobState.CANCELLED,
)
TABLE: dict[str, tuple[Seen, str]] = {
    # The artifacts come first.
    "all is there": (seen(**done(*StageName)), "finish"),
    "the end products are there, the middle was deleted": (seen(**done(GGUF, EVALUATE)), "finish"),
    "the adapter was deleted after the merge": (seen(**done(MERGE)), "submit gguf 1: first attempt"),
    "the manifest of another run": (seen(train=view(made=TRAIN, run_id="x-1")), "submit train 1: first attempt"),
    "the manifest of another stage": (seen(merge=view(made=TRAIN)), "submit train 1: first attempt"),
    "trained": (seen(**done(TRAIN)), "submit merge 1: first attempt"),
    "all but the evaluation": (seen(**done(TRAIN, MERGE, GGUF)), "submit evaluate 1: first attempt"),
    # Live jobs.
    "queued": (seen(job(QUEUED)), "wait: train is queued"),
    "running": (seen(job(RUNNING)), "wait: train is running"),
    "an old attempt still runs": (seen(job(FAILED, 2), job(RUNNING, 1)), "wait: train is running"),
    "queued for a day": (
        seen(job(QUEUED, created_at=NOW - LIMITS.queue_patience_s - 1)),
        "give up train: no machine came in 24 h",
    ),
    "running for a week": (seen(job(RUNNING, created_at=NOW - 7 * 86400)), "wait: train is running"),
    # No job.
    "no trace": (seen(), "submit train 1: first attempt"),
    "an empty repository": (seen(train=view()), "submit train 1: first attempt"),
    "a young claim": (seen(train=view(claim(at=NOW - 1))), "wait: train is being submitted elsewhere"),
    "a claim of a clock that is ahead": (
        seen(train=view(claim(at=NOW + 120))),
        "wait: train is being submitted elsewhere",
    ),
    "a young claim with a job not listed yet": (
        seen(train=view(claim(at=NOW - 1, job_id="j"))),
        "wait: train is being submitted elsewhere",
    ),
    "an old claim": (seen(train=view(claim())), "submit train 1: an earlier submit came to nothing"),
    "an old claim at its last post": (
        seen(train=view(claim(posts=LIMITS.posts - 1))),
        "submit train 1: an earlier submit came to nothing",
    ),
    "the posts are up": (
        seen(train=view(claim(posts=LIMITS.posts))),
        "give up train: 3 submits were answered with an error and no job of them can be found",
    ),
    "a claim from the far future": (
        seen(train=view(claim(at=NOW + 86400))),
        "give up train: its claim cannot be read, or its time lies far ahead",
    ),
    "a claim that cannot be read": (
        seen(train=read_view("head", {"claim.json": b"<html>"})),
        "give up train: its claim cannot be read, or its time lies far ahead",
    ),
    "a claim whose time is no number": (
        seen(train=read_view("head", {"claim.json": b'{"attempt":1,"at":NaN,"by":"a","posts":1,"job_id":null}'})),
        "give up train: its claim cannot be read, or its time lies far ahead",
    ),
    "a winner that cannot be read": (
        seen(train=read_view("head", {"winner.json": b"[]"})),
        "cancelled train: it was cancelled",
    ),
    "an attempt of infinity": (
        seen(train=read_view("head", {"winner.json": b'{"attempt": Infinity, "job_id": "a"}'})),
        "cancelled train: it was cancelled",
    ),
    "the job of the claim is gone": (seen(train=view(claim(job_id="j"))), f"submit train 2: {GONE}"),
    "the winner is gone": (seen(train=view(claim(), Winner(1, "j"))), f"submit train 2: {GONE}"),
    "the winner of the last attempt is gone": (
        seen(train=view(claim(3, job_id="j"))),
        f"give up train: {GONE} (3 attempts)",
    ),
    # The fence is shut.
    "nobody may pass": (seen(train=view(claim(), Winner(1, NOBODY))), "cancelled train: it was cancelled"),
    "nobody may pass, and the job ended as superseded": (
        seen(job(OK), train=view(claim(job_id="train-1"), Winner(1, NOBODY))),
        "cancelled train: it was cancelled",
    ),
    "an earlier attempt was shut out": (
        seen(train=view(claim(2), Winner(1, NOBODY))),
        "submit train 2: an earlier submit came to nothing",
    ),
    # The job ended.
    "ended well a moment ago": (
        seen(job(OK, finished_at=NOW - 1)),
        "wait: train has ended, its artifact is not visible yet",
    ),
    "ended well, no artifact": (seen(job(OK)), "give up train: the job ended well and left no artifact"),
    "of two jobs the one that passed the fence counts": (
        seen(
            job(OK, id="loser"),
            job(FAILED, id="winner", message=LOST),
            train=view(claim(job_id="loser"), Winner(1, "winner")),
        ),
        f"submit train 2: the machine was lost: {LOST}",
    ),
    "of two jobs the one that the claim names counts": (
        seen(
            job(OK, id="other", created_at=NOW), job(FAILED, id="mine", message=LOST), train=view(claim(job_id="mine"))
        ),
        f"submit train 2: the machine was lost: {LOST}",
    ),
    # A winner that nobody knows: buying again is for a person to decide, as long as another job ended well.
    "the winner is unknown to the listing": (
        seen(job(OK, id="loser"), train=view(claim(job_id="loser"), Winner(1, "unknown"))),
        "give up train: the job ended well and left no artifact",
    ),
    "cancelled": (seen(job(STOPPED)), "cancelled train: it was cancelled"),
    "cancelled by a person, in the server's words": (
        seen(job(STOPPED, message="Cancelled by user")),
        "cancelled train: it was cancelled",
    ),
    "cancelled for want of credit": (seen(job(STOPPED, message="NO_CREDITS")), "cancelled train: no credit is left"),
    "taken away by the server": (
        seen(job(STOPPED, message="preempted")),
        "submit train 2: the machine was lost: preempted",
    ),
    "the machine was lost": (seen(job(FAILED, message=LOST)), f"submit train 2: the machine was lost: {LOST}"),
    "lost at the last attempt": (
        seen(job(FAILED, 3, message=LOST)),
        f"give up train: the machine was lost: {LOST} (3 attempts)",
    ),
    "the timeout": (
        seen(job(FAILED, message="Job timeout")),
        "give up train: the job ran into its timeout: Job timeout",
    ),
    "a fault of the experiment": (
        seen(job(FAILED), logs={"train-1": "ValueError: bad data"}),
        "give up train: not known: ValueError: bad data",
    ),
    "only the latest attempt counts": (
        seen(job(FAILED, 1, message="Job timeout"), job(FAILED, 2, message=LOST)),
        f"submit train 3: the machine was lost: {LOST}",
    ),
    "a later stage has attempts of its own": (
        seen(job(OK, 3), job(FAILED, 1, MERGE, message=LOST), **done(TRAIN)),
        f"submit merge 2: the machine was lost: {LOST}",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    world, expected = TABLE[name]
    assert brief(decide(PLAN, world, NOW, LIMITS)) == expected


REOPENED: dict[str, tuple[Seen, dict[str, int], str]] = {
    "everything was deleted": (seen(), {"train": 2}, "submit train 3: asked for by a retry"),
    "the last round's failure does not count": (
        seen(job(FAILED, 2, message="Job timeout"), train=view(claim(2), Winner(2, "train-2"))),
        {"train": 2},
        "submit train 3: asked for by a retry",
    ),
    "nor does its shut fence": (
        seen(train=view(claim(2), Winner(2, NOBODY))),
        {"train": 2},
        "submit train 3: asked for by a retry",
    ),
    "nor do its attempts": (
        seen(job(FAILED, 5, message=LOST)),
        {"train": 3},
        f"submit train 6: the machine was lost: {LOST}",
    ),
    "this round's attempts do": (
        seen(job(FAILED, 6, message=LOST)),
        {"train": 3},
        f"give up train: the machine was lost: {LOST} (3 attempts)",
    ),
    "what is done stays done": (
        seen(**done(TRAIN)),
        {"train": 1, "merge": 3},
        "submit merge 4: asked for by a retry",
    ),
    "an unreadable claim of the last round": (
        seen(train=read_view("head", {"claim.json": b""})),
        {"train": 1},
        "submit train 2: asked for by a retry",
    ),
    "all is there": (seen(**done(*StageName)), {"train": 1}, "finish"),
}


@pytest.mark.parametrize("name", REOPENED)
def test_a_retry_opens_a_new_round(name: str) -> None:
    world, closed, expected = REOPENED[name]
    assert brief(decide(PLAN, world, NOW, LIMITS, closed)) == expected


def test_the_budget_holds_what_is_spent_and_the_worst_case_of_all_that_is_left() -> None:
    worst = PLAN.worst_usd
    spent = seen(job(FAILED, message=LOST))
    bill = spent_usd(spent.jobs)
    assert bill > 0
    assert isinstance(decide(plan_named(max_usd=worst), seen(), NOW, LIMITS), Submit)
    assert isinstance(decide(plan_named(max_usd=round(worst - 0.02, 2)), seen(), NOW, LIMITS), GiveUp)
    assert isinstance(decide(plan_named(max_usd=round(worst + bill, 2)), spent, NOW, LIMITS), Submit)
    refused = decide(plan_named(max_usd=round(worst, 2)), spent, NOW, LIMITS)
    assert isinstance(refused, GiveUp)
    assert refused.why.endswith(f"${bill:.2f} are spent and what is left to do could cost ${worst:.2f}")
    assert refused.hint == f"raise `budget.max_usd` to {bill + worst:.2f}, then `mergetune retry coach`"


def test_hints_hold_the_callers_own_values() -> None:
    ran_out = seen(job(FAILED), logs={"train-1": "torch.OutOfMemoryError: CUDA out of memory"})
    assert decide(PLAN, ran_out, NOW, LIMITS).hint == (
        "`train.max_length: 2048 → 1024`, or `train.flavor: a10g-large → l40sx1`"
    )
    timeout = seen(job(FAILED, message="Job timeout"))
    assert decide(PLAN, timeout, NOW, LIMITS).hint == "`train.timeout: 4h → 6h`, then `mergetune retry coach`"
    braces = 'MERGETUNE {"event": "error", "message": "no {x}", "hint": "write {y} in {path}"}'
    told = decide(PLAN, seen(job(FAILED), logs={"train-1": braces}), NOW, LIMITS)
    assert (told.why.split(": ")[0], told.hint) == ("no {x}", "write {y} in experiments/coach.yaml")


def test_finish_is_said_without_asking_for_jobs() -> None:
    assert decide(PLAN, Seen({stage: view(made=stage) for stage in StageName}), math.inf, LIMITS) == Finish()
