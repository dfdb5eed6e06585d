"""Token counts without torch are those of transformers and of the training script, row by row."""

import builtins
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat_template import FILES
from pipeline.rows import DataRow, check_row
from pipeline.tokens import Counted, ExactCounter, RoughCounter, make_counter

EXAMPLES = Path(__file__).resolve().parents[1] / "experiments/examples"
BASE = EXAMPLES / "tiny-docs-llama"
DATA = EXAMPLES / "data/quickstart-train.jsonl"
NOW = datetime(2026, 11, 22)
LOSSES = ("assistant", "completion", "all")


def files_of(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file()}


def rows_of(path: Path) -> list[DataRow]:
    return [check_row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


@pytest.fixture(scope="module")
def counter() -> ExactCounter:
    made = make_counter(files_of(BASE), NOW)
    assert isinstance(made, ExactCounter)
    return made


def test_the_parts_of_a_row(counter: ExactCounter) -> None:
    row = check_row(chat("Hello?", "Hello, sailor."))
    everything, reply = (counter.count([row], loss)[0].sequences[0] for loss in ("all", "assistant"))
    assert everything.length == reply.length
    assert everything.trained(1000) == everything.length - 1
    assert 0 < reply.trained(1000) < reply.length - 5
    assert counter.marked


def test_a_cut_takes_its_part_of_the_loss() -> None:
    one = Counted(10, ((0, 3), (5, 9)))
    assert [one.trained(limit) for limit in (1000, 9, 7, 4, 1, 0)] == [6, 6, 4, 2, 0, 0]


def test_a_template_that_refuses_a_row_is_a_fault_of_the_row(counter: ExactCounter) -> None:
    tool = {"messages": [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]}
    counts = counter.count([check_row(chat("a", "b")), check_row(tool), check_row(chat("a", "b"))], "assistant")
    assert [count.fault for count in counts] == ["", "unknown role: tool", ""]
    assert counts[0] == counts[2]


def test_a_thousand_rows_take_less_than_two_seconds(counter: ExactCounter) -> None:
    rows = (rows_of(DATA) * 4)[:1000]
    for loss in LOSSES:
        started = time.process_time()
        assert len(counter.count(rows, loss)) == 1000
        assert time.process_time() - started < 2


def test_without_files_or_libraries_a_count_is_rough_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_counter({}, NOW).estimated == "the base's tokenizer is not at hand"
    assert "tokenizer.json cannot be read" in make_counter({"tokenizer.json": "{"}, NOW).estimated
    bad = {**files_of(BASE), "chat_template.jinja": "{% if %}"}
    assert "chat template is not Jinja" in make_counter(bad, NOW).estimated
    real = builtins.__import__
    for missing in ("tokenizers", "jinja2"):

        def without(name: str, *args: Any, missing: str = missing, **kwargs: Any) -> Any:
            if name.split(".")[0] == missing:
                raise ImportError(name=missing)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        made = make_counter(files_of(BASE), NOW)
        monkeypatch.undo()
        assert isinstance(made, RoughCounter)
        assert made.estimated == f"`{missing}` is not installed"


def test_rough_counts_are_of_the_right_size(counter: ExactCounter) -> None:
    rows = rows_of(DATA)
    for loss in LOSSES:
        exact, rough = (
            sum(one.trained(256) for count in which.count(rows, loss) for one in count.sequences)
            for which in (counter, RoughCounter("x"))
        )
        assert 0.3 * exact < rough < 2 * exact  # a 4,096-token vocabulary needs more tokens than most
    pair = check_row({"prompt": "x" * 40, "completion": "y" * 80})
    assert RoughCounter("x").count([pair], "completion")[0].sequences == (Counted(30, ((10, 30),)),)


def test_a_template_cannot_leave_its_sandbox() -> None:
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        made = make_counter({**files_of(BASE), "chat_template.jinja": attack}, NOW)
        assert made.count([check_row(chat("a", "b"))], "all")[0].fault


ROWS = [
    chat("Hi.", "Hello there."),
    chat("Hi.", "  Spaces kept  \n", "And?", "Done.\n\nReally."),
    chat("One", "Two", "Three", "Four", "Five", "Six"),
    {"prompt": [{"role": "user", "content": "Say"}], "completion": [{"role": "assistant", "content": "Said"}]},
    {"prompt": "The quick brown", "completion": " fox jumps"},
    {"text": "Naïve café, 日本語, 🙂."},
]


@pytest.mark.slow
@pytest.mark.parametrize("loss_on", LOSSES)
def test_every_row_of_the_examples_counts_as_in_training(
    counter: ExactCounter, loss_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = training_script(monkeypatch)
    tokenizer = script.load_tokenizer(BASE)
    for path in (DATA, EXAMPLES / "data/quickstart-heldout.jsonl"):
        rows = rows_of(path)
        for row, count in zip(rows, counter.count(rows, "all"), strict=True):
            ids = tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=True)["input_ids"]
            assert count.sequences[0].length == len(ids)
        assert_equal(script, tokenizer, counter, rows, loss_on)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama3_1", "mistral", "gemma3_text", "phi3", "qwen3"])
def test_other_families_count_as_in_training(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import save_tokenizer

    save_tokenizer(tmp_path, family)
    script = training_script(monkeypatch)
    tokenizer, made = script.load_tokenizer(tmp_path), make_counter(files_of(tmp_path), datetime.now())
    assert isinstance(made, ExactCounter)
    # TRL's marked copies of these templates label what a turn's own text does not show; see the module's docstring.
    monkeypatch.setattr(script, "marked_template", lambda tokenizer: None)
    for raw in ROWS:
        row = check_row(raw)
        for loss_on in LOSSES if row.format != "text" else ("all",):
            assert_equal(script, tokenizer, made, [row], loss_on)


def training_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib.util

    path = EXAMPLES.parents[1] / "scripts/train_sft.py"
    spec = importlib.util.spec_from_file_location("train_sft_tokens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def assert_equal(script: Any, tokenizer: Any, counter: ExactCounter, rows: list[DataRow], loss_on: str) -> None:
    """The same sequences, as long, with as many trained tokens at every cut."""
    theirs = [script.Row("x:1", row.format, row.prompt, row.completion, row.tools) for row in rows]
    examples = script.encode_rows(theirs, tokenizer, loss_on)
    counted = [one for count in counter.count(rows, loss_on) for one in count.sequences]
    assert [one.length for one in counted] == [len(example.ids) for example in examples]
    for limit in (8, 20, 64, 256, 4096):
        assert [one.trained(limit) for one in counted] == [example.cut(limit).trained() for example in examples]
