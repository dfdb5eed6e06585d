"""An experiment with `backend: mlx` is never a training job; its adapter is handed in once, and the chain goes on."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_story import make_adapter, merge_mac
from hub_story import TOKEN, Story, here, story_told
from servers.hub_http import Request

from pipeline.book import Verdict

pytestmark = pytest.mark.slow
MOST_REQUESTS = 60  # of handing in one adapter; far more than there are


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        merge_mac(story)
        yield story


@pytest.fixture
def inside(story: Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    with here(story, monkeypatch):
        yield story


def hand_in(story: Story, folder: Path, *more: str) -> tuple[int, str]:
    done = story.call("submit-adapter", "tiny", str(folder), "--yes", *more)
    return done.returncode, done.stdout + done.stderr


def stages_of(story: Story) -> list[str]:
    return [job.labels["stage"] for job in story.hub.jobs.values()]


def test_no_path_leads_to_a_training_job(story: Story) -> None:
    """Not a tick, not `run --backend hf_jobs`, not a retry: it waits for its adapter, which is no failure."""
    for _ in range(2):
        done = story.call("reconcile")
        assert done.returncode == 0, done.stderr
        assert ": yours: train waits for an adapter that is trained with MLX" in done.stdout
        assert "hint: train with `mergetune run experiments/tiny.yaml --backend mlx`" in done.stdout
    paid = story.call("run", "experiments/tiny.yaml", "--backend", "hf_jobs")
    assert paid.returncode == 1
    assert "train waits for an adapter" in paid.stderr
    assert "`mergetune submit-adapter tiny runs/tiny-" in paid.stderr
    assert story.call("cancel", "tiny").returncode == 0
    assert story.call("retry", "tiny").returncode == 0
    (report,) = story.tick()
    assert (report["outcome"], report["stage"]) == ("yours", "train")
    assert stages_of(story) == []
    assert story.hub.repos() == [("model", "acme/tiny-base", "public")]


def test_the_chain_goes_on_from_the_adapter(inside: Story, tmp_path: Path) -> None:
    folder = make_adapter(inside, tmp_path / "adapter")
    (folder / "secret.env").write_text(f"HF_TOKEN={TOKEN}")
    code, said = hand_in(inside, folder)
    assert code == 0, said
    assert "trained by `alice`; the jobs after it cost at most $0.02" in said
    assert "the adapter is in `acme/tiny-adapter`; the next tick goes on" in said
    closed = inside.live_on()
    assert (closed.verdict, closed.attempts) == (Verdict.DONE, {"train": 1, "merge": 1, "gguf": 1})
    assert stages_of(inside) == ["merge", "gguf"]
    files = inside.hub.files("acme/tiny-adapter")
    at = f".mergetune/{closed.run_id}/train"
    assert "secret.env" not in files
    assert json.loads(files["manifest.json"]) == json.loads(files[f"{at}/manifest.json"])
    for name in ("run.json", "claim.json", "winner.json", "train_mlx.py"):
        assert f"{at}/{name}" in files
    manifest = json.loads(files["manifest.json"])
    assert manifest["provenance"]["trained_by"] == "alice"
    assert manifest["provenance"]["trained_at"] == "2026-11-28T06:00:00+00:00"
    assert manifest["provenance"]["versions"]["mlx"] == "0.32.4"
    assert {"system", "machine", "chip", "handed_in_at", "commit", "path"} <= set(manifest["provenance"])
    assert closed.summary["stages"]["train"]["metrics"] == {"train_loss": 1.5, "steps": 6}
    merge = json.loads(inside.hub.files("acme/tiny")[f".mergetune/{closed.run_id}/merge/run.json"])
    assert merge["inputs"]["adapter"]["run_id"] == closed.run_id
    assert merge["inputs"]["base"]["revision"] == inside.base_revision
    for path, content in files.items():
        assert str(tmp_path).encode() not in content, path
        assert TOKEN.encode() not in content, path


def test_killed_at_every_request_one_adapter_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    for number in range(1, MOST_REQUESTS):
        (tmp_path / str(number)).mkdir()
        with story_told(tmp_path / str(number), stand_ins=True) as story:
            merge_mac(story, "merge")
            folder = make_adapter(story, tmp_path / str(number) / "adapter")
            death = killed_at(story, folder, number)
            if death is None:
                break
            met.append(f"{death.method} {death.path.partition('?')[0]}")
            code, said = hand_in(story, folder)
            note = f"killed at request {number}, {met[-1]}: {said}"
            assert code == 0, note
            with here(story, monkeypatch):
                closed = story.live_on()
            assert (closed.verdict, stages_of(story)) == (Verdict.DONE, ["merge"]), note
            files = story.hub.files("acme/tiny-adapter")
            assert files["adapter_model.safetensors"] == b"weights", note
            assert json.loads(files["manifest.json"])["job_id"].startswith("local-"), note
    assert sum("/commit/" in line for line in met) == 3  # the claim, the files, the manifest
    assert "POST /api/repos/create" in met
    assert len(met) >= 12


def killed_at(story: Story, folder: Path, number: int) -> Request | None:
    """The request of the command at which it was killed, done but unanswered; None when it made fewer."""
    first = len(story.hub.requests)
    heard: list[Request] = []
    process = story.start("submit-adapter", "tiny", str(folder), "--yes")

    def kill(request: Request) -> None:
        if not heard and process.poll() is None and request.n == first + number:
            process.kill()
            heard.append(request)

    story.hub.on_request = kill
    try:
        process.communicate(timeout=60)
    finally:
        story.hub.on_request = None
        process.kill()
    return heard[0] if heard else None


def test_two_at_once_leave_one_adapter(story: Story, tmp_path: Path) -> None:
    folders = [make_adapter(story, tmp_path / name, name.encode()) for name in ("ada", "bob")]
    processes = [story.start("submit-adapter", "tiny", str(folder), "--yes") for folder in folders]
    answers = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert sorted(code for _, code in answers) == [0, 1], answers
    kept = story.hub.files("acme/tiny-adapter")
    winner = kept["adapter_model.safetensors"]
    assert winner == (b"ada" if answers[0][1] == 0 else b"bob")
    listed = {file["path"]: file["sha256"] for file in json.loads(kept["manifest.json"])["files"]}
    assert listed["adapter_model.safetensors"] == hashlib.sha256(winner).hexdigest()


def test_done_is_done(inside: Story, tmp_path: Path) -> None:
    mine = make_adapter(inside, tmp_path / "mine")
    assert hand_in(inside, mine)[0] == 0
    before = inside.hub.files("acme/tiny-adapter")
    code, said = hand_in(inside, mine)
    assert (code, "is in `acme/tiny-adapter` already" in said) == (0, True)
    code, said = hand_in(inside, make_adapter(inside, tmp_path / "other", b"others"))
    assert code == 1
    assert "`acme/tiny-adapter` holds another adapter of `tiny-" in said
    assert inside.hub.files("acme/tiny-adapter") == before
    assert inside.live_on().verdict is Verdict.DONE
    code, said = hand_in(inside, mine)
    assert (code, "is closed: " in said) == (1, True)


def test_a_broken_off_upload_keeps_the_stage_until_it_is_cancelled(inside: Story, tmp_path: Path) -> None:
    mine, other = make_adapter(inside, tmp_path / "mine"), make_adapter(inside, tmp_path / "other", b"others")
    commits = 0
    process = inside.start("submit-adapter", "tiny", str(mine), "--yes")

    def kill_after_the_claim(request: Request) -> None:
        nonlocal commits
        commits += "/commit/" in request.path
        if commits:
            process.kill()

    inside.hub.on_request = kill_after_the_claim
    process.communicate(timeout=60)
    inside.hub.on_request = None
    assert commits == 1
    (report,) = inside.tick()
    assert (report["outcome"], "its upload broke off" in report["text"]) == ("yours", True)
    code, said = hand_in(inside, other)
    assert code == 1
    assert "is not this adapter's" in said
    assert "`mergetune cancel tiny`, then `mergetune retry tiny`" in said
    assert inside.call("cancel", "tiny").returncode == 0
    assert hand_in(inside, mine)[0] == 1
    assert inside.call("retry", "tiny").returncode == 0
    code, said = hand_in(inside, other)
    assert code == 0, said
    closed = inside.live_on()
    assert (closed.verdict, closed.attempts["train"]) == (Verdict.DONE, 2)
    assert inside.hub.files("acme/tiny-adapter")["adapter_model.safetensors"] == b"others"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"run_id": "tiny-00000000"}, "was trained as `tiny-00000000`, and the experiment is `tiny-"),
        ({"fingerprint": "0" * 64}, "and the experiment is `tiny-"),
        ({"stage": "merge"}, "is the artifact of stage `merge`"),
        ({"files": []}, "lists no `adapter_config.json`"),
        ({"files": [{"path": "../../home/id_rsa", "sha256": "0"}]}, "lists `../../home/id_rsa`"),
        ({"files": [{"path": "adapter_model.bin", "sha256": "0"}]}, "lists `adapter_model.bin`"),
        ({"files": [{"path": "adapter_config.json", "sha256": "0"}]}, "its hash differs"),
        ({"files": [{"path": "gone.json", "sha256": "0"}]}, "is not there"),
    ],
)
def test_what_is_not_this_runs_adapter_is_refused_by_name(inside: Story, tmp_path: Path, changed, said) -> None:
    code, told = hand_in(inside, make_adapter(inside, tmp_path / "adapter", **changed))
    assert code == 1
    assert said in told
    assert "Traceback" not in told
    assert inside.hub.repos() == [("model", "acme/tiny-base", "public")]


def test_an_adapter_that_nobody_can_vouch_for_is_refused(inside: Story, tmp_path: Path) -> None:
    folder = make_adapter(inside, tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    code, said = hand_in(inside, folder)
    assert (code, "holds an adapter without a manifest" in said) == (1, True)
    (folder / "mlx/adapter_config.json").write_text("{}")
    assert "an adapter of mlx-lm without a manifest" in hand_in(inside, folder / "mlx")[1]
    assert hand_in(inside, tmp_path / "nowhere")[0] == 2


def test_a_job_takes_no_adapter(inside: Story, tmp_path: Path) -> None:
    folder = make_adapter(inside, tmp_path / "adapter")
    inside.merge()
    code, said = hand_in(inside, folder)
    assert (code, "does not say `backend: mlx`" in said) == (1, True)


def test_nobody_is_asked_where_there_is_nobody(inside: Story, tmp_path: Path) -> None:
    done = inside.call("submit-adapter", "tiny", str(make_adapter(inside, tmp_path / "adapter")))
    assert (done.returncode, "add `--yes`" in done.stderr) == (2, True)
    assert inside.hub.repos() == [("model", "acme/tiny-base", "public")]
