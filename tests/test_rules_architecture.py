"""Rules about the base's architecture: each passes the good experiment and fails a bad one."""

import re
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from examples import GOOD, changed
from rule_cases import HEADER, expect, place, run, with_sft

from pipeline.dataset_facts import DatasetFacts
from pipeline.rules.architecture import (
    LAYERS,
    attention_can_load,
    base_can_read_text,
    base_has_a_config,
    experts_stay_large,
    head_is_no_target,
    packing_needs_flash,
    rows_stay_apart,
    targets_are_layers,
    tower_left_out,
)

RULES = (targets_are_layers, head_is_no_target, tower_left_out, packing_needs_flash, attention_can_load)
RULES += (rows_stay_apart,)
HERE = changed("google/gemma-3-12b-it, revision: 96b6f1e", "./base")
BROKEN = DatasetFacts(
    "r.jsonl", 9, 9, "messages", is_chat=True, base_fault="the base's tokenizer.json cannot be read: x"
)
TARGETS = "targets: \\[q_proj, k_proj, v_proj, o_proj\\]"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MOE = {"model_type": "qwen3_moe", "num_experts": 128}
WITH_KERNELS = {"scripts/train_sft.py": HEADER.replace('"trl==1.16.0"', '"trl==1.16.0", "kernels==0.18.2"')}


@pytest.mark.parametrize("rule", (*RULES, experts_stay_large, base_has_a_config, base_can_read_text))
def test_ok(rule) -> None:
    assert run(rule) is None
    assert run(rule, config=LLAMA) is None
    assert run(rule, config=None, shape=None, scripts={}) is None
    assert run(rule, config={"text_config": None, "num_experts": "8", "architectures": 3}, shape=None) is None


@pytest.mark.parametrize(("text", "hint"), [(HERE, "into `./base`"), (GOOD, "base than `google/gemma-3-12b-it`")])
def test_a_base_that_cannot_be_loaded(text: str, hint: str) -> None:
    at = place(text, "./base" if text == HERE else "google/gemma")
    finding = run(base_has_a_config, text, config=None, config_fault="is not JSON: x")
    expect(finding, "`config.json` of `", hint, at)
    assert "is not JSON: x" in finding.message
    expect(run(base_can_read_text, text, dataset=BROKEN), "tokenizer.json cannot be read", hint, at)


def test_a_template_without_answers_is_told_once() -> None:
    said = replace(BROKEN, base_fault="the base's chat template is not Jinja: x")
    assert run(base_can_read_text, HERE, dataset=said, chat_template="{% x %}") is None
    assert run(base_can_read_text, HERE, dataset=said) is not None


@pytest.mark.parametrize(
    ("rule", "targets", "config", "message", "hint"),
    [
        (
            targets_are_layers,
            "[q_proj, qkv_proj]",
            LLAMA,
            "`qkv_proj` is no layer of `llama`",
            "write `v_proj` instead",
        ),
        (targets_are_layers, "[c_attn]", LLAMA, "`c_attn` is no layer", "targets: [q_proj, k_proj,"),
        (
            targets_are_layers,
            "[q_proj]",
            {"model_type": "phi3"},
            "no layer of `phi3`",
            "`qkv_proj` instead of `q_proj`",
        ),
        (head_is_no_target, "[q_proj, lm_head]", LLAMA, "adapter on `lm_head`", "write `targets: [q_proj]`"),
        (head_is_no_target, "[lm_head]", LLAMA, "adapter on `lm_head`", "write `targets: all-linear`"),
    ],
)
def test_bad_targets(rule, targets, config, message, hint) -> None:
    text = changed(TARGETS, f"targets: {targets}")
    expect(run(rule, text, config=config), message, hint, place(text, targets))


def test_a_full_path_and_all_linear_are_targets() -> None:
    assert run(targets_are_layers, changed(TARGETS, "targets: [layers.0.self_attn.q_proj]"), config=LLAMA) is None
    assert run(targets_are_layers, changed(TARGETS, "targets: all-linear"), config=LLAMA) is None


@pytest.mark.parametrize(
    ("exclude", "message", "hint"),
    [
        (".*mlp.*", "leaves the vision tower out", "write `exclude: .*mlp.*|.*(vision|visual).*`"),
        ('"(oops"', "not a regular expression", "remove `exclude`"),
    ],
)
def test_bad_exclude(exclude, message, hint) -> None:
    text = changed(TARGETS, f"targets: all-linear, exclude: {exclude}")
    expect(run(tower_left_out, text), message, hint, place(text, exclude))


def test_an_exclude_that_names_the_tower_or_a_text_only_base_is_fine() -> None:
    text = changed(TARGETS, "targets: all-linear, exclude: .*vision_tower.*")
    assert run(tower_left_out, text) is None
    assert run(tower_left_out, changed(TARGETS, "targets: all-linear, exclude: .*mlp.*"), config=LLAMA) is None
    slow = changed(TARGETS, 'targets: all-linear, exclude: "(.+)+x"')
    assert "vision tower" in run(tower_left_out, slow).message


PACKED = changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  packing: true")


def test_bad_packing() -> None:
    assert run(packing_needs_flash, PACKED) is None  # an A10G has a flash kernel, and the script brings it
    old = changed("flavor: a10g-large", "flavor: t4-medium", PACKED)
    at = place(old, "true\n  lora")
    expect(run(packing_needs_flash, old), "`sdpa` on `t4-medium` needs a mask", "write `packing: false`", at)
    said = with_sft("model_init_kwargs: {attn_implementation: sdpa}", PACKED + "\n")
    assert "remove `attn_implementation`" in run(packing_needs_flash, said).hint
    told = with_sft("model_init_kwargs: {attn_implementation: kernels-community/flash-attn2}", PACKED + "\n")
    assert run(packing_needs_flash, told) is None
    assert run(packing_needs_flash, changed("flavor: a10g-large", "flavor: cpu-xl", PACKED)) is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba2"},
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        {"model_type": "qwen3_5", "text_config": {"layer_types": ["full_attention", "linear_attention"]}},
    ],
)
def test_a_state_is_carried_from_row_to_row(config) -> None:
    finding = run(rows_stay_apart, PACKED, config=config)
    expect(finding, "carry a state from each packed row", "write `packing: false`", place(PACKED, "true\n  lora"))
    assert run(rows_stay_apart, config=config) is None


def test_wrapped_packs_have_no_boundaries() -> None:
    text = with_sft("packing_strategy: wrapped", PACKED + "\n")
    finding = run(rows_stay_apart, text, config=LLAMA)
    expect(
        finding,
        "`packing_strategy: wrapped` lets packed rows read",
        "remove `packing_strategy`",
        place(text, "wrapped"),
    )
    assert run(rows_stay_apart, with_sft("packing_strategy: bfd_split", PACKED + "\n"), config=LLAMA) is None
    assert run(rows_stay_apart, PACKED, config={"layer_types": "x", "text_config": 3}) is None


def test_bad_attention() -> None:
    text = with_sft("model_init_kwargs: {attn_implementation: flash_attention_2}")
    expect(run(attention_can_load, text), "needs `kernels`", "remove `attn_impl", place(text, "flash_attention_2"))
    assert run(attention_can_load, text, scripts=WITH_KERNELS) is None
    ours = with_sft("model_init_kwargs: {attn_implementation: kernels-community/flash-attn2}")
    assert run(attention_can_load, ours) is None  # the script brings `kernels` itself
    text = with_sft("model_init_kwargs: {attn_implementation: sdpa}")
    finding = run(attention_can_load, text, config={"model_type": "gemma2"})
    expect(finding, "`gemma2` has no `sdpa`", "write `attn_implementation: eager`", place(text, "sdpa"))
    assert run(attention_can_load, text, config=LLAMA) is None


def test_bad_experts() -> None:
    finding = run(experts_stay_large, config=MOE, shape=None)
    expect(finding, "leaves the 128 experts", "write `method: lora`", place(GOOD, "qlora"))
    assert run(experts_stay_large, changed("method: qlora", "method: lora"), config=MOE, shape=None) is None


def test_the_layers_are_those_of_the_installed_transformers() -> None:
    """Read as text: importing transformers takes seconds."""
    models = Path(sysconfig.get_paths()["purelib"]) / "transformers/models"
    if not models.is_dir():
        pytest.skip("transformers is not installed here")
    for kind, names in LAYERS.items():
        family = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "qwen3_5_text": "qwen3_5", "mistral3": "mistral"}
        family = family.get(kind, kind)
        text = (models / family / f"modeling_{family}.py").read_text(encoding="utf-8")
        made = set(re.findall(r"self\.(\w+) = \(?\s*nn\.Linear", text))
        assert set(names) <= made, kind
