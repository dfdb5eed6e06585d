"""Xet uploads without a storage server: the client writes into a folder, and a commit takes its files out of it.

hf_xet (1.8.0) accepts `local:///folder` as the address of its storage. That scheme is undocumented; where it is gone,
HF_HUB_DISABLE_XET=1 sends the same files through LFS. A folder can be open in one process only, hence one per token,
and a copy for reading.
"""

import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from servers.hub_http import Answer, Call, json_answer
from servers.hub_repos import Blobs
from servers.hub_world import World, writable_repo

VALID_S = 3600
# Layout of a shard (xet-core, mdb_shard): a header, then per file a record of 48-byte cells until the bookend.
CELL = 48
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 0x80000000, 0x40000000


def write_token(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`GET .../xet-write-token/REV`: a fresh folder to upload into."""
    writable_repo(world, call, kind, repo_id)
    folder = Path(tempfile.mkdtemp(dir=_store(world.root)))
    url, expires = f"local://{folder}", int(time.time()) + VALID_S
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return json_answer({"casUrl": url, "exp": expires, "accessToken": "xet"}, **headers)


def _store(root: Path) -> Path:
    folder = root / "xet"
    folder.mkdir(exist_ok=True)
    return folder


def take(root: Path, blobs: Blobs, sha256: str, size: int) -> bool:
    """Move one uploaded file into the blobs; False where no folder holds it."""
    for folder in _store(root).iterdir():
        for shard in folder.glob("xet/xorbs/shards/*.mdb"):
            found = dict(_files(shard.read_bytes())).get(sha256)
            if found:
                _read(folder, found, size, blobs.path(sha256))
                return True
    return False


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """(SHA-256, Xet hash) of each file in a shard."""
    at = CELL
    while shard[at : at + 32] != BOOKEND and at + CELL <= len(shard):
        flags, entries = struct.unpack_from("<II", shard, at + 32)
        end = at + CELL * (1 + entries * (2 if flags & WITH_VERIFICATION else 1))
        if flags & WITH_SHA256:
            yield _hash(shard, end), _hash(shard, at)
            end += CELL
        at = end


def _hash(shard: bytes, at: int) -> str:
    """Four little-endian words, written as hexadecimal numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))


def _read(folder: Path, xet_hash: str, size: int, target: Path) -> None:
    """Reassemble one file from a copy of the folder: the client may still hold the original open."""
    import hf_xet  # here, because its import alone opens a log file (HF_XET_LOG_DEST, else one in the home folder)

    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as scratch:
        copy = shutil.copytree(folder, Path(scratch) / "cas")
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{copy}", token="xet", token_expiry_unix_secs=int(time.time()) + VALID_S
        )
        with group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(Path(scratch) / "file"))
        shutil.move(Path(scratch) / "file", target)
