"""Preflight rules: each a pure function `(Subject) -> Finding | None` with an id and a page in docs/rules.md."""

from pipeline.rules.experiment import (
    budget_within_settings,
    files_are_there,
    flavors_exist,
    name_is_the_files_name,
    namespace_allowed,
    revision_pinned,
    worst_case_within_budget,
)
from pipeline.rules.hardware import training_fits
from pipeline.rules.rule import Rule, Subject

ALL_RULES: tuple[Rule, ...] = (
    Rule("EXP002", name_is_the_files_name),
    Rule("EXP003", revision_pinned),
    Rule("EXP004", files_are_there),
    Rule("HUB001", namespace_allowed),
    Rule("MEM001", flavors_exist),
    Rule("MEM002", training_fits),
    Rule("TIM001", worst_case_within_budget),
    Rule("TIM002", budget_within_settings),
)

__all__ = ["ALL_RULES", "Rule", "Subject"]
