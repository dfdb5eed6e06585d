"""The actual workflow files, run by act against the loopback GitHub and Hub: what a pull request lives through."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_story import TOKEN
from servers.github import LoopbackGitHub
from servers.hub import LoopbackHub
from workflow_story import PEOPLE, READ_TOKEN, TINY, Ran, Workplace, make_workplace, template_files

from pipeline.book import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    files = template_files()
    with LoopbackHub(tmp_path) as hub, LoopbackGitHub(tmp_path, people=PEOPLE, files=files) as github:
        place = make_workplace(tmp_path, hub, github)
        hub.execute_jobs = False
        yield place
        leaks_nothing(place)


def leaks_nothing(place: Workplace) -> None:
    """No token in a comment, a status or a request to GitHub's body."""
    said = [comment.body for comment in place.github.world.comments.values()]
    said += [status.description or "" for status in place.github.world.statuses]
    for text in said:
        assert TOKEN not in text
        assert READ_TOKEN not in text


def passed(ran: Ran, *jobs: str) -> None:
    """These jobs ran, and no others; an unmapped runner label would skip one silently."""
    assert ran.jobs == dict.fromkeys(jobs, "success"), ran.text[-4000:]


def test_a_bad_experiment_is_annotated_and_the_gate_is_shut(place: Workplace) -> None:
    bad = place.experiment(**{"flavor: cpu-upgrade": "flavor: cpu-upgrad"})
    number = place.open(files={TINY: bad})
    ran = place.preflight(number)
    assert ran.jobs == {"plan": "failure", "gate": "failure"}, ran.text[-4000:]
    assert any(TINY in mark and "cpu-upgrad" in mark for mark in ran.annotations), ran.annotations
    assert len(place.comments(number)) == 1
    assert place.hub.jobs == {}


def test_a_forks_pull_request_gets_annotations_and_no_comment(place: Workplace) -> None:
    bad = place.experiment(**{"flavor: cpu-upgrade": "flavor: cpu-upgrad"})
    number = place.open(by="mallory", fork=True, files={TINY: bad})
    ran = place.preflight(number)
    assert ran.jobs == {"plan": "failure", "gate": "failure"}
    assert any(TINY in mark for mark in ran.annotations)
    assert place.github.comments(number) == []
    assert {exchange.method for exchange in place.github.requests} == {"GET"}
    assert READ_TOKEN not in ran.text
    assert not any(READ_TOKEN in str(request) for request in place.hub.requests)


def test_a_good_experiment_is_planned_rehearsed_and_edited_in_place(place: Workplace) -> None:
    number = place.open(files={TINY: place.experiment()})
    passed(place.preflight(number), "plan", "rehearse", "gate")
    (comment,) = place.comments(number, "plan:tiny")
    assert comment.author == "github-actions[bot]"
    place.github.push("try", {TINY: place.experiment(**{"max_steps: 6": "max_steps: 7"})}, "alice")
    passed(place.preflight(number, job="plan"), "plan")
    (again,) = place.comments(number, "plan:tiny")
    assert (again.id, again.edits) == (comment.id, 1)
    assert place.hub.jobs == {}


def test_from_the_merge_to_the_results_whose_every_command_works(place: Workplace) -> None:
    """Real jobs: they train, merge, convert and evaluate a tiny model."""
    place.hub.execute_jobs = True
    place.install()
    evaluated = "evaluate: {flavor: cpu-upgrade, timeout: 20m, prompts: data/prompts.jsonl, max_new_tokens: 8}\noutput:"
    text = place.experiment(**{"output:": evaluated, "runs on loopback": "runs, and held-out loss falls by 1 %"})
    files = {TINY: text, "data/prompts.jsonl": '{"prompt": "what is 3 plus one?"}\n'}
    number = place.plan_only(place.open(files=files))
    sha, ran = place.merge(number)
    passed(ran, "launch")
    place.hub.wait_jobs(240)
    for stage in ("merge", "gguf", "evaluate"):
        passed(place.watch(), "watch")
        assert [job.labels["stage"] for job in place.hub.jobs.values()][-1] == stage
        assert place.github.statuses(sha)["train/tiny"].state == "pending"
        place.hub.wait_jobs(240)
    assert {job.labels["pr"] for job in place.hub.jobs.values()} == {str(number)}
    passed(place.watch(), "watch")
    (result,) = place.comments(number, "result:")
    assert "@alice" in result.body
    assert "- ✅ **held-out loss falls by 1 %**: it fell by " in result.body
    assert "| what is 3 plus one? |" in result.body
    assert "xychart-beta" in result.body
    assert place.github.statuses(sha)["train/tiny"].state == "success"
    assert place.github.world.workflow("watch.yml").state == "disabled_manually"
    (closed,) = place.book().closed
    assert closed.verdict is Verdict.DONE
    assert (closed.summary["pull_request"], len(closed.summary["curve"]["loss"])) == (number, 6)
    pasted = place.paste(result.body)
    assert [(one.text, one.out[-3000:]) for one in pasted if one.code] == []
    firsts = [one.text.split()[:2] for one in pasted]
    used = ["hf", "llama-server", "llama-cli", "printf", "from", "git"]
    assert [words[0] for words in firsts] == used, "all that the comment shows was run"
    again = pasted[-1].out
    assert "Held-out loss fell by" in again, "the run was made again from its commit"


def test_run_again_pressed_twice_submits_once(place: Workplace) -> None:
    place.install()
    number = place.plan_only(place.open(files={TINY: place.experiment()}))
    before = place.github.world.commit("refs/heads/main")
    sha, ran = place.merge(number)
    passed(ran, "launch")
    for _ in range(2):
        passed(place.push(before, sha), "launch")
    assert len(place.hub.jobs) == 1
    assert len(place.comments(number, "run:")) == 1


def test_a_deleted_file_cancels_its_job(place: Workplace) -> None:
    place.install()
    place.merge(place.plan_only(place.open(files={TINY: place.experiment()})))
    (job,) = place.hub.jobs.values()
    number = place.open("delete", files={TINY: None})
    passed(place.preflight(number), "plan", "gate")
    passed(place.merge(number)[1], "launch")
    assert job.stage == "CANCELED"
    assert len(place.comments(number, "result:")) == 1


def test_an_edited_experiment_replaces_the_one_that_runs(place: Workplace) -> None:
    place.install()
    place.merge(place.plan_only(place.open(files={TINY: place.experiment()})))
    edited = place.experiment(**{"max_steps: 6": "max_steps: 7"})
    number = place.plan_only(place.open("edit", files={TINY: edited}))
    passed(place.merge(number)[1], "launch")
    first, second = place.hub.jobs.values()
    assert (first.stage, first.labels["run"] != second.labels["run"]) == ("CANCELED", True)
    assert "newer version" in place.comments(number, "result:")[0].body


def test_two_experiments_in_one_pull_request(place: Workplace) -> None:
    place.install()
    files = {TINY: place.experiment(), "experiments/other.yaml": place.experiment("other")}
    number = place.plan_only(place.open(files=files))
    assert len(place.comments(number, "plan:")) == 2
    sha, ran = place.merge(number)
    passed(ran, "launch")
    assert {job.labels["experiment"] for job in place.hub.jobs.values()} == {"tiny", "other"}
    assert place.github.statuses(sha).keys() == {"train/tiny", "train/other"}


def test_cancel_and_retry_by_a_writer_and_by_an_outsider(place: Workplace) -> None:
    place.install()
    number = place.plan_only(place.open(files={TINY: place.experiment()}))
    place.merge(number)
    asked, ran = place.say(number, "mallory", "/cancel tiny")
    passed(ran, "command")
    assert place.github.reactions(asked) == [("github-actions[bot]", "-1")]
    (job,) = place.hub.jobs.values()
    assert not job.over
    _, ran = place.say(number, "bob", "/cancel tiny")
    passed(ran, "command", "launch")
    assert job.stage == "CANCELED"
    assert "cancelled, 1 job stopped" in place.comments(number, "answer:")[-1].body
    assert len(place.comments(number, "result:")) == 1
    _, ran = place.say(number, "bob", "/retry tiny")
    passed(ran, "command", "launch")
    assert [j.labels["attempt"] for j in place.hub.jobs.values()] == ["1", "2"]
    _, ran = place.say(number, "bob", "no command")
    assert ran.jobs.get("command", "skipped") == "skipped"


def test_a_push_by_hand_is_not_launched(place: Workplace) -> None:
    place.install()
    before = place.github.world.commit("refs/heads/main")
    after = place.github.push("main", {TINY: place.experiment()}, "alice")
    ran = place.push(before, after)
    passed(ran, "launch")
    assert place.hub.jobs == {}
    assert place.github.statuses(after)["train/tiny"].description.startswith("blocked: needs review")
    number = place.open("touch", files={TINY: place.experiment() + "# reviewed\n"})
    place.plan_only(number)
    passed(place.merge(number)[1], "launch")
    assert len(place.hub.jobs) == 1


def test_a_forks_plan_is_shown_when_a_writer_asks(place: Workplace) -> None:
    place.install()
    number = place.open(by="mallory", fork=True, files={TINY: place.experiment()})
    _, ran = place.say(number, "bob", "/plan")
    passed(ran, "command")
    assert len(place.comments(number, "plan:tiny")) == 1
    passed(place.merge(number)[1], "launch")
    assert len(place.hub.jobs) == 1


def test_a_merge_queue_is_checked_and_not_spoken_to(place: Workplace) -> None:
    number = place.plan_only(place.open(files={TINY: place.experiment()}))
    said = len(place.github.comments(number))
    ran = place.queue(number)
    assert ran.jobs == {"plan": "success"}, ran.text[-4000:]
    assert len(place.github.comments(number)) == said
