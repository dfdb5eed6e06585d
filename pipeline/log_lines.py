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
from dataclasses import dataclass, field
from enum import Enum, auto

from pipeline.errors import redact
from pipeline.events import EVENT_PREFIX, parse_event

LONGEST_LINE = 4000  # characters of a line that are looked at
MOST_CHARACTERS = 8_000_000  # of lines that differ; of more, the beginning and the end
SAME_SHAPE = 40  # lines that differ in digits alone: progress, retries, heartbeats
TAIL_KEPT = 400  # lines of the end, kept whatever they look like
TAIL_LINES = 40  # where a crash tells its cause
MESSAGE_LINES = 12  # an exception's message may go on below its first line

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
INDENTED = ("  ", "\t")
HEADER = "Traceback (most recent call last)"
JOINERS = ("During handling of the above exception", "The above exception was the direct cause")
EXCEPTION = re.compile(r"(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Timeout|Exit|StopIteration)(?::|$)")
WARNING = re.compile(r"\b\w{0,40}Warning: ")
BAR = re.compile(r"\d+%\|[^|]{0,200}\| *(\d+)/(\d+)")
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


class Kind(Enum):
    """What a line is."""

    PLAIN = auto()
    QUIET = auto()
    NOISE = auto()
    FRAME = auto()
    FATAL = auto()
    OUTLIVED = auto()


@dataclass
class Chain:
    """Tracebacks that belong together, as Python joins them; numbers are positions in the log's kept lines."""

    frames: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)  # first lines of the messages
    messages: list[int] = field(default_factory=list)
    harmless: bool = False
    end: int = 0


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
        if _is_step(line):
            alive, last_step = len(kept), line
        elif _is_life(line, bars):
            alive = len(kept)
        kept.append(line)
        tags.append(tag)
        levels.append(level)
    kinds = [_kind(line, level) for line, level in zip(kept, levels, strict=True)]
    chains = _tracebacks(kept, tags, kinds)
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
        text = text.replace("\\n", "\n")
    lines = [part[:LONGEST_LINE] for part in re.split(r"[\r\n]+", text) if part.strip()]
    seen: dict[str, int] = {}
    kept, tail = [], len(lines) - TAIL_KEPT
    for position, line in enumerate(lines):
        shape = line.translate(DIGITS)
        seen[shape] = seen.get(shape, 0) + 1
        if seen[shape] <= SAME_SHAPE or position >= tail or _is_step(line):
            kept.append(line)
    return list(_within(kept))


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


def _is_step(line: str) -> bool:
    return ("'loss':" in line or '"loss":' in line) and ("{" in line)


def _is_life(line: str, bars: dict[str, int]) -> bool:
    """Something goes on: an event of progress, or a bar that has moved since it was last seen."""
    if line.startswith(EVENT_PREFIX):
        event = parse_event(line)
        return event is not None and event["event"] in LIFE_EVENTS
    if "%|" not in line or not (bar := BAR.search(line)):
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


@dataclass
class _Reader:
    """How far the traceback of one process has been read."""

    chain: int = -1
    frames: bool = False
    message: int = 0  # lines that the message may still go on
    joined: bool = False
    code: bool = False  # the next line quotes code, although nothing is indented
    form: str = ""  # `box`: drawn by rich; `notebook`: without `File` lines
    name: str = ""  # of the exception, which a notebook says first
    harmless: bool = False


def _tracebacks(lines: list[str], tags: list[str], kinds: list[Kind]) -> list[Chain]:
    """Every traceback, those of different processes apart; marks their frames in `kinds`."""
    chains: list[Chain] = []
    readers: dict[str, _Reader] = {}
    for position, line in enumerate(lines):
        reader = readers.setdefault(tags[position], _Reader())
        if HEADER in line:
            _begin(reader, chains, line)
            kinds[position] = Kind.FRAME
            chains[reader.chain].frames.append(position)
        elif reader.frames and _is_frame(reader, line):
            kinds[position] = Kind.FRAME
            chains[reader.chain].frames.append(position)
        elif reader.frames:
            reader.frames, reader.message = False, MESSAGE_LINES
            _say(chains[reader.chain], position, head=True)
        elif line.startswith(JOINERS):
            reader.joined = reader.chain >= 0
            kinds[position] = Kind.FRAME
        elif reader.message and kinds[position] is Kind.PLAIN and not _is_step(line):
            _say(chains[reader.chain], position, head=False)
            reader.message -= 1
        elif kinds[position] is Kind.PLAIN and EXCEPTION.match(line):
            chains.append(Chain())  # its traceback was mixed up with another process's, or cut off
            _say(chains[-1], position, head=True)
        else:
            reader.message = 0
            reader.harmless = "Exception ignored in" in line or "--- Logging error ---" in line
    return chains


def _begin(reader: _Reader, chains: list[Chain], line: str) -> None:
    if not reader.joined:
        chains.append(Chain(harmless=reader.harmless))
        reader.chain = len(chains) - 1
    reader.frames, reader.message, reader.joined, reader.harmless = True, 0, False, False
    reader.code = False
    boxed = "─" in line or line.startswith("+-")
    reader.form = "box" if boxed else "" if f"{HEADER}:" in line else "notebook"
    reader.name = line.partition(" ")[0] if reader.form == "notebook" else ""


def _is_frame(reader: _Reader, line: str) -> bool:
    """Whether a line still belongs to the calls of a traceback; its message comes after them."""
    if reader.form == "box":
        return line.startswith(("│", "╰", "└", "|"))
    if reader.form == "notebook":
        return not line.startswith(f"{reader.name}:") and EXCEPTION.match(line) is None
    quoted, reader.code = reader.code, line.startswith('File "')  # a logger that strips its lines
    mixed = not line.strip("^~ ") or ('File "' in line and '", line ' in line)  # with another process's
    plain = reader.code or (quoted and EXCEPTION.match(line) is None)
    return plain or mixed or line.startswith((*INDENTED, "[Previous line"))


def _say(chain: Chain, position: int, *, head: bool) -> None:
    chain.messages.append(position)
    if head:
        chain.heads.append(position)
    chain.end = position


def clipped(text: str, limit: int) -> str:
    """Text of a log that may be shown: without access tokens, and no longer than that."""
    text = redact(text.strip())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
