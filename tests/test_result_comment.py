"""The comment when a run ends, as full texts in every state; hostile artifacts in it do nothing.

`python tests/test_result_comment.py` writes the texts anew, after a change that is meant.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_comments import EVIL

from pipeline.book import Closed, Verdict
from pipeline.plan import StageName
from pipeline.pull_request import LONGEST_COMMENT, carries
from pipeline.result_comment import Ending, result_comment, result_id, rivals_of

GOLDEN = Path(__file__).parent / "golden"
AT = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
CHECKS = {"tensors": "ok", "types": "ok", "generation": "ok"}
MANIFESTS: dict[StageName, dict[str, Any]] = {
    StageName.TRAIN: {
        "run_id": "coach-1a2b3c4d",
        "fingerprint": "1a2b3c4d" * 8,
        "duration_s": 8100.0,
        "predicted": {"duration_s": 7200.0, "allocated_gib": 9.1, "memory_gib": 9.9, "gpu": True},
        "measured": {"peak_memory_gib": 9.4},
        "metrics": {
            "train_loss": 1.31,
            "eval_loss": 1.05,
            "steps": 180,
            "tokens_trained": 1_234_567,
            "tokens_per_s": 3412.6,
        },
        "history": [{"step": step, "loss": 2.3 * 0.99**step + 0.4} for step in range(1, 181)],
        "eval_history": [
            {"step": 60, "eval_loss": 1.4},
            {"step": 120, "eval_loss": 1.12},
            {"step": 180, "eval_loss": 1.05},
        ],
        "inputs": {
            "base": {"repo": "google/gemma-3-12b-it", "revision": "9" * 40, "type": "model"},
            "data": {"path": "inputs/0/coach.jsonl", "sha256": "d" * 64},
        },
        "provenance": {
            "repository": "https://github.com/acme/tunes",
            "commit": "e" * 40,
            "path": "experiments/coach.yaml",
        },
        "seed": 42,
        "versions": {"python": "3.12.4", "torch": "2.13.0", "trl": "1.16.0"},
        "files": [{"path": "adapter_model.safetensors", "bytes": 170_000_000, "sha256": "0" * 64}],
    },
    StageName.MERGE: {
        "duration_s": 340.0,
        "predicted": {"duration_s": 364.0},
        "metrics": {"tensors": 626, "merged": 192},
        "files": [{"path": "model-00001-of-00005.safetensors", "bytes": 24_400_000_000, "sha256": "1" * 64}],
    },
    StageName.GGUF: {
        "duration_s": 1500.0,
        "predicted": {"duration_s": 1744.0},
        "metrics": {
            "quants": [
                {
                    "quant": "Q4_K_M",
                    "file": "coach-Q4_K_M.gguf",
                    "bytes": 7_300_000_000,
                    "bits_per_weight": 4.89,
                    "kl_vs_bf16": 0.0311,
                    "checks": CHECKS,
                },
                {
                    "quant": "Q8_0",
                    "file": "coach-Q8_0.gguf",
                    "bytes": 12_700_000_000,
                    "bits_per_weight": 8.5,
                    "kl_vs_bf16": 0.0004,
                    "checks": {**CHECKS, "types": "3 of 626 tensors fell back to F16"},
                },
            ]
        },
        "files": [
            {"path": "coach-Q4_K_M.gguf", "bytes": 7_300_000_000},
            {"path": "coach-Q8_0.gguf", "bytes": 12_700_000_000},
        ],
    },
    StageName.EVALUATE: {
        "duration_s": 800.0,
        "predicted": {"duration_s": 932.0},
        "metrics": {
            "before": {"loss": 1.82, "perplexity": 6.17},
            "after": {"loss": 1.04, "perplexity": 2.829},
            "loss_change_percent": -42.857,
            "tokens": 21_345,
            "rows": 50,
        },
        "samples": [
            {
                "prompt": "I keep putting things off.",
                "before": "Have you tried a list?",
                "after": "What would help?\nAnd when?",
            },
            {"prompt": [{"role": "user", "content": "Hi"}], "before": "Hello!", "after": "Welcome back."},
            {"prompt": "a | b", "before": "```\n<b>x</b>\n```", "after": "@all see #1"},
            {"prompt": "four", "before": "", "after": "x" * 5000},
        ],
    },
}
STAGES = {
    name.value: {
        "repo": f"acme/coach{ {'train': '-adapter', 'gguf': '-GGUF'}.get(name.value, '') }",
        "revision": "abcdef"[index] * 40,
        "attempt": 1,
        **{key: MANIFESTS[name][key] for key in ("duration_s", "predicted", "metrics")},
    }
    for index, name in enumerate(StageName)
}
SUMMARY = {
    "experiment": "coach",
    "hypothesis": "r=64 LoRA lowers held-out loss below 1.2, and perplexity by 60 %.",
    "dataset": "acme/coach-conversations",
    "method": "qlora",
    "loss_on": "assistant",
    "expected_usd": 3.4,
    "worst_usd": 8.1,
    "stages": STAGES,
    "curve": {"loss": [[1, 2.7], [90, 1.3], [180, 0.8]], "eval_loss": [[60, 1.4], [180, 1.05]]},
}
DONE = Closed("coach-1a2b3c4d", 1, Verdict.DONE, "4 of 4 stages are done", AT, 3.81, {"train": 1}, SUMMARY)


def earlier(run_id: str, loss: float, day: int, **summary: object) -> Closed:
    stages = {"evaluate": {"metrics": {"after": {"loss": loss}}}, "train": {"metrics": {"train_loss": 1.5}}}
    return replace(
        DONE, run_id=run_id, at=AT.replace(day=day), usd=2.5, summary={**SUMMARY, "stages": stages, **summary}
    )


ROUNDS = (
    DONE,
    earlier("coach-00000001", 1.21, 3),
    earlier("coach-00000002", 1.35, 9),
    earlier("other-00000003", 0.99, 4, experiment="other"),
    earlier("other-00000004", 0.5, 4, experiment="other", dataset="acme/else"),
    replace(earlier("coach-00000005", 0.1, 10), verdict=Verdict.FAILED),
    replace(earlier("later-00000006", 0.1, 25), summary={**SUMMARY, "experiment": "later"}),
)
FULL = Ending(
    "coach", DONE, ("alice", "bob", "alice", "app[bot]", "x y"), "", manifests=MANIFESTS, rivals=rivals_of(DONE, ROUNDS)
)
PLAIN = {key: value for key, value in SUMMARY.items() if key not in ("hypothesis", "stages", "curve")}


def over(verdict: Verdict, text: str, *, hint: str = "", number: int = 1, **more: object) -> Ending:
    more = {key.removesuffix("_in_tag"): value for key, value in more.items()}
    closed = Closed("coach-1a2b3c4d", number, verdict, text, AT, 0.31, {"train": 2}, SUMMARY | {"stages": {}} | more)
    return Ending("coach", closed, ("alice",), hint)


# The tick that ended the run could not post its comment: what it knew to do is in the tag.
LATER = {"hint_in_tag": "add credit to `acme`, then `mergetune retry coach`"}


def without(*names: StageName, **summary: object) -> Ending:
    """The full ending less some stages, as an experiment without them leaves it."""
    kept = {name: stage for name, stage in STAGES.items() if StageName(name) not in names}
    closed = replace(DONE, summary={**SUMMARY, "stages": kept, **summary})
    return replace(FULL, closed=closed, manifests={n: m for n, m in MANIFESTS.items() if n not in names}, rivals=())


def overfitted() -> Ending:
    evals = [{"step": step, "eval_loss": loss} for step, loss in ((45, 1.3), (90, 1.1), (135, 1.2), (180, 1.31))]
    return replace(FULL, manifests={StageName.TRAIN: {**MANIFESTS[StageName.TRAIN], "eval_history": evals}})


VARIANTS = [
    {
        "variant": 1,
        "words": "learning_rate 1e-4, lora.r 16",
        "state": "trained",
        "seconds": 1980.4,
        "steps": 180,
        "eval_loss_before": 1.82,
        "eval_loss": 1.21,
        "train_loss": 1.4,
        "memory_gib": 9.1,
    },
    {
        "variant": 2,
        "words": "learning_rate 1e-4, lora.r 64",
        "state": "trained",
        "seconds": 2040.0,
        "steps": 180,
        "eval_loss_before": 1.82,
        "eval_loss": 1.05,
        "train_loss": 1.31,
        "memory_gib": 9.4,
        "winner": True,
    },
    {
        "variant": 3,
        "words": "learning_rate 5e-3, lora.r 16",
        "state": "diverged",
        "seconds": 310.2,
        "reason": "`loss` is nan at step 12, with a learning rate of 0.005",
    },
    {
        "variant": 4,
        "words": "learning_rate 5e-3, lora.r 1024",
        "state": "failed",
        "seconds": 71.0,
        "reason": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB. <b>@all</b>",
    },
    {
        "variant": 5,
        "words": "lora.targets [q_proj|v_proj]",
        "state": "not started",
        "reason": "12 minutes are left of the timeout, and the longest took 34",
    },
]


def swept(rows: object = VARIANTS) -> Ending:
    return replace(FULL, manifests={**MANIFESTS, StageName.TRAIN: {**MANIFESTS[StageName.TRAIN], "sweep": rows}})


def preferred() -> Ending:
    """After preference tuning: the evaluation compares answers, the training's log has the rewards."""
    before = {"loss_chosen": 1.9, "loss_rejected": 1.7, "prefers_chosen": 0.38, "reward_margin": 0.0}
    after = {"loss_chosen": 1.86, "loss_rejected": 2.4, "prefers_chosen": 0.81, "reward_margin": 1.234}
    metrics = {"before": before, "after": {**after, "reward_accuracy": 0.9}, "loss_change_percent": None, "rows": 50}
    trained = {**MANIFESTS[StageName.TRAIN]["metrics"], "train_loss": 0.51, "eval_loss": 0.42}
    trained |= {"eval_reward_margin": 1.2, "eval_reward_accuracy": 0.88}
    curves = {
        "history": [{"step": step, "loss": 0.35 + 0.34 * 0.98**step, "reward_margin": 0.1} for step in range(1, 181)],
        "eval_history": [{"step": 90, "eval_loss": 0.5}, {"step": 180, "eval_loss": 0.42}],
    }
    manifests = {
        StageName.TRAIN: {**MANIFESTS[StageName.TRAIN], "metrics": trained, **curves},
        StageName.EVALUATE: {**MANIFESTS[StageName.EVALUATE], "metrics": metrics},
    }
    said = "DPO lifts the reward margin above 1 and the accuracy above 92 %."
    closed = replace(DONE, summary={**SUMMARY, "hypothesis": said, "method": "dpo", "curve": {}})
    return replace(FULL, closed=closed, manifests={**MANIFESTS, **manifests}, rivals=())


ENDINGS = {
    "done": FULL,
    "done-sweep": swept(),
    "done-preferences": preferred(),
    "done-tag-only": replace(FULL, manifests={}, rivals=()),
    "done-adapter-only": without(StageName.MERGE, StageName.GGUF, StageName.EVALUATE, hypothesis="It speaks well."),
    "done-full-text": without(StageName.MERGE, StageName.GGUF, StageName.EVALUATE, method="full", loss_on="all"),
    "done-overfitted": overfitted(),
    "failed": over(
        Verdict.FAILED,
        "train: the GPU ran out of memory: CUDA out of memory. Tried to allocate 4.00 GiB",
        hint="`train.max_length: 4096 → 2048`, then `mergetune retry coach`",
        curve={"loss": [[1, 2.7], [2, 2.6]]},
    ),
    "failed-again": over(Verdict.FAILED, "train: the job ran into its timeout", number=2, hint="raise `train.timeout`"),
    "failed-unknown": over(
        Verdict.FAILED,
        "train: not known: my_thing.FrobError: the flange is too tight",
        hint="read the job's log",
        lines=["Traceback (most recent call last):", "```", "FrobError: the flange <!-- is --> too tight @all"],
    ),
    "failed-told-later": replace(over(Verdict.FAILED, "train: no credit is left", **LATER), hint=""),
    "stopped-early": over(Verdict.FAILED, "train: stopped early: the loss is nan at step 120", hint="use a lower rate"),
    "cancelled": over(Verdict.CANCELLED, "cancelled by a person"),
    "superseded": Ending(
        "coach", Closed("coach-1a2b3c4d", 1, Verdict.SUPERSEDED, "the experiment was edited", AT, 0.1)
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_whole_text(name: str) -> None:
    assert result_comment(ENDINGS[name]) == (GOLDEN / f"result-{name}.md").read_text(encoding="utf-8")


def test_without_an_evaluation_the_training_tells_the_rewards() -> None:
    ending = preferred()
    closed = replace(ending.closed, summary={**ending.closed.summary, "hypothesis": "It prefers better."})
    trained = {StageName.TRAIN: ending.manifests[StageName.TRAIN]}
    text = result_comment(
        replace(ending, manifests=trained, closed=replace(closed, summary=closed.summary | {"stages": {}}))
    )
    assert "| reward margin, chosen over rejected | 0 | **1.200** |" in text
    assert "| reward accuracy | – | **88.0 %** |" in text
    assert "likelier" not in text
    assert "names no reward margin or accuracy to hold it to" in text


def test_each_round_has_a_comment_of_its_own() -> None:
    text = result_comment(ENDINGS["failed-again"])
    assert carries(text, "result:coach-1a2b3c4d.2")
    assert result_id(DONE) == "coach-1a2b3c4d"


def test_rivals_are_finished_runs_before_this_one() -> None:
    assert [(why, one.run_id) for why, one in rivals_of(DONE, ROUNDS)] == [
        ("the run before it", "coach-00000002"),
        ("the best on this data", "other-00000003"),
    ]
    assert rivals_of(DONE, ROUNDS[:2]) == (("the run before it", ROUNDS[1]),)
    assert rivals_of(DONE, ()) == ()
    assert rivals_of(replace(DONE, summary={}), ROUNDS) == ()


def evil(value: Any) -> Any:
    """The same shape with every text replaced, and every number by one that no table expects."""
    if isinstance(value, Mapping):
        return {key: evil(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [evil(entry) for entry in value]
    return EVIL if isinstance(value, str) else value


WRONG = [None, "x", 7, [], {}, [1], {"a": 1}, True, math.nan, 10**400]


def test_hostile_artifacts_do_not_act() -> None:
    manifests = {name: evil(manifest) for name, manifest in MANIFESTS.items()}
    closed = replace(DONE, text=EVIL, summary=evil(SUMMARY))
    text = result_comment(Ending(EVIL, closed, (EVIL,), EVIL, manifests=manifests))
    inside = text.partition("-->")[2]
    outside_code = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", inside, flags=re.DOTALL)
    assert "<!--" not in inside
    assert "\u202e" not in text
    assert "@everyone" not in outside_code
    assert "](http://evil" not in outside_code
    assert "hf download" not in text


@pytest.mark.parametrize("name", StageName)
def test_a_manifest_of_any_shape_makes_a_comment(name: StageName) -> None:
    for key in MANIFESTS[name]:
        for wrong in WRONG:
            manifests = {**MANIFESTS, name: {**MANIFESTS[name], key: wrong}}
            assert result_comment(replace(FULL, manifests=manifests)).startswith("<!-- mergetune:result:")
    for key in SUMMARY:
        for wrong in WRONG:
            closed = replace(DONE, summary={**SUMMARY, key: wrong})
            assert result_comment(replace(FULL, closed=closed)).startswith("<!-- mergetune:result:")


def test_the_rows_of_a_sweep_may_be_anything() -> None:
    for wrong in WRONG:
        assert result_comment(swept(wrong)).startswith("<!-- mergetune:result:")
        for key in VARIANTS[1]:
            rows = [{**VARIANTS[1], key: wrong}, VARIANTS[0], wrong]
            assert result_comment(swept(rows)).startswith("<!-- mergetune:result:")
    assert result_comment(swept([VARIANTS[0]] * 10_000)).count("`learning_rate 1e-4, lora.r 16`") == 32
    evil_rows = [evil({**row, "words": "", "reason": ""}) for row in VARIANTS]
    inside = result_comment(swept(evil_rows)).partition("-->")[2]
    assert "<!--" not in inside and "@everyone" not in re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", inside)


def test_who_won_is_said_in_a_sentence() -> None:
    won, second = VARIANTS[1], VARIANTS[0]
    said = "**Variant 2** (`learning_rate 1e-4, lora.r 64`) won with a held-out loss of 1.050: 0.160 (13.2 %) below"
    assert f"{said} variant 1 (`learning_rate 1e-4, lora.r 16`)." in result_comment(swept([won, second]))
    assert "is the only one that was trained to its end." in result_comment(swept([won, VARIANTS[2]]))
    even = result_comment(swept([won, {**second, "eval_loss": 1.05}]))
    assert "won, and variant 1 (`learning_rate 1e-4, lora.r 16`) is as good: 1.050 both." in even


def test_no_manifest_sends_a_reader_to_another_repository() -> None:
    stolen = {**MANIFESTS[StageName.GGUF], "repo": "mallory/coach-GGUF", "revision": "f" * 40}
    text = result_comment(replace(FULL, manifests={**MANIFESTS, StageName.GGUF: stolen}))
    assert "mallory" not in text


def test_a_comment_that_would_be_too_long_does_without_samples() -> None:
    samples = [{"prompt": "<" * 700, "before": "*" * 700, "after": "_" * 700}] * 8
    metrics = {f"{n}" + "m" * 180: "v" * 180 for n in range(80)}
    manifests = {
        **MANIFESTS,
        StageName.EVALUATE: {**MANIFESTS[StageName.EVALUATE], "samples": samples},
        StageName.MERGE: {**MANIFESTS[StageName.MERGE], "metrics": metrics},
    }
    text = result_comment(replace(FULL, manifests=manifests))
    assert len(text) <= LONGEST_COMMENT
    assert "Use it" in text
    assert "Before and after" not in text


if __name__ == "__main__":
    for name, ending in ENDINGS.items():
        (GOLDEN / f"result-{name}.md").write_text(result_comment(ending), encoding="utf-8")
