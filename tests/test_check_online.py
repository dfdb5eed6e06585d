"""`mergetune check --online` as a person calls it, against the loopback Hub: every token, nothing created, no guess."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples import changed
from hub_worlds import BOTH
from servers import hub_faults
from servers.hub import LoopbackHub

from pipeline.check import clashes, preflight
from pipeline.hub import open_hub
from pipeline.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "experiments/examples/tiny-docs-llama"
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SECRET = "hf_" + "A1b2C3d4" * 4
OAUTH = "hf_oauth_eyJhbGciOiJIUzI1NiJ9.eyJzY29wZSI6ImpvYnMifQ.c2ln"
READ = "hf_" + "R3aD0nLy" * 4
BASE, DATA = "google/gemma-3-12b-it", "acme/coach"
SCOPES = {"acme": [*BOTH, "repo.content.read"]}


def rows(count: int) -> bytes:
    turns = [
        [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"tell {n}"}] for n in range(count)
    ]
    return "".join(json.dumps({"messages": said}) + "\n" for said in turns).encode()


class World:
    """A Hub, and a repository whose one experiment names its base and dataset."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.hub, self.root, self.cache = hub, folder / "repository", folder / "cache"
        (self.root / "experiments").mkdir(parents=True)
        (self.root / "scripts").mkdir()
        (self.root / "scripts/train_sft.py").write_text((ROOT / "scripts/train_sft.py").read_text())
        (self.root / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n')
        self.write()

    @property
    def path(self) -> Path:
        return self.root / "experiments/coach.yaml"

    def write(self) -> None:
        """The good experiment, pinned to what the Hub has now."""
        text = changed("96b6f1e", self.hub.head(BASE))
        self.path.write_text(changed("revision: 5d2", f"revision: {self.hub.head(DATA, 'dataset')}", text))

    def call(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`mergetune ARGUMENTS` in the repository; nothing may have been created afterwards."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.cache), "HF_ENDPOINT": self.hub.url, **environment}
        before = self.hub.repos()
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=self.root,
            env={**kept, "NO_PROXY": "127.0.0.1", **given},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert self.hub.repos() == before
        asked = [request.path for request in self.hub.requests if request.method not in ("GET", "HEAD")]
        assert all("/auth-check" in path for path in asked), asked
        for token in environment.values():
            assert not token.startswith("hf_") or token not in done.stdout + done.stderr
        return done

    def check(self, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
        """Exit code, rules of the errors found, and everything on stderr."""
        done = self.call("check", "--online", "--format", "json", *arguments, **environment)
        found = json.loads(done.stdout)["findings"]
        return done.returncode, [one["rule"] for one in found if one["severity"] == "error"], done.stderr


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """acme with its member alice, a base with real tokenizer files, and a dataset."""
    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "write"})
        hub.add_user("mallory")
        hub.add_token(SECRET, "alice", "write")
        hub.add_token(READ, "alice", "read")
        hub.add_repo(BASE, {name: (TINY / name).read_bytes() for name in BASE_FILES})
        hub.add_repo(DATA, {"data/train.jsonl": rows(40)}, kind="dataset", private=True)
        yield World(hub, tmp_path)


def test_a_good_token_and_files_as_good_as_in_the_repository(world: World) -> None:
    assert world.check(HF_TOKEN=SECRET) == (0, [], "")
    first = len(world.hub.requests)
    assert world.check("--endpoint", world.hub.url, HF_TOKEN=SECRET, HF_ENDPOINT="http://127.0.0.1:9") == (0, [], "")
    assert len(world.hub.requests) - first < first, "files of a commit are fetched once"
    plan = json.loads(
        world.call("plan", "experiments/coach.yaml", "--online", "--format", "json", HF_TOKEN=SECRET).stdout
    )
    assert plan["data"]["rows"] == 38
    assert plan["data"]["exact"] is True


@pytest.mark.parametrize(
    ("token", "rule"),
    [
        ("$HF_TOKEN", "HUB006"),
        ("${{ secrets.HF_TOKEN }}", "HUB006"),
        ("", "HUB005"),
        (OAUTH, "HUB008"),
        (READ, "HUB010"),
        ("hf_" + "N0t4K1nd" * 4, "HUB007"),
    ],
)
def test_a_token_that_cannot_launch(world: World, token: str, rule: str) -> None:
    world.hub.add_token(OAUTH, "alice", "oauth")
    code, found, _ = world.check(HF_TOKEN=token)
    assert (code, found) == (1, [rule])


def test_a_fine_grained_token_without_jobs(world: World) -> None:
    world.hub.add_token(SECRET, "alice", "fineGrained", scoped={"acme": ["repo.write", "repo.content.read"]})
    assert world.check(HF_TOKEN=SECRET)[:2] == (1, ["HUB012"])


def test_a_revoked_token(world: World) -> None:
    world.hub.revoke(SECRET)
    code, found, said = world.check(HF_TOKEN=SECRET)
    assert (code, found) == (1, ["HUB007"])
    assert f"note: the files of `{BASE}` were not read: the token is refused (401" in said


def test_a_gated_base(world: World) -> None:
    world.hub.delete_repo(BASE)
    world.hub.add_repo(BASE, {"config.json": b"{}"}, gated=True)
    world.write()
    code, found, said = world.check(HF_TOKEN=SECRET)
    assert (code, found) == (1, ["HUB014"])
    assert said.count("note: ") == 1
    assert f"note: the files of `{BASE}` were not read: 403" in said


def test_somebody_elses_output(world: World) -> None:
    world.hub.add_repo("acme/coach-12b", {"model.safetensors": b"1"}, private=True)
    assert world.check(HF_TOKEN=SECRET)[:2] == (1, ["HUB017"])


def test_the_hub_is_down(world: World) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, found, said = world.check(HF_TOKEN=SECRET, HF_ENDPOINT=endpoint)
    assert (code, found) == (1, ["HUB004"])
    assert said.count("note: ") == 2
    assert world.hub.requests == []


def test_an_outage_of_downloads_is_a_note(world: World) -> None:
    world.hub.faults.add(method="GET", path="tokenizer.json", times=99, action=hub_faults.status(503))
    code, found, said = world.check(HF_TOKEN=SECRET)
    assert (code, found) == (0, [])
    assert f"note: the files of `{BASE}` were not read: 503" in said


def test_rows_of_the_hub_are_judged(world: World) -> None:
    world.hub.delete_repo(DATA, "dataset")
    world.hub.add_repo(DATA, {"train.jsonl": rows(40) + b"{\n"}, kind="dataset", private=True)
    world.write()
    done = world.call("check", "--online", HF_TOKEN=SECRET)
    assert done.returncode == 1
    assert "`train.jsonl:41`: " in done.stderr
    assert "[DAT001]" in done.stderr


def test_a_dataset_whose_files_cannot_be_told(world: World) -> None:
    world.hub.delete_repo(DATA, "dataset")
    world.hub.add_repo(DATA, {"a.jsonl": rows(9), "b.jsonl": rows(9)}, kind="dataset", private=True)
    world.write()
    code, found, said = world.check(HF_TOKEN=SECRET)
    assert (code, found) == (0, [])
    assert said.startswith(f"note: the files of `{DATA}` were not read: no JSON-lines or Parquet file can be told")
    assert said.count("\n") == 1


def test_a_reviewer_needs_no_token_that_launches(world: World) -> None:
    assert world.check(HF_READ_TOKEN=READ)[:2] == (0, [])
    assert world.check("--read-only", HF_TOKEN=READ)[:2] == (0, [])
    assert {request.method for request in world.hub.requests} <= {"GET", "HEAD"}


def test_a_cache_that_cannot_be_written(world: World) -> None:
    world.cache.write_text("a file")
    code, found, said = world.check(HF_TOKEN=SECRET)
    assert (code, found) == (0, [])
    assert "could not be kept in the cache" in said


def test_options_of_a_look_without_a_look(world: World) -> None:
    done = world.call("check", "--endpoint", world.hub.url)
    assert done.returncode == 2
    assert "hint: add `--online`, or remove it" in done.stderr
    assert world.hub.requests == []


def test_preflight_is_the_errors_of_a_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from hub_worlds import NOW

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.cache))

    def errors(token: str | None) -> list[str]:
        hub = open_hub(world.hub.url, token, timeout_s=5, sleep=lambda _: None)
        others = clashes(world.root, {}).get(world.path.resolve(), ())
        found = preflight(world.path, world.root, Settings(namespaces=("acme",)), hub, NOW, others)
        return [finding.rule for finding in found]

    assert [errors(token) for token in (SECRET, READ, None)] == [[], ["HUB010"], ["HUB005"]]
    world.path.with_name("twin.yaml").write_text(world.path.read_text().replace("name: coach", "name: twin"))
    assert errors(SECRET) == ["EXP005"]
    world.path.write_text("name: [")
    assert errors(SECRET) == ["EXP001"]
