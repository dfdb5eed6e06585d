"""Run every rule over experiments. The only place that knows both the files and the rules."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import Finding, InvalidExperiment
from pipeline.loader import load_experiment
from pipeline.rules import ALL_RULES, Subject
from pipeline.settings import Settings
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
    unreadable = False
    count = 0
    for path in paths:
        count += 1
        try:
            found = check_file(path, root, settings)
        except InvalidExperiment as error:
            unreadable = True
            found = list(error.findings)
        findings += found
    return CheckResult(findings, unreadable, count)


def check_file(path: Path, root: Path, settings: Settings) -> list[Finding]:
    """Every finding about one file.

    Raises:
        InvalidExperiment: it cannot be read or breaks the schema.
    """
    file = load_experiment(path, shown_path(path, root))
    subject = Subject(file, read_facts(file.experiment, root), settings)
    return [finding for rule in ALL_RULES if (finding := rule.run(subject)) is not None]
