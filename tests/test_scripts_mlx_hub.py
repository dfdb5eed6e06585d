"""scripts/train_mlx.py with an output repo: a real process, the real client, the loopback Hub."""

import json
from pathlib import Path

import pytest
import test_scripts_hub
from mlx_runs import edit, make_twin, quantised
from servers.hub import LoopbackHub
from test_scripts_hub import REPO, Job, add_folder, train_run

pytestmark = pytest.mark.slow

hub = test_scripts_hub.hub  # the fixture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twin(tmp_path_factory.mktemp("bases") / "qwen3", "qwen3")


def test_a_run_on_the_hub_claims_and_publishes(
    hub: LoopbackHub,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(test_scripts_hub.SCRIPTS, "train", "train_mlx")
    job = Job(hub, train_run(tmp_path, add_folder(hub, "acme/tiny", base), train={"max_steps": 3}), "job-a")
    assert job.end() == 0, job.log
    files = hub.files(REPO)
    told = json.loads(files["manifest.json"])
    assert {entry["path"] for entry in told["files"]} <= files.keys()
    assert (told["job_id"], told["trained_on"]["repo"]) == ("job-a", "acme/tiny")
    assert json.loads(files[".mergetune/coach-0f3a9c21/train/winner.json"])["job_id"] == "job-a"
    late = Job(hub, train_run(tmp_path / "two", add_folder(hub, "acme/tiny", base)), "job-b")
    assert (late.end(), late.events("superseded")[0]["winner"]["finished"]) == (0, True)


def test_of_a_base_to_merge_into_only_the_small_files_are_fetched(
    hub: LoopbackHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(test_scripts_hub.SCRIPTS, "train", "train_mlx")
    sources = {"base": add_folder(hub, "acme/tiny", base)}
    sources["mlx_base"] = add_folder(hub, "acme/tiny-8bit", quantised(base, tmp_path / "8bit", 8))
    run = train_run(tmp_path / "run", sources["base"], train={"max_steps": 2, "method": "qlora"})
    inputs = json.loads(run.read_text())["inputs"] | sources
    job = Job(hub, edit(run, inputs=inputs), "job-a")
    assert job.end() == 0, job.log
    fetched = {path.parts[-4]: path.name for path in job.disk.rglob("snapshots/*/*.safetensors")}
    assert set(fetched) == {"models--acme--tiny-8bit"}
    told = json.loads(hub.files(REPO)["manifest.json"])
    expected = {"model": "acme/tiny-8bit", "repo": "acme/tiny-8bit", "revision": sources["mlx_base"]["revision"]}
    assert told["trained_on"] == expected | {"quantization": {"bits": 8, "group_size": 32}}
    assert "the merge puts it into `acme/tiny`" in told["warnings"][0]
