"""A trained adapter in a folder of this machine: read, and refused where it is not whole or not of this run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import UserError, excerpt
from pipeline.plan import Plan, StageName

MANIFEST = "manifest.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENDINGS = {".safetensors", ".json", ".md", ".yaml"}  # of what a training writes: weights without pickle, and words
LARGEST_JSON = 4_000_000


@dataclass(frozen=True)
class Adapter:
    """A whole artifact of the train stage: its manifest, its files by path, and a digest of what they hold."""

    manifest: Mapping[str, Any]
    files: Mapping[str, Path]
    digest: str

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.files.values())


def read_adapter(folder: Path, plan: Plan) -> Adapter:
    """The adapter that lies in `folder`, or in `train/artifact` of a run's folder.

    Raises:
        UserError: it is none, not PEFT's, damaged, or another run's.
    """
    folder = folder / "train/artifact" if (folder / "train/artifact").is_dir() else folder
    name = plan.experiment.name
    again = f"`mergetune run experiments/{name}.yaml --backend mlx` makes one"
    if not folder.is_dir():
        raise UserError(f"`{folder}` is no folder", again, exit_code=2)
    manifest = _json(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"`{folder}` {_without_manifest(folder)}", again)
    _require_run(manifest, plan, again)
    files = _files(folder, manifest)
    for needed in (CONFIG, WEIGHTS):
        if needed not in files:
            raise UserError(f"the manifest in `{folder}` lists no `{needed}`: this is no PEFT adapter", again)
    config = _json(files[CONFIG]) or {}
    base = plan.experiment.base.model
    if config.get("peft_type") != "LORA" or config.get("base_model_name_or_path") != base:
        said = f"`{excerpt(config.get('peft_type'))}` for `{excerpt(config.get('base_model_name_or_path'))}`"
        raise UserError(f"`{CONFIG}` in `{folder}` is {said}, not `LORA` for `{base}`", again)
    return Adapter(manifest, files, files_digest(manifest))


def files_digest(manifest: Mapping[str, Any] | None) -> str:
    """sha256 (hex) of a manifest's list of files: the same adapter has the same wherever it lies."""
    listed = (manifest or {}).get("files")
    kept = {str(file.get("path")): file.get("sha256") for file in listed or [] if isinstance(file, dict)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_manifest(folder: Path) -> str:
    """What is in a folder that has no manifest, and why that is not enough."""
    if (folder / "adapters.safetensors").is_file():
        return "holds an adapter of mlx-lm without a manifest: nobody can say from which rows and settings it learned"
    if (folder / WEIGHTS).is_file():
        return "holds an adapter without a manifest: nobody can say from which rows and settings it learned"
    return "holds no finished adapter"


def _require_run(manifest: Mapping[str, Any], plan: Plan, again: str) -> None:
    if manifest.get("stage") != StageName.TRAIN:
        raise UserError(f"this is the artifact of stage `{excerpt(manifest.get('stage'))}`, not of `train`", again)
    if (manifest.get("run_id"), manifest.get("fingerprint")) == (plan.run_id, plan.fingerprint):
        return
    message = f"this adapter was trained as `{excerpt(manifest.get('run_id'))}`, and the experiment is `{plan.run_id}`"
    raise UserError(message, f"merge the file as it was trained, or train again: {again}")


def _files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """The files that the manifest lists, each compared with its hash; nothing else of the folder is ever read."""
    found: dict[str, Path] = {}
    for listed in manifest.get("files") or []:
        name = str(listed.get("path", "")) if isinstance(listed, dict) else ""
        path = folder / name
        parts = PurePosixPath(name).parts
        if not name or ".." in parts or name.startswith(("/", ".")) or path.suffix not in ENDINGS:
            raise UserError(f"the manifest in `{folder}` lists `{excerpt(name)}`, which no training makes")
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"`{path}` is not there", "the folder is not whole: copy it again")
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != listed.get("sha256"):
                raise UserError(f"`{path}` is not the file that was trained: its hash differs", "copy it again")
        found[name] = path
    return found


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none to trust."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            return None
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None
