"""Views through which files leave: `resolve`, with HEAD, GET and Range."""

import re

from servers.hub_http import Answer, Call, HubError, Route, route
from servers.hub_repo_views import for_kind
from servers.hub_repos import Blob
from servers.hub_world import PLURALS, World, readable_repo


def resolve(world: World, call: Call, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    """`GET|HEAD [/datasets|/spaces]/ID/resolve/REV/PATH`, served by the Hub itself: no redirect to a store."""
    repo = readable_repo(world, call, kind, repo_id)
    commit = repo.resolve(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", **headers)
    blob = commit.files[path]
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
    return _slice(world, blob, headers, call.headers.get("range"))


def _slice(world: World, blob: Blob, headers: dict[str, str], wanted: str | None) -> Answer:
    """The whole file, or the one range asked for."""
    file = world.repos.blobs.path(blob.sha256)
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not found or not any(found.groups()):
        return Answer(200, headers, file=file, length=blob.size)
    first, last = found.groups()
    start = int(first) if first else max(blob.size - int(last), 0)
    end = min(int(last), blob.size - 1) if first and last else blob.size - 1
    if start > end:
        raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
    return Answer(206, headers, file=file, offset=start, length=end - start + 1)


def file_routes() -> list[Route]:
    """The routes of this module."""
    tail = "/{namespace}/{name}/resolve/{revision}/{path:path}"
    starts = {kind: "" if kind == "model" else f"/{plural}" for kind, plural in PLURALS.items()}
    return [route("GET", start + tail, for_kind(kind, resolve)) for kind, start in starts.items()]
