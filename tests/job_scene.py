"""What the tests of the adapter to Hugging Face Jobs share: a loopback Hub with one claimed repository, one job."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session
from servers.hub import LoopbackHub

from pipeline.backends.hf_jobs import HfJobs
from pipeline.hub import open_hub
from pipeline.hub_facts import HubError
from pipeline.remote import JobSpec

TOKEN = "hf_" + "JobsJobs" * 4
FOLDER = ".mergetune/tiny-0a1b2c3d/train"
LABELS = {
    "experiment": "tiny",
    "run": "tiny-0a1b2c3d",
    "stage": "train",
    "attempt": "1",
    "repo": "acme--tunes",
    "pr": "7",
}


class NoWait:
    """A clock that does not wait."""

    def sleep(self, seconds: float) -> None:
        """Nothing."""


@contextmanager
def claimed_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that the client of this process may ask."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # The client's own waits between its retries of a listing.
    monkeypatch.setattr("huggingface_hub.utils._http.time", NoWait())
    close_session()
    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "admin"})
        hub.add_user("mallory")
        hub.add_token(TOKEN, "alice")
        hub.execute_jobs = False
        hub.add_repo("acme/tiny-adapter", {f"{FOLDER}/run.json": b"{}"})
        yield hub
    close_session()


def jobs_of(hub: LoopbackHub, token: str = TOKEN, timeout_s: float = 5) -> HfJobs:
    return HfJobs(open_hub(hub.url, token, timeout_s=timeout_s, sleep=lambda _: None), token)


def spec(hub: LoopbackHub, **given: Any) -> JobSpec:
    return JobSpec(
        **{
            "namespace": "acme",
            "flavor": "a10g-small",
            "timeout_s": 5400,
            "command": ("uv", "run", f"/mergetune/{FOLDER}/train_sft.py", f"/mergetune/{FOLDER}/run.json"),
            "repo": "acme/tiny-adapter",
            "revision": hub.head("acme/tiny-adapter"),
            "mount": "/mergetune",
            "labels": LABELS,
            **given,
        }
    )


def refused(call: Any, *arguments: Any, **given: Any) -> HubError:
    with pytest.raises(HubError) as caught:
        call(*arguments, **given)
    assert TOKEN not in str(caught.value)
    return caught.value
