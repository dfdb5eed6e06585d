"""Rules about GGUF files: each passes the good experiment and fails a bad one."""

import ast

import pytest
from examples import GOOD, changed
from rule_cases import GEMMA, ROOT, expect, place, run

from pipeline.converter_architectures import ARCHITECTURES, LLAMA_CPP_PYTHON, TOP_LEVEL
from pipeline.errors import Severity
from pipeline.rules.release import converter_knows_base, gguf_can_chat, quants_keep_quality

NO_GGUF = changed("^gguf: .*\n", "")


@pytest.mark.parametrize("rule", [converter_knows_base, gguf_can_chat, quants_keep_quality])
def test_ok(rule) -> None:
    assert run(rule) is None
    assert run(rule, config=None, chat_template=None) is None
    assert run(rule, NO_GGUF, config={"architectures": ["Zzz"]}, chat_template="") is None


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"architectures": ["Gemma9ForCausalLM"]}, "cannot convert `Gemma9ForCausalLM`", "the similar `Gemma"),
        ({"architectures": ["Zzz"]}, "cannot convert `Zzz`", "remove `gguf`"),
        ({**GEMMA, "text_config": {"architectures": ["Zzz"]}}, "cannot convert `Zzz`", "remove `gguf`"),
        ({"model_type": "llama"}, "names no `architectures`", "add `architectures`"),
    ],
)
def test_bad_architecture(config, message, hint) -> None:
    expect(run(converter_knows_base, config=config), message, hint, place(GOOD, "{flavor: t4-medium, quants"))


def test_the_text_models_architecture_counts_but_for_the_exceptions() -> None:
    config = {"architectures": ["Zzz"], "text_config": {"architectures": ["LlamaForCausalLM"]}}
    assert run(converter_knows_base, config=config) is None
    config = {"architectures": [sorted(TOP_LEVEL)[0]], "text_config": {"architectures": ["Zzz"]}}
    assert run(converter_knows_base, config=config) is None


def test_bad_template() -> None:
    finding = run(gguf_can_chat, chat_template="")
    expect(finding, "has no chat template", "instruction-tuned", place(GOOD, "google/gemma"))
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(("low", "loss"), [("Q2_K", "+3.52"), ("Q3_K_S", "+1.63")])
def test_bad_quant(low, loss) -> None:
    text = changed("Q4_K_M, Q8_0", f"{low}, Q8_0")
    expect(run(quants_keep_quality, text), loss, "write `quants: [Q3_K_M, Q8_0]`", place(text, f"[{low}"))


def test_the_list_is_of_the_converter_that_the_job_uses() -> None:
    tree = ast.parse((ROOT / "scripts/convert_gguf.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    pin = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "SDIST_VERSION")
    assert ast.literal_eval(pin) == LLAMA_CPP_PYTHON
    assert {
        "LlamaForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Qwen3ForCausalLM",
        "GptOssForCausalLM",
    } < ARCHITECTURES
    assert TOP_LEVEL < ARCHITECTURES
