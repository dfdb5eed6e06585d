"""Views on repositories: create, describe, list, check rights.

Files pass through hub_upload_views and hub_file_views.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from servers.hub_accounts import object_id
from servers.hub_description import require_body
from servers.hub_http import Answer, Call, HubError, Route, json_answer, route
from servers.hub_repos import GIT_ATTRIBUTES, Blob, Commit, Repo, git_oid
from servers.hub_world import PLURALS, World, find_repo, moment, readable_repo, writable_repo


def create(world: World, call: Call) -> Answer:
    """`POST /api/repos/create`: 403 without the right, 409 where it exists; starts with the Hub's own first commit."""
    body = require_body("post", "/api/repos/create", call.json())
    token = world.accounts.token(call.secret)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    kind, namespace = body.get("type") or "model", body.get("organization") or token.user
    repo_id = f"{namespace}/{body['name']}"
    url = page_url(world, kind, repo_id)
    if not world.accounts.may_write(token, namespace):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    with world.lock:
        if (kind, repo_id) in world.repos.by_key:
            return json_answer({"error": f"You already created this {kind} repo", "url": url}, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = world.repos.create(repo_id, kind, world.clock(), private=private)
        first = {".gitattributes": world.repos.blobs.regular(GIT_ATTRIBUTES)}
        repo.commit(first, "initial commit", token.user, world.clock())
    return json_answer({"url": url, "name": repo_id, "id": object_id(kind + repo_id)})


def page_url(world: World, kind: str, repo_id: str) -> str:
    """The repository's page for people."""
    return f"{world.url}/{'' if kind == 'model' else PLURALS[kind] + '/'}{repo_id}"


def delete(world: World, call: Call) -> Answer:
    """`DELETE /api/repos/delete`."""
    body, token = call.json(), world.accounts.token(call.secret)
    kind, namespace = body.get("type") or "model", body.get("organization") or (token.user if token else "")
    repo, _ = writable_repo(world, call, kind, f"{namespace}/{body['name']}")
    with world.lock:
        del world.repos.by_key[kind, repo.id]
    return json_answer({})


def settings(world: World, call: Call, kind: str, repo_id: str) -> Answer:
    """`PUT .../settings`: visibility and gate."""
    repo, _ = writable_repo(world, call, kind, repo_id)
    body = require_body("put", "/api/models/{namespace}/{repo}/settings", call.json())
    if "private" in body or "visibility" in body:
        repo.private = body.get("private", body.get("visibility") == "private")
    if "gated" in body:
        repo.gated = bool(body["gated"])
    return json_answer({"private": repo.private, "gated": "manual" if repo.gated else False})


def info(world: World, call: Call, kind: str, repo_id: str, revision: str = "main") -> Answer:
    """`GET /api/models/ID[/revision/REV]`: metadata, visible even where a gate closes the files."""
    repo, _ = find_repo(world, call, kind, repo_id)
    with_blobs = call.first("blobs").lower() in ("1", "true")
    return json_answer(_facts(world, repo, repo.resolve(revision), with_blobs))


def listing(world: World, call: Call, kind: str) -> Answer:
    """`GET /api/models`: what the token can see, by author, name and tags."""
    token = world.accounts.token(call.secret)
    author, name, tags = call.first("author"), call.first("search").lower(), set(call.query.get("filter", []))
    rows = [
        _facts(world, repo, repo.head, with_blobs=False)
        for (its_kind, _), repo in list(world.repos.by_key.items())
        if its_kind == kind
        and (not author or repo.namespace == author)
        and name in repo.id.lower()
        and (not repo.private or world.accounts.may_see_private(token, repo.namespace, repo.id))
    ]
    return paged(world, call, [row for row in rows if tags <= set(row["tags"])], "id")


def _facts(world: World, repo: Repo, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    card = _card(world, commit)
    facts = {
        "_id": object_id(repo.kind + repo.id),
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "lastModified": moment(commit.date),
        "createdAt": moment(repo.created),
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": [_sibling(path, blob, with_blobs) for path, blob in sorted(commit.files.items())],
    }
    if repo.kind == "model":
        facts |= {"modelId": repo.id} | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    return facts


def _card(world: World, commit: Commit) -> dict[str, Any]:
    """The YAML header of README.md."""
    if "README.md" not in commit.files:
        return {}
    text = world.repos.blobs.path(commit.files["README.md"].sha256).read_text(errors="replace")
    header = text.split("---\n")[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    return yaml.safe_load(header) or {}


def _sibling(path: str, blob: Blob, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid} | ({"lfs": lfs} if blob.lfs else {})


def auth_check(world: World, call: Call, kind: str, repo_id: str) -> Answer:
    """`GET .../auth-check`: may the files be read?"""
    readable_repo(world, call, kind, repo_id)
    return json_answer({})


def auth_check_write(world: World, call: Call, kind: str, repo_id: str) -> Answer:
    """`GET .../auth-check/write`: may the repository be written?"""
    writable_repo(world, call, kind, repo_id)
    return json_answer({})


def tree(world: World, call: Call, kind: str, repo_id: str, revision: str, path: str = "") -> Answer:
    """`GET .../tree/REV[/PATH]`: one folder, or everything below it, in pages."""
    repo, _ = find_repo(world, call, kind, repo_id)
    commit = repo.resolve(revision)
    recursive = call.first("recursive").lower() in ("1", "true")
    entries = _entries(commit.files, path, recursive)
    if path and not entries:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    if call.first("expand").lower() in ("1", "true"):
        last = {"id": commit.sha, "title": commit.title, "date": moment(commit.date)}
        entries = [entry | {"lastCommit": last} for entry in entries]
    return paged(world, call, entries, "path")


def _entries(files: Mapping[str, Blob], path: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{path}/" if path else ""
    below = {name: blob for name, blob in files.items() if name.startswith(prefix)}
    folders = {name.rsplit("/", depth)[0] for name in below for depth in range(1, name.count("/") + 1)}
    names = sorted(name for name in {*below, *folders} if name.startswith(prefix) and name != path)
    if not recursive:
        names = [name for name in names if "/" not in name.removeprefix(prefix)]
    return [entry_of(name, files.get(name)) for name in names]


def entry_of(path: str, blob: Blob | None) -> dict[str, Any]:
    """One row of a listing; no blob means a folder."""
    if blob is None:
        return {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path}
    lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path} | ({"lfs": lfs} if blob.lfs else {})


def paged(world: World, call: Call, entries: list[dict[str, Any]], key: str) -> Answer:
    """One page of the entries and a link to the next.

    The cursor is the last entry's key, not a count: a job that arrives between two pages moves nothing.
    """
    start, last = 0, call.first("cursor")
    if last:
        start = 1 + next((at for at, entry in enumerate(entries) if entry[key] == last), -1)
    limit = min(int(call.first("limit", str(world.page_size))), world.page_size)
    answer = json_answer(entries[start : start + limit])
    if start + limit < len(entries):
        kept = [(name, value) for name, values in call.query.items() if name != "cursor" for value in values]
        query = "&".join(
            f"{name}={quote(value)}" for name, value in [*kept, ("cursor", entries[start + limit - 1][key])]
        )
        answer.headers["Link"] = f'<{world.url}{call.path}?{query}>; rel="next"'
    return answer


def paths_info(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`POST .../paths-info/REV`: the client sends a form, not the JSON of the description."""
    repo, _ = find_repo(world, call, kind, repo_id)
    files = repo.resolve(revision).files
    asked = parse_qs(call.body().decode()).get("paths", [])
    folders = {path for path in asked if any(name.startswith(path.rstrip("/") + "/") for name in files)}
    return json_answer([entry_of(path, files.get(path)) for path in asked if path in files or path in folders])


def commits(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`GET .../commits/REV`: the chain, newest first."""
    repo, _ = find_repo(world, call, kind, repo_id)
    chain = repo.chain(revision)
    rows = [
        {"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": moment(c.date)}
        for c in chain
    ]
    answer = paged(world, call, rows, "id")
    answer.headers["X-Total-Count"] = str(len(rows))
    return answer


def refs(world: World, call: Call, kind: str, repo_id: str) -> Answer:
    """`GET .../refs`."""
    repo, _ = find_repo(world, call, kind, repo_id)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in dict(repo.branches).items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in dict(repo.tags).items()]
    return json_answer({"branches": branches, "tags": tags, "converts": []})


def tag(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`POST .../tag/REV`: a name for a commit."""
    repo, _ = writable_repo(world, call, kind, repo_id)
    body = require_body("post", "/api/models/{namespace}/{repo}/tag/{rev}", call.json())
    return _new_ref(world, repo, repo.tags, body["tag"], revision)


def branch(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`POST .../branch/NAME`: from `startingPoint`, else from main."""
    repo, _ = writable_repo(world, call, kind, repo_id)
    return _new_ref(world, repo, repo.branches, revision, call.json().get("startingPoint") or "main")


def _new_ref(world: World, repo: Repo, names: dict[str, str], name: str, revision: str) -> Answer:
    with world.lock:
        if name in names:
            raise HubError(409, f"Reference {name} already exists")
        names[name] = repo.resolve(revision).sha
    return json_answer({})


def delete_tag(world: World, call: Call, kind: str, repo_id: str, revision: str) -> Answer:
    """`DELETE .../tag/NAME`."""
    repo, _ = writable_repo(world, call, kind, repo_id)
    if repo.tags.pop(revision, None) is None:
        raise HubError(404, f"Tag {revision} not found", "RevisionNotFound")
    return json_answer({})


def repo_routes() -> list[Route]:
    """The routes of this module for every kind of repository."""
    found = [route("POST", "/api/repos/create", create), route("DELETE", "/api/repos/delete", delete)]
    found += [route("GET", f"/api/{plural}", _listing_of(kind)) for kind, plural in PLURALS.items()]
    return found + routes_of_kinds("/api/{kinds}/", _VIEWS)


def _listing_of(kind: str) -> Callable[..., Answer]:
    return lambda world, call: listing(world, call, kind)


def routes_of_kinds(start: str, views: Iterable[tuple[str, str, Callable[..., Answer]]]) -> list[Route]:
    """Each view as a route for each kind of repository; `{kinds}` in the start is the plural of the kind."""
    return [
        route(method, f"{start.replace('{kinds}', plural)}{{namespace}}/{{name}}{tail}", for_kind(kind, view))
        for kind, plural in PLURALS.items()
        for method, tail, view in views
    ]


def for_kind(kind: str, view: Callable[..., Answer]) -> Callable[..., Answer]:
    """The view with its kind fixed and the two halves of the id joined."""

    def bound(world: World, call: Call, namespace: str, name: str, **more: str) -> Answer:
        return view(world, call, kind, f"{namespace}/{name}", **more)

    return bound


_VIEWS = (
    ("GET", "", info),
    ("GET", "/revision/{revision}", info),
    ("GET", "/auth-check", auth_check),
    ("GET", "/auth-check/write", auth_check_write),
    ("GET", "/tree/{revision}", tree),
    ("GET", "/tree/{revision}/{path:path}", tree),
    ("POST", "/paths-info/{revision}", paths_info),
    ("GET", "/commits/{revision}", commits),
    ("GET", "/refs", refs),
    ("POST", "/tag/{revision}", tag),
    ("DELETE", "/tag/{revision}", delete_tag),
    ("POST", "/branch/{revision}", branch),
    ("PUT", "/settings", settings),
)
