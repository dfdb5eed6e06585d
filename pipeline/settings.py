"""`[tool.mergetune]` of pyproject.toml: what this repository allows, whatever an experiment says."""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import Place, UserError


class Stop(StrEnum):
    """Why a job may be stopped before its end: the words of `early_stop`."""

    NAN = "nan"
    EXPLODING = "exploding"
    MASKED = "masked"
    IDLE = "idle"


class Settings(BaseModel):
    """The repository's limits; every field has a default that costs nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespaces: tuple[str, ...] = Field((), description="Hub namespaces that `output.repo` may use; empty: any.")
    max_usd_per_run: Annotated[float, Field(gt=0)] = Field(50, description="No budget may exceed this, in dollars.")
    max_usd_per_month: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Dollars of one calendar month (UTC): what finished runs cost and running ones may cost."
    )
    approvals: Annotated[int, Field(ge=0, le=6)] = Field(
        0, description="Approvals by people with write access that a merged pull request needs before it is launched."
    )
    submits_per_tick: Annotated[int, Field(ge=0)] = Field(5, description="Jobs one tick may start.")
    cancels_per_tick: Annotated[int, Field(ge=0)] = Field(5, description="Runs one tick may cancel.")
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        3, description="Attempts at a stage, when what failed was not the experiment."
    )
    early_stop: tuple[Stop, ...] = Field(
        (Stop.NAN,),
        description="What ends a running job before its timeout: `nan` (loss or gradients are no numbers), `exploding` "
        "(gradients 100 times the usual, and the loss worse for it), `masked` (loss and gradient exactly 0: no token "
        "carries loss), `idle` (the GPU does nothing for `idle_minutes`).",
    )
    idle_minutes: Annotated[float, Field(ge=10)] = Field(30, description="How long `idle` lets a GPU do nothing.")


def find_root(start: Path) -> Path:
    """The repository root: the nearest folder at or above `start` whose pyproject.toml has `[tool.mergetune]`.

    Raises:
        UserError: there is none.
    """
    for folder in (start, *start.parents):
        pyproject = folder / "pyproject.toml"
        if pyproject.is_file() and "[tool.mergetune]" in pyproject.read_text(encoding="utf-8"):
            return folder
    message = f"`{start}` is not inside a mergetune repository (no pyproject.toml with `[tool.mergetune]`)"
    raise UserError(message, "run it in your copy of the template, or pass a path inside it", exit_code=2)


def load_settings(root: Path) -> Settings:
    """Read the settings of the repository at `root`.

    Raises:
        UserError: pyproject.toml is not TOML, or a setting is unknown or of the wrong type.
    """
    path = root / "pyproject.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["mergetune"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not TOML: {error}", "mend that line", at=Place(path.name), exit_code=2) from error
    try:
        return Settings.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Settings.model_fields)
        message = f"`tool.mergetune.{key}`: {first['msg']}"
        raise UserError(message, f"known settings: {known}", at=Place(path.name), exit_code=2) from error
