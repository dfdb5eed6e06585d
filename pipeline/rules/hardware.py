"""Rules about memory: does training fit the GPU of its flavor?"""

from pipeline.errors import Severity
from pipeline.fit import cheapest_flavor, largest_max_length
from pipeline.flavors import FLAVORS
from pipeline.memory import estimate_memory
from pipeline.rules.rule import Subject, Verdict


def training_fits(subject: Subject) -> Verdict | None:
    """Training fits the GPU of its flavor

    Why: Out of memory at step 1 costs the start of a machine and an hour of somebody's attention.
    Fix: A larger flavor, a smaller `max_length` or `batch_size`, or `method: qlora`.
    """
    experiment, shape = subject.file.experiment, subject.facts.shape
    flavor = FLAVORS.get(experiment.train.flavor)
    if shape is None or flavor is None or flavor.gpu is None:
        return None
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
