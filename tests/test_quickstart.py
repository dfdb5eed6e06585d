"""The quickstart does what README says: the held-out loss falls, and the model answers in another voice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_quickstart_changes_what_the_model_says() -> None:
    # Into the folder `make quickstart` uses: what that has finished is not run again here.
    command = [sys.executable, "-m", "pipeline", "run", "experiments/examples/quickstart.yaml", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    manifest = json.loads(
        (Path(result["stages"]["evaluate"]["artifact"]) / "manifest.json").read_text(encoding="utf-8")
    )
    assert manifest["metrics"]["loss_change_percent"] <= -20
    before = [sample["before"].startswith(("Aye", "Ahoy")) for sample in manifest["samples"]]
    after = [sample["after"].startswith(("Aye", "Ahoy")) for sample in manifest["samples"]]
    assert sum(before) == 0
    assert sum(after) >= 6
    quants = result["stages"]["gguf"]["metrics"]["quants"]
    assert {quant["quant"] for quant in quants} == {"Q8_0", "Q4_K_M"}
    assert all(set(quant["checks"].values()) == {"ok"} for quant in quants)


def test_the_data_is_varied_and_the_held_out_rows_are_not_in_it() -> None:
    folder = ROOT / "experiments/examples/data"

    def rows(name: str) -> list[list[dict[str, str]]]:
        lines = (folder / f"quickstart-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]

    train, held_out = rows("train"), rows("heldout")
    assert len(train) >= 200
    asked = [row[-2]["content"].lower() if len(row) < 4 else json.dumps(row[-4:-1]).lower() for row in train + held_out]
    answered = [
        message["content"].lower() for row in train + held_out for message in row if message["role"] == "assistant"
    ]
    assert len(set(asked)) == len(asked)
    assert len(set(answered)) == len(answered)
