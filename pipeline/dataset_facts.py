"""What a data file of this repository holds, counted once: frozen values for rules and estimates. Reads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

SHOWN = 5  # Offending rows that are named; the rest is a count.


class Problem(StrEnum):
    """Why the training script refuses a row."""

    JSON = "json"
    FORMAT = "format"
    MIXED = "mixed"
    ROLES = "roles"
    CONTENT = "content"
    TEMPLATE = "template"


@dataclass(frozen=True)
class RowIssue:
    """One row that cannot be used: its line (of Parquet, its row), counted from 1."""

    line: int
    message: str
    hint: str


@dataclass(frozen=True)
class Issues:
    """All rows with one kind of problem: how many, and the first of them."""

    problem: Problem
    count: int
    first: tuple[RowIssue, ...]


@dataclass(frozen=True)
class Lines:
    """Some lines of a file: how many, and the first of them."""

    count: int = 0
    first: tuple[int, ...] = ()

    @classmethod
    def of(cls, found: Sequence[int]) -> "Lines":
        """The distinct lines of `found`, in their order."""
        unique = list(dict.fromkeys(found))
        return cls(len(unique), tuple(unique[:SHOWN]))


@dataclass(frozen=True)
class TokenFacts:
    """Tokens of one pass over the training rows, for the `max_length` and `loss_on` of the experiment.

    A sequence is what the loss is computed on: a row, or one turn of it where the chat template rewrites history; of
    pairs both answers together. `total` and `trained` count what is left after the cut; `lost` is what the cut takes,
    whole dropped rows included.
    """

    sequences: int
    total: int
    trained: int
    longest: int
    lost: int = 0
    over_limit: Lines = Lines()
    dropped: Lines = Lines()

    @property
    def uncut(self) -> int:
        """Tokens of all rows before the cut."""
        return self.total + self.lost


@dataclass(frozen=True)
class DatasetFacts:
    """One data file. `rows` counts every row of it, good or bad; `training_rows` those that are not held out.

    `exact` says that every row was read and counted with the base's own tokenizer and chat template; `estimated` says
    why not, `base_fault` too where the base's tokenizer or template is broken. `eval_file` holds the facts of
    `data.eval.dataset` or its split, `leaked` the training lines that it repeats, `same` the pairs of equal answers.
    """

    path: str
    rows: int
    training_rows: int
    format: str | None
    is_chat: bool = False
    issues: tuple[Issues, ...] = ()
    duplicates: Lines = Lines()
    leaked: Lines = Lines()
    same: Lines = Lines()
    not_alternating: Lines = Lines()
    tokens: TokenFacts | None = None
    exact: bool = False
    estimated: str = ""
    sampled: bool = False
    has_template: bool | None = None
    base_fault: str = ""
    eval_file: "DatasetFacts | None" = None

    def issue(self, *problems: Problem) -> Issues | None:
        """The first of these kinds of problem that the file has, or None."""
        return next((found for found in self.issues if found.problem in problems), None)
