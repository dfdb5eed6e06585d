"""Rules about trainings on several machines: does one machine not have as many GPUs? Decides from the catalogue."""

from pipeline.errors import Severity
from pipeline.flavors import FLAVORS
from pipeline.rules.rule import Subject, Verdict


def nodes_are_needed(subject: Subject) -> Verdict | None:
    """No single machine has as many of the GPUs

    Why: GPUs of one machine are joined by NVLink or PCIe, those of two by a network that is ten to a hundred times
    slower; one of two jobs may wait for its machine while the other is paid, and when one is lost both end.
    Fix: The flavor that has them in one machine, without `nodes`.
    """
    train = subject.file.experiment.train
    flavor, nodes = FLAVORS.get(train.flavor), train.nodes
    if flavor is None or nodes == 1 or not flavor.gpus:
        return None
    total = nodes * flavor.gpus
    alike = [other for other in FLAVORS.values() if other.gpu == flavor.gpu and other.gpus >= total]
    one = min(alike, key=lambda other: other.usd_per_hour, default=None)
    if one is None:
        return None
    message = (
        f"`nodes: {nodes}` of `{flavor.name}` are {total} {flavor.gpu}, `{one.name}` has {one.gpus} in one machine"
    )
    dollars = f"${one.usd_per_hour:.2f} an hour, not ${nodes * flavor.usd_per_hour:.2f}"
    hint = f"write `flavor: {one.name}` and remove `nodes`: {dollars}"
    return Verdict("train.nodes", message, hint, Severity.WARNING)
