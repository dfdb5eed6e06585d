"""The repository on this disk: which experiments there are, and the facts that lie in its files."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, excerpt
from pipeline.experiment import Experiment
from pipeline.facts import NOTHING, Facts, FromHub
from pipeline.fields import is_path
from pipeline.models import CATALOGUE, ModelShape, shape_of
from pipeline.plan import in_repo_paths, mlx_base

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
LARGEST_SIZE = 100_000_000


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
    real = _real(path.parent) / path.name
    return real.relative_to(root).as_posix() if real.is_relative_to(root) else path.as_posix()


def folder_of(path: Path) -> Path:
    """The folder itself, or the one that a file lies in or would: where to look for the repository from."""
    return _real(path if path.is_dir() else path.parent)


def read_facts(experiment: Experiment, root: Path, fetched: FromHub = NOTHING) -> Facts:
    """Content hashes, the base's shape and template, as far as they lie here, were `fetched`, or are well known."""
    content, missing = read_content(experiment, root)
    model, script = experiment.base.model, experiment.train.script
    base = root / model if is_path(model) else fetched.base
    config, fault = _config(base) if base and model not in missing else (None, "")
    mlx = mlx_base(experiment)
    return Facts(
        content=content,
        missing=missing,
        shape=shape_of(config) if config else CATALOGUE.get(model),
        config=config,
        config_fault=fault,
        chat_template=_chat_template(base) if base and config else None,
        scripts={script: _text(root / script)} if script and script in content else {},
        mlx_config=_config(root / mlx)[0] if mlx and mlx in content else None,
    )


def read_content(experiment: Experiment, root: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The hash of every in-repo path the experiment names, and the paths that are not there as what they are for."""
    base, dataset = experiment.base.model, experiment.data.dataset
    paths = in_repo_paths(experiment)
    folders = {base, mlx_base(experiment)} - {dataset}
    there = [path for path in paths if _lies_here(root / path, root, folder=path in folders)]
    return {path: content_hash(root / path) for path in there}, tuple(path for path in paths if path not in there)


def _lies_here(path: Path, root: Path, *, folder: bool) -> bool:
    """A file (or folder) inside the repository, links followed, and not the repository itself."""
    try:
        real, home = os.path.realpath(path), os.path.realpath(root)
        return real.startswith(home + os.sep) and (Path(real).is_dir() if folder else Path(real).is_file())
    except (OSError, ValueError):  # a name too long, a folder that may not be looked into
        return False


def _real(path: Path) -> Path:
    """With links followed; `Path.resolve` of Python 3.11 raises for a link to itself."""
    return Path(os.path.realpath(path))


def shape_in(folder: Path) -> ModelShape | None:
    """The shape of the model whose config.json lies in a folder; None without one we can size."""
    config, _ = _config(folder)
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
def _config(base: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The config.json of a base, or what is wrong with it."""
    path = base / "config.json"
    if not path.is_file():
        return None, "is not there"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"is not JSON: {excerpt(error)}"
    fault = _nonsense(loaded) if isinstance(loaded, dict) else "is not a JSON object"
    return (None, fault) if fault else (loaded, "")


def _nonsense(config: Mapping[str, Any]) -> str:
    """A value that no model can be made of."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        return f"has `text_config: {excerpt(text)}`, which is not an object"
    if not isinstance(config.get("model_type", ""), str):
        return f"has `model_type: {excerpt(config['model_type'])}`, which is not a text"
    for key in SIZES:
        value = text.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST_SIZE:
            return f"has `{key}: {excerpt(value)}`, which is no size of a model"
    return ""


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
    except (OSError, ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
