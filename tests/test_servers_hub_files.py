"""Files of the loopback Hub, large and small, sent and fetched by the real client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from servers.hub import LoopbackHub
from servers.hub_scene import WRITE, client, populated_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with populated_hub(tmp_path, monkeypatch) as hub:
        yield hub


def put(path: str, content: bytes = b"{}") -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


# Large files.


def large_folder(root: Path) -> Path:
    (root / "up" / "sub").mkdir(parents=True)
    (root / "up" / "sub" / "notes.txt").write_text("é" * 400)
    (root / "up" / "README.md").write_text("---\ntags: [mine]\nlibrary_name: peft\n---\nhello\n")
    (root / "up" / "w.safetensors").write_bytes(os.urandom(11 << 20))
    return root / "up"


def test_a_large_file_goes_through_xet_and_comes_back(hub, tmp_path):
    folder = large_folder(tmp_path)
    hub.add_repo("acme/m", {})
    client(hub).upload_folder(repo_id="acme/m", folder_path=folder)
    assert any("/xet-write-token/" in request.path for request in hub.requests)
    copy = Path(client(hub).snapshot_download("acme/m", cache_dir=tmp_path / "cache"))
    for path in ("w.safetensors", "README.md", "sub/notes.txt"):
        assert (copy / path).read_bytes() == (folder / path).read_bytes()
    info = client(hub).model_info("acme/m", files_metadata=True)
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes == {"README.md": (46, False), "sub/notes.txt": (800, False), "w.safetensors": (11 << 20, True)}
    assert (info.tags, info.library_name, info.sha) == (["mine"], "peft", hub.head("acme/m"))


def test_a_large_file_goes_through_lfs_where_xet_is_off(hub, tmp_path):
    folder = large_folder(tmp_path)
    hub.add_repo("acme/m", {})
    code = "import huggingface_hub as h; h.upload_folder(repo_id='acme/m', folder_path='.')"
    # The client reads the switch when it is imported, hence a process of its own.
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=settings, check=True, timeout=30)
    assert [request.method for request in hub.requests if "lfs" in request.path] == ["POST", "PUT", "POST"]
    assert hub.files("acme/m")["w.safetensors"] == (folder / "w.safetensors").read_bytes()


def test_a_pointer_without_content_is_refused(hub):
    hub.add_repo("acme/m", {})
    line = {"key": "lfsFile", "value": {"path": "w.bin", "oid": "0" * 64, "algo": "sha256", "size": 3}}
    body = [{"key": "header", "value": {"summary": "x"}}, line]
    assert raw_commit(hub, body) == 400
    assert raw_commit(hub, [body[0], {"key": "file", "value": {"path": "../up", "content": ""}}]) == 400
    assert len(hub.history("acme/m")) == 1


def raw_commit(hub: LoopbackHub, lines: list[dict]) -> int:
    text = "\n".join(json.dumps(line) for line in lines)
    headers = {"Authorization": f"Bearer {WRITE}"}
    return get_session().post(f"{hub.url}/api/models/acme/m/commit/main", headers=headers, content=text).status_code


# Reading.


def test_a_download_is_pinned_to_its_revision(hub, tmp_path):
    first = hub.add_repo("acme/data", {"rows.jsonl": b"one\n"}, kind="dataset")
    client(hub).create_commit("acme/data", put("rows.jsonl", b"two\n"), commit_message="two", repo_type="dataset")
    for revision, expected in ((first, b"one\n"), ("main", b"two\n")):
        path = client(hub).hf_hub_download(
            "acme/data", "rows.jsonl", repo_type="dataset", revision=revision, cache_dir=tmp_path
        )
        assert Path(path).read_bytes() == expected
    assert client(hub).dataset_info("acme/data", revision=first).sha == first


def test_what_is_not_there_has_its_own_error(hub, tmp_path):
    hub.add_repo("acme/m", {"a": b"1"})
    api = client(hub)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/none")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("acme/m", "a", revision="v9", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("acme/m", "b", cache_dir=tmp_path)
    assert api.file_exists("acme/m", "a") and not api.file_exists("acme/m", "b")
    assert api.repo_exists("acme/m") and not api.repo_exists("acme/m", repo_type="dataset")


def test_ranges_are_served(hub):
    hub.add_repo("acme/m", {"a": b"0123456789"})
    url = f"{hub.url}/acme/m/resolve/main/a"
    for wanted, expected in (("bytes=2-4", b"234"), ("bytes=7-", b"789"), ("bytes=-2", b"89")):
        answer = get_session().get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, expected)
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_trees_come_in_pages(hub):
    hub.add_repo("acme/m", {f"d{n % 3}/f{n}": b"x" for n in range(23)})
    hub.world.page_size = 10
    assert len(client(hub).list_repo_files("acme/m")) == 23
    top = client(hub).list_repo_tree("acme/m")
    assert [entry.path for entry in top] == ["d0", "d1", "d2"]
    below = client(hub).list_repo_tree("acme/m", "d1", expand=True)
    assert [entry.path for entry in below][:2] == ["d1/f1", "d1/f10"]
    assert sum("/tree/main?" in request.path for request in hub.requests) == 4


def test_refs_tags_commits_and_listing(hub):
    sha = hub.add_repo("acme/m", {"README.md": b"---\ntags: [t1]\n---\n"})
    api = client(hub)
    api.create_tag("acme/m", tag="run/1", revision=sha)
    api.create_branch("acme/m", branch="side")
    api.create_commit("acme/m", put("b"), commit_message="on side", revision="side")
    refs = api.list_repo_refs("acme/m")
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("run/1", sha)]
    assert [ref.name for ref in refs.branches] == ["main", "side"]
    assert [c.title for c in api.list_repo_commits("acme/m", revision="side")] == ["on side", "initial commit"]
    assert [p.path for p in api.get_paths_info("acme/m", ["README.md", "none"], revision="run/1")] == ["README.md"]
    assert [m.id for m in api.list_models(author="acme", filter="t1")] == ["acme/m"]
    assert list(api.list_models(author="acme", filter="t2")) == []


def test_settings_and_deletion(hub):
    hub.add_repo("acme/m", {})
    client(hub).update_repo_settings("acme/m", private=True)
    assert hub.repos() == [("model", "acme/m", "private")]
    client(hub).delete_repo("acme/m")
    assert hub.repos() == []
