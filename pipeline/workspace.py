"""The repository on this disk: which experiments there are, and the facts that lie in its files."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

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
    local_data = is_path(dataset) and dataset not in missing
    return Facts(
        content=content,
        missing=tuple(missing),
        shape=_shape(experiment.base.model, root),
        data=_data_facts(root / dataset) if local_data else None,
    )


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


def _shape(model: str, root: Path) -> ModelShape | None:
    if not is_path(model):
        return CATALOGUE.get(model)
    config = root / model / "config.json"
    try:
        loaded = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # Unknown, and reported as unknown; the train stage refuses such a base by name.
    return shape_of(loaded) if isinstance(loaded, dict) else None


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
