"""Sparklines: shape, width, and what is not a number."""

import math

from pipeline.charts import bar, sparkline


def test_rises_and_falls() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, 1]) == "█▁"


def test_at_most_the_width_and_every_value_counts() -> None:
    line = sparkline([*[0.0] * 99, 100.0], width=10)
    assert len(line) == 10
    assert line[-1] == "█"


def test_flat_empty_and_not_a_number() -> None:
    assert sparkline([]) == ""
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([1, math.nan, 2]) == "▁×█"
    assert sparkline([math.nan]) == "×"


def test_bar() -> None:
    assert bar(1, 4, 8) == "━━──────"
    assert bar(9, 4, 4) == "━━━━"
    assert bar(0, 0, 4) == "────"
