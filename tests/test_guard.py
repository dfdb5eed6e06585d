"""Somebody else's code gets no more time and memory than it was given, and leaves no trace of the limit."""

import resource
import signal
import threading

import pytest

from pipeline.guard import Exceeded, guarded


def test_what_stays_within_runs_and_is_timed() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with guarded(5, 100) as guard:
        total = sum(range(1_000_000))
    assert total
    assert 0 < guard.took < 5
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


def test_too_long() -> None:
    with pytest.raises(Exceeded, match=r"more than 0\.05 s"), guarded(0.05, 100):
        while True:
            try:
                sum(range(1000))
            except Exception:  # what a template's own handlers would catch
                continue
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_too_much() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Exceeded, match="more than 50 MB"), guarded(5, 50):
        bytearray(200_000_000)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(200_000_000)) == 200_000_000


def test_another_thread_has_no_signal_and_runs() -> None:
    done: list[float] = []

    def work() -> None:
        with guarded(1, 500) as guard:
            done.append(guard.took)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == [0.0]
