"""scripts/train_mlx.py and the experiment's fields: each is honoured or refused by name."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlx_runs import TRAIN, changed_run, edit, inline, load, make_twin, manifest, refusal

from pipeline.experiment import Train
from pipeline.train_sections import Lora

pytestmark = pytest.mark.slow

# Another value than the one of the runs here, per field. The result must differ with it …
HONOURED: dict[str, Any] = {
    "epochs": 2.0,
    "max_steps": 2,
    "max_length": 30,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 5e-3,
    "loss_on": "all",
    "seed": 7,
    "save_steps": 1,
    "mlx": {"num_layers": 1},
    "lora.r": 2,
    "lora.alpha": 16,
    "lora.dropout": 0.5,
    "lora.targets": ["q_proj"],
    "lora.rslora": True,
    "lora.dora": True,
}
# … or must be refused by this name. What says only where and for how long something runs changes nothing.
REFUSED: dict[str, Any] = {
    "method": "full",
    "packing": True,
    "tracking": "trackio",
    "script": "scripts/my_train.py",
    "lora.exclude": "layers.0",
    "lora.modules_to_save": ["embed_tokens"],
    "lora.rank_pattern": {"q_proj": 2},
    "lora.alpha_pattern": {"q_proj": 2.0},
}
ELSEWHERE = {"flavor", "timeout", "backend", "sft", "lora", "mlx"}
ELSEWHERE |= {"nodes", "dpo"}  # the schema refuses the one, rule MLX004 the method that reads the other


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """train_mlx.py as a module."""
    return load("train_mlx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twin(tmp_path_factory.mktemp("bases") / "qwen3", "qwen3")


def result(script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a run makes, without what only its clock decides."""
    assert inline(script, run, monkeypatch) == 0
    told = manifest(run)
    told["metrics"].pop("tokens_per_s")
    config = json.loads((run.parent / "out/mlx/adapter_config.json").read_text())
    return {"config": config, **{key: told[key] for key in ("metrics", "history", "eval_history")}}


def test_every_field_of_the_schema_is_in_one_of_the_tables() -> None:
    known = {*Train.model_fields, *(f"lora.{name}" for name in Lora.model_fields)}
    assert known <= {*HONOURED, *REFUSED, *ELSEWHERE}
    assert known >= {*HONOURED, *REFUSED} - ELSEWHERE


@pytest.fixture(scope="module")
def plain_result(script: ModuleType, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        return result(script, changed_run(tmp_path_factory.mktemp("plain"), base), patch)


@pytest.mark.parametrize("field", HONOURED)
def test_a_field_that_is_honoured_changes_the_result(
    script: ModuleType, base: Path, plain_result: dict, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed_run(tmp_path, base, field)
    request = json.loads(run.read_text())
    section, _, key = field.rpartition(".")
    place = request["experiment"]["train"]["lora"] if section else request["experiment"]["train"]
    place[key] = HONOURED[field]
    edit(run, experiment=request["experiment"])
    assert result(script, run, monkeypatch) != plain_result


@pytest.mark.parametrize(("field", "value"), [("flavor", "l4x1"), ("timeout", 60), ("script", "scripts/train_mlx.py")])
def test_where_and_how_long_changes_nothing(
    script: ModuleType,
    base: Path,
    plain_result: dict,
    field: str,
    value: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert result(script, changed_run(tmp_path, base, field, value), monkeypatch) == plain_result


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_mlx_has_no_word_for_is_refused(
    script: ModuleType,
    base: Path,
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    run = changed_run(tmp_path, base)
    request = json.loads(run.read_text())
    section, _, key = field.rpartition(".")
    place = request["experiment"]["train"]["lora"] if section else request["experiment"]["train"]
    place[key] = REFUSED[field]
    error = refusal(script, edit(run, experiment=request["experiment"]), monkeypatch, capfd)
    assert error["message"] == f"`train.{field}: {json.dumps(REFUSED[field])}` cannot be honoured with MLX"


# `train.sft`


SFT: dict[str, tuple[Any, Any]] = {  # another value than the default, and one that is none
    "optim": ("adamw_torch", "adamw_8bit"),
    "lr_scheduler_type": ("cosine", "polynomial"),
    "warmup_steps": (0.5, -1),
    "weight_decay": (0.1, "much"),
    "max_grad_norm": (0.5, True),
    "adam_beta1": (0.8, 1.0),
    "adam_beta2": (0.9, 1),
    "adam_epsilon": (1e-6, None),
    "gradient_checkpointing": (False, "yes"),
}


def test_every_field_of_sft_config_is_honoured_or_refused_by_name(script: ModuleType) -> None:
    from trl import SFTConfig

    train = {**TRAIN, "sft": {}}
    plain = script.read_choices({"experiment": {"train": train}})
    assert script.SFT.keys() == SFT.keys()
    for field in dataclasses.fields(SFTConfig):
        value, _ = SFT.get(field.name, (1, None))
        run = {"experiment": {"train": {**train, "sft": {field.name: value}}}}
        if field.name in script.SFT:
            # Both names of AdamW are one optimizer here.
            assert (script.read_choices(run) == plain) == (field.name == "optim"), field.name
            continue
        with pytest.raises(script.InputError) as caught:
            script.read_choices(run)
        assert f"`train.sft.{field.name}`" in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("key", SFT)
def test_a_value_out_of_range_is_refused(script: ModuleType, key: str) -> None:
    bad = SFT[key][1]
    with pytest.raises(script.InputError) as caught:
        script.read_choices({"experiment": {"train": {**TRAIN, "sft": {key: bad}}}})
    assert caught.value.message == f"`train.sft.{key}: {json.dumps(bad)}` cannot be honoured with MLX"
    assert caught.value.hint.startswith("use ")


def test_a_slip_of_the_pen_gets_the_nearest_name(script: ModuleType) -> None:
    for key, hint in (("weight_decai", "did you mean `weight_decay`?"), ("save_steps", "use `train.save_steps`")):
        with pytest.raises(script.InputError) as caught:
            script.read_choices({"experiment": {"train": {**TRAIN, "sft": {key: 1}}}})
        assert caught.value.hint == hint


def test_dropout_and_recomputed_layers_do_not_go_together(script: ModuleType) -> None:
    train = {**TRAIN, "lora": TRAIN["lora"] | {"dropout": 0.1}}
    assert script.read_choices({"experiment": {"train": train}}).checkpointing is False
    with pytest.raises(script.InputError, match="wrong gradients in MLX"):
        script.read_choices({"experiment": {"train": {**train, "sft": {"gradient_checkpointing": True}}}})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_learning_rates_are_those_of_transformers(script: ModuleType, schedule: str, warmup: float) -> None:
    import torch
    from transformers import TrainingArguments, get_scheduler

    run = {"experiment": {"train": {**TRAIN, "sft": {"lr_scheduler_type": schedule, "warmup_steps": warmup}}}}
    choices, steps = script.read_choices(run), TrainingArguments("out", use_cpu=True, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(schedule, optimizer, steps.get_warmup_steps(10), 10)
    for step in range(10):
        assert script.rate_at(step, 10, 0.3, choices) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
