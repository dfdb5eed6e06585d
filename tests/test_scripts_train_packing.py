"""Rows that share a sequence do not read each other, whatever computes attention; and what is told where that fails."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_scripts_train import (
    bases,
    conversations,
    edit,
    events,
    inline,
    make_run,
    manifest,
    script,
    trainer_of,
    write_rows,
)

__all__ = ["bases", "script"]  # fixtures
pytestmark = pytest.mark.slow
ROWS = ([5, 90, 17, 33, 208, 61, 12, 400, 77, 9], [301, 44, 18, 250, 66, 71, 8], [21, 22, 23, 350, 24])
FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma3_text", "gemma3_vl")


def tiny_model(family: str, attention: str) -> Any:
    """A random model in fp32, with weights large enough that what is read shows; a window shorter than a pack."""
    import torch
    import transformers
    from tiny_models import CLASSES, config_of

    torch.manual_seed(0)
    window = {"sliding_window": 6} if family in ("gemma3_text", "gemma3_vl", "mistral") else {}
    config = config_of(family, initializer_range=0.3, **window)
    config._attn_implementation = attention
    return getattr(transformers, CLASSES[family])(config).eval()


def packed(*rows: list[int], positions: bool = True) -> dict:
    """One pack, as TRL's collator makes it; or with nothing that says where a row begins, as `wrapped` packs are."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    flat = [token for row in rows for token in row]
    example = {"input_ids": flat, "labels": flat, "seq_lengths": [len(row) for row in rows]}
    if not positions:
        del example["seq_lengths"]
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=positions)([example])
    del inputs["labels"]
    return inputs


def logits(model: Any, inputs: dict) -> Any:
    import torch

    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].log_softmax(-1)


def differences(model: Any, positions: bool) -> list[float]:
    """For each row, how far what the model says in the pack is from what it says of the row alone."""
    whole, start, found = logits(model, packed(*ROWS, positions=positions)), 0, []
    for row in ROWS:
        alone = logits(model, packed(row))
        found.append(float((whole[start : start + len(row)] - alone).abs().max()))
        start += len(row)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_is_read_as_if_alone(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    assert max(differences(model, positions=True)) < 1e-4
    first, *others = differences(model, positions=False)
    assert first < 1e-4
    assert min(others) > 0.05  # the same pack without boundaries leaks, and this test sees it


def test_packs_of_trl_say_where_rows_begin_unless_they_are_wrapped() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    rows = Dataset.from_dict({"input_ids": [list(row) for row in ROWS]})
    assert pack_dataset(rows, 32, "bfd")["seq_lengths"] == [[10, 7, 5]]
    assert "seq_lengths" not in pack_dataset(rows, 32, "wrapped").column_names


def test_training_looks_whether_rows_are_apart(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(8))
    run = make_run(tmp_path, bases("qwen3"), data, packing=True, max_length=64)
    trainer, _ = trainer_of(script, run)
    assert script.rows_apart(trainer)
    assert trainer.model.training
    collate = trainer.data_collator

    def without_boundaries(examples: list[dict]) -> dict:
        inputs = collate(examples)
        return {key: inputs[key] for key in ("input_ids", "labels")}

    trainer.data_collator = without_boundaries
    assert not script.rows_apart(trainer)


@pytest.mark.parametrize("family", ["RecurrentGemma", "Lfm2"])
def test_a_base_that_carries_a_state_is_not_trained_on_packs(
    family: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One whose state runs on in silence, and one that says that it would."""
    import torch
    import transformers
    from tiny_models import save_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    more: dict[str, Any] = {"layer_types": ["conv", "conv", "full_attention"], "num_key_value_heads": 2}
    if family == "RecurrentGemma":
        more = {"lru_width": 64, "attention_window_size": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **more, vocab_size=512, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", "qwen3")
    data = write_rows(tmp_path / "data.jsonl", conversations(8))
    run = make_run(tmp_path, tmp_path / "base", data, packing=True, max_length=64, method="full")
    assert inline(script, run, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "error: rows that share a sequence read each other in this base" in said
    assert "hint: use `packing: false`" in said


def test_wrapped_packs_are_refused(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(2))
    sft = {"packing_strategy": "wrapped"}
    run = script.load_run(make_run(tmp_path, bases("llama"), data, packing=True, sft=sft), "train")
    with pytest.raises(script.InputError, match="read the rows before them"):
        script.sft_config(run, has_eval=False)


def test_rows_end_to_end_learn_what_padded_rows_do(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, sft in (("padded", {}), ("flat", {"padding_free": True})):
        data = write_rows(tmp_path / f"{name}.jsonl", conversations(21))
        chosen = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 2, "method": "full", "sft": sft}
        run = make_run(tmp_path / name, bases("llama"), data, 0.25, **chosen)
        assert inline(script, run, monkeypatch) == 0
        found.append(manifest(run)["metrics"])
    padded, flat = found
    for key in ("train_loss", "eval_loss"):
        assert flat[key] == pytest.approx(padded[key], rel=2e-3)
    assert [flat[key] for key in ("tokens_seen", "tokens_trained")] == [
        padded[key] for key in ("tokens_seen", "tokens_trained")
    ]


def test_layers_are_recomputed_unless_the_plan_or_the_file_says_otherwise(
    script: ModuleType, bases: Any, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(2))

    def recomputes(sft: dict, **changes: Any) -> bool:
        run = edit(make_run(tmp_path, bases("llama"), data, sft=sft), **changes)
        return script.sft_config(script.load_run(run, "train"), has_eval=False).gradient_checkpointing

    assert recomputes({})
    assert not recomputes({}, checkpointing=False)
    assert recomputes({"gradient_checkpointing": True}, checkpointing=False)


def test_a_kernel_that_cannot_be_had_is_told_and_does_without(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    run: dict = {"device": "cuda", "attention": "kernels-community/flash-attn2", "experiment": {"train": {"sft": {}}}}
    script.bring_kernels(run)
    assert script.flash_kernel(run) is None
    printed = events(capsys.readouterr().out, "warning")
    assert "`kernels==0.18.2` could not be installed" in printed[0]["message"]
    assert "`kernels-community/flash-attn2` cannot be loaded" in printed[1]["message"]
    assert run["warnings"] == [printed[1]["message"]]
    assert script.flash_kernel({"device": "cuda"}) is None
    script.bring_kernels({**run, "device": "cpu"})
    assert events(capsys.readouterr().out, "phase") == []


def test_the_plan_and_the_script_mean_the_same_kernel(script: ModuleType) -> None:
    """And transformers fetches it, in a version that it knows, by the `kernels` that it accepts."""
    from packaging.version import Version
    from transformers.integrations.hub_kernels import get_attn_kernel_version
    from transformers.utils import import_utils

    from pipeline.attention import FLASH

    assert get_attn_kernel_version(FLASH) is not None
    pinned = Version(script.KERNELS.partition("==")[2])
    assert Version(import_utils.KERNELS_MIN_VERSION) <= pinned < Version(import_utils.KERNELS_MAX_VERSION)
    assert json.dumps(FLASH) == '"kernels-community/flash-attn2"'
