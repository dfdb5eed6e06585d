"""What every view of the loopback Hub can reach, and the one check of who may touch a repository."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from servers.hub_accounts import Accounts, Token, missing_permission
from servers.hub_http import Call, HubError
from servers.hub_repos import Repo, Repos

PLURALS = {"model": "models", "dataset": "datasets", "space": "spaces"}


@dataclass
class World:
    """The state behind the routes. `jobs` is the job board, unknown to the repository views."""

    root: Path
    clock: Callable[[], float]
    accounts: Accounts
    repos: Repos
    jobs: Any = None
    url: str = ""
    page_size: int = 100
    lock: threading.RLock = field(default_factory=threading.RLock)


def moment(seconds: float) -> str:
    """A time as the Hub writes it; cut, not rounded, so that it never lies in the future."""
    return datetime.fromtimestamp(int(seconds * 1000) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def find_repo(world: World, call: Call, kind: str, repo_id: str) -> tuple[Repo, Token | None]:
    """The repository and the token, where the repository exists for it; else the Hub's 401 or 404."""
    token = world.accounts.token(call.secret)
    repo = world.repos.by_key.get((kind, repo_id))
    if repo and not (repo.private and not world.accounts.may_see_private(token, repo.namespace, repo.id)):
        return repo, token
    if token is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    raise HubError(404, "Repository not found", "RepoNotFound")


def readable_repo(world: World, call: Call, kind: str, repo_id: str) -> Repo:
    """The repository where its files open for the token; a gate stops the others."""
    repo, token = find_repo(world, call, kind, repo_id)
    accepted = token is not None and token.user in repo.accepted
    if repo.gated and not world.accounts.may_read_gated(token, repo.id, accepted=accepted):
        text = f"Access to {kind} {repo_id} is restricted and you are not in the authorized list."
        raise HubError(403 if token else 401, text, "GatedRepo")
    return repo


def writable_repo(world: World, call: Call, kind: str, repo_id: str) -> tuple[Repo, Token]:
    """The repository where the token may write it; else 401, 403 or 404."""
    repo, token = find_repo(world, call, kind, repo_id)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    if not world.accounts.may_write(token, repo.namespace, repo.id):
        raise HubError(403, missing_permission(repo.namespace, "repo.write"))
    return repo, token
