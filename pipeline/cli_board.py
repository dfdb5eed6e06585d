"""The verb `board`: one page of every run. Parses, calls, writes the page."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_checks import print_json
from pipeline.errors import UserError


class BoardFormat(StrEnum):
    """What `board` makes."""

    HTML = "html"
    JSON = "json"


def board(
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a file that ends in .html; default: site/ of this repository.")
    ] = None,
    branch: Annotated[str, typer.Option(help="The branch whose open experiments are shown.")] = "main",
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub what open runs do.")] = False,
    format: Annotated[BoardFormat, typer.Option(help="`json` prints one document and writes no file.")] = (
        BoardFormat.HTML
    ),
) -> None:
    """Make one HTML page of every run: state, hypothesis, losses, cost, curves, links. Prints the page's path.

    \b
    mergetune board
    mergetune board --out /tmp/board.html --offline
    mergetune board --format json | jq '.runs[] | [.run_id, .metrics.after]'

    It is made from the run/ tags of the remote; with HF_TOKEN the Hub is asked about open runs, and where it does not
    answer the page says so. The page holds hypotheses, names of models and data, losses and dollars: whoever can open
    it can read them. The GitHub Pages of a private repository may be public.

    Exit code: 0 made, 1 the tags could not be read.
    """
    import os

    from pipeline.board_request import request_board
    from pipeline.settings import find_root

    if format is BoardFormat.JSON and out is not None:
        message = "`--format json` prints the board and writes no file"
        raise UserError(message, f"leave out `--out`, or `mergetune board --format json > {out}`", exit_code=2)
    root = find_root(Path.cwd())
    made = request_board(root, branch, os.environ, datetime.now(UTC), offline=offline)
    if format is BoardFormat.JSON:
        print_json(made.as_dict())
        return
    from pipeline.board_page import render_board

    style, script = (Path(__file__).with_name(f"board.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    path = _page_path(out or root / "site")
    _write(path, render_board(made, style, script))
    print(path)


def _page_path(out: Path) -> Path:
    return out if out.suffix == ".html" else out / "index.html"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {error.strerror}", "choose another place: `--out`") from error
