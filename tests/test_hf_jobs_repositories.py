"""The adapter to Hugging Face Jobs: every call about repositories, by the real client against the loopback Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from job_scene import FOLDER, TOKEN, claimed_hub, jobs_of, refused
from servers.hub import LoopbackHub
from servers.hub_faults import lose_response, status

from pipeline.hub_facts import Access
from pipeline.remote import NOBODY, Claim, StageView, Winner, as_json


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with claimed_hub(tmp_path, monkeypatch) as hub:
        yield hub


def test_a_view(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    assert remote.view("acme/none", FOLDER) == StageView()
    claim = Claim(2, 100.0, "me", 1, "j1")
    files = {"claim.json": claim.as_bytes(), "winner.json": as_json({"attempt": 1, "job_id": NOBODY})}
    files |= {"manifest.json": b'{"run_id": "r"}', "run.json": b"[1]", "train_sft.py": b"pass"}
    head = remote.commit(
        "acme/tiny-adapter",
        hub.head("acme/tiny-adapter"),
        "All of it",
        {f"{FOLDER}/{n}": content for n, content in files.items()},
    )
    view = remote.view("acme/tiny-adapter", FOLDER)
    assert (view.head, view.claim, view.winner) == (head, claim, Winner(1, NOBODY))
    assert (view.manifest, view.request, view.attempt) == ({"run_id": "r"}, {}, 2)
    assert remote.view("acme/tiny-adapter", ".mergetune/other/train") == StageView(head)


def test_views_that_are_refused(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    hub.add_repo("mallory/secret", {"a": b""}, private=True)
    assert remote.view("mallory/secret", FOLDER) == StageView()  # the Hub says no more of it
    hub.add_repo("mallory/gated", {f"{FOLDER}/claim.json": b"{}"}, gated=True)
    assert refused(remote.view, "mallory/gated", FOLDER).access is Access.GATED
    hub.faults.add(method="GET", path="/api/models/", action=status(503), times=60)
    assert refused(remote.view, "acme/tiny-adapter", FOLDER).access is Access.UNREACHABLE
    hub.faults.clear()
    hub.revoke(TOKEN)
    assert refused(remote.view, "acme/tiny-adapter", FOLDER).access is Access.UNAUTHORIZED


def test_repositories_are_made_once_and_private(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    remote.create_repo("acme/new", private=True)
    remote.create_repo("acme/new", private=True)
    remote.create_repo("acme/open", private=False)
    assert {("model", "acme/new", "private"), ("model", "acme/open", "public")} < set(hub.repos())
    assert refused(remote.create_repo, "mallory/new", True).access is Access.FORBIDDEN


def test_a_commit_on_a_head_that_has_moved(hub: LoopbackHub) -> None:
    remote, parent = jobs_of(hub), hub.head("acme/tiny-adapter")
    first = remote.commit("acme/tiny-adapter", parent, "One", {"a": b"1"})
    assert hub.head("acme/tiny-adapter") == first
    assert refused(remote.commit, "acme/tiny-adapter", parent, "Two", {"a": b"2"}).access is Access.MOVED
    assert hub.files("acme/tiny-adapter")["a"] == b"1"


def test_a_commit_takes_files_from_disk(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "rows.bin").write_bytes(b"\0" * 100)
    remote, parent = jobs_of(hub), hub.head("acme/tiny-adapter")
    remote.commit("acme/tiny-adapter", parent, "One", {"rows.bin": tmp_path / "rows.bin"})
    assert hub.files("acme/tiny-adapter")["rows.bin"] == b"\0" * 100


def test_a_commit_whose_answer_was_lost_is_not_sent_again(hub: LoopbackHub) -> None:
    remote, parent = jobs_of(hub), hub.head("acme/tiny-adapter")
    hub.faults.add(method="POST", path="/commit/", action=lose_response())
    assert refused(remote.commit, "acme/tiny-adapter", parent, "One", {"a": b"1"}).access is Access.UNREACHABLE
    assert [title for _, title, _ in hub.history("acme/tiny-adapter")] == ["One", "initial commit"]


def test_revisions(hub: LoopbackHub) -> None:
    remote = jobs_of(hub)
    assert remote.resolve("acme/tiny-adapter", "model", None) == hub.head("acme/tiny-adapter")
    assert remote.resolve("acme/tiny-adapter", "model", "main") == hub.head("acme/tiny-adapter")
    assert refused(remote.resolve, "acme/tiny-adapter", "model", "v9").access is Access.NO_REVISION
    assert refused(remote.resolve, "acme/none", "dataset", None).access is Access.MISSING
