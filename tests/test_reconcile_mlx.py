"""What is decided about a run whose training is a person's: it asks, never submits a training, and goes on after it."""

from dataclasses import replace

import pytest
from examples import MAC
from histories import start, world_of
from simulation import SimRemote
from test_reconcile import LIMITS, NOW, claim, done, job, seen, view

from pipeline.actions import Ask, Finish, Seen, Submit
from pipeline.controller import tick
from pipeline.errors import Finding, Place, Severity
from pipeline.facts import Facts
from pipeline.launch import Order, submit_stage
from pipeline.loader import parse_experiment
from pipeline.plan import StageName, make_plan
from pipeline.reconcile import decide
from pipeline.remote import NOBODY, JobState, StageView, Winner
from pipeline.world import Outcome

PLAN = make_plan(parse_experiment(MAC).experiment, Facts())
LOCAL = "local-0123456789abcdef"


def views(**given: StageView) -> Seen:
    """A look in which made stages carry this plan's run id."""
    changed = {}
    for name, one in given.items():
        manifest = {**one.manifest, "run_id": PLAN.run_id} if one.manifest else None
        changed[StageName(name)] = StageView(one.head, one.claim, one.winner, manifest)
    return Seen(changed)


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (seen(), "waits for an adapter"),
        (seen(train=view()), "waits for an adapter"),
        (seen(train=view(claim())), "waits for an adapter"),
        (seen(train=view(claim(), Winner(1, NOBODY))), "waits for an adapter"),
        (seen(train=view(claim(job_id=LOCAL), Winner(1, LOCAL))), "its upload broke off"),
        (seen(job(JobState.FAILED), logs={"train-1": "the node was lost"}), "waits for an adapter"),
        (seen(job(JobState.SUCCEEDED)), "waits for an adapter"),
    ],
)
@pytest.mark.parametrize("closed", [0, 1, 5])
def test_a_training_is_never_submitted(look: Seen, why: str, closed: int) -> None:
    action = decide(PLAN, look, NOW, LIMITS, {"train": closed})
    assert isinstance(action, Ask)
    assert why in action.why
    assert "`mergetune run experiments/coach.yaml --backend mlx`" in action.hint
    assert f"`mergetune submit-adapter coach runs/{PLAN.run_id}/train/artifact`" in action.hint


def test_the_chain_goes_on_from_the_adapter() -> None:
    action = decide(PLAN, views(**done(StageName.TRAIN)), NOW, LIMITS)
    assert isinstance(action, Submit)
    assert (action.stage.name, action.attempt) == (StageName.MERGE, 1)
    assert decide(PLAN, views(**done(*StageName)), NOW, LIMITS) == Finish()


def test_an_adapters_name_is_no_job() -> None:
    assert view(claim(job_id=LOCAL), Winner(1, LOCAL)).job_ids == set()
    assert view(claim(job_id="a"), Winner(2, "b")).job_ids == {"a", "b"}


def test_submitting_it_is_a_bug_that_flies() -> None:
    remote = SimRemote(start())
    order = Order(PLAN, PLAN.stages[0], 1, "me", {}, "train_mlx.py", {})
    with pytest.raises(ValueError, match="never a job"):
        submit_stage(remote, remote.clock, order, LIMITS)
    assert remote.world.calls == 0


def hand_in(remote: SimRemote) -> None:
    folder = f".mergetune/{PLAN.run_id}/train"
    manifest = f'{{"run_id": "{PLAN.run_id}", "stage": "train"}}'.encode()
    winner = f'{{"attempt": 1, "job_id": "{LOCAL}"}}'.encode()
    files = {f"{folder}/manifest.json": manifest, f"{folder}/winner.json": winner}
    remote.create_repo(PLAN.repo(StageName.TRAIN), True)
    remote.world.put(PLAN.repo(StageName.TRAIN), files)


def test_ticks_ask_and_start_nothing_until_it_is_there() -> None:
    remote = SimRemote(start())
    for _ in range(3):
        (report,) = tick(world_of(remote, (PLAN,)))
        assert (report.outcome, report.stage) == (Outcome.YOURS, StageName.TRAIN)
    assert (remote.world.job_list, remote.world.repos) == ([], {})
    hand_in(remote)
    (report,) = tick(world_of(remote, (PLAN,)))
    assert (report.outcome, report.stage) == (Outcome.SUBMITTED, StageName.MERGE)


def test_the_review_stands_before_the_first_job() -> None:
    """Of a training by a job that is the training; here it is the merge, and money must not flow before it."""
    remote = SimRemote(start())
    hand_in(remote)
    refused = Finding("REVIEW", Severity.ERROR, Place("experiments/coach.yaml"), "needs review: no plan", "`/plan`")
    (report,) = tick(replace(world_of(remote, (PLAN,)), preflight=lambda plan: (refused,)))
    assert (report.outcome, report.text) == (Outcome.BLOCKED, "needs review: no plan")
    assert remote.world.job_list == []
