"""The rules about training, asked for each variant of a sweep; what some find is told with their names. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import Finding
from pipeline.facts import Facts
from pipeline.loader import ExperimentFile
from pipeline.rules.rule import Rule, Subject, Verdict
from pipeline.settings import Settings
from pipeline.sweep import Choice
from pipeline.variants import Variant, numbered, variants_of

# The areas whose rules look at single fields of `train`. The others look at the file and at the plan as a whole, which
# holds every variant.
OF_TRAINING = ("MEM", "DAT", "TRN")


def run_rules_of_variants(
    file: ExperimentFile, facts: Facts, settings: Settings, rules: Sequence[Rule]
) -> list[Finding]:
    """Every finding about one file with a sweep. What all variants have in common is told once, as without a sweep."""
    variants, whole = variants_of(file.experiment), Subject(file, facts, settings)
    findings = [found for rule in rules if rule.id[:3] not in OF_TRAINING and (found := rule.run(whole)) is not None]
    told: dict[tuple[Rule, Verdict], list[Variant]] = {}
    for variant in variants:
        subject = replace(whole, file=replace(file, experiment=variant.experiment))
        for rule in rules:
            if rule.id[:3] in OF_TRAINING and (verdict := rule.check(subject)) is not None:
                told.setdefault((rule, verdict), []).append(variant)
    return findings + [_finding(file, *found, mine, variants) for found, mine in told.items()]


def _finding(
    file: ExperimentFile, rule: Rule, verdict: Verdict, mine: Sequence[Variant], variants: Sequence[Variant]
) -> Finding:
    if len(mine) == len(variants):
        return Finding(rule.id, verdict.severity, file.at(verdict.key), verdict.message, verdict.hint)
    choice = _reason(verdict, mine, [one for one in variants if one not in mine])
    at = file.at(f"sweep.{choice.at}" if choice else "sweep")
    words = mine[0].words if len(mine) == 1 or choice is None else choice.words
    named = numbered([one.number for one in mine])
    return Finding(rule.id, verdict.severity, at, f"{named} (`{words}`): {verdict.message}", verdict.hint)


def _reason(verdict: Verdict, mine: Sequence[Variant], others: Sequence[Variant]) -> Choice | None:
    """The value that the finding is about: of the field it names, else one that these variants have and no other."""
    choices = mine[0].choices
    named = (choice for choice in choices if verdict.key == f"train.{choice.key}")
    elsewhere = {(choice.key, choice.at) for one in others for choice in one.choices}
    own = (
        choice
        for choice in choices
        if (choice.key, choice.at) not in elsewhere and all(choice in one.choices for one in mine)
    )
    return next(named, None) or next(own, None) or (choices[-1] if choices else None)
