"""How a training shares the GPUs of its flavor, and what each of them must hold. Decides from sizes; starts nothing.

Copies (DDP): every GPU holds all of the model and learns from its own rows; gradients are added up. Parts (FSDP2):
each holds one part of weights, gradients and optimizer, and borrows a layer from the others while it computes with it.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pipeline.experiment import Experiment, Method
from pipeline.flavors import FLAVORS, Flavor
from pipeline.memory import GIB, MemoryEstimate, MemorySpec, estimate_need, spec_of
from pipeline.models import ModelShape

SHARDED_BAND = 0.20  # each way: the formula of `sharded_need` is arithmetic that no measurement was held against yet
GATHERED_LAYERS = 2  # torch 2.13 `fully_shard`: the next layer is gathered while this one computes


class Sharing(StrEnum):
    """What each GPU holds."""

    ALONE = "one GPU"
    COPIES = "DDP"
    PARTS = "FSDP2"


@dataclass(frozen=True)
class Parallel:
    """How many processes train, one per GPU of all nodes together, and what each holds.

    `lanes` variants of a sweep train side by side, each in a process of its own.
    """

    gpus: int = 1
    sharing: Sharing = Sharing.ALONE
    nodes: int = 1
    lanes: int = 1

    def request(self) -> dict[str, Any]:
        """What scripts/train_sft.py reads of it in run.json; nothing for one process."""
        if self.lanes > 1:
            return {"concurrency": self.lanes}
        asked = {"processes": self.gpus, "sharded": self.sharing is Sharing.PARTS} if self.gpus > 1 else {}
        return asked | ({"nodes": self.nodes} if self.nodes > 1 else {})

    @property
    def per_node(self) -> int:
        """The GPUs of one machine."""
        return self.gpus // self.nodes

    @property
    def count(self) -> str:
        """`4`, or `2 nodes × 8`."""
        return f"{self.nodes} nodes × {self.per_node}" if self.nodes > 1 else str(self.gpus)

    def at_most(self, count: int) -> "Parallel":
        """The same on one machine with no more processes than that: they run the code that all would."""
        return replace(self, gpus=min(self.gpus, count), nodes=1, lanes=min(self.lanes, count))

    @property
    def words(self) -> str:
        """` on each of 4 GPUs (DDP)`, ` on each of 2 nodes × 8 GPUs (FSDP2)`; empty for one."""
        unit = "GPU" if self.nodes > 1 and self.per_node == 1 else "GPUs"
        return f" on each of {self.count} {unit} ({self.sharing})" if self.gpus > 1 else ""


ALONE = Parallel()


def parallel_of(experiment: Experiment, shape: ModelShape | None, flavor: Flavor | None = None) -> Parallel:
    """How training shares the GPUs of `flavor` (the experiment's own when not given), on all its nodes.

    Full fine-tunes are sharded, and adapters on a bf16 base that surely do not fit as copies. A 4-bit base never is:
    accelerate 1.15 leaves its uint8 weights whole on every GPU (`fsdp2_prepare_model`).
    """
    train = experiment.train
    flavor = flavor or FLAVORS.get(train.flavor)
    processes = max(flavor.gpus, 1) * train.nodes if flavor else 1  # nodes without a GPU have one process each
    if flavor is None or processes < 2 or train.script is not None:  # a custom script's processes are its own
        return ALONE
    if experiment.sweep and experiment.sweep.concurrency > 1:
        return Parallel(lanes=min(experiment.sweep.concurrency, flavor.gpus))
    if train.is_dpo:  # scripts/train_sft.py refuses it: pairs that fill a batch up would count in the loss
        return ALONE
    if train.method is Method.FULL:
        return Parallel(processes, Sharing.PARTS, train.nodes)
    if not train.quantised and shape is not None and flavor.gpus:
        copies = estimate_need(replace(spec_of(experiment, shape, flavor), gpus=processes), shape)
        if copies.fits(flavor) is not True:
            return Parallel(processes, Sharing.PARTS, train.nodes)
    return Parallel(processes, Sharing.COPIES, train.nodes)


def estimate_memory(experiment: Experiment, shape: ModelShape, flavor: Flavor | None = None) -> MemoryEstimate:
    """Predicted need of the train stage on each GPU of its flavor, or of another, in GiB."""
    return need_of(spec_of(experiment, shape, flavor), shape, parallel_of(experiment, shape, flavor))


def need_of(spec: MemorySpec, shape: ModelShape, parallel: Parallel) -> MemoryEstimate:
    """Predicted need of one GPU among those that share a training, in GiB."""
    spec = replace(spec, gpus=parallel.gpus)
    return sharded_need(spec, shape) if parallel.sharing is Sharing.PARTS else estimate_need(spec, shape)


def sharded_need(spec: MemorySpec, shape: ModelShape) -> MemoryEstimate:
    """Predicted need of one GPU under FSDP2, in GiB.

    A part of weights, gradients and optimizer is one over the number of GPUs (Rajbhandari et al. 2020, "ZeRO", stage
    3). What is whole at the peak stands in torch 2.13's `fully_shard` and accelerate 1.15's `fsdp2_prepare_model`: two
    layers; the last norm and the output head, which stay from forward to backward; and of what learns there, a
    gradient before it is reduced and the buffer it is reduced in. Activations are those of the GPU's own rows.
    """
    alone, parts = estimate_need(replace(spec, gpus=1), shape), spec.gpus
    layer = 2 * (shape.linear - shape.other_linear) / shape.layers
    head = spec.other_bytes * shape.vocab * shape.hidden
    learned = 2 * (layer + head) if spec.method is Method.FULL else alone.adapter * GIB / shape.layers
    return replace(
        alone,
        weights=alone.weights / parts + (GATHERED_LAYERS * layer + head) / GIB,
        adapter=alone.adapter / parts + learned / GIB,
        optimizer=alone.optimizer / parts,
        band=SHARDED_BAND,
    )
