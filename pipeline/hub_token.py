"""What a token is: by its text, before it is sent anywhere, and by what the Hub's whoami says. Keeps no token."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.hub_facts import Access, Probe, Scope, TokenFacts, TokenKind

PLACEHOLDER = re.compile(
    r"\$\w+|\$\{[^}]*\}|\$\{\{[^}]*\}\}|%\w+%|<[^>]*>|\*+"
    r"|(?i:(hf_)?(x{3,}|\.{3}|…|your\w*|my_?token|token|hf_token|secret|changeme|none|null|undefined))"
)


def token_shape(token: str | None) -> TokenFacts | None:
    """What a token's text alone shows, before it is sent anywhere; None when it may be one.

    A text that no request can carry in a header is told here too: the client would print it in its error.
    """
    text = (token or "").strip()
    if not text:
        return TokenFacts(TokenKind.NONE, Probe(Access.UNAUTHORIZED, "there is none"))
    if PLACEHOLDER.fullmatch(text):
        return TokenFacts(TokenKind.PLACEHOLDER, Probe(Access.UNAUTHORIZED, f"`{text[:60]}`"))
    if not re.fullmatch(r"[\w.~+/=-]+", text, re.ASCII):
        return TokenFacts(TokenKind.PLACEHOLDER, Probe(Access.UNAUTHORIZED, "characters that no token has"))
    return None


def read_token(who: Mapping[str, Any], token: str) -> TokenFacts:
    """What whoami says; a shape that is not known gives `UNKNOWN`, and the Hub's own checks decide."""
    auth = who.get("auth") or {}
    access = auth.get("accessToken") or {}
    fine = access.get("fineGrained") or {}
    kinds = {kind.value: kind for kind in (TokenKind.READ, TokenKind.WRITE, TokenKind.FINE_GRAINED)}
    kind = kinds.get(str(access.get("role")), TokenKind.UNKNOWN)
    if auth.get("type") == "oauth" or token.startswith("hf_oauth_"):
        kind = TokenKind.OAUTH
    scopes = [
        Scope(str(scope["entity"]["type"]), str(scope["entity"].get("name", "")), frozenset(scope["permissions"]))
        for scope in fine.get("scoped") or []
    ]
    return TokenFacts(
        kind,
        Probe(Access.READABLE),
        str(who["name"]),
        {str(org["name"]): str(org.get("roleInOrg", "unknown")) for org in who.get("orgs") or []},
        tuple(scopes),
        fine.get("canReadGatedRepos") if kind is TokenKind.FINE_GRAINED else None,
        _moment(auth.get("expiresAt")),
    )


def _moment(text: Any) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
