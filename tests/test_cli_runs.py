"""The verbs about runs as a person types them: what they print, where, and with which exit code."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_story import TOKEN, Story, story_told
from servers.hub_faults import status

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        story.merge()
        yield story


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_id(story: Story) -> str:
    return next(iter(story.hub.jobs.values())).labels["run"]


def test_a_dry_run_looks_and_changes_nothing(story: Story) -> None:
    done = story.call("reconcile", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "submitted: would submit train, attempt 1 on cpu-upgrade: first attempt" in done.stdout
    assert done.stdout.startswith("▶ tiny-")
    written = [r for r in story.hub.requests if r.method != "GET" and "auth-check" not in r.path]
    assert written == []
    (report,) = json.loads(story.call("reconcile", "--dry-run", "--format", "json").stdout)
    assert (report["experiment"], report["outcome"], report["stage"]) == ("tiny", "submitted", "train")
    assert "job" not in report


def test_status_before_during_and_after(story: Story) -> None:
    assert "would submit train" in story.call("status").stdout
    story.hub.job_environment["WORK_S"] = "60"
    story.tick()
    (job,) = story.hub.jobs.values()
    until(lambda: "works" in job.log)
    shown = story.call("status", "tiny")
    assert (shown.returncode, shown.stderr) == (0, "")
    load = r"train is running \(memory \d+\.\d of \d+ GiB\)"  # of one run, what its machine does
    first, progress = shown.stdout.splitlines()
    assert re.fullmatch(rf"◐ {run_id(story)}: waiting: {load} \({job.id}\)", first)
    assert re.fullmatch(r"  train: train · step 1/2 · loss 2\.500 · \$0\.\d+ so far", progress)
    (report,) = json.loads(story.call("status", run_id(story), "--format", "json").stdout)
    assert re.fullmatch(load, report.pop("text"))
    assert {"done": 1, "total": 2, "loss": 2.5}.items() <= report.pop("progress").items()
    assert 0 < report.pop("usd") < 0.01
    assert report == {
        "experiment": "tiny",
        "run_id": run_id(story),
        "outcome": "waiting",
        "stage": "train",
        "job": job.id,
    }
    assert story.call("cancel", "tiny").returncode == 0
    assert story.call("status").stdout == f"· {run_id(story)}: cancelled: cancelled by a person\n"


def test_names_that_are_not_there(story: Story) -> None:
    for verb in ("status", "logs", "cancel", "retry"):
        done = story.call(verb, "tinny")
        assert (done.returncode, done.stdout) == (1, ""), verb
        assert done.stderr == (
            "error: no experiment of this branch is called `tinny`\n\nhint: did you mean `tiny`?\n"
        ), verb
    done = story.call("logs", "tiny")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no job yet" in done.stderr
    done = story.call("retry", "tiny")
    assert done.returncode == 1
    assert "hint: a run that is not finished needs no retry" in done.stderr


def test_logs_of_a_job_that_is_over(story: Story) -> None:
    story.tick()
    story.hub.wait_jobs(60)
    done = story.call("logs", "tiny")
    assert done.returncode == 0
    assert done.stdout.startswith("works\nMERGETUNE ")
    assert done.stderr.startswith("train, attempt 1: succeeded (")
    assert story.call("logs", "tiny", "--follow").stdout == done.stdout


def test_following_a_log_ends_with_the_job_or_with_ctrl_c(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    story.tick()
    (job,) = story.hub.jobs.values()
    until(lambda: "works" in job.log)
    process = story.start("logs", "tiny", "-f")
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the job goes on; `mergetune cancel tiny` stops it" in err
    assert "Traceback" not in err
    assert not job.over
    following = story.start("logs", "tiny", "-f")
    assert following.stdout is not None
    following.stdout.readline()
    story.hub.kill_job(job.id)
    following.communicate(timeout=30)
    assert following.returncode == 0


def test_logs_that_are_refused_are_no_traceback(story: Story) -> None:
    story.tick()
    story.hub.wait_jobs(60)
    story.hub.faults.add(method="GET", path="/logs", action=status(403, "no"), times=10)
    for more in ((), ("--follow",)):
        done = story.call("logs", "tiny", *more)
        assert (done.returncode, done.stdout) == (1, "")
        assert "error: the Hub refused: 403" in done.stderr
        assert "Traceback" not in done.stderr


def test_cancel_and_retry(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    story.tick()
    done = story.call("cancel", "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    again = "`mergetune retry tiny` starts it again"
    assert done.stdout == f"{run_id(story)}: cancelled, 1 job stopped; {again}\n"
    done = story.call("cancel", "tiny")
    assert done.returncode == 1
    assert "is closed: cancelled by a person" in done.stderr
    done = story.call("retry", "tiny", "--by", "ada")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run_id(story)}: open again")
    done = story.call("retry", "tiny")
    assert done.returncode == 1
    assert "is not closed" in done.stderr
    (report,) = story.tick()
    assert (report["outcome"], "attempt 2" in report["text"]) == ("submitted", True)


def test_a_checkout_that_is_not_main_does_nothing(story: Story) -> None:
    story.git("commit", "-q", "--allow-empty", "-m", "Mine")
    done = story.call("reconcile")
    assert done.returncode == 1
    assert done.stderr.startswith("error: this checkout is not the head of `main`, so nothing was done")
    assert story.hub.requests == []


# `run --backend hf_jobs`.


def test_a_run_by_hand_is_carried_to_its_end(story: Story) -> None:
    done = story.call("run", "experiments/tiny.yaml", "--backend", "hf_jobs")
    assert done.returncode == 0, done.stderr
    assert [job.stage for job in story.hub.jobs.values()] == ["COMPLETED"] * 3
    first, *repos = done.stdout.splitlines()
    assert first == f"{run_id(story)}: 3 of 3 stages are done"
    assert repos == ["  acme/tiny-adapter", "  acme/tiny", "  acme/tiny-GGUF"]
    lines = done.stderr.splitlines()
    (price,) = [line for line in lines if line.startswith(f"{run_id(story)}: at most $0.0")]
    assert price.endswith("paid by `acme`")
    for stage, job in zip(("train", "merge", "gguf"), story.hub.jobs, strict=True):
        assert any(line.startswith(f"{stage}: job {job}: ") for line in lines), lines
    assert "train: train · step 2/2 · loss 1.500" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    (report,) = story.tick()  # the tag is the controller's to write
    assert report["outcome"] == "finished"
    again = story.call("run", "experiments/tiny.yaml", "--backend", "hf_jobs")
    assert again.returncode == 1
    assert "is done: 3 of 3 stages are done" in again.stderr


def test_a_run_by_hand_that_fails_says_why(story: Story) -> None:
    story.hub.job_environment["FAIL"] = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    done = story.call("run", "experiments/tiny.yaml", "--backend", "hf_jobs", "--format", "json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: train: the GPU ran out of memory" in done.stderr
    assert "hint: a smaller `train.max_length` or `train.batch_size`, or a larger flavor: " in done.stderr
    assert "`mergetune fit experiments/tiny.yaml` shows them" in done.stderr
    assert len(story.hub.jobs) == 1


def test_ctrl_c_ends_the_watching_and_not_the_job(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    process = story.start("run", "experiments/tiny.yaml", "--backend", "hf_jobs")
    until(lambda: any("works" in job.log for job in story.hub.jobs.values()))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "not watching any more; its job goes on: `mergetune cancel tiny`" in err
    assert "Traceback" not in err
    (job,) = story.hub.jobs.values()
    assert not job.over
    assert story.call("cancel", "tiny").returncode == 0
    assert job.over


def test_a_refusal_makes_nothing(story: Story) -> None:
    done = story.call("run", "experiments/tiny.yaml", "--backend", "hf_jobs", token="$HF_TOKEN")
    assert done.returncode == 1
    assert "`HF_TOKEN` holds no personal token" in done.stderr
    assert story.hub.requests == []


def test_a_run_that_somebody_else_ends_is_told_as_it_ended(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    process = story.start("run", "experiments/tiny.yaml", "--backend", "hf_jobs")
    until(lambda: any("works" in job.log for job in story.hub.jobs.values()))
    assert story.call("cancel", "tiny").returncode == 0
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "error: cancelled by a person" in err
    assert "Traceback" not in err


def test_a_cancel_that_meets_an_outage_says_what_to_do(story: Story) -> None:
    story.hub.job_environment["WORK_S"] = "60"
    story.tick()
    story.hub.faults.add(method="POST", path="/cancel", action=status(503), times=10)
    done = story.call("cancel", "tiny")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the Hub did not answer: 503" in done.stderr
    assert "hint: some of it may be done; `mergetune cancel tiny` again ends the rest" in done.stderr
    story.hub.faults.clear()
    assert story.call("cancel", "tiny").returncode == 0
    assert all(job.stage == "CANCELED" for job in story.hub.jobs.values())
