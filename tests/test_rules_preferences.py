"""Rules about preference tuning: its own, and those about `train.sft` where DPOConfig takes the place of SFTConfig."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run, with_script, with_sft
from test_train_sections import PAIRS, with_dpo

from pipeline.errors import Severity
from pipeline.models import CATALOGUE
from pipeline.rules.architecture import experts_stay_large
from pipeline.rules.hardware import training_fits
from pipeline.rules.loss import answers_can_be_found, history_is_read_once
from pipeline.rules.mlx import mlx_has_a_word
from pipeline.rules.preferences import dropout_is_honoured, preferences_use_one_gpu
from pipeline.rules.training import (
    learning_rate_sane,
    logits_stay_fused,
    quantisation_by_method,
    sft_fields_exist,
    sft_keys_are_free,
    sft_values_typed,
)
from pipeline.trl_fields import dpo_fields

DPO = {"sft_fields": dpo_fields().types, "sft_choices": dpo_fields().choices}
DROPOUT = changed("alpha: 128", "alpha: 128, dropout: 0.05", PAIRS)
# Rule, line under `train.sft`, message, hint
BAD_SFT = [
    (sft_fields_exist, "packing_strategy: bfd", "DPOConfig has no field `packing_strategy`", "did you mean"),
    (sft_fields_exist, "label_smoothin: 0.1", "DPOConfig has no field `label_smoothin`", "`label_smoothing`?"),
    (
        sft_fields_exist,
        "max_prompt_length: 512",
        "DPOConfig has no field `max_prompt_length`",
        "`train.max_length` counts",
    ),
    (sft_values_typed, 'label_smoothing: "0.1"', "DPOConfig wants float", "write `label_smoothing: 0.1`"),
    (sft_keys_are_free, "truncation_mode: keep_end", "`truncation_mode` is set by", "remove `truncation_mode`"),
    (sft_keys_are_free, "sync_ref_model: true", "`sync_ref_model` is set by", "remove `sync_ref_model`"),
    (sft_keys_are_free, "precompute_ref_log_probs: true", "`precompute_ref_log_probs` is set by", "remove"),
    (sft_keys_are_free, "label_smoothing_factor: 0.1", "decided by `train.sft.label_smoothing`", "write `train.sft."),
]


@pytest.mark.parametrize(("rule", "line", "message", "hint"), BAD_SFT, ids=[row[1] for row in BAD_SFT])
def test_bad_key_of_sft(rule, line, message, hint) -> None:
    text = changed("^  learning_rate: 5e-6$", f"  learning_rate: 5e-6\n  sft:\n    {line}", PAIRS)
    row, column = place(text, line)
    expect(run(rule, text, **DPO), message, hint, (row, column + len(line.split(": ")[0]) + 2))


def test_what_only_one_of_the_trainers_knows_is_asked_of_the_right_one() -> None:
    known = with_dpo("sft: {label_smoothing: 0.1, ld_alpha: 0.5}")
    assert run(sft_fields_exist, known, **DPO) is None
    assert run(sft_keys_are_free, known, **DPO) is None
    assert run(sft_keys_are_free, with_sft("padding_free: true")) is None
    assert run(logits_stay_fused, with_dpo("sft: {label_smoothing_factor: 0.1}"), **DPO) is None  # another rule has it


@pytest.mark.parametrize("rate", ["2e-4", "1e-7"])
def test_a_learning_rate_of_another_method(rate: str) -> None:
    text = changed("5e-6", rate, PAIRS)
    finding = run(learning_rate_sane, text)
    expect(finding, "for `dpo`", "write `learning_rate: 5e-06`", place(text, rate))
    assert finding.severity is Severity.WARNING
    assert run(learning_rate_sane, PAIRS) is None


@pytest.mark.parametrize(("flavor", "one"), [("l4x4", "l4x1"), ("a10g-largex2", "a10g-"), ("a100x4", "a100-large")])
def test_several_gpus_are_refused_by_name(flavor: str, one: str) -> None:
    text = changed("flavor: a10g-large", f"flavor: {flavor}", PAIRS)
    finding = run(preferences_use_one_gpu, text)
    expect(finding, f"`method: dpo` trains on one GPU, `{flavor}` has", f"write `flavor: {one}", place(text, flavor))
    assert finding.severity is Severity.ERROR
    assert run(preferences_use_one_gpu, changed("flavor: a10g-large", f"flavor: {flavor}")) is None
    assert run(preferences_use_one_gpu, with_script(changed("5e-6", "2e-4", text))) is None


def test_the_memory_hint_names_no_flavor_that_is_refused() -> None:
    text = changed("max_length: 2048", "max_length: 65536", PAIRS)
    finding = run(training_fits, text, shape=CATALOGUE["google/gemma-3-12b-it"])
    assert finding is not None
    assert "`flavor: " not in finding.hint or run(preferences_use_one_gpu, changed("a10g-large", "h200", text)) is None


def test_dropout_that_the_trainer_turns_off() -> None:
    finding = run(dropout_is_honoured, DROPOUT)
    expect(finding, "`dropout: 0.05` has no effect", "{disable_dropout: false}", place(DROPOUT, "0.05, "))
    assert finding.severity is Severity.WARNING
    kept = changed("^  learning_rate: 5e-6$", "  learning_rate: 5e-6\n  sft: {disable_dropout: false}", DROPOUT)
    assert run(dropout_is_honoured, kept) is None
    assert run(dropout_is_honoured, PAIRS) is None
    assert run(dropout_is_honoured, changed("alpha: 128", "alpha: 128, dropout: 0.05")) is None


def test_experts_of_a_4_bit_base() -> None:
    moe = {"config": {"model_type": "qwen3_moe", "num_local_experts": 8}, "shape": None}
    finding = run(experts_stay_large, PAIRS, **moe)
    expect(finding, "`dpo: {quantize: true}` leaves the 8 experts", "`dpo: {quantize: false}`", place(PAIRS, "dpo"))
    assert run(experts_stay_large, with_dpo("dpo: {quantize: false}"), **moe) is None


def test_4_bits_are_asked_for_by_the_section() -> None:
    text = with_dpo("sft: {model_init_kwargs: {load_in_4bit: true}}")
    finding = run(quantisation_by_method, text)
    expect(finding, "load_in_4bit", "write `dpo: {quantize: true}` under `train`", place(text, "true}}"))


def test_mlx_does_not_prefer() -> None:
    text = changed("  flavor: a10g-large\n  timeout: 4h\n", "  backend: mlx\n", PAIRS)
    expect(run(mlx_has_a_word, text), "`method: dpo` cannot be honoured by MLX", "`backend: torch`", place(text, "dpo"))


@pytest.mark.parametrize("rule", [answers_can_be_found, history_is_read_once])
def test_which_tokens_count_is_no_question(rule) -> None:
    template = "{% for m in messages %}{{ m.role }}{% endfor %}"  # shows no answer
    assert run(rule, PAIRS, chat_template=template) is None
    if rule is answers_can_be_found:
        assert run(rule, GOOD, chat_template=template) is not None
