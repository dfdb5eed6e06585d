"""Durations and dollars: whole minutes, worst case from the timeout, tokens bounded by max_length."""

import pytest
from examples import GOOD, changed

from pipeline.cost import estimate_cost, estimate_tokens, estimate_train_seconds
from pipeline.facts import DataFacts
from pipeline.flavors import CONTAINER_START_S, FLAVORS
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE

GEMMA = CATALOGUE["google/gemma-3-12b-it"]
A10G = FLAVORS["a10g-large"]


def test_billing_is_by_the_minute_begun() -> None:
    cost = estimate_cost(61, 3600, A10G)
    assert cost.expected_s == 61 + CONTAINER_START_S
    assert cost.expected_usd == pytest.approx(4 * 1.5 / 60)
    assert cost.worst_usd == pytest.approx(1.5)


def test_expected_never_passes_the_timeout_and_unknown_stays_unknown() -> None:
    assert estimate_cost(1e6, 3600, A10G).expected_s == 3600
    assert estimate_cost(None, 3600, A10G).expected_usd is None


def test_rows_longer_than_max_length_are_cut() -> None:
    experiment = parse_experiment(GOOD).experiment
    assert estimate_tokens(experiment, DataFacts(10, 4000)) == 1000
    assert estimate_tokens(experiment, DataFacts(10, 4_000_000)) == 10 * 2048


def test_the_projects_first_run_lies_within_the_band() -> None:
    # 1,000 coaching dialogues, 3 epochs, Gemma 3 12B on an A10G took two to three hours; 1,500 tokens a row assumed.
    experiment = parse_experiment(GOOD).experiment
    seconds = estimate_train_seconds(experiment, GEMMA, DataFacts(1000, 6_000_000), A10G)
    assert 0.5 * 2 * 3600 <= seconds <= 1.5 * 3 * 3600


def test_max_steps_replaces_epochs() -> None:
    data = DataFacts(1000, 4_000_000)
    whole = parse_experiment(GOOD).experiment
    few = parse_experiment(changed("epochs: 3", "max_steps: 5")).experiment
    assert estimate_train_seconds(few, GEMMA, data, A10G) == pytest.approx(
        estimate_train_seconds(whole, GEMMA, data, A10G) * 40 / 3000
    )
