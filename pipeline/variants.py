"""The variants of a sweep, each a whole experiment, and what is wrong with them together. Trains nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.experiment import Backend, Experiment
from pipeline.sweep import Choice, combinations, overridden

AS_WRITTEN = "nothing"  # an entry without a field: the training as `train` has it, beside the others


@dataclass(frozen=True)
class Variant:
    """One training of a sweep, numbered from 1. Its experiment keeps `sweep`: job, hours and money are shared."""

    number: int
    experiment: Experiment
    choices: tuple[Choice, ...]

    @property
    def words(self) -> str:
        """What differs: `learning_rate 1e-4, lora.r 16`."""
        return ", ".join(choice.words for choice in self.choices) or AS_WRITTEN


def variants_of(experiment: Experiment) -> tuple[Variant, ...]:
    """Every variant in the order of the file; none without a sweep."""
    sweep = experiment.sweep
    if sweep is None:
        return ()
    values = experiment.model_dump(mode="json", exclude_unset=True)
    return tuple(
        Variant(number, Experiment.model_validate({**values, "train": overridden(values["train"], choices)}), choices)
        for number, choices in enumerate(combinations(sweep.grid, sweep.list), 1)
    )


def numbered(numbers: Sequence[int]) -> str:
    """`variant 3`, or `variants 1, 3 and 6`."""
    *first, last = map(str, numbers)
    return f"variants {', '.join(first)} and {last}" if first else f"variant {last}"


def sweep_faults(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Place (a dotted key), message and hint of what a sweep and the rest of its experiment say against each other."""
    sweep, held_out = experiment.sweep, experiment.data.eval
    if sweep is None:
        return
    if experiment.train.backend is Backend.MLX:
        yield "sweep", "a sweep is a job, and `backend: mlx` trains on your Mac", "remove `sweep`, or `backend: mlx`"
    if experiment.train.script is not None:
        message = "variants are trained by `scripts/train_sft.py`, and `train.script` is another one"
        yield "sweep", message, "remove `sweep`, or `script`"
    if experiment.train.nodes > 1:
        yield "train.nodes", "the variants of a sweep train on one machine", "remove `nodes`"
    if experiment.train.method not in ("qlora", "lora") and any(one.key == "method" for one in sweep.choices()):
        yield "train.method", "`method` varies between `qlora` and `lora` alone", "write `method: lora`"
    if held_out is None:
        yield "sweep", "no rows are held out, so no variant wins", "add `eval: {fraction: 0.05}` under `data`"
    elif held_out.fraction is not None and (seed := next((c for c in sweep.choices() if c.key == "seed"), None)):
        message = (
            "`seed` cannot vary: it draws the held-out rows of `data.eval.fraction`, so losses could not be compared"
        )
        yield f"sweep.{seed.at}", message, "write `eval: {split: validation}`, or a file as `eval: {dataset: …}`"


def repeated(variants: tuple[Variant, ...]) -> Iterator[tuple[str, str, str]]:
    """Place, message and hint of each variant that trains what an earlier one does."""
    seen: dict[str, Variant] = {}
    for variant in variants:
        train = variant.experiment.train.model_dump_json()
        if first := seen.get(train):
            at = f"sweep.{variant.choices[-1].at}" if variant.choices else "sweep.list"
            message = f"variant {variant.number} (`{variant.words}`) is variant {first.number} again"
            yield at, message, "remove one of the two: the same choices give the same result"
        seen.setdefault(train, variant)
