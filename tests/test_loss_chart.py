"""Curves as text and as Mermaid."""

import json
import re

import pytest

from pipeline.loss_chart import BLUE, ORANGE, POINTS, loss_chart, loss_lines, read_curve, thinned

FALL = [(step, 4 - step / 100) for step in range(1, 201)]


def lines(chart: str) -> list[list[float]]:
    return [[float(value) for value in row.split(", ")] for row in re.findall(r"line \[(.*)\]", chart)]


def test_both_curves_are_drawn_on_the_same_steps() -> None:
    chart = loss_chart(FALL, [(50, 3.6), (100, 3.2), (200, 2.5)], before=4.1)
    train, held_out = lines(chart)
    assert len(train) == len(held_out) == POINTS
    assert held_out[0] == pytest.approx(4.1, abs=0.02)  # the base, before any training
    assert held_out[-1] == 2.5
    assert train[0] > train[30] > train[-1]
    assert "Orange: held-out." in chart


def test_mermaid_can_read_how_to_draw_it() -> None:
    """A directive that is no JSON is left out without a word, and the lines are drawn almost invisible."""
    (directive,) = re.findall(r"%%\{init: (\{.*\})\}%%", loss_chart(FALL, FALL[::20]))
    colours = json.loads(directive)["themeVariables"]["xyChart"]["plotColorPalette"].split(", ")
    assert colours == [BLUE, ORANGE]


def test_what_was_not_measured_is_said_to_be_drawn() -> None:
    chart = loss_chart(FALL, [(50, 3.6), (200, 2.5)])
    assert "flat before its first measurement" in chart
    assert lines(chart)[1][0] == 3.6


def test_no_number_that_mermaid_cannot_read_reaches_it() -> None:
    history = [{"step": step, "loss": 1e-7 * step} for step in range(1, 500)]
    history += [{"step": 500, "loss": float("nan")}, {"step": 501, "loss": 1e300}, {"step": None, "loss": 1}, 7, "x"]
    points = read_curve(history)
    assert len(points) == 499
    chart = loss_chart(points)
    assert "e-" not in chart.partition("xychart-beta")[2]
    assert "nan" not in chart.lower()


def test_one_point_is_no_curve() -> None:
    assert loss_chart([]) == loss_chart(FALL[:1]) == loss_lines([]) == ""
    assert read_curve(None) == read_curve({"step": 1}) == []


def test_a_thinned_curve_keeps_its_ends() -> None:
    short = thinned(FALL, 5)
    assert (short[0], short[-1], len(short)) == ([1, 3.99], [200, 2.0], 5)
    assert thinned(FALL[:3], 5) == [[1, 3.99], [2, 3.98], [3, 3.97]]
    assert read_curve(short) == [tuple(point) for point in short]
