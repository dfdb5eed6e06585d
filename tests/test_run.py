"""The real chain through the command: TRL, the streamed merge, llama.cpp and the comparison, on the tiny base."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = """\
name: short
hypothesis: a few steps of the whole chain
base: {model: ./base}
data: {dataset: train.jsonl, eval: {dataset: heldout.jsonl}}
train:
  method: METHOD
  flavor: cpu-upgrade
  timeout: 10m
  max_steps: 6
  max_length: 128
  batch_size: 4
  gradient_accumulation: 1
  learning_rate: 5e-3
  save_steps: 2
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q8_0, Q4_K_M]}
evaluate: {timeout: 10m, prompts: prompts.jsonl, max_new_tokens: 8}
output: {repo: acme/short}
budget: {max_usd: 1}
"""


def make_repo(root: Path, method: str = "qlora") -> Path:
    """A repository with the real scripts, the tiny base and forty rows of the quickstart's data."""
    examples = ROOT / "experiments/examples"
    (root / "experiments").mkdir(parents=True)
    (root / "pyproject.toml").write_text("[tool.mergetune]\n")
    (root / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(examples / "tiny-docs-llama", root / "base")
    text = EXPERIMENT.replace("METHOD", method)
    if method == "full":
        text = text.replace("merge: {timeout: 10m}\n", "").replace("5e-3", "1e-3")
    (root / "experiments/short.yaml").write_text(text)
    for name, rows in (("train", 40), ("heldout", 6), ("prompts", 2)):
        lines = (examples / f"data/quickstart-{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        (root / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    return root


def start(root: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline", "run", "experiments/short.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(root: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(root, *arguments)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def manifests(root: Path) -> dict[str, dict]:
    found = (root / "runs").glob("*/*/artifact/manifest.json")
    return {path.parts[-3]: json.loads(path.read_text(encoding="utf-8")) for path in found}


def test_the_whole_chain_and_then_nothing_to_do(tmp_path: Path) -> None:
    root = make_repo(tmp_path)
    code, out, errors = finish(root)
    assert code == 0, errors
    made = manifests(root)
    assert set(made) == {"train", "merge", "gguf", "evaluate"}
    metrics = made["evaluate"]["metrics"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert len(made["evaluate"]["samples"]) == 2
    for quant in made["gguf"]["metrics"]["quants"]:
        assert set(quant["checks"].values()) == {"ok"}
    folders = {path.parts[-2]: path for path in (root / "runs").glob("*/*/artifact")}
    for stage, manifest in made.items():
        for file in manifest["files"]:
            path = folders[stage] / file["path"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
            assert path.suffix not in (".bin", ".pt", ".pkl")
    assert f"Held-out loss fell by {-metrics['loss_change_percent']:.1f} %" in out
    logs = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("log.txt")}
    code, again, told = finish(root)
    assert (code, again) == (0, out)
    assert told.endswith(f"report: {folders['train'].parents[1] / 'report.md'}\n")
    assert "train: start" not in told
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_full_training_needs_no_merge(tmp_path: Path) -> None:
    root = make_repo(tmp_path, "full")
    code, _, errors = finish(root)
    assert code == 0, errors
    made = manifests(root)
    assert set(made) == {"train", "gguf", "evaluate"}
    assert made["evaluate"]["metrics"]["after"]["loss"] < made["evaluate"]["metrics"]["before"]["loss"]


def test_killed_in_training_it_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    root = make_repo(tmp_path)
    process = start(root)
    deadline = time.monotonic() + 200
    while not list((root / "runs").glob("*/train/work/checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (lock,) = (root / "runs").glob("*/lock")
    script = subprocess.run(
        ["pgrep", "-f", str(lock.parent / "train/run.json")], capture_output=True, text=True, check=True
    )
    process.kill()
    for pid in script.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert manifests(root) == {}
    code, _, errors = finish(root)
    assert code == 0, errors
    train = manifests(root)["train"]
    assert train["attempt"] == 2
    assert train["resumed_from_step"] >= 2
    assert [point["step"] for point in train["history"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{not json", "not JSON"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"question": "x"}', "no known format: the row has `question`"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "y"}]}', "is empty"),
        ('{"messages": [{"role": "pilot", "content": "x"}, {"role": "assistant", "content": "y"}]}', "role `pilot`"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_loaded(tmp_path: Path, row: str, said: str) -> None:
    root = make_repo(tmp_path)
    lines = (root / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lines[16] = row
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, errors = finish(root)
    assert (code, out) == (1, "")
    assert "experiments/short.yaml:4:17: error: `train.jsonl:17`: " in errors
    assert said in errors
    assert "\n\nhint: " in errors
    assert "Traceback" not in errors
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("config", "`config.json` of `./base` is not there"),
        ("pickle", "only pickled weights (`pytorch_model.bin`)"),
        ("truncated", "is truncated"),
        ("tokenizer", "has no tokenizer"),
    ],
)
def test_a_base_that_cannot_be_trusted(tmp_path: Path, damage: str, said: str) -> None:
    root = make_repo(tmp_path)
    weights = root / "base/model.safetensors"
    match damage:
        case "config":
            (root / "base/config.json").unlink()
        case "pickle":
            weights.rename(root / "base/pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "tokenizer":
            for path in (root / "base").glob("tokenizer*"):
                path.unlink()
    code, _, errors = finish(root)
    assert code == (1 if damage == "config" else 2)  # a rule finds the first, the script the others
    assert said in errors
    assert "\n\nhint: " in errors
    assert "Traceback" not in errors
