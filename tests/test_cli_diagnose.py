"""`mergetune diagnose` as a person types it: a file, standard input, a job on the loopback Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_story import EXPERIMENT, TOKEN, Story, story_told
from huggingface_hub import HfApi

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "tests/logs"
OOM = (LOGS / "gpu-full-in-the-logits.log").read_text(encoding="utf-8")


def call(*arguments: object, stdin: str | bytes = "", cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "HF_TOKEN": ""}
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "diagnose", *map(str, arguments)],
        input=given,
        capture_output=True,
        timeout=60,
        cwd=cwd,
        env=environment,
        check=False,
    )
    return subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_file_with_its_experiment() -> None:
    done = call(LOGS / "gpu-full-in-the-logits.log", "--experiment", "experiments/examples/chat-qlora.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "cause:    the GPU ran out of memory: the logits did not fit"
    assert lines[1].startswith("evidence: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB.")
    assert lines[2:] == [
        "retry:    would fail again",
        "fix:      `train.max_length: 2048 → 1024`, or `train.flavor: a10g-large → l40sx1`",
        "rule:     MEM002, docs/rules.md#mem002-training-fits-the-gpu-of-its-flavor",
    ]


def test_standard_input_without_an_experiment() -> None:
    done = call("-", stdin=OOM)
    assert done.returncode == 0
    assert "`mergetune fit experiments/my-experiment.yaml` shows them" in done.stdout


def test_json_has_everything() -> None:
    done = call("-", "--format", "json", stdin="OSError: You are trying to access a gated repo.\n")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said.pop("fix").startswith("accept the licence")
    assert said == {
        "id": "gated",
        "known": True,
        "cause": "the base or the data is gated, and the token's account has no access",
        "evidence": "OSError: You are trying to access a gated repo.",
        "retry_may_pass": False,
        "rule": "HUB014",
        "lines": [],
        "experiment": "",
        "stage": "train",
    }


def test_what_may_pass_says_so() -> None:
    done = call("-", stdin="Traceback (most recent call last):\nhttpx2.ReadTimeout: timed out\n")
    assert done.returncode == 0
    assert "retry:    may pass\nfix:      try again\n" in done.stdout


def test_an_unknown_failure_says_so_and_shows_the_most_telling_lines() -> None:
    done = call(LOGS / "nobody-knows-why.log")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("cause:    not known\nevidence: AssertionError: bucket 7 has 3 rows")
    shown = done.stdout.partition("the most telling lines:\n")[2].splitlines()
    assert "  sampler disagrees with curriculum (bucket 7)" in shown
    assert len(shown) <= 15


def test_bytes_that_are_no_text_and_no_token_comes_through() -> None:
    done = call(
        "-", stdin=b"\xff\xfe\x00" * 1000 + b"\nValueError: hf_" + b"Ab1" * 10 + b" \x1b]0;title\x07 \xe2\x80\xae\n"
    )
    assert done.returncode == 1
    assert "<token>" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.log"], "error: `nowhere.log` is neither a file nor a job id"),
        (["-", "--experiment", "nowhere.yaml"], "nowhere.yaml"),
        (["-", "--experiment", "tests/experiments/bad/typos.yaml"], "unknown key `train.flavour`"),
    ],
)
def test_what_cannot_be_read(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def story_text(name: str) -> str:
    return EXPERIMENT.replace("name: tiny", f"name: {name}").replace("acme/tiny}}", f"acme/{name}}}}}")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with story_told(tmp_path_factory.mktemp("story"), stand_ins=True) as story:
        story.merge()
        story.hub.execute_jobs = False
        story.tick()
        yield story


@pytest.mark.slow
def test_a_job_by_its_id(story: Story) -> None:
    (job_id,) = story.hub.jobs
    story.hub.finish_job(job_id, "ERROR", log="loading\nOSError: [Errno 28] No space left on device\n")
    done = story.call("diagnose", job_id)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cause:    the disk is full\n" in done.stdout
    assert "fix:      `train.flavor: cpu-upgrade → cpu-xl`\n" in done.stdout
    said = json.loads(story.call("diagnose", job_id, "--namespace", "acme", "--format", "json").stdout)
    assert (said["experiment"], said["stage"], said["id"]) == ("tiny", "train", "disk-full")


@pytest.mark.slow
def test_a_job_that_a_person_stopped(story: Story) -> None:
    story.merge("other", story_text("other").format(revision=story.base_revision))
    story.tick()
    job_id = next(job.id for job in story.hub.jobs.values() if job.labels["experiment"] == "other")
    story.hub.finish_job(job_id, "CANCELED", log="step 3\n")
    done = story.call("diagnose", job_id)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "cause:    the job was cancelled")


@pytest.mark.slow
def test_a_job_of_an_experiment_that_has_changed_says_so(story: Story) -> None:
    job_id = next(job.id for job in story.hub.jobs.values() if job.labels["experiment"] == "tiny")
    path = story.clone / "experiments/tiny.yaml"
    before = path.read_text()
    path.write_text(before.replace("learning_rate: 1e-3", "learning_rate: 1e-4"))
    done = story.call("diagnose", job_id)
    path.write_text(before)
    assert "has changed since this job: it was of run `tiny-" in done.stderr


@pytest.mark.slow
def test_a_job_without_our_labels_and_one_that_is_not_there(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=story.hub.url, token=TOKEN)
    foreign = api.run_job(image="python:3.12", command=["true"], namespace="acme").id
    story.hub.finish_job(foreign, "ERROR", log="ValueError: odd rows", message="Job timeout")
    assert "cause:    the job ran into its timeout" in story.call("diagnose", foreign, "--namespace", "acme").stdout
    done = story.call("diagnose", "0" * 24)
    assert done.returncode == 2
    assert "error: no job `000000000000000000000000` in `alice`, `acme`" in done.stderr
    without = story.call("diagnose", foreign, token=None)
    assert (without.returncode, "HF_TOKEN" in without.stderr) == (1, True)
