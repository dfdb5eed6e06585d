"""scripts/train_sft.py: rows, masks, order, checkpoints and artifacts, on tiny models and on the CPU."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_sft.py"
# On a busy machine a second thread spins at OpenMP's barriers: the same steps take several times longer.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "exclude": None, "rslora": False, "dora": False}
LORA |= {"modules_to_save": [], "rank_pattern": {}, "alpha_pattern": {}}
TRAIN = {"method": "lora", "flavor": "cpu-basic", "timeout": 600, "epochs": 1.0, "max_steps": None, "max_length": 256}
TRAIN |= {"batch_size": 1, "gradient_accumulation": 1, "learning_rate": 1e-3, "loss_on": "assistant", "seed": 42}
TRAIN |= {"packing": False, "save_steps": 50, "lora": LORA, "sft": {}, "tracking": "none", "script": None}
CHAT = [{"role": "user", "content": "How many sailors?"}, {"role": "assistant", "content": "42 sailors watch."}]
LONGER = [*CHAT, {"role": "user", "content": "From where?"}, {"role": "assistant", "content": "The harbour wall."}]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """train_sft.py as a module."""
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("train_sft", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_sft"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny bases by family, each made once."""
    from tiny_models import make_tiny

    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return base


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Any:
    """Tokenizers by family, without a model."""
    from tiny_models import save_tokenizer

    made: dict[str, Any] = {}

    def tokenizer(family: str) -> Any:
        if family not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / family
            save_tokenizer(folder, family)
            made[family] = script.load_tokenizer(folder)
        return made[family]

    return tokenizer


def conversations(count: int) -> list[dict]:
    """Rows of growing length."""
    words = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
    answers = [" ".join((words * 3)[i % 5 : i % 5 + 1 + i]) for i in range(count)]
    return [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": a}]}
        for i, a in enumerate(answers)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSON lines file; a row that is text goes in as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def make_run(folder: Path, base: Path, data: Path, held_out: float | None = None, **train: Any) -> Path:
    """A run.json of stage `train` in `folder`; keyword arguments change `train`, `lora` its LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {**TRAIN, **train, "lora": {**LORA, **train.get("lora", {})}}
    train["lora"] = None if train["method"] == "full" else train["lora"]
    data_block = {"dataset": "acme/rows", "revision": None, "subset": None, "split": "train"}
    data_block["eval"] = {"fraction": held_out, "split": None, "dataset": None}
    experiment = {"name": "tiny", "hypothesis": "It learns.", "base": {"model": "acme/tiny", "revision": "abc"}}
    experiment |= {"data": data_block, "train": train, "merge": None, "gguf": None, "evaluate": None}
    experiment |= {"output": {"repo": "acme/out", "private": True}, "budget": {"max_usd": 1.0}}
    run = {"schema": 1, "run_id": "tiny-00000000", "fingerprint": "0" * 64, "stage": "train", "attempt": 1}
    run |= {"experiment": experiment, "inputs": {"base": {"path": str(base)}, "data": {"path": str(data)}}}
    run |= {"output": {"path": str(folder / "out")}, "work": str(folder / "work"), "device": "cpu"}
    run["predicted"] = {"memory_gib": 1.0}
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def edit(path: Path, **changes: Any) -> Path:
    """Change top-level keys of a run.json."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
    return path


def front_door(run: Path) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    return subprocess.run(
        [sys.executable, SCRIPT, run], capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD
    )


def events(text: str, *names: str) -> list[dict]:
    """Events in the output, in order; those of `names` if given."""
    found = [json.loads(line.partition(" ")[2]) for line in text.splitlines() if line.startswith("MERGETUNE ")]
    return [event for event in found if not names or event["event"] in names]


def inline(script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The script's main in this process, where the imports are paid already. Returns the exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(run)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return script.guarded(script.main)
    except SystemExit as done:
        return int(done.code)
    finally:
        signal.signal(signal.SIGTERM, before)


def manifest(run: Path) -> dict:
    """The manifest that a run wrote."""
    return json.loads((run.parent / "out" / "manifest.json").read_text(encoding="utf-8"))


# Labels: what is trained on, to the token


FIRST, SECOND = CHAT[1]["content"], LONGER[3]["content"]
THOUGHT = "<think>\n\n</think>\n\n"
# What an assistant turn looks like to each family's template, from where the model takes over to its end marker.
TURN = {
    "llama": "{}<|eot_id|>",
    "llama3_1": "{}<|eot_id|>",
    "mistral": " {}<eos>",
    "qwen3": THOUGHT + "{}<|im_end|>\n",
    "gemma3_text": "{}<end_of_turn>\n",
    "phi3": "{}<|end|>\n",
}
END = {"phi3": "<eos>"}  # what a template adds once, after the last turn
MARKED = ("llama", "qwen3", "gemma3_text", "phi3")  # templates that TRL knows; the others go the other way


def trained_texts(script: ModuleType, tokenizer: Any, raw: dict, loss_on: str) -> list[str]:
    """The labels that count, decoded, per sequence. Asserts that they are the ids they stand at."""
    texts = []
    for example in script.encode_rows([script.clean_row("row 1", raw)], tokenizer, loss_on):
        assert len(example.ids) == len(example.labels)
        assert all(label in (i, -100) for i, label in zip(example.ids, example.labels, strict=True))
        texts.append(tokenizer.decode([label for label in example.labels if label != -100]))
    return texts


@pytest.mark.parametrize("family", TURN)
@pytest.mark.parametrize("messages", [CHAT, LONGER], ids=["single", "multi"])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_labels_of_conversations(
    script: ModuleType, tokenizers: Any, family: str, messages: list[dict], key: str
) -> None:
    tokenizer, turn, end = tokenizers(family), TURN[family], END.get(family, "")
    raw: dict = {key: messages}
    if key == "conversations":
        speaker = {"user": "human", "assistant": "gpt"}
        raw = {key: [{"from": speaker[m["role"]], "value": m["content"]} for m in messages]}
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert trained_texts(script, tokenizer, raw, "assistant") == ["".join(turn.format(text) for text in said) + end]
    assert trained_texts(script, tokenizer, raw, "completion") == [turn.format(said[-1]) + end]
    everything = tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_texts(script, tokenizer, raw, "all") == [everything]


@pytest.mark.parametrize("family", TURN)
def test_count_of_trained_tokens(script: ModuleType, tokenizers: Any, family: str) -> None:
    tokenizer, turn, end = tokenizers(family), TURN[family], END.get(family, "")
    (example,) = script.encode_rows([script.clean_row("row 1", {"messages": LONGER})], tokenizer, "assistant")
    expected = [tokenizer(turn.format(text), add_special_tokens=False)["input_ids"] for text in (FIRST, SECOND)]
    expected.append(tokenizer(end, add_special_tokens=False)["input_ids"])
    assert example.trained() == sum(map(len, expected))
    assert [label for label in example.labels if label != -100] == list(chain.from_iterable(expected))


@pytest.mark.parametrize("family", TURN)
def test_labels_of_pairs(script: ModuleType, tokenizers: Any, family: str) -> None:
    tokenizer, turn, end = tokenizers(family), TURN[family], END.get(family, "")
    raw = {"prompt": LONGER[:3], "completion": LONGER[3:]}
    both = turn.format(FIRST) + turn.format(SECOND) + end
    assert trained_texts(script, tokenizer, raw, "completion") == [turn.format(SECOND) + end]
    assert trained_texts(script, tokenizer, raw, "assistant") == [both]
    assert trained_texts(script, tokenizer, raw, "all") == [tokenizer.apply_chat_template(LONGER, tokenize=False)]


def test_labels_of_plain_rows(script: ModuleType, tokenizers: Any) -> None:
    tokenizer = tokenizers("llama")
    pair = {"prompt": "How many sailors?", "completion": " 42 sailors."}
    assert trained_texts(script, tokenizer, pair, "completion") == [" 42 sailors.<eos>"]
    assert trained_texts(script, tokenizer, pair, "assistant") == [" 42 sailors.<eos>"]
    assert trained_texts(script, tokenizer, pair, "all") == ["How many sailors? 42 sailors.<eos>"]
    assert trained_texts(script, tokenizer, {"text": "The quick fox."}, "all") == ["The quick fox.<eos>"]
    assert trained_texts(script, tokenizer, {"text": "The quick fox.<eos>"}, "all") == ["The quick fox.<eos>"]


def test_a_template_that_rewrites_history_gets_one_sequence_per_turn(script: ModuleType, tokenizers: Any) -> None:
    """Qwen 3 removes earlier thoughts. Without its marked template, each turn is trained as it will be asked for."""
    tokenizer = tokenizers("qwen3")
    row = script.clean_row("row 1", {"messages": LONGER})
    examples = script.encode(row, tokenizer, "assistant", marked=None)
    texts = [tokenizer.decode([label for label in e.labels if label != -100]) for e in examples]
    assert texts == [TURN["qwen3"].format(FIRST), TURN["qwen3"].format(SECOND)]
    assert "<think>" not in tokenizer.decode(examples[1].ids).split(FIRST)[0]


def test_tools_and_parts_reach_the_template(script: ModuleType, tokenizers: Any) -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "count", "arguments": {}}}]}
    question = {"role": "user", "content": [{"type": "text", "text": "Count."}], "name": None}
    raw = {"messages": [question, call, {"role": "tool", "content": "42"}, CHAT[1]], "tools": json.dumps([tool])}
    (text,) = trained_texts(script, tokenizers("qwen3"), raw, "assistant")
    assert '<tool_call>\n{"name": "count"' in text
    assert text.endswith(f"{FIRST}<|im_end|>\n")
    (everything,) = trained_texts(script, tokenizers("qwen3"), raw, "all")
    assert '"name": "count", "parameters"' in everything
    assert "user\nCount.<|im_end|>" in everything


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "llama3_1"])
def test_labels_are_those_of_trl(script: ModuleType, bases: Any, tmp_path: Path, family: str) -> None:
    """What SFTTrainer itself makes of the same rows: assistant_only_loss where it can, prompt/completion elsewhere."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    raw = {"messages": LONGER}
    if family not in MARKED:
        raw = {"prompt": LONGER[:1], "completion": LONGER[1:2]}
    tokenizer = script.load_tokenizer(bases(family))
    settings = SFTConfig(
        str(tmp_path), use_cpu=True, report_to="none", assistant_only_loss=family in MARKED, max_length=None
    )
    trainer = SFTTrainer(
        str(bases(family)), settings, train_dataset=Dataset.from_list([raw]), processing_class=tokenizer
    )
    loss_on = "assistant" if family in MARKED else "completion"
    (example,) = script.encode_rows([script.clean_row("row 1", raw)], tokenizer, loss_on)
    assert trainer.train_dataset[0]["input_ids"] == example.ids
    assert trainer.train_dataset[0]["labels"] == example.labels


# Rows that cannot be used


BAD_ROWS = {
    '{"messages": [': "not JSON",
    "[1]": "a row is a JSON object, this is a list",
    '{"text": null}': "no messages: the row has `text`",
    '{"instruction": "a", "output": "b"}': "no messages: the row has `instruction`, `output`",
    '{"messages": []}': "`messages` is empty",
    '{"messages": "hello"}': "`messages` is text",
    '{"messages": ["hello"]}': "`messages[0]` is text",
    '{"messages": [{"role": "user", "content": ""}]}': "`messages[0].content` is empty",
    '{"messages": [{"role": "user", "content": null}]}': "`messages[0].content` is empty",
    '{"messages": [{"role": "user", "content": 7}]}': "`messages[0].content` is a number",
    '{"messages": [{"role": "bot", "content": "hi"}]}': "`messages[0]` has the role `bot`",
    '{"messages": [{"content": "hi"}]}': "`messages[0]` has the role `None`",
    '{"messages": [{"role": "user", "content": "hi"}]}': "no assistant turn in `messages`",
    '{"conversations": [{"from": "alien", "value": "hi"}]}': "`conversations[0]` has the role `alien`",
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}': "`messages[0].content` has half a character",
    '{"prompt": "a", "completion": ""}': "`completion` is empty",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}': "`prompt` is text and",
    '{"text": "plain"}': "this row is `text` of plain text, data.jsonl:1 is `messages` of messages",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_a_bad_row_is_named(script: ModuleType, tmp_path: Path, line: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}, "", line])
    with pytest.raises(script.InputError) as caught:
        script.load_rows({"path": str(data)}, "train")
    assert caught.value.message.startswith(f"data.jsonl:3: {BAD_ROWS[line]}")
    assert caught.value.hint


KEYS = ["messages", "prompt", "completion", "conversations", "text", "tools", "role", "content", "from", "value"]
KEYS += ["tool_calls", "type"]
LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["user", "assistant", "gpt", "text"])
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=4))


@settings(max_examples=300, deadline=None)
@given(raw=VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_row_is_taken_or_named(script: ModuleType, raw: Any) -> None:
    try:
        row = script.clean_row("data.jsonl:1", raw)
    except script.InputError as error:
        assert error.message.startswith("data.jsonl:1: ")
        assert error.hint
    else:
        assert type(row.prompt) is type(row.completion)


def test_bad_input_fails_at_once_and_leaves_nothing(bases: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    run = make_run(tmp_path / "run", bases("llama"), data)
    done = front_door(run)
    assert done.returncode == 2
    said = "error: data.jsonl:2: no assistant turn in `messages`\n\nhint: remove the row, or add the answer to learn\n"
    assert done.stderr == said
    assert [event["event"] for event in events(done.stdout)] == ["start", "phase", "error"]
    assert not (run.parent / "out").exists()
    empty = front_door(make_run(tmp_path / "empty", bases("llama"), write_rows(tmp_path / "empty.jsonl", [])))
    assert (empty.returncode, empty.stderr.splitlines()[0]) == (2, "error: `empty.jsonl` holds no rows")


def test_data_files(script: ModuleType, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"messages": CHAT}, {"messages": LONGER}]), tmp_path / "rows.parquet")
    rows = script.load_rows({"path": str(tmp_path / "rows.parquet")}, "train")
    assert [(row.where, row.completion) for row in rows] == [
        ("rows.parquet row 1", CHAT),
        ("rows.parquet row 2", LONGER),
    ]
    (tmp_path / "half.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    for name, said in {"half.parquet": "cannot read", "rows.csv": "neither .jsonl nor", "gone.jsonl": "cannot"}.items():
        with pytest.raises(script.InputError, match=said):
            script.load_rows({"path": str(tmp_path / name)}, "train")


def test_the_template_names_the_row_it_refuses(script: ModuleType, tokenizers: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], *CHAT]}])
    rows = script.load_rows({"path": str(data)}, "train")
    with pytest.raises(script.InputError, match=r"^data.jsonl:2: .*roles must alternate"):
        script.encode_rows(rows, tokenizers("gemma3_text"), "assistant")


@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
def test_text_rows_have_no_turns(script: ModuleType, loss_on: str) -> None:
    with pytest.raises(script.InputError, match=f"`loss_on: {loss_on}` cannot be honoured"):
        script.check_loss_on(script.clean_row("row 1", {"text": "plain"}), loss_on)


def test_held_out_rows_are_seeded(script: ModuleType, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(20))
    run = json.loads(make_run(tmp_path, tmp_path, data, held_out=0.2).read_text())
    kept, held_out = script.split_rows(run)
    assert (len(kept), len(held_out)) == (16, 4)
    assert {row.where for row in kept}.isdisjoint(row.where for row in held_out)
    assert script.split_rows(run) == (kept, held_out)
    run["experiment"]["train"]["seed"] = 7
    assert script.split_rows(run)[1] != held_out
    run["inputs"]["eval_data"] = {"path": str(write_rows(tmp_path / "eval.jsonl", conversations(3)))}
    assert [len(rows) for rows in script.split_rows(run)] == [20, 3]
    del run["inputs"]["eval_data"]
    run["experiment"]["data"]["eval"] = {"fraction": None, "split": "validation", "dataset": None}
    with pytest.raises(script.InputError, match="is one file"):
        script.split_rows(run)
    run["experiment"]["data"]["eval"] = {"fraction": 0.99, "split": None, "dataset": None}
    with pytest.raises(script.InputError, match="leaves nothing to train on"):
        script.split_rows(run)


# Bases that cannot be used


def test_bases_that_cannot_be_trained(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    import shutil

    def broken(name: str) -> Path:
        return Path(shutil.copytree(bases("llama"), tmp_path / name))

    def said(base: Path) -> str:
        with pytest.raises(script.InputError) as caught:
            script.check_base(base)
        assert caught.value.hint
        return caught.value.message

    script.check_base(bases("llama"))
    (empty := tmp_path / "empty").mkdir()
    assert "no readable config.json" in said(empty)
    first, second = sorted((base := broken("cut")).glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-10])
    assert said(base) == f"`{first}` is truncated: {first.stat().st_size} of {first.stat().st_size + 10} bytes"
    first.write_bytes(b"\xff" * 100)
    assert "no readable safetensors header" in said(base)
    first.unlink()
    assert f"lacks the shard `{first.name}`" in said(base)
    for path in (base := broken("pickled")).glob("*.safetensors*"):
        path.rename(path.with_suffix(".bin"))
    assert "only pickled weights" in said(base)
    (base := broken("mute") / "tokenizer.json").unlink()
    assert "no tokenizer" in said(base.parent)
    config = json.loads(((base := broken("small")) / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "quantised already" in said(base)
    assert second.exists()


def test_conversations_need_a_chat_template(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    import shutil

    base = Path(shutil.copytree(bases("mistral"), tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    run = json.loads(make_run(tmp_path, base, tmp_path).read_text())
    with pytest.raises(script.InputError, match=r"row 1 is a conversation, and the base .* has no chat template"):
        script.check_rows(run, base, [script.clean_row("row 1", {"messages": CHAT})])
    run["experiment"]["train"]["loss_on"] = "all"
    script.check_rows(run, base, [script.clean_row("row 1", {"text": "plain"})])


def test_a_base_comes_without_second_copies(script: ModuleType) -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += ["tokenizer.json", "chat_template.jinja", "merges.txt", "additional_chat_templates/rag.jinja"]
    other = ["consolidated.safetensors", "original/params.json", "pytorch_model.bin", "onnx/model.onnx", "x.gguf"]
    patterns = {"allow_patterns": script.BASE_FILES, "ignore_patterns": script.BASE_IGNORED}
    assert list(filter_repo_objects(wanted + other, **patterns)) == wanted


# Settings


def test_settings_that_are_not_free(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    said = {}
    for key in ("output_dir", "push_to_hub", "report_to", "use_cpu", "bf16", "max_length", "warmup_ration", "optim"):
        run = json.loads(make_run(tmp_path, bases("llama"), tmp_path, sft={key: "x"}).read_text())
        with pytest.raises(script.InputError) as caught:
            script.sft_config(run, has_eval=False)
        said[key] = f"{caught.value.message} / {caught.value.hint}"
    assert said["output_dir"] == "`train.sft.output_dir` is set by the training script / remove `output_dir`"
    assert said["max_length"] == "`train.sft.max_length` is not free / use `train.max_length`"
    assert said["report_to"] == "`train.sft.report_to` is not free / use `train.tracking`"
    assert said["warmup_ration"].endswith("is not a field of SFTConfig / did you mean `warmup_steps`?")
    assert said["optim"].startswith("`train.sft`: x is not a valid OptimizerNames")
    for key in ("push_to_hub", "use_cpu", "bf16"):
        assert "set by the training script" in said[key]
    loading = {"model_init_kwargs": {"dtype": "float32"}}
    run = json.loads(make_run(tmp_path, bases("llama"), tmp_path, sft=loading).read_text())
    with pytest.raises(script.InputError, match=r"`train.sft.model_init_kwargs.dtype` is set by"):
        script.sft_config(run, has_eval=False)


def test_settings_pass_through(script: ModuleType, bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sft = {"warmup_steps": 3, "optim": "adamw_torch", "tf32": True, "model_init_kwargs": {"use_kernels": True}}
    run = make_run(tmp_path, bases("llama"), tmp_path, sft=sft, method="qlora")
    config = script.sft_config(json.loads(run.read_text()), has_eval=True)
    assert (config.warmup_steps, config.optim.value, config.tf32) == (3, "adamw_torch", None)
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert (config.gradient_checkpointing, config.bf16, config.logging_nan_inf_filter) == (True, True, False)
    assert (config.report_to, config.trackio_static_space_id, config.push_to_hub) == ([], False, False)
    warned = [event["message"] for event in events(capsys.readouterr().out, "warning")]
    assert warned == [f"`{key}: True` needs a GPU: left out on the CPU" for key in ("tf32", "use_kernels")]
    plain = make_run(tmp_path, bases("llama"), tmp_path, method="qlora")
    assert script.sft_config(json.loads(plain.read_text()), has_eval=True).optim.value == "adamw_8bit"


def test_a_gpu_that_is_not_there(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    run = json.loads(make_run(tmp_path, bases("llama"), tmp_path).read_text()) | {"device": "cuda"}
    with pytest.raises(script.InputError, match="torch sees no GPU"):
        script.sft_config(run, has_eval=False)


# Order and length of the rows


def trainer_of(script: ModuleType, run_path: Path) -> tuple[Any, Any]:
    """Trainer and reporter of a run, before the first step."""
    run = json.loads(run_path.read_text())
    base = Path(run["inputs"]["base"]["path"])
    train_rows, eval_rows = script.split_rows(run)
    config = script.sft_config(run, has_eval=bool(eval_rows))
    tokenizer = script.load_tokenizer(base)
    train_set, _ = script.tokenize(run, tokenizer, train_rows, 256)
    eval_set = script.tokenize(run, tokenizer, eval_rows, 256)[0] if eval_rows else None
    return script.make_trainer(run, base, config, tokenizer, train_set, eval_set)


def test_the_longest_rows_open_the_first_two_steps(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(25))
    trainer, _ = trainer_of(script, make_run(tmp_path, bases("llama"), data, batch_size=2, gradient_accumulation=3))
    lengths = sorted((len(ids) for ids in trainer.train_dataset["input_ids"]), reverse=True)
    batches = [batch["attention_mask"].sum(dim=1).tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(batches[0], reverse=True) == lengths[:2]
    assert sorted(batches[3], reverse=True) == lengths[2:4]
    assert sorted(chain.from_iterable(batches), reverse=True) == lengths


def test_the_order_is_seeded_and_changes_every_epoch(script: ModuleType) -> None:
    lengths = [5, 9, 1, 7, 3, 8, 2, 6, 4]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = script.LongestFirst(lengths, batch=1, per_step=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0)[0] == 1
    assert order(1, 0)[2] == 5
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    assert all(sorted(order(1, epoch)) == list(range(9)) for epoch in (0, 1))
    assert list(script.LongestFirst([3, 4], batch=4, per_step=8, seed=0)) == [1, 0]


def test_rows_without_a_token_to_learn(
    script: ModuleType, tokenizers: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    long = [{"role": "user", "content": "The quick brown fox. " * 20}, CHAT[1]]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": m} for m in (CHAT, long, CHAT, long)])
    rows = script.load_rows({"path": str(data)}, "train")
    run = json.loads(make_run(tmp_path, tmp_path, data).read_text())
    tokenizer = tokenizers("llama")
    total = len(tokenizer.apply_chat_template(long)["input_ids"])
    prompt = len(tokenizer.apply_chat_template(long[:1], add_generation_prompt=True)["input_ids"])
    kept, counts = script.tokenize(run, tokenizer, rows, 64)
    assert counts == {"examples": 2, "longest_row_tokens": total, "truncated_rows": 0, "dropped_rows": 2}
    assert len(kept) == 2
    (warned,) = events(capsys.readouterr().out, "warning")
    said = f"2 rows are dropped, the prompt fills `max_length: 64` (the longest prompt has {prompt} tokens)"
    assert warned["message"] == f"{said}: data.jsonl:2, data.jsonl:4"
    with pytest.raises(script.InputError) as caught:
        script.tokenize(run, tokenizer, [rows[1]], 64)
    assert caught.value.message == "every row would be dropped: " + said.removeprefix("2 rows are dropped, ")
    assert caught.value.hint == f"use `max_length: {total}`, or shorten the prompts"
    kept, counts = script.tokenize(run, tokenizer, rows, total - 2)
    assert (counts["truncated_rows"], counts["dropped_rows"]) == (2, 0)
    assert max(map(len, kept["input_ids"])) == total - 2


def test_rows_become_tokens_once_on_a_machine(script: ModuleType, tokenizers: Any, tmp_path: Path) -> None:
    """What a later process reads is what the first one wrote; other rows, tokens or targets are made anew."""
    from pyarrow import parquet

    data = write_rows(tmp_path / "data.jsonl", conversations(5))
    run = json.loads(make_run(tmp_path, tmp_path, data).read_text())
    rows = script.load_rows({"path": str(data)}, "train")
    first = script.encode_once(run, rows, tokenizers("llama"), "assistant")
    assert first == script.encode_rows(rows, tokenizers("llama"), "assistant")
    (kept,) = script.tokens_folder(run).glob("*.parquet")
    changed = parquet.read_table(kept).slice(0, 2)
    parquet.write_table(changed, kept)
    assert script.encode_once(run, rows, tokenizers("llama"), "assistant") == first[:2]  # it was read, not made
    whole = len(rows)
    assert len(script.encode_once(run, rows[1:], tokenizers("llama"), "assistant")) == whole - 1
    assert len(script.encode_once(run, rows, tokenizers("llama"), "all")) == whole
    assert len(script.encode_once(run, rows, tokenizers("qwen3"), "assistant")) == whole
    assert len(list(script.tokens_folder(run).glob("*.parquet"))) == 4
    assert not list(script.tokens_folder(run).glob("*.part"))
    elsewhere = run | {"tokens": str(tmp_path / "shared")}
    assert script.encode_once(elsewhere, rows, tokenizers("llama"), "assistant") == first


def test_a_second_process_waits_for_the_tokens_of_the_first(
    script: ModuleType, tokenizers: Any, tmp_path: Path
) -> None:
    import fcntl

    data = write_rows(tmp_path / "data.jsonl", conversations(5))
    run = json.loads(make_run(tmp_path, tmp_path, data).read_text())
    rows, tokenizer = script.load_rows({"path": str(data)}, "train"), tokenizers("llama")
    key = script.tokens_key(rows, tokenizer, "assistant")
    script.tokens_folder(run).mkdir(parents=True)
    made: list[Any] = []
    with (script.tokens_folder(run) / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = Thread(target=lambda: made.extend(script.encode_once(run, rows, tokenizer, "assistant")))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert made == []
    waiting.join(30)
    assert len(made) == 5


# Training


@pytest.fixture(scope="module")
def quickstart(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One QLoRA training through the front door: its run.json and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = write_rows(folder / "data.jsonl", conversations(20))
    run = make_run(folder / "run", bases("llama"), data, 0.2, method="qlora", max_steps=4, gradient_accumulation=2)
    done = front_door(run)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_quickstart_events(quickstart: tuple[Path, str]) -> None:
    said = events(quickstart[1])
    names = [event["event"] for event in said if event["event"] not in ("phase", "progress")]
    assert names == ["start", "step", "step", "step", "step", "eval", "end"]
    phases = [event["name"] for event in said if event["event"] == "phase"]
    assert phases == ["read data", "import libraries", "tokenize", "load base", "train", "save"]
    steps = [event for event in said if event["event"] == "step"]
    assert [(step["step"], step["total"]) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for key in ("epoch", "loss", "lr", "grad_norm", "tokens_per_s", "memory_gib"):
        assert all(isinstance(step[key], int | float) and step[key] > 0 for step in steps), key
    assert said[-1]["steps"] == 4


def test_quickstart_manifest(quickstart: tuple[Path, str]) -> None:
    found = manifest(quickstart[0])
    metrics = found["metrics"]
    counts = {"steps": 4, "rows": 16, "examples": 16, "eval_rows": 4, "truncated_rows": 0, "dropped_rows": 0}
    assert {key: metrics[key] for key in counts} == counts
    assert 5 < metrics["eval_loss"] < 7
    assert metrics["train_loss"] == pytest.approx(sum(e["loss"] for e in found["history"]) / 4, abs=1e-5)
    assert metrics["tokens_seen"] > metrics["tokens_trained"] > 0
    assert 0 < metrics["trainable_parameters"] < metrics["total_parameters"]
    assert [entry["step"] for entry in found["history"]] == [1, 2, 3, 4]
    assert set(found["history"][0]) == {"step", "loss", "lr", "grad_norm"}
    assert found["eval_history"] == [{"step": 4, "eval_loss": pytest.approx(metrics["eval_loss"], abs=1e-6)}]
    assert found["measured"]["peak_memory_gib"] > 0.1
    assert len(found["inputs"]["data"]["sha256"]) == 64
    assert (found["seed"], found["predicted"], found["resumed_from_step"]) == (42, {"memory_gib": 1.0}, 0)
    assert found["versions"]["trl"] == "1.16.0"


def test_quickstart_artifact(quickstart: tuple[Path, str]) -> None:
    from safetensors.torch import load_file

    run = quickstart[0]
    out = run.parent / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert not (run.parent / "work" / "checkpoints").exists()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("acme/tiny", "abc", 4)
    weights = load_file(out / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    card = (out / "README.md").read_text()
    assert "base_model: acme/tiny\nbase_model_relation: adapter\n" in card
    assert "| run | tiny-00000000, attempt 1, seed 42 |" in card


def test_a_finished_artifact_is_not_made_again(
    script: ModuleType, quickstart: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inline(script, quickstart[0], monkeypatch) == 2


def test_full_training_keeps_the_tokenizer_byte_for_byte(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    data = write_rows(tmp_path / "data.jsonl", conversations(6))
    run = make_run(tmp_path / "run", bases("qwen3"), data, method="full", max_steps=2, learning_rate=1e-2)
    assert inline(script, run, monkeypatch) == 0
    out = run.parent / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (bases("qwen3") / name).read_bytes()
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (bases("qwen3"), out))
    assert before.keys() == after.keys()
    assert sum(not before[name].equal(after[name]) for name in before) > 10
    assert "base_model_relation: finetune" in (out / "README.md").read_text()
    metrics = manifest(run)["metrics"]
    assert metrics["trainable_parameters"] == metrics["total_parameters"]
    assert metrics["eval_loss"] is None


def test_text_only_training_leaves_the_vision_tower_alone(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    run = make_run(tmp_path / "run", bases("gemma3_vl"), data, method="qlora", max_steps=2)
    assert inline(script, run, monkeypatch) == 0
    names = list(load_file(run.parent / "out" / "adapter_model.safetensors"))
    assert len(names) == 2 * 7 * 2  # two layers of seven linears, A and B
    assert all("language_model" in name for name in names)


def test_lora_choices_reach_peft(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    choices = {
        "targets": ["q_proj", "v_proj"],
        "exclude": r".*layers\.0.*",
        "rslora": True,
        "dora": True,
        "dropout": 0.1,
    }
    choices |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "modules_to_save": ["embed_tokens"]}
    data = write_rows(tmp_path / "data.jsonl", conversations(2))
    trainer, _ = trainer_of(script, make_run(tmp_path, bases("qwen3"), data, lora=choices))
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora) == (
        4,
        8,
        0.1,
        True,
        True,
    )
    trained = {name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(shape[0] for name, shape in trained.items() if "lora_A" in name) == [2, 4]
    assert not any("layers.0" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)


@pytest.mark.parametrize(("targets", "said"), [(["qkv_proj_x"], "not found in the base"), (["lm_head"], "`lm_head`")])
def test_lora_targets_that_are_not_there(
    script: ModuleType, bases: Any, tmp_path: Path, targets: list[str], said: str
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(2))
    with pytest.raises(script.InputError, match=said):
        trainer_of(script, make_run(tmp_path, bases("llama"), data, lora={"targets": targets}))


def test_evaluation_is_a_mean_over_tokens_and_changes_nothing(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes repacks CPU weights when a model is evaluated, and then trains on with wrong gradients."""
    rows = conversations(12)
    histories = []
    for name, held_out in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        data = write_rows(tmp_path / name / "data.jsonl", rows)
        run = make_run(tmp_path / name, bases("llama"), data, method="qlora", max_steps=4, save_steps=1)
        if held_out:
            eval_data = write_rows(tmp_path / name / "eval.jsonl", rows[:3])
            inputs = json.loads(run.read_text())["inputs"] | {"eval_data": {"path": str(eval_data)}}
            edit(run, inputs=inputs)
        assert inline(script, run, monkeypatch) == 0
        histories.append(manifest(run)["history"])
    assert [e["step"] for e in manifest(tmp_path / "with" / "run.json")["eval_history"]] == [1, 2, 3, 4]
    assert histories[0] == histories[1]


def test_evaluation_loss_per_token(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    import torch

    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}] * 16)
    strange = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "zx&% 7!" * 9}]
    eval_data = write_rows(tmp_path / "eval.jsonl", [{"messages": m} for m in (CHAT, strange, CHAT)])
    run = make_run(tmp_path, bases("llama"), data, method="full", batch_size=2, learning_rate=1e-2)
    edit(run, inputs=json.loads(run.read_text())["inputs"] | {"eval_data": {"path": str(eval_data)}})
    trainer, _ = trainer_of(script, run)
    trainer.train()  # until the loss of the known rows is far from that of the strange one
    found = trainer.evaluate()["eval_loss"]
    sums, counts = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            sums.append(losses.sum().item())
            counts.append(int((labels != -100).sum()))
    by_row = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
    assert found == pytest.approx(sum(sums) / sum(counts), rel=5e-3)
    assert abs(by_row - found) > 0.2 * found  # the mean over rows is another number


def test_packing(script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(20))
    run = make_run(tmp_path / "run", bases("llama"), data, 0.1, packing=True, max_length=128)
    assert inline(script, run, monkeypatch) == 0
    metrics = manifest(run)["metrics"]
    assert metrics["rows"] == 18
    assert metrics["steps"] < 18
    assert 5 < metrics["eval_loss"] < 7


# What can go wrong


def test_a_loss_that_is_not_a_number_ends_the_run(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(bases("mistral"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", base, write_rows(tmp_path / "data.jsonl", conversations(4)))
    assert inline(script, run, monkeypatch) == 1
    printed = capfd.readouterr()
    (error,) = events(printed.out, "error")
    assert error["message"] == "`loss` is nan at step 1, with a learning rate of 0.001"
    assert error["hint"] == "use `train.learning_rate: 1e-04`, or check the base's weights and the data"
    assert f"error: {error['message']}\n\nhint: {error['hint']}\n" in printed.err
    assert list((run.parent / "out").iterdir()) == []


def test_an_adapter_that_did_not_move_is_no_result(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    run = make_run(tmp_path / "run", bases("llama"), data, max_steps=1, sft={"warmup_steps": 10})
    assert inline(script, run, monkeypatch) == 1
    assert "no weight has moved" in events(capfd.readouterr().out, "error")[0]["message"]
    assert not (run.parent / "out" / "manifest.json").exists()


def until(run: Path, step: int, number: signal.Signals) -> tuple[int, list[int]]:
    """Start the script, send a signal once `step` is reported; its exit code and the steps it ran."""
    command = [sys.executable, SCRIPT, run]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ONE_THREAD)
    assert child.stdout is not None
    steps: list[int] = []
    for line in child.stdout:
        steps += [event["step"] for event in events(line, "step")]
        if steps and steps[-1] == step:
            child.send_signal(number)
    return child.wait(timeout=120), steps


def test_a_killed_run_goes_on_where_it_was(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """SIGKILL, then SIGTERM, then a torn checkpoint: the weights are those of a run that nothing interrupted."""
    from safetensors.torch import load_file

    data = write_rows(tmp_path / "data.jsonl", conversations(14))
    changes = {"method": "qlora", "epochs": 2.0, "gradient_accumulation": 2, "save_steps": 4, "lora": {"dropout": 0.1}}
    run = make_run(tmp_path / "killed", bases("llama"), data, **changes)
    code, steps = until(run, 6, signal.SIGKILL)
    assert (code, steps[:6]) == (-signal.SIGKILL, [1, 2, 3, 4, 5, 6])
    code, steps = until(run, 7, signal.SIGTERM)
    assert (code, steps[:3], len(steps) <= 4) == (130, [5, 6, 7], True)  # ends after the step it is in
    left = run.parent / "work" / "checkpoints"
    last = max(left.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    assert last.name == f"checkpoint-{steps[-1]}"
    with (last / "optimizer.pt").open("r+b") as handle:
        handle.truncate(100)
    assert inline(script, run, monkeypatch) == 0
    said = events(capfd.readouterr().out)
    assert [e["message"] for e in said if e["event"] == "warning"] == [
        f"`{last.name}` is incomplete or of another run: removed"
    ]
    assert [e["step"] for e in said if e["event"] == "step"] == list(range(5, 15))

    whole = make_run(tmp_path / "whole", bases("llama"), data, **changes)
    assert inline(script, whole, monkeypatch) == 0
    resumed, straight = (load_file(r.parent / "out" / "adapter_model.safetensors") for r in (run, whole))
    assert all(resumed[name].float().sub(straight[name].float()).abs().max() < 1e-4 for name in straight)
    assert all(
        e["loss"] == pytest.approx(f["loss"], abs=1e-4)
        for e, f in zip(manifest(run)["history"], manifest(whole)["history"], strict=True)
    )
    for key in ("tokens_seen", "tokens_trained", "steps"):
        assert manifest(run)["metrics"][key] == manifest(whole)["metrics"][key]
    assert manifest(run)["resumed_from_step"] == 4


def test_a_run_killed_after_its_last_step_trains_no_more(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(8))
    run = make_run(tmp_path / "run", bases("llama"), data, max_steps=3)
    with monkeypatch.context() as broken:
        broken.setattr(script, "write_card", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            inline(script, run, monkeypatch)
    first = (run.parent / "out" / "adapter_model.safetensors").read_bytes()
    capfd.readouterr()
    assert inline(script, run, monkeypatch) == 0
    assert events(capfd.readouterr().out, "step") == []
    assert (run.parent / "out" / "adapter_model.safetensors").read_bytes() == first
    assert manifest(run)["metrics"]["steps"] == 3


def test_a_checkpoint_of_another_run_is_not_resumed(
    script: ModuleType, bases: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    path = make_run(tmp_path, bases("llama"), data)
    trainer, _ = trainer_of(script, path)
    trainer.train()
    run = json.loads(path.read_text())
    assert script.last_checkpoint(run).name == "checkpoint-4"
    assert script.last_checkpoint(run | {"fingerprint": "1" * 64}) is None
    assert script.last_checkpoint(run) is None
