"""What a rehearsal does about a sweep: every variant in a few steps on the twin, and a bad one is a failure."""

from typing import Any

from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.loader import ExperimentFile
from pipeline.plan import StageName
from pipeline.report import RunResult
from pipeline.sweep import Choice
from pipeline.sweep_sections import rows_of
from pipeline.variants import Variant, variants_of

LENGTHS = ("epochs", "max_steps")  # a rehearsal has its own


def shortened(experiment: Experiment, rows: int, batches: int) -> dict[str, Any]:
    """The sweep of a rehearsal: the same variants, none of them longer or in larger batches than a rehearsal is."""
    most, entries = {"batch_size": rows, "gradient_accumulation": batches}, []
    for variant in variants_of(experiment):
        kept = {choice.key: choice.value for choice in variant.choices if choice.key not in LENGTHS}
        for key in most.keys() & kept.keys():
            wanted = getattr(variant.experiment.train, key)  # as the schema reads it: a file may quote a number
            kept[key] = min(wanted, most[key]) if isinstance(wanted, int) else wanted
        entries.append(kept)
    return {"list": entries, "concurrency": experiment.sweep.concurrency if experiment.sweep else 1}


def require_every_variant(file: ExperimentFile, result: RunResult) -> None:
    """Raise UserError for the first variant that did not train, at its value: alone it does not fail its stage."""
    rows = {row.get("variant"): row for row in rows_of(result.manifests.get(StageName.TRAIN, {}))}
    for variant in variants_of(file.experiment):
        row = rows.get(variant.number, {})
        if row.get("state") != "trained":
            reason = str(row.get("reason") or "it was not trained")
            choice = _meant(variant, reason)
            at = file.at(f"sweep.{choice.at}" if choice else "sweep")
            hint = str(row.get("hint") or "change its value, or remove it from the sweep")
            raise UserError(f"train: variant {variant.number} (`{variant.words}`) failed: {reason}", hint, at=at)


def proven(experiment: Experiment) -> str:
    """What every variant has shown."""
    return f"each of the {len(variants_of(experiment))} variants of the sweep trains with its values"


def _meant(variant: Variant, reason: str) -> Choice | None:
    """The value that a reason speaks of by its field's name, else the last one of the variant."""
    named = (choice for choice in variant.choices if choice.key.rpartition(".")[2] in reason)
    return next(named, variant.choices[-1] if variant.choices else None)
