"""What the twin of a base keeps and what it shrinks. Pure: no weights, no torch."""

import json
from pathlib import Path

import pytest

from pipeline.twin import layer_choice, shrink_config, twin_of
from pipeline.twin_families import FAMILIES, SPECIALS, default_config, family_of

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "rms_norm_eps": 1e-05,
}
SIX = ["sliding_attention"] * 5 + ["full_attention"]


def test_sizes_shrink_and_everything_else_stays() -> None:
    small = shrink_config(LLAMA, 128256)
    assert (small["hidden_size"], small["intermediate_size"], small["num_hidden_layers"]) == (256, 512, 2)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    unchanged = {"architectures", "model_type", "vocab_size", "eos_token_id", "rope_scaling", "rms_norm_eps"}
    assert {key: small[key] for key in unchanged} == {key: LLAMA[key] for key in unchanged}
    assert small.keys() == LLAMA.keys()


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "moe_intermediate_size"])
def test_rows_of_matrices_suit_k_quants(key: str) -> None:
    small = shrink_config({**LLAMA, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 1000)
    assert small[key] % 256 == 0
    assert (small["num_experts"], small["num_experts_per_tok"]) == (4, 2)


def test_attention_without_groups_stays_without() -> None:
    assert shrink_config({**LLAMA, "num_key_value_heads": 32}, 1000)["num_key_value_heads"] == 4
    assert shrink_config({**LLAMA, "num_key_value_heads": 1}, 1000)["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0, 1]),
        ({"num_hidden_layers": 12, "layer_types": SIX * 2}, [0, 1, 2, 3, 4, 5]),
        ({"num_hidden_layers": 12, "sliding_window_pattern": 6}, [0, 1, 2, 3, 4, 5]),
        ({"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, [0, 1, 2, 3]),
        ({"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"]}, [0, 1]),
        ({"num_hidden_layers": 40, "layer_types": ["a"] * 30 + ["b"] * 10}, [0, 30]),
        ({"num_hidden_layers": 4, "layer_types": ["a"] * 4}, [0, 1]),
        ({"num_hidden_layers": 1}, [0]),
    ],
)
def test_every_kind_of_layer_is_kept(changes: dict, kept: list[int]) -> None:
    config = {**LLAMA, **changes}
    assert layer_choice(config) == kept
    small = shrink_config(config, 1000)
    assert small["num_hidden_layers"] == len(kept)
    if "layer_types" in changes:
        assert set(small["layer_types"]) == set(changes["layer_types"])


def test_rope_factors_fit_the_smaller_head() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    small = shrink_config({**LLAMA, "rope_scaling": scaling}, 1000)
    assert len(small["rope_scaling"]["long_factor"]) == 32
    sections = shrink_config({**LLAMA, "rope_scaling": {"mrope_section": [24, 20, 20]}}, 1000)
    assert sum(sections["rope_scaling"]["mrope_section"]) == 32


def test_a_vision_tower_shrinks_too() -> None:
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    tower = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": tower, "mm_tokens_per_image": 256}
    small = shrink_config(config, 262208)
    assert small["text_config"]["hidden_size"] == 256
    assert small["text_config"]["vocab_size"] == 262208
    assert small["mm_tokens_per_image"] == 4
    assert (small["vision_config"]["hidden_size"], small["vision_config"]["num_hidden_layers"]) == (64, 2)
    assert small["vision_config"]["vision_use_head"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_of_a_stand_in_lie_in_its_vocabulary(family: str) -> None:
    spec = twin_of("acme/base", None, family, ["some text"], 0)

    def ids(value: object) -> list[int]:
        if not isinstance(value, dict):
            return []
        own = [inner for key, inner in value.items() if key.endswith(("_token_id", "_token_index"))]
        return own + [number for inner in value.values() for number in ids(inner)]

    assert all(0 < number < spec.vocab for number in ids(spec.config))
    text = spec.config.get("text_config", spec.config)
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (1, 2, 3)
    assert text["vocab_size"] == spec.vocab
    assert spec.made is not None
    assert len(SPECIALS) + len(spec.made.markers) + 256 < spec.vocab
    assert json.loads(spec.as_json())["config"] == spec.config
    assert default_config(family)["architectures"] == [FAMILIES[family].architecture]


def test_a_base_in_the_repository_is_its_own_template() -> None:
    folder = ROOT / "experiments/examples/tiny-docs-llama"
    spec = twin_of("./base", folder, None, [], 0)
    assert spec.tokenizer == str(folder)
    assert spec.substituted == ()
    assert spec.vocab == spec.config["vocab_size"] == 2048


@pytest.mark.parametrize(
    ("model", "model_type", "family"),
    [
        ("google/gemma-3-12b-it", "gemma3", "gemma3"),
        ("google/gemma-3-1b-it", None, "gemma3_text"),
        ("google/gemma-4-12b-it", None, "gemma4_text"),
        ("Qwen/Qwen3-30B-A3B", None, "qwen3_moe"),
        ("Qwen/Qwen3-4B", None, "qwen3"),
        ("Qwen/Qwen2.5-7B-Instruct", None, "qwen2"),
        ("openai/gpt-oss-20b", None, "gpt_oss"),
        ("microsoft/phi-4", None, "phi4"),
        ("microsoft/phi-4", "phi3", "phi4"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3", "phi3"),
        ("acme/own-phi", "phi3", "phi3"),
        ("google/gemma-3-12b-it", "llama", "llama"),
        ("mistralai/Ministral-8B-Instruct", None, "mistral"),
        ("meta-llama/Llama-3.2-1B", None, "llama"),
        ("acme/house-model", None, "llama"),
    ],
)
def test_the_family_of_a_base_that_is_not_here(model: str, model_type: str | None, family: str) -> None:
    found, why = family_of(model, model_type)
    assert found == family
    assert "stand" in why
    (note,) = twin_of(model, None, model_type, [], 0).substituted
    assert note.startswith(f"`{model}` is not in this repository: ")
