"""The verbs about runs on Hugging Face Jobs: reconcile, status, logs, cancel, retry. Parses, calls, prints."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_checks import RunFormat, print_json
from pipeline.errors import UserError

Branch = Annotated[str, typer.Option(help="The branch whose experiments count.")]
Shape = Annotated[RunFormat, typer.Option("--format", help="How to print the result.")]
Name = Annotated[str, typer.Argument(help="Name of an experiment, or a run id.", show_default=False)]
MARKS = {"submitted": "▶", "waiting": "◐", "blocked": "!", "yours": "⌂", "finished": "●", "failed": "✗"}


def reconcile(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look and decide, change nothing.")] = False,
    branch: Branch = "main",
    github: Annotated[
        bool, typer.Option("--github", help="Say on GitHub what was done; launch only what was reviewed.")
    ] = False,
    format: Shape = RunFormat.TEXT,
) -> None:
    """Take the next action about every experiment of main: submit, chain, retry, finish, cancel. One tick.

    \b
    mergetune reconcile --dry-run
    mergetune reconcile

    Needs HF_TOKEN. Exit code: 0 done, 1 a run failed or is blocked, or something could not be read (then nothing was
    done). With --github only the last is 1: the runs speak for themselves on their pull requests.
    """
    from pipeline.controller import tick
    from pipeline.hf_world import open_world
    from pipeline.world import Outcome

    if dry_run and github:
        raise UserError("`--dry-run` says nothing on GitHub", "leave one of the two out", exit_code=2)
    with hub_answers():
        if github:
            from pipeline.cli_github import reconcile_and_tell

            _print_reports(reconcile_and_tell(_root(), branch), format)
            return
        world = open_world(_root(), branch)
        reports = tick(world, dry_run=dry_run)
    for name in sorted(world.tree.broken):
        print(f"note: experiment `{name}` cannot be read, and is left as it is: `mergetune check`", file=sys.stderr)
    _print_reports(reports, format)
    bad = {Outcome.FAILED, Outcome.BLOCKED}
    raise typer.Exit(int(any(report.outcome in bad for report in reports)))


def status(
    name: Annotated[str | None, typer.Argument(help="Name of an experiment.", show_default=False)] = None,
    branch: Branch = "main",
    format: Shape = RunFormat.TEXT,
) -> None:
    """Show where every run stands, and what the next tick would do.

    \b
    mergetune status
    mergetune status coach-v2 --format json
    """
    from pipeline.hf_world import open_world
    from pipeline.run_verbs import show_status

    with hub_answers():
        reports = show_status(open_world(_root(), branch), name)
    _print_reports(reports, format)


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    branch: Branch = "main",
) -> None:
    """Print the log of the newest job of a run.

    \b
    mergetune logs coach-v2 --follow
    """
    from pipeline.hf_world import open_world
    from pipeline.run_verbs import newest_job

    with hub_answers():
        world = open_world(_root(), branch)
        job = newest_job(world, name)
        print(f"{job.stage}, attempt {job.attempt}: {job.state} ({job.url or job.id})", file=sys.stderr)
        namespace = job.repo.split("/")[0]
        if not follow:
            print(world.remote.log(namespace, job.id, whole=True))
            return
        try:
            for line in world.remote.follow(namespace, job.id):
                print(line, flush=True)
        except KeyboardInterrupt:
            print(f"the job goes on; `mergetune cancel {name}` stops it", file=sys.stderr)
            raise typer.Exit(130) from None


def cancel(name: Name, branch: Branch = "main") -> None:
    """Stop every job of a run, also one that was submitted a moment ago, and close the run.

    \b
    mergetune cancel coach-v2
    """
    from pipeline.hf_world import open_world
    from pipeline.run_verbs import cancel_run

    with hub_answers(f"some of it may be done; `mergetune cancel {name}` again ends the rest"):
        print(cancel_run(open_world(_root(), branch), name))


def retry(
    name: Name,
    by: Annotated[str | None, typer.Option(help="Who asks, for the record.", show_default=False)] = None,
    branch: Branch = "main",
) -> None:
    """Reopen a run that is closed: the next tick goes on from its last artifact or checkpoint.

    \b
    mergetune retry coach-v2
    """
    from pipeline.hf_world import open_world
    from pipeline.run_verbs import retry_run

    with hub_answers():
        print(retry_run(open_world(_root(), branch), name, by))


def submit_adapter(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="The adapter: a run's train/artifact.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    branch: Branch = "main",
) -> None:
    """Hand an adapter that was trained with MLX to the chain: merge, gguf and evaluate go on as jobs.

    \b
    mergetune submit-adapter coach-v2 runs/coach-v2-1a2b3c4d/train/artifact

    Needs HF_TOKEN. The folder's manifest must be of the very run that main wants; who is interrupted runs it again.
    """
    from pipeline.handover import hand_in, offer_adapter
    from pipeline.hf_world import open_account, open_world
    from pipeline.this_machine import describe_machine

    with hub_answers("run it again: what is there is not sent twice"):
        world = open_world(_root(), branch)
        offer = offer_adapter(world, name, folder)
        next_tick = "the next tick goes on: `gh workflow run launch.yml`, or here `mergetune reconcile`"
        if offer.done:
            print(f"{offer.plan.run_id}: this adapter is in `{offer.repo}` already; {next_tick}")
            return
        account = open_account(world.clock)[0].token_facts().user or "unknown"
        worst = f"the jobs after it cost at most ${offer.plan.worst_usd:.2f}"
        print(f"{offer.adapter.bytes / 1e6:.1f} MB to `{offer.repo}`, trained by `{account}`; {worst}", file=sys.stderr)
        if not yes and not sys.stdin.isatty():
            raise UserError("there is nobody to ask whether to hand it in", "add `--yes`", exit_code=2)
        if not yes and not typer.confirm("Hand it in?"):
            raise typer.Exit(1)
        hand_in(world, offer, account, describe_machine())
        print(f"{offer.plan.run_id}: the adapter is in `{offer.repo}`; {next_tick}")


def run_paid(root: Path, path: Path, plan: Any, *, as_json: bool) -> None:
    """`run --backend hf_jobs`: submit, watch and chain the stages of one experiment until it ends."""
    from pipeline.hf_run import run_on_hub
    from pipeline.hf_world import open_world_of_one
    from pipeline.progress import make_display

    print(f"{plan.run_id}: at most ${plan.worst_usd:.2f}, paid by `{plan.repos[0].split('/')[0]}`", file=sys.stderr)
    try:
        with hub_answers():
            report = run_on_hub(open_world_of_one(root, path), make_display(sys.stderr))
    except KeyboardInterrupt:
        print(f"not watching any more; its job goes on: `mergetune cancel {plan.experiment.name}`", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json({**report.as_dict(), "repos": plan.repos})
        return
    print(f"{report.run_id}: {report.text}")
    for repo in plan.repos:
        print(f"  {repo}")


@contextmanager
def hub_answers(hint: str = "") -> Iterator[None]:
    """What the Hub refuses or does not say is an expected failure; `hint` is what to do about it where it is known."""
    from pipeline.hub_facts import Access, HubError

    try:
        yield
    except HubError as error:
        if error.access is Access.UNREACHABLE:
            raise UserError(
                f"the Hub did not answer: {error.detail}", hint or "nothing was done; try again later"
            ) from error
        hint = hint or "check the token: `mergetune check --online`"
        raise UserError(f"the Hub refused: {error.detail}", hint) from error


def _root() -> Path:
    from pipeline.settings import find_root

    return find_root(Path.cwd())


def _print_reports(reports: list[Any], format: RunFormat) -> None:
    if format is RunFormat.JSON:
        print_json([report.as_dict() for report in reports])
        return
    for report in reports:
        mark = MARKS.get(report.outcome, "·")
        job = f" ({report.job})" if report.job else ""
        print(f"{mark} {report.run_id}: {report.outcome}: {report.text}{job}")
        for line in _progress_lines(report):
            print(f"  {line}")
        if report.hint:
            print(f"  hint: {report.hint}")
    if not reports:
        print("nothing to do: every experiment of this branch is closed")


def _progress_lines(report: Any) -> list[str]:
    """How far a report's job is, its curve, and what the curve says."""
    if report.live is None or not (report.live.progress.phase or report.live.progress.total):
        return []
    from pipeline.curve_notes import notes
    from pipeline.loss_chart import loss_lines, read_curve
    from pipeline.markdown import money
    from pipeline.progress import status_line

    spent = "" if report.usd is None else f" · {money(report.usd)} so far"
    lines = loss_lines(read_curve(report.live.losses), read_curve(report.live.held_out)).splitlines()
    said = [f"note: {note}" for note in notes(report.live)]
    return [status_line(report.live.progress) + spent, *(line.strip().replace("`", "") for line in lines), *said]
