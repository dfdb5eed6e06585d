"""scripts/train_mlx.py against train_sft.py: the same rows, losses, steps and artifact; and what a kill leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from mlx_runs import PLAIN, ROOT, edit, events, inline, load, make_run, make_twin, manifest, merged, write_rows
from test_scripts_train import CHAT, LONGER, ONE_THREAD, conversations, trainer_of

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts/train_mlx.py"
TURNS = [{"from": "human", "value": "Say 1."}, {"from": "gpt", "value": "The quick brown fox."}]
ROWS = {
    "messages": [{"messages": CHAT}, {"messages": LONGER}, *conversations(9)],
    "conversations": [{"conversations": TURNS * (1 + i % 3)} for i in range(7)],
    "pairs of messages": [
        {"prompt": LONGER[:3], "completion": LONGER[3:]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ]
    * 3,
    "pairs of text": [{"prompt": "How many?" * (1 + i), "completion": " 42 sailors."} for i in range(7)],
    "text": [{"text": "The quick brown fox jumps. " * (1 + i)} for i in range(7)],
}
CASES = [("messages", loss_on) for loss_on in ("assistant", "completion", "all")]
CASES += [("conversations", "assistant"), ("conversations", "all"), ("pairs of messages", "completion")]
CASES += [
    ("pairs of messages", "assistant"),
    ("pairs of text", "completion"),
    ("pairs of text", "all"),
    ("text", "all"),
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """train_mlx.py as a module."""
    import torch

    torch.set_num_threads(1)
    return load("train_mlx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twin(tmp_path_factory.mktemp("bases") / "qwen3", "qwen3")


def histories(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The manifest of a run by one of the two training scripts."""
    assert inline(load(name), run, monkeypatch) == 0
    return manifest(run)


@pytest.mark.parametrize(("rows", "loss_on"), CASES)
def test_the_same_tokens_and_losses_as_with_torch(
    base: Path, rows: str, loss_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate that moves nothing every loss is the base's: rows, labels, order and means are all in it."""
    changes: dict = {"loss_on": loss_on, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-9}
    changes |= {"epochs": 2.0, "max_length": 48, "save_steps": 2}
    told = {}
    for name, sft in (("train_sft", {}), ("train_mlx", PLAIN)):
        data = write_rows(tmp_path / "data.jsonl", ROWS[rows])
        run = make_run(tmp_path / name, base, data, 0.2, sft=sft, **changes)
        told[name] = histories(name, run, monkeypatch)
    torch, mlx = told["train_sft"], told["train_mlx"]
    speed = {"tokens_per_s", "train_loss", "eval_loss"}
    assert torch["metrics"].keys() == mlx["metrics"].keys()
    assert {k: v for k, v in torch["metrics"].items() if k not in speed} == {
        k: v for k, v in mlx["metrics"].items() if k not in speed
    }
    for key, name in (("history", "loss"), ("eval_history", "eval_loss")):
        assert [entry["step"] for entry in torch[key]] == [entry["step"] for entry in mlx[key]]
        # Both compute in bfloat16, each rounding in its own order.
        assert [e[name] for e in mlx[key]] == pytest.approx([e[name] for e in torch[key]], rel=2e-3)
    assert [e["lr"] for e in mlx["history"]] == pytest.approx([e["lr"] for e in torch["history"]])
    assert [e["grad_norm"] for e in mlx["history"]] == pytest.approx([e["grad_norm"] for e in torch["history"]], rel=1)
    assert mlx.keys() - {"trained_on", "warnings"} == torch.keys()


def test_the_same_steps_as_with_torch(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same adapter to begin with, every step's loss and gradient: accumulation, clipping, AdamW, schedule."""
    import torch

    sft = {"warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta2": 0.95}
    sft["lr_scheduler_type"] = "cosine"
    changes: dict = {"batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "max_steps": 8}
    data = write_rows(tmp_path / "data.jsonl", conversations(13))
    run = make_run(tmp_path / "mlx", base, data, sft=sft | PLAIN, **changes)
    request = json.loads(run.read_text())
    model, _, _ = script.load_model(request, base, script.read_choices(request))
    trainer, _ = trainer_of(load("train_sft"), make_run(tmp_path / "torch", base, data, sft=sft, **changes))
    began = 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            module = model
            for part in name.removeprefix("base_model.model.").partition(".lora_A")[0].split("."):
                module = module[int(part)] if part.isdigit() else module[part]
            parameter.data = torch.from_numpy(numpy.array(module.lora_a).T.copy())
            began += 1
    assert began == 14
    trainer.train()
    theirs = load("train_sft").history(trainer.state.log_history, "loss", lr="learning_rate", grad_norm="grad_norm")
    ours = histories("train_mlx", run, monkeypatch)["history"]
    assert [e["lr"] for e in ours] == pytest.approx([e["lr"] for e in theirs])
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=5e-3)
    assert [e["grad_norm"] for e in ours] == pytest.approx([e["grad_norm"] for e in theirs], rel=5e-2)
    assert ours[-1]["loss"] < 0.97 * ours[0]["loss"]


def test_losses_in_half_the_memory_are_those_in_float32(script: ModuleType) -> None:
    import mlx.core as mx
    from mlx import nn

    mx.random.seed(0)
    scores = (4 * mx.random.normal((2, 40, 3000)) + 20).astype(mx.bfloat16)
    wanted = mx.random.randint(0, 3000, (2, 40))

    def exact(logits: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits.astype(mx.float32), wanted).mean()

    value, slope = mx.value_and_grad(lambda logits: script.token_losses(logits, wanted).mean())(scores)
    expected, expected_slope = mx.value_and_grad(exact)(scores)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert mx.abs(slope - expected_slope).max().item() < 0.01 * mx.abs(expected_slope).max().item()
    rough = nn.losses.cross_entropy(scores, wanted).mean()
    assert abs(rough.item() - expected.item()) > 10 * abs(value.item() - expected.item())


def test_recomputing_layers_changes_nothing(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(4))
    runs = [make_run(tmp_path / name, base, data, sft=sft, max_steps=3) for name, sft in (("yes", {}), ("no", PLAIN))]
    done = front_door(runs[0])
    assert done.returncode == 0, done.stderr
    assert inline(script, runs[1], monkeypatch) == 0
    recomputed, kept = ((run.parent / "out" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert recomputed == kept


# The artifact


def front_door(run: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    """The script as a user starts it."""
    command = [sys.executable, SCRIPT, run, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, str]:
    """A run through the front door with held-out rows, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = write_rows(folder / "data.jsonl", conversations(10))
    run = make_run(folder / "run", base, data, 0.2, gradient_accumulation=2, save_steps=2, learning_rate=1e-2)
    done = front_door(run)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_events_tell_what_goes_on(quickstart: tuple[Path, str]) -> None:
    said = events(quickstart[1])
    names = ["read data", "tokenize", "load base", "train", "save"]
    assert [event["name"] for event in said if event["event"] == "phase"] == names
    steps = [event for event in said if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    known = {"event", "time", "step", "total", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "memory_gib"}
    assert all(event.keys() == known and event["total"] == 4 for event in steps)
    assert [event["epoch"] for event in steps] == [0.25, 0.5, 0.75, 1.0]
    assert said[-1]["event"] == "end" and said[-1]["steps"] == 4


def test_the_artifact_is_a_peft_adapter_with_mlx_beside_it(quickstart: tuple[Path, str]) -> None:
    run, told = quickstart[0], manifest(quickstart[0])
    out = run.parent / "out"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    files += ["mlx/adapter_config.json", "mlx/adapters.safetensors", "mlx/mlx_config.yaml"]
    assert sorted(entry["path"] for entry in told["files"]) == files
    assert not (run.parent / "work" / "checkpoints").exists()
    card = (out / "README.md").read_text()
    assert "base_model: acme/tiny\nbase_model_relation: adapter\n" in card
    assert "| trained on | a local folder, not quantised |" in card
    assert told["trained_on"]["quantization"] is None
    assert told["versions"].keys() == {"python", "mlx", "mlx-lm", "transformers", "trl", "datasets"}
    assert told["measured"]["peak_memory_gib"] >= 0
    assert front_door(run).returncode == 2  # it is there already


def test_mlx_lm_takes_the_config_and_the_rows(quickstart: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    """`mlx_lm.lora` passes over keys that it does not know: each one must be among its own."""
    import yaml
    from mlx_lm.lora import CONFIG_DEFAULTS

    run = quickstart[0]
    path, rows = run.parent / "out/mlx/mlx_config.yaml", run.parent / "work/mlx-data"
    said = yaml.safe_load(path.read_text())
    assert said.keys() <= CONFIG_DEFAULTS.keys()
    command = [sys.executable, "-m", "mlx_lm", "lora", "--config", path, "--data", rows, "--model", base]
    command += ["--adapter-path", tmp_path / "adapters", "--iters", "4"]
    quick = ONE_THREAD | {"MLX_DISABLE_COMPILE": "1"}  # on the CPU it would start a C++ compiler for three steps
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quick)
    assert done.returncode == 0, done.stderr
    used = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert {key: used[key] for key in said if key not in ("model", "iters")} == {
        key: value for key, value in said.items() if key not in ("model", "iters")
    }
    read = load("convert_adapter").read_tensors
    theirs, ours = (read(f / "adapters.safetensors") for f in (tmp_path / "adapters", path.parent))
    assert {n: t.values.shape for n, t in theirs.items()} == {n: t.values.shape for n, t in ours.items()}


@pytest.mark.parametrize("family", ["phi3", "mistral", "gemma3_vl"])
def test_other_layouts_reach_the_merge(
    script: ModuleType, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined `qkv_proj`, another name for Llama's classes, and a vision-language base with wrapped names."""
    from mlx_runs import mlx_logits, mlx_model, torch_logits
    from tiny_models import make_tiny

    sizes = {"num_hidden_layers": 6} if family == "gemma3_vl" else {}
    other = make_tiny(tmp_path / "base", family, **sizes)
    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}] * 3)
    changes: dict = {"max_steps": 3, "learning_rate": 0.02, "sft": PLAIN}
    run = make_run(tmp_path / "run", other, data, **changes)
    assert inline(script, run, monkeypatch) == 0
    out, ids = run.parent / "out", [1, 40, 300, 77, 5, 410]
    ours = mlx_logits(mlx_model(other, out / "mlx"), ids)
    scale = abs(ours).max()
    assert abs(torch_logits(other, ids) - ours).max() > 0.02 * scale
    assert abs(torch_logits(other, ids, out) - ours).max() < 1e-4 * scale
    assert abs(torch_logits(merged(other, out, tmp_path / "merge"), ids) - ours).max() < 0.02 * scale


# Killed, and started again


def until(run: Path, step: int, number: signal.Signals) -> tuple[int, list[int]]:
    """Start the script, send a signal once `step` is reported; its exit code and the steps it ran."""
    command = [sys.executable, SCRIPT, run]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ONE_THREAD)
    assert child.stdout is not None
    steps: list[int] = []
    for line in child.stdout:
        found = [event["step"] for event in events(line, "step")]
        steps += found
        if found == [step]:
            child.send_signal(number)
    return child.wait(timeout=120), steps


def test_a_killed_run_goes_on_where_it_was(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """SIGKILL, then SIGTERM, then a torn checkpoint: the weights are those of a run that nothing interrupted."""
    data = write_rows(tmp_path / "data.jsonl", conversations(40))
    changes: dict = {"epochs": 2.0, "gradient_accumulation": 2, "save_steps": 4, "lora": {"dropout": 0.1}}
    runs = [make_run(tmp_path / name, base, data, 0.1, **changes) for name in ("killed", "whole")]
    for run in runs:  # only the last layer: what was not trained has no place in the optimizer's state
        request = json.loads(run.read_text())
        request["experiment"]["train"]["mlx"] = {"num_layers": 1}
        run.write_text(json.dumps(request))
    run, whole = runs
    code, steps = until(run, 6, signal.SIGKILL)
    assert (code, steps[:6]) == (-signal.SIGKILL, [1, 2, 3, 4, 5, 6])
    code, steps = until(run, steps[-1] + 1, signal.SIGTERM)
    assert code == 130
    left = run.parent / "work" / "checkpoints"
    last = max(left.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    assert last.name == f"checkpoint-{steps[-1]}" and len(list(left.iterdir())) == 2
    with (last / "optimizer.safetensors").open("r+b") as handle:
        handle.truncate(100)
    assert inline(script, run, monkeypatch) == 0
    said = events(capfd.readouterr().out)
    warnings = [e["message"] for e in said if e["event"] == "warning"]
    assert f"`{last.name}` is incomplete or of another run: removed" in warnings
    assert inline(script, whole, monkeypatch) == 0
    resumed, straight = manifest(run), manifest(whole)
    assert 4 <= resumed["resumed_from_step"] < 36 and straight["resumed_from_step"] == 0
    for key in ("history", "eval_history"):
        assert resumed[key] == straight[key]
    assert resumed["metrics"] | {"tokens_per_s": 0} == straight["metrics"] | {"tokens_per_s": 0}
    one, other = ((r.parent / "out" / "adapter_model.safetensors").read_bytes() for r in (run, whole))
    assert one == other


def test_a_checkpoint_of_another_run_is_not_resumed(script: ModuleType, base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base, write_rows(tmp_path / "data.jsonl", conversations(30)), save_steps=1)
    until(run, 3, signal.SIGKILL)
    request = json.loads(run.read_text())
    assert script.last_checkpoint(request).name.startswith("checkpoint-")
    assert script.last_checkpoint(request | {"fingerprint": "1" * 64}) is None
    assert script.last_checkpoint(request) is None


def test_a_run_that_broke_after_its_last_step_trains_no_more(
    script: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", conversations(10))
    run = make_run(tmp_path / "run", base, data, 0.2, max_steps=3, sft=PLAIN)
    experiment = json.loads(run.read_text())["experiment"]
    with pytest.raises(AttributeError):  # the card needs a hypothesis, and comes after the weights
        inline(script, edit(run, experiment=experiment | {"hypothesis": None}), monkeypatch)
    first = (run.parent / "out" / "adapter_model.safetensors").read_bytes()
    capfd.readouterr()
    assert inline(script, edit(run, experiment=experiment), monkeypatch) == 0
    assert events(capfd.readouterr().out, "step") == []
    assert (run.parent / "out" / "adapter_model.safetensors").read_bytes() == first
    told = manifest(run)
    assert (told["metrics"]["steps"], told["eval_history"][-1]["step"]) == (3, 3)
