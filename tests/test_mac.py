"""Time and memory of training on a Mac: against what others measured and the SOP says, and how they move."""

import pytest
from examples import MAC, MAC_LORA, changed

from pipeline.apple import CHIPS, MACS
from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.mac import (
    BAND,
    MEMORY_BAND,
    bits_by_name,
    estimate_mac_memory,
    estimate_mac_seconds,
    mlx_bits,
    seconds_by_chip,
    smallest_mac,
)
from pipeline.models import CATALOGUE, ModelShape
from pipeline.plan import make_plan

GEMMA, QWEN, MISTRAL = (
    CATALOGUE[name] for name in ("google/gemma-3-12b-it", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B-Instruct-v0.3")
)
LLAMA_42M = ModelShape("llama", 8, 512, 1408, 512, 256, 32000, False, heads=8)


def experiment(text: str = MAC) -> Experiment:
    return parse_experiment(text).experiment


def rows(count: int, length: int) -> DatasetFacts:
    tokens = TokenFacts(total=count * length, trained=count * length, sequences=count, longest=length)
    return DatasetFacts("rows.jsonl", count, count, "messages", tokens=tokens)


def batches(count: int, layers: int | None, text: str = MAC_LORA) -> Experiment:
    """`count` batches of one row, with `layers` that learn, none of them recomputed."""
    mlx = f"  mlx: {{num_layers: {layers}}}\n" if layers else ""
    more = f"  max_steps: {count}\n  gradient_accumulation: 1\n  sft: {{gradient_checkpointing: false}}\n{mlx}"
    return experiment(changed("^  epochs: 3\n", more, changed("^  eval: .*\n", "", text)))


def test_the_sops_training_lies_in_the_band() -> None:
    """1,000 rows, three passes, 8 bits, 16 layers, M3 Max: 4 to 6 hours. docs/worked-example.md: about 900 tokens."""
    text = changed("-4bit", "-8bit", changed("^  eval: .*\n", "", MAC))
    text = changed("^  epochs: 3", "  epochs: 3\n  sft: {gradient_checkpointing: false}", text)
    hours = estimate_mac_seconds(experiment(text), GEMMA, rows(1000, 900), CHIPS["m3-max"], 8) / 3600
    assert hours * (1 - BAND) < 4
    assert hours * (1 + BAND) > 6


@pytest.mark.parametrize(
    ("chip", "shape", "length", "layers", "measured_s"),
    [
        ("m1-max", MISTRAL, 100, 4, 100 / 250),
        ("m4-pro", QWEN, 1024, 16, 1 / 2.2),
        ("m4-pro", QWEN, 4096, None, 1 / 0.28),
    ],
)
def test_what_others_measured_lies_in_the_band(chip, shape, length, layers, measured_s) -> None:
    one = batches(100, layers)
    seconds = estimate_mac_seconds(one, shape, rows(100, length), CHIPS[chip], 16) / 100
    assert seconds * (1 - BAND) < measured_s < seconds * (1 + BAND)


@pytest.mark.parametrize(
    ("recomputed", "layers", "length", "measured_gib"),
    [
        ("true", None, 512, 0.274),
        ("false", None, 512, 0.432),
        ("true", 4, 512, 0.263),
        ("true", None, 1024, 0.439),
        ("false", None, 1024, 0.812),
    ],
)
def test_memory_that_was_measured_on_a_cpu(recomputed, layers, length, measured_gib) -> None:
    text = changed(r"  lora: .*", f"  lora: {{r: 16}}\n  sft: {{gradient_checkpointing: {recomputed}}}", MAC_LORA)
    text = changed("max_length: 2048", f"max_length: {length}", text)
    text = changed("  backend: mlx", f"  backend: mlx\n  mlx: {{num_layers: {layers}}}", text) if layers else text
    memory = estimate_mac_memory(experiment(text), LLAMA_42M, 16)
    allocated = memory.total - memory.context
    assert allocated == pytest.approx(measured_gib, rel=0.04)
    assert memory.band == MEMORY_BAND


def test_every_chip_takes_longer_than_a_faster_one() -> None:
    by_chip = seconds_by_chip(experiment(), GEMMA, rows(1000, 1000), 4)
    assert list(by_chip) == list(CHIPS)
    fast_first = sorted(CHIPS, key=lambda name: -CHIPS[name].tflops)
    assert sorted(by_chip, key=lambda name: by_chip[name]) == fast_first


def test_few_tokens_wait_for_the_weights() -> None:
    one = batches(10, None)
    assert estimate_mac_seconds(one, MISTRAL, rows(10, 2), CHIPS["m1"], 16) == pytest.approx(
        10 * 2 * 2 * MISTRAL.parameters / 68e9
    )


def test_fewer_layers_and_fewer_bits_need_less() -> None:
    data = rows(1000, 1000)
    some, every = experiment(), experiment(changed(", num_layers: 16", "", MAC))
    assert estimate_mac_seconds(some, GEMMA, data, CHIPS["m1"], 4) < estimate_mac_seconds(
        every, GEMMA, data, CHIPS["m1"], 4
    )
    needs = [estimate_mac_memory(some, GEMMA, bits).total for bits in (4, 8, 16)]
    assert needs == sorted(needs)
    assert estimate_mac_memory(some, GEMMA, 4).adapter < estimate_mac_memory(every, GEMMA, 4).adapter


def test_the_smallest_mac_gives_three_quarters_to_its_gpu() -> None:
    memory = estimate_mac_memory(experiment(), GEMMA, 4)
    size = smallest_mac(memory)
    assert size is not None
    assert memory.high <= 0.75 * size
    assert memory.high > 0.75 * 16
    long = experiment(changed("max_length: 2048", "max_length: 65536", MAC))
    assert smallest_mac(estimate_mac_memory(long, GEMMA, 4)) is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mlx-community/gemma-3-12b-it-8bit", 8),
        ("mlx-community/Qwen3-8B-MLX-4bit-DWQ", 4),
        ("mlx-community/Llama-3.2-3B-Instruct-mxfp4", 4),
        ("mlx-community/Qwen3-0.6B-bf16", 16),
        ("mlx-community/gemma-3-12b-it-qat-q4", 4),
        ("someone/llama-3-8b", None),
    ],
)
def test_bits_by_name(name, bits) -> None:
    assert bits_by_name(name) == bits


def test_bits_by_config() -> None:
    assert mlx_bits(experiment(), None) == 4
    assert mlx_bits(experiment(), {"quantization": {"bits": 6}}) == 6
    assert mlx_bits(experiment(), {"model_type": "gemma3"}) == 16
    assert mlx_bits(experiment(MAC_LORA), None) == 16


def test_the_train_stage_costs_nothing_and_has_no_bound() -> None:
    facts = Facts(shape=GEMMA, dataset=rows(1000, 1000))
    train, merge, *_ = make_plan(experiment(), facts).stages
    assert (train.script, train.flavor, train.cost.worst_usd) == ("scripts/train_mlx.py", MACS["m3-max"], 0)
    assert train.cost.expected_s == estimate_mac_seconds(experiment(), GEMMA, facts.dataset, CHIPS["m3-max"], 4)
    assert merge.cost.worst_usd > 0
    unnamed = make_plan(experiment(changed("  flavor: m3-max\n", "", MAC)), facts)
    assert (unnamed.stages[0].flavor.name, unnamed.stages[0].cost.expected_s) == ("local", None)
    assert unnamed.expected_usd == make_plan(experiment(), facts).expected_usd
    assert unnamed.first_job == "merge"
