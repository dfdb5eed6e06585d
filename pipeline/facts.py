"""What was looked up about an experiment before anything is decided, so that plan and rules stay pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    `missing` lists the ones that are not there.
    """

    content: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    shape: ModelShape | None = None
    data: DataFacts | None = None
