"""A tick that could not read everything does nothing at all: each question of it, unanswered or cut short, once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_story import EXPERIMENT, Story, here, story_told
from servers.hub_faults import Action, drop, status, truncate_list

from pipeline.hub_facts import HubError

pytestmark = pytest.mark.slow
READS = {
    "whose token it is": r"/api/whoami-v2",
    "the live jobs": r"/api/jobs/acme\?",
    "a stage's repository": r"/api/models/acme/tiny-adapter(\?|$)",
    "a claim": r"/acme/tiny-adapter/resolve/.*/claim\.json",
    "a fence": r"/acme/tiny-adapter/resolve/.*/winner\.json",
    "a manifest": r"/acme/tiny-adapter/resolve/.*/manifest\.json",
    "a job by its id": r"/api/jobs/acme/[0-9a-f]{24}$",
    "a failed job's log": r"/api/jobs/acme/[0-9a-f]{24}/logs",
}
FAULTS: dict[str, Action] = {
    "503": status(503),
    "dropped": drop(),
    "cut short": truncate_list(cut_body=True),
    "not a Hub's 404": status(404, "<html>nothing here</html>"),
}
# A job that is not there is told by a bare 404, and a stream of log lines has no length that could be cut.
ANSWERS = {("not a Hub's 404", "a job by its id"), ("not a Hub's 404", "a failed job's log")}
ANSWERS |= {("cut short", "a failed job's log")}


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    """One run whose merge job has failed for a reason that may pass: the next tick reads everything and submits."""
    with story_told(tmp_path, stand_ins=True) as story, here(story, monkeypatch):
        story.merge(text=EXPERIMENT.format(revision=story.base_revision))
        story.tick_here()
        story.hub.wait_jobs(60)
        story.clock.sleep(60)
        story.hub.execute_jobs = False
        story.tick_here()
        merge = list(story.hub.jobs)[-1]
        story.hub.finish_job(merge, "ERROR", log="requests: HTTP 503", message="node lost")
        story.hub.list_lag_s = 10**6  # jobs are known by their claims alone
        yield story


def writes(story: Story, since: int) -> list[str]:
    """Requests that would have changed something."""
    asked = story.hub.requests[since:]
    return [f"{r.method} {r.path}" for r in asked if r.method != "GET" and "auth-check" not in r.path]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_action_while_a_question_has_no_answer(story: Story, fault: str) -> None:
    tags = story.git("ls-remote", "--tags", "origin")
    for name, path in READS.items():
        if (fault, name) in ANSWERS:
            continue
        since = len(story.hub.requests)
        story.hub.faults.add(method="GET", path=path, action=FAULTS[fault], times=1000)
        with pytest.raises(HubError) as caught:
            story.tick_here()
            pytest.fail(f"{name}: {fault} was taken for an answer", pytrace=False)
        assert story.hub.faults.left() < 1000, f"{name} was not read"
        story.hub.faults.clear()
        assert caught.value.access.value == "unreachable", name
        assert writes(story, since) == [], name
    assert story.git("ls-remote", "--tags", "origin") == tags
    (report,) = story.tick_here()
    assert (report.outcome, report.stage) == ("submitted", "merge"), report


def test_the_command_says_so(story: Story) -> None:
    story.hub.faults.add(method="GET", path=READS["the live jobs"], action=status(403, "come back later"), times=1000)
    blocked = story.call("reconcile")
    assert blocked.returncode == 1
    story.hub.faults.clear()
    since = len(story.hub.requests)
    story.hub.faults.add(method="GET", path=READS["a claim"], action=status(500), times=1000)
    done = story.call("reconcile")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the Hub did not answer: 500")
    assert "hint: nothing was done; try again later" in done.stderr
    assert writes(story, since) == []


def test_a_remote_out_of_reach_ends_the_tick_too(story: Story) -> None:
    remote = story.root / "acme/tunes.git"
    remote.rename(story.root / "acme/away.git")
    since = len(story.hub.requests)
    done = story.call("reconcile")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: `git ls-remote`")
    assert "hint:" in done.stderr
    assert writes(story, since) == []


def test_a_listing_that_ends_after_its_first_page_starts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can see that a page's link to the next one is missing: each run is looked up again by its own label."""
    with story_told(tmp_path, stand_ins=True) as story, here(story, monkeypatch):
        story.hub.execute_jobs = False
        text = EXPERIMENT.format(revision=story.base_revision)
        story.merge(text=text)
        story.merge("small", text.replace("name: tiny", "name: small").replace("acme/tiny}", "acme/small}"))
        assert len(story.tick_here()) == 2
        story.hub.world.page_size = 1
        story.clock.sleep(3600)
        story.hub.faults.add(method="GET", path=READS["the live jobs"], action=truncate_list(), times=1)
        reports = story.tick_here()
        assert story.hub.faults.left() == 0
        assert [report.outcome.value for report in reports] == ["waiting", "waiting"], reports
        assert [job.stage for job in story.hub.jobs.values()] == ["SCHEDULING"] * 2
