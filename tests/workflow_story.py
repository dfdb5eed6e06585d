"""The actual workflow files, run by act on this machine against the loopback GitHub and the loopback Hub."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub_story import BASE, EXPERIMENT, ROWS, TOKEN
from pasted import Pasted, paste
from servers.github import LoopbackGitHub
from servers.github_state import Comment
from servers.hub import LoopbackHub

from pipeline.book import Book, since_message
from pipeline.repository import Repository

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "tests/workflow_stubs"
BIN = Path(sys.executable).parent
READ_TOKEN = "hf_" + "ReaderReaderReaderReaderReaderRead"
PEOPLE = {"alice": "write", "bob": "write", "mallory": "read"}
TINY = "experiments/tiny.yaml"
Jobs = dict[str, str]


@dataclass
class Ran:
    """What act did: the result of every job, everything printed, and every summary."""

    jobs: Jobs
    text: str
    annotations: list[str]
    summaries: str
    code: int


@dataclass
class Workplace:
    """A repository made of this template, beside both servers."""

    root: Path
    github: LoopbackGitHub
    hub: LoopbackHub
    revision: str
    environment: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def experiment(self, name: str = "tiny", **changes: str) -> str:
        text = EXPERIMENT.format(revision=self.revision).replace("tiny\n", f"{name}\n")
        text = text.replace("acme/tiny}", f"acme/{name}}}")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        return text

    def open(self, branch: str = "try", by: str = "alice", **more: Any) -> int:
        return self.github.open_pull(branch, by, **more)

    def preflight(self, number: int, **more: Any) -> Ran:
        """What opening or pushing to a pull request starts."""
        event = self.github.event("pull_request", number)
        ref = self.merge_ref(number)
        fork = self.github.world.pulls[number].head_repo != self.github.repository
        secrets = {} if fork else {"HF_READ_TOKEN": READ_TOKEN}
        token = self.github.fork_token() if fork else self.github.actions_token()
        return self.act("pull_request", "preflight", event, ref, {**secrets, "GITHUB_TOKEN": token}, **more)

    def plan_only(self, number: int) -> int:
        """Preflight's first job, where the rehearsal is not what is shown; the number."""
        ran = self.preflight(number, job="plan")
        assert ran.jobs == {"plan": "success"}, ran.text[-4000:]
        return number

    def queue(self, number: int) -> Ran:
        """What a merge queue starts, less the rehearsal."""
        sha = self.github.enqueue(number)
        event = self.github.event("merge_group", number, sha=sha)
        ref = event["merge_group"]["head_ref"]
        return self.act(
            "merge_group", "preflight", event, ref, {"GITHUB_TOKEN": self.github.actions_token()}, job="plan"
        )

    def install(self) -> None:
        """Write the marker of a first install, as the first tick does."""
        sha = self.github.world.commit("refs/heads/main")
        self._work_tree("refs/heads/main")
        repository = Repository(self.root / "work", remote=str(self.github.git_dir))
        repository.push_tag("mergetune/since", sha, since_message(datetime.now(UTC)))

    def merge(self, number: int, method: str = "merge", by: str = "bob") -> tuple[str, Ran]:
        """Merge, and what the push starts."""
        before = self.github.world.commit("refs/heads/main")
        sha = self.github.merge(number, method, by)
        return sha, self.push(before, sha)

    def push(self, before: str, after: str) -> Ran:
        return self.trusted("push", "launch", self.github.event("push", before=before, after=after))

    def watch(self) -> Ran:
        """What the clock starts."""
        return self.trusted("schedule", "watch", self.github.event("schedule"))

    def pages(self) -> Ran:
        """The run board's workflow, dispatched; it gets no secret of the repository."""
        event = self.github.event("workflow_dispatch", workflow="pages.yml", inputs={}, by="alice")
        return self.act(
            "workflow_dispatch", "pages", event, "refs/heads/main", {"GITHUB_TOKEN": self.github.actions_token()}
        )

    def say(self, number: int, login: str, text: str) -> tuple[int, Ran]:
        """A comment, what it starts, and what that dispatches."""
        sent = len(self.github.dispatches)
        made = self.github.comment(number, login, text)
        if self.github.world.pull(number).open:
            self.merge_ref(number)
        event = self.github.event("issue_comment", made)
        secrets = {"GITHUB_TOKEN": self.github.actions_token()}
        ran = self.act("issue_comment", "commands", event, "refs/heads/main", secrets)
        for one in self.github.dispatches[sent:]:
            dispatch = self.github.event("workflow_dispatch", workflow=one.workflow, inputs=dict(one.inputs), by=one.by)
            more = self.trusted("workflow_dispatch", one.workflow.removesuffix(".yml"), dispatch)
            ran = Ran({**ran.jobs, **more.jobs}, ran.text + more.text, [], ran.summaries + more.summaries, more.code)
        return made, ran

    def trusted(self, name: str, workflow: str, event: Mapping[str, Any]) -> Ran:
        secrets = {"GITHUB_TOKEN": self.github.actions_token(), "HF_TOKEN": TOKEN}
        return self.act(name, workflow, event, "refs/heads/main", secrets)

    def merge_ref(self, number: int) -> str:
        """GitHub's own merge of an open pull request into main, on which its checks run."""
        pull, git = self.github.world.pull(number), self.github.world.git
        tip = self.github.world.commit("refs/heads/main")
        sha = git.join(tip, pull.head_sha, f"Merge {pull.head_sha} into {tip}", self.github.world.clock())
        git.set(f"refs/pull/{number}/merge", sha)
        return f"refs/pull/{number}/merge"

    def act(
        self,
        name: str,
        workflow: str,
        event: Mapping[str, Any],
        ref: str,
        secrets: Mapping[str, str],
        job: str = "",
    ) -> Ran:
        """One workflow run."""
        work = self._work_tree(ref)
        payload, hidden = self.root / "event.json", self.root / "secrets.env"
        payload.write_text(json.dumps(event))
        hidden.write_text("".join(f"{key}={value}\n" for key, value in secrets.items()))
        command = [str(BIN / "act"), name, "-C", str(work), "-W", f".github/workflows/{workflow}.yml"]
        command += ["-P", "ubuntu-24.04=-self-hosted", "-e", str(payload), "--secret-file", str(hidden), "--json"]
        command += ["--no-skip-checkout", "--no-cache-server", "--action-cache-path", str(self.root / "act")]
        command += ["-a", str(event.get("sender", {}).get("login", "github-actions[bot]")), *self._actions()]
        command += [part for key, value in self._variables().items() for part in ("--env", f"{key}={value}")]
        command += [part for key, value in self.variables.items() for part in ("--var", f"{key}={value}")]
        command += ["-j", job] if job else []
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.root / "home"), "LANG": "C.UTF-8"}
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=540, check=False)
        for secret in secrets.values():
            assert secret not in done.stdout + done.stderr, "a secret was printed"
        return _read(done.stdout, done.stderr, done.returncode)

    def paste(self, comment: str) -> list[Pasted]:
        """Run what a comment shows, in a checkout of main, as the person whose token it is."""
        work = self._work_tree("refs/heads/main")
        return paste(comment, work, {**self._variables(), "HF_TOKEN": TOKEN, "LANG": "C.UTF-8"})

    def comments(self, number: int, kind: str = "") -> list[Comment]:
        """Ours, under keys of this kind."""
        start = f"<!-- mergetune:{kind}"
        return [comment for comment in self.github.comments(number) if comment.body.startswith(start)]

    def book(self) -> Book:
        return Repository(self._work_tree("refs/heads/main"), remote=str(self.github.git_dir)).read_book()

    def _work_tree(self, ref: str) -> Path:
        """A clone at the ref, on a branch main: act takes event facts from it."""
        work, quiet = self.root / "work", {"capture_output": True, "check": True, "timeout": 60}
        if not work.exists():
            subprocess.run(["git", "init", "-q", "-b", "main", str(work)], **quiet)
            origin = f"https://github.com/{self.github.repository}.git"
            subprocess.run(["git", "remote", "add", "origin", origin], cwd=work, **quiet)
        subprocess.run(["git", "fetch", "-q", str(self.github.git_dir), ref], cwd=work, **quiet)
        subprocess.run(["git", "checkout", "-q", "--force", "-B", "main", "FETCH_HEAD"], cwd=work, **quiet)
        return work

    def _actions(self) -> list[str]:
        text = "".join(path.read_text() for path in (ROOT / ".github").rglob("*.yml"))
        pins = sorted(set(re.findall(r"uses: (actions/checkout@[0-9a-f]{40})", text)))
        return [part for pin in pins for part in ("--local-repository", f"{pin}={STUBS / 'checkout'}")]

    def _variables(self) -> dict[str, str]:
        return {
            "GITHUB_API_URL": self.github.api_url,
            "HF_ENDPOINT": self.hub.url,
            "LOOPBACK_GIT": str(self.github.git_dir),
            "MERGETUNE_BIN": str(BIN),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.root / "home"),
            **self.environment,
        }


def make_workplace(root: Path, hub: LoopbackHub, github: LoopbackGitHub) -> Workplace:
    """Accounts, a tiny base on the Hub, and mergetune's marker on a repository made of the template."""
    hub.add_user("alice", orgs={"acme": "admin"})
    hub.add_token(TOKEN, "alice")
    hub.add_token(READ_TOKEN, "alice", "read")
    revision = hub.add_repo("acme/tiny-base", {p.name: p.read_bytes() for p in BASE.iterdir() if p.is_file()})
    cache = os.environ.get("MERGETUNE_CACHE") or str(Path.home() / ".cache/mergetune")
    hub.job_environment = {"MERGETUNE_CACHE": cache, "OMP_NUM_THREADS": "1"}
    (root / "home").mkdir()
    for name in ("launch", "watch", "preflight", "commands"):
        github.add_workflow(f"{name}.yml")
    subprocess.run(["git", "-C", github.git_dir, "config", "uploadpack.allowAnySHA1InWant", "true"], check=True)
    return Workplace(root, github, hub, revision, {"MERGETUNE_CACHE": cache})


def template_files() -> dict[str, str | bytes | None]:
    """The files of a repository made of this template, with the stand-in for what installs mergetune."""
    kept = [".github", "scripts", "CODEOWNERS"]
    tracked = [
        path for name in kept for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    wanted = [p for p in tracked if p.is_file() and "__pycache__" not in p.parts]
    files: dict[str, str | bytes | None] = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in wanted}
    files[".github/actions/setup/action.yml"] = (STUBS / "setup/action.yml").read_text()
    files["pyproject.toml"] = '[tool.mergetune]\nnamespaces = ["acme"]\n'
    files["data/rows.jsonl"] = "".join(json.dumps(row) + "\n" for row in ROWS)
    return files


def _read(out: str, err: str, code: int) -> Ran:
    jobs: Jobs = {}
    text, summaries, marks = [err], [], []
    for line in out.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            text.append(line)
            continue
        if result := row.get("jobResult"):
            key = str(row["jobID"])  # of a matrix, one that is not a success counts
            jobs[key] = result if jobs.get(key, "success") == "success" else jobs[key]
        if row.get("command") == "summary":
            summaries.append(str(row.get("content", "")))
        if row.get("command") in ("error", "warning", "notice"):
            marks.append(json.dumps({key: row.get(key) for key in ("command", "kvPairs", "arg", "msg")}))
        text.append(str(row.get("msg", "")).rstrip())
    return Ran(jobs, "\n".join(text), marks, "\n".join(summaries), code)
