"""Two loopback jobs train as two nodes: started, billed, ended and resumed as one attempt."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_story import EXPERIMENT, Story, here, story_told
from servers.hub_jobs import Job

from pipeline.book import Verdict
from pipeline.cost import billed_usd
from pipeline.flavors import FLAVORS

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    with story_told(tmp_path) as story, here(story, monkeypatch):
        yield story


def experiment(story: Story, name: str = "tiny", **changes: str) -> str:
    """Training alone, on two nodes of which each takes one batch of every step."""
    text = EXPERIMENT.format(revision=story.base_revision)
    kept = "".join(line + "\n" for line in text.splitlines() if not line.startswith(("merge:", "gguf:")))
    kept = kept.replace("gradient_accumulation: 1", "gradient_accumulation: 2\n  nodes: 2")
    kept = kept.replace("name: tiny", f"name: {name}").replace("repo: acme/tiny", f"repo: acme/{name}")
    for old, new in changes.items():
        assert old in kept
        kept = kept.replace(old, new)
    return kept


def nodes_of(story: Story, attempt: int = 1) -> list[Job]:
    """The jobs of an attempt, by their node."""
    jobs = [job for job in story.hub.jobs.values() if job.labels["attempt"] == str(attempt)]
    return sorted(jobs, key=lambda job: job.labels["node"])


def until(said: Callable[[], bool], jobs: list[Job], timeout_s: float = 90) -> None:
    """Wait for what a job says; fail with the logs."""
    deadline = time.monotonic() + timeout_s
    while not said():
        assert time.monotonic() < deadline, "\n".join(job.log[-3000:] for job in jobs)
        time.sleep(0.05)


def manifest(story: Story, repo: str) -> dict[str, Any]:
    return json.loads(story.hub.files(repo)["manifest.json"])


def losses(found: dict[str, Any]) -> list[float]:
    logged = [entry["loss"] for entry in found["history"]]
    return logged + [entry["eval_loss"] for entry in found["eval_history"]]


def test_two_jobs_learn_what_one_learns(story: Story) -> None:
    story.merge(text=experiment(story))
    (report,) = story.tick_here()
    assert (report.outcome, report.stage) == ("submitted", "train"), report
    first, second = nodes_of(story)
    assert report.job == first.id
    groups = [job.spec["network"] for job in (first, second)]
    assert groups[0]["group"] == groups[1]["group"] and len(groups[0]["group"]) <= 46
    assert [group["aliases"] for group in groups] == [["node-0"], ["node-1"]]
    assert first.volumes == second.volumes  # the same script, the same request
    assert story.tick_here()[0].outcome == "waiting"
    story.hub.wait_jobs(120)
    assert [job.stage for job in (first, second)] == ["COMPLETED"] * 2, first.log[-3000:] + second.log[-3000:]
    assert story.tick_here()[0].outcome == "finished"
    files = story.hub.files("acme/tiny-adapter")
    claim = json.loads(next(content for path, content in files.items() if path.endswith("claim.json")))
    assert (claim["job_id"], claim["more_ids"]) == (first.id, [second.id])
    winners = {path.rpartition("/")[2]: json.loads(c)["job_id"] for path, c in files.items() if "/winner" in path}
    assert winners == {"winner.json": first.id, "winner-1.json": second.id}
    publishers = [title for _, title, _ in story.hub.history("acme/tiny-adapter") if title.endswith(": manifest")]
    assert len(publishers) == 1 and "published" not in second.log and "pushed" not in second.log
    (closed,) = story.book().closed
    paid = [billed_usd(int(job.finished - job.started), FLAVORS["cpu-upgrade"]) for job in (first, second)]
    assert (closed.verdict, closed.attempts, closed.usd) == (Verdict.DONE, {"train": 1}, pytest.approx(sum(paid)))
    # One process, the same step of two batches.
    story.merge("single", experiment(story, "single", **{"\n  nodes: 2": ""}))
    assert [report.outcome for report in story.tick_here()] == ["submitted"]
    story.hub.wait_jobs(120)
    one, two = manifest(story, "acme/single-adapter"), manifest(story, "acme/tiny-adapter")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for key in ("steps", "tokens_seen", "tokens_trained", "examples"):
        assert two["metrics"][key] == one["metrics"][key], key
    assert two["predicted"]["nodes"] == 2 and "nodes" not in one["predicted"]


def test_a_node_that_is_lost_ends_the_other_and_the_next_attempt_goes_on(story: Story) -> None:
    """Each node holds half of the weights: the checkpoint on the Hub has the parts of both, by the first node alone."""
    changes = {
        "method: lora": "method: full",
        "max_steps: 6": "max_steps: 24",
        "save_steps: 2": "save_steps: 6",
        "  lora: {r: 4, alpha: 8}\n": "",
    }
    story.merge(text=experiment(story, **changes))
    story.tick_here()
    first, second = nodes_of(story)
    until(lambda: '"event": "pushed"' in first.log, [first, second])
    story.hub.kill_job(second.id)
    story.hub.wait_jobs(60)
    assert "the connection to another node was lost on node 1 of 2" in first.log, first.log[-3000:]
    parts = [path for path in story.hub.files("acme/tiny") if path.endswith(".distcp")]
    assert len(parts) >= 2
    (report,) = story.tick_here()
    assert (report.outcome, "attempt 2" in report.text) == ("submitted", True), report
    assert "the machine was lost" in report.text  # what the second node died of, not what the first one saw
    story.hub.wait_jobs(120)
    third, fourth = nodes_of(story, 2)
    assert [job.stage for job in (third, fourth)] == ["COMPLETED"] * 2, third.log[-3000:] + fourth.log[-3000:]
    assert third.spec["network"]["group"] != first.spec["network"]["group"]
    assert story.tick_here()[0].outcome == "finished"
    made = manifest(story, "acme/tiny")
    assert made["resumed_from_step"] >= 6 and made["metrics"]["steps"] == 24
    (closed,) = story.book().closed
    jobs = (first, second, third, fourth)
    paid = [billed_usd(int(job.finished - job.started), FLAVORS["cpu-upgrade"]) for job in jobs]
    assert closed.usd == pytest.approx(sum(paid))
