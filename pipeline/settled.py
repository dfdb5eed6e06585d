"""What a plan settles for the GPU it trains on: rows at once, checkpointing, attention. Pure; measures nothing.

None of it changes what is learned, so none of it enters the fingerprint: it is how the same step is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.attention import FLASH, attention_of, own_attention, said_attention
from pipeline.experiment import Backend, Experiment, Train
from pipeline.fields import AUTO, rows_at_once
from pipeline.flavors import FLAVORS, Flavor
from pipeline.markdown import code, plural
from pipeline.memory import MemoryEstimate, MemorySpec, spec_of
from pipeline.models import ModelShape
from pipeline.parallel import Parallel, Sharing, need_of, parallel_of

# Tokens of one micro-batch. With fewer a GPU is not kept busy, and recomputing layers costs less than that; beyond the
# most, more rows only bring the peak nearer.
BUSY, MOST = 4096, 32_768
# Of `train.sft`: whoever writes one of these decides for himself what is kept for the backward pass.
DECIDES = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "fsdp", "deepspeed")


@dataclass(frozen=True)
class Settled:
    """Rows at once, batches a step over all GPUs, and what else is not left to the script."""

    batch: int
    accumulation: int
    recomputes: bool = True  # gradient checkpointing
    attention: str = ""  # empty: nothing to say
    words: tuple[str, ...] = ()  # one sentence each, in Markdown

    def request(self) -> dict[str, Any]:
        """What scripts/train_sft.py reads of it in run.json, beside the numbers of `train`."""
        kernel = {"attention": self.attention} if self.attention == FLASH else {}
        return kernel if self.recomputes else {"checkpointing": False, **kernel}

    def of(self, experiment: Experiment) -> Experiment:
        """The experiment as it is carried out: with numbers for `auto`, and checkpointing where it is off."""
        numbers: dict[str, Any] = {"batch_size": self.batch, "gradient_accumulation": self.accumulation}
        sft = experiment.train.sft if self.recomputes else {**experiment.train.sft, "gradient_checkpointing": False}
        train = experiment.train.model_copy(update={**numbers, "sft": sft})
        return experiment.model_copy(update={"train": train})


def as_written(experiment: Experiment) -> Settled:
    """Nothing chosen: `auto` is one row at a time, the rest is the script's own."""
    return Settled(rows_at_once(experiment.train.batch_size), experiment.train.gradient_accumulation)


def settle(experiment: Experiment, shape: ModelShape | None, flavor: Flavor | None = None) -> Settled:
    """The most rows at once, and no recomputing, where the whole band of the estimate says that they fit.

    Where not even the least surely fits, the least is chosen: the rules then say what they always said.
    """
    train = experiment.train
    flavor = flavor or FLAVORS.get(train.flavor)
    least = as_written(experiment)
    if shape is None or flavor is None or not flavor.gpu or train.script or train.backend is Backend.MLX:
        return least
    parallel = parallel_of(experiment, shape, flavor)
    for choice in _choices(train, shape, flavor, parallel):
        spec = spec_of(choice.of(experiment), shape, flavor)
        need = need_of(spec, shape, parallel)
        if need.fits(flavor) and need_of(_without_kernel(spec, train, shape), shape, parallel).fits(flavor):
            return _told(choice, experiment, shape, flavor, need)
    return _told(least, experiment, shape, flavor, None)


def _without_kernel(spec: MemorySpec, train: Train, shape: ModelShape) -> MemorySpec:
    """The same where the flash kernel cannot be had when the job starts: what was chosen must fit then, too."""
    if spec.attention != FLASH or said_attention(train):
        return spec
    return replace(
        spec, attention=own_attention(shape), flat=bool(train.packing), padded=spec.flat and not train.packing
    )


def _choices(train: Train, shape: ModelShape, flavor: Flavor, parallel: Parallel) -> Iterator[Settled]:
    """Best first: all layers kept, if that still fills the GPU; then the most rows with recomputing."""
    rows, total = rows_at_once(train.batch_size), rows_at_once(train.batch_size) * train.gradient_accumulation
    batches = _splits(total, parallel.gpus, train.max_length) if train.batch_size == AUTO else [rows]
    # Nobody measured the sharded formula, nor what pairs of answers keep; what a mixture's experts keep depends on the
    # tokens they get; and the formula is that of GPUs with flash attention, which PyTorch's own has too.
    known = parallel.sharing is not Sharing.PARTS and not shape.experts and not train.is_dpo and flavor.has_flash
    free = known and not any(key in train.sft for key in DECIDES)
    busy = min(BUSY, batches[0] * train.max_length)
    if free:
        yield from (Settled(n, total // n, recomputes=False) for n in batches if n * train.max_length >= busy)
    yield from (Settled(n, total // n) for n in batches)


def _splits(total: int, gpus: int, length: int) -> list[int]:
    """Rows at once that divide a step evenly among the GPUs, the most first; one where nothing does."""
    most = max(1, MOST // length)
    return [n for n in range(min(total, most), 0, -1) if total % (n * gpus) == 0] or [1]


def _told(
    choice: Settled, experiment: Experiment, shape: ModelShape, flavor: Flavor, need: MemoryEstimate | None
) -> Settled:
    """The choice with its attention, and with words for whoever reviews the plan."""
    train, words = choice.of(experiment).train, []
    attention = attention_of(train, shape, flavor)
    if experiment.train.batch_size == AUTO:
        rows = plural(choice.batch * choice.accumulation, "row")
        words.append(f"`batch_size: auto`: {plural(choice.batch, 'row')} at once, of the {rows} of a step")
    if not choice.recomputes and need is not None:
        room = f"{need.total:.1f} of {flavor.vram_gib:g} GiB"
        words.append(f"gradient checkpointing off: fits without ({room})")
    if train.packing or choice.batch > 1:
        apart = "packed rows are kept apart" if train.packing else "rows are laid end to end, without padding"
        masked = "packed rows are kept apart by a mask" if train.packing else "rows are padded to the longest"
        words.append(f"attention by {code(attention)}: {apart if attention == FLASH else masked}")
    return replace(choice, attention=attention, words=tuple(words))
