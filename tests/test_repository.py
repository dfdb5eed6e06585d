"""The run book in real git: a bare repository as the remote, clones, races, outages and other people's tags."""

import os
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.book import BY_HAND, SINCE, Book, Closed, Verdict, finish_message, retry_message, since_message
from pipeline.repository import Pushed, Repository, RepositoryError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
AT = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
RUN = "coach-0a1b2c3d"
CONFIG = """\
[user]
    name = Ada
    email = ada@example.org
[init]
    defaultBranch = main
"""
# What a user may have set, and what must not matter.
TASTE = """\
[tag]
    gpgSign = true
[gpg]
    program = false
[push]
    followTags = true
    gpgSign = if-asked
[fetch]
    prune = true
    pruneTags = true
[log]
    showSignature = true
[status]
    showUntrackedFiles = all
"""


@pytest.fixture(autouse=True)
def _own_git_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gitconfig").write_text(CONFIG)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def git(at: Path, *arguments: str, stdin: str | bytes = b"") -> str:
    sent = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(["git", *arguments], cwd=at, input=sent, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace").strip()


def commit(at: Path, path: str, text: str) -> str:
    (at / path).parent.mkdir(parents=True, exist_ok=True)
    (at / path).write_text(text)
    git(at, "add", ".")
    git(at, "commit", "-qm", path)
    return git(at, "rev-parse", "HEAD")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A bare repository with three commits on main."""
    bare = tmp_path / "remote.git"
    git(tmp_path, "init", "-q", "--bare", str(bare))
    git(bare, "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", str(bare), "first")
    for number in range(3):
        commit(tmp_path / "first", f"experiments/{number}.yaml", "x")
    git(tmp_path / "first", "push", "-q", "origin", "HEAD:main")
    return bare


@pytest.fixture
def clone(tmp_path: Path, remote: Path) -> Path:
    return tmp_path / "first"


def clone_of(remote: Path, name: str, *arguments: str) -> Path:
    git(remote.parent, "clone", "-q", *arguments, f"file://{remote}", name)
    return remote.parent / name


def message(number: int = 1, text: str = "all well") -> str:
    return finish_message(Closed(RUN, number, Verdict.DONE, text, AT, 1.25, {"train": 1}, {"loss": 0.5}))


def finish(at: Path, name: str = f"run/{RUN}", text: str | None = None) -> Pushed:
    repository = Repository(at)
    return repository.push_tag(name, repository.head_commit(), text or message())


def hook(remote: Path, name: str, script: str) -> None:
    path = remote / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def state(at: Path) -> tuple[str, str, set[str]]:
    """Refs, configuration and files of a clone's git folder, but for objects."""
    files = {p.relative_to(at).as_posix() for p in (at / ".git").rglob("*") if "objects" not in p.parts}
    return git(at, "for-each-ref"), git(at, "config", "--local", "--list"), files


def test_an_empty_book(clone: Path) -> None:
    assert Repository(clone).read_book() == Book()


def test_finish_retry_and_marker_come_back_in_every_clone(remote: Path, clone: Path) -> None:
    head = git(clone, "rev-parse", "HEAD")
    assert finish(clone, SINCE, since_message(AT)) is Pushed.CREATED
    assert finish(clone) is Pushed.CREATED
    assert not Repository(clone).read_book().is_open(RUN)
    name = Repository(clone).read_book().next_retry(RUN)
    assert finish(clone, name, retry_message(name, "ada", AT)) is Pushed.CREATED
    for at in (clone, clone_of(remote, "deep"), clone_of(remote, "shallow", "--depth", "1", "--no-tags")):
        book = Repository(at).read_book()
        assert book.since == head
        assert book.is_open(RUN)
        assert book.next_tag(RUN) == f"run/{RUN}.2"
        (one,) = book.closed
        assert (one.text, one.usd, one.attempts, one.summary, one.at) == (
            "all well",
            1.25,
            {"train": 1},
            {"loss": 0.5},
            AT,
        )


def test_the_tag_is_ours_and_unsigned_whatever_the_user_likes(tmp_path: Path, remote: Path, clone: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-push", "reference-transaction", "post-checkout"):
        (hooks / name).write_text("#!/bin/sh\necho hooked >&2; exit 1\n")
        (hooks / name).chmod(0o755)
    git(clone, "tag", "-am", "mine", "private")
    git(clone, "config", "core.hooksPath", str(hooks))
    (tmp_path / "gitconfig").write_text(TASTE)  # and no user.name at all
    head = git(clone, "rev-parse", "HEAD")
    assert finish(clone) is Pushed.CREATED
    raw = git(remote, "cat-file", "tag", f"run/{RUN}")
    assert raw.startswith(f"object {head}\ntype commit\ntag run/{RUN}\ntagger mergetune[bot] <")
    assert "PGP" not in raw
    assert git(remote, "tag") == f"run/{RUN}"
    assert len(Repository(clone).read_book().closed) == 1


def test_neither_reading_nor_pushing_touches_the_users_refs(remote: Path, clone: Path) -> None:
    finish(clone)
    for at in (clone, clone_of(remote, "shallow", "--depth", "1", "--no-tags")):
        before = state(at)
        assert len(Repository(at).read_book().closed) >= 1
        assert finish(at, f"run/{at.name}-00000000") is Pushed.CREATED
        assert state(at) == before


def test_local_tags_never_count(remote: Path, clone: Path) -> None:
    finish(clone, f"run/{RUN}.2", message(2))
    stale = clone_of(remote, "stale")
    git(remote, "update-ref", "-d", f"refs/tags/run/{RUN}.2")
    git(stale, "tag", "-am", message(), f"run/{RUN}")
    git(stale, "tag", "-am", retry_message(f"retry/{RUN}.1", "eve", AT), f"retry/{RUN}.1")
    assert Repository(stale).read_book() == Book()
    finish(clone)
    assert not Repository(stale).read_book().is_open(RUN)


def test_a_second_push_of_a_name_changes_nothing(remote: Path, clone: Path) -> None:
    assert finish(clone) is Pushed.CREATED
    before = git(remote, "for-each-ref")
    assert finish(clone) is Pushed.EXISTS
    assert finish(clone, text=message(text="another story")) is Pushed.EXISTS
    assert git(remote, "for-each-ref") == before


@pytest.mark.parametrize("pushers", [2, 6])
def test_of_racing_pushers_exactly_one_creates_the_tag(remote: Path, clone: Path, pushers: int) -> None:
    # All have asked and found nothing before the first may write.
    hook(remote, "pre-receive", f'echo x >>"{remote}/waiting"; for i in 1 2 3 4 5 6 7 8 9 10; do '
         f'[ $(wc -l <"{remote}/waiting") -ge {pushers} ] && exit 0; sleep 0.2; done')  # fmt: skip
    clones = [clone, *(clone_of(remote, f"clone{number}", "--depth", "1") for number in range(1, pushers))]
    with ThreadPoolExecutor(pushers) as pool:
        answers = list(pool.map(finish, clones))
    assert (remote / "waiting").read_text() == "x\n" * pushers
    assert sorted(answers) == [Pushed.CREATED] + [Pushed.EXISTS] * (pushers - 1)
    assert len(Repository(clone).read_book().closed) == 1


def test_a_shallow_clone_behind_main_can_still_tag(remote: Path, clone: Path) -> None:
    shallow = clone_of(remote, "shallow", "--depth", "1")
    commit(clone, "later", "x")
    git(clone, "push", "-q", "origin", "HEAD:main")
    assert finish(shallow) is Pushed.CREATED
    assert not (remote / "shallow").exists()
    git(remote, "fsck", "--strict")


def test_a_push_whose_answer_was_lost_is_looked_up(remote: Path, clone: Path) -> None:
    hook(remote, "post-receive", "kill -9 $PPID")
    assert finish(clone) is Pushed.CREATED
    (remote / "hooks/post-receive").unlink()
    hook(remote, "pre-receive", "kill -9 $PPID")
    with pytest.raises(RepositoryError, match=f"tag `run/{RUN}.2` was not pushed"):
        finish(clone, f"run/{RUN}.2", message(2))
    assert [one.round for one in Repository(clone).read_book().closed] == [1]


def test_a_refusing_hook_is_told_in_its_own_words(remote: Path, clone: Path) -> None:
    hook(remote, "pre-receive", "echo 'tags are closed until monday' >&2; exit 1")
    with pytest.raises(RepositoryError) as error:
        finish(clone)
    assert error.value.message == (
        f"tag `run/{RUN}` was not pushed: `git push`: remote: tags are closed until monday; "
        "[remote rejected] (pre-receive hook declined)"
    )
    assert Repository(clone).read_book() == Book()


def test_a_remote_that_is_gone_is_an_error_and_never_an_empty_book(remote: Path, clone: Path) -> None:
    finish(clone)
    remote.rename(remote.with_name("gone.git"))
    repository = Repository(clone)
    with pytest.raises(RepositoryError, match=r"does not appear to be a git repository") as error:
        repository.read_book()
    assert error.value.hint
    for ask in (lambda: finish(clone), lambda: repository.is_clean_main("main")):
        with pytest.raises(RepositoryError):
            ask()


def test_no_git_no_clone_no_remote(tmp_path: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (Repository(tmp_path), Repository(tmp_path / "nowhere"), Repository(clone, "upstream")):
        with pytest.raises(RepositoryError):
            wrong.read_book()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RepositoryError, match="git cannot run"):
        Repository(clone).read_book()


def test_a_remote_that_hangs_is_left_with_all_its_helpers(tmp_path: Path, clone: Path) -> None:
    ssh(clone, f'echo $$ >"{tmp_path}/pid"; sleep 60')
    began = time.monotonic()
    with pytest.raises(RepositoryError, match=r"gave no answer within 0\.5 s"):
        Repository(clone, timeout_s=0.5).read_book()
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until the killed shell is reaped
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.05)


def ssh(clone: Path, script: str) -> None:
    """From now on the clone reaches its remote through this script, in place of ssh."""
    path = clone.parent / "ssh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    git(clone, "config", "core.sshCommand", str(path))
    git(clone, "config", "ssh.variant", "ssh")
    git(clone, "remote", "set-url", "origin", "ssh://localhost/x")


def test_a_listed_tag_that_is_not_sent_is_an_error(tmp_path: Path, remote: Path, clone: Path) -> None:
    """A replica that lags: the listing comes from one server, the objects from another."""
    git(tmp_path, "clone", "-q", "--bare", str(remote), "lagging.git")
    finish(clone)
    again = tmp_path / "again"
    lagging = tmp_path / "lagging.git"
    ssh(clone, f'test -e "{again}" && exec git-upload-pack "{lagging}"; >"{again}"; exec git-upload-pack "{remote}"')
    with pytest.raises(RepositoryError, match="git fetch"):
        Repository(clone).read_book()
    again.unlink()
    git(clone, "config", "core.sshCommand", "false")
    with pytest.raises(RepositoryError, match="git ls-remote"):
        Repository(clone).read_book()


def test_a_tag_whose_object_the_server_lost_still_closes(remote: Path, clone: Path) -> None:
    finish(clone)
    oid = git(remote, "rev-parse", f"refs/tags/run/{RUN}")
    (remote / "objects" / oid[:2] / oid[2:]).unlink()
    assert not Repository(clone).read_book().is_open(RUN)


def test_a_listing_that_breaks_off_is_an_error(remote: Path, clone: Path) -> None:
    finish(clone)
    git(clone, "config", "protocol.version", "0")
    # A transport that loses the end of the server's answer.
    ssh(clone, f'git-upload-pack "{remote}" | {{ head -c 700; kill -9 $$; }}')
    for number in range(20):
        git(remote, "tag", f"run/other-{number:08}", "main")
    with pytest.raises(RepositoryError, match="git ls-remote`: fatal: "):
        Repository(clone).read_book()


def test_credentials_never_show(clone: Path) -> None:
    secret = "ghs_" + "a1B2" * 9
    for url in (f"https://x-access-token:{secret}@127.0.0.1:1/a/b", "https://me:pass@w@rd@127.0.0.1:1/a/b"):
        git(clone, "remote", "set-url", "origin", url)
        for ask in (Repository(clone).read_book, lambda: finish(clone)):
            with pytest.raises(RepositoryError) as error:
                ask()
            text = f"{error.value} {error.value.as_text()} {error.value.message} {error.value.hint}"
            assert "127.0.0.1" in text
            assert not any(part in text for part in (secret, "pass", "w@rd", "x-access-token"))


def test_the_clones_own_way_to_the_remote_is_used(tmp_path: Path, remote: Path, clone: Path) -> None:
    """Settings of the clone alone, also those that an `includeIf` on its folder brings (actions/checkout does so)."""
    finish(clone)
    (tmp_path / "secret").write_text(f'[url "file://{remote}"]\n    insteadOf = https://example.invalid/x\n')
    git(clone, "remote", "set-url", "origin", "https://example.invalid/x")
    git(clone, "config", f"includeIf.gitdir:{clone}/.git.path", str(tmp_path / "secret"))
    assert len(Repository(clone).read_book().closed) == 1
    assert finish(clone) is Pushed.EXISTS


def test_the_callers_git_environment_does_not_point_elsewhere(
    tmp_path: Path, remote: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(clone)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_SHALLOW_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_TRACE", "1")
    assert len(Repository(clone).read_book().closed) == 1
    assert Repository(clone).is_clean_main("main")


def test_other_peoples_tags_close_and_never_break_the_book(remote: Path, clone: Path) -> None:
    blob = git(clone, "hash-object", "-w", "--stdin", stdin="a file")
    git(clone, "tag", "run/light-00000000")
    git(clone, "tag", "-am", "by hand", "run/note-00000000")
    git(clone, "tag", "-aF", "-", "run/huge-00000000", stdin="x" * 300_000)
    git(clone, "tag", "-am", "a blob", "run/blob-00000000", blob)
    git(clone, "tag", "run/lightblob-00000000", blob)
    git(clone, "tag", "-am", "nested", "run/nested-00000000", "run/note-00000000")
    git(clone, "tag", "-am", "x", "run/deep/er/bidi-\u202e-\u2028-`$(id)`")
    git(clone, "tag", "retry/light-00000000.1")
    git(clone, "tag", "v1.0")
    git(clone, "push", "-q", "origin", "--tags")
    head = git(clone, "rev-parse", "HEAD")
    raw = f"object {head}\ntype commit\ntag run/raw-00000000\ntagger e <e> 1 +0000\n\n".encode() + b"a\0b\xff\n\n{\xff"
    oid = git(remote, "hash-object", "-t", "tag", "-w", "--stdin", stdin=raw)
    git(remote, "update-ref", "refs/tags/run/raw-00000000", oid)
    git(remote, "update-ref", "refs/heads/refs/tags/run/branch-00000000", head)
    finish(clone)
    git(remote, "update-ref", "refs/tags/run/copy-00000000", f"refs/tags/run/{RUN}")
    book = Repository(clone).read_book()
    names = ("light", "note", "huge", "blob", "lightblob", "nested", "raw", "copy")
    for name in names:
        assert not book.is_open(f"{name}-00000000"), name
    assert len(book.closed) == len(names) + 2
    assert {one.text for one in book.closed if one.run_id != RUN} == {BY_HAND}
    assert book.is_open("branch-00000000")
    assert book.usd_in_month(2026, 11) == 1.25


@pytest.mark.parametrize("name", ["v1", "run/", "run/../x", "run/X", "run/a b", "-f", "retry/x.lock", "heads/main", ""])
def test_only_tags_of_the_book_are_pushed(clone: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a tag of the run book"):
        finish(clone, name)
    with pytest.raises(ValueError, match="not a tag of the run book"):
        Repository(clone).push_tag(f"run/{RUN}", "HEAD", "x")


def test_a_commit_that_is_not_here_cannot_be_tagged(clone: Path) -> None:
    with pytest.raises(RepositoryError, match="git mktag"):
        Repository(clone).push_tag(f"run/{RUN}", "0" * 39 + "1", message())


def test_a_path_was_introduced_by_what_main_took(remote: Path, clone: Path) -> None:
    """A merge commit, a squash and a rebase: always the commit on main, never one of the branch."""
    git(clone, "checkout", "-qb", "one")
    commit(clone, "experiments/merged.yaml", "1")
    inner = commit(clone, "experiments/merged.yaml", "2")
    git(clone, "checkout", "-q", "main")
    git(clone, "merge", "-q", "--no-ff", "-m", "merge one", "one")
    merge = git(clone, "rev-parse", "HEAD")
    squash = commit(clone, "experiments/squashed.yaml", "1")
    first, last = (commit(clone, "experiments/rebased.yaml", text) for text in "12")
    commit(clone, "experiments/*.yaml", "glob")
    repository = Repository(clone)
    assert repository.introduced_by("experiments/merged.yaml") == merge != inner
    assert repository.introduced_by("experiments/squashed.yaml") == squash
    assert repository.introduced_by("experiments/rebased.yaml") == last != first
    assert repository.introduced_by("experiments/*.yaml") == git(clone, "rev-parse", "HEAD")
    assert repository.introduced_by("experiments/never.yaml") is None
    assert repository.introduced_by("experiments/0.yaml") == git(clone, "rev-list", "--max-parents=0", "HEAD")


def test_a_shallow_clone_knows_only_what_it_holds(remote: Path, clone: Path) -> None:
    shallow = clone_of(remote, "shallow", "--depth", "1")
    assert Repository(shallow).introduced_by("experiments/0.yaml") is None
    assert Repository(shallow).introduced_by("experiments/2.yaml") is None  # also this: it cannot be told apart
    assert Repository(shallow).head_commit() == git(clone, "rev-parse", "HEAD")
    two = Repository(clone_of(remote, "two", "--depth", "2"))
    assert two.introduced_by("experiments/2.yaml") == two.head_commit()
    assert two.introduced_by("experiments/0.yaml") is None


def test_main_is_clean_when_head_is_the_remotes_and_nothing_is_changed(remote: Path, clone: Path) -> None:
    other = Repository(clone_of(remote, "other"))
    assert other.is_clean_main("main")
    assert not other.is_clean_main("trunk")
    (other.root / "untracked").write_text("x")
    assert other.is_clean_main("main")
    (other.root / "experiments/0.yaml").write_text("edited")
    assert not other.is_clean_main("main")
    git(other.root, "checkout", "-q", ".")
    commit(clone, "later", "x")
    git(clone, "push", "-q", "origin", "HEAD:main")
    assert not other.is_clean_main("main")


def fill(remote: Path, count: int) -> None:
    """`count` commits on main, each with its finish tag."""
    lines: list[str] = []
    for number in range(1, count + 1):
        run_id = f"run-{number}-0a1b2c3d"
        text = finish_message(Closed(run_id, 1, Verdict.DONE, "x", AT, 1.0, {"train": 1}, {"curve": [0.123456] * 60}))
        lines.append(f"commit refs/heads/main\nmark :{number}\ncommitter a <a@b> {number} +0000\ndata 1\nx\n")
        lines.append("from refs/heads/main^0\n" if number == 1 else "")
        lines.append(f"M 644 inline experiments/{number}.yaml\ndata 200\n{number:0200}\n")
        lines.append(f"tag run/{run_id}\nfrom :{number}\ntagger a <a@b> 1 +0000\ndata {len(text)}\n{text}\n")
    git(remote, "fast-import", "--quiet", stdin="".join(lines))


@pytest.mark.parametrize("filters", ["true", "false"])
def test_a_thousand_tags_are_read_in_seconds(remote: Path, filters: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(remote, 1000)
    git(remote, "config", "uploadpack.allowFilter", filters)
    shallow = clone_of(remote, "shallow", "--depth", "1", "--no-tags")
    script = textwrap.dedent("""\
        import sys, time
        from pathlib import Path
        from pipeline.repository import Repository
        def peak():  # not ru_maxrss: that begins with what the parent process used
            status = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
        before, began = peak(), time.monotonic()
        book = Repository(Path(sys.argv[1])).read_book()
        took, after = time.monotonic() - began, peak()
        print(len(book.closed), took, after, after - before)
        """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(shallow)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    count, took, peak, grown = map(float, answer.stdout.split())
    with capsys.disabled():
        print(f"\n1,000 tags, filter {filters}: {took:.2f} s, {peak:.0f} MB (+{grown:.0f})")
    assert count == 1000
    assert took < 20
    assert peak < 150


@pytest.mark.parametrize(
    ("url", "address", "label"),
    [
        ("https://x-access-token:ghs_secret@github.com/acme/tunes.git", "https://github.com/acme/tunes", "acme--tunes"),
        ("git@github.com:acme/my.tunes.git", "https://github.com/acme/my.tunes", "acme--my-tunes"),
        ("ssh://git@git.acme.org:2222/ml/tunes/", "https://git.acme.org/ml/tunes", "ml--tunes"),
        ("/srv/git/acme/tunes.git", "", "acme--tunes"),
    ],
)
def test_name_of_the_remote(clone: Path, url: str, address: str, label: str) -> None:
    git(clone, "remote", "set-url", "origin", url)
    assert (Repository(clone).web_address(), Repository(clone).label()) == (address, label)


def test_many_tags_in_one_push(clone: Path, remote: Path) -> None:
    repository = Repository(clone)
    finish(clone)
    messages = {f"run/old-{number:08x}": message() for number in range(450)}
    began = time.monotonic()
    repository.push_tags(repository.head_commit(), {f"run/{RUN}": message(text="another end"), **messages})
    assert time.monotonic() - began < 60
    assert len(repository.read_book().closed) == 451
    assert "another end" not in git(remote, "for-each-ref", f"refs/tags/run/{RUN}", "--format=%(contents)")
    remote.rename(remote.with_name("gone.git"))
    with pytest.raises(RepositoryError):
        repository.push_tags(repository.head_commit(), {"run/late-00000001": message()})
