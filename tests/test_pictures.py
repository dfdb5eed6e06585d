"""The charts of the comments, drawn by the real Mermaid in a real browser: they parse, and their lines can be seen."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts/dev"))

from render_markdown import Renderer, Unable, draw, renderer  # noqa: E402

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"
BLUE, ORANGE = (0x2F, 0x81, 0xF7), (0xDB, 0x6D, 0x28)
NEAR = 24  # of a colour's parts: lines are smoothed at their edges


@pytest.fixture(scope="module")
def tools() -> Renderer:
    try:
        return renderer()
    except Unable as reason:
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI the charts must be drawn: `make browser`")
        pytest.skip(f"{reason}; `make browser` brings it")


def count(picture: Path, colour: tuple[int, int, int]) -> int:
    """The pixels of about this colour."""
    from PIL import Image

    found = Image.open(picture).convert("RGB").getcolors(2**24) or []
    return sum(n for n, seen in found if all(abs(a - b) <= NEAR for a, b in zip(seen, colour, strict=True)))


def test_every_chart_of_a_comment_is_drawn_light_and_dark(tools: Renderer, tmp_path: Path) -> None:
    files = [path for path in sorted(GOLDEN.glob("*.md")) if "```mermaid" in path.read_text(encoding="utf-8")]
    assert len(files) >= 5
    pictures = [path for path in draw(tools, files, tmp_path) if ".open" not in path.name]
    assert len(pictures) == 2 * len(files)
    for picture in pictures:
        assert count(picture, BLUE) > 100, picture.name
        has_two = "Orange: held-out" in (GOLDEN / f"{picture.name.split('.')[0]}.md").read_text(encoding="utf-8")
        assert (count(picture, ORANGE) > 100) == has_two, picture.name


def test_a_chart_that_mermaid_cannot_read_is_noticed(tools: Renderer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.md"
    broken.write_text("```mermaid\nxychart-beta\n    line [1e-5, NaN]\n```\n")
    with pytest.raises(Unable, match="a chart is broken"):
        draw(tools, [broken], tmp_path)
