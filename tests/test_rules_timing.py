"""Rules about timeouts: each passes the good experiment and fails a bad one."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run

from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.errors import InvalidExperiment
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.rules.experiment import timeouts_hold
from pipeline.rules.timing import SERVER_DEFAULT_S, timeout_is_chosen

HALF = changed("timeout: 4h", "timeout: 30m")
COUNTED = DatasetFacts("r.jsonl", 20, 20, "messages", is_chat=True, tokens=TokenFacts(20, 4000, 2000, 300))


@pytest.mark.parametrize("timeout", ["4h", "31m", "29m", "1h"])
def test_ok(timeout: str) -> None:
    assert run(timeout_is_chosen, changed("timeout: 4h", f"timeout: {timeout}")) is None


def test_known_to_be_enough() -> None:
    """20 rows take minutes; where they take longer, the rule about durations speaks."""
    small = {"shape": CATALOGUE["Qwen/Qwen3-0.6B"], "dataset": COUNTED}
    assert run(timeout_is_chosen, HALF, **small) is None
    assert run(timeouts_hold, HALF, **small) is None


@pytest.mark.parametrize("written", ["30m", "1800s", "0.5h"])
def test_the_servers_default(written: str) -> None:
    text = changed("timeout: 4h", f"timeout: {written}")
    expect(run(timeout_is_chosen, text), "the server's default", "write `timeout: 240m`", place(text, written))


def test_hint_stays_within_the_budget() -> None:
    text = changed("max_usd: 10", "max_usd: 5", HALF)
    expect(run(timeout_is_chosen, text), "not known", "write `timeout: 111m` under", place(text, "30m"))
    text = changed("max_usd: 10", "max_usd: 0.5", HALF)
    expect(run(timeout_is_chosen, text), "not known", "write `timeout: 4h`, and `max_usd: 8.20`", place(text, "30m"))


def test_unknown_flavor_and_missing_file_are_for_other_rules() -> None:
    assert run(timeout_is_chosen, changed("a10g-large", "a10-large", HALF)) is None
    assert run(timeout_is_chosen, HALF, missing=("x.jsonl",)) is None


def test_a_timeout_must_be_written_for_training_and_others_have_their_own_default() -> None:
    with pytest.raises(InvalidExperiment):
        parse_experiment(changed("^  timeout: 4h\n", ""))
    experiment = parse_experiment(GOOD).experiment
    assert experiment.gguf is not None
    assert experiment.gguf.timeout > SERVER_DEFAULT_S
