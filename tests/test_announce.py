"""What a tick says on GitHub, and which plan it launches: the real controller, simulated jobs, GitHub on loopback."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pull_story import ROWS, SMALL, checkout, client, experiment, loopback, workflow_run
from servers.github import LoopbackGitHub
from servers.hub_faults import status
from simulation import SimBook, SimRemote, SimWorld

from pipeline.actions import Seen, Submit
from pipeline.announce import Desk, announce, open_desk, tick_and_tell
from pipeline.book import Tag, since_message
from pipeline.chatops import Place, carry_out_dispatched, read_command, run_command
from pipeline.controller import tick
from pipeline.errors import Finding, Severity
from pipeline.errors import Place as FilePlace
from pipeline.plan import Plan, StageName
from pipeline.preflight import run_preflight
from pipeline.repository import Repository
from pipeline.review import Origins
from pipeline.run_verbs import cancel_run
from pipeline.settings import Settings
from pipeline.tree import make_order, read_tree
from pipeline.world import Outcome, Report, World

pytestmark = pytest.mark.slow

LABEL = "acme--models"
ACME = frozenset({"acme"})
HALF_HOUR = 1800.0


class Life:
    """A repository on GitHub whose jobs are simulated; every tick is a fresh checkout of main."""

    def __init__(self, root: Path) -> None:
        self.root, self.sim = root, SimWorld(random.Random(0))
        self.github: LoopbackGitHub = loopback(root)
        self.github.world.clock = self.sim.now
        message = since_message(datetime.fromtimestamp(self.sim.time, UTC))
        self.sim.tags["mergetune/since"] = Tag("mergetune/since", "c" * 40, message)
        self.approvals = self.checkouts = 0
        self.found: tuple[Finding, ...] = ()  # by the check before a launch
        self.summary = ""

    def propose(self, *, preflight: bool = True, **files: str | None) -> int:
        """A pull request, with the plan comments that preflight makes; `small=` is experiments/small.yaml."""
        changed = {f"experiments/{name}.yaml": text for name, text in files.items()}
        number = self.github.open_pull(f"b{self.sim.calls}-{len(self.github.world.pulls)}", "alice", files=changed)
        if preflight:
            self.preflight(number)
        return number

    def preflight(self, number: int) -> int:
        event = self.github.event("pull_request", number)
        tree = checkout(self.github, f"refs/pull/{number}/head", self.root / f"proposed{number}")
        base = checkout(self.github, "refs/heads/main", self.root / "base")
        run = workflow_run(self.github, self.root, "pull_request", event)
        return run_preflight(run, client(self.github), tree, base)

    def merge(self, number: int, method: str = "merge", by: str = "bob") -> str:
        self.sim.advance(60)
        return self.github.merge(number, method, by)

    def desk(self) -> Desk:
        self.checkouts += 1  # a new folder: this process remembers what it read in the last one
        clone = checkout(self.github, "refs/heads/main", self.root / f"clone{self.checkouts}")
        remote = SimRemote(self.sim)

        def order(plan: Plan, submit: Submit, seen: Seen, attempt: int) -> Any:
            return make_order(clone, remote, LABEL, {}, plan, submit, seen)

        tree = read_tree(clone, self.github.world.commit("refs/heads/main"))
        world = World(
            remote,
            SimBook(remote),
            remote.clock,
            Settings(),
            tree,
            LABEL,
            lambda plan: self.found,
            order,
            namespaces=ACME,
        )
        github = client(self.github)
        return open_desk(world, github, clone, Origins(github, Repository(clone), "main"))

    def tick(self) -> list[Report]:
        def hear(text: str) -> None:
            self.summary = text

        reports = tick_and_tell(self.desk(), self.approvals, hear)
        self.sim.advance(HALF_HOUR)
        return reports

    def run_out(self, ticks: int = 20) -> list[Report]:
        """Until nothing is in flight."""
        said: list[Report] = []
        for _ in range(ticks):
            reports = self.tick()
            said += reports
            if not reports:
                return said
        raise AssertionError(said[-3:])

    def comments(self, number: int, kind: str) -> list[str]:
        """Texts under a key of this kind."""
        return [c.body for c in self.github.comments(number) if c.body.startswith(f"<!-- mergetune:{kind}:")]

    def watched(self) -> bool:
        return self.github.world.workflow("watch.yml").state == "active"

    def say(self, number: int, login: str, text: str) -> int:
        """A comment, and the workflow that answers it; its id."""
        made = self.github.comment(number, login, text)
        run = workflow_run(self.github, self.root, "issue_comment", self.github.event("issue_comment", made))
        given = read_command(run)
        assert given is not None
        base = checkout(self.github, "refs/heads/main", self.root / "base")
        run_command(given, Place(client(self.github), self.root / f"proposed{number}", base))
        return made


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    life = Life(tmp_path)
    with life.github:
        yield life


@pytest.mark.parametrize("method", ["merge", "squash", "rebase", "queue"])
def test_a_merged_experiment_is_followed_to_its_end(life: Life, method: str) -> None:
    number = life.propose(small=experiment())
    sha = life.merge(number, method)
    (report,) = life.tick()
    assert report.outcome is Outcome.SUBMITTED, report
    assert life.watched()
    assert life.github.statuses(sha)["train/small"].state == "pending"
    (followed,) = life.comments(number, "run")
    assert "◐ train → ○ merge → ○ gguf → ○ evaluate" in followed
    life.run_out()
    (followed,) = life.comments(number, "run")
    assert "● train → ● merge → ● gguf → ● evaluate" in followed
    (result,) = life.comments(number, "result")
    assert "✅ `small` is done" in result
    assert "@alice @bob" in result
    assert "acme/small-GGUF" in result
    assert life.github.statuses(sha)["train/small"].state == "success"
    assert not life.watched(), "nothing is in flight"
    life.tick()
    assert len(life.comments(number, "result")) == 1


def test_what_waits_for_an_adapter_is_said_and_not_watched(life: Life) -> None:
    """The schedule stops: an adapter may take days, and who hands it in starts the next tick."""
    text = experiment(**{"flavor: cpu-upgrade, timeout: 10m": "backend: mlx"})
    number = life.propose(small=text)
    sha = life.merge(number)
    (report,) = life.tick()
    assert report.outcome is Outcome.YOURS, report
    (followed,) = life.comments(number, "run")
    assert "### `small` waits for you" in followed
    assert "○ train → ○ merge → ○ gguf → ○ evaluate" in followed
    assert "mergetune submit-adapter small runs/" in followed
    assert "`/cancel small` stops it" in followed
    assert life.github.statuses(sha)["train/small"].state == "pending"
    assert life.sim.job_list == []
    assert not life.watched()


def test_a_retry_asked_for_in_a_comment_starts_no_training_either(life: Life) -> None:
    number = life.propose(small=experiment(**{"flavor: cpu-upgrade, timeout: 10m": "backend: mlx"}))
    life.merge(number)
    life.tick()
    for verb in ("cancel", "retry"):
        inputs = {"command": verb, "experiment": "small", "by": "bob"}
        event = life.github.event("workflow_dispatch", workflow="launch.yml", inputs=inputs)
        run = workflow_run(life.github, life.root, "workflow_dispatch", event)
        assert carry_out_dispatched(run, client(life.github), lambda: life.desk().world) == 0
        life.sim.advance(HALF_HOUR)
    (report,) = life.tick()
    assert (report.outcome, report.stage) == (Outcome.YOURS, StageName.TRAIN)
    assert life.sim.job_list == []


def test_a_final_comment_that_was_not_taken_is_made_later(life: Life) -> None:
    number = life.propose(small=experiment())
    life.merge(number)
    for _ in range(20):
        desk = life.desk()
        if not tick(desk.world):  # the process dies before it says a word
            break
        life.sim.advance(HALF_HOUR)
    assert life.comments(number, "result") == []
    life.tick()
    assert len(life.comments(number, "result")) == 1


def test_a_later_pull_request_is_not_told_of_an_older_run(life: Life) -> None:
    life.merge(life.propose(small=experiment()))
    life.run_out()
    later = life.propose(small=experiment(**{"timeout: 10m}": "timeout: 11m}"}))  # no other run: only a timeout
    life.merge(later)
    assert life.tick() == []
    assert life.comments(later, "result") == []


def test_a_push_without_a_pull_request_is_blocked_and_marked(life: Life) -> None:
    sha = life.github.push("main", {SMALL: experiment()}, "alice")
    (report,) = life.tick()
    assert report.outcome is Outcome.BLOCKED
    assert "needs review" in report.text
    assert "pull request" in report.hint
    assert life.github.statuses(sha)["train/small"].description.startswith("blocked: needs review")
    assert "needs review" in life.summary
    assert life.sim.job_list == []


def test_a_plan_that_nobody_saw_is_not_launched_until_a_writer_asks_for_it(life: Life) -> None:
    number = life.propose(preflight=False, small=experiment())
    life.merge(number)
    (report,) = life.tick()
    assert (report.outcome, life.sim.job_list) == (Outcome.BLOCKED, [])
    assert "/plan" in report.hint
    life.say(number, "mallory", "/plan")
    assert life.tick()[0].outcome is Outcome.BLOCKED
    life.say(number, "bob", "/plan")
    assert life.tick()[0].outcome is Outcome.SUBMITTED


def test_memory_that_a_trace_has_shown_to_fit_is_not_refused_by_the_closed_form(life: Life) -> None:
    place = FilePlace(SMALL)
    life.found = (Finding("MEM002", Severity.ERROR, place, "training needs about 99 GiB", "write `flavor: h200`"),)
    number = life.propose(small=experiment())
    life.merge(number)
    (report,) = life.tick()
    assert (report.outcome, report.text) == (Outcome.BLOCKED, "training needs about 99 GiB")
    (comment,) = life.comments(number, "plan")
    life.github.comment(number, "mallory", comment.replace(" plan=", " memory=traced plan="))
    assert life.tick()[0].outcome is Outcome.BLOCKED, "anybody can type a marker"
    client(life.github).sticky_comment(number, "plan:small", comment.replace(" plan=", " memory=traced plan="))
    life.found += (Finding("HUB007", Severity.ERROR, place, "the token cannot start jobs", ""),)
    assert life.tick()[0].text == "the token cannot start jobs", "only memory was traced"
    life.found = life.found[:1]
    assert life.tick()[0].outcome is Outcome.SUBMITTED


def test_a_plan_that_changed_after_its_comment_is_not_launched(life: Life) -> None:
    number = life.propose(small=experiment())
    branch = life.github.world.pulls[number].branch
    life.github.push(branch, {SMALL: experiment(**{"max_usd: 1": "max_usd: 40"})}, "alice")
    life.merge(number)
    (report,) = life.tick()
    assert report.outcome is Outcome.BLOCKED
    assert "no longer the one" in report.text


def test_a_forged_plan_comment_counts_nothing(life: Life) -> None:
    real = life.propose(small=experiment())
    (text,) = life.comments(real, "plan")
    life.github.close(real)
    number = life.propose(preflight=False, small=experiment())
    life.github.comment(number, "mallory", text)
    life.merge(number)
    assert life.tick()[0].outcome is Outcome.BLOCKED


def test_approvals_count_when_writers_gave_them_to_the_merged_commit(life: Life) -> None:
    life.approvals = 1
    number = life.propose(small=experiment())
    old = life.github.world.pull(number).head_sha
    branch = life.github.world.pulls[number].branch
    life.github.push(branch, {SMALL: experiment() + "\n"}, "alice")
    life.preflight(number)
    life.github.approve(number, "bob", old)  # an earlier commit
    life.github.approve(number, "alice")  # the author
    life.github.approve(number, "mallory")  # may not write
    life.merge(number)
    (report,) = life.tick()
    assert report.outcome is Outcome.BLOCKED
    assert "0 of 1" in report.text
    life.github.approve(number, "bob")
    assert life.tick()[0].outcome is Outcome.SUBMITTED


def test_changed_data_is_reviewed_where_it_was_changed(life: Life) -> None:
    life.merge(life.propose(small=experiment()))
    life.run_out()
    number = life.github.open_pull("data", "alice", files={"data.jsonl": ROWS + ROWS.splitlines()[0] + "\n"})
    life.preflight(number)
    life.merge(number)
    (report,) = life.tick()
    assert report.outcome is Outcome.SUBMITTED
    assert len(life.comments(number, "run")) == 1


def test_a_deleted_file_stops_its_jobs_and_the_deleting_pull_request_is_told(life: Life) -> None:
    life.sim.work_s = 6 * HALF_HOUR
    life.merge(life.propose(small=experiment()))
    life.tick()
    number = life.github.open_pull("delete", "alice", files={SMALL: None})
    sha = life.merge(number)
    (report,) = life.tick()
    assert report.outcome is Outcome.CANCELLED
    (result,) = life.comments(number, "result")
    assert "was cancelled" in result
    assert life.github.statuses(sha) == {}
    assert not life.watched()


def test_an_edited_experiment_replaces_the_one_that_runs(life: Life) -> None:
    life.sim.work_s = 6 * HALF_HOUR
    life.merge(life.propose(small=experiment()))
    life.tick()
    number = life.propose(small=experiment(**{"method: lora": "method: lora, epochs: 2"}))
    life.merge(number)
    reports = life.tick()
    assert {report.outcome for report in reports} == {Outcome.SUPERSEDED, Outcome.SUBMITTED}
    (result,) = life.comments(number, "result")
    assert "newer version" in result
    (followed,) = life.comments(number, "run")
    assert "is under way" in followed


def test_two_experiments_of_one_pull_request_have_a_comment_and_a_status_each(life: Life) -> None:
    number = life.propose(small=experiment(), other=experiment("other"))
    sha = life.merge(number)
    life.run_out()
    assert len(life.comments(number, "run")) == 2
    assert len(life.comments(number, "result")) == 2
    assert {name: status.state for name, status in life.github.statuses(sha).items()} == {
        "train/small": "success",
        "train/other": "success",
    }


def test_what_github_does_not_take_stops_no_run_and_is_said_by_the_next_tick(life: Life) -> None:
    number = life.propose(small=experiment())
    life.merge(number)
    desk = life.desk()
    object.__setattr__(desk.github.api, "attempts", 1)
    life.github.faults.add(action=status(502), path="/issues/", times=50)
    reports = tick_and_tell(desk, 0, lambda text: None)
    assert reports[0].outcome is Outcome.SUBMITTED
    assert desk.unsaid
    assert desk.notes


def test_the_watch_stays_on_when_the_tick_dies(life: Life) -> None:
    life.github.world.workflow("watch.yml").state = "disabled_manually"
    life.merge(life.propose(small=experiment()))
    life.sim.faults.unreachable = 1.0
    with pytest.raises(Exception, match="unreachable"):
        life.tick()
    assert life.watched()


def test_the_same_tick_twice_edits_nothing(life: Life) -> None:
    number = life.propose(small=experiment())
    life.merge(number)
    reports = life.tick()
    before = [(c.id, c.edits) for c in life.github.comments(number)]
    announce(life.desk(), reports)
    assert [(c.id, c.edits) for c in life.github.comments(number)] == before


def test_cancel_and_retry_by_comment_end_and_reopen_the_run(life: Life) -> None:
    number = life.propose(small=experiment())
    life.merge(number)
    life.tick()
    asked = life.say(number, "bob", "/cancel small")
    (sent,) = life.github.dispatches
    assert (sent.workflow, sent.inputs["command"], sent.inputs["experiment"]) == ("launch.yml", "cancel", "small")
    event = life.github.event("workflow_dispatch", workflow="launch.yml", inputs=sent.inputs, by=sent.by)
    run = workflow_run(life.github, life.root, "workflow_dispatch", event)
    assert carry_out_dispatched(run, client(life.github), lambda: life.desk().world) == 0
    (answer,) = life.comments(number, "answer")
    assert "cancelled, 1 job stopped" in answer
    assert f"answer:{asked} " in answer
    life.tick()
    (result,) = life.comments(number, "result")
    assert "was cancelled" in result
    life.say(number, "bob", "/retry small")
    event = life.github.event("workflow_dispatch", workflow="launch.yml", inputs=life.github.dispatches[-1].inputs)
    run = workflow_run(life.github, life.root, "workflow_dispatch", event)
    assert carry_out_dispatched(run, client(life.github), lambda: life.desk().world) == 0
    assert life.tick()[0].outcome is Outcome.SUBMITTED
    life.run_out()
    assert len(life.comments(number, "result")) == 2, "a retried run ends once more"


def test_a_cancel_by_hand_is_told_too(life: Life) -> None:
    number = life.propose(small=experiment())
    life.merge(number)
    life.tick()
    cancel_run(life.desk().world, "small")
    life.tick()
    assert len(life.comments(number, "result")) == 1
