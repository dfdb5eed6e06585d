"""Made-up answers of a Hub for tests of rules: everything well, and ways to change a part of it."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline.hub_facts import (
    Access,
    HubFacts,
    OutputFacts,
    OutputState,
    Probe,
    Scope,
    SourceFacts,
    TokenFacts,
    TokenKind,
)

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
YES = Probe(Access.READABLE)
REPOS = ("acme/coach-12b-adapter", "acme/coach-12b", "acme/coach-12b-GGUF")
BOTH = frozenset({"repo.write", "job.write"})


def no(access: Access, detail: str = "403 no") -> Probe:
    """An answer that is not yes."""
    return Probe(access, detail)


def scoped(*scopes: tuple[str, str, set[str]], **given: Any) -> TokenFacts:
    """A fine-grained token of alice, who may write in acme."""
    made = tuple(Scope(kind, name, frozenset(permissions)) for kind, name, permissions in scopes)
    return replace(token(TokenKind.FINE_GRAINED), scopes=made, can_read_gated=True, **given)


def token(kind: TokenKind = TokenKind.WRITE, **given: Any) -> TokenFacts:
    """A token of alice, who may write in acme."""
    return replace(TokenFacts(kind, YES, "alice", {"acme": "write"}), **given)


def outputs(state: OutputState = OutputState.ABSENT, write: Probe | None = None) -> tuple[OutputFacts, ...]:
    """The three repositories of the good experiment, all alike."""
    return tuple(OutputFacts(repo, state, write) for repo in REPOS)


def hub(**given: Any) -> HubFacts:
    """A Hub on which everything is well for the good experiment."""
    facts = HubFacts(
        endpoint="https://hub.example",
        namespace="acme",
        asked_at=NOW,
        token=token(),
        jobs=YES,
        base=SourceFacts("google/gemma-3-12b-it", "96b6f1e", YES, "96b6f1e" + "0" * 33),
        dataset=SourceFacts("acme/coach", "5d2", YES, "5d2" + "0" * 37),
        outputs=outputs(),
    )
    return replace(facts, **given)
