"""The loopback Hub's accounts and repositories, driven by the real client."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from servers.hub import LoopbackHub
from servers.hub_scene import OAUTH, READ, SCOPED, STRANGER, WRITE, client, populated_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with populated_hub(tmp_path, monkeypatch) as hub:
        yield hub


def put(path: str, content: bytes = b"{}") -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


def refused(call, *args, **kwargs) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value.response.status_code


# Accounts.


def test_whoami_tells_the_four_shapes_of_token(hub):
    answers = {token: client(hub, token).whoami() for token in (WRITE, READ, SCOPED, OAUTH)}
    roles = {token: answer["auth"].get("accessToken", {}).get("role") for token, answer in answers.items()}
    assert roles == {WRITE: "write", READ: "read", SCOPED: "fineGrained", OAUTH: None}
    fine = answers[SCOPED]["auth"]["accessToken"]["fineGrained"]
    assert [(s["entity"]["type"], s["entity"]["name"], s["permissions"]) for s in fine["scoped"]] == [
        ("org", "acme", ["repo.write", "job.write"])
    ]
    assert answers[WRITE]["orgs"][0]["roleInOrg"] == "admin"


def test_a_revoked_token_is_refused_everywhere(hub):
    hub.add_repo("acme/open", {"a": b""})
    hub.revoke(WRITE)
    assert refused(client(hub).whoami) == 401
    assert refused(client(hub).model_info, "acme/open") == 401


def test_the_record_of_requests_holds_no_token(hub):
    client(hub).run_job(
        image="python", command=["true"], namespace="acme", flavor="cpu-basic", secrets={"HF_TOKEN": WRITE}
    )
    assert hub.requests[-1].user == "alice"
    assert b"HF_TOKEN" in hub.requests[-1].body
    assert WRITE not in repr(hub.requests) and WRITE not in repr(hub.jobs)


# Creating and committing.


def test_create_repo_starts_with_the_hubs_own_commit(hub):
    client(hub).create_repo("acme/new", private=True)
    assert hub.repos() == [("model", "acme/new", "private")]
    assert [title for _, title, _ in hub.history("acme/new")] == ["initial commit"]
    assert list(hub.files("acme/new")) == [".gitattributes"]
    assert refused(client(hub).create_repo, "acme/new") == 409
    client(hub).create_repo("acme/new", exist_ok=True)


@pytest.mark.parametrize(
    ("token", "repo_id"), [(READ, "acme/x"), (STRANGER, "acme/x"), (SCOPED, "alice/x"), (WRITE, "other/x")]
)
def test_create_repo_needs_the_right(hub, token, repo_id):
    assert refused(client(hub, token).create_repo, repo_id) == 403
    assert hub.repos() == []


def test_a_commit_on_a_stale_parent_loses(hub):
    first = hub.add_repo("acme/m", {"a": b"1"})
    won = client(hub).create_commit("acme/m", put("claim.json"), commit_message="claim", parent_commit=first)
    assert hub.head("acme/m") == won.oid
    lost = refused(client(hub).create_commit, "acme/m", put("b"), commit_message="late", parent_commit=first)
    assert lost == 412
    assert hub.history("acme/m") == [(won.oid, "claim", "alice"), (first, "initial commit", "acme")]


def test_of_many_racing_commits_one_wins(hub):
    first = hub.add_repo("acme/m", {})
    outcomes: list[int] = []

    def claim(number: int) -> None:
        try:
            client(hub).create_commit("acme/m", put(f"{number}"), commit_message="claim", parent_commit=first)
            outcomes.append(200)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == [200, 412, 412, 412, 412, 412]
    assert len(hub.history("acme/m")) == 2


def test_a_commit_adds_and_deletes_files_and_folders(hub):
    hub.add_repo("acme/m", {"a": b"1", "old/x": b"1", "old/y": b"2", "keep": b"3"})
    operations = [*put("new/file", b"n"), CommitOperationDelete("a"), CommitOperationDelete("old/")]
    client(hub).create_commit("acme/m", operations, commit_message="tidy")
    assert hub.files("acme/m") == {"keep": b"3", "new/file": b"n"}
    with pytest.raises(RemoteEntryNotFoundError, match="file with this name doesn't exist"):
        client(hub).create_commit("acme/m", [CommitOperationDelete("gone")], commit_message="again")


def test_an_unchanged_file_makes_no_commit(hub):
    sha = hub.add_repo("acme/m", {"a": b"1", "w.bin": b"\0" * 9})
    operations = [CommitOperationAdd("a", b"1"), CommitOperationAdd("w.bin", b"\0" * 9)]
    assert client(hub).create_commit("acme/m", operations, commit_message="same").oid == sha


@pytest.mark.parametrize("token", [READ, STRANGER, SCOPED])
def test_a_commit_needs_the_right(hub, token):
    hub.add_repo("alice/m", {"a": b"1"})
    assert refused(client(hub, token).create_commit, "alice/m", put("b"), commit_message="no") == 403
    assert refused(client(hub, token).auth_check, "alice/m", write=True) == 403


def test_a_token_for_one_repo_writes_that_repo_and_creates_none(hub):
    hub.add_repo("acme/m", {}, private=True)
    hub.add_token("hf_one", "alice", "fineGrained", {"acme/m": ["repo.write"]})
    one = client(hub, "hf_one")
    one.create_commit("acme/m", put("a"), commit_message="mine")
    assert refused(one.create_repo, "acme/n") == 403
    assert one.whoami()["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["type"] == "model"


def test_a_member_who_may_only_read_sees_private_repos_and_writes_none(hub):
    hub.add_user("carol", orgs={"acme": "read"})
    hub.add_token("hf_carol", "carol")
    hub.add_repo("acme/m", {"a": b"1"}, private=True)
    client(hub, "hf_carol").auth_check("acme/m")
    assert refused(client(hub, "hf_carol").create_commit, "acme/m", put("b"), commit_message="no") == 403


# Private and gated.


def test_a_private_repo_does_not_exist_for_others(hub):
    hub.add_repo("acme/secret", {"a": b"1"}, private=True)
    for token in (False, STRANGER):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info("acme/secret")
        assert list(client(hub, token).list_models()) == []
    for token in (WRITE, READ, SCOPED):
        assert client(hub, token).model_info("acme/secret").private


def test_a_gated_repo_shows_its_facts_but_not_its_files(hub, tmp_path):
    hub.add_repo("acme/gated", {"config.json": b"{}"}, gated=True)
    stranger: HfApi = client(hub, STRANGER)
    assert stranger.model_info("acme/gated").gated == "manual"
    assert stranger.list_repo_files("acme/gated") == ["config.json"]
    for api in (stranger, client(hub, False)):
        with pytest.raises(GatedRepoError):
            api.auth_check("acme/gated")
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("acme/gated", "config.json", cache_dir=tmp_path)
    hub.grant_gated("bob", "acme/gated")
    stranger.auth_check("acme/gated")
    stranger.hf_hub_download("acme/gated", "config.json", cache_dir=tmp_path)


def test_a_scoped_token_needs_its_own_right_to_gated_files(hub):
    hub.add_repo("meta/base", {"config.json": b"{}"}, gated=True)
    hub.grant_gated("alice", "meta/base")
    client(hub).auth_check("meta/base")
    with pytest.raises(GatedRepoError):
        client(hub, SCOPED).auth_check("meta/base")
    hub.add_token("hf_gate", "alice", "fineGrained", {"acme": ["repo.write"]}, can_read_gated=True)
    client(hub, "hf_gate").auth_check("meta/base")
