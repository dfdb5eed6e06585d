# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate==1.15.0",
#   "datasets==5.2.0",
#   "httpx2==2.16.2",
#   "huggingface_hub==2.4.0",
#   "jinja2==3.1.6",
#   "pyarrow==26.0.1",
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "trl==1.16.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Compare a base with its fine-tuned model: loss and perplexity on held-out rows, answers to the same prompts.

    python scripts/evaluate.py runs/quickstart/evaluate/run.json

The argument is a resolved `run.json` (stage `evaluate`). The held-out rows, their tokens and their labels come from the
same lines as in train_sft.py, so both models are scored on what the training never saw, over the tokens that it was
trained to predict. Decoding is greedy. One model is in memory at a time; `manifest.json` is written last.

After preference tuning (`method: dpo`) both models are asked which answer of each pair is the likelier. From the four
likelihoods follow reward margin and accuracy, as DPOTrainer defines them, with the base as reference.

Exit codes: 0 done, or another job does it, 1 a loss that is not a number, or a bug, 2 the caller's input, 3 the Hub
did not take the result, 130 interrupted.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Second copies of the weights in Mistral's and Meta's repos: as large as the model, and never read.
IGNORED_FILES = (".mergetune/*", "consolidated*", "original/*")


# --- shared: protocol. The same lines stand in every job script; tests/test_scripts.py compares them. ---
SCHEMA = 1
EVENT_PREFIX = "MERGETUNE "
# In many repos beside the weights: the same weights again, and what belongs to the runs that made them.
UNREAD = (".mergetune/*", "consolidated*", "original/*", "pytorch_model*", "*.pth", "*.gguf", "*.onnx", "*.h5")


class InputError(Exception):
    """Something the caller can fix. Printed as `error:` and `hint:`; the script exits with code 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def emit(event: str, **fields: object) -> None:
    """Print one progress event: `MERGETUNE {json}` on a line of stdout. NaN and infinities become strings."""
    record = {"event": event, "time": round(time.time(), 3), **fields}
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    # One write: a second thread must not come between the text and its end of line.
    print(EVENT_PREFIX + json.dumps(safe, allow_nan=False) + "\n", end="", flush=True)


def load_run(path: str, stage: str) -> dict:
    """Read the resolved `run.json` of one stage.

    Raises:
        InputError: not readable, not JSON, another schema version, the run of another stage, or not its data.
    """
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", "pass the path of a run.json") from error
    except ValueError as error:
        raise InputError(f"`{path}` is not JSON: {error}", "pass the run.json that mergetune wrote") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise InputError(f"`{path}` is not a run.json of schema {SCHEMA}", "write it with this version of mergetune")
    if run.get("stage") != stage:
        raise InputError(f"`{path}` is for stage `{run.get('stage')}`, this script is `{stage}`", "pass the other one")
    return at_home(run, Path(path).resolve().parent)


def at_home(run: dict, folder: Path) -> dict:
    """The run with what its writer could not know: full paths of inputs beside run.json, and a folder to write to."""
    for source in run["inputs"].values():
        given = Path(source.get("path", "/"))
        if given.is_absolute():
            continue
        source |= {"path": str(folder / given), "said": str(given)}
        known = source.get("sha256") if (folder / given).is_file() else None
        if known and file_entry(folder, folder / given)["sha256"] != known:
            raise InputError(f"`{given}` is not the file of the plan: its sha256 differs", "start the run again")
    run.setdefault("output", {})
    if "path" not in run["output"] or "work" not in run:
        scratch = Path(tempfile.mkdtemp(prefix="mergetune-"))
        run["output"].setdefault("path", str(scratch / "artifact"))
        run.setdefault("work", str(scratch / "work"))
    return run


def said_inputs(run: dict) -> dict:
    """The inputs as run.json says them, without folders of this machine."""
    inputs = {name: dict(source) for name, source in run["inputs"].items()}
    for source in inputs.values():
        source |= {"path": source.pop("said")} if "said" in source else {}
    return inputs


def fetch(source: dict) -> Path:
    """The local folder or file of an input: `{"path": …}` as it is, `{"repo": …, "revision": …}` from the Hub."""
    if "path" in source:
        return Path(source["path"])
    return download(source, ignore_patterns=UNREAD)


def fresh_output(run: dict) -> Path:
    """The empty folder to write the artifact into. What a killed attempt left there has no manifest and goes."""
    output = Path(run["output"]["path"])
    if (output / "manifest.json").exists():
        raise InputError(f"`{output}` already holds a finished artifact", "remove that folder to make it again")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return output


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise InputError when `folder`'s disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        message = (
            f"`{folder}` has {free / 1e9:.1f} GB of free disk, this stage writes about {needed_bytes / 1e9:.1f} GB"
        )
        raise InputError(message, "free some space, or use `--runs-dir` with a folder on a larger disk")


def file_entry(folder: Path, path: Path) -> dict:
    """`{path, bytes, sha256}` of one artifact file, its path relative to `folder`."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def write_manifest(run: dict, started: float, **fields: object) -> None:
    """Write `manifest.json`, the last file of an artifact: a folder without it is not one. Publishes both."""
    folder, repo = Path(run["output"]["path"]), run["output"].get("repo")
    if repo:
        publish(run)
        fields |= {"job_id": JOB_ID, "provenance": run.get("provenance"), "warnings": run.get("warnings", [])}
    files = run.get("published", []) + [file_entry(folder, p) for p in artifact_files(folder).values()]
    finished = time.time()
    manifest = {
        "schema": SCHEMA,
        "run_id": run["run_id"],
        "fingerprint": run["fingerprint"],
        "experiment": run["experiment"]["name"],
        "stage": run["stage"],
        "attempt": run["attempt"],
        "started_at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "finished_at": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
        "duration_s": round(finished - started, 3),
        "inputs": said_inputs(run),
        "predicted": run.get("predicted", {}),
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        **fields,
        "files": files,
    }
    part = folder / "manifest.json.part"
    with part.open("w", encoding="utf-8") as handle:
        json.dump(manifest, handle, indent=2, allow_nan=False)
        handle.flush()
        os.fsync(handle.fileno())
    part.rename(folder / "manifest.json")
    if repo:
        publish_manifest(run)


def versions(*packages: str) -> dict:
    """Installed versions by distribution name, with Python's own."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def guarded(main: Callable[[], None]) -> int:
    """Run `main`; map its end to an exit code: 0 done, 2 the caller's input, 3 the Hub's, 130 interrupted. Bugs fly."""
    # SIGINT too: a shell starts background jobs with it ignored, and Python then leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        main()
    except (InputError, HubFailed) as error:
        transient = isinstance(error, HubFailed) and not error.refused
        emit("error", message=error.message, hint=error.hint, transient=transient)
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    except Superseded as error:
        emit("superseded", winner=error.winner)
    except KeyboardInterrupt:
        emit("interrupted")
        return 130
    finally:
        STOPPED.set()  # a thread that prints while Python ends would abort it
        for thread in threading.enumerate():
            if thread.name == "heartbeat":
                thread.join(5)
    return 0


# --- end shared: protocol ---


# --- shared: hub. The same lines stand in every job script; tests/test_scripts.py compares them. ---
HUB_TIMEOUT_S = 120  # huggingface_hub has none: a dead connection would hold a paid machine until the job's timeout
# How long the Hub is asked again, in seconds: while it does not answer, and while it refuses (401, 403, 404).
START = (600, 0)  # nothing is lost yet, and the controller can start the job again
PUSH = (180, 0)  # a checkpoint: the next one replaces it
PUBLISH = (3600, 300)  # an hour of the machine costs less than the work that it alone holds
HEARTBEAT_S = 60
RSS_IN_A_GIB = 2**30 if sys.platform == "darwin" else 2**20  # `ru_maxrss` counts KiB, on a Mac bytes
LARGE_BYTES = 1 << 20  # files from this size go one by one, so that one which has arrived does not go again
NOBODY = "nobody"  # in place of a job that won: the stage was stopped
NODE = int(os.environ.get("MERGETUNE_NODE") or 0)  # which machine of a training on several this is
# Without the Hub's own id (a run by hand) every process is a job of its own.
JOB_ID = os.environ.get("JOB_ID") or f"local-{os.getpid()}-{time.time_ns()}"
STOPPED = threading.Event()


class Superseded(Exception):
    """Another job makes this stage, or it is made already. Nothing is wrong: the script exits with code 0."""

    def __init__(self, winner: dict) -> None:
        super().__init__(f"superseded by {winner}")
        self.winner = winner


class HubFailed(Exception):
    """The Hub refused, or did not answer for as long as it was worth asking. The script exits with code 3."""

    def __init__(self, message: str, hint: str, refused: bool = False) -> None:
        super().__init__(message)
        self.message, self.hint, self.refused = message, hint, refused


def begin(run: dict) -> None:
    """First act of a job that publishes: win the fence, then show signs of life. Without `output.repo`, nothing.

    Raises:
        Superseded: another job has won, or the stage is published.
        InputError: the token cannot write to the output repo.
    """
    if not run["output"].get("repo"):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    Path(run["work"]).mkdir(parents=True, exist_ok=True)
    try:
        patiently(run, "claim the stage", START, lambda: win_fence(run))
    except HubFailed as error:
        if error.refused:
            raise InputError(error.message, error.hint) from error
        raise
    threading.Thread(target=heartbeat, args=(run,), name="heartbeat", daemon=True).start()


def win_fence(run: dict) -> None:
    """Name this job in the stage's winner.json by compare-and-swap; it is also the proof that the token can write.

    Every node has a file of its own. A later attempt of any node, and a fence that is shut, shut out all nodes.
    """
    from huggingface_hub import CommitOperationAdd

    seen = look(run)
    winner, finished = winner_in(run, seen, NODE), f"{stage_folder(run)}/manifest.json" in names_in(seen)
    if finished or is_shut_out(run, seen) or (winner.get("attempt", 0) >= run["attempt"] and not is_me(winner)):
        raise Superseded({**winner, "finished": finished})
    if is_me(winner):  # this container was started again, or the answer to the commit was lost
        return
    mine = {"attempt": run["attempt"], "job_id": JOB_ID, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    operation = CommitOperationAdd(winner_path(run, NODE), json.dumps(mine).encode())
    message = f"{run['stage']} of {run['run_id']}: job {JOB_ID} starts"
    hub().create_commit(run["output"]["repo"], [operation], commit_message=message, parent_commit=seen.sha)


def hub() -> Any:
    """The client. Endpoint and token are the environment's."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    get_session().timeout = HUB_TIMEOUT_S
    return HfApi()


def download(source: dict, **patterns: Any) -> Path:
    """The folder of a repo at its revision, without the files that the patterns leave out.

    Raises:
        InputError: the token may not read it, or it is not there.
    """
    from huggingface_hub import snapshot_download

    emit("phase", name="download", detail=source["repo"])
    options = {"revision": source["revision"], "repo_type": source.get("type", "model"), **patterns}
    try:
        folder = Path(snapshot_download(source["repo"], **options))
    except OSError as error:
        if status_of(error) not in (401, 403, 404):
            raise
        hint = "check its name and revision; if it is gated or private, accept its terms and give `HF_TOKEN` a token "
        hint += "of that account which may read it"
        raise InputError(f"cannot read `{source['repo']}`: {one_line_of(error)}", hint) from error
    require_run(folder, source)
    return folder


def require_run(folder: Path, source: dict) -> None:
    """Raise InputError when an artifact of this run was replaced by another run's since this job was submitted."""
    if "run_id" not in source:
        return
    manifest = folder / "manifest.json"
    found = json.loads(manifest.read_bytes()).get("run_id") if manifest.is_file() else None
    if found != source["run_id"]:
        message = f"`{source['repo']}` holds the artifact of `{found}`, not of `{source['run_id']}`"
        raise InputError(message, "give each experiment an `output.repo` of its own, and retry the run")


def stage_folder(run: dict) -> str:
    """Where the output repo keeps what belongs to this stage of this run and is no part of the artifact."""
    return f".mergetune/{run['run_id']}/{run['stage']}"


def look(run: dict) -> Any:
    """The output repo at its head: `sha`, and `siblings` with name, size and hash of every file."""
    return hub().repo_info(run["output"]["repo"], files_metadata=True, timeout=HUB_TIMEOUT_S)


def names_in(seen: Any) -> set[str]:
    """The paths in the repo that `look` has seen."""
    return {sibling.rfilename for sibling in seen.siblings or []}


def read_at(run: dict, seen: Any, name: str) -> dict:
    """A JSON file of the output repo at the commit that was seen; empty when it is not there."""
    if name not in names_in(seen):
        return {}
    from huggingface_hub import hf_hub_download

    return json.loads(Path(hf_hub_download(run["output"]["repo"], name, revision=seen.sha)).read_bytes())


def winner_path(run: dict, node: int = 0) -> str:
    """Where the job that won is named, for each node of a training on several."""
    return f"{stage_folder(run)}/winner{f'-{node}' if node else ''}.json"


def winner_in(run: dict, seen: Any, node: int = 0) -> dict:
    """The stage's winner.json; empty before the first job has won."""
    return read_at(run, seen, winner_path(run, node))


def is_me(winner: dict) -> bool:
    """Whether this job is the one that won."""
    return winner.get("job_id") == JOB_ID


def is_shut_out(run: dict, seen: Any) -> bool:
    """Whether no node of this attempt may work: a later attempt has passed with any node, or the stage was stopped."""
    first = winner_in(run, seen)
    if first.get("job_id") == NOBODY and first.get("attempt", 0) >= run["attempt"]:
        return True
    paths = [name for name in names_in(seen) if name.startswith(f"{stage_folder(run)}/winner")]
    return any(read_at(run, seen, path).get("attempt", 0) > run["attempt"] for path in paths)


def look_as_winner(run: dict) -> Any:
    """`look`, by the job that still holds the fence; raises Superseded in any other."""
    seen = look(run)
    winner = winner_in(run, seen)
    if winner.get("job_id") != JOB_ID:
        raise Superseded({**winner, "finished": False})
    return seen


def patiently(run: dict, what: str, patience: tuple[float, float], act: Callable[[], Any]) -> Any:
    """`act()`, tried again after growing, random pauses while the Hub fails or somebody else commits.

    Raises:
        HubFailed: the patience is over, or the Hub refuses what no repetition changes.
    """
    import httpx2

    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return act()
        except (OSError, RuntimeError, json.JSONDecodeError, httpx2.HTTPError) as error:
            status, text = status_of(error), one_line_of(error)
            refused = status in (401, 403, 404)
            final = status and 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 412, 425, 429)
            limit = 0 if final else min(patience[refused], run.get("patience_s", math.inf))
            left = limit - (time.monotonic() - began)
            if left <= 0:
                raise HubFailed(*refusal(run, what, text) if refused else outage(run, what, text), refused) from error
        raced = status in (409, 412)  # our parent commit is no longer the head: another commit came between
        wait_s = min(left, pause * random.uniform(0.5, 1.5) * (0.2 if raced else 1))
        if not raced:
            emit("warning", message=f"{what}: {text}; tried again in {wait_s:.0f} s")
        time.sleep(wait_s)
        pause = min(2 * pause, 60)


def refusal(run: dict, what: str, text: str) -> tuple[str, str]:
    """Message and hint for a token that may not do it."""
    owner = run["output"]["repo"].partition("/")[0]
    hint = f"set the secret `HF_TOKEN` to a token that can write to the repos of `{owner}`: role `write`, or "
    hint += f"fine-grained with `repo.write` on `{owner}`; then `mergetune retry {run['experiment']['name']}`"
    return f"`{run['output']['repo']}`: the token of this job cannot {what}: {text}", hint


def outage(run: dict, what: str, text: str) -> tuple[str, str]:
    """Message and hint for a Hub that does not do it."""
    hint = f"look at https://status.huggingface.co, then `mergetune retry {run['experiment']['name']}`"
    return f"`{run['output']['repo']}`: the Hub did not {what}: {text}", hint


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or one that caused it, came with."""
    while error is not None:
        # Uploads through Xet say it in words alone: `HTTP status client error (403 Forbidden), domain: …`.
        told = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
        status = getattr(getattr(error, "response", None), "status_code", None) or (told and int(told[1]))
        if status:
            return status
        error = error.__cause__
    return None


def one_line_of(error: BaseException) -> str:
    """What an error says, short, on one line, and never with a token."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\bhf_[\w.-]{8,}", "hf_…", text)[:400]


def push(
    run: dict,
    message: str,
    files: dict[str, Path | bytes],
    stale: Callable[[str], bool],
    patience: tuple[float, float],
) -> None:
    """Put files into the output repo in one commit that also deletes the `stale` ones, by the winner alone.

    Raises:
        Superseded: this job does not hold the fence any more.
        HubFailed: the Hub would not take it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    patiently(run, "look at the repo", patience, lambda: look_as_winner(run))
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    for addition in additions:
        if addition.upload_info.size >= LARGE_BYTES:
            send = partial(hub().preupload_lfs_files, run["output"]["repo"], [addition], free_memory=False)
            patiently(run, f"upload {addition.path_in_repo}", patience, send)

    def commit() -> None:
        seen = look_as_winner(run)
        gone = [CommitOperationDelete(name) for name in sorted(names_in(seen) - set(files)) if stale(name)]
        options = {"commit_message": message, "parent_commit": seen.sha}
        hub().create_commit(run["output"]["repo"], [*additions, *gone], **options)

    patiently(run, f"commit {message!r}", patience, commit)


def deliver(run: dict, title: str, files: dict[str, Path | bytes], stale: Callable[[str], bool]) -> None:
    """`push` of what was paid for, with patience; when it fails for good, the error says what is where."""
    try:
        push(run, title, files, stale, PUBLISH)
    except HubFailed as error:
        message = f"{title} is made and not published: {error.message}. It lies in `{run['output']['path']}` of this "
        message += f"machine alone, and ends with it; what arrived before is in the repo and its `{stage_folder(run)}/`"
        raise HubFailed(message, error.hint, error.refused) from error


def warn(run: dict, message: str) -> None:
    """A warning that the manifest repeats: nobody may be there to read the log."""
    emit("warning", message=message)
    run.setdefault("warnings", []).append(message)


def publish(run: dict) -> None:
    """Upload the artifact, all but its manifest. At the root it replaces what was there, first of all the manifest."""
    folder, prefix = Path(run["output"]["path"]), run["output"].get("folder") or ""
    files = {f"{prefix}/{name}".lstrip("/"): path for name, path in artifact_files(folder).items()}
    kept = {".gitattributes", *(entry["path"] for entry in run.get("published", []))}
    if prefix and not files:
        return
    emit("phase", name="publish", detail=f"{len(files)} files to {run['output']['repo']}")
    title = f"{run['stage']} of {run['run_id']}"

    def stale(name: str) -> bool:
        return not prefix and not name.startswith(".mergetune/") and name not in kept

    try:
        deliver(run, title, files, stale)
    except ValueError as error:  # the Hub looks at the card before it takes anything: weights must not wait for it
        card = files.pop("README.md", None)
        if card is None:
            raise
        warn(run, f"published without its card: {one_line_of(error)}")
        Path(card).unlink()
        deliver(run, title, files, stale)


def artifact_files(folder: Path) -> dict[str, Path]:
    """The files of a finished artifact by their path in it."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def publish_manifest(run: dict) -> None:
    """The last commit: the manifest, for the stage and for the repo; the checkpoint is not needed any more."""
    content = (Path(run["output"]["path"]) / "manifest.json").read_bytes()
    names = [f"{stage_folder(run)}/manifest.json"] + ([] if run["output"].get("folder") else ["manifest.json"])
    checkpoint = f"{stage_folder(run)}/checkpoint/"
    title = f"{run['stage']} of {run['run_id']}: manifest"
    deliver(run, title, dict.fromkeys(names, content), lambda name: name.startswith(checkpoint))
    emit("published", repo=run["output"]["repo"], folder=run["output"].get("folder") or "")


def heartbeat(run: dict) -> None:
    """A sign of life every minute: peak memory of this process and its children, free disk, how busy the GPUs are."""
    began = time.monotonic()
    while not STOPPED.wait(run.get("heartbeat_s", HEARTBEAT_S)):
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        free = shutil.disk_usage(run["work"]).free
        numbers = {"memory_gib": round(peak / RSS_IN_A_GIB, 3), "disk_free_gb": round(free / 1e9, 1), **gpu_busy(run)}
        emit("heartbeat", **numbers, elapsed_s=round(time.monotonic() - began, 1))


def gpu_busy(run: dict) -> dict[str, float]:
    """The busy part of the GPUs (0 to 1) as their driver tells it; nothing without a GPU, or where it does not tell."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    if run.get("device") != "cuda" or not shutil.which(command[0]):
        return {}
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return {"gpu_busy": round(sum(map(float, told)) / len(told) / 100, 3)}
    except (OSError, ValueError, ZeroDivisionError, subprocess.SubprocessError):  # `[N/A]`: some cards do not tell
        return {}


def origin(run: dict) -> dict[str, str]:
    """For a card: commit and pull request that a published artifact comes from, as Markdown links."""
    source = run.get("provenance") or {}
    url, commit, number = (str(source.get(key) or "") for key in ("repository", "commit", "pull_request"))
    links = {"commit": (commit[:7], f"{url}/commit/{commit}"), "pull request": (f"#{number}", f"{url}/pull/{number}")}
    told = {"commit": re.fullmatch("[0-9a-f]{7,64}", commit), "pull request": number.isdigit()}
    is_url = re.fullmatch(r"https://[\w.:/-]+", url)
    return {label: f"[{text}]({link})" for label, (text, link) in links.items() if is_url and told[label]}


# --- end shared: hub ---


# --- shared: data rows. The same lines stand in train_sft.py and evaluate.py; a test compares them. ---
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
FORMATS = "`messages`, `prompt` + `completion`, `conversations` (from/value) or `text`"
PAIRS = "`prompt` + `chosen` + `rejected`, or `chosen` + `rejected` with the same beginning"
IGNORED = -100  # a label that the loss leaves out


@dataclasses.dataclass(frozen=True)
class Row:
    """One checked data row. `prompt` and `completion` are both text, or both lists of messages.

    Of a pair of answers `completion` is the chosen one.
    """

    where: str  # `data.jsonl:17`, for messages to the caller
    format: str
    prompt: Any
    completion: Any
    tools: list | None = None
    rejected: Any = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.completion, list)


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence to train on or to score: token ids, and labels that are `IGNORED` where there is no loss."""

    where: str
    ids: list[int]
    labels: list[int]

    def trained(self) -> int:
        """Tokens in the loss. The first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, max_length: int | None) -> "Example":
        return Example(self.where, self.ids[:max_length], self.labels[:max_length])


def read_raw(source: dict, split: str) -> Iterator[tuple[str, Any]]:
    """Pairs of a row's name and its value, from a .jsonl or .parquet file or one split of a Hub dataset."""
    if "repo" in source:
        from datasets import load_dataset

        emit("phase", name="download", detail=source["repo"])
        try:
            data = load_dataset(source["repo"], source.get("subset"), revision=source["revision"], split=split)
        except ValueError as error:  # an unknown split or subset; the message lists the ones that exist
            raise InputError(f"`{source['repo']}`: {error}", "correct `data.split` or `data.subset`") from error
        yield from ((f"{source['repo']} {split} row {number}", row) for number, row in enumerate(data, 1))
    elif (path := Path(source["path"])).suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    else:
        raise InputError(f"`{path.name}` is neither .jsonl nor .parquet", "convert it to JSON lines, one row per line")


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON lines file; blank lines are skipped, and line numbers still count them."""
    try:
        handle = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", "check the path of the data file") from error
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON: {error}", "write one JSON object per line, in UTF-8") from error


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, counted from 1."""
    from pyarrow import ArrowInvalid, parquet

    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path.name} row {number}", row
    except (OSError, ArrowInvalid) as error:
        raise InputError(f"cannot read `{path}`: {error}", "check that the file is complete Parquet") from error


def load_rows(source: dict, split: str, pairs: bool = False) -> list[Row]:
    """Every row, checked; with `pairs`, of two answers each.

    Raises:
        InputError: an empty source, a row that cannot be used, or rows of different formats; names the row.
    """
    rows: list[Row] = []
    for where, raw in read_raw(source, split):
        row = clean_pair(where, raw) if pairs else clean_row(where, raw)
        if rows and (row.format, row.is_chat) != (rows[0].format, rows[0].is_chat):
            message = f"{where}: this row is {describe(row)}, {rows[0].where} is {describe(rows[0])}"
            raise InputError(message, "use one format for the whole file")
        rows.append(row)
    if not rows:
        name = source.get("repo") or Path(source["path"]).name
        raise InputError(f"`{name}` holds no rows", f"write at least one row of {PAIRS if pairs else FORMATS}")
    return rows


def describe(row: Row) -> str:
    """The format of a row in words."""
    return f"`{row.format}` of {'messages' if row.is_chat else 'plain text'}"


def clean_row(where: str, raw: Any) -> Row:
    """A `Row` of the first format that the keys of `raw` name."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a row is a JSON object, this is {kind_of(raw)}", f"write {FORMATS}")
    keys = {key for key, value in raw.items() if value is not None}
    if "messages" in keys:
        return Row(where, "messages", [], clean_messages(where, raw["messages"], "messages"), clean_tools(where, raw))
    if {"prompt", "completion"} <= keys:
        return clean_prompted(where, raw)
    if "conversations" in keys:
        turns = raw["conversations"]
        if isinstance(turns, list):
            turns = [from_value(turn) for turn in turns]
        messages = clean_messages(where, turns, "conversations")
        return Row(where, "conversations", [], messages, clean_tools(where, raw))
    if "text" in keys:
        return Row(where, "text", "", clean_text(where, raw["text"], "text"))
    found = ", ".join(f"`{key}`" for key in raw) or "nothing"
    hint = f"use `train.method: dpo`, or write {FORMATS}" if {"chosen", "rejected"} <= keys else f"write {FORMATS}"
    raise InputError(f"{where}: no messages: the row has {found}", hint)


def clean_pair(where: str, raw: Any) -> Row:
    """A row of two answers, plain or conversational; their prompt is a column, or how both begin."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a row is a JSON object, this is {kind_of(raw)}", f"write {PAIRS}")
    prompt, chosen, rejected = (raw.get(key) for key in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        found = ", ".join(f"`{key}`" for key in raw) or "nothing"
        raise InputError(f"{where}: no pair of answers: the row has {found}", f"write {PAIRS}, or use `method: qlora`")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        asked, *answers = clean_text_pair(where, prompt, chosen, rejected)
        return Row(where, "chosen/rejected", asked, answers[0], None, answers[1])
    if isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, list | str | None):
        asked, *answers = clean_chat_pair(where, prompt, chosen, rejected)
        return Row(where, "chosen/rejected", asked, answers[0], clean_tools(where, raw), answers[1])
    kinds = ", ".join(f"`{key}` is {kind_of(raw.get(key))}" for key in ("prompt", "chosen", "rejected"))
    raise InputError(f"{where}: {kinds}", "make all three text, or all three lists of messages")


def clean_text_pair(where: str, prompt: str | None, chosen: str, rejected: str) -> list[str]:
    """Prompt and answers, as text."""
    answers = [clean_text(where, chosen, "chosen"), clean_text(where, rejected, "rejected")]
    if prompt is None:
        prompt = common_beginning(*answers).removesuffix(" ")  # the blank before a word belongs to the answer
        answers = [answer[len(prompt) :] for answer in answers]
        require_prompt(where, prompt)
    return [clean_text(where, prompt, "prompt"), *answers]


def clean_chat_pair(where: str, prompt: list | str | None, chosen: list, rejected: list) -> list[list[dict]]:
    """Prompt and answers, as messages. Answers that are whole conversations may say the prompt again."""
    answers = [clean_messages(where, chosen, "chosen"), clean_messages(where, rejected, "rejected")]
    asked = clean_messages(where, prompt, "prompt", answered=False) if isinstance(prompt, list) else []
    begun = common_beginning(*answers)
    if begun and (begun[: len(asked)] == asked if asked else prompt in (None, begun[-1]["content"])):
        asked, answers = begun, [answer[len(begun) :] for answer in answers]
    elif isinstance(prompt, str):
        message = f"{where}: `prompt` is text, and `chosen` is a list that does not begin with it"
        raise InputError(message, "make all three lists of messages")
    require_prompt(where, asked)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer[-1]["role"] != "assistant":
            raise InputError(f"{where}: `{name}` does not end with the assistant", "end it with the answer to compare")
    return [asked, *answers]


def require_prompt(where: str, prompt: Any) -> None:
    """Refuse a pair of answers to nothing."""
    if not prompt:
        raise InputError(f"{where}: no `prompt`, and `chosen` and `rejected` begin differently", f"write {PAIRS}")


def common_beginning(left: Any, right: Any) -> Any:
    """The characters or messages that both begin with, less the last of each: that much is always an answer."""
    return left[: common_prefix(left[:-1], right[:-1])]


def clean_prompted(where: str, raw: dict) -> Row:
    """A `prompt`/`completion` row, plain or conversational."""
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = clean_text(where, prompt, "prompt"), clean_text(where, completion, "completion")
        return Row(where, "prompt/completion", prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        message = f"{where}: `prompt` is {kind_of(prompt)} and `completion` is {kind_of(completion)}"
        raise InputError(message, "make both text, or both lists of messages")
    prompt = clean_messages(where, prompt, "prompt", answered=False)
    return Row(
        where, "prompt/completion", prompt, clean_messages(where, completion, "completion"), clean_tools(where, raw)
    )


def clean_messages(where: str, value: Any, name: str, answered: bool = True) -> list[dict]:
    """Checked messages; with `answered`, at least one of them is the assistant's."""
    if not isinstance(value, list):
        raise InputError(f"{where}: `{name}` is {kind_of(value)}", "write a list of {role, content}")
    if not value:
        raise InputError(f"{where}: `{name}` is empty", "remove the row, or write its messages")
    messages = [clean_message(where, message, f"{name}[{index}]") for index, message in enumerate(value)]
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no assistant turn in `{name}`", "remove the row, or add the answer to learn")
    return messages


def clean_message(where: str, message: Any, name: str) -> dict:
    """One message without its null fields (Parquet and the Hub fill them in), its content as text."""
    if not isinstance(message, dict):
        raise InputError(f"{where}: `{name}` is {kind_of(message)}", "write an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: `{name}` has the role `{role}`", f"use one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content in (None, "") and role == "assistant" and message.get("tool_calls"):
        content = ""  # a turn that only calls tools says nothing, rightly
    else:
        content = clean_text(where, content, f"{name}.content")
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def from_value(turn: Any) -> Any:
    """A `{from, value}` turn as `{role, content}`; anything else unchanged, for the checks to name."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    return {"role": SPEAKERS.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}


def clean_text(where: str, value: Any, name: str) -> str:
    """`value` when it is text with something in it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: `{name}` is empty", "remove the row, or write the text")
    if not isinstance(value, str):
        raise InputError(f"{where}: `{name}` is {kind_of(value)}", "write text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # `\ud83d` alone is JSON, and no tokenizer takes it
        raise InputError(f"{where}: `{name}` has half a character: {error.reason}", "write it in UTF-8") from error
    return value


def clean_tools(where: str, raw: dict) -> list | None:
    """The tool descriptions of a row: a list, or the same list as JSON text."""
    tools = raw.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{where}: `tools` is not JSON: {error}", "write a list of tool descriptions") from error
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{where}: `tools` is {kind_of(tools)}", "write a list of tool descriptions")
    return tools or None


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_loss_on(row: Row, loss_on: str) -> None:
    """Refuse a loss on turns or completions for a row that has neither."""
    if row.format == "text" and loss_on != "all":
        message = f"{row.where}: a `text` row has no turns, so `loss_on: {loss_on}` cannot be honoured"
        raise InputError(message, "use `loss_on: all`, or write `prompt` + `completion` or `messages` rows")


def split_rows(run: dict) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows. Whole rows are held out, so no turn of a held-out row is trained on."""
    data, inputs = run["experiment"]["data"], run["inputs"]
    held_out = data.get("eval") or {}
    pairs = run["experiment"]["train"].get("method") == "dpo"
    rows = load_rows(inputs["data"], data.get("split") or "train", pairs)
    if "eval_data" in inputs:
        return rows, load_rows(inputs["eval_data"], data.get("split") or "train", pairs)
    if held_out.get("split"):
        if "path" in inputs["data"]:
            message = f"`data.eval.split: {held_out['split']}`, but `{Path(inputs['data']['path']).name}` is one file"
            raise InputError(message, "use `data.eval.fraction`, or a second file as `data.eval.dataset`")
        return rows, load_rows(inputs["data"], held_out["split"], pairs)
    if not held_out.get("fraction"):
        return rows, []
    order = list(range(len(rows)))
    random.Random(run["experiment"]["train"]["seed"]).shuffle(order)
    count = max(1, round(len(rows) * held_out["fraction"]))
    if count >= len(rows):
        message = f"`data.eval.fraction: {held_out['fraction']}` of {len(rows)} rows leaves nothing to train on"
        raise InputError(message, "use more rows, or set `data.eval` to null")
    chosen = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def marked_template(tokenizer: Any) -> str | None:
    """A chat template whose generation markers give the assistant mask and its end marker, or None if TRL has none."""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    try:
        template = get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except ValueError:  # not a template that TRL knows by its exact text: Llama 3.1, Mistral, …
        return None
    return template if is_chat_template_stop_token_trained(tokenizer, template) else None


def encode(row: Row, tokenizer: Any, loss_on: str, marked: str | None) -> list[Example]:
    """The sequences of one row, labelled as `loss_on` says. Several only where a chat template rewrites history.

    Raises:
        InputError: the chat template refuses the row.
    """
    from jinja2 import TemplateError

    try:
        return encode_chat(row, tokenizer, loss_on, marked) if row.is_chat else [encode_text(row, tokenizer, loss_on)]
    except TemplateError as error:
        message = f"{row.where}: the base's chat template refuses this row: {error}"
        raise InputError(message, "change the order or the roles of its turns, or remove the row") from error


def encode_text(row: Row, tokenizer: Any, loss_on: str) -> Example:
    """Plain text, with the end marker that teaches the model to stop."""
    end = tokenizer.eos_token or ""
    text = row.prompt + (row.completion if row.completion.endswith(end) else row.completion + end)
    ids = list(tokenizer(text)["input_ids"])
    start = 0 if loss_on == "all" else common_prefix(list(tokenizer(row.prompt)["input_ids"]), ids)
    return label(row, ids, [(start, len(ids))])


def encode_chat(row: Row, tokenizer: Any, loss_on: str, marked: str | None) -> list[Example]:
    """A conversation: all of it, its completion, or every assistant turn."""

    def render(messages: list[dict], **options: Any) -> Any:
        options = {"tools": row.tools, "tokenize": True, "return_dict": True, **options}
        return tokenizer.apply_chat_template(messages, **options)

    def ids_of(messages: list[dict], **options: Any) -> list[int]:
        return list(render(messages, **options)["input_ids"]) if messages else []

    messages = row.prompt + row.completion
    if loss_on == "all":
        ids = ids_of(messages)
        return [label(row, ids, [(0, len(ids))])]
    if loss_on == "completion" and row.prompt:
        ids = ids_of(messages)
        return [label(row, ids, [(common_prefix(ids_of(row.prompt, add_generation_prompt=True), ids), len(ids))])]
    if loss_on == "assistant" and marked:
        done = render(messages, chat_template=marked, return_assistant_tokens_mask=True)
        kept = zip(done["input_ids"], done["assistant_masks"], strict=True)
        return [Example(row.where, list(done["input_ids"]), [i if mask else IGNORED for i, mask in kept])]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return encode_turns(row, ids_of, messages, turns if loss_on == "assistant" else turns[-1:])


def encode_turns(row: Row, ids_of: Callable, messages: list[dict], turns: list[int]) -> list[Example]:
    """Labels on the given assistant turns: what each adds to the prompt before it.

    Where every prompt is a beginning of the whole conversation, one sequence holds all turns: the same loss as one
    sequence per turn, without paying for the history again and again. A template that rewrites history (Qwen 3 drops
    earlier thoughts) gets one sequence per turn.
    """
    pairs = [(ids_of(messages[:turn], add_generation_prompt=True), ids_of(messages[: turn + 1])) for turn in turns]
    whole = pairs[-1][1]
    if all(whole[: len(upto)] == upto and upto[: len(prompt)] == prompt for prompt, upto in pairs):
        return [label(row, whole, [(len(prompt), len(upto)) for prompt, upto in pairs])]
    return [label(row, upto, [(common_prefix(prompt, upto), len(upto))]) for prompt, upto in pairs]


def common_prefix(left: Any, right: Any) -> int:
    """How many tokens, characters or messages two sequences share at their start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def label(row: Row, ids: list[int], spans: list[tuple[int, int]]) -> Example:
    """`ids` with labels on the spans alone."""
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Example(row.where, ids, labels)


def encode_rows(rows: list[Row], tokenizer: Any, loss_on: str) -> list[Example]:
    """All sequences of all rows, uncut."""
    marked = marked_template(tokenizer) if loss_on == "assistant" and rows[0].is_chat else None
    examples: list[Example] = []
    shown = time.monotonic()
    for done, row in enumerate(rows, 1):
        examples += encode(row, tokenizer, loss_on, marked)
        if done == len(rows) or time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            emit("progress", done=done, total=len(rows), unit="rows tokenized")
    return examples


def encode_pairs(rows: list[Row], tokenizer: Any, encode: Callable = encode_rows) -> list[tuple[Example, Example]]:
    """The chosen and the rejected answer of every row, each behind its prompt, uncut."""
    answers = [answer for row in rows for answer in (row, dataclasses.replace(row, completion=row.rejected))]
    examples = encode(answers, tokenizer, "completion")
    return list(zip(examples[::2], examples[1::2], strict=True))


# --- end shared: data rows ---


def main() -> None:
    """Read rows and prompts, ask both models, write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="path of a run.json of stage `evaluate`")
    run, started = load_run(parser.parse_args().run, "evaluate"), time.time()
    emit("start", stage="evaluate", run_id=run["run_id"])
    begin(run)
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    prompts = load_prompts(Path(run["inputs"]["prompts"]["path"])) if "prompts" in run["inputs"] else {}
    emit("phase", name="read data")
    train_rows, eval_rows = split_rows(run)
    if not eval_rows and not prompts:
        hint = "set `data.eval.fraction`, or `evaluate.prompts` to a JSON lines file of prompts"
        raise InputError("nothing to evaluate: no held-out rows and no prompts", hint)
    if eval_rows:
        check_loss_on(eval_rows[0], run["experiment"]["train"]["loss_on"])
    folders = {"before": fetch_model(run["inputs"]["base"]), "after": fetch_model(run["inputs"]["tuned"])}
    fresh_output(run)
    evaluate(run, folders, eval_rows, prompts, train_rows[0].is_chat, started)


def evaluate(
    run: dict, folders: dict[str, Path], eval_rows: list[Row], prompts: dict[str, Any], chat: bool, started: float
) -> None:
    """Everything that needs the heavy libraries. The manifest comes last."""
    import torch
    from transformers import AutoTokenizer

    if run["device"] == "auto":
        run["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if run["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError("`device: cuda`, but torch sees no GPU", "choose a GPU flavor, or check its driver")
    emit("phase", name="tokenize")
    tokenizer = AutoTokenizer.from_pretrained(folders["before"])  # one for both: the same tokens, or no comparison
    tokenizer.chat_template = tokenizer.chat_template or stored_template(folders["before"])
    if (chat or any(isinstance(prompt, list) for prompt in prompts.values())) and not tokenizer.chat_template:
        raise InputError(f"`{folders['before']}` has no chat template", "use an instruction-tuned base, or plain text")
    settings = run["experiment"]["train"]
    examples, rejected = encode_held_out(settings, eval_rows, tokenizer) if eval_rows else ([], [])
    if eval_rows and not examples:
        message = f"no held-out row has a trained token within `max_length: {settings['max_length']}`"
        raise InputError(message, "use a larger `train.max_length`")
    questions = [encode_prompt(where, prompt, tokenizer, chat) for where, prompt in prompts.items()]
    results: dict[str, tuple] = {}
    ahead: list[float] | None = None  # by how much the base prefers each chosen answer
    for moment, folder in folders.items():
        emit("phase", name=f"load {moment}", detail=folder.name)
        model = load_model(folder, run["device"])
        scores, likely = score(model, examples, moment) if examples else (None, [])
        worse, unlikely = score(model, rejected, moment) if rejected else ({}, [])
        told = answer(model, tokenizer, questions, run["experiment"]["evaluate"]["max_new_tokens"])
        if rejected:
            scores = {"loss_chosen": scores["loss"], "loss_rejected": worse["loss"]}
            scores |= preferences(settings["dpo"]["beta"], likely, unlikely, ahead)
            ahead = [one - other for one, other in zip(likely, unlikely, strict=True)]
        results[moment] = scores, told
        del model  # before the next one is loaded
        gc.collect()
        torch.cuda.empty_cache()
    finish(run, started, results, examples, len(eval_rows), list(prompts.values()))


def encode_held_out(settings: dict, rows: list[Row], tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """What is scored of the held-out rows; of pairs the chosen answers, and the rejected ones in the same order."""
    limit = settings["max_length"]
    if settings.get("method") != "dpo":
        examples = (example.cut(limit) for example in encode_rows(rows, tokenizer, settings["loss_on"]))
        return [example for example in examples if example.trained()], []
    pairs = [(chosen.cut(limit), rejected.cut(limit)) for chosen, rejected in encode_pairs(rows, tokenizer)]
    pairs = [pair for pair in pairs if pair[0].trained() and pair[1].trained() and pair[0].ids != pair[1].ids]
    return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]


def preferences(beta: float, chosen: list[float], rejected: list[float], before: list[float] | None) -> dict:
    """For which part of the pairs the chosen answer is the likelier, and what rewards it got beyond `before`.

    A reward is `beta` times what an answer's log-likelihood gained over the base: nothing for the base itself.
    """
    ahead = [one - other for one, other in zip(chosen, rejected, strict=True)]
    found = {"prefers_chosen": round(sum(lead > 0 for lead in ahead) / len(ahead), 6), "reward_margin": 0.0}
    if before is None:
        return found
    margins = [beta * (lead - old) for lead, old in zip(ahead, before, strict=True)]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    return found | {"reward_margin": round(sum(margins) / len(margins), 6), "reward_accuracy": round(accuracy, 6)}


def finish(run: dict, started: float, results: dict, examples: list[Example], rows: int, prompts: list[Any]) -> None:
    """Write the comparison."""
    (before, answers_before), (after, answers_after) = results["before"], results["after"]
    change = round(100 * (after["loss"] / before["loss"] - 1), 3) if before and before.get("loss") else None
    metrics = {"before": before, "after": after, "loss_change_percent": change}
    metrics |= {"tokens": sum(example.trained() for example in examples), "rows": rows}
    samples = zip(prompts, answers_before, answers_after, strict=True)
    write_manifest(
        run,
        started,
        metrics=metrics,
        samples=[{"prompt": prompt, "before": old, "after": new} for prompt, old, new in samples],
        measured={"peak_memory_gib": peak_memory_gib(run["device"]), "duration_s": round(time.time() - started, 1)},
        versions=versions("torch", "transformers", "trl"),
    )
    known = [(moment, scores) for moment, scores in (("before", before), ("after", after)) if scores]
    headline = {f"loss_{moment}": scores["loss"] for moment, scores in known if "loss" in scores}
    headline |= {f"prefers_chosen_{moment}": s["prefers_chosen"] for moment, s in known if "prefers_chosen" in s}
    emit("end", stage="evaluate", duration_s=round(time.time() - started, 1), **headline, samples=len(prompts))


def load_prompts(path: Path) -> dict[str, Any]:
    """The prompts of a JSON lines file by line: text, or lists of messages that end before the answer.

    Raises:
        InputError: no rows, or a row that is neither `{"prompt": text}` nor `{"messages": […]}`; names the line.
    """
    prompts: dict[str, Any] = {}
    for where, raw in read_jsonl(path):
        if isinstance(raw, dict) and "messages" in raw:
            prompts[where] = clean_messages(where, raw["messages"], "messages", answered=False)
            if prompts[where][-1]["role"] == "assistant":
                raise InputError(f"{where}: the last message is the assistant's", "end with the question to answer")
        elif isinstance(raw, dict) and "prompt" in raw:
            prompts[where] = clean_text(where, raw["prompt"], "prompt")
        else:
            raise InputError(f"{where}: neither `prompt` nor `messages`", 'write {"prompt": "…"}, one per line')
    if not prompts:
        raise InputError(f"`{path.name}` holds no prompts", 'write {"prompt": "…"}, one per line')
    return prompts


def fetch_model(source: dict) -> Path:
    """The folder of a model; from the Hub at its revision, without second copies of the weights."""
    if "repo" in source:
        return download(source, allow_patterns=MODEL_FILES, ignore_patterns=IGNORED_FILES)
    folder = Path(source["path"])
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(f"`{folder}` is not a model folder", "it needs config.json and .safetensors files")
    return folder


def stored_template(folder: Path) -> str | None:
    """The chat template that older vision-language repos keep in a file of its own."""
    path = folder / "chat_template.json"
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"] if path.is_file() else None


def load_model(folder: Path, device: str) -> Any:
    """The model in bfloat16, in the class that its config names, with TRL's head that never builds full logits."""
    import torch
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures", [""])[0]
    model_class = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
    add_fused_lm_head(model)
    return model


def score(model: Any, examples: list[Example], moment: str) -> tuple[dict, list[float]]:
    """Mean loss per token in nats and its perplexity, over the trained tokens and over all tokens.

    And the log-likelihood of each example's trained tokens.
    """
    import torch

    emit("phase", name=f"evaluate {moment}")
    whole = {example.where: number for number, example in enumerate(examples)}  # the last of a row holds all of it
    summed, count, shown = {"loss": 0.0, "loss_all_tokens": 0.0}, {"loss": 0, "loss_all_tokens": 0}, time.monotonic()
    likelihoods = []
    for number, example in enumerate(examples):
        ids = torch.tensor([example.ids], device=model.device)
        trained = torch.tensor([example.labels], device=model.device)[:, 1:] != IGNORED
        with torch.inference_mode():
            losses = -model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.double()
        likelihoods.append(-losses[trained].sum().item())
        summed["loss"], count["loss"] = summed["loss"] - likelihoods[-1], count["loss"] + int(trained.sum())
        if whole[example.where] == number:
            summed["loss_all_tokens"] += losses.sum().item()
            count["loss_all_tokens"] += losses.numel()
        if number + 1 == len(examples) or time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            emit("progress", done=number + 1, total=len(examples), unit="rows scored")
    means = {name: summed[name] / count[name] for name in summed}
    if not all(math.isfinite(mean) for mean in means.values()):
        fail(f"the loss {moment} the training is not a number", "check the weights of that model for NaN")
    means = {name: round(mean, 6) for name, mean in means.items()}
    means |= {name.replace("loss", "perplexity"): round(math.exp(mean), 4) for name, mean in means.items()}
    return means, likelihoods


def encode_prompt(where: str, prompt: Any, tokenizer: Any, chat: bool) -> list[int]:
    """The tokens of one prompt. Text is one user turn, unless the training data is plain text too.

    Raises:
        InputError: the chat template refuses the prompt.
    """
    from jinja2 import TemplateError

    if isinstance(prompt, str) and not chat:
        return list(tokenizer(prompt)["input_ids"])
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    try:
        return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])
    except TemplateError as error:
        message = f"{where}: the base's chat template refuses this prompt: {error}"
        raise InputError(message, "change the order or the roles of its messages") from error


def answer(model: Any, tokenizer: Any, questions: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers to prompts of token ids, without special tokens."""
    import torch
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A fresh config: the base's own may sample, or penalise repetition.
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad)
    answers: list[str] = []
    shown = time.monotonic()
    if questions:
        emit("phase", name="generate")
    for question in questions:
        ids = torch.tensor([question], device=model.device)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        answers.append(tokenizer.decode(output[0, len(question) :], skip_special_tokens=True).strip())
        if len(answers) == len(questions) or time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            emit("progress", done=len(answers), total=len(questions), unit="prompts answered")
    return answers


def fail(message: str, hint: str) -> None:
    """Exit with code 1: neither a bug nor the caller's input."""
    emit("error", message=message, hint=hint)
    print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
    raise SystemExit(1)


def peak_memory_gib(device: str) -> float:
    """What torch allocated at most on the GPU, or the process's largest resident set on the CPU."""
    import torch

    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_IN_A_GIB, 3)


if __name__ == "__main__":
    raise SystemExit(guarded(main))
