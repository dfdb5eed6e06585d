"""`mergetune board` as a person runs it: in a clone, beside a loopback Hub, with and without what it asks."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_cases import NOW
from hub_story import TOKEN, Story, here, story_told
from servers.hub_faults import Action, drop, status

from pipeline.board import SILENT, State
from pipeline.board_request import request_board

pytestmark = pytest.mark.slow


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        story.merge()
        yield story


def document(story: Story, *arguments: str, **more: Any) -> dict[str, Any]:
    done = story.call("board", "--format", "json", *arguments, **more)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def run_to_the_end(story: Story) -> None:
    for _ in range(8):
        if not story.tick():
            return
        story.hub.wait_jobs(60)
    raise AssertionError("it did not end")


def test_before_while_and_after_a_run(story: Story) -> None:
    (row,) = document(story)["runs"]
    assert (row["state"], row["experiment"], row["usd"]) == ("waiting", "tiny", None)
    assert row["text"].startswith("would submit train")
    assert row["hypothesis"] == "the whole chain runs on loopback"
    assert row["worst_usd"] > 0
    said = {"event": "step", "step": 2, "total": 3, "loss": 2.0}
    story.hub.job_environment |= {"WORK_S": "60", "SAY": json.dumps([said])}
    story.tick()
    (job,) = story.hub.jobs.values()
    deadline = time.monotonic() + 30
    while '"total": 3' not in job.log:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    story.clock.sleep(600)
    made = document(story)
    (row,) = made["runs"]
    assert (row["state"], made["totals"]["states"]) == ("live", {"live": 1})
    assert row["text"].startswith("train: train · step 2/3 · loss 2.000")
    assert row["curve"]["train"] == [[1, 2.5], [2, 2.0]]
    assert [link["text"] for link in row["links"]] == ["job"]
    assert 0.005 <= row["usd"] <= 0.006  # ten minutes and a little, at $0.03 an hour
    assert row["at"] is not None
    for name in ("WORK_S", "SAY"):
        story.hub.job_environment.pop(name)
    assert story.call("cancel", "tiny").returncode == 0
    assert story.call("retry", "tiny").returncode == 0
    run_to_the_end(story)
    (row,) = document(story)["runs"]
    assert (row["state"], [one["state"] for one in row["earlier"]]) == ("done", ["cancelled"])
    assert {link["text"] for link in row["links"]} >= {"train", "merge", "gguf"}
    assert all(link["url"].startswith(story.hub.url) for link in row["links"])
    assert document(story)["notes"] == []


def test_looking_changes_nothing_on_the_hub(story: Story) -> None:
    before = len(story.hub.requests)
    document(story)
    asked = story.hub.requests[before:]
    assert asked
    assert [one for one in asked if one.method != "GET" and "auth-check" not in one.path] == []


def test_the_page_is_written_where_it_was_asked_for(story: Story, tmp_path: Path) -> None:
    done = story.call("board")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{story.clone / 'site/index.html'}\n"
    assert "the whole chain runs on loopback" in (story.clone / "site/index.html").read_text()
    assert story.call("board", "--out", str(tmp_path / "a/b.html")).stdout == f"{tmp_path / 'a/b.html'}\n"
    assert story.call("board", "--out", str(tmp_path / "folder")).stdout == f"{tmp_path / 'folder/index.html'}\n"
    assert (tmp_path / "folder/index.html").is_file()
    (tmp_path / "file").write_text("x")
    done = story.call("board", "--out", str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: `.*file/index.html` cannot be written: .*\n\nhint: .*`--out`\n", done.stderr)
    done = story.call("board", "--out", "x", "--format", "json")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "token", "reason"),
    [
        (("--offline",), TOKEN, "`--offline` was given"),
        ((), None, "there is no HF_TOKEN to ask with"),
        ((), "hf_xxx", "`HF_TOKEN` holds no personal token"),
    ],
)
def test_who_does_not_ask_does_not_know(story: Story, arguments: tuple[str, ...], token: str, reason: str) -> None:
    made = document(story, *arguments, token=token)
    assert [row["state"] for row in made["runs"]] == ["unknown"]
    (note,) = made["notes"]
    assert note.startswith(f"What open runs do now is not known: {reason}")
    assert story.hub.requests == []


@pytest.mark.parametrize("fault", [drop(), status(503)], ids=["silent", "503"])
def test_an_outage_is_unknown_and_said(story: Story, monkeypatch: pytest.MonkeyPatch, fault: Action) -> None:
    story.hub.faults.add(method="GET", path="/api/jobs/acme", action=fault, times=100)
    with here(story, monkeypatch):  # in this process, under a clock that nobody waits for
        made = request_board(story.clone, "main", os.environ, NOW, offline=False)
    assert [(row.state, row.text) for row in made.rows] == [(State.UNKNOWN, SILENT)]
    assert made.notes[0].startswith("What open runs do now is not known: the Hub did not say (")


def test_a_refusal_is_an_answer(story: Story) -> None:
    story.hub.faults.add(method="GET", path="/api/jobs/acme", action=status(403, "no"), times=100)
    made = document(story)
    assert [(row["state"], row["text"][:15]) for row in made["runs"]] == [("blocked", "the Hub refused")]
    assert made["notes"] == []


def test_a_checkout_that_is_not_main_says_so_and_still_shows_what_ended(story: Story) -> None:
    run_to_the_end(story)
    (story.clone / "experiments/draft.yaml").write_text("name: [\n")
    story.git("add", "-A")
    story.git("commit", "-qm", "Not pushed")
    made = document(story)
    assert [row["state"] for row in made["runs"]] == ["done"]
    assert "not the head of `main`" in made["notes"][0]
    assert made["notes"][1:] == [
        "Open runs are those of this checkout, which is not the head of `main`.",
        "The experiment `draft` cannot be read: its open run is not shown.",
    ]


def test_without_the_tags_there_is_no_board(story: Story) -> None:
    story.git("remote", "set-url", "origin", str(story.root / "nowhere.git"))
    done = story.call("board", "--offline")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: `git ls-remote`")
    assert not (story.clone / "site").exists()
