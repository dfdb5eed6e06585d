"""Rules about the token that launches: each passes offline and where all is well, and fails a bad token."""

from datetime import timedelta

import pytest
from examples import GOOD
from hub_worlds import BOTH, NOW, YES, hub, no, outputs, scoped, token
from rule_cases import expect, place, run

from pipeline.hub_facts import Access, OutputState, Probe, TokenFacts, TokenKind
from pipeline.rules.token import (
    account_may_write,
    token_is_a_value,
    token_is_accepted,
    token_is_personal,
    token_is_there,
    token_outlives_plan,
    token_reaches_namespace,
    token_writes,
)

RULES = [
    token_is_there,
    token_is_a_value,
    token_is_accepted,
    token_is_personal,
    token_outlives_plan,
    token_writes,
    account_may_write,
    token_reaches_namespace,
]
AT = place(GOOD, "acme/coach-12b")
RECIPE = "make a fine-grained token at `https://hub.example/settings/tokens` with `repo.write` and `job.write`"
ON_ACME = ("org", "acme", set(BOTH))
ON_ALICE = ("user", "alice", set(BOTH))


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule) is None, "offline: the Hub was not asked"
    assert run(rule, hub=hub()) is None
    assert run(rule, hub=hub(token=scoped(ON_ACME))) is None
    assert run(rule, hub=hub(token=token(TokenKind.UNKNOWN))) is None, "an unknown shape: the Hub's own checks decide"


@pytest.mark.parametrize("rule", [token_is_there, token_writes, account_may_write, token_reaches_namespace])
def test_a_reviewers_token_need_not_write(rule) -> None:
    reader = token(TokenKind.READ, orgs={})
    assert run(rule, hub=hub(token=reader, jobs=None, launches=False)) is None
    nobody = TokenFacts(TokenKind.NONE, no(Access.UNAUTHORIZED))
    assert run(rule, hub=hub(token=nobody, jobs=None, launches=False)) is None


def test_bad_no_token() -> None:
    facts = hub(token=TokenFacts(TokenKind.NONE, no(Access.UNAUTHORIZED, "there is none")))
    expect(run(token_is_there, hub=facts), "`HF_TOKEN` is not set", RECIPE, AT)


def test_bad_placeholder() -> None:
    facts = hub(token=TokenFacts(TokenKind.PLACEHOLDER, no(Access.UNAUTHORIZED, "`$HF_TOKEN`")))
    expect(run(token_is_a_value, hub=facts), "`HF_TOKEN` holds `$HF_TOKEN`, not a token", RECIPE, AT)


def test_bad_revoked() -> None:
    facts = hub(token=TokenFacts(TokenKind.UNKNOWN, no(Access.UNAUTHORIZED, "401 Invalid username or password.")))
    finding = run(token_is_accepted, hub=facts)
    expect(finding, "does not accept the token: revoked, expired or mistyped (401 Invalid", RECIPE, AT)


@pytest.mark.parametrize(
    ("ends", "said"),
    [(None, "it expires in hours, at most in 30 days"), (NOW, "it expires at 2026-11-22 12:00 UTC")],
)
def test_bad_oauth(ends, said) -> None:
    finding = run(token_is_personal, hub=hub(token=token(TokenKind.OAUTH, expires_at=ends)))
    expect(finding, said, f"{RECIPE} on the organisation `acme`, and put it into `HF_TOKEN`", AT)
    assert "from a browser login or a chat tool's session" in finding.message
    assert "a job's copy is not renewed" in finding.message


def test_bad_expires_before_the_stages_can_end() -> None:
    # The good experiment's timeouts: 4 h, and three times 1 h.
    bad = hub(token=token(expires_at=NOW + timedelta(hours=7)))
    finding = run(token_outlives_plan, hub=bad)
    expect(finding, "expires 2026-11-22 19:00 UTC, the stages may run until 2026-11-22 19:00 UTC", RECIPE, AT)
    assert run(token_outlives_plan, hub=hub(token=token(expires_at=NOW + timedelta(hours=7, minutes=1)))) is None
    assert run(token_outlives_plan, hub=hub(token=token(TokenKind.OAUTH, expires_at=NOW))) is None, "told once"


def test_bad_read_token() -> None:
    finding = run(token_writes, hub=hub(token=token(TokenKind.READ)))
    expect(finding, "the token of `alice` has the role `read`: it can neither start a job nor push", RECIPE, AT)


@pytest.mark.parametrize(
    ("orgs", "said"),
    [
        ({}, "`alice` is not a member of the organisation `acme`"),
        ({"acme": "read"}, "`alice` has the role `read` in the organisation `acme`"),
        ({"acme": "no_access"}, "has the role `no_access`"),
    ],
)
def test_bad_account(orgs, said) -> None:
    finding = run(account_may_write, hub=hub(token=token(orgs=orgs)))
    expect(finding, said, "write `repo: alice/coach-12b`, or ask an admin of `acme` for the role `write`", AT)
    assert run(account_may_write, hub=hub(token=token(orgs={"Acme": "contributor"}))) is None


@pytest.mark.parametrize(
    ("scopes", "jobs", "said", "hint"),
    [
        (
            [ON_ALICE],
            no(Access.FORBIDDEN),
            "has no `repo.write` and `job.write` on the organisation `acme` (it has some on user `alice`)",
            "give the token `repo.write` and `job.write` on the organisation `acme` at `https://hub.example",
        ),
        ([("org", "acme", {"repo.write"})], no(Access.FORBIDDEN), "has no `job.write` on the org", "give the token `j"),
        ([("org", "acme", {"job.write"})], YES, "has no `repo.write` on the organisation", "give the token `repo.wr"),
        ([], no(Access.FORBIDDEN), "has no `repo.write` and `job.write` on the organisation `acme`", "give the token"),
    ],
)
def test_bad_scopes(scopes, jobs, said, hint) -> None:
    expect(run(token_reaches_namespace, hub=hub(token=scoped(*scopes), jobs=jobs)), said, hint, AT)


def test_bad_token_of_single_repositories_cannot_make_them() -> None:
    own = [("model", f"acme/coach-12b{suffix}", {"repo.write"}) for suffix in ("", "-adapter", "-GGUF")]
    facts = hub(token=scoped(("org", "acme", {"job.write"}), *own))
    finding = run(token_reaches_namespace, hub=facts)
    expect(finding, "may write `acme/coach-12b-adapter`, which is not there, and may not create it", "hf repos cr", AT)
    there = outputs(OutputState.EMPTY, YES)
    assert run(token_reaches_namespace, hub=hub(token=facts.token, outputs=there)) is None


def test_a_resource_groups_scope_is_left_to_the_hub() -> None:
    facts = hub(token=scoped(("resource-group", "team", set(BOTH))))
    assert run(token_reaches_namespace, hub=facts) is None


def test_an_outage_says_nothing_of_the_token() -> None:
    silent = Probe(Access.UNREACHABLE, "503 down")
    facts = hub(token=TokenFacts(TokenKind.UNKNOWN, silent), jobs=silent, outputs=outputs(OutputState.UNKNOWN, silent))
    assert [rule.__name__ for rule in RULES if run(rule, hub=facts)] == []
