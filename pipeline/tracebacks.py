"""Tracebacks in a log, whoever printed them: Python, a notebook, rich, several processes at once. Knows no cause."""

import re
from dataclasses import dataclass, field
from enum import Enum, auto

MESSAGE_LINES = 12  # an exception's message may go on below its first line
INDENTED = ("  ", "\t")
HEADER = "Traceback (most recent call last)"
JOINERS = ("During handling of the above exception", "The above exception was the direct cause")
EXCEPTION = re.compile(r"(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Timeout|Exit|StopIteration)(?::|$)")


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


def read_tracebacks(lines: list[str], tags: list[str], kinds: list[Kind]) -> list[Chain]:
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
        elif reader.message and kinds[position] is Kind.PLAIN and not is_step(line):
            _say(chains[reader.chain], position, head=False)
            reader.message -= 1
        elif kinds[position] is Kind.PLAIN and EXCEPTION.match(line):
            chains.append(Chain())  # its traceback was mixed up with another process's, or cut off
            _say(chains[-1], position, head=True)
        else:
            reader.message = 0
            reader.harmless = "Exception ignored in" in line or "--- Logging error ---" in line
    return chains


def is_step(line: str) -> bool:
    """Whether a line is one step's numbers, as the trainer logs them."""
    return ("'loss':" in line or '"loss":' in line) and ("{" in line)


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
