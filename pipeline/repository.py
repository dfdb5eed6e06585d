"""Git: the run book of the remote and what git says of this checkout. The only module that runs git; decides nothing.

Local tags never count and the user's refs are never touched: the book is fetched into a bare repository of its own that
lives as long as the call, and a tag is pushed as an object without a local name.
"""

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.book import SINCE, Book, Tag, make_book
from pipeline.errors import UserError, redact

TAGGER = "mergetune[bot] <mergetune@noreply.invalid>"  # .invalid (RFC 2606): nobody's account
TAGS = "refs/tags/"
PATTERNS = ("refs/tags/run/*", "refs/tags/retry/*", "refs/tags/mergetune/*")
TAGS_A_PUSH = 200  # as many names as a command line surely holds
QUIET_PUSH = ("--porcelain", "--no-verify", "--no-follow-tags", "--signed=no", "--recurse-submodules=no")
READ_BYTES = 65_536  # a larger tag object is not ours and is not read
TAG_NAME = re.compile(rf"(?:run|retry)/[a-z0-9][a-z0-9-]*(?:\.[0-9]+)?|{SINCE}")
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
# No hook of the user's and no background work; nothing here may depend on the user's taste.
GIT = ("git", "-c", f"core.hooksPath={os.devnull}", "-c", "gc.auto=0", "-c", "maintenance.auto=false")
# What a caller's own git (a hook, a rebase) leaves in the environment and would point us elsewhere, or at a trace.
INHERITED = re.compile(
    r"GIT_(DIR|WORK_TREE|INDEX_FILE|COMMON_DIR|NAMESPACE|PREFIX|SHALLOW_FILE|GRAFT_FILE|QUARANTINE_PATH"
    r"|(ALTERNATE_)?OBJECT_DIRECTOR(Y|IES)|REPLACE_REF_BASE|TRACE.*|CURL_VERBOSE)"
)
SETTINGS = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0"}
# How the clone reaches its remote; with the clone's credentials, but without its refspecs.
REACH = re.compile(
    r"(http|credential|url|protocol|ssh)\..+|core\.(sshcommand|askpass|gitproxy)"
    r"|remote\..+\.(url|proxy|proxyauthmethod|uploadpack)"
)
# https://[user[:token]@]host/owner/name[.git], ssh://git@host[:port]/owner/name, git@host:owner/name
NETWORK = re.compile(
    r"(?:https?://(?:[^@/]*@)?|ssh://(?:[^@/]*@)?|[^@/:]+@)([\w.-]+)(?::\d+(?=/))?[:/](.+?)(?:\.git)?/?"
)
CREDENTIALS = re.compile(r"(?<=://)[^\s'\"]*@")
# Lines of git's that tell nothing about the cause.
NOISE: tuple[str, ...] = ("hint:", "To ", "Please make sure", "and the repository exists")
NOISE += ("error: failed to push some refs", "fatal: Could not read from remote repository")


class Pushed(StrEnum):
    """Who made a tag: this call, or somebody before it."""

    CREATED = "created"
    EXISTS = "exists"


class RepositoryError(UserError):
    """Git could not say or do it. Never to be taken for an empty answer."""


@dataclass(frozen=True)
class Repository:
    """A clone at `root` and its remote; no call of git may take longer than `timeout_s`."""

    root: Path
    remote: str = "origin"
    timeout_s: float = 60

    def head_commit(self) -> str:
        """The commit that is checked out."""
        return self._git("rev-parse", "--verify", "HEAD^{commit}").strip()

    def web_address(self) -> str:
        """The remote's page for people, without credentials; empty for a remote that is a folder."""
        found = NETWORK.fullmatch(self._url())
        return f"https://{found[1]}/{found[2]}" if found else ""

    def label(self) -> str:
        """`owner--name` of the remote, as a job's label may hold it: what tells this repository's jobs from others'."""
        path = NETWORK.sub(r"\2", self._url()).removesuffix("/").removesuffix(".git")
        return re.sub(r"[^A-Za-z0-9_-]", "-", "--".join(path.split("/")[-2:]))[-100:]

    def _url(self) -> str:
        return self._git("remote", "get-url", self.remote).strip()

    def introduced_by(self, path: str) -> str | None:
        """The last commit of HEAD's first-parent line that touched a path: the merge, squash or rebase of its PR.

        None when this clone does not know: the path was never committed, or the history is cut off before it.
        """
        answer = self._git("log", "-1", "--first-parent", "--format=%H %P", "HEAD", "--", f":(top,literal){path}")
        if not answer.strip():
            return None
        commit, *parents = answer.split()
        if not parents and "\nparent " in self._git("cat-file", "commit", commit).partition("\n\n")[0]:
            return None  # where a shallow clone is cut every file looks new
        return commit

    def is_clean_main(self, branch: str) -> bool:
        """Whether HEAD is the remote's branch as it is now, and no tracked file is changed."""
        ref = f"refs/heads/{branch}"
        if self._listing("--heads", ref).get(ref) != self.head_commit():
            return False
        return not self._git("status", "--porcelain", "--untracked-files=no")

    def read_book(self) -> Book:
        """The book as the remote holds it now.

        Raises:
            RepositoryError: the remote cannot be reached, or its answer is not whole.
        """
        listing = self._listing("--tags", *PATTERNS)
        listing = {ref: commit for ref, commit in listing.items() if ref.startswith(tuple(p[:-1] for p in PATTERNS))}
        names = [ref for ref in listing if not ref.endswith("^{}")]
        annotated = {ref: listing[ref] for ref in names if f"{ref}^{{}}" in listing}
        messages = self._messages(set(annotated.values()))
        return make_book(
            Tag(ref.removeprefix(TAGS), listing.get(f"{ref}^{{}}", listing[ref]), messages.get(annotated.get(ref, "")))
            for ref in names
        )

    def push_tag(self, name: str, commit: str, message: str) -> Pushed:
        """Put an annotated tag on a commit at the remote, unless there is one of that name: one caller creates it.

        Raises:
            RepositoryError: refused, or out of reach. A push whose answer was lost is looked up before this is said.
        """
        tag = self._make_tag(name, commit, message)
        try:
            self._git("push", *QUIET_PUSH, self.remote, f"{tag}:{TAGS}{name}")
        except RepositoryError as error:
            found = self._listing("--tags", TAGS + name).get(TAGS + name)
            if found is None:
                raise RepositoryError(f"tag `{name}` was not pushed: {error.message}", error.hint) from error
            return Pushed.CREATED if found == tag else Pushed.EXISTS
        return Pushed.CREATED

    def push_tags(self, commit: str, messages: Mapping[str, str]) -> None:
        """Put annotated tags on a commit, many in one push; those whose names are taken stay as they are.

        Raises:
            RepositoryError: some could not be made; calling again makes the rest.
        """
        names = list(messages)
        for first in range(0, len(names), TAGS_A_PUSH):
            some = {name: self._make_tag(name, commit, messages[name]) for name in names[first : first + TAGS_A_PUSH]}
            try:
                self._git("push", *QUIET_PUSH, self.remote, *(f"{tag}:{TAGS}{name}" for name, tag in some.items()))
            except RepositoryError as error:
                missing = {TAGS + name for name in some} - self._listing("--tags", *PATTERNS).keys()
                if missing:
                    message = f"{len(missing)} of {len(names)} tags were not pushed: {error.message}"
                    raise RepositoryError(message, error.hint) from error

    def _make_tag(self, name: str, commit: str, message: str) -> str:
        """The id of a new tag object in this clone, under no name of it."""
        if not TAG_NAME.fullmatch(name) or not COMMIT.fullmatch(commit):
            raise ValueError(f"not a tag of the run book on a commit: {name!r}, {commit!r}")
        # Two pushers of one second must not make one and the same object: each would find "its" tag at the remote.
        text = f"{message.rstrip()}\n\nPush: {secrets.token_hex(8)}\n"
        head = f"object {commit}\ntype commit\ntag {name}\ntagger {TAGGER} {int(time.time())} +0000\n\n"
        return self._git("mktag", stdin=(head + text).encode()).strip()

    def _listing(self, kind: str, *patterns: str) -> dict[str, str]:
        """Object ids by ref name, straight from the remote; `ref^{}` is what an annotated tag points at."""
        # Not splitlines: a ref's name may hold what Unicode calls a line end.
        lines = self._git("ls-remote", kind, self.remote, *patterns).split("\n")
        return {ref: oid for oid, _, ref in (line.partition("\t") for line in lines if line)}

    def _messages(self, wanted: set[str]) -> dict[str, str]:
        """The messages of these tag objects; one that is too large to be ours is left out.

        Fetched without history, trees or files, into a place where neither the clone's tags nor its depth count.
        """
        if not wanted:
            return {}
        oids = "".join(f"{oid}\n" for oid in sorted(wanted)).encode()
        with TemporaryDirectory(prefix="mergetune-") as store:
            self._git("init", "--bare", "--quiet", "--template=", store)
            reach = {"GIT_DIR": store, **self._reach()}
            only = ("--depth=1", "--filter=tree:0", "--no-tags", "--no-write-fetch-head", "--quiet")
            self._git("fetch", *only, "--stdin", self.remote, stdin=oids, more=reach)
            # Offline from here: what is missing must be seen to be missing, not be fetched one by one.
            here = {"GIT_DIR": store, "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
            sizes = [
                line.split() for line in self._git("cat-file", "--batch-check", stdin=oids, more=here).splitlines()
            ]
            held = {oid: int(size) for oid, kind, size in (s for s in sizes if len(s) == 3) if kind == "tag"}
            if missing := wanted - set(held):
                message = f"the remote listed {len(wanted)} tags and sent {len(wanted) - len(missing)}"
                raise RepositoryError(message, "nothing was decided; the next tick reads them again")
            small = "".join(f"{oid}\n" for oid in held if held[oid] <= READ_BYTES).encode()
            return _messages_in(self._run("cat-file", "--batch", stdin=small, more=here))

    def _reach(self) -> dict[str, str]:
        """The clone's own settings for reaching its remote, as environment for a git that works elsewhere."""
        entries = self._git("config", "--list", "-z", "--show-scope", "--includes").split("\0")
        own = zip(entries[0::2], entries[1::2], strict=False)  # the list ends with a NUL
        keys = [entry.partition("\n") for scope, entry in own if scope in ("local", "worktree")]
        kept = [(key, value if line else "true") for key, line, value in keys if REACH.fullmatch(key)]
        first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
        reach = {"GIT_CONFIG_COUNT": str(first + len(kept))}
        for number, (key, value) in enumerate(kept, first):
            reach |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        return reach

    def _git(self, *arguments: str, stdin: bytes = b"", more: Mapping[str, str] | None = None) -> str:
        return self._run(*arguments, stdin=stdin, more=more).decode(errors="replace")

    def _run(self, *arguments: str, stdin: bytes = b"", more: Mapping[str, str] | None = None) -> bytes:
        """What git answers; RepositoryError when it fails, hangs or is not there."""
        kept = {key: value for key, value in os.environ.items() if not INHERITED.fullmatch(key)}
        try:
            # A session of its own: no terminal to ask at, and its helpers can be ended with it.
            process = subprocess.Popen(
                (*GIT, *arguments),
                cwd=self.root,
                env={**kept, **SETTINGS, **(more or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise RepositoryError(f"git cannot run in `{self.root}`: {error.strerror}", "install git 2.31+") from error
        try:
            out, err = process.communicate(stdin, timeout=self.timeout_s)
        except subprocess.TimeoutExpired as error:
            message = f"`git {arguments[0]}` gave no answer within {self.timeout_s:g} s"
            raise RepositoryError(
                message, f"is `{self.remote}` within reach?  `git ls-remote {self.remote}`"
            ) from error
        finally:
            _end(process)
        if process.returncode:
            hint = f"the same by hand: `git {arguments[0]} …` in `{self.root}`; nothing was read or decided"
            raise RepositoryError(f"`git {arguments[0]}`: {_reason(out, err)}", hint)
        return out


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End git and the helpers it started, if they still run."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _messages_in(batch: bytes) -> dict[str, str]:
    """Tag messages by object id, from the answer of `git cat-file --batch`: a line `oid type size`, then the object."""
    found: dict[str, str] = {}
    start = 0
    while start < len(batch):
        end = batch.index(b"\n", start)
        oid, _, size = batch[start:end].decode().split()
        start = end + 1 + int(size) + 1
        found[oid] = batch[end + 1 : start - 1].partition(b"\n\n")[2].decode(errors="replace")
    return found


def _reason(out: bytes, err: bytes) -> str:
    """Git's own last words that say something, with a push's refusal; no credentials, no control characters."""
    lines = [_shown(line) for line in err.decode(errors="replace").split("\n")]
    said = [line for line in lines if line and not line.startswith(NOISE)]
    refused = [_shown(line.split("\t")[-1]) for line in out.decode(errors="replace").split("\n") if line[:1] == "!"]
    return "; ".join([*said[-1:], *refused[-1:]]) or "it failed without a word"


def _shown(line: str) -> str:
    plain = "".join(c if c.isprintable() else " " for c in line)
    return redact(CREDENTIALS.sub("", plain)).strip()[:300]
