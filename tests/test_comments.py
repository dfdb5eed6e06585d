"""The comments as people read them: whole texts, and text from outside that must not act in them."""

import re
from datetime import UTC, datetime

import pytest

from pipeline.book import Closed, Verdict
from pipeline.comments import (
    LOOK,
    POINTS,
    Ending,
    RunView,
    answer_comment,
    help_text,
    loss_chart,
    refusal,
    result_comment,
    result_id,
    run_comment,
    status_table,
    tick_boxes,
)
from pipeline.plan import StageName
from pipeline.pull_request import carries

SUMMARY = {
    "experiment": "coach",
    "hypothesis": "held-out loss falls below 1.2",
    "expected_usd": 0.5,
    "worst_usd": 1,
    "stages": {
        "train": {
            "repo": "acme/coach-adapter",
            "revision": "a" * 40,
            "duration_s": 500,
            "metrics": {"steps": 6, "tokens_per_s": 12.345},
        },
        "gguf": {"repo": "acme/coach-GGUF", "revision": "b" * 40, "duration_s": 50, "metrics": {}},
        "evaluate": {
            "repo": "acme/coach",
            "revision": "c" * 40,
            "metrics": {"before": {"loss": 2.0}, "after": {"loss": 1.0}, "loss_change_percent": -50.0},
        },
    },
}
DONE = Closed(
    "coach-1a2b3c4d", 1, Verdict.DONE, "3 of 3 stages are done", datetime.now(UTC), 0.43, {"train": 1}, SUMMARY
)
RUNNING = """\
<!-- mergetune:run:coach -->

### `coach` is under way

● train → ◐ merge → ○ gguf

merge, attempt 1 on cpu-upgrade

[log and machine of the job](https://huggingface.co/jobs/acme/1)

Run `coach-1a2b3c4d`. This comment follows it; `/cancel coach` stops it.
"""
RESULT = f"""\
<!-- mergetune:result:coach-1a2b3c4d -->

## ✅ `coach` is done

@alice @bob · 3 of 3 stages are done

> held-out loss falls below 1.2

**Held-out loss fell by 50.0 %**, from 2.000 to 1.000

| stage | took | made |
|---|--:|---|
| train | 8m20s | [`acme/coach-adapter`](https://huggingface.co/acme/coach-adapter/tree/{"a" * 40}) |
| gguf | 50s | [`acme/coach-GGUF`](https://huggingface.co/acme/coach-GGUF/tree/{"b" * 40}) |
| evaluate | – | [`acme/coach`](https://huggingface.co/acme/coach/tree/{"c" * 40}) |

**Cost** $0.43, $0.50 was expected, at most $1.00 was approved

Training loss `█▅▁` 3.000 → 1.000

```mermaid
{LOOK}
xychart-beta
    x-axis "step" 1 --> 3
    y-axis "training loss" 0.8000 --> 3.2000
    line [3.0000, 2.0000, 1.0000]
```

<details><summary>Every metric</summary>

| stage | metric | value |
|---|---|--:|
| train | `steps` | `6` |
| train | `tokens_per_s` | `12.35` |
| evaluate | `loss_change_percent` | `-50` |

</details>

Use it:

```sh
llama-server -hf acme/coach-GGUF
```
"""
EVIL = "@everyone #1 <!-- mergetune:plan:x --> ```\n# x\n| [a](http://evil)\u202e https://evil"


def test_a_run_that_goes_on() -> None:
    stages = ((StageName.TRAIN, "done"), (StageName.MERGE, "now"), (StageName.GGUF, "next"))
    view = RunView("coach", "coach-1a2b3c4d", "is under way", stages, "merge, attempt 1 on cpu-upgrade")
    assert run_comment(RunView(**{**vars(view), "job_url": "https://huggingface.co/jobs/acme/1"})) == RUNNING


def test_a_run_that_is_done() -> None:
    history = tuple({"step": step, "loss": 4.0 - step} for step in (1, 2, 3))
    text = result_comment(Ending("coach", DONE, ("alice", "bob", "alice", "app[bot]", "x y"), history=history))
    assert text == RESULT


def test_a_run_that_failed_says_how_to_go_on() -> None:
    closed = Closed("coach-1a2b3c4d", 2, Verdict.FAILED, "train: out of memory", datetime.now(UTC), 0.1, {"train": 1})
    text = result_comment(Ending("coach", closed, ("alice",), "use `batch_size: 1`"))
    assert carries(text, "result:coach-1a2b3c4d.2")
    assert result_id(closed) == "coach-1a2b3c4d.2"
    assert "**What to do:** use `batch_size: 1`" in text
    assert "`/retry coach`" in text


@pytest.mark.parametrize(
    "text",
    [
        run_comment(RunView("coach", "coach-1", "is blocked", (), EVIL, EVIL, "javascript:alert(1)")),
        result_comment(Ending("coach", Closed("coach-1", 1, Verdict.FAILED, EVIL, datetime.now(UTC), 0.0), hint=EVIL)),
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


def test_a_chart_has_no_number_that_mermaid_cannot_read() -> None:
    points = [{"step": step, "loss": 1e-7 * step} for step in range(1, 500)] + [{"step": 500, "loss": float("nan")}]
    chart = loss_chart(points)
    assert "e-" not in chart.partition("mermaid")[2]
    assert "nan" not in chart.lower()
    line = next(row for row in chart.splitlines() if row.strip().startswith("line"))
    assert line.count(",") < POINTS
    assert loss_chart([]) == loss_chart(points[:1]) == ""


def test_boxes_are_ticked_and_unticked_between_our_marks_alone() -> None:
    body = "- [ ] a\n<!-- mergetune:checklist -->\n- [ ] b\n- [x] c\n<!-- /mergetune:checklist -->\n- [x] d"
    assert tick_boxes(body, [True, False]).count("[x]") == 2
    assert tick_boxes(body, [True, False]).startswith("- [ ] a")
