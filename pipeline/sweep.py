"""The `sweep` section: which fields of `train` vary, and over which values. Knows no experiment and trains nothing."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import excerpt
from pipeline.fields import PositiveFloat, PositiveInt, Section, fault
from pipeline.yaml_text import resolve_plain

FEWEST, MOST = 2, 32  # variants
# The fields of `train` that a sweep may vary, beside those of `train.sft`.
SWEPT: tuple[str, ...] = (
    "method",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "packing",
    "seed",
)
SWEPT += ("lora.r", "lora.alpha", "lora.dropout", "lora.targets", "lora.exclude", "lora.rslora", "lora.dora")
SWEPT += ("lora.modules_to_save", "lora.rank_pattern", "lora.alpha_pattern")
METHODS = ("qlora", "lora")
_JOB = "all variants train in one job", "write it under `train`, for all of them"
_LOSS = "it changes what the held-out loss measures, and the variants could not be compared"
_LOSS_HINT = "write it under `train`, and make an experiment of its own for each value"
# Why the others may not vary, and what to do.
FIXED = {
    **dict.fromkeys(("flavor", "timeout", "nodes"), _JOB),
    "backend": ("a sweep is a job, and `backend: mlx` trains on your Mac", "make an experiment of its own for each"),
    "mlx": ("a sweep is a job, and `mlx` is read by `backend: mlx` alone", "make an experiment of its own for each"),
    "script": ("`scripts/train_sft.py` alone trains variants", "make an experiment of its own for each script"),
    "tracking": ("it does not change what is learned", "write it under `train`, for all variants"),
    "save_steps": ("it does not change what is learned", "write it under `train`, for all variants"),
    "lora": ("its fields vary one by one", "write `lora.r: [16, 64]`"),
    "sft": ("its fields vary one by one", "write `sft.warmup_steps: [0, 0.1]`"),
    **dict.fromkeys(("loss_on", "max_length", "dpo"), (_LOSS, _LOSS_HINT)),
}
# Fields of SFTConfig that TRL's loss reads while it evaluates too, or that decide when and how it evaluates.
MEASURING: tuple[str, ...] = (
    "label_smoothing_factor",
    "loss_type",
    "router_aux_loss_coef",
    "model_init_kwargs",
    "eval_delay",
)
MEASURING += ("eval_on_start", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only")
# The same of DPOConfig.
MEASURING += ("label_smoothing", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef")
MEASURING += ("use_weighting", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")


@dataclass(frozen=True)
class Choice:
    """One value of one field of `train`; `at` is where it stands below `sweep`: `grid.lora.r.1`."""

    key: str
    value: Any
    at: str

    @property
    def words(self) -> str:
        """`lora.r 16`."""
        return f"{self.key} {excerpt(said(self.value))}"


def _values(given: Any) -> Any:
    """The grid, every field with a list of values."""
    given = resolve_plain(given)
    for key, values in given.items() if isinstance(given, dict) else ():
        if not isinstance(values, list):
            raise fault(f"`{excerpt(key)}` needs a list of values", f"write `{excerpt(key)}: [{said(values)}, …]`", key)
        if not values:
            raise fault(f"`{excerpt(key)}` has no value", "write its values, or remove it", key)
    return given


Grid = Annotated[dict[str, list[Any]], BeforeValidator(_values)]
Entries = Annotated[list[dict[str, Any]], BeforeValidator(resolve_plain)]


class Sweep(Section):
    """Variants of one training: each differs from `train` by the values named here, in one of two ways."""

    grid: Grid | None = Field(None, description="Values by field of `train`, such as `lora.r`: every combination.")
    list: Entries | None = Field(None, description="One mapping of fields of `train` for each variant.")
    concurrency: PositiveInt = Field(1, description="Variants that train at once, each on one GPU of the flavor.")
    max_usd: PositiveFloat | None = Field(
        None, description="No further variant is started where the training would cost more dollars than this."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.grid is None) == (self.list is None):
            said = "both" if self.grid is not None else "none"
            raise fault(f"needs one of `grid` and `list`; has {said}", "write `grid: {learning_rate: [1e-4, 2e-4]}`")
        for choice in self.choices():
            if problem := _problem(choice):
                raise fault(*problem, choice.at)
        count = math.prod(map(len, self.grid.values())) if self.grid is not None else len(self.list or ())
        if not FEWEST <= count <= MOST:
            limits = f"a sweep has {FEWEST} to {MOST}"
            hint = "write more values" if count < FEWEST else "write fewer values, or name the best ones in `list`"
            raise fault(f"{count} variant{'s' * (count != 1)}; {limits}", hint, "list" if self.grid is None else "grid")
        return self

    def choices(self) -> Iterator[Choice]:
        """Every value that is written, each once."""
        if self.grid is not None:
            yield from (choice for one in _columns(self.grid) for choice in one)
        else:
            yield from (choice for one in combinations(None, self.list) for choice in one)


def combinations(
    grid: Mapping[str, Sequence[Any]] | None, entries: Iterable[Mapping[str, Any]] | None
) -> list[tuple[Choice, ...]]:
    """The choices of each variant, in the order of the file; the last field of a grid changes fastest."""
    if grid is not None:
        return list(product(*_columns(grid)))
    return [
        tuple(Choice(key, value, f"list.{number}.{key}") for key, value in entry.items())
        for number, entry in enumerate(entries or ())
    ]


def overridden(train: Mapping[str, Any], choices: Iterable[Choice]) -> dict[str, Any]:
    """The values of `train` with those of a variant in their places."""
    values = dict(train)
    for choice in choices:
        section, _, field = choice.key.rpartition(".")
        if section:
            values[section] = {**(values.get(section) or {}), field: choice.value}
        else:
            values[field] = choice.value
    return values


def said(value: Any) -> str:
    """A value as a person writes it: `1e-4`, `true`, `[q_proj, v_proj]`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and value and not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {said(inner)}' for key, inner in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns(grid: Mapping[str, Sequence[Any]]) -> list[list[Choice]]:
    return [
        [Choice(key, value, f"grid.{key}.{number}") for number, value in enumerate(values)]
        for key, values in grid.items()
    ]


def _problem(choice: Choice) -> tuple[str, str] | None:
    """Why a field may not vary, or not to this value, and what to do; None where it may."""
    key, (section, _, field) = choice.key, choice.key.partition(".")
    shown = f"`{excerpt(key)}`"
    if key == "method" and choice.value not in METHODS:
        hint = "write `qlora` and `lora`; an experiment of its own for `full`"
        return f"`method` varies between `qlora` and `lora`, not to `{excerpt(choice.value)}`", hint
    if key in SWEPT or (section == "sft" and field and field not in MEASURING):
        return None
    if section == "sft" and field:
        return f"{shown} cannot vary: {_LOSS}", _LOSS_HINT
    if key in FIXED or section in FIXED.keys() - {"lora", "sft"}:
        why, hint = FIXED.get(key) or FIXED[section]
        return f"{shown} cannot vary: {why}", hint
    if section == "train" and field:
        return f"{shown} is named from the top; a sweep names fields of `train`", f"write `{excerpt(field)}`"
    near = get_close_matches(key[:80], SWEPT, 1, 0.6) or [known for known in SWEPT if known == f"lora.{key}"]
    return f"{shown} is no field of `train` that can vary", (
        f"did you mean `{near[0]}`?" if near else f"write one of {', '.join(SWEPT)}, or `sft.…`"
    )
