"""One tick over a whole repository: what it starts, stops, closes and leaves alone. The world is the simulated one."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from histories import (
    COMMIT,
    PLAN,
    VERSIONS,
    book_of,
    check,
    one_tick,
    plan_named,
    reopen,
    run_until_closed,
    start,
    world_of,
)
from histories import wanted as wanted_of
from simulation import DOWN, LOST, Killed, SimRemote, SimWorld

from pipeline.book import SINCE, Closed, Tag, Verdict, finish_message
from pipeline.closing import end_run
from pipeline.controller import tick
from pipeline.errors import Finding, Place, Severity, UserError
from pipeline.hub_facts import Access, HubError
from pipeline.plan import Plan, StageName
from pipeline.remote import NOBODY, JobState, Winner
from pipeline.settings import Settings
from pipeline.world import Outcome, Report, Tree, Wanted

COACH, EDITED = VERSIONS["coach"][:2]
GUIDE, TUTOR = VERSIONS["guide"][0], VERSIONS["tutor"][0]
FORBIDDEN = HubError(Access.FORBIDDEN, "403 no")
MANY = tuple(plan_named(f"exp-{number}") for number in range(12))


def outcomes(reports: list[Report]) -> dict[str, Outcome]:
    """What happened to each experiment."""
    return {report.experiment: report.outcome for report in reports}


def ticked(sim: SimWorld, plans: tuple[Plan, ...] = (PLAN,), dry_run: bool = False, **more: Any) -> list[Report]:
    """A tick in which no fault may stay unseen."""
    return tick(world_of(SimRemote(sim), plans, **more), dry_run=dry_run)


def with_troubles(sim: SimWorld, plans: tuple[Plan, ...], **troubles: list[HubError | None]) -> list[Report]:
    """A tick whose calls go wrong."""
    remote = SimRemote(sim)
    remote.troubles = dict(troubles)
    return tick(world_of(remote, plans))


def running(sim: SimWorld, *plans: Plan) -> None:
    """The trainings of these plans are running."""
    ticked(sim, plans)
    sim.advance(300)
    assert all(job.state is JobState.RUNNING for job in sim.job_list)


# A first install.


def fresh() -> SimWorld:
    sim = start()
    sim.tags.clear()
    return sim


def old_files(count: int) -> tuple[Wanted, ...]:
    """Experiments that nobody may need a plan of."""

    def no_plan() -> Plan:
        raise AssertionError("an old experiment was planned")

    return tuple(Wanted(f"old-{number}", f"old-{number}-0a1b2c3d", "acme", no_plan) for number in range(count))


def test_five_hundred_old_experiments_are_adopted_and_none_is_launched() -> None:
    sim = fresh()
    tree = Tree(COMMIT, old_files(500))
    reports = ticked(sim, tree=tree)
    assert {report.outcome for report in reports} == {Outcome.ADOPTED}
    assert len(reports) == 500
    assert reports[7].hint == "`mergetune retry old-7` launches it"
    assert set(sim.writes) == {"push_tag"}
    assert list(sim.tags)[-1] == SINCE  # the marker is last: whoever dies before it begins again
    assert len(sim.tags) == 501
    assert {one.verdict for one in book_of(sim).closed} == {Verdict.ADOPTED}
    assert ticked(sim, tree=tree) == []
    assert len(sim.tags) == 501


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 21, 22, 40, 41, 42])
def test_an_adoption_that_is_killed_goes_on_where_it_was(kill_at: int) -> None:
    sim = fresh()
    tree = Tree(COMMIT, old_files(20))
    one_tick(sim, kill_at=kill_at, tree=tree)
    ticked(sim, tree=tree)
    assert len(sim.tags) == 21
    assert sim.job_list == []
    assert {len(rounds) for rounds in book_of(sim).rounds.values()} == {1}


def test_what_comes_after_the_install_is_launched() -> None:
    sim = fresh()
    ticked(sim, tree=Tree(COMMIT, old_files(3)))
    tree = Tree(COMMIT, (*old_files(3), wanted_of(PLAN)))
    assert outcomes(ticked(sim, tree=tree)) == {"coach": Outcome.SUBMITTED}


def test_an_adoption_that_is_only_tried_writes_nothing() -> None:
    sim = fresh()
    assert len(ticked(sim, tree=Tree(COMMIT, old_files(3)), dry_run=True)) == 3
    assert sim.writes == []


# Caps and money.


def test_a_tick_starts_so_many_and_the_next_one_goes_on() -> None:
    sim = start(queue_least_s=10_000)
    settings = Settings(submits_per_tick=5)
    first = ticked(sim, MANY, settings=settings)
    assert [report.outcome for report in first].count(Outcome.SUBMITTED) == 5
    waiting = {report.text for report in first if report.outcome is not Outcome.SUBMITTED}
    assert waiting == {"the next tick starts it: this one has started enough", "one of many: this tick looks at others"}
    assert len(sim.job_list) == 5
    ticked(sim, MANY, settings=settings)
    ticked(sim, MANY, settings=settings)
    assert len(sim.job_list) == 12  # ten looks are enough for the last seven
    assert len({job.spec.labels["run"] for job in sim.job_list}) == 12


def test_blocked_experiments_use_up_nobodys_turn() -> None:
    sim = start()
    finding = Finding("HUB001", Place("x"), "no", "mend it", Severity.ERROR)
    blocked = {plan.run_id for plan in MANY[:8]}
    for _ in range(10):  # of more runs than a tick looks at, each has its turn by lot
        ticked(sim, MANY, preflight=lambda plan: (finding,) if plan.run_id in blocked else ())
        sim.advance(60)
    assert {job.spec.labels["run"] for job in sim.job_list} == {plan.run_id for plan in MANY[8:]}


def test_a_tick_asks_little_about_a_backlog() -> None:
    sim = start()
    sim.calls = 0
    reports = ticked(sim, tuple(plan_named(f"exp-{number}") for number in range(60)), dry_run=True)
    assert len(reports) == 60
    assert sim.calls < 2 + 10 * 6


def test_all_files_vanish_and_only_so_many_runs_are_cancelled() -> None:
    sim = start()
    plans = MANY[:5]
    running(sim, *plans)
    reports = ticked(sim, (), settings=Settings(cancels_per_tick=2))
    assert [report.outcome for report in reports] == [Outcome.CANCELLED] * 2 + [Outcome.BLOCKED] * 3
    assert [job.state for job in sim.job_list].count(JobState.RUNNING) == 3
    assert len(sim.repos) == 5  # nothing of anybody's is deleted


def test_the_month_has_a_budget() -> None:
    sim = start()
    at = datetime.fromtimestamp(sim.time, UTC)
    closed = Closed("old-0a1b2c3d", 1, Verdict.DONE, "done", at, 10.0)
    sim.tags["run/old-0a1b2c3d"] = Tag("run/old-0a1b2c3d", COMMIT, finish_message(closed))
    both = Settings(max_usd_per_month=10 + 2 * COACH.worst_usd + 0.01)
    assert outcomes(ticked(sim, (COACH, GUIDE, TUTOR), settings=both)) == {
        "coach": Outcome.SUBMITTED,
        "guide": Outcome.SUBMITTED,
        "tutor": Outcome.BLOCKED,
    }
    reports = ticked(sim, (COACH, GUIDE, TUTOR), settings=both)
    assert "of the month's are left" in reports[2].text
    assert "raise `max_usd_per_month` above" in reports[2].hint
    # What has begun goes on, also when the limit is lowered under it.
    sim.advance(4000)
    lowered = ticked(sim, (COACH, GUIDE), settings=Settings(max_usd_per_month=1))
    assert outcomes(lowered) == {"coach": Outcome.SUBMITTED, "guide": Outcome.SUBMITTED}


def test_a_retry_is_new_money_of_the_month() -> None:
    sim = start()
    sim.faults.broken = 1
    assert run_until_closed(sim) == Verdict.FAILED
    reopen(sim, PLAN.run_id)
    report = ticked(sim, settings=Settings(max_usd_per_month=PLAN.worst_usd / 2))[0]
    assert report.outcome is Outcome.BLOCKED
    assert "of the month's are left" in report.text
    assert len(sim.job_list) == 1


def test_a_run_that_is_replaced_is_booked_with_all_its_jobs() -> None:
    sim = start()
    running(sim, COACH)
    sim.advance(4000)
    ticked(sim, (COACH,))
    assert [job.stage for job in sim.job_list] == ["train", "merge"]
    ticked(sim, (EDITED,))
    closed = book_of(sim).rounds[COACH.run_id][0]
    assert closed.attempts == {"train": 1, "merge": 1}
    assert closed.usd >= 1800 / 3600 * 1.5  # half an hour of training on an a10g-large


# Edits, deletions and files that cannot be read.


def test_an_edited_experiment_replaces_its_old_run() -> None:
    sim = start()
    running(sim, COACH)
    reports = ticked(sim, (EDITED,))
    assert {report.run_id: report.outcome for report in reports} == {
        EDITED.run_id: Outcome.SUBMITTED,
        COACH.run_id: Outcome.SUPERSEDED,
    }
    assert sim.job_list[0].state is JobState.CANCELLED
    assert book_of(sim).rounds[COACH.run_id][0].verdict is Verdict.SUPERSEDED
    assert run_until_closed(sim, plan=EDITED) == Verdict.DONE
    check(sim)


def test_the_old_run_stops_before_the_new_one_starts() -> None:
    """Both write to the same repositories."""
    sim = start()
    running(sim, COACH)
    held = ticked(sim, (EDITED,), settings=Settings(cancels_per_tick=0))
    assert [(report.run_id, report.outcome) for report in held] == [
        (EDITED.run_id, Outcome.BLOCKED),
        (COACH.run_id, Outcome.BLOCKED),
    ]
    assert held[0].text == "jobs of its earlier version still run"
    assert len(sim.job_list) == 1
    before = len(sim.writes)
    ticked(sim, (EDITED,))
    assert sim.writes.index("cancel", before) < sim.writes.index("submit", before)


def test_a_file_that_was_edited_back_stays_closed_until_a_retry() -> None:
    sim = start()
    running(sim, COACH)
    ticked(sim, (EDITED,))
    reports = ticked(sim, (COACH,))
    assert COACH.run_id not in {report.run_id for report in reports}
    reopen(sim, COACH.run_id)
    assert run_until_closed(sim, plan=COACH) == Verdict.DONE
    check(sim)


def test_a_deleted_file_cancels_its_jobs_and_deletes_nothing() -> None:
    sim = start()
    running(sim, COACH, GUIDE)
    repos = {repo: dict(sim.files(repo)) for repo in sim.repos}
    assert outcomes(ticked(sim, (GUIDE,))) == {"coach": Outcome.CANCELLED, "guide": Outcome.WAITING}
    assert sim.job_list[0].state is JobState.CANCELLED
    assert sim.job_list[1].state is JobState.RUNNING
    assert all(repos[repo].keys() <= sim.files(repo).keys() for repo in repos)
    closed = book_of(sim).rounds[COACH.run_id][0]
    assert (closed.verdict, closed.text) == (Verdict.CANCELLED, "the experiment's file is gone")
    assert closed.usd > 0


def test_an_end_reaches_a_job_that_only_its_claim_names() -> None:
    sim = start()
    sim.faults.list_lag_s = 1e9
    running(sim, COACH)
    train = StageName.TRAIN
    ended = end_run(world_of(SimRemote(sim)), COACH.run_id, {(COACH.repo(train), train)}, ())
    assert sim.job_list[0].state is JobState.CANCELLED
    assert ended.views[train].winner == Winner(1, NOBODY)


def test_the_last_file_is_deleted_and_its_job_is_found_all_the_same() -> None:
    sim = start()
    running(sim, COACH)
    assert outcomes(ticked(sim, ())) == {"coach": Outcome.CANCELLED}


def test_a_file_that_cannot_be_read_is_unknown_and_not_deleted() -> None:
    sim = start()
    running(sim, COACH)
    before = len(sim.writes)
    assert ticked(sim, (), broken=frozenset({"coach"})) == []
    assert len(sim.writes) == before
    assert sim.job_list[0].state is JobState.RUNNING


def test_a_run_started_by_hand_ends_nobody_elses() -> None:
    sim = start()
    running(sim, COACH)
    ticked(sim, tree=Tree(COMMIT, (wanted_of(GUIDE),), partial=True))
    assert sim.job_list[0].state is JobState.RUNNING


# Outages and refusals.

OPEN = {"read_book": 1, "jobs": 2, "view": 4, "inspect": 1}  # the reads of a tick whose training job has failed


def failed(sim: SimWorld) -> None:
    """A training that failed, and one that was deleted while it ran: there is something to close and to cancel."""
    sim.faults.broken = 1
    running(sim, COACH, GUIDE)
    sim.job_list[1].starts_at += 100_000
    sim.job_list[1].began_at = sim.time + 100_000
    sim.advance(4000)


@pytest.mark.parametrize(("call", "number"), [(call, n) for call, count in OPEN.items() for n in range(count)])
def test_a_question_without_answer_ends_the_tick_before_anything_is_done(call: str, number: int) -> None:
    sim = start()
    failed(sim)
    sim.faults.list_lag_s = 1e9 if call == "inspect" else 0  # what no listing shows is asked for by its id
    before = len(sim.writes)
    asked = [*[None] * number, *[DOWN] * 3]
    with pytest.raises(HubError):
        with_troubles(sim, (COACH, TUTOR), **{call: asked})
    assert len(sim.writes) == before


def test_a_log_without_answer_ends_the_tick_and_one_that_is_gone_does_not() -> None:
    sim = start()
    failed(sim)
    before = len(sim.writes)
    with pytest.raises(HubError):
        with_troubles(sim, (COACH, TUTOR), log=[DOWN] * 3)
    assert len(sim.writes) == before
    gone = HubError(Access.MISSING, "404 no such log")
    reports = with_troubles(sim, (COACH, TUTOR), log=[gone, gone])
    assert reports[0].outcome is Outcome.FAILED
    assert "the log is not to be had" in reports[0].text


def test_a_controller_that_stands_still_while_it_looks_gives_nothing_up() -> None:
    """It reads that there is no artifact, sleeps an hour, and reads that the job ended an hour ago."""
    sim = start()
    running(sim, COACH)
    sim.faults.list_lag_s = 3600  # no listing shows it live
    remote = SimRemote(sim)
    views: list[str] = []

    def stand_still(name: str) -> None:
        views.append(name)
        if name == "jobs" and views.count("jobs") == 2:
            sim.advance(4000)

    remote.before = stand_still
    report = tick(world_of(remote))[0]
    assert (report.outcome, report.text) == (Outcome.WAITING, "train has ended, its artifact is not visible yet")
    assert run_until_closed(sim) == Verdict.DONE
    check(sim)


def test_what_ends_a_run_is_looked_at_twice() -> None:
    """The artifact appears between the two looks."""
    sim = start()
    running(sim, COACH)
    sim.advance(4000)
    repo, path = COACH.repo(StageName.TRAIN), f".mergetune/{COACH.run_id}/train/manifest.json"
    manifest = sim.repos[repo][-1].pop(path)
    remote = SimRemote(sim)
    looks: list[str] = []

    def appear(name: str) -> None:
        looks.append(name)
        if name == "view" and looks.count("view") == 5:
            sim.put(repo, {path: manifest})

    remote.before = appear
    assert tick(world_of(remote))[0].outcome is Outcome.SUBMITTED
    assert [job.stage for job in sim.job_list] == ["train", "merge"]


def test_a_book_that_cannot_be_read_ends_the_tick() -> None:
    sim = start()
    remote = SimRemote(sim)
    world = world_of(remote)

    class Unread:
        def read_book(self) -> Any:
            raise UserError("the remote listed 9 tags and sent 8")

    with pytest.raises(UserError):
        tick(replace(world, book=Unread()))
    assert sim.writes == []


@pytest.mark.parametrize("call", ["create_repo", "commit", "submit", "resolve", "push_tag"])
@pytest.mark.parametrize("trouble", [DOWN, FORBIDDEN, HubError(Access.NO_CREDIT, "402"), LOST])
def test_an_experiment_that_fails_stops_no_other(call: str, trouble: HubError) -> None:
    sim = start()
    reports = with_troubles(
        sim,
        (COACH, GUIDE, TUTOR),
        **{call: [trouble] * (3 if call == "resolve" and trouble.access is Access.UNREACHABLE else 1)},
    )
    assert outcomes(reports)["guide"] is Outcome.SUBMITTED
    assert outcomes(reports)["tutor"] is Outcome.SUBMITTED
    assert len(sim.job_list) >= 2


def test_an_end_that_fails_stops_no_other() -> None:
    sim = start()
    running(sim, COACH, GUIDE)
    reports = with_troubles(sim, (TUTOR,), cancel=[FORBIDDEN])
    assert outcomes(reports) == {
        "tutor": Outcome.SUBMITTED,
        "coach": Outcome.BLOCKED,
        "guide": Outcome.CANCELLED,
    }
    assert "its jobs could not be stopped" in reports[1].text
    sim.advance(60)
    assert sim.job_list[0].finished_at is not None  # its fence was shut before: it stopped by itself


def test_a_namespace_that_refuses_blocks_its_own_runs_only() -> None:
    sim = start()
    foreign = Wanted("foreign", "foreign-0a1b2c3d", "aaa", lambda: PLAN)  # asked first
    tree = Tree(COMMIT, (foreign, wanted_of(GUIDE)))
    remote = SimRemote(sim)
    remote.troubles["jobs"] = [FORBIDDEN]
    reports = tick(world_of(remote, tree=tree))
    assert outcomes(reports) == {"foreign": Outcome.BLOCKED, "guide": Outcome.SUBMITTED}
    assert reports[0].text == "the Hub refused: 403 no"


def test_a_repository_that_refuses_blocks_its_own_run_only() -> None:
    sim = start()
    reports = with_troubles(sim, (COACH, GUIDE), view=[FORBIDDEN])
    assert outcomes(reports) == {"coach": Outcome.BLOCKED, "guide": Outcome.SUBMITTED}


def test_an_experiment_that_cannot_be_planned_blocks_itself_only() -> None:
    def no_flavor() -> Plan:
        raise UserError("`train.flavor`: there is no flavor `h1000`", "write `h100`")

    sim = start()
    tree = Tree(COMMIT, (Wanted("odd", "odd-0a1b2c3d", "acme", no_flavor), wanted_of(GUIDE)))
    reports = ticked(sim, tree=tree)
    assert outcomes(reports) == {"odd": Outcome.BLOCKED, "guide": Outcome.SUBMITTED}
    assert (reports[0].text, reports[0].hint) == ("`train.flavor`: there is no flavor `h1000`", "write `h100`")


def test_preflight_findings_block_before_anything_is_created() -> None:
    sim = start()
    finding = Finding("HUB001", Place("x"), "`HF_TOKEN` cannot write", "use another", Severity.ERROR)
    report = ticked(sim, preflight=lambda plan: (finding,))[0]
    assert (report.outcome, report.text, report.hint) == (Outcome.BLOCKED, finding.message, finding.hint)
    assert sim.writes == []


def test_no_credit_is_told_with_what_to_do() -> None:
    sim = start()
    report = with_troubles(sim, (COACH,), submit=[HubError(Access.NO_CREDIT, "402 add credit")])[0]
    assert report.text == "`acme` has no credit for jobs: 402 add credit"
    assert sim.job_list == []


# Trying without doing.


def test_a_dry_run_says_what_it_would_do_and_writes_nothing() -> None:
    sim = start()
    failed(sim)
    before = len(sim.writes)
    reports = ticked(sim, (COACH, TUTOR), dry_run=True)
    assert outcomes(reports) == {"coach": Outcome.FAILED, "tutor": Outcome.SUBMITTED, "guide": Outcome.CANCELLED}
    assert len(sim.writes) == before
    done = start()
    for _ in range(8):
        ticked(done)
        done.advance(2400)
        if len(done.job_list) == 4:
            break
    done.advance(4000)
    before = len(done.writes)
    assert outcomes(ticked(done, dry_run=True)) == {"coach": Outcome.FINISHED}
    assert len(done.writes) == before


# Finished is final.


def damage_repos(sim: SimWorld) -> None:
    sim.repos.clear()


def damage_jobs(sim: SimWorld) -> None:
    sim.job_list.clear()


def damage_both(sim: SimWorld) -> None:
    sim.repos.clear()
    sim.job_list.clear()


@pytest.mark.parametrize("damage", [damage_repos, damage_jobs, damage_both])
@pytest.mark.parametrize("broken", [0.0, 1.0])
def test_what_is_finished_stays_finished(damage: Callable[[SimWorld], None], broken: float) -> None:
    sim = start()
    sim.faults.broken = broken
    assert run_until_closed(sim) == (Verdict.FAILED if broken else Verdict.DONE)
    damage(sim)
    sim.advance(30 * 86400)
    # A fresh controller, and plans that could not even be made any more after an upgrade.
    tree = Tree(COMMIT, tuple(replace(run, plan=old_files(1)[0].plan) for run in (wanted_of(PLAN),)))
    before = len(sim.writes)
    assert ticked(sim, tree=tree) == []
    assert len(sim.writes) == before


def test_other_flavors_and_budgets_are_the_same_finished_run() -> None:
    sim = start()
    run_until_closed(sim)
    assert ticked(sim, (plan_named(max_usd=49),)) == []


def test_a_retry_reopens_one_run_and_counts_on() -> None:
    sim = start()
    sim.faults.broken = 1
    for plan in (COACH, GUIDE):
        assert run_until_closed(sim, plan=plan) == Verdict.FAILED
    sim.faults.broken = 0
    reopen(sim, COACH.run_id)
    assert outcomes(ticked(sim, (COACH, GUIDE))) == {"coach": Outcome.SUBMITTED}
    assert [(job.spec.labels["experiment"], job.attempt) for job in sim.job_list] == [
        ("coach", 1),
        ("guide", 1),
        ("coach", 2),
    ]
    assert run_until_closed(sim, plan=COACH) == Verdict.DONE
    rounds = book_of(sim).rounds
    assert [one.verdict for one in rounds[COACH.run_id]] == [Verdict.FAILED, Verdict.DONE]
    assert len(rounds[GUIDE.run_id]) == 1
    # Each round is booked with its own dollars alone.
    assert all(0 < one.usd < 3 for one in rounds[COACH.run_id])
    check(sim)


def test_a_retry_after_everything_was_deleted_trains_anew_under_a_new_number() -> None:
    sim = start()
    run_until_closed(sim)
    damage_both(sim)
    reopen(sim, PLAN.run_id)
    ticked(sim)
    assert [(job.stage, job.attempt) for job in sim.job_list] == [("train", 2)]


def test_a_finished_run_is_closed_with_its_summary() -> None:
    sim = start()
    run_until_closed(sim)
    closed = book_of(sim).rounds[PLAN.run_id][0]
    assert closed.text == "4 of 4 stages are done"
    assert closed.attempts == {"train": 1, "merge": 1, "gguf": 1, "evaluate": 1}
    assert list(closed.summary["stages"]) == [stage.value for stage in StageName]
    assert closed.usd > 0


def test_a_job_of_a_closed_run_is_stopped() -> None:
    sim = start()
    running(sim, COACH)
    at = datetime.fromtimestamp(sim.time, UTC)
    closed = Closed(COACH.run_id, 1, Verdict.CANCELLED, "by hand", at, 0)
    sim.tags[f"run/{COACH.run_id}"] = Tag(f"run/{COACH.run_id}", COMMIT, finish_message(closed))
    report = ticked(sim, (COACH,))[0]
    assert (report.outcome, report.text) == (Outcome.CANCELLED, "the run is closed")
    assert sim.job_list[0].state is JobState.CANCELLED
    assert len(book_of(sim).rounds[COACH.run_id]) == 1


def test_a_run_without_a_machine_for_a_day_is_stopped_and_closed() -> None:
    sim = start(queue_least_s=1e7)
    ticked(sim)
    sim.advance(86400 + 60)
    report = ticked(sim)[0]
    assert report.text == "train: no machine came in 24 h"
    assert sim.job_list[0].state is JobState.CANCELLED
    assert book_of(sim).rounds[PLAN.run_id][0].verdict is Verdict.FAILED


@pytest.mark.parametrize("kill_at", range(1, 30))
def test_an_end_that_is_killed_anywhere_is_taken_up_again(kill_at: int) -> None:
    sim = start()
    running(sim, COACH)
    one_tick(sim, kill_at=kill_at, plans=(EDITED,))
    for _ in range(3):
        ticked(sim, (EDITED,))
    assert sim.job_list[0].state is JobState.CANCELLED
    assert run_until_closed(sim, plan=EDITED) == Verdict.DONE
    assert {job.spec.labels["run"]: job.attempt for job in sim.trainings()} == {COACH.run_id: 1, EDITED.run_id: 1}
    check(sim)


def test_a_controller_that_is_killed_says_nothing_more() -> None:
    with pytest.raises(Killed):
        tick(world_of(SimRemote(start(), kill_at=1)))
