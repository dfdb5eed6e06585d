"""What a tick works with and what it reports: the port to main, to the tags and to the jobs, as values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from pipeline.actions import Limits, Seen, Submit
from pipeline.book import Book
from pipeline.errors import Finding
from pipeline.experiment import Experiment
from pipeline.launch import Order
from pipeline.live import Live
from pipeline.plan import Plan, StageName
from pipeline.remote import Clock, Remote
from pipeline.settings import Settings


class Outcome(StrEnum):
    """What a tick did about one run, or found."""

    SUBMITTED = "submitted"
    WAITING = "waiting"
    YOURS = "yours"  # a person has to do the next step
    BLOCKED = "blocked"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    ADOPTED = "adopted"


@dataclass(frozen=True)
class Report:
    """One run's line of a tick. `job` is the one submitted or waited for, `live` what its log says, `usd` what it
    has cost so far. Of several nodes it is the first one's, `more_jobs` are the others, and the cost is that of all."""

    experiment: str
    run_id: str
    outcome: Outcome
    text: str
    hint: str = ""
    stage: StageName | None = None
    job: str = ""
    live: Live | None = None
    usd: float | None = None
    more_jobs: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        said = {key: value for key, value in vars(self).items() if key != "live" and value not in ("", None, ())}
        return {**said, "progress": self.live.as_dict()} if self.live and self.live.as_dict() else said


@dataclass(frozen=True)
class Wanted:
    """An experiment on main: its run, its file as it was read, and how to learn the rest when it is needed.

    Finished runs never need a plan.
    """

    name: str
    run_id: str
    namespace: str
    plan: Callable[[], Plan]
    path: Path | None = None
    experiment: Experiment | None = None


@dataclass(frozen=True)
class Tree:
    """The experiments of one commit of main. `broken` are names whose file cannot be read: unknown, not deleted.

    `partial`: not all of main. What is not in it is then nobody's to end.
    """

    commit: str
    wanted: tuple[Wanted, ...]
    broken: frozenset[str] = frozenset()
    partial: bool = False


class RunBook(Protocol):
    """The tags of the repository's remote."""

    def read_book(self) -> Book:
        """Everything the tags say."""
        ...

    def push_tag(self, name: str, commit: str, message: str) -> Any:
        """Make a tag; somebody may have been first."""
        ...

    def push_tags(self, commit: str, messages: Mapping[str, str]) -> None:
        """Make many at once; the ones that are there already stay."""
        ...


@dataclass(frozen=True)
class World:
    """What a tick works with. `namespaces` are looked through besides those of the wanted runs, for jobs whose
    experiment is gone. `preflight` gives the findings that stop a first submit; `order` makes a submit."""

    remote: Remote
    book: RunBook
    clock: Clock
    settings: Settings
    tree: Tree
    label: str
    preflight: Callable[[Plan], tuple[Finding, ...]]
    order: Callable[[Plan, Submit, Seen, int], Order]
    limits: Limits = field(default_factory=Limits)
    namespaces: frozenset[str] = frozenset()
