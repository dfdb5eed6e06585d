"""A training's curve as text and as a Mermaid drawing: training loss, and held-out loss where it was measured.

What Mermaid cannot read (exponents, NaN) never reaches it; who reads in a mail sees the sparkline. Posts nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.charts import sparkline

POINTS = 60  # of a drawn line
LARGEST = 1e9  # what is drawn; a loss beyond it has no digit worth reading
# Mermaid's own first colour of a line cannot be seen on white, and its dark ground is a grey box on GitHub's.
BLUE, ORANGE = "#2f81f7", "#db6d28"
Curve = Sequence[tuple[float, float]]  # (step, loss), finite


def read_curve(history: object, key: str = "loss") -> Curve:
    """The finite points of a manifest's `history` or `eval_history`; what is no point is left out."""
    points = []
    for entry in history if isinstance(history, list | tuple) else ():
        pair = _pair(entry, key)
        if pair and all(abs(value) < LARGEST for value in pair):  # NaN compares false, too
            points.append(pair)
    return points


def loss_lines(train: Curve, held_out: Curve = ()) -> str:
    """One line a curve: sparkline, first and last value. Empty for fewer than two points."""
    named = (("Training loss", train), ("Held-out loss", held_out))
    shown = [f"{name} {_spark(points)}" for name, points in named if len(points) > 1]
    return "  \n".join(shown)


def loss_chart(train: Curve, held_out: Curve = (), before: float | None = None) -> str:
    """`loss_lines` and the drawing of both; `before` is the held-out loss of the base, at step 0."""
    if len(train) < 2:
        return ""
    known = [(0.0, before), *held_out] if before is not None and held_out else list(held_out)
    steps = _grid(train[0][0], train[-1][0])
    drawn = [[_mean_near(train, step, steps[1] - steps[0]) for step in steps]]
    if known:
        drawn.append([_between(known, step) for step in steps])
    low, high = min(map(min, drawn)), max(map(max, drawn))
    pad = (high - low) * 0.1 or 0.1
    colours = ", ".join((BLUE, ORANGE)[: len(drawn)])
    look = (
        '%%{init: {"xyChart": {"height": 300}, "themeVariables": {"xyChart": {"plotColorPalette": '
        f'"{colours}", "backgroundColor": "transparent"}}}}}}}}%%'
    )
    chart = [
        "```mermaid",
        look,
        "xychart-beta",
        f'    x-axis "step" {train[0][0]:.0f} --> {train[-1][0]:.0f}',
        f'    y-axis "loss" {low - pad:.4f} --> {high + pad:.4f}',
        *(f"    line [{', '.join(f'{value:.4f}' for value in line)}]" for line in drawn),
        "```",
    ]
    return "\n\n".join([loss_lines(train, held_out), "\n".join(chart), *_legend(known, before)])


def _legend(known: Curve, before: float | None) -> list[str]:
    """Which line is which; Mermaid's own legend depends on its version."""
    if not known:
        return []
    start = "" if before is not None or len(known) < 2 else ", flat before its first measurement"
    return [f"<sub>Blue: training. Orange: held-out{start}.</sub>"]


def _spark(points: Curve) -> str:
    values = [value for _, value in points]
    return f"`{sparkline(values)}` {values[0]:.3f} → {values[-1]:.3f}"


def _grid(first: float, last: float) -> list[float]:
    """Evenly spread steps: Mermaid spreads the values of a line evenly, whatever their steps were."""
    count = min(POINTS, max(2, round(last - first) + 1))
    return [first + (last - first) * index / (count - 1) for index in range(count)]


def _mean_near(points: Curve, step: float, width: float) -> float:
    """The mean around a step: of many points that fall on one of the grid, none is left out."""
    near = [value for at, value in points if abs(at - step) <= width / 2]
    return sum(near) / len(near) if near else _between(points, step)


def _between(points: Curve, step: float) -> float:
    """Straight lines between points, flat outside of them."""
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (step - left) / (right - left)


def _pair(entry: object, key: str) -> tuple[float, float] | None:
    if isinstance(entry, Mapping):
        entry = (entry.get("step"), entry.get(key))
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not _are_numbers(entry):
        return None
    return float(entry[0]), float(entry[1])


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def thinned(points: Curve, most: int) -> list[list[float]]:
    """At most so many `[step, value]` pairs, the first and the last among them, short enough for a tag."""
    if len(points) > most:
        at = [round(index * (len(points) - 1) / (most - 1)) for index in range(most)]
        points = [points[index] for index in at]
    return [[round(step, 2), float(f"{value:.4g}")] for step, value in points]
