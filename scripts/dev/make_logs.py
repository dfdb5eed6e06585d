"""Make fixtures of `mergetune diagnose` by failing: every function of tests/logs/failing.py, in a process of its own.

python scripts/dev/make_logs.py            # all of them, a few minutes of CPU
python scripts/dev/make_logs.py gated_base every_row_too_long

Each runs on the CPU against a loopback Hub. Its output goes to tests/logs/NAME.log with paths, addresses and tokens
scrubbed; what `diagnose` says of it goes to NAME.json, which a person reads before it is committed.
"""

import argparse
import importlib
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/logs")]

from pull_log_fixture import write_fixture  # noqa: E402
from servers.hub import LoopbackHub  # noqa: E402
from servers.hub_faults import status  # noqa: E402

READER, WRITER = "hf_" + "ReadOnly" * 4, "hf_" + "WriteAll" * 4


def main() -> int:
    """Run the chosen functions; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="functions of tests/logs/failing.py; default: all")
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as folder, LoopbackHub(Path(folder)) as hub:
        furnish(hub)
        prepare(hub.url)
        failing = importlib.import_module("failing")
        for name in names or cases(failing):
            log = Path(folder) / f"{name}.log"
            work = Path(folder) / "work" / name
            work.mkdir(parents=True)
            run_apart(getattr(failing, name), work, log)
            text = log.read_text(encoding="utf-8", errors="replace")
            hidden = {str(work): "/tmp/job", folder: "/tmp", str(ROOT / "tests/logs"): "/app", str(ROOT): "/app"}
            hidden[str(Path.home())] = "/home/ada"
            hidden[hub.url] = "https://huggingface.co"
            print(write_fixture(name.replace("_", "-"), text, hidden))
    return 0


def cases(failing: ModuleType) -> list[str]:
    """The functions that take nothing and return nothing: the others are their tools."""
    own = (value for value in vars(failing).values() if getattr(value, "__module__", "") == failing.__name__)
    chosen = (value for value in own if value.__annotations__ == {"return": None})
    return [value.__name__ for value in chosen if not inspect.signature(value).parameters]


def furnish(hub: LoopbackHub) -> None:
    """The accounts and repositories that the scripts fail on."""
    hub.execute_jobs = False
    hub.add_user("alice", orgs={"acme": "admin", "broke": "admin"})
    hub.add_user("bob")
    hub.add_token(READER, "alice", "read")
    hub.add_token(WRITER, "alice", "write")
    hub.set_credit("broke", False)
    hub.add_repo("google/gemma-3-12b-it", {"config.json": b"{}"}, gated=True)
    hub.add_repo("acme/coach-adapter", {"README.md": b"# coach\n"})
    hub.add_repo("acme/in-trouble", {"config.json": b"{}"})
    hub.faults.add(method="GET", path=r"/api/models/acme/in-trouble", action=status(503), times=100)


def prepare(url: str) -> None:
    """The environment of a job, and the imports that every script pays for, once."""
    os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": READER, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_COLOR": "1", "COLUMNS": "100"}
    os.environ.pop("HF_HUB_OFFLINE", None)
    for module in ("torch", "transformers", "peft", "datasets", "trl"):
        importlib.import_module(module)
    importlib.import_module("trl").SFTTrainer  # noqa: B018  # lazy: it is only imported when it is named


def run_apart(fail: Callable[[], None], work: Path, log: Path) -> None:
    """Call the function in a forked process whose output goes to `log`, as Python would run it as a script."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(work)
    os.environ["HF_HOME"] = str(work / "hf")
    code = 1
    try:
        fail()
        code = 0
    except BaseException as error:
        trace = error.__traceback__
        sys.stdout.flush()
        traceback.print_exception(error.with_traceback(trace.tb_next if trace else None))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
