"""The protocol of a submit, call by call, and the end of a run: through the simulated world."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from histories import LABEL, LIMITS, PLAN, ROOT, check, start
from simulation import DOWN, LOST, Killed, SimRemote, SimWorld

from pipeline.actions import Seen, Submit
from pipeline.hub_facts import Access, HubError
from pipeline.launch import Elsewhere, Order, Outcome, Submitted, Unanswered, submit_stage
from pipeline.plan import StageName
from pipeline.remote import CLAIM, NOBODY, WINNER, JobState, stage_folder
from pipeline.stopping import cancel_jobs, close_fence
from pipeline.tree import make_order

TRAIN = PLAN.stages[0]
REPO = PLAN.repo(StageName.TRAIN)
FOLDER = stage_folder(PLAN.run_id, StageName.TRAIN)
LABELS = {"repo": LABEL, "run": PLAN.run_id}
MOVED = HubError(Access.MOVED, "the head is another")


def order_of(remote: SimRemote, attempt: int = 1) -> Order:
    """The order of a controller that decided to train."""
    return make_order(ROOT, remote, LABEL, {}, PLAN, Submit(TRAIN, attempt), Seen())


def submit(remote: SimRemote, attempt: int = 1) -> Outcome:
    """Submit the training."""
    return submit_stage(remote, remote.clock, order_of(remote, attempt), LIMITS)


def claim_in(sim: SimWorld) -> dict[str, object]:
    """`claim.json` at the head."""
    return json.loads(sim.files(REPO)[f"{FOLDER}/{CLAIM}"])


def winner_in(sim: SimWorld) -> dict[str, object] | None:
    """`winner.json` at the head."""
    content = sim.files(REPO).get(f"{FOLDER}/{WINNER}")
    return json.loads(content) if content else None


def when(remote: SimRemote, call: str, act: Callable[[], None]) -> None:
    """Have something happen right before the first call of that name."""
    calls: list[str] = []

    def before(name: str) -> None:
        if name == call and not calls:
            calls.append(name)
            act()

    remote.before = before


def test_a_submit_claims_posts_and_notes() -> None:
    sim = start()
    assert submit(SimRemote(sim)) == Submitted("job0")
    assert sim.writes == ["create_repo", "commit", "submit", "commit"]
    claim = claim_in(sim)
    assert (claim["attempt"], claim["posts"], claim["job_id"]) == (1, 1, "job0")
    files = {path.removeprefix(f"{FOLDER}/") for path in sim.files(REPO)}
    assert files == {"claim.json", "run.json", "train_sft.py"}
    spec = sim.job_list[0].spec
    assert spec.revision == f"{REPO}@1"  # the job mounts the claim's commit, whatever comes later
    assert spec.timeout_s == TRAIN.timeout_s
    assert spec.labels == {**LABELS, "experiment": "coach", "stage": "train", "attempt": "1"}


@pytest.mark.parametrize("call", ["create_repo", "commit", "submit"])
def test_a_lost_answer_is_looked_up_and_not_repeated_blindly(call: str) -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles[call] = [LOST]
    if call == "create_repo":  # before anything was claimed: the next tick begins again
        with pytest.raises(HubError):
            submit(remote)
        assert sim.job_list == []
    assert isinstance(submit(remote), Submitted)
    assert len(sim.job_list) == 1
    assert claim_in(sim)["job_id"] == "job0"


def test_a_lost_answer_to_the_note_writes_it_again() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["commit"] = [None, LOST]
    assert isinstance(submit(remote), Submitted)
    assert claim_in(sim)["job_id"] == "job0"


def test_a_note_that_never_succeeds_loses_no_job() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["commit"] = [None, *[DOWN] * 8]
    assert submit(remote) == Submitted("job0")
    assert claim_in(sim)["job_id"] is None


def test_whoever_loses_the_race_for_the_claim_stops() -> None:
    sim = start()
    late = SimRemote(sim)
    when(late, "commit", lambda: submit(SimRemote(sim)))
    assert submit(late) == Elsewhere("this or a later attempt was submitted")
    assert len(sim.job_list) == 1


def test_a_head_that_moves_for_another_reason_is_taken_again() -> None:
    sim = start()
    remote = SimRemote(sim)
    when(remote, "commit", lambda: sim.put(REPO, {"README.md": b"by hand"}))
    assert isinstance(submit(remote), Submitted)
    assert sim.files(REPO)["README.md"] == b"by hand"


def test_a_head_that_never_rests_starts_nothing() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["commit"] = [MOVED] * 8
    assert submit(remote) == Elsewhere(f"the head of `{REPO}` keeps moving")
    assert sim.job_list == []


def claim_without_post(sim: SimWorld) -> None:
    """A controller that is gone after its claim."""
    remote = SimRemote(sim)
    remote.troubles["submit"] = [Killed()]
    with pytest.raises(Killed):
        submit(remote)
    assert sim.job_list == []


def test_a_claim_is_taken_over_after_its_lease_and_not_before() -> None:
    sim = start()
    claim_without_post(sim)
    sim.advance(LIMITS.lease_s - 60)
    assert submit(SimRemote(sim)) == Elsewhere("it is being submitted elsewhere")
    sim.advance(60)
    assert submit(SimRemote(sim)) == Submitted("job0")
    assert (claim_in(sim)["attempt"], claim_in(sim)["posts"]) == (1, 2)


@pytest.mark.parametrize("lost_posts", [1, 2, 3])
def test_ambiguous_posts_that_started_nothing_are_repeated_up_to_three(lost_posts: int) -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = [DOWN] * lost_posts
    outcome = submit(remote)
    assert isinstance(outcome, Unanswered if lost_posts == 3 else Submitted)
    assert len(sim.job_list) == (0 if lost_posts == 3 else 1)
    assert claim_in(sim)["posts"] == min(lost_posts + 1, 3)
    if lost_posts == 3:
        sim.advance(LIMITS.lease_s)
        assert isinstance(submit(SimRemote(sim)), Unanswered)  # no fourth post, whoever asks
        assert sim.writes.count("submit") == 3


def test_a_post_without_an_answer_is_found_when_the_listing_shows_it() -> None:
    sim = start()
    sim.faults.list_lag_s = 50
    remote = SimRemote(sim)
    remote.troubles["submit"] = [LOST]
    remote.troubles["jobs"] = [DOWN, DOWN, DOWN]  # and the first search fails
    assert submit(remote) == Submitted("job0")
    assert len(sim.job_list) == 1


@pytest.mark.parametrize("access", [Access.NO_CREDIT, Access.FORBIDDEN, Access.UNAUTHORIZED])
def test_a_refused_post_leaves_nothing_started(access: Access) -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = [HubError(access, "no")]
    with pytest.raises(HubError) as error:
        submit(remote)
    assert error.value.access is access
    assert sim.job_list == []
    assert (claim_in(sim)["job_id"], claim_in(sim)["posts"]) == (None, 0)
    # With credit, or the right, the next tick starts it at once: nobody waits for the lease of a claim given back.
    assert submit(SimRemote(sim)) == Submitted("job0")


def test_a_listing_refused_after_a_lost_post_is_no_refusal_of_the_post() -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles["submit"] = [LOST]
    remote.troubles["jobs"] = [HubError(Access.FORBIDDEN, "403")] * 9
    submit(remote)
    assert claim_in(sim)["posts"] >= 1


@pytest.mark.parametrize("call", ["create_repo", "commit"])
def test_a_refusal_before_the_post_starts_nothing(call: str) -> None:
    sim = start()
    remote = SimRemote(sim)
    remote.troubles[call] = [HubError(Access.FORBIDDEN, "403")]
    with pytest.raises(HubError):
        submit(remote)
    assert sim.job_list == []
    assert "submit" not in sim.writes


def test_a_slow_process_does_not_post_on_an_old_claim() -> None:
    """It claims anew instead, as its next post: nobody else may have taken over meanwhile."""
    sim = start()
    slow = SimRemote(sim)
    # The claim is made; then the look that follows a lost answer takes longer than half the lease.
    slow.troubles["commit"] = [LOST]
    views: list[str] = []

    def before(name: str) -> None:
        views.append(name)
        if name == "view" and "commit" in views and views.count("commit") == 1:
            views.append("commit")
            sim.advance(LIMITS.lease_s / 2 + 60)

    slow.before = before
    assert submit(slow) == Submitted("job0")
    assert claim_in(sim)["posts"] == 2
    assert len(sim.job_list) == 1


def test_a_slow_process_whose_claim_was_taken_over_stops() -> None:
    sim = start()
    slow = SimRemote(sim)
    slow.troubles["commit"] = [LOST]
    views: list[str] = []

    def before(name: str) -> None:
        views.append(name)
        if name == "view" and "commit" in views and "slept" not in views:
            views.append("slept")
            sim.advance(LIMITS.lease_s + 60)
            submit(SimRemote(sim))

    slow.before = before
    assert isinstance(submit(slow), Elsewhere)
    assert len(sim.job_list) == 1


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("manifest.json", {"run_id": PLAN.run_id, "stage": "train"}, "the artifact is there"),
        (
            "winner.json",
            {"attempt": 1, "job_id": "j"},
            "a job of this attempt has passed the fence, or it was cancelled",
        ),
        (
            "winner.json",
            {"attempt": 1, "job_id": NOBODY},
            "a job of this attempt has passed the fence, or it was cancelled",
        ),
        (
            "claim.json",
            {"attempt": 2, "at": 0, "by": "x", "posts": 1, "job_id": None},
            "this or a later attempt was submitted",
        ),
        ("claim.json", "not ours to read", "it is being submitted elsewhere"),
    ],
)
def test_what_moved_since_the_decision_is_seen(path: str, content: object, why: str) -> None:
    sim = start()
    sim.repos[REPO] = [{f"{FOLDER}/{path}": json.dumps(content).encode()}]
    assert submit(SimRemote(sim)) == Elsewhere(why)
    assert sim.writes == []


def test_a_repository_that_is_not_visible_yet_is_no_place_to_post() -> None:
    sim = start()
    remote = SimRemote(sim)
    when(remote, "create_repo", lambda: remote.troubles.update(view=[HubError(Access.UNREACHABLE, "no")] * 3))
    with pytest.raises(HubError):
        submit(remote)
    assert sim.job_list == []


# The end of a run.


def test_a_fence_without_any_submit_stays_open() -> None:
    sim = start()
    assert close_fence(SimRemote(sim), REPO, FOLDER).head is None
    sim.repos[REPO] = [{}]
    close_fence(SimRemote(sim), REPO, FOLDER)
    assert sim.writes == []


def test_a_shut_fence_lets_a_queued_job_not_pass() -> None:
    sim = start()
    submit(SimRemote(sim))
    close_fence(SimRemote(sim), REPO, FOLDER)
    assert winner_in(sim) == {"attempt": 1, "job_id": NOBODY}
    sim.advance(4000)
    assert sim.job_list[0].message == "superseded"
    assert sim.trainings() == []


def test_a_shut_fence_stops_a_job_that_has_passed_it() -> None:
    sim = start(queue_s=0)
    submit(SimRemote(sim))
    sim.advance(300)
    assert sim.job_list[0].passed_at is not None
    close_fence(SimRemote(sim), REPO, FOLDER)
    sim.advance(60)
    assert sim.job_list[0].finished_at is not None
    assert sim.job_list[0].trained_s < 600


@pytest.mark.parametrize("troubles", [[LOST], [DOWN, MOVED], [MOVED] * 6])
def test_a_fence_is_shut_through_lost_answers_and_races(troubles: list[HubError | None]) -> None:
    sim = start()
    submit(SimRemote(sim))
    remote = SimRemote(sim)
    remote.troubles["commit"] = troubles
    close_fence(remote, REPO, FOLDER)
    assert winner_in(sim) == {"attempt": 1, "job_id": NOBODY}
    before = len(sim.writes)
    close_fence(remote, REPO, FOLDER)  # again: nothing to do
    assert len(sim.writes) == before


def test_a_fence_that_cannot_be_shut_is_an_error() -> None:
    sim = start()
    submit(SimRemote(sim))
    for trouble in (DOWN, MOVED):
        remote = SimRemote(sim)
        remote.troubles["commit"] = [trouble] * 8
        with pytest.raises(HubError, match="could not be closed"):
            close_fence(remote, REPO, FOLDER)


def test_a_fence_is_not_shut_for_an_attempt_that_came_later() -> None:
    sim = start()
    submit(SimRemote(sim))
    submit(SimRemote(sim), attempt=2)
    close_fence(SimRemote(sim), REPO, FOLDER, 1)
    assert winner_in(sim) is None


def test_the_next_attempt_passes_a_fence_that_was_shut() -> None:
    sim = start()
    submit(SimRemote(sim))
    close_fence(SimRemote(sim), REPO, FOLDER)
    assert submit(SimRemote(sim), attempt=2) == Submitted("job1")
    sim.advance(4000)
    assert [job.attempt for job in sim.trainings()] == [2]
    check(sim)


def cancel(sim: SimWorld, remote: SimRemote | None = None, known: set[str] | None = None) -> set[str]:
    """Cancel the run's jobs."""
    remote = remote or SimRemote(sim)
    return cancel_jobs(remote, remote.clock, "acme", LABELS, known or set())


def test_a_cancel_ends_a_job_submitted_a_moment_before() -> None:
    sim = start()
    submit(SimRemote(sim))
    assert cancel(sim) == {"job0"}
    assert sim.job_list[0].state is JobState.CANCELLED
    assert cancel(sim) == set()


def test_a_cancel_ends_a_job_that_is_not_listed_yet() -> None:
    sim = start()
    sim.faults.list_lag_s = 3600
    submit(SimRemote(sim))
    assert cancel(sim) == set()  # nobody told it of the job
    assert cancel(sim, known={"job0"}) == {"job0"}
    assert sim.job_list[0].state is JobState.CANCELLED


def test_a_cancel_between_claim_and_post_leaves_a_job_that_cannot_pass() -> None:
    """The submitter stands still, the run is cancelled, the post comes afterwards."""
    sim = start()
    slow = SimRemote(sim)

    def stop() -> None:
        close_fence(SimRemote(sim), REPO, FOLDER)
        cancel(sim)

    when(slow, "submit", stop)
    submit(slow)
    assert len(sim.job_list) == 1
    sim.advance(4000)
    assert sim.trainings() == []


def test_a_cancel_before_the_claim_is_followed_by_nothing() -> None:
    """The fence of an attempt nobody claimed cannot be shut; the claim that follows is a new one, and is seen."""
    sim = start()
    submit(SimRemote(sim))
    close_fence(SimRemote(sim), REPO, FOLDER)
    assert isinstance(submit(SimRemote(sim)), Elsewhere)
    assert len(sim.job_list) == 1


def test_a_job_that_does_not_stop_is_told() -> None:
    sim = start(queue_s=10_000)
    submit(SimRemote(sim))
    remote = SimRemote(sim)

    def keep_alive(name: str) -> None:
        sim.job_list[0].state, sim.job_list[0].finished_at = JobState.QUEUED, None

    remote.before = keep_alive
    with pytest.raises(HubError, match="asked to stop and still run: job0"):
        cancel(sim, remote)


def test_jobs_of_other_runs_are_left_alone() -> None:
    sim = start()
    remote = SimRemote(sim)
    order = order_of(remote)
    submit_stage(remote, remote.clock, replace(order, labels={**order.labels, "run": "coach-other"}), LIMITS)
    assert cancel(sim) == set()
    assert sim.job_list[0].state is JobState.QUEUED
