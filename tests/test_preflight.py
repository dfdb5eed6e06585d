"""The `plan` job's flow against the loopback GitHub: what a pull request is told, where, and when nothing is posted."""

import json
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from pull_story import ROWS, SMALL, checkout, client, experiment, loopback, workflow_run
from servers.github import LoopbackGitHub

from pipeline.comments import tick_boxes
from pipeline.errors import UserError
from pipeline.plan_changes import plan_hash
from pipeline.plan_request import preview_of
from pipeline.preflight import MOST, review, run_preflight
from pipeline.pull_request import ChangedFile, FileStatus

pytestmark = pytest.mark.slow

BAD = experiment(**{"flavor: cpu-upgrade": "flavor: nothing-like-it"})
TEMPLATE = (Path(__file__).resolve().parents[1] / ".github/pull_request_template.md").read_text(encoding="utf-8")


@pytest.fixture
def github(tmp_path: Path) -> Iterator[LoopbackGitHub]:
    with loopback(tmp_path) as server:
        yield server


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the `plan` job, before it sets up the training stack."""
    find = PathFinder.find_spec
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))


def outputs(root: Path) -> dict[str, object]:
    """The last value of each output of the step."""
    pairs = (line.partition("=") for line in (root / "output").read_text().splitlines())
    return {name: json.loads(value) for name, _, value in pairs}


def preflight(
    github: LoopbackGitHub, root: Path, number: int, token: str | None = None, trace_follows: bool = False
) -> int:
    """Run the flow as a fresh workflow run does; the exit code."""
    event = github.event("pull_request", number)
    tree = checkout(github, f"refs/pull/{number}/head", root / "proposed")
    base = checkout(github, "refs/heads/main", root / "base")
    for name in ("summary.md", "output"):
        (root / name).unlink(missing_ok=True)
    run = workflow_run(github, root, "pull_request", event, token)
    return run_preflight(run, client(github, token), tree, base, trace_follows=trace_follows)


def rehearsed(root: Path) -> list[str]:
    return json.loads((root / "output").read_text().splitlines()[-1].removeprefix("rehearse="))


def test_a_good_experiment_gets_its_plan_and_is_rehearsed(
    github: LoopbackGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    assert preflight(github, tmp_path, number) == 0
    (comment,) = github.comments(number)
    plan = preview_of(tmp_path / "proposed" / SMALL).plan
    assert comment.body.startswith("<!-- mergetune:plan:small fingerprint=")
    assert plan is not None
    assert f"plan={plan_hash(plan)} -->" in comment.body
    assert comment.author == "github-actions[bot]"
    assert rehearsed(tmp_path) == [SMALL]
    assert "`small`" in (tmp_path / "summary.md").read_text()
    assert "::error" not in capsys.readouterr().out


def test_a_bad_one_is_annotated_on_its_line_and_not_rehearsed(
    github: LoopbackGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = github.open_pull("try", "alice", files={SMALL: BAD})
    assert preflight(github, tmp_path, number) == 1
    line = 1 + next(n for n, text in enumerate(BAD.splitlines()) if "nothing-like-it" in text)
    assert f"::error file={SMALL},line={line}," in capsys.readouterr().out
    assert rehearsed(tmp_path) == []
    (comment,) = github.comments(number)
    assert "plan=none" in comment.body


# A tower whose config leaves out a size: the closed form takes four times its width, the model class 3,072.
TOWER = {"model_type": "siglip_vision_model", "hidden_size": 40960, "num_hidden_layers": 3, "num_attention_heads": 64}
TOWER |= {"vision_use_head": False}
TEXT = {"model_type": "gemma3_text", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
SEEING = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
SEEING |= {"text_config": TEXT, "vision_config": TOWER}


def on_a_gpu(flavor: str) -> dict[str, str]:
    """An experiment whose memory the closed form takes for three times what it is."""
    lora = "lora: {targets: [q_proj, v_proj]}"
    train = f"{{method: qlora, flavor: {flavor}, timeout: 2h, {lora}}}"
    text = experiment(**{"{method: lora, flavor: cpu-upgrade, timeout: 10m}": train, "max_usd: 1": "max_usd: 9"})
    text = text.replace("evaluate: {timeout: 10m, prompts: prompts.jsonl}\n", "").replace(
        "gguf: {timeout: 10m, quants: [Q8_0]}\n", ""
    )
    return {
        SMALL: text.replace("merge: {timeout: 10m}", "merge: {flavor: cpu-xl, timeout: 2h}"),
        "base/config.json": json.dumps(SEEING),
    }


def test_what_the_trace_lets_pass_is_a_warning(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files=on_a_gpu("l4x1"))
    assert preflight(github, tmp_path, number) == 0, (tmp_path / "summary.md").read_text()
    (comment,) = github.comments(number)
    assert "`small` fits `l4x1`" in comment.body
    assert "GiB, traced (closed form" in comment.body
    assert "**warning** `MEM002`" in comment.body
    assert rehearsed(tmp_path) == [SMALL]


def test_what_the_trace_says_does_not_fit_is_an_error(github: LoopbackGitHub, tmp_path: Path) -> None:
    files = on_a_gpu("t4-small")
    files["base/config.json"] = json.dumps(SEEING | {"vision_config": TOWER | {"num_hidden_layers": 6}})
    number = github.open_pull("try", "alice", files=files)
    assert preflight(github, tmp_path, number) == 1
    (comment,) = github.comments(number)
    assert "does not fit `t4-small`" in comment.body
    assert "GiB (traced), `t4-small` has 14.56" in comment.body


def test_what_cannot_be_traced_the_closed_form_decides(github: LoopbackGitHub, tmp_path: Path) -> None:
    files = on_a_gpu("l4x1")
    files["base/config.json"] = json.dumps(SEEING | {"model_type": "gemma4"})
    number = github.open_pull("try", "alice", files=files)
    assert preflight(github, tmp_path, number) == 1
    (comment,) = github.comments(number)
    assert "no trace: `gemma4` cannot be traced" in comment.body
    assert "does not fit `l4x1`" in comment.body


def test_memory_in_question_waits_for_the_call_that_can_trace(
    github: LoopbackGitHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_torch(monkeypatch)
    number = github.open_pull("try", "alice", files=on_a_gpu("l4x1"))
    assert preflight(github, tmp_path, number, trace_follows=True) == 0
    assert outputs(tmp_path) == {"trace": True, "rehearse": []}
    assert github.comments(number) == []
    assert "::error" not in capsys.readouterr().out
    assert preflight(github, tmp_path, number) == 1, "where no trace follows, the closed form decides"
    assert outputs(tmp_path) == {"trace": False, "rehearse": []}


@pytest.mark.parametrize("flavor", ["cpu-upgrade", "nothing-like-it"])
def test_what_no_trace_would_change_is_said_at_once(
    github: LoopbackGitHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavor: str
) -> None:
    without_torch(monkeypatch)
    number = github.open_pull("try", "alice", files={SMALL: experiment(**{"flavor: cpu-upgrade": f"flavor: {flavor}"})})
    assert preflight(github, tmp_path, number, trace_follows=True) == int(flavor != "cpu-upgrade")
    assert outputs(tmp_path)["trace"] is False
    assert len(github.comments(number)) == 1


def test_pushed_again_the_same_comment_changes(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: BAD})
    preflight(github, tmp_path, number)
    github.push("try", {SMALL: experiment()}, "alice")
    assert preflight(github, tmp_path, number) == 0
    (comment,) = github.comments(number)
    assert comment.edits == 1
    assert "plan=none" not in comment.body
    assert preflight(github, tmp_path, number) == 0
    assert github.comments(number)[0].edits == 1, "the same text is no edit"


def test_a_forks_pull_request_is_told_without_a_comment(
    github: LoopbackGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = github.open_pull("try", "mallory", files={SMALL: BAD}, fork=True)
    assert preflight(github, tmp_path, number, github.fork_token()) == 1
    assert github.comments(number) == []
    assert f"::error file={SMALL}" in capsys.readouterr().out
    assert "cannot run" in (tmp_path / "summary.md").read_text()
    assert {request.method for request in github.requests} == {"GET"}


def test_a_token_that_may_not_comment_is_said_in_the_summary(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    assert preflight(github, tmp_path, number, github.fork_token()) == 0
    assert "no comment could be posted" in (tmp_path / "summary.md").read_text()


def test_two_experiments_two_comments_and_one_that_leaves_says_so(github: LoopbackGitHub, tmp_path: Path) -> None:
    files = {SMALL: experiment(), "experiments/other.yaml": experiment("other")}
    number = github.open_pull("try", "alice", files=files)
    assert preflight(github, tmp_path, number) == 0
    assert rehearsed(tmp_path) == ["experiments/other.yaml", SMALL]
    assert len(github.comments(number)) == 2
    github.push("try", {"experiments/other.yaml": None}, "alice")
    assert preflight(github, tmp_path, number) == 0
    bodies = {comment.body.split()[1]: comment.body for comment in github.comments(number)}
    assert "no longer part" in bodies["mergetune:plan:other"]
    assert "plan=none" in bodies["mergetune:plan:other"]
    assert len(bodies) == 2


def test_two_experiments_may_not_write_to_one_place(github: LoopbackGitHub, tmp_path: Path) -> None:
    clash = experiment("other").replace("acme/other", "acme/small")
    number = github.open_pull("try", "alice", files={SMALL: experiment(), "experiments/other.yaml": clash})
    assert preflight(github, tmp_path, number) == 1


def test_changed_data_gets_the_plan_of_the_experiment_that_uses_it(github: LoopbackGitHub, tmp_path: Path) -> None:
    github.push("main", {SMALL: experiment()}, "alice")
    number = github.open_pull("try", "alice", files={"data.jsonl": ROWS + ROWS.splitlines()[0] + "\n"})
    assert preflight(github, tmp_path, number) == 0
    (comment,) = github.comments(number)
    assert "mergetune:plan:small" in comment.body


def test_an_edited_experiment_shows_what_changes(github: LoopbackGitHub, tmp_path: Path) -> None:
    github.push("main", {SMALL: experiment()}, "alice")
    number = github.open_pull("try", "alice", files={SMALL: experiment(**{"timeout: 10m": "timeout: 20m"})})
    assert preflight(github, tmp_path, number) == 0
    (comment,) = github.comments(number)
    assert "train.timeout" in comment.body


def test_what_main_did_meanwhile_is_not_the_pull_requests(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={"README.md": "more\n"})
    github.push("main", {SMALL: experiment()}, "bob")
    assert preflight(github, tmp_path, number) == 0
    assert github.comments(number) == []
    assert "No experiment" in (tmp_path / "summary.md").read_text()


def test_a_removed_experiment_is_named(github: LoopbackGitHub, tmp_path: Path) -> None:
    github.push("main", {SMALL: experiment()}, "alice")
    number = github.open_pull("try", "alice", files={SMALL: None})
    assert preflight(github, tmp_path, number) == 0
    assert "`experiments/small.yaml`" in (tmp_path / "summary.md").read_text()


def test_an_example_is_checked_and_neither_planned_nor_rehearsed(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={"experiments/examples/small.yaml": BAD})
    assert preflight(github, tmp_path, number) == 1
    github.push("try", {"experiments/examples/small.yaml": experiment()}, "alice")
    assert preflight(github, tmp_path, number) == 0
    assert rehearsed(tmp_path) == []
    assert github.comments(number) == []


def test_a_merge_group_is_checked_without_comments(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()})
    sha = github.enqueue(number)
    tree = checkout(github, sha, tmp_path / "proposed")
    base = checkout(github, "refs/heads/main", tmp_path / "base")
    run = workflow_run(github, tmp_path, "merge_group", github.event("merge_group", number, sha=sha))
    assert run_preflight(run, client(github), tree, base) == 0
    assert rehearsed(tmp_path) == [SMALL]
    assert github.comments(number) == []


def test_a_file_that_is_no_experiment_is_an_error_and_others_are_planned(
    github: LoopbackGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {SMALL: experiment(), "experiments/broken.yaml": "name: [\n"}
    number = github.open_pull("try", "alice", files=files)
    assert preflight(github, tmp_path, number) == 1
    assert "::error file=experiments/broken.yaml" in capsys.readouterr().out
    assert len(github.comments(number)) == 2


def test_a_link_out_of_the_tree_is_not_followed(tmp_path: Path) -> None:
    secret, tree = tmp_path / "secret.jsonl", tmp_path / "tree"
    (tree / "experiments").mkdir(parents=True)
    secret.write_text("the token")
    (tree / "data.jsonl").symlink_to(secret)
    (tree / "pyproject.toml").write_text("[tool.mergetune]\n")
    with pytest.raises(UserError, match="leads out"):
        review([ChangedFile(SMALL, FileStatus.ADDED)], tree, tmp_path)


def test_too_many_experiments_at_once_are_refused(github: LoopbackGitHub, tmp_path: Path) -> None:
    files = {f"experiments/e{n}.yaml": experiment(f"e{n}") for n in range(MOST + 1)}
    number = github.open_pull("try", "alice", files=files)
    with pytest.raises(UserError, match="split"):
        try:
            preflight(github, tmp_path, number)
        except UserError as error:
            raise UserError(error.as_text()) from error
    assert rehearsed(tmp_path) == []


def test_the_checklist_ticks_itself(github: LoopbackGitHub, tmp_path: Path) -> None:
    number = github.open_pull("try", "alice", files={SMALL: experiment()}, body=f"Mine\n\n{TEMPLATE}\n- [ ] not ours")
    preflight(github, tmp_path, number)
    body = github.world.pulls[number].body
    assert body.count("- [x]") == 5
    assert body.endswith("- [ ] not ours")
    github.push("try", {SMALL: BAD}, "alice")
    preflight(github, tmp_path, number)
    assert "- [ ] the file is valid" in github.world.pulls[number].body


def test_a_text_without_our_checklist_is_left_alone() -> None:
    assert tick_boxes("- [ ] mine", [True]) == "- [ ] mine"
