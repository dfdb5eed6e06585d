"""The run book: what tags say, and that no foreign tag ever reopens or launches a run."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.book import (
    BY_HAND,
    JSON_BYTES,
    SINCE,
    Book,
    Closed,
    Tag,
    Verdict,
    finish_message,
    make_book,
    retry_message,
    since_message,
)
from pipeline.errors import UserError

AT = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
RUN = "coach-0a1b2c3d"
TOKEN = "hf_" + "Ab1" * 10


def closed(run_id: str = RUN, number: int = 1, **changes: object) -> Closed:
    given_ = {"verdict": Verdict.DONE, "text": "trained, merged, converted", "at": AT, "usd": 1.5}
    return Closed(run_id, number, **{**given_, "attempts": {"train": 2, "merge": 1}, **changes})


def finish(one: Closed) -> Tag:
    name = f"run/{one.run_id}" if one.round == 1 else f"run/{one.run_id}.{one.round}"
    return Tag(name, "c" * 40, finish_message(one))


def retry(run_id: str = RUN, number: int = 1) -> Tag:
    name = f"retry/{run_id}.{number}"
    return Tag(name, "c" * 40, retry_message(name, "ada", AT))


def test_a_message_is_one_line_a_blank_line_and_one_object() -> None:
    head, blank, body = finish_message(closed(summary={"loss": 1.25})).split("\n", 2)
    assert head == "done: trained, merged, converted"
    assert blank == ""
    assert json.loads(body) == {
        "schema": 1,
        "kind": "finish",
        "run_id": RUN,
        "number": 1,
        "at": "2026-11-22T20:00:00+00:00",
        "verdict": "done",
        "text": "trained, merged, converted",
        "usd": 1.5,
        "attempts": {"train": 2, "merge": 1},
        "summary": {"loss": 1.25},
    }


def test_a_run_is_closed_by_a_finish_and_reopened_by_a_retry_once() -> None:
    assert make_book([]).is_open(RUN)
    tags: list[Tag] = []
    for number in (1, 2, 3):
        assert make_book(tags).next_tag(RUN) == (f"run/{RUN}" if number == 1 else f"run/{RUN}.{number}")
        tags.append(finish(closed(number=number)))
        book = make_book(tags)
        assert not book.is_open(RUN)
        assert book.next_retry(RUN) == f"retry/{RUN}.{number}"
        tags.append(retry(number=number))
        assert make_book(tags).is_open(RUN)
        assert make_book(tags).is_open("other-0a1b2c3d")


def test_a_closed_run_cannot_be_finished_again() -> None:
    with pytest.raises(UserError) as error:
        make_book([finish(closed())]).next_tag(RUN)
    assert error.value.as_text() == (
        f"error: `{RUN}` is closed already: done\n\nhint: to run it again: `mergetune retry {RUN}`"
    )


def test_what_is_not_closed_cannot_be_retried() -> None:
    book = make_book([finish(closed()), retry(), Tag("run/<b>`rm -rf`", "c" * 40)])
    with pytest.raises(UserError) as error:
        book.next_retry(RUN)
    assert error.value.as_text() == f"error: `{RUN}` is not closed\n\nhint: it still runs: `mergetune status {RUN}`"
    for asked in ("coach", "coach-0a1b2c3e", "coahc-0a1b2c3d"):
        with pytest.raises(UserError) as error:
            book.next_retry(asked)
        assert error.value.message == f"no finished run is called `{asked}`"
        assert error.value.hint == f"perhaps you meant `{RUN}`"
    with pytest.raises(UserError) as error:
        book.next_retry("<b>")
    assert error.value.hint == "a run that is not finished needs no retry: `mergetune status`"


@pytest.mark.parametrize(
    "message",
    [
        None,
        "",
        "by hand",
        "by hand\n\nnot json",
        "x\n\n[1]",
        "x\n\n" + "[" * 60_000,
        'x\n\n{"schema": 1}',
        'x\n\n{"schema": 1' + "0" * 5_000 + "}",
        finish_message(closed("other-0a1b2c3d")),
        finish_message(closed(number=2)),
        finish_message(closed()).replace('"finish"', '"retry"'),
        finish_message(closed()).replace('"done"', '"paused"'),
        finish_message(closed()).replace("1.5", "NaN"),
        finish_message(closed()).replace("1.5", "-1.5"),
        finish_message(closed()).replace("1.5", "true"),
        finish_message(closed()).replace("1.5", "1" * 400),
        finish_message(closed()).replace("+00:00", ""),
        finish_message(closed()).replace("2026-11-22T20:00:00+00:00", "0001-01-01T00:00:00+14:00"),
        finish_message(closed()).replace('{"train":2,"merge":1}', '{"train":true}'),
        finish_message(closed()).replace('{"train":2,"merge":1}', "[[1,2]]"),
        finish_message(closed()).replace('"summary":{}', '"summary":7'),
        finish_message(closed()).replace('"trained, merged, converted"', "[" * 300 + "]" * 300),
    ],
)
def test_a_foreign_finish_closes_and_costs_nothing(message: str | None) -> None:
    book = make_book([Tag(f"run/{RUN}", "c" * 40, message)])
    assert not book.is_open(RUN)
    assert [(one.verdict, one.text, one.usd, one.attempts) for one in book.closed] == [
        (Verdict.CANCELLED, BY_HAND, 0, {})
    ]
    assert book.next_retry(RUN) == f"retry/{RUN}.1"


@pytest.mark.parametrize("message", [None, "please", retry_message("retry/other-0a1b2c3d.1", "eve", AT)])
def test_a_foreign_retry_opens_nothing_and_does_not_block_ours(message: str | None) -> None:
    book = make_book([finish(closed()), Tag(f"retry/{RUN}.1", "c" * 40, message)])
    assert not book.is_open(RUN)
    assert book.next_retry(RUN) == f"retry/{RUN}.2"
    assert make_book([finish(closed()), Tag(f"retry/{RUN}.1", "c" * 40, message), retry(number=2)]).is_open(RUN)


def test_a_foreign_round_in_the_way_is_stepped_over() -> None:
    tags = [finish(closed()), Tag(f"run/{RUN}.7", "c" * 40), retry(), retry(number=2)]
    assert make_book(tags).next_tag(RUN) == f"run/{RUN}.8"
    assert not make_book(tags[:3]).is_open(RUN)


def test_the_marker_of_the_first_install() -> None:
    assert make_book([]).since is None
    assert make_book([Tag(SINCE, "a" * 40, since_message(AT))]).since == "a" * 40
    assert since_message(AT).startswith("mergetune starts here: ")


def test_attempts_go_on_from_the_highest_even_after_a_finish_by_hand() -> None:
    tags = [finish(closed()), Tag(f"run/{RUN}.2", "c" * 40), finish(closed(number=3, attempts={"train": 4}))]
    assert make_book(tags[:2]).closed_attempts(RUN) == {"train": 2, "merge": 1}
    assert make_book(tags).closed_attempts(RUN) == {"train": 4, "merge": 1}
    assert make_book(tags).closed_attempts("other") == {}


def test_the_budget_book_goes_by_utc_months() -> None:
    new_york = timezone(timedelta(hours=-5))
    ends = [
        datetime(2026, 11, 30, 23, 59, tzinfo=UTC),
        datetime(2026, 11, 30, 20, 0, tzinfo=new_york),  # the 1st of December in UTC
        datetime(2025, 11, 1, tzinfo=UTC),
    ]
    book = make_book(finish(closed(number=number, at=at)) for number, at in enumerate(ends, 1))
    assert book.usd_in_month(2026, 11) == 1.5
    assert book.usd_in_month(2026, 12) == 1.5
    assert book.usd_in_month(2026, 10) == 0


def test_no_token_and_no_control_character_is_published() -> None:
    text = f"failed\x1b[31m: \u202e401 for\n{TOKEN} " + "é" * 600
    one = closed(text=text, summary={"log": f"a\nb {TOKEN}\x00", TOKEN: 1, "loss": math.nan, "deep": {"x": [math.inf]}})
    message = finish_message(one)
    assert TOKEN not in message
    head = message.split("\n")[0]
    assert head.startswith("done: failed[31m: 401 for <token> é")
    assert len(head) == 120
    (read,) = make_book([Tag(f"run/{RUN}", "c" * 40, message)]).closed
    assert read.summary == {"log": "a\nb <token>", "<token>": 1, "loss": None, "deep": {"x": [None]}}
    assert len(read.text) == 500
    assert TOKEN not in retry_message(f"retry/{RUN}.1", TOKEN, AT)


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    summary = {"loss": 1.2, "history": ["x" * 100] * 1000, "url": "https://example.org", "sample": "😀" * 2000}
    message = finish_message(closed(text="😀" * 900, summary=summary))
    body = message.split("\n\n")[1].strip()
    assert len(body) <= JSON_BYTES
    assert json.loads(body)["cut"] == 2
    (read,) = make_book([Tag(f"run/{RUN}", "c" * 40, message)]).closed
    assert read.summary == {"loss": 1.2, "url": "https://example.org"}
    full = finish_message(closed(summary={f"k{number}": "x" * 97 for number in range(500)})).split("\n\n")[1].strip()
    assert JSON_BYTES - 120 < len(full) <= JSON_BYTES


@pytest.mark.parametrize(
    "wrong",
    [
        {"usd": math.nan},
        {"usd": -1},
        {"usd": math.inf},
        {"at": datetime(2026, 1, 1)},
        {"attempts": {"Train!": 1}},
        {"attempts": {"train": 1.5}},
        {"attempts": {f"s{number}": 1 for number in range(17)}},
    ],
)
def test_a_round_that_makes_no_sense_is_a_bug(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=RUN):
        closed(**wrong)


def test_only_a_runs_own_id_can_be_tagged() -> None:
    for wrong in ("a/b", "", "A", "x..y", "-x", "x" * 101):
        with pytest.raises(ValueError, match="cannot be tagged"):
            finish_message(closed(wrong))
        with pytest.raises(ValueError, match="not the name of a retry"):
            retry_message(f"retry/{wrong}.1", "ada", AT)


run_ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,40}", fullmatch=True)
numbers = st.integers() | st.floats() | st.booleans() | st.none()
values = st.recursive(numbers | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
rounds = st.builds(
    Closed,
    run_ids,
    st.integers(1, 999_999),
    st.sampled_from(Verdict),
    st.text(max_size=700),
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=st.just(AT.tzinfo)),
    st.floats(0, 1e9) | st.integers(0, 10**6),
    st.dictionaries(st.from_regex(r"[a-z0-9_-]{1,40}", fullmatch=True), st.integers(0, 2**62), max_size=16),
    st.dictionaries(st.text(), values, max_size=5),
)


@settings(deadline=None, max_examples=100)
@given(rounds)
def test_a_message_says_everything_and_saying_it_again_changes_nothing(one: Closed) -> None:
    message = finish_message(one)
    message.encode()
    head, blank, body = message.split("\n", 2)
    assert len(head) <= 120
    assert head.isprintable() or "\ufffd" in head or not head.isascii()
    assert blank == ""
    assert len(body.strip()) <= JSON_BYTES
    name = finish(one).name
    (read,) = make_book([Tag(name, "c" * 40, message)]).closed
    kept = ("run_id", "round", "verdict", "at", "usd", "attempts")
    assert [getattr(read, key) for key in kept] == [getattr(one, key) for key in kept]
    assert read.text != BY_HAND
    (again,) = make_book([finish(read)]).closed
    assert again == read


@settings(deadline=None)
@given(st.text(), st.text(max_size=300))
def test_any_text_under_run_closes_and_under_retry_opens_nothing(name: str, message: str) -> None:
    book = make_book([finish(closed()), Tag(f"run/{name}", "c" * 40, message), Tag(f"retry/{name}", "c" * 40, message)])
    assert book.retries == {}
    assert not book.is_open(RUN)
    assert not any(book.is_open(one.run_id) for one in book.closed)


@given(st.integers(0, 6), st.integers(0, 6))
def test_a_run_is_open_exactly_when_retried_as_often_as_finished(finishes: int, retries: int) -> None:
    tags = [finish(closed(number=number)) for number in range(1, finishes + 1)]
    tags += [retry(number=number) for number in range(1, retries + 1)]
    assert make_book(reversed(tags)).is_open(RUN) == (retries >= finishes)
    plain = Book(tuple(closed(number=number) for number in range(1, finishes + 1)), {RUN: retries})
    assert plain.is_open(RUN) == (retries >= finishes)
