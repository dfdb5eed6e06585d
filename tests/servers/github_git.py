"""The git side of the loopback GitHub: a real bare repository with branches, pull refs and the four ways to merge."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ZERO = "0" * 40
TIMEOUT_S = 30
WEB_FLOW = "GitHub <noreply@github.com>"


class Conflict(Exception):
    """The two sides cannot be merged."""


@dataclass(frozen=True)
class Git:
    """A bare repository."""

    path: Path

    def run(self, *arguments: str, stdin: bytes | None = None, **env: str) -> str:
        """What git prints; CalledProcessError where it fails."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", **env}
        command = ["git", "-C", str(self.path), *arguments]
        done = subprocess.run(command, input=stdin, env=clean, capture_output=True, timeout=TIMEOUT_S, check=True)
        return done.stdout.decode().strip()

    def sha(self, ref: str) -> str | None:
        """The commit of a ref or of an abbreviated id; None where there is none."""
        try:
            return self.run("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        except subprocess.CalledProcessError:
            return None

    def set(self, ref: str, sha: str) -> None:
        """Point a ref to a commit."""
        self.run("update-ref", ref, sha)

    def commit(
        self, ref: str, parent: str | None, files: Mapping[str, str | bytes | None], by: str, message: str, at: float
    ) -> str:
        """Commit files (None removes one) upon `parent` and point `ref` to the result."""
        person = f"{by} <{by}@users.noreply.github.com> {int(at)} +0000"
        parts = [f"commit {ref}\nauthor {person}\ncommitter {person}\n".encode(), _data(message.encode())]
        parts += [f"from {parent}\n".encode()] if parent else []
        for path, content in files.items():
            if content is None:
                parts.append(f"D {path}\n".encode())
            else:
                parts += [f"M 100644 inline {path}\n".encode()]
                parts += [_data(content.encode() if isinstance(content, str) else content)]
        self.run("fast-import", "--quiet", "--force", "--date-format=raw", stdin=b"".join([*parts, b"\n"]))
        return self.sha(ref) or ""

    def merge_base(self, one: str, other: str) -> str:
        """Their newest common ancestor."""
        return self.run("merge-base", one, other)

    def commits(self, since: str, until: str) -> list[str]:
        """Commits of `until` that `since` does not have, oldest first."""
        return self.run("rev-list", "--reverse", f"{since}..{until}").split()

    def message(self, sha: str) -> str:
        """A commit's whole message."""
        return self.run("log", "-1", "--format=%B", sha)

    def files(self, old: str, new: str) -> list[dict[str, str]]:
        """What differs between two commits, renames found, as GitHub words it."""
        words = {"A": "added", "M": "modified", "D": "removed", "R": "renamed", "T": "changed", "C": "copied"}
        fields = self.run("diff", "--raw", "--abbrev=40", "-z", "-M", old, new).split("\0")
        rows, index = [], 0
        while index < len(fields) - 1:
            _mode, _new_mode, before, after, status = fields[index].split()
            moved = status[0] in "RC"
            row = {"status": words[status[0]], "sha": before if status[0] == "D" else after}
            row |= {"previous_filename": fields[index + 1]} if moved else {}
            rows.append({**row, "filename": fields[index + 1 + moved]})
            index += 2 + moved
        return rows

    def tree(self, sha: str) -> list[dict[str, str]]:
        """Every file of a commit."""
        rows = self.run("ls-tree", "-r", "-z", sha).split("\0")[:-1]
        split = [(*row.split("\t")[0].split(), row.split("\t")[1]) for row in rows]
        return [{"path": path, "mode": mode, "type": kind, "sha": blob} for mode, kind, blob, path in split]

    def join(self, base: str, head: str, message: str, at: float, *, squash: bool = False, by: str = "") -> str:
        """A merge commit of both, or one commit with head's changes upon base."""
        try:
            tree = self.run("merge-tree", "--write-tree", base, head).split("\n")[0]
        except subprocess.CalledProcessError as error:
            raise Conflict(error.stdout.decode()) from None
        parents = ["-p", base] if squash else ["-p", base, "-p", head]
        return self.run("commit-tree", tree, *parents, "-m", message, **_identity(by, at))

    def replay(self, base: str, head: str, at: float) -> list[str]:
        """Head's own commits, one by one, upon base: always new commits, as GitHub does it."""
        with TemporaryDirectory() as folder:
            tree = f"{folder}/tree"
            self.run("worktree", "add", "--detach", "--quiet", tree, base)
            try:
                for sha in self.commits(base, head):
                    Git(Path(tree)).run("cherry-pick", "--keep-redundant-commits", sha, **_identity("", at))
                return Git(Path(tree)).run("rev-list", "--reverse", f"{base}..HEAD").split()
            finally:
                self.run("worktree", "remove", "--force", tree)


def init_git(path: Path, files: Mapping[str, str | bytes | None], by: str, at: float) -> Git:
    """A new bare repository whose main has these files."""
    path.mkdir(parents=True)
    git = Git(path)
    git.run("init", "--bare", "--quiet", "--initial-branch=main", "--template=")
    git.commit("refs/heads/main", None, files, by, "Initial commit", at)
    return git


def _data(content: bytes) -> bytes:
    return f"data {len(content)}\n".encode() + content + b"\n"


def _identity(by: str, at: float) -> dict[str, str]:
    name, _, mail = WEB_FLOW.rstrip(">").partition(" <")
    author = {"GIT_AUTHOR_NAME": by or name, "GIT_AUTHOR_EMAIL": f"{by}@users.noreply.github.com" if by else mail}
    dates = {"GIT_AUTHOR_DATE": f"{int(at)} +0000", "GIT_COMMITTER_DATE": f"{int(at)} +0000"}
    return {**author, **dates, "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": mail}
