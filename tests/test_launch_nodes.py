"""The protocol of a submit on several nodes, call by call: one claim, a post for each, and no half of an attempt."""

import json

import pytest
from histories import LABEL, LIMITS, ROOT, TWO, book_of, check, one_tick, plan_named, run_until_closed, start, world_of
from simulation import DOWN, JOIN_S, LOST, Killed, SimRemote, SimWorld

from pipeline.actions import Seen, Submit
from pipeline.book import Verdict
from pipeline.controller import tick
from pipeline.hub_facts import Access, HubError
from pipeline.launch import Elsewhere, Outcome, Submitted, Unanswered, submit_stage
from pipeline.plan import StageName
from pipeline.remote import CLAIM, JobState, stage_folder
from pipeline.run_verbs import cancel_run, newest_job
from pipeline.stopping import close_fence, end_attempt
from pipeline.tree import make_order
from pipeline.world import Report

REPO = TWO.repo(StageName.TRAIN)
FOLDER = stage_folder(TWO.run_id, StageName.TRAIN)
NO_CREDIT = HubError(Access.NO_CREDIT, "402 add credit")


def submit(remote: SimRemote, attempt: int = 1) -> Outcome:
    order = make_order(ROOT, remote, LABEL, {}, TWO, Submit(TWO.stages[0], attempt), Seen())
    return submit_stage(remote, remote.clock, order, LIMITS)


def claim_in(sim: SimWorld) -> dict[str, object]:
    return json.loads(sim.files(REPO)[f"{FOLDER}/{CLAIM}"])


def ticked(sim: SimWorld, remote: SimRemote | None = None) -> Report:
    (report,) = tick(world_of(remote or SimRemote(sim), (TWO,)))
    return report


def killed_before_post(sim: SimWorld, number: int) -> None:
    """A controller that dies before its second post."""
    remote = SimRemote(sim)
    posts: list[str] = []

    def die(name: str) -> None:
        posts.extend([name] * (name == "submit"))
        if len(posts) == number:
            raise Killed

    remote.before = die
    with pytest.raises(Killed):
        tick(world_of(remote, (TWO,)))


def test_one_claim_and_a_job_for_each_node() -> None:
    sim = start()
    assert submit(SimRemote(sim)) == Submitted("job0")
    assert sim.writes == ["create_repo", "commit", "submit", "commit", "submit", "commit"]
    claim = claim_in(sim)
    assert (claim["posts"], claim["job_id"], claim["more_ids"]) == (1, "job0", ["job1"])
    specs = [job.spec for job in sim.job_list]
    assert [spec.labels["node"] for spec in specs] == ["0", "1"]
    assert [spec.environment for spec in specs] == [{"MERGETUNE_NODE": "0"}, {"MERGETUNE_NODE": "1"}]
    assert [spec.network_aliases for spec in specs] == [("node-0",), ("node-1",)]
    assert len({spec.network_group for spec in specs}) == len({spec.revision for spec in specs}) == 1
    assert specs[0].revision == f"{REPO}@1"
    request = json.loads(sim.files(REPO)[f"{FOLDER}/run.json"])
    assert (request["nodes"], request["processes"], request["predicted"]["nodes"]) == (2, 2, 2)


def test_another_attempt_and_another_run_have_other_groups() -> None:
    sim = start()
    remote = SimRemote(sim)
    orders = [
        make_order(ROOT, remote, label, {}, plan, Submit(plan.stages[0], attempt), Seen())
        for label, plan, attempt in (
            (LABEL, TWO, 1),
            (LABEL, TWO, 2),
            ("acme--other", TWO, 1),
            (LABEL, plan_named(version=1, nodes=2), 1),
        )
    ]
    groups = {order.network_group for order in orders}
    assert len(groups) == 4 and all(group and len(group) <= 46 for group in groups)


def test_killed_between_two_posts_the_missing_node_is_started_after_the_lease() -> None:
    sim = start(queue_s=0, queue_least_s=5000)  # no machine is free yet: nothing is paid
    killed_before_post(sim, 2)
    assert [job.node for job in sim.job_list] == [0]
    assert ticked(sim).text == "train is being submitted elsewhere"
    sim.advance(LIMITS.lease_s)
    report = ticked(sim)
    assert (report.outcome, report.text) == ("submitted", "train, attempt 1 on a10g-large: node 2 was not started")
    assert [(job.node, job.attempt) for job in sim.job_list] == [(0, 1), (1, 1)]
    assert sim.job_list[0].spec.revision == sim.job_list[1].spec.revision  # the same script and the same request
    assert ticked(sim).text == "train is queued"
    assert run_until_closed(sim, plan=TWO) == Verdict.DONE
    assert len(sim.trainings()) == 1
    assert [job.spec.network_group is None for job in sim.job_list] == [False, False, True, True, True]
    check(sim)


def test_a_node_that_nobody_joins_ends_and_the_next_attempt_has_both() -> None:
    sim = start()
    killed_before_post(sim, 2)
    sim.advance(JOIN_S + 600)
    assert sim.job_list[0].state is JobState.FAILED
    report = ticked(sim)
    assert report.text.startswith("train, attempt 2 on a10g-large: another node of the training did not come")
    assert run_until_closed(sim, plan=TWO) == Verdict.DONE
    assert len(sim.trainings()) == 1
    check(sim)


def test_a_node_that_is_refused_takes_the_others_with_it() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = [None, NO_CREDIT]
    report = ticked(sim, remote)
    assert (report.outcome, report.text) == ("blocked", "`acme` has no credit for jobs: 402 add credit")
    assert [job.state for job in sim.job_list] == [JobState.CANCELLED]
    assert claim_in(sim)["ended"] == "node 2 of 2 was refused: 402 add credit"
    assert ticked(sim).text.startswith("train, attempt 2 on a10g-large: node 2 of 2 was refused")
    assert run_until_closed(sim, plan=TWO) == Verdict.DONE
    check(sim)


def test_a_node_that_is_always_refused_is_given_up_after_three_attempts() -> None:
    sim = start()
    for _ in range(4):
        remote = SimRemote(sim)
        remote.troubles["submit"] = [None, NO_CREDIT]
        report = ticked(sim, remote)
    assert (report.outcome, report.text) == (
        "failed",
        "train: node 2 of 2 was refused: 402 add credit (3 attempts)",
    )
    assert len(sim.job_list) == 3 and not [job for job in sim.job_list if job.finished_at is None]


def test_the_first_node_that_is_refused_gives_the_claim_back() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = [NO_CREDIT]
    ticked(sim, remote)
    claim = claim_in(sim)
    assert (sim.job_list, claim["at"], claim["posts"], claim["job_id"]) == ([], 0.0, 0, None)
    assert ticked(sim).outcome == "submitted"
    assert {job.attempt for job in sim.job_list} == {1}


@pytest.mark.parametrize("troubles", [[LOST], [None, LOST], [DOWN], [None, DOWN], [LOST, LOST], [DOWN, LOST, DOWN]])
def test_lost_answers_start_no_node_twice(troubles: list[HubError | None]) -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = list(troubles)
    assert isinstance(submit(remote), Submitted)
    assert [(job.node, job.attempt) for job in sim.job_list] == [(0, 1), (1, 1)]
    assert set(claim_in(sim)["more_ids"]) == {"job1"}
    assert run_until_closed(sim, plan=TWO) == Verdict.DONE
    check(sim)


def test_a_node_whose_posts_all_fail_is_told_and_the_other_is_stopped() -> None:
    sim = start(queue_s=90_000, queue_least_s=80_000)
    remote = SimRemote(sim)
    remote.troubles["submit"] = [None, DOWN, DOWN, DOWN]
    assert isinstance(submit(remote), Unanswered)
    sim.advance(LIMITS.lease_s)
    report = ticked(sim)
    assert report.text == "train: no job of node 2 of 2 can be found after 3 submits"
    assert (report.outcome, sim.job_list[0].state) == ("failed", JobState.CANCELLED)


def test_a_node_that_is_submitted_twice_leaves_at_the_fence() -> None:
    """The answer is lost and listings are late: a second job of node 2 is bought, and it does no work."""
    sim = start(queue_s=0, queue_least_s=3000)
    sim.faults.list_lag_s = 5000
    remote = SimRemote(sim)
    remote.troubles["submit"] = [None, LOST]
    submit(remote)
    assert [job.node for job in sim.job_list] == [0, 1, 1]
    assert run_until_closed(sim, plan=TWO) == Verdict.DONE
    assert len(sim.trainings()) == 1
    assert [job.message for job in sim.job_list if job.stage == "train"].count("superseded") == 1
    check(sim)


def test_a_failed_node_stops_the_other_and_the_cause_is_told() -> None:
    sim = start()
    ticked(sim)
    sim.advance(200)
    first, second = sim.job_list
    second.log, second.finished_at, second.state = (
        "torch.OutOfMemoryError: CUDA out of memory\n",
        sim.time,
        JobState.FAILED,
    )
    second.trained_s = sim.work_s  # the first one does not notice: it hangs
    report = ticked(sim)
    assert report.text == "train: node 2 of 2 has failed: the other nodes are stopped"
    assert first.state is JobState.CANCELLED
    assert ticked(sim).text.startswith("train: the GPU ran out of memory")
    assert not book_of(sim).is_open(TWO.run_id)


def test_what_is_stopped_is_what_was_seen() -> None:
    """Between look and act another controller has begun the next attempt: its jobs go on."""
    sim = start()
    submit(SimRemote(sim))
    sim.advance(200)
    for job in sim.job_list:
        job.state, job.finished_at = JobState.FAILED, sim.time
    submit(SimRemote(sim), 2)
    end_attempt(SimRemote(sim), REPO, FOLDER, 1, ["job0"], "node 2 of 2 has failed")
    assert "ended" not in claim_in(sim)
    assert [job.state for job in sim.job_list[2:]] == [JobState.QUEUED] * 2


def test_an_end_that_cannot_be_noted_stops_nothing() -> None:
    sim = start()
    submit(SimRemote(sim))
    sim.advance(200)
    remote = SimRemote(sim)
    remote.troubles["commit"] = [DOWN] * 20
    with pytest.raises(HubError):
        end_attempt(remote, REPO, FOLDER, 1, ["job0"], "node 2 of 2 has failed")
    assert [job.state for job in sim.job_list] == [JobState.RUNNING] * 2


def test_a_person_who_cancels_one_node_ends_the_run() -> None:
    sim = start()
    ticked(sim)
    sim.advance(200)
    SimRemote(sim).cancel("acme", "job1")
    report = ticked(sim)
    assert (report.outcome, report.text) == ("cancelled", "train: it was cancelled")
    assert [job.state for job in sim.job_list] == [JobState.CANCELLED] * 2


def test_a_run_that_was_given_up_lets_no_node_begin_later() -> None:
    sim = start(queue_s=0, queue_least_s=0)
    ticked(sim)
    sim.job_list[1].starts_at = sim.time + 80_000
    sim.advance(200)
    sim.job_list[1].state = JobState.CANCELLED  # as the server says; its container comes all the same
    one_tick(sim, plans=(TWO,))
    sim.job_list[1].state = JobState.QUEUED
    sim.advance(90_000)
    assert sim.job_list[1].passed_at is None


def test_a_node_that_nobody_could_find_does_not_begin_in_a_run_that_was_given_up() -> None:
    """Its job is not there when the other one's failure closes the run, and comes afterwards."""
    sim = start(queue_s=0)
    ticked(sim)
    first, late = sim.job_list
    sim.advance(200)
    sim.job_list.remove(late)
    first.state, first.finished_at = JobState.FAILED, sim.time  # `bad data`: no retry passes
    assert ticked(sim).outcome == "failed"
    late.state, late.passed_at, late.began_at = JobState.QUEUED, None, None
    del sim.repos[REPO][-1][f"{FOLDER}/winner-1.json"]
    sim.job_list.append(late)
    sim.advance(4000)
    assert (late.passed_at, late.message) == (None, "superseded")


def test_the_files_of_an_attempt_under_way_stay_what_its_nodes_mount() -> None:
    sim = start(queue_s=10_000, queue_least_s=5000)
    killed_before_post(sim, 2)
    sim.advance(LIMITS.lease_s)
    remote = SimRemote(sim)
    before = sim.files(REPO)[f"{FOLDER}/run.json"]
    seen = Seen(jobs=remote.jobs("acme", {"run": TWO.run_id}, live=True))
    order = make_order(ROOT, remote, LABEL, {"commit": "f" * 40}, TWO, Submit(TWO.stages[0], 1, nodes=(1,)), seen)
    assert order.files["run.json"] != before
    assert submit_stage(remote, remote.clock, order, LIMITS) == Submitted("job1")
    assert sim.files(REPO)[f"{FOLDER}/run.json"] == before


@pytest.mark.parametrize("shut", [False, True])
def test_an_attempt_that_was_ended_gets_no_more_nodes(shut: bool) -> None:
    """Between look and act another controller has found a reason to end it, or a person has stopped the run."""
    sim = start(queue_s=10_000, queue_least_s=5000)
    killed_before_post(sim, 2)
    sim.advance(LIMITS.lease_s)
    remote = SimRemote(sim)
    if shut:
        close_fence(remote, REPO, FOLDER)
    else:
        end_attempt(remote, REPO, FOLDER, 1, ["job0"], "node 1 of 2 has failed")
    order = make_order(ROOT, remote, LABEL, {}, TWO, Submit(TWO.stages[0], 1, nodes=(1,)), Seen())
    assert isinstance(submit_stage(remote, remote.clock, order, LIMITS), Elsewhere)
    assert len(sim.job_list) == 1


def test_status_counts_all_nodes_and_the_first_one_speaks() -> None:
    sim = start()
    ticked(sim)
    sim.advance(600)
    report = ticked(sim)
    assert (report.job, report.more_jobs) == ("job0", ("job1",))
    assert report.usd == pytest.approx(2 * 10 * TWO.stages[0].flavor.usd_per_minute)
    assert report.as_dict()["more_jobs"] == ("job1",)
    world = world_of(SimRemote(sim), (TWO,))
    assert newest_job(world, "coach").id == "job0"
    assert cancel_run(world, "coach").startswith(f"{TWO.run_id}: cancelled, 2 jobs stopped")
    assert [job.state for job in sim.job_list] == [JobState.CANCELLED] * 2
