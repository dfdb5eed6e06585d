"""Durations and dollars: whole minutes, worst case from the timeout, published speeds, and what past runs correct."""

from dataclasses import replace

import pytest
from examples import GOOD, changed

from pipeline.cost import (
    BAND,
    CORRECTED_BAND,
    SEVERAL,
    FinishedRun,
    correction,
    estimate_cost,
    estimate_tokens,
    estimate_train_seconds,
    finished_run,
    setup_seconds,
    stage_seconds,
)
from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.flavors import CONTAINER_START_S, FLAVORS
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE, ModelShape

GEMMA = CATALOGUE["google/gemma-3-12b-it"]
A10G, A100 = FLAVORS["a10g-large"], FLAVORS["a100-large"]
QWEN = {
    "1.8B": ModelShape("qwen", 24, 2048, 5504, 2048, 2048, 151936, False),
    "7B": ModelShape("qwen", 32, 4096, 11008, 4096, 4096, 151936, False),
    "14B": ModelShape("qwen", 40, 5120, 13696, 5120, 5120, 152064, False),
    "72B": ModelShape("qwen", 80, 8192, 24576, 8192, 8192, 152064, False),
}


def facts(rows: int, tokens: int, longest: int | None = None) -> DatasetFacts:
    counted = TokenFacts(sequences=rows, total=tokens, trained=tokens // 2, longest=longest or tokens // rows)
    return DatasetFacts("rows.jsonl", rows, rows, "messages", is_chat=True, tokens=counted, exact=True)


def seconds(text: str, data: DatasetFacts, shape: ModelShape = GEMMA, flavor: str = "a10g-large") -> float:
    return estimate_train_seconds(parse_experiment(text).experiment, shape, data, FLAVORS[flavor])


def test_billing_is_by_the_minute_begun() -> None:
    cost = estimate_cost(61, 3600, A10G)
    assert cost.expected_s == 61 + CONTAINER_START_S
    assert cost.expected_usd == pytest.approx(4 * 1.5 / 60)
    assert cost.worst_usd == pytest.approx(1.5)


def test_setup_is_billed_too() -> None:
    cost = estimate_cost(61, 3600, A10G, setup_seconds(GEMMA), corrected=True)
    assert cost.expected_s == pytest.approx(61 + 122 + CONTAINER_START_S, abs=1)
    assert (cost.band, estimate_cost(61, 3600, A10G).band) == (CORRECTED_BAND, BAND)


def test_expected_never_passes_the_timeout_and_unknown_stays_unknown() -> None:
    assert estimate_cost(1e6, 3600, A10G).expected_s == 3600
    assert estimate_cost(None, 3600, A10G).expected_usd is None
    assert stage_seconds("merge", None) is None


def test_counted_tokens_are_taken_as_they_are() -> None:
    experiment = parse_experiment(GOOD).experiment
    assert estimate_tokens(experiment, facts(10, 1234)) == 1234
    assert estimate_tokens(experiment, DatasetFacts("rows.jsonl", 10, 10, "messages")) == 10 * 2048


def test_pairs_are_two_rows_and_a_pass_more() -> None:
    """The same sequences as rows of their own cost three quarters: the base is not asked for its opinion."""
    rows = changed("gradient_accumulation: 8|  epochs: 3", "  epochs: 3\n  batch_size: 2", changed("  eval: .*\n", ""))
    pairs = changed("batch_size: 2", "batch_size: 1", changed("2e-4", "5e-6", changed("qlora", "dpo", rows)))
    each, both = seconds(rows, facts(200, 200_000)), seconds(pairs, facts(100, 200_000, 1000))
    assert both == pytest.approx(4 / 3 * each, rel=1e-6)
    held_out = changed("  max_length: 2048", "  max_length: 2048\n  max_steps: 100", pairs)
    none, some = (replace(facts(100, 200_000, 1000), rows=100 + more) for more in (0, 40))
    passes = (seconds(held_out, some) / seconds(held_out, none) - 1) * 100 * 8
    assert passes == pytest.approx(7 * 40 / 2)  # 7 looks at 40 pairs, at half the price of a training pair
    assert estimate_tokens(parse_experiment(pairs).experiment, DatasetFacts("x.jsonl", 10, 10, "m")) == 2 * 10 * 2048


def test_the_projects_first_run_lies_within_the_band() -> None:
    # 1,000 coaching dialogues, 3 epochs, Gemma 3 12B on an A10G took two to three hours; 1,500 tokens a row assumed.
    expected = seconds(GOOD, facts(1000, 1_500_000, 2048))
    assert expected * (1 - BAND) <= 3 * 3600
    assert expected * (1 + BAND) >= 2 * 3600


# Seconds per step of eight rows on one A100: README of QwenLM/Qwen, "Profiling of Memory and Speed".
PUBLISHED = {
    ("1.8B", "lora"): {256: 1.0, 512: 1.0, 1024: 1.1, 2048: 1.7, 4096: 3.3, 8192: 6.8},
    ("1.8B", "qlora"): {256: 1.4, 512: 1.4, 1024: 1.4, 2048: 2.0, 4096: 3.4, 8192: 6.5},
    ("1.8B", "full"): {4096: 2.8, 8192: 5.6},  # shorter ones are bound by the offloading of DeepSpeed ZeRO 3
    ("7B", "lora"): {256: 1.2, 512: 1.5, 1024: 2.8, 2048: 5.2, 4096: 10.1, 8192: 21.3},
    ("7B", "qlora"): {256: 3.0, 512: 3.0, 1024: 3.5, 2048: 7.0, 4096: 11.6, 8192: 22.3},
    ("14B", "lora"): {256: 1.6, 512: 2.4, 1024: 4.4, 2048: 8.4, 4096: 17.0, 8192: 36.0},
    ("14B", "qlora"): {256: 5.3, 512: 6.3, 1024: 8.2, 2048: 11.8, 4096: 20.1, 8192: 38.3},
    ("72B", "qlora"): {256: 27.4, 512: 31.5, 1024: 41.4, 2048: 59.5, 4096: 97.7, 8192: 179.8},
}


@pytest.mark.parametrize(("size", "method"), PUBLISHED)
def test_published_speeds_are_met(size: str, method: str) -> None:
    text = changed("epochs: 3", "epochs: 1", changed("max_length: 2048", "max_length: 8192"))
    text = changed("method: qlora", f"method: {method}", text)
    if method == "full":
        text = changed("  lora: .*\n", "", changed("^merge: .*\n", "", text))
    for length, published in PUBLISHED[size, method].items():
        predicted = seconds(text, facts(8, 8 * length), QWEN[size], "a100-large")
        assert predicted == pytest.approx(published, rel=0.2), (length, predicted)


def test_max_steps_replaces_epochs() -> None:
    whole = changed("  eval: .*\n", "")
    few = changed("epochs: 3", "max_steps: 5", whole)
    data = facts(1000, 1_000_000)
    assert seconds(few, data) == pytest.approx(seconds(whole, data) * 40 / 3000)


def test_looking_at_held_out_rows_takes_time() -> None:
    # 1,125 rows in 8s: 141 steps a pass, 422 in all, one look every 50 of them: eight looks at 125 rows, a third each.
    data = replace(facts(1125, 1_125_000), rows=1250)
    assert seconds(GOOD, data) == pytest.approx(seconds(GOOD, facts(1125, 1_125_000)) * (1 + 8 * 125 / 3 / 3375))


def test_packing_of_short_rows_saves_time() -> None:
    packed = changed("max_length: 2048", "max_length: 2048\n  packing: true")
    assert seconds(packed, facts(1000, 50_000)) < 0.2 * seconds(GOOD, facts(1000, 50_000))
    # Long rows gain nothing, and the attention to their neighbours is counted.
    assert seconds(packed, facts(1000, 2_000_000)) == pytest.approx(seconds(GOOD, facts(1000, 2_000_000)), rel=0.1)


def test_padding_is_paid_for() -> None:
    batched = changed("max_length: 2048", "max_length: 2048\n  batch_size: 8")
    even, uneven = facts(800, 800_000, 1000), facts(800, 800_000, 2000)
    assert seconds(batched, uneven, flavor="t4-small") > 1.5 * seconds(batched, even, flavor="t4-small")
    assert seconds(batched, uneven) == seconds(batched, even)  # a flash kernel: end to end, without padding


def test_a_second_gpu_helps_and_a_faster_one_does() -> None:
    data = facts(1000, 1_000_000)
    assert seconds(GOOD, data, flavor="a10g-largex2") == pytest.approx(seconds(GOOD, data) / (2 * SEVERAL))
    by_speed = ["h200", "a100-large", "l40sx1", "l4x1", "t4-small"]
    times = [seconds(GOOD, data, flavor=name) for name in by_speed]
    assert times[0] < times[1] < times[3] < times[4]


def test_a_mixture_is_as_fast_as_its_active_weights() -> None:
    dense = ModelShape("qwen3", 48, 2048, 6144, 4096, 512, 151936, False)
    mixture = ModelShape("qwen3_moe", 48, 2048, 768, 4096, 512, 151936, False, 128, experts_per_token=8)
    text = changed("method: qlora", "method: lora")
    assert seconds(text, facts(100, 200_000), mixture) < 2 * seconds(text, facts(100, 200_000), dense)


RUNS = [FinishedRun("train", "qlora", "A10G", 1000, actual) for actual in (1100.0, 1200.0, 9000.0)]


def test_finished_runs_correct_by_their_median() -> None:
    assert correction(RUNS, "train", "qlora", "A10G") == 1.2
    assert correction(RUNS, "train", "lora", "A10G") is None
    assert correction(RUNS, "train", "qlora", "L4") is None
    assert correction([FinishedRun("train", "qlora", "L4", 1, 1000)], "train", "qlora", "L4") == 5.0
    experiment, data = parse_experiment(GOOD).experiment, facts(100, 100_000)
    corrected = estimate_train_seconds(experiment, GEMMA, data, A10G, RUNS)
    assert corrected == pytest.approx(1.2 * estimate_train_seconds(experiment, GEMMA, data, A10G))


def test_a_manifest_tells_what_was_predicted() -> None:
    predicted = {"duration_s": 1000 + CONTAINER_START_S, "flavor": "a10g-large", "method": "qlora"}
    manifest = {"stage": "train", "attempt": 1, "duration_s": 1500.0, "predicted": predicted}
    assert finished_run(manifest) == FinishedRun("train", "qlora", "A10G", 1000, 1500.0)
    assert finished_run({**manifest, "attempt": 2}) is None
    assert finished_run({**manifest, "predicted": {"duration_s": None, "flavor": "a10g-large"}}) is None
    assert finished_run({**manifest, "predicted": {"duration_s": 1000}}) is None
