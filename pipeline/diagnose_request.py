"""What `mergetune diagnose` is asked: a file, standard input, or a job's id. Reads and looks up; prints nothing."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.check import gather_facts
from pipeline.diagnose import Diagnosis, diagnose
from pipeline.errors import InvalidExperiment, UserError
from pipeline.events import parse_event
from pipeline.loader import load_experiment
from pipeline.plan import Plan, Stage, StageName, make_plan
from pipeline.remedy import put, remedy
from pipeline.settings import find_root, load_settings
from pipeline.workspace import find_experiments, folder_of, shown_path

STDIN = "-"
JOB_ID = re.compile(r"[0-9a-f]{24}")
HEAD_BYTES, TAIL_BYTES = 8_000_000, 24_000_000  # of a log that is larger, as much as is read
# Words of the converter and of llama.cpp: the log of the stage that makes GGUF files.
GGUF_WORDS = ("hf-to-gguf", "llama_model_load", "llama_model_quantize", "convert_hf_to_gguf", "gguf_init_from_file")


@dataclass(frozen=True)
class Log:
    """A log with what is known of its job: the server's reason, its run and stage, and whether it was cancelled."""

    text: str
    message: str = ""
    experiment: str = ""
    run_id: str = ""
    stage: StageName | None = None
    state: str = ""


@dataclass(frozen=True)
class Answer:
    """A diagnosis with its fix; `note` says what else the reader should know."""

    found: Diagnosis
    fix: str
    experiment: str = ""
    stage: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready."""
        found = self.found
        return {
            "id": found.id,
            "known": found.is_known,
            "cause": found.cause,
            "evidence": found.evidence,
            "retry_may_pass": found.transient,
            "fix": self.fix,
            "rule": found.rule,
            "lines": list(found.lines),
            "experiment": self.experiment,
            "stage": self.stage,
        }


def answer_about(source: str, namespace: str | None, experiment: Path | None) -> Answer:
    """The diagnosis of a file, of standard input (`-`) or of a job.

    Raises:
        UserError: nothing of that name can be read, or the experiment is not valid.
        HubError: the Hub does not answer about the job.
    """
    log = read_source(source, namespace)
    path = experiment or _path_of(log.experiment)
    found = _diagnosed(log)
    if path is None:
        return Answer(found, put(found.hint), stage=str(log.stage or stage_in(log.text)))
    plan = _plan(path)
    stage = _stage(plan, log.stage or stage_in(log.text))
    changed = log.run_id and log.run_id != plan.run_id
    note = f"`{path}` has changed since this job: it was of run `{log.run_id}`" if changed else ""
    fix = remedy(found, plan, stage, log.text)
    return Answer(found, fix, plan.experiment.name, stage.name.value, note)


def stage_in(text: str) -> StageName:
    """The stage that a log is of, by its own first event, else by whose words are in it."""
    for line in text[:HEAD_BYTES].splitlines():
        event = parse_event(line)
        if event is not None and event["event"] == "start" and event.get("stage") in list(StageName):
            return StageName(event["stage"])
    return StageName.GGUF if any(word in text for word in GGUF_WORDS) else StageName.TRAIN


def _diagnosed(log: Log) -> Diagnosis:
    found = diagnose(log.text, log.message)
    if log.state == "cancelled" and not found.transient and found.id in ("", "no-log", "stopped"):
        hint = "`mergetune retry {name}` starts it again"
        evidence = log.message or found.evidence
        return replace(found, cause="the job was cancelled", evidence=evidence, hint=hint, id="cancelled", lines=())
    return found


def read_source(source: str, namespace: str | None) -> Log:
    path = Path(source)
    if source == STDIN:
        return Log(_bounded(sys.stdin.buffer))
    if path.is_file():
        try:
            with path.open("rb") as file:
                return Log(_bounded(file))
        except OSError as error:
            raise UserError(f"`{source}` cannot be read: {error.strerror}", "check its name", exit_code=2) from error
    if JOB_ID.fullmatch(source):
        return _of_job(source, namespace)
    hint = "give a log file, a job id (24 hexadecimal digits), or `-` for standard input"
    raise UserError(f"`{source}` is neither a file nor a job id", hint, exit_code=2)


def _bounded(file: BinaryIO) -> str:
    """The beginning and the end of a stream of any size, as text whatever its bytes are."""
    head, tail = file.read(HEAD_BYTES), b""
    while more := file.read(1 << 20):
        tail = tail + more if len(tail) < 2 * TAIL_BYTES else tail[-TAIL_BYTES:] + more
    cut = b"\n" if len(tail) > TAIL_BYTES else b""
    return (head + cut + tail[-TAIL_BYTES:]).decode("utf-8", errors="replace")


def _of_job(job_id: str, namespace: str | None) -> Log:
    """A job's log and reason, in the first of the likely namespaces that knows it."""
    from pipeline.backends.hf_jobs import HfJobs
    from pipeline.hf_world import SystemClock, open_account
    from pipeline.hub_facts import Access, HubError

    hub, token = open_account(SystemClock())
    remote = HfJobs(hub, token)
    mine = () if namespace else (hub.token_facts().user, *load_settings(find_root(Path.cwd())).namespaces)
    asked = [name for name in dict.fromkeys((namespace, *mine)) if name]
    for name in asked:
        try:
            message = remote.reason(name, job_id)
        except HubError as error:
            if error.access in (Access.MISSING, Access.FORBIDDEN) and name != asked[-1]:
                continue
            if error.access is Access.MISSING:
                break
            raise
        return _log_of(remote, name, job_id, message)
    hint = f"give its namespace: `mergetune diagnose {job_id} --namespace acme`"
    raise UserError(f"no job `{job_id}` in {', '.join(f'`{name}`' for name in asked)}", hint, exit_code=2)


def _log_of(remote: Any, namespace: str, job_id: str, message: str) -> Log:
    seen, text = remote.inspect(namespace, job_id), remote.log(namespace, job_id, whole=True)
    if seen is None:  # somebody else's job: it has no labels of ours
        return Log(text, message)
    return Log(text, message, seen.experiment, seen.run_id, seen.stage, seen.state.value)


def _path_of(name: str) -> Path | None:
    """The experiment's file in the repository we are in, if it is there."""
    folder = find_root(Path.cwd()) / "experiments"
    if not name or not any(folder.rglob("*.y*ml")):
        return None
    return next((path for path in find_experiments(folder.parent, []) if path.stem == name), None)


def _plan(path: Path) -> Plan:
    root = find_root(folder_of(path))
    try:
        experiment = load_experiment(path, shown_path(path, root)).experiment
    except InvalidExperiment as error:
        error.exit_code = 2
        raise
    return make_plan(experiment, gather_facts(experiment, root))


def _stage(plan: Plan, name: StageName) -> Stage:
    return next((stage for stage in plan.stages if stage.name is name), plan.stages[0])
