"""The demo for a person to watch: its comments in order, its exit code, and nothing left of it, stopped or not."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow


@contextmanager
def demo(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """The script without pictures, with its temporary files below `tmp_path/tmp`."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-u", "scripts/dev/demo.py", "--no-pictures", "--into", str(tmp_path / "demo")]
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def left_running(folder: Path) -> list[str]:
    """Processes that work in the folder or were told of it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                known = bytes((entry / "cwd").readlink()) + (entry / "cmdline").read_bytes()
                if str(folder).encode() in known + (entry / "environ").read_bytes():
                    found.append(f"{entry.name}: {known.decode(errors='replace')}")
            except OSError:
                continue
    return found


def nothing_is_left(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while (left := left_running(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_the_whole_story(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        out, _ = process.communicate(timeout=560)
    assert process.returncode == 0, out[-6000:]
    nothing_is_left(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []
    files = sorted((tmp_path / "demo").iterdir())
    kinds = [re.sub(r"^\d\d-", "", path.stem) for path in files]
    assert kinds[:3] == ["plan", "plan-edited", "run"]
    assert kinds[3:-1] == ["run-edited"] * (len(files) - 4)
    assert kinds[-1] == "result"
    texts = [path.read_text() for path in files]
    assert "## ✅ `harbour-pilot` trains on `cpu-upgrade`" in texts[0]
    strips = [text.split("\n\n")[2] for text in texts[2:-1]]
    assert strips[0] == "◐ train → ○ merge → ○ gguf → ○ evaluate"
    assert strips[-1] == "● train → ● merge → ● gguf → ● evaluate"
    assert "@alice @bob" in texts[-1]
    assert "- ✅ **held-out loss falls by 20 %**: it fell by " in texts[-1]
    assert "| held-out loss (nats per token) |" in texts[-1]
    assert "```mermaid" in texts[-1]
    places = [out.index(f"({path.name})") for path in files]
    assert places == sorted(places), "not printed in the order in which they appeared"
    assert "the checklist in the description: 5 of 5 ticked" in out
    assert "acme/harbour-pilot-GGUF (private)" in out


@pytest.mark.parametrize(("moment", "how"), [("$ mergetune rehearse", signal.SIGINT), ("job train", signal.SIGTERM)])
def test_stopping_it_leaves_nothing(tmp_path: Path, moment: str, how: signal.Signals) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        killer = time.monotonic() + 300
        for line in process.stdout:
            assert time.monotonic() < killer
            if moment in line:
                break
        time.sleep(3)  # so that what it starts has started
        process.send_signal(how)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "servers and jobs are gone" in out
    nothing_is_left(tmp_path)


def test_a_page_shows_tables_folds_and_charts() -> None:
    text = "| a | b |\n|---|--:|\n| 1 | 2 |\n\n<details><summary>more</summary>\n\n**x**\n\n</details>\n\n"
    html_page = runpy.run_path(str(ROOT / "scripts/dev/render_markdown.py"))["html_page"]
    page = html_page(text + "```mermaid\nxychart-beta\n```\n")
    assert "<td" in page
    assert "<summary>more</summary>" in page
    assert "<strong>x</strong>" in page
    assert '<pre class="mermaid">xychart-beta\n</pre>' in page
