"""The rule about experts, and its list against the installed transformers."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from examples import changed
from rule_cases import expect, place, run

from pipeline.rules.experts import STACKED, experts_are_left_out

QWEN = {"model_type": "qwen3_moe", "num_experts": 128}
ALL = changed(r"targets: \[.*\]", "targets: all-linear")


def test_attention_alone_is_fine() -> None:
    assert run(experts_are_left_out, config=QWEN) is None


def test_dense_model_is_fine() -> None:
    assert run(experts_are_left_out, ALL, config={"model_type": "qwen3"}) is None


def test_unmerged_adapter_is_fine() -> None:
    text = changed("^evaluate: .*\n", "", changed("^gguf: .*\n", "", changed("^merge: .*\n", "", ALL)))
    assert run(experts_are_left_out, text, config=QWEN) is None


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, up_proj]"])
def test_experts_in_the_targets(targets: str) -> None:
    text = changed(r"targets: \[.*\]", f"targets: {targets}")
    finding = run(experts_are_left_out, text, config=QWEN)
    expect(finding, "cannot be merged", "`targets: [q_proj, k_proj, v_proj, o_proj]`", place(text, targets))


def test_the_list_is_that_of_the_installed_transformers() -> None:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    tree = ast.parse((Path(spec.origin).parent / "conversion_mapping.py").read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id.startswith("_MODEL_TO")]  # type: ignore[attr-defined]
    mapping = ast.literal_eval(tables[0].value)
    found = {kind for kind, family in mapping.items() if family in ("qwen2_moe", "mixtral") and kind.islower()}
    assert found | {"qwen2_moe", "mixtral"} == STACKED
