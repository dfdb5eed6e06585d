"""The run book: which runs are closed, reopened and paid for, as tags say. Pure: reads no git and pushes nothing.

    run/<run_id>       annotated tag: the first finish. A later round is run/<run_id>.2, .3, …
    retry/<run_id>.1   annotated tag: a person reopened the run, once per number
    mergetune/since    marker: the commit at which mergetune was installed; what is older is adopted, not launched

Tags are never moved or deleted. A message is one line for people, a blank line and one JSON object for us.
"""

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from pipeline.errors import UserError, redact

SINCE = "mergetune/since"
SCHEMA = 1
HEADER_CHARACTERS = 120
TEXT_CHARACTERS = 500
JSON_BYTES = 16_000
READ_CHARACTERS = 65_536  # of a message: four times what we write
DEPTH = 8  # of a summary; what lies deeper becomes "…"
LARGEST = 2**63  # numbers from here on become null: other JSON readers would round them
BY_HAND = "closed by a tag that mergetune did not write"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
STAGE = re.compile(r"[a-z0-9_-]{1,40}")
STAGES = 16
_FINISH = re.compile(r"run/(?P<id>.+?)(?:\.(?P<number>[0-9]{1,6}))?", re.DOTALL)
_RETRY = re.compile(r"retry/(?P<id>.+)\.(?P<number>[0-9]{1,6})", re.DOTALL)


class Verdict(StrEnum):
    """How a round ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    ADOPTED = "adopted"


@dataclass(frozen=True)
class Tag:
    """A tag as the remote holds it: `message` is None for a lightweight tag, or one that is not read for its size."""

    name: str
    commit: str
    message: str | None = None


@dataclass(frozen=True)
class Closed:
    """One finish tag: a round of a run, its end, and the dollars of that round alone.

    `attempts` is the last attempt number of each stage. `summary` is what a board shows, the most important first.
    """

    run_id: str
    round: int
    verdict: Verdict
    text: str
    at: datetime
    usd: float
    attempts: Mapping[str, int] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.at.tzinfo is None or not 1 < self.at.year < 9999:  # the ends have no UTC
            raise ValueError(f"{self.run_id}: a round ends at a time with its zone")
        if type(self.usd) not in (int, float) or not 0 <= self.usd < LARGEST:
            raise ValueError(f"{self.run_id}: a round costs an amount of dollars")
        if len(self.attempts) > STAGES or not all(map(STAGE.fullmatch, self.attempts)):
            raise ValueError(f"{self.run_id}: attempts are counted by stage")
        if any(type(number) is not int or not 0 <= number < LARGEST for number in self.attempts.values()):
            raise ValueError(f"{self.run_id}: an attempt is a number")


@dataclass(frozen=True)
class Book:
    """Everything the tags say. `since` is the commit of the first install; `taken` are the names of all tags."""

    closed: tuple[Closed, ...] = ()
    retries: Mapping[str, int] = field(default_factory=dict)
    since: str | None = None
    taken: frozenset[str] = frozenset()

    @cached_property
    def rounds(self) -> Mapping[str, tuple[Closed, ...]]:
        """The finished rounds by run id, oldest first."""
        found: dict[str, list[Closed]] = {}
        for one in sorted(self.closed, key=lambda one: one.round):
            found.setdefault(one.run_id, []).append(one)
        return {run_id: tuple(rounds) for run_id, rounds in found.items()}

    def is_open(self, run_id: str) -> bool:
        """Whether the run may be worked on: never finished, or reopened as often as it was finished."""
        return self.retries.get(run_id, 0) >= len(self.rounds.get(run_id, ()))

    def closed_attempts(self, run_id: str) -> Mapping[str, int]:
        """The last attempt of each stage in all finished rounds: the next round counts on from there.

        The highest of all rounds, so that a finish made by hand (which knows no attempts) does not start again at 1
        and take a job of an earlier round for its own.
        """
        highest: dict[str, int] = {}
        for one in self.rounds.get(run_id, ()):
            for stage, attempt in one.attempts.items():
                highest[stage] = max(attempt, highest.get(stage, 0))
        return highest

    def usd_in_month(self, year: int, month: int) -> float:
        """Dollars of the rounds that were closed in that month, by UTC."""
        ends = ((one.at.astimezone(UTC), one.usd) for one in self.closed)
        return math.fsum(usd for at, usd in ends if (at.year, at.month) == (year, month))

    def next_tag(self, run_id: str) -> str:
        """The name of the tag that will close this run.

        Raises:
            UserError: it is closed; finished is final.
        """
        if not self.is_open(run_id):
            message = f"`{run_id}` is closed already: {self.rounds[run_id][-1].verdict}"
            raise UserError(message, f"to run it again: `mergetune retry {run_id}`")
        return self._free("run", run_id, max((one.round for one in self.rounds.get(run_id, ())), default=0) + 1)

    def next_retry(self, run_id: str) -> str:
        """The name of the tag that will reopen this run: two people who retry the same round want the same name.

        Raises:
            UserError: the run is open, or no round of it is known.
        """
        if run_id not in self.rounds:
            raise UserError(f"no finished run is called `{_line(run_id, 100)}`", self._nearest(run_id))
        if self.is_open(run_id):
            raise UserError(f"`{run_id}` is not closed", f"it still runs: `mergetune status {run_id}`")
        return self._free("retry", run_id, self.retries.get(run_id, 0) + 1)

    def _free(self, kind: str, run_id: str, number: int) -> str:
        """The first name from `number` on that is not taken: a foreign tag in the way must not block a run."""
        while (name := f"{kind}/{run_id}.{number}".removesuffix(".1" if kind == "run" else "")) in self.taken:
            number += 1
        return name

    def _nearest(self, run_id: str) -> str:
        known = [one for one in self.rounds if RUN_ID.fullmatch(one)]
        near = [one for one in known if one.rpartition("-")[0] == run_id][:3]
        near = near or difflib.get_close_matches(run_id, known, n=3, cutoff=0.5)
        if not near:
            return "a run that is not finished needs no retry: `mergetune status`"
        return "perhaps you meant " + " or ".join(f"`{one}`" for one in near)


def make_book(tags: Iterable[Tag]) -> Book:
    """Read the tags. A finish counts whoever wrote it, a retry only when we did: no foreign tag leads to a launch."""
    closed: list[Closed] = []
    retries: dict[str, int] = {}
    since: str | None = None
    taken: set[str] = set()
    for tag in tags:
        taken.add(tag.name)
        if tag.name == SINCE:
            since = tag.commit
        elif match := _FINISH.fullmatch(tag.name):
            closed.append(_closed_of(tag, match["id"], int(match["number"] or 1)))
        elif (match := _RETRY.fullmatch(tag.name)) and _is_ours(_read(tag.message), "retry", match[1], int(match[2])):
            retries[match["id"]] = retries.get(match["id"], 0) + 1
    return Book(tuple(closed), retries, since, frozenset(taken))


def finish_message(closed: Closed) -> str:
    """The message of a finish tag.

    The text is cut at 500 characters. A summary entry that does not fit in 16,000 bytes of JSON is left out, `cut`
    counts them, and smaller ones after it are kept. Tokens are redacted; numbers JSON cannot hold become null.
    """
    if not RUN_ID.fullmatch(closed.run_id) or closed.round < 1:
        raise ValueError(f"`{closed.run_id}` round {closed.round} cannot be tagged")
    text = _line(closed.text, TEXT_CHARACTERS)
    record = _record("finish", closed.run_id, closed.round, closed.at)
    record |= {"verdict": closed.verdict.value, "text": text, "usd": closed.usd, "attempts": dict(closed.attempts)}
    room = JSON_BYTES - len(_json({**record, "summary": {}, "cut": LARGEST}))
    entries, kept = _plain(dict(closed.summary)), {}
    for key, value in entries.items():
        size = len(_json({key: value})) - 1  # its two braces less the comma before it
        if size <= room:
            kept[key] = value
            room -= size
    cut = {"cut": len(entries) - len(kept)} if len(kept) < len(entries) else {}
    return _message(f"{closed.verdict}: {text}", {**record, "summary": kept, **cut})


def retry_message(name: str, by: str, at: datetime) -> str:
    """The message of the retry tag of that name: who asked, and when."""
    match = _RETRY.fullmatch(name)
    if not match or not RUN_ID.fullmatch(match["id"]):
        raise ValueError(f"`{name}` is not the name of a retry")
    record = {**_record("retry", match["id"], int(match["number"]), at), "by": _line(by, 60)}
    return _message(f"retry, asked by {record['by']}", record)


def since_message(at: datetime) -> str:
    """The message of the marker of a first install."""
    header = "mergetune starts here: experiments before this commit are adopted, not launched"
    return _message(header, {"schema": SCHEMA, "kind": "since", "at": at.astimezone(UTC).isoformat()})


def _record(kind: str, run_id: str, number: int, at: datetime) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": kind, "run_id": run_id, "number": number, "at": at.astimezone(UTC).isoformat()}


def _message(header: str, record: Mapping[str, Any]) -> str:
    return f"{_line(header, HEADER_CHARACTERS)}\n\n{_json(record)}\n"


def _json(value: Any) -> str:
    """Compact ASCII: its length is its bytes, and no character in it can disturb a terminal."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _closed_of(tag: Tag, run_id: str, number: int) -> Closed:
    """The round a finish tag tells of.

    One that is not ours closes it as cancelled: a person ended it, which is neither a success nor a failure of the
    training, and its dollars are unknown (counted as none).
    """
    record = _read(tag.message)
    if _is_ours(record, "finish", run_id, number):
        try:
            return Closed(
                run_id,
                number,
                Verdict(record["verdict"]),
                _line(record["text"], TEXT_CHARACTERS),
                datetime.fromisoformat(record["at"]),
                record["usd"],
                dict(record["attempts"]),
                _plain(dict(record["summary"])),
            )
        except (KeyError, TypeError, ValueError):
            pass  # of a later schema, or forged: closed all the same
    return Closed(run_id, number, Verdict.CANCELLED, BY_HAND, EPOCH, 0.0)


def _is_ours(record: Mapping[str, Any], kind: str, run_id: str, number: int) -> bool:
    """Whether a record is of our making and of this very tag: a copy under another name counts nothing twice."""
    known = isinstance(record.get("schema"), int) and record["schema"] >= SCHEMA
    return known and [record.get(key) for key in ("kind", "run_id", "number")] == [kind, run_id, number]


def _read(message: str | None) -> Mapping[str, Any]:
    """The JSON object of a message; empty when there is none."""
    body = (message or "").partition("\n\n")[2]
    try:
        record, _ = json.JSONDecoder().raw_decode(body[:READ_CHARACTERS].lstrip())
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _line(text: str, characters: int) -> str:
    """One line without control characters or tokens, at most that long."""
    shown = redact(" ".join(_visible(text).split()))
    return shown if len(shown) <= characters else f"{shown[: characters - 1]}…"


def _visible(text: str) -> str:
    """Without control and direction characters and halves of surrogate pairs; line ends and tabs stay."""
    # Nearly always, and a look at every character of 10,000 tags takes a second. What is no text is a TypeError.
    if str.isprintable(text):
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it, and as it is safe to publish."""
    match value:
        case bool() | None:
            return value
        case int() | float():
            return value if -LARGEST < value < LARGEST else None  # NaN compares false, too
        case Mapping() if depth < DEPTH:
            return {_line(str(key), 100): _plain(entry, depth + 1) for key, entry in value.items()}
        case list() | tuple() if depth < DEPTH:
            return [_plain(entry, depth + 1) for entry in value]
        case Mapping() | list() | tuple():
            return "…"
        case _:
            return redact(_visible(str(value)))
