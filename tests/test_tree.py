"""The experiments of a checkout as runs, and what a submit sends: revisions pinned, nothing left to the job's luck."""

import json
import shutil
from pathlib import Path

import pytest
from histories import LABEL, LIMITS, PLAN, ROOT, start
from repository import EXPERIMENT
from simulation import SimRemote

from pipeline.actions import Seen, Submit
from pipeline.errors import UserError
from pipeline.launch import submit_stage
from pipeline.plan import StageName
from pipeline.remote import StageView
from pipeline.tree import make_order, read_tree, wanted_run

COMMIT = "c" * 40
TRAIN, MERGE, GGUF, EVALUATE = PLAN.stages
ROWS = '{"prompt": "a", "completion": "b"}\n' * 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one experiment of the Hub and one of this repository."""
    folder = tmp_path / "experiments"
    (folder / "examples").mkdir(parents=True)
    (folder / "archive").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "data.jsonl").write_text(ROWS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "pyproject.toml").write_text("[tool.mergetune]\n")
    (folder / "small.yaml").write_text(EXPERIMENT)
    return tmp_path


def test_every_experiment_is_a_run_but_examples_and_what_is_done(root: Path) -> None:
    (root / "experiments/examples/shown.yaml").write_text(EXPERIMENT)
    (root / "experiments/archive/old.yaml").write_text(EXPERIMENT)
    tree = read_tree(root, COMMIT)
    assert [(run.name, run.namespace) for run in tree.wanted] == [("small", "acme")]
    assert tree.wanted[0].run_id == tree.wanted[0].plan().run_id
    assert (tree.commit, tree.broken, tree.partial) == (COMMIT, frozenset(), False)


def test_a_repository_without_experiments_wants_nothing(tmp_path: Path) -> None:
    assert read_tree(tmp_path, COMMIT).wanted == ()
    (tmp_path / "experiments").mkdir()
    assert read_tree(tmp_path, COMMIT).wanted == ()


@pytest.mark.parametrize("damage", ["name: [", "", "nmae: small\n", "hypothesis: x\n"])
def test_a_file_that_cannot_be_read_is_broken_and_not_absent(root: Path, damage: str) -> None:
    (root / "experiments/small.yaml").write_text(damage)
    tree = read_tree(root, COMMIT)
    assert (tree.wanted, tree.broken) == ((), {"small"})


def test_an_experiment_whose_data_is_missing_is_broken(root: Path) -> None:
    (root / "data.jsonl").unlink()
    assert read_tree(root, COMMIT).broken == {"small"}
    with pytest.raises(UserError, match=r"data\.jsonl"):
        wanted_run(root / "experiments/small.yaml", root)


def test_data_of_this_repository_decides_the_run(root: Path) -> None:
    other = root.with_name("other")
    shutil.copytree(root, other)
    assert read_tree(other, COMMIT).wanted[0].run_id == read_tree(root, COMMIT).wanted[0].run_id
    third = root.with_name("third")
    shutil.copytree(root, third)
    (third / "data.jsonl").write_text(ROWS * 2)
    assert read_tree(third, COMMIT).wanted[0].run_id != read_tree(root, COMMIT).wanted[0].run_id


def test_the_runs_plan_is_made_only_when_asked_for(root: Path) -> None:
    path = root / "experiments/small.yaml"
    path.write_text(EXPERIMENT.replace("cpu-upgrade", "no-such-flavor"))
    run = read_tree(root, COMMIT).wanted[0]
    with pytest.raises(UserError, match="no-such-flavor"):
        run.plan()


def request(files: dict[str, bytes | Path]) -> dict[str, object]:
    content = files["run.json"]
    assert isinstance(content, bytes)
    return json.loads(content)


def test_an_order_holds_the_script_and_a_resolved_request() -> None:
    remote = SimRemote(start())
    provenance = {"commit": COMMIT, "pull_request": 7}
    order = make_order(ROOT, remote, LABEL, provenance, PLAN, Submit(TRAIN, 2), Seen())
    run = request(dict(order.files))
    assert (run["stage"], run["attempt"], run["run_id"]) == ("train", 2, PLAN.run_id)
    assert run["inputs"]["base"] == {"repo": "google/gemma-3-12b-it", "revision": "a" * 40, "type": "model"}
    assert run["output"] == {"repo": "acme/coach-12b-adapter", "folder": ""}
    assert (run["device"], run["provenance"]) == ("cuda", provenance)
    assert order.files[order.script] == ROOT / "scripts/train_sft.py"
    assert order.labels["pr"] == "7"
    assert order.by != make_order(ROOT, remote, LABEL, {}, PLAN, Submit(TRAIN, 2), Seen()).by
    assert "pr" not in make_order(ROOT, remote, LABEL, {}, PLAN, Submit(TRAIN, 2), Seen()).labels


def test_labels_hold_only_what_the_hub_finds_again() -> None:
    order = make_order(ROOT, SimRemote(start()), LABEL, {"pull_request": 12}, PLAN, Submit(TRAIN, 1), Seen())
    assert all(c.isascii() and (c.isalnum() or c in "-_") for value in order.labels.values() for c in value)


def test_a_later_attempt_takes_the_revisions_of_the_first() -> None:
    """The base moved on the Hub since: a run has one base, whatever happens to it."""
    sim = start()
    remote = SimRemote(sim)
    submit_stage(remote, remote.clock, make_order(ROOT, remote, LABEL, {}, PLAN, Submit(TRAIN, 1), Seen()), LIMITS)
    view = remote.view("acme/coach-12b-adapter", f".mergetune/{PLAN.run_id}/train")
    remote.resolve = lambda repo, kind, revision: "b" * 40  # type: ignore[method-assign]
    later = make_order(ROOT, remote, LABEL, {}, PLAN, Submit(TRAIN, 2), Seen({StageName.TRAIN: view}))
    assert request(dict(later.files))["inputs"]["base"]["revision"] == "a" * 40
    merged = make_order(ROOT, remote, LABEL, {}, PLAN, Submit(MERGE, 1), Seen({StageName.TRAIN: view}))
    inputs = request(dict(merged.files))["inputs"]
    assert inputs["base"]["revision"] == "a" * 40
    assert inputs["adapter"] == {
        "repo": "acme/coach-12b-adapter",
        "revision": view.head,
        "type": "model",
        "run_id": PLAN.run_id,
    }


@pytest.mark.parametrize("damage", [{"inputs": None}, {"inputs": {"base": 3}}, {"inputs": {"base": {"repo": 1}}}, {}])
def test_a_request_that_is_not_ours_to_read_pins_nothing(damage: dict[str, object]) -> None:
    seen = Seen({StageName.TRAIN: StageView("head", request=damage)})
    order = make_order(ROOT, SimRemote(start()), LABEL, {}, PLAN, Submit(TRAIN, 2), seen)
    assert request(dict(order.files))["inputs"]["base"]["revision"] == "a" * 40


def test_the_evaluation_writes_beside_the_model_and_not_over_it() -> None:
    seen = Seen({StageName.MERGE: StageView("merged"), StageName.TRAIN: StageView("trained")})
    order = make_order(ROOT, SimRemote(start()), LABEL, {}, PLAN, Submit(EVALUATE, 1), seen)
    run = request(dict(order.files))
    assert run["output"] == {"repo": "acme/coach-12b", "folder": f".mergetune/{PLAN.run_id}/evaluate"}
    assert run["inputs"]["tuned"]["revision"] == "merged"
    assert run["device"] == "cpu"


def test_files_of_this_repository_travel_with_the_claim(root: Path) -> None:
    plan = read_tree(root, COMMIT).wanted[0].plan()
    (root / "scripts").symlink_to(ROOT / "scripts")
    order = make_order(root, SimRemote(start()), LABEL, {}, plan, Submit(plan.stages[0], 1), Seen())
    inputs = request(dict(order.files))["inputs"]
    assert set(order.files) == {
        "run.json",
        "train_sft.py",
        inputs["data"]["path"],
        f"{inputs['base']['path']}/config.json",
    }
    assert order.files[inputs["data"]["path"]] == root / "data.jsonl"
    assert len(inputs["data"]["sha256"]) == 64
