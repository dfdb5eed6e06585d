"""The command as a person meets it: help, formats, exit codes, words on stderr and data on stdout."""

import json
from pathlib import Path

import pytest
from examples import GOOD, changed
from repository import ROOT, Repository, make_repository


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = make_repository(tmp_path_factory.mktemp("repo"))
    other = changed("2e-4", "1e-4", changed("acme/coach-12b", "acme/warned"))
    for name, text in {
        "coach": GOOD,
        "warned": changed("name: coach", "name: warned", changed(", revision: 96b6f1e", "", other)),
        "wrong": changed("name: coach", "name: wrong", changed("acme/coach-12b", "acne/coach-12b")).replace(
            "2e-4", "3e-4"
        ),
        "broken": changed("epochs: 3", "epoch: 3"),
    }.items():
        (made.root / f"other/{name}.yaml").parent.mkdir(exist_ok=True)
        (made.root / f"other/{name}.yaml").write_text(text)
    return made


@pytest.mark.parametrize(
    ("file", "code", "said", "counted"),
    [
        ("coach", 0, "", "1 checked, 0 errors, 0 warnings"),
        ("warned", 0, "other/warned.yaml:3:15: warning: `google/gemma-3-12b-it` is not pinned [EXP003]", "1 warnings"),
        ("wrong", 1, "other/wrong.yaml:19:16: error: namespace `acne` is not allowed here [HUB001]", "1 errors"),
        ("broken", 2, "other/broken.yaml:12:3: error: unknown key `train.epoch` [EXP001]", "1 errors"),
        ("missing", 2, "other/missing.yaml: error: no such file [EXP001]", "1 errors"),
    ],
)
def test_check(repo: Repository, file: str, code: int, said: str, counted: str) -> None:
    done = repo.call("check", f"other/{file}.yaml")
    assert done.returncode == code
    assert said in done.stderr
    assert counted in done.stdout


def test_check_of_a_folder_reports_every_file_worst_first(repo: Repository) -> None:
    done = repo.call("check", "other", "--format", "json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["files"] == 4
    assert [finding["severity"] for finding in document["findings"]] == ["error", "error", "warning"]
    assert document["findings"][0]["hint"] == "did you mean `epochs`?"


def test_check_by_default_takes_all_experiments(repo: Repository) -> None:
    done = repo.call("check")
    assert "checked" in done.stdout
    assert int(done.stdout.split()[0]) == 1 + len(list((ROOT / "experiments/examples").glob("*.yaml")))


def test_annotations_escape_what_github_would_read(repo: Repository) -> None:
    done = repo.call("check", "other/broken.yaml", "--format", "github")
    line = done.stdout.splitlines()[0]
    assert line == (
        "::error file=other/broken.yaml,line=12,col=3,title=EXP001::unknown key `train.epoch`%0A"
        "hint: did you mean `epochs`?"
    )


def test_plan_formats(repo: Repository) -> None:
    document = json.loads(repo.call("plan", "other/coach.yaml", "--format", "json").stdout)
    assert document["run_id"].startswith("coach-")
    assert [stage["name"] for stage in document["stages"]] == ["train", "merge", "gguf", "evaluate"]
    markdown = repo.call("plan", "other/coach.yaml", "--format", "markdown").stdout
    assert markdown.startswith("<!-- mergetune:plan:coach fingerprint=")
    assert repo.call("plan", "other/coach.yaml").stdout.startswith("## Plan `coach-")


def test_plan_of_a_wrong_experiment_stops_before_any_number(repo: Repository) -> None:
    done = repo.call("plan", "other/wrong.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert "hint: write `repo: acme/coach-12b`" in done.stderr
    assert repo.call("run", "other/broken.yaml").returncode == 2


def test_init_writes_an_experiment_that_checks(repo: Repository) -> None:
    done = repo.call("init", "mine")
    assert done.stdout == "experiments/mine.yaml\n"
    text = (repo.root / "experiments/mine.yaml").read_text()
    assert "\nname: mine\n" in text
    assert "$schema=./_schema.json" in text
    assert "# what you expect" in text
    assert repo.call("check", "experiments/mine.yaml").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["init", "small"], "`experiments/small.yaml` is there already", "choose another name"),
        (["init", "My Model"], "`My Model` is not a name", "`mergetune init my-model`"),
        (["init", "x", "--from", "chat-qlor"], "there is no example `chat-qlor`", "--from chat-qlora"),
    ],
)
def test_init_refuses(repo: Repository, arguments: list[str], message: str, hint: str) -> None:
    done = repo.call(*arguments)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_may_not_be_read(repo: Repository) -> None:
    path = repo.root / "private.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    done = repo.call_unprivileged("check", "private.yaml")
    assert done.returncode == 2
    assert "private.yaml: error: cannot be read: Permission denied" in done.stderr


def test_outside_a_repository(tmp_path: Path, repo: Repository) -> None:
    (tmp_path / "x.yaml").write_text(GOOD)
    done = repo.call("check", str(tmp_path / "x.yaml"))
    assert done.returncode == 2
    assert "is not inside a mergetune repository" in done.stderr


@pytest.mark.parametrize("verb", ["init", "check", "plan", "fit", "rehearse", "run"])
def test_every_verb_helps_with_an_example(repo: Repository, verb: str) -> None:
    done = repo.call(verb, "--help")
    assert done.returncode == 0
    assert f"  mergetune {verb} " in done.stdout or f"  mergetune {verb}\n" in done.stdout


def test_version_schema_and_no_arguments(repo: Repository) -> None:
    assert repo.call("--version").stdout == "0.1.0\n"
    assert json.loads(repo.call("schema").stdout) == json.loads((ROOT / "experiments/_schema.json").read_text())
    assert "Usage: mergetune" in repo.call().stderr


def test_a_closed_pipe_is_no_bug(repo: Repository) -> None:
    process = repo.start("schema")
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors


def test_fit_of_a_model_and_of_an_experiment(repo: Repository) -> None:
    table = repo.call("fit", "--model", "google/gemma-3-12b-it", "--rank", "64")
    assert table.returncode == 0, table.stderr
    assert "| `a10g-large` | 1.50 | 22.06 |" in table.stdout
    rows = json.loads(repo.call("fit", "other/coach.yaml", "--format", "json").stdout)
    assert [row["usd_per_hour"] for row in rows] == sorted(row["usd_per_hour"] for row in rows)
    needs = list(rows[0]["needs_gib"].values())
    assert needs == sorted(needs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit"], "pass an experiment file or `--model`"),
        (["fit", "--model", "google/gemma-3-12b"], "did you mean `google/gemma-3-12b-it`?"),
        (["fit", "--model", "Qwen/Qwen3-8B", "--method", "dora"], "there is no method `dora`"),
    ],
)
def test_fit_refuses(repo: Repository, arguments: list[str], said: str) -> None:
    done = repo.call(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
