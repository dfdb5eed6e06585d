"""What the run board is made of: tags of the remote, experiments of this checkout, jobs of the Hub. Draws nothing.

Without the tags there is no board. Without the Hub there is one, which says that it does not know what open runs do.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.board import Board, OnMain, Place, Standing, State, make_board
from pipeline.board_summary import Summary, shown
from pipeline.book import Book
from pipeline.errors import UserError
from pipeline.hf_world import open_world
from pipeline.hub_facts import HubError
from pipeline.loss_chart import read_curve
from pipeline.online import ENDPOINT
from pipeline.progress import status_line
from pipeline.reconcile import spent_usd
from pipeline.remote import SeenJob
from pipeline.repository import Repository
from pipeline.run_verbs import show_status
from pipeline.tree import read_tree
from pipeline.workspace import shown_path
from pipeline.world import Outcome, Report, Tree, Wanted

STATES = {
    Outcome.SUBMITTED: State.WAITING,  # it would be: nothing is submitted here
    Outcome.WAITING: State.WAITING,
    Outcome.BLOCKED: State.BLOCKED,
    Outcome.FINISHED: State.DONE,
    Outcome.FAILED: State.FAILED,
    Outcome.CANCELLED: State.CANCELLED,
    Outcome.SUPERSEDED: State.SUPERSEDED,
    Outcome.ADOPTED: State.ADOPTED,
}
Seen = Sequence[tuple[Report, tuple[SeenJob, ...]]]


def request_board(root: Path, branch: str, environment: Mapping[str, str], now: datetime, *, offline: bool) -> Board:
    """Every run as it stands now.

    Raises:
        RepositoryError: the tags could not be read: no board is better than one without runs.
    """
    repository = Repository(root)
    # Before the tags: a run that ends meanwhile is then in them, and not nowhere.
    seen, why, tree = _seen(root, branch, environment, offline)
    book = repository.read_book()
    tree = tree or read_tree(root, repository.head_commit())
    notes = [f"What open runs do now is not known: {why}."] if seen is None else []
    if not repository.is_clean_main(branch):
        notes.append(f"Open runs are those of this checkout, which is not the head of `{branch}`.")
    notes += [f"The experiment `{name}` cannot be read: its open run is not shown." for name in sorted(tree.broken)]
    main = [_on_main(run, root, book) for run in tree.wanted]
    live = None if seen is None else [_standing(report, jobs, book) for report, jobs in seen]
    place = Place(repository.web_address(), branch, (environment.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"))
    return make_board(book, main, live, place, now, notes)


def _seen(
    root: Path, branch: str, environment: Mapping[str, str], offline: bool
) -> tuple[Seen | None, str, Tree | None]:
    """Each run's line of a tick that changes nothing, with its jobs where one is live; or None, and the reason.

    The third is main as it was read for it, where it was.
    """
    tree = None
    if offline:
        return None, "`--offline` was given", tree
    if not environment.get("HF_TOKEN", "").strip():
        return None, "there is no HF_TOKEN to ask with", tree
    try:
        world = open_world(root, branch)
        tree = world.tree
        spaces = {run.run_id: run.namespace for run in world.tree.wanted}
        seen = []
        for report in show_status(world, None):
            labels = {"repo": world.label, "run": report.run_id}
            asked = report.job and report.run_id in spaces
            jobs = world.remote.jobs(spaces[report.run_id], labels, live=False) if asked else ()
            seen.append((report, jobs))
    except HubError as error:
        return None, f"the Hub did not say ({error.detail})", tree
    except UserError as error:
        return None, error.message, tree
    return seen, "", tree


def _on_main(run: Wanted, root: Path, book: Book) -> OnMain:
    """What a file says, and for an open run what its plan costs. A closed run has that in its tag."""
    path = shown_path(run.path, root) if run.path else ""
    experiment = run.experiment
    if experiment is None:
        return OnMain(run.run_id, path, Summary(run.name))
    expected, worst = _prices(run) if book.is_open(run.run_id) else (None, None)
    said = Summary(
        experiment=run.name,
        hypothesis=shown(experiment.hypothesis),
        base=shown(experiment.base.model),
        dataset=shown(experiment.data.dataset),
        flavor=experiment.train.flavor,
        expected_usd=expected,
        worst_usd=worst,
    )
    return OnMain(run.run_id, path, said)


def _prices(run: Wanted) -> tuple[float | None, float | None]:
    try:
        plan = run.plan()
    except UserError:
        return None, None  # `status` says why it cannot be planned
    return plan.expected_usd, plan.worst_usd


def _standing(report: Report, jobs: tuple[SeenJob, ...], book: Book) -> Standing:
    """A run as a tick sees it; what its closed rounds cost is not counted again."""
    job = next((job for job in jobs if job.id == report.job), None)
    before = sum(one.usd for one in book.rounds.get(report.run_id, ()))
    at = status_line(report.live.progress) if report.live and report.live.progress.total else ""
    return Standing(
        experiment=report.experiment,
        run_id=report.run_id,
        state=State.LIVE if report.outcome is Outcome.WAITING and report.job else STATES[report.outcome],
        text=at or report.text,
        hint=report.hint,
        at=datetime.fromtimestamp(job.created_at, UTC) if job else None,
        usd=max(0.0, round(spent_usd(jobs) - before, 4)) if job else None,
        job_url=job.url if job else "",
        train_curve=tuple(read_curve(report.live.losses)) if report.live else (),
        eval_curve=tuple(read_curve(report.live.held_out)) if report.live else (),
    )
