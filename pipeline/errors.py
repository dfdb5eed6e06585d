"""What can be wrong and where: places, findings and the one exception a user ever sees. Prints nothing."""

import re
from dataclasses import dataclass
from enum import StrEnum

# Access tokens by their issuers' prefixes: Hugging Face (classic, OAuth, trusted publisher), GitHub, OpenAI-style, AWS.
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_(?:oauth|jwt|app)_[\w.-]{4,}|hf_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})"
)


def redact(text: str) -> str:
    """The text with every access token in it replaced: a message must not publish what a file should not hold."""
    return TOKEN.sub("<token>", text)


def excerpt(value: object) -> str:
    """A value for a message: at most 60 characters, and never a token."""
    text = redact(str(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


@dataclass(frozen=True, order=True)
class Place:
    """A position in a file, counted from 1; line 0 means the whole file."""

    path: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}" if self.line else self.path


class Severity(StrEnum):
    """How much a finding matters: an error stops a launch, a warning is for the reviewer."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """What a rule (or the schema) reports about one place of one experiment."""

    rule: str
    severity: Severity
    at: Place
    message: str
    hint: str = ""

    def as_text(self) -> str:
        """`path:line:column: error: message [RULE]`, then the hint after a blank line."""
        head = f"{self.at}: {self.severity}: {self.message} [{self.rule}]"
        return redact(f"{head}\n\nhint: {self.hint}" if self.hint else head)

    def as_dict(self) -> dict[str, str | int]:
        """Flat and JSON-ready, for `--format json`."""
        at = self.at
        return {
            "path": at.path,
            "line": at.line,
            "column": at.column,
            "rule": self.rule,
            "severity": self.severity.value,
            "message": redact(self.message),
            "hint": redact(self.hint),
        }


class UserError(Exception):
    """An expected failure: printed as `error:` and `hint:` without a traceback.

    `exit_code` is 2 for a file that cannot be read or is invalid, 1 for everything else.
    """

    def __init__(self, message: str, hint: str = "", *, at: Place | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.at = at
        self.exit_code = exit_code

    def as_text(self) -> str:
        """The text for a terminal: fact first, then the way out."""
        head = f"error: {self.at}: {self.message}" if self.at else f"error: {self.message}"
        return redact(f"{head}\n\nhint: {self.hint}" if self.hint else head)


class InvalidExperiment(UserError):
    """An experiment file that cannot be read or breaks the schema; holds every finding, not only the first."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        first = findings[0]
        super().__init__(first.message, first.hint, at=first.at, exit_code=2)
        self.findings = findings

    def as_text(self) -> str:
        """All findings, one after the other."""
        return "\n\n".join(finding.as_text() for finding in self.findings)
