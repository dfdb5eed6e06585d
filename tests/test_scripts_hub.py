"""The job scripts with an output repo, as HF Jobs starts them: real processes, the real client, the loopback Hub."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers.hub import LoopbackHub
from servers.hub_faults import drop, lose_response, status
from servers.hub_http import Request
from test_scripts_evaluate import ONE_THREAD, load
from test_scripts_train import CHAT, LORA, TRAIN, conversations, inline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train": "train_sft", "merge": "merge_adapter", "gguf": "convert_gguf", "evaluate": "evaluate"}
TOKEN, READ_ONLY = "hf_writeAliceAcme", "hf_readAliceAcme"
RUN_ID, REPO = "coach-0f3a9c21", "acme/coach"
WINNER = ".mergetune/coach-0f3a9c21/{}/winner.json"
PROVENANCE = {"repository": "https://github.com/acme/models", "commit": "ab" * 20, "pull_request": 12}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """Alice, with a token that writes and one that reads, and an output repo with a claim in it."""
    with LoopbackHub(tmp_path) as served:
        served.add_user("alice", orgs={"acme": "admin"})
        served.add_token(TOKEN, "alice")
        served.add_token(READ_ONLY, "alice", role="read")
        served.add_repo(REPO, {".mergetune/coach-0f3a9c21/claim.json": b"{}"}, private=True)
        yield served


def write_run(folder: Path, stage: str, inputs: dict[str, Any], attempt: int = 1, **more: Any) -> Path:
    """A run.json as the backend writes it; `train` and other parts of the experiment can be given."""
    experiment = {"name": "coach", "hypothesis": "It learns.", "base": {"model": "acme/tiny", "revision": None}}
    experiment["data"] = {"dataset": "data/rows.jsonl", "revision": None, "subset": None, "split": "train"}
    experiment["data"]["eval"] = {"fraction": more.pop("held_out", None), "split": None, "dataset": None}
    experiment |= {"train": {**TRAIN, **more.pop("train", {})}, "output": {"repo": REPO, "private": True}}
    experiment["merge"] = {"flavor": "cpu-upgrade", "timeout": 3600}
    experiment |= {"gguf": {"quants": more.pop("quants", [])}, "evaluate": {"prompts": None, "max_new_tokens": 4}}
    run = {"schema": 1, "run_id": RUN_ID, "fingerprint": "0f3a9c21" * 8, "stage": stage, "attempt": attempt}
    run |= {"experiment": experiment, "inputs": inputs, "output": {"repo": REPO, "folder": ""}, "device": "cpu"}
    run |= {"predicted": {"flavor": "l4x1", "method": "lora"}, "provenance": PROVENANCE, **more}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


class Job:
    """One container: a process with an empty disk of its own, and what it has printed."""

    def __init__(
        self, hub: LoopbackHub, run: Path, job_id: str, token: str = TOKEN, *options: str, **more: str
    ) -> None:
        stage = json.loads(run.read_text())["stage"]
        self.disk = run.parent / f"disk-of-{job_id}"
        (self.disk / "tmp").mkdir(parents=True)
        environment = {**ONE_THREAD, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "JOB_ID": job_id}
        environment |= {
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(self.disk / "hf"),
            "TMPDIR": str(self.disk / "tmp"),
            **more,
        }
        self.token, self.printed = token, self.disk / "log"
        command = [sys.executable, *options, str(ROOT / f"scripts/{SCRIPTS[stage]}.py"), str(run)]
        with self.printed.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    @property
    def log(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.splitlines(keepends=True) if line.startswith("MERGETUNE ")]
        found = [json.loads(line.removeprefix("MERGETUNE ")) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == name]

    def wait_for(self, event_name: str, /, timeout_s: float = 60.0, **fields: Any) -> dict[str, Any]:
        """The first event of that name with those fields."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in self.events(event_name):
                if fields.items() <= event.items():
                    return event
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise TimeoutError(f"no event {event_name} {fields}:\n{self.log}")

    def end(self, timeout_s: float = 90.0) -> int:
        """The exit code. Whatever happened, the token is not in the log."""
        try:
            code = self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()
        assert self.token not in self.log
        return code


def nothing(folder: Path, stage: str = "merge", **more: Any) -> Path:
    """A run whose inputs are not there: past the fence it ends with exit code 2."""
    gone = {"path": "nowhere"}
    inputs = {"base": gone, "adapter": gone, "model": gone, "tuned": gone, "data": {"path": "nowhere.jsonl"}}
    return write_run(folder, stage, inputs, **more)


def put(hub: LoopbackHub, name: str, content: bytes) -> None:
    """A commit by somebody else."""
    world = hub.world
    with world.lock:
        repo = world.repos.get(REPO)
        files = dict(repo.head.files) | {name: world.repos.blobs.of(name, content)}
        repo.commit(files, f"somebody writes {name}", "alice", world.clock())


def put_winner(hub: LoopbackHub, stage: str, attempt: int, job_id: str) -> None:
    put(hub, WINNER.format(stage), json.dumps({"attempt": attempt, "job_id": job_id, "at": ""}).encode())


def winner(hub: LoopbackHub, stage: str = "merge") -> dict[str, Any]:
    return json.loads(hub.files(REPO)[WINNER.format(stage)])


def titles(hub: LoopbackHub) -> list[str]:
    """Commit titles, oldest first."""
    return [title for _, title, _ in reversed(hub.history(REPO))]


# The fence


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_second_job_of_an_attempt_ends_before_anything_is_loaded(
    hub: LoopbackHub, tmp_path: Path, stage: str
) -> None:
    put_winner(hub, stage, 1, "job-a")
    head = hub.head(REPO)
    job = Job(hub, nothing(tmp_path / "run", stage), "job-b", TOKEN, "-X", "importtime")
    assert job.end() == 0, job.log
    (event,) = job.events("superseded")
    assert (event["winner"]["job_id"], event["winner"]["finished"]) == ("job-a", False)
    imported = {line.rpartition("|")[2].strip() for line in job.log.splitlines() if line.startswith("import time:")}
    assert "huggingface_hub" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy"}
    assert hub.head(REPO) == head


def test_the_first_job_wins_and_a_restart_of_it_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    for again in range(2):
        job = Job(hub, nothing(tmp_path / f"run-{again}"), "job-a")
        assert job.end() == 2, job.log  # past the fence: the inputs are not there
        assert not job.events("superseded")
    assert (winner(hub)["attempt"], winner(hub)["job_id"]) == (1, "job-a")
    assert titles(hub)[1:] == ["merge of coach-0f3a9c21: job job-a starts"]


def test_a_higher_attempt_takes_over_and_a_lower_one_does_not(hub: LoopbackHub, tmp_path: Path) -> None:
    put_winner(hub, "merge", 1, "job-a")
    second = Job(hub, nothing(tmp_path / "two", attempt=2), "job-b")
    assert (second.end(), winner(hub)["job_id"]) == (2, "job-b"), second.log
    first = Job(hub, nothing(tmp_path / "one"), "job-c")
    assert (first.end(), winner(hub)["job_id"]) == (0, "job-b"), first.log
    assert first.events("superseded")[0]["winner"]["attempt"] == 2


def test_a_published_stage_is_not_made_again(hub: LoopbackHub, tmp_path: Path) -> None:
    put(hub, WINNER.format("merge").replace("winner", "manifest"), b"{}")
    job = Job(hub, nothing(tmp_path / "run", attempt=2), "job-b")
    assert job.end() == 0, job.log
    assert job.events("superseded")[0]["winner"]["finished"] is True


@pytest.mark.parametrize("action", [lose_response(), drop(), status(500, performed=True), status(502)])
def test_a_claim_whose_answer_is_lost_is_recognised(hub: LoopbackHub, tmp_path: Path, action: Any) -> None:
    hub.faults.add(method="POST", path="/commit/", action=action)
    job = Job(hub, nothing(tmp_path / "run"), "job-a")
    assert job.end() == 2, job.log
    assert not job.events("superseded")
    assert [title for title in titles(hub) if "starts" in title] == ["merge of coach-0f3a9c21: job job-a starts"]


def test_a_commit_that_comes_between_is_no_reason_to_give_up(hub: LoopbackHub, tmp_path: Path) -> None:
    def interfere(request: Request) -> None:
        if "/preupload/" in request.path and len(titles(hub)) < 4:
            put(hub, f"note-{len(titles(hub))}", b"x")

    hub.on_request = interfere
    job = Job(hub, nothing(tmp_path / "run"), "job-a")
    assert (job.end(), winner(hub)["job_id"]) == (2, "job-a"), job.log


def test_a_claim_that_comes_between_wins(hub: LoopbackHub, tmp_path: Path) -> None:
    def interfere(request: Request) -> None:
        if "/preupload/" in request.path:
            put_winner(hub, "merge", 1, "job-z")

    hub.on_request = interfere
    job = Job(hub, nothing(tmp_path / "run"), "job-a")
    assert (job.end(), winner(hub)["job_id"]) == (0, "job-z"), job.log
    assert job.events("superseded")[0]["winner"]["job_id"] == "job-z"


def test_of_four_jobs_at_once_one_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    jobs = [Job(hub, nothing(tmp_path / f"run-{number}"), f"job-{number}") for number in range(4)]
    codes = [job.end() for job in jobs]
    assert sorted(codes) == [0, 0, 0, 2]
    assert winner(hub)["job_id"] == f"job-{codes.index(2)}"


def test_a_token_that_cannot_write_is_refused_before_anything_is_loaded(hub: LoopbackHub, tmp_path: Path) -> None:
    job = Job(hub, nothing(tmp_path / "run"), "job-a", READ_ONLY, "-X", "importtime")
    assert job.end() == 2, job.log
    assert "error: `acme/coach`: the token of this job cannot claim the stage: " in job.log
    assert "hint: set the secret `HF_TOKEN` to a token that can write to the repos of `acme`" in job.log
    assert "| torch" not in job.log and not hub.files(REPO).get(WINNER.format("merge"))


def test_an_output_repo_that_is_not_there(hub: LoopbackHub, tmp_path: Path) -> None:
    run = nothing(tmp_path / "run", output={"repo": "acme/other", "folder": ""})
    job = Job(hub, run, "job-a")
    assert job.end() == 2, job.log
    assert "`acme/other`: the token of this job cannot claim the stage: 404 Client Error." in job.log


def test_a_hub_that_stays_away(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.add(method="GET", path="/api/models/acme/coach", times=1000, action=status(503))
    job = Job(hub, nothing(tmp_path / "run", patience_s=2), "job-a")
    assert job.end() == 3, job.log
    assert "error: `acme/coach`: the Hub did not claim the stage: " in job.log
    assert job.events("warning")[0]["message"].startswith("claim the stage: ")


# Inputs


def test_data_that_is_not_the_plans(hub: LoopbackHub, tmp_path: Path) -> None:
    inputs = {"base": {"path": "base"}, "data": {"path": "data/rows.jsonl", "sha256": "0" * 64}}
    run = write_run(tmp_path / "run", "train", inputs)
    (run.parent / "data").mkdir()
    (run.parent / "data/rows.jsonl").write_text("{}")
    job = Job(hub, run, "job-a")
    assert job.end() == 2
    assert "`data/rows.jsonl` is not the file of the plan" in job.log
    assert len(titles(hub)) == 1


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_gated_base_without_access(hub: LoopbackHub, tmp_path: Path, stage: str) -> None:
    revision = hub.add_repo("google/gated", {"config.json": b"{}"}, gated=True)
    gated = {"repo": "google/gated", "revision": revision, "type": "model"}
    inputs = {"base": gated, "adapter": gated, "model": gated, "tuned": gated, "data": {"path": "rows.jsonl"}}
    run = write_run(tmp_path / "run", stage, inputs, held_out=0.5, quants=["Q8_0"])
    (run.parent / "rows.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(4)))
    job = Job(hub, run, "job-a")
    assert job.end() == 2, job.log
    assert "error: cannot read `google/gated`: " in job.log and "hint: check its name and revision" in job.log
    assert "Traceback" not in job.log


# Publishing


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and an adapter for it."""
    from test_scripts_merge import make_adapter
    from tiny_models import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    base = make_tiny(folder / "base", "llama")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    adapter = make_adapter(base, folder / "adapter", **settings)
    edited = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(edited | {"base_model_name_or_path": "acme/tiny"}))
    return {"base": base, "adapter": adapter}


def add_folder(hub: LoopbackHub, repo: str, folder: Path) -> dict[str, str]:
    """A repo with the files of a folder; the input that names it."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {"repo": repo, "revision": hub.add_repo(repo, files, private=True), "type": "model"}


def merge_run(hub: LoopbackHub, folder: Path, tiny: dict[str, Path], **more: Any) -> Path:
    inputs = {"base": add_folder(hub, "acme/tiny", tiny["base"])}
    inputs["adapter"] = add_folder(hub, "acme/coach-adapter", tiny["adapter"])
    return write_run(folder, "merge", inputs, **more)


def check_manifest(hub: LoopbackHub, revision: str = "main") -> dict[str, Any]:
    """The root manifest, after every file that it lists was compared with the repo."""
    files = hub.files(REPO, revision)
    manifest = json.loads(files["manifest.json"])
    for entry in manifest["files"]:
        assert hashlib.sha256(files[entry["path"]]).hexdigest() == entry["sha256"]
    listed = {entry["path"] for entry in manifest["files"]} | {"manifest.json", ".gitattributes"}
    assert {name for name in files if not name.startswith(".mergetune/")} <= listed
    assert files[f".mergetune/{RUN_ID}/{manifest['stage']}/manifest.json"] == files["manifest.json"]
    return manifest


@pytest.mark.parametrize(
    ("driver", "busy"),
    [("printf '50\\n100\\n'", 0.75), ("echo '[N/A]'", None), ("exit 9", None), ("printf ''", None)],
)
def test_a_sign_of_life_tells_how_busy_the_gpus_are(
    hub: LoopbackHub,
    tmp_path: Path,
    tiny: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    busy: float | None,
) -> None:
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{driver}\n")
    tool.chmod(0o755)
    monkeypatch.setitem(ONE_THREAD, "PATH", f"{tool.parent}:{os.environ['PATH']}")
    job = Job(hub, merge_run(hub, tmp_path / "run", tiny, heartbeat_s=0.05, device="cuda"), "job-a")
    assert job.end() == 0, job.log
    assert job.events("heartbeat")[0].get("gpu_busy") == busy


def test_a_merge_is_published_with_its_manifest_last(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    for name in ("manifest.json", "old.safetensors", ".gitattributes", ".mergetune/coach-11111111/merge/manifest.json"):
        put(hub, name, b"old")
    hub.faults.add(method="POST", path="acme/coach/commit/", skip=1, action=status(503))
    hub.faults.add(method="POST", path="acme/coach/commit/", action=lose_response())
    run = merge_run(hub, tmp_path / "run", tiny, heartbeat_s=0.05)
    job = Job(hub, run, "job-a")
    assert job.end() == 0, job.log
    assert job.events("heartbeat")[0].keys() >= {"memory_gib", "disk_free_gb", "elapsed_s"}
    order = [(title, set(hub.files(REPO, sha))) for sha, title, _ in reversed(hub.history(REPO))][5:]
    assert [title.removeprefix("merge of coach-0f3a9c21") for title, _ in order] == [
        ": job job-a starts",
        "",
        ": manifest",
    ]
    between = order[1][1]
    assert "manifest.json" not in between and "old.safetensors" not in between
    assert {"config.json", ".gitattributes", ".mergetune/coach-11111111/merge/manifest.json"} <= between
    manifest = check_manifest(hub)
    assert manifest["inputs"] == json.loads(run.read_text())["inputs"]
    assert (manifest["job_id"], manifest["provenance"], manifest["warnings"]) == ("job-a", PROVENANCE, [])
    assert manifest["predicted"] == {"flavor": "l4x1", "method": "lora"}
    card = hub.files(REPO)["README.md"].decode()
    assert 'base_model: "acme/tiny"\nbase_model_relation: "finetune"\n' in card
    assert f"- Commit: [abababa](https://github.com/acme/models/commit/{'ab' * 20})\n" in card
    assert "- Pull request: [#12](https://github.com/acme/models/pull/12)\n" in card
    assert "- Adapter: `acme/coach-adapter` at `" in card and "- Attempt: 1\n" in card
    assert "- GGUF files: `acme/coach-GGUF`\n" in card
    assert str(tmp_path) not in card and "/tmp" not in card
    assert hub.repos() == [("model", name, "private") for name in ("acme/coach", "acme/coach-adapter", "acme/tiny")]


def test_weights_that_the_hub_does_not_take(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    hub.faults.add(method="POST", path="acme/coach/commit/", skip=1, times=1000, action=status(500))
    job = Job(hub, merge_run(hub, tmp_path / "run", tiny, patience_s=3), "job-a")
    assert job.end() == 3, job.log
    assert "error: merge of coach-0f3a9c21 is made and not published: `acme/coach`: the Hub did not commit " in job.log
    assert "hint: look at https://status.huggingface.co, then `mergetune retry coach`" in job.log
    assert len(job.events("warning")) >= 2 and "manifest.json" not in hub.files(REPO)


def test_a_card_that_the_hub_dislikes_holds_nothing_up(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    hub.faults.add(method="POST", path="/api/validate-yaml", times=100, action=status(400, "bad card"))
    job = Job(hub, merge_run(hub, tmp_path / "run", tiny), "job-a")
    assert job.end() == 0, job.log
    manifest = check_manifest(hub)
    assert "README.md" not in hub.files(REPO)
    assert [warning.partition(":")[0] for warning in manifest["warnings"]] == ["published without its card"]


def test_a_job_that_was_replaced_publishes_nothing(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    def replace(request: Request) -> None:
        if request.method == "POST" and "acme/coach/commit/" in request.path and winner(hub)["attempt"] == 1:
            put_winner(hub, "merge", 2, "job-b")

    hub.on_request = replace
    job = Job(hub, merge_run(hub, tmp_path / "run", tiny), "job-a")
    assert job.end() == 0, job.log
    assert job.events("superseded")[0]["winner"]["job_id"] == "job-b"
    assert "config.json" not in hub.files(REPO)


def test_a_quant_is_uploaded_as_soon_as_it_is_made(hub: LoopbackHub, tmp_path: Path) -> None:
    from tiny_models import make_tiny

    model = add_folder(hub, "acme/merged", make_tiny(tmp_path / "model", "llama"))
    first = Job(hub, write_run(tmp_path / "one", "gguf", {"model": model}, quants=["Q8_0", "F16"]), "job-a")
    first.wait_for("phase", name="quantize F16", timeout_s=300)
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    made = hub.files(REPO)["coach-Q8_0.gguf"]
    assert "manifest.json" not in hub.files(REPO)
    assert not list(first.disk.rglob("coach-Q8_0.gguf"))
    second = Job(hub, write_run(tmp_path / "two", "gguf", {"model": model}, attempt=2, quants=["Q8_0", "F16"]), "job-b")
    assert second.end() == 0, second.log
    phases = [event["name"] for event in second.events("phase")]
    assert "Q8_0 is published already" in phases and "quantize F16" in phases and "quantize Q8_0" not in phases
    manifest = check_manifest(hub)
    assert [quant["quant"] for quant in manifest["metrics"]["quants"]] == ["Q8_0", "F16"]
    assert hub.files(REPO)["coach-Q8_0.gguf"] == made
    card = hub.files(REPO)["README.md"].decode()
    assert 'base_model: "acme/merged"\nbase_model_relation: "quantized"\n' in card
    assert "| `coach-Q8_0.gguf` | 0.00 GB |" in card and "llama-server -hf acme/coach:Q8_0" in card
    assert str(tmp_path) not in card


# Training


def train_run(folder: Path, base: dict[str, str], **more: Any) -> Path:
    """Sixty steps with a checkpoint after every tenth; data beside run.json."""
    text = "".join(json.dumps(row) + "\n" for row in [{"messages": CHAT}, *conversations(11)])
    inputs = {"base": base, "data": {"path": "data/rows.jsonl", "sha256": hashlib.sha256(text.encode()).hexdigest()}}
    lora = {**LORA, "dropout": 0.1}  # random numbers must go on too
    chosen = {"max_steps": 60, "save_steps": 10, "lora": lora, **more.pop("train", {})}
    run = write_run(folder, "train", inputs, train=chosen, **more)
    (folder / "data").mkdir()
    (folder / "data/rows.jsonl").write_text(text)
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Path]) -> dict[str, Any]:
    """The adapter of the same training in one piece and without a Hub."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = {"path": str(folder / "out")}
    run = train_run(folder / "run", {"path": str(tiny["base"])}, output=output, work=str(folder / "work"))
    with pytest.MonkeyPatch.context() as patch:
        assert inline(load("train_sft"), run, patch) == 0
    return load_file(folder / "out/adapter_model.safetensors")


def test_a_killed_training_goes_on_from_the_hub(
    hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path], uninterrupted: dict[str, Any]
) -> None:
    import torch
    from safetensors import torch as safetensors

    base = add_folder(hub, "acme/tiny", tiny["base"])
    place = f".mergetune/{RUN_ID}/train/checkpoint"
    killed = Job(hub, train_run(tmp_path / "one", base), "job-a")
    killed.wait_for("pushed")
    killed.process.kill()
    assert killed.end() == -signal.SIGKILL
    kept = json.loads(hub.files(REPO)[f"{place}/complete.json"])["step"]
    assert kept % 10 == 0 and "manifest.json" not in hub.files(REPO)

    stopped = Job(hub, train_run(tmp_path / "two", base, attempt=2), "job-b")
    stopped.wait_for("step")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == 130, stopped.log
    pushed = json.loads(hub.files(REPO)[f"{place}/complete.json"])["step"]
    assert kept < pushed == stopped.events("pushed")[-1]["step"] < 60
    assert stopped.events("phase")[-1] | {"time": 0} == {
        "event": "phase",
        "time": 0,
        "name": "resume",
        "detail": f"step {kept}",
    }

    hub.faults.add(method="POST", path="acme/coach/commit/", skip=1, action=status(413, "Payload Too Large"))
    last = Job(hub, train_run(tmp_path / "three", base, attempt=3), "job-c")
    assert last.end() == 0, last.log
    manifest = check_manifest(hub)
    assert (manifest["resumed_from_step"], manifest["metrics"]["steps"]) == (pushed, 60)
    assert not any(name.startswith(place) for name in hub.files(REPO))
    final = safetensors.load(hub.files(REPO)["adapter_model.safetensors"])
    assert final.keys() == uninterrupted.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, uninterrupted[name], rtol=1e-5, atol=1e-6)
    # What went wrong in the background is said twice: when it happened, and where people look afterwards.
    (told,) = manifest["warnings"]
    assert re.match("`checkpoint-[0-9]+` is not on the Hub: `acme/coach`: the Hub did not commit ", told)
    assert told in [event["message"] for event in last.events("warning")]
    check_adapter_card(hub, base, str(tmp_path))
    assert manifest["inputs"]["data"]["path"] == "data/rows.jsonl"


def test_a_training_that_was_replaced_stops(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    def replace(request: Request) -> None:
        if request.method == "POST" and "acme/coach/commit/" in request.path and winner(hub, "train")["attempt"] == 1:
            put_winner(hub, "train", 2, "job-b")

    hub.on_request = replace
    long = {"max_steps": 2000, "save_steps": 5}
    job = Job(hub, train_run(tmp_path / "run", add_folder(hub, "acme/tiny", tiny["base"]), train=long), "job-a")
    assert job.end() == 0, job.log
    assert job.events("superseded")[0]["winner"]["job_id"] == "job-b"
    assert job.events("step")[-1]["step"] < 1000
    assert titles(hub)[-1] == f"somebody writes {WINNER.format('train')}"


def test_halves_of_a_training_go_to_the_hub_and_come_back(
    hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]
) -> None:
    """Two processes, one job: one claim, one pusher. The next job finds all parts, and needs no second process."""
    base, place = add_folder(hub, "acme/tiny", tiny["base"]), f".mergetune/{RUN_ID}/train/checkpoint"
    train = {"method": "full", "lora": None, "gradient_accumulation": 2, "max_steps": 90}  # it is stopped long before
    two = {"processes": 2, "sharded": True}
    stopped = Job(hub, train_run(tmp_path / "one", base, train=train, **two), "job-a")
    stopped.wait_for("pushed")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == 130, stopped.log
    assert titles(hub).count("train of coach-0f3a9c21: job job-a starts") == 1
    pushed = json.loads(hub.files(REPO)[f"{place}/complete.json"])["step"]
    assert sum(name.endswith(".distcp") for name in hub.files(REPO)) == 4  # weights and optimizer, a half each
    assert winner(hub, "train")["job_id"] == "job-a"

    last = Job(hub, train_run(tmp_path / "two", base, attempt=2, train=train), "job-b")
    assert last.end() == 0, last.log
    manifest = check_manifest(hub)
    assert (manifest["resumed_from_step"], manifest["metrics"]["steps"], manifest["job_id"]) == (pushed, 90, "job-b")
    assert not any(name.startswith(place) for name in hub.files(REPO))


def test_all_processes_of_a_training_that_was_replaced_stop(
    hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]
) -> None:
    def replace(request: Request) -> None:
        if request.method == "POST" and "acme/coach/commit/" in request.path and winner(hub, "train")["attempt"] == 1:
            put_winner(hub, "train", 2, "job-b")

    hub.on_request = replace
    long = {"max_steps": 2000, "save_steps": 5, "gradient_accumulation": 2}
    base = add_folder(hub, "acme/tiny", tiny["base"])
    job = Job(hub, train_run(tmp_path / "run", base, train=long, processes=2), "job-a")
    assert job.end() == 0, job.log
    assert [event["winner"]["job_id"] for event in job.events("superseded")] == ["job-b"]
    assert "Traceback" not in job.log


def check_adapter_card(hub: LoopbackHub, base: dict[str, str], local: str) -> None:
    card = hub.files(REPO)["README.md"].decode()
    assert "base_model: acme/tiny\nbase_model_relation: adapter\n" in card
    assert f"| base | acme/tiny at {base['revision']} |" in card
    assert "| pull request | [#12](https://github.com/acme/models/pull/12) |" in card
    assert "| merged model | acme/coach |" in card
    assert local not in card and "/tmp" not in card


def test_a_comparison_goes_into_its_own_folder(hub: LoopbackHub, tmp_path: Path, tiny: dict[str, Path]) -> None:
    put(hub, "manifest.json", b"of the gguf")
    base = add_folder(hub, "acme/tiny", tiny["base"])
    folder = f".mergetune/{RUN_ID}/evaluate"
    output = {"repo": REPO, "folder": folder}
    inputs = {"base": base, "tuned": base, "data": {"path": "rows.jsonl"}}
    run = write_run(tmp_path / "run", "evaluate", inputs, held_out=0.5, output=output, device="auto")
    rows = [{"messages": CHAT}, *conversations(3)]
    (run.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job(hub, run, "job-a")
    assert job.end() == 0, job.log
    files = hub.files(REPO)
    assert json.loads(files[f"{folder}/manifest.json"])["metrics"]["loss_change_percent"] == 0
    assert files["manifest.json"] == b"of the gguf"
    assert titles(hub)[2:] == [f"evaluate of {RUN_ID}: job job-a starts", f"evaluate of {RUN_ID}: manifest"]


def test_no_request_carries_the_token_in_sight(hub: LoopbackHub, tmp_path: Path) -> None:
    job = Job(hub, nothing(tmp_path / "run"), "job-a")
    assert job.end() == 2
    assert hub.requests
    assert not any(TOKEN in request.path or TOKEN.encode() in request.body for request in hub.requests)
    assert TOKEN not in os.environ.values()
