"""The verbs that workflows call, and `doctor`: preflight, command, dispatched. Parses, calls, prints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_checks import RunFormat, print_json
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.errors import Finding
    from pipeline.github import GitHub
    from pipeline.online import Online
    from pipeline.workflow_run import WorkflowRun
    from pipeline.world import Report

Tree = Annotated[Path, typer.Option(help="The proposed tree. It is read, never run.")]
Base = Annotated[Path, typer.Option(help="The tree to compare with: main's.")]


def preflight(
    tree: Tree = Path("proposed"),
    base_tree: Base = Path(),
    trace_follows: Annotated[
        bool, typer.Option("--trace-follows", help="Leave memory that is in question to another call, which can trace.")
    ] = False,
) -> None:
    """Check and plan what a pull request changes; comment and annotate it. For the workflow of that name.

    \b
    mergetune preflight --tree proposed --base-tree .

    Memory is traced where the training stack is installed.

    On a laptop: `mergetune check`, `mergetune plan`. Exit code: 0 no error, 1 an experiment has one, 2 the tree cannot
    be read.
    """
    from pipeline.preflight import run_preflight
    from pipeline.pull_request import annotations

    run, github = _workflow()
    with github_answers():
        try:
            raise typer.Exit(run_preflight(run, github, tree, base_tree, _online(), trace_follows=trace_follows))
        except UserError as error:
            print(annotations([_finding(error)]))
            run.summarise(error.as_text())
            raise


def command(tree: Tree = Path("proposed"), base_tree: Base = Path()) -> None:
    """Answer a command in a comment on a pull request: /plan, /status, /cancel, /retry, /help. For a workflow.

    \b
    mergetune command --tree proposed --base-tree .

    On a laptop: `mergetune plan`, `status`, `cancel`, `retry`. Exit code: 0 answered, 1 GitHub did not take it.
    """
    from pipeline.chatops import Place, read_command, run_command

    run, github = _workflow()
    given = read_command(run)
    if given is None:
        print("this comment holds no command")
        return
    with github_answers():
        raise typer.Exit(run_command(given, Place(github, tree, base_tree, _online())))


def dispatched(branch: Annotated[str, typer.Option(help="The branch whose experiments count.")] = "main") -> None:
    """Carry out what the workflow `launch` was dispatched for: cancel or retry. The tick comes after it.

    \b
    mergetune dispatched

    Needs HF_TOKEN. On a laptop: `mergetune cancel`, `mergetune retry`. Exit code: 0 done or nothing asked, 1 refused.
    """
    from pipeline.chatops import carry_out_dispatched
    from pipeline.cli_runs import hub_answers
    from pipeline.hf_world import open_world
    from pipeline.settings import find_root

    run, github = _workflow()
    with github_answers(), hub_answers():
        raise typer.Exit(carry_out_dispatched(run, github, lambda: open_world(find_root(Path.cwd()), branch)))


def doctor(
    format: Annotated[RunFormat, typer.Option("--format", help="How to print the result.")] = RunFormat.TEXT,
    offline: Annotated[bool, typer.Option("--offline", help="Ask neither GitHub nor the Hub.")] = False,
    repository: Annotated[str | None, typer.Option(help="owner/name; default: of the remote `origin`.")] = None,
) -> None:
    """Check that this repository is set up: secrets, the token, protection of main and of the tags, tools.

    \b
    GITHUB_TOKEN=$(gh auth token) mergetune doctor
    mergetune doctor --offline

    Each line is ok, warn or bad; what is not ok comes with the command that mends it. Exit code: 0 nothing bad, 1 bad.
    """
    from pipeline.doctor import Grade, examine, render
    from pipeline.settings import find_root

    checks = examine(find_root(Path.cwd()), os.environ, repository, offline=offline)
    if format is RunFormat.JSON:
        print_json([check.as_dict() for check in checks])
    else:
        print(render(checks), end="")
    raise typer.Exit(int(any(check.grade is Grade.BAD for check in checks)))


def reconcile_and_tell(root: Path, branch: str) -> "list[Report]":
    """`mergetune reconcile --github`: one tick, with the review gate before it and words on GitHub after it."""
    from pipeline.announce import open_desk, tick_and_tell
    from pipeline.comments import refusal
    from pipeline.hf_world import open_world
    from pipeline.repository import Repository
    from pipeline.review import Origins

    run, github = _workflow()
    origins = Origins(github, Repository(root), branch)
    with github_answers():
        try:
            world = open_world(root, branch, pull_of=origins.number_of)
        except UserError as error:  # such as a secret that is not there: the first thing that a new repository meets
            run.summarise(refusal(error.message, error.hint))
            raise
        desk = open_desk(world, github, root, origins, os.environ.get("HF_ENDPOINT"))
        reports = tick_and_tell(desk, world.settings.approvals, run.summarise)
        if desk.unsaid:
            raise UserError("GitHub did not take all that there was to say", "the next tick says it: see the summary")
    return reports


@contextmanager
def github_answers() -> Iterator[None]:
    """What GitHub refuses or does not say is an expected failure."""
    from pipeline.pull_request import GitHubError

    try:
        yield
    except GitHubError as error:
        hint = "run the workflow again; if it stays so, look at the permissions of its job"
        raise UserError(f"GitHub did not do it ({error.access}): {error.detail}", hint) from error


def _workflow() -> "tuple[WorkflowRun, GitHub]":
    from pipeline.github import open_github
    from pipeline.workflow_run import read_workflow_run

    run = read_workflow_run(os.environ)
    return run, open_github(run.api_url, run.token, run.repository)


def _online() -> "Online | None":
    """A reader's look at the Hub: with HF_READ_TOKEN, or as anybody."""
    from pipeline.online import go_online

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    return go_online({key: value for key, value in os.environ.items() if key != "HF_TOKEN"}, read_only=True)


def _finding(error: UserError) -> "Finding":
    from pipeline.errors import Finding, Place, Severity

    return Finding("PREFLIGHT", Severity.ERROR, error.at or Place("experiments"), error.message, error.hint)
