"""Whatever would fail later is refused before anything is made or paid, and the message says what to do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_story import BASE, TOKEN, Story, story_told

pytestmark = pytest.mark.slow
OAUTH = "hf_oauth_" + "StoryStoryStoryStory"
OTHER = "hf_" + "OtherOtherOtherOtherOtherOtherOther"
SCOPES = ["repo.content.read", "repo.write", "job.write"]


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with story_told(tmp_path, stand_ins=True) as story:
        story.hub.execute_jobs = False
        story.merge()
        yield story


def changed(story: Story) -> list[str]:
    """Every request that made, wrote or paid something."""
    paths = ("/api/repos/", "/commit/", "/preupload/", "/api/jobs/acme", "/api/jobs/mallory", "/cancel")
    asked = [request for request in story.hub.requests if request.method != "GET" and "auth-check" not in request.path]
    return [f"{request.method} {request.path}" for request in asked if any(path in request.path for path in paths)]


def submits(story: Story, token: str = TOKEN) -> None:
    """The next tick launches it."""
    done = story.call("reconcile", token=token)
    assert (done.returncode, ": submitted: train" in done.stdout) == (0, True), done
    assert len(story.hub.jobs) == 1


def refuses(story: Story, token: str | None) -> str:
    """What the command says while it makes and pays nothing."""
    done = story.call("reconcile", token=token)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert changed(story) == []
    assert story.hub.jobs == {}
    assert story.book().closed == ()
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("$HF_TOKEN", "`HF_TOKEN` holds no personal token"),
        ("${{ secrets.HF_TOKEN }}", "`HF_TOKEN` holds no personal token"),
        (None, "`HF_TOKEN` holds no personal token"),
        ("hf_" + "Revoked" * 5, "the token"),
    ],
)
def test_what_is_no_token(story: Story, token: str | None, said: str) -> None:
    text = refuses(story, token)
    assert said in text
    assert "hint:" in text
    submits(story)


def test_a_browser_logins_token(story: Story) -> None:
    story.hub.add_token(OAUTH, "alice", "oauth")
    text = refuses(story, OAUTH)
    assert "is an OAuth token" in text
    assert "hint: make a" in text
    submits(story)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"role": "read"}, ("the role `read`", "`repo.write` and `job.write`")),
        ({"role": "fineGrained", "scoped": {"acme": ["repo.content.read", "repo.write"]}}, ("job.write", "on `acme`")),
        ({"role": "fineGrained", "scoped": {"acme": ["repo.content.read", "job.write"]}}, ("repo.write", "`acme`")),
    ],
)
def test_a_token_with_too_few_rights(story: Story, given: dict[str, Any], said: tuple[str, str]) -> None:
    story.hub.add_token(OTHER, "alice", **given)
    text = refuses(story, OTHER)
    assert all(words in text for words in said), text
    assert "hint:" in text
    story.hub.add_token(OTHER, "alice", "fineGrained", {"acme": SCOPES}, can_read_gated=True)
    submits(story, OTHER)


def test_a_gated_base_without_access(story: Story) -> None:
    files = {path.name: path.read_bytes() for path in BASE.iterdir() if path.is_file()}
    story.hub.delete_repo("acme/tiny-base")
    story.hub.add_user("google")
    revision = story.hub.add_repo("google/tiny-base", files, gated=True)
    text = (story.clone / "experiments/tiny.yaml").read_text()
    story.merge(text=text.replace("acme/tiny-base", "google/tiny-base").replace(story.base_revision, revision))
    said = refuses(story, TOKEN)
    assert "`google/tiny-base` is gated" in said
    assert "google/tiny-base" in said.partition("hint:")[2]
    story.hub.grant_gated("alice", "google/tiny-base")
    submits(story)


def taken(story: Story) -> None:
    story.hub.add_repo("acme/tiny-adapter", {"model.safetensors": b"somebody's work"})


def private(story: Story) -> None:
    """An organisation whose members may only read."""
    story.hub.add_user("alice", orgs={"acme": "read"})


@pytest.mark.parametrize(("spoil", "said"), [(taken, "acme/tiny-adapter"), (private, "acme")])
def test_an_output_that_is_not_ours(story: Story, spoil: Callable[[Story], None], said: str) -> None:
    spoil(story)
    text = refuses(story, TOKEN)
    assert said in text
    assert "hint:" in text
    story.hub.add_user("alice", orgs={"acme": "admin"})
    if ("model", "acme/tiny-adapter") in story.hub.world.repos.by_key:
        story.hub.delete_repo("acme/tiny-adapter")
    submits(story)


def test_an_output_in_a_namespace_that_is_not_ours(story: Story) -> None:
    story.hub.add_user("mallory")
    text = (story.clone / "experiments/tiny.yaml").read_text()
    (story.clone / "pyproject.toml").write_text("[tool.mergetune]\n")
    story.merge(text=text.replace("repo: acme/tiny", "repo: mallory/tiny"))
    said = refuses(story, TOKEN)
    assert "mallory" in said
    assert "hint:" in said
    story.merge(text=text)
    submits(story)


def test_no_credit_is_known_at_the_post_and_pays_nothing(story: Story) -> None:
    story.hub.set_credit("acme", False)
    done = story.call("reconcile")
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "`acme` has no credit for jobs" in text
    assert "hint: add credit" in text
    assert story.hub.jobs == {}
    assert story.book().closed == ()
    story.hub.set_credit("acme", True)
    submits(story)
