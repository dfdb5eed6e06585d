"""scripts/evaluate.py: loss on held-out rows and greedy answers of two tiny models, on the CPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "evaluate.py"
# On a busy machine a second thread spins at OpenMP's barriers: the same steps take several times longer.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SHARED = "# --- shared: data rows.", "# --- end shared: data rows ---"


def load(name: str) -> ModuleType:
    """A job script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """evaluate.py as a module."""
    import torch

    torch.set_num_threads(1)
    return load("evaluate")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two models that stand for its fine-tuned form: another one, and one that is broken."""
    from safetensors.torch import load_file, save_file
    from tiny_models import make_tiny

    folder = tmp_path_factory.mktemp("models")
    made = {name: make_tiny(folder / name, "qwen3", seed=seed) for seed, name in enumerate(("base", "tuned", "broken"))}
    weights = load_file(made["broken"] / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, made["broken"] / "model.safetensors", metadata={"format": "pt"})
    return made


def rows(count: int) -> list[dict]:
    """Conversations of different length."""
    turns = [("How many sailors?", "42 sailors watch."), ("From where?", "The harbour wall. " * 3)]
    made = []
    for number in range(count):
        messages = []
        for question, answer in turns[: 1 + number % 2]:
            messages += [{"role": "user", "content": f"{number}: {question}"}, {"role": "assistant", "content": answer}]
        made.append({"messages": messages})
    return made


def lines(path: Path, values: list[Any]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def make_run(folder: Path, models: dict[str, Path], tuned: str = "tuned", **inputs: Path) -> Path:
    """A run.json of stage `evaluate` over 10 rows, 3 of them held out; keyword arguments are further inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"base": models["base"], "tuned": models[tuned], "data": lines(folder / "data.jsonl", rows(10)), **inputs}
    data = {"dataset": "acme/rows", "revision": None, "subset": None, "split": "train"}
    data["eval"] = {"fraction": 0.3, "split": None, "dataset": None}
    train = {"seed": 42, "loss_on": "assistant", "max_length": 256}
    experiment = {"name": "tiny", "hypothesis": "It learns.", "data": data, "train": train}
    experiment["evaluate"] = {"prompts": None, "max_new_tokens": 6, "flavor": "cpu-basic", "timeout": 60}
    run = {"schema": 1, "run_id": "tiny-00000000", "fingerprint": "0" * 64, "stage": "evaluate", "attempt": 1}
    run |= {"experiment": experiment, "inputs": {name: {"path": str(path)} for name, path in paths.items()}}
    run |= {"output": {"path": str(folder / "out")}, "work": str(folder / "work"), "device": "cpu", "predicted": {}}
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def without_eval(run: Path) -> Path:
    """The run with no held-out rows."""
    changed = json.loads(run.read_text())
    changed["experiment"]["data"]["eval"] = {"fraction": None, "split": None, "dataset": None}
    run.write_text(json.dumps(changed), encoding="utf-8")
    return run


def inline(script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The script's main in this process, where the imports are paid already. Returns the exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(run)])
    try:
        return script.guarded(script.main)
    except SystemExit as done:
        return int(done.code)


def events(text: str, *names: str) -> list[dict]:
    """Events in the output, in order; those of `names` if given."""
    found = [json.loads(line.partition(" ")[2]) for line in text.splitlines() if line.startswith("MERGETUNE ")]
    return [event for event in found if not names or event["event"] in names]


def manifest(run: Path) -> dict:
    """The manifest that a run wrote."""
    return json.loads((run.parent / "out" / "manifest.json").read_text(encoding="utf-8"))


def test_the_row_code_is_that_of_training() -> None:
    blocks = []
    for name in ("train_sft.py", "evaluate.py"):
        text = (SCRIPTS / name).read_text(encoding="utf-8")
        blocks.append(text[text.index(SHARED[0]) : text.index(SHARED[1])])
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) > 5000


def test_the_front_door(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = [{"prompt": "How many?"}, {"messages": [{"role": "user", "content": "From where?"}]}]
    run = make_run(tmp_path, models, prompts=lines(tmp_path / "prompts.jsonl", prompts))
    done = subprocess.run(
        [sys.executable, SCRIPT, run], capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr
    said = events(done.stdout)
    assert (said[0]["event"], said[-1]["event"]) == ("start", "end")
    phases = [event["name"] for event in said if event["event"] == "phase"]
    models_phases = [p for m in ("before", "after") for p in (f"load {m}", f"evaluate {m}", "generate")]
    assert phases == ["read data", "tokenize", *models_phases]
    last = {event["unit"]: (event["done"], event["total"]) for event in said if event["event"] == "progress"}
    assert last == {"rows tokenized": (3, 3), "rows scored": (3, 3), "prompts answered": (2, 2)}
    found = manifest(run)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]
    metrics = found["metrics"]
    assert metrics["rows"] == 3
    for moment in ("before", "after"):
        assert metrics[moment]["perplexity"] == pytest.approx(math.exp(metrics[moment]["loss"]), rel=1e-3)
    change = 100 * (metrics["after"]["loss"] / metrics["before"]["loss"] - 1)
    assert metrics["loss_change_percent"] == pytest.approx(change, abs=1e-3)
    assert [sample["prompt"] for sample in found["samples"]] == ["How many?", prompts[1]["messages"]]
    assert all(isinstance(sample[moment], str) for sample in found["samples"] for moment in ("before", "after"))
    assert "<|im_end|>" not in json.dumps(found["samples"])


def test_the_loss_is_that_of_the_plain_model_over_the_assistant_tokens(
    script: ModuleType, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a float32 forward with full logits, over spans found by searching the text, not by our code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import get_training_chat_template

    run_path = make_run(tmp_path, models)
    assert inline(script, run_path, monkeypatch) == 0
    run = json.loads(run_path.read_text())
    _, held_out = script.split_rows(run)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    template = get_training_chat_template(tokenizer)
    for moment, name in (("before", "base"), ("after", "tuned")):
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
        trained, everything = [], []
        for row in held_out:
            text = tokenizer.apply_chat_template(row.completion, chat_template=template, tokenize=False)
            coded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
            head, tail = "<|im_start|>assistant\n", "<|im_end|>\n"
            spans = [
                (i + len(head), text.index(tail, i) + len(tail)) for i in range(len(text)) if text[i:].startswith(head)
            ]
            with torch.no_grad():
                logits = model(coded["input_ids"]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, coded["input_ids"][0, 1:], reduction="none").tolist()
            starts = [int(start) for start, _ in coded["offset_mapping"][0][1:]]
            everything += losses
            trained += [x for x, at in zip(losses, starts, strict=True) if any(a <= at < b for a, b in spans)]
        metrics = manifest(run_path)["metrics"]
        assert metrics["tokens"] == len(trained)
        assert metrics[moment]["loss"] == pytest.approx(sum(trained) / len(trained), rel=5e-3)
        assert metrics[moment]["loss_all_tokens"] == pytest.approx(sum(everything) / len(everything), rel=5e-3)


def test_a_model_against_itself(
    script: ModuleType, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, models, "base", prompts=lines(tmp_path / "p.jsonl", [{"prompt": "How many?"}]))
    assert inline(script, run, monkeypatch) == 0
    found = manifest(run)
    assert found["metrics"]["before"] == found["metrics"]["after"]
    assert found["metrics"]["loss_change_percent"] == 0
    assert found["samples"][0]["before"] == found["samples"][0]["after"]


def test_prompts_alone(
    script: ModuleType, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = without_eval(make_run(tmp_path, models, prompts=lines(tmp_path / "p.jsonl", [{"prompt": "How many?"}])))
    assert inline(script, run, monkeypatch) == 0
    found = manifest(run)
    assert (found["metrics"]["before"], found["metrics"]["rows"], len(found["samples"])) == (None, 0, 1)


def test_answers_are_greedy_and_as_long_as_asked(script: ModuleType, models: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    question = script.encode_prompt("p.jsonl:1", "How many?", tokenizer, chat=True)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False)
    assert tokenizer.decode(question) == asked + "<|im_start|>assistant\n"
    assert script.encode_prompt("p.jsonl:1", "How many?", tokenizer, chat=False) == tokenizer("How many?")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.bfloat16).eval()
    for length in (1, 5):
        ids = list(question)
        with torch.no_grad():
            for _ in range(length):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[len(question) :], skip_special_tokens=True).strip()
        assert script.answer(model, tokenizer, [question], length) == [expected]


def test_the_same_held_out_rows_as_training(script: ModuleType, models: dict[str, Path], tmp_path: Path) -> None:
    train = load("train_sft")
    run = json.loads(make_run(tmp_path, models).read_text())
    ours, theirs = ([[row.where for row in part] for part in module.split_rows(run)] for module in (script, train))
    assert ours == theirs
    assert [len(part) for part in ours] == [7, 3]


BAD_PROMPTS = {
    "{": "p.jsonl:2: not JSON",
    '{"question": "hm"}': "p.jsonl:2: neither `prompt` nor `messages`",
    '{"prompt": ""}': "p.jsonl:2: `prompt` is empty",
    '{"messages": [{"role": "bot", "content": "hi"}]}': "p.jsonl:2: `messages[0]` has the role `bot`",
    '{"messages": [{"role": "assistant", "content": "hi"}]}': "p.jsonl:2: the last message is the assistant's",
}


@pytest.mark.parametrize("line", BAD_PROMPTS)
def test_a_bad_prompt_is_named(script: ModuleType, tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(script.InputError) as caught:
        script.load_prompts(path)
    assert caught.value.message.startswith(BAD_PROMPTS[line])
    assert caught.value.hint


def test_bad_input_fails_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    run = without_eval(make_run(tmp_path / "nothing", models))
    done = subprocess.run([sys.executable, SCRIPT, run], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: nothing to evaluate: no held-out rows and no prompts\n\n"
        "hint: set `data.eval.fraction`, or `evaluate.prompts` to a JSON lines file of prompts\n"
    )
    assert not (run.parent / "out").exists()


def test_models_that_cannot_be_compared(
    script: ModuleType,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert inline(script, make_run(tmp_path / "a", models | {"tuned": empty}), monkeypatch) == 2
    assert "is not a model folder" in events(capfd.readouterr().out, "error")[0]["message"]
    run = make_run(tmp_path / "b", models, "broken")
    assert inline(script, run, monkeypatch) == 1
    assert events(capfd.readouterr().out, "error")[0]["message"] == "the loss after the training is not a number"
    assert not (run.parent / "out" / "manifest.json").exists()


def pairs(count: int) -> list[dict]:
    """Two answers to each question."""
    made = []
    for number in range(count):
        asked = [{"role": "user", "content": f"{number}: How many sailors?"}]
        better, worse = f"{number} sailors watch.", "The harbour wall. " * (1 + number % 3)
        answers = [[{"role": "assistant", "content": text.strip()}] for text in (better, worse)]
        made.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    return made


def test_of_pairs_the_likelier_answer_is_asked_for(
    script: ModuleType, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards as DPOTrainer defines them: held against its own, on the same pairs, policy and reference."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    run = make_run(tmp_path / "pairs", models)
    lines(tmp_path / "pairs/data.jsonl", pairs(10))
    changed = json.loads(run.read_text())
    changed["experiment"]["train"] |= {"method": "dpo", "loss_on": "completion", "dpo": {"beta": 2.0}}
    run.write_text(json.dumps(changed), encoding="utf-8")
    assert inline(script, run, monkeypatch) == 0
    found = json.loads((tmp_path / "pairs/out/manifest.json").read_text())["metrics"]
    assert set(found["before"]) == {"loss_chosen", "loss_rejected", "prefers_chosen", "reward_margin"}
    assert found["before"]["reward_margin"] == 0
    assert (found["rows"], found["loss_change_percent"]) == (3, None)

    held_out = [pairs(10)[int(row.where.rpartition(":")[2]) - 1] for row in script.split_rows(changed)[1]]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.bfloat16) for name in ("tuned", "base")
    )
    settings = DPOConfig(
        str(tmp_path / "trl"), use_cpu=True, report_to="none", beta=2.0, per_device_eval_batch_size=1, max_length=256
    )
    rows = Dataset.from_list(held_out)
    trainer = DPOTrainer(
        policy,
        reference,
        settings,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(models["base"]),
    )
    trainer.evaluate()
    theirs = trainer.state.log_history[-1]
    assert abs(theirs["eval_rewards/margins"]) > 0.1
    assert found["after"]["reward_margin"] == pytest.approx(theirs["eval_rewards/margins"], rel=0.1)  # bf16
    assert found["after"]["reward_accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"], abs=1e-6)
