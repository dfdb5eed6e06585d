"""A loopback GitHub with people in it, and our client in front of it; time passes only while somebody sleeps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.github import GitHub, open_github
from pipeline.pull_request import GitHubError
from servers.github import LoopbackGitHub

PEOPLE = {"alice": "admin", "bob": "write", "mia": "maintain", "tim": "triage", "eve": "read", "out": "none"}
KEY, MARK = "plan:coach", "<!-- mergetune:plan:coach fingerprint=1 plan=2 -->"
RUN = "coach-12345678"
RESULT = f"<!-- mergetune:result:{RUN} -->\ndone"
NOW = 1_800_000_000.0


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Remember the wish."""
        self.slept.append(seconds)

    def now(self) -> float:
        """Seconds since 1970."""
        return NOW + sum(self.slept)


def populated_github(folder: Path, prefix: str = "") -> LoopbackGitHub:
    """A repository with people of every permission and one workflow; not yet serving."""
    github = LoopbackGitHub(folder, people=PEOPLE, prefix=prefix)
    github.add_workflow("watch.yml")
    return github


def opened(github: LoopbackGitHub, clock: Clock, token: str | None = None, timeout_s: float = 30.0) -> GitHub:
    """Our client; with a workflow's token unless another is given."""
    known = token or github.actions_token()
    more = {"sleep": clock.sleep, "clock": clock.now, "timeout_s": timeout_s}
    return open_github(github.api_url, known, github.repository, **more)


def refusal(act: Callable[[], object]) -> GitHubError:
    """The error that this raises."""
    with pytest.raises(GitHubError) as caught:
        act()
    return caught.value


def bodies(github: LoopbackGitHub, number: int) -> list[str]:
    """The conversation's texts."""
    return [comment.body for comment in github.comments(number)]
