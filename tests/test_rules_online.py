"""Rules about what only the Hub knows: each passes offline and where all is well, and fails a bad Hub."""

from dataclasses import replace

import pytest
from examples import GOOD
from hub_worlds import YES, hub, no, outputs, scoped, token
from rule_cases import expect, place, run

from pipeline.errors import Severity
from pipeline.hub_facts import Access, OutputFacts, OutputState, Probe, SourceFacts, TokenFacts, TokenKind
from pipeline.rules.online import (
    base_is_readable,
    dataset_is_readable,
    hub_answers,
    jobs_are_allowed,
    outputs_are_free,
    outputs_are_writable,
    revisions_exist,
)

RULES = [
    hub_answers,
    jobs_are_allowed,
    base_is_readable,
    dataset_is_readable,
    revisions_exist,
    outputs_are_free,
    outputs_are_writable,
]
AT = place(GOOD, "acme/coach-12b")
BASE = hub().base
DATA = hub().dataset
BASE_AT = place(GOOD, "google/gemma-3-12b-it")
DATA_AT = place(GOOD, "acme/coach\n")
GATED = no(Access.GATED, "403 gated")
TERMS = "accept its terms at `https://hub.example/google/gemma-3-12b-it` with the account `alice`"


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule) is None, "offline: the Hub was not asked"
    assert run(rule, hub=hub()) is None
    assert run(rule, hub=hub(base=None, dataset=None, outputs=outputs(OutputState.OURS, YES))) is None
    assert run(rule, hub=hub(outputs=outputs(OutputState.EMPTY, YES))) is None


def test_bad_silence_is_told_once_and_is_no_absence() -> None:
    silent = Probe(Access.UNREACHABLE, "no answer within 30 s")
    facts = hub(
        base=SourceFacts("google/gemma-3-12b-it", None, silent),
        dataset=SourceFacts("acme/coach", None, silent),
        jobs=silent,
        outputs=outputs(OutputState.UNKNOWN, silent),
    )
    finding = run(hub_answers, hub=facts)
    said = "could not ask the Hub at `https://hub.example` about `google/gemma-3-12b-it`, `acme/coach`, jobs in `acme`"
    expect(finding, said, "run `mergetune check --online", AT)
    assert finding.severity is Severity.ERROR
    assert finding.message.endswith(": no answer within 30 s")
    assert [rule.__name__ for rule in RULES if run(rule, hub=facts)] == ["hub_answers"]


def test_bad_jobs_refused() -> None:
    refused = no(Access.FORBIDDEN, "403 missing permissions: job.write.")
    finding = run(jobs_are_allowed, hub=hub(jobs=refused))
    expect(finding, "start jobs in the organisation `acme`: 403 missing permissions: job.write.", "make a fine", AT)
    assert run(jobs_are_allowed, hub=hub(jobs=refused, token=token(TokenKind.READ))) is None, "one cause, one finding"
    assert run(jobs_are_allowed, hub=hub(jobs=refused, token=scoped())) is None


@pytest.mark.parametrize(
    ("who", "hint"),
    [
        (token(), TERMS),
        (scoped(("org", "acme", {"repo.write", "job.write"})), TERMS),
        (
            replace(scoped(), can_read_gated=False),
            f"{TERMS}, and enable access to public gated repositories for the token at",
        ),
    ],
)
def test_bad_gated_base(who, hint) -> None:
    finding = run(base_is_readable, hub=hub(token=who, base=replace(BASE, probe=GATED)))
    expect(finding, "`google/gemma-3-12b-it` is gated, and the token of `alice` may not read it", hint, BASE_AT)
    assert ("enable" in finding.hint) == ("enable" in hint)
    assert finding.severity is Severity.ERROR


@pytest.mark.parametrize("access", [Access.GATED, Access.MISSING])
def test_without_a_token_a_reviewer_is_warned(access) -> None:
    nobody = TokenFacts(TokenKind.NONE, no(Access.UNAUTHORIZED))
    finding = run(base_is_readable, hub=hub(token=nobody, base=replace(BASE, probe=no(access)), launches=False))
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("access", "said", "hint"),
    [
        (Access.MISSING, "is not on the Hub, or is private and not shown to this token", "correct `{}`"),
        (Access.FORBIDDEN, "the Hub refuses to show `{}`: 403 no", "with the account `alice`"),
    ],
)
def test_bad_sources(access, said, hint) -> None:
    base = hub(base=replace(BASE, probe=no(access)))
    expect(run(base_is_readable, hub=base), said.format(BASE.repo), hint.format("base.model"), BASE_AT)
    data = hub(dataset=replace(DATA, probe=no(access)))
    finding = run(dataset_is_readable, hub=data)
    expect(finding, said.format(DATA.repo), hint.format("data.dataset"), DATA_AT)
    assert "https://hub.example/datasets/acme/coach" in finding.hint


def test_bad_private_source_hidden_from_a_fine_grained_token() -> None:
    who = scoped(("org", "acme", {"repo.write", "job.write"}))
    finding = run(dataset_is_readable, hub=hub(token=who, dataset=replace(DATA, probe=no(Access.MISSING))))
    expect(finding, "`acme/coach` is not on the Hub, or", "give the token `repo.content.read` on `acme` at", DATA_AT)


def test_bad_revision() -> None:
    gone = no(Access.NO_REVISION, "404 Invalid rev id")
    finding = run(revisions_exist, hub=hub(base=replace(BASE, probe=gone, head="c0ffee")))
    at = place(GOOD, "96b6f1e")
    expect(finding, "`96b6f1e` is no commit, branch or tag of `google/g", "write `revision: c0ffee`, its newest", at)
    finding = run(revisions_exist, hub=hub(dataset=replace(DATA, probe=gone)))
    expect(finding, "`5d2` is no commit, branch or tag of `acme/coach`", "remove `data.revision`", place(GOOD, "5d2"))
    assert run(base_is_readable, hub=hub(base=replace(BASE, probe=gone))) is None


def test_bad_somebody_elses_output() -> None:
    taken = (OutputFacts("acme/coach-12b-GGUF", OutputState.FOREIGN, YES),)
    finding = run(outputs_are_free, hub=hub(outputs=taken))
    expect(finding, "`acme/coach-12b-GGUF` exists and nothing in it comes from a run", "such as `repo: acme/coach`", AT)
    assert run(outputs_are_writable, hub=hub(outputs=taken)) is None


@pytest.mark.parametrize("state", [OutputState.OURS, OutputState.EMPTY, OutputState.NO_ACCESS])
def test_bad_output_not_writable(state) -> None:
    refused = outputs(state, no(Access.FORBIDDEN, "403 Forbidden"))
    finding = run(outputs_are_writable, hub=hub(outputs=refused))
    said = "`acme/coach-12b-adapter` exists and the token may not write it: 403 Forbidden"
    expect(finding, said, "give the token `repo.write` on the organisation `acme`", AT)
    assert run(outputs_are_writable, hub=hub(outputs=refused, token=token(TokenKind.READ))) is None
