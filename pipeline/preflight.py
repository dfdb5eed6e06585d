"""What the `plan` job of a pull request does: its experiments, read as data by the base's code, checked and planned.

Nothing of the proposed tree is imported or executed. A tree with a link that leads out of it is not read at all.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from pipeline.comments import findings_text, left_comment, tick_boxes
from pipeline.errors import Finding, Place, Severity, UserError
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.github import GitHub
from pipeline.loader import load_experiment
from pipeline.online import Online
from pipeline.plan import in_repo_paths
from pipeline.plan_comment import plan_comment
from pipeline.plan_preview import Preview, Verdict, verdict_of
from pipeline.plan_request import preview_of
from pipeline.pull_request import (
    Access,
    ChangedFile,
    FileStatus,
    GitHubError,
    PullRequest,
    annotations,
    read_pull,
)
from pipeline.rules import ALL_RULES, Subject
from pipeline.rules.others import relatives
from pipeline.settings import find_root, load_settings
from pipeline.trace import MEMORY_RULE, can_trace, trace_where_possible
from pipeline.tree import EXAMPLES
from pipeline.workflow_run import WorkflowRun
from pipeline.workspace import find_experiments, shown_path

MOST = 20  # experiments of one pull request: each has a comment and a rehearsal of its own
PINNED = "EXP003"  # the rule about revisions
TOGETHER = {"EXP005", "EXP006"}  # the rules about an experiment among the others
PLAN_MARKER = re.compile(r"<!-- mergetune:plan:([a-z0-9-]{1,64})(?: | -->)")


@dataclass(frozen=True)
class Proposed:
    """A changed experiment; `previous` is where main has the version before it, `example` one never launched."""

    path: str
    previous: str | None = None
    example: bool = False


@dataclass(frozen=True)
class Proposal:
    """What a pull request does to the experiments of a tree."""

    experiments: tuple[Proposed, ...]
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reviewed:
    """The proposal with everything there is to see of it."""

    proposal: Proposal
    previews: tuple[tuple[Proposed, Preview], ...]

    @property
    def findings(self) -> list[Finding]:
        """Of every experiment, worst first."""
        return sorted({f for _, preview in self.previews for f in preview.findings}, key=lambda f: (f.severity, f.at))

    @property
    def is_good(self) -> bool:
        """Whether no experiment has an error."""
        return not any(preview.errors for _, preview in self.previews)

    @property
    def waits_for_a_trace(self) -> bool:
        """Whether memory by the closed form is all that stands in the way, or is not sure to be enough."""
        rules = {finding.rule for _, preview in self.previews for finding in preview.errors}
        return rules <= {MEMORY_RULE} and any(finding.rule == MEMORY_RULE for finding in self.findings)

    @property
    def launched(self) -> list[Preview]:
        """The previews of those that a merge launches."""
        return [preview for proposed, preview in self.previews if not proposed.example]


def run_preflight(
    run: WorkflowRun,
    github: GitHub,
    tree: Path,
    base: Path,
    online: Online | None = None,
    *,
    trace_follows: bool = False,
) -> int:
    """Check, plan and say so; the exit code. Memory is traced where the training stack is installed.

    `trace_follows`: it is not, and where only memory is in question another call will trace it and say everything.

    Raises:
        UserError: the tree cannot be read, or changes too much at once.
        GitHubError: what is changed cannot be known.
    """
    run.set_output("trace", False)
    run.set_output("rehearse", [])  # whatever happens below: nothing of a bad proposal is rehearsed
    pull = read_pull(run.event["pull_request"]) if "pull_request" in run.event else None
    reviewed = review(changes_of(run, github, pull), tree, base, online)
    if trace_follows and not can_trace() and reviewed.waits_for_a_trace:
        run.set_output("trace", True)
        return 0
    if lines := annotations(reviewed.findings):
        print(lines)
    run.summarise(summary_of(reviewed))
    if pull is not None and not pull.from_fork:
        run.summarise(_said(github, pull.number, reviewed, str(run.event["pull_request"].get("body") or "")))
    if reviewed.is_good:
        run.set_output("rehearse", [one.path for one, _ in reviewed.previews if not one.example])
    return int(not reviewed.is_good)


def changes_of(run: WorkflowRun, github: GitHub, pull: PullRequest | None) -> tuple[ChangedFile, ...]:
    """The files that the event's pull request, or group of a merge queue, changes."""
    if pull is not None:
        return github.changed_files(pull.number)
    group = run.event.get("merge_group")
    if not group:
        raise UserError(
            f"`{run.event_name}` is no event that preflight knows", "it runs on pull_request and merge_group"
        )
    return github.pushed_files(group["base_sha"], group["head_sha"])


def review(changed: Iterable[ChangedFile], tree: Path, base: Path, online: Online | None = None) -> Reviewed:
    """Check and plan what these files change of the tree's experiments.

    Raises:
        UserError: the tree cannot be read, or changes too much at once.
    """
    tree, base = tree.resolve(), base.resolve()
    refuse_links_out(tree)
    if find_root(tree) != tree:
        raise UserError("the proposal has no pyproject.toml with `[tool.mergetune]`", "put it back")
    experiments = read_experiments(tree)
    proposal = proposal_of(tuple(changed), experiments)
    if len(proposal.experiments) > MOST:
        words = f"{len(proposal.experiments)} experiments are changed at once, at most {MOST} may be"
        raise UserError(words, "split the pull request")
    together = _checked_together(proposal, tree, experiments)
    previews = [(one, _preview(one, tree, base, online, together)) for one in proposal.experiments]
    return Reviewed(proposal, tuple(previews))


def refuse_links_out(tree: Path) -> None:
    """Reading must not lead out of the tree: what lies beside it is not the pull request's to show.

    Raises:
        UserError: a link points outside.
    """
    for folder, folders, files in os.walk(tree):
        if ".git" in folders:
            folders.remove(".git")
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink() and not path.resolve().is_relative_to(tree):
                shown = path.relative_to(tree).as_posix()
                raise UserError(f"`{shown}` is a link that leads out of the repository", "remove it", at=Place(shown))


def read_experiments(tree: Path) -> dict[str, Experiment | None]:
    """Every experiment of a tree by its path there; None for one that cannot be read."""
    found: dict[str, Experiment | None] = {}
    folder = tree / "experiments"
    for path in find_experiments(tree, []) if any(folder.rglob("*.y*ml")) else []:
        shown = shown_path(path, tree)
        found[shown] = None
        with suppress(UserError):
            found[shown] = load_experiment(path).experiment
    return found


def proposal_of(changed: Sequence[ChangedFile], experiments: Mapping[str, Experiment | None]) -> Proposal:
    """The experiments whose file, or whose data in the repository, is among the changed files."""
    paths = {one.path for one in changed if one.status is not FileStatus.REMOVED}
    touched = paths | {one.path for one in changed} | {one.previous for one in changed if one.previous}
    moved = {one.path: one.previous for one in changed if one.previous and one.status is FileStatus.RENAMED}
    found: list[Proposed] = []
    for shown, experiment in experiments.items():
        if shown in paths or (experiment and _uses(experiment, touched)):
            previous = moved.get(shown, shown)
            found.append(Proposed(shown, previous, EXAMPLES in PurePosixPath(shown).parts))
    gone = {path for path in touched - experiments.keys() if _launches(path)}
    return Proposal(tuple(found), tuple(sorted(gone)))


def summary_of(reviewed: Reviewed) -> str:
    """Everything for the workflow run's own page; on a fork's pull request it is all there is."""
    parts = [plan_comment(preview) for _, preview in reviewed.previews]
    if reviewed.proposal.removed:
        parts.append(findings_text([f"merging stops what runs of `{path}`" for path in reviewed.proposal.removed]))
    if not parts:
        parts.append("No experiment is changed.")
    return "\n\n".join(parts)


def say_plans(github: GitHub, number: int, reviewed: Reviewed) -> None:
    """One comment for each experiment, edited where there is one; those of experiments that left say so.

    Raises:
        GitHubError: a comment could not be posted.
    """
    names = {preview.name for preview in reviewed.launched}
    for preview in reviewed.launched:
        github.sticky_comment(number, f"plan:{preview.name}", plan_comment(preview))
    for comment in github.comments(number):
        match = PLAN_MARKER.match(comment.body)
        if match and comment.author == github.login and match[1] not in names:
            github.sticky_comment(number, f"plan:{match[1]}", left_comment(match[1]))


def checklist(previews: Sequence[Preview]) -> list[bool]:
    """The boxes of the pull request template, in its order."""
    plans = [preview.plan for preview in previews]
    fits = [verdict_of(plan.stages[0]) in (Verdict.FITS, Verdict.NO_GPU, Verdict.LOCAL) for plan in plans if plan]
    known = bool(previews) and all(plans)
    unpinned = [f for preview in previews for f in preview.findings if f.rule == PINNED]
    return [
        bool(previews) and not any(preview.errors for preview in previews),
        known and all(fits),
        known and all(plan.worst_usd <= plan.experiment.budget.max_usd for plan in plans if plan),
        known and not unpinned,
        known and all(plan.experiment.hypothesis.strip() for plan in plans if plan),
    ]


def _said(github: GitHub, number: int, reviewed: Reviewed, body: str) -> str:
    """Comment and tick the boxes; what could not be said, as a line for the summary."""
    try:
        say_plans(github, number, reviewed)
        ticked = tick_boxes(body, checklist(reviewed.launched))
        if reviewed.launched and ticked != body:
            github.api.ask("PATCH", f"issues/{number}", body={"body": ticked})
    except GitHubError as error:
        if error.access not in (Access.FORBIDDEN, Access.LOCKED):
            raise
        return findings_text([f"no comment could be posted: {error.detail}"])
    return ""


def _preview(
    one: Proposed, tree: Path, base: Path, online: Online | None, together: Mapping[str, list[Finding]]
) -> Preview:
    before = base / one.previous if one.previous else None
    against = before if before is not None and before.is_file() and not before.is_symlink() else None
    untraced: list[Finding] = []
    trace = partial(trace_where_possible, one.path, untraced) if can_trace() else None
    try:
        preview = preview_of(tree / one.path, against, online, trace)
    except UserError as error:
        finding = Finding("PLAN", Severity.ERROR, Place(one.path), error.message, error.hint)
        preview = Preview(PurePosixPath(one.path).stem, one.path, findings=(finding,))
    return replace(preview, findings=(*preview.findings, *untraced, *together.get(one.path, ())))


def _checked_together(
    proposal: Proposal, tree: Path, experiments: Mapping[str, Experiment | None]
) -> dict[str, list[Finding]]:
    """Findings by file of the proposed experiments among all: two of them may not write to one place."""
    readable = {path: one for path, one in experiments.items() if one}
    groups = dict(zip(readable, relatives(list(readable.values())), strict=True))
    rules = [rule for rule in ALL_RULES if rule.id in TOGETHER]
    settings, found = load_settings(tree), {}
    for path in groups.keys() & {one.path for one in proposal.experiments}:
        others = tuple(one for one in groups[path] if one is not readable[path])
        subject = Subject(load_experiment(tree / path, path), Facts(others=others), settings)
        said = [finding for rule in rules if (finding := rule.run(subject))]
        found[path] = sorted(said, key=lambda one: (one.severity, one.at, one.rule))
    return found


def _uses(experiment: Experiment, touched: set[str]) -> bool:
    """Whether an experiment names one of these files, or a folder that holds one."""
    named = {str(PurePosixPath(name)) for name in in_repo_paths(experiment)}
    return any(name in named or any(str(up) in named for up in PurePosixPath(name).parents) for name in touched)


def _launches(path: str) -> bool:
    parts = PurePosixPath(path).parts
    kept = parts[:1] == ("experiments",) and not {EXAMPLES, "archive"} & set(parts)
    return kept and path.endswith((".yaml", ".yml"))
