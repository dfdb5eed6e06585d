"""The fields of TRL's SFTConfig and DPOConfig, from source or from the committed snapshot. Imports no TRL, no torch."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("trl_fields.json")
# Base first: a later class says a field again with another default, and its annotation counts.
SOURCES = (("transformers/training_args.py", "TrainingArguments"), ("trl/trainer/base_config.py", "_BaseConfig"))
SFT, DPO = ("trl/trainer/sft_config.py", "SFTConfig"), ("trl/trainer/dpo_config.py", "DPOConfig")
# Enumerations whose values a person writes; `transformers/training_args.py` holds OptimizerNames itself.
ENUMS = {
    "OptimizerNames": "transformers/training_args.py",
    "SchedulerType": "transformers/trainer_utils.py",
    "SaveStrategy": "transformers/trainer_utils.py",
    "IntervalStrategy": "transformers/trainer_utils.py",
    "HubStrategy": "transformers/trainer_utils.py",
}
PLAIN = ("int", "float", "bool", "str", "list", "dict")


@dataclass(frozen=True)
class SftFields:
    """A config class of one pinned TRL: the type word of each field, and the values of fields that are a choice."""

    versions: Mapping[str, str]
    types: Mapping[str, str]
    choices: Mapping[str, tuple[str, ...]]


@cache
def sft_fields() -> SftFields:
    """The committed snapshot: what the pinned TRL accepts. Written by `scripts/dev/snapshot_trl_fields.py`."""
    held = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return _fields_of(held["versions"], held)


@cache
def dpo_fields() -> SftFields:
    """The same of DPOConfig."""
    held = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return _fields_of(held["versions"], held["dpo"])


def _fields_of(versions: Mapping[str, str], held: Mapping[str, Any]) -> SftFields:
    choices = {name: tuple(values) for name, values in held["choices"].items()}
    return SftFields(versions, held["types"], choices)


def read_source(site_packages: Path, config: tuple[str, str] = SFT) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Types and choices by field of `config`, from the installed source under `site_packages`, read as text.

    Raises:
        OSError: TRL or transformers is not installed there.
    """
    enums = {name: _enum_values(_class_of(site_packages / path, name)) for name, path in ENUMS.items()}
    types: dict[str, str] = {}
    choices: dict[str, list[str]] = {}
    for path, name in (*SOURCES, config):
        for field, annotation, metadata in _fields(_class_of(site_packages / path, name)):
            types[field] = _type_word(annotation)
            values = metadata.get("choices") or _values_of(annotation, enums)
            if values:
                choices[field] = values
    return types, choices


def _class_of(path: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, dict[str, Any]]]:
    """Name, annotation and metadata of every dataclass field. Class attributes such as `_VALID_…` are not fields."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if not name.startswith("_") and "ClassVar" not in ast.unparse(statement.annotation):
                yield name, statement.annotation, _metadata(statement.value)


def _metadata(value: ast.expr | None) -> dict[str, Any]:
    """The literal entries of `field(metadata={…})`."""
    if not isinstance(value, ast.Call):
        return {}
    given = next((keyword.value for keyword in value.keywords if keyword.arg == "metadata"), None)
    if not isinstance(given, ast.Dict):
        return {}
    pairs = zip(given.keys, given.values, strict=True)
    return {ast.literal_eval(key): ast.literal_eval(item) for key, item in pairs if key and isinstance(item, ast.List)}


def _type_word(annotation: ast.expr) -> str:
    """One of `PLAIN`, or `any` where a field takes values of several kinds. `None` is always allowed and not told."""
    words = {_word(part) for part in _parts(annotation)} - {"None"}
    return words.pop() if len(words) == 1 else "any"


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of `a | b | None`."""
    if isinstance(annotation, ast.BinOp):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
    else:
        yield annotation


def _word(part: ast.expr) -> str:
    text = ast.unparse(part).split("[")[0]
    if text in (*PLAIN, "None"):
        return text
    return "str" if text in ENUMS else "any"


def _values_of(annotation: ast.expr, enums: Mapping[str, list[str]]) -> list[str]:
    """The values of the enumeration an annotation names."""
    return next((enums[text] for part in _parts(annotation) if (text := ast.unparse(part)) in enums), [])


def _enum_values(node: ast.ClassDef) -> list[str]:
    assigned = [statement.value for statement in node.body if isinstance(statement, ast.Assign)]
    return [value.value for value in assigned if isinstance(value, ast.Constant) and isinstance(value.value, str)]
