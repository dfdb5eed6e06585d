"""The table of causes and how a pattern is found in a line."""

import re

import pytest

from pipeline.causes import CAUSES_BY_AREA, LOG_CAUSES, SERVER_CAUSES, Cause, Pattern, fill
from pipeline.remedy import EDITS, NOBODYS
from pipeline.rules import ALL_RULES


@pytest.mark.parametrize(
    ("pattern", "line", "words"),
    [
        ("No module named '{module}'", "ModuleNotFoundError: No module named 'trl.x'", {"module": "trl.x"}),
        ("No module named {module}", "python: No module named axolotl.cli (see docs)", {"module": "axolotl.cli"}),
        ("403*lfs/objects", "403 Client Error for url /x.git/info/lfs/objects/batch", {}),
        ("403*lfs/objects", "lfs/objects and then 403", None),
        ("^Killed$", "Killed", {}),
        ("^Killed$", "Killed by signal", None),
        ("^Killed$", "was Killed", None),
        ("KeyError: '{name}'$", "KeyError: 'text'", {"name": "text"}),
        ("KeyError: '{name}'$", "KeyError: 'text' in row 3", None),
        ("{value} is not valid", "`adam8` is not valid", {"value": "adam8"}),
        ("a*b*c", "aXbXc", {}),
        ("a*b*c", "acb", None),
    ],
)
def test_patterns(pattern: str, line: str, words: dict[str, str] | None) -> None:
    assert Pattern(pattern).match(line) == words


def test_words_of_a_log_are_tame() -> None:
    token = "hf_" + "Ab1" * 10
    words = Pattern("got '{argument}'!").match(f"got '`{{stage}}` {token} {'x' * 200}'!")
    assert words is not None
    assert words["argument"].startswith("(stage)' <token> xxx")
    assert len(words["argument"]) == 80
    assert fill("no `{argument}` in {path}", {"argument": "x"}) == "no `x` in {path}"


def test_ids_are_unique_within_the_log_causes_and_words_are_plain() -> None:
    ids = [cause.id for cause in LOG_CAUSES]
    assert len(ids) == len(set(ids))
    for cause in (*LOG_CAUSES, *SERVER_CAUSES):
        assert re.fullmatch(r"[a-z0-9-]+", cause.id)
        assert cause.cause[0].islower() or cause.cause[0] == "`"
        assert not cause.cause.endswith(".")
        assert not cause.fix.endswith(".")
        assert cause.transient or cause.fix, cause.id


@pytest.mark.parametrize("cause", [*LOG_CAUSES, *SERVER_CAUSES], ids=lambda cause: cause.id)
def test_a_cause_names_rules_and_places_that_exist(cause: Cause) -> None:
    assert cause.rule in {"", *(rule.id for rule in ALL_RULES)}
    places = set(re.findall(r"\{([a-z]+)\}", cause.fix + cause.cause))
    words = {word for text in cause.texts for word in re.findall(r"\{([a-z]+)\}", text)}
    assert places <= words | set(NOBODYS)
    for word in places - set(NOBODYS):
        assert all(f"{{{word}}}" in text for text in cause.texts), f"{cause.id}: a pattern lacks {word}"
    assert all(len(pattern.needle) >= 3 for pattern in cause.patterns)


def test_only_the_machine_the_network_and_the_hub_are_worth_a_retry() -> None:
    """A new attempt costs money: what a person must mend is never tried again by itself."""
    hopeful = {cause.id for cause in (*LOG_CAUSES, *SERVER_CAUSES) if cause.transient}
    assert hopeful == {
        "gpu-start",
        "gpu-broken",
        "preempted",
        "rate-limit",
        "download-broken",
        "network",
        "machine-lost",
        "peer-missing",
        "peer-lost",
    }


def test_every_edit_is_of_a_known_cause() -> None:
    known = {cause.id for causes in CAUSES_BY_AREA.values() for cause in causes} | {cause.id for cause in SERVER_CAUSES}
    assert set(EDITS) - {"loss-not-falling"} <= known
