"""What a rule is and what it is given. Holds no rule."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import Finding, Severity
from pipeline.facts import Facts
from pipeline.loader import ExperimentFile
from pipeline.settings import Settings


@dataclass(frozen=True)
class Subject:
    """One experiment with everything looked up about it."""

    file: ExperimentFile
    facts: Facts
    settings: Settings


@dataclass(frozen=True)
class Verdict:
    """What a rule found at a dotted key of the file, before it carries the rule's id."""

    key: str
    message: str
    hint: str
    severity: Severity = Severity.ERROR


@dataclass(frozen=True)
class Rule:
    """An id and its check; the check's docstring is its page in the reference."""

    id: str
    check: Callable[[Subject], Verdict | None]

    @property
    def title(self) -> str:
        """The first line of its page."""
        return inspect.cleandoc(self.check.__doc__ or "").partition("\n")[0]

    @property
    def link(self) -> str:
        """Where its page is, as GitHub names the place."""
        heading = re.sub(r"[^\w -]", "", f"{self.id}: {self.title}".lower())
        return f"docs/rules.md#{heading.replace(' ', '-')}"

    def run(self, subject: Subject) -> Finding | None:
        """The finding at its place in the file, or None."""
        verdict = self.check(subject)
        if verdict is None:
            return None
        at = subject.file.at(verdict.key)
        return Finding(self.id, verdict.severity, at, verdict.message, verdict.hint)
