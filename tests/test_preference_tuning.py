"""docs/preference-tuning.md: its rows are read as it says, its numbers are those of a run, its commands pass."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples import GOOD, changed

from pipeline.experiment import Experiment
from pipeline.loader import load_experiment, parse_experiment
from pipeline.rows import check_row
from pipeline.rules.training import LEARNING_RATES
from pipeline.train_sections import DPO_RATE, Dpo

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/preference-tuning.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "experiments/examples/preferences.yaml"


def shown() -> Experiment:
    """The page's example, with what it leaves out from the good experiment."""
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block
    rest = changed("^data:\n(  .*\n)+", "", changed("^train:\n(  .*\n)+", "", GOOD))
    return parse_experiment(rest + block[1]).experiment


def test_the_file_it_shows_is_one_and_says_the_defaults() -> None:
    train = shown().train
    assert train.dpo == Dpo()
    assert train.is_dpo and train.quantised
    assert train.learning_rate == float(DPO_RATE)


def test_the_rows_it_shows_are_read_as_it_says() -> None:
    rows = [line.split("|")[1].strip(" `") for line in PAGE.splitlines() if line.startswith("| `{")]
    assert len(rows) == 4
    asked, answer = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
    lists: dict[str, Any] = {"prompt": [asked], "chosen": [answer], "rejected": [{**answer, "content": "B."}]}
    assert check_row(json.loads(rows[0]), pairs=True).completion == " 4"
    assert json.loads(rows[1].replace("[messages]", "[]")).keys() == lists.keys()
    assert check_row(lists, pairs=True).prompt == [asked]
    whole = {name: [asked, *lists[name]] for name in json.loads(rows[2].replace("[messages]", "[]"))}
    assert check_row(whole, pairs=True) == check_row(lists, pairs=True)
    texts = {name: f"Q? {name}" for name in json.loads(rows[3])}
    assert check_row(texts, pairs=True).prompt == "Q?"


def test_the_rates_it_names_are_those_of_the_rules() -> None:
    low, high = LEARNING_RATES[shown().train.method]
    assert f"A rate outside of {low:.0e} to {high:.0e} is a warning".replace("e-0", "e-") in PAGE


def test_it_is_found() -> None:
    assert "(docs/preference-tuning.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_data_of_the_example_is_varied_and_held_out() -> None:
    data = load_experiment(EXAMPLE).experiment.data
    assert data.eval is not None and data.eval.dataset is not None
    train, held_out = (
        [check_row(json.loads(line), pairs=True) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        for name in (data.dataset, data.eval.dataset)
    )
    assert (len(train), len(held_out)) == (52, 14)
    asked = [row.prompt[0]["content"] for row in train + held_out]
    assert len(set(asked)) == len(asked)
    assert len({row.completion[0]["content"] for row in train + held_out}) == len(asked)
    assert not any(row.is_same for row in train + held_out)


@pytest.mark.slow
def test_the_example_comes_to_what_the_page_says(tmp_path: Path) -> None:
    """Less the GGUF, which has its own tests."""
    shutil.copytree(EXAMPLE.parent, tmp_path / "experiments/examples")
    path = tmp_path / "experiments/examples/preferences.yaml"
    path.write_text(re.sub("(?m)^gguf: .*\n", "", path.read_text(encoding="utf-8")), encoding="utf-8")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "pyproject.toml").write_text("[tool.mergetune]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    report = Path(result["report"]).read_text(encoding="utf-8")
    assert "- ✅ **held-out reward accuracy above 90 %**" in report
    assert "- ✅ **held-out reward margin above 0.5**" in report
    measured = result["stages"]["evaluate"]["metrics"]["after"]
    trained = result["stages"]["train"]["metrics"]
    said = float(re.search(r"\| reward margin.*\*\*([\d.]+)\*\*", PAGE)[1])
    assert measured["reward_margin"] == pytest.approx(said, rel=0.1)  # machines differ in the last bits of bf16
    assert measured["reward_margin"] == pytest.approx(trained["eval_reward_margin"], rel=0.05)
    assert measured["reward_accuracy"] == trained["eval_reward_accuracy"] == 1.0
    assert trained["eval_loss"] < 0.4
