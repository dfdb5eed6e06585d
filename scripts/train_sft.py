# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate==1.15.0",
#   "bitsandbytes==0.50.2",
#   "datasets==5.2.0",
#   "httpx2==2.16.2",
#   "huggingface_hub==2.4.0",
#   "jinja2==3.1.6",
#   "peft==0.21.2",
#   "pyarrow==26.0.1",
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "trl==1.16.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Fine-tune one base on one data set: QLoRA, LoRA, full or preferences, on one or all GPUs of a machine, or on the CPU.

    python scripts/train_sft.py runs/quickstart/train/run.json

The argument is a resolved `run.json` (stage `train`); its `device` says `cuda` or `cpu`, and the CPU runs the same code
path as the GPU. The order below is the order of the work: check everything that is cheap to check, turn rows into
tokens and labels, load the base, train, check the result, write it, write `manifest.json` last.

With `processes` above 1 in run.json the script checks, then starts itself so many times under `torch.distributed.run`,
one process per GPU (gloo on the CPU). `gradient_accumulation` counts the batches of a step over all of them, so that
the same experiment learns the same on any number of GPUs. Only the first process reports, pushes and writes. With
`sharded` each holds a part of weights, gradients and optimizer (FSDP2) instead of all (DDP).

With `method: dpo` the rows are pairs of answers, and TRL's DPOTrainer learns to prefer the chosen ones; the section
"Preferences" has all that differs. The reference is the base itself, with the adapter off: no second model is loaded.
One process only.

With `sweep` in run.json (variants of `train`) it trains each in a process of its own, `concurrency` at a time with one
GPU each, and keeps the adapter with the lowest held-out loss. `sweep.json`, beside the checkpoints and in the repo, has
a row for each that ended: a killed sweep goes on with the others, and the one it was at begins again on a new disk.

With `nodes` above 1 the processes are those of so many machines, each with a job of its own, and `MERGETUNE_NODE` says
which of them this one is. Every node passes a fence of its own, waits a while for the others, and they meet at the
first one, by the alias `node-0` of the job's network group. The first node alone pushes and writes.

Killed runs go on from the last complete checkpoint in `work/checkpoints`, or in the output repo where there is one.
Exit codes: 0 done, or another job does it, 1 training failed (not a number, or nothing learned) or a bug, 2 the
caller's input, 3 the Hub did not take the result or another node did not come, 130 interrupted.
"""

import argparse
import dataclasses
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import queue
import random
import re
import resource
import shutil
import signal
import socket
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

# `train.sft` passes to SFTConfig, but for what an experiment field of its own says …
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
PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")  # columns of DPOTrainer
DPO_FIELD_OF = {"beta": "train.dpo.beta", "loss_type": "train.dpo.loss"}
DPO_FIELD_OF |= {"label_smoothing_factor": "train.sft.label_smoothing"}  # DPOTrainer passes over the other in silence
# … and what the script decides.
OWNED = """
output_dir run_name project use_cpu bf16 fp16 trust_remote_code remove_unused_columns label_names ignore_data_skip
train_sampling_strategy push_to_hub hub_strategy hub_token hub_private_repo hub_always_push hub_revision
trackio_space_id trackio_static_space_id save_strategy save_total_limit save_only_model resume_from_checkpoint
load_best_model_at_end eval_strategy eval_steps do_eval per_device_eval_batch_size eval_packing disable_tqdm
logging_strategy logging_steps logging_nan_inf_filter dataset_kwargs dataset_text_field chat_template_path eos_token
pad_token fsdp fsdp_config deepspeed parallelism_config average_tokens_across_devices
"""
DPO_OWNED = """
truncation_mode padding_free loss_weights precompute_ref_log_probs precompute_ref_batch_size sync_ref_model
ref_model_mixup_alpha ref_model_sync_steps
"""
OWNED_LOADING = ("dtype", "torch_dtype", "quantization_config", "device_map", "revision", "trust_remote_code")
# A CPU run (a rehearsal) leaves these out with a warning, instead of failing on them.
GPU_ONLY = ("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "activation_offloading")
GPU_ONLY += ("use_liger_kernel", "liger_kernel_config")
GPU_ONLY_LOADING = ("attn_implementation", "use_kernels")
BASE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Second copies of the weights in Mistral's and Meta's repos: as large as the base, and never read.
BASE_IGNORED = (".mergetune/*", "consolidated*", "original/*")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken")
TOKENIZER_FILES += ("tekken.json", "*.jinja", "chat_template.json", "generation_config.json", "*processor_config.json")
# Where LoRA also finds linear layers, and text never passes: parameters and memory without a gradient.
NOT_TEXT = r".*(vision|visual|image|audio|multi_modal_projector|mm_projector|connector).*"
# Not in the header: as soon as it is installed, bitsandbytes 0.50 on a CPU takes a kernel of its own from the Hub.
KERNELS = "kernels==0.18.2"
INSTALL_S = 300
APART = 16  # tokens of each of the rows that are laid end to end to see whether one reads the other
GRACE_S = 20  # a step may take this long after SIGTERM; the Hub kills 30 s after it asks
JOIN_S = 1200  # a node waits so long for the others, and is paid for it
JOIN_POLL_S = 5
CHUNK = 64 << 20  # bytes of a checkpoint that go from node to node at once
PUSH_GRACE_S = 27  # and the push of its checkpoint goes on until then, counted from SIGTERM too
LAST_PUSH_S = 600  # after the last step: a push that hangs must not hold up the artifact
# What gloo, NCCL and torch's own store say when a process at the other end of a connection is gone.
BROKEN_CONNECTION = ("onnection closed by peer", "onnection reset by peer", "remote process exited", "Broken pipe")
BROKEN_CONNECTION += ("Connection was likely closed", "failed to recv, got 0 bytes", "Failed to recv, got 0 bytes")
TAIL_BYTES = 8000  # of what a process that failed printed; the traceback is its end


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


class TrainingFailed(Exception):
    """The training went wrong, by no bug and no malformed input. Exit code 1."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Diverged(TrainingFailed):
    """Loss, gradient or weights are not numbers any more."""


def main() -> None:
    """Check what is cheap to check, then train, here or in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="path of a run.json of stage `train`")
    run, started = load_run(parser.parse_args().run, "train"), time.time()
    if "launched" in run:
        take_place(run)
        end_with_parent(run["launched"]["parent"])
        named_failures(run, lambda: train(run, Path(run["launched"]["base"]), *split_rows(run), run["launched"]["at"]))
        return
    emit("start", stage="train", run_id=run["run_id"])
    if "variant" in run:
        end_with_parent(run["variant"]["parent"])
    begin(run)
    await_nodes(run)
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # 3 % lost to fragmentation, not 11 %
    if "sweep" in run:
        named_failures(run, lambda: sweep(run, started))
        return
    base, *rows = prepare(run)
    bring_kernels(run)
    if processes_of(run) == 1:
        named_failures(run, lambda: train(run, base, *rows, started))
    else:
        launch(run, base, started)  # each process reads the rows again


def prepare(run: dict) -> tuple[Path, list[Row], list[Row]]:
    """The base's folder, training and held-out rows, all checked; an output folder, and the checkpoint of the Hub."""
    accumulation_of(run)
    if is_dpo(run) and processes_of(run) > 1:
        raise InputError("`method: dpo` trains in one process", "choose a flavor with one GPU")
    base = fetch_base(run["inputs"]["base"])
    check_base(base)
    emit("phase", name="read data")
    train_rows, eval_rows = split_rows(run)
    check_rows(run, base, [train_rows[0], *eval_rows[:1]])
    # Three checkpoints of weights and optimizer (one more that is on its way to the Hub) and the result; adapters are a
    # few per cent of the base.
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    copies = 13 if run["output"].get("repo") else 10
    is_full = run["experiment"]["train"]["method"] == "full"
    require_disk(fresh_output(run), weights * copies if is_full else weights // 4)
    if run["output"].get("repo"):
        patiently(run, "download the checkpoint", START, lambda: fetch_checkpoint(run))
    return base, train_rows, eval_rows


def named_failures(run: dict, act: Callable[[], None]) -> None:
    """`act()`; where the training went wrong, exit code 1 with a reason. One of several processes notes when."""
    try:
        act()
    except TrainingFailed as error:
        emit("error", message=error.message, hint=error.hint, diverged=isinstance(error, Diverged))
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        if "launched" in run:  # the others fail by it within a moment, and the log must end with the cause
            told = f"{time.time_ns()} {'connection' if is_broken_connection(error) else ''}"
            (processes_folder(run) / f"failed-{local_rank()}").write_text(told, encoding="utf-8")
        raise


# Several processes


def processes_of(run: dict) -> int:
    """How many processes train: one per GPU of the flavor, or as many as a rehearsal on the CPU asks for."""
    return int(run.get("processes", 1))


def nodes_of(run: dict) -> int:
    """How many machines train together."""
    return int(run.get("nodes", 1))


def per_node(run: dict) -> int:
    """How many of the processes are this machine's."""
    return processes_of(run) // nodes_of(run)


def rank() -> int:
    """This process's number among those that train together; 0 when it is alone."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The same among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def accumulation_of(run: dict) -> int:
    """Micro-batches that each process sums for a step: its share of `gradient_accumulation`."""
    total, processes = run["experiment"]["train"]["gradient_accumulation"], processes_of(run)
    if total % processes:
        message = f"`gradient_accumulation: {total}` batches a step cannot be shared evenly by {processes} GPUs"
        raise InputError(message, f"write `gradient_accumulation: {math.ceil(total / processes) * processes}`")
    return total // processes


def processes_folder(run: dict) -> Path:
    """The request of this machine's processes, and what all but the first of them print."""
    return Path(run["work"]) / "processes"


def launch(run: dict, base: Path, started: float) -> None:
    """Train in one process per GPU, and end as they end. The first prints here, the others into files.

    Each machine starts its own, and they meet by `take_place`: one launcher over all nodes would keep every node paid
    for until the first one has published.

    Raises:
        SystemExit: with the code of the process that failed first; 130 after SIGTERM or SIGINT, which they are sent.
    """
    from torch.distributed import run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    shutil.rmtree(processes_folder(run), ignore_errors=True)
    processes_folder(run).mkdir(parents=True)
    checkpoint, request = last_checkpoint(run), processes_folder(run) / "run.json"
    known = {"base": str(base), "at": started, "parent": os.getpid(), "checkpoint": checkpoint and str(checkpoint)}
    request.write_text(json.dumps(run | {"launched": known}), encoding="utf-8")
    os.environ["JOB_ID"] = JOB_ID  # the fence knows this job by it
    count = per_node(run)
    quiet = ",".join(f"{number}:3" for number in range(1, count)) or "0"
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}", f"--redirects={quiet}"]
    options += [f"--log-dir={processes_folder(run)}", __file__, str(request)]
    emit("phase", name="launch", detail=f"{count} process{'es' * (count > 1)}{node_words(run)}")
    try:
        launcher.run(launcher.parse_args(options))
    except SignalException:
        raise SystemExit(130) from None
    except ChildFailedError as error:
        raise SystemExit(explain_failure(run, error.failures)) from None


def explain_failure(run: dict, failures: dict[int, Any]) -> int:
    """Print what the process that failed first said, unless it prints here anyway; returns the exit code."""
    first = first_failure(run, failures)
    name, code = f"process {first + 1} of {per_node(run)}{node_words(run)}", failures[first].exitcode
    if nodes_of(run) > 1 and (code == -signal.SIGABRT or noted_failures(run).get(first, (0, False))[1]):
        print_failure(run, first, name)
        # NCCL's watchdog aborts a process that waits for a node which is gone.
        message = f"the connection to another node was lost{node_words(run)}"
        emit("error", message=message, hint="look into the logs of the other nodes' jobs", transient=True)
        return 1
    if code < 0:
        message = f"{name} was killed by {signal.Signals(-code).name}"
        hint = "if its memory ran out, choose a flavor with more RAM or a smaller `train.batch_size`; look into the log"
        emit("error", message=message, hint=hint)
        print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
        return 1
    print_failure(run, first, name)
    return code


def print_failure(run: dict, number: int, name: str) -> None:
    """The last that a process said which does not print here."""
    if number == 0:
        return
    for path in sorted(processes_folder(run).glob(f"**/{number}/std*.log"), reverse=True):  # errors last
        text = path.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        # Its events would count twice; but for errors, which the first process knows nothing of.
        lines = [x for x in text.splitlines() if not x.startswith(EVENT_PREFIX) or '"event": "error"' in x]
        if lines:
            print(f"{name}, {path.name}:", *lines, sep="\n", file=sys.stderr, flush=True)


def first_failure(run: dict, failures: dict[int, Any]) -> int:
    """The number of the process that ended the others: one that was killed, or whose error came before theirs."""
    noted = noted_failures(run)

    def order(number: int) -> tuple[bool, bool, float, int]:
        code = failures[number].exitcode
        told = code in (130, -signal.SIGTERM)  # by the launcher, once another had ended
        return told, code > 0, noted.get(number, (math.inf, False))[0], number

    return min(failures, key=order)


def noted_failures(run: dict) -> dict[int, tuple[float, bool]]:
    """By process of this machine: when it failed, and whether it had only lost its connection to another."""
    notes = {p.name.partition("-")[2]: p.read_text().split() for p in processes_folder(run).glob("failed-*")}
    return {int(number): (int(words[0]), len(words) > 1) for number, words in notes.items() if words}


def is_broken_connection(error: Exception) -> bool:
    """Whether an error says no more than that another process is not there any more."""
    return any(words in str(error) for words in BROKEN_CONNECTION)


def end_with_parent(parent: int) -> None:
    """A process must not train on when the one that started it is killed: nobody could stop it, and it holds a GPU."""

    def watch() -> None:
        while not STOPPED.wait(0.2):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


# Several nodes


class NodeMissing(HubFailed):
    """Another node did not come. A new attempt may have more luck."""

    def __init__(self, run: dict, missing: list[int]) -> None:
        names = " and ".join(f"node {node + 1}" for node in missing)
        message = f"{names} of {nodes_of(run)} did not come within {join_s(run) / 60:.0f} minutes"
        super().__init__(message, "look whether its job waits for a machine, or has failed: its log says why")


def node_words(run: dict) -> str:
    """` on node 1 of 2`; empty for one machine."""
    return f" on node {NODE + 1} of {nodes_of(run)}" if nodes_of(run) > 1 else ""


def join_s(run: dict) -> float:
    """How long a node waits for the others."""
    return run.get("join_s", JOIN_S)


def await_nodes(run: dict) -> None:
    """Wait until all nodes have passed their fences, before anything is loaded: alone, none of them can work.

    Raises:
        NodeMissing: one did not in time.
        Superseded: the attempt was stopped meanwhile.
    """
    if nodes_of(run) == 1 or not run["output"].get("repo"):
        return
    emit("phase", name="wait for the other nodes", detail=f"node {NODE + 1} of {nodes_of(run)}")
    end = time.monotonic() + join_s(run)
    while missing := patiently(run, "look for the other nodes", START, lambda: missing_nodes(run)):
        if time.monotonic() > end:
            raise NodeMissing(run, missing)
        time.sleep(min(JOIN_POLL_S, max(end - time.monotonic(), 0.1)))


def missing_nodes(run: dict) -> list[int]:
    """The nodes of this attempt that have not passed their fence yet."""
    seen = look(run)
    mine = winner_in(run, seen, NODE)
    if is_shut_out(run, seen) or not is_me(mine):
        raise Superseded({**mine, "finished": False})
    return [n for n in range(nodes_of(run)) if winner_in(run, seen, n).get("attempt") != run["attempt"]]


def take_place(run: dict) -> None:
    """Number this process among those of all nodes; its launcher knows only those of its own machine."""
    if nodes_of(run) == 1:
        return
    number = NODE * per_node(run) + local_rank()
    # The first process of all opens the meeting point, not its launcher.
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(processes_of(run)), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting_port(run))}


def meeting_port(run: dict) -> int:
    """The port of the first node at which all meet. Another one for each attempt: the last one's may still be held."""
    return 20000 + int(hashlib.sha256(f"{run['run_id']} {run['attempt']}".encode()).hexdigest()[:8], 16) % 10000


def find_first_node(run: dict) -> None:
    """Wait until the first node listens, and remember at which address.

    Several jobs may hold its alias for a moment, if it was submitted twice: the one that listens is meant.

    Raises:
        NodeMissing: it did not in time.
    """
    if nodes_of(run) == 1 or NODE == 0:
        return
    host, end = f"{os.environ.get('HF_NETWORK_GROUP_PREFIX', '')}node-0", time.monotonic() + join_s(run)
    while not (address := listening(host, meeting_port(run))):
        if time.monotonic() > end:
            raise NodeMissing(run, [0])
        time.sleep(0.5)
    os.environ["MASTER_ADDR"] = address


def listening(host: str, port: int) -> str | None:
    """The first of a name's addresses at which somebody listens; None where nobody does, or the name is not known."""
    try:
        addresses = {str(found[4][0]): None for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return None
    for address in addresses:
        try:
            socket.create_connection((address, port), 5).close()
        except OSError:
            continue
        return address
    return None


def bring_home(run: dict, folder: Path, device: Any) -> None:
    """Put what the other nodes wrote of a checkpoint beside the first node's part of it, which alone is pushed.

    Over the connections that the gradients take, because those are known to work.
    """
    if nodes_of(run) == 1 or local_rank() > 0:
        return
    if NODE > 0:
        send_files(folder, 0, device)
        shutil.rmtree(folder)
        return
    for node in range(1, nodes_of(run)):
        receive_files(folder, node * per_node(run), device)


def send_files(folder: Path, to: int, device: Any) -> None:
    """Send every file of a folder: the list of names and sizes, then their bytes."""
    files = artifact_files(folder)
    listed = json.dumps([[name, path.stat().st_size] for name, path in files.items()]).encode()
    send_bytes(len(listed).to_bytes(8, "little"), to, device)
    send_bytes(listed, to, device)
    for path in files.values():
        with path.open("rb") as handle:
            while chunk := handle.read(CHUNK):
                send_bytes(chunk, to, device)


def receive_files(folder: Path, sender: int, device: Any) -> None:
    """What `send_files` sends."""
    size = int.from_bytes(receive_bytes(8, sender, device), "little")
    for name, left in json.loads(receive_bytes(size, sender, device)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as handle:
            while left:
                handle.write(chunk := receive_bytes(min(left, CHUNK), sender, device))
                left -= len(chunk)


def send_bytes(content: bytes, to: int, device: Any) -> None:
    """To one process, as a tensor."""
    import torch

    torch.distributed.send(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device), to)


def receive_bytes(count: int, sender: int, device: Any) -> bytes:
    """What one process sends with `send_bytes`."""
    import torch

    tensor = torch.empty(count, dtype=torch.uint8, device=device)
    torch.distributed.recv(tensor, sender)
    return tensor.cpu().numpy().tobytes()


def part() -> None:
    """The last word between the processes: the first goes on alone, however long its result takes to publish."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def summed(values: list[Any], device: Any) -> list[int]:
    """Whole numbers, each added up over all processes."""
    import torch

    numbers = torch.stack([torch.as_tensor(value, device=device).long() for value in values])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
    return [int(number) for number in numbers.tolist()]


# A sweep: variants of one training, one after the other or one per GPU, each in a process of its own

# The machine's start before this script, and publishing after it: no variant may use these seconds of the timeout.
SWEEP_RESERVE_S = 300
STOP_S = GRACE_S + 5  # a variant that is asked to stop has so long to write its checkpoint
FINAL = ("trained", "diverged")  # a later job does not train these again; one that failed it tries


def sweep(run: dict, started: float) -> None:
    """Train every variant that fits into time and money; the best adapter by held-out loss is the artifact.

    Base and rows are fetched once, here, and this process alone talks to the Hub. What becomes of a variant is no
    other's: each has fresh memory, a checkpoint folder of its own and an end of its own.

    Raises:
        InputError, TrainingFailed: not one variant was trained; with the cause of the first.
    """
    inputs = sweep_inputs(run)
    for number in range(1, len(run["sweep"]["variants"]) + 1):
        bring_kernels(variant_run(run, number, inputs))  # here, because two of them must not install at once
    table = Table(run, started)
    train_variants(run, inputs, table)
    if table.best is None:
        raise table.failure()
    chosen, output = table.variant(table.best), Path(run["output"]["path"])
    artifact = variant_folder(run, table.best) / "artifact"
    made = read_json(artifact / "manifest.json")
    emit("phase", name="save", detail=f"variant {table.best}: {chosen['words']}")
    shutil.copytree(artifact, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    won = run | {"experiment": run["experiment"] | {"train": chosen["train"]}, "won": chosen["words"]}
    write_card(won, made["metrics"])
    kept = {key: made[key] for key in ("metrics", "history", "eval_history", "resumed_from_step", "seed", "versions")}
    peak = max(row["memory_gib"] for row in table.rows.values() if row["state"] == "trained")
    measured = {"peak_memory_gib": peak, "duration_s": round(time.time() - started, 1)}
    write_manifest(run, started, inputs=hashed_inputs(run), measured=measured, sweep=table.sorted_rows(), **kept)
    shutil.rmtree(variant_folder(run, 0).parent, ignore_errors=True)
    shutil.rmtree(tokens_folder(run), ignore_errors=True)
    headline = {key: made["metrics"][key] for key in ("steps", "train_loss", "eval_loss", "tokens_per_s")}
    emit("end", stage="train", duration_s=round(time.time() - started, 1), won=table.best, **headline)


def sweep_inputs(run: dict) -> dict:
    """What the variants read, all of it on this disk: the base's folder, and rows of the Hub as files."""
    alone = {key: value for key, value in run.items() if key != "processes"}
    first = run["experiment"] | {"train": run["sweep"]["variants"][0]["train"]}
    base, _, held_out = prepare(alone | {"experiment": first})
    if not held_out:
        raise InputError("no rows are held out, so no variant wins", "add `eval: {fraction: 0.05}` under `data`")
    inputs = dict(run["inputs"]) | {"base": {**run["inputs"]["base"], "path": str(base)}}
    data, split = run["inputs"]["data"], (run["experiment"]["data"].get("eval") or {}).get("split")
    if "repo" in data:
        inputs["data"] = rows_on_disk(run, data, run["experiment"]["data"].get("split") or "train", "train.jsonl")
        if split:
            inputs["eval_data"] = rows_on_disk(run, data, split, "held-out.jsonl")
    if "repo" in run["inputs"].get("eval_data", {}):
        source = run["inputs"]["eval_data"]
        inputs["eval_data"] = rows_on_disk(run, source, run["experiment"]["data"].get("split") or "train", "eval.jsonl")
    return inputs


def rows_on_disk(run: dict, source: dict, split: str, name: str) -> dict:
    """The rows of a split of the Hub as a file, as they are."""
    path = Path(run["work"]) / "rows" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, default=str) + "\n" for _, row in read_raw(source, split))
    return {"path": str(path)}


def variant_folder(run: dict, number: int) -> Path:
    """Request, checkpoints and artifact of one variant."""
    return Path(run["work"]) / "variants" / str(number)


def variant_run(run: dict, number: int, inputs: dict) -> dict:
    """The run.json of one variant: its own experiment and folders, local inputs, nothing to publish."""
    chosen, folder = run["sweep"]["variants"][number - 1], variant_folder(run, number)
    left_out = ("sweep", "concurrency", "processes", "sharded", "warnings")
    own = {key: value for key, value in run.items() if key not in left_out}
    own |= {key: chosen[key] for key in ("processes", "sharded", "checkpointing", "attention") if key in chosen}
    own |= {"experiment": run["experiment"] | {"train": chosen["train"]}, "inputs": inputs}
    own |= {"output": {"path": str(folder / "artifact")}, "work": str(folder / "work")}
    own |= {"tokens": str(tokens_folder(run))}
    return own | {"variant": {"number": number, "parent": os.getpid()}}


def train_variants(run: dict, inputs: dict, table: "Table") -> None:
    """Every variant that has no row yet, `concurrency` at a time. However this ends, no process of theirs goes on."""
    lanes: dict[int, Child] = {}
    ended: queue.Queue[Child] = queue.Queue()
    waiting = [number for number in range(1, len(run["sweep"]["variants"]) + 1) if number not in table.rows]
    try:
        while waiting or lanes:
            for lane in range(int(run.get("concurrency", 1))):
                if waiting and lane not in lanes:
                    if reason := table.no_room():
                        table.leave_out(waiting, reason)
                        waiting = []
                    else:
                        lanes[lane] = Child(run, waiting.pop(0), inputs, lane, ended)
            if lanes:
                child = ended.get()
                del lanes[child.lane]
                table.note(child)
    finally:
        for child in lanes.values():
            child.process.terminate()
        for child in lanes.values():
            child.stop()


class Child:
    """The process of one variant: what it prints is passed on, its events with the variant's number."""

    def __init__(self, run: dict, number: int, inputs: dict, lane: int, ended: "queue.Queue[Child]") -> None:
        self.run, self.number, self.lane, self.ended = run, number, lane, ended
        self.error: dict = {}
        self.last, self.began = "", time.monotonic()
        folder = variant_folder(run, number)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        request = folder / "run.json"
        request.write_text(json.dumps(variant_run(run, number, inputs)), encoding="utf-8")
        self.tell("phase", name="start variant", detail=run["sweep"]["variants"][number - 1]["words"])
        # A session of its own: Ctrl-C reaches it through this process, once, and its own processes end with it.
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(request)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment(),
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read, name=f"variant {number}", daemon=True)
        self.reader.start()

    def environment(self) -> dict[str, str]:
        """This process's own, less the GPUs of the variants beside it."""
        if int(self.run.get("concurrency", 1)) < 2 or self.run["device"] == "cpu":
            return dict(os.environ)
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        mine = given.split(",")[self.lane] if given else str(self.lane)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": mine}

    def tell(self, event: str, **fields: object) -> None:
        """An event of this variant."""
        emit(event, **fields, variant=self.number, variants=len(self.run["sweep"]["variants"]))

    def read(self) -> None:
        """Pass on every line to the end of the process. A start, an end or an error is one of the variant alone."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            event = self.event_of(line)
            if event is None:
                self.last = line.strip()[:500] or self.last
                print(line + "\n", end="", flush=True)
            elif event["event"] == "error":
                self.error = event
            elif event["event"] not in ("start", "end", "interrupted"):
                own = {"variant": self.number, "variants": len(self.run["sweep"]["variants"])}
                print(EVENT_PREFIX + json.dumps(event | own) + "\n", end="", flush=True)
        self.process.wait()
        self.ended.put(self)

    def event_of(self, line: str) -> dict | None:
        """The event on a line; None for any other line."""
        try:
            event = json.loads(line.removeprefix(EVENT_PREFIX)) if line.startswith(EVENT_PREFIX) else None
        except ValueError:
            return None
        return event if isinstance(event, dict) and "event" in event else None

    def stop(self) -> None:
        """Wait for the end of a process that was asked to stop; kill it and its processes when it takes too long."""
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.reader.join(5)

    def row(self) -> dict:
        """What became of the variant."""
        seconds, code = round(time.monotonic() - self.began, 1), self.process.returncode
        made = read_json(variant_folder(self.run, self.number) / "artifact" / "manifest.json")
        if code == 0 and made and made["metrics"]["eval_loss"] is not None:
            before = [entry["eval_loss"] for entry in made["eval_history"] if entry["step"] == 0]
            losses = {"eval_loss_before": round(before[0], 6) if before else None, **made["metrics"]}
            kept = {key: losses[key] for key in ("eval_loss_before", "eval_loss", "train_loss", "steps")}
            return {"state": "trained", "seconds": seconds, **kept, "memory_gib": made["measured"]["peak_memory_gib"]}
        reason, hint = self.error.get("message") or self.last or "it said nothing", self.error.get("hint", "")
        if code < 0:
            reason = f"it was killed by {signal.Signals(-code).name}; its memory may have run out"
        state, told = "diverged" if self.error.get("diverged") else "failed", bool(self.error) or code < 0
        row = {"state": state, "seconds": seconds, "reason": one_line_of(Exception(reason)), "hint": hint}
        return row | {"code": code, "told": told}


class Table:
    """What became of the variants, kept where the next job finds it: `sweep.json`, and the adapter of the best."""

    def __init__(self, run: dict, started: float) -> None:
        self.run, self.started = run, started
        self.rows: dict[int, dict] = {}
        self.spent_s = 0.0  # by jobs before this one
        self.is_pushed = True  # the best adapter so far is on the Hub, as far as there is one to be pushed to
        kept = self.kept()
        if kept.get("fingerprint") != run["fingerprint"]:
            return
        self.spent_s = kept["spent_s"]
        self.rows = {row["variant"]: row for row in kept["rows"] if row["state"] in FINAL}
        while self.best and not read_json(variant_folder(run, self.best) / "artifact" / "manifest.json"):
            emit("warning", message=f"the adapter of variant {self.best} is not there any more: it is trained again")
            del self.rows[self.best]
        if self.rows:
            done = ", ".join(str(number) for number in sorted(self.rows))
            emit("phase", name="resume", detail=f"variants that are done: {done}")

    @property
    def place(self) -> str:
        """Where the repo keeps the best adapter; the last commit removes it, as it removes a checkpoint."""
        return f"{stage_folder(self.run)}/checkpoint/best/"

    @property
    def best(self) -> int | None:
        """The trained variant with the lowest held-out loss so far."""
        trained = [row for row in self.rows.values() if row["state"] == "trained"]
        return min(trained, key=lambda row: (row["eval_loss"], row["variant"]))["variant"] if trained else None

    def variant(self, number: int) -> dict:
        """A variant as run.json has it."""
        return self.run["sweep"]["variants"][number - 1]

    def kept(self) -> dict:
        """What an earlier job of this run wrote down: on this disk, or in the repo with the best adapter."""
        path = variant_folder(self.run, 0).parent / "sweep.json"
        if path.is_file() or not self.run["output"].get("repo"):
            return read_json(path)
        return patiently(self.run, "read the sweep so far", START, self.fetch)

    def fetch(self) -> dict:
        """`sweep.json` of the repo, and the best adapter to where its variant has it."""
        from huggingface_hub import hf_hub_download

        seen = look(self.run)
        kept = read_at(self.run, seen, f"{stage_folder(self.run)}/sweep.json")
        names = [name for name in names_in(seen) if name.startswith(self.place)]
        if kept.get("fingerprint") != self.run["fingerprint"] or not names:
            return kept
        scratch, number = Path(self.run["work"]) / "download", kept["best"]
        for name in names:
            hf_hub_download(self.run["output"]["repo"], name, revision=seen.sha, local_dir=scratch)
        target = variant_folder(self.run, number) / "artifact"
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (scratch / self.place).rename(target)
        shutil.rmtree(scratch)
        return kept

    def sorted_rows(self) -> list[dict]:
        """Every row in the order of the variants, the winner marked."""
        own = ("code", "told", "winner")  # how its process ended, and who led when an earlier job wrote this down
        rows = [{key: value for key, value in self.rows[n].items() if key not in own} for n in sorted(self.rows)]
        return [row | ({"winner": True} if row["variant"] == self.best else {}) for row in rows]

    def note(self, child: Child) -> None:
        """A variant has ended: keep its row, and of the adapters the best."""
        number, before = child.number, self.best
        row = {"variant": number, "words": self.variant(number)["words"], **child.row()}
        self.rows[number] = row
        shown = {key: row[key] for key in ("state", "eval_loss", "seconds") if key in row}
        child.tell("variant", **shown)
        if row["state"] != "trained":
            warn(self.run, f"variant {number} (`{row['words']}`) {row['state']}: {row['reason']}")
        self.is_pushed = self.is_pushed and self.best == before
        self.write()
        for other in self.rows:
            if other != self.best:
                shutil.rmtree(variant_folder(self.run, other), ignore_errors=True)

    def leave_out(self, numbers: list[int], reason: str) -> None:
        """These are not started any more."""
        for number in numbers:
            words = self.variant(number)["words"]
            self.rows[number] = {"variant": number, "words": words, "state": "not started", "reason": reason}
        warn(self.run, f"{len(numbers)} of {len(self.run['sweep']['variants'])} variants are not started: {reason}")

    def write(self) -> None:
        """`sweep.json` on this disk, and in the repo in one commit with the best adapter where that is a new one."""
        known = {"fingerprint": self.run["fingerprint"], "best": self.best, "rows": self.sorted_rows()}
        known["spent_s"] = round(self.spent_s + time.time() - self.started, 1)
        path = variant_folder(self.run, 0).parent / "sweep.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(known), encoding="utf-8")
        part.rename(path)
        if not self.run["output"].get("repo"):
            return
        files: dict[str, Path | bytes] = {f"{stage_folder(self.run)}/sweep.json": path}
        if not self.is_pushed and self.best:
            made = artifact_files(variant_folder(self.run, self.best) / "artifact")
            files |= {self.place + name: file for name, file in made.items()}
        title = f"train of {self.run['run_id']}: {len(self.rows)} of {len(self.run['sweep']['variants'])} variants"
        replaces = not self.is_pushed
        try:
            push(self.run, title, files, lambda name: replaces and name.startswith(self.place), PUSH)
            self.is_pushed = True
        except HubFailed as error:  # the next variant's commit brings it along, or the artifact's
            warn(self.run, f"the variants so far are not on the Hub: {error.message}")

    def no_room(self) -> str:
        """Why no further variant can be started; empty where one can, and before anybody knows how long one takes."""
        limits, took = self.run["sweep"], [row["seconds"] for row in self.rows.values() if row["state"] == "trained"]
        if not took or "timeout_s" not in limits:
            return ""
        longest, used = max(took), time.time() - self.started
        left = limits["timeout_s"] - SWEEP_RESERVE_S - used
        if left < longest:
            return f"{max(left, 0) / 60:.0f} minutes are left of the timeout, and the longest took {longest / 60:.0f}"
        price = limits["usd_per_minute"] / 60
        usd = (self.spent_s + used + longest + SWEEP_RESERVE_S) * price
        if limits["max_usd"] is not None and usd > limits["max_usd"]:
            return f"with one more the training would cost ${usd:.2f}, and `sweep.max_usd` is {limits['max_usd']:g}"
        return ""

    def failure(self) -> BaseException:
        """Why there is no artifact: the cause of the first variant.

        An `error` event is what a reader of the log believes first. Where a traceback is all there is, it must be read.
        """
        first = self.rows[min(self.rows)]
        message = f"no variant was trained; variant {first['variant']} (`{first['words']}`) {first['state']}: "
        message += first["reason"]
        if not first["told"]:
            print(message, file=sys.stderr)
            return SystemExit(1)
        kind = InputError if first["code"] == 2 else TrainingFailed
        return kind(message, first["hint"] or "look at what it printed before this")


def train(run: dict, base: Path, train_rows: list[Row], eval_rows: list[Row], started: float) -> None:
    """Everything that needs the heavy libraries, in order. The manifest comes last."""
    emit("phase", name="import libraries")
    import_libraries(run)
    settings = sft_config(run, has_eval=bool(eval_rows))
    emit("phase", name="tokenize")
    tokenizer = load_tokenizer(base)
    to_tokens, limit = tokenize_pairs if is_dpo(run) else tokenize, run["experiment"]["train"]["max_length"]
    packing = getattr(settings, "packing", False)
    splits = packing and settings.packing_strategy != "bfd"  # the others put the rest into the next pack
    train_set, counts = to_tokens(run, tokenizer, train_rows, None if splits else limit)
    eval_set, _ = to_tokens(run, tokenizer, eval_rows, limit) if eval_rows else (None, {})
    emit("phase", name="load base", detail=run["experiment"]["base"]["model"])
    trainer, reporter = make_trainer(run, base, settings, tokenizer, train_set, eval_set)
    emit("phase", name="train", detail=f"{reporter.total} steps")
    run_training(run, trainer, reporter)
    emit("phase", name="save")
    check_weights(trainer.model)
    state = gathered(run, trainer.model)
    part()
    if rank() > 0:
        return
    save(run, trainer.model, base, state)
    metrics = collect_metrics(run, trainer, reporter) | {"rows": len(train_rows), "eval_rows": len(eval_rows), **counts}
    write_card(run, metrics)
    log = trainer.state.log_history
    write_manifest(
        run,
        started,
        inputs=hashed_inputs(run),
        metrics=metrics,
        history=history(log, "loss", lr="learning_rate", grad_norm="grad_norm", **rewards_in(run)),
        eval_history=history(log, "eval_loss", **rewards_in(run, "eval_")),
        measured={"peak_memory_gib": reporter.memory_gib(), "duration_s": round(time.time() - started, 1)},
        resumed_from_step=reporter.first_step,
        seed=settings.seed,
        versions=versions("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"),
    )
    shutil.rmtree(checkpoints(run), ignore_errors=True)
    if "tokens" not in run:  # else others may need them
        shutil.rmtree(tokens_folder(run), ignore_errors=True)
    headline = {key: metrics[key] for key in ("steps", "train_loss", "eval_loss", "tokens_per_s")}
    emit("end", stage="train", duration_s=round(time.time() - started, 1), **headline)


def import_libraries(run: dict) -> None:
    """What takes long to import, while the other nodes do the same; then all of them meet."""
    if nodes_of(run) > 1:
        import trl  # noqa: F401

        find_first_node(run)


# Before anything heavy is imported: is the base whole, do the rows suit it?


def fetch_base(source: dict) -> Path:
    """The folder of the base; from the Hub at its revision, without second copies of the weights."""
    if "path" in source:
        return Path(source["path"])
    return download(source, allow_patterns=BASE_FILES, ignore_patterns=BASE_IGNORED)


def check_base(base: Path) -> None:
    """Raise InputError for a base that cannot be trained: incomplete, pickled, or quantised already."""
    config = read_json(base / "config.json")
    if not config:
        raise InputError(f"the base `{base}` has no readable config.json", "give a Transformers model repo or folder")
    if "quantization_config" in config:
        raise InputError(f"the base `{base}` is quantised already", "give its bfloat16 original; `qlora` quantises it")
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        pickles = [p.name for p in sorted(base.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        found = f"only pickled weights (`{pickles[0]}`)" if pickles else "no weights"
        raise InputError(f"the base `{base}` has {found}", "give a base with .safetensors files")
    for name in sorted(set(read_json(base / "model.safetensors.index.json").get("weight_map", {}).values())):
        if not (base / name).is_file():
            raise InputError(f"the base `{base}` lacks the shard `{name}` of its index", "download the base again")
    for shard in shards:
        check_shard(shard)
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")):
        raise InputError(f"the base `{base}` has no tokenizer", "give a base with tokenizer.json")


def check_shard(path: Path) -> None:
    """Raise InputError when a safetensors file is not as long as its own header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length if length < size else 0))
        expected = 8 + length + max(x["data_offsets"][1] for name, x in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"`{path}` has no readable safetensors header", "download that file again") from None
    if size != expected:
        raise InputError(f"`{path}` is truncated: {size} of {expected} bytes", "download that file again")


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


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


# Settings


def sft_config(run: dict, has_eval: bool) -> Any:
    """The trainer's settings: ours, then the experiment's `train.sft`.

    Raises:
        InputError: a device that is not there, or a `train.sft` key that is unknown, not free or badly set.
    """
    import torch
    from trl import DPOConfig, SFTConfig

    config = DPOConfig if is_dpo(run) else SFTConfig
    if run["device"] == "auto":
        run["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    settings, cpu = run["experiment"]["train"], run["device"] == "cpu"
    if not (cpu or torch.cuda.is_available()):
        raise InputError("`device: cuda`, but torch sees no GPU", "choose a GPU flavor, or check its driver")
    if not cpu and torch.cuda.device_count() < processes_of(run):
        message = f"`processes: {processes_of(run)}`, but torch sees {torch.cuda.device_count()} GPUs"
        raise InputError(message, "choose a flavor with so many, or check its driver")
    if settings["packing"] and settings["sft"].get("packing_strategy") == "wrapped":
        message = "`packing_strategy: wrapped` lets packed rows read the rows before them"
        raise InputError(message, "remove `packing_strategy`: `bfd` keeps them apart")
    if settings["tracking"] == "trackio" and not util.find_spec("trackio"):
        raise InputError("`train.tracking: trackio`, but trackio is not installed", "pip install trackio")
    check_keys(settings["sft"], config)
    sft, loading = dict(settings["sft"]), dict(settings["sft"].get("model_init_kwargs") or {})
    for options, gpu_only in ((sft, GPU_ONLY), (loading, GPU_ONLY_LOADING)):
        for key in [key for key in gpu_only if cpu and key in options]:
            emit("warning", message=f"`{key}: {options.pop(key)}` needs a GPU: left out on the CPU")
    # One device, whole: with "auto" a model that does not fit would move to the CPU in silence, and train for days.
    loading |= {"dtype": "bfloat16"} | ({} if cpu else {"device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}})
    if not cpu and "attn_implementation" not in loading and (kernel := flash_kernel(run)):
        loading["attn_implementation"] = kernel
        if settings["batch_size"] > 1 and not settings["packing"]:
            sft = {"padding_free": True} | sft  # rows end to end, which the kernel keeps apart: nothing is padded
    if run.get("sharded"):
        sft |= sharded_settings()
    if sft.get("padding_free"):  # an evaluation's mean over rows wants one row a batch
        sft = {"per_device_eval_batch_size": 1} | sft
    try:
        made = config(**{**our_settings(run, cpu, has_eval), **sft, "model_init_kwargs": loading})
    except (ValueError, TypeError) as error:
        raise InputError(f"`train.sft`: {error}", "correct that value") from error
    if run.get("sharded") and cpu:
        made.distributed_state.distributed_type = "MULTI_GPU"  # Accelerate 1.15 shards nothing, silently, on CPUs
    return made


def check_keys(sft: dict, config: Any) -> None:
    """Raise InputError for a key of `train.sft` that is taken, or that the trainer's `config` class does not know."""
    known, name = [field.name for field in dataclasses.fields(config)], config.__name__
    fields, owned = FIELD_OF, OWNED.split()
    if name == "DPOConfig":
        fields, owned = FIELD_OF | DPO_FIELD_OF, owned + DPO_OWNED.split()
    for key in sft:
        if key in fields:
            raise InputError(f"`train.sft.{key}` is not free", f"use `{fields[key]}`")
        if key in owned:
            raise InputError(f"`train.sft.{key}` is set by the training script", f"remove `{key}`")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"see the fields of TRL's {name}"
            raise InputError(f"`train.sft.{key}` is not a field of {name}", hint)
    for key in sft.get("model_init_kwargs") or {}:
        if key in OWNED_LOADING:
            raise InputError(f"`train.sft.model_init_kwargs.{key}` is set by the training script", f"remove `{key}`")


def our_settings(run: dict, cpu: bool, has_eval: bool) -> dict:
    """What the experiment's own fields mean to TRL. The rest keeps its defaults."""
    settings = run["experiment"]["train"]
    return {
        "output_dir": str(checkpoints(run)),
        "run_name": run["run_id"],
        "project": run["experiment"]["name"],
        "use_cpu": cpu,
        "seed": settings["seed"],
        "data_seed": settings["seed"],
        "num_train_epochs": settings["epochs"],
        "max_steps": settings["max_steps"] or -1,
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": accumulation_of(run),
        "learning_rate": settings["learning_rate"],
        # 8-bit Adam on the CPU too: a rehearsal runs the code that the GPU will run.
        "optim": "adamw_8bit" if is_quantised(run) else "adamw_torch_fused",
        "gradient_checkpointing": run.get("checkpointing", True),  # off where the plan says that all layers fit
        **(preference_settings(run) if is_dpo(run) else packing_settings(settings)),
        "eval_strategy": "steps" if has_eval else "no",
        "eval_on_start": has_eval and "variant" in run and chosen_checkpoint(run) is None,
        "per_device_eval_batch_size": 1 if settings["packing"] else settings["batch_size"],
        "save_strategy": "steps",
        "save_steps": settings["save_steps"],
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,  # the filter logs a loss of 0 where the loss is not a number
        "disable_tqdm": True,
        "report_to": settings["tracking"],
        "trackio_static_space_id": False,  # otherwise a public Space, made with the caller's token
        **({} if cpu else gpu_settings()),
        **distributed_settings(run),
    }


def packing_settings(settings: dict) -> dict:
    """What only supervised tuning does with its rows."""
    packing = settings["packing"]
    return {
        "packing": packing,
        "max_length": settings["max_length"] if packing else None,  # `tokenize` has cut the rows
        "eval_packing": False,
    }


def gpu_settings() -> dict:
    """What keeps a GPU from waiting. On a CPU a worker would only take the cores that compute."""
    import torch

    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    return workers | {"tf32": torch.cuda.get_device_capability()[0] >= 8}


def bring_kernels(run: dict) -> None:
    """Install what loads a flash kernel, where the plan wants one. Not to have it is no reason to stop."""
    said = (run["experiment"]["train"]["sft"].get("model_init_kwargs") or {}).get("attn_implementation")
    wanted = said or run.get("attention") or ""
    if run["device"] != "cuda" or "/" not in wanted or util.find_spec("kernels"):
        return
    emit("phase", name="install", detail=KERNELS)
    pip = ["uv", "pip", "install", "--python", sys.executable] if shutil.which("uv") else [sys.executable, "-m", "pip"]
    command = [*pip, *([] if "uv" in pip else ["install"]), KERNELS]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [""])[-1]
        emit("warning", message=f"`{KERNELS}` could not be installed: {last[:200]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        emit("warning", message=f"`{KERNELS}` could not be installed: {one_line_of(error)}")


def flash_kernel(run: dict) -> str | None:
    """The flash kernel of the plan, loaded; None, with a warning, where it cannot be had.

    Without it transformers' own attention keeps rows apart by a mask: slower, and never less strict.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    wanted = run.get("attention")
    if not wanted:
        return None
    try:
        lazy_import_flash_attention(wanted)
    except Exception as error:  # of the Hub, of the driver, of what is compiled: there is another way for all of them
        text = f"`{wanted}` cannot be loaded ({one_line_of(error)}): attention is computed without it, and a mask"
        warn(run, f"{text} keeps rows apart; that takes more time and memory")
        return None
    return str(wanted)


def distributed_settings(run: dict) -> dict:
    """What several processes need to be told."""
    if processes_of(run) == 1:
        return {}
    config = read_json(Path(run["launched"]["base"]) / "config.json")
    # Looking for weights that a step did not touch costs a pass over the graph; only these bases can have some.
    partial = "vision_config" in config or "expert" in json.dumps(list(config) + list(config.get("text_config") or {}))
    return {"ddp_find_unused_parameters": partial}


def sharded_settings() -> dict:
    """FSDP2: weights, gradients and optimizer in parts, a layer whole only while it computes."""
    # Read where the base is loaded: one process reads the weights, and the others get their part of it.
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
    # Not FSDP's own `activation_checkpointing`: it renames layers, and PEFT 0.21 then saves adapters without a weight.
    config |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    # With `bf16` Accelerate makes the weights fp32: four times the optimizer, and another training than on one GPU.
    return {"fsdp": True, "fsdp_config": config, "bf16": False}


def lora_config(settings: dict, base: Path) -> Any:
    """PEFT's names for the LoRA choices of the experiment."""
    from peft import LoraConfig

    lora = settings["lora"]
    if "lm_head" in lora["targets"]:
        raise InputError("`train.lora.targets` names `lm_head`, which TRL cannot train", "remove it")
    has_vision = "vision_config" in read_json(base / "config.json")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        exclude_modules=lora["exclude"] or (NOT_TEXT if has_vision else None),
        use_rslora=lora["rslora"],
        use_dora=lora["dora"],
        modules_to_save=lora["modules_to_save"] or None,
        rank_pattern=lora["rank_pattern"],
        alpha_pattern=lora["alpha_pattern"],
    )


# Rows to tokens


def load_tokenizer(base: Path) -> Any:
    """The base's tokenizer. Not its processor, even for a vision-language base: the rows are text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or read_json(base / "chat_template.json").get("chat_template")
    return tokenizer


def tokens_folder(run: dict) -> Path:
    """Rows as tokens, for whoever on this machine needs the same: all variants of a sweep share one folder."""
    return Path(run.get("tokens") or Path(run["work"]) / "tokens")


def encode_once(run: dict, rows: list[Row], tokenizer: Any, loss_on: str) -> list[Example]:
    """What `encode_rows` makes, made by the first of several processes, variants and attempts; the others read it."""
    import pyarrow
    from pyarrow import parquet

    columns = [field.name for field in dataclasses.fields(Example)]
    path = tokens_folder(run) / f"{tokens_key(rows, tokenizer, loss_on)}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            known = parquet.read_table(path).to_pydict()
            return [Example(*values) for values in zip(*(known[name] for name in columns), strict=True)]
        examples = encode_rows(rows, tokenizer, loss_on)
        part = path.with_suffix(".part")
        parquet.write_table(pyarrow.table({name: [getattr(e, name) for e in examples] for name in columns}), part)
        part.rename(path)
        return examples


def tokens_key(rows: list[Row], tokenizer: Any, loss_on: str) -> str:
    """All that decides the tokens: rows, tokenizer, which of them count, and this script, which makes them."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for pattern in TOKENIZER_FILES:
        for path in sorted(Path(tokenizer.name_or_path).glob(pattern)):
            key.update(path.read_bytes())
    for part in (tokenizer.chat_template, loss_on, *map(dataclasses.astuple, rows)):
        key.update(json.dumps(part, default=str).encode())
    return key.hexdigest()[:32]


def tokenize(run: dict, tokenizer: Any, rows: list[Row], limit: int | None) -> tuple[Any, dict]:
    """A data set of `input_ids` and `labels`, cut to `limit` tokens, and what was counted on the way.

    Raises:
        InputError: no row has a trained token within `limit`.
    """
    from datasets import Dataset

    examples = encode_once(run, rows, tokenizer, run["experiment"]["train"]["loss_on"])
    kept = [short for short in (example.cut(limit) for example in examples) if short.trained()]
    longest = max(len(example.ids) for example in examples)
    if len(kept) < len(examples):
        warn_dropped([example for example in examples if not example.cut(limit).trained()], limit, bool(kept))
    dropped = len(examples) - len(kept)
    truncated = sum(len(example.ids) > (limit or longest) for example in examples) - dropped
    if truncated:
        message = f"{truncated} of {len(examples)} rows are longer than `max_length: {limit}` and are cut"
        emit("warning", message=f"{message}; the longest has {longest} tokens")
    columns = {"input_ids": [example.ids for example in kept], "labels": [example.labels for example in kept]}
    counts = {
        "examples": len(kept),
        "longest_row_tokens": longest,
        "truncated_rows": truncated,
        "dropped_rows": dropped,
    }
    return Dataset.from_dict(columns), counts


def warn_dropped(dropped: list[Example], limit: int | None, anything_left: bool) -> None:
    """Say which rows have nothing left to learn once they are cut; raise InputError if that is all of them."""
    prompts = [next((i for i, x in enumerate(e.labels) if x != IGNORED), len(e.labels)) for e in dropped]
    reason = f"the prompt fills `max_length: {limit}` (the longest prompt has {max(prompts)} tokens)"
    if not anything_left:
        enough = max(len(example.ids) for example in dropped)
        raise InputError(f"every row would be dropped: {reason}", f"use `max_length: {enough}`, or shorten the prompts")
    names = ", ".join(example.where for example in dropped[:5])
    emit("warning", message=f"{len(dropped)} rows are dropped, {reason}: {names}")


# Training


def make_trainer(
    run: dict, base: Path, settings: Any, tokenizer: Any, train_set: Any, eval_set: Any
) -> tuple[Any, "Reporter"]:
    """The trainer with the base loaded and its adapter added, and the reporter that listens to it."""
    import torch
    from peft.utils.error import NoMatchingPeftModuleError
    from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
    from trl import DPOTrainer, SFTTrainer

    parts = (PreferenceChanges, DPOTrainer) if is_dpo(run) else (SupervisedChanges, SFTTrainer)
    chosen = run["experiment"]["train"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        trainer = type("Trainer", parts, {})(
            model=str(base),
            args=settings,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            quantization_config=nf4 if is_quantised(run) else None,
            peft_config=lora_config(chosen, base) if chosen["method"] != "full" else None,
        )
    except NoMatchingPeftModuleError as error:
        raise InputError(f"`train.lora.targets`: {error}", "use `all-linear`, or names of this base") from error
    for module in trainer.model.modules():
        # bitsandbytes repacks a CPU weight when it is first evaluated, and from then on passes no gradient through it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    share(run, trainer)
    reporter = type("Reporter", (Reporter, TrainerCallback), {})(run, trainer)
    trainer.add_callback(reporter)
    trainer.remove_callback(PrinterCallback)  # its lines would repeat ours
    return trainer, reporter


def share(run: dict, trainer: Any) -> None:
    """Prepare what several processes share: full batches for each, and the layers that are whole one at a time."""
    settings, processes = trainer.args, trainer.args.world_size
    if processes > 1:
        trainer.train_dataset, trainer.fillers = filled(trainer.train_dataset, settings.train_batch_size * processes)
        if trainer.eval_dataset is not None:
            trainer.eval_dataset, _ = filled(trainer.eval_dataset, settings.eval_batch_size * processes)
    if trainer.is_fsdp_enabled != bool(run.get("sharded")):
        raise RuntimeError("this training was to be sharded, and Accelerate does not do it")
    if run.get("sharded"):  # a family names layers of towers, too, that this base may not have
        there = {type(module).__name__ for module in trainer.model.modules()}
        layers = [name for name in trainer.model._no_split_modules if name in there]
        trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers


def filled(data: Any, multiple: int) -> tuple[Any, int]:
    """`data` with as many rows more as make a multiple, and how many.

    Every process needs as many full batches as the others. Accelerate repeats rows from the beginning; ours are two
    tokens without a label, so that nothing is learned or evaluated twice.
    """
    from datasets import Dataset, concatenate_datasets

    missing = -len(data) % multiple
    if not missing:
        return data, 0
    columns = {"input_ids": data[0]["input_ids"][:1] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    row = {name: [columns[name]] * missing for name in data.column_names}
    return concatenate_datasets([data, Dataset.from_dict(row, features=data.features)]), missing


class TrainerChanges:
    """What differs from TRL's trainers: the order of the rows, and what is loaded from a checkpoint."""

    tokens_seen = tokens_trained = 0  # by all processes, up to the last finished step
    step_seen: Any = 0
    step_trained: Any = 0
    fillers = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> "LongestFirst":
        lengths = self.row_lengths((train_dataset or self.train_dataset).with_format("arrow")[:])
        batch = self.args.per_device_train_batch_size
        per_step = batch * self.args.gradient_accumulation_steps * self.args.world_size
        return LongestFirst(lengths, batch, per_step, self.args.seed, self.fillers)

    def compute_loss_context_manager(self) -> Any:
        import torch

        context = super().compute_loss_context_manager()
        if self.is_fsdp_enabled:  # where Accelerate does not do it: `sharded_settings`
            context.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return context

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and model is not None:  # wrapped already: without it, `resume` wants weights to save
            super()._load_from_checkpoint(checkpoint, model)
            return
        if is_sharded(checkpoint):
            from accelerate.utils import load_fsdp_model

            load_fsdp_model(shard_reader(), self.accelerator, self.model, checkpoint, adapter_only=True)
            return
        before = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(checkpoint, model)
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(before[name])  # PEFT loads float32, QLoRA was training bfloat16

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or not is_sharded(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        import torch
        from accelerate.utils import load_fsdp_optimizer

        load_fsdp_optimizer(shard_reader(), self.accelerator, self.optimizer, self.model, checkpoint, adapter_only=True)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


class SupervisedChanges(TrainerChanges):
    """What differs from SFTTrainer besides: an evaluation loss per token, and token counts."""

    trained_per_eval_row: float = 0.0

    def row_lengths(self, rows: Any) -> list[int]:
        from pyarrow.compute import list_value_length

        return list_value_length(rows["input_ids"]).to_pylist()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict:
        trained = [sum(x != IGNORED for x in labels[1:]) for labels in self.eval_dataset["labels"]]
        self.trained_per_eval_row = sum(trained) / len(trained)
        return super().evaluate(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            mask, counts = inputs.get("attention_mask"), inputs["labels"] != IGNORED
            self.step_seen += inputs["input_ids"].numel() if mask is None else mask[counts.any(dim=1)].sum()
            self.step_trained += counts[:, 1:].sum()
        else:
            # Trainer averages over rows. Divided by the mean tokens of a row, that is the average over tokens. TRL
            # multiplies by the number of processes, as it expects a count over all of them.
            num_items_in_batch = len(inputs["labels"]) * self.trained_per_eval_row * self.args.world_size
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether processes that hold parts wrote it; any number of them reads it, and one that holds all does too."""
    return (Path(checkpoint) / "pytorch_model_fsdp_0").is_dir()


def shard_reader() -> Any:
    """What Accelerate wants to know about sharded checkpoints, for a training that is not sharded itself."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


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


class Pusher:
    """Pushes checkpoints while the training goes on: one at a time, and of those that wait only the newest."""

    def __init__(self, run: dict) -> None:
        self.run, self.changed = run, threading.Condition()
        self.waiting: Path | None = None
        self.pushing = False
        self.superseded: Superseded | None = None
        threading.Thread(target=self.work, name="pusher", daemon=True).start()

    def put(self, folder: Path) -> None:
        """Push this checkpoint next, instead of one that still waits. The trainer may delete `folder` from now on."""
        staged = Path(self.run["work"]) / "push" / folder.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(folder, staged, copy_function=os.link)  # no copy: the same files under a second name
        with self.changed:
            replaced, self.waiting = self.waiting, staged
            self.changed.notify_all()
        if replaced and replaced != staged:
            shutil.rmtree(replaced)

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                folder, self.waiting, self.pushing = self.waiting, None, True
            try:
                self.push(folder)
            except Superseded as error:
                self.superseded = error
            except Exception as error:  # whatever it is: the training goes on, and nobody else can tell of it
                text = getattr(error, "message", "") or f"{type(error).__name__}: {one_line_of(error)}"
                warn(self.run, f"`{folder.name}` is not on the Hub: {text}")
            shutil.rmtree(folder, ignore_errors=True)
            with self.changed:
                self.pushing = False
                self.changed.notify_all()

    def push(self, folder: Path) -> None:
        """One commit: the checkpoint in the place of the one before."""
        place = f"{stage_folder(self.run)}/checkpoint/"
        files: dict[str, Path | bytes] = {place + name: path for name, path in artifact_files(folder).items()}
        title = f"train of {self.run['run_id']}: {folder.name}"
        push(self.run, title, files, lambda name: name.startswith(place), PUSH)
        emit("pushed", step=int(folder.name.partition("-")[2]), repo=self.run["output"]["repo"])

    def finish(self, timeout_s: float, drop_waiting: bool) -> None:
        """Wait, so long, for the push that is under way, and for the one that waits unless it is not needed any more.

        Raises:
            Superseded: a push found that another job makes this stage.
        """
        with self.changed:
            self.waiting = None if drop_waiting else self.waiting
            self.changed.wait_for(lambda: not (self.waiting or self.pushing), timeout_s)
        if self.superseded:
            raise self.superseded


class Reporter:
    """A TrainerCallback: events, intervals, the end of a broken training, marked checkpoints, orderly interrupts."""

    def __init__(self, run: dict, trainer: Any) -> None:
        self.run, self.trainer, args = run, trainer, trainer.args
        epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        self.total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        args.logging_steps = math.ceil(self.total / 200)
        # Evaluate at most about ten times, but at least once an epoch: each time costs as much as training on a third
        # of the held-out rows.
        args.eval_steps = min(epoch, args.save_steps * math.ceil(self.total / args.save_steps / 10))
        self.first_step, self.interrupted = 0, False
        self.pusher = Pusher(run) if run["output"].get("repo") and rank() == 0 else None
        self.busy_s = self.busy_tokens = 0.0  # training alone, in this attempt
        self.logged_s = self.logged_tokens = self.step_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.padding_free and not rows_apart(self.trainer):
            message = "rows that share a sequence read each other in this base: what carries over is no attention mask"
            raise InputError(message, "use `packing: false`, and no `padding_free`")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, lost = self.trainer, self.pusher.superseded if self.pusher else None
        # All processes stop after the same step: one that went on would wait for the others for ever.
        told = [trainer.step_seen, trainer.step_trained, self.interrupted, lost is not None]
        seen, trained, interrupted, superseded = summed(told, args.device)
        if superseded:
            raise lost or Superseded({})  # every further step would be paid twice
        trainer.step_seen = trainer.step_trained = 0
        trainer.tokens_seen, trainer.tokens_trained = trainer.tokens_seen + seen, trainer.tokens_trained + trained
        self.busy_tokens += seen
        self.busy_s += time.monotonic() - self.step_s
        self.interrupted = bool(interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        # Log before each checkpoint: one of weights that are not numbers must not be there to resume from.
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
        seen = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "eval_loss") if key in logs}
        for key in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(seen.get(key, 0.0)):
                self.fail(f"`{key}` is {seen[key]} at step {state.global_step}", seen.get("learning_rate"))
        if "eval_loss" in seen:
            found = rewards(self.run, logs, "eval_")
            emit("eval", step=state.global_step, eval_loss=round(seen["eval_loss"], 6), **found)
        elif "loss" in seen:
            speed = (self.busy_tokens - self.logged_tokens) / max(self.busy_s - self.logged_s, 1e-9)
            self.logged_s, self.logged_tokens = self.busy_s, self.busy_tokens
            numbers = {"epoch": round(state.epoch, 4), "loss": round(seen["loss"], 6), "lr": seen["learning_rate"]}
            numbers |= {"grad_norm": round(seen["grad_norm"], 6), "tokens_per_s": round(speed, 1)}
            numbers |= rewards(self.run, logs)
            emit("step", step=state.global_step, total=self.total, **numbers, memory_gib=self.memory_gib())

    def fail(self, message: str, rate: float | None) -> None:
        """End the run: every further step would be paid for nothing."""
        chosen = self.run["experiment"]["train"]["learning_rate"]
        hint = f"use `train.learning_rate: {chosen / 10:.0e}`, or check the base's weights and the data"
        raise Diverged(f"{message}, with a learning rate of {chosen if rate is None else rate:.3g}", hint)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = checkpoints(self.run) / f"checkpoint-{state.global_step}"
        self.trainer.accelerator.wait_for_everyone()  # each process writes a part of it
        bring_home(self.run, folder, args.device)
        if rank() > 0:
            return
        mark_complete(self.run, folder, self.trainer)
        if self.pusher:
            self.pusher.put(folder)

    def memory_gib(self) -> float:
        """Peak so far: what torch allocated on the GPU, or the process's resident set on the CPU."""
        import torch

        if self.run["device"] == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_IN_A_GIB, 3)


def rows_apart(trainer: Any) -> bool:
    """Whether a row says the same behind any other: the one before it is turned round, and nothing else.

    Masked positions add exactly nothing, so where rows are apart not a bit of the answer changes; the experts of a
    mixture are left room for another order of sums.
    """
    import torch

    pool = [token for ids in trainer.train_dataset[:2]["input_ids"] for token in ids[: 2 * APART]]
    before, row = pool[: len(pool) // 2][:APART], pool[len(pool) // 2 :][:APART]
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            one, other = (read_behind(trainer, first, row) for first in (before, before[::-1]))
    except ValueError as error:  # layers that know that they cannot, and say so
        if "packed sequences" not in str(error):
            raise
        return False
    trainer.model.train()
    tolerance = 0.05 if "expert" in json.dumps(list(trainer.model.config.to_dict())) else 1e-4
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def read_behind(trainer: Any, first: list[int], row: list[int]) -> Any:
    """What the model says of a row that lies behind another, in one sequence as the trainer makes it."""
    import torch

    tokens = {"input_ids": first + row, "labels": first + row, "seq_lengths": [len(first), len(row)]}
    inputs = trainer.data_collator([tokens])
    del inputs["labels"]
    inputs = {k: v.to(trainer.args.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    return trainer.model(**inputs, use_cache=False).logits[0, len(first) :].float()


def run_training(run: dict, trainer: Any, reporter: Any) -> None:
    """Train from the start or from the last complete checkpoint.

    SIGTERM and SIGINT end it with a checkpoint after the current step, or without one after `GRACE_S` seconds. On the
    Hub that checkpoint is pushed as far as the time allows; after a whole training only the push under way is awaited,
    as the artifact follows at once.
    """

    def interrupt(*_: object) -> None:
        nonlocal end
        if reporter.interrupted:
            raise KeyboardInterrupt
        reporter.interrupted, end = True, time.monotonic() + PUSH_GRACE_S
        signal.alarm(GRACE_S)

    end = math.inf
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        resume(chosen_checkpoint(run), trainer, reporter)
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if reporter.pusher:
        left = end - time.monotonic() if reporter.interrupted else LAST_PUSH_S
        reporter.pusher.finish(left, drop_waiting=not reporter.interrupted)
    if reporter.interrupted:
        raise KeyboardInterrupt


def resume(checkpoint: Path | None, trainer: Any, reporter: Any) -> None:
    """Train on from a checkpoint, or from the start without one."""
    from transformers import TrainerState

    agree(run_step(checkpoint), trainer.args)
    if checkpoint is None:
        trainer.train()
        return
    mark = read_json(checkpoint / "complete.json")
    reporter.first_step = mark["step"]
    trainer.tokens_seen, trainer.tokens_trained = mark["tokens_seen"], mark["tokens_trained"]
    emit("phase", name="resume", detail=f"step {reporter.first_step}")
    if reporter.first_step < reporter.total:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # killed after the last step and before the manifest: `train` would add a step
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def run_step(checkpoint: Path | None) -> int:
    """The step of a checkpoint; 0 without one."""
    return read_json(checkpoint / "complete.json")["step"] if checkpoint else 0


def agree(step: int, settings: Any) -> None:
    """Raise RuntimeError unless all processes begin at the same step: each node has found its checkpoint by itself."""
    if summed([step], settings.device)[0] != step * settings.world_size:
        raise RuntimeError(f"the nodes begin at different steps, this one at {step}")


def chosen_checkpoint(run: dict) -> Path | None:
    """The checkpoint to go on from. Several processes are told which: looking removes those that are incomplete."""
    if "launched" not in run:
        return last_checkpoint(run)
    chosen = run["launched"]["checkpoint"]
    return Path(chosen) if chosen else None


def checkpoints(run: dict) -> Path:
    """Where checkpoints live until the manifest is written."""
    return Path(run["work"]) / "checkpoints"


def mark_complete(run: dict, folder: Path, trainer: Any) -> None:
    """Write the sizes of a checkpoint's files beside them, last: without this mark it is half a checkpoint."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    mark = {"fingerprint": run["fingerprint"], "step": trainer.state.global_step, "files": files}
    mark |= {"tokens_seen": int(trainer.tokens_seen), "tokens_trained": int(trainer.tokens_trained)}
    part = folder / "complete.json.part"
    part.write_text(json.dumps(mark), encoding="utf-8")
    part.rename(folder / "complete.json")


def fetch_checkpoint(run: dict) -> None:
    """Bring the checkpoint that an earlier job of this run pushed, if it is whole, to where `last_checkpoint` looks."""
    from huggingface_hub import hf_hub_download

    place, seen = f"{stage_folder(run)}/checkpoint/", look(run)
    sizes = {sibling.rfilename.removeprefix(place): sibling.size for sibling in seen.siblings or []}
    mark = read_at(run, seen, place + "complete.json")
    if not mark:
        return
    if mark["fingerprint"] != run["fingerprint"] or any(sizes.get(name) != n for name, n in mark["files"].items()):
        warn(run, "the checkpoint on the Hub is incomplete or of another run: not used")
        return
    target, scratch = checkpoints(run) / f"checkpoint-{mark['step']}", Path(run["work"]) / "download"
    shutil.rmtree(target, ignore_errors=True)
    emit("phase", name="download checkpoint", detail=f"step {mark['step']}")
    for name in [*mark["files"], "complete.json"]:
        hf_hub_download(run["output"]["repo"], place + name, revision=seen.sha, local_dir=scratch)
    target.parent.mkdir(parents=True, exist_ok=True)
    (scratch / place).rename(target)
    shutil.rmtree(scratch)


def last_checkpoint(run: dict) -> Path | None:
    """The latest complete checkpoint of this run. Others are removed: they would count in the limit of two."""
    folders = sorted(checkpoints(run).glob("checkpoint-*"), key=lambda p: -int(p.name.partition("-")[2]))
    for folder in folders:
        mark = read_json(folder / "complete.json")
        sizes = mark.get("files", {})
        whole = all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in sizes.items())
        readable = is_sharded(folder) or not run.get("sharded")  # the other way round nobody reads it
        if sizes and whole and mark["fingerprint"] == run["fingerprint"] and readable:
            return folder
        shutil.rmtree(folder)
        why = "incomplete or of another run" if readable else "not sharded, and this training is"
        emit("warning", message=f"`{folder.name}` is {why}: removed")
    return None


# Preferences: what `method: dpo` does otherwise


def is_dpo(run: dict) -> bool:
    """Whether the rows are pairs of answers."""
    return run["experiment"]["train"]["method"] == "dpo"


def is_quantised(run: dict) -> bool:
    """Whether the base is loaded in 4 bits."""
    chosen = run["experiment"]["train"]
    return chosen["dpo"]["quantize"] if is_dpo(run) else chosen["method"] == "qlora"


def preference_settings(run: dict) -> dict:
    """What DPOConfig is told instead of `packing_settings`."""
    dpo = run["experiment"]["train"]["dpo"]
    return {"beta": dpo["beta"], "loss_type": [dpo["loss"]], "max_length": None}  # `tokenize_pairs` has cut the rows


def tokenize_pairs(run: dict, tokenizer: Any, rows: list[Row], limit: int) -> tuple[Any, dict]:
    """A data set of the token ids that DPOTrainer makes of pairs, cut to `limit`, and what was counted on the way.

    Raises:
        InputError: no pair has two different answers within `limit`.
    """
    from datasets import Dataset

    whole = encode_pairs(rows, tokenizer, partial(encode_once, run))
    cut = [(chosen.cut(limit), rejected.cut(limit)) for chosen, rejected in whole]
    answered = [pair for pair in cut if all(answer.trained() for answer in pair)]
    if len(answered) < len(cut):
        lost = [pair for pair, short in zip(whole, cut, strict=True) if not all(answer.trained() for answer in short)]
        lost = [max(pair, key=lambda answer: len(answer.ids)) for pair in lost]
        warn_dropped(lost, limit, bool(answered))
    kept = [pair for pair in answered if pair[0].ids != pair[1].ids]
    warn_same([chosen.where for chosen, rejected in answered if chosen.ids == rejected.ids], limit, bool(kept))
    lengths = [max(len(answer.ids) for answer in pair) for pair in whole]
    truncated = sum(length > limit for length in lengths) - (len(cut) - len(answered))
    if truncated:
        message = f"{truncated} of {len(whole)} pairs are longer than `max_length: {limit}` and are cut"
        emit("warning", message=f"{message}; the longest has {max(lengths)} tokens")
    columns = dict(zip(PARTS, map(list, zip(*map(three_parts, kept), strict=True)), strict=True))
    counts = {"examples": len(kept), "longest_row_tokens": max(lengths)}
    return Dataset.from_dict(columns), counts | {"truncated_rows": truncated, "dropped_rows": len(whole) - len(kept)}


def three_parts(pair: tuple[Example, Example]) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected ids. The answers begin where the first of them leaves the prompt, as in TRL."""
    start = min(next(i for i, label in enumerate(answer.labels) if label != IGNORED) for answer in pair)
    chosen, rejected = pair
    return chosen.ids[:start], chosen.ids[start:], rejected.ids[start:]


def warn_same(same: list[str], limit: int, anything_left: bool) -> None:
    """Say which pairs teach nothing; raise InputError if no pair is left."""
    if not same:
        return
    reason = f"`chosen` and `rejected` are the same within `max_length: {limit}`"
    if not anything_left:
        raise InputError(f"every pair would be dropped: {reason}", "write pairs of answers that differ")
    emit("warning", message=f"{len(same)} pairs are dropped, {reason}: {', '.join(same[:5])}")


class PreferenceChanges(TrainerChanges):
    """What differs from DPOTrainer besides: the rows are tokens already, and token counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        rows, settings = kwargs["eval_dataset"], kwargs["args"]
        if rows is not None:  # TRL averages rewards over batches: only of equal batches is that the mean of all rows
            most = settings.per_device_eval_batch_size
            settings.per_device_eval_batch_size = next(n for n in range(most, 0, -1) if len(rows) % n == 0)
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def row_lengths(self, rows: Any) -> list[int]:
        from pyarrow.compute import list_value_length

        prompts, chosen, rejected = (list_value_length(rows[name]).to_pylist() for name in PARTS)
        return [prompt + max(both) for prompt, *both in zip(prompts, chosen, rejected, strict=True)]

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.step_seen += inputs["attention_mask"].sum()
            self.step_trained += inputs["completion_mask"][:, 1:].sum()
        return super().compute_loss(model, inputs, *args, **kwargs)


def rewards_in(run: dict, prefix: str = "") -> dict[str, str]:
    """Our names of the rewards, and TRL's: how much more the chosen answers gained, and for which part of the pairs."""
    if not is_dpo(run):
        return {}
    return {"reward_margin": f"{prefix}rewards/margins", "reward_accuracy": f"{prefix}rewards/accuracies"}


def rewards(run: dict, logs: dict, prefix: str = "") -> dict[str, float]:
    """The rewards in an entry of the trainer's log."""
    return {name: round(float(logs[said]), 6) for name, said in rewards_in(run, prefix).items()}


def last_rewards(run: dict, log: list[dict]) -> dict[str, float]:
    """The rewards that the training ended with, of the rows it learned from and of those held out."""
    last = {key: value for entry in log for key, value in entry.items()}
    known = [prefix for prefix in ("", "eval_") if f"{prefix}loss" in last]
    return {f"{prefix}{name}": value for prefix in known for name, value in rewards(run, last, prefix).items()}


def preference_facts(run: dict, metrics: dict) -> dict[str, Any]:
    """Lines of the model card."""
    if not is_dpo(run):
        return {}
    dpo = run["experiment"]["train"]["dpo"]
    facts = {"preferences": f"beta {dpo['beta']:g}, loss {dpo['loss']}, {'4-bit' if dpo['quantize'] else 'bf16'} base"}
    for name in ("reward_margin", "reward_accuracy", "eval_reward_margin", "eval_reward_accuracy"):
        if name in metrics:
            facts[name.replace("eval", "validation").replace("_", " ")] = metrics[name]
    return facts


# Result


def check_weights(model: Any) -> None:
    """Raise TrainingFailed unless the trained weights are finite and have moved."""
    trained = {name: own_part(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if not parameter.isfinite().all():
            raise Diverged(f"the trained weight `{name}` is not finite", "use a lower `train.learning_rate`")
    second = [p for name, p in trained.items() if "lora_B" in name]  # zero until the first update
    if second and not any(summed([p.any() for p in second], second[0].device)):
        hint = "train for more steps than the warm-up, with a `train.learning_rate` above 0"
        raise TrainingFailed("the adapter is what it was before training: no weight has moved", hint)


def own_part(parameter: Any) -> Any:
    """What this process holds of a parameter: all of it, unless it is sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def gathered(run: dict, model: Any) -> dict[str, Any] | None:
    """The weights to save of a sharded model, whole and in host memory, for the first process; None of another model.

    Called by every process: one parameter after the other is put together on its GPU, and leaves it again.
    """
    if not run.get("sharded"):
        return None
    own, parts, state = dict(model.named_parameters()), model.state_dict(), {}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()  # the same again
    adapter = {name for name, parameter in own.items() if parameter.requires_grad}
    kept = parts.keys() - tied if run["experiment"]["train"]["method"] == "full" else adapter
    for name in [name for name in parts if name in kept]:
        part = parts[name]
        whole = (part.full_tensor() if hasattr(part, "full_tensor") else part).cpu()
        state |= {name: whole} if rank() == 0 else {}
    return state


def save(run: dict, model: Any, base: Path, state: dict[str, Any] | None) -> None:
    """The adapter, or the whole model with the base's tokenizer files byte for byte. Safetensors only, no pickles."""
    output = Path(run["output"]["path"])
    if run["experiment"]["train"]["method"] == "full":
        model.save_pretrained(output, state_dict=state)
        for path in sorted({p for pattern in TOKENIZER_FILES for p in base.glob(pattern) if p.is_file()}):
            shutil.copyfile(path, output / path.name)
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = run["experiment"]["base"]["model"]
        config.revision = run["inputs"]["base"].get("revision") or run["experiment"]["base"]["revision"]
        model.save_pretrained(output, save_embedding_layers=False, state_dict=state)
        if state is not None and (count := saved_weights(output)) < len(state):
            raise RuntimeError(f"{count} of {len(state)} weights were saved")


def saved_weights(folder: Path) -> int:
    """How many tensors the headers of a folder's safetensors files name."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        count += len(header.keys() - {"__metadata__"})
    return count


def collect_metrics(run: dict, trainer: Any, reporter: Any) -> dict:
    """The manifest's metrics; the training loss is the mean over all steps, those of earlier attempts too."""
    losses = history(trainer.state.log_history, "loss")
    steps = [0, *(entry["step"] for entry in losses)]
    summed = sum(e["loss"] * (e["step"] - before) for e, before in zip(losses, steps, strict=False))
    evals = history(trainer.state.log_history, "eval_loss")
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trainable, total = sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
    if hasattr(trainer.model, "get_nb_trainable_parameters"):  # knows that a 4-bit byte holds two parameters
        trainable, total = trainer.model.get_nb_trainable_parameters()
    return {
        "train_loss": round(summed / steps[-1], 6),
        "eval_loss": round(evals[-1]["eval_loss"], 6) if evals else None,
        **last_rewards(run, trainer.state.log_history),
        "steps": trainer.state.global_step,
        "tokens_seen": int(trainer.tokens_seen),
        "tokens_trained": int(trainer.tokens_trained),
        "tokens_per_s": round(reporter.busy_tokens / reporter.busy_s, 1) if reporter.busy_s else None,
        "trainable_parameters": trainable,
        "total_parameters": total,
    }


def history(log: list[dict], name: str, **more: str) -> list[dict]:
    """The entries of the trainer's log that hold `name`, as numbers; `more` are other fields under a shorter name."""
    fields = {name: name, **more}
    picked = [entry for entry in log if name in entry]
    return [{"step": e["step"], **{k: float(e[logged]) for k, logged in fields.items()}} for e in picked]


def hashed_inputs(run: dict) -> dict:
    """The run's inputs, with the SHA-256 of data that came as a file."""
    inputs = said_inputs(run)
    for name, source in run["inputs"].items():
        if (path := Path(source.get("path", "."))).is_file():
            inputs[name]["sha256"] = file_entry(path.parent, path)["sha256"]
    return inputs


def write_card(run: dict, metrics: dict) -> None:
    """README.md: the model card, with the relation to the base that the Hub's model tree reads."""
    experiment, output = run["experiment"], Path(run["output"]["path"])
    chosen, base, data = experiment["train"], experiment["base"], experiment["data"]
    full = chosen["method"] == "full"
    revisions = {key: run["inputs"][key].get("revision") or experiment[key]["revision"] for key in ("base", "data")}
    dataset = data["dataset"] if "repo" in run["inputs"]["data"] else Path(data["dataset"]).name
    front = ["library_name: " + ("transformers" if full else "peft"), "pipeline_tag: text-generation"]
    is_local = base["model"].startswith((".", "/", "~"))
    if not is_local:
        front += [f"base_model: {base['model']}", f"base_model_relation: {'finetune' if full else 'adapter'}"]
    if "repo" in run["inputs"]["data"]:
        front += ["datasets:", f"- {data['dataset']}"]
    facts = {
        "base": "a local folder" if is_local else f"{base['model']} at {revisions['base']}",
        "data": f"{dataset} at {revisions['data']}: {metrics['rows']} rows, "
        + ("pairs of answers" if is_dpo(run) else f"loss on {chosen['loss_on']}"),
        "method": chosen["method"]
        + (f", r {chosen['lora']['r']}, alpha {chosen['lora']['alpha']}" if not full else ""),
        **preference_facts(run, metrics),
        "steps": f"{metrics['steps']} of {chosen['batch_size']} x {chosen['gradient_accumulation']} rows",
        "learning rate": chosen["learning_rate"],
        "training loss": metrics["train_loss"],
        "validation loss": metrics["eval_loss"],
        "run": f"{run['run_id']}, attempt {run['attempt']}, seed {chosen['seed']}",
        "made with": ", ".join(" ".join(item) for item in versions("trl", "transformers", "peft", "torch").items()),
    }
    facts |= {"chosen for": f"the lowest validation loss of a sweep, by {run['won']}"} if "won" in run else {}
    facts |= origin(run)
    if run["output"].get("repo") and not full and experiment["merge"]:
        facts["merged model"] = experiment["output"]["repo"]
    tags = ["- mergetune", *(["- dpo"] if is_dpo(run) else ["- sft", f"- {chosen['method']}"])]
    table = "".join(f"| {name} | {str(value).replace('|', '/')} |\n" for name, value in facts.items())
    text = "---\n" + "\n".join([*front, "tags:", *tags]) + "\n---\n"
    text += f"# {experiment['name']}\n\n{experiment['hypothesis'].strip()}\n\n| | |\n|---|---|\n{table}"
    (output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
