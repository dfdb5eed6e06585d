"""A sweep in words and tables: what its variants are expected to take, and what became of them. Posts nothing.

`rows` of a manifest come from a repository that others may write to: no value of theirs is trusted to have its type.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cost import setup_seconds
from pipeline.errors import redact
from pipeline.flavors import CONTAINER_START_S
from pipeline.markdown import code, money, plural, prose, table
from pipeline.plan import Plan, Stage
from pipeline.progress import duration
from pipeline.sweep import MOST
from pipeline.sweep_plan import VariantEstimate
from pipeline.unvouched import mapping, number

WORDS, REASON = 200, 200  # characters shown of each
MARKS = {"trained": "", "diverged": "❌ diverged", "failed": "❌ failed", "not started": "not started"}


def variants_section(plan: Plan) -> str:
    """The variants of a sweep for a reviewer; empty without one."""
    shown = variants_table(plan)
    return f"### {plural(len(plan.stages[0].variants), 'variant')} in one job\n\n{shown}" if shown else ""


def variants_table(plan: Plan) -> str:
    """One row a variant and the whole training; how the winner is found."""
    train, sweep = plan.stages[0], plan.experiment.sweep
    if not train.variants or sweep is None:
        return ""
    rows = [_planned(variant, train) for variant in train.variants]
    rows += [("", "start of the job, download of the base", "", *_start(plan)), _whole(train)]
    head = ("variant", "what differs", "memory", "expected time", "expected cost")
    shown = table(head, rows, "rlrrr")
    lanes = train.parallel.lanes
    order = f"{lanes} at a time, one GPU each," if lanes > 1 else "one after the other"
    limit = f" No further one is started where the training would pass {money(sweep.max_usd)}." if sweep.max_usd else ""
    kept = "the one with the lowest held-out loss goes on to the stages after it"
    return f"{shown}\n\nThey train {order} in one job; {kept}.{limit}"


def winner_of(train: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the variant whose adapter is the artifact; empty where no sweep was made."""
    return next((row for row in rows_of(train) if row.get("winner") is True), {})


def rows_of(train: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a training's manifest, as far as they are rows."""
    rows = train.get("sweep")
    return [row for row in rows[:MOST] if isinstance(row, Mapping)] if isinstance(rows, list) else []


def comparison_section(train: Mapping[str, Any]) -> str:
    """What became of every variant, the winner in bold, and by how much it won; empty without a sweep."""
    rows = rows_of(train)
    if not rows:
        return ""
    head = ("variant", "what differs", "held-out loss", "training loss", "took", "peak memory", "")
    shown = table(head, [_compared(row) for row in rows], "rlrrrrl")
    return "\n\n".join(part for part in ("### The variants compared", shown, victory(rows)) if part)


def victory(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who won, over whom, and by how much."""
    lost = [(loss, row) for row in rows if (loss := number(row.get("eval_loss"))) is not None]
    winner = next((pair for pair in lost if pair[1].get("winner") is True), None)
    if winner is None:
        return ""
    others = sorted((pair for pair in lost if pair is not winner), key=lambda pair: pair[0])
    named = f"**Variant {_number(winner[1])}** ({_words(winner[1])})"
    if not others:
        return f"{named} is the only one that was trained to its end."
    (second, row), best = others[0], winner[0]
    less = f" ({100 * (second - best) / second:.1f} %)" if second else ""
    over = f"Variant {_number(row)} ({_words(row)})"
    if f"{best:.4f}" == f"{second:.4f}":
        return f"{named} won, and {over.replace('Variant', 'variant', 1)} is as good: {best:.3f} both."
    return (
        f"{named} won with a held-out loss of {best:.3f}: {second - best:.3f}{less} below {over[0].lower()}{over[1:]}."
    )


def _planned(variant: VariantEstimate, train: Stage) -> tuple[str, ...]:
    time = "not known" if variant.seconds is None else f"~{duration(variant.seconds)}"
    cost = "not known" if variant.usd is None else money(variant.usd)
    return (str(variant.number), code(variant.words, WORDS), _memory(variant, train), time, cost)


def _memory(variant: VariantEstimate, train: Stage) -> str:
    if variant.memory is None or train.flavor.gpu is None:
        return ""
    return f"{variant.memory.total:.1f} of {train.flavor.vram_gib:g} GiB"


def _start(plan: Plan) -> tuple[str, str]:
    """What the job takes beside its variants: once for all of them."""
    seconds = CONTAINER_START_S + (setup_seconds(plan.shape) if plan.shape else 0.0)
    return f"~{duration(seconds)}", money(seconds / 60 * plan.stages[0].flavor.usd_per_minute)


def _whole(train: Stage) -> tuple[str, ...]:
    cost = train.cost
    time = "not known" if cost.needed_s is None else f"~{duration(cost.needed_s)}"
    price = "not known" if cost.expected_usd is None else money(cost.expected_usd)
    return ("**all**", "", "", f"**{time}**", f"**{price}**, at most {money(cost.worst_usd)}")


def _compared(row: Mapping[str, Any]) -> tuple[str, ...]:
    before, after, trained, took, peak = (
        number(row.get(key)) for key in ("eval_loss_before", "eval_loss", "train_loss", "seconds", "memory_gib")
    )
    loss = "–" if after is None else f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
    won = row.get("winner") is True
    state = str(row.get("state", ""))
    reason = prose(" ".join(redact(str(row.get("reason") or "")).split())[:REASON])
    words = "🏆 winner" if won else ": ".join(part for part in (MARKS.get(state, ""), reason) if part)
    return (
        f"**{_number(row)}**" if won else _number(row),
        _words(row),
        f"**{loss}**" if won else loss,
        "–" if trained is None else f"{trained:.3f}",
        "–" if took is None else duration(took),
        "–" if peak is None else f"{peak:.1f} GiB",
        words,
    )


def _number(row: Mapping[str, Any]) -> str:
    count = number(row.get("variant"))
    return f"{count:.0f}" if count is not None else "?"


def _words(row: Mapping[str, Any]) -> str:
    return code(str(row.get("words") or ""), WORDS)


def winner_words(train: Mapping[str, Any]) -> str:
    """The winner's words for a summary: `variant 2: learning_rate 2e-4`; empty without a sweep."""
    row = winner_of(train)
    return f"variant {_number(row)}: {str(row.get('words') or '')[:WORDS]}" if mapping(row) else ""
