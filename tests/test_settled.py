"""What a plan chooses for its GPU: rows at once, checkpointing, attention; and that none of it is another run."""

from dataclasses import replace

import pytest
from examples import GOOD, changed

from pipeline.attention import FLASH
from pipeline.errors import InvalidExperiment
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.flavors import FLAVORS
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.parallel import estimate_memory
from pipeline.plan import make_plan
from pipeline.run_json import make_run_json
from pipeline.settled import settle

LLAMA, GEMMA = CATALOGUE["meta-llama/Llama-3.1-8B-Instruct"], CATALOGUE["google/gemma-3-12b-it"]
GPUS = [name for name, flavor in FLAVORS.items() if flavor.gpu]


def written(flavor: str = "a10g-large", *lines: str, length: int = 1024) -> Experiment:
    """The good experiment on a flavor, with more lines under `train`."""
    text = changed("max_length: 2048", "\n  ".join([f"max_length: {length}", *lines]))
    return parse_experiment(changed("a10g-large", flavor, text)).experiment


def test_checkpointing_is_off_where_all_layers_surely_fit() -> None:
    small, large = (settle(written(name, length=2048), GEMMA) for name in ("a10g-large", "a100-large"))
    assert (small.recomputes, large.recomputes) == (True, False)
    assert small.request() == {}
    assert large.request() == {"checkpointing": False}
    assert large.words == ("gradient checkpointing off: fits without (28.6 of 79.15 GiB)",)


@pytest.mark.parametrize("line", ["gradient_checkpointing: true", "activation_offloading: true"])
def test_what_the_file_says_wins(line: str) -> None:
    said = settle(written("h200", f"sft: {{{line}}}"), GEMMA)
    assert said.recomputes
    assert said.words == ()


@pytest.mark.parametrize("flavor", GPUS)
@pytest.mark.parametrize("length", [512, 4096, 32768])
@pytest.mark.parametrize("batch", ["1", "auto"])
def test_what_is_chosen_surely_fits_or_is_the_least_there_is(flavor: str, length: int, batch: str) -> None:
    experiment = written(flavor, f"batch_size: {batch}", "gradient_accumulation: 16", length=length)
    for shape in (LLAMA, GEMMA):
        chosen = settle(experiment, shape)
        assert chosen.batch * chosen.accumulation == 16  # a step sees the same rows on any flavor
        assert chosen.accumulation % FLAVORS[flavor].gpus == 0
        fits = estimate_memory(chosen.of(experiment), shape).fits(FLAVORS[flavor])
        assert fits is True or (chosen.batch == 1 and chosen.recomputes)


@pytest.mark.parametrize("flavor", ["l4x1", "a10g-large", "a100-large"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_what_is_chosen_fits_without_the_kernel_too(flavor: str, packing: str) -> None:
    """A job whose machine cannot have it goes on with a mask: that must not be what ends it."""
    lines = ("batch_size: auto", f"packing: {packing}", "gradient_accumulation: 16")
    experiment = written(flavor, *lines, length=2048)
    masked = written(flavor, *lines, "sft: {model_init_kwargs: {attn_implementation: sdpa}}", length=2048)
    for shape in (LLAMA, GEMMA):
        chosen = settle(experiment, shape)
        assert chosen.attention == FLASH
        sft = {**chosen.of(experiment).train.sft, **masked.train.sft}
        train = chosen.of(masked).train.model_copy(update={"sft": sft})
        assert estimate_memory(masked.model_copy(update={"train": train}), shape).fits(FLAVORS[flavor])


def test_auto_takes_more_rows_on_a_larger_gpu() -> None:
    lines = ("batch_size: auto", "gradient_accumulation: 32", "packing: false")
    found = {name: settle(written(name, *lines), LLAMA) for name in ("t4-small", "a10g-large", "h200")}
    assert {name: (s.batch, s.recomputes) for name, s in found.items()} == {
        "t4-small": (8, True),
        "a10g-large": (16, True),
        "h200": (16, False),
    }
    assert [s.attention for s in found.values()] == ["sdpa", FLASH, FLASH]
    assert found["t4-small"].words[-1] == "attention by `sdpa`: rows are padded to the longest"
    assert found["h200"].words[0] == "`batch_size: auto`: 16 rows at once, of the 32 rows of a step"


def test_auto_does_not_split_what_gpus_cannot_share() -> None:
    chosen = settle(written("l4x4", "batch_size: auto", "gradient_accumulation: 6"), LLAMA)
    assert (chosen.batch, chosen.accumulation) == (1, 6)  # MEM007 says what to write


def test_nothing_is_chosen_for_what_nobody_knows() -> None:
    auto = written("h200", "batch_size: auto")
    for experiment, shape in (
        (auto, None),
        (written("cpu-xl", "batch_size: auto"), GEMMA),
        (written("h200", "batch_size: auto", "script: my/train.py"), GEMMA),
    ):
        chosen = settle(experiment, shape)
        assert (chosen.batch, chosen.accumulation, chosen.recomputes, chosen.words) == (1, 8, True, ())
    assert settle(auto, replace(GEMMA, experts=8)).recomputes  # what experts keep depends on the tokens they get


def test_packed_rows_ask_for_a_flash_kernel() -> None:
    packed = settle(written("l4x1", "packing: true", length=4096), LLAMA)
    assert packed.request() == {"attention": FLASH}
    assert packed.words == (f"attention by `{FLASH}`: packed rows are kept apart",)
    old = settle(written("t4-small", "packing: true"), LLAMA)
    assert old.request() == {}
    assert old.words == ("attention by `sdpa`: packed rows are kept apart by a mask",)
    said = written("l4x1", "packing: true", "sft: {model_init_kwargs: {attn_implementation: sdpa}}")
    assert "attention" not in settle(said, LLAMA).request()
    assert "attention" not in settle(written("l4x1", "packing: true"), replace(LLAMA, model_type="olmo2")).request()


def test_a_mask_over_a_whole_pack_is_paid_for() -> None:
    lines = ("packing: true", "batch_size: 4")
    with_kernel, with_mask = (
        estimate_memory(written(name, *lines, length=4096), LLAMA) for name in ("a10g-large", "t4-small")
    )
    assert with_mask.activations - with_kernel.activations > 4 * (4 * 4096) ** 2 / 2**30


def test_the_same_run_whatever_is_chosen() -> None:
    plans = [
        make_plan(written(name, "batch_size: auto", "gradient_accumulation: 16"), Facts(shape=LLAMA))
        for name in ("t4-small", "h200")
    ]
    assert plans[0].fingerprint == plans[1].fingerprint
    number = make_plan(written("h200", "batch_size: 1", "gradient_accumulation: 16"), Facts(shape=LLAMA))
    assert number.fingerprint != plans[1].fingerprint  # what the file says


def test_a_job_is_told_numbers_and_another_machine_one_row() -> None:
    plan = make_plan(written("h200", "batch_size: auto", "gradient_accumulation: 16"), Facts(shape=LLAMA))
    stage = plan.stages[0]
    job = make_run_json(plan, stage, 1, {}, {"repo": "acme/x"}, **stage.request())
    assert (job["experiment"]["train"]["batch_size"], job["experiment"]["train"]["gradient_accumulation"]) == (16, 1)
    assert (job["checkpointing"], job["attention"]) == (False, FLASH)
    here = make_run_json(plan, stage, 1, {}, {"path": "out"})["experiment"]["train"]
    assert (here["batch_size"], here["gradient_accumulation"]) == (1, 16)
    assert "gradient_checkpointing" not in here["sft"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "greater than 0"),
        ("many", "is no number of rows"),
        ("1.5", "integer"),
        ("[1]", "integer"),
        ("08", "octal"),
    ],
)
def test_what_is_no_batch_size(value: str, said: str) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        written("h200", f"batch_size: {value}")
    assert said in str(caught.value)


def test_auto_is_written_plainly_and_kept() -> None:
    assert parse_experiment(changed("max_length: 2048", "batch_size: auto")).experiment.train.batch_size == "auto"
    assert "batch_size" not in GOOD
