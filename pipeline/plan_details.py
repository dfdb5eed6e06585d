"""The folded part of the plan comment: memory by part, flavors that fit, basis of the estimates, every setting."""

import json
from functools import partial

from pipeline.cost import estimate_cost, estimate_train_seconds, setup_seconds
from pipeline.errors import redact
from pipeline.facts import Facts
from pipeline.fit import Fit, fit_table
from pipeline.flavors import AS_OF, CONTAINER_START_S
from pipeline.markdown import code, fence, money, prose, table
from pipeline.memory import spec_of
from pipeline.models import ModelShape
from pipeline.parallel import ALONE, need_of
from pipeline.plan import Plan
from pipeline.plan_changes import decides, flat, shown
from pipeline.plan_preview import Preview
from pipeline.progress import duration
from pipeline.settled import settle
from pipeline.sweep_plan import estimate_variants, heaviest, sweep_seconds
from pipeline.traced import TracedMemory
from pipeline.train_lines import gpus_line, settled_line, traced_line

FITS = {True: "fits", None: "may not fit"}
SETTING = 300  # characters of one value


def memory_parts(preview: Preview) -> str:
    """What the GiB on the GPU are made of."""
    train = preview.plan.stages[0] if preview.plan else None
    if train is None or train.flavor.gpu is None:
        return ""
    if train.memory is None:
        return traced_line(train)
    memory = train.memory
    parts = [
        ("weights of the base", memory.weights),
        ("adapter and gradients", memory.adapter),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("output head and loss", memory.head),
        ("fragmentation", memory.allocated * memory.fragmentation),
        ("CUDA context", memory.context),
    ]
    rows = [(name, f"{gib:.2f}") for name, gib in parts]
    rows.append((f"**needed** (±{memory.band:.0%}: {memory.low:.1f} to {memory.high:.1f})", f"**{memory.total:.2f}**"))
    rows.append((f"`{train.flavor.name}` has", f"{train.flavor.vram_gib:g}"))
    if train.traced is None:
        return table(("part", "GiB"), rows, "lr")
    beside = [*_traced_parts(train.traced), f"**{train.traced.total:.2f}**", f"{train.flavor.vram_gib:g}"]
    both = [(*row, found) for row, found in zip(rows, beside, strict=True)]
    return table(("part", "closed form, GiB", "traced, GiB"), both, "lrr") + f"\n\n{traced_line(train)}"


def _traced_parts(traced: TracedMemory) -> list[str]:
    """The traced bytes in the rows of the closed form. Scratch is part of its activations, but in the output head."""
    activations = traced.activations + traced.scratch
    parts = (traced.weights, traced.adapter, traced.optimizer, activations, traced.head)
    return [f"{gib:.2f}" for gib in (*parts, traced.allocated * traced.fragmentation, traced.context)]


def flavors_that_fit(preview: Preview) -> str:
    """Every single-GPU flavor that this training fits, or may fit, cheapest per hour first."""
    plan, shape = preview.plan, preview.facts.shape
    if plan is None or shape is None or plan.stages[0].flavor.gpu is None:
        return ""
    length = plan.experiment.train.max_length
    fits = fit_table(partial(spec_of, heaviest(plan.experiment, shape), shape), shape, (length,))
    rows = [_flavor_row(fit, preview, plan, shape) for fit in fits if fit.verdict(length) is not False]
    if not rows:
        return "No single-GPU flavor fits this training."
    head = (
        "flavor",
        "per hour",
        "memory",
        f"at max_length {length:,}",
        "longest that fits",
        "train time",
        "train cost",
    )
    if preview.facts.dataset is None:  # then neither time nor cost is known of any
        return table(head[:5], [row[:5] for row in rows], "lrrlr")
    return table(head, rows, "lrrlrrr")


def estimate_basis(preview: Preview) -> str:
    """Where each number comes from, and how far it may be off."""
    plan = preview.plan
    if plan is None:
        return ""
    train = plan.stages[0]
    lines = []
    if train.flavor.gpu is not None:
        base = code(plan.experiment.base.model)
        known = f"from the shape of {base}, ±{train.memory.band:.0%}" if train.memory else f"no config.json of {base}"
        if train.traced is not None:
            known = f"one step of the pinned libraries on tensors without data, from the config of {base}"
        lines.append(f"- **Memory**: {known}; not measured.")
    if shared := gpus_line(plan):
        lines.append(f"- **GPUs**: {shared}")
    if chosen := settled_line(train):
        lines.append(f"- **Chosen by the estimate**: {chosen}")
    lines.append(f"- **Tokens**: {_token_basis(preview)}.")
    # On a Mac the training's own section says how wide its band is, and why.
    band = (plan.stages[-1] if train.flavor.local else train).cost.band
    lines.append(
        f"- **Time**: arithmetic of the model over the speed of the flavor, ±{band:.0%}, with "
        f"{duration(CONTAINER_START_S)} for each stage to start."
    )
    lines.append(f"- **Cost**: prices of {AS_OF}, whole minutes; at most means that every stage runs into its timeout.")
    lines.append(f"- **Fingerprint**: `{plan.fingerprint}`, of everything in the file that decides the result.")
    return "\n".join(lines)


def settings_written(preview: Preview) -> str:
    """Every field with its value: those that decide the result, then the others; which ones are defaults."""
    if preview.experiment is None:
        return ""
    said = flat(preview.experiment.model_dump(mode="json", exclude_unset=True))
    values = flat(preview.experiment.resolved())
    there = {keys: value for keys, value in values.items() if value is not None and keys != ("hypothesis",)}
    deciding = [_setting(keys, value, keys in said) for keys, value in there.items() if decides(keys)]
    others = [_setting(keys, value, keys in said) for keys, value in there.items() if not decides(keys)]
    parts = ["What decides the result, and makes the fingerprint:", fence("\n".join(deciding), "yaml")]
    return "\n\n".join([*parts, "What does not:", fence("\n".join(others), "yaml")])


def _setting(keys: tuple[str, ...], value: object, said: bool) -> str:
    text = redact(shown(keys, value))  # before it is cut: half a token is not recognised as one
    if "#" in text or "\n" in text:
        text = json.dumps(text, ensure_ascii=False)
    text = text if len(text) <= SETTING else f"{text[: SETTING - 1]}…"
    return f"{' '.join('.'.join(keys).split())}: {text}" + ("" if said else "  # default")


def _flavor_row(fit: Fit, preview: Preview, plan: Plan, shape: ModelShape) -> tuple[str, ...]:
    flavor, length = fit.flavor, plan.experiment.train.max_length
    largest = heaviest(plan.experiment, shape, flavor)
    experiment = settle(largest, shape, flavor).of(largest)
    name = f"**`{flavor.name}`**, chosen" if flavor == plan.stages[0].flavor else f"`{flavor.name}`"
    need = need_of(spec_of(experiment, shape, flavor), shape, ALONE)
    data = preview.facts.dataset
    time, cost = "not known", "not known"
    if data is not None:
        seconds = estimate_train_seconds(experiment, shape, data, flavor)
        if experiment.sweep:
            seconds = sweep_seconds(estimate_variants(experiment, Facts(shape=shape, dataset=data), flavor), 1) or 0.0
        week = 7 * 86400  # the longest timeout there is
        estimate = estimate_cost(seconds, week, flavor, setup_seconds(shape))
        time = f"~{duration(estimate.needed_s or 0)}"
        cost = "not known" if estimate.expected_usd is None else money(estimate.expected_usd)
    longest = f"{fit.largest:,}" if fit.largest else "none"
    room = f"{need.total:.1f} of {flavor.vram_gib:g} GiB"
    return (name, money(flavor.usd_per_hour), room, FITS[fit.verdict(length)], longest, time, cost)


def _token_basis(preview: Preview) -> str:
    dataset = preview.facts.dataset
    if dataset is not None and dataset.exact:
        return "every row counted with the base's own tokenizer and chat template"
    if dataset is not None and dataset.tokens is not None:
        return f"an estimate: {prose(dataset.estimated)}" if dataset.estimated else "an estimate"
    return "not counted"
