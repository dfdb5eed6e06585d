"""scripts/train_sft.py in several processes: they learn what one learns, and end together. Gloo, two on the CPU."""

from pathlib import Path
from typing import Any

import pytest
from test_scripts_train import conversations, edit, events, front_door, make_run, manifest, write_rows
from tiny_models import make_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny base for all trainings here."""
    return make_tiny(tmp_path_factory.mktemp("bases") / "llama", "llama")


def trained(run: Path, **changes: Any) -> dict:
    """The manifest of a run that must succeed, with what it printed."""
    done = front_door(edit(run, **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    return manifest(run) | {"printed": done.stdout}


def weights(run: Path) -> dict:
    """What the run's artifact holds."""
    from safetensors.torch import load_file

    files = sorted((run.parent / "out").glob("*.safetensors"))
    return {name: weight.float() for file in files for name, weight in load_file(file).items()}


def test_two_processes_learn_what_one_learns(base: Path, tmp_path: Path) -> None:
    """Two epochs of 13 rows, 4 a step: the last step of each epoch is one row, and one process has none."""
    data = write_rows(tmp_path / "data.jsonl", conversations(16))
    changes = {"method": "lora", "epochs": 2.0, "gradient_accumulation": 4, "save_steps": 4}
    runs = {n: make_run(tmp_path / str(n), base, data, 0.2, **changes) for n in (1, 2)}
    one, two = trained(runs[1], processes=1), trained(runs[2], processes=2)
    for key in ("loss", "lr", "grad_norm"):
        assert [e[key] for e in two["history"]] == pytest.approx([e[key] for e in one["history"]], rel=1e-4), key
    assert [e["step"] for e in two["history"]] == [e["step"] for e in one["history"]] == list(range(1, 9))
    assert [e["step"] for e in two["eval_history"]] == [e["step"] for e in one["eval_history"]]
    found = [[e["eval_loss"] for e in m["eval_history"]] for m in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    for key in ("steps", "tokens_seen", "tokens_trained", "examples", "trainable_parameters"):
        assert two["metrics"][key] == one["metrics"][key], key
    first, second = weights(runs[1]), weights(runs[2])
    assert first.keys() == second.keys()
    for name in first:
        difference = (first[name] - second[name]).norm() / first[name].norm()
        assert difference < 1e-4, (name, difference)
    names = [e["event"] for e in events(two["printed"]) if e["event"] not in ("phase", "progress", "warning")]
    assert names == ["start", *["step"] * 4, "eval", *["step"] * 4, "eval", "end"]
