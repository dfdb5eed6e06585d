"""Pieces of Markdown as GitHub reads it, in which untrusted text cannot act. Knows no plan and no run."""

import re
from collections.abc import Sequence

from pipeline.errors import redact

ZWNJ = "\N{ZERO WIDTH NON-JOINER}"  # shown as nothing, and what it stands in is no mention, reference or link
# Controls (less tab and line feed), invisible characters, line separators, text direction, half surrogates, tags.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0e"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
# `&` too: GitHub looks for mentions after entities such as `&commat;` were decoded. `$` opens formulas.
MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~!&$])")
Cells = Sequence[str]


def visible(text: str) -> str:
    """Untrusted text without access tokens, invisible characters and the start of an HTML comment."""
    shown = INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", redact(text))
    return shown.replace("<!--", f"<{ZWNJ}!--")


def defang(text: str) -> str:
    """Untrusted text for one line of Markdown: markup, mentions, references, links and controls made inert."""
    line = re.sub(r"\s*\n\s*|\t", " ", visible(text)).strip()
    escaped = MARKUP.sub(r"\\\1", line)
    # What would begin a list, a heading's underline or a rule at the start of a line.
    escaped = re.sub(r"^([-+=])", r"\\\1", re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped))
    escaped = re.sub(r"([@#])", rf"\1{ZWNJ}", escaped)
    return re.sub(r"(?i)(:(?=//)|\bwww(?=\.)|\bGH(?=-\d))", rf"\1{ZWNJ}", escaped)


def prose(text: str) -> str:
    """One line of our words with untrusted ones inside: what stands between two backticks becomes code."""
    parts = re.sub(r"\s*\n\s*", " ", text).split("`")
    if len(parts) % 2 == 0:
        return defang(text)
    inner = [code(part) if index % 2 else _between(part) for index, part in enumerate(parts)]
    return "".join(inner).strip()


def code(text: str, limit: int = 200) -> str:
    """Untrusted text as inline code; nothing in it acts. An empty one is a dash."""
    line = " ".join(visible(text).split())
    line = line if len(line) <= limit else f"{line[: limit - 1]}…"
    if not line:
        return "–"
    marks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{marks}{pad}{line}{pad}{marks}"


def quote(text: str) -> str:
    """Untrusted text as a block quote: no mention, reference, HTML or fence in it acts."""
    return "\n".join(f"> {defang(line)}" for line in text.strip().splitlines() or [""])


def fence(text: str, language: str = "text") -> str:
    """Untrusted text as a code block, behind a fence longer than any run of backticks in it."""
    shown = visible(text).strip()
    marks = "`" * max(3, _longest_run(shown) + 1)
    return f"{marks}{language}\n{shown}\n{marks}"


def table(head: Cells, rows: Sequence[Cells], align: str) -> str:
    """A table of cells that are Markdown already; `align` has `l` or `r` for every column."""
    rule = "|" + "|".join({"l": "---", "r": "--:"}[side] for side in align) + "|"
    return "\n".join([_row(head), rule, *(_row(row) for row in rows)])


def details(summary: str, body: str) -> str:
    """A body that is folded away under a summary; both are Markdown already (the summary: plain words)."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def money(usd: float) -> str:
    """Dollars; cents only as far as they matter."""
    return f"${usd:.4f}" if 0 < usd < 0.01 else f"${usd:,.2f}"


def size(count: float) -> str:
    """Bytes in decimal units, as file listings and the Hub show them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def percent(part: float, whole: float) -> str:
    """`67 %`; `<1 %` and `>99 %` where rounding would say nothing or all."""
    if not whole:
        return "0 %"
    share = 100 * part / whole
    if 0 < share < 1:
        return "<1 %"
    return ">99 %" if 99 < share < 100 else f"{share:.0f} %"


def plural(count: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _row(cells: Cells) -> str:
    """One line; a pipe inside a cell is escaped, in code too, which is how GitHub's tables want it."""
    return "| " + " | ".join(re.sub(r"(\\*)\|", _escaped_pipe, cell) for cell in cells) + " |"


def _escaped_pipe(found: re.Match[str]) -> str:
    """An odd number of backslashes and the pipe: pairs of them are backslashes of their own."""
    return found[1] + ("" if len(found[1]) % 2 else "\\") + "|"


def _between(text: str) -> str:
    """Defanged, with the spaces that stand beside code."""
    before, after = " " * text.startswith(" "), " " * (text.endswith(" ") and bool(text.strip()))
    return f"{before}{defang(text)}{after}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
