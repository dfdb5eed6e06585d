"""The run board's page: as text, and as people meet it in a real headless Chromium."""

import json
import os
import re
import runpy
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from board_cases import BREAKOUT, NOW, PLACE, TOKEN, full_board, hostile_board

from pipeline.board import Board, Row, State, make_board
from pipeline.board_page import ORDERS, render_board
from pipeline.book import Book

ROOT = Path(__file__).resolve().parents[1]
STYLE, SCRIPT = ((ROOT / f"pipeline/board.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
EMPTY = make_board(Book(), [], None, PLACE, NOW, ("What open runs do now is not known: there is no HF_TOKEN.",))
VOID = {"meta", "link", "input"}
BROWSER_S = 120


def page(board: Board) -> str:
    return render_board(board, STYLE, SCRIPT)


def name(row: Row) -> str:
    return f"{row.experiment} {row.run_id.removeprefix(f'{row.experiment}-')}"


class Nesting(HTMLParser):
    """Every tag is closed, and in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")


@pytest.mark.parametrize("board", [full_board(), hostile_board(), EMPTY], ids=["season", "hostile", "empty"])
def test_the_page_is_whole_and_the_same_again(board: Board) -> None:
    text = page(board)
    assert text == page(board)
    nesting = Nesting()
    nesting.feed(text)
    assert (nesting.open, nesting.wrong) == ([], [])
    assert all(c.isprintable() or c in "\n\u200c" for c in text)  # the second stands in what would begin a comment


def test_nothing_of_the_page_is_asked_of_anybody() -> None:
    text = page(full_board())
    assert not re.search(r"\bsrc=|@import|url\(|<link (?!rel=\"icon\" href=\"data:,\")|<iframe|<object", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules.pop("img-src") == "data:"
    assert {key: re.sub(r"'sha256-[A-Za-z0-9+/]{43}='", "HASH", value) for key, value in rules.items()} == {
        "default-src": "'none'",
        "style-src": "HASH",
        "script-src": "HASH",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.count("<script>") == 1
    assert not re.search(r"<[^>]* (style|on\w+)=", text.replace(SCRIPT, ""))


def test_hostile_text_is_shown_and_does_nothing() -> None:
    text = page(hostile_board())
    assert "<script>window" not in text
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in text
    assert TOKEN not in text
    assert "&lt;token&gt;" in text
    assert "\u202e" not in text
    assert not re.search(r'href="(?!https://(?:huggingface\.co|github\.com)/|data:,)', text)


def test_what_is_not_known_is_said() -> None:
    text = page(EMPTY)
    assert "<li>What open runs do now is not known: there is no HF_TOKEN.</li>" in text
    assert "No run is known yet" in text
    assert "<table" not in text


def test_a_thousand_runs_are_less_than_two_megabytes() -> None:
    assert len(page(full_board(1000)).encode()) < 2_000_000


def test_every_key_that_rows_are_sorted_by_is_in_the_list_of_orders() -> None:
    keys = set(re.findall(r" data-([a-z]+)=", re.sub(r"<(?!tr)[^>]*>", "", page(full_board()))))
    assert keys == {order.removeprefix("-") for order, _ in ORDERS}


# From here on: what Chromium says.


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that was seen in one visit, with pictures in the folder of the test."""
    dev = runpy.run_path(str(ROOT / "scripts/dev/render_markdown.py"))
    try:
        tools = dev["renderer"]()
    except dev["Unable"] as reason:
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI the page must be opened: `make browser`")
        pytest.skip(f"{reason}; `make browser` brings it")
    folder = tmp_path_factory.mktemp("board")
    boards = {"season": full_board(), "hostile": hostile_board(), "thousand": full_board(1000), "empty": EMPTY}
    for key, board in boards.items():
        (folder / f"{key}.html").write_text(page(board), encoding="utf-8")
    pages = {key: str(folder / f"{key}.html") for key in boards}
    work = {"browser": tools.browser, "packages": str(tools.packages), "pages": pages, "pictures": str(folder)}
    (folder / "work.json").write_text(json.dumps(work))
    command = [tools.node, str(ROOT / "tests/board_browser.mjs"), str(folder / "work.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_S, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


ROWS = full_board().rows
Key = Callable[[Row], Any]


def ordered(key: Key, *, down: bool = False) -> list[str]:
    """As the page promises: what is not known last, equals newest first."""
    place = {row.run_id: number for number, row in enumerate(ROWS)}

    def when(row: Row) -> float:
        open_ones = (State.LIVE, State.WAITING, State.BLOCKED)
        return (row.at or NOW).timestamp() if row.at or row.state in open_ones else 0

    newest = sorted(ROWS, key=lambda row: (-int(when(row)), place[row.run_id]))
    known = [row for row in newest if key(row) is not None]
    return [name(row) for row in sorted(known, key=key, reverse=down)] + [
        name(row) for row in newest if key(row) is None
    ]


def stable(key: Key) -> list[str]:
    """Downwards, with equals as they would stand upwards."""
    values = sorted({key(row) for row in ROWS if key(row) is not None}, reverse=True)
    return ordered(lambda row: None if key(row) is None else values.index(key(row)))


slow = pytest.mark.slow


@slow
def test_nothing_is_asked_for_and_nothing_is_wrong(told: dict[str, Any]) -> None:
    assert told["requests"] == []
    assert told["errors"] == []


@slow
@pytest.mark.parametrize(
    ("head", "order", "key"),
    [
        ("Held-out loss", "after", lambda row: row.metrics.after),
        ("Experiment", "experiment", lambda row: row.experiment),
        ("Cost", "-cost", lambda row: row.usd),
        ("State", "state", lambda row: list(State).index(row.state)),
        ("Made from", "base", lambda row: row.said.base.lower() or None),
    ],
)
def test_a_click_sorts_and_another_turns_it_round(told: dict[str, Any], head: str, order: str, key: Key) -> None:
    up, down = (ordered(key), [[order, "ascending"]]), (stable(key), [[order, "descending"]])
    first, second = (down, up) if order.startswith("-") else (up, down)
    for (rows, mark, _), expected in zip(told["sorting"][head], (first, second), strict=True):
        assert rows == expected[0]
        assert mark == expected[1]


@slow
def test_the_first_view_is_the_newest_and_the_keyboard_sorts(told: dict[str, Any]) -> None:
    rows, mark = told["sorting"]["first"]
    assert mark == [["-when", "descending"]]
    assert set(rows[:3]) == {name(row) for row in ROWS[:3]}
    assert rows[3:] == [name(row) for row in ROWS[3:]]
    assert told["sorting"]["enter"] == [stable(lambda row: row.usd), [["-cost", "descending"]]]
    assert told["sorting"]["space"] == [ordered(lambda row: row.usd), [["-cost", "ascending"]]]


@slow
def test_the_list_of_orders_sorts_by_what_has_no_column(told: dict[str, Any]) -> None:
    rows, mark, address = told["sorting"]["flavor"]
    assert (rows, mark, address) == (ordered(lambda row: row.said.flavor or None), [], "#sort=flavor")
    rows, mark, address = told["sorting"]["turned"]
    assert (rows, address) == (stable(lambda row: row.said.flavor or None), "#sort=-flavor")


@slow
def test_words_and_states_filter_and_the_address_keeps_them(told: dict[str, Any]) -> None:
    seen = told["filtering"]
    assert seen["status"] == ["40 shown"]
    gemma = [row for row in ROWS if row.experiment == "coach-gemma3-12b" and row.said.base]
    rows, address, status = seen["words"]
    assert sorted(rows) == sorted(name(row) for row in gemma)
    assert (address, status) == ("#q=GEMMA++coach", f"{len(gemma)} of 40 shown")
    failed = [row for row in gemma if row.state is State.FAILED]
    assert failed
    assert sorted(seen["failed"][0]) == sorted(map(name, failed))
    assert seen["left"][1] == "#q=GEMMA++coach&state=failed&sort=-cost"
    assert seen["restored"] == seen["left"]
    assert seen["controls"] == ["GEMMA  coach", ["failed"], "-cost"]
    open_or_done = [row for row in ROWS if row.state in (State.DONE, State.LIVE)]
    assert sorted(seen["went"]) == sorted(map(name, open_or_done))


@slow
def test_an_odd_address_shows_everything(told: dict[str, Any]) -> None:
    rows, mark = told["filtering"]["odd"]
    assert (len(rows), mark) == (0, [["-when", "descending"]])  # no run holds the character that it asks for


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 between two `rgb(…)`."""

    def luminance(colour: str) -> float:
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@slow
def test_dark_is_dark_and_every_text_can_be_read(told: dict[str, Any]) -> None:
    light, dark = told["light"], told["dark"]
    assert contrast(light["page"], "rgb(255, 255, 255)") < 1.1
    assert contrast(dark["page"], "rgb(0, 0, 0)") < 1.3
    for scheme in (light, dark):
        assert len(scheme["text"]) >= 15
        for text, colour in scheme["text"].items():
            assert contrast(scheme["page"], colour) >= 4.5, text


@slow
@pytest.mark.parametrize("case", ["phone", "narrow"])
def test_a_phone_shows_cards_and_nothing_beside_them(told: dict[str, Any], case: str) -> None:
    seen = told[case]
    assert seen["overflow"] <= 0
    assert seen["widest"] <= 375
    assert seen["lowest"] >= 24  # WCAG 2.2: a target's least size


@slow
def test_a_card_says_what_each_number_is(told: dict[str, Any]) -> None:
    labels = "none,Held-out loss,Change,Training,Tokens,Took,Cost,Made from,When,Links"
    assert told["phone"]["labels"] == labels.split(",")


@slow
def test_no_window_is_too_narrow(told: dict[str, Any]) -> None:
    assert {width: over for width, over in told["widths"].items() if over > 0} == {}


@slow
def test_without_script_every_run_is_there(told: dict[str, Any]) -> None:
    assert told["plain"] == {"rows": 40, "controls": False}


@slow
def test_hostile_text_does_nothing_in_a_browser(told: dict[str, Any]) -> None:
    seen = told["hostile"]
    assert (seen["hacked"], seen["handlers"]) == (None, [])
    assert not {"img", "iframe", "style"} & set(seen["tags"])
    assert all(href.startswith(("https://huggingface.co/", "https://github.com/acme/tunes")) for href in seen["hrefs"])
    assert BREAKOUT in seen["text"]
    assert seen["overflow"] <= 0


@slow
def test_the_policy_forbids_what_an_injection_would_do(told: dict[str, Any]) -> None:
    seen = told["policy"]
    assert seen["hacked"] is None
    wanted = {"connect-src", "frame-src", "img-src", "script-src-elem", "style-src-attr", "style-src-elem"}
    assert wanted <= set(seen["blocked"])
    assert "No run is known yet" in seen["main"]


@slow
def test_a_thousand_runs_are_sorted_at_once(told: dict[str, Any]) -> None:
    times = sorted(told["thousand"]["times"])
    assert times[len(times) // 2] < 200, times
    assert told["thousand"]["rows"] > 100


@slow
def test_it_is_a_table_for_those_who_hear_it(told: dict[str, Any]) -> None:
    seen = told["accessibility"]
    assert seen["nameless"] == []
    assert (seen["counts"]["table"], seen["counts"]["row"]) == (1, 41)
    assert (seen["counts"]["columnheader"], seen["counts"]["rowheader"]) == (11, 40)
    assert seen["counts"]["button"] >= 10


@slow
def test_paper_holds_the_table_without_its_controls(told: dict[str, Any]) -> None:
    assert told["paper"]["bytes"] > 20_000
    assert (told["paper"]["controls"], told["paper"]["overflow"]) == (False, 0)
    assert told["paper"]["table"] <= 1040
    assert told["paper"]["fold"]


def test_rows_of_earlier_rounds_are_folded() -> None:
    row = next(row for row in ROWS if row.earlier)
    assert f"1 earlier round, ${row.earlier[0].usd:.2f}</summary><ul><li>round 1: ✗ failed" in page(
        replace(full_board(), rows=(row,))
    )
