"""The workflow of the run board, run by act against the loopback GitHub: off, on, and on once more."""

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from servers.github import LoopbackGitHub
from servers.hub import LoopbackHub
from workflow_story import PEOPLE, TINY, Workplace, make_workplace, template_files

from pipeline.book import Closed, Verdict, finish_message
from pipeline.repository import Repository

pytestmark = pytest.mark.slow
RUN = "coach-0a1b2c3d"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    with LoopbackHub(tmp_path) as hub, LoopbackGitHub(tmp_path, people=PEOPLE, files=template_files()) as github:
        yield make_workplace(tmp_path, hub, github)


def git(place: Workplace, *arguments: str) -> str:
    command = ["git", "-C", str(place.github.git_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_nothing_is_published_until_a_person_switches_it_on(place: Workplace) -> None:
    place.install()
    ran = place.pages()
    assert ran.jobs.get("board", "skipped") == "skipped"
    assert "run-board" not in git(place, "for-each-ref")


def test_the_page_is_the_only_thing_on_a_branch_without_history(place: Workplace) -> None:
    place.install()
    repository = Repository(place.root / "work", remote=str(place.github.git_dir))
    ended = Closed(RUN, 1, Verdict.DONE, "4 of 4 stages are done", datetime.now(UTC), 1.25)
    repository.push_tag(f"run/{RUN}", repository.head_commit(), finish_message(ended))
    place.github.push("main", {TINY: place.experiment()}, "alice")
    place.variables["MERGETUNE_BOARD"] = "on"
    before = git(place, "for-each-ref")
    for _ in range(2):
        ran = place.pages()
        assert ran.jobs == {"board": "success"}, ran.text[-4000:]
    assert git(place, "ls-tree", "-r", "--name-only", "run-board").split() == [".nojekyll", "index.html"]
    assert git(place, "rev-list", "--count", "run-board").strip() == "1"
    page = git(place, "show", "run-board:index.html")
    assert RUN.removeprefix("coach-") in page
    assert "there is no HF_TOKEN to ask with" in page
    assert place.hub.requests == []
    others = [line for line in git(place, "for-each-ref").splitlines() if "run-board" not in line]
    assert others == before.splitlines()
