"""Sections inside `train` that only some trainings have, and what they ask of it. Knows no other field by its value."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from pipeline.fields import (
    WHOLE,
    BaseSource,
    Boolean,
    PositiveFloat,
    PositiveInt,
    Revision,
    Section,
    StringList,
    Targets,
    fault,
)

# What `train.dpo` says may not stand in `train.sft` again.
OWNED_BY_DPO = {"beta": "train.dpo.beta", "loss_type": "train.dpo.loss"}
# TRL 1.16, trl/scripts/dpo.py, starts LoRA from this; its DPOConfig has 1e-6, for all weights.
DPO_RATE = "5e-6"


class Lora(Section):
    """The adapter. `alpha / r` (or `alpha / sqrt(r)` with `rslora`) scales what it adds."""

    r: Annotated[int, Field(gt=0, le=1024), WHOLE] = Field(16, description="Rank.")
    alpha: PositiveFloat = Field(32, description="Scale numerator.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the adapter, 0 to 1.")
    targets: Targets = Field("all-linear", description="Module names, or `all-linear`.")
    exclude: str | None = Field(None, description="Regular expression of modules to leave out.")
    rslora: Boolean = Field(False, description="Scale by the square root of the rank.")
    dora: Boolean = Field(False, description="Learn magnitude and direction apart (slower, more memory).")
    modules_to_save: StringList = Field([], description="Modules trained whole and saved beside the adapter.")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Rank by module-name pattern.")
    alpha_pattern: dict[str, PositiveFloat] = Field({}, description="Alpha by module-name pattern.")


class DpoLoss(StrEnum):
    """Losses of TRL 1.16's DPOTrainer. All of them take the base with the adapter off as reference: no second model."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    EXO_PAIR = "exo_pair"
    NCA_PAIR = "nca_pair"
    ROBUST = "robust"
    BCO_PAIR = "bco_pair"
    SPPO_HARD = "sppo_hard"
    AOT = "aot"
    AOT_UNPAIRED = "aot_unpaired"
    APO_ZERO = "apo_zero"
    APO_DOWN = "apo_down"
    DISCOPOP = "discopop"
    SFT = "sft"
    SIGMOID_NORM = "sigmoid_norm"


class Dpo(Section):
    """Preference tuning: answer as `chosen` and not as `rejected`, and stay near the base."""

    beta: PositiveFloat = Field(0.1, description="How strongly the model is held to its base.")
    loss: DpoLoss = Field(DpoLoss.SIGMOID, description="Loss of TRL's DPOTrainer; `sigmoid` is the paper's.")
    quantize: Boolean = Field(True, description="4-bit base, as `qlora`; `false`: bf16 base, as `lora`.")


class Mlx(Section):
    """What only MLX is told."""

    base: BaseSource | None = Field(
        None,
        description="MLX model to train on, say a quantised one: Hub id or `./folder`. Left out: `base.model`.",
    )
    revision: Revision | None = Field(None, description="Commit of `train.mlx.base` on the Hub.")
    num_layers: PositiveInt | None = Field(None, description="Only the last so many layers learn. Left out: all.")


def check_dpo(chosen: bool, written: Collection[str], dpo: Dpo | None, sft: Mapping[str, Any]) -> None:
    """Raise the fault of a training whose `dpo` does not go with its other fields; `chosen`: it is `method: dpo`."""
    if not chosen:
        if dpo is not None:
            raise fault("`dpo` is read by `method: dpo` alone", "remove `dpo`, or write `method: dpo`", "dpo")
        return
    for key in OWNED_BY_DPO.keys() & sft.keys():
        hint = f"remove it here and write `{OWNED_BY_DPO[key].split('.')[-1]}: {sft[key]}` under `train.dpo`"
        raise fault(f"`train.sft.{key}` is decided by `{OWNED_BY_DPO[key]}`", hint, f"sft.{key}")
    for key in ("loss_on", "packing"):
        if key in written:
            message = f"`{key}` means nothing to `method: dpo`: the loss compares two whole answers, pair by pair"
            raise fault(message, f"remove `{key}`", key)
    if "learning_rate" not in written:
        message = "`method: dpo` has no default `learning_rate`: 2e-4, that of the others, is far too high for it"
        raise fault(message, f"write `learning_rate: {DPO_RATE}`, where TRL's own LoRA example starts")
    if dpo and dpo.loss is DpoLoss.EXO_PAIR and not sft.get("label_smoothing"):
        hint = "write `sft: {label_smoothing: 0.001}` under `train`, the paper's value"
        raise fault("`loss: exo_pair` needs `label_smoothing` above 0", hint, "dpo.loss")


def check_nodes(is_mlx: bool, is_custom: bool, is_dpo: bool) -> None:
    """Raise the fault of a training that names several nodes and cannot have them."""
    if is_mlx:
        raise fault("MLX trains on one Mac", "remove `nodes`, or write `backend: torch`", "nodes")
    if is_custom:
        raise fault("a custom script has one job: its machines are its own affair", "remove `nodes`", "nodes")
    if is_dpo:
        raise fault("`method: dpo` trains in one process", "remove `nodes`", "nodes")
