"""Numbers as small pictures in text: sparklines and bars. Posts nothing."""

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 60


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Unicode bars of at most `width` characters, each the mean of its share of `values`; NaN shows as `×`."""
    if not values:
        return ""
    buckets = [_share(values, index, min(width, len(values))) for index in range(min(width, len(values)))]
    means = [sum(bucket) / len(bucket) for bucket in buckets]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_bar(mean, low, high) for mean in means)


def bar(done: int, total: int, width: int = BAR_WIDTH) -> str:
    """`━━━━───`: the part of `total` that is done, in `width` characters."""
    filled = width * min(max(done, 0), total) // total if total > 0 else 0
    return "━" * filled + "─" * (width - filled)


def _share(values: Sequence[float], index: int, width: int) -> Sequence[float]:
    start = index * len(values) // width
    return values[start : max((index + 1) * len(values) // width, start + 1)]


def _bar(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "×"
    if high == low:
        return BARS[0]
    return BARS[round((value - low) / (high - low) * (len(BARS) - 1))]
