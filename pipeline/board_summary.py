"""The summary of a finish tag, read with distrust: anybody may write a tag, and old ones know fewer keys. Pure."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.loss_chart import read_curve
from pipeline.markdown import visible
from pipeline.plan import StageName
from pipeline.unvouched import mapping, number

POINTS = 32  # of a drawn curve: more cannot be told apart at its width
NAME_CHARACTERS, TEXT_CHARACTERS = 100, 600
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Artifact:
    """What a stage made: a repository of the Hub, at a commit where it is known."""

    stage: StageName
    repo: str
    revision: str = ""


@dataclass(frozen=True)
class Metrics:
    """What was measured; None is not known, which is never zero. Losses are nats per token."""

    before: float | None = None
    after: float | None = None
    change_percent: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    tokens: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Summary:
    """Everything the board shows of a summary; empty text and None are not known."""

    experiment: str = ""
    hypothesis: str = ""
    base: str = ""
    dataset: str = ""
    flavor: str = ""
    expected_usd: float | None = None
    worst_usd: float | None = None
    metrics: Metrics = Metrics()
    artifacts: tuple[Artifact, ...] = ()
    train_curve: Points = ()
    eval_curve: Points = ()
    commit: str = ""
    pull: int | None = None


def read_summary(summary: Mapping[str, Any]) -> Summary:
    """The summary of a finish tag, or of one by hand, of an older mergetune, or forged: what is odd is not known."""
    curves = mapping(summary.get("curve"))
    train, held_out = (tuple(sorted(read_curve(curves.get(key)))) for key in ("loss", "eval_loss"))
    commit, pull = summary.get("commit"), summary.get("pull_request")
    return Summary(
        experiment=shown(summary.get("experiment"), NAME_CHARACTERS),
        hypothesis=shown(summary.get("hypothesis")),
        base=shown(summary.get("base"), NAME_CHARACTERS),
        dataset=shown(summary.get("dataset"), NAME_CHARACTERS),
        flavor=shown(summary.get("flavor"), NAME_CHARACTERS),
        expected_usd=_amount(summary.get("expected_usd")),
        worst_usd=_amount(summary.get("worst_usd")),
        metrics=_metrics(summary, train, held_out),
        artifacts=tuple(_artifacts(summary)),
        train_curve=thinned(train),
        eval_curve=thinned(held_out),
        commit=commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else "",
        pull=pull if type(pull) is int and pull > 0 else None,
    )


def shown(value: Any, characters: int = TEXT_CHARACTERS) -> str:
    """Untrusted text on one line, without tokens and invisible characters, cut; nothing where it is no text."""
    if not isinstance(value, str):
        return ""
    line = " ".join(visible(value[: 4 * characters]).split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def thinned(points: Points) -> Points:
    """At most POINTS of them, each the mean of its share; the last one stays as it is, since it is named in text."""
    if len(points) <= POINTS:
        return points
    body, every = points[:-1], math.ceil((len(points) - 1) / (POINTS - 1))
    shares = [body[at : at + every] for at in range(0, len(body), every)]
    means = [(sum(x for x, _ in share) / len(share), sum(y for _, y in share) / len(share)) for share in shares]
    return (*means, points[-1])


def _metrics(summary: Mapping[str, Any], train: Points, held_out: Points) -> Metrics:
    trained, evaluated = (mapping(_stage(summary, name).get("metrics")) for name in ("train", "evaluate"))
    took = [_amount(_stage(summary, name).get("duration_s")) for name in StageName]
    known = [seconds for seconds in took if seconds is not None]
    # The curve's last point is where the training ended; `train_loss` is the mean over all of it.
    last_train, last_eval = (points[-1][1] if points else None for points in (train, held_out))
    train_loss, eval_loss = number(trained.get("train_loss")), number(trained.get("eval_loss"))
    return Metrics(
        before=number(mapping(evaluated.get("before")).get("loss")),
        after=number(mapping(evaluated.get("after")).get("loss")),
        change_percent=number(evaluated.get("loss_change_percent")),
        train_loss=last_train if last_train is not None else train_loss,
        eval_loss=last_eval if last_eval is not None else eval_loss,
        tokens=_amount(trained.get("tokens_trained")),
        duration_s=math.fsum(known) if known else None,
    )


def _artifacts(summary: Mapping[str, Any]) -> Iterator[Artifact]:
    for name in StageName:
        repo, revision = (_stage(summary, name).get(key) for key in ("repo", "revision"))
        if isinstance(repo, str) and REPO.fullmatch(repo):
            at = isinstance(revision, str) and COMMIT.fullmatch(revision)
            yield Artifact(name, repo, str(revision) if at else "")


def _stage(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return mapping(mapping(summary.get("stages")).get(name))


def _amount(value: Any) -> float | None:
    """A number that counts something."""
    amount = number(value)
    return amount if amount is not None and amount >= 0 else None
