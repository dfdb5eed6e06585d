"""A failed job to its cause: what the server, the script and the log say, and what may be tried again."""

import pytest

from pipeline.diagnose import LONGEST, diagnose, diagnose_message
from pipeline.log_lines import TAIL_LINES

TRACEBACK = 'Traceback (most recent call last):\n  File "train_sft.py", line 9, in <module>\n'


@pytest.mark.parametrize(
    ("message", "cause", "transient"),
    [
        ("Job timeout", "the job ran into its timeout", False),
        ("NO_CREDITS", "no credit is left", False),
        ("RESOURCE_GROUP_LIMIT", "the resource group's limit is reached", False),
        ("node lost", "the machine was lost", True),
        ("Node was lost during execution", "the machine was lost", True),
        ("instance preempted", "the machine was lost", True),
        ("Pod evicted", "the machine was lost", True),
        ("hardware failure", "the machine was lost", True),
    ],
)
def test_the_server_knows_first(message: str, cause: str, transient: bool) -> None:
    log = f"{TRACEBACK}httpx2.ConnectError: refused\n"  # the log would say something else
    found = diagnose(log, message)
    assert (found.cause, found.transient, found.evidence) == (cause, transient, message)
    assert diagnose_message(message) == found


@pytest.mark.parametrize("message", ["", "Cancelled by user", "exit code 1", "Job failed"])
def test_words_of_the_server_that_say_nothing_are_no_cause(message: str) -> None:
    assert diagnose_message(message) is None


@pytest.mark.parametrize(
    ("line", "cause", "transient"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "the GPU ran out of memory", False),
        ("RuntimeError: CUDA driver initialization failed", "the GPU did not start", True),
        ("RuntimeError: NCCL error: unhandled system error", "the GPU did not start", True),
        ("httpx2.ConnectError: [Errno 111] refused", "a server or the network failed", True),
        ("httpx2.ReadTimeout: timed out", "a server or the network failed", True),
        (
            "huggingface_hub.errors.HfHubHTTPError: Server error '503 Service Unavailable'",
            "a server or the network failed",
            True,
        ),
        ("HfHubHTTPError: 503 Server Error: Service Unavailable for url", "a server or the network failed", True),
        ("requests failed with HTTP 502", "a server or the network failed", True),
        ("ConnectionResetError: [Errno 104] reset by peer", "a server or the network failed", True),
        ("ValueError: could not read row 503", "not known", False),
        ("KeyError: 'status_500'", "not known", False),
        ("AssertionError: loss is nan", "the training diverged: a loss or a gradient is not a number", False),
    ],
)
def test_the_end_of_the_log(line: str, cause: str, transient: bool) -> None:
    found = diagnose(f"loading\n{TRACEBACK}{line}\n\n")
    assert (found.cause, found.transient, found.evidence) == (cause, transient, line)


def test_a_request_that_was_repeated_with_success_is_not_the_cause() -> None:
    steps = "".join(f"step {number}\n" for number in range(TAIL_LINES))
    found = diagnose(f"HTTP 503, asked again\n{steps}{TRACEBACK}ValueError: bad row\n")
    assert (found.cause, found.transient) == ("not known", False)


def test_the_script_knows_best() -> None:
    told = 'MERGETUNE {"event": "error", "message": "row 3 has no answer", "hint": "mend it", "transient": false}\n'
    found = diagnose(f"MERGETUNE not json\nMERGETUNE [1]\n{told}{TRACEBACK}httpx2.ConnectError: refused\n")
    assert (found.cause, found.hint, found.transient) == ("row 3 has no answer", "mend it", False)
    again = told.replace("false", "true")
    assert diagnose(again).transient
    assert not diagnose(told.replace("false", '"yes"')).transient  # only the plain word


def test_a_job_without_any_log_may_be_tried_again() -> None:
    assert diagnose("", "").transient
    assert diagnose("\n \n").cause == "the job left no log"


def test_no_token_and_no_flood_comes_through() -> None:
    token = "hf_" + "Ab1" * 10
    assert token not in diagnose(f"ValueError: {token}").evidence
    assert len(diagnose("x" * 10_000).evidence) == LONGEST
