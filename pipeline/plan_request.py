"""What `mergetune plan` is asked: an experiment file, and the version to compare it with. Prints nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.check import gather_facts, run_rules
from pipeline.errors import InvalidExperiment, UserError
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import load_experiment
from pipeline.online import Online
from pipeline.plan import Plan, make_plan
from pipeline.plan_changes import Changes, Version, compare
from pipeline.plan_preview import Preview
from pipeline.settings import find_root, load_settings
from pipeline.traced import TracedMemory
from pipeline.workspace import folder_of, shown_path

Tracer = Callable[[Experiment, Facts], TracedMemory | None]


def preview_of(
    path: Path, against: Path | None = None, online: Online | None = None, trace: Tracer | None = None
) -> Preview:
    """Everything to be seen of one experiment; faults of its file are findings of the preview.

    Raises:
        UserError: outside a repository, `against` is not there, or what `trace` raises.
    """
    root = find_root(folder_of(path))
    shown = shown_path(path, root)
    if against is not None and not against.is_file():
        raise UserError(f"`{against}`: no such file", "pass the experiment as the previous run had it", exit_code=2)
    try:
        file = load_experiment(path, shown)
    except InvalidExperiment as error:
        return Preview(_name(path), shown, findings=error.findings)
    facts = gather_facts(file.experiment, root, online=online)
    if trace is not None:
        facts = replace(facts, traced=trace(file.experiment, facts))
    findings = tuple(run_rules(file, facts, load_settings(root)))
    plan, fault = _plan(file.experiment, facts)
    if plan is None and not any(finding.severity == "error" for finding in findings):
        raise fault or UserError(f"no plan can be made of `{shown}`")
    preview = Preview(file.experiment.name, shown, file.experiment, plan, facts, findings)
    return preview if against is None else _compared(preview, against, root)


def _compared(preview: Preview, against: Path, root: Path) -> Preview:
    """The preview with what changed. An old file that today's schema refuses must not hide the new plan.

    Paths that the old version names are read as they are now.
    """
    try:
        before = load_experiment(against).experiment
    except InvalidExperiment as error:
        first = error.findings[0]
        return replace(preview, not_compared=f"the previous version cannot be read: {first.message}")
    if preview.experiment is None:
        return preview
    changes: Changes = compare(
        Version(before, _plan(before, gather_facts(before, root))[0]),
        Version(preview.experiment, preview.plan, preview.facts.content),
    )
    return replace(preview, changes=changes)


def _plan(experiment: Experiment, facts: Facts) -> tuple[Plan | None, UserError | None]:
    """The plan, or why there is none."""
    try:
        return make_plan(experiment, facts), None
    except UserError as error:
        return None, error


def _name(path: Path) -> str:
    """A name for an experiment whose file cannot be read: of its file, in the letters that names have."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:64] or "experiment"
