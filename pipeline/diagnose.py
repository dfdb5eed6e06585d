"""A failed job's log to its cause. Pure: the whole log is searched, and the likeliest of all matches is the cause.

Told first, in this order: the server's reason; the job script's own `error` event, which knows best. Else every known
cause (pipeline/causes/) is looked for in every line, and the strongest match wins; of equally strong ones the earliest,
because what comes later often follows from it (within one chain of tracebacks, the first in the table of causes):

| where the words stand                                       | STRONG | PLAIN | WEAK | LAST |
|-------------------------------------------------------------|--------|-------|------|------|
| the message of a traceback that ended a process             | 7      | 6     | 4    | 2    |
| a plain line, with no sign of life after it                 | 5      | 3     | 1 *  | 1    |
| a plain line, or a traceback, that training outlived        | 3      | 2     | –    | –    |

(*) only among the last lines: a request that was repeated with success stands further up.

A traceback that ended a process and whose message shows no known cause counts 4 itself: it makes the cause unknown.
Code that a traceback quotes, warnings, and lines known to be harmless count for nothing. In a chain of tracebacks all
messages count, so a special cause at its root wins over a general one at its end, and the other way round.

Only a lost machine, a GPU that did not start, another node that is not there, and a server's or network's bad minute
may pass with a new attempt. What is not known is not retried: a retry costs money.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.causes import LOG_CAUSES, SERVER_CAUSES, Cause, Pattern, Weight, fill
from pipeline.events import parse_event
from pipeline.log_lines import Log, clipped, read_log
from pipeline.loss_trend import loss_trend
from pipeline.oom import part_of
from pipeline.telling import telling_lines
from pipeline.tracebacks import EXCEPTION, Chain, Kind

LONGEST = 300  # characters of a log line worth showing
MOST_HITS = 100  # of one pattern, from each end of the log
SCORES = {
    Kind.FATAL: {Weight.STRONG: 7, Weight.PLAIN: 6, Weight.WEAK: 4, Weight.LAST: 2},
    Kind.PLAIN: {Weight.STRONG: 5, Weight.PLAIN: 3, Weight.WEAK: 1, Weight.LAST: 1},
    Kind.OUTLIVED: {Weight.STRONG: 3, Weight.PLAIN: 2},
}
UNKNOWN_SCORE = 4
NOT_KNOWN = "not known"


@dataclass(frozen=True)
class Diagnosis:
    """Why a job failed: the cause, the line that shows it, whether a new attempt may pass, and what to do.

    `id` names the cause in docs/diagnoses.md (empty: not known); `rule` the preflight rule that looks for it; `lines`
    are the most telling ones of a log whose cause is not known. `hint` holds places such as `{stage}`: `remedy` fills
    them.
    """

    cause: str
    evidence: str
    transient: bool
    hint: str
    id: str = ""
    rule: str = ""
    lines: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether a cause was found."""
        return self.cause != NOT_KNOWN


@dataclass(frozen=True)
class _Match:
    """One cause at one line."""

    rank: tuple[int, ...]  # minus its score, start of its traceback, places of cause and pattern, position: least wins
    cause: Cause
    words: dict[str, str]
    needle: str

    @property
    def position(self) -> int:
        return self.rank[-1]


def diagnose(log: str, message: str = "") -> Diagnosis:
    """The cause of a failure from the server's reason and the job's log; both may be empty."""
    if told := diagnose_message(message):
        return told
    taken = read_log(log)
    if told := _error_event(taken):
        return told
    if not taken.lines:
        return _of_text(message) or Diagnosis("the job left no log", clipped(message, LONGEST), True, "", "no-log")
    matches = list(_matches(taken))
    found = min(matches, key=lambda match: match.rank, default=None)
    unknown = _first_unknown(taken, matches)
    is_quiet = unknown is None and (found is None or found.cause.weight is Weight.LAST)
    if is_quiet and (said := _of_text(message) or _flat(taken)):
        return said
    if found is not None and (unknown is None or _beats(found, unknown)):
        line = _around(found.needle, taken.lines[found.position])
        return _with_part(taken, found, _diagnosis(found.cause, found.words, line))
    evidence = taken.lines[unknown.heads[-1]] if unknown else taken.lines[-1]
    hint = "read the job's log"
    return Diagnosis(NOT_KNOWN, clipped(evidence, LONGEST), False, hint, lines=telling_lines(taken))


def diagnose_message(message: str) -> Diagnosis | None:
    """The cause as the server itself names it; None when it says nothing that is known."""
    said = _of_text(message)
    if said is not None and said.id in ("host-oom", "disk-full") and "low on resource" in message:
        return said  # the machine evicted the job for what the job took
    lower = message.lower()
    for cause in SERVER_CAUSES:
        if any(pattern.match(lower) is not None for pattern in cause.patterns):
            return _diagnosis(cause, {}, message)
    return None


def _of_text(text: str) -> Diagnosis | None:
    """The first strong cause in a line of the server that no log explains: `exit code: 137`."""
    for cause in LOG_CAUSES:
        if cause.weight >= Weight.PLAIN:
            for pattern in cause.patterns:
                if (words := pattern.match(text)) is not None and not cause.within:
                    return _diagnosis(cause, words, text)
    return None


def _flat(log: Log) -> Diagnosis | None:
    """No failure at all, only a training that learnt nothing."""
    if log.chains or (trend := loss_trend(log.lines)) is None or trend.falls:
        return None
    cause = f"the loss did not fall: {trend.first:.3g} at first, {trend.last:.3g} at last"
    hint = "a tenth of `train.learning_rate`; look at the rows, and at what the loss counts (`train.loss_on`)"
    return Diagnosis(cause, clipped(log.last_step, LONGEST), False, hint, "loss-not-falling", "TRN008")


def _error_event(log: Log) -> Diagnosis | None:
    """What the job script itself said: it knows best, and marks what a new attempt may pass."""
    for line in log.lines:
        event = parse_event(line)
        if event is not None and event["event"] == "error":
            message, hint = str(event.get("message", "")), str(event.get("hint", ""))
            like = _of_text(message)
            known = Diagnosis(
                clipped(message, LONGEST),
                clipped(line, LONGEST),
                event.get("transient") is True,
                clipped(hint, LONGEST),
                "script",
            )
            return replace(known, id=like.id, rule=like.rule) if like else known
    return None


def _matches(log: Log) -> Iterator[_Match]:
    """Every known cause at every line that shows it."""
    text = "\n".join(log.lines)
    starts = [0]
    for line in log.lines:
        starts.append(starts[-1] + len(line) + 1)
    for order, cause in enumerate(LOG_CAUSES):
        if any(word in text for word in cause.unless):
            continue
        for place, pattern in enumerate(cause.patterns):
            for position in _hits(text, pattern, starts):
                score = _score(log, cause, position)
                if score is not None and (words := pattern.match(log.lines[position])) is not None:
                    yield _Match((-score, log.start_of(position), order, place, position), cause, words, pattern.needle)


def _hits(text: str, pattern: Pattern, starts: list[int]) -> Iterator[int]:
    """The lines that may match: the first ones from the beginning, the last ones from the end."""
    at, hits = text.find(pattern.needle), 0
    while at >= 0 and hits < MOST_HITS:
        position = bisect.bisect_right(starts, at) - 1
        yield position
        hits, at = hits + 1, text.find(pattern.needle, starts[position + 1])
    end, hits = len(text) if at >= 0 else 0, 0
    while end > at and hits < MOST_HITS and (last := text.rfind(pattern.needle, at, end)) >= 0:
        position = bisect.bisect_right(starts, last) - 1
        yield position
        hits, end = hits + 1, starts[position]


def _score(log: Log, cause: Cause, position: int) -> int | None:
    """How much a match at this line counts; None when not at all."""
    kind = log.kinds[position]
    if cause.within and not _stands_within(log, cause, position):
        return None
    if kind is Kind.FATAL:
        return SCORES[kind][cause.weight]
    if cause.id == "nan-loss" and log.last_step and "nan" not in log.last_step.lower():
        return None  # mixed precision skips such a step, and goes on
    if cause.weight <= Weight.WEAK and position < log.tail:
        return None
    if kind is Kind.PLAIN and position < log.alive:
        kind = Kind.OUTLIVED
    return SCORES.get(kind, {}).get(cause.weight)


def _stands_within(log: Log, cause: Cause, position: int) -> bool:
    """Whether the traceback of this message passes where the cause asks for."""
    number = log.chain_at.get(position)
    if number is None:
        return False
    return any(word in log.lines[frame] for frame in log.chains[number].frames for word in cause.within)


def _first_unknown(log: Log, matches: list[_Match]) -> Chain | None:
    """The first traceback that ended a process and shows no known cause; one with the name of an exception, if any."""
    known = {log.chain_at.get(match.position) for match in matches}
    unknown = [chain for number, chain in enumerate(log.chains) if number not in known and log.is_fatal(chain)]
    named = (chain for chain in unknown if EXCEPTION.match(log.lines[chain.heads[-1]]))
    return next(named, unknown[0] if unknown else None)


def _beats(found: _Match, unknown: Chain) -> bool:
    """A match against a traceback that nobody knows: the stronger one, or the earlier one."""
    return found.rank[:2] < (-UNKNOWN_SCORE, unknown.heads[0])


def _around(needle: str, line: str) -> str:
    """A line from its beginning; a long one from shortly before what matters, which may stand at its end."""
    at = line.find(needle)
    if at + len(needle) < LONGEST:
        return line
    start = max(0, min(at - LONGEST // 3, len(line) - LONGEST + 1))
    return f"…{line[start:]}"


def _with_part(log: Log, found: _Match, known: Diagnosis) -> Diagnosis:
    """Which tensors did not fit the GPU, where the traceback tells."""
    number = log.chain_at.get(found.position)
    if known.id != "cuda-oom" or number is None:
        return known
    part = part_of([log.lines[frame] for frame in log.chains[number].frames if frame < found.position])
    return replace(known, cause=f"{known.cause}: {part} did not fit") if part else known


def _diagnosis(cause: Cause, words: dict[str, str], line: str) -> Diagnosis:
    return Diagnosis(
        fill(cause.cause, words),
        clipped(line, LONGEST),
        cause.transient,
        fill(cause.fix, words),
        cause.id,
        cause.rule,
    )
