"""Rules about memory: does training fit the GPU of its flavor?"""

from pipeline.errors import Severity
from pipeline.flavors import FLAVORS, gpu_flavors
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
    cheapest = next((f.name for f in gpu_flavors() if estimate.fits(f)), None)
    hint = f"write `flavor: {cheapest}`" if cheapest else "write a smaller `max_length`, or `method: qlora`"
    word = "needs" if fits is False else "may need"
    message = (
        f"training {word} {estimate.low:.1f} to {estimate.high:.1f} GiB, `{flavor.name}` has {flavor.vram_gib:g} GiB"
    )
    severity = Severity.ERROR if fits is False else Severity.WARNING
    return Verdict("train.flavor", message, hint, severity)
