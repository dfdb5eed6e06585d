"""Users, organisations and tokens of the loopback Hub, and what each token may do. Serves only `whoami`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from servers.hub_http import Answer, Call, HubError, json_answer

WRITERS = {"admin", "write", "contributor"}
CREATED = "2026-01-05T10:00:00.000Z"
UNKNOWN_TOKEN = "Invalid credentials in Authorization header"
NO_CREDIT = "Pre-paid credit balance is insufficient - add more credits to your account to use Jobs."


def object_id(text: str) -> str:
    """24 hexadecimal digits, the same for the same text: the form of the Hub's database ids."""
    return hashlib.sha1(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Token:
    """One access token; `scoped` counts for the fine-grained role only."""

    value: str = field(repr=False)
    user: str
    role: str
    scoped: Mapping[str, list[str]] = field(default_factory=dict)
    can_read_gated: bool = False

    def granted(self, permission: str, *entities: str) -> bool:
        """Whether a scope names this permission for one of the entities; the other roles are not scoped."""
        if self.role != "fineGrained":
            return permission.endswith("read") or self.role in ("write", "oauth")
        return any(permission in self.scoped.get(entity, ()) for entity in entities)


class Accounts:
    """Who exists, who belongs where, which tokens are alive, who has credit."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, str]] = {}
        self.orgs: set[str] = set()
        self.tokens: dict[str, Token] = {}
        self.without_credit: set[str] = set()

    def exists(self, namespace: str) -> bool:
        """Whether the name is a user or an organisation."""
        return namespace in self.users or namespace in self.orgs

    def token(self, secret: str | None) -> Token | None:
        """The token sent; None for an anonymous request; 401 for one that is unknown or revoked."""
        if secret is None:
            return None
        if secret not in self.tokens:
            raise HubError(401, UNKNOWN_TOKEN)
        return self.tokens[secret]

    def user_of(self, secret: str | None) -> str | None:
        """The user's name, for the record of requests."""
        token = self.tokens.get(secret or "")
        return token.user if token else None

    def role_in(self, user: str, namespace: str) -> str | None:
        """The user's role there; their own namespace is theirs to administer."""
        return "admin" if user == namespace else self.users.get(user, {}).get(namespace)

    def may_write(self, token: Token | None, namespace: str, repo_id: str = "") -> bool:
        """Whether the token may write repositories of the namespace (or this one repository)."""
        if token is None or self.role_in(token.user, namespace) not in WRITERS:
            return False
        return token.granted("repo.write", namespace, repo_id)

    def may_see_private(self, token: Token | None, namespace: str, repo_id: str) -> bool:
        """Whether a private repository exists at all for this token."""
        if token is None or self.role_in(token.user, namespace) is None:
            return False
        return token.granted("repo.content.read", namespace, repo_id) or self.may_write(token, namespace, repo_id)

    def may_read_gated(self, token: Token | None, repo_id: str, *, accepted: bool) -> bool:
        """Whether gated files open: their user was accepted or is a member, and the token carries that right."""
        namespace = repo_id.partition("/")[0]
        if token is None or not (accepted or self.role_in(token.user, namespace)):
            return False
        return token.can_read_gated or token.granted("repo.content.read", namespace, repo_id)

    def require_jobs(self, token: Token | None, namespace: str, need: str = "write") -> Token:
        """The token, where it may read or start jobs of the namespace; else the Hub's 401, 404 or 403."""
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if not self.exists(namespace):
            raise HubError(404, f"Namespace {namespace} not found")
        role = self.role_in(token.user, namespace)
        scopes = ["job.write"] if need == "write" else ["job.write", "job.read"]
        allowed = role in WRITERS if need == "write" else role is not None
        if not allowed or not any(token.granted(scope, namespace) for scope in scopes):
            raise HubError(403, missing_permission(namespace, f"job.{need}"))
        return token


def missing_permission(namespace: str, permission: str) -> str:
    """The sentence of the Hub's 403 answers."""
    return (
        "You don't have the required permissions to complete this action on namespace "
        f"{namespace}, missing permissions: {permission}."
    )


def whoami(world: Any, call: Call) -> Answer:
    """`GET /api/whoami-v2`: the account behind a token, in the shape of its role."""
    accounts: Accounts = world.accounts
    token = accounts.token(call.secret)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [_entity(name, "org", accounts, roleInOrg=role) for name, role in accounts.users[token.user].items()]
    user = _entity(token.user, "user", accounts, isPro=False, emailVerified=True, orgs=orgs)
    return json_answer({**user, "email": f"{token.user}@example.com", "auth": _auth(token, accounts)})


def _entity(name: str, kind: str, accounts: Accounts, **more: Any) -> dict[str, Any]:
    paid = name not in accounts.without_credit
    facts = {"id": object_id(name), "name": name, "fullname": name.title(), "periodEnd": None, "canPay": paid}
    return {"type": kind, **facts, "billingMode": "prepaid", "avatarUrl": f"/avatars/{name}.svg", **more}


def _auth(token: Token, accounts: Accounts) -> dict[str, Any]:
    """An OAuth token has no `accessToken` at all: code that takes one for granted fails on it."""
    if token.role == "oauth":
        return {"type": "oauth", "expiresAt": "2027-01-05T10:00:00.000Z"}
    access: dict[str, Any] = {"displayName": "test", "role": token.role, "createdAt": CREATED}
    if token.role == "fineGrained":
        scoped = [
            {"entity": _scope(entity, accounts), "permissions": list(permissions)}
            for entity, permissions in token.scoped.items()
        ]
        access["fineGrained"] = {"scoped": scoped, "global": [], "canReadGatedRepos": token.can_read_gated}
    return {"type": "access_token", "accessToken": access}


def _scope(entity: str, accounts: Accounts) -> dict[str, str]:
    kind = "model" if "/" in entity else "org" if entity in accounts.orgs else "user"
    return {"_id": object_id(entity), "type": kind, "name": entity}
