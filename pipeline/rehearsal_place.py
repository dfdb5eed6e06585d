"""Where in the experiment a failure of its rehearsal belongs. Reads the message; looks at no log and no file."""

import difflib
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, excerpt
from pipeline.loader import ExperimentFile
from pipeline.yaml_text import Keys

WORD = re.compile(r"[\w.+-]*\w")
# Below this likeness two names are not of one family: `lr_scheduler_kwargs` and `lr_scheduler_type` have 0.72.
ALIKE = 0.7
# What the base brings with it: a failure that speaks of it and of no field is looked for there.
OF_THE_BASE = re.compile(r"chat template|tokenizer|vocabulary|architecture|config\.json|\bthe base\b", re.IGNORECASE)
LOG_ONLY = "the whole log:"  # the hint of a failure that nobody foresaw
SOURCES = (("data", "dataset"), ("data", "eval", "dataset"), ("evaluate", "prompts"))


def placed(error: UserError, file: ExperimentFile, stage: str | None) -> UserError:
    """The failure of a stage with its place in the experiment, and the value to change where only a log was named."""
    if error.at is not None:
        return error
    keys = keys_of(error.message, file, stage)
    hint, value = error.hint, _value(file.text.data, keys) if keys else None
    if hint.startswith(LOG_ONLY) and isinstance(value, str):
        hint = f"change `{'.'.join(map(str, keys or ()))}: {excerpt(value)}`; {hint}"
    return UserError(error.message, hint, at=file.text.at_key(keys) if keys else None, exit_code=1)


def keys_of(message: str, file: ExperimentFile, stage: str | None) -> Keys | None:
    """The key of the experiment that the error message of a stage speaks of.

    From the surest sign to the weakest: a dotted key, a data file, a key by its name or its value, a key that is named
    alike, the base, the section of the stage. None when even that was not written.
    """
    keys = _by_dotted_key(message, file) or _by_data_file(message, file) or _by_name(message, file, stage)
    if keys is None and (stage == "twin" or OF_THE_BASE.search(message)) and ("base", "model") in file.text.values:
        return ("base", "model")
    return keys or _section(file, stage)


def _written(file: ExperimentFile, below: Keys = ()) -> list[Keys]:
    """The keys that the file has below another one, the outer ones first."""
    found = (keys for keys in file.text.values if keys[: len(below)] == below and len(keys) > len(below))
    return sorted(found, key=len)


def _by_dotted_key(message: str, file: ExperimentFile) -> Keys | None:
    """The longest key that is named in full, or what below it is named by its own name or value."""
    words = set(WORD.findall(message))
    named = [keys for keys in _written(file) if len(keys) > 1 and ".".join(map(str, keys)) in words]
    if not named:
        return None
    below = _written(file, named[-1])
    return next((keys for keys in below if str(keys[-1]) in words or _has_value(message, file, keys)), named[-1])


def _by_data_file(message: str, file: ExperimentFile) -> Keys | None:
    present = [keys for keys in SOURCES if keys in file.text.values]
    return next((keys for keys in present if Path(str(_value(file.text.data, keys))).name in message), None)


def _by_name(message: str, file: ExperimentFile, stage: str | None) -> Keys | None:
    """A key of the stage's section by its name or value, or named alike; then a key of any section by its name."""
    told = {word for word in WORD.findall(message) if "_" in word} | set(re.findall(r"`(\w+)(?=[`:])", message))
    section = _section(file, stage)
    mine = _written(file, section)[::-1] if section else []
    for keys in mine:
        # `method: full` must not be found in `disk full`: words of the schema's own fields are too common.
        if str(keys[-1]) in told or (len(keys) > 2 and _has_value(message, file, keys)):
            return keys
    if other := next((keys for keys in _written(file)[::-1] if len(keys) > 1 and str(keys[-1]) in told), None):
        return other
    names = {str(keys[-1]): keys for keys in mine if "_" in str(keys[-1])}
    near = (name for word in sorted(told) for name in difflib.get_close_matches(word, names, 1, ALIKE))
    return next((names[name] for name in near), None)


def _has_value(message: str, file: ExperimentFile, keys: Keys) -> bool:
    """Is the text that is written there a word of the message? Short ones and numbers say nothing."""
    value = _value(file.text.data, keys)
    if not isinstance(value, str) or len(value) < 3 or not value[0].isalpha() or value in ("true", "false", "null"):
        return False
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", message, re.IGNORECASE) is not None


def _section(file: ExperimentFile, stage: str | None) -> Keys | None:
    """The stage's own section; of training the free settings, where the file has any: the schema knows the others."""
    choices: tuple[Keys, ...] = (("train", "sft"), ("train",)) if stage == "train" else ((stage,),) if stage else ()
    return next((keys for keys in choices if keys in file.text.values), None)


def _value(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data
