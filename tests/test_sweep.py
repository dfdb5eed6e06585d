"""A sweep from its file to a job's request: faults with their places, variants, rules, estimates, live progress."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from examples import GOOD, MAC, changed
from histories import check, one_tick, run_until_closed, start
from repository import ROOT
from rule_cases import facts, place, with_script
from simulation import Faults
from test_plan_comment import COUNTED, ROOMY

from pipeline.actions import Seen
from pipeline.check import run_rules
from pipeline.closing import make_summary
from pipeline.cost import finished_run
from pipeline.curve_notes import find_waste, notes
from pipeline.diagnose import diagnose
from pipeline.errors import Finding, InvalidExperiment, Severity, UserError
from pipeline.experiment import Train
from pipeline.facts import Facts
from pipeline.fields import Section
from pipeline.flavors import FLAVORS
from pipeline.live import Live, read_live
from pipeline.loader import field_section, parse_experiment
from pipeline.pace import read_pace
from pipeline.parallel import Parallel
from pipeline.plan import Plan, StageName, as_mlx, make_fingerprint, make_plan
from pipeline.plan_preview import Preview, plan_as_dict, render_plan
from pipeline.progress import status_line
from pipeline.remote import StageView
from pipeline.rules.others import relatives
from pipeline.run_json import make_run_json
from pipeline.settings import Settings
from pipeline.settled import Settled
from pipeline.sweep import FIXED, MOST, SWEPT, said
from pipeline.sweep_plan import VariantEstimate, heaviest, sweep_seconds
from pipeline.train_sections import Lora
from pipeline.variants import variants_of

GRID = ROOMY + "sweep:\n  grid: {learning_rate: [1e-4, 2e-4], lora.r: [16, 64]}\n"
ONE_ROW = Settled(1, 8)
LOCAL_EVAL = changed("eval: {fraction: 0.05}", "eval: {split: validation}", ROOMY)


def swept(lines: str, text: str = ROOMY) -> str:
    """An experiment with a sweep of these lines."""
    return text + "sweep:\n" + "".join(f"  {line}\n" for line in lines.splitlines())


def faults(text: str) -> tuple[Finding, ...]:
    with pytest.raises(InvalidExperiment) as caught:
        parse_experiment(text)
    return caught.value.findings


def plan_of(text: str, **known: Any) -> Plan:
    return make_plan(parse_experiment(text).experiment, facts(**{"dataset": COUNTED, **known}))


# The file

BAD = [
    (
        "grid: {learning_rate: [1e-4, fast]}",
        "fast",
        "`train.learning_rate` is `fast`: input should be a valid number",
        "Peak",
    ),
    ("grid: {lora.r: [16, -1]}", "-1", "`sweep`: `train.lora.r` is `-1`: input should be greater than 0", "Rank"),
    ("grid: {lora.r: [16, 010]}", "010", "octal to some", "write `10`"),
    ("grid: {epochs: [1:30, 2]}", "1:30", "`train.epochs` is `1:30`", "Passes"),
    ("grid: {packing: [yes, false]}", "yes", "`yes` is not a boolean", "(here probably `true`)"),
    ("grid: {lora.targets: [q_proj, all-linear]}", "q_proj, all", "`q_proj` is not a list", "write `[q_proj]`"),
    ("grid: {sft.learning_rate: [1, 2]}", "1, 2", "decided by `train.learning_rate`", "under `train`"),
    ("list: [{lora.r: 8}, {lora.r: x}]", "x}]", "`train.lora.r` is `x`", "Rank"),
    ("list: [{lora.r: 8}, {lora.r: 8}]", "8}]", "variant 2 (`lora.r 8`) is variant 1 again", "remove one of the two"),
    ("list: [{lora.r: 64}, {}]", "[{lora.r: 64}, {}]", "variant 2 (`nothing`) is variant 1 again", "remove one"),
    ("grid: {learning_rate: [1e-4, 0.0001]}", "0.0001", "is variant 1 again", "remove one of the two"),
    (
        "grid: {learning_rate: 1e-4}",
        "1e-4}",
        "`learning_rate` needs a list of values",
        "write `learning_rate: [1e-4, …]`",
    ),
    ("grid: {learning_rate: []}", "[]", "`learning_rate` has no value", "remove it"),
    ("grid: {learning_rate: [1e-4]}", "{learning_rate: [", "1 variant; a sweep has 2 to 32", "write more values"),
    ("list: [{lora.r: 8}]", "[{lora.r", "1 variant; a sweep has 2 to 32", "write more values"),
    ("list: [a, {}]", "a, {}", "input should be a mapping", "write"),
    ("grid: [1, 2]", "[1, 2]", "`sweep.grid` is a list: input should be a mapping", "write `grid: {key: value}`"),
    ("concurrency: 2", "concurrency", "needs one of `grid` and `list`; has none", "write `grid: {learning_rate"),
    ("grid: {lora.r: [8, 9]}\nlist: [{}, {lora.r: 8}]", "grid", "has both", "write `grid:"),
    ("gird: {lora.r: [8, 9]}", "gird", "unknown key `sweep.gird`", "did you mean `grid`?"),
    ("grid: {lora.r: [8, 9]}\nconcurrency: 0", "0\n", "`sweep.concurrency` is `0`", "one GPU"),
    ("grid: {lora.r: [8, 9]}\nmax_usd: -1", "-1\n", "`sweep.max_usd` is `-1`", "No further variant"),
    (
        "grid: {learning_rat: [1e-4, 2e-4]}",
        "1e-4",
        "`learning_rat` is no field of `train`",
        "did you mean `learning_rate`?",
    ),
    ("grid: {r: [8, 16]}", "8, 16", "`r` is no field of `train` that can vary", "did you mean `lora.r`?"),
    ("grid: {train.lora.r: [8, 16]}", "8, 16", "named from the top", "write `lora.r`"),
    (
        "grid: {method: [qlora, full]}",
        "full",
        "varies between `qlora` and `lora`, not to `full`",
        "an experiment of its own",
    ),
    ("grid: {sft.loss_type: [nll, dft]}", "nll", "what the held-out loss measures", "an experiment of its own"),
    ("grid: {sft.label_smoothing_factor: [0, 0.1]}", "0, 0.1", "what the held-out loss measures", "write it under"),
    ("grid: {sft: [{}, {}]}", "{}, {}", "its fields vary one by one", "write `sft.warmup_steps"),
]


@pytest.mark.parametrize(("lines", "at", "message", "hint"), BAD)
def test_a_fault_stands_at_its_value(lines: str, at: str, message: str, hint: str) -> None:
    text = swept(lines)
    found = faults(text)[0]
    assert message in found.message and hint in found.hint
    head, _, tail = text.rpartition("sweep:")
    line, column = place(tail, at)
    assert (found.at.line, found.at.column) == (head.count("\n") + line, column)


@pytest.mark.parametrize("key", [key for key in FIXED if key != "lora"])
def test_what_must_not_vary_says_why(key: str) -> None:
    (first, *_) = faults(swept(f"grid: {{{key}: [1, 2]}}"))
    assert first.message.startswith(f"`sweep`: `{key}` cannot vary: ") and first.hint


def test_every_field_of_train_may_vary_or_says_why_not() -> None:
    fields = {name for name, field in Train.model_fields.items() if field_section(field.annotation) is None}
    assert set(SWEPT) <= fields | {f"lora.{name}" for name in Lora.model_fields}
    for name in fields - set(SWEPT):
        assert faults(swept(f"grid: {{{name}: [1, 2]}}"))[0].hint, name
    assert issubclass(Lora, Section)


def test_what_the_rest_of_the_file_says_against_a_sweep() -> None:
    lines = "grid: {lora.r: [8, 16]}"
    (no_rows,) = faults(swept(lines, changed("  eval: .*\n", "", ROOMY)))
    assert (no_rows.message, no_rows.hint) == (
        "no rows are held out, so no variant wins",
        "add `eval: {fraction: 0.05}` under `data`",
    )
    assert any("`backend: mlx` trains on your Mac" in found.message for found in faults(swept(lines, MAC)))
    assert "`train.script` is another one" in faults(swept(lines, with_script(ROOMY)))[0].message
    seeds = "grid: {seed: [1, 2]}"
    assert "draws the held-out rows" in faults(swept(seeds))[0].message
    assert len(variants_of(parse_experiment(swept(seeds, LOCAL_EVAL)).experiment)) == 2
    full = changed("  lora: .*\n", "", changed("method: qlora", "method: full", changed("merge: .*\n", "", ROOMY)))
    assert "alone" in faults(swept("grid: {method: [qlora, lora]}", full))[0].message
    with pytest.raises(UserError, match="MLX trains one variant"):
        as_mlx(parse_experiment(GRID).experiment)


def test_too_many_variants() -> None:
    values = ", ".join(str(number) for number in range(1, MOST + 2))
    (found,) = faults(swept(f"grid: {{lora.r: [{values}]}}"))
    assert (found.message, found.hint) == (
        "`sweep`: 33 variants; a sweep has 2 to 32",
        "write fewer values, or name the best ones in `list`",
    )


def test_variants_in_the_order_of_the_file() -> None:
    variants = variants_of(parse_experiment(GRID).experiment)
    assert [(one.number, one.words) for one in variants] == [
        (1, "learning_rate 1e-4, lora.r 16"),
        (2, "learning_rate 1e-4, lora.r 64"),
        (3, "learning_rate 2e-4, lora.r 16"),
        (4, "learning_rate 2e-4, lora.r 64"),
    ]
    chosen = [one.experiment.train for one in variants]
    assert [(train.learning_rate, train.lora and train.lora.r) for train in chosen][1] == (1e-4, 64)
    assert all(train.lora and train.lora.alpha == 128 for train in chosen)  # what no value says is as `train` has it
    listed = variants_of(parse_experiment(swept("list: [{}, {sft.optim: adamw_torch, packing: true}]")).experiment)
    assert [one.words for one in listed] == ["nothing", "sft.optim adamw_torch, packing true"]
    assert listed[1].experiment.train.sft == {"optim": "adamw_torch"}
    assert variants_of(parse_experiment(GOOD).experiment) == ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((1e-4, "1e-4"), (5e-3, "5e-3"), (2.5e-5, "2.5e-5"), (0.05, "0.05"), (3.0, "3"), (0.0, "0"), (64, "64")),
        *((True, "true"), (None, "null"), (["q_proj", "v_proj"], "[q_proj, v_proj]"), ({"a": 8}, "{a: 8}")),
    ],
)
def test_a_value_reads_as_a_person_writes_it(value: object, words: str) -> None:
    assert said(value) == words


# Identity


def test_a_sweep_enters_the_fingerprint_and_its_limits_do_not() -> None:
    def of(text: str) -> str:
        return make_fingerprint(parse_experiment(text).experiment, Facts())

    assert of(GRID) != of(ROOMY)
    assert of(GRID) == of(GRID.replace("[1e-4, 2e-4]", "[0.0001, 2e-4]"))
    assert of(GRID) == of(f"{GRID}  concurrency: 4\n  max_usd: 5\n")
    assert of(GRID) != of(GRID.replace("[16, 64]", "[16, 32]"))
    assert of(swept("list: [{}, {lora.r: 8}]")) != of(swept("list: [{}, {lora.r: 9}]"))


def test_two_sweeps_of_one_training_are_not_the_same() -> None:
    texts = [GRID, GRID.replace("[16, 64]", "[16, 32]"), changed("name: coach", "name: other", GRID)]
    one, other, same = relatives([parse_experiment(text).experiment for text in texts])
    assert [len({id(found) for found in group[2:]}) for group in (one, other, same)] == [2, 1, 2]


# Rules


def findings(text: str, **known: Any) -> list[Finding]:
    file = parse_experiment(text, "experiments/coach.yaml")
    return run_rules(file, facts(**{"dataset": COUNTED, **known}), Settings(namespaces=("acme",)))


def test_a_good_sweep_has_no_finding() -> None:
    assert findings(GRID) == []


def test_a_variant_that_does_not_fit_is_named_at_its_value() -> None:
    text = swept("grid: {learning_rate: [1e-4, 2e-4], lora.r: [16, 1024]}", ROOMY.replace("a10g-large", "t4-medium"))
    (found,) = [one for one in findings(text) if one.rule == "MEM002"]
    assert found.severity is Severity.ERROR
    assert found.message.startswith("variants 2 and 4 (`lora.r 1024`): training needs 15.5 to 18.9 GiB")
    assert (found.at.line, found.at.column) == place(text, "1024")


def test_what_all_variants_do_wrong_is_said_once_at_its_own_place() -> None:
    text = GRID.replace("flavor: a10g-large", "flavor: a10-large")
    (found,) = [one for one in findings(text) if one.rule == "MEM001"]
    assert found.message == "there is no flavor `a10-large`"
    assert (found.at.line, found.at.column) == place(text, "a10-large")
    steps = [
        one
        for one in findings(swept("grid: {batch_size: [1, 2], gradient_accumulation: [200, 400]}"))
        if one.rule == "TRN009"
    ]
    assert [one.message.partition(":")[0] for one in steps] == [
        "variant 2 (`batch_size 1, gradient_accumulation 400`)",
        "variant 3 (`batch_size 2, gradient_accumulation 200`)",
        "variant 4 (`batch_size 2, gradient_accumulation 400`)",
    ]


def test_a_value_that_trl_does_not_know_is_found_for_its_variant() -> None:
    text = swept("list: [{}, {sft.optim: adamw_trch}, {sft.warmup_stepz: 10}]")
    found = {one.rule: one for one in findings(text)}
    assert found["TRN003"].message.startswith("variant 2 (`sft.optim adamw_trch`): `optim` cannot be `adamw_trch`")
    assert (found["TRN003"].at.line, found["TRN003"].at.column) == place(text, "adamw_trch")
    assert found["TRN001"].message == "variant 3 (`sft.warmup_stepz 10`): SFTConfig has no field `warmup_stepz`"


def test_the_base_value_that_every_variant_overrides_is_not_judged() -> None:
    text = swept("grid: {learning_rate: [1e-4, 2e-4]}", ROOMY.replace("learning_rate: 2e-4", "learning_rate: 0.9"))
    assert findings(text) == []


# Plan


def test_the_plan_adds_time_and_takes_the_largest_memory() -> None:
    alone, plan = plan_of(ROOMY).stages[0], plan_of(swept("grid: {lora.r: [16, 64, 1024]}"))
    train = plan.stages[0]
    assert [stage.name for stage in plan.stages] == ["train", "merge", "gguf", "evaluate"]
    assert (
        train.memory and alone.memory and train.memory.total == max(v.memory.total for v in train.variants if v.memory)
    )
    assert train.memory.total > alone.memory.total
    seconds = [variant.seconds or math.nan for variant in train.variants]
    assert train.cost.needed_s and alone.cost.needed_s
    assert train.cost.needed_s - sum(seconds) == pytest.approx(242, abs=2)  # the start and the download, once
    assert seconds[1] == pytest.approx(
        alone.cost.needed_s - 242 + 40 + 47, abs=3
    )  # imports, and the base from the disk
    assert train.cost.worst_usd == alone.cost.worst_usd == 18.0
    assert heaviest(plan.experiment, plan.shape).train.lora == variants_of(plan.experiment)[2].experiment.train.lora


def test_side_by_side_the_longest_lane_counts() -> None:
    one, four = (
        plan_of(changed("a10g-large", "a10g-largex4", GRID) + f"  concurrency: {n}\n").stages[0] for n in (1, 4)
    )
    assert (one.parallel.gpus, one.parallel.lanes, four.parallel.gpus, four.parallel.lanes) == (4, 1, 1, 4)
    assert one.cost.needed_s and four.cost.needed_s and four.cost.needed_s < one.cost.needed_s
    assert four.parallel.request() == {"concurrency": 4}
    uneven = [VariantEstimate(n, "", ONE_ROW, seconds=s) for n, s in enumerate((5.0, 1.0, 1.0, 4.0), 1)]
    assert (sweep_seconds(uneven, 1), sweep_seconds(uneven, 2)) == (11.0, 6.0)
    assert sweep_seconds([*uneven, VariantEstimate(5, "", ONE_ROW)], 2) is None


def test_a_limit_bounds_what_is_expected() -> None:
    train = plan_of(f"{GRID}  max_usd: 4\n").stages[0]
    assert train.cost.expected_usd == pytest.approx(4.0, abs=0.03)
    assert plan_of(GRID).stages[0].cost.expected_usd == pytest.approx(10.2, abs=0.2)


def test_plan_for_a_terminal_and_as_json() -> None:
    file, known = parse_experiment(GRID), facts(dataset=COUNTED)
    preview = Preview("coach", "coach.yaml", file.experiment, make_plan(file.experiment, known), known)
    text = render_plan(preview)
    assert "| 4 | `learning_rate 2e-4, lora.r 64` | 9.9 of 22.06 GiB | ~1h41m | $2.53 |" in text
    rows = plan_as_dict(preview)["stages"][0]["variants"]
    assert [row["variant"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() == {"variant", "differs", "memory_gib", "expected_s", "expected_usd"}
    json.dumps(plan_as_dict(preview))


# The request of the job


def test_run_json_holds_every_variant_whole() -> None:
    plan = plan_of(f"{GRID}  max_usd: 9\n")
    job = make_run_json(plan, plan.stages[0], 1, {}, {"repo": "acme/x"})["sweep"]
    assert {key: job[key] for key in ("timeout_s", "max_usd")} == {"timeout_s": 43_200, "max_usd": 9.0}
    assert job["usd_per_minute"] == FLAVORS["a10g-large"].usd_per_minute
    second = job["variants"][1]
    assert second["words"] == "learning_rate 1e-4, lora.r 64"
    assert (second["train"]["learning_rate"], second["train"]["lora"]["r"], second["train"]["seed"]) == (1e-4, 64, 42)
    here = make_run_json(plan, plan.stages[0], 1, {}, {"path": "x"})["sweep"]
    assert here.keys() == {"variants"}  # here nothing ends a training, and nothing costs
    assert "sweep" not in make_run_json(plan, plan.stages[1], 1, {}, {"repo": "acme/x"})
    assert "sweep" not in plan_of(GOOD).experiment.resolved()


def test_each_variant_is_settled_for_the_gpu() -> None:
    """What is kept for the backward pass is chosen for each: a larger adapter may leave no room for it."""
    text = ROOMY.replace("a10g-large", "a100-large")
    three = swept("grid: {lora.r: [16, 1024]}", text.replace("epochs: 3", "epochs: 3\n  batch_size: 3"))
    plan = plan_of(three)
    job = make_run_json(plan, plan.stages[0], 1, {}, {"repo": "acme/x"})["sweep"]["variants"]
    assert [one.get("checkpointing") for one in job] == [False, None]
    sizes = [one.memory.total for one in plan.stages[0].variants if one.memory]
    assert sizes[0] > sizes[1]
    assert plan.stages[0].memory is not None
    assert plan.stages[0].memory.total == sizes[0]
    file, known = parse_experiment(three), facts(dataset=COUNTED)
    shown = render_plan(Preview("coach", "coach.yaml", file.experiment, plan, known))
    assert "On `a100-large`: variant 1: gradient checkpointing off: fits without" in shown
    assert "On `a100-large`: variant 2: attention by `kernels-community/flash-attn2`" in shown


def test_rows_at_once_are_numbers_in_the_request() -> None:
    text = ROOMY.replace("a10g-large", "a100-large").replace("epochs: 3", "epochs: 3\n  batch_size: auto")
    plan = plan_of(swept("grid: {lora.r: [16, 64]}", text))
    job, here = (
        [one["train"] for one in make_run_json(plan, plan.stages[0], 1, {}, output)["sweep"]["variants"]]
        for output in ({"repo": "acme/x"}, {"path": "x"})
    )
    assert {(one["batch_size"], one["gradient_accumulation"]) for one in job} == {(2, 4)}
    assert {(one["batch_size"], one["gradient_accumulation"]) for one in here} == {(1, 8)}


def test_variants_share_the_gpus_each_by_its_method() -> None:
    text = swept("grid: {method: [qlora, lora]}", ROOMY.replace("a10g-large", "l4x4"))
    plan = plan_of(text)
    request = make_run_json(plan, plan.stages[0], 1, {}, {"repo": "acme/x"}, **plan.stages[0].parallel.request())
    assert [(one["processes"], one["sharded"]) for one in request["sweep"]["variants"]] == [(4, False), (4, True)]
    assert Parallel(4).at_most(2) == Parallel(2) and Parallel(lanes=4).at_most(2) == Parallel(lanes=2)


@pytest.mark.parametrize("dies", [False, True])
def test_a_sweep_is_one_job_however_its_run_goes(dies: bool) -> None:
    """The controller submits one training with all variants in its request, and the stages after it as ever."""
    plan = plan_of(GRID)
    sim = start(faults=Faults(node_lost=1.0) if dies else None)
    one_tick(sim, plans=(plan,))
    (training,) = sim.job_list
    request = json.loads(sim.files("acme/coach-12b-adapter")[f"{training.folder}/run.json"])
    assert [one["words"] for one in request["sweep"]["variants"]] == [one.words for one in plan.stages[0].variants]
    assert request["sweep"]["timeout_s"] == plan.stages[0].timeout_s == training.spec.timeout_s
    verdict = run_until_closed(sim, plan=plan)
    check(sim)
    assert verdict == ("failed" if dies else "done")
    assert len(sim.trainings("train")) == (3 if dies else 1) and len(sim.trainings("merge")) == (0 if dies else 1)


def test_the_finish_tag_keeps_who_won() -> None:
    rows = [{"variant": 1, "words": "lora.r 8"}, {"variant": 2, "words": "lora.r 16", "winner": True}]
    seen = Seen({StageName.TRAIN: StageView(manifest={"sweep": rows})})
    assert make_summary(plan_of(GRID), seen)["winner"] == "variant 2: lora.r 16"
    assert "winner" not in make_summary(plan_of(ROOMY), seen)
    assert make_summary(plan_of(GRID), Seen({StageName.TRAIN: StageView(manifest={"sweep": "x"})}))["winner"] == ""


# Live


def log(*events: dict[str, Any]) -> str:
    return "".join(f"MERGETUNE {json.dumps({'time': 1000.0 + n, **event})}\n" for n, event in enumerate(events))


def step(variant: int, number: int, loss: object, total: int = 10) -> dict[str, Any]:
    return {"event": "step", "step": number, "total": total, "loss": loss, "variant": variant, "variants": 3}


def live(*events: dict[str, Any]) -> Live:
    return read_live(StageName.TRAIN, log(*events))


def test_a_live_sweep_shows_the_variant_that_began_last() -> None:
    began = {"event": "phase", "name": "train", "variant": 2, "variants": 3}
    seen = live(step(1, 9, 1.5), step(1, 10, 1.4), began, step(2, 1, 2.0), step(1, 10, 9.9), step(2, 5, 1.9))
    assert [(point.step, point.loss) for point in seen.points] == [(1, 2.0), (5, 1.9)]
    assert status_line(seen.progress).startswith("train: train · variant 2 of 3 (50 % of the sweep) · step 5/10")
    assert (seen.as_dict()["variant"], seen.as_dict()["variants"]) == (2, 3)
    ended = live(step(3, 10, 1.0), {"event": "phase", "name": "save"})
    assert "variant" not in status_line(ended.progress)


def test_a_variant_gone_wrong_is_no_reason_to_stop_the_job() -> None:
    nan = [step(1, number, "nan") for number in range(1, 9)]
    assert find_waste(live(*nan), 1010.0, 600.0, 2e-4) is None
    alone = [{key: value for key, value in event.items() if not key.startswith("variant")} for event in nan]
    assert find_waste(live(*alone), 1010.0, 600.0, 2e-4) is not None
    beats = [{"event": "heartbeat", "gpu_busy": 0.0, "time": 1000.0 + 60 * n} for n in range(12)]
    idle = find_waste(live(step(1, 1, 2.0), *beats), 1700.0, 600.0)
    assert idle is not None and "the GPU did nothing" in idle.why
    rising = [step(2, number, 1.0 + number) for number in range(1, 30)]
    assert "train.learning_rate" not in notes(live(*rising), 2e-4)[0]


@pytest.mark.parametrize("wrong", [None, "2", 0, -1, 4, True, [2]])
def test_a_custom_scripts_own_word_is_no_variant(wrong: object) -> None:
    seen = live({**step(1, 1, 2.0), "variant": wrong})
    assert seen.progress.variant in (0, 1)


def test_the_pace_of_a_sweep_counts_all_variants() -> None:
    pace = read_pace(log(step(1, 1, 2.0), step(1, 10, 1.5), step(2, 5, 1.9)))
    assert pace and (pace.done, pace.total) == (15, 30)


@pytest.mark.parametrize(
    "name", ["gpu-full-in-the-logits", "data-worker-killed", "device-side-assert", "hub-in-trouble"]
)
def test_a_log_of_variants_is_diagnosed_as_that_of_one(name: str) -> None:
    """Two variants end as the one of the fixture did, and then the sweep, which has no better cause."""
    alone = (ROOT / f"tests/logs/{name}.log").read_text(encoding="utf-8")
    both = "".join(
        log({"event": "phase", "name": "start variant", "variant": number, "variants": 2})
        + f"{alone}\n"
        + log({"event": "variant", "state": "failed", "variant": number, "variants": 2})
        + log({"event": "warning", "message": f"variant {number} (`lora.r 8`) failed: {alone.splitlines()[-1]}"})
        for number in (1, 2)
    )
    whole = f"{both}no variant was trained; variant 1 (`lora.r 8`) failed: {alone.splitlines()[-1]}\n"
    assert diagnose(whole).id == diagnose(alone).id != ""


def test_a_sweep_that_lost_variants_corrects_no_estimate() -> None:
    manifest = {"predicted": {"flavor": "a10g-large", "duration_s": 900.0}, "duration_s": 500.0, "stage": "train"}
    assert finished_run({**manifest, "sweep": [{"state": "trained"}]}) is not None
    for rows in ([{"state": "trained"}, {"state": "failed"}], [{}], ["x"]):
        assert finished_run({**manifest, "sweep": rows}) is None
    assert replace(Parallel(), lanes=2).words == ""
