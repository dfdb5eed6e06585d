"""The whole of it on loopback: real git, the real client, real jobs that train, merge and convert a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_story import TOKEN, Story, make_story
from servers.hub import LoopbackHub

from pipeline.book import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with LoopbackHub(tmp_path) as hub:
        yield make_story(tmp_path, hub)


def test_a_merged_experiment_becomes_three_repositories(story: Story) -> None:
    story.install()
    story.merge()
    for stage in ("train", "merge", "gguf"):
        (report,) = story.tick()
        assert (report["outcome"], report.get("stage")) == ("submitted", stage), report
        assert story.tick()[0]["outcome"] in ("waiting", "submitted")
        story.hub.wait_jobs(240)
        job = story.hub.jobs[report["job"]]
        assert job.stage == "COMPLETED", job.log[-3000:]
    (report,) = story.tick()
    assert report["outcome"] == "finished", report
    assert story.tick() == []
    assert [job.stage for job in story.hub.jobs.values()] == ["COMPLETED"] * 3
    (closed,) = story.book().closed
    assert (closed.verdict, closed.attempts) == (Verdict.DONE, {"train": 1, "merge": 1, "gguf": 1})
    made = {repo: story.hub.files(repo) for repo in ("acme/tiny-adapter", "acme/tiny", "acme/tiny-GGUF")}
    for repo, files in made.items():
        assert json.loads(files["manifest.json"])["run_id"] == closed.run_id
        assert b"base_model" in files["README.md"]
        assert ("model", repo, "private") in story.hub.repos()
    manifest = json.loads(made["acme/tiny-GGUF"]["manifest.json"])
    assert manifest["metrics"]
    leaks_nothing(story)


def leaks_nothing(story: Story) -> None:
    """The token is in no log, no request line or body, and no file of any repository or folder."""
    for job in story.hub.jobs.values():
        assert TOKEN not in job.log
    for request in story.hub.requests:
        assert TOKEN not in request.path
        assert TOKEN.encode() not in request.body
    for path in story.root.rglob("*"):
        if path.is_file() and path.stat().st_size < 50_000_000:
            assert TOKEN.encode() not in path.read_bytes(), path
