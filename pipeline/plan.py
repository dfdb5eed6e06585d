"""Experiment and facts to a plan: identity, ordered stages, estimates. Pure: reads and asks nothing."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.apple import CHIPS, MACS
from pipeline.cost import (
    CostEstimate,
    correction,
    estimate_cost,
    estimate_train_seconds,
    gpus_of,
    setup_seconds,
    stage_seconds,
)
from pipeline.errors import UserError
from pipeline.experiment import ANY_MAC, Backend, Evaluate, Experiment, Gguf, Merge, Method, Train, nearest
from pipeline.facts import Facts
from pipeline.fields import is_path
from pipeline.flavors import FLAVORS, Flavor
from pipeline.mac import BAND as MAC_BAND
from pipeline.mac import estimate_mac_memory, estimate_mac_seconds, mlx_bits
from pipeline.memory import MemoryEstimate
from pipeline.models import ModelShape
from pipeline.parallel import ALONE, Parallel, estimate_memory, parallel_of
from pipeline.settled import Settled, settle
from pipeline.sweep_plan import VariantEstimate, affordable_seconds, estimate_variants, sweep_seconds
from pipeline.traced import TracedMemory

# What a section of the file says that decides the result. Flavor, timeout, budget and names do not.
NOT_IN_FINGERPRINT = {"flavor", "nodes", "timeout", "tracking", "save_steps", "concurrency", "max_usd"}
DECIDING = ("base", "data", "train", "gguf", "sweep")


class StageName(StrEnum):
    """The stages, in the order they run."""

    TRAIN = "train"
    MERGE = "merge"
    GGUF = "gguf"
    EVALUATE = "evaluate"


SCRIPTS = {
    StageName.TRAIN: "scripts/train_sft.py",
    StageName.MERGE: "scripts/merge_adapter.py",
    StageName.GGUF: "scripts/convert_gguf.py",
    StageName.EVALUATE: "scripts/evaluate.py",
}
MLX_SCRIPT = "scripts/train_mlx.py"
WEEK_S = 7 * 86400  # the longest timeout there is; nothing ends a training on somebody's Mac


@dataclass(frozen=True)
class Stage:
    """One step of a plan: a job script on a flavor, bounded by a timeout in seconds.

    `memory` is the closed form, `traced` what a trace found where one was made: that one decides.
    """

    name: StageName
    script: str
    flavor: Flavor
    timeout_s: int
    cost: CostEstimate
    memory: MemoryEstimate | None = None
    parallel: Parallel = ALONE
    traced: TracedMemory | None = None
    settled: Settled | None = None  # of training in a job; of a sweep each variant has its own
    variants: tuple[VariantEstimate, ...] = ()  # of a sweep: `memory` is that of the largest, `cost` of all

    def request(self) -> dict[str, Any]:
        """What its script is told of the GPUs in run.json, beside the experiment."""
        return {**self.parallel.request(), **(self.settled.request() if self.settled else {})}

    @property
    def usd_per_minute(self) -> float:
        """The price of all its nodes together."""
        return self.parallel.nodes * self.flavor.usd_per_minute

    @property
    def where(self) -> str:
        """Its flavor in Markdown, and how often where there are several nodes: `2 × a100x8`."""
        return f"{self.parallel.nodes} × `{self.flavor.name}`" if self.parallel.nodes > 1 else f"`{self.flavor.name}`"


@dataclass(frozen=True)
class Plan:
    """An experiment carried out once: `run_id` names it everywhere."""

    run_id: str
    fingerprint: str
    experiment: Experiment
    stages: tuple[Stage, ...]
    shape: ModelShape | None = None  # of the base, when it is known

    def needs(self, stage: StageName) -> StageName | None:
        """The stage whose artifact `stage` reads, None when it starts from the base alone."""
        if stage is StageName.TRAIN:
            return None
        full = self.experiment.train.method is Method.FULL
        return StageName.TRAIN if stage is StageName.MERGE or full else StageName.MERGE

    def pending(self, done: Collection[StageName]) -> list[Stage]:
        """What is still to do, in order: missing end products, and what they need that is missing too.

        Counted from the end: an artifact in the middle that somebody deleted after the end was reached is not made
        again, because that could buy a second training.
        """
        used = {need for stage in self.stages if (need := self.needs(stage.name))}
        wanted: set[StageName] = set()
        for stage in self.stages:
            current: StageName | None = stage.name if stage.name not in used else None
            while current is not None and current not in done:
                wanted.add(current)
                current = self.needs(current)
        return [stage for stage in self.stages if stage.name in wanted]

    def repo(self, stage: StageName) -> str:
        """The Hub repository a stage writes to."""
        repo = self.experiment.output.repo
        if stage is StageName.GGUF:
            return f"{repo}-GGUF"
        adapter = stage is StageName.TRAIN and self.experiment.train.method is not Method.FULL
        return f"{repo}-adapter" if adapter else repo

    @property
    def repos(self) -> tuple[str, ...]:
        """Every repository the run writes to, each once."""
        return tuple(dict.fromkeys(self.repo(stage.name) for stage in self.stages))

    @property
    def first_job(self) -> StageName | None:
        """The first stage that costs money: before it, the plan must have been reviewed."""
        return next((stage.name for stage in self.stages if not stage.flavor.local), None)

    @property
    def worst_usd(self) -> float:
        """Every stage running into its timeout."""
        return sum(stage.cost.worst_usd for stage in self.stages)

    @property
    def expected_usd(self) -> float | None:
        """Sum over stages, None when one of them is unknown."""
        parts = [stage.cost.expected_usd for stage in self.stages]
        return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)


def make_fingerprint(experiment: Experiment, facts: Facts) -> str:
    """sha256 (hex) of the canonical JSON of what the file says that decides the result.

    Only written fields enter, so a new default in a later version changes no finished run; in-repo
    data, bases and custom scripts enter by content.
    """
    said: dict[str, Any] = experiment.model_dump(mode="json", exclude_unset=True)
    kept = {key: said[key] for key in DECIDING if said.get(key) is not None}
    for section in ("train", "gguf", "sweep"):
        if section in kept:
            kept[section] = {k: v for k, v in kept[section].items() if k not in NOT_IN_FINGERPRINT}
    deciding = [experiment.base.model, experiment.data.dataset, experiment.train.script, _eval_path(experiment)]
    deciding.append(mlx_base(experiment))
    content = {path: facts.content[path] for path in deciding if path is not None and path in facts.content}
    canonical = json.dumps([kept, content], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def make_run_id(experiment: Experiment, fingerprint: str) -> str:
    """The name of the run everywhere: of its tag, its jobs and its folder in the output repositories."""
    return f"{experiment.name}-{fingerprint[:8]}"


def make_plan(experiment: Experiment, facts: Facts) -> Plan:
    """Lay out the stages of an experiment.

    Raises:
        UserError: a flavor that does not exist, or an in-repo path that is not there.
    """
    if facts.missing:
        raise UserError(f"`{facts.missing[0]}` is not in this repository", "commit the file, or correct the path")
    fingerprint = make_fingerprint(experiment, facts)
    run_id = make_run_id(experiment, fingerprint)
    stages = [_train_stage(experiment, facts)]
    for name, section in _after_training(experiment):
        files = len(section.quants) + 1 if isinstance(section, Gguf) else 1
        flavor = flavor_named(section.flavor, name)
        seconds = stage_seconds(name, facts.shape, files)
        ratio = correction(facts.finished, name, experiment.train.method, gpus_of(flavor))
        seconds = seconds * ratio if seconds and ratio else seconds
        cost = estimate_cost(seconds, section.timeout, flavor, corrected=ratio is not None)
        stages.append(Stage(name, SCRIPTS[name], flavor, section.timeout, cost))
    return Plan(run_id, fingerprint, experiment, tuple(stages), facts.shape)


def flavor_named(name: str, section: str) -> Flavor:
    """The flavor of that name.

    Raises:
        UserError: there is none; the nearest is named.
    """
    flavor = FLAVORS.get(name)
    if flavor is None:
        near = nearest(name, FLAVORS) or "a10g-large"
        raise UserError(f"`{section}.flavor`: there is no flavor `{name}`", f"write `{near}`", exit_code=2)
    return flavor


def in_repo_paths(experiment: Experiment) -> tuple[str, ...]:
    """Every path of this repository that the experiment names, in file order, each once."""
    sources = [experiment.base.model, experiment.data.dataset, mlx_base(experiment)]
    paths = [source for source in sources if source and is_path(source)]
    paths += [path for path in (_eval_path(experiment), experiment.train.script) if path]
    if experiment.evaluate and experiment.evaluate.prompts:
        paths.append(experiment.evaluate.prompts)
    return tuple(dict.fromkeys(paths))


def mlx_base(experiment: Experiment) -> str | None:
    """The model that MLX trains on, where it is not `base.model` itself."""
    return experiment.train.mlx.base if experiment.train.mlx else None


def as_mlx(experiment: Experiment) -> Experiment:
    """The same experiment trained by MLX on this machine: another run, with the same other choices."""
    if experiment.train.backend is Backend.MLX:
        return experiment
    if experiment.sweep:
        raise UserError("a sweep is a job, and MLX trains one variant", "remove `sweep`, or run it without `mlx`")
    values = experiment.model_dump(mode="json", exclude_unset=True)
    kept = {key: value for key, value in values["train"].items() if key not in ("flavor", "timeout")}
    return Experiment.model_validate({**values, "train": {**kept, "backend": Backend.MLX.value}})


def _eval_path(experiment: Experiment) -> str | None:
    held_out = experiment.data.eval
    return held_out.dataset if held_out and held_out.dataset and is_path(held_out.dataset) else None


def _train_stage(experiment: Experiment, facts: Facts) -> Stage:
    train: Train = experiment.train
    if train.backend is Backend.MLX:
        return _mac_stage(experiment, facts)
    assert train.timeout is not None  # the schema asks for it
    flavor = flavor_named(train.flavor, "train")
    if experiment.sweep:
        return _sweep_stage(experiment, facts, flavor, train.timeout)
    settled = settle(experiment, facts.shape)
    carried_out = settled.of(experiment)
    seconds = None
    if facts.shape and facts.dataset:
        seconds = estimate_train_seconds(carried_out, facts.shape, facts.dataset, flavor, facts.finished)
    known = correction(facts.finished, StageName.TRAIN, train.method, gpus_of(flavor, train.nodes)) is not None
    memory = estimate_memory(carried_out, facts.shape) if facts.shape else None
    setup_s = setup_seconds(facts.shape) if facts.shape else 0.0
    parallel = parallel_of(experiment, facts.shape)
    cost = estimate_cost(seconds, train.timeout, flavor, setup_s, known, parallel)
    script = train.script or SCRIPTS[StageName.TRAIN]
    return Stage(StageName.TRAIN, script, flavor, train.timeout, cost, memory, parallel, facts.traced, settled)


def _sweep_stage(experiment: Experiment, facts: Facts, flavor: Flavor, timeout_s: int) -> Stage:
    """Training every variant in one job: the memory of the largest, the time of all."""
    variants, parallel = estimate_variants(experiment, facts, flavor), parallel_of(experiment, facts.shape)
    known = correction(facts.finished, StageName.TRAIN, experiment.train.method, gpus_of(flavor)) is not None
    seconds, setup_s = sweep_seconds(variants, parallel.lanes), setup_seconds(facts.shape) if facts.shape else 0.0
    if seconds is not None and experiment.sweep and experiment.sweep.max_usd is not None:
        seconds = min(seconds, max(0.0, affordable_seconds(experiment.sweep.max_usd, flavor) - setup_s))
    cost = estimate_cost(seconds, timeout_s, flavor, setup_s, known, parallel)
    largest = max((one.memory for one in variants if one.memory), key=lambda need: need.total, default=None)
    script = SCRIPTS[StageName.TRAIN]
    return Stage(StageName.TRAIN, script, flavor, timeout_s, cost, largest, parallel, facts.traced, variants=variants)


def _mac_stage(experiment: Experiment, facts: Facts) -> Stage:
    """Training on a Mac: how long is known where the file names its chip, and it costs nothing."""
    flavor = MACS.get(experiment.train.flavor, MACS[ANY_MAC])
    chip, bits, shape = CHIPS.get(flavor.name), mlx_bits(experiment, facts.mlx_config), facts.shape
    seconds = None
    if chip and shape and facts.dataset:
        seconds = estimate_mac_seconds(experiment, shape, facts.dataset, chip, bits)
    cost = CostEstimate(seconds, WEEK_S, 0.0, 0.0, MAC_BAND, seconds)
    memory = estimate_mac_memory(experiment, shape, bits) if shape and bits else None
    return Stage(StageName.TRAIN, experiment.train.script or MLX_SCRIPT, flavor, WEEK_S, cost, memory)


def _after_training(experiment: Experiment) -> list[tuple[StageName, Merge | Gguf | Evaluate]]:
    chosen: list[tuple[StageName, Merge | Gguf | Evaluate]] = []
    if experiment.merge and experiment.train.method is not Method.FULL:
        chosen.append((StageName.MERGE, experiment.merge))
    if experiment.gguf:
        chosen.append((StageName.GGUF, experiment.gguf))
    if experiment.evaluate:
        chosen.append((StageName.EVALUATE, experiment.evaluate))
    return chosen
