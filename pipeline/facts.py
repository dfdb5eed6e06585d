"""What was looked up about an experiment before anything is decided, so that plan and rules stay pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset_facts import DatasetFacts
from pipeline.experiment import Experiment
from pipeline.models import ModelShape


@dataclass(frozen=True)
class DataFacts:
    """Size of an in-repo data file: rows, and characters of all text in them."""

    rows: int
    characters: int


@dataclass(frozen=True)
class Facts:
    """Looked-up values; what could not be looked up is absent, never guessed.

    `content` maps each in-repo path the experiment names to the sha256 of what stands there;
    `missing` lists the ones that are not there. `config` is the base's config.json, `chat_template` its template's
    text (empty: it has none), `sft_fields` the type word of every field of the pinned TRL's SFTConfig (`sft_choices`:
    the allowed values of some), `scripts` the text of this plan's job scripts by path, `others` the other experiments
    of the same check, `dataset` what its in-repo data file holds.
    """

    content: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    shape: ModelShape | None = None
    data: DataFacts | None = None
    config: Mapping[str, Any] | None = None
    chat_template: str | None = None
    sft_fields: Mapping[str, str] = field(default_factory=dict)
    sft_choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Experiment, ...] = ()
    dataset: DatasetFacts | None = None
