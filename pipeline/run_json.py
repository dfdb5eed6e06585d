"""`run.json`: the one argument of every job script, on every backend. Pure: puts together, writes nothing."""

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.experiment import Experiment, Method
from pipeline.plan import Plan, Stage, StageName
from pipeline.settled import as_written
from pipeline.sweep_plan import shares
from pipeline.variants import variants_of

RUN_SCHEMA = 1

Source = dict[str, Any]
# A base, dataset or file the experiment names: its id or path, its kind, its revision → where a script finds it.
FindSource = Callable[[str, str, str | None], Source]
FindArtifact = Callable[[StageName], Source]


def make_run_json(
    plan: Plan, stage: Stage, attempt: int, inputs: Mapping[str, Any], output: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The resolved request of one attempt at a stage.

    `inputs` maps a name to `{path, sha256}` or `{repo, revision, type}`; `output` says where the artifact goes; `more`
    is what only one backend has to say.
    """
    predicted = {
        # A local run is not on the flavor that the prediction is for: it must not correct later ones.
        "flavor": stage.flavor.name if "repo" in output else None,
        "method": plan.experiment.train.method,
        "duration_s": stage.cost.expected_s,
        "usd": stage.cost.expected_usd,
        "memory_gib": stage.memory and stage.memory.total,
        "allocated_gib": stage.memory and stage.memory.allocated,  # what the script measures on a GPU
        "gpu": bool(stage.flavor.gpus),
    }
    predicted |= {"nodes": stage.parallel.nodes} if stage.parallel.nodes > 1 else {}
    return {
        "schema": RUN_SCHEMA,
        "run_id": plan.run_id,
        "fingerprint": plan.fingerprint,
        "stage": stage.name,
        "attempt": attempt,
        "experiment": _carried_out(plan, on_a_job="repo" in output).resolved(),
        "inputs": dict(inputs),
        "output": dict(output),
        "predicted": predicted,
        **more,
        **(_sweep(plan, stage, int(more.get("processes", 1)), "repo" in output) if stage.variants else {}),
    }


def _sweep(plan: Plan, stage: Stage, processes: int, is_job: bool) -> dict[str, Any]:
    """The variants of a sweep with every default filled in; of a job also what bounds its time and money."""
    variants, sweep = variants_of(plan.experiment), plan.experiment.sweep
    shared = shares(plan.experiment, plan.shape, processes)
    rows = []
    for variant, estimate, share in zip(variants, stage.variants, shared, strict=True):
        settled = estimate.settled if is_job else as_written(variant.experiment)
        train = settled.of(variant.experiment).resolved()["train"]
        rows.append({"words": variant.words, "train": train, **share, **settled.request()})
    price, most = stage.flavor.usd_per_minute, sweep.max_usd if sweep else None
    limits = {"timeout_s": stage.timeout_s, "usd_per_minute": price, "max_usd": most}
    return {"sweep": {"variants": rows, **(limits if is_job else {})}}


def _carried_out(plan: Plan, on_a_job: bool) -> Experiment:
    """The experiment with numbers for `auto`: the plan's in a job, one row at a time on a machine it does not know."""
    settled = plan.stages[0].settled if on_a_job else None
    return (settled or as_written(plan.experiment)).of(plan.experiment)


def make_inputs(plan: Plan, stage: StageName, source: FindSource, artifact: FindArtifact) -> dict[str, Source]:
    """What the script of a stage reads, by name; where each lies is for the backend to say."""
    experiment = plan.experiment
    full = experiment.train.method is Method.FULL

    def base() -> Source:
        return source(experiment.base.model, "model", experiment.base.revision)

    def tuned() -> Source:
        return artifact(StageName.TRAIN if full else StageName.MERGE)

    match stage:
        case StageName.TRAIN:
            return {"base": base(), **_mlx_inputs(plan, source), **_data_inputs(plan, source)}
        case StageName.MERGE:
            return {"base": base(), "adapter": artifact(StageName.TRAIN)}
        case StageName.GGUF:
            return {"model": tuned()}
        case StageName.EVALUATE:
            inputs = {"base": base(), "tuned": tuned(), **_data_inputs(plan, source)}
            evaluate = experiment.evaluate
            if evaluate and evaluate.prompts:
                prompts = source(evaluate.prompts, "dataset", None)
                inputs["prompts"] = {**prompts, "max_new_tokens": evaluate.max_new_tokens}
            return inputs


def _mlx_inputs(plan: Plan, source: FindSource) -> dict[str, Source]:
    """The model that MLX trains on, where it is not the base itself."""
    mlx = plan.experiment.train.mlx
    return {"mlx_base": source(mlx.base, "model", mlx.revision)} if mlx and mlx.base else {}


def _data_inputs(plan: Plan, source: FindSource) -> dict[str, Source]:
    data = plan.experiment.data
    found = source(data.dataset, "dataset", data.revision)
    inputs = {"data": found if "path" in found else {**found, "subset": data.subset}}
    if data.eval and data.eval.dataset:
        inputs["eval_data"] = source(data.eval.dataset, "dataset", data.revision)
    return inputs
