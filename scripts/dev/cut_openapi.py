"""Cut the Hub's API description down to the paths that the loopback Hub serves. Usage:

    python scripts/dev/cut_openapi.py FULL.json.gz tests/servers/hub_openapi.json.gz

The full description is the Hub's own OpenAPI document, gzipped; the cut in use comes from the snapshot of 2026-08-17
in the public repository tryAGI/HuggingFace.
"""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

_REPO = "/api/(models|datasets|spaces)/{namespace}/{repo}"
SERVED = re.compile(
    "|".join(
        [
            "/api/whoami-v2",
            "/api/agent-harnesses",
            "/api/repos/create",
            _REPO + "/(commits|preupload|commit|xet-write-token|paths-info|tag|branch)/{rev}",
            _REPO + "/(refs|settings)",
            _REPO + "/tree/{rev}/{path}",
            "(/datasets|/spaces)?/{namespace}/{repo}/resolve/{rev}/{path}",
            "/api/jobs/hardware",
            "/api/jobs/{namespace}(/count|/auth-check/{perms})?",
            "/api/jobs/{namespace}/{jobId}(/(logs|metrics|cancel|labels))?",
        ]
    ).replace("{", r"\{").replace("}", r"\}")
)  # fmt: skip


def references(node: Any) -> set[str]:
    """Every `#/components/...` that the node points to."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()


def components(full: dict[str, Any], node: Any) -> dict[str, dict[str, Any]]:
    """The components that the node needs, with those that they need in turn."""
    wanted, todo = set[str](), references(node)
    while todo:
        wanted |= todo
        todo = set().union(*(references(_find(full, name)) for name in todo)) - wanted
    kept: dict[str, dict[str, Any]] = {}
    for name in sorted(wanted):
        _, _, section, key = name.split("/")
        kept.setdefault(section, {})[key] = _find(full, name)
    return kept


def _find(full: dict[str, Any], name: str) -> Any:
    node: Any = full
    for part in name.removeprefix("#/").split("/"):
        node = node[part]
    return node


def cut(full: dict[str, Any]) -> dict[str, Any]:
    """The description of the served paths only."""
    paths = {path: item for path, item in full["paths"].items() if SERVED.fullmatch(path)}
    kept = {key: full[key] for key in ("openapi", "info")}
    return {**kept, "paths": paths, "components": components(full, paths)}


def main(source: Path, target: Path) -> None:
    """Write the cut, the same bytes for the same input."""
    smaller = cut(json.loads(gzip.decompress(source.read_bytes())))
    text = json.dumps(smaller, sort_keys=True, separators=(",", ":"))
    target.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{target}: {len(smaller['paths'])} paths, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
