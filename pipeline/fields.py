"""What the experiment file is made of: sections, durations, names, repository ids, paths. No field, no file."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema, WrapValidator
from pydantic_core import PydanticCustomError

from pipeline.errors import excerpt
from pipeline.yaml_text import Plain, resolve_plain

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
AUTO: Literal["auto"] = "auto"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
# The Hub's rule for `namespace/name`: word characters, `.` and `-`, 96 characters, no `--` or `..`.
REVISION = r"^[\w./-]{1,128}$"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Section(BaseModel):
    """A mapping of the file: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)


def fault(message: str, hint: str, key: str = "") -> PydanticCustomError:
    """A schema error with its hint, at the dotted `key` below the value. Pydantic formats a message: braces double."""
    context = {"hint": hint, "key": key}
    return PydanticCustomError("mergetune", message.replace("{", "{{").replace("}", "}}"), context)


def required_unless(key: str, value: str, *names: str) -> Callable[[dict[str, Any]], None]:
    """For a section's JSON schema: these fields are required unless `key` has that value."""

    def add(schema: dict[str, Any]) -> None:
        schema["if"] = {"properties": {key: {"const": value}}, "required": [key]}
        schema["else"] = {"required": list(names)}

    return add


def _duration(value: Any) -> Any:
    """Seconds of `90s`, `45m`, `4h`, `1.5h` or `2d` (what HF Jobs accepts, less a bare number)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = excerpt(str(value).strip())
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([smhd])", text):
        return round(min(float(match[1]), 1e9) * SECONDS[match[2]])  # what is above is refused as too long
    if match := re.fullmatch(r"([0-9]+)(?:h|:)([0-9]{1,2})m?", text):
        minutes = int(match[1]) * 60 + int(match[2])
        raise fault(f"`{text}` is not a duration", f"write `{minutes}m`")
    if re.fullmatch(r"[0-9]+", text):
        raise fault(f"`{text}` has no unit", f"write `{text}m` for minutes or `{text}h` for hours")
    raise fault(f"`{text}` is not a duration", "write a number and a unit: `90m`, `4h`, `1.5h`, `2d`")


def _boolean(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if value in ("true", "True", "TRUE"):
        return True
    if value in ("false", "False", "FALSE"):
        return False
    shown = f"`{excerpt(value)}`"
    guess = {"yes": "true", "on": "true", "y": "true", "1": "true"}.get(str(value).lower(), "false")
    raise fault(f"{shown} is not a boolean", f"write `true` or `false` (here probably `{guess}`)")


def _name(value: Any) -> Any:
    if isinstance(value, str) and not NAME.fullmatch(value):
        tidy = re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9]+", "-", value.lower())).strip("-")[:64] or "my-experiment"
        raise fault(
            f"`{excerpt(value)}` is not a name: lower-case letters, digits and `-`, at most 64", f"write `{tidy}`"
        )
    return value


def _repo(value: Any) -> Any:
    if isinstance(value, str) and (not REPO.fullmatch(value) or ".." in value or "--" in value or len(value) > 96):
        if link := re.match(r"https?://[^/]+/(?:datasets/)?([\w.-]+/[\w.-]+)", value):
            raise fault(f"`{excerpt(value)}` is a link, not a repository id", f"write `{link[1]}`")
        raise fault(f"`{excerpt(value)}` is not a repository id", "write `namespace/name`, as in the Hub's address")
    return value


def _repo_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value or value.startswith("~"):
        raise fault(f"`{excerpt(value)}` leaves the repository", "write a path relative to the repository's root")
    if len(value) > 1000 or any(len(part.encode("utf-8", "replace")) > 255 for part in path.parts):
        raise fault(f"`{excerpt(value)}` is longer than a file's name can be", "correct the path")
    return value


def _source(value: Any) -> Any:
    return _repo_path(value) if isinstance(value, str) and is_path(value) else _repo(value)


def is_path(source: str) -> bool:
    """True when a base or dataset is a path in this repository: starts with `.` or `/`, or names a data file."""
    return source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".parquet", ".json", ".csv", ".txt"))


def _data_source(value: Any) -> Any:
    value = _source(value)
    if isinstance(value, str) and is_path(value) and not value.endswith((".jsonl", ".parquet")):
        raise fault(f"`{excerpt(value)}` is not JSONL or Parquet", "convert it to `.jsonl`: one JSON object a line")
    return value


def _revision(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(REVISION, value, re.ASCII):
        raise fault(f"`{excerpt(value)}` is not a revision", "write the commit: 40 hexadecimal digits on the Hub")
    return value


def _whole(value: Any) -> Any:
    """Refuse `010`: 8 to YAML 1.1, 10 to YAML 1.2 and to most readers."""
    if isinstance(value, Plain) and re.fullmatch(r"[-+]?0[0-9]+", value):
        tidy = value.lstrip("+-0") or "0"
        raise fault(f"`{excerpt(value)}` is octal to some and decimal to others", f"write `{excerpt(tidy)}`")
    return value


def rows_at_once(batch_size: int | Literal["auto"]) -> int:
    """Rows of a micro-batch. `auto` counts as one: how a step's rows are split does not change what is learned."""
    return 1 if batch_size == AUTO else batch_size


def _batch(value: Any, _: Any) -> int | Literal["auto"]:
    """Not a plain union: its errors would name both sides."""
    if value == AUTO:
        return AUTO
    if isinstance(value, str) and not re.fullmatch(r"[-+]?[0-9.]+", value):
        raise fault(f"`{excerpt(value)}` is no number of rows", "write a whole number such as `1`, or `auto`")
    return _COUNT.validate_python(value)


def _targets(value: Any) -> Any:
    if isinstance(value, str) and value != "all-linear":
        raise fault(f"`{excerpt(value)}` is not a list", f"write `[{excerpt(value)}]`, or `all-linear`")
    if isinstance(value, list) and not all(isinstance(name, str) for name in value):
        raise fault("holds what is not a name", "write names alone: `[q_proj, v_proj]`, or `all-linear`")
    return value


def _free(value: Any) -> Any:
    return resolve_plain(value)


def _strings(value: Any) -> Any:
    """Accept one word where a list is asked for only when YAML made it one: `[a, b]` stays, `a` is an error."""
    if isinstance(value, Plain):
        raise fault(f"`{excerpt(value)}` is not a list", f"write `[{excerpt(value)}]`")
    return value


# What a person writes (and an editor checks) is `4h`; what the code holds is seconds.
_DURATION_SCHEMA = WithJsonSchema(
    {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?[smhd]$", "examples": ["90m", "4h"]}
)
Duration = Annotated[int, BeforeValidator(_duration), Field(gt=0, le=7 * 86400), _DURATION_SCHEMA]
Boolean = Annotated[bool, BeforeValidator(_boolean)]
Name = Annotated[str, BeforeValidator(_name)]
RepoId = Annotated[str, BeforeValidator(_repo)]
RepoPath = Annotated[str, BeforeValidator(_repo_path), Field(min_length=1)]
BaseSource = Annotated[str, BeforeValidator(_source), Field(min_length=1)]
DataSource = Annotated[str, BeforeValidator(_data_source), Field(min_length=1)]
FreeValues = Annotated[dict[str, Any], BeforeValidator(_free)]
StringList = Annotated[list[str], BeforeValidator(_strings)]
Revision = Annotated[str, Field(pattern=REVISION), BeforeValidator(_revision)]
Targets = Annotated[Annotated[str, Field(pattern="^all-linear$")] | list[str], BeforeValidator(_targets)]
WHOLE = BeforeValidator(_whole)
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0), WHOLE]
_COUNT: TypeAdapter[int] = TypeAdapter(PositiveInt)
_BATCH_SCHEMA = WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": AUTO}]})
BatchSize = Annotated[int | Literal["auto"], WrapValidator(_batch), _BATCH_SCHEMA]
