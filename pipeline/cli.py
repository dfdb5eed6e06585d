"""The `mergetune` command: parse, call, print. Decides nothing.

Imports are inside the verbs: `check` starts in the time of pydantic and PyYAML, not of everything.
"""

import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.cli_board import board
from pipeline.cli_checks import RunFormat, check, fit, plan, planned, print_json, print_markdown, rehearse
from pipeline.cli_diagnose import diagnose
from pipeline.cli_github import command, dispatched, doctor, preflight
from pipeline.cli_runs import cancel, logs, reconcile, retry, run_paid, status, submit_adapter
from pipeline.errors import UserError

app = typer.Typer(
    name="mergetune",
    help="Merge a YAML file, get a fine-tuned model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(check)
app.command()(plan)


class Backend(StrEnum):
    """Where `run` runs."""

    LOCAL = "local"
    MLX = "mlx"
    HF_JOBS = "hf_jobs"


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(help="Name of the experiment and its file.", show_default=False)] = None,
    source: Annotated[str, typer.Option("--from", help="An example to start from.")] = "chat-qlora",
    issue: Annotated[
        Path | None,
        typer.Option(
            "--from-issue", help="An issue's text instead, `-` for standard input.", readable=False, show_default=False
        ),
    ] = None,
) -> None:
    """Write a commented experiment to experiments/NAME.yaml.

    \b
    mergetune init coach-v2
    mergetune init tiny --from quickstart
    gh issue view 12 --json body --jq .body | mergetune init --from-issue -

    An issue made with the form of this repository has a name of its own; NAME replaces it.
    """
    from pipeline.issue_form import experiment_of_issue
    from pipeline.scaffold import write_experiment, write_new
    from pipeline.settings import find_root

    root = find_root(Path.cwd())
    if issue is not None:
        path = write_new(root, *experiment_of_issue(_read_issue(issue), name))
    elif name:
        path = write_experiment(root, name, source)
    else:
        raise UserError("the experiment needs a name", "`mergetune init my-experiment`", exit_code=2)
    print(path.relative_to(root))
    print(f"hint: edit it, then `mergetune check {path.relative_to(root)}`", file=sys.stderr)


def _read_issue(path: Path) -> str:
    most = 1_000_000  # bytes: far above what GitHub takes
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(most).decode("utf-8")
        with path.open("rb") as file:
            return file.read(most).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}", "give the issue's text, in UTF-8", exit_code=2) from error


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
    backend: Annotated[
        Backend, typer.Option(help="This machine; this machine, training with MLX; or paid jobs (needs HF_TOKEN).")
    ] = Backend.LOCAL,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Where runs are kept; default: runs/ of this repository.")
    ] = None,
    format: Annotated[RunFormat, typer.Option(help="How to print the result.")] = RunFormat.TEXT,
) -> None:
    """Run every stage of an experiment, here or as paid Hugging Face Jobs, and report.

    Ctrl-C stops a local run, and only the watching of a paid one; running it again continues. A finished run answers
    from its artifacts.

    \b
    mergetune run experiments/examples/quickstart.yaml
    mergetune run experiments/coach.yaml --runs-dir /data/runs
    mergetune run experiments/coach.yaml --backend mlx
    mergetune run experiments/coach.yaml --backend hf_jobs
    """
    from pipeline.local_run import open_run, run_locally
    from pipeline.progress import make_display
    from pipeline.report import render_report

    root, facts, made = planned(path, with_mlx=backend is Backend.MLX, paid=backend is Backend.HF_JOBS)
    if backend is Backend.HF_JOBS:
        run_paid(root, path, made, as_json=format is RunFormat.JSON)
        return
    try:
        place = open_run(made, facts, root, runs_dir or root / "runs")
        result = run_locally(place, make_display(sys.stderr))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    if format is RunFormat.JSON:
        print_json(result.as_dict())
    else:
        print_markdown(render_report(result))
        print(f"report: {result.folder / 'report.md'}", file=sys.stderr)


app.command()(rehearse)
app.command()(fit)
for verb in (
    *(reconcile, status, logs, diagnose, cancel, retry, submit_adapter, board),
    *(preflight, command, dispatched, doctor),
):
    app.command()(verb)


@app.command()
def schema() -> None:
    """Print the JSON schema of the experiment file (what `experiments/_schema.json` holds).

    \b
    mergetune schema > experiments/_schema.json
    """
    from pipeline.experiment import Experiment

    print_json(Experiment.model_json_schema())


@app.callback(invoke_without_command=True)
def root_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Merge a YAML file, get a fine-tuned model."""
    if version:
        from pipeline import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; expected failures print `error:` and `hint:`, bugs fly."""
    for stream in (sys.stdout, sys.stderr):  # a name in a file may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="mergetune")
    except UserError as error:
        _fail(error)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _fail(error: UserError) -> NoReturn:
    print(error.as_text(), file=sys.stderr)
    sys.exit(error.exit_code)
