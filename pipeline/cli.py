"""The `mergetune` command: parse, call, print. Decides nothing.

Imports are inside the verbs: `check` starts in the time of pydantic and PyYAML, not of everything.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipeline.errors import UserError

app = typer.Typer(
    name="mergetune",
    help="Merge a YAML file, get a fine-tuned model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


class Backend(StrEnum):
    """Where `run` runs."""

    LOCAL = "local"


class RunFormat(StrEnum):
    """How `run` prints its result."""

    TEXT = "text"
    JSON = "json"


@app.command()
def check(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Experiment files or folders.", show_default=False, readable=False)
    ] = None,
    format: Annotated[TextFormat, typer.Option(help="`github` prints annotations.")] = TextFormat.TEXT,
) -> None:
    """Check experiments against the schema and every rule; by default all of experiments/.

    \b
    mergetune check
    mergetune check experiments/coach.yaml --format json

    Exit code: 0 no error, 1 a rule found an error, 2 a file is unreadable or invalid.
    """
    from pipeline.check import check_files
    from pipeline.settings import find_root, load_settings
    from pipeline.workspace import find_experiments

    root = find_root(_start(paths))
    result = check_files(find_experiments(root, paths or []), root, load_settings(root))
    match format:
        case TextFormat.JSON:
            _print_json({"files": result.files, "findings": [finding.as_dict() for finding in result.findings]})
        case TextFormat.GITHUB:
            for finding in result.findings:
                print(_annotation(finding.as_dict()))
        case TextFormat.TEXT:
            for finding in result.findings:
                print(f"{finding.as_text()}\n", file=sys.stderr)
            warnings = len(result.findings) - result.errors
            print(f"{result.files} checked, {result.errors} errors, {warnings} warnings")
    raise typer.Exit(result.exit_code)


@app.command()
def plan(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
    format: Annotated[PlanFormat, typer.Option(help="`markdown` is what a pull request shows.")] = PlanFormat.TEXT,
) -> None:
    """Show what an experiment would run: stages, memory, duration and cost.

    \b
    mergetune plan experiments/coach.yaml
    mergetune plan experiments/coach.yaml --format markdown
    """
    from pipeline.report import plan_as_dict, render_plan

    _, _, made = _planned(path)
    match format:
        case PlanFormat.JSON:
            _print_json(plan_as_dict(made))
        case PlanFormat.MARKDOWN:
            print(render_plan(made), end="")
        case PlanFormat.TEXT:
            _print_markdown(render_plan(made))


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the experiment and its file.", show_default=False)],
    source: Annotated[str, typer.Option("--from", help="An example to start from.")] = "chat-qlora",
) -> None:
    """Write a commented experiment to experiments/NAME.yaml.

    \b
    mergetune init coach-v2
    mergetune init tiny --from quickstart
    """
    from pipeline.scaffold import write_experiment
    from pipeline.settings import find_root

    root = find_root(Path.cwd())
    path = write_experiment(root, name, source)
    print(path.relative_to(root))
    print(f"hint: edit it, then `mergetune check experiments/{name}.yaml`", file=sys.stderr)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
    backend: Annotated[Backend, typer.Option(help="Where to run: this machine.")] = Backend.LOCAL,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Where runs are kept; default: runs/ of this repository.")
    ] = None,
    format: Annotated[RunFormat, typer.Option(help="How to print the result.")] = RunFormat.TEXT,
) -> None:
    """Run every stage of an experiment on this machine, and report.

    Ctrl-C stops it; running it again continues where it stopped. A finished run answers from its artifacts.

    \b
    mergetune run experiments/examples/quickstart.yaml
    mergetune run experiments/coach.yaml --runs-dir /data/runs
    """
    from pipeline.local_run import open_run, run_locally
    from pipeline.progress import make_display
    from pipeline.report import render_report

    root, facts, made = _planned(path)
    try:
        match backend:
            case Backend.LOCAL:
                place = open_run(made, facts, root, runs_dir or root / "runs")
                result = run_locally(place, make_display(sys.stderr))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    if format is RunFormat.JSON:
        _print_json(result.as_dict())
    else:
        _print_markdown(render_report(result))
        print(f"report: {result.folder / 'report.md'}", file=sys.stderr)


@app.command()
def rehearse(
    path: Annotated[Path, typer.Argument(help="An experiment file.", show_default=False, readable=False)],
) -> None:
    """Run the whole chain on this CPU, on a tiny twin of the base, with the first rows of the data.

    \b
    mergetune rehearse experiments/examples/quickstart.yaml

    Exit code: 0 passed, 1 a stage failed, 2 the file is invalid.
    """
    from pipeline.progress import make_display
    from pipeline.rehearse import rehearse as carry_through

    root, file, facts = _checked(path)
    try:
        result = carry_through(file, facts, root, make_display(sys.stderr))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    print(result.summary())
    if result.failure is not None:
        print(f"\n{result.failure.as_text()}\n\nlogs: {result.folder}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def fit(
    path: Annotated[Path | None, typer.Argument(help="An experiment file.", show_default=False, readable=False)] = None,
    model: Annotated[str | None, typer.Option(help="A base of the catalogue, or a folder with a config.json.")] = None,
    method: Annotated[str, typer.Option(help="With --model: qlora, lora or full.")] = "qlora",
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
        _print_json(fit_as_dict(fits))
    else:
        _print_markdown(render_fit(fits, title))


@app.command()
def schema() -> None:
    """Print the JSON schema of the experiment file (what `experiments/_schema.json` holds).

    \b
    mergetune schema > experiments/_schema.json
    """
    from pipeline.experiment import Experiment

    _print_json(Experiment.model_json_schema())


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
    try:
        app(prog_name="mergetune")
    except UserError as error:
        _fail(error)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _planned(path: Path) -> tuple[Path, Any, Any]:
    """The repository root, the facts and the plan of one experiment; rule errors stop here."""
    from pipeline.plan import make_plan

    root, file, facts = _checked(path)
    return root, facts, make_plan(file.experiment, facts)


def _checked(path: Path) -> tuple[Path, Any, Any]:
    """The repository root, one loaded experiment and its facts; rule errors stop here, warnings are printed."""
    from pipeline.check import gather_facts, run_rules
    from pipeline.errors import InvalidExperiment, Severity
    from pipeline.loader import load_experiment
    from pipeline.settings import find_root, load_settings
    from pipeline.workspace import shown_path

    root = find_root(_start([path]))
    file = load_experiment(path, shown_path(path, root))
    facts = gather_facts(file.experiment, root)
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
    if not paths:
        return Path.cwd()
    first = paths[0].resolve()
    return first if first.is_dir() else first.parent


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_markdown(text: str) -> None:
    """Typeset on a terminal, as it is anywhere else."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def _annotation(finding: dict[str, Any]) -> str:
    """One GitHub annotation; its grammar wants `%`, line ends, and in properties `:` and `,` escaped."""

    def data(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def prop(text: str) -> str:
        return data(text).replace(":", "%3A").replace(",", "%2C")

    text = finding["message"] + (f"\nhint: {finding['hint']}" if finding["hint"] else "")
    where = f"file={prop(finding['path'])},line={max(finding['line'], 1)},col={max(finding['column'], 1)}"
    return f"::{finding['severity']} {where},title={prop(finding['rule'])}::{data(text)}"


def _fail(error: UserError) -> NoReturn:
    print(error.as_text(), file=sys.stderr)
    sys.exit(error.exit_code)
