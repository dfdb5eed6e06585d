"""What a cause of failure is, and how its patterns are found in a line. Knows no log and no experiment.

A pattern is the text that a library prints. `*` stands for anything, `{word}` for anything that the cause or the fix
repeats, `^` and `$` for the ends of the line. There are no regular expressions: looking for the literal parts one after
the other takes time in proportion to the line, whatever a hostile log holds.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from pipeline.errors import redact

LONGEST_WORD = 80  # characters of a log that a cause or a fix repeats


class Weight(IntEnum):
    """How much the words alone prove.

    STRONG explains itself wherever it stands; PLAIN, when it ended a process, or when nothing else did; WEAK is often
    repeated with success, or follows from something else; LAST says only that something failed.
    """

    LAST = 0
    WEAK = 1
    PLAIN = 2
    STRONG = 3


@dataclass(frozen=True)
class Pattern:
    """The text of a log line with holes in it."""

    text: str

    def match(self, line: str) -> dict[str, str] | None:
        """The words in the holes that have a name, or None when the line is not like this."""
        at, words, hole = 0, {}, ""
        for index, part in enumerate(self._parts):
            if index % 2:
                hole = part
                continue
            found = line.find(part, at) if not (self._to_end and index == len(self._parts) - 1) else line.rfind(part)
            if found < at or (index == 0 and self._from_start and found > 0):
                return None
            if hole.startswith("{"):
                words[hole[1:-1]] = _word(line[at:found])
            at, hole = found + len(part), ""
        if self._to_end and at < len(line):
            return None
        if self._parts[-1] == "" and len(self._parts) > 1 and self._parts[-2].startswith("{"):
            words[self._parts[-2][1:-1]] = _word(line[at:].partition(" ")[0].rstrip(".,;:"))
        return words

    @cached_property
    def needle(self) -> str:
        """The longest text that is in every such line."""
        return max(self._parts[::2], key=len)

    @cached_property
    def _parts(self) -> list[str]:
        """Literal texts, and between them the holes."""
        text = self.text.removeprefix("^")
        return re.split(r"(\*|\{[a-z]+\})", text[:-1] if self._to_end else text)

    @cached_property
    def _from_start(self) -> bool:
        return self.text.startswith("^")

    @cached_property
    def _to_end(self) -> bool:
        return self.text.endswith("$")


@dataclass(frozen=True)
class Cause:
    """A way to fail: its words in a log, what it means, and what to do about it.

    `cause` and `fix` may hold `{word}` of a pattern; `fix` also `{stage}`, `{name}`, `{namespace}`, `{path}`, `{base}`,
    `{dataset}`, `{repo}` and `{learning_rate}` of the experiment. `within`: one of these stands in the traceback above
    the line. `unless`: none of these stands anywhere in the log. `rule` is the preflight rule that looks for it.
    """

    id: str
    cause: str
    texts: tuple[str, ...]
    fix: str
    transient: bool = False
    rule: str = ""
    weight: Weight = Weight.PLAIN
    within: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The texts, taken apart."""
        return tuple(Pattern(text) for text in self.texts)


def fill(text: str, words: dict[str, str]) -> str:
    """The text with words of the log in it; what has no word stays as it is."""
    for name, word in words.items():
        text = text.replace(f"{{{name}}}", word)
    return text


def _word(text: str) -> str:
    """Text of a log for the middle of a sentence: short, and no token, line end, code mark or place to fill in it."""
    text = " ".join(redact(text.strip(" '\"`")).replace("`", "'").split()).replace("{", "(").replace("}", ")")
    return text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 1]}…"
