"""The plan comment as full texts, one for each thing a reviewer may have to decide; hostile words in it do nothing.

`python tests/test_plan_comment.py` writes the texts anew, after a change that is meant.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from examples import GOOD, MAC, changed
from repository import ROOT, Repository, make_repository
from rule_cases import facts
from test_markdown import HOSTILE, tokens

from pipeline.check import run_rules
from pipeline.cost import CostEstimate
from pipeline.dataset_facts import DatasetFacts, Lines, TokenFacts
from pipeline.errors import Finding, Place, Severity
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.plan import make_plan
from pipeline.plan_changes import Version, compare, plan_hash
from pipeline.plan_comment import LIMIT, plan_comment
from pipeline.plan_preview import Preview, plan_as_dict, render_plan
from pipeline.plan_request import preview_of
from pipeline.settings import Settings
from pipeline.traced import TracedMemory

GOLDEN = Path(__file__).parent / "golden"
LOCAL = changed("dataset: acme/coach", "dataset: data/coach.jsonl", changed("  revision: 5d2\n", ""))
COUNTED = DatasetFacts(
    "coach.jsonl", 1000, 950, "messages", True, tokens=TokenFacts(950, 412_345, 171_000, 1800), exact=True
)
ROOMY = changed("max_usd: 10", "max_usd: 25", changed("timeout: 4h", "timeout: 12h"))
SWEEP = ROOMY + "sweep:\n  grid: {learning_rate: [1e-4, 5e-3], lora.r: [16, 64, 4096]}\n  max_usd: 6\n"
SWEEP = SWEEP.replace("4096", "1024").replace("a10g-large", "t4-medium")
TROUBLED = replace(
    COUNTED,
    tokens=TokenFacts(947, 401_000, 150_000, 9_120, 48_200, Lines(31, (3, 17, 40, 41, 99)), Lines(3, (17, 40, 41))),
    duplicates=Lines(2, (8, 12)),
    leaked=Lines(1, (77,)),
    exact=False,
    estimated="2,000 of 1,000,000 rows were counted",
)

PREFERENCES = changed("held-out loss falls below 1.2", "the reward accuracy is above 80 %", changed("qlora", "dpo"))
PREFERENCES = changed("2e-4", "5e-6\n  dpo: {beta: 0.3, loss: ipo}", PREFERENCES)
PAIRS = replace(COUNTED, format="chosen/rejected", same=Lines(2, (8, 12)))


def preview(text: str = GOOD, limits: Settings | None = None, **given: object) -> Preview:
    """The good experiment's preview, with its rules' findings, as `plan_request` makes it."""
    file = parse_experiment(text, "experiments/coach.yaml")
    known = facts(**{"dataset": COUNTED, **given})
    found = tuple(run_rules(file, known, limits or Settings(namespaces=("acme",))))
    plan = None if known.missing else make_plan(file.experiment, known)
    return Preview(file.experiment.name, "experiments/coach.yaml", file.experiment, plan, known, found)


def with_previous() -> Preview:
    now = preview()
    text = changed("2e-4", "1e-4", changed("flavor: a10g-large", "flavor: l4x1", changed("r: 64", "r: 16")))
    text = changed("  epochs: 3", "  seed: 42", changed("evaluate: .*\n", "", text))
    before = preview(text)
    assert before.experiment is not None and now.experiment is not None
    versions = Version(before.experiment, before.plan), Version(now.experiment, now.plan)
    return replace(now, changes=compare(*versions))


def side_by_side() -> Preview:
    """Four variants on four GPUs, against the version with two of them; a word that acts stays words."""
    text = changed("flavor: a10g-large", "flavor: a10g-largex4", changed("timeout: 12h", "timeout: 3h", ROOMY))
    entries = "[{}, {learning_rate: 1e-4}, {lora.r: 16}, {sft.lr_scheduler_type: 'cosine|<b>@all'}]"
    now = preview(f"{text}sweep:\n  list: {entries}\n  concurrency: 4\n  max_usd: 14\n")
    before = preview(f"{text}sweep:\n  list: [{{}}, {{learning_rate: 1e-4}}]\n")
    assert before.experiment is not None and now.experiment is not None
    kept = tuple(found for found in now.findings if found.rule != "TRN003")  # the made-up scheduler
    versions = Version(before.experiment, before.plan), Version(now.experiment, now.plan)
    return replace(now, findings=kept, changes=compare(*versions))


def hostile() -> Preview:
    """Every field, finding and reason that can hold foreign text holds the worst of it."""
    evil = " ".join(HOSTILE) + "\n\n# heading\n\n```\n"
    written = evil.replace("\ud800", "")  # the schema refuses half surrogates everywhere, and backslashes in paths
    path = written.replace("\\", "").replace("..", ".")
    path = "/".join(path[start : start + 60] for start in range(0, len(path), 60))  # a file's name has a longest length
    values = preview().experiment
    assert values is not None
    raw = values.model_dump(mode="json", exclude_unset=True)
    raw["hypothesis"] = written
    raw["base"] = {"model": f"./{path}"}
    raw["data"] = {"dataset": f"data/{path}.jsonl", "subset": written, "split": written, "eval": {"split": written}}
    raw["train"] |= {"script": path, "sft": {written: written, "list": [written, {written: 1}]}}
    raw["train"]["lora"] |= {"targets": [written], "exclude": written, "rank_pattern": {written: 8}}
    raw["evaluate"] = {"prompts": path}
    experiment = Experiment.model_validate(raw)
    known = Facts(shape=CATALOGUE["google/gemma-3-12b-it"], dataset=replace(TROUBLED, estimated=evil))
    plan = make_plan(experiment, known)
    findings = tuple(
        Finding(evil, severity, Place(evil, 3, 1), f"`{evil}` {evil}", evil)
        for severity in (Severity.WARNING, Severity.ERROR)
    )
    version, before = Version(experiment, plan), preview()
    assert before.experiment is not None
    changes = compare(Version(before.experiment, before.plan), version)
    return Preview("coach", f"experiments/{evil}.yaml", experiment, plan, known, findings, changes)


def invalid() -> Preview:
    at = Place("experiments/coach.yaml", 12, 3)
    found = Finding("EXP001", Severity.ERROR, at, "unknown key `train.epoch`", "did you mean `epochs`?")
    return Preview("coach", "experiments/coach.yaml", findings=(found,))


TRACED = TracedMemory(
    allocated=9.07,
    weights=7.19,
    adapter=0.32,
    optimizer=0.16,
    activations=0.7,
    head=0.01,
    scratch=0.69,
    phase="backward of the last sliding_attention layer",
    layers=48,
    traced_layers=(4, 5, 5),
    fragmentation=0.03,
    context=0.55,
)


CASES: dict[str, Callable[[], Preview]] = {
    "quickstart": lambda: preview_of(ROOT / "experiments/examples/quickstart.yaml"),
    "chat-qlora": lambda: preview_of(ROOT / "experiments/examples/chat-qlora.yaml"),
    "preferences": lambda: preview_of(ROOT / "experiments/examples/preferences.yaml"),
    "preferences-qlora": lambda: preview(PREFERENCES, dataset=PAIRS),
    "fits": preview,
    "does-not-fit": lambda: preview(changed("max_length: 2048", "max_length: 32768")),
    "errors-and-warnings": lambda: preview(
        changed("max_usd: 10", "max_usd: 2", changed(", revision: 96b6f1e", "")), Settings(namespaces=("acne",))
    ),
    "mlx": lambda: preview(MAC),
    "mlx-any-chip": lambda: preview(changed("  flavor: m3-max\n", "", MAC)),
    "troubled-data": lambda: preview(dataset=TROUBLED),
    "with-previous": with_previous,
    "hostile": hostile,
    "sweep": lambda: preview(SWEEP),
    "sweep-side-by-side": side_by_side,
    "traced": lambda: preview(traced=TRACED),
    "traced-does-not-fit": lambda: preview(traced=replace(TRACED, allocated=24.0, activations=15.63)),
    "invalid": invalid,
    "no-plan": lambda: preview(LOCAL, missing=("data/coach.jsonl",), dataset=None),
}


@pytest.mark.parametrize("name", CASES)
def test_comment(name: str) -> None:
    assert plan_comment(CASES[name]()) == (GOLDEN / f"plan-comment-{name}.md").read_text(encoding="utf-8")


def test_short_plan() -> None:
    assert render_plan(preview()) == (GOLDEN / "plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_the_structure_is_ours_alone(name: str) -> None:
    text = plan_comment(CASES[name]())
    html = [token.content for token in tokens(text) if token.type in ("html_block", "html_inline")]
    assert re.fullmatch(r"<!-- mergetune:plan:[a-z0-9-]+ fingerprint=\w+( memory=traced)? plan=\w+ -->\n", html[0])
    assert all(re.fullmatch(r"<details><summary>[\w ,]+</summary>\n|</details>\n", part) for part in html[1:])
    assert text.count("<!--") == 1
    words = [token.content for token in tokens(text) if token.type == "text"]
    assert not [word for word in words if re.search(r"[@#][\w-]|\bGH-\d|://|\bwww\.", word)]
    kinds = {token.type for token in tokens(text)}
    assert not {
        kind for kind in kinds if kind.startswith(("link", "image", "em_", "s_", "code_block", "hr", "ordered"))
    }


def test_hostile_words_make_no_heading_and_no_list() -> None:
    parsed = tokens(plan_comment(hostile()))
    headings = [parsed[index + 1].content for index, token in enumerate(parsed) if token.type == "heading_open"]
    assert [heading.split()[0] for heading in headings] == ["❌", "Data:", "1", "Against", "Next"]
    assert "hf_abcdefghijklmnopqrstuvwxyz012345" not in plan_comment(hostile())


def test_decision_comes_first() -> None:
    said = {name: plan_comment(make()).splitlines()[2] for name, make in CASES.items()}
    assert said == {
        "quickstart": "## ✅ `quickstart` trains on `cpu-upgrade`, without a GPU",
        "chat-qlora": "## ⚠️ `chat-qlora` fits `a10g-large`; its duration cannot be known",
        "preferences": "## ✅ `preferences` trains on `cpu-upgrade`, without a GPU",
        "preferences-qlora": "## ✅ `coach` fits `a10g-large`",
        "fits": "## ✅ `coach` fits `a10g-large`",
        "does-not-fit": "## ❌ `coach` does not fit `a10g-large`",
        "errors-and-warnings": "## ❌ `coach` cannot run: 2 errors",
        "mlx": "## ✅ `coach` trains on a Mac with MLX",
        "mlx-any-chip": "## ⚠️ `coach` trains on a Mac with MLX; how long depends on its chip",
        "troubled-data": said["troubled-data"],
        "with-previous": "## ✅ `coach` fits `a10g-large`",
        "hostile": said["hostile"],
        "sweep": "## ❌ `coach` does not fit `t4-medium`",
        "sweep-side-by-side": "## ✅ `coach` fits `a10g-largex4`",
        "traced": "## ✅ `coach` fits `a10g-large`",
        "traced-does-not-fit": "## ❌ `coach` does not fit `a10g-large`",
        "invalid": "## ❌ `coach` is not a valid experiment",
        "no-plan": "## ❌ `coach` cannot run: 1 error",
    }
    unknown = plan_comment(preview(shape=None))
    assert "## ⚠️ `coach`: whether it fits `a10g-large` cannot be known" in unknown
    assert "may not fit" in plan_comment(preview(changed("max_length: 2048", "max_length: 16384")))


def test_findings_stand_worst_first_and_once() -> None:
    made = preview()
    at = Place("experiments/coach.yaml", 9, 3)
    low, high = (Finding("TST001", severity, at, "m", "h") for severity in (Severity.WARNING, Severity.ERROR))
    text = plan_comment(replace(made, findings=(low, high, low)))
    assert "### 1 error, 1 warning" in text
    assert text.index("**error**") < text.index("**warning**")
    many = tuple(Finding(f"TST{number:03}", Severity.ERROR, at, "m") for number in range(40))
    assert "- and 15 more: `mergetune check` lists them" in plan_comment(replace(made, findings=many))


def test_work_that_outlasts_its_timeout_is_said_in_the_table() -> None:
    made = preview()
    assert made.plan is not None
    train = replace(made.plan.stages[0], cost=CostEstimate(14400, 14400, 6.0, 6.0, needed_s=20_000))
    text = plan_comment(replace(made, plan=replace(made.plan, stages=(train, *made.plan.stages[1:]))))
    assert "| ~5h33m, too long | 4h00m |" in text


def test_a_comment_is_cut_between_sections_and_says_what_is_left_out() -> None:
    whole = plan_comment(preview())
    assert len(whole) < LIMIT and "Left out" not in whole
    for limit in (1500, 2500, 4000, len(whole) - 1):
        text = plan_comment(preview(), limit)
        assert len(text) <= limit
        assert text.startswith(whole[:150])
        assert text.count("<details>") == text.count("</details>")
        assert re.search(r"\nLeft out, to stay under [\d,]+ characters: [\w, ]+\. See `mergetune check` ", text)
    sft = {f"key{number}": "`@x #1 " * 20 for number in range(3000)}
    made = preview()
    assert made.experiment is not None
    train = made.experiment.train.model_copy(update={"sft": sft})
    huge = replace(made, experiment=made.experiment.model_copy(update={"train": train}))
    text = plan_comment(huge)
    assert len(text) < LIMIT and "characters: settings." in text and "### Next" in text


def test_a_plan_is_another_when_what_was_approved_is() -> None:
    def made(text: str) -> str:
        return plan_hash(make_plan(parse_experiment(text).experiment, facts()))

    assert made(GOOD) == made(changed("hypothesis: .*", "hypothesis: another"))
    others = [
        ("4h", "5h"),
        ("a10g-large", "l4x1"),
        ("2e-4", "1e-4"),
        ("coach-12b", "x"),
        ("max_usd: 10", "max_usd: 11"),
    ]
    hashes = {made(changed(*other)) for other in others}
    assert len(hashes | {made(GOOD)}) == len(others) + 1


def test_json_has_data_findings_and_changes() -> None:
    document = json.loads(json.dumps(plan_as_dict(with_previous())))
    assert document["data"]["tokens"] == {
        "per_pass": 412_345,
        "trained": 171_000,
        "longest": 1800,
        "lost": 0,
        "rows_over_max_length": 0,
        "rows_dropped": 0,
    }
    assert document["data"]["held_out_rows"] == 50
    assert document["verdict"] == "fits"
    assert len(document["plan_hash"]) == 64
    assert {"field": "train.lora.r", "before": "16", "after": "64", "decides": True} in document["changes"]["fields"]
    assert plan_as_dict(preview())["changes"] is None


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = make_repository(tmp_path_factory.mktemp("repo"))
    small = made.experiment.read_text()
    for name, text in {
        "old/small.yaml": small.replace("timeout: 10m}\nmerge", "timeout: 20m, epochs: 2}\nmerge"),
        "old/broken.yaml": "name: [",
        "experiments/wrong.yaml": small.replace("name: small", "name: wrong").replace("acme/small", "acne/small"),
        "experiments/Bröken file.yaml": "train: {epoch: 1}",
    }.items():
        (made.root / name).parent.mkdir(exist_ok=True)
        (made.root / name).write_text(text)
    return made


def test_the_command_prints_the_same_bytes_twice(repo: Repository) -> None:
    arguments = ("plan", "experiments/small.yaml", "--format", "markdown", "--against", "old/small.yaml")
    one, two = repo.call(*arguments), repo.call(*arguments)
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("<!-- mergetune:plan:small fingerprint=")
    assert "| `train.timeout` | `20m00s` | `10m00s` | stays the same |" in one.stdout
    assert "| `train.epochs` | `2.0` | `3.0` | **changes** |" in one.stdout
    assert "**A new run**" in one.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("experiments/wrong.yaml",), 1, "`HUB001` `experiments/wrong.yaml:9`: namespace `acne` is not allowed here"),
        (("experiments/Bröken file.yaml",), 2, "## ❌ `br-ken-file` is not a valid experiment"),
        (("experiments/none.yaml",), 2, "no such file"),
        (("experiments/small.yaml", "--against", "old/broken.yaml"), 0, "Not compared: the previous version cannot"),
    ],
)
def test_the_comment_is_written_whatever_is_wrong(
    repo: Repository, arguments: tuple[str], code: int, said: str
) -> None:
    done = repo.call("plan", *arguments, "--format", "markdown")
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout


def test_other_formats_stop_at_errors_and_name_a_missing_previous_file(repo: Repository) -> None:
    done = repo.call("plan", "experiments/wrong.yaml", "--format", "json")
    assert (done.returncode, done.stdout) == (1, "")
    done = repo.call("plan", "experiments/small.yaml", "--against", "old/none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "`old/none.yaml`: no such file" in done.stderr
    text = repo.call("plan", "experiments/small.yaml", "--against", "old/small.yaml").stdout
    assert "Against the previous run `small-" in text
    assert "`train.timeout` `20m00s` → `10m00s`" in text


if __name__ == "__main__":
    for name, make in CASES.items():
        (GOLDEN / f"plan-comment-{name}.md").write_text(plan_comment(make()), encoding="utf-8")
    (GOLDEN / "plan.md").write_text(render_plan(preview()), encoding="utf-8")
