"""A diagnosis to the edit that mends it, with the experiment's own values. Pure: nothing is looked up."""

import math
from collections.abc import Callable, Mapping

from pipeline.diagnose import Diagnosis
from pipeline.events import EVENT_PREFIX
from pipeline.fit import cheapest_flavor
from pipeline.flavors import FLAVORS, Flavor, gpu_flavors
from pipeline.host_memory import cheapest_host
from pipeline.pace import read_pace
from pipeline.parallel import estimate_memory
from pipeline.plan import Plan, Stage, StageName
from pipeline.remedy_gpu import fewer_rows, larger_gpu, measured, shorter_rows
from pipeline.settled import as_written

# What stands in a fix where no experiment is known.
NOBODYS = {
    "stage": "train",
    "name": "my-experiment",
    "namespace": "the namespace",
    "path": "experiments/my-experiment.yaml",
    "base": "the base",
    "dataset": "the data",
    "repo": "the output",
}
SPARE_TIME, HALF_HOUR = 1.2, 1800
AMPERE = ("T4",)  # GPUs that are older
MACHINE = ("cuda-oom", "gpu-too-small", "host-oom", "disk-full")  # what a script says of these knows no flavors


def remedy(found: Diagnosis, plan: Plan, stage: Stage, log: str = "") -> str:
    """What to do: an edit from old to new where it can be computed, else the hint with the experiment's names in it."""
    said = found.evidence.startswith(EVENT_PREFIX) and found.id not in MACHINE
    compute = None if said else EDITS.get(found.id)
    edit = compute(found, plan, stage, log) if compute else ""
    return edit or filled(found.hint, plan, stage)


def filled(hint: str, plan: Plan, stage: Stage) -> str:
    """A hint of `diagnose` with the caller's own values in it. It may hold any text: nothing else is replaced."""
    experiment = plan.experiment
    values = {
        "stage": stage.name.value,
        "name": experiment.name,
        "namespace": experiment.output.repo.split("/")[0],
        "path": f"experiments/{experiment.name}.yaml",
        "base": experiment.base.model,
        "dataset": experiment.data.dataset,
        "repo": plan.repo(stage.name),
    }
    return put(hint, values)


def put(hint: str, values: Mapping[str, str] = NOBODYS) -> str:
    """The hint with these values; without an experiment, with words for them."""
    for key, value in values.items():
        hint = hint.replace(f"{{{key}}}", value)
    return hint


def _gpu_memory(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    """Shorter rows, fewer at once, or the cheapest larger GPU."""
    experiment, shape = plan.experiment, plan.shape
    if shape is None or stage.flavor.gpu is None:
        return ""
    if stage.name is not StageName.TRAIN:
        return _flavor_edit(stage, cheapest_host(stage.name, experiment, shape, stage.flavor))
    settled = stage.settled or as_written(experiment)
    seen = measured(settled.of(experiment), shape, stage.flavor, found.evidence)
    ways = ["" if settled.recomputes else "`train.sft: {gradient_checkpointing: true}`"]
    ways += [shorter_rows(seen), fewer_rows(seen), _flavor_edit(stage, larger_gpu(seen))]
    text = ", or ".join(way for way in ways if way)
    if not experiment.train.sft.get("label_smoothing_factor"):
        return text
    first = "remove `label_smoothing_factor` from `train.sft`: it makes all logits at once"
    return f"{first}; or {text}" if text else first


def _one_gpu(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    """One such GPU, if the training fits it, else the cheapest flavor with one that it fits."""
    if stage.flavor.gpus < 2 or plan.shape is None:
        return ""
    need = estimate_memory(plan.experiment, plan.shape)
    alike = [flavor for flavor in gpu_flavors() if flavor.gpu == stage.flavor.gpu and need.fits(flavor)]
    one = max(alike, key=lambda flavor: flavor.ram_gib, default=None)
    return _flavor_edit(stage, one or cheapest_flavor(plan.experiment, plan.shape))


def _newer_gpu(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    """The cheapest GPU that knows bf16 and is large enough."""
    newer = [f for f in gpu_flavors() if f.gpu not in AMPERE and f.vram_gib >= stage.flavor.vram_gib]
    if plan.shape is not None and stage.name is StageName.TRAIN:
        need = estimate_memory(plan.experiment, plan.shape)
        newer = [flavor for flavor in newer if need.fits(flavor)]
    return _flavor_edit(stage, next(iter(newer), None)) if stage.flavor.gpu in (*AMPERE, None) else ""


def _more_ram(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    return _larger_host(plan, stage, lambda flavor: flavor.ram_gib)


def _more_disk(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    return _larger_host(plan, stage, lambda flavor: flavor.disk_gb)


def _larger_host(plan: Plan, stage: Stage, size: Callable[[Flavor], float]) -> str:
    """The cheapest flavor that the stage should fit, and that has more than the one it failed on."""
    if plan.shape is not None:
        able = cheapest_host(stage.name, plan.experiment, plan.shape, stage.flavor)
        if able is not None and size(able) > size(stage.flavor):
            return _flavor_edit(stage, able)
    more = [
        flavor
        for flavor in FLAVORS.values()
        if size(flavor) > size(stage.flavor)
        and (flavor.gpu is None) == (stage.flavor.gpu is None)
        and flavor.vram_gib >= stage.flavor.vram_gib
        and flavor.gpus <= max(stage.flavor.gpus, 1)
    ]
    return _flavor_edit(stage, min(more, key=lambda flavor: flavor.usd_per_hour, default=None))


def _flavor_edit(stage: Stage, better: Flavor | None) -> str:
    if better is None or better.name == stage.flavor.name:
        return ""
    return f"`{stage.name}.flavor: {stage.flavor.name} → {better.name}`"


def _longer(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    """A timeout that the measured pace needs, with a fifth to spare; half as much again where no pace is known."""
    pace = read_pace(log)
    needed = max(pace.needed_s * SPARE_TIME if pace else 0.0, stage.timeout_s + 1)
    if pace is None:
        needed = stage.timeout_s * 1.5
    seconds = math.ceil(needed / HALF_HOUR) * HALF_HOUR
    edit = f"`{stage.name}.timeout: {_duration(stage.timeout_s)} → {_duration(seconds)}`"
    if pace is not None:
        edit += f" ({pace.done} of {pace.total} steps took {pace.elapsed_s / 3600:.1f} h)"
    budget = plan.experiment.budget.max_usd
    worst = plan.worst_usd + (seconds - stage.timeout_s) / 60 * stage.usd_per_minute
    if worst > budget:
        edit += f" and `budget.max_usd: {budget:g} → {math.ceil(worst)}`"
    return f"{edit}, then `mergetune retry {plan.experiment.name}`"


def _duration(seconds: int) -> str:
    if seconds % 3600 == 0:
        return f"{seconds // 3600}h"
    return f"{seconds // 60}m" if seconds % 60 == 0 else f"{seconds}s"


def _slower(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    rate = plan.experiment.train.learning_rate
    return f"`train.learning_rate: {rate:g} → {rate / 10:g}`, or check the base's weights and the data"


def _all_linear(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    lora = plan.experiment.train.lora
    if lora is None or isinstance(lora.targets, str):
        return ""
    return f"`train.lora.targets: [{', '.join(lora.targets)}] → all-linear`"


def _longer_rows(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    now = plan.experiment.train.max_length
    return f"`train.max_length: {now} → {2 * now}`, or shorter rows: `mergetune check` counts those that are lost"


def _unpacked(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    return "`train.packing: true → false`" if plan.experiment.train.packing else ""


def _untracked(found: Diagnosis, plan: Plan, stage: Stage, log: str) -> str:
    now = plan.experiment.train.tracking
    return f"`train.tracking: {now} → none`" if now != "none" else ""


EDITS: dict[str, Callable[[Diagnosis, Plan, Stage, str], str]] = {
    "cuda-oom": _gpu_memory,
    "gpu-too-small": _gpu_memory,
    "host-oom": _more_ram,
    "disk-full": _more_disk,
    "job-timeout": _longer,
    "time-limit": _longer,
    "nan-loss": _slower,
    "loss-not-falling": _slower,
    "targets-missing": _all_linear,
    "no-rows": _longer_rows,
    "packing-attention": _unpacked,
    "tracking-forbidden": _untracked,
    "tracker-login": _untracked,
    "tracker-missing": _untracked,
    "no-bf16": _newer_gpu,
    "gpu-unsupported": _newer_gpu,
    "attention-kernel": _newer_gpu,
    "nccl": _one_gpu,
    "nccl-timeout": _one_gpu,
    "sharding": _one_gpu,
}
