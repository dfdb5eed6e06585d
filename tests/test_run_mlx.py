"""Training with MLX for real, on the CPU: the commands of docs/mlx.md on a tiny base, and the same experiment twice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
from hub_story import ROOT, TOKEN, Story, here, story_told
from test_run import manifests

from pipeline.book import Verdict
from pipeline.facts import MlxHere
from pipeline.loader import load_experiment
from pipeline.plan import MLX_SCRIPT
from pipeline.progress import PlainDisplay
from pipeline.rehearse import rehearse
from pipeline.workspace import read_facts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / MLX_SCRIPT).exists(), reason=f"{MLX_SCRIPT} is not there yet"),
]
with_mlx = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
EXAMPLES = ROOT / "experiments/examples"
PAGE = (ROOT / "docs/mlx.md").read_text(encoding="utf-8")
EXPERIMENT = """\
name: tiny
hypothesis: a few steps with MLX
base: {model: ./base}
data: {dataset: data/rows.jsonl, eval: {fraction: 0.2}}
train:
  method: lora
  backend: mlx
  max_steps: 6
  max_length: 128
  batch_size: 2
  gradient_accumulation: 1
  learning_rate: 1e-3
  save_steps: 2
  lora: {r: 4, alpha: 8}
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q8_0]}
output: {repo: acme/tiny}
budget: {max_usd: 1}
"""


def commands(name: str) -> list[str]:
    """The shell lines of the page's block that is marked so."""
    block = re.search(rf"<!-- tested: {name} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def add_base(root: Path) -> None:
    shutil.copytree(EXAMPLES / "tiny-docs-llama", root / "base")


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    """A repository with the tiny base in it, the real job scripts, and an account on a loopback Hub."""
    with story_told(tmp_path) as story:
        add_base(story.clone)
        shutil.copytree(ROOT / "scripts/dev", story.clone / "scripts/dev", ignore=shutil.ignore_patterns("__pycache__"))
        (story.clone / ".gitignore").write_text("runs/\n")
        story.environment = dict(story.hub.job_environment)
        story.merge(text=EXPERIMENT)
        yield story


@with_mlx
def test_the_pages_commands_take_a_mac_to_the_end_of_the_chain(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for line in commands("run"):
        _, *words = shlex.split(line)
        done = story.call(*words)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said[words[0]] = done.stdout
    assert "training with MLX starts, learns, checkpoints and saves" in said["rehearse"]
    made = manifests(story.clone)
    assert set(made) == {"train", "merge", "gguf"}
    assert made["train"]["metrics"]["steps"] == 6
    assert made["train"]["trained_on"]["quantization"] is None
    assert "mlx" in made["train"]["versions"]
    for line in commands("submit"):
        if line.startswith("export HF_TOKEN="):
            continue
        (folder,) = story.clone.glob("runs/tiny-*")
        _, *words = shlex.split(line.replace("tiny-…", folder.name))
        done = story.call(*words, *(["--yes"] if words[0] == "submit-adapter" else []))
        assert done.returncode == 0, f"{line}: {done.stderr}{done.stdout}"
    with here(story, monkeypatch):
        closed = story.live_on()
    assert closed.verdict is Verdict.DONE, closed.text
    assert [job.labels["stage"] for job in story.hub.jobs.values()] == ["merge", "gguf"]
    files = story.hub.files("acme/tiny")
    assert files["model.safetensors"] == (folder / "merge/artifact/model.safetensors").read_bytes()
    adapter = story.hub.files("acme/tiny-adapter")
    assert json.loads(adapter["manifest.json"])["provenance"]["trained_by"] == "alice"
    for path, content in adapter.items():
        assert str(story.root).encode() not in content, path
        assert TOKEN.encode() not in content, path


def start(root: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def make_repo(root: Path, text: str = EXPERIMENT) -> Path:
    (root / "experiments").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "pyproject.toml").write_text("[tool.mergetune]\n")
    (root / "scripts").symlink_to(ROOT / "scripts")
    add_base(root)
    rows = (EXAMPLES / "data/quickstart-train.jsonl").read_text(encoding="utf-8").splitlines(True)
    (root / "data/rows.jsonl").write_text("".join(rows[:40]), encoding="utf-8")
    (root / "experiments/tiny.yaml").write_text(text)
    return root


@with_mlx
def test_killed_it_goes_on_and_torch_and_mlx_are_two_runs(tmp_path: Path) -> None:
    torch = EXPERIMENT.replace("  backend: mlx\n", "  flavor: cpu-upgrade\n  timeout: 10m\n")
    text = "".join(line for line in torch.splitlines(True) if not line.startswith("gguf"))
    root = make_repo(tmp_path, text)
    process = start(root, "run", "experiments/tiny.yaml", "--backend", "mlx")
    deadline = time.monotonic() + 200
    while not list((root / "runs").glob("*/train/work/checkpoints/checkpoint-*/complete.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (request,) = (root / "runs").glob("*/train/run.json")
    script = subprocess.run(["pgrep", "-f", str(request)], capture_output=True, text=True, check=True)
    process.kill()
    for pid in script.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert manifests(root) == {}
    out, errors = (again := start(root, "run", "experiments/tiny.yaml", "--backend", "mlx")).communicate(timeout=300)
    assert again.returncode == 0, errors
    train = manifests(root)["train"]
    assert (train["attempt"], train["metrics"]["steps"]) == (2, 6)
    assert train["resumed_from_step"] >= 2
    assert "Stages done: train, merge." in out
    out, errors = (plain := start(root, "run", "experiments/tiny.yaml")).communicate(timeout=300)
    assert plain.returncode == 0, errors
    assert len(list((root / "runs").iterdir())) == 2
    assert {"mlx", "trl"} <= {
        name
        for path in (root / "runs").glob("*/train/artifact/manifest.json")
        for name in json.loads(path.read_text())["versions"]
    }


def test_a_field_without_a_word_stops_it_before_anything_is_loaded(tmp_path: Path) -> None:
    root = make_repo(tmp_path, EXPERIMENT.replace("  save_steps: 2", "  save_steps: 2\n  packing: true"))
    out, errors = (process := start(root, "run", "experiments/tiny.yaml", "--backend", "mlx")).communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "experiments/tiny.yaml:14:12: error: `packing: true` cannot be honoured by MLX" in errors
    assert not (root / "runs").exists()


def test_without_mlx_a_rehearsal_says_that_training_was_not_rehearsed(tmp_path: Path) -> None:
    root = make_repo(tmp_path)
    path = root / "experiments/tiny.yaml"
    file = load_experiment(path, "experiments/tiny.yaml")
    facts = replace(read_facts(file.experiment, root), mlx_here=MlxHere(None, None))
    result = rehearse(file, facts, root, PlainDisplay(StringIO()))
    assert result.failure is None, result.failure and result.failure.as_text()
    assert "the train stage was NOT rehearsed: MLX is not installed" in result.summary()
    assert not any("training" in point for point in result.proves)
    assert "the adapter merges into this architecture" in result.proves


@with_mlx
def test_a_quantised_base_is_rehearsed_on_a_quantised_twin(tmp_path: Path) -> None:
    text = EXPERIMENT.replace("method: lora", "method: qlora")
    text = text.replace("backend: mlx", "backend: mlx\n  mlx: {base: acme/base-4bit, num_layers: 1}")
    text = "".join(line for line in text.splitlines(True) if not line.startswith("gguf"))
    root = make_repo(tmp_path, text)
    file = load_experiment(root / "experiments/tiny.yaml", "experiments/tiny.yaml")
    facts = replace(read_facts(file.experiment, root), mlx_here=MlxHere("0.32.4", "0.32.2"))
    shown = StringIO()
    result = rehearse(file, facts, root, PlainDisplay(shown))
    assert result.failure is None, result.failure and result.failure.as_text()
    assert "quantised to 4 bits in groups of 32; the merge puts it into `./twin`" in shown.getvalue()
    assert "the twin, quantised by MLX to 4 bits, stands for `acme/base-4bit`" in result.summary()
