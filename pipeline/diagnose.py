"""A failed job's log to its cause. Pure: patterns in order, the first that matches wins.

Only what decides whether a retry may pass is told apart here: a new container helps against a lost machine or a
server's bad minute, never against a fault of the experiment. What is not known is not retried: a retry costs money.
"""

import re
from dataclasses import dataclass

from pipeline.errors import redact
from pipeline.events import parse_event

LONGEST = 300  # characters of a log line worth showing
TAIL_LINES = 40  # where a crash tells its cause; a request that was repeated with success stands further up
# The server's reason (status.message or cancelReason), read before the log.
SERVER: tuple[tuple[str, str, bool, str], ...] = (
    (r"job timeout", "the job ran into its timeout", False, "raise `{stage}.timeout`, then `mergetune retry {name}`"),
    (r"NO_CREDITS", "no credit is left", False, "add credit to `{namespace}`, then `mergetune retry {name}`"),
    (
        r"RESOURCE_GROUP_LIMIT",
        "the resource group's limit is reached",
        False,
        "raise it, then `mergetune retry {name}`",
    ),
    (r"node (was )?lost|preempt|evicted|hardware (fail|fault)", "the machine was lost", True, ""),
)
LOG: tuple[tuple[str, str, bool, str], ...] = (
    (r"CUDA out of memory|OutOfMemoryError", "the GPU ran out of memory", False, "`mergetune fit {path}`"),
    (r"\b(NCCL|CUDA) (error|driver).*(unhandled|initializ|system not yet)", "the GPU did not start", True, ""),
    (
        r"(HTTP|Error|status)\W{0,3}(429|500|502|503|504)\b|(Connection|Read|Connect)(Error|Timeout|ResetError)",
        "a server or the network failed",
        True,
        "",
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """Why a job failed: the cause, the line that shows it, whether a new attempt may pass, and what to do."""

    cause: str
    evidence: str
    transient: bool
    hint: str


def diagnose(log: str, message: str = "") -> Diagnosis:
    """The cause of a failure from the server's reason and the job's log; both may be empty."""
    told = diagnose_message(message) or _error_event(log)
    if told is not None:
        return told
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    for pattern, cause, transient, hint in LOG:
        if found := re.search(pattern, tail):
            return Diagnosis(cause, _clean(_line_at(tail, found.start())), transient, hint)
    if not log.strip():
        return Diagnosis("the job left no log", _clean(message), True, "")
    last = next(line for line in reversed(log.splitlines()) if line.strip())
    return Diagnosis("not known", _clean(last), False, "read the job's log")


def diagnose_message(message: str) -> Diagnosis | None:
    """The cause as the server itself names it; None when it says nothing that is known."""
    for pattern, cause, transient, hint in SERVER:
        if re.search(pattern, message, re.IGNORECASE):
            return Diagnosis(cause, _clean(message), transient, hint)
    return None


def _error_event(log: str) -> Diagnosis | None:
    """What the job script itself said: it knows best, and marks what a new attempt may pass."""
    for line in log.splitlines():
        event = parse_event(line)
        if event is not None and event["event"] == "error":
            message, hint = str(event.get("message", "")), str(event.get("hint", ""))
            return Diagnosis(_clean(message), _clean(line), event.get("transient") is True, _clean(hint))
    return None


def _line_at(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : end if end >= 0 else len(text)]


def _clean(text: str) -> str:
    text = redact(text.strip())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
