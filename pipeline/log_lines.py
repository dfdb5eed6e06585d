"""A job's log taken apart: what each line is, and which tracebacks ended something. Knows no cause.

Colour, carriage returns and what launchers put in front (time, rank, level) are taken off. A line is of one kind:

- FRAME: inside a traceback. The code it quotes may hold any error message.
- FATAL: the message that ends a traceback after which training did not go on.
- OUTLIVED: the message of a traceback after which it did, or before a sign of life.
- QUIET: a warning or information.
- NOISE: known to be harmless.
- PLAIN: everything else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import redact
from pipeline.events import EVENT_PREFIX, parse_event
from pipeline.tracebacks import HEADER, Chain, Kind, is_step, read_tracebacks

LONGEST_LINE = 4000  # characters of a line that are looked at
MOST_CHARACTERS = 8_000_000  # of lines that differ; of more, the beginning and the end
SAME_SHAPE = 40  # lines that differ in digits alone: progress, retries, heartbeats
TAIL_KEPT = 400  # lines of the end, kept whatever they look like
TAIL_LINES = 40  # where a crash tells its cause

ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)?|[@-Z\\-_])")
DIGITS = str.maketrans("", "", "0123456789")
TIME = r"(?:\d{4}[-/]\d\d[-/]\d\d|\d\d/\d\d/\d{4})[T_ ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d| UTC)?"
RANK = re.compile(
    r"\[(?:rank|default|Rank |RANK:)?\d{1,4}\]:? ?|\(\w+(?:\([^)]{0,60}\))? (?:pid|PID)=\d+(?:, ip=[\d.]+)?\) ?"
    r"|\d{1,2}: |[\w.-]{1,60} +\| |(?:node|worker|master|rank)[-_ ]?\d+: |[\w.-]{1,60} logs: "
)
PREFIX = re.compile(
    rf"\[?{TIME}\]? ?|\[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]? |[A-Z][a-z]{{2}} +\d+ \d\d:\d\d:\d\d (?:[\w.-]+ )?"
    r"|std(?:out|err) [FP] |>{1,2} |[\w.]{1,80}:\d+ >> |##\[error\]|\[(?:PID|RANK):\d+\] ?"
    r"|[EWIF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w/. -]{1,100}:\d+\] ?"
    r"|\[[\w./<>-]{1,80}(?::[\w<>.-]{1,60}){1,3}\] ?|- (?=[A-Z])|\[-?\d+\] (?=\[)"
)
LEVEL = re.compile(
    r"\[?(ERROR|CRITICAL|FATAL|WARNING|WARN|INFO|DEBUG)(?:\|[^\]\n]{1,80}\] ?|\]:?|:| -| \||(?= )) *(?:[\w.]+ - )?"
    r"|\[?(error|warning|info)(?:\]:?|:) *"
)
WARNING = re.compile(r"\b\w{0,40}Warning: ")
BAR = re.compile(r" {0,3}\d+%\|[^|]{0,200}\| *(\d+)/(\d+)")  # of training: those of loading and mapping have a name
# Words of lines that stand in healthy logs too.
HARMLESS = (
    "Retrying in ",
    "Retrying (Retry",
    "etrying after",
    "thrown while requesting",
    "tried again in",
    "asked again",
    "Trying to resume download",
    "will retry",
    "Retry attempt",
    "retry 1",
    "Failed to load CPU gemm",
    "incompatible with gradient checkpointing",
    "Exception ignored in",
    "Token indices sequence length is longer",
    "is deprecated and will be removed",
    "huggingface/tokenizers: The current process just got forked",
    "Some weights of",
    "Unable to register cu",
    "computation placer already registered",
    "TF-TRT Warning",
    "Could not find TensorRT",
    "Could not load library libcudart",
    "Unknown RoPE type: default",
    "Duplicated key name",
    "Unknown separator token",
    "falling back to",
    "Falling back to",
    "destroy_process_group() was not called",
    "You can safely ignore",
    "No device id is provided",
    "cuda capability",
    "Setting `pad_token_id`",
    "Error in sys.excepthook",
    "Setting OMP_NUM_THREADS",
)
LIFE_EVENTS = ("step", "eval", "pushed", "published", "end")


@dataclass(frozen=True)
class Log:
    """The kept lines of a log, cleaned, with what each is. `last_step` is the last line with a loss."""

    lines: tuple[str, ...]
    kinds: tuple[Kind, ...]
    chains: tuple[Chain, ...]
    chain_at: dict[int, int]
    alive: int  # position of the last sign of life
    last_step: str
    tail: int  # where the last lines begin

    def start_of(self, position: int) -> int:
        """The first message of the chain that a line belongs to; a line of none is its own start."""
        number = self.chain_at.get(position)
        return position if number is None else self.chains[number].messages[0]

    def is_fatal(self, chain: Chain) -> bool:
        """Whether it ended something."""
        return bool(chain.heads) and self.kinds[chain.heads[-1]] is Kind.FATAL


def read_log(text: str) -> Log:
    """The log taken apart."""
    kept: list[str] = []
    tags: list[str] = []
    levels: list[str] = []
    alive, last_step = -1, ""
    bars: dict[str, int] = {}
    for raw in _kept(_cut(text)):
        line, tag, level = _bare(raw)
        if is_step(line):
            alive, last_step = len(kept), line
        elif _is_life(line, bars):
            alive = len(kept)
        kept.append(line)
        tags.append(tag)
        levels.append(level)
    kinds = [_kind(line, level) for line, level in zip(kept, levels, strict=True)]
    chains = read_tracebacks(kept, tags, kinds)
    chain_at = {}
    for number, chain in enumerate(chains):
        for position in chain.messages:
            chain_at[position] = number
            kinds[position] = Kind.OUTLIVED if chain.end < alive else Kind.FATAL
            if chain.harmless:
                kinds[position] = Kind.NOISE
    return Log(tuple(kept), tuple(kinds), tuple(chains), chain_at, alive, last_step, _tail(kinds))


def _cut(text: str) -> str:
    """A log of any size made one that can be read: its beginning and its end."""
    limit = 4 * MOST_CHARACTERS
    return text if len(text) <= limit else f"{text[: limit // 4]}\n{text[-3 * limit // 4 :]}"


def _kept(text: str) -> list[str]:
    """The lines, of those that differ in digits alone the first and the last ones, of too many the ends."""
    if "\x1b" in text:
        text = ANSI.sub("", text)
    if f"{HEADER}:\\n" in text:  # a child's output, printed by its parent as the text of bytes
        text = text.replace("\\n", "\n").replace("\\'", "'")
    lines = [_bounded(part) for part in re.split(r"[\r\n]+", text) if part.strip()]
    seen: dict[str, int] = {}
    kept, tail = [], len(lines) - TAIL_KEPT
    for position, line in enumerate(lines):
        shape = line.translate(DIGITS)
        seen[shape] = seen.get(shape, 0) + 1
        if seen[shape] <= SAME_SHAPE or position >= tail or is_step(line):
            kept.append(line)
    return list(_within(kept))


def _bounded(line: str) -> str:
    """A line's beginning and end: a launcher prints its whole command, and then how it ended."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]}…{line[-LONGEST_LINE // 2 :]}"


def _within(lines: list[str]) -> Iterator[str]:
    """The lines, without some from the middle when they are too many."""
    total = sum(map(len, lines))
    if total <= MOST_CHARACTERS:
        yield from lines
        return
    begun, left = 0, total
    for line in lines:
        begun += len(line)
        if begun <= MOST_CHARACTERS // 4 or left <= 3 * MOST_CHARACTERS // 4:
            yield line
        left -= len(line)


def _bare(line: str) -> tuple[str, str, str]:
    """A line without what stands in front of it, whose process it is of, and its level."""
    tag, level = "", ""
    for _ in range(6):
        if found := RANK.match(line):
            tag += found[0].strip()
        elif found := LEVEL.match(line):
            level = (found[1] or found[2]).upper()
        elif not (found := PREFIX.match(line)):
            break
        if found.end() == 0:
            break
        line = line[found.end() :]
    return line.rstrip(), tag, level


def _is_life(line: str, bars: dict[str, int]) -> bool:
    """Something goes on: an event of progress, or a bar that has moved since it was last seen."""
    if line.startswith(EVENT_PREFIX):
        event = parse_event(line)
        return event is not None and event["event"] in LIFE_EVENTS
    if "%|" not in line or not (bar := BAR.match(line)):
        return False
    before, now = bars.get(bar[2], 0), int(bar[1][:12])
    bars[bar[2]] = max(before, now)
    return now > before


def _tail(kinds: list[Kind]) -> int:
    """Where the last lines begin that say something."""
    left = TAIL_LINES
    for position in range(len(kinds) - 1, -1, -1):
        left -= kinds[position] not in (Kind.QUIET, Kind.NOISE)
        if not left:
            return position
    return 0


def _kind(line: str, level: str) -> Kind:
    """What a line is by itself, outside of tracebacks."""
    if line.startswith(EVENT_PREFIX) or any(word in line for word in HARMLESS):
        return Kind.NOISE
    quiet = level in ("WARNING", "WARN", "INFO", "DEBUG") or line.startswith(("note:", "hint:"))
    return Kind.QUIET if quiet or WARNING.search(line) else Kind.PLAIN


def clipped(text: str, limit: int) -> str:
    """Text of a log that may be shown: without access tokens, and no longer than that."""
    text = redact(text.strip())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
