"""Money on loopback under faults: fifty lives of one run, each drawn from its seed; the real client, jobs that run."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hub_story import EXPERIMENT, TOKEN, Story, here, story_told
from servers.hub_faults import Action, delay, drop, lose_response, status, truncate_list
from servers.hub_http import Request
from servers.hub_jobs import Job

from pipeline.book import Closed, Verdict
from pipeline.hub_facts import HubError
from pipeline.world import Outcome

pytestmark = pytest.mark.slow
SEEDS = 50
PER_TEST = 10
TICKS = 60
ATTEMPTS = 3  # of one stage: the settings' own
REQUESTS = (
    ("POST", r"/api/jobs/acme$"),
    ("POST", r"/commit/"),
    ("POST", r"/preupload/"),
    ("POST", r"/api/repos/create"),
    ("GET", r"/api/jobs/acme\?"),
    ("GET", r"/api/jobs/acme/\w+$"),
    ("GET", r"/logs"),
    ("GET", r"/api/models/acme/tiny"),
    ("GET", r"/resolve/"),
    ("GET", r"/api/whoami-v2"),
)
ACTIONS: tuple[Callable[[], Action], ...] = (
    lambda: status(500, performed=True),
    lambda: status(502),
    lambda: status(503),
    lambda: status(429),
    drop,
    lose_response,
    lambda: delay(0.05),
    lambda: truncate_list(cut_body=True),
)


@dataclass
class Life:
    """One run's life: what goes wrong, and when, by its seed."""

    seed: int
    story: Story
    random: random.Random
    told: list[str] = field(default_factory=list)
    kills: int = 0

    def plant(self) -> None:
        """Draw everything that will go wrong."""
        draw, hub = self.random, self.story.hub
        for _ in range(draw.randint(1, 7)):
            method, path = draw.choice(REQUESTS)
            number = draw.randrange(len(ACTIONS))
            times, skip = draw.randint(1, 4), draw.randint(0, 8)
            hub.faults.add(action=ACTIONS[number](), method=method, path=path, times=times, skip=skip)
            self.told.append(f"{method} {path}: fault {number}, {times} times after {skip}")
        hub.list_lag_s = draw.choice((0, 0, 30, 200, 1200, 4000))
        if draw.random() < 0.35:  # posts that worked and did not say so, of jobs that wait for a machine and in no list
            action = draw.choice((lose_response(), status(500, performed=True)))
            hub.faults.add(action=action, method="POST", path=r"/api/jobs/acme$", times=2, skip=draw.randint(0, 1))
            hub.list_lag_s, hub.scheduling_s = draw.choice((1200, 4000)), 0.7
            hub.job_environment["WORK_S"] = "0.5"  # so that two of them would be seen to work at once
            self.told.append("two posts without an answer")
        self.kills = draw.choice((0, 0, 1, 2))
        self.told.append(f"lag {hub.list_lag_s} s, {self.kills} jobs killed")
        hub.on_request = self.hear

    def hear(self, request: Request) -> None:
        """The machine under a job is lost just after it passed the fence."""
        if self.kills and request.method == "POST" and b"winner.json" in request.body and request.status == 200:
            live = [job for job in self.story.hub.jobs.values() if job.stage == "RUNNING"]
            if live and "/commit/" in request.path:
                self.kills -= 1
                self.story.hub.kill_job(live[-1].id)

    def trouble(self) -> None:
        """A token that is revoked or a credit that is used up, for one tick."""
        hub, chance = self.story.hub, self.random.random()
        if TOKEN not in hub.world.accounts.tokens:
            hub.add_token(TOKEN, "alice")
        hub.set_credit("acme", True)
        if chance < 0.1 and not any(not job.over for job in hub.jobs.values()):
            hub.revoke(TOKEN)
            self.told.append("token revoked")
        elif chance < 0.25:
            hub.set_credit("acme", False)
            self.told.append("no credit")

    def live(self) -> Closed:
        """Ticks until the run is closed, while things go wrong."""
        for number in range(TICKS):
            if number < TICKS // 2:
                self.trouble()
            self.tick()
            if self.random.random() < 0.8:
                self.story.hub.wait_jobs(60)
            if closed := self.story.book().closed:
                self.story.hub.wait_jobs(60)
                return closed[-1]
            self.story.clock.sleep(self.random.choice((5, 60, 1800, 1800)))
        raise AssertionError(f"never closed {self.note()}")

    def tick(self) -> None:
        """One tick; what cannot be read ends it."""
        try:
            reports = self.story.tick_here()
        except HubError as error:
            self.told.append(f"tick: {error}")
            return
        self.told += [f"tick: {report.outcome}: {report.text}" for report in reports]
        assert all(report.hint for report in reports if report.outcome is Outcome.BLOCKED), self.note()

    def judge(self, closed: Closed) -> None:
        """Never two trainings at a time or for nothing, never a lost run, always an end that is told."""
        assert closed.verdict in (Verdict.DONE, Verdict.FAILED), self.note()
        assert closed.text, self.note()
        for stage in ("train", "merge"):
            worked = self.story.worked(stage)
            assert len(worked) <= ATTEMPTS, self.note()
            for earlier, later in pairwise(worked):
                assert is_over_before(earlier, later), self.note()
                assert earlier.stage == "ERROR", f"{stage} was paid again without need {self.note()}"
            numbers = [job.labels["attempt"] for job in worked]
            assert len(set(numbers)) == len(numbers), f"one attempt at {stage} was worked on twice {self.note()}"
            if closed.verdict is Verdict.DONE:
                assert worked, self.note()
                repo = "acme/tiny-adapter" if stage == "train" else "acme/tiny"
                manifest = json.loads(self.story.hub.files(repo)["manifest.json"])
                assert manifest["run_id"] == closed.run_id, self.note()
        assert all(job.over for job in self.story.hub.jobs.values()), self.note()

    def note(self) -> str:
        """Everything to tell it again."""
        jobs = [f"{job.labels} {job.stage} {job.message} {job.log[:300]}" for job in self.story.hub.jobs.values()]
        return "\n".join([f"(seed {self.seed})", *self.told, *jobs])


def is_over_before(earlier: Job, later: Job) -> bool:
    """Whether the one had ended when the other began."""
    return earlier.finished is not None and later.started is not None and earlier.finished <= later.started


def begin(story: Story) -> None:
    """One experiment of two stages on main."""
    text = EXPERIMENT.format(revision=story.base_revision)
    story.merge(text="".join(line for line in text.splitlines(keepends=True) if not line.startswith("gguf:")))


@pytest.mark.parametrize("block", range(SEEDS // PER_TEST))
def test_whatever_fails_nothing_is_lost_or_paid_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    for seed in range(PER_TEST * block, PER_TEST * block + PER_TEST):
        (tmp_path / str(seed)).mkdir()
        with story_told(tmp_path / str(seed), stand_ins=True) as story, here(story, monkeypatch):
            begin(story)
            life = Life(seed, story, random.Random(seed))
            life.plant()
            life.judge(life.live())
