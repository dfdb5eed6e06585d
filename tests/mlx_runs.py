"""Training with MLX on tiny models, for the tests of train_mlx.py and convert_adapter.py: runs, twins and logits."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_scripts_train import (
    CHAT,
    LONGER,
    LORA,
    TRAIN,
    conversations,
    edit,
    events,
    inline,
    make_run,
    manifest,
    write_rows,
)

ROOT = Path(__file__).parents[1]
# Gemma 3 repeats five sliding layers and a full one, and MLX looks at the sixth. Other thetas than the classes' own
# defaults: a loader that passes over what the config says makes another model.
TWINS: dict[str, dict] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
}
# Reused in one process, a layer class that recomputes would recompute in layers: see mlx_lm's `grad_checkpoint`.
PLAIN = {"gradient_checkpointing": False}
ROWS = [{"messages": LONGER}, {"messages": CHAT}, *conversations(4)]
__all__ = ["LORA", "TRAIN", "edit", "events", "inline", "make_run", "manifest", "write_rows"]


@cache
def load(name: str) -> ModuleType:
    """A job script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_twin(folder: Path, family: str) -> Path:
    """A tiny base whose config has other values than MLX's defaults, with a longer context than its window."""
    from tiny_models import make_tiny

    return make_tiny(folder, family, **TWINS.get(family, {}))


def quantised(base: Path, folder: Path, bits: int) -> Path:
    """The base as `mlx_lm.convert -q` makes it."""
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", base, "--mlx-path", folder, "-q"]
    done = subprocess.run([*command, "--q-bits", str(bits), "--q-group-size", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def merged(base: Path, artifact: Path, folder: Path) -> Path:
    """What scripts/merge_adapter.py makes of a base and the artifact of a train stage."""
    folder.mkdir()
    run = json.loads((artifact.parent / "run.json").read_text()) | {"stage": "merge", "work": str(folder / "work")}
    run |= {"inputs": {"base": {"path": str(base)}, "adapter": {"path": str(artifact)}}}
    run |= {"output": {"path": str(folder / "out")}}
    (folder / "run.json").write_text(json.dumps(run))
    command = [sys.executable, ROOT / "scripts/merge_adapter.py", folder / "run.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def convert(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """convert_adapter.py as a user starts it."""
    command = [sys.executable, ROOT / "scripts/convert_adapter.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def mlx_model(base: Path, adapter: Path | None = None, fuse: bool = False) -> Any:
    """The base in MLX, with an adapter if given, `fuse`d as `mlx_lm.fuse` does."""
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import load_adapters, load_model

    config = json.loads((base / "config.json").read_text())
    model, _ = load_model(base, model_config=load("train_mlx").mlx_config(config))
    model = load_adapters(model, str(adapter)) if adapter else model
    if fuse:
        model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    model.eval()
    return model


def mlx_logits(model: Any, ids: list[int]) -> Any:
    """Scores in float32, as numpy: so that only weights can make a difference."""
    import mlx.core as mx
    import numpy

    model.set_dtype(mx.float32)
    return numpy.array(model(mx.array([ids]))[0])


def torch_logits(base: Path, ids: list[int], adapter: Path | None = None) -> Any:
    """Scores of transformers, or of PEFT, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def copied(folder: Path, target: Path, **config: Any) -> Path:
    """A copy of an adapter with changes to its adapter_config.json."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def changed_run(folder: Path, base: Path, field: str = "", value: Any = None, **more: Any) -> Path:
    """A short run with held-out rows whose field, such as `lora.r`, has another value."""
    section, _, key = field.rpartition(".")
    changes = {"sft": PLAIN, "save_steps": 50, **more}
    changes |= {"lora": {key: value}} if section else {key: value} if key else {}
    data = write_rows(folder / "data.jsonl", ROWS)
    run = make_run(folder / "run", base, data, **changes)
    held_out = write_rows(folder / "held_out.jsonl", ROWS[:2])
    return edit(run, inputs=json.loads(run.read_text())["inputs"] | {"eval_data": {"path": str(held_out)}})


def refusal(script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> dict:
    """The error event of a run that ends with exit code 2 and leaves nothing."""
    assert inline(script, run, monkeypatch) == 2
    (error,) = events(capfd.readouterr().out, "error")
    assert error["hint"]
    assert not (run.parent / "out").exists()
    return error
