"""An experiment file to an `Experiment`, every fault with its line and a hint. Checks the schema, no rule."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.errors import Finding, InvalidExperiment, Place, Severity, excerpt
from pipeline.experiment import Experiment, nearest
from pipeline.yaml_text import Keys, YamlText, load_yaml, parse_yaml

SCHEMA_RULE = "EXP001"
EXAMPLES = {
    "name": "my-experiment",
    "hypothesis": "what you expect, and how you will know",
    "base": "{model: Qwen/Qwen3-0.6B}",
    "data": "{dataset: acme/conversations}",
    "train": "{method: qlora, flavor: a10g-large, timeout: 4h}",
    "output": "{repo: acme/my-model}",
    "budget": "{max_usd: 10}",
    "base.model": "Qwen/Qwen3-0.6B",
    "data.dataset": "acme/conversations",
    "train.method": "qlora",
    "train.flavor": "a10g-large",
    "train.timeout": "4h",
    "output.repo": "acme/my-model",
    "budget.max_usd": "10",
}


@dataclass(frozen=True)
class ExperimentFile:
    """A loaded experiment and where its words stand."""

    path: Path
    shown: str
    experiment: Experiment
    text: YamlText

    def at(self, dotted: str) -> Place:
        """The place of a value such as `train.flavor`, or of the nearest written parent."""
        return self.text.at(tuple(dotted.split(".")))


def load_experiment(path: Path, shown: str | None = None) -> ExperimentFile:
    """Read and check one experiment file; `shown` is its name in messages.

    Raises:
        InvalidExperiment: with every fault found, in the order of the file.
    """
    shown = shown or path.as_posix()
    return _checked(path, load_yaml(path, shown))


def parse_experiment(text: str, shown: str = "experiment.yaml") -> ExperimentFile:
    """Check the text of an experiment; see `load_experiment`."""
    return _checked(Path(shown), parse_yaml(text, shown))


def _checked(path: Path, text: YamlText) -> ExperimentFile:
    try:
        experiment = Experiment.model_validate(text.data)
    except ValidationError as error:
        found = {_finding(text, fault) for fault in error.errors(include_url=False)}
        raise InvalidExperiment(tuple(sorted(found, key=lambda finding: finding.at))) from error
    return ExperimentFile(path, text.path, experiment, text)


def _finding(text: YamlText, fault: Any) -> Finding:
    """One pydantic error in our words: the dotted key, what is wrong, what to write."""
    kind = fault["type"]
    keys = _written_keys(text.data, fault["loc"], keep_last=kind == "missing")
    dotted = ".".join(str(key) for key in keys)
    if kind == "extra_forbidden":
        return Finding(SCHEMA_RULE, Severity.ERROR, text.at_key(keys), f"unknown key `{dotted}`", _near_key(keys))
    if kind == "missing" or _is_null(text.data, keys):
        example = EXAMPLES.get(dotted, "…")
        hint = f"add `{keys[-1]}: {example}`" + (f" under `{'.'.join(map(str, keys[:-1]))}`" if keys[:-1] else "")
        return Finding(SCHEMA_RULE, Severity.ERROR, text.at(keys), f"`{dotted}` is missing", hint)
    if kind == "mergetune":
        hint = fault["ctx"]["hint"]
        message = fault["msg"] if not dotted or fault["msg"].startswith("`train.") else f"`{dotted}`: {fault['msg']}"
        return Finding(SCHEMA_RULE, Severity.ERROR, text.at(keys), message, hint)
    return Finding(
        SCHEMA_RULE, Severity.ERROR, text.at(keys), _plain_message(text, keys, fault), _type_hint(keys, fault)
    )


def _written_keys(data: Any, location: Iterable[str | int], *, keep_last: bool) -> Keys:
    """The path in the file: pydantic adds the names of union branches, which nobody wrote."""
    parts = list(location)
    keys: list[str | int] = []
    for index, part in enumerate(parts):
        if _has(data, part):
            data = data[part]
        elif not (keep_last and index == len(parts) - 1):
            continue
        keys.append(part)
    return tuple(keys)


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _plain_message(text: YamlText, keys: Keys, fault: Any) -> str:
    value = _value(text.data, keys)
    dotted = ".".join(str(key) for key in keys)
    said = f"`{excerpt(value)}`" if isinstance(value, str) else f"a {_kind(value)}"
    return f"`{dotted}` is {said}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", type(None): "null"}.get(type(value), type(value).__name__)


def _type_hint(keys: Keys, fault: Any) -> str:
    if fault["type"] == "enum":
        expected = fault["ctx"]["expected"].replace("'", "`")
        return f"write one of {expected}"
    description = _description(keys)
    return f"{'.'.join(str(key) for key in keys)}: {description}" if description else "see docs/experiment.md"


def _near_key(keys: Keys) -> str:
    section = _section(keys[:-1])
    if section is None:
        return "remove it"
    if elsewhere := _elsewhere(str(keys[-1])):
        return f"write it as `{elsewhere}`"
    known = list(section.model_fields)
    near = nearest(str(keys[-1]), known)
    return f"did you mean `{near}`?" if near else f"known here: {', '.join(known)}"


def _elsewhere(key: str) -> str | None:
    """Where a key that stands in the wrong section belongs."""
    for name in Experiment.model_fields:
        section = _section((name,))
        if section is not None and key in section.model_fields:
            return f"{name}.{key}"
    lora = _section(("train", "lora"))
    return f"train.lora.{key}" if lora is not None and key in lora.model_fields else None


def _section(keys: Keys) -> type[BaseModel] | None:
    """The model class behind a path of keys, or None when it is not a section."""
    model: type[BaseModel] = Experiment
    for key in keys:
        field = model.model_fields.get(str(key))
        if field is None:
            return None
        inner = field_section(field.annotation)
        if inner is None:
            return None
        model = inner
    return model


def field_section(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field typed `Section` or `Section | None`, None for a plain field."""
    options = (annotation, *get_args(annotation))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _description(keys: Keys) -> str | None:
    words = tuple(key for key in keys if isinstance(key, str))
    section = _section(words[:-1])
    field = section.model_fields.get(words[-1]) if section and words else None
    return field.description if field else None


def _value(data: Any, keys: Keys) -> Any:
    for key in keys:
        if not _has(data, key):
            return data if key != keys[-1] else None
        data = data[key]
    return data


def _is_null(data: Any, keys: Keys) -> bool:
    return _value(data, keys) is None
