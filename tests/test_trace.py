"""Traced memory: against earlier traces, published runs, the closed form and its own full depth; what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from examples import GOOD, changed
from repository import ROOT, Repository, make_repository

from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.memory import GIB, estimate_need, spec_of
from pipeline.models import CATALOGUE, ModelShape, config_of, shape_of
from pipeline.settled import settle
from pipeline.trace import trace_request

SCRIPT = ROOT / "scripts/trace_memory.py"
GEMMA = CATALOGUE["google/gemma-3-12b-it"]
Trace = Callable[[dict[str, Any]], dict[str, Any]]
ALL_LINEAR = ("targets: .q_proj, k_proj, v_proj, o_proj.", "targets: all-linear")
PAIRS, ON_BF16 = ("method: qlora", "method: dpo"), ("  lora:", "  dpo: {quantize: false}\n  lora:")
FULL = (("method: qlora", "method: full"), ("  lora: .*\n", ""), ("^merge: .*\n", ""))
# Families that the catalogue does not have, with the sizes that their repositories publish.
QWEN2 = ModelShape("qwen2", 28, 3584, 18944, 3584, 512, 152064, False, heads=28)
PHI3 = ModelShape("phi3", 32, 3072, 8192, 3072, 3072, 32064, False, heads=32)
SHAPES = {
    "gemma3_text": replace(GEMMA, other_linear=0),
    "gemma3": CATALOGUE["google/gemma-3-4b-it"],
    "llama": CATALOGUE["meta-llama/Llama-3.2-3B-Instruct"],
    "mistral": CATALOGUE["mistralai/Mistral-7B-Instruct-v0.3"],
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": CATALOGUE["Qwen/Qwen3-4B"],
    "smollm3": CATALOGUE["HuggingFaceTB/SmolLM3-3B"],
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trace() -> Trace:
    """The script's trace, each in a process forked from this one: the training stack is imported once for all."""
    import trl.trainer.utils  # noqa: F401

    script, benchmark = load(SCRIPT), load(ROOT / "benchmarks/trace.py")
    return lambda request: benchmark.apart(lambda: script.trace(request))


def experiment_of(*changes: tuple[str, str]) -> Experiment:
    text = GOOD
    for pattern, replacement in changes:
        text = changed(pattern, replacement, text)
    return parse_experiment(text).experiment


def request_of(shape: ModelShape, *changes: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {**trace_request(experiment_of(*changes), Facts(shape=shape)), **more}


def call(request: object, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *(arguments or ("-",))]
    text = request if isinstance(request, str) else json.dumps(request)
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, input=text, env=given, capture_output=True, text=True, timeout=120, check=False)


# An earlier tracer of the same stack: Gemma 3 12B, r=64 on q/k/v/o, dropout 0.05, sdpa, micro-batch 1; text tower.
@pytest.mark.slow
@pytest.mark.parametrize(("length", "gib"), [(2048, 9.0), (3072, 9.7), (4096, 10.4), (8192, 13.3), (16384, 19.4)])
def test_an_earlier_trace_of_the_same_stack(trace: Trace, length: int, gib: float) -> None:
    changes = ("max_length: 2048", f"max_length: {length}"), ("alpha: 128", "alpha: 128, dropout: 0.05")
    traced = trace(request_of(SHAPES["gemma3_text"], *changes))
    assert traced["allocated_gib"] == pytest.approx(gib, rel=0.02)
    assert sum(traced["parts"].values()) == pytest.approx(traced["allocated_gib"], abs=0.001)
    assert traced["traced_layers"] == [4, 5, 5]
    if length == 2048:
        assert traced["allocated_gib"] == pytest.approx(8.94, abs=0.01)  # this one, to the second digit


# benchmarks/memory_rows.csv: max_memory_allocated of real runs, on an older stack whose loss the benchmark writes out.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "within"),
    [
        ("fms-a100_80gb-76-alloc", 0.02),
        ("fms-a100_80gb-78-alloc", 0.02),
        ("fms-a100_80gb-92-alloc", 0.03),
        ("fms-a100_80gb-56-alloc", 0.04),
    ],
)
def test_published_runs(run: str, within: float) -> None:
    benchmark = load(ROOT / "benchmarks/trace.py")
    measured = benchmark.PUBLISHED[run][-1] / GIB
    assert benchmark.traced_published(load(SCRIPT), run) == pytest.approx(measured, rel=within)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "rows"),
    [("gemma3_text", (PAIRS,), ()), ("llama", (PAIRS, ON_BF16), (("method: qlora", "method: lora"),))],
)
def test_closed_form_and_trace_agree_about_pairs(trace: Trace, family: str, changes: Any, rows: Any) -> None:
    shape, batch = SHAPES[family], ("max_length: 2048", "max_length: 2048\n  batch_size: 2")
    same = (ALL_LINEAR, ("a10g-large", "t4-medium"))  # where rows of two are padded, and layers recomputed
    traced, alone = (trace(request_of(shape, *same, *more)) for more in (changes, (*rows, batch)))
    closed = estimate_need(spec_of(experiment_of(*same, *changes), shape), shape)
    assert closed.allocated == pytest.approx(traced["allocated_gib"], rel=0.02)
    assert traced["allocated_gib"] == pytest.approx(alone["allocated_gib"], rel=0.005)  # the reference adds nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flavor", "within"),
    [*((family, "t4-medium", 0.04) for family in SHAPES), ("gemma3_text", "h200", 0.04), ("phi3", "h200", 0.06)],
)
def test_closed_form_and_trace_agree(trace: Trace, family: str, flavor: str, within: float) -> None:
    """Layers recomputed, and kept: Phi 3 splits its joined projections into copies that the closed form leaves out."""
    shape, changes = SHAPES[family], (ALL_LINEAR, ("a10g-large", flavor))
    traced = trace(request_of(shape, *changes))
    settled = settle(experiment_of(*changes), shape)
    assert settled.recomputes is (flavor == "t4-medium")
    closed = estimate_need(spec_of(settled.of(experiment_of(*changes)), shape), shape)
    assert closed.allocated == pytest.approx(traced["allocated_gib"], rel=within)
    assert closed.weights == pytest.approx(traced["parts"]["weights"], rel=0.01)


VARIANTS = {
    "qlora": (),
    "full": FULL,
    "full, one batch a step": (*FULL, ("epochs: 3", "epochs: 3\n  gradient_accumulation: 1")),
    "no checkpointing": (("  lora:", "  sft: {gradient_checkpointing: false}\n  lora:"),),
    "padded": (("max_length: 2048", "max_length: 512\n  batch_size: 4"),),
    "dora": (("alpha: 128", "alpha: 128, dora: true"),),
    "eager": (("  lora:", "  sft: {model_init_kwargs: {attn_implementation: eager}}\n  lora:"),),
    "pairs": (PAIRS,),
    "pairs on bf16": (PAIRS, ON_BF16),
    "smoothed": (("  lora:", "  sft: {label_smoothing_factor: 0.1}\n  lora:"),),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"),
    [*((family, "qlora") for family in SHAPES), *(("gemma3_text", name) for name in VARIANTS if name != "qlora")],
)
def test_the_line_through_a_few_layers_is_the_full_depth(trace: Trace, family: str, variant: str) -> None:
    shape = replace(SHAPES[family], layers=20, hidden=512, intermediate=1024, other_linear=0, window=256)
    shape = replace(shape, query=512, key_value=256, heads=4)
    if family == "gemma3":
        shape = replace(shape, other_linear=GEMMA.other_linear)
    few, all_of_them = (trace(request_of(shape, *VARIANTS[variant], full_depth=whole)) for whole in (False, True))
    assert len(few["traced_layers"]) > 1
    assert all_of_them["traced_layers"] == [20]
    assert few["allocated_gib"] == pytest.approx(all_of_them["allocated_gib"], rel=1e-3)
    assert few["phase"] == all_of_them["phase"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [("max_length: 2048", "max_length: 4096")],
        [("r: 64", "r: 128")],
        [("alpha: 128", "alpha: 128, dropout: 0.05")],
        [("alpha: 128", "alpha: 128, modules_to_save: [embed_tokens]")],
        [("  lora:", "  sft: {optim: adamw_torch}\n  lora:")],
        [("flavor: a10g-large", "flavor: a10g-largex4")],
        [("method: qlora", "method: lora")],
    ],
)
def test_more_of_anything_allocates_more(trace: Trace, changes: list[tuple[str, str]]) -> None:
    usual = trace(request_of(SHAPES["llama"]))["allocated_gib"]
    assert trace(request_of(SHAPES["llama"], *changes))["allocated_gib"] > usual


@pytest.mark.slow
def test_less_of_anything_allocates_less(trace: Trace) -> None:
    usual = trace(request_of(SHAPES["llama"]))["allocated_gib"]
    paged = ("  lora:", "  sft: {optim: paged_adamw_8bit}\n  lora:")
    flash = ("  lora:", "  sft: {model_init_kwargs: {attn_implementation: flash_attention_2}}\n  lora:")
    assert trace(request_of(SHAPES["llama"], paged))["allocated_gib"] < usual
    gemma = [("max_length: 2048", "max_length: 8192")]
    masked = trace(request_of(SHAPES["gemma3_text"], *gemma))["allocated_gib"]
    assert trace(request_of(SHAPES["gemma3_text"], *gemma, flash))["allocated_gib"] < masked


@pytest.mark.slow
def test_the_gpu_comparison_trains_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it measures nothing, and runs every line before the question."""
    benchmark = load(ROOT / "benchmarks/trace.py")
    small = ModelShape("qwen3", 2, 256, 512, 256, 128, 4096, True, heads=4)
    monkeypatch.setitem(CATALOGUE, "Qwen/Qwen3-4B", small)
    train = {"max_length": 32, "batch_size": 2, "gradient_accumulation": 1}
    for method, lora in (("qlora", {"r": 4}), ("full", {})):
        assert benchmark.measure(benchmark.Case("Qwen/Qwen3-4B", method, train, lora), "cpu") is None
    assert len(benchmark.CASES) >= 12


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ([], {"config": {"model_type": "qwen3_moe"}}, "`qwen3_moe` cannot be traced; known: gemma3"),
        ([], {"config": {}}, "`None` cannot be traced"),
        ([("  epochs: 3", "  script: my/train.py")], {}, "what `my/train.py` allocates is not known"),
        ([("  lora:", "  sft: {activation_offloading: true}\n  lora:")], {}, "`train.sft.activation_offloading`"),
        (
            [("  epochs: 3", "  packing: true"), ("a10g-large", "t4-medium")],
            {},
            "packed rows need a flash-attention kernel",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused_before_any_import(
    changes: list[tuple[str, str]], more: dict[str, Any], said: str
) -> None:
    done = call(request_of(GEMMA, *changes, **more))
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "\n\nhint: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("request_text", "said"), [("{", "is not JSON"), ("[]", "is no request"), ("{}", "needs")])
def test_a_request_that_is_none(request_text: str, said: str) -> None:
    done = call(request_text)
    assert done.returncode == 2
    assert said in done.stderr
    assert call("", "missing.json").returncode == 2


@pytest.mark.slow
def test_settings_that_fail_are_refused_with_their_reason() -> None:
    done = call(request_of(PHI3, ("  lora:", "  sft: {optim: galore_adamw}\n  lora:")))
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: `phi3` cannot be traced with these settings: " in done.stderr


def test_a_config_of_the_catalogue_has_the_shape_it_came_from() -> None:
    for shape in (*CATALOGUE.values(), QWEN2, PHI3):
        assert shape_of(config_of(shape)) == shape


def test_a_base_that_nothing_is_known_of() -> None:
    with pytest.raises(UserError, match=r"the config.json of `google/gemma-3-12b-it` is not here") as caught:
        trace_request(experiment_of(), Facts())
    assert caught.value.hint == "add `--online` to fetch it"
    with pytest.raises(UserError, match="`cpu-upgrade` is no flavor with a GPU"):
        trace_request(experiment_of(("flavor: a10g-large", "flavor: cpu-upgrade")), Facts(shape=GEMMA))


# The command


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = make_repository(tmp_path_factory.mktemp("repo"))
    (made.root / "coach.yaml").write_text(GOOD)
    long = changed("name: coach", "name: long", changed("max_length: 2048", "max_length: 16384"))
    (made.root / "long.yaml").write_text(changed("a10g-large", "t4-small", long))
    return made


@pytest.mark.slow
def test_plan_prints_the_trace_beside_the_closed_form(repo: Repository) -> None:
    done = repo.call("plan", "coach.yaml", "--trace")
    assert done.returncode == 0, done.stderr
    assert "**Fits** `a10g-large`: 9.9 of 22.06 GiB, traced." in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("Traced: "))
    assert line.startswith("Traced: 9.1 GiB allocated (closed form 9.0), 9.9 of the 22.06 GiB of `a10g-large`")
    assert line.endswith(": fits. The peak: `backward of the last sliding_attention layer`.")


@pytest.mark.slow
def test_plan_as_json_holds_the_trace(repo: Repository) -> None:
    (train, *others) = json.loads(repo.call("plan", "coach.yaml", "--trace", "--format", "json").stdout)["stages"]
    assert train["traced"]["allocated_gib"] == pytest.approx(9.07, abs=0.02)
    assert sum(train["traced"]["parts"].values()) == pytest.approx(train["traced"]["allocated_gib"], abs=0.01)
    assert train["traced"]["layers"] == 48
    assert all(stage["traced"] is None for stage in others)


@pytest.mark.slow
def test_plan_stops_where_the_trace_says_out_of_memory(repo: Repository) -> None:
    done = repo.call("plan", "long.yaml", "--trace")
    assert (done.returncode, done.stdout) == (1, "")
    assert "GiB (traced), `t4-small` has 14.56 [MEM002]" in done.stderr
    assert "hint: write `flavor: l4x1`, or a smaller `max_length`" in done.stderr


def test_without_the_training_stack_plan_says_how_to_install_it(repo: Repository, tmp_path: Path) -> None:
    hidden = (
        "from importlib.machinery import PathFinder\nfind = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hidden)
    command = repo.command("plan", "coach.yaml", "--trace")
    given = repo.environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=repo.root, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "error: a trace needs the training stack, and it is not installed\n\nhint: install it"
    )


def test_shared_weights_are_not_traced() -> None:
    text = changed("method: qlora", "method: full", changed("  lora: .*\n", ""))
    text = changed("flavor: a10g-large", "flavor: a100x4", changed("^merge: .*\n", "", text))
    known = Facts(shape=CATALOGUE["google/gemma-3-12b-it"])
    with pytest.raises(UserError, match="share the weights"):
        trace_request(parse_experiment(text).experiment, known)
