"""scripts/train_mlx.py and what it is given: a base, its quantised form, data; which pairs of bases are one model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlx_runs import (
    PLAIN,
    ROOT,
    changed_run,
    edit,
    events,
    inline,
    load,
    make_run,
    make_twin,
    manifest,
    mlx_logits,
    mlx_model,
    quantised,
    refusal,
    torch_logits,
    write_rows,
)
from test_scripts_train import ONE_THREAD, conversations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """train_mlx.py as a module."""
    return load("train_mlx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twin(tmp_path_factory.mktemp("bases") / "qwen3", "qwen3")


def with_mlx_base(run: Path, folder: Path, **train: Any) -> Path:
    request = json.loads(run.read_text())
    request["experiment"]["train"] |= train
    return edit(run, experiment=request["experiment"], inputs=request["inputs"] | {"mlx_base": {"path": str(folder)}})


def changed_base(base: Path, folder: Path, name: str, **changes: Any) -> Path:
    """A copy of a base with another value in one of its JSON files."""
    shutil.copytree(base, folder)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return folder


OTHER_BASES = {
    "hidden_size": ("config.json", {"hidden_size": 128}, "`hidden_size: 128`, `acme/tiny` has `64`"),
    "vocab_size": ("config.json", {"vocab_size": 600}, "`vocab_size: 600`"),
    "layers": ("config.json", {"num_hidden_layers": 3}, "`num_hidden_layers: 3`"),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantised, and not by MLX"),
    "end": ("tokenizer_config.json", {"eos_token": "<pad>"}, "texts end with `<pad>`, in the base with `<eos>`"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_an_mlx_base_that_is_another_model(
    script: ModuleType,
    base: Path,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    name, changes, said = OTHER_BASES[case]
    run = with_mlx_base(changed_run(tmp_path, base), changed_base(base, tmp_path / "other", name, **changes))
    assert inline(script, run, monkeypatch) == 2
    assert said in events(capfd.readouterr().out, "error")[0]["message"]


def test_tokens_and_prompts_of_an_mlx_base_are_the_bases_own(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name, said in (("chat_template.jinja", "the chat template in"), ("tokenizer.json", "gives other tokens")):
        other = Path(shutil.copytree(base, tmp_path / name.partition(".")[0] / "other"))
        text = (other / name).read_text(encoding="utf-8")
        (other / name).write_text(
            text + " " if "jinja" in name else text.replace('"merges": [', '"merges": [], "x": [')
        )
        run = with_mlx_base(changed_run(other.parent, base), other)
        assert inline(script, run, monkeypatch) == 2
        assert said in events(capfd.readouterr().out, "error")[0]["message"]


def test_which_base_may_be_quantised(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "full").mkdir()
    error = refusal(script, changed_run(tmp_path / "full", base, "method", "qlora"), monkeypatch, capfd)
    assert error["message"] == "`train.method: qlora`, but `acme/tiny` is not quantised"
    small = quantised(base, tmp_path / "small", 8)
    (tmp_path / "merge").mkdir()
    error = refusal(script, changed_run(tmp_path / "merge", small), monkeypatch, capfd)
    assert "is quantised by MLX (8 bits, groups of 32), and an adapter is merged into full weights" in error["message"]
    odd = quantised(base, tmp_path / "odd", 6)
    (tmp_path / "dora").mkdir()
    run = with_mlx_base(changed_run(tmp_path / "dora", base, "lora.dora", True), odd)
    assert inline(script, run, monkeypatch) == 2
    assert "`train.lora.dora: true` on `odd` of 6 bits" in events(capfd.readouterr().out, "error")[0]["message"]


def test_without_mlx_the_error_says_how_to_get_it(base: Path, tmp_path: Path) -> None:
    run = changed_run(tmp_path, base)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlx'] = None\n")
    command, environment = (
        [sys.executable, ROOT / "scripts/train_mlx.py", run],
        ONE_THREAD | {"PYTHONPATH": str(tmp_path)},
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "`mlx` is not installed" in done.stderr
    assert 'hint: pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2' in done.stderr


ROPES: dict[str, tuple[str, dict]] = {
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}),
    "linear": ("qwen3", {"factor": 4.0, "rope_theta": 500.0}),
    "yarn": ("qwen3", {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 500.0}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_mlx_reads_what_transformers_wrote(kind: str, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters`, which `mlx_lm` passes over: another model, without a word."""
    from tiny_models import make_tiny

    family, rope = ROPES[kind]
    rope = {"rope_type": kind, "original_max_position_embeddings": 16, **rope}
    made = make_tiny(tmp_path / "base", family, rope_parameters=rope, max_position_embeddings=64)
    ids = [1, *range(40, 90)]  # past what the model was first made for
    theirs, ours = torch_logits(made, ids), mlx_logits(mlx_model(made), ids)
    assert abs(ours - theirs).max() < 1e-4 * abs(theirs).max()


def test_a_base_in_float32_is_trained_in_bfloat16(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    wide = Path(shutil.copytree(base, tmp_path / "base"))
    weights = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    made = []
    for name, folder in (("wide", wide), ("usual", base)):
        (tmp_path / name).mkdir()
        run = changed_run(tmp_path / name, folder)
        assert inline(script, run, monkeypatch) == 0
        made.append(manifest(run)["history"])
    assert made[0] == made[1]


WRONG_BASES = {
    "config.json": "no readable config.json",
    "tokenizer.json": "has no tokenizer",
    "model.safetensors": "has no weights",
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_a_base_that_is_not_whole(
    script: ModuleType,
    base: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    (other / name).unlink()
    assert WRONG_BASES[name] in refusal(script, changed_run(tmp_path, other), monkeypatch, capfd)["message"]


def test_what_mlx_cannot_load_or_has_not(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    changes = {"model_type": "bert"}, {}, {}
    fields = ("", None), ("mlx", {"num_layers": 3}), ("lora.targets", ["qkv_proj"])
    said = ["Model type bert not supported", "and the base has 2 layers", "`qkv_proj` is no linear module"]
    for number, (change, field, words) in enumerate(zip(changes, fields, said, strict=True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = changed_run(folder, changed_base(base, folder / "base", "config.json", **change), *field)
        assert inline(script, run, monkeypatch) == 2
        assert words in events(capfd.readouterr().out, "error")[0]["message"]


# Trainings


def test_a_loss_that_is_not_a_number_ends_the_run(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(base, tmp_path / "base"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", broken, write_rows(tmp_path / "data.jsonl", conversations(4)), sft=PLAIN)
    assert inline(script, run, monkeypatch) == 1
    (error,) = events(capfd.readouterr().out, "error")
    assert error["message"] == "`loss` is nan at step 1, with a learning rate of 0.001"
    assert error["hint"] == "use `train.learning_rate: 1e-04`, or check the base's weights and the data"
    assert list((run.parent / "out").iterdir()) == []


def test_an_adapter_that_did_not_move_is_no_result(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    run = make_run(tmp_path / "run", base, data, max_steps=1, sft=PLAIN | {"warmup_steps": 10})
    assert inline(script, run, monkeypatch) == 1
    assert "no weight has moved" in events(capfd.readouterr().out, "error")[0]["message"]
