"""One tick: read the whole world, decide about every run, then act. Keeps no state.

A question that nobody answers ends the tick before anything is done. A refusal is an answer: it blocks the run it is
about, as a file does whose plan cannot be made, and no other run.

Truth, in this order: finish tags, artifacts with manifests, claims, jobs by label. A tick may die anywhere: the next
one finds what was done and goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.actions import Ask, Finish, GiveUp, Seen, StopNodes, Submit, Wait
from pipeline.book import SINCE, Book, Verdict, since_message
from pipeline.closing import close_run, end_run, finish_tag, look_closely, shut_late_jobs_out, tag_run
from pipeline.errors import UserError
from pipeline.gather import chosen_runs, live_jobs, live_logs
from pipeline.hub_facts import Access, HubError
from pipeline.launch import Elsewhere, Submitted, Unanswered, submit_stage
from pipeline.nodes import is_whole
from pipeline.plan import Plan
from pipeline.reconcile import decide, so_far_usd
from pipeline.remote import SeenJob, stage_folder
from pipeline.stopping import end_attempt
from pipeline.world import Outcome, Report, Wanted, World


@dataclass(frozen=True)
class _Look:
    """A run and what was seen of it. `at` is when the look began: what was seen is never older than that."""

    wanted: Wanted
    plan: Plan
    seen: Seen
    at: float


def tick(world: World, *, dry_run: bool = False, book: Book | None = None) -> list[Report]:
    """Take the next action about every run; `book` is what the tags say, where it was read just now.

    Raises:
        HubError: a question had no answer; nothing was done.
        UserError: the tags could not be read; nothing was done.
    """
    book = book or world.book.read_book()
    if book.since is None:
        return _adopt(world, book, dry_run)
    open_runs = [run for run in world.tree.wanted if book.is_open(run.run_id)]
    live, refused = live_jobs(world)
    chosen = chosen_runs(world, open_runs, live)
    logs = live_logs(world, open_runs, live)
    looks = [
        _look(world, run, Seen(jobs=live.get(run.run_id, ()), logs=logs), refused.get(run.namespace))
        if run.run_id in chosen
        else _later(run)
        for run in open_runs
    ]
    # First what must stop: an edited experiment's two versions write to the same repositories.
    ended = [] if world.tree.partial else _end_unwanted(world, book, live, dry_run)
    allowance = _Allowance(world, book, [look for look in looks if isinstance(look, _Look)], ended)
    reports = [look if isinstance(look, Report) else _act(world, book, look, allowance, dry_run) for look in looks]
    return reports + ended


def _later(run: Wanted) -> Report:
    return Report(run.name, run.run_id, Outcome.WAITING, "one of many: this tick looks at others")


def _look(world: World, run: Wanted, live: Seen, refused: HubError | None) -> _Look | Report:
    """What there is to know of an open run, or why it is not known.

    A live job says enough, and so do all nodes of an attempt that are live: nothing else is asked.
    """
    try:
        if refused:
            raise refused
        plan, at = run.plan(), world.clock.now()
        nodes = next((s.parallel.nodes for s in plan.stages if live.jobs and s.name is live.jobs[0].stage), 1)
        is_enough = live.jobs and (nodes == 1 or is_whole(live.jobs, nodes))
        return _Look(run, plan, live if is_enough else look_closely(world.remote, plan, world.label), at)
    except UserError as error:
        return Report(run.name, run.run_id, Outcome.BLOCKED, error.message, error.hint)
    except HubError as error:
        if error.access is Access.UNREACHABLE:
            raise
        return Report(run.name, run.run_id, Outcome.BLOCKED, *_explain(error, run))


class _Allowance:
    """What this tick may still submit and cancel."""

    def __init__(self, world: World, book: Book, looks: list[_Look], ended: list[Report]) -> None:
        self.submits = world.settings.submits_per_tick
        self.book = book
        self.held = {report.experiment for report in ended if report.outcome is Outcome.BLOCKED}
        self.usd = None
        self.cap = world.settings.max_usd_per_month
        if self.cap is not None:
            today = datetime.fromtimestamp(world.clock.now(), UTC)
            under_way = sum(look.plan.worst_usd for look in looks if self._has_begun(look))
            self.usd = self.cap - book.usd_in_month(today.year, today.month) - under_way

    def refusal(self, look: _Look) -> tuple[str, str] | None:
        """Why a job may not start now."""
        if look.wanted.name in self.held:
            return "jobs of its earlier version still run", "the next tick stops them first"
        if self.submits <= 0:
            return "the next tick starts it: this one has started enough", "raise `submits_per_tick` for more"
        if self.usd is not None and not self._has_begun(look) and look.plan.worst_usd > self.usd:
            text = f"it could cost ${look.plan.worst_usd:.2f} and ${max(self.usd, 0):.2f} of the month's are left"
            return text, f"raise `max_usd_per_month` above {self.cap:g}, or wait for the next month"
        return None

    def take(self, look: _Look) -> None:
        """Count a submit. Only what is really tried counts: a blocked experiment must not use up others' turns."""
        self.submits -= 1
        if self.usd is not None and not self._has_begun(look):
            self.usd -= look.plan.worst_usd

    def _has_begun(self, look: _Look) -> bool:
        """Whether this round of the run has left a trace; a retry is a new round, and new money."""
        closed = self.book.closed_attempts(look.wanted.run_id)
        traces = [(stage, view.attempt) for stage, view in look.seen.views.items()]
        traces += [(job.stage, job.attempt) for job in look.seen.jobs]
        return any(attempt > closed.get(stage, 0) for stage, attempt in traces)


def _act(world: World, book: Book, look: _Look, allowance: _Allowance, dry_run: bool) -> Report:
    """Carry out what `decide` says about one run; what goes wrong with it stops no other run."""
    try:
        return _carry_out(world, book, look, allowance, dry_run)
    except HubError as error:
        return _report(look, Outcome.BLOCKED, *_explain(error, look.wanted))
    except UserError as error:
        return _report(look, Outcome.BLOCKED, error.message, error.hint)


def _carry_out(world: World, book: Book, look: _Look, allowance: _Allowance, dry_run: bool) -> Report:
    plan, closed = look.plan, book.closed_attempts(look.wanted.run_id)
    action = decide(plan, look.seen, look.at, world.limits, closed)
    if isinstance(action, GiveUp) and not dry_run:
        # What ends a run is looked at twice: this process may have stood still since the first time.
        at = world.clock.now()
        look = replace(look, seen=look_closely(world.remote, plan, world.label), at=at)
        action = decide(plan, look.seen, at, world.limits, closed)
    seen = look.seen
    match action:
        case Wait(why):
            jobs = sorted((job for job in seen.jobs if job.is_live), key=lambda job: job.node)
            if not jobs:
                return _report(look, Outcome.WAITING, why)
            job, more = jobs[0], tuple(job.id for job in jobs[1:])  # the first node tells most
            told: dict[str, Any] = {"live": seen.live(job), "usd": so_far_usd(seen, look.at), "more_jobs": more}
            return _report(look, Outcome.WAITING, why, stage=job.stage, job=job.id, **told)
        case StopNodes(stage, attempt, jobs, why):
            if not dry_run:
                repo, folder = plan.repo(stage), stage_folder(plan.run_id, stage)
                end_attempt(world.remote, repo, folder, attempt, jobs, why)
            return _report(look, Outcome.WAITING, f"{stage}: {why}: the other nodes are stopped", stage=stage)
        case Ask(stage, why, hint):
            return _report(look, Outcome.YOURS, f"{stage} {why}", hint, stage=stage)
        case Submit():
            return _submit(world, look, action, allowance, dry_run)
        case GiveUp(stage, why, hint, cancelled, lines):
            outcome = Outcome.CANCELLED if cancelled else Outcome.FAILED
            text = f"{stage}: {why}"
            if not dry_run:
                verdict = Verdict.CANCELLED if cancelled else Verdict.FAILED
                seen = _stop(world, plan, seen)
                close_run(world, book, plan, seen, verdict, text, hint=hint, lines=list(lines))
                shut_late_jobs_out(world.remote, plan, stage, seen)
            return _report(look, outcome, text, hint, stage=stage)
        case Finish():
            text = f"{len(plan.stages)} of {len(plan.stages)} stages are done"
            if not dry_run:
                close_run(world, book, plan, seen, Verdict.DONE, text)
            return _report(look, Outcome.FINISHED, text)


def _submit(world: World, look: _Look, action: Submit, allowance: _Allowance, dry_run: bool) -> Report:
    stage = action.stage.name
    if refusal := allowance.refusal(look):
        return _report(look, Outcome.BLOCKED, refusal[0], refusal[1], stage=stage)
    what = f"{stage}, attempt {action.attempt} on {action.stage.flavor.name}: {action.why}"
    if action.stage.name is look.plan.first_job and (errors := world.preflight(look.plan)):
        return _report(look, Outcome.BLOCKED, errors[0].message, errors[0].hint, stage=stage)
    allowance.take(look)
    if dry_run:
        return _report(look, Outcome.SUBMITTED, f"would submit {what}", stage=stage)
    order = world.order(look.plan, action, look.seen, action.attempt)
    match submit_stage(world.remote, world.clock, order, world.limits):
        case Submitted(job_id):
            return _report(look, Outcome.SUBMITTED, what, stage=stage, job=job_id)
        case Elsewhere(why):
            return _report(look, Outcome.WAITING, why, stage=stage)
        case Unanswered(why):
            return _report(look, Outcome.WAITING, why, "the next tick looks again", stage=stage)


def _explain(error: HubError, run: Wanted) -> tuple[str, str]:
    """A refusal of the Hub in the caller's own names."""
    namespace = run.namespace
    match error.access:
        case Access.NO_CREDIT:
            return f"`{namespace}` has no credit for jobs: {error.detail}", "add credit; the next tick tries again"
        case Access.UNREACHABLE:
            return f"the Hub did not answer: {error.detail}", "the next tick tries again"
        case _:
            hint = f"give the token `repo.write` and `job.write` on `{namespace}`; see `mergetune check --online`"
            return f"the Hub refused: {error.detail}", hint


def _stop(world: World, plan: Plan, seen: Seen) -> Seen:
    """End whatever of a run still lives, and let no late job pass; returns the jobs as they ended."""
    live = tuple(job for job in seen.jobs if job.is_live)
    if not live:
        return seen
    end_run(world, plan.run_id, {(plan.repo(job.stage), job.stage) for job in live}, live)
    return look_closely(world.remote, plan, world.label)


def _end_unwanted(world: World, book: Book, live: Mapping[str, tuple[SeenJob, ...]], dry_run: bool) -> list[Report]:
    """Cancel live jobs whose run main does not want: its file is gone, was edited, or the run is closed."""
    wanted = {run.run_id for run in world.tree.wanted if book.is_open(run.run_id)}
    unwanted = {run_id: live[run_id] for run_id in sorted(live.keys() - wanted)}
    unwanted = {run_id: jobs for run_id, jobs in unwanted.items() if jobs[0].experiment not in world.tree.broken}
    reports: list[Report] = []
    for run_id, jobs in unwanted.items():
        name = jobs[0].experiment
        if len(reports) >= world.settings.cancels_per_tick:
            hint = "if you meant to stop more than these, the next tick goes on: raise `cancels_per_tick`"
            reports.append(Report(name, run_id, Outcome.BLOCKED, "this tick has cancelled enough", hint))
            continue
        try:
            reports.append(_end(world, book, run_id, jobs, dry_run))
        except (HubError, UserError) as error:
            text = f"its jobs could not be stopped: {getattr(error, 'detail', error)}"
            reports.append(Report(name, run_id, Outcome.BLOCKED, text, "the next tick tries again"))
    return reports


def _end(world: World, book: Book, run_id: str, jobs: tuple[SeenJob, ...], dry_run: bool) -> Report:
    """Stop one unwanted run, and close it with what all its jobs have cost."""
    name, is_open = jobs[0].experiment, book.is_open(run_id)
    superseded = is_open and name in {run.name for run in world.tree.wanted}
    outcome = Outcome.SUPERSEDED if superseded else Outcome.CANCELLED
    text = "the experiment was edited" if superseded else "the experiment's file is gone"
    text = text if is_open else "the run is closed"
    if not dry_run:
        ended = end_run(world, run_id, {(job.repo, job.stage) for job in jobs if job.repo}, jobs)
        if is_open:
            verdict = Verdict.SUPERSEDED if superseded else Verdict.CANCELLED
            tag_run(world, book, run_id, verdict, text, ended, {"experiment": name})
    return Report(name, run_id, outcome, text, stage=jobs[0].stage)


def _adopt(world: World, book: Book, dry_run: bool) -> list[Report]:
    """A first install: what is on main already is recorded and not launched. The marker is written last."""
    now = datetime.fromtimestamp(world.clock.now(), UTC)
    reports: list[Report] = []
    tags: dict[str, str] = {}
    for run in world.tree.wanted:
        if not book.is_open(run.run_id) or book.retries.get(run.run_id, 0):
            continue
        text = "it was here before mergetune was"
        made = finish_tag(world, book, run.run_id, Verdict.ADOPTED, text, Seen(), {"experiment": run.name})
        tags[made[0]] = made[1]
        hint = f"`mergetune retry {run.name}` launches it"
        reports.append(Report(run.name, run.run_id, Outcome.ADOPTED, text, hint))
    if not dry_run:
        world.book.push_tags(world.tree.commit, tags)
        world.book.push_tag(SINCE, world.tree.commit, since_message(now))
    return reports


def _report(look: _Look, outcome: Outcome, text: str, hint: str = "", **more: Any) -> Report:
    return Report(look.wanted.name, look.wanted.run_id, outcome, text, hint, **more)
