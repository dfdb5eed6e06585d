"""An issue's text becomes an experiment that says what was answered, or a refusal; nothing in it acts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import ROOT, make_repository

from pipeline.errors import UserError
from pipeline.issue_form import LABELS, MOST, NO_ANSWER, answers, experiment_of_issue
from pipeline.loader import parse_experiment

ANSWERS = {
    "name": "coach-v2",
    "hypothesis": "r=64 LoRA on 1,000 dialogues: lowers the loss below 1.2.",
    "base.model": "google/gemma-3-12b-it",
    "data.dataset": "acme/coach-conversations",
    "train.method": "qlora",
    "train.flavor": "l4x1",
    "output.repo": "acme/coach-gemma3-12b",
    "budget.max_usd": "10",
}


def issue(**changes: str) -> str:
    """The text that GitHub makes of the form; keys with `_` for `.`."""
    said = {label: changes.get(label.replace(".", "_"), answer) for label, answer in ANSWERS.items()}
    return "\n\n".join(f"### {label}\n\n{answer}" for label, answer in said.items())


def test_the_labels_are_the_forms() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/experiment.yml").read_text())
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert tuple(part["attributes"]["label"] for part in asked) == LABELS
    methods = next(part for part in asked if part["id"] == "method")["attributes"]["options"]
    for method in methods:
        experiment_of_issue(issue(train_method=method))


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_answer_is_in_the_file(ends: str) -> None:
    name, text = experiment_of_issue(issue().replace("\n", ends))
    made = parse_experiment(text).experiment
    assert name == made.name == "coach-v2"
    assert made.hypothesis == ANSWERS["hypothesis"]
    assert (made.base.model, made.data.dataset) == (ANSWERS["base.model"], ANSWERS["data.dataset"])
    assert (made.train.method, made.train.flavor, made.budget.max_usd) == ("qlora", "l4x1", 10)
    assert made.output.repo == ANSWERS["output.repo"]
    assert made.output.private


def test_what_was_left_empty_is_an_example() -> None:
    _, text = experiment_of_issue(issue(train_flavor=NO_ANSWER))
    assert "flavor: a10g-large # `mergetune fit" in text


def test_another_name_replaces_the_issues() -> None:
    name, text = experiment_of_issue(issue(name="Not A Name"), "other")
    assert name == "other"
    assert "name: other\n" in text


def test_a_full_training_has_nothing_to_merge() -> None:
    assert "\nmerge:" not in experiment_of_issue(issue(train_method="full"))[1]
    preferred = experiment_of_issue(issue(train_method="dpo"))[1]
    assert "\nmerge:" in preferred
    assert "  learning_rate: 5e-6\n" in preferred


@pytest.mark.parametrize(
    "words",
    [
        "a # comment: {not: yaml} - *anchor &and !!python/object:os.system [x",
        "'quotes' \"both\" \\ back\\nslash % @ ` | >",
        "two\nlines\n\nbudget:\n  max_usd: 9999",
        "---\nname: other\n...",
        "### not a question\n#### budget.max_usd\n\n9999",
        "{name} {0} {budget!r} %s",
        "word" * 100,
    ],
)
def test_a_hypothesis_stays_a_hypothesis(words: str) -> None:
    made = parse_experiment(experiment_of_issue(issue(hypothesis=words))[1]).experiment
    assert made.hypothesis == " ".join(words.split())
    assert (made.name, made.budget.max_usd) == ("coach-v2", 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hypothesis": "x\n\n### budget.max_usd\n\n9999"}, "`budget.max_usd` is answered twice"),
        ({"hypothesis": ""}, "does not answer `hypothesis`"),
        ({"budget_max_usd": NO_ANSWER}, "does not answer `budget.max_usd`"),
        ({"name": "../../etc/passwd"}, "is not a name"),
        ({"name": "x\nbudget: {max_usd: 1}"}, "is not a name"),
        ({"data_dataset": "../../secrets.jsonl"}, "leaves the repository"),
        ({"data_dataset": "/etc/passwd"}, "leaves the repository"),
        ({"base_model": "acme/x # y"}, "is not a repository id"),
        ({"base_model": "https://hub.example/acme/x"}, "is a link"),
        ({"output_repo": "{repo: acme/x}"}, "is not a repository id"),
        ({"train_method": "rlhf"}, "train.method"),
        ({"budget_max_usd": "as much as it takes"}, "budget.max_usd"),
        ({"budget_max_usd": "-1"}, "budget.max_usd"),
        ({"hypothesis": "turned\u202earound"}, "invisible character, U+202E"),
        ({"hypothesis": "bell\x07"}, "invisible character, U+0007"),
        ({"hypothesis": "x" * MOST}, "more than 65,536 characters"),
    ],
)
def test_what_is_no_answer_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        experiment_of_issue(issue(**changes))
    assert said in refused.value.as_text()
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("body", ["", "please train something", "### name", "### name\n" * 30])
def test_another_text_is_refused(body: str) -> None:
    with pytest.raises(UserError):
        answers(body)


def test_the_command_writes_a_file_once(tmp_path: Path) -> None:
    repo = make_repository(tmp_path)
    (repo.root / "issue.md").write_text(issue())
    done = repo.call("init", "--from-issue", "issue.md")
    assert (done.returncode, done.stdout) == (0, "experiments/coach-v2.yaml\n"), done.stderr
    made = (repo.root / "experiments/coach-v2.yaml").read_text()
    assert made == experiment_of_issue(issue())[1]
    again = repo.call("init", "--from-issue", "issue.md")
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    assert repo.call("init", "second", "--from-issue", "issue.md").stdout == "experiments/second.yaml\n"
    missing = repo.call("init", "--from-issue", "nowhere.md")
    assert (missing.returncode, "`nowhere.md` cannot be read" in missing.stderr) == (2, True)
    assert "needs a name" in repo.call("init").stderr


def test_the_command_reads_standard_input(tmp_path: Path) -> None:
    repo = make_repository(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "init", "--from-issue", "-"],
        cwd=repo.root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"},
        input=issue(),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "experiments/coach-v2.yaml\n"), done.stderr
