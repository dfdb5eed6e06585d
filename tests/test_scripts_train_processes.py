"""scripts/train_sft.py in several processes: they learn what one learns, and end together. Gloo, two on the CPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_scripts_train import (
    ONE_THREAD,
    SCRIPT,
    conversations,
    edit,
    events,
    front_door,
    make_run,
    manifest,
    write_rows,
)
from tiny_models import make_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny base for all trainings here."""
    return make_tiny(tmp_path_factory.mktemp("bases") / "llama", "llama")


def trained(run: Path, **changes: Any) -> dict:
    """The manifest of a run that must succeed, with what it printed."""
    done = front_door(edit(run, **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    return manifest(run) | {"printed": done.stdout}


def weights(run: Path) -> dict:
    """What the run's artifact holds."""
    from safetensors.torch import load_file

    files = sorted((run.parent / "out").glob("*.safetensors"))
    return {name: weight.float() for file in files for name, weight in load_file(file).items()}


def test_two_processes_learn_what_one_learns(base: Path, tmp_path: Path) -> None:
    """Two epochs of 13 rows, 4 a step: the last step of each epoch is one row, and one process has none."""
    data = write_rows(tmp_path / "data.jsonl", conversations(16))
    changes = {"method": "lora", "epochs": 2.0, "gradient_accumulation": 4, "save_steps": 4}
    runs = {n: make_run(tmp_path / str(n), base, data, 0.2, **changes) for n in (1, 2)}
    one, two = trained(runs[1], processes=1), trained(runs[2], processes=2)
    for key in ("loss", "lr", "grad_norm"):
        assert [e[key] for e in two["history"]] == pytest.approx([e[key] for e in one["history"]], rel=1e-4), key
    assert [e["step"] for e in two["history"]] == [e["step"] for e in one["history"]] == list(range(1, 9))
    assert [e["step"] for e in two["eval_history"]] == [e["step"] for e in one["eval_history"]]
    found = [[e["eval_loss"] for e in m["eval_history"]] for m in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    for key in ("steps", "tokens_seen", "tokens_trained", "examples", "trainable_parameters"):
        assert two["metrics"][key] == one["metrics"][key], key
    first, second = weights(runs[1]), weights(runs[2])
    assert first.keys() == second.keys()
    for name in first:
        difference = (first[name] - second[name]).norm() / first[name].norm()
        assert difference < 1e-4, (name, difference)
    names = [e["event"] for e in events(two["printed"]) if e["event"] not in ("phase", "progress", "warning")]
    assert names == ["start", *["step"] * 4, "eval", *["step"] * 4, "eval", "end"]


def while_running(run: Path, moment: int | str, act: Callable[[int], None]) -> tuple[int, str, str]:
    """Start the script, and `act` with its process id at a step or a phase; exit code and what it printed."""
    errors = run.parent / "errors.log"
    with errors.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, SCRIPT, run], stdout=subprocess.PIPE, stderr=sink, text=True, env=ONE_THREAD
        )
        assert child.stdout is not None
        said, acted = "", False
        for line in child.stdout:
            said += line
            if not acted and any(moment in (e.get("step"), e.get("name")) for e in events(line, "step", "phase")):
                acted = bool(act(child.pid) or True)
        return child.wait(timeout=120), said, errors.read_text(errors="replace")


def process_of(parent: int, rank: int) -> int:
    """The process id of one of the script's processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environ = (folder / "status").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"\nPPid:\t{parent}\n" in status and f"\0RANK={rank}\0".encode() in environ:
            return int(folder.name)
    raise AssertionError(f"no process {rank}")


def is_alive(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody asked for is dead."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_two_processes_that_are_stopped_go_on_as_one(base: Path, tmp_path: Path) -> None:
    """SIGTERM to two processes: a checkpoint and code 130; one process goes on, and learns what it would have alone."""
    data = write_rows(tmp_path / "data.jsonl", conversations(12))
    changes = {"method": "lora", "gradient_accumulation": 2, "epochs": 2.0, "save_steps": 50}
    stopped, whole = (make_run(tmp_path / name, base, data, **changes) for name in ("stopped", "whole"))
    edit(stopped, processes=2)
    code, said, errors = while_running(stopped, 3, lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 130, errors
    assert [event["event"] for event in events(said)][-1] == "interrupted"
    steps = [event["step"] for event in events(said, "step")]
    assert steps[:3] == [1, 2, 3] and len(steps) < 12
    left = (stopped.parent / "work/checkpoints").glob("checkpoint-*")
    assert [path.name for path in left] == [f"checkpoint-{steps[-1]}"]
    gone_on, straight = trained(stopped, processes=1), trained(whole)
    assert gone_on["resumed_from_step"] == steps[-1]
    losses = [[entry["loss"] for entry in found["history"]] for found in (gone_on, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key in ("steps", "tokens_seen", "tokens_trained"):
        assert gone_on["metrics"][key] == straight["metrics"][key]
    first, second = weights(stopped), weights(whole)
    assert all((first[name] - second[name]).norm() < 1e-3 * second[name].norm() for name in second)


def test_a_process_that_dies_ends_the_others_and_is_named(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(40))
    run = edit(make_run(tmp_path, base, data, method="lora", gradient_accumulation=2, epochs=5.0), processes=2)
    code, said, errors = while_running(run, 2, lambda pid: os.kill(process_of(pid, 1), signal.SIGKILL))
    assert code == 1
    (error,) = events(said, "error")
    assert error["message"] == "process 2 of 2 was killed by SIGKILL"
    assert errors.rstrip().endswith(f"hint: {error['hint']}")
    assert not (run.parent / "out" / "manifest.json").exists()


def test_processes_end_with_the_script_that_started_them(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(40))
    run = edit(make_run(tmp_path, base, data, method="lora", gradient_accumulation=2, epochs=5.0), processes=2)
    started: list[int] = []

    def kill(pid: int) -> None:
        started.extend(process_of(pid, rank) for rank in (0, 1))
        os.kill(pid, signal.SIGKILL)

    code, _, _ = while_running(run, 1, kill)  # returns when the last of them has let go of the output
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(map(is_alive, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, started))


def test_an_error_in_one_process_ends_the_log(base: Path, tmp_path: Path) -> None:
    """The second process lacks a library; what it said is the end of the log, not what the first said when it fell."""
    lost = "import os, sys\nif os.environ.get('RANK') == '1':\n    sys.modules['trl'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(lost)
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    run = edit(make_run(tmp_path, base, data, gradient_accumulation=2), processes=2)
    command, env = [sys.executable, SCRIPT, run], ONE_THREAD | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 1
    said = done.stderr.partition("process 2 of 2, stderr.log:\n")[2].splitlines()
    assert said[0].startswith("Traceback"), done.stderr
    assert said[-1].startswith("ModuleNotFoundError: import of trl halted")


def test_batches_that_cannot_be_shared_are_refused(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    run = edit(make_run(tmp_path, base, data, gradient_accumulation=3), processes=2)
    done = front_door(run)
    assert done.returncode == 2
    said = "`gradient_accumulation: 3` batches a step cannot be shared evenly by 2 GPUs"
    assert done.stderr == f"error: {said}\n\nhint: write `gradient_accumulation: 4`\n"


# Sharded: FSDP2. Weights in bfloat16 round now and then to a neighbour: 1e-3 of all.


@pytest.mark.parametrize(
    ("method", "family"), [("full", "llama"), ("full", "qwen3"), ("full", "gemma3_vl"), ("lora", "llama")]
)
def test_two_processes_that_hold_halves_learn_what_one_learns(tmp_path: Path, method: str, family: str) -> None:
    """Qwen 3's output head is its embeddings, a weight not to be saved twice; Gemma 3 has a tower that text skips."""
    base = make_tiny(tmp_path / "base", family)
    data = write_rows(tmp_path / "data.jsonl", conversations(12))
    changes = {"method": method, "gradient_accumulation": 2, "save_steps": 2}
    runs = {n: make_run(tmp_path / str(n), base, data, 0.2, **changes) for n in (1, 2)}
    one, two = trained(runs[1]), trained(runs[2], processes=2, sharded=True)
    losses = [[e["loss"] for e in m["history"]] + [e["eval_loss"] for e in m["eval_history"]] for m in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for key in ("steps", "tokens_seen", "tokens_trained", "trainable_parameters", "total_parameters"):
        assert two["metrics"][key] == one["metrics"][key], key
    names = [sorted(path.name for path in (run.parent / "out").iterdir()) for run in runs.values()]
    assert names[0] == names[1]
    first, second = weights(runs[1]), weights(runs[2])
    assert first.keys() == second.keys()
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    assert apart < (1e-3) ** 2 * sum(weight.square().sum() for weight in first.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_halves_that_are_killed_go_on_as_halves_and_as_one(base: Path, tmp_path: Path, method: str) -> None:
    """SIGKILL, then SIGTERM after going on as two, then one process: the weights of a training that nothing stopped."""
    data = write_rows(tmp_path / "data.jsonl", conversations(16))
    changes = {"method": method, "gradient_accumulation": 2, "epochs": 2.0, "save_steps": 3}
    killed, whole = (make_run(tmp_path / name, base, data, **changes) for name in ("killed", "whole"))
    edit(killed, processes=2, sharded=True)
    code, said, _ = while_running(killed, 4, lambda pid: os.kill(pid, signal.SIGKILL))
    assert (code, [event["step"] for event in events(said, "step")][:4]) == (-signal.SIGKILL, [1, 2, 3, 4])
    code, said, errors = while_running(killed, 5, lambda pid: os.kill(pid, signal.SIGTERM))
    steps = [event["step"] for event in events(said, "step")]
    assert (code, steps[0], len(steps) < 12) == (130, 4, True), errors
    checkpoint = killed.parent / "work/checkpoints" / f"checkpoint-{steps[-1]}"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    gone_on, straight = trained(killed, processes=1, sharded=False), trained(whole)
    assert gone_on["resumed_from_step"] == steps[-1]
    losses = [[entry["loss"] for entry in found["history"]] for found in (gone_on, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    first, second = weights(killed), weights(whole)
    assert all((first[name] - second[name]).norm() < 1e-3 * second[name].norm() for name in second)


def test_halves_that_are_killed_after_the_last_step_train_no_more(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(8))
    changes = {"method": "full", "gradient_accumulation": 2}
    killed, whole = (make_run(tmp_path / name, base, data, **changes) for name in ("killed", "whole"))
    edit(killed, processes=2, sharded=True)
    mark = killed.parent / "work/checkpoints/checkpoint-4/complete.json"

    def kill(pid: int) -> None:
        first = process_of(pid, 0)
        deadline = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        for number in (first, pid):
            os.kill(number, signal.SIGKILL)

    assert while_running(killed, 4, kill)[0] == -signal.SIGKILL
    assert not (killed.parent / "out" / "manifest.json").exists()
    gone_on, straight = trained(killed), trained(whole)
    assert events(gone_on["printed"], "step") == []
    assert gone_on["metrics"]["steps"] == gone_on["resumed_from_step"] == straight["metrics"]["steps"]
    first, second = weights(killed), weights(whole)
    assert all((first[name] - second[name]).norm() < 1e-3 * second[name].norm() for name in second)
