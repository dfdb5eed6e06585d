"""What a curve says in words, and when it proves that a job wastes money."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pipeline.curve_notes import IN_A_ROW, find_waste, notes, notes_on
from pipeline.live import Beat, Live, Point, read_live
from pipeline.plan import StageName
from pipeline.progress import progress_of
from pipeline.settings import Stop

RATE = 2e-4
FALLING = [3.0 * 0.985**step + 0.4 for step in range(100)]


def points(losses: Sequence[float], norms: Sequence[float | None] = ()) -> tuple[Point, ...]:
    padded = [*norms, *([1.0] * (len(losses) - len(norms)))]
    return tuple(Point(10 * (i + 1), loss, norm) for i, (loss, norm) in enumerate(zip(losses, padded, strict=True)))


def job(seen: Sequence[Point] = (), beats: Sequence[Beat] = (), phase: str = "train") -> Live:
    progress = progress_of("run", [StageName.TRAIN], [])
    return Live(progress.__class__(**{**vars(progress), "phase": phase}), tuple(seen), (), tuple(beats))


@pytest.mark.parametrize(
    ("losses", "held_out", "word"),
    [
        ([*FALLING[:50], *(FALLING[50] * 1.01**step for step in range(60))], (), "is rising"),
        ([2.31 + 0.01 * (-1) ** step for step in range(40)], (), "has not moved"),
        ([11.8 * 0.99**step for step in range(40)], (), "usually begins at 2 to 3"),
        (FALLING, ((200, 1.5), (400, 1.2), (600, 1.31), (800, 1.4)), "by heart. `train.max_steps: 400`"),
        ([2.0 * 0.8**step for step in range(40)], (), "knows its rows by heart"),
    ],
)
def test_a_curve_that_leaves_its_course_is_told(losses: list[float], held_out: tuple, word: str) -> None:
    said = notes_on(points(losses), held_out, RATE)
    assert any(word in note for note in said), said


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        (FALLING, ((200, 1.5), (400, 1.2), (600, 1.19), (800, 1.21))),  # held-out wobbles
        ([2.5, 1.2, *([0.9 + 0.02 * math.sin(step) for step in range(60)])], ()),  # fell, then stays
        (FALLING[:8], ()),  # too short to say
        ([float("nan")] * 30, ()),  # not a curve: another judge's
        ((), ()),
    ],
)
def test_a_usual_curve_is_left_alone(losses: list[float], held_out: tuple) -> None:
    assert notes_on(points(losses), held_out, RATE) == ()


def preferring(losses: Sequence[float], norms: Sequence[float | None] = ()) -> tuple[Point, ...]:
    return tuple(replace(point, reward_margin=3.0) for point in points(losses, norms))


@pytest.mark.parametrize("losses", [[25 * 0.97**step + 1 for step in range(40)], [0.69 * 0.8**s for s in range(40)]])
def test_the_height_of_a_loss_of_preferences_says_nothing(losses: list[float]) -> None:
    assert notes_on(points(losses)) != ()
    assert notes_on(preferring(losses)) == ()
    rising = [*FALLING[:50], *(FALLING[50] * 1.01**step for step in range(60))]
    assert "is rising" in notes_on(preferring(rising))[0]


def test_a_margin_wide_enough_for_every_pair_is_no_waste() -> None:
    """The hinge loss is 0 from a margin of 1 on."""
    satisfied = job(preferring([0.0] * IN_A_ROW, [0.0] * IN_A_ROW))
    assert find_waste(satisfied, 0.0, 600.0, RATE) is None


def test_rewards_are_read_from_the_log() -> None:
    step = {"event": "step", "time": 1.0, "step": 3, "loss": 0.6, "grad_norm": 2.0, "lr": 1e-5, "reward_margin": 0.2}
    live = read_live(StageName.TRAIN, f"MERGETUNE {json.dumps(step)}\n")
    assert live.points == (Point(3, 0.6, 2.0, 1e-5, 0.2),)


def test_a_note_names_a_rate_to_try() -> None:
    rising = [*FALLING[:50], *(FALLING[50] * 1.01**step for step in range(60))]
    assert "`train.learning_rate: 5e-05`" in notes(job(points(rising)), RATE)[0]


@pytest.mark.parametrize(
    ("live", "kind"),
    [
        (job(points([2.0, 1.9, math.nan, math.nan])), Stop.NAN),
        (job(points([2.0] * 9, [1.0] * 4 + [math.inf] * 5)), Stop.NAN),
        (job(points([2.0, 1.9, math.nan, 1.8])), None),  # one step, and it goes on
        (job(points([2.0] * 9, [math.inf] * 4 + [1.0] * 5)), None),  # how float16 finds its scale
        (job(points([0.0] * IN_A_ROW, [0.0] * IN_A_ROW)), Stop.MASKED),
        (job(points([0.0] * IN_A_ROW, [0.1] * IN_A_ROW)), None),
        (job(points([0.0] * (IN_A_ROW - 1), [0.0] * (IN_A_ROW - 1))), None),
        (job(points([2.0] * 20 + [9.0] * 5, [1.0] * 20 + [500.0] * 5)), Stop.EXPLODING),
        (job(points([2.0] * 20 + [1.0] * 5, [1.0] * 20 + [500.0] * 5)), None),  # and yet it learns
        (job(points([2.0] * 20 + [9.0] * 5, [1.0] * 20 + [500.0, 1.0] * 2 + [500.0])), None),  # spikes
        (job(points(FALLING)), None),
    ],
)
def test_waste_is_proved_or_not_claimed(live: Live, kind: Stop | None) -> None:
    found = find_waste(live, 0.0, 1800, RATE)
    assert (found and found.kind) == kind


def beats(busy: float | None, minutes: int, last: float = 10_000.0) -> list[Beat]:
    return [Beat(last - 60 * ago, busy) for ago in range(minutes, -1, -1)]


@pytest.mark.parametrize(
    ("live", "idle"),
    [
        (job(beats=beats(0.0, 40)), True),
        (job(beats=beats(0.0, 10)), False),  # not for long enough
        (job(beats=[*beats(0.0, 40), Beat(10_000.0, 0.3)]), False),
        (job(beats=beats(None, 40)), False),  # nobody says how busy it is
        (job(beats=beats(0.0, 40), phase="publish"), False),  # what it uploads is paid for
        (job(beats=beats(0.0, 40, last=5_000.0)), False),  # its log has ended long ago: nothing is known of now
    ],
)
def test_a_gpu_that_does_nothing(live: Live, idle: bool) -> None:
    found = find_waste(live, 10_030.0, 1800, RATE)
    assert (found is not None and found.kind is Stop.IDLE) == idle


def event(kind: str, **fields: object) -> str:
    return "MERGETUNE " + json.dumps({"event": kind, "time": 1000.0, **fields})


def test_a_log_is_read_as_far_as_it_can_be() -> None:
    log = "\n".join(
        [
            "Downloading torch",
            event("phase", name="load base"),
            event("step", step=10, total=100, loss=2.5, grad_norm="nan", lr=1e-4, tokens_per_s=900.0, time=1010.0),
            event("step", loss="?"),
            event("step", step=True, total=None, loss=[]),
            event("eval", step=10, eval_loss=2.1),
            event("heartbeat", gpu_busy=0.5),
            event("warning", message="3 rows are cut"),
            "MERGETUNE {half a line",
            event("step", step=20, total=100, loss="inf", tokens_per_s=1000.0, time=1020.0),
        ]
    )
    live = read_live(StageName.TRAIN, log)
    assert [(point.step, point.loss) for point in live.points] == [(10, 2.5), (20, math.inf)]
    assert math.isnan(live.points[0].grad_norm or 0)
    assert (live.held_out, live.beats, live.warnings) == (((10, 2.1),), (Beat(1000.0, 0.5),), ("3 rows are cut",))
    assert (live.since, live.last, live.progress.eta_s) == (1000.0, 1020.0, 80.0)
    assert live.as_dict()["loss"] == "inf"
    assert json.loads(json.dumps(live.as_dict(), allow_nan=False))["eta_s"] == 80
    assert live.losses == ((10, 2.5), (20, math.inf))
    assert read_live(StageName.TRAIN, "").as_dict() == {"phase": "start", "done": 0, "total": 0, "unit": "step"}
