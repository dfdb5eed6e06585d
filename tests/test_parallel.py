"""Several GPUs: who holds what, what each needs, how long it takes, and what the plan and run.json say of it."""

from dataclasses import replace

import pytest
from examples import GOOD, changed

from pipeline.cost import (
    BAND,
    CORRECTED_BAND,
    LINK_GB_PER_S,
    LINK_REACHED,
    NODES_GB_PER_S,
    SEVERAL,
    SEVERAL_BAND,
    estimate_cost,
    estimate_train_seconds,
    finished_run,
)
from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.errors import InvalidExperiment
from pipeline.facts import Facts
from pipeline.fit import cheapest_flavor, largest_max_length
from pipeline.flavors import FLAVORS
from pipeline.host_memory import CUDA_HOST_GIB, LIBRARIES_GIB, ram_gib, weights_gb
from pipeline.loader import parse_experiment
from pipeline.memory import GIB, MemorySpec, estimate_need, spec_of
from pipeline.models import CATALOGUE
from pipeline.parallel import ALONE, SHARDED_BAND, Parallel, Sharing, estimate_memory, parallel_of, sharded_need
from pipeline.plan import make_plan
from pipeline.plan_changes import plan_hash
from pipeline.plan_preview import Preview, plan_as_dict, render_plan
from pipeline.plan_sections import stages_section

GEMMA, QWEN = CATALOGUE["google/gemma-3-12b-it"], CATALOGUE["Qwen/Qwen3-14B"]
LORA = changed("method: qlora", "method: lora")
FULL = changed("^merge: .*\n", "", changed("  lora: .*\n", "", changed("method: qlora", "method: full")))
NODES = changed("flavor: a10g-large", "nodes: 2\n  flavor: a10g-large", GOOD)
ROWS = DatasetFacts("rows.jsonl", 1000, 1000, "messages", is_chat=True, tokens=TokenFacts(1000, 10**6, 10**6, 1000))


def on(flavor: str, text: str = GOOD):
    """The experiment on another flavor."""
    return parse_experiment(changed("flavor: a10g-large", f"flavor: {flavor}", text)).experiment


@pytest.mark.parametrize(
    ("text", "flavor", "expected"),
    [
        (GOOD, "a10g-large", ALONE),
        (GOOD, "a10g-largex2", Parallel(2, Sharing.COPIES)),
        (GOOD, "cpu-xl", ALONE),
        (LORA, "a100x4", Parallel(4, Sharing.COPIES)),  # 12 B in bf16 fit one A100, and no L4
        (LORA, "l4x4", Parallel(4, Sharing.PARTS)),
        (FULL, "a100-large", ALONE),
        (FULL, "a100x8", Parallel(8, Sharing.PARTS)),
        (NODES, "a10g-large", Parallel(2, Sharing.COPIES, 2)),
        (NODES, "cpu-xl", Parallel(2, Sharing.COPIES, 2)),
        (changed("method: qlora", "method: lora", NODES), "l4x4", Parallel(8, Sharing.PARTS, 2)),
        (changed("  learning_rate: 2e-4", "  learning_rate: 2e-4\n  script: my/train.py"), "l4x4", ALONE),
    ],
)
def test_who_holds_what(text: str, flavor: str, expected: Parallel) -> None:
    assert parallel_of(on(flavor, text), GEMMA) == expected
    if text is GOOD:
        assert parallel_of(on(flavor), None) == expected


def test_run_json_asks_for_processes_only_where_there_are_several() -> None:
    assert ALONE.request() == {}
    assert Parallel(2, Sharing.COPIES).request() == {"processes": 2, "sharded": False}
    assert Parallel(8, Sharing.PARTS).request() == {"processes": 8, "sharded": True}


def test_parts_of_a_sharded_model_by_hand() -> None:
    """Qwen 3 14 B, all of it learning on 8 GPUs, AdamW with moments in bf16."""
    spec = replace(spec_of(on("a100x8", FULL), QWEN), gpus=8)
    whole, found = estimate_need(replace(spec, gpus=1), QWEN), sharded_need(spec, QWEN)
    layer = 2 * (5120 * (2 * 5120 + 2 * 1024) + 3 * 5120 * 17408)
    head = 2 * 151936 * 5120
    assert found.weights * GIB == pytest.approx(2 * QWEN.parameters / 8 + 2 * layer + head)
    assert found.adapter * GIB == pytest.approx(2 * QWEN.parameters / 8 + 2 * (layer + head))
    assert found.optimizer * GIB == pytest.approx(4 * QWEN.parameters / 8)
    assert (found.activations, found.head, found.context) == (whole.activations, whole.head, whole.context)
    assert found.band == SHARDED_BAND


def test_more_gpus_need_less_of_each_and_copies_need_more() -> None:
    totals = [estimate_memory(on(name, FULL), QWEN).total for name in ("a100-large", "a100x4", "a100x8")]
    assert totals == sorted(totals, reverse=True)
    assert estimate_memory(on("a10g-largex2"), GEMMA).adapter == 1.5 * estimate_memory(on("a10g-large"), GEMMA).adapter


def test_the_cheapest_flavor_may_have_several_gpus() -> None:
    large = CATALOGUE["google/gemma-3-27b-it"]
    found = cheapest_flavor(on("a100-large", FULL), large)
    assert found is not None and found.gpus > 1
    assert estimate_memory(on(found.name, FULL), large).fits(found)
    odd = changed("max_length: 2048", "max_length: 2048\n  gradient_accumulation: 3", FULL)
    assert cheapest_flavor(on("a100-large", odd), large) is None


def test_the_longest_row_of_a_sharded_training() -> None:
    length = largest_max_length(on("a100x8", FULL), GEMMA, FLAVORS["a100x8"])
    assert length is not None
    longer = changed("max_length: 2048", f"max_length: {length + 64}", FULL)
    assert estimate_memory(on("a100x8", longer), GEMMA).fits(FLAVORS["a100x8"]) is not True


def test_sharded_layers_travel() -> None:
    """On PCIe the weights of a full fine-tune take longer to travel than to compute with; over NVLink they do not."""
    short = replace(ROWS, tokens=TokenFacts(1000, 10**5, 10**5, 100))
    text = changed("max_length: 2048", "max_length: 128", FULL)

    def seconds(flavor: str) -> float:
        return estimate_train_seconds(on(flavor, text), GEMMA, short, FLAVORS[flavor])

    sent = 3 * 2 * GEMMA.parameters * 3 / 4 / (LINK_GB_PER_S["L4"] * 1e9 * LINK_REACHED)
    batches = 1000 * on("l4x4", text).train.epochs
    assert seconds("l4x4") == pytest.approx(batches * sent / (4 * SEVERAL))
    long = changed("max_length: 2048", "max_length: 2048", FULL)
    one, four = (
        estimate_train_seconds(on(name, long), GEMMA, ROWS, FLAVORS[name]) for name in ("a100-large", "a100x4")
    )
    assert four == pytest.approx(one / (4 * SEVERAL))


def test_several_gpus_are_less_certain_until_runs_correct_them() -> None:
    flavor, two = FLAVORS["a10g-largex2"], Parallel(2, Sharing.COPIES)
    assert estimate_cost(60, 3600, flavor, parallel=two).band == SEVERAL_BAND > BAND
    assert estimate_cost(60, 3600, flavor, corrected=True, parallel=two).band == CORRECTED_BAND
    manifest = {"stage": "train", "duration_s": 900.0, "predicted": {"flavor": flavor.name, "duration_s": 720}}
    run = finished_run(manifest)
    assert run is not None and run.gpu == "2x A10G"


@pytest.mark.parametrize(
    ("text", "flavor", "tensors"),
    [(LORA, "a100x4", 4), (FULL, "a100x8", 1), (LORA, "l4x4", 1), (FULL, "a100-large", 1)],
)
def test_host_memory_of_several_processes(text: str, flavor: str, tensors: int) -> None:
    gpus = FLAVORS[flavor].gpus
    libraries = LIBRARIES_GIB["train"] * (gpus + (gpus > 1)) + CUDA_HOST_GIB * gpus
    expected = libraries + tensors * weights_gb(GEMMA) * 1e9 / GIB
    assert ram_gib("train", on(flavor, text), GEMMA, on_gpu=True).least == pytest.approx(expected)


def test_the_plan_says_what_the_gpus_do() -> None:
    experiment = on("a10g-largex2")
    facts = Facts(shape=GEMMA)
    preview = Preview("coach", "experiments/coach.yaml", experiment, make_plan(experiment, facts), facts)
    plan = preview.plan
    assert plan is not None and plan.stages[0].parallel == Parallel(2, Sharing.COPIES)
    text = render_plan(preview)
    assert "of 22.06 GiB on each of 2 GPUs (DDP)." in text
    said = "2 GPUs share each step (DDP: each holds all of the model), 4 of its 8 batches of 1 row for each: "
    assert said + "one GPU would learn the same." in text
    assert "of 22.06 GiB on each of 2 GPUs (DDP) |" in stages_section(preview)
    train = plan_as_dict(preview)["stages"][0]
    assert (train["gpus"], train["sharing"]) == (2, "DDP")
    assert plan.stages[0].cost.worst_usd == pytest.approx(4 * 3.00)


def test_the_fingerprint_does_not_depend_on_the_gpus() -> None:
    plans = [make_plan(on(flavor), Facts(shape=GEMMA)) for flavor in ("a10g-large", "a10g-largex2", "a100x8")]
    assert len({plan.run_id for plan in plans}) == 1


def test_a_copy_needs_what_one_gpu_needs_and_buckets() -> None:
    spec = MemorySpec(seq=2048, gpus=4)
    assert estimate_need(spec, GEMMA).total > estimate_need(replace(spec, gpus=1), GEMMA).total


# Several machines.


def test_run_json_and_words_of_several_nodes() -> None:
    sixteen, two = Parallel(16, Sharing.PARTS, 2), Parallel(2, Sharing.COPIES, 2)
    assert sixteen.request() == {"processes": 16, "sharded": True, "nodes": 2}
    assert (sixteen.per_node, two.per_node) == (8, 1)
    assert sixteen.words == " on each of 2 nodes × 8 GPUs (FSDP2)"
    assert two.words == " on each of 2 nodes × 1 GPU (DDP)"


def test_nodes_are_paid_for_and_memory_is_that_of_one_gpu() -> None:
    one, two = (make_plan(on("a100x8", text), Facts(shape=GEMMA, dataset=ROWS)) for text in (GOOD, NODES))
    assert two.stages[0].cost.worst_usd == pytest.approx(2 * one.stages[0].cost.worst_usd) == pytest.approx(160)
    minutes = -(-two.stages[0].cost.expected_s // 60)
    assert two.stages[0].cost.expected_usd == pytest.approx(2 * minutes * 20 / 60)
    assert two.stages[0].cost.expected_s < one.stages[0].cost.expected_s
    full = changed("flavor: a10g-large", "nodes: 2\n  flavor: a10g-large", FULL)
    needs = [estimate_memory(on("a100x8", text), QWEN).total for text in (FULL, full)]
    assert needs[1] < needs[0]
    assert ram_gib("train", on("a100x8", NODES), GEMMA, True) == ram_gib("train", on("a100x8"), GEMMA, True)


def test_sharded_layers_of_two_nodes_travel_by_the_network() -> None:
    short = replace(ROWS, tokens=TokenFacts(1000, 10**5, 10**5, 100))
    text = changed("max_length: 2048", "max_length: 128", FULL)
    text = changed("flavor: a10g-large", "nodes: 2\n  flavor: a10g-large", text)
    sent = 3 * 2 * GEMMA.parameters * 15 / 16 / (NODES_GB_PER_S * 1e9)
    found = estimate_train_seconds(on("a100x8", text), GEMMA, short, FLAVORS["a100x8"])
    assert found == pytest.approx(1000 * 3 * sent / (16 * SEVERAL))


def test_a_finished_run_on_nodes_corrects_only_such_runs() -> None:
    predicted = {"flavor": "a100x8", "duration_s": 720, "nodes": 2}
    run = finished_run({"stage": "train", "duration_s": 900.0, "predicted": predicted})
    assert run is not None and run.gpu == "2 nodes of 8x A100"


def test_nodes_decide_no_result_but_what_a_reviewer_approves() -> None:
    one, two = (make_plan(on("a100x8", text), Facts(shape=GEMMA)) for text in (GOOD, NODES))
    assert one.run_id == two.run_id
    assert plan_hash(one) != plan_hash(two)
    assert "nodes" not in one.experiment.resolved()["train"]
    assert two.experiment.resolved()["train"]["nodes"] == 2


def test_the_plan_says_what_the_nodes_do_and_cost() -> None:
    experiment = on("a100x8", changed("nodes: 2", "nodes: 2\n  gradient_accumulation: 32", NODES))
    facts = Facts(shape=GEMMA)
    preview = Preview("coach", "experiments/coach.yaml", experiment, make_plan(experiment, facts), facts)
    text = render_plan(preview)
    assert "on each of 2 nodes × 8 GPUs (DDP)." in text
    assert "2 nodes × 8 GPUs (DDP), $40.00/h: a job each, one attempt together. 16 GPUs share each step" in text
    assert "| 2 × `a100x8` |" in text
    assert "| 2 × `a100x8` |" in stages_section(preview)
    assert plan_as_dict(preview)["stages"][0]["nodes"] == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("nodes: 9", "8"),
        ("nodes: 0", "1"),
        ("nodes: 2\n  script: my/train.py", "a custom script has one job"),
        ("nodes: 2\n  backend: mlx", "MLX trains on one Mac"),
    ],
)
def test_nodes_that_cannot_be(lines: str, message: str) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        parse_experiment(changed("  learning_rate: 2e-4", f"  learning_rate: 2e-4\n  {lines}"))
    assert message in str([finding.message for finding in caught.value.findings])
