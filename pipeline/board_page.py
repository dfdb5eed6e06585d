"""The run board as one HTML page that asks nobody for anything. Returns text; writes no file and knows no tag.

Everything but our own words is untrusted and is escaped, and a Content-Security-Policy lets only this page's own style
and script act. The page is whole without JavaScript: the script only sorts and filters.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from html import escape

from pipeline.board import OPEN, Board, Place, Round, Row, State
from pipeline.board_chart import loss_picture
from pipeline.markdown import money, plural
from pipeline.progress import duration

CODE = re.compile(r"`([^`]+)`")
FOLD = 170  # characters of a hypothesis that stand in the table; the rest is a fold
MANY = 200  # rows from which on laying out only what is in sight is worth it
MARKS = {
    State.LIVE: "◐",
    State.WAITING: "○",
    State.BLOCKED: "!",
    State.UNKNOWN: "?",
    State.DONE: "●",
    State.FAILED: "✗",
    State.CANCELLED: "–",
    State.SUPERSEDED: "»",
    State.ADOPTED: "+",
}
COUNTED = (*OPEN, State.DONE, State.FAILED)  # at the top; the others have a count on their button
# Head of the column, and the key that it is sorted by; `-`: the first click sorts downwards.
COLUMNS = (
    ("State", "state"),
    ("Experiment", "experiment"),
    ("Held-out loss", "after"),
    ("Change", "change"),
    ("Training", "eval"),
    ("Tokens", "-tokens"),
    ("Took", "-took"),
    ("Cost", "-cost"),
    ("Made from", "base"),
    ("When", "-when"),
    ("Links", ""),
)
# Every key, for the list of orders: also what shares a column with others.
ORDERS = (
    ("-when", "when"),
    ("experiment", "experiment"),
    ("state", "state"),
    ("after", "held-out loss"),
    ("before", "held-out loss before"),
    ("change", "change of held-out loss"),
    ("train", "training loss"),
    ("eval", "held-out loss while training"),
    ("-tokens", "tokens"),
    ("-took", "duration"),
    ("-cost", "cost"),
    ("-expected", "expected cost"),
    ("-worst", "cost at most"),
    ("base", "base"),
    ("dataset", "dataset"),
    ("flavor", "flavor"),
)


def render_board(board: Board, style: str, script: str) -> str:
    """The page. The same board gives the same page."""
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
    policy += "base-uri 'none'; form-action 'none'"
    heads = "".join(_head(text, order) for text, order in COLUMNS)
    rows = "\n".join(_row(row, board.now) for row in board.rows)
    caption = "<caption>Every run: what is open first, then the newest end first.</caption>"
    many = ' class="many"' if len(board.rows) > MANY else ""
    table = f'<table id="runs"{many}>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>'
    empty = "<p>No run is known yet: merge an experiment, and it will stand here.</p>"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">\n<meta name="robots" content="noindex">',
        f'<link rel="icon" href="data:,">\n<title>Run board{_named(board.place)}</title>',
        f"<style>{style}</style>\n</head>\n<body>",
        _top(board),
        _controls(board),
        f"<main>\n{table if board.rows else empty}\n</main>",
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _named(place: Place) -> str:
    return f" of {escape('/'.join(place.web.split('/')[-2:]))}" if place.web else ""


def _top(board: Board) -> str:
    name, totals = _named(board.place), board.totals
    if name:
        name = f' <small>of <a href="{escape(board.place.web)}">{name.removeprefix(" of ")}</a></small>'
    counts = [(state, count) for state, count in totals.states.items() if state in COUNTED]
    tiles = [
        (f"{totals.runs:,}", "run" if totals.runs == 1 else "runs"),
        *((f"{count:,}", state.value) for state, count in counts),
        (money(totals.month_usd), f"in {totals.month} (UTC)"),
        (money(totals.all_usd), "in all"),
        *([(money(totals.live_usd), "in open runs so far")] if totals.live_usd else []),
    ]
    shown = "".join(f"<div><dt>{words}</dt><dd>{number}</dd></div>" for number, words in tiles)
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes)
    notes = f'\n<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else ""
    made = f"Made {_time(board.now)} from the <code>run/</code> tags. Times are UTC, dollars are of rounds that ended."
    made = f'<p class="made">{made}</p>'
    return f"<header>\n<h1>Run board{name}</h1>\n{made}\n<dl>{shown}</dl>{notes}\n</header>"


def _controls(board: Board) -> str:
    """Hidden until the script is there to answer them."""
    chips = "".join(
        f'<button type="button" class="chip {state}" data-state="{state}" aria-pressed="false">'
        f"<b>{MARKS[state]}</b> {state} <span>{count:,}</span></button>"
        for state, count in board.totals.states.items()
    )
    options = "".join(f'<option value="{order}">{words}</option>' for order, words in ORDERS)
    return (
        '<div id="controls" role="search" hidden>\n'
        '<input id="filter" type="search" aria-label="Filter runs by any text" placeholder="Filter by any text" '
        'autocomplete="off" spellcheck="false">\n'
        f'<div role="group" aria-label="Show only these states">{chips}</div>\n'
        f'<div><label>Sort by <select id="order">{options}</select></label>'
        '<button type="button" id="turn" aria-label="Turn the order round">↓</button></div>\n'
        '<p id="count" role="status"></p>\n</div>'
    )


def _head(text: str, order: str) -> str:
    key = f' data-order="{order}"' if order else ""
    return f'<th scope="col"{key}>{text}</th>'


def _row(row: Row, now: datetime) -> str:
    m, said = row.metrics, row.said
    after, before = _loss(m.after), _loss(m.before)
    cells = [
        f"<b><i>{MARKS[row.state]}</i>{row.state}</b>",
        _lines(f"<strong>{after}</strong>" if after else "", f"from {before}" if before else ""),
        _lines(_change(m.change_percent), _against(row)),
        _training(row),
        _compact(m.tokens),
        duration(m.duration_s) if m.duration_s is not None else "",
        _lines(_usd(row.usd), _usd(said.expected_usd, " expected"), _usd(said.worst_usd, " at most")),
        _lines(_link(said.base, row.base_url), _link(said.dataset, row.dataset_url), escape(said.flavor)),
        _when(row, now),
        " ".join(_link(link.text, link.url) for link in row.links),
    ]
    state, *rest = [f"<td>{cell}</td>" for cell in cells]  # what is not known is empty: the style shows a dash
    name = f'<th scope="row">{_experiment(row)}</th>'
    return f'<tr class="{row.state}"{_keys(row, now)}>{state}{name}{"".join(rest)}</tr>'


def _keys(row: Row, now: datetime) -> str:
    """What the script sorts by; a key that is not there is not known, and comes last."""
    m, said = row.metrics, row.said
    at = row.at or (now if row.state in OPEN else None)
    values: dict[str, str | float | None] = {
        "state": list(State).index(row.state),
        "experiment": row.experiment,
        "before": m.before,
        "after": m.after,
        "change": m.change_percent,
        "train": m.train_loss,
        "eval": m.eval_loss,
        "tokens": m.tokens,
        "took": m.duration_s,
        "cost": row.usd,
        "expected": said.expected_usd,
        "worst": said.worst_usd,
        "base": said.base or None,
        "dataset": said.dataset or None,
        "flavor": said.flavor or None,
        "when": f"{at.timestamp():.0f}" if at else None,
    }
    known = ((key, value) for key, value in values.items() if value is not None)
    return "".join(f' data-{k}="{escape(v) if isinstance(v, str) else format(v, ".6g")}"' for k, v in known)


def _experiment(row: Row) -> str:
    name = _link(row.experiment, row.file_url)
    words = f"{row.text} {row.hint and f'→ {row.hint}'}".strip() if row.state is not State.DONE else ""
    parts = [f"{name} <code>{escape(row.run_id.removeprefix(f'{row.experiment}-'))}</code>"]
    parts += [f'<p class="words">{_prose(words)}</p>'] if words else []
    parts += [_folded(row.said.hypothesis)] if row.said.hypothesis else []
    return "".join(parts) + (_earlier(row.earlier) if row.earlier else "")


def _prose(text: str) -> str:
    """Words in which what stands between two backticks is code."""
    return CODE.sub(r"<code>\1</code>", escape(text))


def _folded(text: str) -> str:
    if len(text) <= FOLD:
        return f"<p>{escape(text)}</p>"
    at = text.rfind(" ", 0, FOLD) if " " in text[FOLD // 2 : FOLD] else FOLD
    head, rest = escape(text[:at]), escape(text[at:].strip())
    return f'<details class="more"><summary>{head}</summary><p>{rest}</p></details>'


def _earlier(rounds: Sequence[Round]) -> str:
    items = "".join(
        f"<li>round {one.number}: {MARKS[one.state]} {one.state}, {_usd(one.usd)}"
        f"{f', {_time(one.at)}' if one.at else ''}: {escape(one.text)}</li>"
        for one in rounds
    )
    count = plural(len(rounds), "earlier round")
    return f"<details><summary>{count}, {_usd(sum(one.usd for one in rounds))}</summary><ul>{items}</ul></details>"


def _change(percent: float | None) -> str:
    if percent is None:
        return ""
    kind = "better" if percent < 0 else "worse" if percent > 0 else "same"
    return f'<span class="{kind}">{_signed(percent)}</span>'


def _against(row: Row) -> str:
    if row.against_percent is None:
        return ""
    return f'<span title="against {escape(row.against)}">{_signed(row.against_percent)} vs previous</span>'


def _training(row: Row) -> str:
    train, held_out = _loss(row.metrics.train_loss), _loss(row.metrics.eval_loss)
    words = [f'<span class="t">train {train}</span>'] if train else []
    words += [f'<span class="e">held-out {held_out}</span>'] if held_out else []
    return loss_picture(row.said.train_curve, row.said.eval_curve) + "".join(words)


def _when(row: Row, now: datetime) -> str:
    if row.at is None:
        return ""
    ago = (now - row.at).total_seconds()
    since = f"for {duration(max(ago, 0))}" if row.state in OPEN else ""
    return _lines(_time(row.at), since)


def _lines(first: str, *more: str) -> str:
    """The first part, and the others that are known below it; nothing when none is."""
    below = "".join(f"<small>{part}</small>" for part in more if part)
    return (first or "–") + below if first or below else ""


def _link(text: str, url: str) -> str:
    return f'<a href="{escape(url)}">{escape(text)}</a>' if url else escape(text)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _signed(percent: float) -> str:
    """`−12.3 %`, with a minus as wide as a plus."""
    return (f"{percent:+.1f} %" if abs(percent) < 1e6 else f"{percent:+.2g} %").replace("-", "−")


def _usd(usd: float | None, words: str = "") -> str:
    return "" if usd is None else f"{money(usd)}{words}"


def _compact(count: float | None) -> str:
    """`812`, `4.1 k`, `12.4 M`."""
    if count is None:
        return ""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:,.3g}{unit}" if count < 1000 * size else f"{count / size:,.0f}{unit}"
    return f"{count:.0f}"


def _time(at: datetime) -> str:
    return f"<time>{at.astimezone(UTC):%Y-%m-%d %H:%M}</time>"
