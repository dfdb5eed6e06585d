"""Faults that a test plants in the loopback Hub: which request goes wrong, and how. Sends nothing."""

import re
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """What happens to one request instead of a plain answer."""

    delay_s: float = 0.0
    perform: bool = True  # whether the Hub does what was asked
    answer: tuple[int, str] | None = None  # status and text sent in place of the real answer
    close: bool = False  # the socket is closed without any answer
    strip_link: bool = False  # the page goes out without its link to the next one
    cut_body: bool = False  # half of the announced body is sent, then the socket is closed


NO_FAULT = Action()


def status(code: int, body: str = "Internal Error", *, performed: bool = False) -> Action:
    """Answer with this status; `performed` = the Hub did the work and then failed to say so."""
    return Action(perform=performed, answer=(code, body))


def delay(seconds: float) -> Action:
    """Answer properly, but late."""
    return Action(delay_s=seconds)


def hang(bound_s: float = 30.0) -> Action:
    """Say nothing until the server stops or the bound is reached, then close; nothing is performed."""
    return Action(delay_s=bound_s, perform=False, close=True)


def lose_response() -> Action:
    """Perform the request, then close the socket without an answer."""
    return Action(close=True)


def drop() -> Action:
    """Close the socket before anything is performed."""
    return Action(perform=False, close=True)


def truncate_list(*, cut_body: bool = False) -> Action:
    """A listing page without its link to the next page, or with half of its body."""
    return Action(strip_link=not cut_body, cut_body=cut_body)


@dataclass
class _Planted:
    """One fault with its remaining counts."""

    method: str
    path: re.Pattern[str]
    times: int
    skip: int
    action: Action

    def claim(self) -> bool:
        """Whether the matching request at hand is one that goes wrong; counts it."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times <= 0:
            return False
        self.times -= 1
        return True


class Faults:
    """The planted faults, oldest first; at most one applies to a request."""

    def __init__(self) -> None:
        self._planted: list[_Planted] = []
        self._lock = threading.Lock()

    def add(self, *, action: Action, method: str = "POST", path: str = "", times: int = 1, skip: int = 0) -> None:
        """The next `times` requests of `method` whose path with query matches, after `skip` of them, go wrong."""
        with self._lock:
            self._planted.append(_Planted(method, re.compile(path), times, skip, action))

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._planted.clear()

    def left(self) -> int:
        """How many planted faults have not happened yet."""
        with self._lock:
            return sum(planted.times for planted in self._planted)

    def take(self, method: str, path: str) -> Action:
        """What happens to this request."""
        with self._lock:
            for planted in self._planted:
                if planted.method == method and planted.path.search(path) and planted.claim():
                    return planted.action
        return NO_FAULT
