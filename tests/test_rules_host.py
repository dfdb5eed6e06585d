"""Rules about disk, RAM and the GPU of evaluating: each passes a good experiment and fails a bad one."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run, with_script

from pipeline.errors import Severity
from pipeline.models import CATALOGUE, ModelShape
from pipeline.rules.host import disk_suffices, evaluation_fits, ram_suffices

RULES = (disk_suffices, ram_suffices, evaluation_fits)
SMALL = CATALOGUE["Qwen/Qwen3-4B"]
MERGE, GGUF, EVALUATE = "^merge: .*$", "^gguf: .*$", "^evaluate: .*$"
CHEAP = changed(MERGE, "merge: {flavor: cpu-upgrade, timeout: 1h}")
CHEAP = changed(EVALUATE, "evaluate: {max_new_tokens: 100}", changed(GGUF, "gguf: {quants: [Q4_K_M, Q8_0]}", CHEAP))


def roomy(flavor: str = "l4x1", text: str = GOOD) -> str:
    """The good experiment of 12 B parameters with stages after training on a machine with room."""
    text = changed(MERGE, f"merge: {{flavor: {flavor}, timeout: 1h}}", text)
    text = changed(GGUF, f"gguf: {{flavor: {flavor}, quants: [Q4_K_M, Q8_0]}}", text)
    return changed(EVALUATE, "evaluate: {flavor: l40sx1, max_new_tokens: 100}", text)


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule, shape=SMALL) is None
    assert run(rule, roomy()) is None
    assert run(rule, roomy("cpu-xl")) is None
    assert run(rule, shape=None) is None


@pytest.mark.parametrize("rule", RULES)
def test_unknown_flavors_are_for_another_rule(rule) -> None:
    assert run(rule, changed("a10g-large", "a10-huge", roomy("cpu-huge"))) is None


def test_twelve_billion_do_not_fit_the_disk_of_cpu_upgrade() -> None:
    finding = run(disk_suffices, CHEAP)
    expect(finding, "`merge` needs 50.8 GB of disk, `cpu-upgrade` has 50", "`merge.flavor: t4-medium`", (16, 17))
    assert finding is not None
    assert "`gguf` needs 67.4 GB of disk, `cpu-upgrade` has 50" in finding.message
    assert "`gguf.flavor: t4-medium`" in finding.hint
    assert "`evaluate.flavor: cpu-xl`" in finding.hint
    assert finding.severity is Severity.ERROR


def test_the_hints_flavor_passes() -> None:
    text = changed(MERGE, "merge: {flavor: t4-medium, timeout: 1h}")
    text = changed(GGUF, "gguf: {flavor: t4-medium, quants: [Q4_K_M, Q8_0]}", text)
    assert run(disk_suffices, changed(EVALUATE, "evaluate: {flavor: cpu-xl}", text)) is None


def test_what_packages_may_fill_is_a_warning() -> None:
    eleven = ModelShape("llama", 46, 3840, 15360, 4096, 2048, 262208, True)
    text = changed(GGUF + "\n", "", changed(EVALUATE + "\n", "", CHEAP))
    finding = run(disk_suffices, text, shape=eleven)
    expect(finding, "`merge` may need", "write `merge.flavor: t4-medium`", place(text, "cpu-upgrade"))
    assert finding is not None
    assert finding.severity is Severity.WARNING


def test_disk_of_training_all_weights() -> None:
    text = changed("^  lora: .*\n", "", changed(MERGE + "\n", "", changed("method: qlora", "method: full")))
    text = changed("flavor: a10g-large", "flavor: rtx-pro-6000", text)
    finding = run(disk_suffices, text, shape=CATALOGUE["google/gemma-3-27b-it"])
    expect(
        finding,
        "`train` needs 769.5 GB of disk, `rtx-pro-6000` has 475",
        "write `method: lora`",
        place(text, "rtx-pro-6000"),
    )


@pytest.mark.parametrize(
    ("stage", "line", "shape", "message", "hint"),
    [
        (
            EVALUATE,
            "evaluate: {flavor: cpu-basic}",
            CATALOGUE["google/gemma-3-12b-it"],
            "`evaluate` needs 23.5 GiB of RAM, `cpu-basic` has 16",
            "write `evaluate.flavor: cpu-xl`",
        ),
        (
            GGUF,
            "gguf: {flavor: t4-small, quants: [Q8_0]}",
            ModelShape("llama", 4, 8192, 8192, 8192, 1024, 262144, True),
            "`gguf` needs 16.3 GiB of RAM, `t4-small` has 15",
            "write `gguf.flavor: cpu-upgrade`",
        ),
    ],
)
def test_ram(stage: str, line: str, shape: ModelShape, message: str, hint: str) -> None:
    text = changed(stage, line, roomy())
    flavor = line.split("flavor: ")[1].split("}")[0].split(",")[0]
    expect(run(ram_suffices, text, shape=shape), message, hint, place(text, flavor))


def test_evaluating_in_16_bits_needs_more_than_training_in_4() -> None:
    text = changed(EVALUATE, "evaluate: {flavor: a10g-small}", roomy())
    finding = run(evaluation_fits, text)
    message = "`evaluate` needs 23.2 GiB of GPU memory, `a10g-small` has 22.06"
    expect(finding, message, "write `evaluate.flavor: l40sx1`", place(text, "a10g-small"))


def test_a_custom_script_is_not_judged() -> None:
    text = with_script(changed("flavor: a10g-large", "flavor: t4-small", roomy()))
    assert run(disk_suffices, text, shape=ModelShape("llama", 90, 8192, 28672, 8192, 1024, 128256, False)) is not None
    assert run(ram_suffices, changed(EVALUATE, "", text)) is None
