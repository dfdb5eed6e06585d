"""Run every rule over experiments. The only place that knows both the files and the rules."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.dataset import read_dataset
from pipeline.errors import Finding, InvalidExperiment
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import ExperimentFile, load_experiment
from pipeline.rules import ALL_RULES, Subject
from pipeline.rules.others import relatives
from pipeline.settings import Settings
from pipeline.trl_fields import sft_fields
from pipeline.workspace import read_facts, shown_path


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


def check_files(paths: Iterable[Path], root: Path, settings: Settings) -> CheckResult:
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
        findings += run_rules(file, gather_facts(file.experiment, root, others), settings)
    return CheckResult(findings, unreadable, count)


def run_rules(file: ExperimentFile, facts: Facts, settings: Settings) -> list[Finding]:
    """Every rule's finding about one loaded file."""
    subject = Subject(file, facts, settings)
    return [finding for rule in ALL_RULES if (finding := rule.run(subject)) is not None]


def gather_facts(experiment: Experiment, root: Path, others: tuple[Experiment, ...] = ()) -> Facts:
    """What the repository and the pinned libraries say about an experiment."""
    fields = sft_fields()
    facts = read_facts(experiment, root)
    return replace(
        facts,
        sft_fields=fields.types,
        sft_choices=fields.choices,
        others=others,
        dataset=None if facts.missing else read_dataset(experiment, root),
    )
