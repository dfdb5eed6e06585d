"""Money on loopback: the real command, killed at every request it makes, or started many times at once, pays once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_story import EXPERIMENT, Story, here, story_told
from servers.hub_http import Request

from pipeline.book import Verdict

pytestmark = pytest.mark.slow
MOST_REQUESTS = 80  # of one tick that submits; far more than there are


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        yield begin(story)


def begin(story: Story) -> Story:
    """One experiment of one stage on main; its job waits for a machine until the tick is over."""
    text = EXPERIMENT.format(revision=story.base_revision)
    kept = [line for line in text.splitlines() if not line.startswith(("merge:", "gguf:"))]
    story.merge(text="\n".join(kept) + "\n")
    story.hub.scheduling_s = 0.5
    return story


def killed_at(story: Story, due: Callable[[Request], bool]) -> Request | None:
    """The request of `mergetune reconcile` at which it was killed, done but unanswered; None when none was due."""
    heard: list[Request] = []
    process = story.start("reconcile")

    def kill(request: Request) -> None:
        if not heard and process.poll() is None and due(request):
            process.kill()
            heard.append(request)

    story.hub.on_request = kill
    try:
        process.communicate(timeout=60)
    finally:
        story.hub.on_request = None
        process.kill()
    return heard[0] if heard else None


def test_killed_at_every_request_one_training_is_paid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: list[Request] = []
    for number in range(1, MOST_REQUESTS):
        (tmp_path / str(number)).mkdir()
        with story_told(tmp_path / str(number), stand_ins=True) as story:
            begin(story)
            due = len(story.hub.requests) + number
            death = killed_at(story, lambda request, due=due: request.n == due)
            if death is None:
                assert len(story.hub.jobs) == 1
                break
            deaths.append(death)
            note = f"killed at request {number}, {death.method} {death.path}"
            with here(story, monkeypatch):
                closed = story.live_on()
            assert closed.verdict is Verdict.DONE, note
            assert len(story.hub.jobs) == len(story.worked()) == 1, note
            assert len(story.book().closed) == 1, note
    met = [f"{death.method} {death.path}" for death in deaths]
    for step in ("GET /api/models/acme/tiny-adapter", "POST /api/repos/create", "POST /api/jobs/acme"):
        assert step in [line.partition("?")[0] for line in met]
    assert sum("/commit/" in line for line in met) == 2  # the claim, and the job's id in it
    assert len(met) >= 20


def test_a_job_that_nobody_can_find_shares_no_work_with_its_second(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the post, and no listing shows the job before the claim's lease is over: a second is bought. One works.

    The other leaves at the fence, before it has loaded anything.
    """
    story.hub.scheduling_s = 4
    story.hub.list_lag_s = 10**6
    death = killed_at(story, lambda request: (request.method, request.path) == ("POST", "/api/jobs/acme"))
    assert death is not None
    with here(story, monkeypatch):
        story.clock.sleep(1800)
        (report,) = story.tick_here()
        assert report.outcome == "submitted"
        assert story.live_on().verdict is Verdict.DONE
    assert len(story.hub.jobs) == 2
    assert len(story.worked()) == 1
    assert sum("superseded" in job.log for job in story.hub.jobs.values()) == 1


@pytest.mark.parametrize("controllers", [2, 8])
def test_commands_at_once_start_one_job(story: Story, monkeypatch: pytest.MonkeyPatch, controllers: int) -> None:
    processes = [story.start("reconcile") for _ in range(controllers)]
    answers = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in answers] == [0] * controllers, answers
    assert sum(": submitted: " in out for (out, _), _ in answers) == 1, answers
    assert len(story.hub.jobs) == 1
    with here(story, monkeypatch):
        assert story.live_on().verdict is Verdict.DONE
    assert len(story.worked()) == 1


def test_a_tick_that_dies_before_its_tag_is_pushed_is_finished_by_the_next(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert story.call("reconcile").returncode == 0
    story.hub.wait_jobs(60)
    hook = story.root / "acme/tunes.git/hooks/pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    refused = story.call("reconcile")
    assert refused.returncode == 1
    assert "tag `run/tiny-" in refused.stdout
    hook.unlink()
    done = story.call("reconcile")
    assert (done.returncode, "finished" in done.stdout) == (0, True)
    assert len(story.hub.jobs) == 1
