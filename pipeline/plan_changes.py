"""What differs between two versions of one experiment, field by field, and what that does. Reads and runs nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.experiment import Experiment
from pipeline.fields import is_path
from pipeline.plan import DECIDING, NOT_IN_FINGERPRINT, Plan, mlx_base
from pipeline.progress import duration

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """One version of an experiment: its plan where one could be made, and what its paths held (None: not known)."""

    experiment: Experiment
    plan: Plan | None = None
    content: Mapping[str, str] | None = None


@dataclass(frozen=True)
class FieldChange:
    """One field before and after, as text; None where it is not there. `decides`: it is part of the fingerprint.

    `written` is not empty where both versions have this value, and only one of them writes it down: which one.
    """

    field: str
    before: str | None
    after: str | None
    decides: bool
    written: Literal["", "before", "now"] = ""


@dataclass(frozen=True)
class EstimateChange:
    """One number of the plan before and after; None where it is unknown. Units are in the name."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Changes:
    """The difference: fields in the order of the file, estimates, and both fingerprints where they are known."""

    fields: tuple[FieldChange, ...]
    estimates: tuple[EstimateChange, ...] = ()
    before: Plan | None = None
    after: Plan | None = None
    not_compared: tuple[str, ...] = ()  # paths whose earlier content is not known

    @property
    def same_run(self) -> bool | None:
        """True when nothing that decides the result differs, None when that cannot be known."""
        if any(change.decides for change in self.fields):
            return False
        return None if self.not_compared else True

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "same_run": self.same_run,
            "before": self.before and self.before.run_id,
            "fields": [
                {"field": c.field, "before": c.before, "after": c.after, "decides": c.decides} for c in self.fields
            ],
            "estimates": [{"name": e.name, "before": e.before, "after": e.after} for e in self.estimates],
            "not_compared": list(self.not_compared),
        }


def compare(before: Version, after: Version) -> Changes:
    """Every field whose value differs, or that only one version writes down, then file contents, then estimates."""
    fields = _field_changes(before.experiment, after.experiment)
    paths = [path for path in _deciding_paths(after.experiment) if path in _deciding_paths(before.experiment)]
    content: list[FieldChange] = []
    if before.content is not None and after.content is not None:
        content = [
            change for path in paths if (change := _content_change(path, before.content, after.content)) is not None
        ]
        paths = []
    estimates = _estimates(before.plan, after.plan) if before.plan and after.plan else ()
    return Changes((*fields, *content), estimates, before.plan, after.plan, tuple(paths))


def plan_hash(plan: Plan) -> str:
    """sha256 (hex) of what a reviewer approves: the result, the stages and their worst price, where it goes.

    A launch of anything else is a launch nobody looked at.
    """
    stages = [
        {
            "name": stage.name,
            "script": stage.script,
            "flavor": stage.flavor.name,
            "timeout_s": stage.timeout_s,
            "worst_usd": f"{stage.cost.worst_usd:.4f}",
            **({"nodes": stage.parallel.nodes} if stage.parallel.nodes > 1 else {}),
        }
        for stage in plan.stages
    ]
    experiment = plan.experiment
    essentials = {
        "name": experiment.name,
        "fingerprint": plan.fingerprint,
        "stages": stages,
        "output": experiment.output.model_dump(mode="json"),
        "max_usd": f"{experiment.budget.max_usd:.4f}",
    }
    canonical = json.dumps(essentials, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def flat(values: Mapping[str, Any], at: Keys = ()) -> dict[Keys, Any]:
    """A tree of mappings as one, by the path of keys; an empty mapping is a value. The order is kept."""
    found: dict[Keys, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, (*at, str(key)))
        else:
            found[(*at, str(key))] = value
    return found


def shown(keys: Keys, value: Any) -> str:
    """A value of the file as a person would write it; text that reads as a number keeps its quotes."""
    if keys[-1] == "timeout" and isinstance(value, int):
        return duration(value)
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False) if _is_json(value) else value


def decides(keys: Keys) -> bool:
    """True when the field enters the fingerprint."""
    return keys[0] in DECIDING and not (
        keys[0] in ("train", "gguf", "sweep") and len(keys) > 1 and keys[1] in NOT_IN_FINGERPRINT
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _field_changes(before: Experiment, after: Experiment) -> list[FieldChange]:
    old, new = _there(before), _there(after)
    old_said, new_said = (flat(one.model_dump(mode="json", exclude_unset=True)) for one in (before, after))
    changes = []
    for keys in _in_order(before, after):
        differs = old.get(keys) != new.get(keys)
        # A default that is written out is another text, and so another fingerprint: see `make_fingerprint`.
        said = decides(keys) and (keys in old_said) != (keys in new_said) and not _has_inner(keys, old, new)
        if differs or said:
            texts = (_text(keys, old), _text(keys, new))
            written: Literal["", "before", "now"] = "" if differs else "now" if keys in new_said else "before"
            changes.append(FieldChange(".".join(keys), *texts, decides(keys), written))
    return changes


def _text(keys: Keys, values: Mapping[Keys, Any]) -> str | None:
    return shown(keys, values[keys]) if keys in values else None


def _there(experiment: Experiment) -> dict[Keys, Any]:
    """Every field that holds something, defaults included."""
    return {keys: value for keys, value in flat(experiment.resolved()).items() if value is not None and value != {}}


def _in_order(before: Experiment, after: Experiment) -> list[Keys]:
    """Every field of either version, section by section, in the order of the schema."""
    sections = list(Experiment.model_fields)
    trees = [one for version in (after, before) for one in (version.resolved(), version.model_dump(exclude_unset=True))]
    every = dict.fromkeys(keys for tree in trees for keys in flat(tree))
    return sorted(every, key=lambda keys: sections.index(keys[0]))


def _has_inner(keys: Keys, *versions: Mapping[Keys, Any]) -> bool:
    """A mapping that is empty in one version and filled in another: what it is filled with says it."""
    return any(other[: len(keys)] == keys and len(other) > len(keys) for one in versions for other in one)


def _deciding_paths(experiment: Experiment) -> list[str]:
    """Paths of this repository that enter the fingerprint by content."""
    held_out = experiment.data.eval.dataset if experiment.data.eval else None
    sources = (experiment.base.model, experiment.data.dataset, held_out, mlx_base(experiment))
    paths = [source for source in sources if source is not None and is_path(source)]
    return [*paths, *([experiment.train.script] if experiment.train.script else [])]


def _content_change(path: str, before: Mapping[str, str], after: Mapping[str, str]) -> FieldChange | None:
    old, new = before.get(path), after.get(path)
    if old == new:
        return None
    return FieldChange(f"content of {path}", old and f"sha256 {old[:12]}", new and f"sha256 {new[:12]}", decides=True)


def _estimates(before: Plan, after: Plan) -> tuple[EstimateChange, ...]:
    """The numbers a reviewer compares, in the order of the verdict."""

    def seconds(plan: Plan) -> float | None:
        parts = [stage.cost.expected_s for stage in plan.stages]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def memory(plan: Plan) -> float | None:
        found = plan.stages[0].memory
        return None if found is None or plan.stages[0].flavor.gpu is None else round(found.total, 2)

    return (
        EstimateChange("memory_gib", memory(before), memory(after)),
        EstimateChange("expected_s", seconds(before), seconds(after)),
        EstimateChange("expected_usd", before.expected_usd, after.expected_usd),
        EstimateChange("worst_usd", before.worst_usd, after.worst_usd),
    )
