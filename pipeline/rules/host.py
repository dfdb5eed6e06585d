"""Rules about the machine around the GPU: does each stage have the disk and the memory that its script uses?"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import Severity
from pipeline.flavors import Flavor
from pipeline.host_memory import Need, cheapest_host, disk_gb, evaluate_vram_gib, ram_gib, stages_of
from pipeline.rules.rule import Subject, Verdict


@dataclass(frozen=True)
class _Shortage:
    stage: str
    flavor: Flavor
    need: Need
    has: float

    @property
    def certain(self) -> bool:
        return self.need.least > self.has


def disk_suffices(subject: Subject) -> Verdict | None:
    """Every stage's flavor has the disk it fills

    Why: A model of 12 B parameters is 24 GB: base and merged model side by side, or a merged model, its bf16 GGUF and
    the quants, are more than the 50 GB of `cpu-upgrade`. The script refuses after the download was paid for.
    Fix: The cheapest flavor with enough; the hint names it.
    """
    shape = subject.facts.shape
    if shape is None:
        return None
    experiment = subject.file.experiment
    needs = ((stage, flavor, disk_gb(stage, experiment, shape)) for stage, flavor in stages_of(experiment))
    return _verdict(subject, "GB of disk", (_Shortage(s, f, need, f.disk_gb) for s, f, need in needs))


def ram_suffices(subject: Subject) -> Verdict | None:
    """Every stage's flavor has the host memory it uses

    Why: A process that takes more is killed without a message, after the download was paid for.
    Fix: The cheapest flavor with enough; the hint names it. Merging is streamed and hardly ever short of memory.
    """
    shape = subject.facts.shape
    if shape is None:
        return None
    experiment = subject.file.experiment
    needs = (
        (stage, flavor, ram_gib(stage, experiment, shape, flavor.gpu is not None))
        for stage, flavor in stages_of(experiment)
    )
    return _verdict(subject, "GiB of RAM", (_Shortage(s, f, need, f.ram_gib) for s, f, need in needs))


def evaluation_fits(subject: Subject) -> Verdict | None:
    """Evaluating fits the GPU of its flavor

    Why: Both models are compared in bf16, as they will be used; a GPU that trains 12 B parameters in 4 bits does not
    hold them in 16.
    Fix: The cheapest flavor with enough; the hint names it.
    """
    shape = subject.facts.shape
    if shape is None:
        return None
    flavors = (flavor for stage, flavor in stages_of(subject.file.experiment) if stage == "evaluate" and flavor.gpu)
    need = evaluate_vram_gib(shape)
    return _verdict(subject, "GiB of GPU memory", (_Shortage("evaluate", f, need, f.vram_gib) for f in flavors))


def _verdict(subject: Subject, unit: str, needs: Iterator[_Shortage]) -> Verdict | None:
    """One verdict about all stages that are short of something; an error if one of them surely is."""
    short = [one for one in needs if one.need.likely > one.has]
    if not short:
        return None
    certain = any(one.certain for one in short)
    facts = [
        f"`{one.stage}` {'needs' if one.certain else 'may need'} {_amount(one)} {unit},"
        f" `{one.flavor.name}` has {one.has:g}"
        for one in short
    ]
    severity = Severity.ERROR if certain else Severity.WARNING
    return Verdict(f"{short[0].stage}.flavor", "; ".join(facts), _hint(subject, short), severity)


def _amount(one: _Shortage) -> str:
    """Figures that differ from what the flavor has."""
    return f"{one.need.least if one.certain else one.need.likely:.1f}"


def _hint(subject: Subject, short: list[_Shortage]) -> str:
    shape, experiment = subject.facts.shape, subject.file.experiment
    edits = []
    for one in short:
        better = cheapest_host(one.stage, experiment, shape, one.flavor) if shape else None
        edits += [f"`{one.stage}.flavor: {better.name}`"] if better else []
    if len(edits) == len(short):
        return f"write {' and '.join(edits)}"
    if subject.file.experiment.train.method == "full":
        return "no flavor has enough: write `method: lora`, or use a smaller base"
    return "no flavor has enough: use a smaller base" + (f"; for the rest write {' and '.join(edits)}" if edits else "")
