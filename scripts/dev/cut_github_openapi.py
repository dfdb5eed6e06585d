"""Cut GitHub's API description down to the operations that the loopback GitHub serves. Usage:

    npm install --ignore-scripts @octokit/openapi@23.0.2      (in a temporary folder: 390 MB)
    python -m scripts.dev.cut_github_openapi \\
        node_modules/@octokit/openapi/generated/api.github.com.json tests/servers/github_openapi.json.gz

The description is the one GitHub publishes, as that package ships it; prose is left out, shapes and examples stay.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from scripts.dev.cut_openapi import components

_ = "/repos/{owner}/{repo}"
SERVED = {
    _: "get",
    _ + "/pulls": "get",
    _ + "/pulls/{pull_number}": "get",
    _ + "/pulls/{pull_number}/files": "get",
    _ + "/pulls/{pull_number}/reviews": "get",
    _ + "/commits/{commit_sha}/pulls": "get",
    _ + "/commits/{ref}/status": "get",
    _ + "/statuses/{sha}": "post",
    _ + "/compare/{basehead}": "get",
    _ + "/git/trees/{tree_sha}": "get",
    _ + "/issues": "get post",
    _ + "/issues/{issue_number}": "get patch",
    _ + "/issues/{issue_number}/comments": "get post",
    _ + "/issues/comments/{comment_id}": "get patch delete",
    _ + "/issues/comments/{comment_id}/reactions": "get post",
    _ + "/collaborators/{username}/permission": "get",
    _ + "/actions/workflows": "get",
    _ + "/actions/workflows/{workflow_id}": "get",
    _ + "/actions/workflows/{workflow_id}/dispatches": "post",
    _ + "/actions/workflows/{workflow_id}/enable": "put",
    _ + "/actions/workflows/{workflow_id}/disable": "put",
    _ + "/actions/secrets": "get",
    _ + "/actions/permissions/workflow": "get",
    _ + "/environments": "get",
    _ + "/environments/{environment_name}/secrets": "get",
    _ + "/environments/{environment_name}/deployment-branch-policies": "get",
    _ + "/rulesets": "get",
    _ + "/rulesets/{ruleset_id}": "get",
    _ + "/branches/{branch}/protection": "get",
    "/rate_limit": "get",
}
PROSE = {"description", "summary", "externalDocs", "tags", "x-github"}
KEPT_WHOLE = {"example", "examples", "default", "enum", "properties"}  # what stands in these is data, or names of data


def without_prose(node: Any) -> Any:
    """The node without words for readers; examples and names of properties are left as they are."""
    if isinstance(node, list):
        return [without_prose(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":
            kept[key] = {name: without_prose(schema) for name, schema in value.items()}
        elif key in KEPT_WHOLE:
            kept[key] = value
        elif key not in PROSE:
            kept[key] = without_prose(value)
    return kept


def cut(full: dict[str, Any]) -> dict[str, Any]:
    """The description of the served operations only."""
    paths = {
        path: {key: item for key, item in full["paths"][path].items() if key in (*verbs.split(), "parameters")}
        for path, verbs in SERVED.items()
    }
    smaller = {"openapi": full["openapi"], "paths": without_prose(paths)}
    parts = {name: without_prose(part) if name != "examples" else part for name, part in full["components"].items()}
    info = {key: full["info"][key] for key in ("title", "version")}
    return {**smaller, "info": info, "components": components({"components": parts}, smaller)}


def main(source: Path, target: Path) -> None:
    """Write the cut, the same bytes for the same input."""
    smaller = cut(json.loads(source.read_text(encoding="utf-8")))
    text = json.dumps(smaller, sort_keys=True, separators=(",", ":"))
    target.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{target}: {len(smaller['paths'])} paths, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
