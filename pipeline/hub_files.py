"""Files of a Hub base or dataset into a cache folder, where the readers of in-repo ones find them. Reads no content.

A folder is named by its commit and appears only when it is complete, so it is never fetched twice and never half there.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline.chat_template import FILES
from pipeline.hub_facts import Access, Fetched, HubClient, HubError, Probe

# What the readers of a base know, and what a twin needs besides; none of them is weights.
BASE_FILES = frozenset(
    {
        *FILES,
        *("config.json", "generation_config.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"),
        *("preprocessor_config.json", "processor_config.json", "README.md"),
    }
)
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
# The largest tokenizer.json known here (Gemma 3) has 33 MB.
LARGEST_BASE_FILE = 100_000_000
LARGEST_SPLIT = 200_000_000
ENDINGS = (".jsonl", ".json", ".parquet")
# JSON files that describe a dataset and hold no rows.
NO_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
LARGEST_CARD = 1_000_000


def resolve_revision(hub: HubClient, repo: str, kind: str, revision: str | None) -> str:
    """The commit a revision is now.

    Raises:
        HubError: there is none, or nobody answered.
    """
    return hub.resolve(repo, kind, revision)


def fetch_base_files(hub: HubClient, repo: str, revision: str | None, cache: Path) -> Fetched:
    """Configuration, tokenizer and chat template of a base; a gated one without access is told, not raised."""

    def choose(files: dict[str, int], sha: str) -> list[str]:
        return [path for path in files if path in BASE_FILES or MORE_TEMPLATES.fullmatch(path)]

    return _fetch(hub, repo, "model", revision, cache, choose, LARGEST_BASE_FILE)


def fetch_dataset_files(
    hub: HubClient, repo: str, revision: str | None, split: str, subset: str | None, cache: Path
) -> Fetched:
    """The JSON-lines or Parquet files of a split, when they can be told and are small enough; else the reason.

    The card's `configs` say which they are; without, the split's name between separators of the path does, as
    `datasets` reads it. A `.json` of JSON lines is kept as `.jsonl`.
    """

    def choose(files: dict[str, int], sha: str) -> list[str]:
        card = hub.read(repo, "dataset", "README.md", sha, LARGEST_CARD) if "README.md" in files else b""
        return _split_files(files, _card_patterns(card, split, subset), split, subset)

    part = hashlib.sha256(f"{subset or ''}\n{split}".encode()).hexdigest()[:16]  # a split may be called anything
    return _fetch(hub, repo, "dataset", revision, cache / part, choose, LARGEST_SPLIT)


def _fetch(
    hub: HubClient,
    repo: str,
    kind: str,
    revision: str | None,
    cache: Path,
    choose: Callable[[dict[str, int], str], list[str]],
    limit: int,
) -> Fetched:
    """The chosen files in `cache/<repo>/<commit>`; all of them or none."""
    sha = None
    try:
        sha = hub.resolve(repo, kind, revision)
        folder = cache / f"{kind}--{repo.replace('/', '--')}" / sha
        if not folder.is_dir():
            listed = hub.files(repo, kind, sha)
            _download(hub, repo, kind, sha, choose(listed, sha), folder, limit)
    except HubError as error:
        return Fetched(Probe(error.access, error.detail), sha)
    return Fetched(Probe(Access.READABLE), sha, folder, tuple(sorted(p for p in folder.rglob("*") if p.is_file())))


def _download(hub: HubClient, repo: str, kind: str, sha: str, paths: list[str], folder: Path, limit: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent))
    try:
        for path in paths:
            target = part / path
            if not target.resolve().is_relative_to(part.resolve()):
                raise HubError(Access.REFUSED, f"`{path}` leaves its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            hub.download(repo, kind, path, sha, target, limit)
            if kind == "dataset" and path.endswith(".json"):
                _as_json_lines(target, path)
        if not folder.is_dir():  # another process may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _as_json_lines(file: Path, path: str) -> None:
    with file.open("rb") as handle:
        if handle.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise HubError(Access.REFUSED, f"`{path}` is one JSON array, not JSON lines")
    file.rename(file.with_suffix(".jsonl"))


def _split_files(files: dict[str, int], patterns: list[str] | None, split: str, subset: str | None) -> list[str]:
    """The split's files, by the card's patterns or by name.

    Raises:
        HubError: it cannot be told which they are, they are of several kinds, or too large together.
    """
    data = [path for path in files if path.endswith(ENDINGS) and PurePosixPath(path).name not in NO_ROWS]
    if patterns is not None:
        chosen = [path for path in data if any(fnmatch(path, p) for p in patterns)]
    else:
        data = [path for path in data if subset is None or _has_word(path, subset)]
        named = [path for path in data if _has_word(path, split)]
        chosen = named or (data if len(data) == 1 and split == "train" else [])
    if not chosen:
        raise HubError(Access.REFUSED, f"no JSON-lines or Parquet file can be told to be the split `{split}`")
    if len({PurePosixPath(path).suffix for path in chosen}) > 1:
        raise HubError(Access.REFUSED, f"the split `{split}` is there in several formats")
    size = sum(files[path] for path in chosen)
    if size > LARGEST_SPLIT:
        raise HubError(Access.REFUSED, f"the split `{split}` has {size:,} bytes, {LARGEST_SPLIT:,} are fetched")
    return chosen


def _card_patterns(card: bytes, split: str, subset: str | None) -> list[str] | None:
    """The path patterns a card's `configs` give for a split, empty for none of them; None without `configs`."""
    match = re.match(rb"(?:\xef\xbb\xbf)?---\r?\n(.*?)\n---", card, re.DOTALL)
    try:
        said = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    configs = said.get("configs") if isinstance(said, dict) else None
    if not isinstance(configs, list):
        return None
    wanted = [config for config in configs if isinstance(config, dict)]
    if subset is not None or len(wanted) > 1:
        wanted = [config for config in wanted if config.get("config_name") == (subset or "default")]
    return [pattern for config in wanted for pattern in _patterns(config.get("data_files"), split)]


def _patterns(data_files: Any, split: str) -> list[str]:
    """`data_files` is a pattern, a list of them, or a list of `{split, path}`; without a split all is `train`."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: list[str] = []
    for entry in entries:
        named = isinstance(entry, dict)
        paths = entry.get("path") if named else entry
        if (entry.get("split") if named else "train") == split:
            found += [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
    return found


def _has_word(path: str, word: str) -> bool:
    return re.search(rf"(^|[/._ -]){re.escape(word)}([/._ -]|$)", path) is not None
