# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "httpx2==2.16.2",
#   "huggingface_hub==2.4.0",
#   "safetensors==0.8.0",
#   "torch==2.13.0",
# ]
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Merge a LoRA adapter into its base model, one tensor at a time; runs on a cheap CPU machine.

    python scripts/merge_adapter.py run.json

The output folder gets the base's safetensors files with the same names, headers and order, the adapted tensors
rewritten and every other byte copied, plus the base's tokenizer and config files byte for byte, a model card and,
last, `manifest.json`. Memory does not grow with the model: the update of one tensor is held at a time. The result is
bit-identical to `PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)` on a CPU for LoRA,
rsLoRA, DoRA, rank and alpha patterns and `modules_to_save`. What cannot be merged this way is refused by name before
anything is written (exit code 2).
"""

import argparse
import difflib
import filecmp
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

Tensor = Any  # torch.Tensor: torch is imported after the inputs were checked, so that bad input fails fast

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MERGEABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names: torch's names
COPY_BYTES = 8 << 20  # held at once of a tensor that is only copied
BLOCK_ELEMENTS = 1 << 17  # rewritten at once: few enough to stay in the processor's cache

# Parts of a name that only say where a module sits. transformers 5 renames modules when it loads old files, so Gemma 3
# has `language_model.model.layers.0` on disk and `model.language_model.layers.0` in memory and in the adapter.
WRAPPERS = {"model", "base_model", "language_model", "text_model", "vision_model"}
HEADS = {"lm_head", "embed_out"}
EMBEDDINGS = {"embed_tokens", "embed_in", "word_embeddings", "wte"}

INDEX = "model.safetensors.index.json"
COPIED_FOLDER = "additional_chat_templates"
COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tekken.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip

# Keys of adapter_config.json that are read below, or that change nothing about a merge whatever they say.
KNOWN_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
CANNOT = {
    "alora_invocation_tokens": "an activated LoRA switches on inside the prompt, so no single set of weights equals it",
    "arrow_config": "Arrow picks adapters for each token, so no single set of weights equals it",
    "fan_in_fan_out": "the base stores these layers transposed (GPT-2's Conv1D)",
    "kasa_config": "KaSA changes the base's weights before training",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it trained a bias beside the LoRA matrices",
    "target_parameters": "it adapts stacked parameters, such as mixture-of-experts weights",
    "trainable_token_indices": "it trained single rows of the embeddings",
    "use_qalora": "QA-LoRA belongs to a quantised base",
}
PLAIN_INITS = ("gaussian", "eva", "orthogonal")  # like true and false, they leave the base's weights alone
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

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


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file. `start` and `size` are bytes, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file as its header tells it: `head` is the length and the JSON as they are on disk."""

    path: Path
    head: bytes
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Base:
    """A base model folder; the headers of all its weight files were read and checked."""

    folder: Path
    config: dict
    shards: tuple[TensorFile, ...]

    def tensors(self) -> dict[str, Entry]:
        return {entry.name: entry for shard in self.shards for entry in shard.entries}


@dataclass(frozen=True)
class Lora:
    """Add `scale * b @ a` to a weight; with DoRA's `magnitude`, then rescale its rows."""

    a: Entry
    b: Entry
    scale: float
    magnitude: Entry | None


Change = Lora | Entry  # an Entry takes the place of the base's tensor (`modules_to_save`)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="path of the run.json of a merge stage")
    merge(load_run(parser.parse_args().run, "merge"))


def merge(run: dict) -> None:
    """Carry out a merge stage. Raises InputError for what cannot be merged, before the output folder is touched."""
    started = time.time()
    emit("start", stage=run["stage"], run_id=run["run_id"])
    begin(run)
    base_folder, adapter_folder = fetch(run["inputs"]["base"]), fetch(run["inputs"]["adapter"])
    emit("phase", name="check")
    base = read_base(base_folder)
    settings, adapter = read_adapter(adapter_folder)
    changes = plan_changes(base, settings, adapter)
    check_tokenizer(base, adapter_folder)
    for message in doubts(run, base_folder, settings, adapter_folder):
        emit("warning", message=message)
    output = fresh_output(run)
    weight_bytes = sum(shard.path.stat().st_size for shard in base.shards)
    require_disk(output, weight_bytes + (64 << 20))
    emit("phase", name="merge", detail=f"{len(changes)} of {len(base.tensors())} tensors")
    write_weights(base, changes, output, progress_in_mib(weight_bytes))
    copy_base_files(base_folder, output)
    (output / "README.md").write_text(model_card(run, settings), encoding="utf-8")
    emit("phase", name="checksums")
    replaced = sum(isinstance(change, Entry) for change in changes.values())
    metrics = {"tensors": len(base.tensors()), "merged": len(changes) - replaced, "replaced": replaced}
    metrics |= {"bytes": weight_bytes}
    measured = {"peak_memory_gib": round(peak_memory_gib(), 3)}
    write_manifest(run, started, metrics=metrics, versions=versions("torch", "safetensors"), measured=measured)
    emit("end", stage=run["stage"], duration_s=round(time.time() - started, 3), **metrics, **measured)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"`{path}` is not JSON: {error}", f"fetch `{path.name}` again") from error
    if not isinstance(content, dict):
        raise InputError(f"`{path}` is not a JSON object", f"fetch `{path.name}` again")
    return content


def read_header(path: Path) -> TensorFile:
    """Read the header of a safetensors file; its tensors in file order.

    Raises:
        InputError: the header cannot be read, or the file is not as long as the header says (a cut-off download).
    """
    size, hint = path.stat().st_size, f"fetch `{path.name}` again: its download or upload was cut off"
    with path.open("rb") as handle:
        head = handle.read(8)
        head += handle.read(min(int.from_bytes(head, "little"), size))
    entries = []
    try:
        for name, item in json.loads(head[8:]).items():
            if name != "__metadata__":
                begin, end = item["data_offsets"]
                shape = tuple(int(length) for length in item["shape"])
                entries.append(Entry(name, item["dtype"], shape, path, len(head) + begin, end - begin))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"`{path}` ({size} bytes) has no readable safetensors header", hint) from error
    entries.sort(key=lambda entry: (entry.start, entry.size))
    position = len(head)
    for entry in entries:
        expected = math.prod(entry.shape) * ITEM_BYTES[entry.dtype] if entry.dtype in ITEM_BYTES else entry.size
        if (entry.start, entry.size) != (position, expected):
            raise InputError(f"`{path}`: the header misplaces `{entry.name}`", hint)
        position += entry.size
    if position != size:
        raise InputError(f"`{path}` has {size} bytes, its header promises {position}", hint)
    return TensorFile(path, head, tuple(entries))


def read_base(folder: Path) -> Base:
    """Read config and headers of the base. Raises InputError when it is not an unquantised safetensors model."""
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter: swap `base` and `adapter`" if is_adapter else "name a model in transformers' format"
        raise InputError(f"the base `{folder}` has no config.json", hint)
    config = read_json(folder / "config.json")
    if quantised := config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config"):
        message = f"the base `{folder}` is quantised (`{quantised.get('quant_method', '?')}`)"
        message += ": config.json has `quantization_config`"
        raise InputError(message, "set `base.model` to the unquantised model that this one was made from")
    placed = shard_names(folder)
    shards = tuple(read_header(folder / name) for name in sorted(set(placed.values()) or {"model.safetensors"}))
    seen: dict[str, str] = {}
    for entry in (entry for shard in shards for entry in shard.entries):
        if entry.name in seen:
            message = f"both `{seen[entry.name]}` and `{entry.file.name}` hold `{entry.name}`"
            raise InputError(message, f"fetch `{folder}` again: it mixes two versions of the model")
        seen[entry.name] = entry.file.name
    for tensor, shard_name in placed.items():
        if seen.get(tensor) != shard_name:
            hint = f"fetch `{shard_name}` again: it is of another version than the index"
            raise InputError(f"`{INDEX}` places `{tensor}` in `{shard_name}`, which does not hold it", hint)
    return Base(folder, config, shards)


def shard_names(folder: Path) -> dict[str, str]:
    """The index's tensor name: file name; empty when all is in model.safetensors, which transformers prefers.

    Raises:
        InputError: no weights that are safetensors, or a file that the index names is missing.
    """
    if (folder / "model.safetensors").is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        if pickles:
            message = f"the base `{folder}` has its weights in a pickle only: `{pickles[0]}`"
            raise InputError(message, "use a revision with safetensors, or convert it once with save_pretrained()")
        raise InputError(f"the base `{folder}` has neither model.safetensors nor `{INDEX}`", "fetch all its files")
    placed = read_json(folder / INDEX).get("weight_map") or {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"`{INDEX}` names `{name}`, which is missing in `{folder}`", f"fetch `{name}` again")
    return placed


def read_adapter(folder: Path) -> tuple[dict, TensorFile]:
    """Read settings and header of the adapter. Raises InputError for every setting that cannot be merged."""
    if not (folder / "adapter_config.json").is_file():
        is_model = (folder / "config.json").is_file()
        hint = "it is a whole model, which needs no merge" if is_model else "name a folder that PEFT saved"
        raise InputError(f"the adapter `{folder}` has no adapter_config.json", hint)
    settings = read_json(folder / "adapter_config.json")
    for key, only in (("peft_type", "LORA"), ("bias", "none")):
        if settings.get(key) != only:
            message = f"adapter_config.json: `{key}` is `{settings.get(key)}`, only `{only}` can be merged here"
            raise InputError(message, f"train with `{key}: {only}`, or merge it with PEFT itself")
    for key in sorted(set(settings) - KNOWN_KEYS):
        if settings[key]:
            message = f"adapter_config.json: `{key}` is set, which cannot be merged here: "
            message += CANNOT.get(key, "this script does not know what it does to the weights")
            raise InputError(message, f"train without `{key}`, or use the adapter with PEFT, unmerged")
    init = settings.get("init_lora_weights", True)
    if str(init).lower().startswith(CHANGED_BASE_INITS):
        message = f"adapter_config.json: `init_lora_weights` is `{init}`, which changed the base before training"
        hint = "save the adapter again with `path_initial_model_for_weight_conversion`, or train with the default"
        raise InputError(message, hint)
    if not isinstance(init, bool) and init not in PLAIN_INITS:
        message = f"adapter_config.json: `init_lora_weights` is `{init}`, which this script does not know"
        raise InputError(message, f"train with one of: true, {', '.join(PLAIN_INITS)}")
    if not (folder / "adapter_model.safetensors").is_file():
        is_pickle = (folder / "adapter_model.bin").is_file()
        hint = "save it with PEFT's `safe_serialization=True`" if is_pickle else "fetch all its files"
        raise InputError(f"the adapter `{folder}` has no adapter_model.safetensors", hint)
    return settings, read_header(folder / "adapter_model.safetensors")


def plan_changes(base: Base, settings: dict, adapter: TensorFile) -> dict[str, Change]:
    """What changes in the base, by tensor name on disk, with every name, shape and dtype checked.

    Raises:
        InputError: an adapter tensor of an unknown kind, without counterpart, of another shape, or of a tied base.
    """
    layers, whole = sort_adapter(adapter)
    tensors, tied = base.tensors(), is_tied(base)
    tables = name_tables(tensors)
    changes: dict[str, Change] = {}
    for name in [*(f"{module}.weight" for module in layers), *whole]:
        if tied and (EMBEDDINGS | HEADS) & set(name.split(".")):
            message = f"the adapter trained `{name}`, but the base ties its embeddings to its output layer"
            raise InputError(message, "train without it in `lora.modules_to_save` and `lora.targets`")
        target = tensors[find_target(name, tables)]
        if target.name in changes:
            message = f"two tensors of the adapter change `{target.name}`; the second is `{name}`"
            raise InputError(message, "save the adapter again with PEFT, or merge it with PEFT itself")
        if name in whole:
            changes[target.name] = replacement_of(target, whole[name])
        else:
            module = name.removesuffix(".weight")
            changes[target.name] = lora_of(target, module, layers[module], settings)
    if not changes:
        raise InputError(f"`{adapter.path}` holds no tensors", "look at the training: it saved nothing")
    return changes


def sort_adapter(adapter: TensorFile) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """LoRA parts (`lora_A.weight`, …) by module, and whole tensors by name, both without PEFT's prefix."""
    layers: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for entry in adapter.entries:
        name = entry.name.removeprefix("base_model.model.")
        if name == entry.name:
            message = f"adapter tensor `{name}` does not begin with `base_model.model.`"
            raise InputError(message, "save the adapter with PEFT's save_pretrained()")
        if found := re.fullmatch(r"(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)", name):
            layers.setdefault(found[1], {})[found[2]] = entry
        elif reason := strange(name):
            raise InputError(f"adapter tensor `{entry.name}` cannot be merged: {reason}", "merge it with PEFT itself")
        else:
            whole[name] = entry
    for module, parts in layers.items():
        if missing := {"lora_A.weight", "lora_B.weight"} - set(parts):
            message = f"the adapter has only half of `{module}`: `{min(missing)}` is missing"
            raise InputError(message, f"fetch `{adapter.path.name}` again")
    return layers, whole


def strange(name: str) -> str | None:
    """Why the adapter tensor `name` is neither half of a LoRA layer nor a whole saved tensor; None when it is one."""
    if "lora_embedding_" in name:
        return "it is LoRA on an embedding"
    if name.endswith(".lora_B.bias"):
        return "it is the bias of a LoRA layer (`lora_bias`)"
    if ".token_adapter." in name or "trainable_tokens_" in name:
        return "it is single embedding rows (`trainable_token_indices`)"
    if ".base_layer." in name:
        return "it is a copy of the base, saved because LoRA is on an embedding or output layer"
    if ".lora_" in name:
        return "this script does not know its kind"
    return None


def is_tied(base: Base) -> bool:
    """Are the embeddings also the output layer? As the config says, or else as the weights show."""
    said = base.config.get("tie_word_embeddings", (base.config.get("text_config") or {}).get("tie_word_embeddings"))
    tensors = base.tensors().values()
    heads = [entry for entry in tensors if HEADS & set(entry.name.split("."))]
    inputs = [entry for entry in tensors if EMBEDDINGS & set(entry.name.split("."))]
    # Old configs leave out the default; then the same bytes twice are one tied tensor that was saved twice.
    return bool(said) or not heads or (said is None and any(same_bytes(h, i) for h in heads for i in inputs))


def same_bytes(one: Entry, other: Entry) -> bool:
    return one.size == other.size and all(a == b for a, b in zip(pieces(one), pieces(other), strict=True))


def short_names(name: str) -> list[str]:
    """`name` as it is, then with fewer and fewer wrapper parts."""
    parts = name.split(".")
    return [".".join(part for part in parts if part not in dropped) for dropped in (set(), {"model"}, WRAPPERS)]


def name_tables(names: Iterable[str]) -> list[dict[str, list[str]]]:
    """For each step of `short_names`: the tensors on disk that have the short name."""
    tables: list[dict[str, list[str]]] = [{}, {}, {}]
    for name in names:
        for table, short in zip(tables, short_names(name), strict=True):
            table.setdefault(short, []).append(name)
    return tables


def find_target(name: str, tables: list[dict[str, list[str]]]) -> str:
    """The tensor on disk that the adapter calls `name`: the strictest table that knows it decides."""
    for table, short in zip(tables, short_names(name), strict=True):
        found = table.get(short, [])
        if len(found) == 1:
            return found[0]
        if found:
            message = f"adapter tensor `{name}` fits several tensors of the base: `{found[0]}`, `{found[1]}`"
            raise InputError(message, "merge it with PEFT itself")
    near = difflib.get_close_matches(name, tables[0], n=1)
    hint = f"the nearest one is `{near[0]}`" if near else "none has a similar name"
    hint += "; name the base that this adapter was trained on"
    raise InputError(f"adapter tensor `{name}` matches no tensor of the base", hint)


def check_dtypes(*entries: Entry) -> None:
    for entry in entries:
        if entry.dtype not in MERGEABLE:
            message = f"`{entry.name}` in `{entry.file.name}` is stored as `{entry.dtype}`"
            raise InputError(message, f"use weights stored as one of: {', '.join(MERGEABLE)}")


def lora_of(target: Entry, module: str, parts: dict[str, Entry], settings: dict) -> Lora:
    """The update of one weight. Raises InputError for a shape or rank that does not fit."""
    a, b, magnitude = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_magnitude_vector")
    check_dtypes(target, *parts.values())
    if len(target.shape) != 2:
        message = f"`{target.name}` has shape {list(target.shape)}: only LoRA on linear layers can be merged"
        raise InputError(message, f"leave `{module}` out of `lora.targets`, or merge it with PEFT itself")
    rank = pattern_value("rank_pattern", settings, module, settings.get("r", 8))
    alpha = pattern_value("alpha_pattern", settings, module, settings.get("lora_alpha", 8))
    if (b.shape, a.shape) != ((target.shape[0], rank), (rank, target.shape[1])):
        message = f"`{target.name}` has shape {list(target.shape)}, the adapter's parts have {list(b.shape)} and"
        message += f" {list(a.shape)} where adapter_config.json says rank {rank}"
        raise InputError(message, "name the base that this adapter was trained on")
    if bool(settings.get("use_dora")) != (magnitude is not None):
        message = f"adapter_config.json: `use_dora` is `{settings.get('use_dora')}`, the tensors of `{module}` disagree"
        raise InputError(message, "fetch the adapter again: its two files are of different runs")
    if magnitude is not None and magnitude.shape != target.shape[:1]:
        message = f"`{magnitude.name}` has shape {list(magnitude.shape)}, expected {list(target.shape[:1])}"
        raise InputError(message, "name the base that this adapter was trained on")
    return Lora(a, b, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank, magnitude)


def pattern_value(key: str, settings: dict, module: str, default: float) -> float:
    """The value of the first pattern under `key` that matches the end of `module`, as PEFT matches it."""
    patterns: dict[str, float] = settings.get(key) or {}
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"adapter_config.json: `{key}` has `{pattern}`: {error}", "write a valid regex") from error
    return default


def replacement_of(target: Entry, source: Entry) -> Entry:
    check_dtypes(target, source)
    if source.shape != target.shape:
        message = f"`{source.name}` has shape {list(source.shape)}, the base's `{target.name}` {list(target.shape)}"
        raise InputError(message, "train without adding tokens or resizing embeddings")
    return source


def check_tokenizer(base: Base, adapter_folder: Path) -> None:
    """Raise InputError when the tokenizer saved with the adapter has tokens that the base's has not."""
    ours, theirs = adapter_folder / "tokenizer.json", base.folder / "tokenizer.json"
    if ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False):
        return
    trained_on = token_ids(adapter_folder)
    known = token_ids(base.folder) if trained_on else {}
    rows = max((e.shape[0] for e in base.tensors().values() if "embed_tokens" in e.name.split(".")), default=math.inf)
    # A base with nothing but a sentencepiece file lists no tokens; an id beyond its embeddings still shows.
    added = [token for token, number in trained_on.items() if (token not in known if known else number >= rows)]
    if added:
        shown = ", ".join(f"`{token}`" for token in added[:3])
        message = f"the adapter's tokenizer has {len(added)} tokens that the base's has not: {shown}"
        raise InputError(message, "train with the base's own tokenizer: its files are what the merged model gets")


def token_ids(folder: Path) -> dict[str, int]:
    """Every token that the tokenizer files in `folder` list, with its id; empty when they list none."""
    tokens: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            tokens |= read_json(folder / name)
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        tokens |= {token["content"]: int(number) for number, token in decoder.items()}
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        vocab = content["model"]["vocab"]
        tokens |= vocab if isinstance(vocab, dict) else {piece[0]: number for number, piece in enumerate(vocab)}
        tokens |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return tokens


def doubts(run: dict, base_folder: Path, settings: dict, adapter_folder: Path) -> Iterator[str]:
    """What is no reason to refuse, but somebody should know."""
    recorded, source = settings.get("base_model_name_or_path"), run["inputs"]["base"]
    names = {source.get("repo"), source.get("path"), str(base_folder), run["experiment"]["base"]["model"]} - {None}
    in_cache = any(f"models--{name.replace('/', '--')}/" in str(recorded) for name in names)
    if recorded and recorded not in names and not in_cache:
        yield f"the adapter was trained on `{recorded}`, it is merged into `{run['experiment']['base']['model']}`"
    if has_chat_template(adapter_folder) and not has_chat_template(base_folder):
        yield "the adapter folder has a chat template, the base has none: the merged model will have none"


def has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in read_json(settings)
    return inside or any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))


def progress_in_mib(total_bytes: int) -> Callable[[int], None]:
    """A function to tell each number of bytes written; it emits `progress` at most twice a second, and at the end."""
    done, last = 0, 0.0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if done == total_bytes or time.monotonic() - last >= 0.5:
            last = time.monotonic()
            emit("progress", done=done >> 20, total=total_bytes >> 20, unit="MiB")

    return advance


def write_weights(base: Base, changes: dict[str, Change], output: Path, advance: Callable[[int], None]) -> None:
    """Write all weight files; `advance` is told every number of bytes written."""
    import torch

    # Reading and writing bound this work. More threads wait for each other: two on two busy cores took twice as long.
    torch.set_num_threads(1)
    adapted = [entry for name, entry in base.tensors().items() if isinstance(changes.get(name), Lora)]
    scratch = torch.empty(max((math.prod(entry.shape) for entry in adapted), default=0))
    for shard in base.shards:
        write_shard(shard, changes, output / shard.path.name, scratch, advance)


def write_shard(
    shard: TensorFile, changes: dict[str, Change], path: Path, scratch: Tensor, advance: Callable[[int], None]
) -> None:
    """Write one weight file, flush it to the disk and let the safetensors library validate it."""
    from safetensors import safe_open

    with path.open("wb") as sink:
        sink.write(shard.head)
        advance(len(shard.head))
        for entry in shard.entries:
            for piece in changed(entry, changes.get(entry.name), scratch):
                sink.write(piece)
                advance(len(piece))
        sink.flush()
        os.fsync(sink.fileno())
    with safe_open(path, framework="pt") as reader:
        if set(reader.keys()) != {entry.name for entry in shard.entries}:
            raise RuntimeError(f"`{path}` does not hold the tensors of `{shard.path}`")


def changed(entry: Entry, change: Change | None, scratch: Tensor) -> Iterator[bytearray]:
    """The bytes of a base tensor after its change, piece by piece, in the base's dtype."""
    match change:
        case None:
            yield from pieces(entry)
        case Lora():
            yield from merged(entry, change, scratch)
        case Entry():
            for piece in pieces(change, BLOCK_ELEMENTS * ITEM_BYTES[change.dtype]):
                values = trained(change, piece)
                data = bytearray(len(values) * ITEM_BYTES[entry.dtype])
                as_tensor(data, entry.dtype).copy_(values)
                yield data


def merged(entry: Entry, lora: Lora, scratch: Tensor) -> Iterator[bytearray]:
    """LoRA in PEFT's order: the product in float32, scaled, added to the weight in float32, rounded once.

    The product is made whole, as PEFT makes it, because its rounding could depend on how it is cut. It is made in
    `scratch`: fresh memory of that size for every tensor takes longer than the arithmetic. What follows works on single
    rows, so it goes in blocks that stay in the processor's cache.
    """
    import torch

    rows, width = entry.shape
    delta = scratch[: rows * width].view(rows, width)
    torch.mm(trained(lora.b).view(rows, -1), trained(lora.a).view(-1, width), out=delta)
    magnitude = trained(lora.magnitude) if lora.magnitude else None
    step = max(1, BLOCK_ELEMENTS // width)
    for number, data in enumerate(pieces(entry, step * width * ITEM_BYTES[entry.dtype])):
        block = slice(number * step, (number + 1) * step)
        weight = as_tensor(data, entry.dtype).view(-1, width)
        total = weight + delta[block].mul_(lora.scale)
        if magnitude is not None:
            total *= (magnitude[block] / torch.linalg.norm(total, dim=1)).view(-1, 1)
        weight.copy_(total)
        yield data


def pieces(entry: Entry, size: int = COPY_BYTES) -> Iterator[bytearray]:
    """The bytes of a tensor as they are on disk, `size` of them at a time."""
    with entry.file.open("rb") as handle:
        handle.seek(entry.start)
        for done in range(0, entry.size, size):
            data = bytearray(min(size, entry.size - done))
            if handle.readinto(data) != len(data):
                raise OSError(f"`{entry.file}` changed while it was read")
            yield data


def trained(entry: Entry, data: bytearray | None = None) -> Tensor:
    """An adapter tensor (or a piece of it, `data`) as float32, to which PEFT casts it, in one dimension.

    Raises:
        InputError: an element is NaN or infinite.
    """
    import torch

    # A copy even of float32: a product may round differently on memory that is aligned differently.
    values = as_tensor(bytearray().join(pieces(entry)) if data is None else data, entry.dtype)
    values = values.to(torch.float32, copy=True)
    if not all(math.isfinite(bound) for bound in torch.aminmax(values)):
        raise InputError(f"adapter tensor `{entry.name}` holds NaN or infinity", "look at the losses of the training")
    return values


def as_tensor(data: bytearray, dtype: str) -> Tensor:
    """The same memory as a tensor of one dimension; `dtype` is safetensors' name."""
    import torch

    return torch.frombuffer(data, dtype=getattr(torch, MERGEABLE[dtype]))


def copy_base_files(base: Path, output: Path) -> None:
    """Copy index, config, tokenizer and processor files byte for byte: a tokenizer saved anew breaks the GGUF."""
    for name in COPIED_FILES if (base / "model.safetensors").is_file() else [INDEX, *COPIED_FILES]:
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)
    if (base / COPIED_FOLDER).is_dir():
        shutil.copytree(base / COPIED_FOLDER, output / COPIED_FOLDER)


def peak_memory_gib() -> float:
    """The most memory that this process held so far, in GiB. Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def model_card(run: dict, settings: dict) -> str:
    """README.md: front matter that the Hub reads, and where the model comes from. Never a path of this machine."""
    experiment, data, base = run["experiment"], run["experiment"]["data"], run["experiment"]["base"]
    base_id = run["inputs"]["base"].get("repo") or hub_id(base["model"])
    dataset_id = hub_id(data["dataset"])
    front = {"base_model": base_id, "base_model_relation": base_id and "finetune", "library_name": "transformers"}
    front |= {"pipeline_tag": "text-generation", "datasets": dataset_id and [dataset_id]}
    front["tags"] = ["mergetune", "lora", experiment["train"]["method"]]
    kind = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    chosen = experiment["train"]
    is_quantised = chosen["dpo"]["quantize"] if chosen["method"] == "dpo" else chosen["method"] == "qlora"
    method = f"{kind} on a base quantised to 4 bits (QLoRA)" if is_quantised else kind
    method += ", preference tuning (DPO)" if chosen["method"] == "dpo" else ""
    revision = run["inputs"]["base"].get("revision") or base.get("revision")
    facts = {
        "Run": run["run_id"],
        "Fingerprint": run["fingerprint"],
        "Base model": base_id or "a local folder",
        "Base revision": revision,
        "Dataset": dataset_id or Path(data["dataset"]).name,
        "Dataset revision": data.get("revision"),
        "Method": f"{method}, rank {settings.get('r', 8)}, alpha {settings.get('lora_alpha', 8)}",
    }
    # JSON is YAML too, so no value can break out of the front matter.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value), "---", ""]
    lines += [f"# {one_line(experiment['name'])}", "", "A fine-tuned model. Its trained adapter is merged into the"]
    lines += ["weights, so it loads and runs like its base; tokenizer and chat template are the base's own."]
    lines += ["", "## What was expected", "", *fenced(experiment["hypothesis"]), "", "## How it was made", ""]
    lines += [f"- {label}: {one_line(str(value))}" for label, value in facts.items() if value]
    if run["output"].get("repo"):
        made_with = ", ".join(" ".join(item) for item in versions("torch", "safetensors").items())
        traced = {"Attempt": str(run["attempt"])} | {key.capitalize(): link for key, link in origin(run).items()}
        adapter = run["inputs"]["adapter"]
        if adapter.get("repo"):
            traced |= {"Adapter": f"`{adapter['repo']}` at `{adapter['revision']}`"}
        if experiment.get("gguf"):
            traced |= {"GGUF files": f"`{experiment['output']['repo']}-GGUF`"}
        lines += [f"- {label}: {value}" for label, value in {**traced, "Merged with": one_line(made_with)}.items()]
    return "\n".join([*lines, "", "`manifest.json` has the checksums, versions and durations.", ""])


def hub_id(name: str) -> str | None:
    """`name` when it is a Hub id, None when it is a path."""
    is_file = name.endswith((".jsonl", ".parquet")) or Path(name).exists()
    return None if is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) else name


def one_line(text: str) -> str:
    """Text from a file as Markdown that shows it literally."""
    return "".join(f"\\{char}" if char in r"\`*_[]<>#!|~&@" else char for char in " ".join(text.split()))


def fenced(text: str) -> list[str]:
    """Text from a file as a block that it cannot end: its fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.strip().splitlines(), fence]


if __name__ == "__main__":
    raise SystemExit(guarded(main))
