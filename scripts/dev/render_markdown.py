"""Draw comments as GitHub shows them, light and dark, folds shut and open, charts included. Sends nothing anywhere.

    python scripts/dev/render_markdown.py tests/golden/plan-comment-*.md --into build/pictures

Needs Chromium on the PATH, and npm, which brings Mermaid and a driver of Chromium once into ~/.cache/mergetune/render.
The page is a look-alike: a comment's width and type sizes at a window of 1280 x 900, not GitHub's own style sheet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

SCRIPT = Path(__file__).with_suffix(".mjs")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = {"mermaid": "11.17.2", "playwright-core": "1.65.1"}
INSTALL_S, DRAW_S = 120, 120
STYLE = """
:root { --page: #fff; --text: #1f2328; --quiet: #59636e; --line: #d1d9e0; --shade: #f6f8fa; --mark: #818b981f;
  --link: #0969da; color-scheme: light }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #f0f6fc; --quiet: #9198a1; --line: #3d444d;
  --shade: #151b23; --mark: #656c7633; --link: #4493f8; color-scheme: dark } }
body { margin: 16px; background: var(--page); color: var(--text);
  font: 14px/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, "DejaVu Sans", sans-serif }
article { width: 860px; border: 1px solid var(--line); border-radius: 6px; overflow-wrap: break-word }
header { padding: 8px 16px; background: var(--shade); border-bottom: 1px solid var(--line); color: var(--quiet) }
main { padding: 16px } main > :first-child { margin-top: 0 } main > :last-child { margin-bottom: 0 }
p, blockquote, ul, ol, table, pre, details { margin: 0 0 16px }
h1, h2, h3 { margin: 24px 0 16px; line-height: 1.25 } h2 { font-size: 1.5em } h3 { font-size: 1.25em }
h1, h2 { padding-bottom: .3em; border-bottom: 1px solid var(--line) }
blockquote { padding: 0 1em; color: var(--quiet); border-left: .25em solid var(--line) } blockquote p { margin: 0 }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse }
th, td { padding: 6px 13px; border: 1px solid var(--line) } tr:nth-child(2n) td { background: var(--shade) }
code { padding: .2em .4em; font: 85% "DejaVu Sans Mono", monospace; background: var(--mark); border-radius: 6px }
pre { padding: 16px; overflow: auto; background: var(--shade); border-radius: 6px; line-height: 1.45 }
pre code { padding: 0; background: none } pre.mermaid { text-align: center; background: none; padding: 0 }
ul, ol { padding-left: 2em } li > ul, li > ol { margin: 0 } li + li { margin-top: .25em } li > p { margin: 16px 0 0 }
a { color: var(--link) } sub { color: var(--quiet) }
"""


class Unable(Exception):
    """Nothing can be drawn on this machine; the words say why."""


@dataclass(frozen=True)
class Renderer:
    """What draws: a browser, node, and the folder of its packages."""

    browser: str
    node: str
    packages: Path


def renderer() -> Renderer:
    """What draws on this machine; its packages are installed when they are not there yet.

    Raises:
        Unable: something is not there and cannot be brought.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    node, npm = shutil.which("node"), shutil.which("npm")
    if browser is None:
        raise Unable("there is no Chromium (`apt-get install chromium`)")
    if node is None or npm is None:
        raise Unable("there is no npm (`apt-get install npm`)")
    cache = Path(os.environ.get("MERGETUNE_CACHE") or Path.home() / ".cache/mergetune")
    packages = cache / "render"
    if any(_installed(packages, name) != version for name, version in PACKAGES.items()):
        _install(npm, packages)
    return Renderer(browser, node, packages)


def draw(tools: Renderer, paths: Sequence[Path], into: Path) -> list[Path]:
    """A picture of each file in light and in dark, and with its folds open where it has some; their paths.

    Raises:
        Unable: the browser did not draw.
    """
    with tempfile.TemporaryDirectory(prefix="mergetune-draw-") as folder:
        pages = []
        for path in paths:
            page = Path(folder) / f"{path.stem}.html"
            page.write_text(html_page(path.read_text(encoding="utf-8")), encoding="utf-8")
            pages.append({"page": str(page), "picture": str((into / path.stem).resolve())})
        work = Path(folder) / "work.json"
        work.write_text(json.dumps({"browser": tools.browser, "packages": str(tools.packages), "pages": pages}))
        command = [tools.node, str(SCRIPT), str(work)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DRAW_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unable(f"the browser took more than {DRAW_S} s") from error
    if done.returncode:
        raise Unable((done.stderr.strip().splitlines() or ["the browser failed"])[-1])
    for line in done.stderr.splitlines():
        print(line, file=sys.stderr)
    return [Path(line) for line in done.stdout.splitlines()]


def html_page(text: str) -> str:
    """One comment as a page."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    markdown.add_render_rule("fence", _fence)
    head = f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>'
    who = "<header><b>github-actions</b> bot commented</header>"
    return f"{head}<article>{who}<main>{markdown.render(text)}</main></article>\n"


def _fence(self: RendererHTML, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
    token = tokens[index]
    if token.info.strip() == "mermaid":
        return f'<pre class="mermaid">{escape(token.content)}</pre>\n'
    return f"<pre><code>{escape(token.content)}</code></pre>\n"


def _installed(packages: Path, name: str) -> str:
    """The version that is there, or nothing."""
    try:
        return str(json.loads((packages / "node_modules" / name / "package.json").read_text())["version"])
    except (OSError, ValueError, KeyError):
        return ""


def _install(npm: str, packages: Path) -> None:
    packages.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(packages), *wanted]
    try:
        done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unable(f"npm took more than {INSTALL_S} s") from error
    if done.returncode:
        raise Unable(f"npm could not install {' and '.join(PACKAGES)}")


def main() -> int:
    """Parse, draw, print the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files")
    parser.add_argument("--into", type=Path, default=Path("build/pictures"), help="folder of the pictures")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    try:
        for path in draw(renderer(), options.files, options.into):
            print(path)
    except Unable as reason:
        print(f"no pictures: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
