"""The memory estimate against published traces of the pinned stack, and its directions."""

import pytest
from examples import GOOD, changed

from pipeline.flavors import FLAVORS
from pipeline.loader import parse_experiment
from pipeline.memory import estimate_memory
from pipeline.models import CATALOGUE, shape_of

GEMMA = CATALOGUE["google/gemma-3-12b-it"]


def total(*changes: tuple[str, str]) -> float:
    text = GOOD
    for pattern, replacement in changes:
        text = changed(pattern, replacement, text)
    return estimate_memory(parse_experiment(text).experiment, GEMMA).total


# Allocation traces of Gemma 3 12B, r=64 on q/k/v/o, checkpointing, micro-batch 1 (text tower; +0.3 GiB for SigLIP).
@pytest.mark.parametrize(("length", "traced"), [(2048, 9.0), (4096, 10.4), (8192, 13.3), (16384, 19.4)])
def test_within_its_band_of_the_traces(length: int, traced: float) -> None:
    assert total(("max_length: 2048", f"max_length: {length}")) == pytest.approx(traced + 0.3 + 0.55, rel=0.2)


def test_more_of_anything_needs_more() -> None:
    assert total() < total(("max_length: 2048", "max_length: 4096"))
    assert total() < total(("r: 64", "r: 128"))
    assert total() < total(("method: qlora", "method: lora"))
    assert total(("method: qlora", "method: lora")) < total(
        ("method: qlora", "method: full"), ("  lora: .*\n", ""), ("^merge: .*\n", "")
    )


def test_verdicts_use_the_whole_band() -> None:
    estimate = estimate_memory(parse_experiment(GOOD).experiment, GEMMA)
    assert estimate.fits(FLAVORS["a100-large"]) is True
    assert estimate.fits(FLAVORS["t4-small"]) in (True, None)
    huge = estimate_memory(parse_experiment(changed("max_length: 2048", "max_length: 131072")).experiment, GEMMA)
    assert huge.fits(FLAVORS["a10g-large"]) is False


# Parameter counts their model cards state, in billions.
@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("google/gemma-3-12b-it", 12.2),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.25),
        ("HuggingFaceTB/SmolLM3-3B", 3.08),
    ],
)
def test_parameter_counts(model: str, billions: float) -> None:
    assert CATALOGUE[model].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_shape_of_a_config() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    assert shape_of(config) == CATALOGUE["meta-llama/Llama-3.1-8B-Instruct"]
    assert shape_of({"model_type": "bert"}) is None


def test_lora_parameters_of_the_seed_adapter() -> None:
    # r=64 on q/k/v/o of Gemma 3 12B: 96.9 M in all, 11.94 M of them on the vision tower, which is excluded here.
    count = GEMMA.lora_parameters(64, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert count == pytest.approx(96.9e6 - 11.94e6, rel=0.005)
