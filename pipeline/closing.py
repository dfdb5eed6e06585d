"""End a run: stop its jobs, write its finish tag. What is closed here is never launched again by itself."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pipeline.actions import Seen
from pipeline.book import Book, Closed, Verdict, finish_message
from pipeline.hub_facts import Access, HubError
from pipeline.loss_chart import read_curve, thinned
from pipeline.plan import Plan, StageName
from pipeline.reconcile import spent_usd
from pipeline.remote import JobState, Remote, SeenJob, StageView, stage_folder
from pipeline.stopping import cancel_jobs, close_fence
from pipeline.sweep_sections import winner_words
from pipeline.world import World


def close_run(
    world: World, book: Book, plan: Plan, seen: Seen, verdict: Verdict, text: str, **more: str | list[str]
) -> None:
    """Push the finish tag of a run: from here on it is final. `more` is kept in its summary, unless it is empty."""
    kept = {key: value for key, value in more.items() if value}
    tag_run(world, book, plan.run_id, verdict, text, seen, make_summary(plan, seen) | kept)


def tag_run(
    world: World, book: Book, run_id: str, verdict: Verdict, text: str, seen: Seen, summary: Mapping[str, Any]
) -> None:
    """Push a finish tag with what the jobs of this round cost. Somebody may have been first, with the same end."""
    name, message = finish_tag(world, book, run_id, verdict, text, seen, summary)
    world.book.push_tag(name, world.tree.commit, message)


def finish_tag(
    world: World, book: Book, run_id: str, verdict: Verdict, text: str, seen: Seen, summary: Mapping[str, Any]
) -> tuple[str, str]:
    """The name and message of the tag that closes this round of a run."""
    number = len(book.rounds.get(run_id, ())) + 1
    attempts: dict[str, int] = {}
    for job in seen.jobs:
        attempts[job.stage] = max(job.attempt, attempts.get(job.stage, 0))
    for stage, view in seen.views.items():
        attempts[stage] = max(view.attempt, attempts.get(stage, 0))
    before = sum(one.usd for one in book.rounds.get(run_id, ()))
    usd = max(0.0, round(spent_usd(seen.jobs) - before, 4))
    at = datetime.fromtimestamp(world.clock.now(), UTC)
    attempts = {stage: number for stage, number in attempts.items() if number}
    closed = Closed(run_id, number, verdict, text, at, usd, attempts, summary)
    return book.next_tag(run_id), finish_message(closed)


def make_summary(plan: Plan, seen: Seen) -> dict[str, Any]:
    """What the board and a later comparison want to know of a run, the most important first."""
    experiment, train = plan.experiment, seen.views.get(StageName.TRAIN, StageView()).manifest or {}
    views = {stage.name: seen.views.get(stage.name, StageView()) for stage in plan.stages}
    origin = next((p for view in views.values() if isinstance(p := (view.request or {}).get("provenance"), dict)), {})
    curve = {
        "loss": thinned(read_curve(train.get("history")), 40),
        "eval_loss": thinned(read_curve(train.get("eval_history"), "eval_loss"), 20),
    }
    return {
        "experiment": experiment.name,
        "stages": {name.value: _kept(plan, name, view) for name, view in views.items() if view.manifest},
        "base": experiment.base.model,
        "dataset": experiment.data.dataset,
        "flavor": experiment.train.flavor,
        "method": experiment.train.method.value,
        "loss_on": experiment.train.loss_on.value,
        "expected_usd": plan.expected_usd,
        "worst_usd": plan.worst_usd,
        **({"winner": winner_words(train)} if experiment.sweep and train else {}),
        "hypothesis": experiment.hypothesis,
        "commit": origin.get("commit"),
        "pull_request": origin.get("pull_request"),
        "curve": {name: points for name, points in curve.items() if points},
    }


def _kept(plan: Plan, stage: StageName, view: StageView) -> dict[str, Any]:
    """What a finish tag keeps of a manifest: no file lists and no details of checks."""
    manifest = view.manifest or {}
    metrics = dict(manifest.get("metrics") or {})
    if isinstance(quants := metrics.get("quants"), list):
        kept = ("quant", "file", "bytes", "bits_per_weight", "kl_vs_bf16")
        short = [{key: quant[key] for key in kept if key in quant} for quant in quants if isinstance(quant, dict)]
        metrics = {"quants": short}
    return {
        "repo": plan.repo(stage),
        "revision": view.head,
        "attempt": manifest.get("attempt"),
        "duration_s": manifest.get("duration_s"),
        "predicted": manifest.get("predicted", {}),
        "measured": manifest.get("measured", {}),
        "metrics": metrics,
    }


def end_run(world: World, run_id: str, stages: set[tuple[str, StageName]], live: tuple[SeenJob, ...]) -> Seen:
    """Shut the fences, then cancel every job of a run, also one submitted a moment before; returns how they ended.

    Raises:
        HubError: a fence could not be shut, or a job did not end.
    """
    known = {job.id for job in live}
    views: dict[StageName, StageView] = {}
    namespaces = {repo.split("/")[0] for repo, _ in stages}
    for repo, stage in sorted(stages):
        views[stage] = view = close_fence(world.remote, repo, stage_folder(run_id, stage))
        known |= view.job_ids
    labels = {"repo": world.label, "run": run_id}
    jobs = {job.id: job for job in live}
    for namespace in sorted(namespaces):
        cancel_jobs(world.remote, world.clock, namespace, labels, known)
        jobs |= {job.id: job for job in world.remote.jobs(namespace, labels, live=False)}
    return Seen(views, tuple(jobs.values()))


def shut_late_jobs_out(remote: Remote, plan: Plan, stage: StageName, seen: Seen) -> None:
    """After a run was given up: a job that nobody could find must not begin its work in a closed run."""
    view = seen.views.get(stage, StageView())
    several = any(one.name is stage and one.parallel.nodes > 1 for one in plan.stages)  # one may have passed alone
    if view.attempt and (several or view.winner is None or view.winner.attempt < view.attempt):
        with suppress(HubError):  # where it stays open, a tick cancels the job when it sees it
            close_fence(remote, plan.repo(stage), stage_folder(plan.run_id, stage), view.attempt)


def look_closely(remote: Remote, plan: Plan, label: str) -> Seen:
    """Every stage's repository and every job of the run, also those that only a claim or a fence names."""
    namespace = plan.experiment.output.repo.split("/")[0]
    views = {s.name: remote.view(plan.repo(s.name), stage_folder(plan.run_id, s.name)) for s in plan.stages}
    jobs = {job.id: job for job in remote.jobs(namespace, {"repo": label, "run": plan.run_id}, live=False)}
    for view in views.values():
        for job_id in view.job_ids - jobs.keys():
            if job := remote.inspect(namespace, job_id):
                jobs[job.id] = job
    live = [job for job in jobs.values() if job.is_live]
    if live:
        return Seen(views, tuple(jobs.values()), remote.logs(namespace, [job.id for job in live]))
    failed = [job for job in jobs.values() if job.state is JobState.FAILED]
    last = max(failed, key=lambda job: (job.attempt, job.created_at), default=None)
    told = [job for job in failed if last and (job.stage, job.attempt) == (last.stage, last.attempt)]
    # Of an attempt on several nodes each has failed in its own way; otherwise a second job left at the fence.
    told = told if any(job.node for job in told) else [last] if last else []
    return Seen(views, tuple(jobs.values()), {job.id: _log(remote, namespace, job.id) for job in told})


def _log(remote: Remote, namespace: str, job_id: str) -> str:
    """A job's log. One that the server does not keep any more says nothing, and so nothing is tried again."""
    try:
        return remote.log(namespace, job_id, whole=True)
    except HubError as error:
        if error.access is Access.UNREACHABLE:
            raise
        return f"the log is not to be had: {error.detail}"
