"""Rules about an experiment among the others of the same check. Looks at no file but what was loaded."""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel

from pipeline.errors import Severity
from pipeline.experiment import Experiment
from pipeline.plan import NOT_IN_FINGERPRINT
from pipeline.rules.rule import Subject, Verdict

NOT_DECIDING = {*NOT_IN_FINGERPRINT, "seed"}


def relatives(experiments: Sequence[Experiment]) -> list[tuple[Experiment, ...]]:
    """For each experiment the ones it clashes with: what `Facts.others` needs. One pass over all files.

    Two of a kind are enough to name another one, and the cost stays linear where thousands are of one kind.
    """
    by_repo: dict[str, list[Experiment]] = defaultdict(list)
    by_choice: dict[object, list[Experiment]] = defaultdict(list)
    kinds = [(by_repo[one.output.repo.lower()], by_choice[_choices(one)]) for one in experiments]
    for experiment, (repo, choice) in zip(experiments, kinds, strict=True):
        repo.append(experiment)
        choice.append(experiment)
    return [(*repo[:2], *choice[:2]) for repo, choice in kinds]


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
    others = [one for one in subject.facts.others if one is not mine]
    choices = _choices(mine) if others else None
    twin = next((one for one in others if _choices(one) == choices), None)
    if twin is None:
        return None
    if twin.train.seed == mine.train.seed:
        hint = f"change what differs from `{twin.name}`, or remove one of the two"
        return Verdict("name", f"same as `{twin.name}`: base, data and training are equal", hint, Severity.WARNING)
    message = f"same as `{twin.name}` but for the seed ({twin.train.seed} there, {mine.train.seed} here)"
    hint = f"say in `hypothesis` that it repeats `{twin.name}`, or write `seed: {twin.train.seed}` and change a choice"
    return Verdict("train.seed", message, hint, Severity.WARNING)


def _choices(experiment: Experiment) -> object:
    """Everything that decides the result, but for the seed: equal for two that do the same, and good as a key."""
    train = {key: value for key, value in experiment.train if key not in NOT_DECIDING}
    quants = experiment.gguf.quants if experiment.gguf else None
    sweep = (experiment.sweep.grid, experiment.sweep.list) if experiment.sweep else None
    return _key([experiment.base, experiment.data, quants, train, sweep])


def _key(value: object) -> object:
    """The value as what can be a key of a dictionary, equal where the values are."""
    match value:
        case BaseModel():
            return _key(vars(value))
        case dict():
            return frozenset((name, _key(entry)) for name, entry in value.items())
        case list() | tuple():
            return tuple(map(_key, value))
        case _:
            return value
