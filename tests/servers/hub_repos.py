"""Repositories of the loopback Hub: immutable snapshots in a chain, large files on disk. Serves no route."""

import base64
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from servers.hub_http import HubError

LFS_THRESHOLD = 10 * 1024 * 1024  # The Hub takes larger files through LFS only.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".parquet", ".arrow", ".pt", ".pth", ".zip", ".npz", ".model")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores the file through LFS: its size, its suffix, or content that is not text."""
    if size == 0:
        return False
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3:  # not merely a character cut by the sample's end
            return True
    return size >= LFS_THRESHOLD or path.endswith(LFS_SUFFIXES) or b"\0" in sample


@dataclass(frozen=True)
class Blob:
    """One file's content, on disk under its SHA-256; `oid` is git's id of what git itself stores."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        """What the Hub names the content by."""
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer file."""
        return len(_pointer(self.sha256, self.size))


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Blobs:
    """Contents by SHA-256 in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        """Where the content lies."""
        return self.root / sha256

    def write(self, source: BinaryIO) -> tuple[str, int]:
        """Store a stream piece by piece, whole or not at all; its SHA-256 and size."""
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as target:
            while piece := source.read(1 << 20):
                digest.update(piece)
                size += target.write(piece)
        Path(target.name).replace(self.path(digest.hexdigest()))
        return digest.hexdigest(), size

    def regular(self, content: bytes) -> Blob:
        """A file that git itself stores."""
        digest, size = self.write(io.BytesIO(content))
        return Blob(digest, size, git_oid(content), lfs=False)

    def large(self, sha256: str) -> Blob:
        """A file of which git stores a pointer."""
        size = self.path(sha256).stat().st_size
        return Blob(sha256, size, git_oid(_pointer(sha256, size)), lfs=True)

    def of(self, path: str, content: bytes) -> Blob:
        """Either, as the Hub would choose for this path."""
        blob = self.regular(content)
        return self.large(blob.sha256) if is_large(path, blob.size, content[:512]) else blob


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot and its parent."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: float
    files: Mapping[str, Blob] = field(repr=False)


@dataclass
class Repo:
    """One repository; only its refs, visibility and guests ever change."""

    id: str
    kind: str
    private: bool
    gated: bool
    created: float
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)

    @property
    def namespace(self) -> str:
        """Who owns it."""
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        """The tip of main."""
        return self.commits[self.branches["main"]]

    def resolve(self, revision: str) -> Commit:
        """A branch, a tag, a ref or a full commit id."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(name) or self.tags.get(name) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def chain(self, revision: str) -> list[Commit]:
        """Commits from the revision back to the first."""
        found = [self.resolve(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def commit(
        self, files: Mapping[str, Blob], title: str, author: str, now: float, *, branch: str = "main", message: str = ""
    ) -> Commit:
        """Put a snapshot on top of the branch."""
        parent = self.branches.get(branch)
        listing = sorted((path, blob.etag) for path, blob in files.items())
        text = json.dumps([self.kind, self.id, parent, title, message, author, now, len(self.commits), listing])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, now, dict(files))
        self.branches[branch] = sha
        return self.commits[sha]


class Repos:
    """All repositories by kind and id."""

    def __init__(self, root: Path) -> None:
        self.blobs = Blobs(root / "blobs")
        self.by_key: dict[tuple[str, str], Repo] = {}

    def create(self, repo_id: str, kind: str, now: float, *, private: bool, gated: bool = False) -> Repo:
        """An empty repository; it has a tip only after the first commit."""
        repo = Repo(repo_id, kind, private, gated, now)
        self.by_key[kind, repo_id] = repo
        return repo

    def get(self, repo_id: str, kind: str = "model") -> Repo:
        """The repository; for the test's own questions."""
        return self.by_key[kind, repo_id]

    def materialise(self, repo: Repo, revision: str, folder: Path, below: str = "") -> None:
        """Copy a snapshot, or one folder of it, to disk."""
        prefix = f"{below.strip('/')}/" if below.strip("/") else ""
        for path, blob in repo.resolve(revision).files.items():
            if path.startswith(prefix):
                target = folder / path.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.blobs.path(blob.sha256), target)


def changed(
    blobs: Blobs, before: Mapping[str, Blob], lines: Iterable[tuple[str, dict[str, object]]]
) -> dict[str, Blob]:
    """The files after a commit's operations."""
    files = dict(before)
    for key, value in lines:
        path = str(value["path"])
        match key:
            case "file":
                content = str(value["content"])
                encoded = value.get("encoding") == "base64"
                files[_safe(path)] = blobs.regular(base64.b64decode(content) if encoded else content.encode())
            case "lfsFile":
                files[_safe(path)] = _uploaded(blobs, str(value["oid"]))
            case "deletedFile" | "deletedFolder" | "deletedEntry":
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            case _:
                raise HubError(400, f"Unknown key in commit: {key}")
    return files


def _safe(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise HubError(400, f"Invalid path in commit: {path}")
    return path


def _uploaded(blobs: Blobs, sha256: str) -> Blob:
    if not blobs.path(sha256).is_file():
        raise HubError(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist.")
    return blobs.large(sha256)
