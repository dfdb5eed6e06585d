"""How `scripts/convert_gguf.py` names the cut of a byte-level BPE vocabulary that the converter never saw."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.twin_families import FAMILIES, GPT_4O, LLAMA_3, QWEN_2

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_gguf.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_gguf", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_gguf"] = module
    spec.loader.exec_module(module)
    return module


def definition(*regexes: str, own: bool = False, ignore_merges: bool = False, **split: Any) -> dict[str, Any]:
    """The parts of a tokenizer.json that say how text is cut."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | split
        for regex in regexes
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own}
    before = {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last
    return {"pre_tokenizer": before, "model": {"type": "BPE", "ignore_merges": ignore_merges}}


def test_known_cuts_have_llama_cpps_names(script: ModuleType) -> None:
    assert script.pre_tokenizer(definition(LLAMA_3, ignore_merges=True)) == "llama-bpe"
    assert script.pre_tokenizer(definition(LLAMA_3)) == "dbrx"
    assert script.pre_tokenizer(definition(QWEN_2)) == "qwen2"
    assert script.pre_tokenizer(definition(GPT_4O)) == "gpt-4o"
    assert script.pre_tokenizer(definition(own=True)) == "gpt-2"


@pytest.mark.parametrize(
    "other",
    [
        definition(r"\p{N}{1,3}", LLAMA_3),
        definition(LLAMA_3 + "|x"),
        definition(QWEN_2, ignore_merges=True),
        definition(QWEN_2, own=True),
        definition(QWEN_2, behavior="Removed"),
        definition(QWEN_2, invert=True),
        definition(QWEN_2, pattern={"String": " "}),
        definition(),
        {"pre_tokenizer": None, "model": {"type": "BPE"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}}, "model": {}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}, "model": {}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "model": {}},
    ],
)
def test_any_other_cut_stays_unknown(script: ModuleType, other: dict[str, Any]) -> None:
    assert script.pre_tokenizer(other) is None


def test_it_knows_the_cut_of_every_stand_in(script: ModuleType) -> None:
    made = [family.tokenizer for family in FAMILIES.values() if family.tokenizer.cut]
    assert {(tokenizer.cut, tokenizer.ignore_merges) for tokenizer in made} < script.PRE_TOKENIZERS.keys()
