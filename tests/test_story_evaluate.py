"""An experiment with an evaluate stage, on loopback with the real job scripts: trained, merged, measured, finished."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_story import EXPERIMENT, Story, make_story
from servers.hub import LoopbackHub

from pipeline.book import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with LoopbackHub(tmp_path) as hub:
        yield make_story(tmp_path, hub)


def test_an_evaluation_is_a_job_like_the_others(story: Story) -> None:
    story.install()
    (story.clone / "data/prompts.jsonl").write_text('{"prompt": "what is 3 plus one?"}\n')
    lines = EXPERIMENT.format(revision=story.base_revision).splitlines()
    lines = [line for line in lines if not line.startswith("gguf:")]
    lines.append("evaluate: {flavor: cpu-upgrade, timeout: 20m, prompts: data/prompts.jsonl, max_new_tokens: 8}")
    story.merge(text="\n".join(lines) + "\n")
    for stage in ("train", "merge", "evaluate"):
        (report,) = story.tick()
        assert (report["outcome"], report.get("stage")) == ("submitted", stage), report
        story.hub.wait_jobs(240)
        job = story.hub.jobs[report["job"]]
        assert job.stage == "COMPLETED", job.log[-3000:]
    (report,) = story.tick()
    assert report["outcome"] == "finished", report
    (closed,) = story.book().closed
    assert (closed.verdict, closed.attempts) == (Verdict.DONE, {"train": 1, "merge": 1, "evaluate": 1})
    assert closed.summary["stages"]["evaluate"]["metrics"]
    folder = f".mergetune/{closed.run_id}/evaluate"
    manifest = json.loads(story.hub.files("acme/tiny")[f"{folder}/manifest.json"])
    assert (manifest["run_id"], manifest["stage"]) == (closed.run_id, "evaluate")
    assert len(story.hub.jobs) == 3
