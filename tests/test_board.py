"""The run board as values: what the tags, main and the live jobs come to, row by row."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from board_cases import COMMIT, NOW, PLACE, TOKEN, finish, full_board, hostile_board, retry
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.board import SILENT, Board, Link, OnMain, Place, Row, Standing, State, make_board
from pipeline.board_chart import HEIGHT, WIDTH, loss_picture
from pipeline.board_page import render_board
from pipeline.board_summary import POINTS, Artifact, Metrics, Summary, read_summary, thinned
from pipeline.book import Closed, Tag, Verdict, make_book
from pipeline.plan import StageName

RUN = "coach-0a1b2c3d"
SUMMARY: dict[str, Any] = {
    "experiment": "coach",
    "stages": {
        "train": {
            "repo": "acme/coach-adapter",
            "revision": COMMIT,
            "duration_s": 3600,
            "metrics": {"train_loss": 1.4, "eval_loss": 1.1, "tokens_trained": 1_250_000},
        },
        "gguf": {"repo": "acme/coach-GGUF", "revision": COMMIT, "duration_s": 60, "metrics": {}},
        "evaluate": {
            "repo": "acme/coach",
            "revision": COMMIT,
            "metrics": {"before": {"loss": 2.0}, "after": {"loss": 1.0}, "loss_change_percent": -50.0},
        },
    },
    "base": "google/gemma-3-12b-it",
    "dataset": "acme/conversations",
    "flavor": "a10g-large",
    "expected_usd": 4.0,
    "worst_usd": 6,
    "hypothesis": "the loss falls below 1.2",
    "curve": {"loss": [[1, 2.5], [10, 1.2]], "eval_loss": [[5, 1.6], [10, 1.15]]},
    "pull_request": 12,
    "commit": COMMIT,
}
ON_MAIN = OnMain(
    RUN, "experiments/coach.yaml", Summary("coach", "as main says", "acme/base", "acme/data", "l4x1", 3, 5)
)


def closed(run_id: str = RUN, number: int = 1, verdict: Verdict = Verdict.DONE, **changes: Any) -> Closed:
    given: dict[str, Any] = {"text": "all is done", "at": NOW, "usd": 3.5, "attempts": {"train": 1}, "summary": SUMMARY}
    return Closed(run_id, number, verdict, **{**given, **changes})


def board(*tags: Tag, main: tuple[OnMain, ...] = (), live: Any = (), place: Place = PLACE) -> Board:
    return make_board(make_book(tags), main, live, place, NOW)


def only(*tags: Tag, **more: Any) -> Row:
    (row,) = board(*tags, **more).rows
    return row


def test_a_finished_run_says_everything_that_its_tag_says() -> None:
    row = only(finish(closed()))
    assert (row.experiment, row.state, row.text, row.at, row.usd) == ("coach", State.DONE, "all is done", NOW, 3.5)
    assert row.metrics == Metrics(2.0, 1.0, -50.0, train_loss=1.2, eval_loss=1.15, tokens=1_250_000, duration_s=3660)
    assert (row.said.hypothesis, row.said.expected_usd, row.said.worst_usd) == ("the loss falls below 1.2", 4.0, 6.0)
    assert row.file_url == f"https://github.com/acme/tunes/blob/{COMMIT}/experiments/coach.yaml"
    assert row.base_url == "https://huggingface.co/google/gemma-3-12b-it"
    assert row.dataset_url == "https://huggingface.co/datasets/acme/conversations"
    assert row.links == (
        Link("train", f"https://huggingface.co/acme/coach-adapter/tree/{COMMIT}"),
        Link("gguf", f"https://huggingface.co/acme/coach-GGUF/tree/{COMMIT}"),
        Link("evaluate", f"https://huggingface.co/acme/coach/tree/{COMMIT}"),
        Link("#12", "https://github.com/acme/tunes/pull/12"),
        Link(COMMIT[:7], f"https://github.com/acme/tunes/commit/{COMMIT}"),
    )


def test_a_tag_of_an_older_mergetune_shows_what_it_knows() -> None:
    old = {key: value for key, value in SUMMARY.items() if key not in ("curve", "pull_request", "commit")}
    row = only(finish(closed(summary=old)))
    assert (row.metrics.train_loss, row.metrics.eval_loss) == (1.4, 1.1)
    assert (row.said.train_curve, row.file_url, [link.text for link in row.links][-1]) == ((), "", "evaluate")
    bare = only(finish(closed(summary={"experiment": "coach"}, verdict=Verdict.ADOPTED)))
    assert (bare.state, bare.metrics, bare.said.hypothesis) == (State.ADOPTED, Metrics(), "")
    filled = only(finish(closed(summary={"experiment": "coach"})), main=(ON_MAIN,))
    assert (filled.said.hypothesis, filled.said.base, filled.said.worst_usd) == ("as main says", "acme/base", 5)
    assert filled.file_url == "https://github.com/acme/tunes/blob/main/experiments/coach.yaml"


def test_a_tag_by_hand_is_a_cancelled_run_without_a_date() -> None:
    row = only(Tag(f"run/{RUN}", COMMIT, "enough of it"))
    assert (row.experiment, row.state, row.at, row.usd) == ("coach", State.CANCELLED, None, 0.0)


def test_the_latest_round_is_the_row_and_the_earlier_ones_are_folded() -> None:
    first = closed(verdict=Verdict.FAILED, text="train: out of memory", usd=0.4, at=NOW - timedelta(days=2), summary={})
    second = closed(number=2, verdict=Verdict.CANCELLED, text="cancelled", usd=0.1, at=NOW - timedelta(days=1))
    row = only(*map(finish, (first, second, closed(number=3))), retry(RUN), retry(RUN, 2))
    assert (row.state, row.usd) == (State.DONE, 3.5)
    assert [(one.number, one.state, one.usd) for one in row.earlier] == [
        (2, State.CANCELLED, 0.1),
        (1, State.FAILED, 0.4),
    ]
    totals = board(*map(finish, (first, second))).totals
    assert (totals.runs, totals.states, totals.all_usd) == (1, {State.CANCELLED: 1}, 0.5)


def test_an_open_run_is_as_the_hub_says() -> None:
    since = NOW - timedelta(hours=1)
    url = "https://huggingface.co/jobs/acme/1"
    here = Standing("coach", RUN, State.LIVE, "train is running", "", since, 1.25, url)
    made = board(main=(ON_MAIN,), live=[here])
    (row,) = made.rows
    assert (row.state, row.text, row.at, row.usd) == (State.LIVE, "train is running", since, 1.25)
    assert (row.said.hypothesis, row.said.expected_usd, row.links) == ("as main says", 3, (Link("job", url),))
    assert (made.totals.states, made.totals.live_usd, made.totals.all_usd) == ({State.LIVE: 1}, 1.25, 0)


def test_a_run_that_was_reopened_is_live_and_its_rounds_are_earlier_ones() -> None:
    here = Standing("coach", RUN, State.WAITING, "would submit gguf")
    row = only(finish(closed(verdict=Verdict.FAILED)), retry(RUN), main=(ON_MAIN,), live=[here])
    assert (row.state, row.metrics, row.said.train_curve) == (State.WAITING, Metrics(), ())
    assert [one.state for one in row.earlier] == [State.FAILED]
    assert row.said.hypothesis == "the loss falls below 1.2"


def test_an_outage_is_not_an_empty_world() -> None:
    row = only(main=(ON_MAIN,), live=None)
    assert (row.state, row.text, row.usd) == (State.UNKNOWN, SILENT, None)
    again = only(finish(closed(verdict=Verdict.FAILED)), retry(RUN), main=(ON_MAIN,), live=None)
    assert (again.state, [one.state for one in again.earlier]) == (State.UNKNOWN, [State.FAILED])


def test_a_closed_run_is_as_its_tag_says_whatever_a_tick_reports() -> None:
    late = Standing("coach", RUN, State.CANCELLED, "the run is closed", usd=9.0)
    made = board(finish(closed()), live=[late])
    assert (made.rows[0].state, made.totals.live_usd) == (State.DONE, 0)


def test_a_reopened_run_whose_file_is_gone_stays_as_it_ended() -> None:
    row = only(finish(closed(verdict=Verdict.FAILED)), retry(RUN))
    assert (row.state, row.earlier) == (State.FAILED, ())


def test_a_live_job_of_no_experiment_is_shown_too() -> None:
    row = only(live=[Standing("gone", "gone-12345678", State.CANCELLED, "the experiment's file is gone")])
    assert (row.experiment, row.state, row.file_url) == ("gone", State.CANCELLED, "")


def test_what_is_open_stands_first_then_the_newest() -> None:
    ended = [finish(closed(f"coach-{n:08x}", at=NOW - timedelta(days=n))) for n in (3, 1, 2)]
    rows = board(*ended, main=(ON_MAIN,), live=None).rows
    assert [row.run_id for row in rows] == [RUN, "coach-00000001", "coach-00000002", "coach-00000003"]


def test_dollars_of_the_month_are_by_utc() -> None:
    edge = datetime(2026, 11, 1, 0, 30, tzinfo=UTC)
    tags = [finish(closed("a-00000001", at=edge)), finish(closed("b-00000001", at=edge - timedelta(hours=1)))]
    totals = board(*tags).totals
    assert (totals.month, totals.month_usd, totals.all_usd) == ("November 2026", 3.5, 7.0)


def test_a_run_is_held_against_the_previous_one_of_its_experiment() -> None:
    def tag(run_id: str, days: int, loss: float | None, **changes: str) -> Tag:
        said = {**SUMMARY, **changes}
        after = {"metrics": {"after": {"loss": loss}}} if loss is not None else {}
        return finish(closed(run_id, at=NOW - timedelta(days=days), summary={**said, "stages": {"evaluate": after}}))

    tags = [tag("coach-1", 9, 2.0), tag("coach-2", 8, None), tag("coach-3", 7, 1.5)]
    tags += [tag("coach-4", 6, 1.2, dataset="acme/other"), tag("guide-1", 5, 9.0, experiment="guide")]
    found = {row.run_id: (row.against, row.against_percent) for row in board(*tags).rows}
    assert found.pop("coach-3") == ("coach-1", -25.0)
    assert set(found.values()) == {("", None)}  # other data, another experiment, nothing measured: not comparable


def test_a_repository_without_a_page_has_no_links_to_it() -> None:
    row = only(finish(closed()), place=Place(hub="http://127.0.0.1:1"))
    assert row.file_url == ""
    assert all(link.url.startswith("http://127.0.0.1:1/acme/") for link in row.links)


def test_hostile_tags_become_plain_values() -> None:
    made = hostile_board()
    rows = {row.run_id: row for row in made.rows}
    row = rows["evil-00000000"]
    assert row.links == (Link("merge", "https://huggingface.co/acme/fine"),)
    assert (row.file_url, row.base_url, row.said.commit, row.said.pull) == ("", "", "", None)
    assert (row.said.expected_usd, row.said.worst_usd) == (None, None)
    assert row.said.train_curve == ((1.0, 2.0),)
    assert TOKEN not in json.dumps(made.as_dict())
    assert "\u202e" not in json.dumps(made.as_dict(), ensure_ascii=False)
    assert all(len(row.text) <= 600 and len(row.experiment) <= 100 for row in made.rows)
    assert rows["by-hand"].state is State.CANCELLED
    (live,) = [row for row in made.rows if row.state is State.LIVE]
    assert live.links == ()  # javascript: leads nowhere


@pytest.mark.parametrize(
    "summary",
    [
        {"stages": None, "curve": None},
        {"stages": [], "curve": [], "hypothesis": 5, "base": ["x"]},
        {"stages": {"train": {"metrics": {"train_loss": math.nan, "eval_loss": math.inf, "tokens_trained": True}}}},
        {"curve": {"loss": [[1], [1, 2, 3], None, ["a", "b"], [True, 1], [math.nan, 1]]}},
        {"expected_usd": -1, "worst_usd": 10**400, "pull_request": True, "commit": "zz" * 20},
    ],
)
def test_what_is_odd_in_a_summary_is_not_known(summary: dict[str, Any]) -> None:
    assert read_summary(summary) == Summary()


def test_a_stage_is_linked_only_where_its_repository_can_be_one() -> None:
    said = read_summary({"stages": {"merge": {"repo": "acme/x", "revision": "HEAD"}, "train": {"repo": "../x"}}})
    assert said.artifacts == (Artifact(StageName.MERGE, "acme/x"),)


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    points = tuple((float(step), 3 - step / 1000) for step in range(2000))
    few = thinned(points)
    assert len(few) <= POINTS
    assert few[-1] == points[-1]
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thinned(points[:POINTS]) == points[:POINTS]


def test_a_picture_lies_within_its_frame() -> None:
    drawn = loss_picture(((1.0, 9.0), (5.0, 1.0)), ((3.0, -(2.0**62)), (4.0, 2.0**62)))
    numbers = [int(word) for word in drawn.replace('"', " ").replace("M", " ").split() if word.lstrip("-").isdigit()]
    assert len(numbers) > 8
    assert all(0 <= number <= max(WIDTH, HEIGHT) for number in numbers)
    assert loss_picture(((1.0, 2.0),), ()) == ""
    flat = loss_picture(((1.0, 2.0), (2.0, 2.0)), ())
    assert f"M3 {HEIGHT // 2} {WIDTH - 3} {HEIGHT // 2}" in flat


def test_the_document_is_json_and_names_every_run() -> None:
    made = full_board()
    read = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert [run["run_id"] for run in read["runs"]] == [row.run_id for row in made.rows]
    assert read["at"] == "2026-11-22T20:00:00+00:00"
    assert read["totals"]["states"]["done"] == sum(row.state is State.DONE for row in made.rows)
    done = next(run for run in read["runs"] if run["state"] == "done")
    assert set(done["metrics"]) == set(vars(Metrics()))
    assert done["curve"]["train"][-1][1] == done["metrics"]["train_loss"]
    assert replace(made) == full_board()


SHAPES = st.sampled_from([SUMMARY, SUMMARY["stages"], SUMMARY["stages"]["train"], SUMMARY["curve"]])
KEYS = SHAPES.flatmap(lambda shape: st.sampled_from(sorted(shape))) | st.text(max_size=3)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(COMMIT)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(summary=st.dictionaries(KEYS, JSON, max_size=8), usd=st.floats(0, 1e18), verdict=st.sampled_from(Verdict))
def test_no_tag_breaks_the_board(summary: dict[str, Any], usd: float, verdict: Verdict) -> None:
    made = board(finish(closed(summary=summary, usd=usd, verdict=verdict)), finish(closed("b-1", summary=summary)))
    assert len(made.rows) == 2
    json.dumps(made.as_dict(), allow_nan=False)
    render_board(made, "", "").encode()
