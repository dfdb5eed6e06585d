"""Run every rule over experiments. The only place that knows both the files and the rules."""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.dataset import read_dataset
from pipeline.errors import Finding, InvalidExperiment, Severity
from pipeline.experiment import Experiment
from pipeline.facts import NOTHING, Facts
from pipeline.hub_facts import HubClient
from pipeline.hub_look import Interview
from pipeline.loader import ExperimentFile, load_experiment
from pipeline.online import Online, cache_folder
from pipeline.rules import ALL_RULES, Subject
from pipeline.rules.others import relatives
from pipeline.settings import Settings
from pipeline.trl_fields import sft_fields
from pipeline.workspace import find_experiments, read_facts, shown_path

DECIDED_BEFORE = ("MEM002",)  # by the pull request's preflight


class CheckResult:
    """Findings of a check, worst first; `unreadable` when a file broke the schema."""

    def __init__(self, findings: Iterable[Finding], unreadable: bool, files: int) -> None:
        self.findings = tuple(sorted(findings, key=lambda f: (f.severity, f.at, f.rule)))
        self.unreadable = unreadable
        self.files = files

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 no error, 1 error findings, 2 a file that is unreadable or invalid."""
        return 2 if self.unreadable else int(self.errors > 0)


def check_files(paths: Iterable[Path], root: Path, settings: Settings, online: Online | None = None) -> CheckResult:
    """Check every file; one bad file never hides another's findings."""
    findings: list[Finding] = []
    files: list[ExperimentFile] = []
    count = 0
    for path in paths:
        count += 1
        try:
            files.append(load_experiment(path, shown_path(path, root)))
        except InvalidExperiment as error:
            findings += error.findings
    unreadable = len(files) < count
    for file, others in zip(files, relatives([file.experiment for file in files]), strict=True):
        findings += run_rules(file, gather_facts(file.experiment, root, others, online), settings)
    return CheckResult(findings, unreadable, count)


def run_rules(file: ExperimentFile, facts: Facts, settings: Settings) -> list[Finding]:
    """Every rule's finding about one loaded file."""
    subject = Subject(file, facts, settings)
    return [finding for rule in ALL_RULES if (finding := rule.run(subject)) is not None]


def gather_facts(
    experiment: Experiment,
    root: Path,
    others: tuple[Experiment, ...] = (),
    online: Online | None = None,
    now: datetime | None = None,
) -> Facts:
    """What the repository, the pinned libraries and (`online`) the Hub say about an experiment."""
    hub, fetched = online.look(experiment, now or datetime.now(UTC)) if online else (None, NOTHING)
    fields = sft_fields()
    facts = read_facts(experiment, root, fetched)
    return replace(
        facts,
        sft_fields=fields.types,
        sft_choices=fields.choices,
        others=others,
        dataset=None if facts.missing else read_dataset(experiment, root, fetched=fetched),
        hub=hub,
        finished=online.finished if online else (),
    )


def preflight(path: Path, root: Path, settings: Settings, hub: HubClient, now: datetime) -> tuple[Finding, ...]:
    """The errors of one experiment of the repository, with what the Hub says now: what stops a launch.

    Not whether training fits its GPU: the pull request decided that, where it can be traced. A tick has no torch, and
    must not refuse by the closed form what a trace let pass.
    """
    try:
        file = load_experiment(path, shown_path(path, root))
    except InvalidExperiment as error:
        return error.findings
    experiments = [file.experiment]
    for other in find_experiments(root, []):
        if other.resolve() != path.resolve():
            with contextlib.suppress(InvalidExperiment):
                experiments.append(load_experiment(other).experiment)
    online = Online(Interview(hub), cache_folder())
    facts = gather_facts(file.experiment, root, relatives(experiments)[0], online, now)
    found = run_rules(file, facts, settings)
    return tuple(f for f in found if f.severity is Severity.ERROR and f.rule not in DECIDED_BEFORE)
