"""A diagnosis to an edit with the experiment's own values: lengths, batches, flavors, timeouts."""

import json

import pytest
from examples import GOOD, changed

from pipeline.diagnose import Diagnosis, diagnose
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.pace import read_pace
from pipeline.plan import Plan, Stage, make_plan
from pipeline.remedy import put, remedy

SHAPE = CATALOGUE["google/gemma-3-12b-it"]
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried} GiB. GPU 0 has a total capacity of 22.06 GiB"
)
OOM += " of which 1.00 GiB is free. Including non-PyTorch memory, this process has {used} GiB memory in use."


def plan_of(*changes: tuple[str, str], known: bool = True) -> Plan:
    text = GOOD
    for old, new in changes:
        text = changed(old, new, text)
    return make_plan(parse_experiment(text).experiment, Facts(shape=SHAPE if known else None))


def stage(plan: Plan, name: str = "train") -> Stage:
    return next(one for one in plan.stages if one.name == name)


def fix(log: str, plan: Plan, name: str = "train", message: str = "") -> str:
    return remedy(diagnose(log, message), plan, stage(plan, name), log)


def steps(*marks: tuple[int, float], total: int = 375) -> str:
    events = [{"event": "start", "time": 0.0, "stage": "train"}]
    events += [{"event": "step", "time": at, "step": step, "total": total} for step, at in marks]
    return "".join(f"MERGETUNE {json.dumps(event)}\n" for event in events)


def test_rows_that_were_known_to_be_too_long_get_the_longest_that_fit() -> None:
    plan = plan_of(("max_length: 2048", "max_length: 24576"))
    assert fix(OOM.format(tried="9.00", used="21.00"), plan) == (
        "`train.max_length: 24576 → 13952`, or `train.flavor: a10g-large → l40sx1`"
    )


def test_a_surprise_halves_the_rows_at_least() -> None:
    assert fix(OOM.format(tried="1.00", used="21.90"), plan_of()) == (
        "`train.max_length: 2048 → 1024`, or `train.flavor: a10g-large → l40sx1`"
    )
    assert fix("CUDA out of memory", plan_of()) == fix(OOM.format(tried="0.50", used="22.00"), plan_of())


def test_a_larger_batch_is_traded_for_accumulation() -> None:
    plan = plan_of(("max_length: 2048", "max_length: 8192\n  batch_size: 4\n  gradient_accumulation: 2"))
    assert fix(OOM.format(tried="4.00", used="21.90"), plan) == (
        "`train.max_length: 8192 → 4416`, or `train.batch_size: 4 → 2` with `train.gradient_accumulation: 2 → 4`,"
        " or `train.flavor: a10g-large → l40sx1`"
    )


def test_label_smoothing_is_named_because_it_makes_the_logits() -> None:
    plan = plan_of(("max_length: 2048", "max_length: 8192\n  sft: {label_smoothing_factor: 0.1}"))
    said = fix(OOM.format(tried="8.00", used="20.00"), plan)
    assert said.startswith(
        "remove `label_smoothing_factor` from `train.sft`: it makes all logits at once; or `train.max_"
    )


def test_without_the_shape_of_the_base_the_way_to_find_out_is_named() -> None:
    assert "`mergetune fit experiments/coach.yaml`" in fix("CUDA out of memory", plan_of(known=False))


@pytest.mark.parametrize(
    ("log", "name", "said"),
    [
        ("Killed", "merge", "`merge.flavor: t4-medium → a10g-large`"),
        ("Killed", "gguf", "`gguf.flavor: t4-medium → a10g-large`"),
        ("OSError: [Errno 28] No space left on device", "gguf", "`gguf.flavor: t4-medium → l4x1`"),
        ("OSError: [Errno 28] No space left on device", "train", "`train.flavor: a10g-large → l40sx1`"),
        ("torch.OutOfMemoryError: CUDA out of memory", "gguf", ""),
    ],
)
def test_a_machine_with_more(log: str, name: str, said: str) -> None:
    assert fix(log, plan_of(), name).startswith(said)


def test_a_script_that_refused_for_disk_gets_a_flavor_too() -> None:
    event = {"event": "error", "message": "`/x` has 3.0 GB of free disk, this stage writes about 30.0 GB", "hint": "y"}
    plan = plan_of(("flavor: t4-medium, timeout: 1h", "flavor: cpu-upgrade, timeout: 1h"))
    assert fix(f"MERGETUNE {json.dumps(event)}", plan, "merge") == "`merge.flavor: cpu-upgrade → t4-medium`"


def test_a_timeout_from_the_measured_pace() -> None:
    log = steps((2, 600.0), (200, 600.0 + 198 * 60))  # a minute a step
    pace = read_pace(log)
    assert pace is not None
    assert (pace.done, pace.total, pace.elapsed_s, pace.left_s) == (200, 375, 12_480.0, 10_500.0)
    assert fix(log, plan_of(("max_usd: 10", "max_usd: 40")), message="Job timeout") == (
        "`train.timeout: 4h → 8h` (200 of 375 steps took 3.5 h), then `mergetune retry coach`"
    )


def test_a_longer_timeout_may_need_a_larger_budget() -> None:
    said = fix("", plan_of(), message="Job timeout")
    assert said == "`train.timeout: 4h → 6h` and `budget.max_usd: 10 → 12`, then `mergetune retry coach`"


def test_a_pace_from_a_progress_bar() -> None:
    rows = "Map: 100%|██████████| 1000/1000 [00:01<00:00, 900.1 examples/s]\n"
    bar = f"{rows} 32%|███  | 120/375 [4:00:00<8:30:00, 120.00s/it]\n"
    pace = read_pace(bar)
    assert pace is not None
    assert (pace.done, pace.total, pace.needed_s) == (120, 375, 45_000.0)
    assert read_pace("  0%|  | 0/375 [00:00<?, ?it/s]") is None
    assert read_pace(steps((5, 10.0))) is None


def test_other_edits_show_old_and_new() -> None:
    lora = "Target modules {'x'} not found in the base model"
    assert (
        fix(f"ValueError: {lora}", plan_of()) == "`train.lora.targets: [q_proj, k_proj, v_proj, o_proj] → all-linear`"
    )
    assert fix("{'loss': nan, 'grad_norm': nan}", plan_of()).startswith("`train.learning_rate: 0.0002 → 2e-05`")
    assert fix("got num_samples=0", plan_of()).startswith("`train.max_length: 2048 → 4096`")
    old = plan_of(("flavor: a10g-large", "flavor: t4-medium"))
    assert fix("RuntimeError: no kernel image is available for execution on the device", old) == (
        "`train.flavor: t4-medium → l4x1`"
    )
    many = plan_of(("flavor: a10g-large", "flavor: a10g-largex2"))
    assert (
        fix("RuntimeError: Must flatten tensors with uniform dtype", many)
        == "`train.flavor: a10g-largex2 → a10g-large`"
    )


def test_names_of_the_experiment_or_words_for_them() -> None:
    plan = plan_of()
    gated = diagnose("OSError: You are trying to access a gated repo.")
    assert "the page of `google/gemma-3-12b-it` (or of `acme/coach`)" in remedy(gated, plan, stage(plan))
    assert "the page of `the base` (or of `the data`)" in put(gated.hint)
    told = Diagnosis("x", "y", False, "write {z} in {path}")
    assert remedy(told, plan, stage(plan)) == "write {z} in experiments/coach.yaml"
