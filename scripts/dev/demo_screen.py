"""What the demo shows: headings, remarks, and every version of a comment as it appears. Runs nothing."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.panel import Panel
from servers.github_state import Comment

FOLD = re.compile(r"<details><summary>(.*?)</summary>.*?</details>", re.DOTALL)
CHART = re.compile(r"```mermaid\n.*?\n```\n*", re.DOTALL)
MARKER = re.compile(r"<!-- mergetune:([a-z]+).*?-->\s*")


@dataclass
class Screen:
    """A console and a folder. `seen` counts the edits of every comment that was shown."""

    console: Console
    into: Path
    seen: dict[int, int] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def heading(self, text: str) -> None:
        """What happens next, with the seconds so far."""
        took = f"{time.monotonic() - self.began:.0f} s"
        if self.console.is_terminal:
            self.console.rule(style="cyan")
            self.console.print(f"[bold]{escape(text)}[/] [dim]({took})[/]", highlight=False)
        else:
            self.console.print(f"\n== {text} ({took})", markup=False, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """A remark."""
        self.console.print(f"   {text}", markup=False, highlight=False, soft_wrap=True)

    def show_new(self, comments: Sequence[Comment]) -> None:
        """Print and write every one of these comments that is new or was edited."""
        for comment in comments:
            if self.seen.get(comment.id) != comment.edits:
                self.seen[comment.id] = comment.edits
                self._show(comment)

    def _show(self, comment: Comment) -> None:
        kind = MARKER.match(comment.body)
        what = (kind[1] if kind else "comment") + ("-edited" if comment.edits else "")
        path = self.into / f"{len(self.written) + 1:02}-{what}.md"
        path.write_text(comment.body, encoding="utf-8")
        self.written.append(path)
        title = f"{comment.author} {'edited its comment' if comment.edits else 'commented'} ({path.name})"
        text = on_a_terminal(comment.body)
        if self.console.is_terminal:
            self.console.print(Panel(Markdown(text), title=escape(title), title_align="left", border_style="cyan"))
        else:
            self.console.print(f"--- {title}\n{text}\n---", markup=False, highlight=False, soft_wrap=True)


def on_a_terminal(body: str) -> str:
    """A comment without what a terminal cannot draw: folds stay shut, charts are left to the pictures."""
    return FOLD.sub(r"▸ \1", CHART.sub("", MARKER.sub("", body))).strip()
