"""Where an experiment on main came from, and whether what would run is what was reviewed there. Launches nothing."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.errors import Finding, Place, Severity
from pipeline.github import GitHub
from pipeline.plan import Plan, in_repo_paths
from pipeline.plan_changes import plan_hash
from pipeline.pull_request import GitHubError, PullRequest, ours
from pipeline.repository import Repository

RULE = "REV001"
REVIEWED = re.compile(r"<!-- mergetune:plan:\S+ .*?\bplan=([0-9a-f]{64}) -->")


@dataclass(frozen=True)
class Origin:
    """The commit of main that brought files as they are, and its pull request; None: it was pushed by hand."""

    commit: str | None
    pull: PullRequest | None


@dataclass
class Origins:
    """Origins by path, each looked up once in a tick."""

    github: GitHub
    repository: Repository
    branch: str = "main"
    known: dict[str, Origin] = field(default_factory=dict)

    def of_plan(self, plan: Plan) -> Origin:
        """Where an experiment, or the data it was last given, came from."""
        return self.of((path_of(plan.experiment.name), *in_repo_paths(plan.experiment)))

    def of(self, paths: Iterable[str]) -> Origin:
        """The newest origin of several paths: the pull request merged last, else the first path's."""
        found = [self._origin(path) for path in paths]
        merged = [origin for origin in found if origin.pull]
        return max(merged, key=lambda origin: origin.pull.merged_at or "" if origin.pull else "", default=found[0])

    def number_of(self, plan: Plan) -> int | None:
        """The pull request that brought an experiment, None also where GitHub does not say: it is only a label."""
        try:
            pull = self.of_plan(plan).pull
        except GitHubError:
            return None
        return pull.number if pull else None

    def _origin(self, path: str) -> Origin:
        if path not in self.known:
            commit = self.repository.introduced_by(path)
            same = next((origin for origin in self.known.values() if origin.commit == commit), None)
            pull = same.pull if same else self.github.pull_request_of(commit, self.branch) if commit else None
            self.known[path] = Origin(commit, pull)
        return self.known[path]


def path_of(name: str) -> str:
    """An experiment's file: it has its name."""
    return f"experiments/{name}.yaml"


def make_gate(origins: Origins, approvals: int) -> Callable[[Plan], Finding | None]:
    """The question before a first submit: is this plan the one that people looked at?"""

    def gate(plan: Plan) -> Finding | None:
        refusal = _refusal(origins, approvals, plan)
        if refusal is None:
            return None
        message, hint = refusal
        return Finding(RULE, Severity.ERROR, Place(path_of(plan.experiment.name)), f"needs review: {message}", hint)

    return gate


def reviewed_hash(github: GitHub, pull: PullRequest, name: str) -> str | None:
    """The hash in our plan comment; anybody can type a marker, so only our own account's counts."""
    for comment in ours(github.comments(pull.number), f"plan:{name}", github.login):
        if match := REVIEWED.match(comment.body):
            return match[1]
    return None


def memory_was_traced(origins: Origins, plan: Plan) -> bool:
    """Whether our plan comment of this very plan says that a trace has shown the training to fit."""
    pull, name = origins.of_plan(plan).pull, plan.experiment.name
    comments = ours(origins.github.comments(pull.number), f"plan:{name}", origins.github.login) if pull else []
    marks = (match[0] for comment in comments if (match := REVIEWED.match(comment.body)))
    first = next(marks, "")
    return " memory=traced " in first and f"plan={plan_hash(plan)} " in first


def _refusal(origins: Origins, approvals: int, plan: Plan) -> tuple[str, str] | None:
    name, github = plan.experiment.name, origins.github
    origin = origins.of_plan(plan)
    pull = origin.pull
    if pull is None:
        hint = "change the file in a pull request, even by a comment: its plan is reviewed there"
        return f"`{path_of(name)}` came to `{origins.branch}` without a pull request", hint
    if approvals:
        who = github.approvals(pull)
        if len(who) < approvals:
            message = f"#{pull.number} has {len(who)} of {approvals} approvals of `{pull.head_sha[:12]}` by writers"
            return message, f"approve the last commit of #{pull.number}; the next tick looks again"
    seen = reviewed_hash(github, pull, name)
    if seen is None:
        hint = f"comment `/plan` on #{pull.number}: it shows the plan, and the next tick launches it"
        return f"#{pull.number} shows no plan of `{name}`", hint
    if seen != plan_hash(plan):
        hint = f"comment `/plan` on #{pull.number}: it shows the new plan, and the next tick launches it"
        return f"the plan is no longer the one that #{pull.number} shows", hint
    return None
