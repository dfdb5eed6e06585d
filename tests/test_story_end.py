"""Finished is final, a cancel is a cancel: what no tick launches again, what tags say, and what `retry` reopens."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_story import EXPERIMENT, ROOT, Story, here, story_told
from servers.hub_faults import lose_response
from servers.hub_jobs import Job

from pipeline.book import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story, here(story, monkeypatch):
        yield story


def text(story: Story, name: str = "tiny", **changes: str) -> str:
    """The experiment, or another with its own repository."""
    found = EXPERIMENT.format(revision=story.base_revision).replace("name: tiny", f"name: {name}")
    found = found.replace("acme/tiny}", f"acme/{name}}}")
    for old, new in changes.items():
        found = found.replace(f"{old}: ", f"{old}: {new} #", 1)
    return found


def tags(story: Story) -> dict[str, str]:
    """Name to first line of every tag, in the bare repository itself."""
    command = ["git", "-C", str(story.root / "acme/tunes.git"), "for-each-ref", "--format=%(refname:short)\t%(subject)"]
    out = subprocess.run([*command, "refs/tags"], capture_output=True, text=True, check=True, timeout=30).stdout
    return dict(line.split("\t") for line in out.splitlines())


def run_ids(story: Story) -> list[str]:
    return [name.removeprefix("run/") for name in tags(story) if name.startswith("run/")]


# Finished is final.


def test_finished_is_final_whatever_happens_to_its_repositories(story: Story) -> None:
    story.merge()
    assert story.live_on().verdict is Verdict.DONE
    (run_id,) = run_ids(story)
    assert tags(story)[f"run/{run_id}"] == "done: 3 of 3 stages are done"
    for repo in ("acme/tiny-adapter", "acme/tiny", "acme/tiny-GGUF"):
        story.hub.delete_repo(repo)
    assert story.tick_here() == []
    script = story.clone / "scripts/train_sft.py"
    script.write_text(script.read_text() + "# upgraded\n")
    story.publish("Upgrade the template")
    assert story.tick_here() == []
    shutil.rmtree(story.clone)
    subprocess.run(["git", "clone", "-q", str(story.root / "acme/tunes.git"), str(story.clone)], check=True, timeout=60)
    assert story.tick_here() == []
    assert len(story.hub.jobs) == 3


def test_a_version_with_other_defaults_relaunches_nothing(story: Story) -> None:
    story.merge()
    story.live_on()
    later = story.root / "later"
    shutil.copytree(ROOT / "pipeline", later / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    schema = later / "pipeline/experiment.py"
    old = schema.read_text()
    schema.write_text(old.replace("Field(3.0, ", "Field(4.0, ").replace('"Q4_K_M", "Q8_0"', '"Q5_K_M"'))
    assert schema.read_text() != old
    story.environment["PYTHONPATH"] = str(later)
    done = story.call("reconcile")
    assert (done.returncode, done.stdout) == (0, "nothing to do: every experiment of this branch is closed\n"), done
    assert "epochs" not in (story.clone / "experiments/tiny.yaml").read_text()
    assert len(story.hub.jobs) == 3


def test_a_tag_says_what_it_was_and_what_it_cost(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "1.1"  # the Hub counts whole seconds
    story.merge()
    story.live_on()
    (closed,) = story.book().closed
    assert closed.attempts == {"train": 1, "merge": 1, "gguf": 1}
    assert closed.summary["stages"].keys() == {"train", "merge", "gguf"}
    assert closed.summary["stages"]["train"]["metrics"] == {"loss": 1.5}
    assert closed.usd > 0
    command = ["git", "-C", str(story.root / "acme/tunes.git"), "for-each-ref", "--format=%(contents)"]
    out = subprocess.run([*command, "refs/tags/run"], capture_output=True, text=True, check=True, timeout=30).stdout
    assert json.loads(out.split("\n\n")[1])["run_id"] == closed.run_id


def test_a_first_install_among_five_hundred_old_experiments_launches_none(story: Story) -> None:
    story.git("push", "-q", "origin", ":refs/tags/mergetune/since")
    for number in range(500):
        (story.clone / f"experiments/old-{number}.yaml").write_text(text(story, f"old-{number}"))
    story.publish("Five hundred")
    reports = story.tick_here()
    assert {report.outcome.value for report in reports} == {"adopted"}
    assert len(reports) == 500
    assert story.tick_here() == []
    assert story.hub.jobs == {}
    assert len(tags(story)) == 501
    shutil.rmtree(story.clone)
    subprocess.run(["git", "clone", "-q", str(story.root / "acme/tunes.git"), str(story.clone)], check=True, timeout=60)
    assert story.tick_here() == []
    assert story.call("retry", "old-7").returncode == 0
    (report,) = story.tick_here()
    assert (report.experiment, report.outcome) == ("old-7", "submitted")
    assert len(story.hub.jobs) == 1


def test_retry_reopens_one_run_only(story: Story) -> None:
    story.hub.job_environment["FAIL"] = "ValueError: bad rows"
    for name in ("tiny", "small"):
        story.merge(name, text(story, name))
    ended = story.live_on()
    assert (ended.verdict, ended.summary["hint"]) == (Verdict.FAILED, "read the job's log")
    assert "ValueError: bad rows" in ended.summary["lines"], "whoever posts the comment later finds it in the tag"
    assert sorted(report.split(":")[0] for name, report in tags(story).items() if "run/" in name) == ["failed"] * 2
    del story.hub.job_environment["FAIL"]
    done = story.call("retry", "tiny")
    assert (done.returncode, "open again" in done.stdout) == (0, True), done
    assert story.live_on().verdict is Verdict.DONE
    assert [job.labels["attempt"] for job in story.worked() if job.labels["experiment"] == "tiny"] == ["1", "2"]
    assert [job.labels["attempt"] for job in story.worked() if job.labels["experiment"] == "small"] == ["1"]
    ends = {name.split("-")[0] + name[-2:]: said.split(":")[0] for name, said in tags(story).items() if "run/" in name}
    assert sorted(ends.values()) == ["done", "failed", "failed"]
    assert ends["run/tiny.2"] == "done"


# Cancel, edit, delete.


def sole(story: Story, stage: str = "train") -> Job:
    (job,) = [job for job in story.hub.jobs.values() if job.labels["stage"] == stage]
    return job


def test_cancel_ends_a_job_that_no_listing_shows_yet(story: Story) -> None:
    story.hub.scheduling_s = 60
    story.hub.list_lag_s = 10**6
    story.merge()
    story.tick_here()
    done = story.call("cancel", "tiny")
    assert (done.returncode, "1 job stopped" in done.stdout) == (0, True), done
    assert sole(story).stage == "CANCELED"
    assert story.tick_here() == []
    (run_id,) = run_ids(story)
    assert tags(story)[f"run/{run_id}"] == "cancelled: cancelled by a person"


def test_a_job_that_starts_after_the_cancel_finds_the_fence_shut(story: Story) -> None:
    """Its post lost its answer, nothing lists it, and the claim does not name it: only the fence can stop it."""
    story.hub.scheduling_s = 4
    story.hub.list_lag_s = 10**6
    story.hub.faults.add(method="POST", path="/api/jobs/acme$", action=lose_response())
    story.merge()
    process = story.start("reconcile")
    while not story.hub.jobs and process.poll() is None:
        process.poll()
    process.kill()
    process.communicate(timeout=30)
    done = story.call("cancel", "tiny")
    assert done.returncode == 0, done
    story.hub.wait_jobs(60)
    assert sole(story).stage == "COMPLETED"
    assert story.worked() == []
    assert "superseded" in sole(story).log
    assert story.tick_here() == []


def test_an_edited_experiment_supersedes_the_running_one(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    story.merge()
    story.tick_here()
    first = sole(story)
    story.merge(text=text(story, max_steps="7"))
    reports = story.tick_here()
    assert sorted(report.outcome.value for report in reports) == ["submitted", "superseded"], reports
    assert first.stage == "CANCELED"
    story.hub.job_environment["WORK_S"] = "0"
    second = list(story.hub.jobs)[-1]
    story.call("cancel", "tiny")
    assert story.hub.jobs[second].over
    assert sorted(said.split(":")[0] for name, said in tags(story).items() if "run/" in name) == [
        "cancelled",
        "superseded",
    ]


def test_a_deleted_file_cancels_and_keeps_the_repositories(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    story.merge()
    story.tick_here()
    story.remove()
    (report,) = story.tick_here()
    assert (report.outcome, report.text) == ("cancelled", "the experiment's file is gone")
    assert sole(story).stage == "CANCELED"
    assert ("model", "acme/tiny-adapter", "private") in story.hub.repos()
    assert list(tags(story).values())[-1] == "cancelled: the experiment's file is gone"


def test_two_experiments_in_parallel(story: Story) -> None:
    for name in ("tiny", "small"):
        story.merge(name, text(story, name))
    reports = story.tick_here()
    assert [report.outcome.value for report in reports] == ["submitted", "submitted"]
    story.live_on()
    assert sorted(said.split(":")[0] for name, said in tags(story).items() if "run/" in name) == ["done", "done"]
    assert len(story.hub.jobs) == 6
    for name in ("tiny", "small"):
        manifest = json.loads(story.hub.files(f"acme/{name}-GGUF")["manifest.json"])
        assert manifest["run_id"].startswith(f"{name}-")
