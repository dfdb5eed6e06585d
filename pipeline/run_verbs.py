"""What a person asks about one run: where it stands, its newest job, cancel, retry. The tick does the rest."""

import difflib
from dataclasses import replace
from datetime import UTC, datetime

from pipeline.book import Book, Verdict, retry_message
from pipeline.closing import close_run, end_run, look_closely
from pipeline.controller import tick
from pipeline.errors import UserError
from pipeline.hub_facts import HubError
from pipeline.remote import SeenJob
from pipeline.world import Outcome, Report, Wanted, World

OUTCOMES = {
    Verdict.DONE: Outcome.FINISHED,
    Verdict.FAILED: Outcome.FAILED,
    Verdict.CANCELLED: Outcome.CANCELLED,
    Verdict.SUPERSEDED: Outcome.SUPERSEDED,
    Verdict.ADOPTED: Outcome.ADOPTED,
}


def show_status(world: World, name: str | None) -> list[Report]:
    """One line a run: how the closed ones ended, and what the next tick would do about the others.

    Raises:
        UserError: no experiment of that name.
        HubError: something could not be read.
    """
    book = world.book.read_book()
    chosen = [find_run(world, name)] if name else list(world.tree.wanted)
    closed = [ended_report(book, run) for run in chosen if book.rounds.get(run.run_id) and not book.is_open(run.run_id)]
    names = {run.run_id for run in chosen}
    narrow = replace(world, tree=replace(world.tree, wanted=tuple(chosen), partial=name is not None))
    over = {report.run_id for report in closed}
    live = [report for report in tick(narrow, dry_run=True, book=book) if name is None or report.run_id in names]
    live = [report for report in live if report.run_id not in over]
    return closed + [_with_load(world, report, chosen[0]) if name else report for report in live]


def _with_load(world: World, report: Report, run: Wanted) -> Report:
    """The report of one run, with what its machine does; asked of one run only, because it takes a second a job."""
    try:
        load = world.remote.load(run.namespace, report.job) if report.job else None
    except HubError:
        load = None  # a job that waits for its machine has nothing to tell, and nothing is decided from this
    return replace(report, text=f"{report.text} ({load})") if load else report


def newest_job(world: World, name: str) -> SeenJob:
    """The job of a run that runs, or that ran last; of several nodes the first one's, which tells most.

    Raises:
        UserError: there is no such run, or it has no job yet.
    """
    run = find_run(world, name)
    jobs = world.remote.jobs(run.namespace, {"repo": world.label, "run": run.run_id}, live=False)
    if not jobs:
        raise UserError(f"`{run.run_id}` has no job yet", "see what it waits for: `mergetune status`")
    newest = max(jobs, key=lambda job: (job.is_live, job.created_at))
    nodes = [
        job for job in jobs if (job.stage, job.attempt, job.is_live) == (newest.stage, newest.attempt, newest.is_live)
    ]
    return max(nodes, key=lambda job: (-job.node, job.created_at))


def cancel_run(world: World, name: str) -> str:
    """Stop every job of a run and close it; says what was done.

    Raises:
        UserError: there is no such run, or it is closed.
        HubError: a job did not end; run it again.
    """
    run, book = find_run(world, name), world.book.read_book()
    if not book.is_open(run.run_id):
        raise UserError(f"`{run.run_id}` is closed: {book.rounds[run.run_id][-1].text}", "there is nothing to cancel")
    plan = run.plan()
    seen = look_closely(world.remote, plan, world.label)
    begun = {(plan.repo(stage), stage) for stage, view in seen.views.items() if view.attempt}
    live = tuple(job for job in seen.jobs if job.is_live)
    end_run(world, run.run_id, begun, live)
    seen = look_closely(world.remote, plan, world.label)
    close_run(world, book, plan, seen, Verdict.CANCELLED, "cancelled by a person")
    stopped = f"{len(live)} job{'' if len(live) == 1 else 's'} stopped"
    return f"{run.run_id}: cancelled, {stopped}; `mergetune retry {run.name}` starts it again"


def retry_run(world: World, name: str, by: str | None) -> str:
    """Reopen a closed run; says what happens next.

    Raises:
        UserError: there is no such run, or it is open.
    """
    run, book = find_run(world, name), world.book.read_book()
    tag = book.next_retry(run.run_id)
    at = datetime.fromtimestamp(world.clock.now(), UTC)
    world.book.push_tag(tag, world.tree.commit, retry_message(tag, by or "a person", at))
    return f"{run.run_id}: open again; the next tick goes on with it (now: `mergetune reconcile`)"


def find_run(world: World, name: str) -> Wanted:
    """The run of an experiment's name or of a run id.

    Raises:
        UserError: there is none; the nearest is named.
    """
    for run in world.tree.wanted:
        if name in (run.name, run.run_id):
            return run
    if name in world.tree.broken:
        raise UserError(f"experiment `{name}` cannot be read", f"`mergetune check experiments/{name}.yaml`")
    near = difflib.get_close_matches(name, [run.name for run in world.tree.wanted], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "see them all: `mergetune status`"
    raise UserError(f"no experiment of this branch is called `{name}`", hint)


def ended_report(book: Book, run: Wanted) -> Report:
    """How a closed run ended."""
    last = book.rounds[run.run_id][-1]
    return Report(run.name, run.run_id, OUTCOMES[last.verdict], last.text)
