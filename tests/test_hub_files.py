"""Files of a Hub base and dataset into a cache, where the readers of in-repo ones find them."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session
from servers import hub_faults
from servers.hub import LoopbackHub

from pipeline.dataset import base_files
from pipeline.hub import Hub, open_hub
from pipeline.hub_facts import Access, HubError
from pipeline.hub_files import fetch_base_files, fetch_dataset_files, resolve_revision
from pipeline.workspace import shape_in

SECRET = "hf_" + "A1b2C3d4" * 4
BASE, DATA = "google/gemma", "acme/coach"
ROW = b'{"text": "a"}\n'
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"model": 1}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"x",
    "model.safetensors": b"0" * 1000,
    "script.py": b"print()",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that alice can ask, with a base."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    close_session()
    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "write"})
        hub.add_token(SECRET, "alice", "write")
        hub.add_repo(BASE, FILES)
        yield hub
    close_session()


def opened(server: LoopbackHub) -> Hub:
    return open_hub(server.url, SECRET, timeout_s=5, sleep=lambda _: None)


def test_base_files_lie_where_the_readers_look(server: LoopbackHub, tmp_path: Path) -> None:
    got = fetch_base_files(opened(server), BASE, "main", tmp_path / "cache")
    assert got.probe.access is Access.READABLE
    assert got.sha == got.folder.name == server.head(BASE)
    names = {path.relative_to(got.folder).as_posix() for path in got.files}
    assert names == set(FILES) - {"model.safetensors", "script.py"}
    assert shape_in(got.folder).layers == 16
    assert base_files(got.folder)["tokenizer.json"] == '{"model": 1}'
    before = len(server.requests)
    assert fetch_base_files(opened(server), BASE, got.sha, tmp_path / "cache") == got
    assert len(server.requests) == before + 1, "only its commit is asked for again"


def test_a_gated_base_is_told(server: LoopbackHub, tmp_path: Path) -> None:
    server.add_repo("google/closed", FILES, gated=True)
    got = fetch_base_files(opened(server), "google/closed", None, tmp_path / "cache")
    assert (got.probe.access, got.folder, got.files) == (Access.GATED, None, ())


@pytest.mark.parametrize("fault", [hub_faults.status(503), hub_faults.drop(), hub_faults.truncate_list(cut_body=True)])
@pytest.mark.parametrize("path", ["/revision/", "tokenizer.json"])
def test_half_a_fetch_leaves_nothing(server: LoopbackHub, tmp_path: Path, fault, path: str) -> None:
    server.faults.add(method="GET", path=path, times=99, action=fault)
    got = fetch_base_files(opened(server), BASE, "main", tmp_path / "cache")
    assert (got.probe.access, got.folder) == (Access.UNREACHABLE, None)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    server.faults.clear()
    assert fetch_base_files(opened(server), BASE, "main", tmp_path / "cache").folder is not None


PARQUET = ["data/train-0-of-2.parquet", "data/train-1-of-2.parquet"]
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows/*.jsonl}\n---\n# Rows\n"


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"data/train-0-of-2.parquet": b"1", "data/train-1-of-2.parquet": b"2"}, PARQUET),
        ({"train.jsonl": ROW, "validation.jsonl": ROW, "dataset_infos.json": b"{}"}, ["train.jsonl"]),
        ({"train/a.jsonl": ROW, "pretraining/b.jsonl": ROW}, ["train/a.jsonl"]),
        ({"rows.jsonl": ROW}, ["rows.jsonl"]),
        ({"train.json": ROW}, ["train.jsonl"]),
        ({"README.md": CARD, "rows/a.jsonl": ROW, "old/train.jsonl": ROW}, ["rows/a.jsonl"]),
        ({"README.md": b"# no front matter", "train.jsonl": ROW}, ["train.jsonl"]),
    ],
)
def test_the_files_of_a_split(server: LoopbackHub, tmp_path: Path, files: dict[str, bytes], names: list[str]) -> None:
    server.add_repo(DATA, files, kind="dataset", private=True)
    got = fetch_dataset_files(opened(server), DATA, None, "train", None, tmp_path / "cache")
    assert got.probe.access is Access.READABLE, got.probe
    assert [path.relative_to(got.folder).as_posix() for path in got.files] == names


@pytest.mark.parametrize(
    ("files", "subset", "said"),
    [
        ({"a.jsonl": ROW, "b.jsonl": ROW}, None, "no JSON-lines or Parquet file can be told"),
        ({"images/1.png": b"x"}, None, "no JSON-lines or Parquet file can be told"),
        ({"train.jsonl": ROW, "train.parquet": b"x"}, None, "is there in several formats"),
        ({"train.json": b' \n[{"text": "a"}]'}, None, "is one JSON array"),
        ({"en/train.jsonl": ROW}, "fr", "no JSON-lines or Parquet file can be told"),
        ({"README.md": CARD.replace(b"split: train", b"split: test"), "rows/a.jsonl": ROW}, None, "can be told"),
    ],
)
def test_what_cannot_be_told_is_not_fetched(server: LoopbackHub, tmp_path: Path, files, subset, said: str) -> None:
    server.add_repo(DATA, files, kind="dataset")
    got = fetch_dataset_files(opened(server), DATA, None, "train", subset, tmp_path / "cache")
    assert (got.probe.access, got.folder) == (Access.REFUSED, None)
    assert said in got.probe.detail


def test_a_split_too_large(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.hub_files.LARGEST_SPLIT", 20)
    server.add_repo(DATA, {"train-1.jsonl": ROW, "train-2.jsonl": ROW}, kind="dataset")
    got = fetch_dataset_files(opened(server), DATA, None, "train", None, tmp_path / "cache")
    assert got.probe.detail == "the split `train` has 28 bytes, 20 are fetched"
    assert all(request.method == "GET" and "resolve" not in request.path for request in server.requests)


def test_resolve_revision(server: LoopbackHub) -> None:
    assert resolve_revision(opened(server), BASE, "model", "main") == server.head(BASE)
    with pytest.raises(HubError) as error:
        resolve_revision(opened(server), BASE, "model", "f" * 40)
    assert error.value.access is Access.NO_REVISION
