"""Rules about training on a Mac: each passes a good experiment with `backend: mlx` and fails a bad one."""

import ast
import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from examples import GOOD, MAC, MAC_LORA, changed
from rule_cases import GEMMA, ROOT, expect, place, run

from pipeline.errors import Severity
from pipeline.facts import MlxHere
from pipeline.mlx_models import MLX, MLX_LM, MODEL_TYPES
from pipeline.models import CATALOGUE
from pipeline.plan import MLX_SCRIPT
from pipeline.rules import mlx as rules
from pipeline.rules.training import sft_fields_current

RULES = [
    rules.mlx_is_here,
    rules.flavor_is_a_chip,
    rules.timeout_is_left_out,
    rules.mlx_has_a_word,
    rules.quantised_as_said,
    rules.base_can_be_merged_into,
    rules.bases_are_one_model,
    rules.mlx_knows_base,
    rules.layers_are_there,
    rules.training_fits_a_mac,
]
HERE = MlxHere(MLX, MLX_LM)


def with_line(line: str, text: str = MAC) -> str:
    return changed("^  learning_rate: 2e-4$", f"  learning_rate: 2e-4\n  {line}", text)


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule) is None
    assert run(rule, MAC, mlx_here=HERE) is None
    assert run(rule, MAC_LORA, mlx_here=HERE) is None
    assert run(rule, MAC, config=None, shape=None) is None


@pytest.mark.parametrize("rule", RULES)
def test_a_job_is_not_what_they_are_about(rule) -> None:
    text = changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  packing: true\n  tracking: trackio")
    assert run(rule, text, mlx_here=MlxHere(None, None), config={**GEMMA, "model_type": "nobody_knows"}) is None


@pytest.mark.parametrize(
    ("here", "lacks"),
    [(MlxHere(None, None), "`mlx` and `mlx-lm`"), (MlxHere(MLX, None), "`mlx-lm`"), (MlxHere(None, MLX_LM), "`mlx`")],
)
def test_bad_machine(here, lacks) -> None:
    finding = run(rules.mlx_is_here, MAC, mlx_here=here)
    expect(finding, f"{lacks} cannot be found", f'pip install "mlx=={MLX}" "mlx-lm=={MLX_LM}"', place(MAC, "mlx\n"))


@pytest.mark.parametrize(
    ("flavor", "near"), [("a10g-large", "m3-max"), ("cpu-upgrade", "m3-max"), ("M4 pro", "m4-pro"), ("m2-mx", "m2-max")]
)
def test_bad_flavor(flavor, near) -> None:
    text = changed("flavor: m3-max", f"flavor: {flavor}", MAC)
    expect(run(rules.flavor_is_a_chip, text), f"`{flavor}` is no chip", f"`flavor: {near}`", place(text, flavor))


def test_bad_timeout() -> None:
    text = with_line("timeout: 4h")
    expect(run(rules.timeout_is_left_out, text), "bounds a job", "remove `timeout`", place(text, "4h"))


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("packing: true", "`packing: true` cannot", "remove `packing`"),
        ("tracking: trackio", "`tracking: trackio` cannot", "remove `tracking`"),
        ("script: my/train.py", "`script: my/train.py` cannot", "remove `script`"),
        ("sft: {warmup_step: 3}", "`sft.warmup_step: 3` cannot", "write `warmup_steps`"),
        ("sft: {neftune_noise_alpha: 5}", "`sft.neftune_noise_alpha: 5`", "remove `neftune_noise_alpha` (MLX knows"),
        ("sft: {activation_checkpointing: true}", "`sft.activation_checkpointing: true`", "`gradient_checkpointing`"),
    ],
)
def test_bad_field(line, message, hint) -> None:
    text = with_line(line)
    at = place(text, line)
    expect(run(rules.mlx_has_a_word, text), message, hint, (at[0], at[1] + line.rindex(": ") + 2))


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("exclude: .*vision.*", "`lora.exclude: .*vision.*`", "lora.targets"),
        ("modules_to_save: [embed_tokens]", "`lora.modules_to_save:", "remove `modules_to_save`"),
        ("rank_pattern: {q_proj: 8}", "`lora.rank_pattern:", "`r: 64`"),
        ("alpha_pattern: {q_proj: 8}", "`lora.alpha_pattern:", "`alpha: 128`"),
    ],
)
def test_bad_lora(line, message, hint) -> None:
    text = changed("alpha: 128,", f"alpha: 128, {line},", MAC)
    finding = run(rules.mlx_has_a_word, text)
    assert finding is not None
    assert message in finding.message
    assert hint in finding.hint
    assert finding.at.line == place(text, line)[0]


def test_full_training_is_not_offered() -> None:
    text = changed(r"  lora: .*\n", "", changed("method: lora", "method: full", changed(r"merge: .*\n", "", MAC_LORA)))
    expect(run(rules.mlx_has_a_word, text), "`method: full` cannot", "write `method: lora`", place(text, "full"))


def test_bad_method() -> None:
    text = changed(r"  mlx: .*\n", "", MAC)
    hint = "`mlx: {base: mlx-community/gemma-3-12b-it-4bit}`"
    expect(run(rules.quantised_as_said, text), "`google/gemma-3-12b-it` is not quantised", hint, place(text, "qlora"))
    text = changed("gemma-3-12b-it-4bit", "gemma-3-12b-it-bf16", MAC)
    assert "is not quantised" in run(rules.quantised_as_said, text).message
    text = changed("method: qlora", "method: lora", MAC)
    finding = run(rules.quantised_as_said, text)
    expect(finding, "is quantised to 4 bits", "write `method: qlora`", place(text, "lora\n"))
    assert finding.severity is Severity.WARNING


def test_the_config_of_a_base_here_counts_more_than_its_name() -> None:
    plain, eight = {"model_type": "gemma3"}, {"quantization": {"bits": 8, "group_size": 64}}
    assert "is not quantised" in run(rules.quantised_as_said, MAC, mlx_config=plain).message
    text = changed("method: qlora", "method: lora", MAC)
    assert "to 8 bits" in run(rules.quantised_as_said, text, mlx_config=eight).message


def test_bad_base() -> None:
    text = changed("google/gemma-3-12b-it", "mlx-community/gemma-3-12b-it-8bit", MAC)
    finding = run(rules.base_can_be_merged_into, text)
    expect(
        finding, "nothing can be merged into it", "`…/gemma-3-12b-it`", place(text, "mlx-community/gemma-3-12b-it-8")
    )
    config = {**GEMMA, "quantization": {"bits": 4, "group_size": 64}}
    assert run(rules.base_can_be_merged_into, MAC, config=config) is not None


@pytest.mark.parametrize("form", ["-8bit", "-MLX-4bit", "-4bit-DWQ", "-bf16", "-mxfp4", ""])
def test_forms_of_one_base(form) -> None:
    text = changed("gemma-3-12b-it-4bit", f"gemma-3-12b-it{form}", MAC)
    assert run(rules.bases_are_one_model, text) is None


@pytest.mark.parametrize("other", ["gemma-3-4b-it-4bit", "gemma-3-12b-pt-4bit", "Qwen3-8B-4bit"])
def test_bad_pair_by_name(other) -> None:
    text = changed("gemma-3-12b-it-4bit", other, MAC)
    finding = run(rules.bases_are_one_model, text)
    expect(finding, "does not look like a form of", "same model", place(text, f"mlx-community/{other}"))
    assert finding.severity is Severity.WARNING


def test_bad_pair_by_shape() -> None:
    config = {"num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 151936}
    finding = run(rules.bases_are_one_model, MAC, mlx_config=config)
    expect(finding, "has layers 28", "same base", place(MAC, "mlx-community/"))
    assert "has 48" in finding.message
    assert finding.severity is Severity.ERROR


@pytest.mark.parametrize(("kind", "hint"), [("qwen9", "the similar `qwen"), ("bert", "remove `backend: mlx`")])
def test_bad_architecture(kind, hint) -> None:
    finding = run(rules.mlx_knows_base, MAC, config={"model_type": kind})
    expect(finding, f"no module for `model_type: {kind}`", hint, place(MAC, "google/gemma"))


def test_bad_layers() -> None:
    text = changed("num_layers: 16", "num_layers: 49", MAC)
    expect(run(rules.layers_are_there, text), "the base has 48 layers", "at most 48", place(text, "49"))


def test_bad_memory() -> None:
    text = changed("max_length: 2048", "max_length: 65536", MAC)
    finding = run(rules.training_fits_a_mac, text)
    assert finding is not None
    assert finding.severity is Severity.WARNING
    assert "a Mac with 128 GB gives its GPU 96" in finding.message
    assert "`max_length: 32768`" in finding.hint
    assert "`num_layers: 8`" in finding.hint
    larger = replace(CATALOGUE["google/gemma-3-27b-it"], layers=300)
    assert "a base of 4 bits" in run(rules.training_fits_a_mac, MAC_LORA, shape=larger).hint


def test_the_name_that_mlx_knows_is_not_called_old() -> None:
    line = "sft: {gradient_checkpointing: false}"
    assert run(sft_fields_current, with_line(line)) is None
    assert run(sft_fields_current, with_line(line, GOOD)) is not None


def test_the_model_types_are_those_of_the_pinned_mlx_lm() -> None:
    folder = next((p for p in map(Path, sys.path) if (p / "mlx_lm/utils.py").is_file()), None)
    if folder is None:
        pytest.skip("mlx-lm is not installed")
    assert metadata.version("mlx-lm") == MLX_LM
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (folder / "mlx_lm/models").glob("*.py")}
    known = {stem for stem, text in texts.items() if re.search(r"^(class Model\(|from .* import Model\b)", text, re.M)}
    tree = ast.parse((folder / "mlx_lm/utils.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    renamed = ast.literal_eval(assigned["MODEL_REMAPPING"])
    known |= {name for name, module in renamed.items() if module in known}
    assert known == MODEL_TYPES


def test_what_mlx_honours_is_what_its_script_says() -> None:
    script = ROOT / MLX_SCRIPT
    if not script.exists():
        pytest.skip(f"{MLX_SCRIPT} is not there yet")
    text = script.read_text(encoding="utf-8")
    tree = ast.parse(text)
    said = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SFT")
    assert {ast.literal_eval(key) for key in said.keys} == set(rules.SFT)
    assert f'"mlx[cpu]=={MLX}"' in text
    assert f'"mlx-lm=={MLX_LM}"' in text
