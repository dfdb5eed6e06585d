"""The numbers that a hypothesis names, and whether they came true."""

import time

import pytest

from pipeline.hypothesis import judge, read_claims

EVALUATE = {"before": {"loss": 2.0, "perplexity": 7.4}, "after": {"loss": 1.0, "perplexity": 2.7}}
TRAIN = {"train_loss": 0.8, "eval_loss": 1.1}


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("r=64 lowers validation loss below 1.2 without losing anything.", ["held-out loss below 1.2"]),
        ("held-out loss falls\n  below 1.2", ["held-out loss below 1.2"]),
        ("Loss < 2; eval perplexity under 3.", ["held-out loss below 2", "held-out perplexity below 3"]),
        ("Training loss below 1.0", ["training loss below 1"]),
        ("lowers perplexity by at least 20 %", ["held-out perplexity falls by 20 %"]),
        ("loss below 12 %", []),  # no value of a loss
        ("the whole chain runs on loopback", []),
        ("A loss of 3 is bad. below 2 we celebrate", []),  # another sentence
        ("loss stays and perplexity falls below 4", ["held-out perplexity below 4"]),
        ("a reward margin above 0.5", ["held-out reward margin above 0.5"]),
        ("reward accuracy of at least 80 %, margin > 1", ["held-out reward accuracy above 80 %"]),
        ("Preference accuracy rises above 0.9.", ["held-out reward accuracy above 90 %"]),
        (
            "accuracy > 75 percent and reward margin > 1",
            ["held-out reward accuracy above 75 %", "held-out reward margin above 1"],
        ),
        ("token accuracy above 90 %", []),
        ("accuracy is what counts. Above 3 we celebrate", []),
        ("loss below 1, I mean loss below 1", ["held-out loss below 1"]),
    ],
)
def test_only_what_cannot_be_misread_is_read(text: str, claims: list[str]) -> None:
    assert [str(claim) for claim in read_claims(text)] == claims


@pytest.mark.parametrize(
    ("text", "held", "measured"),
    [
        ("loss below 1.2", True, "1.000"),
        ("loss below 0.9", False, "1.000"),
        ("loss falls by 50 %", True, "it fell by 50.0 %"),
        ("loss falls by 60 %", False, "it fell by 50.0 %"),
        ("perplexity below 3", True, "2.700"),
        ("training loss below 0.9", True, "0.800"),
        ("training perplexity below 3", None, "not measured"),
        ("training loss falls by 10 %", None, "not measured"),
    ],
)
def test_a_claim_is_held_to_what_was_measured(text: str, held: bool | None, measured: str) -> None:
    (claim,) = read_claims(text)
    answer = judge(claim, EVALUATE, TRAIN)
    assert (answer.held, answer.measured) == (held, measured)


PREFERRED = {"before": {"prefers_chosen": 0.4}, "after": {"reward_margin": 0.8, "reward_accuracy": 0.85}}


@pytest.mark.parametrize(
    ("text", "held", "measured"),
    [
        ("reward margin above 0.5", True, "0.800"),
        ("reward margin above 1", False, "0.800"),
        ("accuracy above 80 %", True, "85.0 %"),
        ("accuracy above 0.9", False, "85.0 %"),
        ("held-out loss below 0.6", True, "0.550"),
        ("perplexity below 3", None, "not measured"),
    ],
)
def test_a_claim_about_preferences(text: str, held: bool | None, measured: str) -> None:
    (claim,) = read_claims(text)
    trained = {"eval_loss": 0.55, "eval_reward_margin": 0.7, "eval_reward_accuracy": 0.8}
    answer = judge(claim, PREFERRED, trained)
    assert (answer.held, answer.measured) == (held, measured)
    if claim.is_reward:
        alone = judge(claim, {}, trained)
        assert alone.measured in ("0.700", "80.0 %")
        assert judge(claim, {}, {}).held is None


def test_without_an_evaluation_the_training_s_held_out_loss_answers() -> None:
    (claim,) = read_claims("held-out loss below 1.2")
    assert judge(claim, {}, TRAIN).measured == "1.100"
    assert judge(claim, {}, {"eval_loss": None}).held is None
    (fall,) = read_claims("loss falls by 10 %")
    assert judge(fall, {}, TRAIN).held is None


def test_a_long_hypothesis_takes_no_time() -> None:
    began = time.process_time()
    read_claims("loss " * 20_000 + "x " * 20_000 + "perplexity loss by " * 5_000)
    assert time.process_time() - began < 2
