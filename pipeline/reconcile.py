"""What to do next about one run, from what is seen of it. Pure: the same world gives the same action.

The states, from the last artifact that exists with this run's id:

| seen of the next stage                                        | action                                          |
|---------------------------------------------------------------|-------------------------------------------------|
| every end product is there                                    | Finish                                          |
| it is trained on somebody's Mac, and no adapter is there      | Ask: no job is ever submitted for it            |
| a job of the run is queued or running                         | Wait                                            |
| the same, and its log proves that it only wastes money        | GiveUp, if `early_stop` names that proof        |
| no trace in this round                                        | Submit the next attempt                         |
| a claim without a job, younger than its lease                 | Wait: it is in flight elsewhere                 |
| the same, older                                               | Submit the same attempt, until the posts are up |
| a claim that cannot be read                                   | GiveUp                                          |
| a job of this attempt was there and is not known any more     | Submit the next attempt, after the lease        |
| the fence is shut: nobody may pass                            | GiveUp                                          |
| the job succeeded, no artifact, for less than the lag window  | Wait: listings lag                              |
| the same, for longer                                          | GiveUp                                          |
| the job was cancelled, not by a lost machine                  | GiveUp                                          |
| a job has waited for a machine for too long                   | GiveUp                                          |
| the job failed or is gone, a retry may pass, money remains    | Submit the next attempt                         |
| the job failed otherwise                                      | GiveUp with the diagnosis                       |

Where the stage trains on several nodes, an attempt is live while one of them is, and one job means all of theirs:

| seen of an attempt on several nodes                           | action                                          |
|---------------------------------------------------------------|-------------------------------------------------|
| all of them are queued, running or at their end               | as above                                        |
| a node was never started, its claim is younger than its lease | Wait: it is in flight elsewhere                 |
| the same, older                                               | Submit that node, until the posts are up        |
| a person has cancelled one of them                            | GiveUp: the others are stopped with it          |
| one has failed or is gone, others are live                    | StopNodes, unless the first is past training    |
| the controller has said that it ends them, one is live        | StopNodes                                       |
| none is live, one has failed                                  | as a job that failed, of the most telling cause |
| the artifact is there, and a node lives on                    | StopNodes, after the lag window                 |

A round is what lies between two finish tags: `mergetune retry` opens the next one, and the attempts of a closed round
no longer count.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pipeline.actions import Action, Ask, Finish, GiveUp, Limits, Seen, StopNodes, Submit, Wait
from pipeline.cost import billed_usd
from pipeline.curve_notes import find_waste
from pipeline.diagnose import Diagnosis, diagnose, diagnose_message
from pipeline.flavors import FLAVORS
from pipeline.live import Live
from pipeline.nodes import GONE, Group, group_of, has_met, most_telling
from pipeline.plan import Plan, Stage
from pipeline.remedy import remedy
from pipeline.remote import NOBODY, JobState, SeenJob, StageView, Winner

CENT = 0.01


def decide(
    plan: Plan, seen: Seen, now: float, limits: Limits, closed_attempts: Mapping[str, int] | None = None
) -> Action:
    """The next action about an open run that is wanted. `now` is in epoch seconds."""
    pending = plan.pending(seen.done(plan))
    if not pending:
        return Finish()
    if live := [job for job in seen.jobs if job.is_live]:
        return _about_live(plan, seen, live, now, limits)
    if pending[0].flavor.local:
        return _about_adapter(plan, pending[0], seen)
    action = _about_stage(plan, pending[0], seen, now, limits, (closed_attempts or {}).get(pending[0].name, 0))
    return _within_budget(plan, action, pending, seen) if isinstance(action, Submit) else action


def spent_usd(jobs: tuple[SeenJob, ...]) -> float:
    """What these jobs have cost so far: whole minutes begun, at their flavor's price."""
    return sum(billed_usd(job.running_s, FLAVORS[job.flavor]) for job in jobs if job.flavor in FLAVORS)


def so_far_usd(seen: Seen, now: float) -> float | None:
    """What the jobs that run, one for each node, have cost until `now`; None when none runs."""
    costs = [usd for job in seen.jobs if (usd := _job_so_far_usd(job, seen.live(job), now)) is not None]
    return sum(costs) if costs else None


def _job_so_far_usd(job: SeenJob, live: Live | None, now: float) -> float | None:
    """A server may tell a job's seconds only at the end, its log has them."""
    if job.flavor not in FLAVORS or job.state is not JobState.RUNNING:
        return None
    logged_s = now - live.since if live and live.since else 0.0
    return billed_usd(max(job.running_s, logged_s, 0.0), FLAVORS[job.flavor])


def _about_adapter(plan: Plan, stage: Stage, seen: Seen) -> Action:
    """What is trained with MLX comes by `submit-adapter`, however often somebody tries again here."""
    name, view = plan.experiment.name, seen.views.get(stage.name, StageView())
    hint = f"train with `mergetune run experiments/{name}.yaml --backend mlx`, then `mergetune submit-adapter {name} "
    hint += f"runs/{plan.run_id}/{stage.name}/artifact`"
    if view.winner and view.winner.job_id != NOBODY:
        return Ask(stage.name, "an adapter is being handed in, or its upload broke off", f"{hint} goes on with it")
    return Ask(stage.name, "waits for an adapter that is trained with MLX", hint)


def _about_stage(plan: Plan, stage: Stage, seen: Seen, now: float, limits: Limits, closed: int) -> Action:
    view = seen.views.get(stage.name, StageView())
    jobs = [job for job in seen.jobs if job.stage is stage.name]
    attempt = max([view.attempt, *(job.attempt for job in jobs)])
    if attempt <= closed:
        return Submit(stage, closed + 1, "asked for by a retry" if closed else "first attempt")
    if view.winner == Winner(attempt, NOBODY):
        return _cancelled(plan, stage, "it was cancelled")
    job = _job_of(view, [job for job in jobs if job.attempt == attempt])
    if job is not None and stage.parallel.nodes > 1:
        group = group_of(stage, view, jobs, attempt)
        if not group.has_succeeded:
            return _about_ended_nodes(plan, stage, seen, group, attempt - closed, now, limits)
    if job is None:
        return _about_no_job(plan, stage, view, attempt, attempt - closed, now, limits)
    match job.state:
        case JobState.SUCCEEDED:
            return _about_success(stage, job, now, limits)
        case JobState.CANCELLED:
            # Only the server's own words undo a cancel: a job that a person stopped must not be bought again.
            said = diagnose_message(job.message)
            if said is None or not said.transient:
                return _cancelled(plan, stage, said.cause if said else "it was cancelled", said)
            return _about_failure(plan, stage, said, attempt, attempt - closed, limits)
        case _:
            return _about_failure(plan, stage, _diagnosed(plan, stage, seen, job), attempt, attempt - closed, limits)


def _diagnosed(plan: Plan, stage: Stage, seen: Seen, job: SeenJob) -> Diagnosis:
    log = seen.logs.get(job.id, "")
    found = diagnose(log, job.message)
    return replace(found, hint=remedy(found, plan, stage, log))


def _within_budget(plan: Plan, submit: Submit, pending: list[Stage], seen: Seen) -> Action:
    """A submit only while what is spent, and the worst case of all that is still to do, stay within the budget."""
    spent, later = spent_usd(seen.jobs), sum(stage.cost.worst_usd for stage in pending)
    if spent + later <= plan.experiment.budget.max_usd + CENT / 2:
        return submit
    hint = f"raise `budget.max_usd` to {spent + later:.2f}, then `mergetune retry {plan.experiment.name}`"
    why = f"{submit.why}; ${spent:.2f} are spent and what is left to do could cost ${later:.2f}"
    return GiveUp(submit.stage.name, why, hint)


def _cancelled(plan: Plan, stage: Stage, why: str, said: Diagnosis | None = None) -> GiveUp:
    hint = remedy(said, plan, stage) if said else ""
    return GiveUp(stage.name, why, hint or f"`mergetune retry {plan.experiment.name}` starts it again", cancelled=True)


def _about_live(plan: Plan, seen: Seen, jobs: list[SeenJob], now: float, limits: Limits) -> Action:
    for job in jobs:
        if job.state is JobState.QUEUED and now - job.created_at > limits.queue_patience_s:
            hours, hint = limits.queue_patience_s / 3600, f"another flavor than `{job.flavor}` may be free"
            return GiveUp(job.stage, f"no machine came in {hours:.0f} h", hint)
        live = seen.live(job)
        waste = live and find_waste(live, now, limits.idle_s, plan.experiment.train.learning_rate)
        if waste and waste.kind in limits.early_stop:
            return GiveUp(job.stage, f"stopped early: {waste.why}", waste.hint)
    stage = next((stage for stage in plan.stages if stage.name is jobs[0].stage), None)
    several = stage and stage.parallel.nodes > 1 and _about_live_nodes(plan, stage, seen, jobs, now, limits)
    return several or Wait(f"{jobs[0].stage} is {jobs[0].state}")


def _about_live_nodes(
    plan: Plan, stage: Stage, seen: Seen, live: list[SeenJob], now: float, limits: Limits
) -> Action | None:
    """What an attempt needs of which some nodes are live; None when it is on its way."""
    attempt, view = max(job.attempt for job in live), seen.views.get(stage.name, StageView())
    group = group_of(stage, view, seen.jobs, attempt)
    first, stop = group.first, partial(StopNodes, stage.name, attempt, tuple(job.id for job in live))
    if stage.name in seen.done(plan) or group.has_succeeded:
        is_late = first and first.finished_at and now - first.finished_at > limits.lag_s
        return stop("the first node has ended") if is_late else None
    if stopped := group.stopped():
        return _cancelled(plan, stage, *stopped)
    told = seen.live(first) if first and first.is_live else None
    if why := group.why_to_stop(told):
        return stop(why)
    return None if has_met(told) else _about_missing_nodes(plan, stage, group, now, limits)


def _about_missing_nodes(plan: Plan, stage: Stage, group: Group, now: float, limits: Limits) -> Action | None:
    missing, claim = group.missing, group.claim
    if not missing or claim is None:
        return None
    if claim.at - now > limits.lease_s or claim.posts >= limits.posts:
        why = f"no job of node {missing[0] + 1} of {group.nodes} can be found after {claim.posts} submits"
        return GiveUp(stage.name, why, f"look at the jobs page, then `mergetune retry {plan.experiment.name}`")
    if now - claim.at < limits.lease_s:
        return Wait(f"{stage.name} is being submitted elsewhere")
    return Submit(stage, claim.attempt, f"node {missing[0] + 1} was not started", missing)


def _about_ended_nodes(
    plan: Plan, stage: Stage, seen: Seen, group: Group, tried: int, now: float, limits: Limits
) -> Action:
    """An attempt of which no node is live and whose first has not succeeded: of the most telling failure."""
    if stopped := group.stopped():
        return _cancelled(plan, stage, *stopped)
    found = [(job, _diagnosed(plan, stage, seen, job)) for job in group.jobs if job.state is JobState.FAILED]
    told = [(job, diagnose_message(job.message)) for job in group.jobs if job.state is JobState.CANCELLED]
    found += [(job, said) for job, said in told if said]
    why = group.why_ended()
    cause = most_telling(found) or (Diagnosis(why, "", True, "") if why else None)
    if cause is not None:
        return _about_failure(plan, stage, cause, group.jobs[0].attempt, tried, limits)
    return _about_success(stage, max(group.jobs, key=lambda job: job.finished_at or job.created_at), now, limits)


def _job_of(view: StageView, jobs: list[SeenJob]) -> SeenJob | None:
    """The job that counts: the one that passed the fence, else the one the claim names, else the latest."""
    by_id = {job.id: job for job in jobs}
    if view.winner and view.winner.job_id in by_id:
        return by_id[view.winner.job_id]
    if view.claim and view.claim.job_id in by_id:
        return by_id[view.claim.job_id]
    return max(jobs, key=lambda job: job.created_at, default=None)


def _about_no_job(
    plan: Plan, stage: Stage, view: StageView, attempt: int, tried: int, now: float, limits: Limits
) -> Action:
    claim = view.claim
    if claim and claim.at - now > limits.lease_s:  # also one that cannot be read: its lease never ends
        hint = f"look at the jobs page, then `mergetune retry {plan.experiment.name}`"
        return GiveUp(stage.name, "its claim cannot be read, or its time lies far ahead", hint)
    if claim and now - claim.at < limits.lease_s:
        return Wait(f"{stage.name} is being submitted elsewhere")
    if (view.winner and view.winner.attempt == attempt) or (claim and claim.job_id is not None):
        if tried >= limits.attempts:
            return GiveUp(stage.name, f"{GONE} ({tried} attempts)")
        return Submit(stage, attempt + 1, GONE)
    if claim and claim.posts >= limits.posts:
        why = f"{claim.posts} submits were answered with an error and no job of them can be found"
        return GiveUp(stage.name, why, "look at the jobs page before you retry: one of them may have started")
    return Submit(stage, attempt, "an earlier submit came to nothing")


def _about_success(stage: Stage, job: SeenJob, now: float, limits: Limits) -> Action:
    if now - (job.finished_at or job.created_at) < limits.lag_s:
        return Wait(f"{stage.name} has ended, its artifact is not visible yet")
    return GiveUp(stage.name, "the job ended well and left no artifact", f"read its log: {job.url or job.id}")


def _about_failure(plan: Plan, stage: Stage, found: Diagnosis, attempt: int, tried: int, limits: Limits) -> Action:
    why = f"{found.cause}: {found.evidence}" if found.evidence else found.cause
    if not found.transient:
        return GiveUp(stage.name, why, found.hint, lines=found.lines)
    if tried >= limits.attempts:
        return GiveUp(stage.name, f"{why} ({tried} attempts)", f"`mergetune retry {plan.experiment.name}` tries again")
    return Submit(stage, attempt + 1, why)
