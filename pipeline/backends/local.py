"""The local backend: stages as subprocesses of this machine, artifacts as folders with manifests.

Layout of a run: `<runs>/<run_id>/<stage>/{run.json, log.txt, work/, artifact/}`. A stage is done because its
artifact's manifest says so, written last; nothing else records state.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pipeline.backends.process import OnEvent, follow, living_pid, note_pids
from pipeline.errors import UserError
from pipeline.events import EVENT_PREFIX
from pipeline.facts import Facts, MlxHere
from pipeline.fields import is_path
from pipeline.parallel import ALONE, Parallel
from pipeline.plan import Plan, Stage, StageName, mlx_base
from pipeline.run_json import make_inputs, make_run_json

Manifest = dict[str, Any]


@dataclass(frozen=True)
class LocalRun:
    """One run's place on disk. `python` is the interpreter that has the training stack, `parallel` how many train.

    Here one process trains whatever the flavor says: a rehearsal alone asks for more.
    """

    plan: Plan
    facts: Facts
    root: Path
    folder: Path
    device: str
    python: str = sys.executable
    parallel: Parallel = ALONE

    def stage_folder(self, stage: StageName) -> Path:
        """Where a stage keeps its run.json, log, scratch and artifact."""
        return self.folder / stage

    def artifact(self, stage: StageName) -> Path:
        """The folder a stage fills."""
        return self.stage_folder(stage) / "artifact"


class StageFailed(UserError):
    """A job script ended badly; carries the tail of its log."""


def find_device() -> str:
    """`cuda` when an NVIDIA driver answers, else `cpu`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return "cuda" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


def find_mlx() -> MlxHere:
    """The versions of MLX that this Python has: it is the one that runs the job scripts."""
    found: list[str | None] = []
    for name in ("mlx", "mlx-lm"):
        try:
            found.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            found.append(None)
    return MlxHere(found[0], found[1])


@contextmanager
def locked(run: LocalRun) -> Iterator[TextIO]:
    """Hold the run's lock; yields its file, which the job script inherits.

    The lock so lives as long as the script, even when this process is killed: a second run never starts beside it.

    Raises:
        UserError: another process runs this.
        OSError: the folder cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    handle = (run.folder / "lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = living_pid(handle)
            message = f"run `{run.plan.run_id}` is already going on (process {pid})"
            raise UserError(message, f"wait for it, or stop it: `kill {pid}`") from error
        note_pids(handle, os.getpid())
        yield handle


def look(run: LocalRun) -> dict[StageName, Manifest]:
    """The manifests of the stages that are done."""
    found = {stage.name: _finished(run, stage.name) for stage in run.plan.stages}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def run_stage(run: LocalRun, stage: Stage, lock: TextIO, on_event: OnEvent) -> Manifest:
    """Run one stage's script to its end, passing on its events; returns the manifest it wrote.

    Raises:
        StageFailed: the script failed or left no valid artifact. (Timeouts bound money; here there is none.)
        OSError: the run's folder cannot be written.
        KeyboardInterrupt: passed on after the script has stopped.
    """
    folder = run.stage_folder(stage.name)
    request = folder / "run.json"
    (folder / "work").mkdir(parents=True, exist_ok=True)
    # An artifact that does not count (damaged, or made from other inputs) would make the script refuse to start.
    shutil.rmtree(run.artifact(stage.name), ignore_errors=True)
    part = request.with_suffix(".part")
    part.write_text(json.dumps(_run_json(run, stage), indent=2), encoding="utf-8")
    part.replace(request)
    last_error: dict[str, Any] = {}

    def remember(event: dict[str, Any]) -> None:
        if event["event"] == "error":
            last_error.update(event)
        on_event(event)

    command = [run.python, str(run.root / stage.script), str(request)]
    code = follow(command, run.root, _environment(run), folder / "log.txt", lock, remember)
    manifest = _finished(run, stage.name) if code == 0 else None
    if manifest is None:
        raise _failure(stage, code, folder / "log.txt", last_error)
    return manifest


def start_preparing(run: LocalRun, pending: list[Stage]) -> subprocess.Popen[bytes] | None:
    """Build llama.cpp while training runs, so that the gguf stage finds it ready; None when nothing needs it."""
    names = [stage.name for stage in pending]
    if StageName.GGUF not in names or names == [StageName.GGUF]:
        return None
    script = next(stage.script for stage in pending if stage.name is StageName.GGUF)
    log = run.stage_folder(StageName.GGUF) / "prepare.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        command = [run.python, str(run.root / script), "prepare"]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def _finished(run: LocalRun, stage: StageName) -> Manifest | None:
    """The manifest of a stage's artifact if it is of this run, of these inputs, and whole."""
    manifest = read_manifest(run.artifact(stage))
    if manifest is None or manifest.get("run_id") != run.plan.run_id or manifest.get("stage") != stage:
        return None
    for file in manifest.get("files", []):
        path = run.artifact(stage) / file["path"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return None
    return manifest if _same_inputs(manifest.get("inputs", {}), _inputs(run, stage)) else None


def read_manifest(artifact: Path) -> Manifest | None:
    """The manifest of an artifact folder, or None when there is none to trust."""
    try:
        manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return None  # Not ours, or damaged: the stage runs again and replaces it.
    return manifest if isinstance(manifest, dict) else None


def _same_inputs(recorded: dict[str, Any], now: dict[str, Any]) -> bool:
    """Equal by content. A path may have moved, and an input that is gone cannot have changed."""

    def essence(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: {k: v for k, v in source.items() if k != "path"} for name, source in inputs.items()}

    then, current = essence(recorded), essence(now)
    return then.keys() == current.keys() and all(
        current[name] == then[name] or current[name].get("sha256") == "" for name in then
    )


def _inputs(run: LocalRun, stage: StageName) -> dict[str, Any]:
    """What the script of a stage reads, each with the hash of its content."""

    def source(name: str, kind: str, revision: str | None) -> dict[str, Any]:
        if is_path(name):
            return {"path": str(run.root / name), "sha256": run.facts.content[name]}
        return {"repo": name, "revision": revision, "type": kind}

    return make_inputs(run.plan, stage, source, lambda made: _made_by(run, made))


def _made_by(run: LocalRun, stage: StageName) -> dict[str, Any]:
    """The artifact of an earlier stage; its hash is that of its file list, empty when it is gone."""
    manifest = read_manifest(run.artifact(stage))
    files = {file["path"]: file["sha256"] for file in manifest["files"]} if manifest else None
    return {"path": str(run.artifact(stage)), "sha256": _digest(files) if files is not None else ""}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _run_json(run: LocalRun, stage: Stage) -> dict[str, Any]:
    previous = run.stage_folder(stage.name) / "run.json"
    attempt = json.loads(previous.read_text(encoding="utf-8"))["attempt"] + 1 if previous.exists() else 1
    output, inputs = {"path": str(run.artifact(stage.name))}, _inputs(run, stage.name)
    work = str(run.stage_folder(stage.name) / "work")
    shared = run.parallel.request() if stage.name is StageName.TRAIN else {}
    return make_run_json(run.plan, stage, attempt, inputs, output, work=work, device=run.device, **shared)


def _environment(run: LocalRun) -> dict[str, str]:
    experiment = run.plan.experiment
    sources = (experiment.base.model, experiment.data.dataset, mlx_base(experiment) or ".")
    offline = all(is_path(source) for source in sources)
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that wait must sleep: spinning ones take the cores they wait for as soon as anything else runs, such as
    # the build of llama.cpp beside training (measured on 2 busy cores: 34 s against 11 s for the same steps).
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**patient, **os.environ, **quiet, **({"HF_HUB_OFFLINE": "1"} if offline else {})}


def _failure(stage: Stage, code: int, log: Path, error: dict[str, Any]) -> StageFailed:
    name = stage.name
    if code == 2 and error:
        return StageFailed(f"{name}: {error['message']}", str(error.get("hint", "")), exit_code=2)
    if error:
        return StageFailed(f"{name}: {error['message']}", str(error.get("hint") or f"see `{log}`"))
    if code == -signal.SIGKILL:
        return StageFailed(
            f"{name} was killed (out of memory?)", "close other programs, or lower `max_length`; then run again"
        )
    tail = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(tail) if not line.startswith(EVENT_PREFIX)), "no output")
    how = (
        f"was ended by signal {-code}"
        if code < 0
        else f"failed with exit code {code}"
        if code
        else "left no whole artifact"
    )
    return StageFailed(f"{name} {how}: {last.strip()[:300]}", f"the whole log: `{log}`")
