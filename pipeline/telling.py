"""The lines of a log that tell most about a failure nobody knows. Names no cause."""

import re

from pipeline.log_lines import Log, clipped
from pipeline.tracebacks import Kind

MOST_LINES, LONGEST = 15, 200
# Words that healthy lines hardly hold.
WORRY = re.compile(r"(?i)\b(?:error|failed|failure|fatal|cannot|can't|could not|unable|invalid|missing|abort|not)\b")
FILE = re.compile(r'^\s*File "([^"]{1,300})", line \d+')
FOREIGN = ("site-packages", "dist-packages", "/lib/python", "<frozen", "/usr/lib")


def telling_lines(log: Log) -> tuple[str, ...]:
    """At most fifteen lines, in the order of the log: what was raised, where in the user's code, what complained."""
    heads = {head for chain in log.chains if log.is_fatal(chain) for head in chain.heads}
    worth = [_worth(log, position, heads) for position in range(len(log.lines))]
    ranked = sorted(range(len(worth)), key=lambda position: (-worth[position], -position))
    chosen = sorted(position for position in ranked[:MOST_LINES] if worth[position] > 0)
    return tuple(clipped(log.lines[position], LONGEST) for position in chosen)


def _worth(log: Log, position: int, heads: set[int]) -> int:
    line, kind = log.lines[position], log.kinds[position]
    if kind is Kind.FATAL:
        return 9 if position in heads else 4
    if kind is Kind.FRAME:
        file = FILE.match(line)
        if file:
            return 3 if any(word in file[1] for word in FOREIGN) else 6
        return 1
    if kind is Kind.NOISE:
        return 0
    if kind in (Kind.QUIET, Kind.OUTLIVED):
        return 1 if WORRY.search(line) else 0
    if WORRY.search(line):
        return 5
    return 2 if position >= len(log.lines) - MOST_LINES else 0
