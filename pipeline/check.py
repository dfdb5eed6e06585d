"""Run every rule over experiments. The only place that knows both the files and the rules."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from pipeline.sweep_rules import run_rules_of_variants
from pipeline.trl_fields import dpo_fields, sft_fields
from pipeline.workspace import find_experiments, read_facts, shown_path

Watch = Callable[[Sequence[Any], str], Iterable[Any]]


def _unwatched(items: Sequence[Any], words: str) -> Iterable[Any]:
    return items


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


def check_files(
    paths: Sequence[Path], root: Path, settings: Settings, online: Online | None = None, watch: Watch = _unwatched
) -> CheckResult:
    """Check every file; one bad file never hides another's findings. `watch` is told what goes by."""
    findings: list[Finding] = []
    files: list[ExperimentFile] = []
    for path in watch(paths, "reading"):
        try:
            files.append(load_experiment(path, shown_path(path, root)))
        except InvalidExperiment as error:
            findings += error.findings
    groups = relatives([file.experiment for file in files])
    # Those of one data file after the other: the rows of few files are held at a time.
    together = sorted(zip(files, groups, strict=True), key=lambda pair: pair[0].experiment.data.dataset)
    for file, others in watch(together, "checking"):
        findings += run_rules(file, gather_facts(file.experiment, root, others, online), settings)
    return CheckResult(findings, len(files) < len(paths), len(paths))


def run_rules(file: ExperimentFile, facts: Facts, settings: Settings) -> list[Finding]:
    """Every rule's finding about one loaded file; where it has a sweep, about each of its variants."""
    if file.experiment.sweep:
        return run_rules_of_variants(file, facts, settings, ALL_RULES)
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
    fields = dpo_fields() if experiment.train.is_dpo else sft_fields()
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


def clashes(root: Path, known: Mapping[Path, Experiment]) -> dict[Path, tuple[Experiment, ...]]:
    """For every experiment of the repository the others it clashes with, by path; `known` are loaded already."""
    loaded = {path.resolve(): experiment for path, experiment in known.items()}
    for path in find_experiments(root, []):
        if path.resolve() not in loaded:
            with contextlib.suppress(InvalidExperiment):
                loaded[path.resolve()] = load_experiment(path).experiment
    groups = zip(loaded.items(), relatives(list(loaded.values())), strict=True)
    return {path: tuple(one for one in group if one is not mine) for (path, mine), group in groups}


def preflight(
    path: Path, root: Path, settings: Settings, hub: HubClient, now: datetime, others: tuple[Experiment, ...]
) -> tuple[Finding, ...]:
    """The errors of one experiment of the repository, with what the Hub says now: what stops a launch."""
    try:
        file = load_experiment(path, shown_path(path, root))
    except InvalidExperiment as error:
        return error.findings
    online = Online(Interview(hub), cache_folder())
    facts = gather_facts(file.experiment, root, others, online, now)
    return tuple(finding for finding in run_rules(file, facts, settings) if finding.severity is Severity.ERROR)
