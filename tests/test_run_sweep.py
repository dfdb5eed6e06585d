"""A sweep through the commands: trained, killed, gone on with, reported; a bad value found in a rehearsal."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_run import ROOT, finish, make_repo, manifests, start
from test_scripts_train_processes import is_alive

from pipeline.errors import UserError
from pipeline.loader import load_experiment
from pipeline.progress import PlainDisplay
from pipeline.rehearse import rehearse
from pipeline.workspace import read_facts

pytestmark = pytest.mark.slow
# The second one's first update makes everything infinite.
SWEEP = (
    "sweep:\n  list: [{learning_rate: 1e-5}, {lora.alpha: 1e38}, {learning_rate: 1e-2, lora.r: 8}]\n  concurrency: 1\n"
)


def with_sweep(root: Path, sweep: str) -> Path:
    """The small repository, its experiment a sweep of trainings and nothing after them."""
    path = make_repo(root, "lora") / "experiments/short.yaml"
    lines = [line for line in path.read_text().splitlines(True) if not line.startswith(("merge", "gguf", "evaluate"))]
    path.write_text("".join(lines).replace("max_steps: 6", "max_steps: 3") + sweep)
    return path


def test_killed_it_goes_on_with_the_variants_that_are_left(tmp_path: Path) -> None:
    with_sweep(tmp_path, SWEEP)
    process, deadline = start(tmp_path), time.monotonic() + 200
    while not (kept := list((tmp_path / "runs").glob("*/train/work/variants/sweep.json"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder = kept[0].parents[2]
    while not list((tmp_path / "runs").glob("*/train/work/variants/2/run.json")):
        time.sleep(0.02)
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=True)
    script = subprocess.run(["pgrep", "-f", f"{folder}/run.json"], capture_output=True, text=True, check=True)
    process.kill()
    os.kill(int(script.stdout.split()[0]), signal.SIGKILL)
    process.communicate()
    # The variant that was training does not outlive what started it.
    ends = time.monotonic() + 10
    while any(is_alive(int(pid)) for pid in found.stdout.split()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert manifests(tmp_path) == {}

    code, out, errors = finish(tmp_path)
    assert code == 0, errors
    train = manifests(tmp_path)["train"]
    assert [(row["variant"], row["state"], row.get("winner")) for row in train["sweep"]] == [
        (1, "trained", None),
        (2, "diverged", None),
        (3, "trained", True),
    ]
    assert train["attempt"] == 2
    log = (folder / "log.txt").read_text()
    imported = [line for line in log.splitlines() if '"import libraries"' in line]
    assert [json.loads(line.partition(" ")[2])["variant"] for line in imported if '"variant": 1' in line] == [1]
    adapter = json.loads((folder / "artifact/adapter_config.json").read_text())
    assert adapter["r"] == 8
    assert not (folder / "work/variants").exists()
    best, first = train["sweep"][2]["eval_loss"], train["sweep"][0]["eval_loss"]
    assert best == train["metrics"]["eval_loss"] < first
    assert "**Variant 3** (`learning_rate 0.01, lora.r 8`) won with a held-out loss of" in out
    assert "| 2 | `lora.alpha 1e38` |" in out and "❌ diverged" in out
    assert "variant 3 of 3" in errors and "variant 2 (`lora.alpha 1e38`) diverged" in errors


def test_a_value_that_only_training_refuses_is_found_in_the_rehearsal(tmp_path: Path) -> None:
    """Alone a variant does not fail its training; on a pull request it is a failure, at its value."""
    sweep = "sweep:\n  grid: {max_steps: [1000], sft.lr_scheduler_type: [linear, cosine_with_min_lr]}\n"
    path = with_sweep(tmp_path, sweep)
    (tmp_path / "scripts").unlink()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    file = load_experiment(path, "experiments/short.yaml")
    with (tmp_path / "shown").open("w") as shown:
        result = rehearse(file, read_facts(file.experiment, tmp_path), tmp_path, PlainDisplay(shown))
    assert isinstance(result.failure, UserError)
    words = "max_steps 1000, sft.lr_scheduler_type cosine_with_min_lr"
    assert result.failure.message.startswith(f"train: variant 2 (`{words}`) failed: ValueError: One of min_lr")
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "cosine_with" in text)
    assert result.failure.at and (result.failure.at.line, result.failure.at.path) == (line, "experiments/short.yaml")
    assert "variant 2 of 2" in (tmp_path / "shown").read_text()
