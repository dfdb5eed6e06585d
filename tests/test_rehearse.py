"""Rehearsals by the real job scripts: the whole chain once, a bad setting once, and training on a twin per family."""

import shutil
from io import StringIO
from pathlib import Path

import pytest

from pipeline.loader import load_experiment, parse_experiment
from pipeline.progress import PlainDisplay
from pipeline.rehearse import RehearsalResult, rehearse
from pipeline.workspace import read_facts

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
HUB = """\
name: hub
hypothesis: the chain runs on a stand-in for a base that is not here
base: {model: MODEL}
data: {dataset: acme/conversations, eval: {fraction: 0.1}}
train:
  method: qlora
  flavor: a10g-large
  timeout: 1h
  loss_on: assistant
  sft: {warmup_steps: 10, weight_decay: 0.01}
  lora: {r: 8, targets: TARGETS}
output: {repo: acme/hub}
budget: {max_usd: 1}
"""
GGUF = """\
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q4_K_M]}
evaluate: {timeout: 10m}
"""


def rehearse_text(text: str) -> RehearsalResult:
    file = parse_experiment(text, "experiments/hub.yaml")
    return rehearse(file, read_facts(file.experiment, ROOT), ROOT, PlainDisplay(StringIO()))


def test_the_quickstart_from_training_to_evaluation() -> None:
    path = ROOT / "experiments/examples/quickstart.yaml"
    file = load_experiment(path, path.relative_to(ROOT).as_posix())
    shown = StringIO()
    result = rehearse(file, read_facts(file.experiment, ROOT), ROOT, PlainDisplay(shown))
    assert result.failure is None, result.failure
    assert list(result.seconds) == ["twin", "train", "merge", "gguf", "evaluate"]
    assert result.folder is None
    assert "train: train · step 2/2" in shown.getvalue()
    assert "llama.cpp converts, quantizes and runs it: Q8_0, Q4_K_M" in result.proves
    assert all("stand for all of it" in note for note in result.substituted)
    assert result.summary().startswith("rehearsal passed in ")


def test_a_bad_setting_is_named_with_its_line() -> None:
    text = HUB.replace("MODEL", "Qwen/Qwen3-0.6B").replace("TARGETS", "all-linear")
    result = rehearse_text(text.replace("weight_decay: 0.01", "lr_scheduler_type: cosinee"))
    assert result.failure is not None
    assert result.failure.exit_code == 1
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "sft:" in line)
    assert str(result.failure.at).startswith(f"experiments/hub.yaml:{line}:")
    assert "cosinee is not a valid SchedulerType" in result.failure.message
    assert result.folder is not None
    (log,) = result.folder.glob("runs/*/train/log.txt")
    assert "cosinee" in log.read_text(encoding="utf-8")
    shutil.rmtree(result.folder)


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "[q_proj, v_proj]"),
        ("Qwen/Qwen3-4B", "all-linear"),
        ("google/gemma-3-1b-it", "[q_proj, v_proj]"),
        ("google/gemma-3-12b-it", "[q_proj, v_proj]"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "[q_proj, v_proj]"),
        ("microsoft/phi-4", "[qkv_proj, o_proj]"),
    ],
)
def test_training_on_the_stand_in_of_a_family(model: str, targets: str) -> None:
    result = rehearse_text(HUB.replace("MODEL", model).replace("TARGETS", targets))
    assert result.failure is None, result.failure and result.failure.as_text()
    assert list(result.seconds) == ["twin", "train"]
    assert f"`{model}` is not in this repository" in result.substituted[0]
    assert "made conversations stand in" in result.substituted[1]


def test_a_vision_language_base_becomes_gguf_too() -> None:
    result = rehearse_text(HUB.replace("MODEL", "google/gemma-3-4b-it").replace("TARGETS", "[q_proj]") + GGUF)
    assert result.failure is None, result.failure and result.failure.as_text()
    assert list(result.seconds) == ["twin", "train", "merge", "gguf", "evaluate"]
