"""The verbs that look before anything runs: check, plan, fit, rehearse. Parse, call, print; decide nothing.

Imports are inside the verbs: `check` starts in the time of pydantic and PyYAML, not of everything.
"""

import json
import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.online import Online

OnlineFlag = Annotated[bool, typer.Option("--online", help="Ask the Hub too: token, access, outputs, files.")]
Endpoint = Annotated[str | None, typer.Option(help="The Hub to ask; default: HF_ENDPOINT, or huggingface.co.")]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="The token only reads: ask nothing that launching needs.")]


class TextFormat(StrEnum):
    """How `check` prints."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"


class PlanFormat(StrEnum):
    """How `plan` prints."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


class RunFormat(StrEnum):
    """How a verb prints its result."""

    TEXT = "text"
    JSON = "json"


def check(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Experiment files or folders.", show_default=False, readable=False)
    ] = None,
    format: Annotated[TextFormat, typer.Option(help="`github` prints annotations.")] = TextFormat.TEXT,
    online: OnlineFlag = False,
    endpoint: Endpoint = None,
    read_only: ReadOnly = False,
) -> None:
    """Check experiments against the schema and every rule; by default all of experiments/.

    \b
    mergetune check
    mergetune check experiments/coach.yaml --format json
    mergetune check experiments/coach.yaml --online

    Exit code: 0 no error, 1 a rule found an error, 2 a file is unreadable or invalid.
    """
    from pipeline.check import check_files
    from pipeline.progress import watched
    from pipeline.settings import find_root, load_settings
    from pipeline.workspace import find_experiments

    root = find_root(_start(paths))
    seen = _online(root, online, endpoint, read_only)
    watch = partial(watched, out=sys.stderr)
    try:
        result = check_files(find_experiments(root, paths or []), root, load_settings(root), seen, watch)
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        raise typer.Exit(130) from None
    _print_notes(seen)
    match format:
        case TextFormat.JSON:
            print_json({"files": result.files, "findings": [finding.as_dict() for finding in result.findings]})
        case TextFormat.GITHUB:
            from pipeline.pull_request import annotation

            for finding in result.findings:
                print(annotation(finding))
        case TextFormat.TEXT:
            for finding in result.findings:
                print(f"{finding.as_text()}\n", file=sys.stderr)
            warnings = len(result.findings) - result.errors
            print(f"{result.files} checked, {result.errors} errors, {warnings} warnings")
    raise typer.Exit(result.exit_code)


def plan(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
    format: Annotated[PlanFormat, typer.Option(help="`markdown` is what a pull request shows.")] = PlanFormat.TEXT,
    against: Annotated[
        Path | None, typer.Option(help="The file as the previous run had it: shows what changes.", readable=False)
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace one step for the exact memory: 10 s, needs the training stack.")
    ] = False,
    online: OnlineFlag = False,
    endpoint: Endpoint = None,
    read_only: ReadOnly = False,
) -> None:
    """Show what an experiment would run: stages, memory, duration and cost.

    \b
    mergetune plan experiments/coach.yaml --online
    mergetune plan experiments/coach.yaml --trace
    mergetune plan experiments/coach.yaml --format markdown --against old/coach.yaml

    Exit code: 0 no error, 1 a rule found an error, 2 the file is invalid. `markdown` prints errors in its text.
    """
    from pipeline.plan_comment import plan_comment
    from pipeline.plan_preview import plan_as_dict, render_plan
    from pipeline.plan_request import preview_of
    from pipeline.settings import find_root
    from pipeline.trace import trace_memory

    seen = _online(find_root(_start([path])), online, endpoint, read_only)
    preview = preview_of(path, against, seen, trace_memory if trace else None)
    _print_notes(seen)
    if format is PlanFormat.MARKDOWN:
        print(plan_comment(preview), end="")
        raise typer.Exit(preview.exit_code)
    if preview.errors:
        raise preview.refusal()
    for finding in preview.warnings:
        print(f"{finding.as_text()}\n", file=sys.stderr)
    if format is PlanFormat.JSON:
        print_json(plan_as_dict(preview))
    else:
        print_markdown(render_plan(preview))


def rehearse(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
) -> None:
    """Run the whole chain on this CPU, on a tiny twin of the base, with the first rows of the data.

    \b
    mergetune rehearse experiments/examples/quickstart.yaml

    Exit code: 0 passed, 1 a stage failed, 2 the file is invalid.
    """
    from dataclasses import replace

    from pipeline.backends.local import find_mlx
    from pipeline.progress import make_display
    from pipeline.rehearse import rehearse as carry_through

    root, file, facts = checked(path)
    try:
        result = carry_through(file, replace(facts, mlx_here=find_mlx()), root, make_display(sys.stderr))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    print(result.summary())
    if result.failure is not None:
        print(f"\n{result.failure.as_text()}\n\nlogs: {result.folder}", file=sys.stderr)
        raise typer.Exit(1)


def fit(
    path: Annotated[Path | None, typer.Argument(help="An experiment file.", show_default=False, readable=False)] = None,
    model: Annotated[str | None, typer.Option(help="A base of the catalogue, or a folder with a config.json.")] = None,
    method: Annotated[str, typer.Option(help="With --model: qlora, lora, full or dpo.")] = "qlora",
    rank: Annotated[int, typer.Option(help="With --model: rank of the adapter on every linear layer.", min=1)] = 16,
    format: Annotated[RunFormat, typer.Option(help="How to print the table.")] = RunFormat.TEXT,
) -> None:
    """Show which flavors fit a training at which max_length, cheapest first. Works offline.

    \b
    mergetune fit experiments/coach.yaml
    mergetune fit --model google/gemma-3-12b-it --rank 64
    """
    from pipeline.fit_request import fit_of_experiment, fit_of_model
    from pipeline.report import fit_as_dict, render_fit

    if (path is None) == (model is None):
        raise UserError("pass an experiment file or `--model`", "`mergetune fit --model Qwen/Qwen3-8B`", exit_code=2)
    title, fits = fit_of_model(model, method, rank) if model else fit_of_experiment(path or Path())
    if format is RunFormat.JSON:
        print_json(fit_as_dict(fits))
    else:
        print_markdown(render_fit(fits, title))


def planned(path: Path, *, with_mlx: bool, paid: bool) -> tuple[Path, Any, Any]:
    """The repository root, the facts and the plan of one experiment; rule errors stop here.

    `with_mlx`: trained with MLX, whatever the file says; `paid`: no stage runs on this machine.
    """
    from pipeline.plan import make_plan

    root, file, facts = checked(path, with_mlx=with_mlx, trains_here=not paid)
    return root, facts, make_plan(file.experiment, facts)


def checked(path: Path, *, with_mlx: bool = False, trains_here: bool = False) -> tuple[Path, Any, Any]:
    """The repository root, one loaded experiment and its facts; rule errors stop here, warnings are printed."""
    from dataclasses import replace

    from pipeline.backends.local import find_mlx
    from pipeline.check import gather_facts, run_rules
    from pipeline.errors import InvalidExperiment, Severity
    from pipeline.loader import load_experiment
    from pipeline.plan import as_mlx
    from pipeline.settings import find_root, load_settings
    from pipeline.workspace import folder_of, shown_path

    root = find_root(folder_of(path))
    file = load_experiment(path, shown_path(path, root))
    file = replace(file, experiment=as_mlx(file.experiment)) if with_mlx else file
    facts = replace(gather_facts(file.experiment, root), mlx_here=find_mlx() if trains_here else None)
    findings = run_rules(file, facts, load_settings(root))
    errors = tuple(finding for finding in findings if finding.severity is Severity.ERROR)
    if errors:
        failure = InvalidExperiment(errors)
        failure.exit_code = 1
        raise failure
    for finding in findings:
        print(f"{finding.as_text()}\n", file=sys.stderr)
    return root, file, facts


def _start(paths: list[Path] | None) -> Path:
    """Where to look for the repository from: the first path's folder, else here."""
    from pipeline.workspace import folder_of

    return folder_of(paths[0]) if paths else Path.cwd()


def _online(root: Path, wanted: bool, endpoint: str | None, read_only: bool) -> "Online | None":
    if not wanted:
        if endpoint is not None or read_only:
            option = "--read-only" if read_only else "--endpoint"
            raise UserError(f"`{option}` says how the Hub is asked", "add `--online`, or remove it", exit_code=2)
        return None
    from pipeline.online import go_online

    return go_online(os.environ, endpoint, read_only, root)


def _print_notes(online: "Online | None") -> None:
    for note in online.notes if online else []:
        print(f"note: {note}", file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_markdown(text: str) -> None:
    """Typeset on a terminal, as it is anywhere else."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
