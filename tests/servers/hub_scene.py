"""The cast that the tests of the loopback Hub share, and the real client set up against it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from servers.hub import LoopbackHub

WRITE, READ, SCOPED, OAUTH, STRANGER = "hf_write", "hf_read", "hf_scoped", "hf_oauth_alice", "hf_stranger"


def go_online(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests keep the client offline; the loopback Hub is what it may reach. Its Xet logs go below the folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_XET_LOG_DEST", f"{root}/xet-logs/")
    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", "0")


@contextmanager
def populated_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Alice administers acme and holds one token of each shape; Bob belongs nowhere."""
    go_online(root, monkeypatch)
    with LoopbackHub(root) as hub:
        hub.add_user("alice", orgs={"acme": "admin"})
        hub.add_user("bob")
        hub.add_token(WRITE, "alice")
        hub.add_token(READ, "alice", "read")
        hub.add_token(SCOPED, "alice", "fineGrained", {"acme": ["repo.write", "job.write"]})
        hub.add_token(OAUTH, "alice", "oauth")
        hub.add_token(STRANGER, "bob")
        yield hub


def client(hub: LoopbackHub, token: str | bool = WRITE) -> HfApi:
    """The real client; `False` is an anonymous one."""
    return HfApi(endpoint=hub.url, token=token)
