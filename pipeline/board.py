"""The run board as values: every run there is, from the tags, main and the live jobs. Pure: draws and asks nothing."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pipeline.board_summary import NAME_CHARACTERS, REPO, Metrics, Points, Summary, read_summary, shown, thinned
from pipeline.book import EPOCH, RUN_ID, Book, Closed
from pipeline.fields import is_path

SILENT = "what its jobs do is not known"
JOB_CHARACTERS = 300


class State(StrEnum):
    """Where a run stands, in the order in which states are listed."""

    LIVE = "live"
    WAITING = "waiting"
    BLOCKED = "blocked"
    UNKNOWN = "unknown"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    ADOPTED = "adopted"


OPEN = (State.LIVE, State.WAITING, State.BLOCKED, State.UNKNOWN)


@dataclass(frozen=True)
class OnMain:
    """An experiment of main: what its file says, and the path it has there; prices of its plan, if one was made."""

    run_id: str
    path: str
    summary: Summary


@dataclass(frozen=True)
class Standing:
    """Where one run stands. `at` is when it ended, or when its job was submitted; `usd` is of this round so far.

    The curves are what the log of its job says until now.
    """

    experiment: str
    run_id: str
    state: State
    text: str
    hint: str = ""
    at: datetime | None = None
    usd: float | None = None
    job_url: str = ""
    train_curve: Points = ()
    eval_curve: Points = ()


@dataclass(frozen=True)
class Place:
    """Where links lead: the repository's page (empty: it has none), its branch, and the Hub."""

    web: str = ""
    branch: str = "main"
    hub: str = "https://huggingface.co"


@dataclass(frozen=True)
class Link:
    """A word that leads somewhere."""

    text: str
    url: str


@dataclass(frozen=True)
class Round:
    """An earlier end of a run that was reopened."""

    number: int
    state: State
    text: str
    at: datetime | None
    usd: float


@dataclass(frozen=True)
class Row:
    """One run. `usd` is of the latest round; `against` is the loss in percent of the experiment's previous run's."""

    run_id: str
    experiment: str
    state: State
    text: str
    hint: str
    at: datetime | None
    usd: float | None
    said: Summary
    earlier: tuple[Round, ...] = ()
    links: tuple[Link, ...] = ()
    file_url: str = ""
    base_url: str = ""
    dataset_url: str = ""
    against_percent: float | None = None
    against: str = ""

    @property
    def metrics(self) -> Metrics:
        """What was measured."""
        return self.said.metrics

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not known is null or empty."""
        said = asdict(self.said)
        metrics, curves = said.pop("metrics"), {key: said.pop(f"{key}_curve") for key in ("train", "eval")}
        own = {key: value for key, value in asdict(self).items() if key != "said"}
        rounds = [{**one, "at": _iso(one["at"])} for one in own["earlier"]]
        return {**said, **own, "at": _iso(self.at), "earlier": rounds, "metrics": metrics, "curve": curves}


@dataclass(frozen=True)
class Totals:
    """Counts and dollars over all rounds of all runs. `live_usd` is not in the others: its rounds have no end yet."""

    runs: int
    states: Mapping[State, int]
    month: str
    month_usd: float
    all_usd: float
    live_usd: float


@dataclass(frozen=True)
class Board:
    """Everything the page shows. `notes` say what could not be looked at."""

    rows: tuple[Row, ...]
    totals: Totals
    now: datetime
    place: Place = field(default_factory=Place)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for `--format json`."""
        totals = {**asdict(self.totals), "states": {state.value: n for state, n in self.totals.states.items()}}
        head = {"at": _iso(self.now), "repository": self.place.web, "notes": list(self.notes), "totals": totals}
        return {**head, "runs": [row.as_dict() for row in self.rows]}


def make_board(
    book: Book,
    main: Sequence[OnMain],
    live: Sequence[Standing] | None,
    place: Place,
    now: datetime,
    notes: Sequence[str] = (),
) -> Board:
    """All runs, what is open first, then the newest end first. `live` None: nobody could say, so open is unknown."""
    of_main = {one.run_id: one for one in main}
    # What a tick reports about a closed run is what its tag says.
    of_live = {one.run_id: one for one in live or () if one.run_id not in book.rounds or book.is_open(one.run_id)}
    ids = sorted({*book.rounds, *of_main, *of_live})
    rows = [_row(run_id, book, of_main.get(run_id), of_live.get(run_id), place) for run_id in ids]
    rows.sort(key=lambda row: (row.state not in OPEN, -_epoch(row), row.run_id))
    counts = Counter(row.state for row in rows)
    totals = Totals(
        runs=len(rows),
        states={state: counts[state] for state in State if counts[state]},
        month=f"{now.astimezone(UTC):%B %Y}",
        month_usd=book.usd_in_month(now.astimezone(UTC).year, now.astimezone(UTC).month),
        all_usd=math.fsum(one.usd for one in book.closed),
        live_usd=math.fsum(one.usd or 0 for one in of_live.values()),
    )
    return Board(tuple(_compared(rows)), totals, now, place, tuple(shown(note) for note in notes))


def _row(run_id: str, book: Book, on_main: OnMain | None, live: Standing | None, place: Place) -> Row:
    rounds = book.rounds.get(run_id, ())
    said = read_summary(rounds[-1].summary if rounds else {})
    # A run that was reopened and is not on main any more stays as it ended: nobody will go on with it.
    if rounds and live is None and not (on_main and book.is_open(run_id)):
        last = rounds[-1]
        ended = Standing(said.experiment, run_id, State(last.verdict), last.text, "", _at(last), last.usd)
        return _joined(ended, _filled(said, on_main), rounds[:-1], on_main, place)
    here = live or Standing(said.experiment, run_id, State.UNKNOWN, SILENT)
    # What the tag says of these is of the round that is over.
    said = replace(said, metrics=Metrics(), train_curve=thinned(here.train_curve), eval_curve=thinned(here.eval_curve))
    return _joined(here, _filled(said, on_main), rounds, on_main, place)


def _joined(here: Standing, said: Summary, earlier: Sequence[Closed], on_main: OnMain | None, place: Place) -> Row:
    names = (said.experiment, here.experiment, here.run_id.rpartition("-")[0], here.run_id)
    rounds = (Round(one.round, State(one.verdict), shown(one.text), _at(one), one.usd) for one in reversed(earlier))
    return Row(
        run_id=shown(here.run_id, 120),
        experiment=next((name for name in (shown(name, NAME_CHARACTERS) for name in names) if name), "?"),
        state=here.state,
        text=shown(here.text),
        hint=shown(here.hint),
        at=here.at,
        usd=here.usd,
        said=said,
        earlier=tuple(rounds),
        links=tuple(_links(said, here.job_url, place)),
        file_url=_file_url(said, on_main, place),
        base_url=_hub_url(said.base, place, ""),
        dataset_url=_hub_url(said.dataset, place, "datasets/"),
    )


def _filled(said: Summary, on_main: OnMain | None) -> Summary:
    """What the tag does not say, from the file of main, whose run id says that it is the same."""
    if on_main is None:
        return said
    keys = ("experiment", "hypothesis", "base", "dataset", "flavor", "expected_usd", "worst_usd")
    held = on_main.summary
    return replace(said, **{key: getattr(held, key) for key in keys if getattr(said, key) in ("", None)})


def _links(said: Summary, job_url: str, place: Place) -> Iterator[Link]:
    if job_url.startswith(("https://", "http://")) and len(job_url) <= JOB_CHARACTERS:
        yield Link("job", job_url)
    seen = set()
    for made in said.artifacts:
        url = f"{place.hub}/{made.repo}" + (f"/tree/{made.revision}" if made.revision else "")
        if url not in seen:
            seen.add(url)
            yield Link(made.stage.value, url)
    if place.web and said.pull:
        yield Link(f"#{said.pull}", f"{place.web}/pull/{said.pull}")
    if place.web and said.commit:
        yield Link(said.commit[:7], f"{place.web}/commit/{said.commit}")


def _file_url(said: Summary, on_main: OnMain | None, place: Place) -> str:
    """The experiment's file as it was launched, or as it is on main when this is the run of it."""
    if not place.web or not (on_main or (said.commit and RUN_ID.fullmatch(said.experiment))):
        return ""
    path = on_main.path if on_main else f"experiments/{said.experiment}.yaml"
    return f"{place.web}/blob/{said.commit or place.branch}/{path}"


def _hub_url(name: str, place: Place, kind: str) -> str:
    return f"{place.hub}/{kind}{name}" if REPO.fullmatch(name) and not is_path(name) else ""


def _compared(rows: Sequence[Row]) -> Iterator[Row]:
    """Each row with its held-out loss beside the previous run's of the same experiment, on the same base and data."""
    before: dict[tuple[str, str, str], Row] = {}
    against: dict[str, Row] = {}
    for row in sorted((r for r in rows if r.metrics.after is not None), key=lambda row: (_epoch(row), row.run_id)):
        key = (row.experiment, row.said.base, row.said.dataset)
        if key in before:
            against[row.run_id] = before[key]
        before[key] = row
    for row in rows:
        other = against.get(row.run_id)
        after, past = row.metrics.after, other.metrics.after if other else None
        if other is None or after is None or not past or past <= 0:
            yield row
        else:
            yield replace(row, against=other.run_id, against_percent=100 * (after / past - 1))


def _at(closed: Closed) -> datetime | None:
    """When a round ended; a tag by hand does not say."""
    return None if closed.at == EPOCH else closed.at.astimezone(UTC)


def _epoch(row: Row) -> float:
    return row.at.timestamp() if row.at else 0.0


def _iso(at: datetime | None) -> str | None:
    return at.astimezone(UTC).isoformat(timespec="seconds") if at else None
