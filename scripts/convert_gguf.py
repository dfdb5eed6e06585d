# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "cmake==4.4.4",
#   "httpx2==2.16.2",
#   "huggingface_hub==2.4.0",
#   "jinja2==3.1.6",
#   "ninja==1.13.2",
#   "numpy==2.4.6",
#   "pip==26.3",
#   "protobuf==7.36.2",
#   "pyyaml==6.0.3",
#   "safetensors==0.8.0",
#   "scikit-build-core==1.1.2",
#   "sentencepiece==0.2.3",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "transformers==5.23.0",
#   "typing_extensions==4.16.0",
# ]
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Convert a merged model folder to GGUF, one verified file per quant.

    python scripts/convert_gguf.py RUN_JSON     the gguf stage
    python scripts/convert_gguf.py prepare      only fetch and build llama.cpp into the cache, at low priority, and exit

Converter and library come from one pinned source: the llama.cpp inside the hash-checked `llama_cpp_python` sdist,
built once into `$MERGETUNE_CACHE` (default `~/.cache/mergetune`). Everything of llama.cpp runs in a child process: this
file again, with `_child` as its first argument. A crash there is a message here. No GPU is used.
"""

import argparse
import ctypes
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

SDIST_VERSION = "0.3.36"
LLAMA_CPP_VERSION = "0.5.0"
LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# From vendor/llama.cpp: the converter, and what `--target llama` compiles. The rest of the sdist stays packed.
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
SOURCES = ("CMakeLists.txt", "cmake", "ggml", "include", "licenses", "src", "vendor")
# Only these: the package's own __init__ would import the high-level classes with more dependencies.
BINDINGS = ("llama_cpp.py", "_ctypes_extensions.py", "_ggml.py")
# Not native: AMX kernels crash on some hosts (llama.cpp#20824), and the cache may be restored on another machine.
PORTABLE = {"GGML_NATIVE": "OFF", "GGML_METAL": "OFF", "GGML_BLAS": "OFF", "GGML_CCACHE": "OFF"}
X86 = {"GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON"}
OMITTED = ("TESTS", "EXAMPLES", "SERVER", "TOOLS", "COMMON", "APP")
# The kernels are built with -O3. The other three quarters of the code (150 model graphs, vocabulary, loader) are not
# hot here; -O1 saves a third of the build's CPU time and leaves every byte of the quantised files the same.
GLUE_FLAGS, KERNEL_FLAGS = "-O1 -DNDEBUG", "-O3 -DNDEBUG"


@dataclass(frozen=True)
class Quant:
    """A kind of GGUF: llama.cpp's file type, bits per weight of an 8 B model, the type most tensors get."""

    ftype: int
    bits: float
    main: str


QUANTS = {
    "BF16": Quant(32, 16.0, "BF16"),
    "F16": Quant(1, 16.0, "F16"),
    "Q8_0": Quant(7, 8.5, "Q8_0"),
    "Q6_K": Quant(18, 6.6, "Q6_K"),
    "Q5_K_M": Quant(17, 5.7, "Q5_K"),
    "Q5_K_S": Quant(16, 5.6, "Q5_K"),
    "Q5_0": Quant(8, 5.6, "Q5_0"),
    "Q4_K_M": Quant(15, 4.9, "Q4_K"),
    "Q4_K_S": Quant(14, 4.7, "Q4_K"),
    "Q4_0": Quant(2, 4.7, "Q4_0"),
    "Q3_K_L": Quant(13, 4.3, "Q3_K"),
    "Q3_K_M": Quant(12, 4.0, "Q3_K"),
    "Q3_K_S": Quant(11, 3.7, "Q3_K"),
    "Q2_K": Quant(10, 3.2, "Q2_K"),
}
CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # token types of a GGUF vocabulary
PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
FALLBACK = re.compile(r"(\d+ of \d+) tensor\(s\) required fallback")
FAULT_LINE = re.compile(
    r"error|not found|not supported|not recognized|missing|corrupt|no space|failed(?! to load model)"
)
# What the tools print on known faults -> what to do about it.
KNOWN_FAULTS = {
    r"pre-tokenizer was not recognized|File not found: .*tokenizer\.model": "copy the tokenizer files of the base "
    "repository into the model folder byte for byte; saving them anew changes them",
    r"is not supported|Failed to detect model architecture|unknown model architecture": "this llama.cpp does not know "
    "the architecture: remove `gguf:` from the experiment",
    r"Can not map tensor|tensor '.*' not found|wrong number of tensors": "the model folder does not hold "
    "the architecture's tensors: merge again from the base and the adapter",
    r"has wrong shape": "vocabulary and embedding rows differ: merge again, or save the resized model",
    r"logits hold NaN": "the weights are damaged: look at the loss of the training, then train or merge again",
    r"DO NOT MATCH THE HASHES": "the package index serves another file under this name: use one you trust",
    r"Failed to load shared library": "the cached llama.cpp is of another system: remove its folder and run again",
    r"No space left|iostream error": "free some space, or use `--runs-dir` with a folder on a larger disk",
}
# How byte-level BPE tokenizers cut text before they merge: (regular expression of tokenizer.json, `ignore_merges`) ->
# llama.cpp's name for the same cut (src/llama-vocab.cpp, llm_tokenizer_bpe). None: ByteLevel's own expression.
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_CUT = rf"{ENDING}|{LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}"
QWEN_2_CUT = LLAMA_3_CUT.replace("{1,3}", "")
WORD_START = r"[^\r\n\p{L}\p{N}]?"
GPT_4O_CUT = (
    rf"{WORD_START}{UPPER}*{LOWER}+{ENDING}?|{WORD_START}{UPPER}+{LOWER}*{ENDING}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
)
PRE_TOKENIZERS = {
    (LLAMA_3_CUT, True): "llama-bpe",
    (LLAMA_3_CUT, False): "dbrx",
    (QWEN_2_CUT, False): "qwen2",
    (GPT_4O_CUT, False): "gpt-4o",
    (None, False): "gpt-2",
}
# Plain text in which tokenizers differ: leading and double spaces, blank lines, tabs, emoji, CJK, digits, code.
PROBES = {
    "words": "The harbour master counted forty boats before breakfast, then lost count.",
    "spaces": "  two leading spaces, a\ttab and a  double one ",
    "lines": "first line\n\n\nfourth line\n  indented\n",
    "emoji": "Well done 🙂🚀, naïve café!",
    "cjk": "日本語の文と中文句子。",
    "numbers": "In 2026 it cost 1234567.89, or 3.5e-4 of 100%.",
    "code": "def area(r):\n    return 3.14 * r ** 2  # m²\n",
}
QUESTION = "In one sentence, how does a lighthouse help sailors at night?"
ANSWER = """A lighthouse marks a dangerous coast or a safe harbour entrance with a light of a known rhythm. Sailors time
the flashes, find the same rhythm on their chart and so learn which tower they see. Two bearings give a position: draw
both lines, and the ship is where they cross. In fog the light fails, so many towers also had a horn or a bell. Today a
receiver does this work within a few metres, yet crews still check it against the light they can see, because 1 wrong
setting in 1,000 is enough to put a hull on the rocks. The keepers are gone; timers, sensors and lamps of 35 watts took
their place, and a boat visits 2 or 3 times a year to clean the lens, change a battery and paint the rail."""
KL_TOKENS, ANSWER_TOKENS = 256, 16

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


# --- llama.cpp: fetched, checked and built once ---


def threads() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_flags() -> dict[str, str]:
    """CMake settings of the library: CPU only, portable between x86-64 machines of the last ten years."""
    x86 = X86 if platform.machine().lower() in ("x86_64", "amd64") else {}
    omitted = {f"LLAMA_BUILD_{part}": "OFF" for part in OMITTED}
    shared = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON"}
    quiet = {"LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_ALL_WARNINGS": "OFF"}
    return {**shared, **omitted, **quiet, **PORTABLE, **x86, "CMAKE_CXX_FLAGS_RELEASE": GLUE_FLAGS}


def run_child(command: list[str], unit: str = "", **options: Any) -> tuple[int, list[str]]:
    """Run a command, its output copied to our log; returns the exit code (-N: ended by signal N) and the lines.

    With a `unit`, lines that start like `[12/78]` become progress events. The child does not outlive this call.
    """
    lines, shown = [], 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options
    ) as child:
        try:
            for raw in child.stdout or ():
                line = raw.rstrip()
                count = PROGRESS.match(line) if unit else None
                if not count:
                    lines.append(line)
                    print(line + "\n", end="", flush=True)
                elif time.monotonic() - shown > 0.5 or count[1] == count[2]:
                    shown = time.monotonic()
                    emit("progress", done=int(count[1]), total=int(count[2]), unit=unit)
        except BaseException:
            child.terminate()
            raise
    return child.returncode, lines


def require_success(what: str, code: int, lines: list[str], hint: str = "the lines above say more") -> None:
    """Raise InputError with the child's last informative line, and the hint of a known fault, unless `code` is 0."""
    if code == 0:
        return
    told = [line for line in lines if FAULT_LINE.search(line.lower())] or [line for line in lines if line.strip()]
    last = told[-1].strip() if told else "no output"
    # From the end: a Python traceback of chained exceptions ends with the one that matters (llama.cpp#18065).
    known = (advice for line in reversed(lines) for pattern, advice in KNOWN_FAULTS.items() if re.search(pattern, line))
    if code == -signal.SIGKILL:
        raise InputError(f"{what} was killed: {last}", "out of memory, most likely: use a flavor with more of it")
    if code < 0:
        hint = "llama.cpp crashed, by a bug or on an unsupported processor: try another machine, then report it"
        raise InputError(f"{what} was ended by {signal.Signals(-code).name}: {last}", hint)
    raise InputError(f"{what} failed with exit code {code}: {last}", next(known, hint))


def fetch_sdist(folder: Path, sha256: str = SDIST_SHA256) -> Path:
    """Download llama_cpp_python's source archive with the user's own pip settings; its hash is checked twice.

    Raises:
        InputError: pip cannot get it, or it is not the archive this script was written for.
    """
    emit("phase", name="fetch llama.cpp", detail=f"llama_cpp_python {SDIST_VERSION}")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"llama_cpp_python=={SDIST_VERSION} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    code, lines = run_child([*command, "--progress-bar", "off", "-d", str(folder), "-r", str(requirements)])
    require_success("pip download", code, lines, "pip needs an index that has llama_cpp_python as source archive")
    archive = folder / f"llama_cpp_python-{SDIST_VERSION}.tar.gz"
    require_hash(archive, sha256)
    return archive


def require_hash(path: Path, sha256: str) -> None:
    """Raise InputError unless the file has this SHA-256."""
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"`{path.name}` has sha256 `{found}`, expected `{sha256}`", "use another package index")


def extract(archive: Path, folder: Path) -> None:
    """Unpack the needed parts of the sdist: `llama.cpp/` and `bindings/llama_cpp/`."""
    root = f"llama_cpp_python-{SDIST_VERSION}/"
    tree = {f"{root}vendor/llama.cpp/{name}": f"llama.cpp/{name}" for name in CONVERTER + SOURCES}
    tree |= {f"{root}llama_cpp/{name}": f"bindings/llama_cpp/{name}" for name in BINDINGS}
    # Python 3.11.0 to 3.11.3 have no filters; there the checked hash alone has to do.
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        for member in tar:
            start = next((old for old in tree if member.name == old or member.name.startswith(old + "/")), None)
            if start:
                member.name = tree[start] + member.name.removeprefix(start)
                tar.extract(member, folder, **safely)
    (folder / "bindings/llama_cpp/__init__.py").touch()


def build_tool(name: str) -> str:
    """Path of cmake or ninja: beside this Python (their wheels), else on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        raise InputError(f"`{name}` is not installed", f"`pip install {name}`")
    return found


def require_build_tools() -> None:
    """Raise InputError when cmake, ninja or a C++ compiler is missing."""
    build_tool("cmake"), build_tool("ninja")
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        hint = "`apt-get install g++` (Debian, Ubuntu), `dnf install gcc-c++`, `xcode-select --install` (macOS)"
        raise InputError("building llama.cpp needs a C++ compiler, and there is none on PATH", hint)


def compile_library(scratch: Path, lock: int) -> None:
    """Configure and build libllama in `scratch/build`. Object files of a killed build there are used again."""
    emit("phase", name="build llama.cpp", detail=f"commit {LLAMA_CPP_COMMIT[:9]}, {threads()} threads")
    kernels = scratch / "kernels.cmake"
    kernels.write_text(f'set(CMAKE_CXX_FLAGS_RELEASE "{KERNEL_FLAGS}")\n', encoding="utf-8")
    flags = {**build_flags(), "CMAKE_PROJECT_ggml_INCLUDE": str(kernels), "CMAKE_MAKE_PROGRAM": build_tool("ninja")}
    command = [build_tool("cmake"), "-GNinja", f"-S{scratch / 'source/llama.cpp'}", f"-B{scratch / 'build'}"]
    code, lines = run_child([*command, *(f"-D{name}={value}" for name, value in flags.items())])
    require_success("cmake", code, lines)
    # ninja holds our lock too: when we are killed, the next builder waits until ninja's compilers have ended.
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    command = [build_tool("ninja"), "-C", str(scratch / "build"), "-j", str(threads()), "llama"]
    code, lines = run_child(command, "files", env=environment, pass_fds=(lock,))
    require_success("ninja", code, lines)


def build_llama_cpp(folder: Path, lock: int) -> None:
    """Fetch, unpack and build in `<folder>.build`; `folder` appears last, whole."""
    require_build_tools()
    scratch, started = folder.with_name(folder.name + ".build"), time.time()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    source, part, done = scratch / "source", scratch / "source.part", scratch / "done"
    scratch.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        archive = fetch_sdist(scratch)
        shutil.rmtree(part, ignore_errors=True)
        extract(archive, part)
        part.rename(source)
    compile_library(scratch, lock)
    shutil.rmtree(done, ignore_errors=True)
    shutil.copytree(scratch / "build/bin", done / "lib", symlinks=True)
    # Copied, not moved: killed here, the next builder must find the source whole.
    for path in [*(source / "llama.cpp" / name for name in CONVERTER), source / "bindings"]:
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, done / path.name)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {"commit": LLAMA_CPP_COMMIT, "flags": build_flags(), "kernel_flags": KERNEL_FLAGS}
    facts |= {"build_s": round(time.time() - started, 1), "build_cpu_s": round(cpu, 1), "machine": platform.machine()}
    (done / "build.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    done.rename(folder)
    shutil.rmtree(scratch)


def build_once(folder: Path, build: Callable[[Path, int], None]) -> Path:
    """Return `folder`, made by `build(folder, lock)` if it is not there; one builder at a time on this machine."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            emit("phase", name="waiting for llama.cpp build", detail=str(folder))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            build(folder, lock.fileno())
    return folder


def prepare_llama_cpp() -> Path:
    """The folder with `convert_hf_to_gguf.py`, `gguf-py`, `bindings` and `lib`, fetched and built on the first call.

    Raises:
        InputError: no compiler, no package index, or the build fails.
    """
    cache = Path(os.environ.get("MERGETUNE_CACHE") or Path.home() / ".cache/mergetune").resolve()
    decides = [SDIST_SHA256, CONVERTER, BINDINGS, build_flags(), KERNEL_FLAGS, platform.system(), platform.machine()]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return build_once(cache / f"llama.cpp-{SDIST_VERSION}-{key}", build_llama_cpp)


# --- the model folder, checked before anything is built ---


@dataclass(frozen=True)
class Source:
    """A merged model folder: its config (the text part on top), and the number of elements of each tensor."""

    folder: Path
    config: dict[str, Any]
    elements: dict[str, int]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model folder; {} when the file is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"`{path}` is not JSON: {error}", "copy the file again") from error
    return content if isinstance(content, dict) else {}


def read_shard(path: Path) -> dict[str, int]:
    """Elements by tensor name from a safetensors header.

    Raises:
        InputError: the file is shorter or longer than its header says.
    """
    size, broken = path.stat().st_size, f"`{path}` is truncated or damaged"
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 + length:
            raise InputError(broken, "copy or merge it again")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise InputError(broken, "copy or merge it again") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != 8 + length + end:
        message = f"{broken}: its header describes {8 + length + end:,} bytes, the file has {size:,}"
        raise InputError(message, "copy or merge it again")
    return {name: math.prod(tensor["shape"]) for name, tensor in header.items()}


def read_tensors(folder: Path) -> dict[str, int]:
    """Elements by tensor name of all shards, which must be those of the index if there is one."""
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    # `model*`, as in the converter: an adapter's weights may lie beside.
    names = sorted(set(index.values())) or sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        raise InputError(f"`{folder}` has no `model*.safetensors`", "save or merge the model as safetensors")
    gone = [name for name in names if not (folder / name).exists()]
    if gone:
        raise InputError(f"`{folder}` lacks `{gone[0]}`, which its index names", "copy or merge it again")
    found = {tensor: count for name in names for tensor, count in read_shard(folder / name).items()}
    if index and (differ := sorted(index.keys() ^ found.keys())):
        raise InputError(f"index and shards of `{folder}` disagree on `{differ[0]}`", "copy or merge it again")
    return found


def check_model(folder: Path) -> Source:
    """What is needed of a merged model folder, or InputError: config, weights, tokenizer, chat template."""
    config = read_json(folder / "config.json")
    if not config:
        adapter = (folder / "adapter_config.json").exists()
        hint = "merge the adapter into its base first" if adapter else "give the folder of a merged model"
        raise InputError(f"`{folder}` has no config.json", hint)
    if not config.get("architectures"):
        raise InputError(f"`{folder}/config.json` names no `architectures`", "copy config.json from the base model")
    if "quantization_config" in config:
        raise InputError(f"`{folder}` holds quantised weights", "merge into the base model in bfloat16, not in 4 bit")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"`{folder}` has no tokenizer files", "copy the base model's tokenizer files into it")
    files = [folder / "chat_template.jinja", folder / "chat_template.json"]
    if "chat_template" not in read_json(folder / "tokenizer_config.json") and not any(p.exists() for p in files):
        hint = "write the template that the training used to `chat_template.jinja` in the model folder"
        raise InputError(f"`{folder}` has no chat template, so chat programs would guess one", hint)
    elements = read_tensors(folder)
    if wrapped := [name for name in elements if name.startswith("base_model.model.") or ".absmax" in name]:
        raise InputError(f"`{folder}` holds `{wrapped[0]}`: it was saved, not merged", "merge the adapter first")
    return Source(folder, {**config, **config.get("text_config", {})}, elements)


def check_disk(source: Source, quants: list[str], work: Path, output: Path, one_by_one: bool = False) -> None:
    """Raise InputError unless the bf16 file fits into `work` and the quantised files into `output`, with 10 % over.

    `one_by_one`: a quantised file leaves the disk before the next one is made.
    """
    weights = sum(source.elements.values())
    logits = KL_TOKENS * source.config.get("vocab_size", 300_000) * 4
    scratch = 2 * weights + logits
    sizes = [weights * QUANTS[quant].bits / 8 for quant in quants]
    results = max(sizes) if one_by_one else sum(sizes)
    if work.stat().st_dev == output.stat().st_dev:
        scratch, results = 0, scratch + results
    require_disk(work, int(1.1 * scratch))
    require_disk(output, int(1.1 * results))


@dataclass(frozen=True)
class Expected:
    """What transformers' tokenizer makes of the model folder, for llama.cpp to agree with."""

    texts: dict[str, str]
    ids: dict[str, list[int]]
    # For each text, for each piece of it between added tokens: the ids without and with a space before it.
    spaced: dict[str, list[list[list[int]]]]
    added: dict[int, str]
    unknown: int | None
    bos: int | None
    eos: int | None
    ends: list[int]
    size: int
    template: str


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions; all of them mean unreadable files
        hint = "copy the base model's tokenizer files into the folder byte for byte"
        raise InputError(f"transformers cannot load the tokenizer of `{folder}`: {error}", hint) from error


def expect(source: Source) -> Expected:
    """Tokenize the probe texts, each special token and the rendered chat with transformers.

    Raises:
        InputError: no usable tokenizer or template, or ids beyond the model's vocabulary.
    """
    tokenizer = load_tokenizer(source.folder)
    size = 1 + max(tokenizer.get_vocab().values())
    rows = source.config.get("vocab_size", size)
    if size > rows:
        message = f"the tokenizer has ids up to {size - 1}, `vocab_size` in config.json is {rows}"
        raise InputError(message, "resize the model's embeddings to the tokenizer, or copy the base model's tokenizer")
    chat = [{"role": "user", "content": QUESTION}]
    try:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        talk = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": ANSWER}], tokenize=False)
    except Exception as error:  # a template is a program: it may raise anything
        hint = "the template must accept a user message followed by an assistant message"
        raise InputError(f"the chat template of `{source.folder}` fails: {error}", hint) from error
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special = {f"token {t.content}": t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts = {**PROBES, **special, "chat": prompt, "talk": talk}
    ends = read_json(source.folder / "generation_config.json").get("eos_token_id") or []
    return Expected(
        texts=texts,
        ids={name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()},
        spaced={name: spaced_ids(tokenizer, text, added) for name, text in texts.items()},
        added=added,
        unknown=tokenizer.unk_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        ends=ends if isinstance(ends, list) else [ends],
        size=size,
        template=tokenizer.get_chat_template(),
    )


def spaced_ids(tokenizer: Any, text: str, added: dict[int, str]) -> list[list[list[int]]]:
    """For each piece of `text` between added tokens, the ids of the piece alone and with a space before it."""
    by_content = {content: token_id for token_id, content in added.items()}
    pattern = "|".join(map(re.escape, sorted(by_content, key=len, reverse=True)))
    pieces = [piece for piece in re.split(f"({pattern})", text) if piece] if pattern else [text]
    return [
        [[by_content[piece]]]
        if piece in by_content
        else [tokenizer(prefix + piece, add_special_tokens=False)["input_ids"] for prefix in ("", " ")]
        for piece in pieces
    ]


# --- child processes: `convert_gguf.py _child <name> <spec.json>` ---


def child_convert(script: str, folder: str, target: str) -> None:
    """The converter as its own program, but for a byte-level BPE vocabulary it has never seen.

    It knows such tokenizers by a hash over the token ids of one text, so a vocabulary that was extended, cut or made
    anew is unknown to it even where nothing else is new. Then the cut of the text is looked up by its own definition.
    That this is right is not assumed: `verify` compares the ids of every probe text.
    """
    sys.path[0] = str(Path(script).parent)  # as if it had been started: `conversion` lies beside it
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    def by_hash_or_cut(self: Any, tokenizer: Any) -> str:
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            name = pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))
            if name is None:
                raise
            emit("warning", message=f"the converter does not know this vocabulary; its text is cut as in `{name}`")
            return name

    TextModel.get_vocab_base_pre = by_hash_or_cut
    sys.argv = [script, folder, "--outtype", "bf16", "--outfile", target]
    runpy.run_path(script, run_name="__main__")


def pre_tokenizer(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name for how the tokenizer of a tokenizer.json cuts text; None if it is not in PRE_TOKENIZERS."""
    before = definition.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    *splits, last = steps
    regexes = [split.get("pattern", {}).get("Regex") for split in splits]
    if None in regexes or any(split.get("behavior") != "Isolated" or split.get("invert") for split in splits):
        return None
    cuts = regexes + [None] * bool(last.get("use_regex", True))
    if len(cuts) != 1:
        return None
    return PRE_TOKENIZERS.get((cuts[0], bool(definition["model"].get("ignore_merges"))))


def child_quantize(spec: dict[str, Any], lib: Any) -> None:
    """Quantise `source` into `target`."""
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads(), spec["ftype"]
    if lib.llama_model_quantize(os.fsencode(spec["source"]), os.fsencode(spec["target"]), ctypes.byref(params)):
        sys.exit("llama_model_quantize failed")


class GgufInit(ctypes.Structure):
    """`struct gguf_init_params` of ggml's gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class GgufHeader:
    """Metadata and tensor list of a GGUF file through ggml's C functions.

    gguf-py's reader builds Python objects per token: 3 s for a vocabulary of 50,000, against milliseconds here.
    """

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self.library = library
        library.gguf_init_from_file.restype = ctypes.c_void_p
        library.ggml_type_name.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p(library.gguf_init_from_file(os.fsencode(path), GgufInit(no_alloc=True)))
        if not self.handle:
            sys.exit("error: not a readable GGUF file")

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """`gguf_<name>` of this file, its result of the given C type."""
        function = getattr(self.library, f"gguf_{name}")
        function.restype = result
        return function(self.handle, *arguments)

    def value(self, key: str, kind: str, result: Any) -> Any:
        """The value of a metadata key, read with `gguf_get_<kind>`; None when there is no such key."""
        at = self.call("find_key", ctypes.c_int64, key.encode())
        return None if at < 0 else self.call(f"get_{kind}", result, ctypes.c_int64(at))

    def tensors(self) -> dict[str, list[Any]]:
        """Type and number of elements by tensor name."""
        found = {}
        for at in map(ctypes.c_int64, range(self.call("get_n_tensors", ctypes.c_int64))):
            name = self.call("get_tensor_name", ctypes.c_char_p, at).decode()
            kind = self.library.ggml_type_name(self.call("get_tensor_type", ctypes.c_int, at)).decode().upper()
            shape = self.call("get_tensor_ne", ctypes.POINTER(ctypes.c_int64), at)[:4]
            found[name] = [kind, math.prod(shape)]
        return found


def child_inspect(spec: dict[str, Any], lib: Any) -> dict[str, Any]:
    """Metadata, types of the added tokens and tensors of one GGUF."""
    header = GgufHeader(lib._lib, spec["gguf"])  # libllama; ggml's functions are found through it
    text, number = ("val_str", ctypes.c_char_p), ("val_u32", ctypes.c_uint32)
    architecture = (header.value("general.architecture", *text) or b"").decode()
    numbers = {"file_type": "general.file_type"}
    numbers |= {name: f"{architecture}.{name}" for name in ("block_count", "context_length")}
    numbers |= {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")}
    size = header.value("tokenizer.ggml.token_type", "arr_n", ctypes.c_size_t) or 0
    types = header.value("tokenizer.ggml.token_type", "arr_data", ctypes.POINTER(ctypes.c_int32))
    facts = {name: header.value(key, *number) for name, key in numbers.items()}
    return {
        **facts,
        "architecture": architecture,
        "template": (header.value("tokenizer.chat_template", *text) or b"").decode(),
        "vocab_size": size,
        "token_types": {i: types[i] for i in spec["added"] if i < size},
        "tensors": header.tensors(),
        "mapped": mapped_names(spec["source"], architecture, facts["block_count"]),
    }


def mapped_names(source: list[str], architecture: str, blocks: int) -> dict[str, str | None]:
    """The converter's GGUF name for each tensor of the model folder, None where it has none (a vision tower)."""
    if not source:
        return {}
    import gguf

    code = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(code, blocks)
    # The same replacement as in the converter: multimodal models keep their text part under this prefix.
    short = {name: name.replace("language_model.", "") for name in source}
    return {name: names.get_name(short[name], (".weight", ".bias")) for name in source}


def child_probe(spec: dict[str, Any], lib: Any) -> dict[str, Any]:
    """Load one GGUF: token ids of the probe texts, KL divergence from the reference file, a greedy answer."""
    params = lib.llama_model_default_params()
    params.use_extra_bufts = False  # keep weights memory-mapped instead of repacked, and away from AMX
    model = lib.llama_model_load_from_file(os.fsencode(spec["gguf"]), params)
    if not model:
        sys.exit(1)  # its log says why
    vocab = lib.llama_model_get_vocab(model)
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(KL_TOKENS, len(spec["prompt"]) + ANSWER_TOKENS)
    # A small model's threads only wait for each other, for long when a training keeps the cores busy.
    settings.n_threads = settings.n_threads_batch = 1 if lib.llama_model_n_params(model) < 10**8 else threads()
    context = lib.llama_init_from_model(model, settings)
    if not context:
        sys.exit("llama.cpp failed to allocate the context")
    size = lib.llama_vocab_n_tokens(vocab)
    kl = divergence(lib, context, spec, size)
    answer = greedy_answer(lib, context, vocab, spec["prompt"])
    return {
        "ids": {name: token_ids(lib, vocab, text) for name, text in spec["texts"].items()},
        "not_end": [i for i in spec["ends"] if not lib.llama_vocab_is_eog(vocab, i)],
        "kl": kl,
        "answer": answer,
        "text": detokenize(lib, vocab, answer),
    }


def token_ids(lib: Any, vocab: Any, text: str) -> list[int]:
    """llama.cpp's ids of a text: special tokens recognised, none added."""
    data = text.encode()
    buffer = (lib.llama_token * (len(data) + 8))()
    count = lib.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, True)
    return list(buffer[:count])


def detokenize(lib: Any, vocab: Any, ids: list[int]) -> str:
    """The text of token ids, without special tokens."""
    buffer = ctypes.create_string_buffer(256 * (len(ids) + 1))
    count = lib.llama_detokenize(vocab, (lib.llama_token * len(ids))(*ids), len(ids), buffer, len(buffer), False, False)
    return buffer.raw[: max(count, 0)].decode(errors="replace")


def decode(lib: Any, context: Any, ids: list[int], size: int, every: bool) -> Any:
    """Feed tokens; the logits after the last one, or after every one, as an array [positions, vocabulary]."""
    import numpy as np

    tokens, wanted = (lib.llama_token * len(ids))(*ids), (ctypes.c_int8 * len(ids))(*[1] * len(ids))
    batch = lib.llama_batch_get_one(tokens, len(ids))  # it points to `tokens`, which must stay alive
    if every:
        batch.logits = wanted
    if code := lib.llama_decode(context, batch):
        sys.exit(f"llama_decode failed with code {code}")
    logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids) if every else 1, size))
    if not np.isfinite(logits).all():
        sys.exit("error: the logits hold NaN or infinity")
    return logits


def divergence(lib: Any, context: Any, spec: dict[str, Any], size: int) -> float:
    """Mean KL(reference || this file) of the next-token distributions, nats per token; without one, become it."""
    import numpy as np

    logits, reference = decode(lib, context, spec["kl_ids"], size, every=True), Path(spec["reference"])
    mode = "r" if reference.exists() else "w+"
    shape = {"dtype": np.float32, "shape": logits.shape} if mode == "w+" else {}
    truth, total = np.lib.format.open_memmap(reference, mode=mode, **shape), 0.0
    for row, log_p in zip(logits, truth, strict=True):
        shifted = row.astype(np.float64) - row.max()
        log_q = shifted - np.log(np.exp(shifted).sum())
        if mode == "w+":
            log_p[:] = log_q
        else:
            total += float((np.exp(log_p, dtype=np.float64) * (log_p - log_q)).sum())
    return max(total / len(truth), 0.0)


def greedy_answer(lib: Any, context: Any, vocab: Any, prompt: list[int]) -> list[int]:
    """At most ANSWER_TOKENS tokens, always the likeliest, up to the first that ends a turn."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    size, answer, feed = lib.llama_vocab_n_tokens(vocab), [], prompt
    while len(answer) < ANSWER_TOKENS:
        token = int(decode(lib, context, feed, size, every=False)[0].argmax())
        if lib.llama_vocab_is_eog(vocab, token):
            break
        answer.append(token)
        feed = [token]
    return answer


def child(name: str, spec_path: str) -> None:
    """Entry of a child process: load the library, do one job, write its result beside the spec."""
    if name == "convert":
        child_convert(**json.loads(Path(spec_path).read_text(encoding="utf-8")))
        return
    # In C code a Python handler would wait for the call to return; the default ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import llama_cpp.llama_cpp as lib

    lowest = 2 if name == "quantize" else 3  # ggml's levels: 2 is info, 3 warning, 4 error, 5 continues a line

    def log(level: int, text: bytes, _data: object) -> None:
        if lowest <= level:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    callback = lib.llama_log_callback(log)
    lib.llama_log_set(callback, None)
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    job = {"quantize": child_quantize, "inspect": child_inspect, "probe": child_probe}[name]
    Path(spec_path).with_suffix(".result").write_text(json.dumps(job(spec, lib)), encoding="utf-8")
    lib.llama_log_set(lib.llama_log_callback(), None)


def call_child(tools: Path, work: Path, name: str, unit: str = "", **spec: Any) -> tuple[Any, list[str]]:
    """Run one of the jobs above in a child process; returns its result and its log.

    Raises:
        InputError: it failed, or was ended by a signal.
    """
    path = work / f"{name}.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), "_child", name, str(path)]
    code, lines = run_child(command, unit, env=child_environment(tools))
    about = Path(spec.get("gguf") or spec["target"]).name.removesuffix(".part")
    require_success(f"{name} of `{about}`", code, lines)
    return json.loads(path.with_suffix(".result").read_text(encoding="utf-8")), lines


def child_environment(tools: Path) -> dict[str, str]:
    """Environment in which Python finds the bindings, the library and the gguf-py of `tools` and of nothing else."""
    paths = {
        "PYTHONPATH": f"{tools / 'bindings'}{os.pathsep}{tools / 'gguf-py'}",
        "LLAMA_CPP_LIB_PATH": str(tools / "lib"),
    }
    kept = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    return {**kept, **paths, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


# --- checks of one GGUF; each returns "ok" or a deviation to warn of, and raises InputError on a defect ---


def defect(gguf: Path, check: str, fact: str, hint: str) -> InputError:
    """The error of a failed check."""
    return InputError(f"`{gguf.name.removesuffix('.part')}` failed the check `{check}`: {fact}", hint)


MERGE_AGAIN = "merge again from the base and the adapter; the model folder is not what its config describes"
TOKENIZER_AGAIN = "copy the base model's tokenizer files into the model folder byte for byte, then convert again"


def check_tensors(gguf: Path, facts: dict[str, Any], source: Source) -> str:
    """Every tensor of the source arrived, and layers that were alike in the source are alike in the file."""
    tensors, mapped = facts["tensors"], {old: new for old, new in facts["mapped"].items() if new}
    if not tensors:
        raise defect(gguf, "tensors", "it has none", MERGE_AGAIN)
    gone = {old: new for old, new in mapped.items() if new not in tensors}
    if source.config.get("tie_word_embeddings"):
        gone = {old: new for old, new in gone.items() if new != "output.weight"}
    # Some converters split or join tensors under other names: then nothing is lost, the elements are elsewhere.
    elsewhere = sum(count for name, (_, count) in tensors.items() if name not in mapped.values())
    if sum(source.elements[old] for old in gone) > elsewhere:
        raise defect(gguf, "tensors", f"`{next(iter(gone))}` and {len(gone) - 1} more are missing", MERGE_AGAIN)
    layers: dict[str, set[str]] = {}
    for name in tensors:
        if found := re.match(r"blk\.(\d+)\.(.+)", name):
            layers.setdefault(found[1], set()).add(found[2])
    if len(layers) < facts["block_count"]:
        raise defect(gguf, "tensors", f"{len(layers)} of {facts['block_count']} layers have tensors", MERGE_AGAIN)
    kinds = Counter(frozenset(names) for names in layers.values())
    return "ok" if len(kinds) == 1 else f"{len(kinds)} kinds of layers"


def check_same_tensors(gguf: Path, facts: dict[str, Any], original: dict[str, Any]) -> str:
    """A quantised file has the tensors of the bf16 file it was made from."""
    mine, theirs = ({name: t[1] for name, t in f["tensors"].items()} for f in (facts, original))
    if mine != theirs:
        fact = f"{len(mine)} tensors, the bf16 file has {len(theirs)}, {len(mine.items() ^ theirs.items())} differ"
        raise defect(gguf, "tensors", fact, "run the stage again; report it when it repeats")
    return "ok"


def check_metadata(gguf: Path, facts: dict[str, Any], quant: str, source: Source, expected: Expected) -> str:
    """File type, sizes and special token ids in the header are those of the request, config.json and tokenizer."""
    config = source.config
    blocks = config.get("num_hidden_layers")
    # Converters count the layers of a multi-token-prediction head as blocks.
    extra = config.get("num_nextn_predict_layers") or 0
    wanted = {
        "file_type": {QUANTS[quant].ftype},
        "block_count": {blocks, blocks + extra} if blocks else set(),
        "context_length": {config.get("max_position_embeddings")} - {None},
        "bos": {expected.bos} - {None},
        "eos": {expected.eos} - {None},
    }
    for name, allowed in wanted.items():
        if allowed and facts[name] not in allowed:
            fact = f"`{name}` is {facts[name]}, expected {min(allowed)}"
            raise defect(gguf, "metadata", fact, "config.json, tokenizer and weights must come from one merge")
    return "ok"


def check_vocabulary(gguf: Path, facts: dict[str, Any], expected: Expected) -> str:
    """The file has a token for every id of the tokenizer."""
    if facts["vocab_size"] < expected.size:
        fact = f"{facts['vocab_size']} tokens, the tokenizer has {expected.size}"
        raise defect(gguf, "vocabulary", fact, "resize the model's embeddings to the tokenizer")
    return "ok"


def check_special_tokens(gguf: Path, facts: dict[str, Any], expected: Expected) -> str:
    """Added tokens are typed CONTROL or USER_DEFINED: typed NORMAL, chat markers are cut into pieces."""
    for token, kind in facts["token_types"].items():
        if kind not in (CONTROL, USER_DEFINED) and not (kind == UNKNOWN and int(token) == expected.unknown):
            fact = f"`{expected.added[int(token)]}` has token type {kind}, not CONTROL or USER_DEFINED"
            raise defect(gguf, "special_tokens", fact, TOKENIZER_AGAIN)
    return "ok"


def check_template(gguf: Path, facts: dict[str, Any], expected: Expected) -> str:
    """The chat template in the file is the one that transformers uses for the folder."""
    if (facts["template"] or "").strip() != expected.template.strip():
        fact = "its chat template is not the model folder's"
        hint = "remove `chat_template` from tokenizer_config.json, or write the text of chat_template.jinja there"
        raise defect(gguf, "chat_template", fact, hint)
    return "ok"


def check_types(gguf: Path, facts: dict[str, Any], quant: str, log: list[str]) -> str:
    """The main type of the quant is there, except where llama.cpp says that shapes did not allow it."""
    if fallback := FALLBACK.search("\n".join(log)):
        return f"{fallback[1]} tensors needed fallback quantisation (a dimension is no multiple of 256)"
    if QUANTS[quant].main not in types_of(facts):
        fact = f"no tensor has type {QUANTS[quant].main}: {types_of(facts)}"
        raise defect(gguf, "types", fact, "run the stage again; report it when it repeats")
    return "ok"


def types_of(facts: dict[str, Any]) -> dict[str, int]:
    """Number of tensors by type."""
    return dict(Counter(kind for kind, _ in facts["tensors"].values()))


def check_ids(gguf: Path, found: dict[str, list[int]], expected: Expected, names: list[str]) -> str:
    """llama.cpp cuts the texts into the same ids as transformers, but for its space after special tokens."""
    spaced = False
    for name in names:
        wanted, got = expected.ids[name], found[name]
        if got == wanted:
            continue
        if not is_spaced(got, expected.spaced[name]):
            at = next(
                (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
            )
            fact = f"on `{name}` ids differ from transformers' at position {at}: {got[at : at + 6]}, expected "
            raise defect(gguf, "token_ids", f"{fact}{wanted[at : at + 6]}", TOKENIZER_AGAIN)
        spaced = True
    return "llama.cpp adds a space before some text where transformers does not" if spaced else "ok"


def is_spaced(got: list[int], pieces: list[list[list[int]]]) -> bool:
    """Are these ids the pieces in a row, each with or without a space before it?"""
    at = 0
    for options in pieces:
        fits = [option for option in options if got[at : at + len(option)] == option]
        if not fits:
            return False
        at += len(max(fits, key=len))
    return at == len(got)


def check_answer(probe: dict[str, Any]) -> str:
    """The greedy answer has more than one token over and over (a hint, not a proof, on a tiny model)."""
    if len(probe["answer"]) > 3 and len(set(probe["answer"])) == 1:
        return f"the greedy answer repeats one token: {probe['text']!r}"
    return "ok"


@dataclass(frozen=True)
class Job:
    """What all files of one run share."""

    tools: Path
    work: Path
    source: Source
    expected: Expected


def verify(job: Job, gguf: Path, quant: str, log: list[str], original: dict[str, Any] | None) -> dict[str, Any]:
    """All checks of one file against the model folder and (if it was made from one) against the bf16 file's result.

    Returns facts, checks, KL divergence (nats/token) and the greedy text. Raises InputError at the first defect.
    """
    emit("phase", name=f"verify {quant}", detail=gguf.name)
    expected, source = job.expected, job.source
    names = {"added": list(expected.added), "source": [] if original else list(source.elements)}
    facts, _ = call_child(job.tools, job.work, "inspect", gguf=str(gguf), **names)
    checks = {
        "tensors": check_same_tensors(gguf, facts, original["facts"])
        if original
        else check_tensors(gguf, facts, source),
        "metadata": check_metadata(gguf, facts, quant, source, expected),
        "vocabulary": check_vocabulary(gguf, facts, expected),
        "special_tokens": check_special_tokens(gguf, facts, expected),
        "chat_template": check_template(gguf, facts, expected),
        "types": check_types(gguf, facts, quant, log),
    }
    spec = {"texts": expected.texts, "prompt": expected.ids["chat"], "kl_ids": expected.ids["talk"][:KL_TOKENS]}
    spec |= {"ends": expected.ends, "reference": str(job.work / "reference.npy")}
    probe, _ = call_child(job.tools, job.work, "probe", gguf=str(gguf), **spec)
    chat = [name for name in expected.texts if name in ("chat", "talk")]
    checks["load"] = "ok"
    checks["tokens_text"] = check_ids(gguf, probe["ids"], expected, [n for n in expected.texts if n not in chat])
    checks["tokens_chat"] = check_ids(gguf, probe["ids"], expected, chat)
    checks["end_of_turn"] = f"llama.cpp does not stop at {probe['not_end']}" if probe["not_end"] else "ok"
    checks["generation"] = check_answer(probe)
    for name, result in checks.items():
        if result not in ("ok", original and original["checks"][name]):
            emit("warning", message=f"{gguf.name.removesuffix('.part')}: {name}: {result}")
    return {"facts": facts, "checks": checks, "kl": probe["kl"], "text": probe["text"]}


# --- the stage ---


def choose_quants(gguf: dict[str, Any]) -> list[str]:
    """The quants asked for, each once.

    Raises:
        InputError: none, or a name that is not in QUANTS.
    """
    names = list(dict.fromkeys(gguf["quants"]))
    if not names:
        raise InputError("`gguf.quants` is empty", "name at least one, such as `quants: [Q4_K_M]`")
    for name in names:
        if name not in QUANTS:
            near = difflib.get_close_matches(str(name).upper(), QUANTS, 1, 0.4)
            hint = f"use `{near[0]}`" if near else f"one of {', '.join(QUANTS)}"
            raise InputError(f"`gguf.quants`: `{name}` is not a quant this script makes", hint)
    return names


def convert(tools: Path, source: Source, target: Path) -> None:
    """Write the model folder as a bf16 GGUF with llama.cpp's converter.

    Raises:
        InputError: the converter failed. What it leaves out while it exits with 0 is found by `verify`.
    """
    emit("phase", name="convert", detail=target.name)
    spec = target.with_name("convert.json")
    script = str(tools / "convert_hf_to_gguf.py")
    spec.write_text(json.dumps({"script": script, "folder": str(source.folder), "target": str(target)}))
    command = [sys.executable, str(Path(__file__).resolve()), "_child", "convert", str(spec)]
    code, lines = run_child(command, env=child_environment(tools))
    require_success("convert_hf_to_gguf.py", code, lines)


def make_quant(job: Job, bf16: Path, original: dict[str, Any], target: Path, quant: str) -> dict[str, Any]:
    """Quantise the bf16 file into `target`, which gets its name only after all checks; returns its manifest entry."""
    part, log = target.with_name(target.name + ".part"), []
    emit("phase", name=f"quantize {quant}", detail=target.name)
    if quant == "BF16":
        shutil.copyfile(bf16, part)
    else:
        spec = {"source": str(bf16), "target": str(part), "ftype": QUANTS[quant].ftype}
        _, log = call_child(job.tools, job.work, "quantize", "tensors", **spec)
    result = verify(job, part, quant, log, original)
    part.rename(target)
    size, elements = target.stat().st_size, sum(count for _, count in result["facts"]["tensors"].values())
    return {
        "quant": quant,
        "file": target.name,
        "bytes": size,
        "bits_per_weight": round(8 * size / elements, 3),
        "types": types_of(result["facts"]),
        "checks": result["checks"],
        "kl_vs_bf16": round(result["kl"], 6),
        "sample": {"prompt": QUESTION, "text": result["text"]},
    }


def publish_quant(run: dict, path: Path, result: dict[str, Any]) -> None:
    """Upload one finished file with a record of it, and remove it here: the disk holds one at a time."""
    entry = file_entry(path.parent, path)
    record = {"run_id": run["run_id"], "script_sha256": own_hash(), "inputs": said_inputs(run), "file": entry}
    record |= {"result": result}
    files = {path.name: path, f"{stage_folder(run)}/{result['quant']}.json": json.dumps(record, indent=2).encode()}
    emit("phase", name=f"publish {result['quant']}", detail=path.name)
    # What the repo says of its former files must not outlive the first of them.
    deliver(run, f"gguf of {run['run_id']}: {result['quant']}", files, lambda name: name == "manifest.json")
    run.setdefault("published", []).append(entry)
    path.unlink()


def published_quant(run: dict, quant: str, name: str) -> dict[str, Any] | None:
    """The manifest entry of a file that an earlier job of this run has made, verified and uploaded; None without."""
    if not run["output"].get("repo"):
        return None
    record, seen = patiently(run, "look for files that are there", START, lambda: read_record(run, quant))
    known = {"run_id": run["run_id"], "script_sha256": own_hash(), "inputs": said_inputs(run)}
    stored = next((s for s in seen.siblings or [] if s.rfilename == name), None)
    if not stored or any(record.get(key) != value for key, value in known.items()):
        return None
    if not stored.lfs or (stored.lfs.sha256, stored.lfs.size) != (record["file"]["sha256"], record["file"]["bytes"]):
        return None
    emit("phase", name=f"{quant} is published already", detail=name)
    run.setdefault("published", []).append(record["file"])
    return record["result"]


def read_record(run: dict, quant: str) -> tuple[dict, Any]:
    """The record of a published file, and the repo as it is now."""
    seen = look(run)
    return read_at(run, seen, f"{stage_folder(run)}/{quant}.json"), seen


def own_hash() -> str:
    """SHA-256 of this script."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def model_card(run: dict, results: list[dict[str, Any]]) -> str:
    """README.md of a published repo: front matter that the Hub reads, the files, and where they come from."""
    experiment, model = run["experiment"], run["inputs"]["model"]
    base, repo = model.get("repo") or experiment["output"]["repo"], run["output"]["repo"]
    front = {"base_model": base, "base_model_relation": "quantized", "pipeline_tag": "text-generation"}
    front |= {"tags": ["mergetune", "gguf", "llama.cpp"]}
    facts = {
        "Model": f"`{base}`" + (f" at `{model['revision']}`" if model.get("revision") else ""),
        "Run": f"`{run['run_id']}`, attempt {run['attempt']}",
        "Data": data_in_card(run),
        "Made with": f"llama.cpp {LLAMA_CPP_VERSION}, commit `{LLAMA_CPP_COMMIT[:9]}`",
        **{label.capitalize(): link for label, link in origin(run).items()},
    }
    # JSON is YAML too, so no value can break out of the front matter.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {experiment['name']}, GGUF", "", f"`{base}` for llama.cpp and the programs built on it:", ""]
    lines += [f"    llama-server -hf {repo}:{results[0]['quant']}", ""]
    lines += ["| File | Size | Bits per weight | KL divergence from bf16, nats per token |", "|---|---|---|---|"]
    lines += [
        f"| `{r['file']}` | {r['bytes'] / 1e9:.2f} GB | {r['bits_per_weight']} | {r['kl_vs_bf16']} |" for r in results
    ]
    lines += ["", *(f"- {label}: {value}" for label, value in facts.items())]
    return "\n".join([*lines, "", "`manifest.json` has the checks that each file passed.", ""])


def data_in_card(run: dict) -> str:
    """The training data, named without a folder of any machine."""
    data = run["experiment"]["data"]
    is_file = data["dataset"].endswith((".jsonl", ".parquet"))
    name = Path(data["dataset"]).name if is_file else data["dataset"]
    return f"`{name}`" + (f" at `{data['revision']}`" if data.get("revision") else "")


def peak_memory_gib() -> float:
    """Largest resident set of this process or one of its children, GiB."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 2**30, 3)


def convert_run(run: dict, started: float) -> None:
    """The whole stage for one resolved run."""
    quants = choose_quants(run["experiment"]["gguf"])
    source = check_model(fetch(run["inputs"]["model"]))
    output, work = fresh_output(run), Path(run["work"]) / "gguf"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    check_disk(source, quants, work, output, one_by_one=bool(run["output"].get("repo")))
    emit("phase", name="tokenize")
    expected = expect(source)
    job = Job(prepare_llama_cpp(), work, source, expected)
    bf16 = work / "model-bf16.gguf"
    convert(job.tools, source, bf16)
    original = verify(job, bf16, "BF16", [], None)
    name = run["experiment"]["name"]
    results = []
    for quant in quants:
        target = output / f"{name}-{quant}.gguf"
        done = published_quant(run, quant, target.name)
        results.append(done or make_quant(job, bf16, original, target, quant))
        if run["output"].get("repo") and not done:
            publish_quant(run, target, results[-1])
    shutil.rmtree(work)
    if run["output"].get("repo"):
        (output / "README.md").write_text(model_card(run, results), encoding="utf-8")
    peak = peak_memory_gib()
    llama_cpp = {"version": LLAMA_CPP_VERSION, "llama_cpp_python": SDIST_VERSION, "sdist_sha256": SDIST_SHA256}
    llama_cpp |= read_json(job.tools / "build.json")
    metrics = {"quants": results, "source": {"tensors": len(source.elements), "checks": original["checks"]}}
    metrics |= {"architecture": original["facts"]["architecture"], "llama_cpp": llama_cpp}
    packages = ("torch", "transformers", "sentencepiece", "numpy", "safetensors")
    measured = {"peak_memory_gib": peak}
    write_manifest(run, started, metrics=metrics, versions=versions(*packages), measured=measured)
    sizes = {result["quant"]: {key: result[key] for key in ("bytes", "kl_vs_bf16")} for result in results}
    emit("end", stage="gguf", duration_s=round(time.time() - started, 3), quants=sizes, peak_memory_gib=peak)


def main() -> None:
    """Dispatch: a child process, `prepare`, or the run.json of a gguf stage."""
    started = time.time()
    if sys.argv[1:2] == ["_child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="path of the run.json of a gguf stage, or the word `prepare`")
    argument = parser.parse_args().run
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    if argument == "prepare":
        os.nice(10)  # made to run beside a training
        folder = prepare_llama_cpp()
        return emit("end", stage="prepare", duration_s=round(time.time() - started, 3), folder=str(folder))
    run = load_run(argument, "gguf")
    emit("start", stage="gguf", run_id=run["run_id"])
    begin(run)
    return convert_run(run, started)


if __name__ == "__main__":
    raise SystemExit(guarded(main))
