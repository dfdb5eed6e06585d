"""scripts/train_sft.py with `method: dpo`: TRL's tokens and TRL's loss, learned preferences, exact resumes."""

import json
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_scripts_train import (
    SCRIPT,
    bases,
    edit,
    events,
    front_door,
    inline,
    make_run,
    manifest,
    script,
    until,
    write_rows,
)

pytestmark = pytest.mark.slow
__all__ = ["bases", "script"]  # fixtures

DPO = {"beta": 0.1, "loss": "sigmoid", "quantize": False}
WORDS = ["quick", "brown", "fox", "jumps", "lazy", "dog", "harbour", "wall", "sailors", "watch"]


def pair(number: int) -> dict[str, Any]:
    """Which answer is the better one can be told from its words, whatever is asked."""
    word = WORDS[number % len(WORDS)]
    asked = {"role": "user", "content": f"Say {word} {number}."}
    better, worse = f"The {word} of the harbour.", "return it; raise " + "the error " * (number % 4)
    return {
        "prompt": [asked],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse.strip()}],
    }


def run_of(folder: Path, base: Path, rows: list[Any], held_out: float | None = None, **train: Any) -> Path:
    """A run.json for pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_rows(folder / "data.jsonl", rows)
    given = {"method": "dpo", "loss_on": "completion", "learning_rate": 1e-3, "dpo": DPO, **train}
    return make_run(folder / "run", base, data, held_out, **given)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_tokens_are_those_of_trl(script: ModuleType, bases: Any, tmp_path: Path, family: str) -> None:
    """Messages, whole conversations and plain text: prompt, chosen and rejected ids as DPOTrainer makes them."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    asked, better, worse = (pair(3)[key] for key in ("prompt", "chosen", "rejected"))
    plain = {"prompt": "The quick brown", "chosen": " fox jumps.", "rejected": " fox sleeps; it is lazy."}
    forms = [
        pair(3),
        {"prompt": [*asked, *better, *asked], "chosen": better, "rejected": worse},
        {"chosen": [*asked, *better], "rejected": [*asked, *worse]},
        plain,
        {key: plain["prompt"] + plain[key] for key in ("chosen", "rejected")},
    ]
    tokenizer = script.load_tokenizer(bases(family))
    run = json.loads(run_of(tmp_path, bases(family), forms[:1]).read_text())
    for raw in forms:
        settings = DPOConfig(str(tmp_path), use_cpu=True, report_to="none", max_length=None)
        trainer = DPOTrainer(
            str(bases(family)), args=settings, train_dataset=Dataset.from_list([raw]), processing_class=tokenizer
        )
        ours, _ = script.tokenize_pairs(run, tokenizer, [script.clean_pair("row 1", raw)], 512)
        assert {name: trainer.train_dataset[0][name] for name in script.PARTS} == ours[0]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "apo_zero", "sigmoid_norm"])
def test_loss_and_rewards_are_those_of_trl(script: ModuleType, bases: Any, tmp_path: Path, loss: str) -> None:
    """Our trainer and TRL's own on the same batch, cut to the same length, with the same adapter."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, limit = [pair(number) for number in range(4)], 30
    path = run_of(tmp_path, bases("llama"), rows, dpo={**DPO, "loss": loss}, batch_size=4, max_length=limit)
    run = json.loads(path.read_text())
    tokenizer = script.load_tokenizer(bases("llama"))
    settings = script.sft_config(run, has_eval=False)
    made, counts = script.tokenize_pairs(run, tokenizer, script.split_rows(run)[0], limit)
    assert counts["truncated_rows"] > 0
    ours, _ = script.make_trainer(run, bases("llama"), settings, tokenizer, made, None)
    plain = DPOConfig(
        str(tmp_path / "trl"),
        use_cpu=True,
        report_to="none",
        max_length=limit,
        beta=0.1,
        loss_type=[loss],
        model_init_kwargs={"dtype": "bfloat16"},
    )
    theirs = DPOTrainer(
        str(bases("llama")),
        args=plain,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=script.lora_config(run["experiment"]["train"], bases("llama")),
    )
    torch.manual_seed(0)
    weights = {name: torch.randn_like(p) * 0.05 for name, p in ours.model.named_parameters() if p.requires_grad}
    found = []
    for trainer in (ours, theirs):
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(weights[name])
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        trainer.model.train()
        value = trainer.compute_loss(trainer.model, batch)
        value.backward()
        gradients = [p.grad.norm().item() for p in trainer.model.parameters() if p.requires_grad]
        rewards = {name: trainer._metrics["train"][f"rewards/{name}"] for name in ("margins", "accuracies")}
        found.append((value.item(), gradients, rewards, batch["input_ids"].tolist()))
    assert found[0] == found[1]
    assert found[0][0] not in (0.0, pytest.approx(0.6931, abs=1e-3))  # the adapter does something


@pytest.fixture(scope="module")
def learned(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One preference training on a 4-bit base through the front door: its run.json and what it printed."""
    rows = [pair(number) for number in range(40)]
    run = run_of(
        tmp_path_factory.mktemp("learned"),
        bases("llama"),
        rows,
        0.25,
        dpo={**DPO, "quantize": True},
        epochs=4.0,
        batch_size=4,
        gradient_accumulation=2,
    )
    done = front_door(run)
    assert done.returncode == 0, done.stderr[-3000:]
    return run, done.stdout


def test_it_learns_what_is_preferred(learned: tuple[Path, str]) -> None:
    found = manifest(learned[0])
    metrics, first = found["metrics"], found["history"][0]
    assert first["loss"] == pytest.approx(0.6931, abs=0.01)  # policy and reference are one
    assert metrics["eval_reward_accuracy"] > 0.9
    assert metrics["eval_reward_margin"] > 0.1
    assert metrics["eval_loss"] < 0.65
    assert metrics["reward_margin"] > first["reward_margin"]
    counts = {"rows": 30, "eval_rows": 10, "examples": 30, "dropped_rows": 0}
    assert {key: metrics[key] for key in counts} == counts
    assert metrics["tokens_seen"] > metrics["tokens_trained"] > 0
    assert set(first) == {"step", "loss", "lr", "grad_norm", "reward_margin", "reward_accuracy"}
    last = found["eval_history"][-1]
    assert last["reward_margin"] == pytest.approx(metrics["eval_reward_margin"], abs=1e-5)
    assert found["versions"]["trl"] == "1.16.0"


def test_what_is_told_on_the_way(learned: tuple[Path, str]) -> None:
    said = events(learned[1])
    steps = [event for event in said if event["event"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, 17))
    assert all({"loss", "reward_margin", "reward_accuracy", "tokens_per_s", "memory_gib"} <= set(e) for e in steps)
    evals = [event for event in said if event["event"] == "eval"]
    assert evals[-1]["reward_accuracy"] > 0.9
    assert said[-1]["event"] == "end"
    card = (learned[0].parent / "out/README.md").read_text()
    assert "tags:\n- mergetune\n- dpo\n---" in card
    assert "| preferences | beta 0.1, loss sigmoid, 4-bit base |" in card
    assert "| validation reward accuracy | " in card


def test_rewards_of_held_out_pairs_are_a_mean_over_pairs(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    """TRL's mean over batches is that, as the batches are equal: 9 pairs are evaluated 3 at a time, not 4, 4 and 1."""
    run = json.loads(run_of(tmp_path, bases("llama"), [pair(n) for n in range(30)], 0.3, batch_size=4).read_text())
    tokenizer = script.load_tokenizer(bases("llama"))
    settings = script.sft_config(run, has_eval=True)
    parts = [script.tokenize_pairs(run, tokenizer, rows, 256)[0] for rows in script.split_rows(run)]
    trainer, _ = script.make_trainer(run, bases("llama"), settings, tokenizer, *parts)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    assert trainer.args.per_device_eval_batch_size == 3
    whole = trainer.evaluate()
    seen = dict(trainer.state.log_history[-1])
    trainer.args.per_device_eval_batch_size = 1
    singly = trainer.evaluate()
    assert whole["eval_loss"] == pytest.approx(singly["eval_loss"], rel=1e-2)
    alone = trainer.state.log_history[-1]
    for name in ("eval_rewards/margins", "eval_rewards/accuracies"):
        assert seen[name] == pytest.approx(alone[name], abs=0.02), name


def test_the_longest_pair_opens_the_run(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    rows = [pair(number) for number in range(12)]
    rows[7]["rejected"][0]["content"] = "raise the error " * 9
    run = json.loads(run_of(tmp_path, bases("llama"), rows).read_text())
    tokenizer = script.load_tokenizer(bases("llama"))
    made, counts = script.tokenize_pairs(run, tokenizer, script.split_rows(run)[0], 256)
    trainer, _ = script.make_trainer(run, bases("llama"), script.sft_config(run, has_eval=False), tokenizer, made, None)
    order = list(trainer._get_train_sampler())
    assert order[0] == 7
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (2, counts["longest_row_tokens"])


def test_a_killed_run_goes_on_where_it_was(
    script: ModuleType, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file

    rows, changes = [pair(number) for number in range(14)], {"epochs": 2.0, "gradient_accumulation": 2, "save_steps": 4}
    changes["dpo"] = {**DPO, "quantize": True}
    run = run_of(tmp_path / "killed", bases("llama"), rows, **changes)
    code, steps = until(run, 6, signal.SIGKILL)
    assert (code, steps[:6]) == (-signal.SIGKILL, [1, 2, 3, 4, 5, 6])
    assert inline(script, run, monkeypatch) == 0
    assert [e["step"] for e in events(capfd.readouterr().out, "step")] == list(range(5, 15))
    whole = run_of(tmp_path / "whole", bases("llama"), rows, **changes)
    assert inline(script, whole, monkeypatch) == 0
    resumed, straight = (load_file(r.parent / "out/adapter_model.safetensors") for r in (run, whole))
    assert all(resumed[name].float().sub(straight[name].float()).abs().max() < 1e-4 for name in straight)
    for one, other in zip(manifest(run)["history"], manifest(whole)["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["reward_margin"] == pytest.approx(other["reward_margin"], abs=1e-4)
    for key in ("tokens_seen", "tokens_trained", "steps", "reward_margin", "reward_accuracy"):
        assert manifest(run)["metrics"][key] == pytest.approx(manifest(whole)["metrics"][key], abs=1e-4)
    assert manifest(run)["resumed_from_step"] == 4


def test_pairs_that_teach_nothing_are_left_out_and_named(
    script: ModuleType, bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [pair(0), pair(1) | {"rejected": pair(1)["chosen"]}, pair(2)]
    rows[2]["prompt"][0]["content"] = "harbour wall " * 30
    run = json.loads(run_of(tmp_path, bases("llama"), rows).read_text())
    tokenizer = script.load_tokenizer(bases("llama"))
    read = script.split_rows(run)[0]
    made, counts = script.tokenize_pairs(run, tokenizer, read, 48)
    assert (len(made), counts["examples"], counts["dropped_rows"], counts["truncated_rows"]) == (1, 1, 2, 0)
    first, second = (event["message"] for event in events(capsys.readouterr().out, "warning"))
    assert first.startswith("1 rows are dropped, the prompt fills `max_length: 48` (the longest prompt has ")
    assert first.endswith("tokens): data.jsonl:3")
    same = "`chosen` and `rejected` are the same within `max_length: 48`"
    assert second == f"1 pairs are dropped, {same}: data.jsonl:2"
    with pytest.raises(script.InputError) as caught:
        script.tokenize_pairs(run, tokenizer, read[1:2], 48)
    assert caught.value.message == f"every pair would be dropped: {same}"
    with pytest.raises(script.InputError, match="every row would be dropped: the prompt fills"):
        script.tokenize_pairs(run, tokenizer, read[2:], 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"beta": 0.2}}, "`train.sft.beta` is not free"),
        ({"sft": {"label_smoothing_factor": 0.1}}, "`train.sft.label_smoothing_factor` is not free"),
        ({"sft": {"sync_ref_model": True}}, "`train.sft.sync_ref_model` is set by the training script"),
        ({"sft": {"packing_strategy": "bfd"}}, "`train.sft.packing_strategy` is not a field of DPOConfig"),
        ({"sft": {"learning_ratio": 1}}, "`train.sft.learning_ratio` is not a field of DPOConfig"),
    ],
)
def test_settings_that_are_not_free(script: ModuleType, bases: Any, tmp_path: Path, changes: Any, message: str) -> None:
    run = json.loads(run_of(tmp_path, bases("llama"), [pair(0)], **changes).read_text())
    with pytest.raises(script.InputError) as caught:
        script.sft_config(run, has_eval=False)
    assert caught.value.message == message


def test_settings_pass_through(script: ModuleType, bases: Any, tmp_path: Path) -> None:
    sft = {"label_smoothing": 0.1, "weight_decay": 0.02}
    loss = {**DPO, "beta": 0.3, "loss": "robust"}
    run = json.loads(run_of(tmp_path, bases("llama"), [pair(0)], dpo=loss, sft=sft).read_text())
    made = script.sft_config(run, has_eval=False)
    assert (made.beta, made.loss_type, made.label_smoothing, made.weight_decay) == (0.3, ["robust"], 0.1, 0.02)
    assert made.max_length is None


@pytest.mark.parametrize(
    ("rows", "train", "more", "message", "hint"),
    [
        ([{"messages": pair(0)["prompt"] + pair(0)["chosen"]}], {}, {}, "data.jsonl:1: no pair of answers", "qlora"),
        ([pair(0)], {"method": "lora"}, {}, "data.jsonl:1: no messages: the row has `prompt`", "`train.method: dpo`"),
        ([pair(0), pair(1)], {"gradient_accumulation": 2}, {"processes": 2}, "`method: dpo` trains in one process", ""),
    ],
)
def test_what_does_not_go_together(
    script: ModuleType,
    bases: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    rows: list[Any],
    train: dict[str, Any],
    more: dict[str, Any],
    message: str,
    hint: str,
) -> None:
    run = edit(run_of(tmp_path, bases("llama"), rows, **train), **more)
    assert inline(script, run, monkeypatch) == 2
    (said,) = events(capfd.readouterr().out, "error")
    assert said["message"].startswith(message)
    assert hint in said["hint"]
    assert sys.modules["train_sft"].__file__ == str(SCRIPT)
