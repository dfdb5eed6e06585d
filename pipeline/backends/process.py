"""A job script as a child process: start it, read the events in its growing log, stop it. Knows no stage and no run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pipeline.events import parse_event

PATIENCE_S = 30  # for a stopped script to save its checkpoint before it is killed
POLL_S = 0.1

OnEvent = Callable[[dict[str, Any]], None]


def follow(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path, lock: TextIO, on_event: OnEvent
) -> int:
    """Run a command to its end, passing on the events in its log; returns the exit code (negative: killed by a signal).

    The child inherits `lock` and is noted in it. When this process is interrupted, the child is stopped first. The log
    of earlier attempts is kept above.
    """
    # The script writes to the file, not to a pipe: it goes on, and its log stays whole, when this process dies.
    with log.open("ab") as out, log.open("r", encoding="utf-8", errors="replace") as tail:
        tail.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
        note_pids(lock, os.getpid(), process.pid)
        reader = _EventReader(tail)
        try:
            while process.poll() is None:
                reader.pass_on(on_event)
                time.sleep(POLL_S)
        except BaseException:
            stop_group(process)
            raise
        reader.pass_on(on_event)
    return process.returncode


def note_pids(lock: TextIO, *pids: int) -> None:
    """Write into a lock file who holds it: the command, then its script."""
    lock.seek(0)
    lock.truncate()
    lock.write(" ".join(str(pid) for pid in pids))
    lock.flush()


def living_pid(lock: TextIO) -> str:
    """The first noted process that is still alive, or `unknown`."""
    lock.seek(0)
    for pid in lock.read().split():
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            continue
        except PermissionError:  # alive, and somebody else's
            pass
        return pid
    return "unknown"


class _EventReader:
    """Reads whole lines of a growing log and passes on those that are events."""

    def __init__(self, tail: TextIO) -> None:
        self.tail = tail
        self.rest = ""

    def pass_on(self, on_event: OnEvent) -> None:
        self.rest += self.tail.read()
        *lines, self.rest = self.rest.split("\n")
        for line in lines:
            event = parse_event(line)
            if event is not None:
                on_event(event)


def stop_group(process: "subprocess.Popen[Any]", patience_s: float = PATIENCE_S) -> None:
    """Ask a process group to stop, and end it when it does not, or when Ctrl-C comes a second time."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
            break
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
