"""Rules about a sweep as a whole: its GPUs and its own limit. What one variant does wrong is other rules' to say."""

import math

from pipeline.cost import billed_usd, setup_seconds
from pipeline.errors import Severity
from pipeline.flavors import CONTAINER_START_S, FLAVORS
from pipeline.plan import make_plan
from pipeline.rules.experiment import flavors_exist
from pipeline.rules.rule import Subject, Verdict
from pipeline.sweep_plan import sweep_seconds
from pipeline.variants import variants_of


def lanes_have_gpus(subject: Subject) -> Verdict | None:
    """Every variant that trains beside others has a GPU, and every GPU a variant

    Why: `sweep.concurrency` gives each variant one GPU; two on one GPU run out of memory, and a GPU without a variant
    is paid for and idle. With `concurrency: 1` each variant in its turn has all of them.
    Fix: As many as the flavor has GPUs, or 1.
    """
    experiment = subject.file.experiment
    sweep, flavor = experiment.sweep, FLAVORS.get(experiment.train.flavor)
    if sweep is None or flavor is None or sweep.concurrency == 1:
        return None
    count, gpus, at = len(variants_of(experiment)), flavor.gpus, "sweep.concurrency"
    best = max(1, min(gpus, count))
    said = f"`concurrency: {sweep.concurrency}`"
    if sweep.concurrency > max(gpus, 1):
        message = f"{said}, and `{flavor.name}` has {gpus or 'no'} GPU{'s' * (gpus > 1)}"
        return Verdict(at, message, f"write `concurrency: {best}`")
    if sweep.concurrency > count:
        return Verdict(at, f"{said} for {count} variants", f"write `concurrency: {best}`", Severity.WARNING)
    if sweep.concurrency < best:
        message = f"{said} leaves {gpus - sweep.concurrency} of the {gpus} GPUs of `{flavor.name}` idle"
        return Verdict(at, message, f"write `concurrency: {best}`, or 1", Severity.WARNING)
    return None


def limit_leaves_variants(subject: Subject) -> Verdict | None:
    """`sweep.max_usd` is enough for every variant

    Why: Where the training would pass it, no further variant is started: the winner is found among fewer than the
    reviewer reads here.
    Fix: Raise it, or leave it out: `budget.max_usd` and the timeout bound the price too.
    """
    sweep = subject.file.experiment.sweep
    if sweep is None or sweep.max_usd is None or flavors_exist(subject) or subject.facts.missing:
        return None
    train = make_plan(subject.file.experiment, subject.facts).stages[0]
    shape, seconds = subject.facts.shape, sweep_seconds(train.variants, train.parallel.lanes)
    if shape is None or seconds is None:
        return None

    def price(count: int) -> float:
        """Dollars of a job that trains so many of the variants."""
        work = sweep_seconds(train.variants[:count], train.parallel.lanes) or 0.0
        return billed_usd(CONTAINER_START_S + setup_seconds(shape) + work, train.flavor)

    count, needed = len(train.variants), price(len(train.variants))
    if needed <= sweep.max_usd:
        return None
    fits = sum(price(number) <= sweep.max_usd for number in range(1, count))
    message = f"`max_usd: {sweep.max_usd:g}` is enough for about {fits} of {count} variants"
    hint = f"write `max_usd: {math.ceil(100 * needed) / 100:.2f}`, or remove it"
    return Verdict("sweep.max_usd", message, hint, Severity.WARNING)
