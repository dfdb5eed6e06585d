"""What was looked up about an experiment before anything is decided, so that plan and rules stay pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dataset_facts import DatasetFacts
from pipeline.experiment import Experiment
from pipeline.hub_facts import HubFacts
from pipeline.models import ModelShape
from pipeline.traced import TracedMemory


@dataclass(frozen=True)
class FromHub:
    """Where files that were fetched from the Hub lie: the base's folder, the data files, the held-out ones."""

    base: Path | None = None
    data: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()


NOTHING = FromHub()


@dataclass(frozen=True)
class FinishedRun:
    """How long one stage took where it ran on a job's hardware, and what had been predicted for it."""

    stage: str
    method: str
    gpu: str | None
    predicted_s: float
    actual_s: float


@dataclass(frozen=True)
class MlxHere:
    """Which versions of MLX the interpreter that runs the job scripts has; None: it has none."""

    mlx: str | None
    mlx_lm: str | None


@dataclass(frozen=True)
class Facts:
    """Looked-up values; what could not be looked up is absent, never guessed.

    `content` maps each in-repo path the experiment names to the sha256 of what stands there; `missing` lists the ones
    that are not there. `config` is the base's config.json (`config_fault`: what is wrong with it), `chat_template` its
    template's text (empty: it has none), `sft_fields` the type word of every field of the pinned TRL's SFTConfig
    or, with `method: dpo`, DPOConfig (`sft_choices`: the allowed values of some), `scripts` the text of this plan's job
    scripts by path, `others` the other experiments of the same check, `dataset` what its data file holds, `hub` what
    the Hub said (None: not asked).
    `mlx_config` is the config.json of `train.mlx.base`, `mlx_here` the MLX of this machine (None: nothing trains here),
    `traced` the memory of a traced step (None: not traced).
    """

    content: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    shape: ModelShape | None = None
    config: Mapping[str, Any] | None = None
    config_fault: str = ""
    chat_template: str | None = None
    sft_fields: Mapping[str, str] = field(default_factory=dict)
    sft_choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Experiment, ...] = ()
    dataset: DatasetFacts | None = None
    hub: HubFacts | None = None
    finished: tuple[FinishedRun, ...] = ()
    mlx_config: Mapping[str, Any] | None = None
    mlx_here: MlxHere | None = None
    traced: TracedMemory | None = None
