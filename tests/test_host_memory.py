"""RAM and disk of the stages: against what the real scripts wrote and held, and against the scripts' own constants."""

import ast
import re
from pathlib import Path

import pytest
from examples import GOOD, changed

from pipeline.flavors import FLAVORS
from pipeline.host_memory import (
    GGUF_SPARE,
    KL_TOKENS,
    PACKAGES_LEAST_GB,
    QUANT_BITS,
    TRAIN_SPARE,
    TRAIN_SPARE_FULL,
    adapter_gb,
    cheapest_host,
    disk_gb,
    evaluate_vram_gib,
    ram_gib,
    stages_of,
    weights_gb,
)
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE, ModelShape

ROOT = Path(__file__).resolve().parents[1]
COACH = parse_experiment(GOOD).experiment
TWELVE, TINY = CATALOGUE["google/gemma-3-12b-it"], ModelShape("llama", 4, 256, 512, 256, 64, 2048, True)
# The model that was taken through the scripts: 377,521,152 parameters.
MEASURED = ModelShape("llama", 16, 1024, 4096, 1024, 256, 131_072, True, heads=16)


def source(name: str) -> str:
    return (ROOT / f"scripts/{name}.py").read_text(encoding="utf-8")


def test_constants_are_the_scripts() -> None:
    convert = source("convert_gguf")
    quants = re.search(r"^QUANTS = \{.*?^\}", convert, re.MULTILINE | re.DOTALL)
    assert quants
    table = ast.parse(quants[0]).body[0]
    assert isinstance(table, ast.Assign)
    assert isinstance(table.value, ast.Dict)
    entries = zip(table.value.keys, table.value.values, strict=True)
    bits = {ast.literal_eval(key): ast.literal_eval(value.args[1]) for key, value in entries}  # type: ignore[arg-type,attr-defined]
    assert bits == QUANT_BITS
    assert f"KL_TOKENS, ANSWER_TOKENS = {KL_TOKENS}, " in convert
    assert f"int({GGUF_SPARE} * scratch)" in convert
    assert f"int({GGUF_SPARE} * results)" in convert
    assert "weight_bytes + (64 << 20)" in source("merge_adapter")
    train = source("train_sft")
    assert f'copies = {TRAIN_SPARE_FULL} if run["output"].get("repo")' in train
    assert ("weights * copies if is_full else weights // 4" in train, TRAIN_SPARE) == (True, 1 / 4)


def test_disk_is_what_the_scripts_wrote() -> None:
    """Measured at the fullest: merge 0.755 GB of output; gguf 1.557 GB of work and output, with Q8_0 and Q4_K_M, which
    a job on Hugging Face holds one at a time."""
    wrote = disk_gb("merge", COACH, MEASURED).least - PACKAGES_LEAST_GB - weights_gb(MEASURED)
    assert wrote == pytest.approx(0.755 + 0.067 + adapter_gb(COACH, MEASURED), rel=0.01)
    wrote = disk_gb("gguf", COACH, MEASURED).least - PACKAGES_LEAST_GB - weights_gb(MEASURED)
    q4_k_m = MEASURED.parameters * QUANT_BITS["Q4_K_M"] / 8e9
    assert wrote / GGUF_SPARE + q4_k_m == pytest.approx(1.557, rel=0.03)


@pytest.mark.parametrize(
    ("stage", "method", "peak_gib"),
    [
        ("train", "lora", 1.49),
        ("train", "full", 3.39),
        ("merge", "lora", 0.24),
        ("gguf", "lora", 1.34),
        ("evaluate", "lora", 1.23),
    ],
)
def test_ram_on_a_cpu_covers_what_was_measured(stage: str, method: str, peak_gib: float) -> None:
    """Largest resident set of the script's processes, one optimizer step of 64 tokens."""
    text = changed("max_length: 2048", "max_length: 64", changed("method: qlora", f"method: {method}"))
    if method == "full":
        text = changed("^  lora: .*\n", "", changed("^merge: .*\n", "", text))
    need = ram_gib(stage, parse_experiment(text).experiment, MEASURED, on_gpu=False)
    assert 0.95 * peak_gib < need.least < 1.6 * peak_gib


def test_twelve_billion_parameters() -> None:
    """24.4 GB of weights: neither merging nor converting fits the 50 GB of `cpu-upgrade`."""
    assert weights_gb(TWELVE) == pytest.approx(24.35, abs=0.01)
    assert disk_gb("merge", COACH, TWELVE).least > FLAVORS["cpu-upgrade"].disk_gb
    assert disk_gb("gguf", COACH, TWELVE).least == pytest.approx(67.4, abs=0.5)
    assert ram_gib("merge", COACH, TWELVE, on_gpu=False).likely < 1
    assert FLAVORS["a10g-large"].vram_gib < evaluate_vram_gib(TWELVE).least < 24


def test_memory_of_merging_does_not_grow_with_the_model() -> None:
    deeper = ModelShape("llama", 160, 1024, 4096, 1024, 256, 131_072, True, heads=16)
    assert ram_gib("merge", COACH, deeper, on_gpu=False) == ram_gib("merge", COACH, MEASURED, on_gpu=False)


def test_cheapest_host_has_enough_of_everything() -> None:
    for stage, flavor in stages_of(COACH):
        better = cheapest_host(stage, COACH, TWELVE, flavor)
        assert better is not None
        assert disk_gb(stage, COACH, TWELVE).likely <= better.disk_gb
        assert ram_gib(stage, COACH, TWELVE, better.gpu is not None).likely <= better.ram_gib
    assert [f.name for s, now in stages_of(COACH) if (f := cheapest_host(s, COACH, TINY, now))] == [
        "t4-small",
        "cpu-basic",
        "cpu-basic",
        "cpu-basic",
    ]


def test_nothing_has_enough_for_everything() -> None:
    huge = ModelShape("llama", 800, 16384, 53248, 16384, 1024, 128256, False)
    assert cheapest_host("gguf", COACH, huge, FLAVORS["cpu-upgrade"]) is None


def test_stages_that_our_scripts_carry_out() -> None:
    own = changed("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  script: my/train.py")
    assert [stage for stage, _ in stages_of(parse_experiment(own).experiment)] == ["merge", "gguf", "evaluate"]
    unknown = parse_experiment(changed("^merge: {flavor: t4-medium", "merge: {flavor: cpu-huge")).experiment
    assert [stage for stage, _ in stages_of(unknown)] == ["train", "gguf", "evaluate"]
