"""The repository on this disk: which experiments there are, and the facts that lie in its files."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.facts import DataFacts, Facts
from pipeline.fields import is_path
from pipeline.models import CATALOGUE, ModelShape, shape_of
from pipeline.plan import in_repo_paths


def find_experiments(root: Path, paths: list[Path]) -> list[Path]:
    """The experiment files of `paths` (files, or folders searched through), by default all of `experiments/`.

    Raises:
        UserError: a folder without any experiment.
    """
    found: list[Path] = []
    for path in paths or [root / "experiments"]:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for ending in ("*.yaml", "*.yml") for p in path.rglob(ending))
        found += [p for p in inside if "archive" not in p.relative_to(path).parts]
        if not inside:
            raise UserError(f"`{path}` holds no experiment", "create one: `mergetune init my-experiment`")
    return list(dict.fromkeys(found))


def shown_path(path: Path, root: Path) -> str:
    """How a path is named in messages: relative to the repository when it lies inside it."""
    resolved = path.resolve()
    return resolved.relative_to(root).as_posix() if resolved.is_relative_to(root) else path.as_posix()


def read_facts(experiment: Experiment, root: Path) -> Facts:
    """Content hashes, model shape and data size, as far as they lie in this repository or the catalogue."""
    content: dict[str, str] = {}
    missing: list[str] = []
    for path in in_repo_paths(experiment):
        if (root / path).exists():
            content[path] = content_hash(root / path)
        else:
            missing.append(path)
    dataset = experiment.data.dataset
    config = _config(root / experiment.base.model) if is_path(experiment.base.model) else None
    script = experiment.train.script
    return Facts(
        content=content,
        missing=tuple(missing),
        shape=shape_of(config) if config else CATALOGUE.get(experiment.base.model),
        data=_data_facts(root / dataset) if is_path(dataset) and dataset not in missing else None,
        config=config,
        chat_template=_chat_template(root / experiment.base.model) if config else None,
        scripts={script: _text(root / script)} if script and script in content else {},
    )


def shape_in(folder: Path) -> ModelShape | None:
    """The shape of the model whose config.json lies in a folder; None without one we can size."""
    config = _config(folder)
    return shape_of(config) if config else None


@lru_cache(maxsize=1024)
def content_hash(path: Path) -> str:
    """sha256 (hex) of a file; of a folder, the sha256 of its files' relative names and hashes.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        if not path.is_dir():
            return _file_hash(path)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        lines = [f"{_file_hash(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    except OSError as error:
        raise UserError(f"`{error.filename}` cannot be read: {error.strerror}", "check its permissions") from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _config(base: Path) -> Mapping[str, Any] | None:
    """The config.json of a base in this repository; None when unreadable, which the train stage refuses by name."""
    return _json_object(base / "config.json")


@lru_cache(maxsize=256)
def _chat_template(base: Path) -> str | None:
    """The base's chat template: a file of its own, else a key of tokenizer_config.json.

    Empty when the base has none; None when it is kept in a form that is not read here (several, or inside JSON).
    """
    if (base / "chat_template.jinja").is_file():
        return _text(base / "chat_template.jinja")
    template = (_json_object(base / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, str):
        return template
    elsewhere = any((base / name).exists() for name in ("chat_template.json", "additional_chat_templates"))
    return None if elsewhere or template is not None else ""


def _json_object(path: Path) -> Mapping[str, Any] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@lru_cache(maxsize=256)
def _data_facts(path: Path) -> DataFacts | None:
    """Rows and text of a JSONL file; None for Parquet, which this light install cannot read."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    rows = characters = 0
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            rows += bool(line.strip())
            characters += len(line.rstrip())
    return DataFacts(rows, characters)
