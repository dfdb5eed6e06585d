"""Stands in for every job script: the real ones' fence, events and manifest, and no work. Run by the loopback Hub.

    uv run /mergetune/.mergetune/RUN/STAGE/train_sft.py /mergetune/.mergetune/RUN/STAGE/run.json

Variables of its environment make it misbehave: `FAIL` is what it dies of, `WORK_S` how long it works, `SAY` events
(JSON: a list of objects) that it says before.
"""

import json
import os
import sys
import time
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

RUN = json.loads(Path(sys.argv[1]).read_text())
REPO, STAGE = RUN["output"]["repo"], RUN["stage"]
FOLDER = f".mergetune/{RUN['run_id']}/{STAGE}"
JOB_ID = os.environ["JOB_ID"]
TRIES = 5


def emit(event: str, **more: object) -> None:
    """One line for whoever watches."""
    print("MERGETUNE " + json.dumps({"event": event, "time": time.time(), **more}), flush=True)


def look() -> tuple[str, dict, set[str]]:
    """The head, who won the fence, and what is in the repository."""
    info = HfApi().repo_info(REPO)
    names = {file.rfilename for file in info.siblings}
    path = f"{FOLDER}/winner.json"
    if path not in names:
        return info.sha, {}, names
    return info.sha, json.loads(Path(HfApi().hf_hub_download(REPO, path, revision=info.sha)).read_bytes()), names


def win_fence() -> bool:
    """Whether this is the job that may work; a commit on a head that has moved is tried again on the new one."""
    for _ in range(TRIES):
        try:
            head, winner, names = look()
            if winner.get("job_id") == JOB_ID:
                return True
            if f"{FOLDER}/manifest.json" in names or winner.get("attempt", 0) >= RUN["attempt"]:
                return False
            put({f"{FOLDER}/winner.json": {"attempt": RUN["attempt"], "job_id": JOB_ID}}, head)
        except (HfHubHTTPError, HTTPError, OSError):
            time.sleep(0.05)
    sys.exit("HTTP 503: the fence could not be reached")


def put(files: dict[str, dict], head: str) -> None:
    """One commit on top of `head`."""
    operations = [CommitOperationAdd(path, json.dumps(content).encode()) for path, content in files.items()]
    HfApi().create_commit(REPO, operations, commit_message=f"{STAGE} of job {JOB_ID}", parent_commit=head)


def publish() -> bool:
    """The manifest, by the winner alone."""
    manifest = {key: RUN[key] for key in ("run_id", "stage", "attempt")} | {"duration_s": 1, "metrics": {"loss": 1.5}}
    names = [f"{FOLDER}/manifest.json", "manifest.json"]
    for _ in range(TRIES):
        try:
            head, winner, _ = look()
            if winner.get("job_id") != JOB_ID:
                return False
            put(dict.fromkeys(names, manifest), head)
            return True
        except (HfHubHTTPError, HTTPError, OSError):
            time.sleep(0.05)
    sys.exit("HTTP 503: the manifest could not be published")


def main() -> None:
    """Fence first, manifest last."""
    if not win_fence():
        emit("superseded")
        return
    print("works", flush=True)
    emit("step", loss="?")  # no event of ours: a custom script may print anything
    emit("step", step=1, total=2, loss=2.5)
    for said in json.loads(os.environ.get("SAY", "[]")):
        print("MERGETUNE " + json.dumps({"time": time.time(), **said}), flush=True)
    if os.environ.get("FAIL"):
        sys.exit(os.environ["FAIL"])
    time.sleep(float(os.environ.get("WORK_S", "0")))
    emit("step", step=2, total=2, loss=1.5)
    emit("done") if publish() else emit("superseded")


main()
