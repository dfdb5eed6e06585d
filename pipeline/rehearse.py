"""Rehearse an experiment: the whole chain, by the very job scripts, on this CPU, on the twin of its base.

The rehearsal is a run like any other: a repository laid out in a temporary folder, with the twin as base and the first
rows of the real data, carried through by the local backend. Nothing of it touches the network.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import rehearse_mlx, rehearse_sweep
from pipeline.backends.local import LocalRun
from pipeline.errors import UserError
from pipeline.experiment import Backend, Experiment
from pipeline.facts import Facts
from pipeline.fields import is_path, rows_at_once
from pipeline.loader import ExperimentFile
from pipeline.local_run import run_locally
from pipeline.parallel import Parallel, parallel_of
from pipeline.plan import make_plan
from pipeline.progress import Display, Progress
from pipeline.rehearsal_place import placed
from pipeline.rehearsal_rows import copy_first_rows, made_rows, texts_of, write_lines
from pipeline.twin import TwinSpec, twin_of
from pipeline.workspace import read_facts

MAKER = "scripts/dev/make_twin.py"
ROWS, HELD_OUT, PROMPTS, STEPS, ANSWER = 16, 4, 2, 2, 8
BATCH, ACCUMULATION, PROCESSES = 4, 2, 2  # at most: a rehearsal repeats the code, not the work; 2 stand for all GPUs
TEXT = 600  # characters of a row, shared by its turns: short rows keep two steps short
MAX_LENGTH = 512  # tokens; rows of TEXT characters fit in it with any tokenizer and chat template
BIG_VOCAB, BIG_TEXT, BIG_LENGTH = 50_000, 300, 256  # the CPU scores every token of the vocabulary, at every position


@dataclass(frozen=True)
class RehearsalResult:
    """What a rehearsal found. `seconds` are wall time by step; `folder` is kept, for its logs, when it failed."""

    seconds: dict[str, float]
    proves: tuple[str, ...]
    cannot_prove: tuple[str, ...]
    substituted: tuple[str, ...]
    failure: UserError | None = None
    folder: Path | None = None
    not_rehearsed: str = ""

    def summary(self) -> str:
        """A few lines for a terminal."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        lines = [f"rehearsal {'failed' if self.failure else 'passed'} in {total:.0f} s ({parts})"]
        lines += [self.not_rehearsed] if self.not_rehearsed else []
        sections = (("proves", self.proves), ("cannot prove", self.cannot_prove), ("substituted", self.substituted))
        for title, points in sections:
            lines += [f"{title}:", *(f"  - {point}" for point in points)] if points else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Found:
    """Files of Hub sources that were fetched before: a folder of the base's small files, files of rows."""

    base: Path | None = None
    rows: Path | None = None
    held_out: Path | None = None


def rehearse(
    file: ExperimentFile, facts: Facts, root: Path, display: Display, found: Found | None = None
) -> RehearsalResult:
    """Carry `file` through on the CPU; `facts` are the experiment's own, `root` its repository.

    A stage that fails is part of the result, with its place in the experiment. KeyboardInterrupt passes on.
    """
    folder = Path(tempfile.mkdtemp(prefix="mergetune-rehearsal-"))
    watch = _Watch(display)
    substituted: tuple[str, ...] = ()
    lacks = rehearse_mlx.NOT_HERE if rehearse_mlx.is_stood_in_for(file.experiment, facts.mlx_here) else ""
    try:
        spec, experiment, notes = lay_out(file.experiment, facts, root, folder, found or Found())
        substituted = (*spec.substituted, *notes, *rehearse_mlx.substituted(file.experiment, facts))
        watch.begin("twin")
        display.say("twin: build")
        _build_twin(spec, root, folder)
        if experiment.train.backend is Backend.MLX:
            rehearse_mlx.make_base(folder, rehearse_mlx.twin_bits(file.experiment, facts.mlx_config))
        watch.begin(None)
        twin_facts = read_facts(experiment, folder)
        plan = make_plan(experiment, twin_facts)
        parallel = parallel_of(file.experiment, facts.shape).at_most(PROCESSES)
        place = folder / "runs" / plan.run_id
        result = run_locally(LocalRun(plan, twin_facts, folder, place, "cpu", parallel=parallel), watch)
        rehearse_sweep.require_every_variant(file, result)
    except UserError as error:
        stage = watch.stage
        return RehearsalResult(watch.finish(), (), (), substituted, placed(error, file, stage), folder, lacks)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    cannot = _cannot(file, spec, watch.warnings)
    proves = _proves(experiment, spec, parallel, trained=not lacks)
    return RehearsalResult(watch.finish(), proves, cannot, substituted, not_rehearsed=lacks)


def lay_out(
    experiment: Experiment, facts: Facts, root: Path, folder: Path, found: Found
) -> tuple[TwinSpec, Experiment, tuple[str, ...]]:
    """Write the rehearsal's repository into `folder`: rows, prompts, links to the job scripts.

    Returns the twin to build at `folder/twin`, the rehearsal's experiment, and what stands in for what.
    """
    (folder / "pyproject.toml").write_text("[tool.mergetune]\n", encoding="utf-8")
    (folder / "scripts").symlink_to((root / "scripts").resolve(), target_is_directory=True)
    script = experiment.train.script
    if script and (root / script).exists() and not (folder / script).exists():
        (folder / script).parent.mkdir(parents=True, exist_ok=True)
        (folder / script).symlink_to((root / script).resolve())
    model = experiment.base.model
    base = (root / model).resolve() if is_path(model) else found.base
    model_type = facts.shape.model_type if facts.shape else None
    big = bool(base and facts.shape and facts.shape.vocab > BIG_VOCAB)
    data = _write_data(experiment, root, found, folder, BIG_TEXT if big else TEXT)
    spec = twin_of(model, base, model_type, texts_of(data.lines), experiment.train.seed)
    changed = _changed(experiment, data, big)
    changed["train"]["max_length"] = _max_length(experiment, spec, big)
    if experiment.train.backend is Backend.MLX:
        layers = int(spec.config.get("text_config", spec.config).get("num_hidden_layers", 1))
        rehearse_mlx.change_training(changed["train"], experiment, facts, layers)
    return spec, Experiment.model_validate(changed), data.notes


class _Watch:
    """A display that also takes the time of each stage and keeps what only a GPU can show."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.stage: str | None = None
        self._since = time.monotonic()

    def begin(self, name: str | None) -> None:
        """Another step starts; None: between steps."""
        now = time.monotonic()
        if self.stage is not None:
            self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + now - self._since, 1)
        self.stage, self._since = name, now

    def finish(self) -> dict[str, float]:
        """The seconds of every step that began."""
        self.begin(None)
        return self.seconds

    def show(self, progress: Progress, *, important: bool = False) -> None:
        """Pass on; a change of stage stops one clock and starts the next."""
        if progress.current is not None and progress.current.value != self.stage:
            self.begin(progress.current.value)
        self.display.show(progress, important=important)

    def say(self, message: str) -> None:
        """Pass on, and remember what was left out."""
        if ": warning: " in message and "needs a GPU" in message:  # others speak of random weights and few rows
            self.warnings.append(message.partition(": warning: ")[2])
        self.display.say(message)

    def close(self) -> None:
        """Pass on."""
        self.display.close()


@dataclass(frozen=True)
class _Data:
    """Paths in the rehearsal's repository, the rows written there as JSON lines, and what they stand for."""

    dataset: str
    eval: str | None = None
    prompts: str | None = None
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def plus(self, lines: list[str], note: str) -> "_Data":
        """With more rows."""
        return replace(self, lines=(*self.lines, *lines), notes=(*self.notes, note))


def _write_data(experiment: Experiment, root: Path, found: Found, folder: Path, budget: int) -> _Data:
    """Rows, held-out rows and prompts, each in a folder of its own: never through the link to the job scripts."""

    def write(place: str, source: str, fetched: Path | None, count: int) -> tuple[str, list[str], str]:
        file = root / source if is_path(source) else fetched
        target = f"./{place}/{file.name if file else 'made.jsonl'}"  # messages repeat the file's name
        (folder / place).mkdir()
        if file is None:
            lines, what = made_rows(count, experiment.train.is_dpo)
            write_lines(folder / target, lines)
            note = f"`{source}` is not in this repository: {count} made {what} stand in for its rows"
            return target, lines, note
        lines = copy_first_rows(file, folder / target, count, budget)
        note = f"the first {len(lines)} rows of `{source}`, their texts cut to {budget} characters, stand for all of it"
        return target, lines, note

    source = experiment.data
    target, lines, note = write("rows", source.dataset, found.rows, ROWS)
    data = _Data(target).plus(lines, note)
    if source.eval and (source.eval.dataset or source.eval.split):
        held_out = source.eval.dataset or f"{source.dataset}:{source.eval.split}"
        target, lines, note = write("held-out", held_out, found.held_out, HELD_OUT)
        data = replace(data, eval=target).plus(lines, note)
    if experiment.evaluate and (prompts := experiment.evaluate.prompts):
        target, lines, note = write("prompts", prompts, None, PROMPTS)
        data = replace(data, prompts=target).plus(lines, note)
    return data


def _changed(experiment: Experiment, data: _Data, big: bool) -> dict[str, Any]:
    """The experiment's values with what a rehearsal changes: sources, lengths and counts. No choice of method."""
    values = experiment.model_dump(mode="json", exclude_unset=True)
    for section in ("merge", "gguf", "evaluate"):
        values.setdefault(section, None)
    values["base"] = {"model": "./twin"}
    held_out = {"dataset": data.eval} if data.eval else values["data"].get("eval")
    values["data"] = {"dataset": data.dataset, **({"eval": held_out} if held_out else {})}
    train = experiment.train
    values["train"] |= {
        "max_steps": STEPS,
        "save_steps": 1,
        "batch_size": 1 if big else min(rows_at_once(train.batch_size), BATCH),
        "gradient_accumulation": min(train.gradient_accumulation, ACCUMULATION),
        "tracking": "none",
    }
    if experiment.sweep:
        values["sweep"] = rehearse_sweep.shortened(experiment, 1 if big else BATCH, ACCUMULATION)
    if experiment.evaluate and values["evaluate"] is not None:
        values["evaluate"] |= {
            "max_new_tokens": min(experiment.evaluate.max_new_tokens, ANSWER),
            "prompts": data.prompts,
        }
    return values


def _max_length(experiment: Experiment, spec: TwinSpec, big: bool) -> int:
    """Short; with a made tokenizer, which needs more tokens for the same text, whatever the experiment says."""
    longest = BIG_LENGTH if big else MAX_LENGTH
    return min(experiment.train.max_length, longest) if spec.tokenizer else longest


def _build_twin(spec: TwinSpec, root: Path, folder: Path) -> None:
    request, log = folder / "twin.json", folder / "twin.log"
    request.write_text(spec.as_json(), encoding="utf-8")
    command = [sys.executable, str(root / MAKER), str(request), str(folder / "twin")]
    with log.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = (lines or ["no output"])[-1][:300]
        bare = 'install what trains: `pip install "mergetune[train]"`' if "No module named" in last else None
        raise UserError(f"the twin cannot be built: {last}", bare or f"the whole log: `{log}`")


def _proves(experiment: Experiment, spec: TwinSpec, parallel: Parallel, *, trained: bool) -> tuple[str, ...]:
    train = experiment.train
    how = "with MLX " if train.backend is Backend.MLX else ""
    points = [f"`{train.method}` training {how}starts, learns, checkpoints and saves with these settings"] * trained
    if experiment.sweep:
        points.append(rehearse_sweep.proven(experiment))
    if parallel.gpus > 1:
        points.append(f"{parallel.gpus} processes share each step ({parallel.sharing}), as the GPUs will")
    if train.sft and trained:
        points.append("the trainer takes every value of `train.sft`: " + ", ".join(train.sft))
    if train.lora and train.lora.targets != "all-linear":
        points.append("`train.lora.targets` are layers of this architecture")
    if spec.tokenizer:
        learned = "both answers of each pair have" if train.is_dpo else "`loss_on` finds"
        points.append(f"the chat template takes the first rows, and {learned} tokens to learn")
    if experiment.merge:
        points.append("the adapter merges into this architecture")
    if experiment.gguf:
        points.append(f"llama.cpp converts, quantizes and runs it: {', '.join(experiment.gguf.quants)}")
    if experiment.evaluate:
        points.append("the evaluation compares before and after")
    return tuple(points)


def _cannot(file: ExperimentFile, spec: TwinSpec, warnings: list[str]) -> tuple[str, ...]:
    experiment = file.experiment
    where = "Mac" if experiment.train.backend is Backend.MLX else "GPU"
    points = [
        f"that it fits the {where} and ends in time: `mergetune plan` estimates both",
        "that the result is any good: the twin's weights are random",
        "access: tokens, licences and repositories of the Hub are not touched",
        f"what only whole rows of {experiment.train.max_length} tokens, or rows after the first {ROWS}, would show",
    ]
    if spec.tokenizer is None:
        points.append("that the base's own tokenizer and chat template pass: stand-ins took their place")
    if experiment.train.tracking != "none":
        points.append(f"`train.tracking: {experiment.train.tracking}`, which needs the network")
    return (*points, *dict.fromkeys(warnings))
