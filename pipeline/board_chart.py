"""Loss curves as one small SVG picture: training and held-out loss on the same axes. Pure; styled by the page."""

from collections.abc import Sequence

from pipeline.board_summary import Points

WIDTH, HEIGHT, PAD = 110, 30, 3


def loss_picture(train: Points, held_out: Points) -> str:
    """Both curves, each with a dot at its end; nothing for fewer than two points. The numbers stand beside it."""
    curves = [(name, points) for name, points in (("t", train), ("e", held_out)) if len(points) > 1]
    if not curves:
        return ""
    points = [point for _, curve in curves for point in curve]
    steps, losses = (sorted(point[axis] for point in points) for axis in (0, 1))
    parts = []
    for name, curve in curves:
        drawn = [(_scaled(x, steps, WIDTH), HEIGHT - _scaled(y, losses, HEIGHT)) for x, y in curve]
        path, (x, y) = " ".join(f"{x} {y}" for x, y in drawn), drawn[-1]
        parts.append(f'<path class="{name}" d="M{path}"/><circle class="{name}" cx="{x}" cy="{y}" r="2"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'


def _scaled(value: float, values: Sequence[float], size: int) -> int:
    """A place inside the margins, in whole pixels; in the middle where all values are the same."""
    low, high = values[0], values[-1]
    share = (value - low) / (high - low) if high > low else 0.5
    return round(PAD + share * (size - 2 * PAD))
