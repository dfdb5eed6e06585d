"""Rules about an experiment among the others of the same check. Looks at no file but what was loaded."""

from collections import defaultdict
from collections.abc import Sequence

from pipeline.errors import Severity
from pipeline.experiment import Experiment
from pipeline.plan import NOT_IN_FINGERPRINT
from pipeline.rules.rule import Subject, Verdict

NOT_DECIDING = {*NOT_IN_FINGERPRINT, "seed"}


def relatives(experiments: Sequence[Experiment]) -> list[tuple[Experiment, ...]]:
    """For each experiment the ones it could clash with: what `Facts.others` needs. One pass over all files."""
    by_repo: dict[str, list[Experiment]] = defaultdict(list)
    by_choice: dict[tuple[object, ...], list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        by_repo[experiment.output.repo.lower()].append(experiment)
        by_choice[_coarse(experiment)].append(experiment)
    return [(*by_repo[one.output.repo.lower()], *by_choice[_coarse(one)]) for one in experiments]


def output_is_its_own(subject: Subject) -> Verdict | None:
    """No other experiment writes to the same `output.repo`

    Why: The second run would overwrite the first one's model, and nobody could tell whose it is.
    Fix: Give each experiment a repository; its name makes a good one.
    """
    mine = subject.file.experiment
    repo = mine.output.repo.lower()
    twin = next((one for one in subject.facts.others if one.output.repo.lower() == repo and one is not mine), None)
    if twin is None:
        return None
    namespace = mine.output.repo.split("/")[0]
    message = f"`{twin.name}` writes to `{twin.output.repo}` too"
    return Verdict("output.repo", message, f"write `repo: {namespace}/{mine.name}`")


def not_done_before(subject: Subject) -> Verdict | None:
    """No other experiment has the same base, data and training

    Why: The same choices give the same result; a second seed measures noise, and the reviewer should know it.
    Fix: Change what the hypothesis is about, or say in `hypothesis` that this is a repetition.
    """
    mine = subject.file.experiment
    coarse = _coarse(mine)
    alike = (one for one in subject.facts.others if one is not mine and _coarse(one) == coarse)
    twin = next((one for one in alike if _same(one, mine)), None)
    if twin is None:
        return None
    if twin.train.seed == mine.train.seed:
        hint = f"change what differs from `{twin.name}`, or remove one of the two"
        return Verdict("name", f"same as `{twin.name}`: base, data and training are equal", hint, Severity.WARNING)
    message = f"same as `{twin.name}` but for the seed ({twin.train.seed} there, {mine.train.seed} here)"
    hint = f"say in `hypothesis` that it repeats `{twin.name}`, or write `seed: {twin.train.seed}` and change a choice"
    return Verdict("train.seed", message, hint, Severity.WARNING)


def _coarse(experiment: Experiment) -> tuple[object, ...]:
    """What two copies surely share, quick to compare: base, rows, and the numbers that a sweep changes."""
    train = experiment.train
    rank = train.lora.r if train.lora else None
    return experiment.base.model, experiment.data.dataset, train.learning_rate, train.epochs, rank


def _same(other: Experiment, mine: Experiment) -> bool:
    """True when everything that decides the result is equal, but for the seed."""
    quants = [one.gguf.quants if one.gguf else None for one in (other, mine)]
    decides = [name for name in type(mine.train).model_fields if name not in NOT_DECIDING]
    return (
        other.base == mine.base
        and other.data == mine.data
        and quants[0] == quants[1]
        and all(getattr(other.train, name) == getattr(mine.train, name) for name in decides)
    )
