"""The report of a run as a full text; untrusted text cannot act."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples import GOOD, changed

from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.plan import Plan, StageName, make_plan
from pipeline.report import RunResult, render_report

COUNTED = TokenFacts(1000, 1_000_000, 500_000, 2048)
ROWS = DatasetFacts("rows.jsonl", 1000, 1000, "messages", is_chat=True, tokens=COUNTED)
FACTS = Facts(shape=CATALOGUE["google/gemma-3-12b-it"], dataset=ROWS)
GOLDEN = Path(__file__).parent / "golden"


def plan() -> Plan:
    return make_plan(parse_experiment(GOOD).experiment, FACTS)


def manifest(stage: str, files: dict[str, int], **fields: Any) -> dict[str, Any]:
    listed = [{"path": path, "bytes": count, "sha256": "0123456789abcdef" * 4} for path, count in files.items()]
    common = {"stage": stage, "attempt": 1, "duration_s": 75.2, "measured": {"peak_memory_gib": 1.25}}
    return {**common, "versions": {"python": "3.11.7", "torch": "2.13.0"}, "files": listed, **fields}


def result() -> RunResult:
    train = manifest(
        "train",
        {"adapter_model.safetensors": 904712},
        metrics={"steps": 65, "rows": 260, "tokens_trained": 23704, "tokens_per_s": 601.0},
        history=[{"step": i + 1, "loss": 6 - i * 0.5} for i in range(8)],
        eval_history=[{"step": 4, "eval_loss": 4.4}, {"step": 8, "eval_loss": 3.1}],
    )
    evaluate = manifest(
        "evaluate",
        {},
        metrics={
            "before": {"loss": 4.0, "perplexity": 54.6},
            "after": {"loss": 2.0, "perplexity": 7.39},
            "loss_change_percent": -50.0,
            "tokens": 1234,
            "rows": 40,
        },
        samples=[
            {"prompt": "What does `len` do?", "before": "Return the length.", "after": "Aye, sailor!\n```\n@acme #1"}
        ],
    )
    gguf = manifest("gguf", {"coach-Q8_0.gguf": 3_500_000, "coach-Q4_K_M.gguf": 2_100_000})
    merge = manifest("merge", {"model.safetensors": 5_200_000, "README.md": 10})
    stages = {"train": train, "merge": merge, "gguf": gguf, "evaluate": evaluate}
    return RunResult(plan(), {StageName(name): made for name, made in stages.items()}, Path("runs/coach"))


def test_report() -> None:
    assert render_report(result()) == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_a_base_that_was_quantised_for_the_training_is_named() -> None:
    made = result()
    on = {"model": "mlx-community/`x`-4bit", "revision": "1a2b3c4", "quantization": {"bits": 4, "group_size": 64}}
    trained = {**made.manifests[StageName.TRAIN], "trained_on": on}
    text = render_report(replace(made, manifests={**made.manifests, StageName.TRAIN: trained}))
    assert "- trained on ``mlx-community/`x`-4bit``, quantised to `4` bits\n" in text
    plain = {**trained, "trained_on": {**on, "quantization": None}}
    assert "- trained on" not in render_report(replace(made, manifests={StageName.TRAIN: plain}))


def test_a_report_of_preferences() -> None:
    made = result()
    metrics = {"before": {"prefers_chosen": 0.25, "reward_margin": 0.0}, "loss_change_percent": None}
    metrics["after"] = {"prefers_chosen": 0.5, "reward_margin": 2.5, "reward_accuracy": 1.0}
    evaluate = {**made.manifests[StageName.EVALUATE], "metrics": metrics}
    text = render_report(replace(made, manifests={**made.manifests, StageName.EVALUATE: evaluate}))
    assert "Held-out loss" not in text
    assert "| reward margin, chosen over rejected | 0 | **2.500** |  |" in text
    assert "| the chosen answer is the likelier | 25.0 % | **50.0 %** | +25.0 points |" in text


def test_an_evaluation_of_prompts_alone_has_no_verdict() -> None:
    made = result()
    metrics = {"before": None, "after": None, "loss_change_percent": None}
    evaluate = {**made.manifests[StageName.EVALUATE], "metrics": metrics}
    text = render_report(replace(made, manifests={**made.manifests, StageName.EVALUATE: evaluate}))
    assert "rows the training never saw" not in text
    assert "Aye, sailor!" in text


def test_a_report_of_what_there_is() -> None:
    only = replace(result(), manifests={StageName.GGUF: result().manifests[StageName.GGUF]})
    text = render_report(only)
    assert "Stages done: gguf." in text
    assert "Held-out" not in text
    # The first of `gguf.quants` is the one the commands name.
    assert "llama-server -m runs/coach/gguf/artifact/coach-Q4_K_M.gguf --port 8080" in text


def test_hypothesis_and_samples_cannot_act() -> None:
    hostile = changed("hypothesis: .*", 'hypothesis: "@acme fixes #12 <!-- x --> [a](b) `c`"')
    plan = make_plan(parse_experiment(hostile).experiment, FACTS)
    text = render_report(replace(result(), plan=plan))
    quoted = next(line for line in text.splitlines() if "fixes" in line)
    assert "<!--" not in quoted
    assert "@acme" not in quoted
    assert "#12" not in quoted
