"""Says on GitHub what a tick found: comments on the merged pull request, a commit status, a summary. Decides no run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.book import Closed, Verdict
from pipeline.comments import RunView, findings_text, run_comment, run_key, status_table
from pipeline.controller import tick
from pipeline.errors import Finding, UserError
from pipeline.github import GitHub
from pipeline.hub_facts import HubError
from pipeline.plan import Plan, StageName
from pipeline.pull_request import Access, GitHubError, PullRequest, StatusState, ours
from pipeline.remote import SeenJob, stage_folder
from pipeline.result_comment import Ending, result_comment, result_id, rivals_of
from pipeline.review import Origin, Origins, make_gate, memory_was_traced, path_of
from pipeline.trace import MEMORY_RULE
from pipeline.world import Outcome, Report, Wanted, World

WATCH = "watch.yml"
RECENT = timedelta(days=2)  # how long a final comment that could not be posted is tried again
# Not what waits for a person's adapter: that may take days, and who hands it in starts the next tick.
IN_FLIGHT = {Outcome.SUBMITTED, Outcome.WAITING, Outcome.BLOCKED}
HEADLINES = {
    Outcome.SUBMITTED: "is under way",
    Outcome.WAITING: "is under way",
    Outcome.YOURS: "waits for you",
    Outcome.BLOCKED: "is blocked",
    Outcome.FINISHED: "is done",
    Outcome.FAILED: "failed",
    Outcome.CANCELLED: "was cancelled",
    Outcome.SUPERSEDED: "was stopped for a newer version",
}
STATES = {
    Outcome.SUBMITTED: StatusState.PENDING,
    Outcome.WAITING: StatusState.PENDING,
    Outcome.YOURS: StatusState.PENDING,
    Outcome.BLOCKED: StatusState.PENDING,
    Outcome.FINISHED: StatusState.SUCCESS,
    Outcome.FAILED: StatusState.FAILURE,
    Outcome.CANCELLED: StatusState.ERROR,
}
PASSING = {Access.UNREACHABLE, Access.LIMITED, Access.INCOMPLETE}


@dataclass
class Desk:
    """Where a tick speaks. `notes` are things that could not be said; `unsaid`: another tick must say them."""

    world: World
    github: GitHub
    origins: Origins
    root: Path
    endpoint: str = "https://huggingface.co"
    notes: list[str] = field(default_factory=list)
    unsaid: bool = False

    def tried(self, about: str, say: Callable[[], object]) -> None:
        """Say something; what fails about one run keeps no other run from being spoken of."""
        try:
            say()
        except GitHubError as error:
            self.unsaid = self.unsaid or error.access in PASSING
            self.notes.append(f"`{about}`: GitHub did not take it ({error.access}): {error.detail}")


def open_desk(world: World, github: GitHub, root: Path, origins: Origins, endpoint: str | None = None) -> Desk:
    """Where the ticks of this checkout speak."""
    desk = Desk(world, github, origins, root)
    return replace(desk, endpoint=endpoint.rstrip("/")) if endpoint else desk


def tick_and_tell(desk: Desk, approvals: int, summarise: Callable[[str], None]) -> list[Report]:
    """One tick whose first submits wait for a review, and everything it has to say. `watch` goes on while it must.

    Raises:
        HubError, UserError: nothing was done; `watch` is left on, so that another tick follows.
    """
    switch_watch(desk, on=True)
    reports = tick(gated(desk.world, desk.origins, approvals))
    announce(desk, reports)
    summarise(summary_of(reports, desk.notes))
    if not desk.unsaid and not any(report.outcome in IN_FLIGHT for report in reports):
        switch_watch(desk, on=False)
    return reports


def gated(world: World, origins: Origins, approvals: int) -> World:
    """The world in which a plan that nobody reviewed is not launched.

    A tick has no torch to trace memory with: where the reviewed comment says that a trace has shown the training to
    fit, the closed form does not refuse it here.
    """
    gate = make_gate(origins, approvals)

    def preflight(plan: Plan) -> tuple[Finding, ...]:
        try:
            if refused := gate(plan):
                return (refused,)
            found = world.preflight(plan)
            if any(one.rule == MEMORY_RULE for one in found) and memory_was_traced(origins, plan):
                found = tuple(one for one in found if one.rule != MEMORY_RULE)
        except GitHubError as error:
            message = f"whether it was reviewed is not known: {error.detail}"
            raise UserError(message, "the next tick asks again") from error
        return found

    return replace(world, preflight=preflight)


def switch_watch(desk: Desk, *, on: bool) -> None:
    """Let the schedule of `watch` run, or stop it; a repository may have no such workflow."""
    change = desk.github.enable if on else desk.github.disable
    desk.tried(WATCH, partial(change, WATCH))


def announce(desk: Desk, reports: Sequence[Report]) -> None:
    """Comments and statuses for every report, and the final comment of every run that ended lately."""
    runs = {run.run_id: run for run in desk.world.tree.wanted}
    for report in reports:
        if report.outcome is not Outcome.ADOPTED:
            desk.tried(report.experiment, partial(_tell, desk, report, runs.get(report.run_id)))
    hints = {report.run_id: report.hint for report in reports}
    since = datetime.fromtimestamp(desk.world.clock.now(), UTC) - RECENT
    ended = desk.world.book.read_book().closed  # again: the tick has closed some
    for closed in ended:
        if closed.at >= since and closed.verdict is not Verdict.ADOPTED:
            run, hint = runs.get(closed.run_id), hints.get(closed.run_id, "")
            desk.tried(closed.run_id, partial(_tell_end, desk, closed, run, hint, ended))


def summary_of(reports: Sequence[Report], notes: Sequence[str]) -> str:
    """A tick on its workflow run's own page."""
    rows = [(report.run_id, report.outcome.value, _words(report)) for report in reports]
    told = status_table(rows) if rows else "Nothing to do: every experiment is closed."
    return f"{told}\n\n{findings_text(notes)}" if notes else told


def _tell(desk: Desk, report: Report, run: Wanted | None) -> None:
    """The comment that follows the run, and the commit status."""
    plan = _plan(run)
    origin = _origin(desk, plan, report.experiment)
    job, *others = (_job(desk, run, job_id) for job_id in (report.job, *report.more_jobs))
    url = job.url if job else ""
    # An ended older version speaks only in its final comment: the comment that is followed is the new version's.
    if origin.pull and report.outcome is not Outcome.SUPERSEDED:
        nodes = tuple(other.url for other in others if other)
        view = replace(_view(report, plan, job), node_urls=nodes)
        desk.github.sticky_comment(origin.pull.number, run_key(report.experiment), run_comment(view))
    state = STATES.get(report.outcome)
    commit = origin.pull.merge_sha if origin.pull else origin.commit
    if commit and state and run is not None:
        desk.github.set_status(commit, report.experiment, state, _words(report), url)


def _view(report: Report, plan: Plan | None, job: SeenJob | None) -> RunView:
    stage = report.stage or (job.stage if job else None)
    stages = tuple(s.name for s in plan.stages) if plan else ()
    return RunView(
        name=report.experiment,
        run_id=report.run_id,
        headline=HEADLINES[report.outcome],
        stages=tuple((name, _mark(name, stages, stage, report.outcome)) for name in stages),
        text=report.text,
        hint=report.hint,
        job_url=job.url if job else "",
        live=report.outcome in IN_FLIGHT or report.outcome is Outcome.YOURS,
        job=report.live,
        usd=report.usd,
        most_usd=next((s.cost.worst_usd for s in plan.stages if s.name is stage), None) if plan else None,
        learning_rate=plan.experiment.train.learning_rate if plan else None,
    )


def _mark(name: StageName, stages: Sequence[StageName], current: StageName | None, outcome: Outcome) -> str:
    if outcome is Outcome.FINISHED:
        return "done"
    if current not in stages or stages.index(name) > stages.index(current):
        return "next"
    if name is not current:
        return "done"
    if outcome in (Outcome.FAILED, Outcome.CANCELLED):
        return "failed"
    return "next" if outcome in (Outcome.BLOCKED, Outcome.YOURS) else "now"


def _tell_end(desk: Desk, closed: Closed, run: Wanted | None, hint: str, ended: Sequence[Closed]) -> None:
    """The final comment, once, where a pull request brought what ended."""
    plan = _plan(run)
    name = str(closed.summary.get("experiment") or (run.name if run else closed.run_id.rpartition("-")[0]))
    pull = _origin(desk, plan, name).pull
    # A pull request that was merged after the end has nothing to do with it.
    if pull is None or not pull.merged_at or datetime.fromisoformat(pull.merged_at) > closed.at + timedelta(seconds=1):
        return
    key = result_id(closed)
    if ours(desk.github.comments(pull.number), f"result:{key}", desk.github.login):
        return
    people = _people(desk.github, pull)
    rivals = rivals_of(closed, ended)
    ending = Ending(name, closed, people, hint, desk.endpoint, _manifests(desk, plan), rivals)
    desk.github.final_comment(pull.number, key, result_comment(ending))


def _people(github: GitHub, pull: PullRequest) -> tuple[str, ...]:
    """Who is told: the author, who approved, who merged."""
    return tuple(login for login in (pull.author, *github.approvals(pull), pull.merged_by) if login)


def _manifests(desk: Desk, plan: Plan | None) -> dict[StageName, Mapping[str, Any]]:
    """The manifests of a run's stages; where one cannot be read, the comment has only the numbers of the tag."""
    found: dict[StageName, Mapping[str, Any]] = {}
    if plan is None:
        return found
    for stage in plan.stages:
        try:
            view = desk.world.remote.view(plan.repo(stage.name), stage_folder(plan.run_id, stage.name))
        except HubError:
            continue
        if view.manifest and view.manifest.get("run_id") == plan.run_id:
            found[stage.name] = view.manifest
    return found


def _plan(run: Wanted | None) -> Plan | None:
    try:
        return run.plan() if run else None
    except UserError:
        return None


def _origin(desk: Desk, plan: Plan | None, name: str) -> Origin:
    return desk.origins.of_plan(plan) if plan else desk.origins.of((path_of(name),))


def _job(desk: Desk, run: Wanted | None, job_id: str) -> SeenJob | None:
    if run is None or not job_id:
        return None
    try:
        return desk.world.remote.inspect(run.namespace, job_id)
    except HubError:
        return None


def _words(report: Report) -> str:
    prefix = "blocked: " if report.outcome is Outcome.BLOCKED else ""
    return f"{prefix}{report.text}"
