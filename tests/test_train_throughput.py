"""benchmarks/train_throughput.py and longest_context.py: they run, and compare what they say they compare."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from repository import ROOT

from pipeline.models import CATALOGUE

sys.path.insert(0, str(ROOT / "benchmarks"))
import longest_context
import train_throughput

SILENT = train_throughput.told("no summary", 1.0, 2.0)
LLAMA = CATALOGUE["meta-llama/Llama-3.1-8B-Instruct"]


@pytest.mark.slow
def test_the_scripts_that_are_compared_train_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tiny_models import make_tiny

    scale = replace(train_throughput.CPU, rows=8, median=24)
    base, data = make_tiny(tmp_path / "base", "llama"), train_throughput.make_rows(tmp_path, scale)
    work = train_throughput.Work("llama", base, data, scale)
    before, after = (
        train_throughput.sop(work, tmp_path / "sop"),
        train_throughput.ours(work, tmp_path / "us", packing=True),
    )
    assert before.busy_s > 0 and before.cpu_s > before.busy_s / 2
    assert after.useful > 8 * 8
    halves = train_throughput.less(replace(after, cpu_s=9.0, useful=100), replace(after, cpu_s=5.0, useful=40))
    assert (halves.busy_s, halves.useful) == (4.0, 60)
    rows = {"the SOP's script": replace(before, busy_s=8.0), "ours, a row at a time": halves, "Axolotl": SILENT}
    train_throughput.print_rows(work, rows)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| llama | the SOP's script | 8 | 1.00 | 8.0 | ")
    assert printed[1].startswith("| llama | ours, a row at a time | 15 | 2.00 | 4.0 | ")
    assert printed[2] == "| llama | Axolotl | told no time | | | |"


def test_the_others_are_named_and_tell_their_time() -> None:
    named = Namespace(without_trl=False, axolotl=Path("python"))
    assert list(train_throughput.others(named)) == ["`trl sft`", "Axolotl"]
    assert train_throughput.others(Namespace(without_trl=True, axolotl=None)) == {}
    text = "100%|##| 2/2 [00:07<00:00]  {'train_runtime': '7.8', 'train_loss': '8.966'}"
    assert train_throughput.told(text, 1.5, 9.0) == train_throughput.Result(7.8, 1.5, 9.0)


def test_a_full_size_model_has_the_sizes_of_its_base() -> None:
    for family, name in train_throughput.BASES.items():
        shape, sizes = CATALOGUE[name], train_throughput.sizes_of(family, train_throughput.GPU)
        assert sizes["num_attention_heads"] * sizes["head_dim"] == shape.query
        assert sizes["num_key_value_heads"] * sizes["head_dim"] == shape.key_value


def test_the_longest_rows_are_the_last_that_fit() -> None:
    asked: list[int] = []

    def need(length: int) -> float:
        asked.append(length)
        return length / 1000

    assert longest_context.longest(need, 22.0) == 21 * 1024
    assert len(asked) < 12
    assert longest_context.longest(need, 0.5) == 0
    assert longest_context.longest(lambda _: 0.0, 1.0) == longest_context.LONGEST - longest_context.STEP


def test_measured_rows_count_fragmentation_and_the_context_of_cuda() -> None:
    text = longest_context.measured(
        "x", ("the SOP's script", "ours"), lambda who, n: n / (2000 if who == "ours" else 1000)
    )
    assert text.splitlines()[0] == "| x | the SOP's script | 20,480 (1.0x) | 75,776 (1.0x), measured |"
    assert text.splitlines()[1].startswith("| x | ours | 40,960 (2.0x) |")


def test_longer_rows_fit_than_in_the_sop() -> None:
    _, _, day, repaired, ours, offloaded = longest_context.predicted({"llama": LLAMA}).splitlines()
    assert day.startswith("| llama | the SOP's script in its day | ")
    assert ours.startswith("| llama | ours | ")
    assert "1.0x" in day and "1.0x" not in repaired
    assert "activation_offloading" in offloaded
