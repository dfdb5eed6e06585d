"""Preference tuning in comments: what a plan says of it, and what it came to. Posts nothing, trusts no manifest."""

from collections.abc import Mapping
from typing import Any

from pipeline.experiment import Train
from pipeline.markdown import code
from pipeline.train_sections import Dpo
from pipeline.unvouched import mapping, number


def method_words(train: Train) -> str:
    """`preference tuning (dpo, beta 0.1, loss sigmoid, 4-bit base)`, or the method's name alone."""
    if not train.is_dpo:
        return code(train.method)
    dpo = train.dpo or Dpo()
    base = "4-bit" if dpo.quantize else "bf16"
    return f"Preference tuning ({code(train.method)}, beta {dpo.beta:g}, loss {code(dpo.loss)}, {base} base)"


def reward_rows(evaluate: Mapping[str, Any], train: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table before and after, of held-out pairs: of the evaluation, else of the training's last look.

    Before the training policy and reference are one: every reward is 0, and no answer is ahead.
    """
    metrics, trained = mapping(evaluate.get("metrics")), mapping(train.get("metrics"))
    before, after = mapping(metrics.get("before")), mapping(metrics.get("after"))
    margin, accuracy = (
        _first(number(after.get(name)), number(trained.get(f"eval_{name}")))
        for name in ("reward_margin", "reward_accuracy")
    )
    rows: list[tuple[str, ...]] = []
    if margin is not None:
        rows.append(("reward margin, chosen over rejected", "0", f"**{margin:.3f}**", ""))
    if accuracy is not None:
        rows.append(("reward accuracy", "–", f"**{100 * accuracy:.1f} %**", ""))
    old, new = number(before.get("prefers_chosen")), number(after.get("prefers_chosen"))
    if old is not None and new is not None:
        likelier = ("the chosen answer is the likelier", f"{100 * old:.1f} %", f"**{100 * new:.1f} %**")
        rows.append((*likelier, f"{100 * (new - old):+.1f} points"))
    for name in ("chosen", "rejected"):
        old, new = number(before.get(f"loss_{name}")), number(after.get(f"loss_{name}"))
        if old is not None and new is not None:
            change = f"{100 * (new / old - 1):+.1f} %" if old else ""
            rows.append((f"loss of the {name} answers (nats per token)", f"{old:.3f}", f"{new:.3f}", change))
    return rows


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
