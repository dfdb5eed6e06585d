"""Hugging Face Jobs as a `Remote`: the real client's calls, each answer mapped once. Decides nothing.

The personal token goes to the job as a secret by value, and nowhere else. Namespace and token are always explicit: the
client's own defaults list the wrong account's jobs.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, JobInfo, Volume, get_session
from huggingface_hub.utils._http import hf_raise_for_status

from pipeline.hub import Hub
from pipeline.hub_facts import Access, HubError
from pipeline.plan import StageName
from pipeline.remote import VIEWED, JobSpec, JobState, Load, SeenJob, StageView, read_load, read_view

# Debian with git, a compiler and uv: what a job script needs before its own dependencies.
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
LIVE_STAGES = ["SCHEDULING", "RUNNING"]
STATES = {
    "SCHEDULING": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "COMPLETED": JobState.SUCCEEDED,
    "ERROR": JobState.FAILED,
    "CANCELED": JobState.CANCELLED,
    "DELETED": JobState.CANCELLED,
}
# What every job gets besides its labels; never a secret.
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
SMALL_BYTES = 4_000_000
LOG_LINES = 2000
MOST_LINES = 200_000  # of a whole log: more than any training says, and what memory holds
READERS = 32  # logs that are read at once


class HfJobs:
    """The Hub's repositories and jobs, as one account sees them."""

    def __init__(self, hub: Hub, token: str) -> None:
        self.hub = hub
        self._token = token

    def view(self, repo: str, folder: str) -> StageView:
        """The claim, winner and manifest in `folder` at the repository's head; no head when there is no repository."""
        try:
            info = self.hub.ask(lambda: self.hub.api.model_info(repo, timeout=self.hub.timeout_s))
        except HubError as error:
            if error.access is Access.MISSING:
                return StageView()
            raise
        if not info.sha or info.siblings is None:
            raise HubError(Access.UNREACHABLE, f"the answer about `{repo}` is not whole")
        there = {file.rfilename for file in info.siblings}
        paths = {name: f"{folder}/{name}" for name in VIEWED}
        head = str(info.sha)
        return read_view(
            head,
            {n: self.hub.read(repo, "model", path, head, SMALL_BYTES) for n, path in paths.items() if path in there},
        )

    def create_repo(self, repo: str, private: bool) -> None:
        """Make the repository if it is not there."""
        try:
            self.hub.ask(lambda: self.hub.api.create_repo(repo, private=private, exist_ok=False), attempts=1)
        except HubError as error:
            if error.access is not Access.MOVED:  # 409: it is there
                raise

    def commit(self, repo: str, parent: str, message: str, files: Mapping[str, bytes | Path]) -> str:
        """Commit on top of `parent` or raise `Access.MOVED`."""
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return self.hub.commit(repo, operations, message, parent)

    def submit(self, spec: JobSpec) -> str:
        """Start a paid job. Asked once: an error may hide a yes."""
        volume = Volume(type="model", source=spec.repo, mount_path=spec.mount, revision=spec.revision, read_only=True)
        started = self.hub.ask(
            lambda: self.hub.api.run_job(
                image=IMAGE,
                command=list(spec.command),
                env={**ENVIRONMENT, **{name: str(value) for name, value in spec.environment.items()}},
                secrets={"HF_TOKEN": self._token},
                flavor=spec.flavor,
                timeout=spec.timeout_s,
                labels=dict(spec.labels),
                name="-".join(spec.labels[key] for key in ("run", "stage", "node") if key in spec.labels)[:100],
                volumes=[volume],
                network_group=spec.network_group,
                network_aliases=list(spec.network_aliases) or None,
                namespace=spec.namespace,
                token=self._token,
            ),
            attempts=1,
        )
        return started.id

    def jobs(self, namespace: str, labels: Mapping[str, str], live: bool) -> tuple[SeenJob, ...]:
        """The jobs with all these labels that are ours."""
        listed = self.hub.ask(
            lambda: list(
                self.hub.api.list_jobs(
                    namespace=namespace,
                    labels=dict(labels),
                    status=LIVE_STAGES if live else None,
                    timeout=int(self.hub.timeout_s),
                    token=self._token,
                )
            )
        )
        return tuple(seen for job in listed if (seen := self._seen(job, namespace)) is not None)

    def inspect(self, namespace: str, job_id: str) -> SeenJob | None:
        """One job by its id, None when the server knows no such job."""
        try:
            job = self.hub.ask(lambda: self.hub.api.inspect_job(job_id=job_id, namespace=namespace, token=self._token))
        except HubError as error:
            if error.access is Access.MISSING:
                return None
            raise
        return self._seen(job, namespace)

    def log(self, namespace: str, job_id: str, *, whole: bool = False) -> str:
        """The last lines of a job's log, or all of it: the first cause of a failure may stand far above its end."""
        return self.hub.ask(lambda: self._log(namespace, job_id, None if whole else LOG_LINES))

    def logs(self, namespace: str, job_ids: Collection[str]) -> Mapping[str, str]:
        """The logs of several jobs, each asked for once.

        Side by side, because the server keeps the log of a live job open and the client waits five seconds for more.
        """

        def read(job_id: str) -> str | None:
            try:
                return self.hub.ask(lambda: self._log(namespace, job_id), attempts=1)
            except HubError:
                return None

        with ThreadPoolExecutor(READERS) as readers:
            found = zip(job_ids, readers.map(read, job_ids), strict=True)
            return {job_id: log for job_id, log in found if log is not None}

    def follow(self, namespace: str, job_id: str) -> Iterator[str]:
        """The log from its beginning, line by line, until the job ends."""
        lines = iter(self.hub.api.fetch_job_logs(job_id=job_id, namespace=namespace, follow=True, token=self._token))
        # The client asks again by itself; what it gives up on is a refusal or an outage, as everywhere.
        while (line := self.hub.ask(lambda: next(lines, None), attempts=1)) is not None:
            yield line

    def load(self, namespace: str, job_id: str) -> Load | None:
        """What the job's machine does at this moment; None before it runs and after it has ended."""
        api, token = self.hub.api, self._token
        found = self.hub.ask(
            lambda: list(api.fetch_job_metrics(job_id=job_id, namespace=namespace, follow=False, token=token))
        )
        return read_load(found[0]) if found else None

    def cancel(self, namespace: str, job_id: str) -> None:
        """Ask a job to stop. One that has ended answers with an error, which is what was wanted."""
        try:
            self.hub.ask(lambda: self.hub.api.cancel_job(job_id=job_id, namespace=namespace, token=self._token))
        except HubError as error:
            job = self.inspect(namespace, job_id)
            if job is not None and job.is_live:
                raise error

    def resolve(self, repo: str, kind: str, revision: str | None) -> str:
        """The commit that a revision names now."""
        return self.hub.resolve(repo, kind, revision)

    def _log(self, namespace: str, job_id: str, tail: int | None = LOG_LINES) -> str:
        lines = self.hub.api.fetch_job_logs(job_id=job_id, namespace=namespace, tail=tail, token=self._token)
        return "\n".join(deque(lines, MOST_LINES))

    def _seen(self, job: JobInfo, namespace: str) -> SeenJob | None:
        """A job as ours, None for one that is not: without our labels."""
        labels = job.labels or {}
        try:
            stage, attempt = StageName(labels["stage"]), int(labels["attempt"])
            node = int(labels.get("node", 0))
            experiment, run_id = labels["experiment"], labels["run"]
        except (KeyError, ValueError):
            return None
        state = STATES.get(str(getattr(job.status.stage, "value", job.status.stage)))
        if state is None:
            raise HubError(Access.UNREACHABLE, f"job `{job.id}` is in a state this version does not know")
        message = job.status.message or ""
        if state in (JobState.FAILED, JobState.CANCELLED):
            message = self.reason(namespace, job.id) or message
        volumes = [volume for volume in job.volumes or () if volume.type == "model"]
        return SeenJob(
            id=job.id,
            experiment=experiment,
            run_id=run_id,
            stage=stage,
            attempt=attempt,
            state=state,
            created_at=_epoch(job.created_at) or 0.0,
            running_s=_seconds(job),
            flavor=str(getattr(job.flavor, "value", job.flavor)),
            repo=volumes[0].source if volumes else "",
            finished_at=_epoch(job.finished_at),
            message=message,
            url=job.url,
            node=node,
            revision=(volumes[0].revision or "") if volumes else "",
        )

    def reason(self, namespace: str, job_id: str) -> str:
        """The server's words on why a job ended: message and cancel reason, of which the client drops the second."""
        url = f"{self.hub.endpoint}/api/jobs/{quote(namespace, safe='')}/{quote(job_id, safe='')}"
        headers = self.hub.api._build_hf_headers(token=self._token)

        def ask() -> Any:
            response = get_session().get(url, headers=headers)
            hf_raise_for_status(response)
            return response.json()

        status = self.hub.ask(ask).get("status") or {}
        return " ".join(str(status[key]) for key in ("message", "cancelReason") if status.get(key))


def _seconds(job: JobInfo) -> float:
    """Seconds it has run, which is what is billed; from its times where the server gives no durations."""
    durations = job.durations
    if durations is not None and durations.running_secs is not None:
        return float(durations.running_secs)
    started, finished = _epoch(job.started_at), _epoch(job.finished_at)
    return max(0.0, finished - started) if started is not None and finished is not None else 0.0


def _epoch(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()
