"""Commands in comments on a pull request: who may give them, and what each does. Starts no job and holds no Hub token.

/plan            here, by the same flow as preflight     /cancel, /retry  dispatched to `launch`, which answers
/status, /help   here
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.comments import answer_comment, answer_key, findings_text, help_text, refusal, status_table
from pipeline.errors import UserError
from pipeline.github import GitHub
from pipeline.hub_facts import HubError
from pipeline.online import Online
from pipeline.preflight import proposal_of, read_experiments, refuse_links_out, review, say_plans
from pipeline.pull_request import GitHubError, PullRequest, Reaction
from pipeline.run_verbs import cancel_run, retry_run
from pipeline.workflow_run import WorkflowRun
from pipeline.world import World

LAUNCH = "launch.yml"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
LOGIN = re.compile(r"[A-Za-z0-9-]{1,39}(?:\[bot\])?")


@dataclass(frozen=True)
class Command:
    """A command as it was given."""

    verb: str
    arguments: tuple[str, ...]
    number: int
    comment_id: int
    by: str

    @property
    def shown(self) -> str:
        """As it was typed."""
        return " ".join((f"/{self.verb}", *self.arguments))


@dataclass(frozen=True)
class Place:
    """Where commands are carried out: GitHub, the proposal of an open pull request (if there is one), main, the Hub."""

    github: GitHub
    tree: Path
    base: Path
    online: Online | None = None


def read_command(run: WorkflowRun) -> Command | None:
    """The command in the event's comment; None when it is none of ours: no pull request, or no slash up front."""
    comment, issue = run.event["comment"], run.event["issue"]
    lines = str(comment["body"] or "").strip().splitlines()
    if "pull_request" not in issue or not lines or not re.match(r"/[a-z]", lines[0]):
        return None
    verb, *arguments = lines[0][1:].split()[:3]
    return Command(
        verb[:40], tuple(a[:100] for a in arguments), issue["number"], comment["id"], comment["user"]["login"]
    )


def run_command(command: Command, place: Place) -> int:
    """Answer a command: a reaction and, for those who may command, a comment. The exit code."""
    github = place.github
    if not github.permission(command.by).writes:
        _react(github, command, Reaction.REFUSED)
        return 0
    _react(github, command, Reaction.SEEN)
    try:
        text, reaction = _carry_out(command, place), Reaction.DONE
    except UserError as error:
        text, reaction = refusal(error.message, error.hint), Reaction.REFUSED
    if text:
        say(github, command.number, command.comment_id, command.by, command.shown, text)
    _react(github, command, reaction)
    return 0


def say(github: GitHub, number: int, comment_id: int, by: str, shown: str, text: str) -> None:
    """The one answer to a command; said again, it is edited."""
    github.sticky_comment(number, answer_key(comment_id), answer_comment(comment_id, by, shown, text))


def carry_out_dispatched(run: WorkflowRun, github: GitHub, world: Callable[[], World]) -> int:
    """What `launch` was dispatched for, before its tick: cancel or retry. Answers where it was asked; the exit code."""
    given = {key: str(value or "") for key, value in (run.event.get("inputs") or {}).items()}
    verb, name = given.get("command", ""), given.get("experiment", "")
    if verb not in ("cancel", "retry"):
        return 0
    by = given.get("by", "") or str(run.event.get("sender", {}).get("login", ""))
    by = by if LOGIN.fullmatch(by) else "somebody"
    try:
        if not NAME.fullmatch(name):
            raise UserError(f"`{name}` is not the name of an experiment", f"`/{verb} NAME`")
        text, code = (cancel_run(world(), name) if verb == "cancel" else retry_run(world(), name, by)), 0
    except UserError as error:
        text, code = refusal(error.message, error.hint), 1
    except HubError as error:
        text, code = refusal(f"the Hub did not do it: {error.detail}", "nothing is lost: ask again"), 1
    print(text)
    pull, comment = given.get("pull", ""), given.get("comment", "")
    if pull.isdecimal() and comment.isdecimal():
        say(github, int(pull), int(comment), by, f"/{verb} {name}", text)
    return code


def _react(github: GitHub, command: Command, reaction: Reaction) -> None:
    """A reaction is a courtesy: where the token may not react, the command is carried out all the same."""
    with suppress(GitHubError):
        github.react(command.comment_id, reaction)


def _carry_out(command: Command, place: Place) -> str:
    match command.verb:
        case "plan":
            return _plan(command, place)
        case "status":
            return _status(command, place)
        case "cancel" | "retry":
            return _dispatch(command, place)
        case "help":
            return help_text()
        case _:
            return help_text(command.shown)


def _plan(command: Command, place: Place) -> str:
    """Plan again; for a merged pull request with main's files, which is how a changed plan is reviewed."""
    pull = place.github.pull_request(command.number)
    if pull.open:
        tree = place.tree
        if not (tree / "pyproject.toml").is_file():
            message = f"the files of #{pull.number} as they would be merged cannot be had"
            raise UserError(message, "if it is in conflict with main, resolve that; then ask again")
    elif pull.merged_at:
        tree = place.base
    else:
        raise UserError(f"#{pull.number} was closed without a merge", "reopen it, then ask again")
    reviewed = review(place.github.changed_files(pull.number), tree, place.base, place.online)
    say_plans(place.github, pull.number, reviewed)
    if not reviewed.launched:
        return "This pull request changes no experiment."
    lines = [f"`{preview.name}`: {'has errors' if preview.errors else 'planned'}" for preview in reviewed.launched]
    return findings_text(lines)


def _status(command: Command, place: Place) -> str:
    """The commit statuses where the pull request was merged: they are what the last tick found."""
    pull = place.github.pull_request(command.number)
    if pull.merge_sha is None or not pull.merged_at:
        return "This pull request is not merged: nothing of it runs."
    path = f"commits/{pull.merge_sha}/status"
    rows = place.github.api.items(path, key="statuses")
    found = [(row["context"], row["state"], row["description"] or "") for row in rows]
    return status_table([(name.removeprefix("train/"), s, w) for name, s, w in found if name.startswith("train/")])


def _dispatch(command: Command, place: Place) -> str:
    """Hand a command to the workflow that holds the token; it edits the answer that is given here. Returns no more."""
    pull = place.github.pull_request(command.number)
    name = command.arguments[0] if command.arguments else _only_experiment(command, place, pull)
    if not NAME.fullmatch(name):
        raise UserError(f"`{name}` is not the name of an experiment", f"`/{command.verb} NAME`")
    inputs = {"command": command.verb, "experiment": name, "by": command.by}
    inputs |= {"pull": str(command.number), "comment": str(command.comment_id)}
    # Said before it is dispatched: `launch` edits these words, and must not be overwritten by them.
    words = f"Handed to `launch`, which answers here in a minute or two: {command.verb} `{name}`."
    say(place.github, command.number, command.comment_id, command.by, command.shown, words)
    try:
        place.github.dispatch(LAUNCH, inputs)
    except GitHubError as error:
        raise UserError(f"`launch` could not be started: {error.detail}", "ask again, or start it by hand") from error
    return ""


def _only_experiment(command: Command, place: Place, pull: PullRequest) -> str:
    tree = place.tree if pull.open and place.tree.is_dir() else place.base
    refuse_links_out(tree.resolve())
    changed = place.github.changed_files(pull.number)
    proposal = proposal_of(changed, read_experiments(tree.resolve()))
    names = [Path(one.path).stem for one in proposal.experiments if not one.example]
    if len(names) != 1:
        many = ", ".join(f"`/{command.verb} {name}`" for name in names) or f"`/{command.verb} NAME`"
        raise UserError("which experiment?", f"one of {many}" if names else many)
    return names[0]
