"""The verb `diagnose`: a log to its cause and its fix. Parses, calls, prints; decides nothing."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_checks import RunFormat, print_json
from pipeline.cli_runs import hub_answers


def diagnose(
    source: Annotated[
        str, typer.Argument(metavar="LOG|JOB_ID|-", help="A log file, a job, or `-` for standard input.")
    ],
    experiment: Annotated[
        Path | None,
        typer.Option(help="The experiment that failed: fixes then name its own values.", readable=False),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Whose job it is; default: yours, then the settings'.")] = None,
    format: Annotated[RunFormat, typer.Option(help="How to print the diagnosis.")] = RunFormat.TEXT,
) -> None:
    """Say why a job failed: the cause, the line that shows it, whether a retry may pass, and the fix.

    \b
    mergetune diagnose train.log --experiment experiments/coach.yaml
    mergetune diagnose 6974ec4657a10a9d296cb981 --namespace acme
    kubectl logs trainer | mergetune diagnose - --format json

    A log of any training or conversion will do, not only of our own jobs. Only a job id asks the Hub (needs HF_TOKEN).

    Exit code: 0 a cause was found, 1 it is not known, 2 the log or the experiment cannot be read.
    """
    from pipeline.diagnose_request import answer_about

    with hub_answers():
        answer = answer_about(source, namespace, experiment)
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if format is RunFormat.JSON:
        print_json(answer.as_dict())
    else:
        print(_text(answer))
    raise typer.Exit(int(not answer.found.is_known))


def _text(answer: Any) -> str:
    found = answer.found
    retry = "may pass" if found.transient else "would fail again"
    rows = [("cause", found.cause), ("evidence", found.evidence)]
    if found.is_known:
        rows += [("retry", retry), ("fix", answer.fix or "try again"), ("rule", _rule(found.rule))]
    text = "\n".join(f"{name + ':':<10}{_printable(value)}" for name, value in rows if value)
    if found.lines:
        text += "\n\nthe most telling lines:\n" + "\n".join(f"  {_printable(line)}" for line in found.lines)
    return text


def _printable(text: str) -> str:
    """Text of a log for a terminal: on one line, and nothing in it moves the cursor."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)


def _rule(rule_id: str) -> str:
    """The rule and its place in docs/rules.md."""
    from pipeline.rules import ALL_RULES

    rule = next((rule for rule in ALL_RULES if rule.id == rule_id), None)
    return f"{rule.id}, {rule.link}" if rule else ""
