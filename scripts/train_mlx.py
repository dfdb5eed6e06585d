# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "datasets==5.2.0",
#   "httpx2==2.16.2",
#   "huggingface_hub==2.4.0",
#   "jinja2==3.1.6",
#   "mlx[cpu]==0.32.4",
#   "mlx-lm==0.32.2",
#   "numpy==2.4.6",
#   "pyarrow==26.0.1",
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "trl==1.16.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Fine-tune one base on one data set with MLX: LoRA or DoRA, on a Mac with Apple Silicon, or on the CPU of a Linux PC.

    python scripts/train_mlx.py runs/quickstart/train/run.json

The argument is a resolved `run.json` (stage `train`), the same as train_sft.py's. MLX takes the GPU of a Mac and the
CPU elsewhere; the request's `device` is for torch. Rows, tokens, labels, order, learning rate and the loss (a mean over
all trained tokens of a step) are those of train_sft.py; what MLX has no word for is refused by name.

With `inputs.mlx_base` the training reads that base, which may be quantised, and `inputs.base` says into which one the
adapter will be merged. The artifact is a PEFT adapter, MLX's own files are under `mlx/`, `manifest.json` comes last.

Killed runs go on from the last complete checkpoint in `work/checkpoints`; checkpoints stay on this machine.
Exit codes: 0 done, or another job does it, 1 training failed (not a number, or nothing learned) or a bug, 2 the
caller's input, 3 the Hub did not take the result, 130 interrupted.
"""

import argparse
import dataclasses
import difflib
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
from importlib import metadata, util
from pathlib import Path
from typing import Any

# `train.sft` is honoured in these, with these values (two numbers: from the first, below the second) …
SFT = {
    "optim": ("adamw_torch_fused", "adamw_torch"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, 1),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "gradient_checkpointing": (True, False),
}
# … and says twice what an experiment field of its own says in these.
FIELD_OF = {
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "max_length": "train.max_length",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "learning_rate": "train.learning_rate",
    "completion_only_loss": "train.loss_on",
    "assistant_only_loss": "train.loss_on",
    "packing": "train.packing",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "save_steps": "train.save_steps",
    "report_to": "train.tracking",
    "hub_model_id": "output.repo",
}
BASE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Second copies of the weights in Mistral's and Meta's repos: as large as the base, and never read.
BASE_IGNORED = (".mergetune/*", "consolidated*", "original/*")
# What two forms of one base have in common, in their config.json.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "num_experts", "num_local_experts")
PROBES = (
    "The quick brown fox: 3.14 < 42!",
    "def f(x):\n\treturn x  # naïve café",
    "日本語 🙂 привет",
    "<s>[INST] </s>",
)
GRACE_S = 20  # a step may take this long after SIGTERM; the Hub kills 30 s after it asks


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


# --- shared: mlx adapter. The same lines stand in train_mlx.py and convert_adapter.py; a test compares them. ---
PEFT_PREFIX = "base_model.model."
# One layer is `model.layers.0…`, `language_model.model.layers.0…` or `model.language_model.layers.0…`, by who names it.
WRAPPERS = {"model", "language_model", "text_model"}
# numpy has no bfloat16: its two bytes are moved, and never computed with.
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Keys of PEFT's adapter_config.json that say nothing about the weights, or that are read below.
HARMLESS = """
auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules inference_mode
init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core
peft_type peft_version qalora_group_size r revision target_modules task_type use_dora use_rslora
"""
NOT_CARRIED = {
    "rank_pattern": "an MLX adapter has one rank",
    "alpha_pattern": "an MLX adapter has one scale",
    "modules_to_save": "an MLX adapter has no modules that are trained whole",
    "trainable_token_indices": "an MLX adapter has no single rows of the embeddings",
    "target_parameters": "experts are stacked differently in MLX",
    "lora_bias": "MLX's LoRA layers have no bias",
    "fan_in_fan_out": "MLX stores these layers the other way round",
}
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Where LoRA also finds linear layers, and text never passes; MLX leaves these parts of a base out.
NOT_TEXT = r".*(vision|visual|image|audio|multi_modal_projector|mm_projector|connector).*"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file; bfloat16 as plain 16-bit numbers."""

    dtype: str
    values: Any

    def turned(self) -> "Tensor":
        return Tensor(self.dtype, self.values.T)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The base that an adapter is for: its config, and the shapes of its weights by their names on disk."""

    folder: Path
    config: dict
    shapes: dict[str, tuple[int, ...] | None]  # None: the index names it, the file is not here

    def text_config(self) -> dict:
        return self.config.get("text_config") or self.config

    def modules(self) -> dict[str, str]:
        """The name on disk of each module, by its name without wrappers."""
        return {bare(name): name for name in (n.removesuffix(".weight") for n in self.shapes if n.endswith(".weight"))}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in neither layout. `parts`: by bare module name `a` (rank × in), `b` (out × rank), DoRA's `m`."""

    rank: int
    scale: float
    dropout: float
    dora: bool
    parts: dict[str, dict[str, Tensor]]
    rslora: bool = False


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_header(path: Path) -> tuple[dict, int]:
    """The tensors that a safetensors file promises, and where their bytes begin. Raises InputError if it is cut off."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length if length < size else 0))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"`{path}` has no readable safetensors header", "fetch that file again") from None
    if size != end:
        raise InputError(f"`{path}` is truncated: {size} of {end} bytes", "fetch that file again")
    return header, 8 + length


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        InputError: no such file, not whole, or with numbers of another type than adapters have.
    """
    import numpy

    if not path.is_file():
        raise InputError(f"`{path.parent}` has no {path.name}", "give the folder of an adapter, with all its files")
    header, start = read_header(path)
    content, tensors = path.read_bytes(), {}
    for name, entry in header.items():
        if entry["dtype"] not in NUMPY_TYPES:
            message = f"`{name}` in `{path}` is stored as `{entry['dtype']}`"
            raise InputError(message, f"save it as one of: {', '.join(NUMPY_TYPES)}")
        first, last = entry["data_offsets"]
        flat = numpy.frombuffer(content[start + first : start + last], NUMPY_TYPES[entry["dtype"]])
        tensors[name] = Tensor(entry["dtype"], flat.reshape(entry["shape"]))
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], made_for: str) -> None:
    """A safetensors file, its tensors by name; `made_for` is what its readers look for."""
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    chunks, position = [], 0
    for name, tensor in sorted(tensors.items()):
        chunks.append(tensor.values.tobytes())  # rows first, also of a matrix that was turned
        offsets = [position, position + len(chunks[-1])]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.values.shape), "data_offsets": offsets}
        position = offsets[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(chunks))


def bare(name: str) -> str:
    """A module's name without the wrappers that libraries put around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def layer_of(module: str) -> tuple[int, str] | None:
    """Number of the layer and name in it, or None for a module that is in no layer."""
    found = re.fullmatch(r"(?:.+\.)?layers\.(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else None


def quantization_of(config: dict) -> dict | None:
    """`bits` and `group_size` of a base that MLX quantised, else None."""
    found = config.get("quantization") or (config.get("text_config") or {}).get("quantization")
    return {key: found.get(key) for key in ("bits", "group_size")} if found else None


def read_weights(folder: Path) -> Weights:
    """What an adapter is for. Raises InputError unless it is an unquantised base in Hugging Face's layout."""
    config = read_json(folder / "config.json")
    if not config:
        raise InputError(f"the base `{folder}` has no readable config.json", "give the folder of a Hugging Face base")
    text = config.get("text_config") or {}
    if found := quantization_of(config):
        message = (
            f"the base `{folder}` is quantised by MLX ({found['bits']} bits, groups of {found['group_size']}), and "
        )
        message += "an adapter is merged into full weights"
        raise InputError(message, f"give {original_of(folder)}")
    if "quantization_config" in config or "quantization_config" in text:
        raise InputError(f"the base `{folder}` is quantised already", f"give {original_of(folder)}")
    index = read_json(folder / "model.safetensors.index.json").get("weight_map") or {}
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(index)
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}
    return Weights(folder, config, shapes)


def original_of(folder: Path) -> str:
    """The base that a quantised one was made from, in words: by the name on its card where it has one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        card = ""
    named = re.search(r"(?m)^base_model:\s*(?:\n- )?([\w.-]+/[\w.-]+)\s*$", card.partition("\n---")[0])
    return f"`{named[1]}`, the base it was made from" if named else "the bfloat16 base it was made from"


def read_mlx(folder: Path, weights: Weights) -> Adapter:
    """An adapter that MLX trained.

    Raises:
        InputError: it is none, or it has what PEFT cannot carry, or it is for another base.
    """
    config = read_json(folder / "adapter_config.json")
    if "peft_type" in config:
        raise InputError(f"`{folder}` is a PEFT adapter", "it needs no conversion to PEFT; `to-mlx` is the other way")
    kind, chosen = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind not in ("lora", "dora"):
        raise InputError(
            f"`{folder}`: `fine_tune_type` is `{kind}`, which is no adapter", "train with `lora` or `dora`"
        )
    if missing := {"rank", "scale"} - set(chosen):
        message = f"`{folder}`: adapter_config.json has no `lora_parameters.{min(missing)}`"
        raise InputError(message, "give the folder that `mlx_lm.lora` wrote, with its adapter_config.json")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / "adapters.safetensors").items():
        found = re.fullmatch(r"(.+)\.(?:lora_([ab])|(m))", name)
        if not found:
            raise InputError(f"`{name}` is trained whole, which PEFT has no place for here", "train with LoRA alone")
        if found[2] and tensor.values.ndim != 2:
            message = f"`{name}` is for experts that MLX stacks, and PEFT's layout differs"
            raise InputError(message, "train without `switch_mlp` in `lora_parameters.keys`")
        parts.setdefault(bare(found[1]), {})[found[2] or found[3]] = tensor.turned() if found[2] else tensor
    dropout = float(chosen.get("dropout", 0.0))
    adapter = Adapter(int(chosen["rank"]), float(chosen["scale"]), dropout, kind == "dora", parts)
    check_adapter(adapter, weights)
    return adapter


def read_peft(folder: Path, weights: Weights) -> Adapter:
    """An adapter that PEFT saved.

    Raises:
        InputError: it is none, or it has what MLX cannot carry, or it is for another base.
    """
    config = read_json(folder / "adapter_config.json")
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise InputError(f"`{folder}` is an MLX adapter", "it needs no conversion to MLX; `to-peft` is the other way")
    for key, only in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(key) != only:
            message = f"`{folder}`: `{key}` is `{config.get(key)}`, and MLX knows only `{only}`"
            raise InputError(message, f"train with `{key}: {only}`, or use the adapter with PEFT")
    for key in sorted(set(config) - set(HARMLESS.split())):
        if config[key]:
            reason = NOT_CARRIED.get(key, "MLX has no word for it")
            raise InputError(f"`{folder}`: `{key}` is set, and {reason}", f"train without `{key}`")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGED_BASE_INITS):
        message = f"`{folder}`: `init_lora_weights` is `{config['init_lora_weights']}`, which changed the base"
        raise InputError(message, "train with the default, or save it with `path_initial_model_for_weight_conversion`")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.(?:lora_([AB])\.weight|lora_(m)agnitude_vector)", name)
        if not found:
            raise InputError(
                f"`{name}` is neither half of a LoRA layer, and MLX has no place for it", "train without it"
            )
        parts.setdefault(bare(found[1]), {})[found[2].lower() if found[2] else found[3]] = tensor
    rank, rslora = int(config["r"]), bool(config.get("use_rslora"))
    scale = config["lora_alpha"] / (math.sqrt(rank) if rslora else rank)
    dropout, dora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_dora"))
    adapter = Adapter(rank, scale, dropout, dora, parts, rslora)
    check_adapter(adapter, weights)
    return adapter


def check_adapter(adapter: Adapter, weights: Weights) -> None:
    """Raise InputError unless every part of the adapter is there and fits a layer of the base."""
    known, wanted = weights.modules(), {"a", "b", *("m" if adapter.dora else "")}
    if not adapter.parts:
        raise InputError("the adapter holds no tensors", "look at its training: it saved nothing")
    for module, parts in adapter.parts.items():
        if layer_of(module) is None or re.fullmatch(NOT_TEXT, module):
            message = f"the adapter changes `{module}`, which is no linear layer of the base's text layers"
            raise InputError(message, "train without embeddings, output layer and vision tower")
        if parts.keys() != wanted:
            odd = min(parts.keys() ^ wanted)
            raise InputError(f"the adapter's `{module}` lacks `{odd}`, or has it too much", "fetch the adapter again")
        if known and module not in known:
            message = f"`{module}` of the adapter is no layer of the base `{weights.folder}`"
            raise InputError(message, "give the base that it was trained on; layers that MLX joins cannot be carried")
        shape = weights.shapes.get(f"{known.get(module, module)}.weight")
        made = (parts["b"].values.shape[0], parts["a"].values.shape[1])
        ranks = {parts["b"].values.shape[1], parts["a"].values.shape[0], adapter.rank}
        if (shape and made != shape) or len(ranks) > 1 or (adapter.dora and parts["m"].values.shape != made[:1]):
            message = f"`{module}` of the adapter is for {list(made)} with rank {min(ranks)} to {max(ranks)}, the base "
            message += f"has {list(shape or made)}, its config rank {adapter.rank}"
            raise InputError(message, "give the base that it was trained on")


def named_as(module: str, weights: Weights, wrapper: str) -> str:
    """The full name of a module: as on disk, or with the given wrapper where a vision-language base has one."""
    name = weights.modules().get(module, f"model.{module}")
    return f"{wrapper}.{module}" if "language_model" in name.split(".") or "text_config" in weights.config else name


def write_mlx(adapter: Adapter, weights: Weights, folder: Path) -> None:
    """`adapters.safetensors` and `adapter_config.json` as `mlx_lm` reads them."""
    tensors: dict[str, Tensor] = {}
    for module, parts in adapter.parts.items():
        name = named_as(module, weights, "language_model.model")
        tensors |= {f"{name}.lora_{half}": parts[half].turned() for half in ("a", "b")}
        tensors |= {f"{name}.m": parts["m"]} if adapter.dora else {}
    places = [place for module in adapter.parts if (place := layer_of(module))]
    first = min(number for number, _ in places)
    chosen = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout}
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": weights.text_config()["num_hidden_layers"] - first,
        "lora_parameters": chosen | {"keys": sorted({name for _, name in places})},
    }
    write_tensors(folder / "adapters.safetensors", tensors, "mlx")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_peft(adapter: Adapter, weights: Weights, folder: Path, model: str, revision: str | None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` as PEFT and merge_adapter.py read them."""
    tensors: dict[str, Tensor] = {}
    for module, parts in adapter.parts.items():
        name = PEFT_PREFIX + named_as(module, weights, "model.language_model")
        tensors |= {f"{name}.lora_{half.upper()}.weight": parts[half] for half in ("a", "b")}
        tensors |= {f"{name}.lora_magnitude_vector": parts["m"]} if adapter.dora else {}
    places = [place for module in adapter.parts if (place := layer_of(module))]
    numbers = sorted({number for number, _ in places})
    alpha = adapter.scale * (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_modules": sorted({name.rpartition(".")[2] for _, name in places}),
        "exclude_modules": NOT_TEXT if "vision_config" in weights.config else None,
        "layers_to_transform": None if len(numbers) == weights.text_config()["num_hidden_layers"] else numbers,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, "pt")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- end shared: mlx adapter ---


class TrainingFailed(Exception):
    """The training went wrong, by no bug and no malformed input. Exit code 1."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the experiment says about LoRA and the optimizer, in MLX's terms."""

    rank: int
    scale: float
    dropout: float
    dora: bool
    targets: str | list[str]
    last_layers: int | None  # None: all
    schedule: str
    warmup: float  # steps, or below 1 a part of all steps
    decay: float
    max_norm: float
    betas: tuple[float, float]
    epsilon: float
    checkpointing: bool


def main() -> None:
    """Check what is cheap to check, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="path of a run.json of stage `train`")
    run, started = load_run(parser.parse_args().run, "train"), time.time()
    emit("start", stage="train", run_id=run["run_id"])
    begin(run)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    choices = read_choices(run)
    require_mlx()
    base, trained_base = fetch_bases(run)
    check_bases(run, base, trained_base)
    emit("phase", name="read data")
    train_rows, eval_rows = split_rows(run)
    check_rows(run, base, [train_rows[0], *eval_rows[:1]])
    # Three checkpoints of an adapter and its optimizer, and the result: a few per cent of the base.
    size = sum(path.stat().st_size for path in trained_base.glob("*.safetensors"))
    require_disk(fresh_output(run), size // 4)
    try:
        train(run, choices, (base, trained_base), (train_rows, eval_rows), started)
    except TrainingFailed as error:
        emit("error", message=error.message, hint=error.hint)
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(1) from error


def train(
    run: dict, choices: Choices, bases: tuple[Path, Path], rows: tuple[list[Row], list[Row]], started: float
) -> None:
    """Everything that needs the heavy libraries, in order. The manifest comes last."""
    (base, trained_base), (train_rows, eval_rows) = bases, rows
    write_mlx_rows(run, {"train": train_rows, "valid": eval_rows})
    emit("phase", name="tokenize")
    tokenizer = load_tokenizer(base)
    if trained_base != base:
        check_same_tokenizer(tokenizer, load_tokenizer(trained_base), trained_base)
    train_set, counts = tokenize(run, tokenizer, train_rows)
    eval_set, _ = tokenize(run, tokenizer, eval_rows) if eval_rows else ([], {})
    emit("phase", name="load base", detail=trained_name(run))
    model, keys, total_parameters = load_model(run, trained_base, choices)
    training = Training(run, model, choices, train_set, eval_set)
    emit("phase", name="train", detail=f"{training.total} steps")
    run_training(run, training)
    emit("phase", name="save")
    check_weights(model)
    save(run, choices, training, keys, base, trained_base)
    metrics = collect_metrics(training, total_parameters)
    metrics |= {"rows": len(train_rows), "eval_rows": len(eval_rows), **counts}
    write_card(run, metrics, trained_base)
    write_manifest(
        run,
        started,
        inputs=hashed_inputs(run),
        metrics=metrics,
        history=training.log,
        eval_history=training.evals,
        measured={"peak_memory_gib": memory_gib(), "duration_s": round(time.time() - started, 1)},
        resumed_from_step=training.first_step,
        seed=run["experiment"]["train"]["seed"],
        trained_on=trained_on(run, trained_base),
        warnings=run.get("warnings", []),
        versions=versions("mlx", "mlx-lm", "transformers", "trl", "datasets"),
    )
    shutil.rmtree(checkpoints(run), ignore_errors=True)
    headline = {key: metrics[key] for key in ("steps", "train_loss", "eval_loss", "tokens_per_s")}
    emit("end", stage="train", duration_s=round(time.time() - started, 1), **headline)


# What the experiment asks for: honoured, or refused by name


def read_choices(run: dict) -> Choices:
    """The choices in MLX's terms.

    Raises:
        InputError: a field that MLX has no word for, or a `train.sft` key that is unknown, not free or badly set.
    """
    chosen = run["experiment"]["train"]
    refuse_fields(chosen)
    check_sft(chosen["sft"])
    lora, sft = chosen["lora"], chosen["sft"]
    # Recomputed, a layer draws its dropout again (mlx_lm 0.32.2): the gradient would be that of another model.
    can_recompute = not lora["dropout"]
    if sft.get("gradient_checkpointing") and not can_recompute:
        message = f"`train.sft.gradient_checkpointing: true` with `train.lora.dropout: {lora['dropout']}` gives wrong "
        raise InputError(
            message + "gradients in MLX", "set `train.lora.dropout: 0`, or remove `gradient_checkpointing`"
        )
    return Choices(
        rank=lora["r"],
        scale=lora["alpha"] / (math.sqrt(lora["r"]) if lora["rslora"] else lora["r"]),
        dropout=lora["dropout"],
        dora=lora["dora"],
        targets=lora["targets"],
        last_layers=(chosen.get("mlx") or {}).get("num_layers") or None,
        schedule=sft.get("lr_scheduler_type", "linear"),
        warmup=sft.get("warmup_steps", 0),
        decay=sft.get("weight_decay", 0.0),
        max_norm=sft.get("max_grad_norm", 1.0) or math.inf,
        betas=(sft.get("adam_beta1", 0.9), sft.get("adam_beta2", 0.999)),
        epsilon=sft.get("adam_epsilon", 1e-8),
        checkpointing=sft.get("gradient_checkpointing", can_recompute),
    )


def refuse_fields(chosen: dict) -> None:
    """Raise InputError for a field of `train` that MLX has no word for; all others are honoured."""
    lora, script = chosen["lora"] or {}, chosen["script"]
    torch = "or train with torch"
    refused = [
        ("method", chosen["method"] in ("full", "dpo"), f"use `method: lora`, {torch}"),
        ("packing", chosen["packing"], f"set `packing: false`, {torch}"),
        ("tracking", chosen["tracking"] != "none", "set `tracking: none`; the manifest holds every logged step"),
        ("script", script and Path(script).name != Path(__file__).name, f"remove `script`, {torch}"),
        ("lora.exclude", lora.get("exclude"), f"name what to train in `lora.targets` instead, {torch}"),
        ("lora.modules_to_save", lora.get("modules_to_save"), f"remove it, {torch}"),
        ("lora.rank_pattern", lora.get("rank_pattern"), f"use one `lora.r`, {torch}"),
        ("lora.alpha_pattern", lora.get("alpha_pattern"), f"use one `lora.alpha`, {torch}"),
        ("lora.targets", "lm_head" in lora.get("targets", []), "remove `lm_head` from it"),
    ]
    for field, is_set, hint in refused:
        if is_set:
            value = chosen["lora"][field[5:]] if field.startswith("lora.") else chosen[field]
            raise InputError(f"`train.{field}: {json.dumps(value)}` cannot be honoured with MLX", hint)


def check_sft(sft: dict) -> None:
    """Raise InputError for a key of `train.sft` that MLX training does not honour, or for a value out of range."""
    for key, value in sft.items():
        if key in FIELD_OF:
            raise InputError(f"`train.sft.{key}` is not free", f"use `{FIELD_OF[key]}`")
        if key not in SFT:
            near = difflib.get_close_matches(key, SFT, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"remove it, or train with torch; known: {', '.join(SFT)}"
            raise InputError(f"`train.sft.{key}` cannot be honoured with MLX", hint)
        if type(SFT[key][0]) is int:
            least, below = SFT[key]
            is_good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below
            said = f"a number from {least}" + (f", below {below}" if math.isfinite(below) else "")
        else:
            is_good = type(value) is type(SFT[key][0]) and value in SFT[key]
            said = " or ".join(map(json.dumps, SFT[key]))
        if not is_good:
            raise InputError(f"`train.sft.{key}: {json.dumps(value)}` cannot be honoured with MLX", f"use {said}")


# Before anything heavy is imported: is the base whole, do the rows suit it?


def require_mlx() -> None:
    """Raise InputError where MLX is not installed: on Windows, and on Macs with Intel's processors, it cannot be."""
    missing = [name for name, module in (("mlx", "mlx.core"), ("mlx-lm", "mlx_lm")) if not is_installed(module)]
    if missing:
        hint = 'pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2, on a Mac with Apple Silicon or on Linux'
        raise InputError(f"`{missing[0]}` is not installed for `{sys.executable}`", hint)


def is_installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False


def fetch_bases(run: dict) -> tuple[Path, Path]:
    """The folders of the base that the adapter is for, and of the one to train on; often the same."""
    source, other = run["inputs"]["base"], run["inputs"].get("mlx_base")
    if other is None:
        base = fetch_base(source, BASE_FILES)
        return base, base
    small = tuple(pattern for pattern in BASE_FILES if pattern != "*.safetensors")
    return fetch_base(source, small), fetch_base(other, BASE_FILES)


def fetch_base(source: dict, patterns: tuple[str, ...]) -> Path:
    """The folder of a base; from the Hub at its revision, without second copies of the weights."""
    if "path" in source:
        return Path(source["path"])
    return download(source, allow_patterns=patterns, ignore_patterns=BASE_IGNORED)


def check_bases(run: dict, base: Path, trained: Path) -> None:
    """Raise InputError for a base that cannot be trained or merged into, or for two that are not one model."""
    weights = read_weights(base)  # refuses a base that is no target of a merge
    config = read_json(trained / "config.json")
    if not config:
        raise InputError(f"the base `{trained}` has no readable config.json", "give an MLX or Hugging Face model")
    quantised = quantization_of(config)
    if "quantization_config" in config and not quantised:
        raise InputError(f"the base `{trained}` is quantised, and not by MLX", "give its bfloat16 original")
    if run["experiment"]["train"]["method"] == "qlora" and not quantised:
        message = f"`train.method: qlora`, but `{trained_name(run)}` is not quantised"
        raise InputError(message, "give a base that MLX quantised, such as one of mlx-community, or use `method: lora`")
    if quantised and run["experiment"]["train"]["lora"]["dora"] and 32 % quantised["bits"]:
        message = (
            f"`train.lora.dora: true` on `{trained_name(run)}` of {quantised['bits']} bits: mlx_lm 0.32.2 takes its "
        )
        raise InputError(message + "layers for narrower ones", "set `dora: false`, or give a base of 4 or 8 bits")
    check_shards(trained)
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")):
        raise InputError(f"the base `{base}` has no tokenizer", "give a base with tokenizer.json")
    ours, theirs = weights.text_config(), config.get("text_config") or config
    for key in SHAPE:
        if ours.get(key) != theirs.get(key) and not (key == "model_type" and None in (ours.get(key), theirs.get(key))):
            message = (
                f"`{trained_name(run)}` has `{key}: {theirs.get(key)}`, `{run['experiment']['base']['model']}` has "
            )
            raise InputError(f"{message}`{ours.get(key)}`", "give the MLX form of the same base")
    if quantised:
        message = (
            f"the adapter is trained against `{trained_name(run)}`, quantised to {quantised['bits']} bits in groups "
        )
        message += f"of {quantised['group_size']}; the merge puts it into `{run['experiment']['base']['model']}`"
        warn(run, message)


def check_shards(base: Path) -> None:
    """Raise InputError for weights that are missing, pickled or cut off."""
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        pickles = [p.name for p in sorted(base.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".npz", ".gguf")]
        found = f"only weights in another form (`{pickles[0]}`)" if pickles else "no weights"
        raise InputError(f"the base `{base}` has {found}", "give a base with .safetensors files")
    for name in sorted(set(read_json(base / "model.safetensors.index.json").get("weight_map", {}).values())):
        if not (base / name).is_file():
            raise InputError(f"the base `{base}` lacks the shard `{name}` of its index", "download the base again")
    for shard in shards:
        read_header(shard)


def check_rows(run: dict, base: Path, rows: list[Row]) -> None:
    """Raise InputError where rows, loss and base do not fit together. `rows` are one of each source."""
    templates = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    has_template = any((base / name).exists() for name in templates)
    has_template = has_template or bool(read_json(base / "tokenizer_config.json").get("chat_template"))
    for row in rows:
        check_loss_on(row, run["experiment"]["train"]["loss_on"])
        if row.is_chat and not has_template:
            message = f"{row.where} is a conversation, and the base `{base}` has no chat template"
            raise InputError(message, "use the instruction-tuned base, or write `text` rows")


def trained_name(run: dict) -> str:
    """The base to train on, as the experiment calls it."""
    if "mlx_base" not in run["inputs"]:
        return run["experiment"]["base"]["model"]
    source = run["inputs"]["mlx_base"]
    said = (run["experiment"]["train"].get("mlx") or {}).get("base")
    return said or source.get("repo") or source.get("said") or Path(source["path"]).name


def trained_on(run: dict, trained_base: Path) -> dict:
    """For the manifest: which base the training read, and how it is quantised."""
    source = said_inputs(run).get("mlx_base") or said_inputs(run)["base"]
    found = {key: source[key] for key in ("repo", "path", "revision") if source.get(key)}
    quantised = quantization_of(read_json(trained_base / "config.json"))
    return {"model": trained_name(run), "revision": None, **found, "quantization": quantised}


# Rows to tokens


def write_mlx_rows(run: dict, rows_of: dict[str, list[Row]]) -> None:
    """The rows in `mlx_lm`'s own formats, for whoever wants to go on with its tools; not a part of the artifact."""
    folder = Path(run["work"]) / "mlx-data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, rows in rows_of.items():
        if rows:
            text = "".join(json.dumps(mlx_row(row), ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def mlx_row(row: Row) -> dict:
    """`messages`, `prompt` and `completion`, or `text`; `mlx_lm` knows no other rows."""
    if row.is_chat:
        return {"messages": row.prompt + row.completion} | ({"tools": row.tools} if row.tools else {})
    return {"prompt": row.prompt, "completion": row.completion} if row.prompt else {"text": row.completion}


def load_tokenizer(base: Path) -> Any:
    """The base's tokenizer. Not its processor, even for a vision-language base: the rows are text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or read_json(base / "chat_template.json").get("chat_template")
    return tokenizer


def check_same_tokenizer(ours: Any, theirs: Any, folder: Path) -> None:
    """Raise InputError when a base's MLX form makes other tokens or another prompt than the base itself."""
    hint = "give the MLX form of the same revision of the base"
    for text in PROBES:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise InputError(f"the tokenizer in `{folder}` gives other tokens than the base's for {text!r}", hint)
    if len(ours) != len(theirs):
        raise InputError(f"the tokenizer in `{folder}` has {len(theirs)} tokens, the base's has {len(ours)}", hint)
    if ours.eos_token != theirs.eos_token:
        message = f"in `{folder}` texts end with `{theirs.eos_token}`, in the base with `{ours.eos_token}`"
        raise InputError(message, hint)
    if (ours.chat_template or "") != (theirs.chat_template or ""):
        raise InputError(f"the chat template in `{folder}` is not the base's", hint)


def tokenize(run: dict, tokenizer: Any, rows: list[Row]) -> tuple[list[Example], dict]:
    """The sequences to train on, cut to `max_length`, and what was counted on the way.

    Raises:
        InputError: no row has a trained token within `max_length`.
    """
    limit = run["experiment"]["train"]["max_length"]
    examples = encode_rows(rows, tokenizer, run["experiment"]["train"]["loss_on"])
    kept = [short for short in (example.cut(limit) for example in examples) if short.trained()]
    longest = max(len(example.ids) for example in examples)
    if len(kept) < len(examples):
        warn_dropped([example for example in examples if not example.cut(limit).trained()], limit, bool(kept))
    dropped = len(examples) - len(kept)
    truncated = sum(len(example.ids) > limit for example in examples) - dropped
    if truncated:
        message = f"{truncated} of {len(examples)} rows are longer than `max_length: {limit}` and are cut"
        emit("warning", message=f"{message}; the longest has {longest} tokens")
    counts = {
        "examples": len(kept),
        "longest_row_tokens": longest,
        "truncated_rows": truncated,
        "dropped_rows": dropped,
    }
    return kept, counts


def warn_dropped(dropped: list[Example], limit: int | None, anything_left: bool) -> None:
    """Say which rows have nothing left to learn once they are cut; raise InputError if that is all of them."""
    prompts = [next((i for i, x in enumerate(e.labels) if x != IGNORED), len(e.labels)) for e in dropped]
    reason = f"the prompt fills `max_length: {limit}` (the longest prompt has {max(prompts)} tokens)"
    if not anything_left:
        enough = max(len(example.ids) for example in dropped)
        raise InputError(f"every row would be dropped: {reason}", f"use `max_length: {enough}`, or shorten the prompts")
    names = ", ".join(example.where for example in dropped[:5])
    emit("warning", message=f"{len(dropped)} rows are dropped, {reason}: {names}")


# The model


def load_model(run: dict, folder: Path, choices: Choices) -> tuple[Any, list[str], int]:
    """The base with its adapter, the names of what is adapted in each layer, and how many parameters there are."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import utils
    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    utils.maybe_set_recommended_wired_limit()
    mx.random.seed(run["experiment"]["train"]["seed"])
    model = load_base(run, folder)
    model.freeze()
    parameters, count = utils.get_total_parameters(model), len(model.layers)
    if (choices.last_layers or 0) > count:
        message = f"`train.mlx.num_layers: {choices.last_layers}`, and the base has {count} layers"
        raise InputError(message, f"use at most {count}, or leave it out for all")
    layers = choices.last_layers or count
    keys = adapted(model.layers[-layers:], choices.targets)
    settings = {"rank": choices.rank, "scale": choices.scale, "dropout": choices.dropout, "keys": keys}
    linear_to_lora_layers(model, layers, settings, use_dora=choices.dora)
    if choices.checkpointing:
        grad_checkpoint(model.layers[0])
    elif choices.dropout:
        emit("warning", message="with `lora.dropout` MLX keeps what layers compute, which takes more memory")
    return model, keys, parameters + sum(value.size for _, value in tree_flatten(model.trainable_parameters()))


def load_base(run: dict, folder: Path) -> Any:
    """The base in bfloat16, or as it is where it is quantised. Raises InputError if `mlx_lm` cannot load it."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path
    from mlx_lm import utils

    config = read_json(folder / "config.json")
    try:
        model, _ = utils.load_model(folder, lazy=True, model_config=mlx_config(config))
    except (ValueError, TypeError, KeyError, IndexError, FileNotFoundError) as error:
        message = f"mlx_lm {metadata.version('mlx-lm')} cannot load `{trained_name(run)}`: {one_line_of(error)}"
        raise InputError(message, "train this base with torch") from error

    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def to_bfloat16(name: str, value: Any) -> Any:
        return value.astype(mx.bfloat16) if mx.issubdtype(value.dtype, mx.floating) and may_cast(name) else value

    if not quantization_of(config):
        model.update(tree_map_with_path(to_bfloat16, model.parameters()))
    mx.eval(model.parameters())
    return model


def mlx_config(config: dict) -> dict:
    """What transformers 5 writes to config.json in other words than `mlx_lm` reads, and would pass over in silence.

    With Llama 3's `rope_theta` left out, MLX would train a model that turns positions 50 times too fast.
    """
    changes: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    whole, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" not in config and "rope_theta" in whole:
        changes["rope_theta"] = whole["rope_theta"]
    if not config.get("rope_scaling") and whole.get("rope_type", "default") != "default":
        changes["rope_scaling"] = {**whole, "type": whole["rope_type"]}
    if "partial_rotary_factor" not in config and "partial_rotary_factor" in whole:
        changes["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if sliding and "rope_local_base_freq" not in config:
        changes["rope_local_base_freq"] = sliding["rope_theta"]
    kinds = config.get("layer_types") or []
    if "sliding_window_pattern" not in config and {"sliding_attention", "full_attention"} == set(kinds):
        changes["sliding_window_pattern"] = kinds.index("full_attention") + 1
    if text := config.get("text_config"):
        changes["text_config"] = text | mlx_config(text)
        if "vocab_size" not in config and "vocab_size" in text:  # else it takes that of the published model
            changes["vocab_size"] = text["vocab_size"]
    return changes


def adapted(layers: list, targets: str | list[str]) -> list[str]:
    """The linear modules of the layers that `train.lora.targets` names, by their names within a layer."""
    from mlx import nn

    linear = {n for layer in layers for n, m in layer.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    if targets == "all-linear":
        return sorted(linear)
    found = {target: {n for n in linear if n == target or n.endswith(f".{target}")} for target in targets}
    for target, names in found.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            hint = f"use `all-linear`, or names of this base: {known}"
            raise InputError(f"`train.lora.targets`: `{target}` is no linear module of the base's layers", hint)
    return sorted(set().union(*found.values()))


def token_losses(logits: Any, targets: Any) -> Any:
    """The loss of each position in float32, with all that is as large as the vocabulary left in bfloat16.

    Of a whole `logsumexp` 8 bits would be left, of its distance to the largest score they are enough: 8 bytes a score
    at the peak instead of 20, with a loss that agrees to 5 digits.
    """
    import mlx.core as mx

    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    rest = mx.logsumexp(logits - top, axis=-1)
    wanted = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return rest.astype(mx.float32) + (top.astype(mx.float32) - wanted.astype(mx.float32))[..., 0]


def summed_loss(model: Any, batch: list[Example]) -> Any:
    """The loss of a batch, summed over its trained tokens. Rows are filled up on the right, where nothing looks."""
    import mlx.core as mx

    longest = max(len(example.ids) for example in batch)
    ids = mx.array([example.ids + [0] * (longest - len(example.ids)) for example in batch])
    labels = mx.array([example.labels + [IGNORED] * (longest - len(example.ids)) for example in batch])[:, 1:]
    counted = labels != IGNORED
    losses = token_losses(model(ids[:, :-1]), mx.where(counted, labels, 0))
    return mx.where(counted, losses, 0.0).sum()


# Training


class LongestFirst:
    """Row order: shuffled by seed and epoch, but the longest micro-batches open the first two steps of the run.

    An out-of-memory error then costs a minute instead of hours. Two steps, because the optimizer allocates its state
    at the end of the first.
    """

    def __init__(self, lengths: list[int], batch: int, per_step: int, seed: int, fillers: int = 0) -> None:
        self.lengths, self.batch, self.per_step, self.seed, self.epoch = lengths, batch, per_step, seed, 0
        self.fillers = fillers  # rows at the end of the data that stay there

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths) - self.fillers))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        if self.epoch == 0:
            longest = sorted(order, key=lambda row: -self.lengths[row])[: 2 * self.batch]
            taken = set(longest)
            rest = [row for row in order if row not in taken]
            filler = self.per_step - self.batch
            order = longest[: self.batch] + rest[:filler] + longest[self.batch :] + rest[filler:]
        return iter(order + list(range(len(order), len(self.lengths))))


def make_optimizer(choices: Choices) -> Any:
    """torch's AdamW by another name; its learning rate is set before each step."""
    from mlx import optimizers

    options = {"eps": choices.epsilon, "weight_decay": choices.decay, "bias_correction": True}
    return optimizers.AdamW(0.0, betas=list(choices.betas), **options)


def rate_at(step: int, total: int, peak: float, choices: Choices) -> float:
    """The learning rate of a step, counted from 0, as transformers' schedules have it."""
    warmup = warmup_steps(total, choices)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    falls = {"linear": max(0.0, 1.0 - done), "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))}
    return peak * falls.get(choices.schedule, 1.0)


def warmup_steps(total: int, choices: Choices) -> int:
    if choices.schedule == "constant":
        return 0
    return int(choices.warmup) if choices.warmup >= 1 else math.ceil(total * choices.warmup)


class Training:
    """The loop: steps, events, evaluations, checkpoints, the end of a broken training."""

    def __init__(self, run: dict, model: Any, choices: Choices, train_set: list[Example], eval_set: list) -> None:
        from mlx import nn

        chosen = run["experiment"]["train"]
        self.run, self.model, self.choices, self.rows, self.eval_rows = run, model, choices, train_set, eval_set
        self.batch, self.per_step = chosen["batch_size"], chosen["batch_size"] * chosen["gradient_accumulation"]
        self.order = LongestFirst([len(e.ids) for e in train_set], self.batch, self.per_step, chosen["seed"])
        self.per_epoch = math.ceil(len(train_set) / self.per_step)
        self.total = chosen["max_steps"] or math.ceil(chosen["epochs"] * self.per_epoch)
        self.log_every = math.ceil(self.total / 200)
        # Evaluate at most about ten times, but at least once an epoch: each time costs as much as training on a third
        # of the held-out rows.
        often = chosen["save_steps"] * math.ceil(self.total / chosen["save_steps"] / 10)
        self.eval_every = min(self.per_epoch, often)
        self.gradient = nn.value_and_grad(model, partial(summed_loss, model))
        self.optimizer = make_optimizer(choices)
        self.step = self.first_step = self.tokens_seen = self.tokens_trained = 0
        self.log: list[dict] = []
        self.evals: list[dict] = []
        self.losses: list[float] = []  # since the last entry of the log
        self.interrupted = False
        self.busy_s = self.busy_tokens = self.logged_s = self.logged_tokens = 0.0  # training alone, in this attempt

    def go(self) -> None:
        """All steps that are left, or those until an interrupt; both end with a checkpoint."""
        chosen = self.run["experiment"]["train"]
        self.model.train()
        stops = False
        while self.step < self.total and not stops:
            rate = rate_at(self.step, self.total, chosen["learning_rate"], self.choices)
            norm = self.take_step(rate)
            stops = self.interrupted  # read once a step: a signal may come at any line
            saves = stops or self.step == self.total or self.step % chosen["save_steps"] == 0
            if saves or self.step % self.log_every == 0:
                self.report(rate, norm)
            if self.eval_rows and not stops and self.step % self.eval_every == 0:
                self.evaluate()
            if saves:
                save_checkpoint(self.run, self)
        if self.eval_rows and not stops and self.step not in [entry["step"] for entry in self.evals]:
            self.evaluate()

    def take_step(self, rate: float) -> float:
        """One optimizer step on the mean loss of its trained tokens; returns the norm of the gradient."""
        import mlx.core as mx
        from mlx.optimizers import clip_grad_norm
        from mlx.utils import tree_map

        began, rows = time.monotonic(), self.rows_of_step()
        count = sum(example.trained() for example in rows)
        mx.random.seed(self.run["experiment"]["train"]["seed"] * 2**32 + self.step)  # so a resumed run needs no state
        total, gradients = 0.0, None
        for start in range(0, len(rows), self.batch):
            loss, new = self.gradient(rows[start : start + self.batch])
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(loss, gradients)  # now, or all micro-batches would be in memory at once
            total += loss.item()
        gradients, norm = clip_grad_norm(tree_map(lambda g: g / count, gradients), self.choices.max_norm)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, norm)
        mx.clear_cache()  # rows of many lengths leave many sizes of buffers behind
        self.step += 1
        seen = sum(len(example.ids) for example in rows)
        self.tokens_seen, self.tokens_trained = self.tokens_seen + seen, self.tokens_trained + count
        self.busy_tokens, self.busy_s = self.busy_tokens + seen, self.busy_s + time.monotonic() - began
        self.losses.append(total / count)
        return norm.item()

    def rows_of_step(self) -> list[Example]:
        """The rows of the step to take; the last step of an epoch has what is left."""
        epoch, place = divmod(self.step, self.per_epoch)
        self.order.set_epoch(epoch)
        chosen = list(self.order)[place * self.per_step : (place + 1) * self.per_step]
        return [self.rows[index] for index in chosen]

    def report(self, rate: float, norm: float) -> None:
        """One entry of the log: the mean loss of the steps since the entry before. Raises TrainingFailed."""
        loss = sum(self.losses) / len(self.losses)
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                self.fail(f"`{name}` is {value} at step {self.step}", rate)
        self.losses = []
        speed = (self.busy_tokens - self.logged_tokens) / max(self.busy_s - self.logged_s, 1e-9)
        self.logged_s, self.logged_tokens = self.busy_s, self.busy_tokens
        epoch, place = divmod(self.step, self.per_epoch)
        numbers = {
            "epoch": round(epoch + place * self.per_step / len(self.rows), 4),
            "loss": round(loss, 6),
            "lr": rate,
        }
        numbers |= {"grad_norm": round(norm, 6), "tokens_per_s": round(speed, 1), "memory_gib": memory_gib()}
        emit("step", step=self.step, total=self.total, **numbers)
        self.log.append({"step": self.step, "loss": loss, "lr": rate, "grad_norm": norm})

    def evaluate(self) -> None:
        """The mean loss over the trained tokens of the held-out rows."""
        self.model.eval()
        total = 0.0
        for start in range(0, len(self.eval_rows), self.batch):
            total += summed_loss(self.model, self.eval_rows[start : start + self.batch]).item()
        self.model.train()
        loss = total / sum(example.trained() for example in self.eval_rows)
        if not math.isfinite(loss):
            self.fail(f"`eval_loss` is {loss} at step {self.step}", None)
        emit("eval", step=self.step, eval_loss=round(loss, 6))
        self.evals.append({"step": self.step, "eval_loss": loss})

    def fail(self, message: str, rate: float | None) -> None:
        """End the run: every further step would be paid for nothing."""
        chosen = self.run["experiment"]["train"]["learning_rate"]
        hint = f"use `train.learning_rate: {chosen / 10:.0e}`, or check the base's weights and the data"
        raise TrainingFailed(f"{message}, with a learning rate of {chosen if rate is None else rate:.3g}", hint)


def memory_gib() -> float:
    """The most that MLX had allocated so far, on the GPU or on the CPU; not what Python itself takes."""
    import mlx.core as mx

    return round(mx.get_peak_memory() / 2**30, 3)


def run_training(run: dict, training: Training) -> None:
    """Train from the start or from the last complete checkpoint.

    SIGTERM and SIGINT end it with a checkpoint after the current step, or without one after `GRACE_S` seconds.
    """

    def interrupt(*_: object) -> None:
        if training.interrupted:
            raise KeyboardInterrupt
        training.interrupted = True
        signal.alarm(GRACE_S)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        if checkpoint := last_checkpoint(run):
            load_checkpoint(checkpoint, training)
            emit("phase", name="resume", detail=f"step {training.first_step}")
        training.go()
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if training.interrupted:
        raise KeyboardInterrupt


def checkpoints(run: dict) -> Path:
    """Where checkpoints live until the manifest is written."""
    return Path(run["work"]) / "checkpoints"


def save_checkpoint(run: dict, training: Training) -> None:
    """Adapter, optimizer and log; the sizes of these files last: without them it is half a checkpoint."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder = checkpoints(run) / f"checkpoint-{training.step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapter.safetensors"), dict(tree_flatten(training.model.trainable_parameters())))
    mx.save_safetensors(str(folder / "optimizer.safetensors"), dict(tree_flatten(training.optimizer.state)))
    (folder / "log.json").write_text(json.dumps({"log": training.log, "evals": training.evals}), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    mark = {"fingerprint": run["fingerprint"], "step": training.step, "files": files}
    mark |= {"tokens_seen": training.tokens_seen, "tokens_trained": training.tokens_trained}
    part = folder / "complete.json.part"
    part.write_text(json.dumps(mark), encoding="utf-8")
    part.rename(folder / "complete.json")
    older = sorted(checkpoints(run).glob("checkpoint-*"), key=lambda p: -int(p.name.partition("-")[2]))[2:]
    for old in older:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, training: Training) -> None:
    """Bring the training to where the checkpoint was written."""
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    mark, logs = read_json(folder / "complete.json"), read_json(folder / "log.json")
    training.model.load_weights(str(folder / "adapter.safetensors"), strict=False)
    training.optimizer.state = tree_unflatten(list(mx.load(str(folder / "optimizer.safetensors")).items()))
    training.step = training.first_step = mark["step"]
    training.tokens_seen, training.tokens_trained = mark["tokens_seen"], mark["tokens_trained"]
    training.log, training.evals = logs["log"], logs["evals"]


def last_checkpoint(run: dict) -> Path | None:
    """The latest complete checkpoint of this run. Others are removed: they would count in the limit of two."""
    folders = sorted(checkpoints(run).glob("checkpoint-*"), key=lambda p: -int(p.name.partition("-")[2]))
    for folder in folders:
        mark = read_json(folder / "complete.json")
        sizes = mark.get("files", {})
        whole = all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in sizes.items())
        if sizes and whole and mark["fingerprint"] == run["fingerprint"]:
            return folder
        shutil.rmtree(folder)
        emit("warning", message=f"`{folder.name}` is incomplete or of another run: removed")
    return None


# Result


def check_weights(model: Any) -> None:
    """Raise TrainingFailed unless the trained weights are finite and have moved."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    trained = dict(tree_flatten(model.trainable_parameters()))
    for name, parameter in trained.items():
        if not mx.isfinite(parameter).all().item():
            raise TrainingFailed(f"the trained weight `{name}` is not finite", "use a lower `train.learning_rate`")
    if not any(
        mx.any(p).item() for name, p in trained.items() if name.endswith("lora_b")
    ):  # zero before the first step
        hint = "train for more steps than the warm-up, with a `train.learning_rate` above 0"
        raise TrainingFailed("the adapter is what it was before training: no weight has moved", hint)


def save(run: dict, choices: Choices, training: Training, keys: list[str], base: Path, trained_base: Path) -> None:
    """MLX's own files under `mlx/`, and the same adapter in PEFT's layout."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    output, experiment = Path(run["output"]["path"]), run["experiment"]
    folder = output / "mlx"
    folder.mkdir()
    trained = dict(tree_flatten(training.model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained, {"format": "mlx"})
    layers = choices.last_layers or len(training.model.layers)
    settings = {"rank": choices.rank, "scale": choices.scale, "dropout": choices.dropout, "keys": keys}
    kind = {"fine_tune_type": "dora" if choices.dora else "lora", "num_layers": layers, "lora_parameters": settings}
    config = {"model": trained_name(run), **kind}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_mlx_config(run, choices, training, kind)
    weights = read_weights(base)
    adapter = dataclasses.replace(read_mlx(folder, weights), rslora=experiment["train"]["lora"]["rslora"])
    revision = run["inputs"]["base"].get("revision") or experiment["base"]["revision"]
    write_peft(adapter, weights, output, experiment["base"]["model"], revision)


def write_mlx_config(run: dict, choices: Choices, training: Training, kind: dict) -> None:
    """`mlx_config.yaml`: the same training for `mlx_lm.lora`, by hand. JSON values are YAML."""
    chosen = run["experiment"]["train"]
    warmup = warmup_steps(training.total, choices)
    schedules = {
        "linear": ("linear_schedule", [chosen["learning_rate"], 0.0, training.total - warmup]),
        "cosine": ("cosine_decay", [chosen["learning_rate"], training.total - warmup, 0.0]),
    }
    name, arguments = schedules.get(choices.schedule, ("linear_schedule", [chosen["learning_rate"]] * 2 + [1]))
    adamw = {"betas": list(choices.betas), "eps": choices.epsilon, "weight_decay": choices.decay}
    settings = {
        "model": trained_name(run),
        "train": True,
        **kind,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": adamw | {"bias_correction": True}},
        "learning_rate": chosen["learning_rate"],
        "lr_schedule": {"name": name, "arguments": arguments, "warmup": warmup},
        "iters": training.total * chosen["gradient_accumulation"],
        "batch_size": chosen["batch_size"],
        "grad_accumulation_steps": chosen["gradient_accumulation"],
        "grad_checkpoint": choices.checkpointing,
        "max_seq_length": chosen["max_length"],
        "mask_prompt": chosen["loss_on"] != "all",
        "save_every": chosen["save_steps"] * chosen["gradient_accumulation"],
        "seed": chosen["seed"],
    }
    text = (
        "# mlx_lm.lora --config mlx_config.yaml --data FOLDER: the run left its rows for it in its `work/mlx-data`.\n"
    )
    text += "# The same choices, not the same numbers: it masks all but the last turn, orders rows its own way and\n"
    text += "# weighs every micro-batch alike, however many tokens it trains.\n"
    text += "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
    (Path(run["output"]["path"]) / "mlx" / "mlx_config.yaml").write_text(text, encoding="utf-8")


def collect_metrics(training: Training, total_parameters: int) -> dict:
    """The manifest's metrics; the training loss is the mean over all steps, those of earlier attempts too."""
    from mlx.utils import tree_flatten

    steps = [0, *(entry["step"] for entry in training.log)]
    summed = sum(e["loss"] * (e["step"] - before) for e, before in zip(training.log, steps, strict=False))
    return {
        "train_loss": round(summed / steps[-1], 6),
        "eval_loss": round(training.evals[-1]["eval_loss"], 6) if training.evals else None,
        "steps": training.step,
        "tokens_seen": training.tokens_seen,
        "tokens_trained": training.tokens_trained,
        "tokens_per_s": round(training.busy_tokens / training.busy_s, 1) if training.busy_s else None,
        "trainable_parameters": sum(p.size for _, p in tree_flatten(training.model.trainable_parameters())),
        "total_parameters": total_parameters,
    }


def hashed_inputs(run: dict) -> dict:
    """The run's inputs, with the SHA-256 of data that came as a file."""
    inputs = said_inputs(run)
    for name, source in run["inputs"].items():
        if (path := Path(source.get("path", "."))).is_file():
            inputs[name]["sha256"] = file_entry(path.parent, path)["sha256"]
    return inputs


def write_card(run: dict, metrics: dict, trained_base: Path) -> None:
    """README.md: the model card, with the relation to the base that the Hub's model tree reads."""
    experiment, output = run["experiment"], Path(run["output"]["path"])
    chosen, base, data = experiment["train"], experiment["base"], experiment["data"]
    revisions = {key: run["inputs"][key].get("revision") or experiment[key]["revision"] for key in ("base", "data")}
    dataset = data["dataset"] if "repo" in run["inputs"]["data"] else Path(data["dataset"]).name
    front = ["library_name: peft", "pipeline_tag: text-generation"]
    is_local = base["model"].startswith((".", "/", "~"))
    if not is_local:
        front += [f"base_model: {base['model']}", "base_model_relation: adapter"]
    if "repo" in run["inputs"]["data"]:
        front += ["datasets:", f"- {data['dataset']}"]
    facts = {
        "base": "a local folder" if is_local else f"{base['model']} at {revisions['base']}",
        "trained on": trained_text(run, trained_base),
        "data": f"{dataset} at {revisions['data']}: {metrics['rows']} rows, loss on {chosen['loss_on']}",
        "method": f"{chosen['method']} with MLX, r {chosen['lora']['r']}, alpha {chosen['lora']['alpha']}",
        "steps": f"{metrics['steps']} of {chosen['batch_size']} x {chosen['gradient_accumulation']} rows",
        "learning rate": chosen["learning_rate"],
        "training loss": metrics["train_loss"],
        "validation loss": metrics["eval_loss"],
        "run": f"{run['run_id']}, attempt {run['attempt']}, seed {chosen['seed']}",
        "made with": ", ".join(" ".join(item) for item in versions("mlx", "mlx-lm", "transformers").items()),
    }
    facts |= origin(run)
    if run["output"].get("repo") and experiment["merge"]:
        facts["merged model"] = experiment["output"]["repo"]
    table = "".join(f"| {name} | {str(value).replace('|', '/')} |\n" for name, value in facts.items())
    text = "---\n" + "\n".join([*front, "tags:", "- mergetune", "- sft", "- mlx", f"- {chosen['method']}"]) + "\n---\n"
    text += f"# {experiment['name']}\n\n{experiment['hypothesis'].strip()}\n\n| | |\n|---|---|\n{table}"
    (output / "README.md").write_text(text, encoding="utf-8")


def trained_text(run: dict, trained_base: Path) -> str:
    """For the card: the base that the training read, without folders of this machine."""
    found = trained_on(run, trained_base)
    name = "a local folder" if "path" in found and "repo" not in found else f"{found['model']} at {found['revision']}"
    form = found["quantization"]
    return f"{name}, {form['bits']} bits in groups of {form['group_size']}" if form else f"{name}, not quantised"


if __name__ == "__main__":
    raise SystemExit(guarded(main))
