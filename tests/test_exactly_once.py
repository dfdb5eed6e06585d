"""Money: whatever fails and whoever dies, one training is paid, and every run ends. The real controller, simulated.

Three thousand lives of a whole repository, each told by its seed:  python benchmarks/exactly_once.py --histories 3000
"""

import contextlib

import pytest
from histories import LIMITS, PLAN, TWO, book_of, check, make_history, one_tick, run_until_closed, start, world_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import LOST, Faults, Interleaved, Killed, SimRemote, SimWorld

from pipeline.book import Verdict
from pipeline.controller import tick
from pipeline.hub_facts import HubError
from pipeline.remote import JobState

pytestmark = pytest.mark.slow


def test_a_merged_experiment_runs_once_through_all_stages() -> None:
    sim = start(0)
    assert run_until_closed(sim) == Verdict.DONE
    assert [job.stage for job in sim.job_list] == ["train", "merge", "gguf", "evaluate"]
    assert all(job.state is JobState.SUCCEEDED for job in sim.job_list)
    assert one_tick(sim) == []  # finished is final
    check(sim)


def test_killed_after_every_call_one_training_is_paid() -> None:
    calls = start(1)
    one_tick(calls)
    # Twice per call: before it reached the world, and after it did.
    for kill_at in range(1, 2 * calls.calls + 1):
        sim = start(1)
        one_tick(sim, kill_at=kill_at)
        assert run_until_closed(sim) == Verdict.DONE, f"killed at {kill_at}"
        assert len(sim.trainings()) == 1, f"killed at {kill_at}"
        check(sim)


def test_killed_after_every_call_two_nodes_train_once() -> None:
    calls = start(1)
    one_tick(calls, plans=(TWO,))
    for kill_at in range(1, 2 * calls.calls + 1):
        sim = start(1)
        one_tick(sim, kill_at=kill_at, plans=(TWO,))
        assert run_until_closed(sim, plan=TWO) == Verdict.DONE, f"killed at {kill_at}"
        assert len(sim.trainings()) == 1, f"killed at {kill_at}"
        check(sim)


@pytest.mark.parametrize("controllers", [2, 8])
def test_controllers_at_once_start_one_job(controllers: int) -> None:
    for seed in range(60):
        sim = start(seed, Faults(list_lag_s=20))
        Interleaved(sim).run([lambda step, sim=sim: one_tick(sim, step)] * controllers)
        assert len(sim.job_list) == 1, f"seed {seed}"
        assert run_until_closed(sim) == Verdict.DONE
        check(sim)


faults = st.builds(
    Faults,
    unreachable=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    lost=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    killed=st.sampled_from([0.0, 0.01, 0.05]),
    list_lag_s=st.sampled_from([0.0, 5.0, 60.0, 200.0]),
    node_lost=st.sampled_from([0.0, 0.2]),
    broken=st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32), faults=faults, controllers=st.sampled_from([1, 1, 2, 4]))
def test_whatever_fails_no_run_is_lost_and_none_is_paid_twice(seed: int, faults: Faults, controllers: int) -> None:
    sim = start(seed, faults)
    if controllers > 1:
        Interleaved(sim).run([lambda step: one_tick(sim, step)] * controllers)
    verdict = run_until_closed(sim)
    assert verdict in (Verdict.DONE, Verdict.FAILED), verdict
    check(sim, f"(seed {seed})")
    if faults.node_lost == 0 and faults.broken == 0:
        assert len(sim.trainings()) <= 1
        if verdict == Verdict.DONE:
            assert len(sim.trainings()) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32), faults=faults, controllers=st.sampled_from([1, 1, 2, 4]))
def test_whatever_fails_two_nodes_are_one_attempt(seed: int, faults: Faults, controllers: int) -> None:
    """One job passes for each node of an attempt, one attempt trains at a time, and every run ends and is told."""
    sim = start(seed, faults)
    if controllers > 1:
        Interleaved(sim).run([lambda step: one_tick(sim, step, plans=(TWO,))] * controllers)
    verdict = run_until_closed(sim, plan=TWO)
    assert verdict in (Verdict.DONE, Verdict.FAILED), verdict
    check(sim, f"(seed {seed})")
    if faults.node_lost == 0 and faults.broken == 0:
        assert len(sim.trainings()) <= 1
        if verdict == Verdict.DONE:
            assert len(sim.trainings()) == 1


@pytest.mark.parametrize("block", range(2))
def test_a_whole_repository_whose_trainings_are_on_two_or_three_nodes(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        history = make_history(seed, nodes=2 + seed % 2)
        history.live()
        history.judge()


@pytest.mark.parametrize("block", range(8))
def test_a_whole_repository_lives_through_edits_deletions_retries_stalls_and_wrong_clocks(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        history = make_history(seed)
        history.live()
        history.judge()


def test_a_seed_tells_its_history_again() -> None:
    first, second = make_history(7), make_history(7)
    first.live()
    second.live()
    assert first.events == second.events
    assert first.sim.writes == second.sim.writes
    assert first.sim.tags == second.sim.tags


def one_tick_of(sim: SimWorld, remote: SimRemote) -> None:
    """A tick of this very controller."""
    with contextlib.suppress(Killed, HubError):
        tick(world_of(remote))


def stopped_between_claim_and_post(sim: SimWorld) -> None:
    """A controller claims and dies."""
    remote = SimRemote(sim)

    def die(name: str) -> None:
        if name == "submit":
            raise Killed

    remote.before = die
    one_tick_of(sim, remote)


@pytest.mark.parametrize("skew_s", [-120, 120])
def test_a_clock_that_is_off_takes_no_claim_before_its_time(skew_s: float) -> None:
    sim = start(3)
    stopped_between_claim_and_post(sim)
    late = SimRemote(sim)
    late.clock.off_s = skew_s
    sim.advance(LIMITS.lease_s / 2 + 1)  # from here on the first one would not post any more
    one_tick_of(sim, late)
    assert sim.job_list == []
    sim.advance(LIMITS.lease_s)
    one_tick_of(sim, late)
    assert len(sim.job_list) == 1
    check(sim)


def test_a_controller_that_stands_still_before_its_post_starts_nothing_that_works_twice() -> None:
    """Its post comes after somebody else took the claim over: two jobs are there, and the fence lets one work."""
    sim = start(4)
    slow = SimRemote(sim)

    def stand_still(name: str) -> None:
        if name == "submit" and not sim.job_list:
            sim.advance(LIMITS.lease_s + 60)
            one_tick(sim)

    slow.before = stand_still
    one_tick_of(sim, slow)
    assert len(sim.job_list) == 2
    assert run_until_closed(sim) == Verdict.DONE
    assert len(sim.trainings()) == 1
    check(sim)


def test_a_job_found_after_its_run_was_given_up_is_shut_out() -> None:
    """Every post loses its answer and the listing shows nothing for hours: told, closed, and nothing works on."""
    sim = start(5, Faults(list_lag_s=20_000), queue_least_s=30_000)
    remote = SimRemote(sim)
    for _ in range(6):
        remote.troubles["submit"] = [LOST] * 3
        one_tick_of(sim, remote)
        sim.advance(1800)
    closed = book_of(sim).rounds[PLAN.run_id][-1]
    assert closed.verdict is Verdict.FAILED
    assert "no job of them can be found" in closed.text
    sim.advance(40_000)
    assert len(sim.job_list) == 3
    assert sim.trainings() == []
