"""The loopback Hub: the real huggingface_hub client drives it over HTTP, and its jobs really run. For tests only.

    with LoopbackHub(tmp_path) as hub:
        hub.add_user("alice", orgs={"acme": "admin"})
        hub.add_token("hf_test", "alice")
        HfApi(endpoint=hub.url, token="hf_test").create_repo("acme/model")

Everything it keeps lies below the given folder; it listens on 127.0.0.1 only.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from servers.hub_accounts import Accounts, Token, whoami
from servers.hub_faults import Faults
from servers.hub_file_views import file_routes
from servers.hub_http import Answer, Call, Front, Request, Server, dispatch, json_answer, route
from servers.hub_job_process import kill_group, run_job
from servers.hub_job_views import JobViews, without_secrets
from servers.hub_jobs import Job, JobBoard
from servers.hub_repo_views import repo_routes
from servers.hub_repos import Repos
from servers.hub_upload_views import upload_routes
from servers.hub_world import World


class LoopbackHub:
    """A Hub in a folder."""

    def __init__(self, root: Path, *, python: str = sys.executable, clock: Callable[[], float] = time.time) -> None:
        folder = root / "loopback-hub"
        (folder / "spool").mkdir(parents=True)
        self.world = World(folder, clock, Accounts(), Repos(folder))
        self.faults = Faults()
        self.on_request: Callable[[Request], None] | None = None
        self.python = python
        self.execute_jobs = True  # False: jobs stay where start_job and finish_job put them
        self.scheduling_s = 0.05  # how long a job waits for its hardware
        self.job_environment: dict[str, str] = {}  # added to every job
        user_of, spool = self.world.accounts.user_of, folder / "spool"
        self._front = Front(self._perform, user_of, without_secrets, self._heard, self.faults, spool, clock)
        self.stop = self._front.stop
        self._board = JobBoard()
        self.routes = [
            route("GET", "/api/whoami-v2", whoami),
            route("GET", "/api/agent-harnesses", _no_harnesses),
            *repo_routes(),
            *upload_routes(),
            *file_routes(),
            *JobViews(self._board, self._start, self.stop).routes(),
        ]
        self._server = Server(self._front)
        self.world.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        for job in self._board.jobs.values():
            kill_group(job)
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()

    @property
    def url(self) -> str:
        """The endpoint, without a slash at its end."""
        return self.world.url

    @property
    def requests(self) -> list[Request]:
        """Every request so far, oldest first."""
        return list(self._front.requests)

    def _perform(self, call: Call) -> Answer:
        return dispatch(self.routes, self.world, call)

    def _heard(self, request: Request) -> None:
        if self.on_request:
            self.on_request(request)

    def _start(self, job: Job) -> None:
        if self.execute_jobs:
            threading.Thread(target=run_job, args=(job, self), daemon=True).start()

    # Accounts.

    def add_user(self, name: str, orgs: Mapping[str, str] | None = None) -> None:
        """A person, with their role in each organisation (created where it is new)."""
        self.world.accounts.users[name] = dict(orgs or {})
        self.world.accounts.orgs.update(orgs or {})

    def add_org(self, name: str) -> None:
        """An organisation."""
        self.world.accounts.orgs.add(name)

    def add_token(
        self,
        value: str,
        user: str,
        role: str = "write",
        scoped: Mapping[str, list[str]] | None = None,
        can_read_gated: bool = False,
    ) -> None:
        """An access token: `read`, `write`, `fineGrained` (with permissions by entity) or `oauth`."""
        self.world.accounts.tokens[value] = Token(value, user, role, dict(scoped or {}), can_read_gated)

    def revoke(self, value: str) -> None:
        """The token is refused from now on."""
        del self.world.accounts.tokens[value]

    def set_credit(self, namespace: str, has_credit: bool) -> None:
        """Whether the namespace can pay for jobs."""
        broke = self.world.accounts.without_credit
        broke.discard(namespace) if has_credit else broke.add(namespace)

    # Repositories.

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """A repository with exactly these files in its first commit; the commit's id."""
        repos, now = self.world.repos, self.world.clock()
        blobs = {path: repos.blobs.of(path, content) for path, content in files.items()}
        with self.world.lock:
            repo = repos.create(repo_id, kind, now, private=private, gated=gated)
            return repo.commit(blobs, "initial commit", repo.namespace, now).sha

    def grant_gated(self, user: str, repo_id: str, kind: str = "model") -> None:
        """The owner accepts the user."""
        self.world.repos.get(repo_id, kind).accepted.add(user)

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path to content at a revision."""
        repos = self.world.repos
        snapshot = repos.get(repo_id, kind).resolve(revision).files
        return {path: repos.blobs.path(blob.sha256).read_bytes() for path, blob in snapshot.items()}

    def head(self, repo_id: str, kind: str = "model") -> str:
        """The commit id of main."""
        return self.world.repos.get(repo_id, kind).head.sha

    def history(self, repo_id: str, kind: str = "model") -> list[tuple[str, str, str]]:
        """(commit id, title, author) of main, newest first."""
        return [(c.sha, c.title, c.author) for c in self.world.repos.get(repo_id, kind).chain("main")]

    def delete_repo(self, repo_id: str, kind: str = "model") -> None:
        """Remove the repository behind everybody's back."""
        with self.world.lock:
            del self.world.repos.by_key[kind, repo_id]

    def repos(self) -> list[tuple[str, str, str]]:
        """(kind, id, `public` or `private`) of every repository."""
        rows = list(self.world.repos.by_key.values())
        return sorted((repo.kind, repo.id, "private" if repo.private else "public") for repo in rows)

    # Jobs.

    @property
    def jobs(self) -> dict[str, Job]:
        """Every job by id, oldest first."""
        return dict(self._board.jobs)

    @property
    def list_lag_s(self) -> float:
        """How long after its submission a job appears in listings; by its id it is found at once."""
        return self._board.list_lag_s

    @list_lag_s.setter
    def list_lag_s(self, seconds: float) -> None:
        self._board.list_lag_s = seconds

    def wait_jobs(self, timeout_s: float) -> None:
        """Until every job is over, also those submitted meanwhile; TimeoutError names the one that is not."""
        deadline = time.monotonic() + timeout_s
        while live := [job for job in self.jobs.values() if not job.over]:
            job = live[0]
            with job.changed:
                if not job.changed.wait_for(partial(getattr, job, "over"), max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"job {job.id} is still {job.stage}: {job.labels}\n{job.log[-2000:]}")

    def start_job(self, job_id: str) -> None:
        """To RUNNING, where jobs are not executed."""
        self._board.jobs[job_id].begin(self.world.clock())

    def finish_job(self, job_id: str, stage: str, log: str = "", message: str | None = None) -> None:
        """To a terminal stage, where jobs are not executed."""
        job, now = self._board.jobs[job_id], self.world.clock()
        job.begin(now)
        for line in log.splitlines():
            job.say(line, now)
        job.failures += stage == "ERROR"
        job.end(stage, now, message)

    def kill_job(self, job_id: str, message: str = "node lost") -> None:
        """The machine under the job is gone."""
        job = self._board.jobs[job_id]
        job.end("ERROR", self.world.clock(), message)
        kill_group(job)


def _no_harnesses(world: World, call: Call) -> Answer:
    """`GET /api/agent-harnesses`: the `hf` command asks at its start and wants a dict."""
    return json_answer({"standardEnvVars": [], "harnesses": {}})
