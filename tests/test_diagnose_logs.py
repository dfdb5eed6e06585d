"""Real and typical logs to their causes: each fixture of tests/logs/, and the same in other launchers' clothes."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.diagnose import LONGEST, diagnose

ROOT = Path(__file__).resolve().parents[1]
LOGS = sorted((ROOT / "tests/logs").glob("*.log"))
NOISE = [
    "{time} INFO trainer: bucket {n} of 96 prefetched in {n}.{n} ms",
    "Fetching file {n} of 4000 (resolve/main/part-{n})",
    "/opt/lib/python3.11/site-packages/x/y.py:{n}: UserWarning: CUDA out of memory is possible with batch {n}",
    "HTTP 503 for GET /api/models/x, asked again in {n} s",
    "Retrying in {n}s [Retry {n}/5].",
]
each_log = pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)


def noise(count: int) -> str:
    """Lines that healthy logs hold, some with words of failures."""
    lines = (
        NOISE[n % len(NOISE)].format(n=n, time=f"2026-11-20 10:{n // 60 % 60:02}:{n % 60:02},{n % 1000:03}")
        for n in range(count)
    )
    return "".join(f"{line}\n" for line in lines)


def each_line(change: str) -> Callable[[str], str]:
    """A variant in which every line is put into a frame; `{line}` and `{n}` stand in it."""
    return lambda log: "".join(change.format(line=line, n=n % 60) + "\n" for n, line in enumerate(log.splitlines()))


VARIANTS: dict[str, Callable[[str], str]] = {
    "as it is": lambda log: log,
    "CRLF": lambda log: log.replace("\n", "\r\n"),
    "colour": each_line("\x1b[31m{line}\x1b[0m"),
    "time in front": each_line("2026-11-20T10:11:{n:02}.1234567Z {line}"),
    "time and level in front": each_line(
        "[2026-11-20 10:11:{n:02},123] [ERROR] [axolotl.train:88] [PID:7] [RANK:0] {line}"
    ),
    "rank in front": each_line("[rank3]: {line}"),
    "container in front": each_line("trainer-1  | {line}"),
    "worker in front": each_line("(TrainTrainable pid=1234, ip=10.0.0.7) {line}"),
    "noise before": lambda log: noise(5000) + log,
    "noise after": lambda log: log + "".join(line for line in noise(5000).splitlines(True) if "Fetching" not in line),
    "empty lines between": lambda log: log.replace("\n", "\n\n"),
}
FAST = ("as it is", "time and level in front")  # a thousand small tests are a long time, too


def expected(path: Path) -> dict[str, str | bool]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_there_are_many() -> None:
    ids = {expected(path)["id"] for path in LOGS}
    assert len(LOGS) >= 100
    assert len(ids) >= 60


@each_log
def test_cause_evidence_and_fix(path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts/dev"))
    from pull_log_fixture import expectation

    said = expected(path)
    assert expectation(path.read_text(encoding="utf-8"), str(said.get("message", ""))) == said


@each_log
@pytest.mark.parametrize("variant", [v if v in FAST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_other_clothes_do_not_matter(path: Path, variant: str) -> None:
    said = expected(path)
    found = diagnose(VARIANTS[variant](path.read_text(encoding="utf-8")), str(said.get("message", "")))
    assert (found.id, found.transient) == (said["id"], said["transient"])
    if said["id"]:
        assert found.cause == said["cause"]
        assert found.evidence[:200] == str(said["evidence"])[:200]


def place_of_evidence(path: Path) -> int | None:
    """The line of a log that shows its cause; None where nothing is known, or only the server says it."""
    said, lines = expected(path), path.read_text(encoding="utf-8").splitlines()
    at = next((n for n, line in enumerate(lines) if str(said["evidence"])[:100] in line), None)
    return at if said["id"] else None


@pytest.mark.parametrize("path", [path for path in LOGS if place_of_evidence(path) is not None], ids=lambda p: p.stem)
def test_the_beginning_may_be_cut_off(path: Path) -> None:
    lines, at = path.read_text(encoding="utf-8").splitlines(), place_of_evidence(path)
    assert at is not None
    assert diagnose("\n".join(lines[max(0, at - 12) :])).id == expected(path)["id"]


@each_log
def test_nothing_private_is_in_a_fixture(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"hf_[A-Za-z0-9]{16,}|pyenv|/root/\.cache/merge|127\.0\.0\.1:\d\d", text)
    assert f"{ROOT}/" not in text
    assert len(text) < 60_000


def test_what_training_outlived_is_not_the_cause() -> None:
    caught = 'Traceback (most recent call last):\n  File "a.py", line 1, in push\nhttpx2.ReadTimeout: timed out\n'
    step = "{'loss': '1.2', 'grad_norm': '0.4', 'epoch': '0.1'}\n"
    ended = 'Traceback (most recent call last):\n  File "a.py", line 9, in <module>\nAssertionError: odd rows\n'
    assert diagnose(caught).id == "network"
    assert diagnose(caught + step + ended).id == ""
    assert diagnose(caught + step).id == ""


def test_code_that_a_traceback_quotes_is_not_the_cause() -> None:
    frames = '  File "a.py", line 3, in read\n    raise RuntimeError("CUDA out of memory")\n'
    assert diagnose(f"Traceback (most recent call last):\n{frames}AssertionError: odd rows\n").id == ""


@pytest.mark.slow
def test_a_large_log_takes_little_time() -> None:
    hostile = "".join(
        f"{chr(97 + n % 26)}{'CUDA out ' * 9}{'403' * 5}{n:x}{'(' * 40}{n * 7919:x}\n" for n in range(140_000)
    )
    log = f"{hostile}Traceback (most recent call last):\n  File 'x'\nKeyError: 'text'\n"
    assert len(log) > 20_000_000
    began = time.process_time()
    assert diagnose(log).id == "columns"
    assert diagnose("Traceback (most recent call last):\n" * 200_000).id == ""
    assert diagnose("\x1b[" * 5_000_000).id in ("", "no-log")
    assert time.process_time() - began < 30


def test_the_most_telling_lines_of_an_unknown_failure() -> None:
    found = diagnose((ROOT / "tests/logs/nobody-knows-why.log").read_text(encoding="utf-8"))
    assert not found.is_known
    assert 1 < len(found.lines) <= 15
    assert any("sampler disagrees" in line for line in found.lines)
    assert any("curriculum says 4" in line for line in found.lines)


def test_a_training_that_learnt_nothing() -> None:
    def log(*losses: float) -> str:
        return "".join(f"{{'loss': '{loss}', 'grad_norm': '1.0', 'epoch': '0.1'}}\n" for loss in losses)

    found = diagnose(log(*[2.31] * 8, *[2.3] * 8))
    assert (found.id, found.cause) == ("loss-not-falling", "the loss did not fall: 2.31 at first, 2.3 at last")
    assert diagnose(log(*[2.31] * 8, *[1.9] * 8)).id == ""
    assert diagnose(log(*[2.31] * 5)).id == ""
    killed = log(*[2.31] * 16) + "Killed\n"
    assert diagnose(killed).id == "host-oom"


def test_a_push_that_is_seen_is_not_missed() -> None:
    ended = "{'train_runtime': '8.1', 'train_loss': '1.3'}\n"
    assert diagnose(ended).id == "nothing-pushed"
    assert diagnose(f"{ended}Uploading adapter.safetensors\n").id == ""
    assert diagnose(ended, "Job failed with exit code: 137. Reason: OOMKilled").id == "host-oom"


def test_the_evidence_of_a_long_line_shows_what_matters() -> None:
    command = ", ".join(f"'--option{n}', '{n}'" for n in range(2000))
    found = diagnose(
        f"[2024-02-03 11:48:27,267] [ERROR] [launch.py:322:sigkill_handler] [{command}] exits with return code = -9\n"
    )
    assert found.id == "host-oom"
    assert found.evidence.endswith("exits with return code = -9")
    assert len(found.evidence) <= LONGEST


def test_output_of_a_child_as_the_text_of_bytes() -> None:
    lines = ["INFO:hf-to-gguf:Loading", "Traceback (most recent call last):", '  File "c.py", line 1, in <module>']
    lines.append("FileNotFoundError: [Errno 2] No such file or directory: 'x/config.json'")
    assert diagnose(f"Error: {chr(10).join(lines).encode()!r}\n").id == "not-merged"


def test_a_key_error_of_a_login_is_no_missing_column() -> None:
    frames = '  File "train.py", line 4, in <module>\n    login(token=os.environ["HF_TOKEN"])\n'
    frames += (
        '  File "/usr/lib/python3.11/site-packages/huggingface_hub/_login.py", line 130, in login\n    _login(token)\n'
    )
    assert diagnose(f"Traceback (most recent call last):\n{frames}KeyError: 'auth'\n").id == "login-call"
