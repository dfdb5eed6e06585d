"""The snapshot of SFTConfig and DPOConfig equals the installed source, read as text; no import of TRL or torch."""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.trl_fields import DPO, SFT, dpo_fields, read_source, sft_fields

SITE = Path(sysconfig.get_paths()["purelib"])


def test_snapshot_is_of_the_installed_versions() -> None:
    if not (SITE / "trl").is_dir():
        pytest.skip("trl is not installed here")
    for held, config in ((sft_fields(), SFT), (dpo_fields(), DPO)):
        types, choices = read_source(SITE, config)
        assert held.types == types
        assert {name: list(values) for name, values in held.choices.items()} == choices
        assert held.versions == {name: metadata.version(name) for name in held.versions}


def test_pins_agree() -> None:
    pins = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in sft_fields().versions.items():
        assert f'"{name}=={version}"' in pins


def test_types_and_choices() -> None:
    held = sft_fields()
    assert len(held.types) == 135
    wanted = {"max_length": "int", "warmup_steps": "float", "packing": "bool", "optim": "str"}
    wanted |= {"include_for_metrics": "list", "model_init_kwargs": "any", "lr_scheduler_type": "str"}
    assert {name: held.types[name] for name in wanted} == wanted
    assert set(held.types.values()) <= {"int", "float", "bool", "str", "list", "dict", "any"}
    assert {"adamw_8bit", "adamw_torch_fused"} < set(held.choices["optim"])
    assert held.choices["packing_strategy"] == ("bfd", "bfd_split", "wrapped")
    assert set(held.choices) <= set(held.types)


def test_each_trainer_has_fields_of_its_own() -> None:
    sft, dpo = sft_fields(), dpo_fields()
    assert {name: dpo.types[name] for name in ("beta", "loss_type", "label_smoothing", "disable_dropout")} == {
        "beta": "float",
        "loss_type": "list",
        "label_smoothing": "float",
        "disable_dropout": "bool",
    }
    assert {"packing", "assistant_only_loss"} <= sft.types.keys() - dpo.types.keys()
    assert {"beta", "sync_ref_model", "loss_weights"} <= dpo.types.keys() - sft.types.keys()
    assert dpo.choices["truncation_mode"] == ("keep_end", "keep_start")
    assert dpo.choices["optim"] == sft.choices["optim"]


def test_reading_imports_no_training_stack() -> None:
    code = "import sys, pipeline.trl_fields as t; t.sft_fields(); "
    code += "sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
