"""The exact memory of training: one step traced by `scripts/trace_memory.py` in a child process. Imports no torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.attention import FLASH
from pipeline.errors import Finding, Place, Severity, UserError, redact
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.flavors import FLAVORS, Flavor
from pipeline.memory import CUDA_CONTEXT_GIB, EXPANDABLE
from pipeline.models import config_of
from pipeline.parallel import Sharing, parallel_of
from pipeline.settled import settle
from pipeline.sweep_plan import heaviest
from pipeline.traced import TracedMemory

# The script of this code, not of the experiment's repository: that may be a proposal, which is read and never run.
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "trace_memory.py"
MEMORY_RULE = "MEM002"  # training fits the GPU of its flavor
STACK = ("torch", "transformers", "trl", "peft", "bitsandbytes")
TIMEOUT_S = 300  # a trace takes 10 s of CPU; most of it are imports
SAID = 300  # characters of what the script said
# All that the child gets to know of its surroundings: no token is among them.
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT")


def can_trace() -> bool:
    """Whether this Python has what a trace needs."""
    return SCRIPT.is_file() and all(find_spec(name) for name in STACK)


def trace_memory(experiment: Experiment, facts: Facts) -> TracedMemory:
    """What one GPU of the experiment's flavor would have to allocate at its peak.

    Raises:
        UserError: the training stack is not installed, the base's config.json is not here, or this base or these
            settings cannot be traced.
    """
    if not can_trace():
        message = "a trace needs the training stack, and it is not installed"
        raise UserError(message, 'install it: `pip install "mergetune[train]"`, or leave out `--trace`')
    return _traced(json.loads(_answer(trace_request(experiment, facts))))


def trace_where_possible(
    path: str, untraced: list[Finding], experiment: Experiment, facts: Facts
) -> TracedMemory | None:
    """The traced memory; where a training cannot be traced the closed form decides, and `untraced` says why."""
    flavor = FLAVORS.get(experiment.train.flavor)
    if flavor is None or flavor.gpu is None or (facts.config is None and facts.shape is None):
        return None
    try:
        return trace_memory(experiment, facts)
    except UserError as error:
        hint = "nothing to do: the closed form decides, with its band"
        untraced.append(Finding(MEMORY_RULE, Severity.WARNING, Place(path), error.message, hint))
        return None


def trace_request(experiment: Experiment, facts: Facts) -> dict[str, Any]:
    """What the script is asked.

    Raises:
        UserError: there is no GPU, the GPUs share the weights, or nobody knows the base's config.json.
    """
    flavor = FLAVORS.get(experiment.train.flavor)
    if flavor is None or flavor.gpu is None:
        message = f"`{experiment.train.flavor}` is no flavor with a GPU, whose memory could be traced"
        raise UserError(message, "leave out `--trace`, or write `flavor: l4x1`")
    if parallel_of(experiment, facts.shape).sharing is Sharing.PARTS:
        message = f"the GPUs of `{flavor.name}` share the weights (FSDP2), which is not traced"
        raise UserError(message, "leave out `--trace`: the closed form counts each GPU's part")
    config: Mapping[str, Any] | None = facts.config or (config_of(facts.shape) if facts.shape else None)
    if config is None:
        why = facts.config_fault or "is not here"
        model = experiment.base.model
        raise UserError(f"the config.json of `{model}` {why}, and a trace starts from it", "add `--online` to fetch it")
    train = _carried_out(heaviest(experiment, facts.shape, flavor), facts, flavor)
    return {"config": dict(config), "train": train, "gpus": flavor.gpus * experiment.train.nodes}


def _carried_out(experiment: Experiment, facts: Facts, flavor: Flavor) -> dict[str, Any]:
    """The section `train` as the plan carries it out: rows at once, checkpointing and attention are chosen."""
    settled = settle(experiment, facts.shape, flavor)
    train: dict[str, Any] = settled.of(experiment).resolved()["train"]
    if settled.attention == FLASH:
        loading = {**(train["sft"].get("model_init_kwargs") or {}), "attn_implementation": FLASH}
        train["sft"] = {**train["sft"], "model_init_kwargs": loading}
    return train


def _answer(request: dict[str, Any]) -> str:
    """Standard output of the script.

    Raises:
        UserError: with the script's own words, or the last line of what it printed.
    """
    environment = {key: os.environ[key] for key in KEPT if key in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="mergetune-trace-") as folder:  # nothing of a proposal is importable there
        try:
            done = subprocess.run(
                [sys.executable, str(SCRIPT), "-"],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                cwd=folder,
                env=environment,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the trace took more than {TIMEOUT_S} s", "leave out `--trace`") from error
    if done.returncode == 0:
        return done.stdout
    _, found, said = done.stderr.rpartition("error: ")
    message, _, hint = said.partition("\n\nhint: ")
    if found and hint:
        raise UserError(f"no trace: {_short(message)}", _short(hint))
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
    raise UserError(f"no trace: {_short(last)}", "leave out `--trace`: the closed form needs none")


def _short(text: str) -> str:
    """What the script said, bounded; redacted first, as half a token is not recognised as one."""
    return redact(text.strip())[:SAID]


def _traced(answer: dict[str, Any]) -> TracedMemory:
    return TracedMemory(
        allocated=answer["allocated_gib"],
        **answer["parts"],
        phase=answer["phase"],
        layers=answer["layers"],
        traced_layers=tuple(answer["traced_layers"]),
        fragmentation=EXPANDABLE,
        context=CUDA_CONTEXT_GIB,
    )
