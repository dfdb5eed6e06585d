"""`train.dpo`: what preference tuning may be told, what it may not, and what of it enters the fingerprint."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from examples import GOOD, MAC, changed
from rule_cases import ROOT, place

from pipeline.errors import InvalidExperiment
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.plan import make_plan
from pipeline.train_sections import DPO_RATE, DpoLoss

PAIRS = changed("learning_rate: 2e-4", "learning_rate: 5e-6", changed("method: qlora", "method: dpo"))


def with_dpo(line: str) -> str:
    return changed("^  learning_rate: 5e-6$", f"  learning_rate: 5e-6\n  {line}", PAIRS)


def experiment(text: str) -> Experiment:
    return parse_experiment(text).experiment


@pytest.mark.parametrize(
    ("text", "words", "message", "hint"),
    [
        (changed("^  learning_rate: .*\n", "", PAIRS), "method: dpo", "has no default `learning_rate`", DPO_RATE),
        (with_dpo("loss_on: assistant"), "assistant", "`loss_on` means nothing to `method: dpo`", "remove `loss_on`"),
        (with_dpo("packing: true"), "true", "`packing` means nothing to `method: dpo`", "remove `packing`"),
        (with_dpo("packing: false"), "false", "`packing` means nothing to `method: dpo`", "remove `packing`"),
        (with_dpo("dpo: {loss: sigmoidal}"), "sigmoidal", "`train.dpo.loss` is `sigmoidal`", "`sigmoid`"),
        (with_dpo("dpo: {bta: 0.1}"), "bta", "unknown key `train.dpo.bta`", "did you mean `beta`?"),
        (with_dpo("dpo: {beta: 0}"), "0}\n  lora", "greater than 0", "How strongly"),
        (with_dpo("dpo: {loss: exo_pair}"), "exo_pair", "needs `label_smoothing` above 0", "label_smoothing: 0.001"),
        (with_dpo("sft: {beta: 0.2}"), "0.2", "is decided by `train.dpo.beta`", "write `beta: 0.2` under `train.dpo`"),
        (with_dpo("sft: {loss_type: ipo}"), "ipo", "is decided by `train.dpo.loss`", "write `loss: ipo`"),
        (changed("2e-4$", "2e-4\n  dpo: {beta: 0.2}"), "{beta", "`dpo` is read by `method: dpo` alone", "remove `dpo`"),
    ],
)
def test_what_is_refused(text: str, words: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        parse_experiment(text)
    (finding,) = caught.value.findings
    assert message in finding.message
    assert hint in finding.hint
    assert finding.at.line == place(text, words)[0]


def test_what_a_script_is_told() -> None:
    told = experiment(PAIRS).resolved()["train"]
    assert told["dpo"] == {"beta": 0.1, "loss": "sigmoid", "quantize": True}
    assert told["loss_on"] == "completion"
    assert told["lora"]["r"] == 64
    said = experiment(with_dpo("dpo: {loss: ipo, quantize: false}")).resolved()["train"]
    assert said["dpo"] == {"beta": 0.1, "loss": "ipo", "quantize": False}
    assert "dpo" not in experiment(GOOD).resolved()["train"]
    assert "dpo" not in experiment(MAC).resolved()["train"]


@pytest.mark.parametrize(
    ("text", "quantised"),
    [
        (PAIRS, True),
        (with_dpo("dpo: {quantize: false}"), False),
        (GOOD, True),
        (changed("method: qlora", "method: lora"), False),
    ],
)
def test_whether_the_base_has_4_bits(text: str, quantised: bool) -> None:
    assert experiment(text).train.quantised is quantised


def test_only_what_is_written_enters_the_fingerprint() -> None:
    def fingerprint(text: str) -> str:
        return make_plan(experiment(text), Facts()).fingerprint

    assert fingerprint(PAIRS) != fingerprint(GOOD)
    written = with_dpo("dpo: {beta: 0.1}")
    assert fingerprint(written) != fingerprint(PAIRS)  # as every default that is written
    assert fingerprint(written) == fingerprint(changed("beta: 0.1", "beta: 1e-1", written))
    assert fingerprint(changed("flavor: a10g-large", "flavor: l4x1", PAIRS)) == fingerprint(PAIRS)


def test_the_stages_are_those_of_an_adapter() -> None:
    plan = make_plan(experiment(PAIRS), Facts())
    assert [stage.name for stage in plan.stages] == ["train", "merge", "gguf", "evaluate"]
    assert plan.repos == ("acme/coach-12b-adapter", "acme/coach-12b", "acme/coach-12b-GGUF")


def installed_trl() -> Path:
    """Its source, to be read as text."""
    found = find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed here")
    return Path(found.origin).parent


def test_the_losses_are_those_of_the_installed_trainer() -> None:
    tree = ast.parse((installed_trl() / "trainer/dpo_trainer.py").read_text(encoding="utf-8"))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    known = [
        node.comparators[0].value
        for node in compared
        if isinstance(node.left, ast.Name)
        and node.left.id == "loss_type"
        and isinstance(node.comparators[0], ast.Constant)
    ]
    assert set(known) == set(DpoLoss)


def test_the_rate_of_the_hint_is_that_of_trls_example() -> None:
    text = (installed_trl() / "scripts/dpo.py").read_text(encoding="utf-8")
    lora = text.partition("# LoRA:")[2]
    assert float(DPO_RATE) == float(lora.partition("--learning_rate ")[2].split()[0])
    assert (ROOT / "docs/preference-tuning.md").read_text(encoding="utf-8").count(DPO_RATE) > 0
