"""A hypothesis as a test of the result: the numbers it names, and whether they came true. Pure.

Read is only what cannot be misread: a loss or perplexity, a word of comparison and a number (`held-out loss below 1.2`,
`lowers perplexity by 20 %`); of preference tuning a reward margin or accuracy (`accuracy above 80 %`). What else it
says is for people, and the answer says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.unvouched import mapping, number

NUMBER = r"(?P<number>\d+(?:\.\d+)?)"
METRIC = r"(?P<training>\btrain(?:ing)? )?(?P<metric>\bloss|\bperplexity)"
# At most a few words between metric and comparison, none of which names another metric or ends the sentence.
FEW = r"(?:(?!\bloss\b|\bperplexity\b)[^.;\n]){0,40}?"
BELOW = re.compile(rf"{METRIC}\b{FEW}\b(?:below|under|less than|lower than|at most|<=?)\s*{NUMBER}(?![\d.]*\s*%)", re.I)
SIGN = re.compile(rf"{METRIC}\b\s*(?:<=?|≤)\s*{NUMBER}(?![\d.]*\s*%)", re.I)
REWARD = r"(?<!token )(?P<metric>\breward margin|\b(?:reward |preference )?accuracy)"
MORE = r"(?:\b(?:above|over|more than|higher than|at least)|>=?|≥)"
ABOVE = re.compile(rf"{REWARD}\b{FEW}{MORE}\s*{NUMBER}(?P<unit>\s*(?:%|percent))?", re.I)
BY_PERCENT = re.compile(rf"{METRIC}\b{FEW}\bby (?:at least |more than |about )?{NUMBER}\s*(?:%|percent)", re.I)


@dataclass(frozen=True)
class Claim:
    """One testable part. `bound` is a value of the metric, or percent of a fall when `percent`.

    `metric` is `held-out loss`, `held-out perplexity`, `training loss`, `held-out reward margin` or `… accuracy`, which
    are to be above it.
    """

    metric: str
    bound: float
    percent: bool = False

    @property
    def is_reward(self) -> bool:
        """Whether only preference tuning measures it."""
        return "reward" in self.metric

    def __str__(self) -> str:
        if self.is_reward:
            accuracy = self.metric.endswith("accuracy")
            return f"{self.metric} above " + (f"{100 * self.bound:g} %" if accuracy else f"{self.bound:g}")
        return f"{self.metric} falls by {self.bound:g} %" if self.percent else f"{self.metric} below {self.bound:g}"


@dataclass(frozen=True)
class Answer:
    """Whether a claim came true, and what was measured; `held` None when it was not."""

    claim: Claim
    held: bool | None
    measured: str


def read_claims(hypothesis: str) -> tuple[Claim, ...]:
    """The testable claims of a hypothesis, in its order, each once."""
    text = " ".join(hypothesis.split())
    found = [(match.start(), _claim(match, False)) for pattern in (BELOW, SIGN) for match in pattern.finditer(text)]
    found += [(match.start(), _claim(match, True)) for match in BY_PERCENT.finditer(text)]
    found += [(match.start(), _reward_claim(match)) for match in ABOVE.finditer(text)]
    return tuple(dict.fromkeys(claim for _, claim in sorted(found, key=lambda pair: pair[0])))


def judge(claim: Claim, evaluate: Mapping[str, Any], train: Mapping[str, Any]) -> Answer:
    """A claim against the metrics of the stages: those of `evaluate`, else the losses of the training."""
    before, after = _measured(claim.metric, evaluate, train)
    if after is None or (claim.percent and not before):
        return Answer(claim, None, "not measured")
    if claim.is_reward:
        said = f"{100 * after:.1f} %" if claim.metric.endswith("accuracy") else f"{after:.3f}"
        return Answer(claim, after > claim.bound, said)
    if not claim.percent or before is None:
        return Answer(claim, after < claim.bound, f"{after:.3f}")
    fall = 100 * (1 - after / before)
    return Answer(claim, fall >= claim.bound, f"it {'fell' if fall >= 0 else 'rose'} by {abs(fall):.1f} %")


def _claim(match: re.Match[str], percent: bool) -> Claim:
    where = "training" if match["training"] else "held-out"
    return Claim(f"{where} {match['metric'].lower()}", float(match["number"]), percent)


def _reward_claim(match: re.Match[str]) -> Claim:
    """A margin as it stands; an accuracy as a part of one, also where it is said in percent."""
    bound = float(match["number"])
    if match["metric"].lower().endswith("margin"):
        return Claim("held-out reward margin", bound)
    return Claim("held-out reward accuracy", bound / 100 if match["unit"] or bound > 1 else bound)


def _measured(metric: str, evaluate: Mapping[str, Any], train: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Before and after, where they were measured."""
    if metric.startswith("training"):
        return None, _value(train, "train_loss") if metric.endswith("loss") else None
    name = "_".join(metric.split()[1:])
    before, after = _value(evaluate.get("before"), name), _value(evaluate.get("after"), name)
    if after is None and name != "perplexity":
        after = _value(train, f"eval_{name}")
    return before, after


def _value(metrics: object, name: str) -> float | None:
    return number(mapping(metrics).get(name))
