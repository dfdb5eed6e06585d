"""Where a failure of a rehearsal is shown: messages as the stages wrote them, against one experiment."""

import pytest

from pipeline.errors import UserError
from pipeline.loader import parse_experiment
from pipeline.rehearsal_place import placed

TEXT = """\
name: x
hypothesis: y
base: {model: acme/x}
data:
  dataset: data.jsonl
  eval: {dataset: held-out.jsonl}
train:
  method: lora
  learning_rate: 1e-4
  sft:
    lr_scheduler_type: cosine_with_min_lr
    max_grad_norm: 1.0
    optim: lomo
  lora: {targets: [qq]}
  flavor: t4-small
  timeout: 1h
merge: {timeout: 10m}
gguf:
  timeout: 10m
  quants:
    - Q8_0
    - Q4_K_M
evaluate: {timeout: 10m}
output: {repo: acme/x}
budget: {max_usd: 1}
"""
LOG = "the whole log: `log.txt`"


def line_of(message: str, stage: str | None) -> str:
    """The line of TEXT that a failure is shown at."""
    error = placed(UserError(message, LOG), parse_experiment(TEXT), stage)
    return TEXT.splitlines()[error.at.line - 1].strip() if error.at else ""


@pytest.mark.parametrize(
    ("stage", "message", "line"),
    [
        ("train", "train: `train.sft`: cosine_with_min_lr is not valid", "lr_scheduler_type: cosine_with_min_lr"),
        ("train", "train: `train.sft.max_grad_norm` is not a field", "max_grad_norm: 1.0"),
        ("train", "train: `train.lora.targets`: Target modules {'qq'} not found", "lora: {targets: [qq]}"),
        ("train", "train: use a lower `learning_rate`", "learning_rate: 1e-4"),
        (
            "train",
            "train failed with exit code 1: ValueError: One of min_lr or min_lr_rate should be set through the "
            "`lr_scheduler_kwargs`",
            "lr_scheduler_type: cosine_with_min_lr",
        ),
        (
            "train",
            "train failed with exit code 1: ImportError: You need to install `lomo_optim` in order to use LOMO "
            "optimizers. Install it with `pip install lomo-optim`",
            "optim: lomo",
        ),
        ("train", "train failed with exit code 1: RuntimeError: no", "sft:"),
        ("train", "train failed with exit code 1: OSError: no lora adapter fits", "sft:"),
        ("train", "train: data.jsonl:3: not JSON", "dataset: data.jsonl"),
        ("train", "train: held-out.jsonl:1: not JSON", "eval: {dataset: held-out.jsonl}"),
        ("train", "train: data.jsonl:1: the base's chat template refuses this row: no", "dataset: data.jsonl"),
        ("merge", "merge was killed (out of memory?)", "merge: {timeout: 10m}"),
        ("gguf", "gguf: the chat template of `artifact` fails: no", "base: {model: acme/x}"),
        (
            "gguf",
            "gguf: convert_hf_to_gguf.py failed with exit code 1: NotImplementedError: BPE pre-tokenizer was not "
            "recognized - update get_vocab_base_pre()",
            "base: {model: acme/x}",
        ),
        ("gguf", "gguf: `x-Q4_K_M.gguf` failed the check `types`", "- Q4_K_M"),
        ("gguf", "gguf: `model-bf16.gguf` failed the check `tensors`", "gguf:"),
        ("evaluate", "evaluate: nothing to evaluate: no prompts", "evaluate: {timeout: 10m}"),
        ("twin", "the twin cannot be built: KeyError: 'hidden'", "base: {model: acme/x}"),
        (None, "`data.jsonl` cannot be read: no", "dataset: data.jsonl"),
        (None, "something else", ""),
    ],
)
def test_a_failure_finds_its_line(stage: str | None, message: str, line: str) -> None:
    assert line_of(message, stage) == line


def test_a_failure_that_nobody_foresaw_names_the_value_to_change() -> None:
    error = placed(UserError("train failed with exit code 1: LOMO", LOG), parse_experiment(TEXT), "train")
    assert error.hint == f"change `train.sft.optim: lomo`; {LOG}"
    known = placed(UserError("train: LOMO", "use another"), parse_experiment(TEXT), "train")
    assert (known.hint, known.exit_code) == ("use another", 1)
