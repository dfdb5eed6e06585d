"""An experiment file to an `Experiment`, every fault with its line and a hint. Checks the schema, no rule."""

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.errors import Finding, InvalidExperiment, Place, Severity, excerpt
from pipeline.experiment import Experiment, nearest
from pipeline.sweep import Choice, combinations, overridden
from pipeline.variants import repeated, sweep_faults, variants_of
from pipeline.yaml_text import Keys, YamlText, load_yaml, parse_yaml

SCHEMA_RULE = "EXP001"
MAPPING_WANTED = ("model_type", "model_attributes_type", "dict_type")
NUMBER_WANTED = ("int_parsing", "float_parsing")
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
        return self.text.at(self.text.find(dotted))


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
        # Each once, and in the schema's order where two stand at one place: the same bytes on every run.
        found = dict.fromkeys(_finding(text, fault) for fault in error.errors(include_url=False))
        raise InvalidExperiment(tuple(sorted(found, key=lambda finding: finding.at))) from error
    if found := dict.fromkeys(_of_sweep(text, experiment)):
        raise InvalidExperiment(tuple(sorted(found, key=lambda finding: finding.at)))
    return ExperimentFile(path, text.path, experiment, text)


def _of_sweep(text: YamlText, experiment: Experiment) -> Iterator[Finding]:
    """What is wrong with the variants of a sweep, each a whole experiment, at its values."""
    if experiment.sweep is None:
        return
    sweep, bad = text.data["sweep"], False
    for choices in combinations(sweep.get("grid"), sweep.get("list")):
        values = {**text.data, "train": overridden(text.data["train"], choices)}
        try:
            Experiment.model_validate(values)
        except ValidationError as error:
            bad = True
            faults = error.errors(include_url=False)
            yield from (_of_variant(replace(text, data=values), choices, fault) for fault in faults)
    told = [*sweep_faults(experiment), *(() if bad else repeated(variants_of(experiment)))]
    for dotted, message, hint in told:
        yield Finding(SCHEMA_RULE, Severity.ERROR, text.at(text.find(dotted)), message, hint)


def _of_variant(text: YamlText, choices: tuple[Choice, ...], fault: Any) -> Finding:
    """A fault of one variant: its words, at the value of the sweep that it speaks of."""
    found, key = _finding(text, fault), _dotted(tuple(fault["loc"][1:]))
    named = [
        choice
        for choice in choices
        if f"{key}.".startswith(f"{choice.key}.") or f"train.{choice.key}`" in found.message
    ]
    at = text.at(text.find(f"sweep.{(named or choices)[-1].at}")) if choices else text.at(("sweep",))
    return replace(found, at=at, message=f"`sweep`: {found.message}")


def _finding(text: YamlText, fault: Any) -> Finding:
    """One pydantic error in our words: the dotted key, what is wrong, what to write."""
    kind = fault["type"]
    keys = _written_keys(text.data, fault["loc"], keep_last=kind == "missing")
    dotted, at = _dotted(keys), text.at(keys)
    if kind == "extra_forbidden":
        at, message, hint = text.at_key(keys), f"unknown key `{dotted}`", _near_key(keys)
    elif keys and isinstance(keys[-1], int) and _is_null(text.data, keys):
        message, hint = f"`{dotted}` is empty", "remove it, or write its value"
    elif kind == "missing" or _is_null(text.data, keys):
        example = EXAMPLES.get(dotted, "…")
        message = f"`{dotted}` is missing"
        hint = f"add `{keys[-1]}: {example}`" + (f" under `{_dotted(keys[:-1])}`" if keys[:-1] else "")
    elif kind == "mergetune":
        hint, key = fault["ctx"]["hint"], fault["ctx"]["key"]
        message = fault["msg"] if not dotted or fault["msg"].startswith("`train.") else f"`{dotted}`: {fault['msg']}"
        at = text.at(text.find(key, keys)) if key else at
    else:
        message, hint = _plain_message(text, keys, fault), _type_hint(text, keys, fault)
    return Finding(SCHEMA_RULE, Severity.ERROR, at, message, hint)


def _dotted(keys: Keys) -> str:
    return ".".join(excerpt(key) for key in keys)


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
    said = f"`{excerpt(value)}`" if isinstance(value, str) and value else f"a {_kind(value)}"
    said = "empty" if value == "" else said
    wanted = "input should be a mapping of keys to values" if fault["type"] in MAPPING_WANTED else fault["msg"]
    return f"`{_dotted(keys)}` is {said}: {wanted[:1].lower()}{wanted[1:]}"


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", type(None): "null"}.get(type(value), type(value).__name__)


def _type_hint(text: YamlText, keys: Keys, fault: Any) -> str:
    value = _value(text.data, keys)
    if fault["type"] == "enum":
        expected = fault["ctx"]["expected"].replace("'", "`")
        return f"write one of {expected}{_foreign(value)}"
    if fault["type"] in MAPPING_WANTED:
        return _mapping_hint(keys, value)
    if fault["type"] in NUMBER_WANTED and (number := _number_meant(value, fault["type"])):
        return f"write `{keys[-1]}: {number}`"
    description = _description(keys)
    return f"{_dotted(keys)}: {description}" if description else "see docs/experiment.md"


def _mapping_hint(keys: Keys, value: Any) -> str:
    """The value put where it belongs: `base: Qwen/Qwen3-0.6B` is `base: {model: Qwen/Qwen3-0.6B}`."""
    section = _section(keys)
    if section is None:
        return f"write `{keys[-1]}: {{key: value}}`" if keys else "write `key: value` lines"
    first = next((name for name, field in section.model_fields.items() if field.is_required()), None)
    if first is None:
        return f"write `{keys[-1]}: {{}}` for the defaults, or its keys: {', '.join(section.model_fields)}"
    given = excerpt(value) if isinstance(value, str) else EXAMPLES.get(f"{_dotted(keys)}.{first}", "…")
    example = EXAMPLES.get(_dotted(keys), "")
    written = example if ", " in example else f"{{{first}: {given}}}"
    return f"write `{keys[-1]}: {written}`"


def _number_meant(value: Any, fault_type: str) -> str | None:
    """The number that `2,048`, `$10`, `0x1F` or `３` probably is."""
    text = unicodedata.normalize("NFKC", str(value)).replace(" ", "").strip("$€£")
    if re.fullmatch(r"0[xob][0-9a-fA-F]{1,12}", text):
        with contextlib.suppress(ValueError):
            return str(int(text, 0))
    if fault_type == "int_parsing" and re.fullmatch(r"[0-9]{1,6}e[0-9]", text):
        return f"{float(text):.0f}"
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        return text.replace(",", "")
    if fault_type == "float_parsing" and (part := re.fullmatch(r"([0-9]{1,6})/([1-9][0-9]{0,5})", text)):
        return f"{int(part[1]) / int(part[2]):g}"
    plain = re.fullmatch(r"[0-9]{1,12}" + (r"(\.[0-9]{1,12})?" if fault_type == "float_parsing" else ""), text)
    return text if plain and text != str(value) else None


def _foreign(word: Any) -> str:
    """A note on the first letter that only looks like one of ours; empty without one."""
    letter = next((one for one in str(word) if not one.isascii() and one.isalpha()), None)
    return f": `{letter}` is U+{ord(letter):04X}, not a Latin letter" if letter else ""


def _near_key(keys: Keys) -> str:
    section = _section(keys[:-1])
    if section is None:
        return "remove it"
    if elsewhere := _elsewhere(str(keys[-1])):
        return f"write it as `{elsewhere}`"
    known = list(section.model_fields)
    near = nearest(str(keys[-1])[:80], known)
    if near and (foreign := _foreign(keys[-1])):
        return f"write `{near}`{foreign}"
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
