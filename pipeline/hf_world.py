"""The real world for a tick: this checkout, the tags of its remote, the Hub. Opens it; decides and submits nothing."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from pipeline.actions import Limits, Seen, Submit
from pipeline.backends.hf_jobs import HfJobs
from pipeline.book import Book
from pipeline.check import clashes, preflight
from pipeline.errors import Finding, UserError
from pipeline.experiment import Experiment
from pipeline.hub import Hub, open_hub
from pipeline.hub_token import token_shape
from pipeline.launch import Order
from pipeline.online import ENDPOINT
from pipeline.plan import Plan
from pipeline.remote import Clock
from pipeline.repository import Repository
from pipeline.settings import load_settings
from pipeline.tree import make_order, read_tree, wanted_run
from pipeline.world import RunBook, Tree, World

PullOf = Callable[[Plan], int | None]


@dataclass(frozen=True)
class SystemClock:
    """The clock of this machine."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""
        time.sleep(seconds)


@dataclass(frozen=True)
class UnwrittenBook:
    """The tags as they are, with nothing added: one run by hand neither installs mergetune nor closes anything."""

    repository: Repository
    commit: str

    def read_book(self) -> Book:
        """The book of the remote; a repository that has no marker yet counts as installed here."""
        book = self.repository.read_book()
        return replace(book, since=book.since or self.commit)

    def push_tag(self, name: str, commit: str, message: str) -> None:
        """Nothing: the controller writes the tag when it finds the artifacts."""

    def push_tags(self, commit: str, messages: Mapping[str, str]) -> None:
        """Nothing, either."""


def open_world(root: Path, branch: str, clock: Clock | None = None, pull_of: PullOf = lambda plan: None) -> World:
    """Everything a tick over main needs; by this machine's clock unless another is given.

    `pull_of` gives the number of the pull request that brought an experiment, where somebody can be asked.

    Raises:
        UserError: no token that can be one, or a checkout that is not the head of `branch`.
        HubError: the Hub does not say whose token it is.
    """
    repository = Repository(root)
    if not repository.is_clean_main(branch):
        hint = f"`git switch {branch} && git pull`: a tick from an old commit would take newer runs for unwanted ones"
        raise UserError(f"this checkout is not the head of `{branch}`, so nothing was done", hint)
    return _world(root, repository, repository, read_tree(root, repository.head_commit()), clock, pull_of)


def open_world_of_one(root: Path, path: Path, clock: Clock | None = None) -> World:
    """The world of one experiment, run by hand: it may be on no branch yet, and no other run is touched.

    Raises:
        UserError: no token that can be one, or a file that cannot be read.
        HubError: the Hub does not say whose token it is.
    """
    repository = Repository(root)
    commit = repository.head_commit()
    tree = Tree(commit, (wanted_run(path.resolve(), root),), partial=True)
    return _world(root, repository, UnwrittenBook(repository, commit), tree, clock)


def open_account(clock: Clock) -> tuple[Hub, str]:
    """The Hub with the personal token of the environment.

    Raises:
        UserError: there is none, or what is there cannot be one.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    shape = token_shape(token)
    if shape is not None:
        where = "set HF_TOKEN to a personal token that may write and start jobs"
        raise UserError(f"`HF_TOKEN` holds no personal token ({shape.kind})", where)
    return open_hub(os.environ.get("HF_ENDPOINT") or ENDPOINT, token, sleep=clock.sleep), token


def _world(
    root: Path,
    repository: Repository,
    book: RunBook,
    tree: Tree,
    clock: Clock | None,
    pull_of: PullOf = lambda plan: None,
) -> World:
    settings = load_settings(root)
    clock = clock or SystemClock()
    hub, token = open_account(clock)
    remote = HfJobs(hub, token)
    label = repository.label()
    account = hub.token_facts().user
    namespaces = frozenset(settings.namespaces) | ({account} if account else set())
    provenance: Callable[[Plan], dict[str, object]] = partial(_provenance, repository, tree, pull_of)

    def order(plan: Plan, submit: Submit, seen: Seen, attempt: int) -> Order:
        return make_order(root, remote, label, provenance(plan), plan, submit, seen)

    @cache  # asked for at the first submit: a tick that starts no job compares nothing
    def others() -> dict[Path, tuple[Experiment, ...]]:
        return clashes(root, {run.path: run.experiment for run in tree.wanted if run.path and run.experiment})

    def check(plan: Plan) -> tuple[Finding, ...]:
        path = next(run.path for run in tree.wanted if run.run_id == plan.run_id) or Path()
        now = datetime.fromtimestamp(clock.now(), UTC)
        return preflight(path, root, settings, hub, now, others().get(path.resolve(), ()))

    stops, idle_s = settings.early_stop, 60 * settings.idle_minutes
    limits = Limits(attempts=settings.attempts, early_stop=stops, idle_s=idle_s)
    return World(remote, book, clock, settings, tree, label, check, order, limits, namespaces)


def _provenance(repository: Repository, tree: Tree, pull_of: PullOf, plan: Plan) -> dict[str, object]:
    """Where an artifact comes from: for its card and its manifest."""
    path = next(run.path for run in tree.wanted if run.run_id == plan.run_id)
    shown = path.relative_to(repository.root).as_posix() if path else ""
    commit = repository.introduced_by(shown) or tree.commit
    number = pull_of(plan)
    known = {"pull_request": number} if number else {}
    return {"repository": repository.web_address(), "commit": commit, "path": shown, **known}
