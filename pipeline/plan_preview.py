"""What a reviewer is to see of one experiment, in one value; also as JSON, and short for a terminal. Reads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.dataset_facts import DatasetFacts
from pipeline.errors import Finding, InvalidExperiment, Severity
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.flavors import AS_OF
from pipeline.mac_words import mac_lines
from pipeline.markdown import code, defang, money, percent, plural, quote, table
from pipeline.plan import Plan, Stage
from pipeline.plan_changes import Changes, plan_hash
from pipeline.progress import duration
from pipeline.sweep_sections import variants_table
from pipeline.train_lines import gpus_line, settled_line, traced_line


class Verdict(StrEnum):
    """What is known about the memory of a training."""

    FITS = "fits"
    DOES_NOT_FIT = "does not fit"
    MAY_NOT_FIT = "may not fit"
    UNKNOWN = "cannot be known"
    NO_GPU = "needs no GPU"
    LOCAL = "trains on a Mac"


@dataclass(frozen=True)
class Preview:
    """One experiment before it runs. `experiment` is None when the file breaks the schema, `plan` when none could be
    made; the findings say why. `not_compared` says why there are no changes although there is a previous version.
    """

    name: str
    path: str
    experiment: Experiment | None = None
    plan: Plan | None = None
    facts: Facts = field(default_factory=Facts)
    findings: tuple[Finding, ...] = ()
    changes: Changes | None = None
    not_compared: str = ""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop a launch, in the order of the file."""
        return tuple(f for f in self.sorted_findings if f.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings for the reviewer, in the order of the file."""
        return tuple(f for f in self.sorted_findings if f.severity is Severity.WARNING)

    @property
    def sorted_findings(self) -> list[Finding]:
        """Worst first, then by place; each once."""
        return sorted(set(self.findings), key=lambda f: (f.severity, f.at, f.rule, f.message, f.hint))

    @property
    def exit_code(self) -> int:
        """0 no error, 1 a rule found an error, 2 the file is unreadable or invalid."""
        return 2 if self.experiment is None else int(bool(self.errors))

    def refusal(self) -> InvalidExperiment:
        """The errors as an exception, for those who cannot show a plan that must not run."""
        failure = InvalidExperiment(self.errors)
        failure.exit_code = self.exit_code
        return failure


@dataclass(frozen=True)
class Span:
    """Seconds of all stages together: expected, and the ends of their bands (never beyond a timeout)."""

    expected: float
    low: float
    high: float


def verdict_of(train: Stage) -> Verdict:
    """Whether training fits the GPU of its flavor."""
    if train.flavor.local:
        return Verdict.LOCAL
    if train.flavor.gpu is None:
        return Verdict.NO_GPU
    if train.traced is not None:
        return Verdict.FITS if train.traced.fits(train.flavor) else Verdict.DOES_NOT_FIT
    if train.memory is None:
        return Verdict.UNKNOWN
    return {True: Verdict.FITS, False: Verdict.DOES_NOT_FIT, None: Verdict.MAY_NOT_FIT}[train.memory.fits(train.flavor)]


def span_of(stages: Sequence[Stage]) -> Span | None:
    """How long these stages take together; None when one is unknown."""
    known = [(stage.cost.expected_s, stage) for stage in stages if stage.cost.expected_s is not None]
    if len(known) < len(stages):
        return None
    low = sum(seconds * (1 - stage.cost.band) for seconds, stage in known)
    high = sum(min(seconds * (1 + stage.cost.band), stage.timeout_s) for seconds, stage in known)
    return Span(sum(seconds for seconds, _ in known), low, high)


def held_out_rows(dataset: DatasetFacts) -> int:
    """Rows that are kept from training: of their own file, or drawn from this one."""
    return dataset.eval_file.rows if dataset.eval_file else dataset.rows - dataset.training_rows


def render_plan(preview: Preview) -> str:
    """The plan of an experiment, short: verdict first, one row a stage. For a terminal; see `plan_comment`."""
    plan = preview.plan
    if plan is None:
        return ""
    train = plan.stages[0]
    expected = "not known" if plan.expected_usd is None else money(plan.expected_usd)
    parts = [
        f"## Plan `{plan.run_id}`",
        f"{_fit_words(train)} Expected {expected}, at most {money(plan.worst_usd)} "
        f"of a budget of {money(plan.experiment.budget.max_usd)}.",
        quote(plan.experiment.hypothesis),
        stage_table(plan.stages),
        variants_table(plan),
        _data_line(preview.facts.dataset),
        _memory_line(train),
        gpus_line(plan),
        settled_line(train),
        "\n".join(f"- {words}" for words in mac_lines(plan, preview.facts)),
        traced_line(train),
        _changes_line(preview.changes),
    ]
    memory_band = f"memory ±{train.memory.band:.0%}, " if train.memory else ""
    bands = f"{memory_band}durations ±{train.cost.band:.0%}, prices of {AS_OF}"
    parts.append(f"<sub>Estimates: {bands}. Fingerprint `{plan.fingerprint}`.</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def stage_table(stages: Sequence[Stage]) -> str:
    """One row a stage: where, how long, what it costs."""
    head = ("stage", "flavor", "expected", "timeout", "expected cost", "at most")
    return table(head, [_stage_row(stage) for stage in stages], "llrrrr")


def timeout_words(stage: Stage) -> str:
    """When it is stopped."""
    return "none" if stage.flavor.local else duration(stage.timeout_s)


def expected_time(stage: Stage) -> str:
    """`~2h46m`, or what the work would need when its timeout is shorter."""
    cost = stage.cost
    if cost.expected_s is None:
        return "not known"
    if cost.needed_s is not None and cost.needed_s > stage.timeout_s:
        return f"~{duration(cost.needed_s)}, too long"
    return f"~{duration(cost.expected_s)}"


def expected_cost(stage: Stage) -> str:
    """Dollars, or that they are not known."""
    return "not known" if stage.cost.expected_usd is None else money(stage.cost.expected_usd)


def plan_as_dict(preview: Preview) -> dict[str, Any]:
    """The plan, JSON-ready. Durations in seconds, memory in GiB, cost in US dollars."""
    plan = preview.plan
    if plan is None:
        return {}
    return {
        "run_id": plan.run_id,
        "fingerprint": plan.fingerprint,
        "plan_hash": plan_hash(plan),
        "expected_usd": plan.expected_usd,
        "worst_usd": plan.worst_usd,
        "max_usd": plan.experiment.budget.max_usd,
        "verdict": verdict_of(plan.stages[0]).value,
        "stages": [_stage_as_dict(stage) for stage in plan.stages],
        "data": preview.facts.dataset and data_as_dict(preview.facts.dataset),
        "findings": [finding.as_dict() for finding in preview.sorted_findings],
        "changes": preview.changes and preview.changes.as_dict(),
    }


def data_as_dict(dataset: DatasetFacts) -> dict[str, Any]:
    """The rows of a training file, JSON-ready; `exact` is False where `estimated` says why."""
    tokens = dataset.tokens
    return {
        "rows": dataset.training_rows,
        "held_out_rows": held_out_rows(dataset),
        "exact": dataset.exact,
        "estimated": dataset.estimated,
        "duplicates": dataset.duplicates.count,
        "leaked": dataset.leaked.count,
        "tokens": tokens
        and {
            "per_pass": tokens.total,
            "trained": tokens.trained,
            "longest": tokens.longest,
            "lost": tokens.lost,
            "rows_over_max_length": tokens.over_limit.count,
            "rows_dropped": tokens.dropped.count,
        },
    }


def _stage_as_dict(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "script": stage.script,
        "flavor": stage.flavor.name,
        "timeout_s": None if stage.flavor.local else stage.timeout_s,
        "expected_s": stage.cost.expected_s,
        "expected_usd": stage.cost.expected_usd,
        "worst_usd": stage.cost.worst_usd,
        "memory_gib": stage.memory and round(stage.memory.total, 2),
        "memory_band": stage.memory and stage.memory.band,
        **({"gpus": stage.parallel.gpus, "sharing": stage.parallel.sharing} if stage.parallel.gpus > 1 else {}),
        **({"nodes": stage.parallel.nodes} if stage.parallel.nodes > 1 else {}),
        "traced": stage.traced and stage.traced.as_dict(),
        **({"variants": [variant.as_dict() for variant in stage.variants]} if stage.variants else {}),
    }


def _stage_row(stage: Stage) -> tuple[str, ...]:
    costs = expected_cost(stage), money(stage.cost.worst_usd)
    return (str(stage.name), stage.where, expected_time(stage), timeout_words(stage), *costs)


def _fit_words(train: Stage) -> str:
    flavor, memory = train.flavor, train.memory
    if flavor.local:
        return "Trains on a Mac with MLX."
    if flavor.gpu is None:
        return f"Trains on `{flavor.name}`, without a GPU."
    if train.traced is not None:
        verdict, total = verdict_of(train).capitalize(), train.traced.total
        return f"**{verdict}** `{flavor.name}`: {total:.1f} of {flavor.vram_gib:g} GiB, traced."
    if memory is None:
        return f"Memory on `{flavor.name}` is not known: no config.json of this base at hand."
    room = f"{memory.total:.1f} of {flavor.vram_gib:g} GiB{train.parallel.words}"
    return f"**{verdict_of(train).capitalize()}** `{flavor.name}`: about {room}."


def _memory_line(train: Stage) -> str:
    memory = train.memory
    if memory is None or train.flavor.gpu is None:
        return ""
    return (
        f"Memory of training{train.parallel.words}: {memory.total:.1f} GiB ({memory.low:.1f} to {memory.high:.1f}): "
        f"weights {memory.weights:.1f}, activations {memory.activations:.1f}, head {memory.head:.1f}, "
        f"adapter and optimizer {memory.adapter + memory.optimizer:.1f}, CUDA {memory.context:.1f}."
    )


def _data_line(dataset: DatasetFacts | None) -> str:
    if dataset is None or dataset.tokens is None:
        return ""
    tokens, about = dataset.tokens, "" if dataset.exact else "about "
    return (
        f"Data: {plural(dataset.training_rows, 'row')}, {plural(held_out_rows(dataset), 'row')} held out, "
        f"{about}{tokens.total:,} tokens a pass, {percent(tokens.trained, tokens.total)} of them trained on."
    )


def _changes_line(changes: Changes | None) -> str:
    if changes is None:
        return ""
    listed = [f"{code(c.field)} {code(c.before or '')} → {code(c.after or '')}" for c in changes.fields]
    run = f" `{defang(changes.before.run_id)}`" if changes.before else ""
    return f"Against the previous run{run}: {'; '.join(listed) or 'no field changed'}."
