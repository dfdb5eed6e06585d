"""Rules about memory: does training fit the GPU of its flavor?"""

from pipeline.errors import Severity
from pipeline.experiment import Experiment
from pipeline.fit import cheapest_flavor, largest_max_length
from pipeline.flavors import FLAVORS, Flavor, gpu_flavors
from pipeline.memory import MemoryEstimate, estimate_memory
from pipeline.models import ModelShape
from pipeline.rules.rule import Subject, Verdict
from pipeline.traced import TracedMemory


def training_fits(subject: Subject) -> Verdict | None:
    """Training fits the GPU of its flavor

    Why: Out of memory at step 1 costs the start of a machine and an hour of somebody's attention. The closed form is
    right to ±10 %; where `mergetune plan --trace` was asked for, or preflight could trace, the trace decides.
    Fix: A larger flavor, a smaller `max_length` or `batch_size`, or `method: qlora`.
    """
    experiment, shape = subject.file.experiment, subject.facts.shape
    flavor, traced = FLAVORS.get(experiment.train.flavor), subject.facts.traced
    if flavor is None or flavor.gpu is None:
        return None
    if traced is not None:
        return _by_trace(traced, estimate_memory(experiment, shape) if shape else None, flavor)
    return _by_closed_form(experiment, shape, flavor) if shape else None


def _by_closed_form(experiment: Experiment, shape: ModelShape, flavor: Flavor) -> Verdict | None:
    estimate = estimate_memory(experiment, shape)
    fits = estimate.fits(flavor)
    if fits is True:
        return None
    cheapest = cheapest_flavor(experiment, shape)
    largest = largest_max_length(experiment, shape, flavor)
    ways = [f"`flavor: {cheapest.name}`"] if cheapest else []
    ways += [f"`max_length: {largest}`"] if largest else []
    hint = "write " + " or ".join(ways) if ways else "no flavor fits: write `method: qlora`, or a smaller base"
    word = "needs" if fits is False else "may need"
    message = (
        f"training {word} {estimate.low:.1f} to {estimate.high:.1f} GiB, `{flavor.name}` has {flavor.vram_gib:g} GiB"
    )
    severity = Severity.ERROR if fits is False else Severity.WARNING
    return Verdict("train.flavor", message, hint, severity)


def _by_trace(traced: TracedMemory, estimate: MemoryEstimate | None, flavor: Flavor) -> Verdict | None:
    """The trace blocks; a closed form that it contradicts only warns."""
    need = f"{traced.total:.1f} GiB"
    if not traced.fits(flavor):
        larger = next((other for other in gpu_flavors() if traced.fits(other)), None)
        hint = f"write `flavor: {larger.name}`, or a smaller `max_length`" if larger else "write a smaller `max_length`"
        return Verdict("train.flavor", f"training needs {need} (traced), `{flavor.name}` has {flavor.vram_gib:g}", hint)
    if estimate is None or estimate.fits(flavor) is not False:
        return None
    message = (
        f"by the closed form training needs {estimate.low:.1f} to {estimate.high:.1f} GiB, by the trace {need}:"
        f" it fits the {flavor.vram_gib:g} GiB of `{flavor.name}`"
    )
    return Verdict(
        "train.flavor", message, "leave it: the trace counts what the closed form estimates", Severity.WARNING
    )
