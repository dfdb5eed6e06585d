"""The experiment file: every field, documented once, here. `experiments/_schema.json` and the docs come from it."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from pipeline.errors import excerpt
from pipeline.fields import (
    WHOLE,
    BaseSource,
    BatchSize,
    Boolean,
    DataSource,
    Duration,
    FreeValues,
    Name,
    PositiveFloat,
    PositiveInt,
    RepoId,
    RepoPath,
    Revision,
    Section,
    StringList,
    fault,
    required_unless,
)
from pipeline.sweep import Sweep
from pipeline.train_sections import Dpo, Lora, Mlx, check_dpo, check_nodes

# What the converter can write and llama.cpp can run without an importance matrix.
QUANTS: tuple[str, ...] = (
    *("BF16", "F16", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M"),
    *("Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
# `train.sft` may not say again what `train` says: two places for one choice is how they come to differ.
OWNED_BY_TRAIN = {
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "max_length": "train.max_length",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "learning_rate": "train.learning_rate",
    "packing": "train.packing",
    "seed": "train.seed",
    "save_steps": "train.save_steps",
    "assistant_only_loss": "train.loss_on",
    "completion_only_loss": "train.loss_on",
    "report_to": "train.tracking",
    "hub_model_id": "output.repo",
    "hub_private_repo": "output.private",
}
ANY_MAC = "local"  # the flavor of `backend: mlx` where the file names no chip


class Method(StrEnum):
    """How the weights are trained."""

    QLORA = "qlora"
    LORA = "lora"
    FULL = "full"
    DPO = "dpo"


class Backend(StrEnum):
    """What trains: PyTorch in a job on a GPU, or MLX on the Mac of whoever runs it."""

    TORCH = "torch"
    MLX = "mlx"


class LossOn(StrEnum):
    """Which tokens the loss counts."""

    ASSISTANT = "assistant"
    COMPLETION = "completion"
    ALL = "all"


class Tracking(StrEnum):
    """Where training metrics go besides our own events."""

    NONE = "none"
    TRACKIO = "trackio"


class Base(Section):
    """The model to start from."""

    model: BaseSource = Field(description="Hub id, or a folder in this repository starting with `./`.")
    revision: Revision | None = Field(None, description="Commit of the base. Unpinned, a base can change under a plan.")


class EvalSplit(Section):
    """Where held-out rows come from: exactly one of the three."""

    fraction: Annotated[float, Field(gt=0, lt=0.5)] | None = Field(
        None, description="Part of the training rows held out, drawn with `train.seed`: above 0, below 0.5."
    )
    split: str | None = Field(None, description="A split of the same dataset, such as `validation`.")
    dataset: DataSource | None = Field(None, description="A data file in this repository of the same format.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("fraction", "split", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(f"`{name}`" for name in given) or "none"
            raise fault(f"needs exactly one of `fraction`, `split`, `dataset`; has {said}", "write `{fraction: 0.05}`")
        return self


class Data(Section):
    """The rows: `messages`, `prompt`/`completion`, `conversations`, `text`; for `dpo` `chosen`/`rejected`."""

    dataset: DataSource = Field(description="Hub id, or a `.jsonl` or `.parquet` path in this repository.")
    revision: Revision | None = Field(None, description="Commit of the dataset on the Hub.")
    subset: str | None = Field(None, description="Configuration name of a Hub dataset that has several.")
    split: str = Field("train", min_length=1, description="Split of a Hub dataset.")
    eval: EvalSplit | None = Field(None, description="Held-out rows; without them no held-out loss is reported.")


class Train(Section):
    """The training stage."""

    model_config = ConfigDict(json_schema_extra=required_unless("backend", Backend.MLX, "flavor", "timeout"))

    method: Method = Field(description="`qlora`: 4-bit base; `lora`: bf16; `full`: every weight; `dpo`: preferences.")
    backend: Backend = Field(Backend.TORCH, description="`torch`: a job; `mlx`: your Mac, see docs/mlx.md.")
    flavor: str = Field(
        "", validate_default=True, description="Hardware of a job, such as `a10g-large`; of MLX the chip, or nothing."
    )
    nodes: Annotated[int, Field(ge=1, le=8), WHOLE] = Field(
        1, description="Machines of that flavor that train together, each a job of its own: see docs/jobs.md."
    )
    timeout: Duration | None = Field(
        None, validate_default=True, description="Hard stop: `90m`, `4h`. The worst case of the price; not with MLX."
    )
    epochs: PositiveFloat = Field(3.0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps instead of `epochs`.")
    max_length: Annotated[int, Field(ge=8, le=1_048_576), WHOLE] = Field(2048, description="Tokens kept of a row.")
    batch_size: BatchSize = Field(1, description="Rows at once; `auto`: what fits of `gradient_accumulation` rows.")
    gradient_accumulation: PositiveInt = Field(8, description="Batches summed before the weights move, over all GPUs.")
    learning_rate: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(2e-4, description="Peak step size.")
    loss_on: LossOn = Field(
        LossOn.ASSISTANT, description="`assistant`: every reply; `completion`: the last one; `all`: every token."
    )
    packing: Boolean = Field(False, description="Fill each row of `max_length` with several examples.")
    seed: Annotated[int, Field(ge=0, lt=2**32), WHOLE] = Field(42, description="Of data order, held-out draw, dropout.")
    save_steps: PositiveInt = Field(50, description="Optimizer steps between checkpoints; a retry loses at most these.")
    lora: Lora | None = Field(None, description="The adapter of `qlora`, `lora` and `dpo`.")
    dpo: Dpo | None = Field(None, description="What only `method: dpo` is told, see docs/preference-tuning.md.")
    mlx: Mlx | None = Field(None, description="What only `backend: mlx` is told.")
    sft: FreeValues = Field({}, description="Any other field of TRL's `SFTConfig` (`dpo`: `DPOConfig`).")
    tracking: Tracking = Field(Tracking.NONE, description="`none`, or `trackio`.")
    script: RepoPath | None = Field(None, description="A custom job script under the same contract.")

    @field_validator("flavor", "timeout")
    @classmethod
    def _of_a_job(cls, value: Any, info: ValidationInfo) -> Any:
        """A job has to say where it runs and when it ends; what trains on somebody's Mac costs nothing."""
        if not value and info.data.get("backend") is Backend.TORCH:
            raise PydanticKnownError("missing")
        return value or (ANY_MAC if info.field_name == "flavor" else None)

    @model_validator(mode="after")
    def _one_place_for_each_choice(self) -> Self:
        for key in self.sft:
            if key in OWNED_BY_TRAIN:
                value = self.sft[key]
                hint = f"remove it here and write `{OWNED_BY_TRAIN[key].split('.')[-1]}: {value}` under `train`"
                raise fault(f"`train.sft.{key}` is decided by `{OWNED_BY_TRAIN[key]}`", hint, f"sft.{key}")
        if self.method is Method.FULL and self.lora is not None:
            raise fault("`method: full` has no adapter", "remove `lora`, or write `method: lora`")
        if self.mlx is not None and self.backend is Backend.TORCH:
            raise fault("`mlx` is read by `backend: mlx` alone", "remove `mlx`, or write `backend: mlx`", "mlx")
        check_dpo(self.is_dpo, self.model_fields_set, self.dpo, self.sft)
        if self.nodes > 1:
            check_nodes(self.backend is Backend.MLX, self.script is not None, self.is_dpo)
        return self

    @property
    def is_dpo(self) -> bool:
        """Whether it learns from pairs of answers."""
        return self.method is Method.DPO

    @property
    def quantised(self) -> bool:
        """Whether the base is loaded in 4 bits."""
        return self.method is Method.QLORA or (self.is_dpo and (self.dpo or Dpo()).quantize)


class JobStage(Section):
    """Where a stage after training runs."""

    flavor: str = Field("cpu-upgrade", description="Hugging Face hardware.")
    timeout: Duration = Field(3600, description="Hard stop, such as `1h`.")


class Merge(JobStage):
    """Adapter and base become one model. Streamed: its memory does not grow with the model."""


class Gguf(JobStage):
    """llama.cpp files, one per quant, each verified."""

    quants: Annotated[StringList, Field(min_length=1)] = Field(["Q4_K_M", "Q8_0"], description="llama.cpp quants.")

    @model_validator(mode="after")
    def _known_quants(self) -> Self:
        for quant in self.quants:
            if quant not in QUANTS:
                near = nearest(quant.upper(), QUANTS) or "Q4_K_M"
                raise fault(
                    f"`{excerpt(quant)}` is not a quant llama.cpp can make here",
                    f"write `{near}`; known: {', '.join(QUANTS)}",
                )
        if len(set(self.quants)) != len(self.quants):
            raise fault(
                "a quant stands twice in `quants`", f"write `{list(dict.fromkeys(self.quants))}`".replace("'", "")
            )
        return self


class Evaluate(JobStage):
    """Held-out loss before and after, and answers to the prompts of a file."""

    prompts: RepoPath | None = Field(None, description="JSONL file of `{prompt: …}` rows to answer before and after.")
    max_new_tokens: Annotated[int, Field(gt=0, le=8192), WHOLE] = Field(200, description="Longest answer, in tokens.")


class Output(Section):
    """Where the results go: `repo`, `repo-adapter` and `repo-GGUF`."""

    repo: RepoId = Field(description="Hub repository, `namespace/name`.")
    private: Boolean = Field(True, description="Create the repositories private.")


class Budget(Section):
    """What this experiment may spend, all stages and attempts together."""

    max_usd: PositiveFloat = Field(description="Dollars.")


class Experiment(Section):
    """One fine-tune: a hypothesis and every choice that decides the result."""

    name: Name = Field(description="The file's name without `.yaml`.")
    hypothesis: Annotated[str, Field(min_length=1, max_length=2000)] = Field(
        description="What you expect and how you will know: shown to the reviewer, answered in the results."
    )
    base: Base = Field(description="The model to start from.")
    data: Data = Field(description="The rows to learn from.")
    train: Train = Field(description="The training stage.")
    merge: Merge | None = Field(None, description="Merge the adapter into the base. Left out: no merged model.")
    gguf: Gguf | None = Field(None, description="Make GGUF files. Left out: none.")
    evaluate: Evaluate | None = Field(None, description="Compare before and after. Left out: no comparison.")
    output: Output = Field(description="Where the results go.")
    budget: Budget = Field(description="What it may spend.")
    sweep: Sweep | None = Field(None, description="Variants of `train`, in one job, for the best. See docs/sweeps.md.")

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        needs_merge = [name for name in ("gguf", "evaluate") if getattr(self, name) is not None]
        if self.train.method is Method.FULL:
            if self.merge is not None:
                raise fault("`method: full` has nothing to merge", "remove `merge`", "merge")
        elif needs_merge and self.merge is None:
            raise fault(f"`{needs_merge[0]}` needs the merged model", "add `merge: {flavor: cpu-upgrade, timeout: 1h}`")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every field with its default filled in, JSON-ready: what a job script reads from `run.json`."""
        values = self.model_dump(mode="json")
        if self.train.method is not Method.FULL and self.train.lora is None:
            values["train"]["lora"] = Lora().model_dump(mode="json")
        if self.sweep is None:
            del values["sweep"]
        if self.train.backend is Backend.TORCH:  # says nothing: a request is the same as before there was a choice
            del values["train"]["backend"], values["train"]["mlx"]
        if self.train.is_dpo:  # an evaluation scores the chosen answer
            values["train"] |= {"dpo": (self.train.dpo or Dpo()).model_dump(mode="json"), "loss_on": "completion"}
        else:
            del values["train"]["dpo"]
        if self.train.nodes == 1:
            del values["train"]["nodes"]
        return values


def nearest(word: str, known: Any) -> str | None:
    """The known word most like `word`, or None when nothing is close."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
