"""Rules about `train.sft` and training numbers: each passes the good experiment and fails a bad one."""

import ast

import pytest
from examples import GOOD, changed
from rule_cases import ROOT, expect, place, run, with_script, with_sft

from pipeline.errors import Severity
from pipeline.rules import training
from pipeline.rules.training import (
    batch_sane,
    dtype_spelled,
    learning_rate_sane,
    logits_stay_fused,
    nan_is_shown,
    quantisation_by_method,
    sft_fields_current,
    sft_fields_exist,
    sft_keys_are_free,
    sft_values_typed,
)

RULES = (
    *(sft_fields_exist, sft_fields_current, sft_values_typed, sft_keys_are_free, quantisation_by_method),
    *(dtype_spelled, nan_is_shown, learning_rate_sane, batch_sane, logits_stay_fused),
)
# rule, line under `train.sft`, where the finding stands, message, hint
BAD_SFT = [
    (sft_fields_exist, "warmup_stepz: 3", "3", "no field `warmup_stepz`", "did you mean `warmup_steps`?"),
    (sft_fields_exist, "max_seq_length: 4096", "4096", "no field `max_seq_length`", "write `max_length: 4096` under"),
    (sft_fields_exist, "warmup_ratio: 0.03", "0.03", "no field `warmup_ratio`", "write `warmup_steps: 0.03`"),
    (sft_fields_exist, "evaluation_strategy: steps", "steps", "`evaluation_strategy`", "held-out rows come from"),
    (sft_fields_exist, "tokenizer: x/y", "x/y", "no field `tokenizer`", "remove `tokenizer`; the base's tokenizer"),
    (sft_fields_exist, "group_by_length: true", "true", "`group_by_length`", "remove `group_by_length`"),
    (sft_fields_exist, "no_cuda: true", "true", "`no_cuda`", "`train.flavor` decides"),
    (sft_fields_exist, "load_in_4bit: true", "true", "`load_in_4bit`", "write `method: qlora` under `train`"),
    (sft_fields_exist, "attn_implementation: eager", "eager", "`attn_imp", "{attn_implementation: eager}`"),
    (sft_fields_exist, "zzzz: 1", "1", "no field `zzzz`", "remove `zzzz`"),
    (sft_fields_current, "gradient_checkpointing: true", "true", "is now", "write `activation_checkpointing: true`"),
    (sft_values_typed, 'warmup_steps: "1e-2"', '"1e-2"', "the text `1e-2`", "write `warmup_steps: 1e-2`"),
    (sft_values_typed, 'logging_first_step: "yes"', '"yes"', "wants bool", "write `logging_first_step: true`"),
    (sft_values_typed, "dataloader_num_workers: 2.0", "2.0", "a number", "write `dataloader_num_workers: 2`"),
    (sft_values_typed, "dataloader_num_workers: true", "true", "a boolean", "write `dataloader_num_workers: 8`"),
    (sft_values_typed, "include_for_metrics: loss", "loss", "wants list", "write `include_for_metrics: [loss]`"),
    (sft_values_typed, "model_init_kwargs: eager", "eager", "wants dict", "write `model_init_kwargs: {key: value}`"),
    (sft_values_typed, "optim: adamw_8bits", "adamw_8bits", "cannot be `adamw_8bits`", "write `optim: adamw_8bit`"),
    (sft_values_typed, "lr_scheduler_type: cosinee", "cosinee", "cannot be `cosinee`", "`lr_scheduler_type: cosine`"),
    (sft_keys_are_free, "data_seed: 3", "3", "decided by `train.seed`", "remove `data_seed` and write `train.seed`"),
    (sft_keys_are_free, "output_dir: x", "x", "set by the training script", "remove `output_dir`"),
    (sft_keys_are_free, "model_init_kwargs: {device_map: auto}", "auto", "`model_init_kwargs.device_map`", "remove `d"),
    (quantisation_by_method, "model_init_kwargs: {load_in_4bit: true}", "true", "load_in_4bit", "`method: qlora`"),
    (quantisation_by_method, "model_init_kwargs: {bnb_4bit_quant_type: nf4}", "nf4", "bnb_4", "`method: qlora`"),
    (dtype_spelled, "model_init_kwargs: {dtype: bf16}", "bf16", "`dtype: bf16` is not a dtype", "remove `dtype`"),
    (dtype_spelled, "model_init_kwargs: {dtype: bfloat16}", "bfloat16", "set by the training", "remove `dtype`"),
    (nan_is_shown, "logging_nan_inf_filter: true", "true", "a loss of 0", "remove `logging_nan_inf_filter`"),
    (logits_stay_fused, "label_smoothing_factor: 0.1", "0.1", "2048 tokens, about 6.2 GiB", "remove `label_smoothing"),
]


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule) is None
    assert run(rule, with_sft("lr_scheduler_type: cosine\n    warmup_steps: 0.03\n    weight_decay: 0")) is None


@pytest.mark.parametrize(("rule", "line", "value", "message", "hint"), BAD_SFT)
def test_bad_key_of_sft(rule, line, value, message, hint) -> None:
    text = with_sft(line)
    row, column = place(text, line)
    expect(run(rule, text), message, hint, (row, column + line.rindex(value)))


def test_unknown_fields_are_not_judged_without_the_snapshot() -> None:
    assert run(sft_fields_exist, with_sft("zzzz: 1"), sft_fields={}) is None


def test_a_custom_script_decides_its_own_keys() -> None:
    text = with_sft("output_dir: x", with_script(changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4")))
    assert run(sft_keys_are_free, text) is None
    text = with_sft("model_init_kwargs: {dtype: bf16}", with_script())
    assert "write `dtype: bfloat16`" in run(dtype_spelled, text).hint


@pytest.mark.parametrize(
    ("method", "rate", "hint"),
    [("qlora", "1e-2", "2e-04"), ("qlora", "1e-6", "2e-04"), ("full", "1e-3", "2e-05")],
)
def test_bad_learning_rate(method, rate, hint) -> None:
    text = changed("learning_rate: 2e-4", f"learning_rate: {rate}", changed("method: qlora", f"method: {method}"))
    if method == "full":
        text = changed("^merge: .*\n", "", changed("^  lora: .*\n", "", text))
    finding = run(learning_rate_sane, text)
    expect(finding, f"`{method}`", f"write `learning_rate: {hint}`", place(text, rate))
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("line", "rows", "hint"),
    [
        ("gradient_accumulation: 1", "1 row ", "write `gradient_accumulation: 16`"),
        ("gradient_accumulation: 512", "512 rows", "write `gradient_accumulation: 16`"),
    ],
)
def test_bad_batch(line, rows, hint) -> None:
    text = changed("^  learning_rate: 2e-4$", f"  learning_rate: 2e-4\n  {line}")
    expect(run(batch_sane, text), f"each step sees {rows}", hint, place(text, line.split(": ")[1] + "\n  lora"))


def test_a_token_in_a_value_is_never_shown() -> None:
    token = "hf_" + "A1b2C3d4" * 4
    for line in (f'warmup_steps: "{token}"', f"max_seq_length: {token}", f"optim: {token}"):
        for rule in RULES:
            finding = run(rule, with_sft(line))
            assert finding is None or token not in finding.as_text()


def test_what_the_training_script_owns_is_what_it_says() -> None:
    tree = ast.parse((ROOT / "scripts/train_sft.py").read_text(encoding="utf-8"))
    said = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("FIELD_OF", "OWNED", "OWNED_LOADING")
    }
    assert said["FIELD_OF"] == training.EXPERIMENT_FIELD
    assert set(said["OWNED"].split()) == training.OWNED
    assert said["OWNED_LOADING"] == training.OWNED_LOADING


def test_moved_names_are_really_gone() -> None:
    from pipeline.trl_fields import sft_fields

    types = sft_fields().types
    assert not set(training.MOVED) & set(types)
    assert set(training.RENAMED.values()) <= set(types)
    assert "learning_rate: 2e-4" in GOOD
