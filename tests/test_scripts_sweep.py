"""scripts/train_sft.py with a sweep: variants in processes of their own, the best adapter, and what a kill leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_scripts_train import conversations, edit, front_door, make_run, manifest, write_rows
from tiny_models import make_tiny

pytestmark = pytest.mark.slow
GOOD, SMALL, WILD = {"learning_rate": 1e-2}, {"learning_rate": 1e-7}, {"learning_rate": 1e38}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("bases") / "llama", "llama")


def sweep_run(folder: Path, base: Path, *variants: dict[str, Any], **more: Any) -> Path:
    """A run.json with a sweep: each variant differs from a short training as given."""
    folder.mkdir(parents=True)
    data = write_rows(folder / "data.jsonl", conversations(8))
    run = make_run(folder, base, data, 0.25, method="lora", max_steps=3, save_steps=1)
    train = json.loads(run.read_text())["experiment"]["train"]
    rows = [
        {"words": ", ".join(f"{key} {value}" for key, value in one.items()), "train": {**train, **one}}
        for one in variants
    ]
    return edit(run, sweep={"variants": rows}, **more)


def test_the_best_of_three_is_the_artifact(base: Path, tmp_path: Path) -> None:
    """One that learns too little, one that diverges and one that learns: a bad one ends itself alone."""
    run = sweep_run(tmp_path / "run", base, SMALL, WILD, GOOD)
    done = front_door(run)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = manifest(run)
    print(json.dumps(made["sweep"], indent=1))
    print(done.stdout)
