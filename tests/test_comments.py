"""The comments that follow a run, as full texts in every state, and text from outside that must not act in them.

`python tests/test_comments.py` writes the texts anew, after a change that is meant.
"""

import json
import re
from pathlib import Path

import pytest

from pipeline.comments import (
    RunView,
    answer_comment,
    findings_text,
    help_text,
    left_comment,
    refusal,
    run_comment,
    status_table,
    tick_boxes,
)
from pipeline.live import read_live
from pipeline.plan import StageName

GOLDEN = Path(__file__).parent / "golden"
TRAIN, MERGE, GGUF, EVALUATE = StageName
URL = "https://huggingface.co/jobs/acme/1"


def log(*events: tuple[str, dict]) -> str:
    return "\n".join("MERGETUNE " + json.dumps({"event": kind, **fields}) for kind, fields in events)


def steps(*losses: float, total: int = 600) -> list[tuple[str, dict]]:
    """A step every ten seconds, ten steps apart."""
    return [
        ("step", {"step": 10 * n, "total": total, "loss": loss, "tokens_per_s": 3412.6, "time": 1000.0 + 10 * n})
        for n, loss in enumerate(losses, 1)
    ]


def of_variant(number: int, *events: tuple[str, dict]) -> list[tuple[str, dict]]:
    """The events of one variant of a sweep of six."""
    return [(kind, {**fields, "variant": number, "variants": 6}) for kind, fields in events]


FALLING = [2.31 * 0.97**n + 0.5 for n in range(20)]
RISING = [*FALLING, *(FALLING[-1] * 1.05**n for n in range(12))]


def view(headline: str, strip: str, text: str, **more: object) -> RunView:
    stages = tuple(zip(StageName, strip.split(), strict=True))
    return RunView("coach", "coach-1a2b3c4d", headline, stages, text, **{"job_url": URL, **more})


def under_way(stage: StageName, strip: str, *events: tuple[str, dict], **more: object) -> RunView:
    live = read_live(stage, log(*events))
    return view("is under way", strip, f"{stage} is running", job=live, most_usd=6.0, **more)


BROKEN = [("eval", {"step": 100, "eval_loss": 1.9}), ("warning", {"message": "12 rows are cut @all <b>"})]
VIEWS = {
    "submitted": view("is under way", "now next next next", "train, attempt 1 on a10g-large: first attempt"),
    "queued": view("is under way", "now next next next", "train is queued"),
    "loading": under_way(TRAIN, "now next next next", ("phase", {"name": "load base", "time": 1000.0}), usd=0.05),
    "training": under_way(
        TRAIN, "now next next next", *steps(*FALLING), ("eval", {"step": 200, "eval_loss": 1.712}), usd=0.43
    ),
    "training-on-nodes": under_way(
        TRAIN,
        "now next next next",
        *steps(*FALLING),
        usd=1.13,
        node_urls=("https://huggingface.co/jobs/acme/second", "javascript:alert(1)"),
    ),
    "training-badly": under_way(TRAIN, "now next next next", *steps(*RISING), *BROKEN, usd=0.9, learning_rate=2e-4),
    "sweeping": under_way(
        TRAIN,
        "now next next next",
        *of_variant(1, *steps(*RISING), ("eval", {"step": 200, "eval_loss": 1.712})),
        ("warning", {"message": "variant 2 (`lora.r 8`) diverged: `loss` is nan at step 12"}),
        *of_variant(3, *steps(*FALLING[:15]), ("eval", {"step": 100, "eval_loss": 1.65})),
        *of_variant(1, *steps(9.0)),  # one that trains beside it
        usd=0.43,
        learning_rate=2e-4,
    ),
    "retried": view("is under way", "now next next next", "train, attempt 2 on a10g-large: the machine was lost"),
    "converting": under_way(
        GGUF,
        "done done now next",
        ("phase", {"name": "quantize Q4_K_M", "time": 1000.0}),
        ("progress", {"done": 120, "total": 480, "unit": "tensors", "time": 1010.0}),
        usd=0.0,
    ),
    "blocked": view(
        "is blocked",
        "next next next next",
        "needs review: #12 has 0 of 1 approvals of `0123456789ab` by writers",
        hint="approve the last commit of #12; the next tick looks again",
        job_url="",
    ),
    "done": view("is done", "done done done done", "4 of 4 stages are done", live=False, job_url=""),
    "stopped-early": view(
        "failed",
        "failed next next next",
        "train: stopped early: the loss is nan at step 120",
        hint="use `train.learning_rate: 2e-05`, or look for broken rows",
        live=False,
    ),
    "cancelled": view("was cancelled", "done failed next next", "cancelled by a person", live=False, job_url=""),
    "hostile": view("is blocked", "next next next next", "EVIL", hint="EVIL", job_url="javascript:alert(1)"),
}
OTHERS = {
    "left": left_comment("coach"),
    "answer": answer_comment(7, "bob", "/cancel coach", "coach-1a2b3c4d: cancelled, 1 job stopped"),
    "refusal": answer_comment(8, "bob", "/retry x", refusal("no experiment is called `x`", "did you mean `coach`?")),
    "help": answer_comment(9, "bob", "/help", help_text()),
    "unknown": answer_comment(10, "bob", "/lanch", help_text("/lanch")),
    "status": status_table([("coach", "pending", "train is running"), ("other", "success", "4 of 4 stages are done")]),
    "no-status": status_table([]),
    "unsaid": findings_text(["`coach`: GitHub did not take it (unreachable): 502"]),
}
EVIL = "@everyone #1 <!-- mergetune:plan:x --> ```\n# x\n| [a](http://evil)\u202e https://evil"


def rendered() -> dict[str, str]:
    texts = {name: run_comment(shown) for name, shown in VIEWS.items() if name != "hostile"}
    hostile = RunView(**{**vars(VIEWS["hostile"]), "text": EVIL, "hint": EVIL})
    return {f"run-{name}": text for name, text in (texts | {"hostile": run_comment(hostile)}).items()} | {
        f"said-{name}": text if text.endswith("\n") else f"{text}\n" for name, text in OTHERS.items()
    }


@pytest.mark.parametrize("name", rendered())
def test_the_whole_text(name: str) -> None:
    assert rendered()[name] == (GOLDEN / f"{name}.md").read_text(encoding="utf-8")


def test_a_job_that_says_nothing_changes_nothing() -> None:
    silent = RunView(**{**vars(VIEWS["queued"]), "job": read_live(TRAIN, "")})
    assert run_comment(silent).replace("phase `start`\n\n", "") == run_comment(VIEWS["queued"])


@pytest.mark.parametrize(
    "text",
    [
        run_comment(RunView("coach", "coach-1", "is blocked", (), EVIL, EVIL, "javascript:alert(1)")),
        run_comment(under_way(TRAIN, "now next next next", ("warning", {"message": EVIL}), ("phase", {"name": EVIL}))),
        answer_comment(7, "bob", f"/x {EVIL}", refusal(EVIL, EVIL)),
        help_text(EVIL),
        status_table([(EVIL, EVIL, EVIL)]),
    ],
)
def test_text_from_outside_does_not_act(text: str) -> None:
    inside = text.partition("-->")[2] if text.startswith("<!--") else text
    outside_code = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", inside, flags=re.DOTALL)
    assert "<!--" not in inside
    assert "\u202e" not in text
    assert "@everyone" not in outside_code
    assert "#1" not in outside_code
    assert "](http://evil" not in outside_code
    assert "javascript" not in text


def test_boxes_are_ticked_and_unticked_between_our_marks_alone() -> None:
    body = "- [ ] a\n<!-- mergetune:checklist -->\n- [ ] b\n- [x] c\n<!-- /mergetune:checklist -->\n- [x] d"
    assert tick_boxes(body, [True, False]).count("[x]") == 2
    assert tick_boxes(body, [True, False]).startswith("- [ ] a")


if __name__ == "__main__":
    for name, text in rendered().items():
        (GOLDEN / f"{name}.md").write_text(text, encoding="utf-8")
