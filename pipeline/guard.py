"""A last resort around somebody else's code in this process: CPU seconds and memory that it cannot exceed.

Where the system offers no such limit (not in the first thread, no `resource`, no /proc) the block runs without it.
"""

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

PAGE = 4096


class Exceeded(BaseException):
    """The block took more than it was given. No ordinary handler inside the block may catch it."""


class guarded:  # noqa: N801 (a context manager, named as one reads it)
    """Run a block with so much CPU time and additional memory; `took` is the seconds it took when it is over.

    Raises:
        Exceeded: it took more.
    """

    def __init__(self, seconds: float, megabytes: int) -> None:
        self.seconds, self.megabytes, self.took = seconds, megabytes, 0.0
        self.limits: tuple[int, int] | None = None
        self.handler: Any = None
        self.timed = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "guarded":
        with contextlib.suppress(OSError):
            self._limit_memory()
        if self.timed:
            self.handler = signal.signal(signal.SIGVTALRM, self._stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.timed:
                self.took = self.seconds - signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0]
                signal.signal(signal.SIGVTALRM, self.handler)
        finally:
            if self.limits is not None:
                resource.setrlimit(resource.RLIMIT_AS, self.limits)
        if kind is not None and issubclass(kind, MemoryError):
            raise Exceeded(f"more than {self.megabytes} MB of memory") from None

    def _limit_memory(self) -> None:
        if resource is None:
            return
        with open("/proc/self/statm", "rb", buffering=0) as handle:  # noqa: PTH123 (it is opened thousands of times)
            used = int(handle.read(100).split()[0]) * PAGE
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([used + self.megabytes * 1_000_000, *known]), hard))
        self.limits = soft, hard

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"more than {self.seconds:g} s")
