"""Runs one job as a process of this machine, in its own folder, environment and process group. Serves no route."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from servers.hub_http import HubError
from servers.hub_jobs import TIMEOUT_MESSAGE, Job
from servers.hub_network import join_group, leave_group
from servers.hub_world import World

# Options of `uv run` that take a value; all others stand alone.
UV_VALUES = {
    "--constraint", "--env-file", "--exclude-newer", "--extra-index-url", "--find-links", "--index", "--index-strategy",
    "--index-url", "--python", "--with", "--with-requirements", "-p", "-w",
}  # fmt: skip
LINES_KEPT = 100_000  # A job that prints for ever must not fill the memory of the tests.


class Host(Protocol):
    """What every job runs with: the Hub's own attributes of these names."""

    world: World
    python: str
    stop: threading.Event
    scheduling_s: float
    job_environment: dict[str, str]


def run_job(job: Job, host: Host) -> None:
    """Wait for hardware, start the command up to `attempts` times, end the job by its exit code."""
    clock = host.world.clock
    with job.changed:
        job.changed.wait_for(lambda: job.over or host.stop.is_set(), host.scheduling_s)
    code = 0
    for _ in range(job.attempts):
        if host.stop.is_set() or not job.begin(clock()):
            return
        try:
            code = _attempt(job, host)
        except (HubError, OSError) as error:
            job.end("ERROR", clock(), f"Job failed to start: {error}")
            return
        if code == 0:
            break
        job.failures += 1
    if code == 0:
        job.end("COMPLETED", clock())
    else:
        job.end("ERROR", clock(), f"Job failed with exit code: {code}. Reason: Error")


def _attempt(job: Job, host: Host) -> int:
    """One start of the command in a fresh folder; its exit code, 128 + signal where it was killed."""
    folder = host.world.root / "jobs" / f"{job.id}-{job.failures}"
    for name in ("home", "work", "tmp"):
        (folder / name).mkdir(parents=True)
    try:
        rewrite = _rewriter(_mount(job, host.world, folder))
        command = [rewrite(argument) for argument in real_command(job.command, host.python)]
        environment = {**_environment(job, host, folder, rewrite), **join_group(job, host.world.root, folder)}
        return _run(job, host, command, environment, folder / "work")
    finally:
        leave_group(job, host.world.root)
        _remove(folder)


def _mount(job: Job, world: World, folder: Path) -> dict[str, Path]:
    """Volumes as folders: repositories as read-only copies of a snapshot, buckets as a folder that outlives the job."""
    mounts = {}
    for number, volume in enumerate(job.volumes):
        where = folder / f"volume-{number}"
        if volume["type"] == "bucket":
            where = world.root / "buckets" / volume["source"] / (volume.get("path") or "")
            where.mkdir(parents=True, exist_ok=True)
        else:
            repo = world.repos.by_key.get((volume["type"], volume["source"]))
            if repo is None:
                raise HubError(404, f"volume {volume['source']} does not exist")
            where.mkdir()
            world.repos.materialise(repo, volume.get("revision") or "main", where, volume.get("path") or "")
            _chmod(where, 0o444, 0o555)
        mounts[volume["mountPath"].rstrip("/")] = where
    return mounts


def _rewriter(mounts: Mapping[str, Path]) -> Callable[[str], str]:
    """Puts the real folder in place of a mount path, where the path begins and ends there or goes on with a slash."""
    if not mounts:
        return lambda text: text
    paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w./-])({paths})(?![\w.-])")
    return lambda text: pattern.sub(lambda found: str(mounts[found[1]]), text)


def real_command(command: list[str], python: str) -> list[str]:
    """`uv run [options] script.py args` as the prepared interpreter on that script; everything else as it is."""
    if command[:2] != ["uv", "run"]:
        return command
    at = 2
    while at < len(command) and command[at].startswith("-"):
        at += 2 if command[at] in UV_VALUES else 1
    rest = command[at:]
    if rest and rest[0].endswith(".py"):
        return [python, *rest]
    return rest


def _environment(job: Job, host: Host, folder: Path, rewrite: Callable[[str], str]) -> dict[str, str]:
    """Nothing of this process's own environment: a variable a job depends on must be in its request."""
    return {
        "PATH": f"{Path(host.python).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "HF_HOME": str(folder / "home" / "huggingface"),
        "HF_ENDPOINT": host.world.url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_XET_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "ACCELERATOR": job.flavor,
        **host.job_environment,
        **{name: rewrite(value) for name, value in job.environment.items()},
        **job.secrets,
        "JOB_ID": job.id,
    }


def _run(job: Job, host: Host, command: list[str], environment: dict[str, str], work: Path) -> int:
    process = subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    job.pid = process.pid
    if job.over or host.stop.is_set():  # cancelled between its start and this line
        kill_group(job)
    reader = threading.Thread(target=_read, args=(process, job, host), daemon=True)
    reader.start()
    try:
        code = process.wait(job.timeout_s)
    except subprocess.TimeoutExpired:
        job.end("ERROR", host.world.clock(), TIMEOUT_MESSAGE)
        kill_group(job)
        code = process.wait(10)
    kill_group(job)  # children that the command left behind would hold its pipe open
    reader.join(5)
    job.pid = None
    return code if code >= 0 else 128 - code


def _read(process: "subprocess.Popen[bytes]", job: Job, host: Host) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if len(job.lines) < LINES_KEPT:
                job.say(line.decode(errors="replace").rstrip("\n"), host.world.clock())


def kill_group(job: Job) -> None:
    """Kill the job's process and all its children."""
    if job.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.pid, signal.SIGKILL)


def _chmod(folder: Path, file_mode: int, folder_mode: int) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(folder_mode if path.is_dir() else file_mode)


def _remove(folder: Path) -> None:
    """The Hub deletes a job's disk when it ends."""
    for path in [folder, *(entry for entry in folder.rglob("*") if entry.is_dir() and not entry.is_symlink())]:
        path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
