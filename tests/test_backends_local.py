"""The local backend through the command: resumes, never repeats, never counts half an artifact."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from repository import Repository, make_repository

from pipeline.backends.local import find_mlx
from pipeline.facts import MlxHere

STAGES = ["train", "merge", "gguf", "evaluate"]


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return make_repository(tmp_path)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_a_run_goes_through_every_stage_and_reports(repo: Repository) -> None:
    done = repo.call("run", "experiments/small.yaml")
    assert done.returncode == 0, done.stderr
    assert repo.started() == STAGES
    assert "**Held-out loss fell by 50.0 %**" in done.stdout
    assert (repo.run_folder() / "report.md").read_text() == done.stdout
    assert "train: train · step 3/3" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_finished_run_answers_from_its_artifacts(repo: Repository) -> None:
    first = repo.call("run", "experiments/small.yaml")
    again = repo.call("run", "experiments/small.yaml")
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert repo.started() == STAGES


def test_json_is_one_document(repo: Repository) -> None:
    done = repo.call("run", "experiments/small.yaml", "--format", "json")
    result = json.loads(done.stdout)
    assert list(result["stages"]) == STAGES
    assert Path(result["report"]).exists()


@pytest.mark.parametrize("failing", STAGES)
def test_a_failed_stage_is_told_and_the_next_run_goes_on_from_it(repo: Repository, failing: str) -> None:
    repo.set(f"{failing}.crash")
    failed = repo.call("run", "experiments/small.yaml")
    assert failed.returncode == 1
    assert f"error: {failing} failed with exit code 1: RuntimeError: the sky fell" in failed.stderr
    assert "hint: the whole log: " in failed.stderr
    assert "Traceback" not in failed.stderr
    repo.clear(f"{failing}.crash")
    assert repo.call("run", "experiments/small.yaml").returncode == 0
    at = STAGES.index(failing)
    assert repo.started() == [*STAGES[: at + 1], *STAGES[at:]]
    assert repo.manifest(failing)["attempt"] == 2


def test_refused_input_keeps_the_scripts_words_and_exit_code(repo: Repository) -> None:
    repo.set("train.error", json.dumps({"message": "`data.jsonl:2` is not JSON", "hint": "mend line 2"}))
    failed = repo.call("run", "experiments/small.yaml")
    assert failed.returncode == 2
    assert failed.stderr.endswith("error: train: `data.jsonl:2` is not JSON\n\nhint: mend line 2\n")


def test_the_log_keeps_every_attempt(repo: Repository) -> None:
    repo.set("train.crash")
    repo.call("run", "experiments/small.yaml")
    repo.clear("train.crash")
    repo.call("run", "experiments/small.yaml")
    log = (repo.run_folder() / "train/log.txt").read_text()
    assert log.count('"event": "start"') == 2
    assert "the sky fell" in log


def test_a_killed_script_is_told_as_killed(repo: Repository) -> None:
    repo.set("merge.kill")
    failed = repo.call("run", "experiments/small.yaml")
    assert failed.returncode == 1
    assert "merge was killed (out of memory?)" in failed.stderr


def test_an_artifact_without_a_manifest_does_not_count(repo: Repository) -> None:
    repo.set("train.no_manifest")
    failed = repo.call("run", "experiments/small.yaml")
    assert failed.returncode == 1
    assert "train left no whole artifact" in failed.stderr
    repo.clear("train.no_manifest")
    assert repo.call("run", "experiments/small.yaml").returncode == 0
    assert repo.started() == ["train", *STAGES]


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "foreign"])
def test_a_damaged_artifact_is_made_again(repo: Repository, damage: str) -> None:
    repo.call("run", "experiments/small.yaml")
    artifact = repo.run_folder() / "gguf/artifact"
    match damage:
        case "truncated":
            (artifact / "result.safetensors").write_text("")
        case "missing":
            (artifact / "result.safetensors").unlink()
        case "manifest":
            (artifact / "manifest.json").write_text('{"run_id": ')
        case "foreign":
            manifest = repo.manifest("gguf")
            (artifact / "manifest.json").write_text(json.dumps({**manifest, "run_id": "another-00000000"}))
    assert repo.call("run", "experiments/small.yaml").returncode == 0
    assert repo.started() == [*STAGES, "gguf"]


def test_new_prompts_evaluate_again_and_train_nothing(repo: Repository) -> None:
    repo.call("run", "experiments/small.yaml")
    (repo.root / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    assert repo.call("run", "experiments/small.yaml").returncode == 0
    assert repo.started() == [*STAGES, "evaluate"]


def test_deleting_the_adapter_after_the_end_trains_nothing(repo: Repository) -> None:
    repo.call("run", "experiments/small.yaml")
    (repo.run_folder() / "train/artifact/manifest.json").unlink()
    assert repo.call("run", "experiments/small.yaml").returncode == 0
    assert repo.started() == STAGES


def test_another_text_is_another_run(repo: Repository) -> None:
    repo.call("run", "experiments/small.yaml")
    text = repo.experiment.read_text().replace("method: lora", "method: lora, epochs: 2")
    repo.experiment.write_text(text)
    repo.call("run", "experiments/small.yaml")
    assert len(list((repo.root / "runs").iterdir())) == 2
    assert repo.started() == STAGES * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_lets_the_script_save_and_leaves_a_run_to_continue(repo: Repository, number: signal.Signals) -> None:
    repo.set("train.slow", "2000")
    process = repo.start("run", "experiments/small.yaml")
    wait_for(lambda: repo.started() == ["train"])
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    assert (repo.run_folder() / "train/work/stopped").read_text() == "tidy"
    repo.clear("train.slow")
    assert repo.call("run", "experiments/small.yaml").returncode == 0


def test_a_second_run_at_the_same_time_is_refused(repo: Repository) -> None:
    repo.set("train.slow", "2000")
    process = repo.start("run", "experiments/small.yaml")
    wait_for(lambda: repo.started() == ["train"])
    second = repo.call("run", "experiments/small.yaml")
    assert second.returncode == 1
    assert re.search(r"error: run `small-[0-9a-f]{8}` is already going on \(process \d+\)", second.stderr)
    assert "hint: wait for it, or stop it: `kill " in second.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert repo.started() == ["train"]


def test_the_lock_outlives_a_killed_command_as_long_as_its_script_works(repo: Repository) -> None:
    repo.set("train.slow", "60")
    process = repo.start("run", "experiments/small.yaml")
    wait_for(lambda: repo.started() == ["train"])
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    refused = repo.call("run", "experiments/small.yaml").stderr
    assert "already going on" in refused
    assert f"process {process.pid})" not in refused, "names the script that lives, not the command that is dead"
    wait_for(lambda: (repo.run_folder() / "train/artifact/manifest.json").exists())
    repo.clear("train.slow")
    wait_for(lambda: repo.call("run", "experiments/small.yaml").returncode == 0)
    # The orphan's work was not lost and not done twice.
    assert repo.started() == STAGES


def test_a_runs_folder_that_cannot_be_written(repo: Repository) -> None:
    (repo.root / "runs").write_text("a file where the folder should be")
    failed = repo.call("run", "experiments/small.yaml")
    assert failed.returncode == 1
    assert "cannot be written" in failed.stderr
    assert "hint: free some space, or pass a folder you can write: `--runs-dir DIR`" in failed.stderr
    other = repo.call("run", "experiments/small.yaml", "--runs-dir", "elsewhere")
    assert other.returncode == 0
    assert (repo.root / "elsewhere").is_dir()


def test_a_read_only_runs_folder(repo: Repository) -> None:
    runs = repo.root / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    failed = repo.call_unprivileged("run", "experiments/small.yaml")
    runs.chmod(0o755)
    assert failed.returncode == 1
    assert "cannot be written: Permission denied" in failed.stderr


def test_a_full_disk(repo: Repository, tmp_path: Path) -> None:
    small = repo.root / "runs"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=8", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        failed = repo.call("run", "experiments/small.yaml")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert repo.started() == []


def test_the_mlx_of_this_python_is_found() -> None:
    found = find_mlx()
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    assert found == MlxHere(versions.get("mlx"), versions.get("mlx-lm"))
