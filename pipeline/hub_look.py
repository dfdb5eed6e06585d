"""One look at the Hub for one experiment: the questions of `check --online`, in order. Judges no answer, makes nothing.

That a token can write is shown without leaving a mark: by the Hub's write check for a repository that is there, by the
token's scopes for one that is not. The claim's commit is the final proof. Credit is not asked for: no endpoint tells.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

from pipeline.experiment import Experiment
from pipeline.fields import is_path
from pipeline.hub_facts import (
    Access,
    HubClient,
    HubError,
    HubFacts,
    OutputFacts,
    OutputState,
    Probe,
    SourceFacts,
    TokenFacts,
    TokenKind,
)

P = ParamSpec("P")
T = TypeVar("T")
# What a repository that was only just created may hold.
HOUSEKEEPING = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
MANIFEST_BYTES = 4_000_000


@dataclass
class Interview:
    """Questions to one Hub at one time: none is asked twice, and after a silence none at all.

    An outage must not take minutes, nor a hundred experiments with one base a hundred questions about it. A new look
    (a later tick) is a new interview.
    """

    hub: HubClient
    silence: str = ""
    answers: dict[tuple[object, ...], tuple[Any, Probe]] = field(default_factory=dict)

    def ask(self, question: Callable[P, T], *about: P.args, **more: P.kwargs) -> tuple[T | None, Probe]:
        """What a method of the Hub answers, and what kind of answer that is."""
        key = (question.__name__, *about, *sorted(more.items()))
        if key not in self.answers:
            if self.silence:
                return None, Probe(Access.UNREACHABLE, self.silence)
            self.answers[key] = self._ask(lambda: question(*about, **more))
        return self.answers[key]

    def _ask(self, call: Callable[[], T]) -> tuple[T | None, Probe]:
        try:
            return call(), Probe(Access.READABLE)
        except HubError as error:
            if error.access is Access.UNREACHABLE:
                self.silence = error.detail
            return None, Probe(error.access, error.detail)


def fetch_hub_facts(
    experiment: Experiment, repos: tuple[str, ...], interview: Interview, now: datetime, *, launches: bool = True
) -> HubFacts:
    """Everything the rules want to know. `repos` are the model repositories the plan makes.

    `launches`: the token is the one that will submit and write. Of one that only reads for a reviewer, or of nobody,
    writing is not asked. A token that is refused ends the look: nothing else it is told would be about the experiment.
    """
    hub = interview.hub
    namespace = experiment.output.repo.split("/")[0]
    told, probe = interview.ask(hub.token_facts)
    token = told or TokenFacts(TokenKind.UNKNOWN, probe)
    facts = HubFacts(hub.endpoint, namespace, now, token, launches=launches)
    anonymous = token.kind is TokenKind.NONE and not launches
    if token.probe.access not in (Access.READABLE, Access.UNREACHABLE) and not anonymous:
        return facts
    base, data = experiment.base, experiment.data
    return replace(
        facts,
        base=_source(interview, base.model, "model", base.revision),
        dataset=_source(interview, data.dataset, "dataset", data.revision),
        jobs=interview.ask(hub.may_start_jobs, namespace)[1] if launches else None,
        outputs=tuple(_output(interview, repo, experiment.name, launches) for repo in repos),
    )


def _source(interview: Interview, repo: str, kind: str, revision: str | None) -> SourceFacts | None:
    """Access first: the page of a gated repository, with its commits, is shown to everybody."""
    if is_path(repo):
        return None
    _, probe = interview.ask(interview.hub.may_read, repo, kind)
    if probe.access is not Access.READABLE:
        return SourceFacts(repo, revision, probe)
    sha, probe = interview.ask(interview.hub.resolve, repo, kind, revision)
    head = None
    if probe.access is Access.NO_REVISION:
        head, _ = interview.ask(interview.hub.resolve, repo, kind, None)
    return SourceFacts(repo, revision, probe, sha, head)


def _output(interview: Interview, repo: str, experiment: str, launches: bool) -> OutputFacts:
    files, probe = interview.ask(interview.hub.files, repo, "model", None)
    if probe.access is Access.MISSING:
        return OutputFacts(repo, OutputState.ABSENT)
    if files is None:
        state = OutputState.UNKNOWN if probe.access is Access.UNREACHABLE else OutputState.NO_ACCESS
        return OutputFacts(repo, state, probe)
    state, probe = _state(interview, repo, set(files), experiment)
    if launches and probe.access is Access.READABLE:
        _, probe = interview.ask(interview.hub.may_write, repo)
    return OutputFacts(repo, state, probe)


def _state(interview: Interview, repo: str, files: set[str], experiment: str) -> tuple[OutputState, Probe]:
    """Whose the repository's content is: ours when a claim or a manifest of this experiment is in it."""
    readable = Probe(Access.READABLE)
    if any(path.startswith(".mergetune/") for path in files):
        return OutputState.OURS, readable
    if files <= HOUSEKEEPING:
        return OutputState.EMPTY, readable
    if "manifest.json" not in files:
        return OutputState.FOREIGN, readable
    content, probe = interview.ask(interview.hub.read, repo, "model", "manifest.json", "main", MANIFEST_BYTES)
    if probe.access is Access.UNREACHABLE:
        return OutputState.UNKNOWN, probe
    return (OutputState.OURS if _names(content or b"", experiment) else OutputState.FOREIGN), readable


def _names(manifest: bytes, experiment: str) -> bool:
    try:
        said = json.loads(manifest)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("experiment") == experiment
