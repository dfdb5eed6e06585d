"""The comment that is new when a run ends: what came of the hypothesis, and how to use what was made. Posts nothing.

It is made of the finish tag, which is always there, and of the artifacts' manifests as far as they can be read: a
section whose numbers are not known is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.book import Closed, Verdict
from pipeline.comments import LOGIN, joined
from pipeline.markdown import code, details, fence, money, prose, quote
from pipeline.plan import StageName
from pipeline.pull_request import LONGEST_COMMENT, marker_of
from pipeline.result_sections import (
    answers_list,
    artifacts_section,
    before_after,
    comparison,
    curve_section,
    estimates_section,
    every_metric,
    held_out_loss,
    reproduction,
    samples_section,
    usage_section,
)
from pipeline.sweep_sections import comparison_section
from pipeline.unvouched import mapping, number

HEADS = {
    Verdict.DONE: ("✅", "is done"),
    Verdict.FAILED: ("❌", "failed"),
    Verdict.CANCELLED: ("⛔", "was cancelled"),
    Verdict.SUPERSEDED: ("⛔", "was stopped for a newer version"),
    Verdict.ADOPTED: ("·", "was here before mergetune, and is not launched"),
}


@dataclass(frozen=True)
class Ending:
    """A finished round and who is told. `manifests` are those of its stages, `hint` a way on.

    `rivals` are the rounds to compare with, each with a word on why: the run before it, the best on the same data.
    """

    name: str
    closed: Closed
    people: tuple[str, ...] = ()
    hint: str = ""
    endpoint: str = "https://huggingface.co"
    manifests: Mapping[StageName, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    rivals: tuple[tuple[str, Closed], ...] = ()

    def stage(self, name: StageName) -> Mapping[str, Any]:
        """What is known of a stage: its manifest, and under it what the tag kept of it.

        Which repository and commit it is, only the tag says: a manifest must not send a reader elsewhere.
        """
        stages = self.closed.summary.get("stages")
        kept = mapping(mapping(stages).get(name.value))
        return {**kept, **self.manifests.get(name, {}), **{key: kept.get(key) for key in ("repo", "revision")}}


def result_id(closed: Closed) -> str:
    """The id under which a round's final comment is posted once: a retried run ends once more."""
    return closed.run_id if closed.round == 1 else f"{closed.run_id}.{closed.round}"


def result_comment(ending: Ending) -> str:
    """The whole comment; where it is too long for GitHub the samples go first, then the metrics."""
    text = _render(ending)
    if len(text) > LONGEST_COMMENT:
        text = _render(_without_samples(ending))
    return text


def _render(ending: Ending) -> str:
    closed, summary = ending.closed, ending.closed.summary
    mark, words = HEADS[closed.verdict]
    people = " ".join(f"@{login}" for login in dict.fromkeys(ending.people) if LOGIN.fullmatch(login))
    hypothesis = _text(summary.get("hypothesis"))
    stages = {name: ending.stage(name) for name in StageName}
    parts = [
        f"{marker_of(f'result:{result_id(closed)}')} -->",
        f"## {mark} {code(ending.name)} {words}",
        " · ".join(part for part in (people, prose(closed.text)) if part),
        quote(hypothesis) if hypothesis else "",
        _answers(hypothesis, stages, closed),
        f"**What to do:** {prose(hint)}" if (hint := ending.hint or _text(summary.get("hint"))) else "",
        _telling(summary),
        comparison_section(stages[StageName.TRAIN]),
        before_after(stages[StageName.EVALUATE], stages[StageName.TRAIN]),
        estimates_section(stages, closed),
        _cost(closed),
        curve_section(stages, summary),
        samples_section(stages[StageName.EVALUATE]),
        artifacts_section(stages, ending.endpoint),
        usage_section(stages, summary) if closed.verdict is Verdict.DONE else "",
        comparison(closed, ending.rivals),
        details("To make it again", reproduction(closed, stages)) if closed.verdict is Verdict.DONE else "",
        every_metric(stages),
        _next(ending),
    ]
    return joined(parts)


def _answers(hypothesis: str, stages: Mapping[StageName, Mapping[str, Any]], closed: Closed) -> str:
    """Each number of the hypothesis against what was measured: the first thing a reader wants to know."""
    if closed.verdict is not Verdict.DONE:
        return ""
    answers = answers_list(hypothesis, stages)
    if not answers and hypothesis:
        numbers = "reward margin or accuracy" if closed.summary.get("method") == "dpo" else "loss or perplexity"
        return f"❔ The hypothesis names no {numbers} to hold it to: judge it by the samples and the curve."
    return answers


def _cost(closed: Closed) -> str:
    parts = [f"**Cost** {money(closed.usd)}"]
    expected, worst = number(closed.summary.get("expected_usd")), number(closed.summary.get("worst_usd"))
    if expected is not None:
        whole = expected > 0 and closed.verdict is Verdict.DONE
        off = f" ({100 * (closed.usd / expected - 1):+.0f} %)" if whole else ""
        parts.append(f"{money(expected)} was expected{off}")
    if worst is not None:
        parts.append(f"at most {money(worst)} was approved")
    return ", ".join(parts) if closed.attempts else ""


def _telling(summary: Mapping[str, Any]) -> str:
    """What a log says whose cause nobody knows."""
    lines = summary.get("lines")
    shown = [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
    return details("The most telling lines of its log", fence("\n".join(shown))) if shown else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _next(ending: Ending) -> str:
    if ending.closed.verdict in (Verdict.FAILED, Verdict.CANCELLED) and ending.name:
        return f"Comment `/retry {ending.name}` to go on from the last artifact or checkpoint."
    return ""


def _without_samples(ending: Ending) -> Ending:
    """The same with no answers and no metrics of custom scripts, which are all that can be long."""
    shorter = {
        name: {key: value for key, value in manifest.items() if key != "samples"}
        for name, manifest in ending.manifests.items()
    }
    return replace(ending, manifests=shorter)


def rivals_of(closed: Closed, rounds: Sequence[Closed]) -> tuple[tuple[str, Closed], ...]:
    """The finished rounds to compare with: the one before it of the same experiment, and the best on the same data."""
    done = [
        one for one in rounds if one.verdict is Verdict.DONE and one.run_id != closed.run_id and one.at <= closed.at
    ]
    name, dataset = closed.summary.get("experiment"), closed.summary.get("dataset")
    same = [one for one in done if name and one.summary.get("experiment") == name]
    data = [one for one in done if dataset and one.summary.get("dataset") == dataset and held_out_loss(one) is not None]
    previous = max(same, key=lambda one: one.at, default=None)
    best = min(data, key=lambda one: held_out_loss(one) or 0.0, default=None)
    found = [("the run before it", previous), ("the best on this data", best if best is not previous else None)]
    return tuple((why, one) for why, one in found if one is not None)
