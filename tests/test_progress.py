"""Progress from events, and how it reads."""

import io
from typing import Any

from pipeline.plan import StageName
from pipeline.progress import (
    LiveDisplay,
    PlainDisplay,
    Progress,
    StageState,
    advance,
    begin_stage,
    duration,
    make_display,
    mark_stage,
    progress_of,
    stage_strip,
    status_line,
)

START = progress_of("coach-1234", list(StageName), [])


def after(*events: dict[str, Any]) -> Progress:
    progress = begin_stage(START, StageName.TRAIN)
    for event in events:
        progress = advance(progress, event)
    return progress


def step(number: int, when: float, loss: float | str = 2.0) -> dict[str, Any]:
    return {"event": "step", "step": number, "total": 100, "time": when, "loss": loss, "tokens_per_s": 1234.5}


def test_a_step_in_words() -> None:
    progress = after({"event": "phase", "name": "load base"}, step(10, 100.0), step(20, 110.0, 1.5))
    assert status_line(progress) == "train: train · step 20/100 · loss 1.500 · 1,234 tokens/s · 1m20s left"


def test_no_time_left_is_claimed_before_there_is_a_pace() -> None:
    assert after(step(1, 100.0)).eta_s is None
    assert after(step(1, 100.0), step(1, 105.0)).eta_s is None


def test_not_a_number_arrives_as_text_and_is_shown() -> None:
    assert "loss nan" in status_line(after(step(1, 1.0, "nan")))


def test_stage_strip() -> None:
    progress = mark_stage(after(), StageName.TRAIN, StageState.DONE)
    progress = begin_stage(progress, StageName.MERGE)
    assert stage_strip(progress) == "● train  ◐ merge  ○ gguf  ○ evaluate"


def test_unknown_events_change_nothing() -> None:
    assert after({"event": "from a later version", "x": 1}) == after()


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.4, 60, 3599, 7620)] == ["0s", "59s", "1m00s", "59m59s", "2h07m"]


def test_plain_display_prints_what_matters_and_no_control_codes() -> None:
    out = io.StringIO()
    display = PlainDisplay(out)
    display.show(after({"event": "phase", "name": "load base"}), important=True)
    for number in range(1, 100):
        display.show(after(step(number, float(number))))
    display.show(after(step(100, 100.0)))
    lines = out.getvalue().splitlines()
    assert lines[0] == "train: load base"
    assert "step 100/100" in lines[-1]
    assert len(lines) <= 3
    assert "\x1b" not in out.getvalue()
    assert isinstance(make_display(io.StringIO()), PlainDisplay)


def test_live_display_draws_the_strip_and_the_loss() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    display = make_display(out)
    assert isinstance(display, LiveDisplay)
    display.show(after(step(1, 1.0), step(2, 2.0, 1.0)))
    display.live.refresh()
    display.say("train: warning: something")
    display.close()
    shown = out.getvalue()
    assert "● train" in shown or "◐ train" in shown
    assert "something" in shown
