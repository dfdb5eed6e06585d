"""The Hub through the real client against the loopback Hub: every token, every answer, every kind of outage."""

import logging
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.constants
import pytest
from examples import GOOD, changed
from hub_worlds import BOTH, REPOS
from huggingface_hub import CommitOperationAdd, close_session
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import hf_raise_for_status
from servers import hub_faults
from servers.hub import LoopbackHub

from pipeline.errors import Finding, Severity
from pipeline.facts import Facts
from pipeline.hub import Hub, open_hub
from pipeline.hub_facts import Access, HubError, HubFacts, OutputState, TokenKind, planned_repos
from pipeline.hub_look import Interview, fetch_hub_facts
from pipeline.hub_token import read_token
from pipeline.loader import parse_experiment
from pipeline.rules import Rule, Subject, online, token
from pipeline.settings import Settings

pytestmark = pytest.mark.slow

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECRET = "hf_" + "A1b2C3d4" * 4
OAUTH = "hf_oauth_eyJhbGciOiJIUzI1NiJ9.eyJzY29wZSI6ImpvYnMifQ.c2ln"
RULES = [rule for module in (token, online) for rule in vars(module).values() if getattr(rule, "__doc__", None)]
RULES = [rule for rule in RULES if callable(rule) and "\n    Fix:" in (rule.__doc__ or "")]
BASE, DATA = "google/gemma-3-12b-it", "acme/coach"


@pytest.fixture(autouse=True)
def online_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client may ask (127.0.0.1 only) and keeps no connection for the next test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    """acme with its member alice and a dataset, a public base, and somebody else's namespace."""
    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "write"})
        hub.add_user("mallory")
        hub.add_repo(BASE, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"0" * 100})
        hub.add_repo(DATA, {"data/train.jsonl": b'{"text": "a"}\n'}, kind="dataset", private=True)
        yield hub


def opened(server: LoopbackHub, secret: str | None = SECRET, timeout_s: float = 5.0) -> Hub:
    return open_hub(server.url, secret, timeout_s=timeout_s, sleep=lambda _: None)


def text(server: LoopbackHub) -> str:
    """The good experiment, pinned to what the loopback Hub has."""
    pinned = changed("96b6f1e", server.head(BASE))
    return changed("revision: 5d2", f"revision: {server.head(DATA, 'dataset')}", pinned)


def look(server: LoopbackHub, secret: str | None = SECRET, *, timeout_s: float = 5.0, **given: bool) -> HubFacts:
    experiment = parse_experiment(text(server)).experiment
    return fetch_hub_facts(experiment, REPOS, Interview(opened(server, secret, timeout_s)), NOW, **given)


def found(facts: HubFacts) -> dict[str, Finding]:
    """Every rule's finding by the rule's name."""
    subject = Subject(parse_experiment(GOOD), Facts(hub=facts), Settings())
    findings = {rule.__name__: Rule("HUB000", rule).run(subject) for rule in RULES}
    return {name: finding for name, finding in findings.items() if finding is not None}


def test_there_are_rules() -> None:
    assert len(RULES) == 15


def test_planned_repositories() -> None:
    full = changed("method: qlora", "method: full", changed("^(merge|  lora): .*\n", "", changed("^  lora: .*\n", "")))
    for text, repos in (
        (GOOD, REPOS),
        (changed("^(gguf|evaluate): .*\n", "", changed("^gguf: .*\n", "")), REPOS[:2]),
        (full, REPOS[1:]),
        (re.sub("(?m)^(merge|gguf|evaluate): .*\n", "", GOOD), REPOS[:1]),
    ):
        assert planned_repos(parse_experiment(text).experiment) == repos


@pytest.mark.parametrize(
    ("who", "kind", "ends"),
    [
        ({"name": "alice"}, TokenKind.UNKNOWN, None),
        ({"name": "alice", "auth": {"type": "app_token"}, "orgs": None}, TokenKind.UNKNOWN, None),
        ({"name": "alice", "auth": {"type": "access_token", "accessToken": {"role": "god"}}}, TokenKind.UNKNOWN, None),
        ({"name": "alice", "auth": {"type": "oauth", "expiresAt": "2026-11-23T00:00:00.000Z"}}, TokenKind.OAUTH, 23),
        ({"name": "alice", "auth": {"accessToken": {"role": "write"}, "expiresAt": "soon"}}, TokenKind.WRITE, None),
        ({"name": "alice", "auth": {"accessToken": {"role": "read"}, "expiresAt": "2026-11-24"}}, TokenKind.READ, 24),
    ],
)
def test_shapes_of_whoami(who: dict[str, Any], kind: TokenKind, ends: int | None) -> None:
    facts = read_token(who, SECRET)
    assert facts.kind is kind
    assert (facts.expires_at.day if facts.expires_at else None) == ends
    assert facts.expires_at is None or facts.expires_at.tzinfo is not None


def test_a_write_token_on_a_hub_where_all_is_well(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice", "write")
    facts = look(server)
    assert found(facts) == {}
    assert facts.token.kind is TokenKind.WRITE
    assert (facts.token.user, dict(facts.token.orgs)) == ("alice", {"acme": "write"})
    assert facts.base.sha == server.head(BASE)
    assert facts.dataset.sha == server.head(DATA, "dataset")
    assert [output.state for output in facts.outputs] == [OutputState.ABSENT] * 3
    assert not {request.method for request in server.requests} - {"GET", "HEAD", "POST"}
    assert all(request.path.endswith("/auth-check/write") for request in server.requests if request.method == "POST")
    assert len(server.repos()) == 2, "a check makes nothing"


def test_a_fine_grained_token_with_its_two_permissions(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice", "fineGrained", scoped={"acme": [*BOTH, "repo.content.read"]})
    facts = look(server)
    assert found(facts) == {}
    assert facts.token.kind is TokenKind.FINE_GRAINED
    assert facts.token.may("job.write", "Acme")
    assert facts.token.can_read_gated is False


@pytest.mark.parametrize(
    ("role", "scoped", "rule", "said"),
    [
        ("read", None, "token_writes", "role `read`"),
        ("oauth", None, "token_is_personal", "it expires at 2027-01-05 10:00 UTC"),
        ("fineGrained", {"alice": [*BOTH], "acme": ["repo.content.read"]}, "token_reaches_namespace", "some on user"),
        ("fineGrained", {"acme": ["repo.write"]}, "token_reaches_namespace", "no `job.write` on the organisation"),
        ("fineGrained", {"acme": ["job.write", "repo.content.read"]}, "token_reaches_namespace", "no `repo.write` on"),
    ],
)
def test_a_token_that_cannot_launch(server: LoopbackHub, role: str, scoped, rule: str, said: str) -> None:
    secret = OAUTH if role == "oauth" else SECRET
    server.add_token(secret, "alice", role, scoped=scoped)
    facts = look(server, secret)
    assert list(found(facts)) == [rule]
    assert said in found(facts)[rule].message


def test_a_stranger(server: LoopbackHub) -> None:
    server.add_token(SECRET, "mallory", "write")
    assert list(found(look(server))) == ["account_may_write", "dataset_is_readable"]


@pytest.mark.parametrize("secret", ["$HF_TOKEN", "${HF_TOKEN}", "${{ secrets.HF_TOKEN }}", "hf_xxx", "<token>", "a b"])
def test_a_placeholder_is_never_sent(server: LoopbackHub, secret: str) -> None:
    assert list(found(look(server, secret))) == ["token_is_a_value"]
    assert server.requests == []


@pytest.mark.parametrize("secret", [None, "", " \n"])
def test_no_token(server: LoopbackHub, secret: str | None) -> None:
    assert list(found(look(server, secret))) == ["token_is_there"]
    assert server.requests == []


def test_a_revoked_token_ends_the_look(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    server.revoke(SECRET)
    facts = look(server)
    assert list(found(facts)) == ["token_is_accepted"]
    assert len(server.requests) == 1


def test_a_reviewer_reads_and_is_not_asked_to_write(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice", "read")
    assert found(look(server, launches=False)) == {}
    anonymous = found(look(server, None, launches=False))
    assert {name: finding.severity for name, finding in anonymous.items()} == {"dataset_is_readable": Severity.WARNING}
    assert {request.method for request in server.requests} == {"GET"}


def test_gated_base(server: LoopbackHub) -> None:
    server.delete_repo(BASE)
    server.add_repo(BASE, {"config.json": b"{}"}, gated=True)
    server.add_token(SECRET, "alice", "fineGrained", scoped={"acme": [*BOTH, "repo.content.read"]})
    findings = found(look(server))
    assert list(findings) == ["base_is_readable"]
    assert (
        f"accept its terms at `{server.url}/{BASE}` with the account `alice`, and enable"
        in findings["base_is_readable"].hint
    )
    server.grant_gated("alice", BASE)
    assert list(found(look(server))) == ["base_is_readable"], "the token, not the account, lacks it now"
    server.add_token(SECRET, "alice", "fineGrained", scoped={"acme": [*BOTH, "repo.content.read"]}, can_read_gated=True)
    assert found(look(server)) == {}


def test_a_token_without_the_right_to_gated_repositories(server: LoopbackHub) -> None:
    """The Hub's own words for it come as a plain 403 without an error code."""
    server.add_token(SECRET, "alice", "fineGrained", scoped={"acme": [*BOTH, "repo.content.read"]})
    said = '{"error": "Please enable access to public gated repositories in your fine-grained token settings."}'
    server.faults.add(method="GET", path=f"{BASE}/auth-check", action=hub_faults.status(403, said))
    facts = look(server)
    assert facts.base.probe.access is Access.GATED
    assert "enable access to public gated repositories for the token" in found(facts)["base_is_readable"].hint


def test_missing_sources(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    experiment = parse_experiment(text(server)).experiment
    server.delete_repo(BASE)
    server.delete_repo(DATA, "dataset")
    facts = fetch_hub_facts(experiment, REPOS, Interview(opened(server)), NOW)
    assert list(found(facts)) == ["base_is_readable", "dataset_is_readable"]


def test_a_revision_that_is_not_there(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    facts = fetch_hub_facts(parse_experiment(GOOD).experiment, REPOS, Interview(opened(server)), NOW)
    assert facts.base.probe.access is Access.NO_REVISION
    assert f"write `revision: {server.head(BASE)}`" in found(facts)["revisions_exist"].hint


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({".gitattributes": b"", "README.md": b"# Mine"}, OutputState.EMPTY),
        ({".mergetune/coach-0123abcd/train/claim.json": b"{}", "x.bin": b"1"}, OutputState.OURS),
        ({"manifest.json": b'{"experiment": "coach"}', "x.bin": b"1"}, OutputState.OURS),
        ({"manifest.json": b'{"experiment": "other"}'}, OutputState.FOREIGN),
        ({"manifest.json": b"not JSON"}, OutputState.FOREIGN),
        ({"model.safetensors": b"1"}, OutputState.FOREIGN),
    ],
)
def test_whose_an_output_is(server: LoopbackHub, files: dict[str, bytes], state: OutputState) -> None:
    server.add_token(SECRET, "alice")
    server.add_repo("acme/coach-12b", files, private=True)
    facts = look(server)
    assert [output.state for output in facts.outputs] == [OutputState.ABSENT, state, OutputState.ABSENT]
    assert facts.outputs[1].write.access is Access.READABLE
    assert list(found(facts)) == (["outputs_are_free"] if state is OutputState.FOREIGN else [])


def test_an_output_that_may_be_seen_and_not_written(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice", "fineGrained", scoped={"acme": ["job.write", "repo.content.read"]})
    server.add_repo("acme/coach-12b", {".gitattributes": b""}, private=True)
    facts = look(server)
    assert facts.outputs[1].write.access is Access.FORBIDDEN
    assert list(found(facts)) == ["token_reaches_namespace"], "one cause, one finding"


QUESTIONS = {
    "token": ("GET", "whoami"),
    "base": ("GET", f"/api/models/{BASE}/auth-check"),
    "base commit": ("GET", f"/api/models/{BASE}/revision"),
    "dataset": ("GET", f"/api/datasets/{DATA}/auth-check"),
    "jobs": ("POST", "/api/jobs/acme/auth-check/write"),
    "output": ("GET", "/api/models/acme/coach-12b$|/api/models/acme/coach-12b\\?"),
    "output write": ("GET", "/api/models/acme/coach-12b/auth-check/write"),
}
OUTAGES = {
    "500": hub_faults.status(500),
    "503 HTML": hub_faults.status(503, "<html>down</html>"),
    "429": hub_faults.status(429, "slow down"),
    "404 of a proxy": hub_faults.status(404, "no such page"),
    "200 of a portal": hub_faults.status(200, "<html>log in to this network</html>"),
    "200 of nothing": hub_faults.status(200, "[]"),
    "closed": hub_faults.drop(),
    "lost": hub_faults.lose_response(),
    "cut": hub_faults.truncate_list(cut_body=True),
}
# A check whose answer is a bare 200 is answered by any 200: what it says is not in its body.
BODYLESS = {"base", "dataset", "jobs", "output write"}


OUTAGE_CASES = [
    (question, outage)
    for question in QUESTIONS
    for outage in OUTAGES
    if not (question in BODYLESS and outage.startswith("200"))
    # So the Hub answers for a namespace that is not there: refused, and never taken for a yes.
    and (question, outage) != ("jobs", "404 of a proxy")
]


@pytest.mark.parametrize(("question", "outage"), OUTAGE_CASES)
def test_an_outage_is_no_answer(server: LoopbackHub, question: str, outage: str) -> None:
    server.add_token(SECRET, "alice")
    server.add_repo("acme/coach-12b", {".mergetune/x/claim.json": b"{}"}, private=True)
    method, path = QUESTIONS[question]
    server.faults.add(method=method, path=path, times=99, action=OUTAGES[outage])
    facts = look(server)
    assert list(found(facts)) == ["hub_answers"], facts
    assert SECRET not in repr(facts)
    assert sum(path.rstrip("$") in request.path for request in server.requests) <= 4


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_hang_is_no_answer_and_ends_the_look(server: LoopbackHub, question: str) -> None:
    server.add_token(SECRET, "alice")
    server.add_repo("acme/coach-12b", {".mergetune/x/claim.json": b"{}"}, private=True)
    method, path = QUESTIONS[question]
    server.faults.add(method=method, path=path, times=99, action=hub_faults.hang())
    findings = found(look(server, timeout_s=0.15))
    assert list(findings) == ["hub_answers"]
    assert "no answer within 0.15 s" in findings["hub_answers"].message


def test_after_a_silence_nothing_more_is_asked(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    server.faults.add(method="GET", path=f"{BASE}/auth-check", times=99, action=hub_faults.status(503))
    facts = look(server)
    asked = [request.path for request in server.requests]
    assert asked == ["/api/whoami-v2", *[f"/api/models/{BASE}/auth-check"] * 3]
    assert {output.state for output in facts.outputs} == {OutputState.UNKNOWN}


def test_an_outage_while_a_manifest_is_read(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    server.add_repo("acme/coach-12b", {"manifest.json": b'{"experiment": "coach"}'}, private=True)
    server.faults.add(method="GET", path="manifest.json", times=99, action=hub_faults.status(503))
    facts = look(server)
    assert facts.outputs[1].state is OutputState.UNKNOWN
    assert list(found(facts)) == ["hub_answers"]


def test_many_experiments_ask_once(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    experiment = parse_experiment(text(server)).experiment
    interview = Interview(opened(server))
    first = fetch_hub_facts(experiment, REPOS, interview, NOW)
    asked = len(server.requests)
    assert asked == 9
    assert fetch_hub_facts(experiment, REPOS, interview, NOW) == first
    assert len(server.requests) == asked


def test_a_moments_fault_is_asked_again(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    server.faults.add(method="GET", path="whoami", times=2, action=hub_faults.status(502))
    waits: list[float] = []
    hub = open_hub(server.url, SECRET, timeout_s=5, sleep=waits.append)
    assert hub.token_facts().user == "alice"
    assert waits == [1.0, 2.0]


def test_a_bare_401_is_not_absence() -> None:
    """The client raises RepositoryNotFoundError for it, on https only, whoever answered."""
    request = httpx2.Request("GET", "https://hub.example/api/models/acme/coach-12b")
    hub = open_hub("https://hub.example", SECRET, sleep=lambda _: None)
    for headers, access in (({}, Access.UNAUTHORIZED), ({"X-Error-Code": "RepoNotFound"}, Access.MISSING)):
        response = httpx2.Response(401, headers=headers, request=request)
        with pytest.raises(RepositoryNotFoundError):
            hf_raise_for_status(response)
        with pytest.raises(HubError) as caught:
            hub.ask(lambda response=response: hf_raise_for_status(response))
        assert caught.value.access is access


def test_connection_refused_and_offline_mode(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    experiment = parse_experiment(GOOD).experiment
    hub = open_hub(endpoint, SECRET, timeout_s=1, sleep=lambda _: None)
    assert list(found(fetch_hub_facts(experiment, REPOS, Interview(hub), NOW))) == ["hub_answers"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    finding = found(look(server))["hub_answers"]
    assert "`HF_HUB_OFFLINE` is set" in finding.message
    assert server.requests == []


@pytest.mark.parametrize("secret", [SECRET, OAUTH, "a-token.of-no-known_shape"])
@pytest.mark.parametrize("echo", ["{}", "Bearer {}", "bad token {} for alice"])
def test_a_token_is_in_no_finding_log_or_exception(
    server: LoopbackHub, secret: str, echo: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where a server answers with the token it was sent."""
    caplog.set_level(logging.INFO)
    server.add_token(secret, "alice")
    seen = []
    for status in (401, 403, 418, 500):
        server.faults.clear()
        for method in ("GET", "POST"):
            server.faults.add(method=method, path="", times=99, action=hub_faults.status(status, echo.format(secret)))
        facts = look(server, secret)
        hub = opened(server, secret)
        with pytest.raises(HubError) as caught:
            hub.may_write("acme/coach-12b")
        assert caught.value.__cause__ is None
        seen += [repr(facts), repr(hub), str(caught.value), repr(caught.value)]
        seen += [f"{finding.as_text()} {finding}" for finding in found(facts).values()]
    assert secret not in "".join(seen) + caplog.text
    assert "<token>" in "".join(seen)


def test_no_log_shows_the_header_of_a_request(server: LoopbackHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.add_token(SECRET, "alice")
    look(server)
    assert len(caplog.records) > 20
    assert SECRET not in caplog.text


def test_repositories_and_commits(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    hub = opened(server)
    assert hub.create("acme/new") is True
    assert hub.create("acme/new") is False
    assert [visibility for *_, visibility in server.repos() if "acme/new" in _] == ["private"]
    head = hub.resolve("acme/new", "model", None)
    add = [CommitOperationAdd("a.txt", b"one")]
    sha = hub.commit("acme/new", add, "Claim", head)
    assert sha == server.head("acme/new")
    with pytest.raises(HubError) as lost:
        hub.commit("acme/new", [CommitOperationAdd("a.txt", b"two")], "Claim", head)
    assert lost.value.access is Access.MOVED
    assert hub.read("acme/new", "model", "a.txt", sha, 10) == b"one"
    assert hub.files("acme/new", "model", sha)["a.txt"] == 3
    for path, limit, access in (("b.txt", 10, Access.NO_FILE), ("a.txt", 2, Access.REFUSED)):
        with pytest.raises(HubError) as refused:
            hub.read("acme/new", "model", path, sha, limit)
        assert refused.value.access is access


def test_a_commit_whose_answer_was_lost_is_not_repeated(server: LoopbackHub) -> None:
    server.add_token(SECRET, "alice")
    hub = opened(server)
    hub.create("acme/new")
    head = hub.resolve("acme/new", "model", None)
    server.faults.add(method="POST", path="/commit/", times=1, action=hub_faults.lose_response())
    with pytest.raises(HubError) as lost:
        hub.commit("acme/new", [CommitOperationAdd("a.txt", b"one")], "Claim", head)
    assert lost.value.access is Access.UNREACHABLE
    assert server.head("acme/new") != head
    assert len(server.history("acme/new")) == 2


def test_no_stored_login_answers(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.add_token(SECRET, "alice")
    with pytest.raises(HubError):
        opened(server, None).may_read(DATA, "dataset")
    assert {request.user for request in server.requests} == {None}
