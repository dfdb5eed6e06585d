"""The memory estimate against published traces and measurements, its parts against arithmetic, and its directions."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from examples import GOOD, changed

from pipeline.experiment import Method
from pipeline.flavors import FLAVORS
from pipeline.loader import parse_experiment
from pipeline.memory import GIB, Loss, MemoryEstimate, MemorySpec, estimate_need, spec_of
from pipeline.models import CATALOGUE, ModelShape, shape_of
from pipeline.parallel import estimate_memory

GEMMA = CATALOGUE["google/gemma-3-12b-it"]
LLAMA = CATALOGUE["meta-llama/Llama-3.1-8B-Instruct"]
MISTRAL = replace(CATALOGUE["mistralai/Mistral-7B-Instruct-v0.3"], vocab=32000)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FULL = (("method: qlora", "method: full"), ("  lora: .*\n", ""), ("^merge: .*\n", ""))


def estimate_of(*changes: tuple[str, str], shape: ModelShape = GEMMA) -> MemoryEstimate:
    text = GOOD
    for pattern, replacement in changes:
        text = changed(pattern, replacement, text)
    return estimate_memory(parse_experiment(text).experiment, shape)


# Allocation traces of the pinned stack: Gemma 3 12B, r=64 on q/k/v/o, dropout 0.05, sdpa, micro-batch 1; text tower.
@pytest.mark.parametrize(("length", "traced"), [(2048, 9.0), (3072, 9.7), (4096, 10.4), (8192, 13.3), (16384, 19.4)])
def test_traces_of_the_pinned_stack(length: int, traced: float) -> None:
    spec = MemorySpec(seq=length, rank=64, targets=ATTENTION, dropout=True)
    estimate = estimate_need(spec, replace(GEMMA, other_linear=0))
    assert estimate.allocated == pytest.approx(traced, rel=0.06)


# The same on stacks that write out all logits: TRL up to 1.6.
@pytest.mark.parametrize(("length", "traced"), [(2048, 14.3), (3072, 17.6), (4096, 21.0), (8192, 34.6), (16384, 61.7)])
def test_traces_with_full_logits(length: int, traced: float) -> None:
    spec = MemorySpec(seq=length, rank=64, targets=ATTENTION, dropout=True, loss=Loss.LOGITS)
    assert estimate_need(spec, replace(GEMMA, other_linear=0)).allocated == pytest.approx(traced, rel=0.05)


# fms-acceleration scripts/benchmarks/refs/a100_80gb.csv, rows 76, 78 and 92: HF SFTTrainer, transformers 4.48,
# rank 16 on q/k/v/o, flash attention, rows of 4,096; max_memory_allocated in bytes.
@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "batch", "measured"),
    [(32, 4096, 14336, 4, 16373838336), (32, 4096, 14336, 8, 28412178944), (80, 8192, 28672, 4, 68126381056)],
)
def test_measured_runs(layers: int, hidden: int, inner: int, batch: int, measured: int) -> None:
    shape = replace(MISTRAL, layers=layers, hidden=hidden, intermediate=inner, query=hidden)
    spec = MemorySpec(4096, batch, rank=16, targets=ATTENTION, adapter_bytes=4, optimizer="adamw_torch")
    spec = replace(spec, attention="flash_attention_2", loss=Loss.LOGITS, logit_bytes=14)
    assert estimate_need(spec, shape).allocated * GIB == pytest.approx(measured, rel=0.02)


def test_parts_of_a_small_model_by_hand() -> None:
    shape = ModelShape("llama", 2, 256, 512, 256, 128, 1000, False)
    linear = 2 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 512)
    estimate = estimate_need(MemorySpec(seq=64, rank=4), shape)
    assert estimate.weights * GIB == pytest.approx(linear * 0.515869 + 2 * (2 * 256_000 + 4 * 256), rel=1e-5)
    adapter = 2 * 4 * ((256 + 256) * 2 + (256 + 128) * 2 + (256 + 512) * 3)
    assert estimate.adapter * GIB == pytest.approx(4 * adapter)
    assert estimate.optimizer * GIB == pytest.approx(2.03 * adapter)
    full = estimate_need(MemorySpec(64, method=Method.FULL, linear="bf16", optimizer="adamw_torch_fused"), shape)
    assert (full.weights, full.adapter, full.optimizer) == tuple(n * 2 * shape.parameters / GIB for n in (1, 1, 2))


@pytest.mark.parametrize(
    "changes",
    [
        [("max_length: 2048", "max_length: 4096")],
        [("max_length: 2048", "max_length: 2048\n  batch_size: 2")],
        [("r: 64", "r: 128")],
        [("alpha: 128", "alpha: 128, dropout: 0.05")],
        [("alpha: 128", "alpha: 128, dora: true")],
        [("alpha: 128", "alpha: 128, modules_to_save: [embed_tokens]")],
        [("alpha: 128", "alpha: 128, rank_pattern: {q_proj: 128}")],
        [("  lora:", "  sft: {gradient_checkpointing: false}\n  lora:")],
        [("  lora:", "  sft: {label_smoothing_factor: 0.1}\n  lora:")],
        [("  lora:", "  sft: {optim: adamw_torch}\n  lora:")],
        [("  lora:", "  sft: {model_init_kwargs: {attn_implementation: eager}}\n  lora:")],
        [("flavor: a10g-large", "flavor: a10g-largex4")],
        [("method: qlora", "method: lora")],
        [*FULL],
    ],
)
def test_more_of_anything_needs_more(changes: list[tuple[str, str]]) -> None:
    assert estimate_of(*changes).total > estimate_of().total


def test_less_of_anything_needs_less() -> None:
    for sft in ("optim: paged_adamw_8bit", "activation_offloading: true"):
        assert estimate_of(("  lora:", f"  sft: {{{sft}}}\n  lora:")).total < estimate_of().total
    short = ("max_length: 2048", "max_length: 16384")
    flash = ("  lora:", "  sft: {model_init_kwargs: {attn_implementation: flash_attention_2}}\n  lora:")
    assert estimate_of(short, flash).total < estimate_of(short).total


def test_full_costs_more_than_lora() -> None:
    assert estimate_of(("method: qlora", "method: lora")).total < estimate_of(*FULL).total


def test_a_family_that_refuses_sdpa_falls_back_to_eager() -> None:
    experiment = parse_experiment(GOOD).experiment
    assert spec_of(experiment, replace(GEMMA, model_type="gemma2")).attention == "eager"
    assert spec_of(experiment, GEMMA).attention == "sdpa"


def test_experts_stay_in_bf16() -> None:
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "intermediate_size": 6144}
    shape = shape_of(config | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768})
    assert shape is not None
    assert shape.parameters / 1e9 == pytest.approx(30.5, rel=0.01)  # Qwen3-30B-A3B, by its model card
    assert estimate_of(shape=shape).weights > 54  # GiB: 29 billion weights of experts in bf16
    old = MemorySpec(seq=2048, quantised_experts=True)
    assert estimate_need(old, shape).weights < 16


def test_verdicts_use_the_whole_band() -> None:
    estimate = estimate_of()
    assert estimate.fits(FLAVORS["a100-large"]) is True
    assert estimate.fits(FLAVORS["t4-small"]) in (True, None)
    assert estimate_of(("max_length: 2048", "max_length: 131072")).fits(FLAVORS["a10g-large"]) is False
    edge = replace(FLAVORS["a10g-large"], vram_gib=estimate.total)
    assert estimate.fits(edge) is None


def test_committed_measurements_have_their_sources() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "memory_rows.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len({row["id"] for row in rows}) == len(rows) >= 40
    assert all(row["source"] and row["link"] for row in rows)


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
    assert shape_of(config) == LLAMA
    assert shape_of({"model_type": "bert"}) is None
    assert shape_of({"text_config": 3}) is None
    assert shape_of(config | {"hidden_size": 0}) is None
    window = shape_of(config | {"sliding_window": 4096})
    assert window is not None and window.window == 4096
    unused = shape_of(config | {"sliding_window": 4096, "use_sliding_window": False})
    assert unused is not None and unused.window == 0


def test_pairs_need_what_twice_as_many_padded_rows_need() -> None:
    """DPOTrainer runs both answers in one pass; the reference is the same base, and its pass keeps nothing."""
    padded = changed("a10g-large", "t4-medium")  # which has no flash kernel
    rows = changed("  epochs: 3", "  epochs: 3\n  batch_size: 4", padded)
    pairs = changed("2e-4", "5e-6", changed("qlora", "dpo", changed("batch_size: 4", "batch_size: 2", rows)))
    needs = [estimate_need(spec_of(parse_experiment(text).experiment, GEMMA), GEMMA) for text in (rows, pairs)]
    assert needs[0] == needs[1]
    single = spec_of(parse_experiment(changed("batch_size: 2", "batch_size: 1", pairs)).experiment, GEMMA)
    assert (single.micro_batch, single.padded) == (2, True)
    bf16 = changed("5e-6", "5e-6\n  dpo: {quantize: false}", pairs)
    spec = spec_of(parse_experiment(bf16).experiment, GEMMA)
    assert (spec.linear, spec.adapter_bytes, spec.optimizer) == ("bf16", 4, "adamw_torch_fused")


def test_dropout_that_is_turned_off_needs_nothing() -> None:
    text = changed("2e-4", "5e-6", changed("qlora", "dpo", changed("alpha: 128", "alpha: 128, dropout: 0.1")))
    assert not spec_of(parse_experiment(text).experiment, GEMMA).dropout
    kept = changed("5e-6", "5e-6\n  sft: {disable_dropout: false}", text)
    assert spec_of(parse_experiment(kept).experiment, GEMMA).dropout


def test_lora_parameters_of_a_known_adapter() -> None:
    # r=64 on q/k/v/o of Gemma 3 12B: 96.9 M in all, 11.94 M of them on the vision tower, which is excluded here.
    count = GEMMA.lora_parameters(64, ATTENTION)
    assert count == pytest.approx(96.9e6 - 11.94e6, rel=0.005)
