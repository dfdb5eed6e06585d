"""scripts/train_sft.py with a sweep: variants in processes of their own, the best adapter, and what a kill leaves."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers.hub import LoopbackHub
from servers.hub_faults import status
from servers.hub_http import Request
from test_scripts_hub import (
    REPO,
    RUN_ID,
    TOKEN,
    Job,
    add_folder,
    check_manifest,
    put_winner,
    titles,
    train_run,
)
from test_scripts_train import TRAIN, conversations, edit, events, front_door, make_run, manifest, write_rows
from test_scripts_train_processes import is_alive
from tiny_models import make_tiny

pytestmark = pytest.mark.slow
BROKEN = {"lora": {"alpha": 1e38}}  # the first update makes everything infinite


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny base for all sweeps here."""
    return make_tiny(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """Alice, with a token that writes, and an output repo."""
    with LoopbackHub(tmp_path) as served:
        served.add_user("alice", orgs={"acme": "admin"})
        served.add_token(TOKEN, "alice")
        served.add_repo(REPO, {}, private=True)
        yield served


def variants(train: dict[str, Any], *changes: dict[str, Any], **shared: Any) -> dict[str, Any]:
    """The `sweep` of a run.json: each variant differs from `train` as given."""

    def one(change: dict[str, Any]) -> dict[str, Any]:
        words = ", ".join(f"{key} {value}" for key, value in change.items())
        lora = {**train["lora"], **change.get("lora", {})}
        return {"words": words, "train": {**train, **change, "lora": lora}, **shared}

    return {"variants": [one(change) for change in changes]}


def sweep_run(folder: Path, base: Path, *changes: dict[str, Any], **shared: Any) -> Path:
    """A run.json whose variants train three steps."""
    folder.mkdir(parents=True)
    data = write_rows(folder / "data.jsonl", conversations(8))
    run = make_run(folder, base, data, 0.25, method="lora", max_steps=3)
    train = json.loads(run.read_text())["experiment"]["train"]
    return edit(run, sweep=variants(train, *changes, **shared))


def hub_run(hub: LoopbackHub, folder: Path, base: dict[str, str], **more: Any) -> Path:
    """A run.json that reads its base, its rows and its held-out rows from the Hub, two variants at once."""
    rows = {"train": conversations(12), "validation": conversations(3)}
    files = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in some).encode() for name, some in rows.items()}
    if "acme/rows" not in [name for _, name, _ in hub.repos()]:
        hub.add_repo("acme/rows", files, kind="dataset")
    run = train_run(folder, base, concurrency=2, **more)
    given = json.loads(run.read_text())
    given["experiment"]["data"] |= {"dataset": "acme/rows", "eval": {"split": "validation"}}
    data = {"repo": "acme/rows", "revision": hub.head("acme/rows", "dataset"), "type": "dataset", "subset": None}
    return edit(run, experiment=given["experiment"], inputs={**given["inputs"], "data": data})


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_side_by_side_in_a_job_that_is_stopped_and_goes_on(hub: LoopbackHub, tmp_path: Path, base: Path) -> None:
    """Two at a time. The one that ended is in the repo with its adapter when SIGTERM comes, and stays trained."""
    from safetensors.torch import load

    source, place = add_folder(hub, "acme/tiny", base), f".mergetune/{RUN_ID}/train"
    sweep = variants(TRAIN, {"max_steps": 3, "learning_rate": 1e-2}, {"max_steps": 4000, "learning_rate": 1e-7})
    first = Job(hub, hub_run(hub, tmp_path / "one", source, sweep=sweep), "job-a")
    first.wait_for("variant", variant=1, state="trained", timeout_s=120)
    first.wait_for("step", variant=2)
    while "train of coach-0f3a9c21: 1 of 2 variants" not in titles(hub):
        assert first.process.poll() is None, first.log
        time.sleep(0.02)
    (still,) = children(first.process.pid)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 130, first.log
    assert not is_alive(still)
    kept = hub.files(REPO)
    rows = json.loads(kept[f"{place}/sweep.json"])["rows"]
    assert [(row["variant"], row["state"], row.get("winner")) for row in rows] == [(1, "trained", True)]
    adapter = kept[f"{place}/checkpoint/best/adapter_model.safetensors"]
    assert "manifest.json" not in kept
    begun = [event["variant"] for event in first.events("phase") if event["name"] == "import libraries"]
    assert sorted(begun) == [1, 2]

    short = variants(TRAIN, {"max_steps": 3, "learning_rate": 1e-2}, {"max_steps": 3, "learning_rate": 1e-7})
    last = Job(hub, hub_run(hub, tmp_path / "two", source, attempt=2, sweep=short), "job-b")
    assert last.end() == 0, last.log
    assert [event["variant"] for event in last.events("phase") if event["name"] == "import libraries"] == [2]
    made, files = check_manifest(hub), hub.files(REPO)
    assert [(row["variant"], row["state"]) for row in made["sweep"]] == [(1, "trained"), (2, "trained")]
    assert [row["variant"] for row in made["sweep"] if row.get("winner")] == [1]
    assert files["adapter_model.safetensors"] == adapter
    assert made["metrics"]["eval_loss"] == made["sweep"][0]["eval_loss"] < made["sweep"][0]["eval_loss_before"]
    assert not any("/checkpoint/" in name for name in files)
    assert any(weight.any() for name, weight in load(adapter).items() if "lora_B" in name)
    card = files["README.md"].decode()
    assert "base_model: acme/tiny\n" in card and "| learning rate | 0.01 |" in card
    assert "by max_steps 3, learning_rate 0.01 |" in card and str(tmp_path) not in card
    # The parent alone talks to the Hub: each job passes the fence once, and downloads the base once.
    assert titles(hub)[1:] == [
        "train of coach-0f3a9c21: job job-a starts",
        "train of coach-0f3a9c21: 1 of 2 variants",
        "train of coach-0f3a9c21: job job-b starts",
        "train of coach-0f3a9c21: 2 of 2 variants",
        "train of coach-0f3a9c21",
        "train of coach-0f3a9c21: manifest",
    ]
    got = [one.path for one in hub.requests if one.method == "GET" and "/resolve/" in one.path]
    assert len([path for path in got if path.startswith("/acme/tiny/") and "model-00001" in path]) == 2
    assert len([path for path in got if "/acme/rows/" in path and "train.jsonl" in path]) <= 2


def finished(run: Path, number: int, loss: float, seconds: float) -> None:
    """What a variant that an earlier job trained leaves on the disk."""
    artifact = run.parent / f"work/variants/{number}/artifact"
    artifact.mkdir(parents=True)
    (artifact / "adapter_model.safetensors").write_bytes(b"weights of variant %d" % number)
    metrics = {"steps": 3, "train_loss": loss, "eval_loss": loss, "tokens_per_s": 9.0, "rows": 6}
    made = {"metrics": metrics, "history": [], "eval_history": [], "resumed_from_step": 0, "seed": 42, "versions": {}}
    (artifact / "manifest.json").write_text(json.dumps(made))
    row = {"variant": number, "words": f"n {number}", "state": "trained", "seconds": seconds, "memory_gib": 1.0}
    path = run.parent / "work/variants/sweep.json"
    known = json.loads(path.read_text()) if path.exists() else {"fingerprint": "0" * 64, "spent_s": 3600.0, "rows": []}
    known["rows"].append(row | {"eval_loss": loss})
    path.write_text(json.dumps(known | {"best": number}))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"timeout_s": 1500, "max_usd": None}, "20 minutes are left of the timeout, and the longest took 25"),
        (
            {"timeout_s": 90_000, "max_usd": 3.0},
            "with one more the training would cost $3.15, and `sweep.max_usd` is 3",
        ),
    ],
)
def test_what_does_not_fit_is_not_started(base: Path, tmp_path: Path, limits: dict[str, Any], reason: str) -> None:
    """An earlier job has trained two of three: the better one is the artifact, whatever is left of time and money."""
    run = sweep_run(tmp_path / "run", base, {"seed": 1}, {"seed": 2}, {"seed": 3})
    finished(run, 1, 1.5, 900.0)
    finished(run, 2, 1.2, 1500.0)
    edit(run, sweep={**json.loads(run.read_text())["sweep"], **limits, "usd_per_minute": 2.10 / 60})
    done = front_door(run)
    assert done.returncode == 0, done.stdout + done.stderr
    made = manifest(run)
    assert [(row["state"], row.get("winner")) for row in made["sweep"]] == [
        ("trained", None),
        ("trained", True),
        ("not started", None),
    ]
    assert made["sweep"][2]["reason"] == reason
    assert made["metrics"]["eval_loss"] == 1.2 and made["inputs"]["data"]["sha256"]
    assert (run.parent / "out/adapter_model.safetensors").read_bytes() == b"weights of variant 2"
    assert "| learning rate | 0.001 |" in (run.parent / "out/README.md").read_text()
    assert [event["message"] for event in events(done.stdout, "warning")] == [
        f"1 of 3 variants are not started: {reason}"
    ]


def test_none_that_trains_is_a_failure_with_the_first_cause(base: Path, tmp_path: Path) -> None:
    """Three batches a step are not shared by two processes; a variant that failed is tried again by the next job."""
    run = sweep_run(tmp_path / "run", base, {"gradient_accumulation": 3}, {"gradient_accumulation": 5}, processes=2)
    for _ in range(2):
        done = front_door(run)
        assert done.returncode == 2, done.stdout + done.stderr
        assert [event["name"] for event in events(done.stdout, "phase")].count("start variant") == 2
    (error,) = events(done.stdout, "error")
    first = "no variant was trained; variant 1 (`gradient_accumulation 3`) failed: `gradient_accumulation: 3` batches "
    assert error["message"].startswith(first) and error["hint"] == "write `gradient_accumulation: 4`"
    assert done.stderr.endswith("hint: write `gradient_accumulation: 4`\n")
    assert not (run.parent / "out/manifest.json").exists()


def test_without_held_out_rows_nothing_is_trained(base: Path, tmp_path: Path) -> None:
    run = sweep_run(tmp_path / "run", base, {"seed": 1}, {"seed": 2})
    experiment = json.loads(run.read_text())["experiment"]
    experiment["data"]["eval"] = None
    done = front_door(edit(run, experiment=experiment))
    assert done.returncode == 2
    assert "error: no rows are held out, so no variant wins\n\nhint: add `eval: {fraction: 0.05}`" in done.stderr


UNEVEN = [{"gradient_accumulation": 3}, {"gradient_accumulation": 5}]  # of two processes: refused before any import


def test_a_job_that_was_replaced_starts_no_further_variant(hub: LoopbackHub, tmp_path: Path, base: Path) -> None:
    source = add_folder(hub, "acme/tiny", base)

    def replace(request: Request) -> None:
        if request.method == "GET" and "acme/coach" in request.path and "job job-a starts" in titles(hub)[-1]:
            put_winner(hub, "train", 2, "job-b")

    run = train_run(tmp_path / "run", source, held_out=0.25, sweep=variants(TRAIN, *UNEVEN, processes=2))
    hub.on_request = replace
    job = Job(hub, run, "job-a")
    assert job.end() == 0, job.log
    assert job.events("superseded")[0]["winner"]["job_id"] == "job-b"
    assert [event["variant"] for event in job.events("phase") if event["name"] == "start variant"] == [1]
    assert titles(hub)[-1].startswith("somebody writes")


def test_a_hub_that_takes_no_row_holds_nothing_up(hub: LoopbackHub, tmp_path: Path, base: Path) -> None:
    """The rows come with the next variant's commit, or with the artifact; here there is none, and the cause is told."""
    source = add_folder(hub, "acme/tiny", base)
    hub.faults.add(method="POST", path="acme/coach/commit/", skip=1, times=1000, action=status(500))
    sweep = variants(TRAIN, *UNEVEN, processes=2)
    job = Job(hub, train_run(tmp_path / "run", source, held_out=0.25, sweep=sweep, patience_s=0.3), "job-a")
    assert job.end() == 2, job.log
    told = [event["message"] for event in job.events("warning") if event["message"].startswith("the variants so far")]
    assert len(told) == 2 and "the Hub did not commit" in told[0]
    assert "no variant was trained; variant 1" in job.events("error")[0]["message"]


def test_an_adapter_that_is_gone_is_trained_again(base: Path, tmp_path: Path) -> None:
    """Of two that an earlier job trained neither is left: both are started again, whatever their rows say."""
    run = sweep_run(tmp_path / "run", base, *UNEVEN, processes=2)
    for number, loss in ((1, 1.5), (2, 1.2)):
        finished(run, number, loss, 900.0)
        (run.parent / f"work/variants/{number}/artifact/manifest.json").unlink()
    done = front_door(run)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [event["message"] for event in events(done.stdout, "warning")]
    assert told[:2] == [f"the adapter of variant {n} is not there any more: it is trained again" for n in (2, 1)]
    begun = [event["variant"] for event in events(done.stdout, "phase") if event["name"] == "start variant"]
    assert begun == [1, 2]
