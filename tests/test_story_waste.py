"""A job that only burns money is stopped, where its own log proves it; anything less stops nothing."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_story import Story, story_told
from servers.hub_faults import status

from pipeline.book import Verdict

pytestmark = pytest.mark.slow
NAN = [
    {"event": "step", "step": n, "total": 60, "loss": 2.0 if n < 3 else "nan", "grad_norm": 1.0} for n in range(1, 6)
]
MASKED = [{"event": "step", "step": n, "total": 60, "loss": 0.0, "grad_norm": 0.0} for n in range(1, 8)]


def idle(minutes: int, phase: str = "train") -> list[dict[str, Any]]:
    """Signs of life of so many minutes; `ago_s` becomes their time when the job is launched."""
    beats = [{"event": "heartbeat", "gpu_busy": 0.0, "ago_s": 60 * ago} for ago in range(minutes, -1, -1)]
    return [{"event": "phase", "name": phase}, *beats]


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        story.hub.job_environment["WORK_S"] = "120"
        story.merge()
        yield story


def until(there: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def launch(story: Story, said: list[dict[str, Any]]) -> Any:
    """A training job that has said all this and goes on."""
    now = time.time()
    timed = [{**one, "time": now - one["ago_s"]} if "ago_s" in one else one for one in said]
    story.hub.job_environment["SAY"] = json.dumps(timed)
    assert story.tick()[0]["outcome"] == "submitted"
    (job,) = story.hub.jobs.values()
    until(lambda: job.log.count("MERGETUNE ") >= len(said) + 2)
    return job


def settings(story: Story, text: str) -> None:
    (story.clone / "pyproject.toml").write_text(f'[tool.mergetune]\nnamespaces = ["acme"]\n{text}\n')
    story.publish("Change the settings")


def test_a_loss_that_is_no_number_ends_the_job_and_the_run(story: Story) -> None:
    job = launch(story, NAN)
    (report,) = story.tick()
    assert (report["outcome"], report["text"]) == ("failed", "train: stopped early: the loss is nan at step 5")
    assert report["hint"] == "use `train.learning_rate: 1e-04`, or look for broken rows"
    assert job.stage == "CANCELED"
    (closed,) = story.book().closed
    assert (closed.verdict, closed.text) == (Verdict.FAILED, report["text"])
    assert story.tick() == []
    assert len(story.hub.jobs) == 1, "it is not bought again"


@pytest.mark.parametrize(
    ("setting", "said", "words"),
    [
        ('early_stop = ["masked"]', MASKED, "no token carries loss"),
        ('early_stop = ["idle"]\nidle_minutes = 10', idle(20), "the GPU did nothing for 10 minutes (`train`)"),
    ],
)
def test_other_proofs_end_it_where_the_settings_name_them(
    story: Story, setting: str, said: list[dict[str, Any]], words: str
) -> None:
    job = launch(story, said)
    assert story.tick()[0]["outcome"] == "waiting", "not asked for"
    settings(story, setting)
    (report,) = story.tick()
    assert (report["outcome"], words in report["text"]) == ("failed", True), report
    assert job.stage == "CANCELED"


@pytest.mark.parametrize("said", [NAN[:3], idle(20, "publish"), MASKED[:4], [{"event": "step", "loss": "nan"}]])
def test_what_is_no_proof_stops_nothing(story: Story, said: list[dict[str, Any]]) -> None:
    settings(story, 'early_stop = ["nan", "exploding", "masked", "idle"]\nidle_minutes = 10')
    job = launch(story, said)
    (report,) = story.tick()
    assert report["outcome"] == "waiting", report
    assert not job.over


def test_a_log_that_nobody_gives_proves_nothing(story: Story) -> None:
    job = launch(story, NAN)
    story.hub.faults.add(method="GET", path=f"/{job.id}/logs", times=99, action=status(503))
    (report,) = story.tick()
    assert (report["outcome"], "progress" in report) == ("waiting", False)
    assert not job.over
    story.hub.faults.clear()
    assert story.tick()[0]["outcome"] == "failed"
