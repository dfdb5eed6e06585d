"""Run one rule function over an experiment's text and made-up facts, as `check` would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples import GOOD, changed

from pipeline.errors import Finding
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.rules import Rule, Subject
from pipeline.rules.rule import Verdict
from pipeline.settings import Settings
from pipeline.trl_fields import sft_fields

ROOT = Path(__file__).resolve().parents[1]
GEMMA = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "vision_config": {"hidden_size": 1152},
    "text_config": {"model_type": "gemma3_text"},
}
HEADER = '# /// script\n# dependencies = ["trl==1.16.0"]\n# ///\n'

Check = Callable[[Subject], Verdict | None]


def facts(**given: Any) -> Facts:
    """Facts of the good experiment's base and the pinned TRL, with some of them changed."""
    fields = sft_fields()
    usual: dict[str, Any] = {
        "shape": CATALOGUE["google/gemma-3-12b-it"],
        "config": GEMMA,
        "chat_template": "{{ messages }}",
        "sft_fields": fields.types,
        "sft_choices": fields.choices,
        "scripts": {"scripts/train_sft.py": (ROOT / "scripts/train_sft.py").read_text(encoding="utf-8")},
    }
    return Facts(**{**usual, **given})


def run(check: Check, text: str = GOOD, **given: Any) -> Finding | None:
    """What a rule finds."""
    return Rule("TST001", check).run(Subject(parse_experiment(text), facts(**given), Settings()))


def with_sft(line: str, text: str = GOOD) -> str:
    """The good experiment with one line under `train.sft`."""
    return changed("^  learning_rate: 2e-4$", f"  learning_rate: 2e-4\n  sft:\n    {line}", text)


def with_script(text: str = GOOD) -> str:
    """The good experiment with a custom script."""
    return changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  script: my/train.py", text)


def place(text: str, words: str) -> tuple[int, int]:
    """Line and column, from 1, where `words` begin."""
    before = text[: text.index(words)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def expect(finding: Finding | None, message: str, hint: str, at: tuple[int, int]) -> None:
    """The finding says `message` and `hint` and stands at line and column `at`."""
    assert finding is not None
    assert message in finding.message
    assert hint in finding.hint
    assert (finding.at.line, finding.at.column) == at
