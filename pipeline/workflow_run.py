"""What GitHub Actions tells a step, and where a step puts its words. Asks GitHub nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

NEEDED = ("GITHUB_EVENT_NAME", "GITHUB_EVENT_PATH", "GITHUB_REPOSITORY", "GITHUB_API_URL", "GITHUB_TOKEN")


@dataclass(frozen=True)
class WorkflowRun:
    """The workflow run that this process is a step of."""

    event_name: str
    event: Mapping[str, Any]
    repository: str
    api_url: str
    token: str = field(repr=False)
    summary: Path | None = None
    output: Path | None = None

    def summarise(self, text: str) -> None:
        """Add Markdown to the step's summary; without one it goes nowhere."""
        _append(self.summary, text)

    def set_output(self, name: str, value: Any) -> None:
        """An output of the step, as JSON on one line."""
        _append(self.output, f"{name}={json.dumps(value)}")


def read_workflow_run(environment: Mapping[str, str]) -> WorkflowRun:
    """The workflow run as its environment describes it.

    Raises:
        UserError: this is no step of a workflow, or the step was given no token.
    """
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        hint = "a workflow step has them; `GITHUB_TOKEN: ${{ github.token }}` has to be passed in its `env:`"
        raise UserError(f"`{missing[0]}` is not set: this verb is for a workflow", hint)
    event = json.loads(Path(environment["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    return WorkflowRun(
        event_name=environment["GITHUB_EVENT_NAME"],
        event=event,
        repository=environment["GITHUB_REPOSITORY"],
        api_url=environment["GITHUB_API_URL"],
        token=environment["GITHUB_TOKEN"],
        summary=_path(environment.get("GITHUB_STEP_SUMMARY")),
        output=_path(environment.get("GITHUB_OUTPUT")),
    )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _append(path: Path | None, text: str) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
