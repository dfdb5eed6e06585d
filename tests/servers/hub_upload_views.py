"""Views through which files arrive: preupload, Xet or LFS, commit. The client takes Xet unless HF_HUB_DISABLE_XET=1."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from servers.hub_description import require_body
from servers.hub_http import Answer, Call, HubError, Route, json_answer, route
from servers.hub_repo_views import for_kind, page_url, routes_of_kinds
from servers.hub_repos import Blob, changed, is_large
from servers.hub_world import PLURALS, World, writable_repo
from servers.hub_xet import take, write_token

CONFLICT = "A commit has happened since. Please refresh and try again."


def preupload(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`POST .../preupload/REV`: which files go through LFS, and what is there already."""
    repo, _ = writable_repo(world, call, kind, repo_id)
    commit = repo.resolve(revision)
    body = require_body("post", "/api/models/{namespace}/{repo}/preupload/{rev}", call.json())
    return json_answer({"files": [_mode(file, commit.files) for file in body["files"]], "commitOid": commit.sha})


def _mode(file: dict[str, Any], files: Mapping[str, Blob]) -> dict[str, Any]:
    large = is_large(file["path"], int(file["size"]), base64.b64decode(file["sample"]))
    known = files.get(file["path"])
    mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return mode | ({"oid": known.etag} if known else {})


def commit(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`POST .../commit/BRANCH`: compare with the parent named, then swap."""
    repo, token = writable_repo(world, call, kind, repo_id)
    lines = _lines(call)
    header = lines[0]["value"]
    _take_from_xet(world, [line["value"] for line in lines if line["key"] == "lfsFile"])
    with world.lock:
        parent = repo.resolve(revision)
        if revision not in repo.branches:
            raise HubError(400, f"Cannot commit to {revision}: not a branch")
        if header.get("parentCommit") not in (None, parent.sha):
            raise HubError(412, CONFLICT)
        files = changed(world.repos.blobs, parent.files, [(line["key"], line["value"]) for line in lines[1:]])
        message = header.get("description") or ""
        made = repo.commit(files, header["summary"], token.user, world.clock(), branch=revision, message=message)
    url = f"{page_url(world, kind, repo_id)}/commit/{made.sha}"
    return json_answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _lines(call: Call) -> list[dict[str, Any]]:
    """The body's JSON lines, the header first."""
    try:
        lines = [json.loads(line) for line in call.body().splitlines() if line.strip()]
    except ValueError:
        raise HubError(400, "Invalid JSON line in commit") from None
    if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "The first line of a commit is its header, with a summary")
    return lines


def _take_from_xet(world: World, files: list[dict[str, Any]]) -> None:
    """Contents named by a commit that did not come through LFS came through Xet, or not at all."""
    for file in files:
        if not world.repos.blobs.path(file["oid"]).is_file():
            take(world.root, world.repos.blobs, file["oid"], file.get("size", 0))


def lfs_batch(world: World, call: Call, kind: str, repo_id: str) -> Answer:
    """`POST /ID.git/info/lfs/objects/batch`: where to put each content that is not stored yet."""
    writable_repo(world, call, kind, repo_id)
    objects = [{"oid": str(o["oid"]), "size": int(o["size"])} for o in call.json()["objects"]]
    for wanted in objects:
        if not world.repos.blobs.path(wanted["oid"]).is_file():
            actions = {
                "upload": {"href": f"{world.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{world.url}/lfs-verify"},
            }
            wanted["actions"] = actions
    return json_answer({"transfer": "basic", "objects": objects})


def lfs_put(world: World, call: Call, oid: str) -> Answer:
    """`PUT /lfs/OID`: the content, streamed to disk; like a signed address, it asks for no token."""
    call.stream.seek(0)
    sha256, _ = world.repos.blobs.write(call.stream)
    if sha256 != oid:
        raise HubError(400, f"The content is {sha256}, not {oid}")
    return Answer(headers={"ETag": f'"{oid}"'})


def lfs_verify(world: World, call: Call) -> Answer:
    """`POST /lfs-verify`: did it arrive whole?"""
    wanted = call.json()
    path = world.repos.blobs.path(str(wanted["oid"]))
    if not path.is_file() or path.stat().st_size != wanted["size"]:
        raise HubError(404, f"LFS object {wanted['oid']} was not uploaded")
    return json_answer({})


def validate_yaml(world: World, call: Call) -> Answer:
    """`POST /api/validate-yaml`: the client asks before it commits a README.md."""
    return json_answer({"errors": [], "warnings": []})


def upload_routes() -> list[Route]:
    """The routes of this module."""
    found = [
        route("POST", "/api/validate-yaml", validate_yaml),
        route("PUT", "/lfs/{oid}", lfs_put),
        route("POST", "/lfs-verify", lfs_verify),
    ]
    for kind, plural in PLURALS.items():
        start = "" if kind == "model" else f"/{plural}"
        found.append(route("POST", start + "/{namespace}/{name}.git/info/lfs/objects/batch", for_kind(kind, lfs_batch)))
    views = (
        ("POST", "/preupload/{revision}", preupload),
        ("GET", "/xet-write-token/{revision}", write_token),
        ("POST", "/commit/{revision}", commit),
    )
    return found + routes_of_kinds("/api/{kinds}/", views)
