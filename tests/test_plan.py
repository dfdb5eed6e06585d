"""Identity and stages of a plan: what enters the fingerprint, what does not, which stages follow."""

from dataclasses import replace

import pytest
from examples import GOOD, changed

from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.errors import UserError
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.plan import StageName, in_repo_paths, make_fingerprint, make_plan

LOCAL = changed("dataset: acme/coach", "dataset: data/coach.jsonl", changed("  revision: 5d2\n", ""))
FACTS = Facts(content={"data/coach.jsonl": "a" * 64}, shape=CATALOGUE["google/gemma-3-12b-it"])


def fingerprint(text: str, facts: Facts = FACTS) -> str:
    return make_fingerprint(parse_experiment(text).experiment, facts)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("flavor: a10g-large", "flavor: a100-large"),
        ("timeout: 4h", "timeout: 6h"),
        ("max_usd: 10", "max_usd: 20"),
        ("hypothesis: .*", "hypothesis: another expectation"),
        ("name: coach", "name: coach-two"),
        ("repo: acme/coach-12b", "repo: acme/other"),
        ("max_new_tokens: 100", "max_new_tokens: 50"),
        ("learning_rate: 2e-4", "learning_rate: 0.0002"),
        ("epochs: 3", "epochs: 3.0"),
        ("  epochs: 3", "  epochs: 3\n  save_steps: 10"),
        ("  epochs: 3", "  epochs: 3\n  tracking: trackio"),
        (r"merge: .*", "merge: {flavor: cpu-xl}"),
    ],
)
def test_what_does_not_decide_the_result_does_not_enter(pattern: str, replacement: str) -> None:
    assert fingerprint(changed(pattern, replacement)) == fingerprint(GOOD)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("gemma-3-12b-it", "gemma-3-4b-it"),
        ("revision: 96b6f1e", "revision: 96b6f1f"),
        ("revision: 5d2", "revision: 5d3"),
        ("fraction: 0.05", "fraction: 0.1"),
        ("2e-4", "1e-4"),
        ("epochs: 3", "epochs: 2"),
        ("r: 64", "r: 32"),
        ("Q4_K_M, Q8_0", "Q4_K_M"),
        ("  epochs: 3", "  epochs: 3\n  seed: 7"),
        ("  epochs: 3", "  epochs: 3\n  loss_on: all"),
        ("  epochs: 3", "  epochs: 3\n  sft: {warmup_steps: 10}"),
    ],
)
def test_what_decides_the_result_enters(pattern: str, replacement: str) -> None:
    assert fingerprint(changed(pattern, replacement)) != fingerprint(GOOD)


def test_data_base_and_script_of_this_repository_enter_by_content() -> None:
    assert fingerprint(LOCAL) != fingerprint(LOCAL, replace(FACTS, content={"data/coach.jsonl": "b" * 64}))
    scripted = changed("  epochs: 3", "  epochs: 3\n  script: scripts/mine.py")
    one, two = ({"scripts/mine.py": letter * 64} for letter in "ab")
    assert fingerprint(scripted, Facts(content=one)) != fingerprint(scripted, Facts(content=two))


def test_prompts_do_not_enter_even_when_their_file_changes() -> None:
    text = changed("max_new_tokens: 100", "prompts: evals/p.jsonl")
    assert fingerprint(text, Facts(content={"evals/p.jsonl": "a" * 64})) == fingerprint(GOOD, Facts())


def test_a_new_default_changes_no_old_fingerprint() -> None:
    """Only written fields enter: writing a default out is another text, leaving it out is this one forever."""
    # Recorded when the schema was first released; a change here would relaunch every finished experiment.
    assert fingerprint(GOOD, Facts()) == "b2f2d99457bed2f502643a896a1073ee585d3999ee54788cfbc493767ce0bde9"


def test_stages_and_run_id() -> None:
    plan = make_plan(parse_experiment(GOOD).experiment, FACTS)
    assert [stage.name for stage in plan.stages] == list(StageName)
    assert plan.run_id == f"coach-{plan.fingerprint[:8]}"
    assert plan.stages[0].script == "scripts/train_sft.py"
    assert plan.stages[0].memory is not None
    assert plan.stages[0].cost.worst_usd == pytest.approx(6.0)


def test_full_training_has_no_merge_stage() -> None:
    text = changed("method: qlora", "method: full", changed("  lora: .*\n", "", changed("^merge: .*\n", "")))
    plan = make_plan(parse_experiment(text).experiment, FACTS)
    assert [stage.name for stage in plan.stages] == [StageName.TRAIN, StageName.GGUF, StageName.EVALUATE]


def test_a_stage_runs_when_its_section_is_written() -> None:
    text = changed("^evaluate: .*\n", "", changed("^gguf: .*\n", ""))
    plan = make_plan(parse_experiment(text).experiment, FACTS)
    assert [stage.name for stage in plan.stages] == [StageName.TRAIN, StageName.MERGE]


def test_unknown_flavor_and_missing_path_are_named() -> None:
    with pytest.raises(UserError, match="no flavor `a10g-larg`") as caught:
        make_plan(parse_experiment(changed("a10g-large", "a10g-larg")).experiment, FACTS)
    assert caught.value.hint == "write `a10g-large`"
    with pytest.raises(UserError, match=r"`data/coach.jsonl` is not in this repository"):
        make_plan(parse_experiment(LOCAL).experiment, Facts(missing=("data/coach.jsonl",)))


def test_costs_are_unknown_rather_than_guessed() -> None:
    plan = make_plan(parse_experiment(GOOD).experiment, Facts())
    assert plan.expected_usd is None
    assert plan.stages[0].memory is None
    counted = TokenFacts(1000, 1_000_000, 500_000, 2048)
    rows = DatasetFacts("rows.jsonl", 1000, 1000, "messages", is_chat=True, tokens=counted)
    known = make_plan(parse_experiment(GOOD).experiment, replace(FACTS, dataset=rows))
    assert known.expected_usd is not None
    assert 0 < known.expected_usd < known.worst_usd


def test_in_repo_paths() -> None:
    text = changed("max_new_tokens: 100", "prompts: evals/p.jsonl", LOCAL)
    assert in_repo_paths(parse_experiment(text).experiment) == ("data/coach.jsonl", "evals/p.jsonl")
