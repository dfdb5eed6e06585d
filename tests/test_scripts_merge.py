"""scripts/merge_adapter.py: bit-identical to PEFT, refuses by name, and a killed merge leaves no artifact."""

import importlib.util
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "scripts" / "merge_adapter.py"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("merge_adapter", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["merge_adapter"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base by family, made once: copy it before changing it."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(family: str) -> Path:
        from tiny_models import make_tiny

        if family not in made:
            if family == "gemma3_vl_hub":
                made[family] = like_the_hub(base("gemma3_vl"), root / family)
            else:
                made[family] = make_tiny(root / family, family, vocab=384)
        return made[family]

    return base


@pytest.fixture(scope="module")
def adapters(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A plain q_proj adapter by family, made once: copy it before changing it."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def adapter(family: str) -> Path:
        if family not in made:
            made[family] = make_adapter(bases(family), root / family, r=4, target_modules=["q_proj"])
        return made[family]

    return adapter


def like_the_hub(base: Path, folder: Path) -> Path:
    """Gemma 3's published files call the vision tower `vision_tower.vision_model`, as transformers 4 did."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in tensors_of(base)}
    renamed = {names[name]: tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_model(base: Path, dtype: str = "bfloat16") -> Any:
    import transformers

    is_vision = "vision_config" in json.loads((base / "config.json").read_text())
    kind = transformers.AutoModelForImageTextToText if is_vision else transformers.AutoModelForCausalLM
    return kind.from_pretrained(base, dtype=dtype)


def make_adapter(
    base: Path, folder: Path, *, stored: str = "float32", embeddings: bool | str = "auto", **settings: Any
) -> Path:
    """Save a PEFT adapter with random weights in dtype `stored`; `settings` go to LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    torch.manual_seed(7)
    get_peft_model(load_model(base), LoraConfig(**settings)).save_pretrained(folder, save_embedding_layers=embeddings)
    path = folder / "adapter_model.safetensors"
    # Noise on everything: a fresh lora_B is zero and would hide mistakes.
    noisy = {name: tensor.float() + 0.05 * torch.randn(tensor.shape) for name, tensor in load_file(path).items()}
    save_file({name: tensor.to(getattr(torch, stored)) for name, tensor in noisy.items()}, path)
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def merge_with_peft(base: Path, adapter: Path, folder: Path, dtype: str) -> Path:
    from peft import PeftModel

    PeftModel.from_pretrained(load_model(base, dtype), adapter).merge_and_unload().save_pretrained(folder)
    return folder


def make_run(base_folder: Path, adapter: Path, output: Path, **experiment: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run_id": "quickstart-0f3a9c21",
        "fingerprint": "0f3a9c21" * 8,
        "stage": "merge",
        "attempt": 1,
        "experiment": {
            "name": "quickstart",
            "hypothesis": "Loss falls below 1.2.",
            "base": {"model": str(base_folder), "revision": None},
            "data": {"dataset": "acme/coach", "revision": "5d2", "subset": None, "split": "train"},
            "train": {"method": "lora"},
            **experiment,
        },
        "inputs": {"base": {"path": str(base_folder)}, "adapter": {"path": str(adapter)}},
        "output": {"path": str(output)},
        "work": str(output.parent / "work"),
        "device": "cpu",
        "predicted": {"duration_s": 60},
    }


def start(run: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    (folder / "run.json").write_text(json.dumps(run))
    command = [sys.executable, str(SCRIPT), str(folder / "run.json")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events_in(text: str) -> list[dict[str, Any]]:
    lines = (line for line in text.splitlines() if line.startswith("MERGETUNE "))
    return [json.loads(line.removeprefix("MERGETUNE ")) for line in lines]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load a safetensors file, let `change` edit the tensors, save it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


PATTERNS = {
    "rank_pattern": {"k_proj": 2, r"^model.layers.0.self_attn.v_proj": 8},
    "alpha_pattern": {"_proj": 99, r"layers\.1\.self_attn\.(q|k)_proj": 5, "v_proj": 32},
}
SAME = {  # case: family, LoraConfig fields
    "lora": ("llama", {"target_modules": ATTENTION}),
    "alpha that is no multiple of the rank": ("llama", {"target_modules": ATTENTION, "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora with rslora and patterns": (
        "llama",
        {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True} | PATTERNS,
    ),
    "patterns": ("llama", {"target_modules": ATTENTION} | PATTERNS),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "lora on an untied lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"], "embeddings": False}),
    "untied modules to save": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "a saved norm": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm"]}),
    "bf16 adapter": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"], "stored": "bfloat16"}),
    "bf16 dora": ("llama", {"target_modules": ATTENTION, "use_dora": True, "stored": "bfloat16"}),
    "fp16 adapter": ("llama", {"target_modules": ATTENTION, "stored": "float16"}),
    "gaussian init": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "tied gemma 3": ("gemma3_text", {"target_modules": "all-linear"}),
    "tied qwen 3": ("qwen3", {"target_modules": "all-linear", "use_dora": True}),
    "fused phi 3": ("phi3", {"target_modules": FUSED}),
    "fused phi 3 dora": ("phi3", {"target_modules": "all-linear", "use_dora": True}),
    "gemma 3 vision": ("gemma3_vl", {"target_modules": ["q_proj", "v_proj"]}),
    "gemma 3 vision, names of the Hub": ("gemma3_vl_hub", {"target_modules": "all-linear"}),
    "gemma 3 vision dora": ("gemma3_vl_hub", {"target_modules": "all-linear", "use_dora": True}),
    "gemma 3 projector": (
        "gemma3_vl_hub",
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_equals_peft(case: str, script: ModuleType, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, settings = SAME[case]
    adapter = make_adapter(bases(family), tmp_path / "adapter", **{"r": 4, "lora_alpha": 8} | settings)
    assert_equals_peft(script, bases(family), adapter, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equals_peft_on_a_base_of_another_dtype(
    dtype: str, script: ModuleType, bases: Callable[[str], Path], adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    load_model(bases("llama"), dtype).save_pretrained(tmp_path / "base")
    assert_equals_peft(script, tmp_path / "base", adapters("llama"), tmp_path, dtype)


def assert_equals_peft(script: ModuleType, base: Path, adapter: Path, folder: Path, dtype: str = "bfloat16") -> None:
    import torch

    script.merge(make_run(base, adapter, folder / "merged"))
    ours, theirs, before = (
        tensors_of(path) for path in (folder / "merged", merge_with_peft(base, adapter, folder / "peft", dtype), base)
    )
    assert set(ours) == set(theirs) == set(before)
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert different == []
    metrics = json.loads((folder / "merged" / "manifest.json").read_text())["metrics"]
    changed = sum(not torch.equal(ours[name], before[name]) for name in ours)
    assert metrics["merged"] + metrics["replaced"] == changed > 0
    assert metrics["tensors"] == len(ours)


def test_whole_run(bases: Callable[[str], Path], tmp_path: Path) -> None:
    import transformers
    from safetensors import safe_open

    base = shutil.copytree(bases("llama"), tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    extra = "tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json"
    extra += " preprocessor_config.json processor_config.json additional_chat_templates/tool_use.jinja"
    for name in extra.split():
        (base / name).write_bytes(b'{"\\u00e9":\r\n 1}  ')
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "notes.txt"):
        (base / name).write_bytes(b"not copied")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", r=4, **settings)
    process = start(make_run(base, adapter, tmp_path / "merged"), tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    events = events_in(out)
    assert [event["event"] for event in events if event["event"] != "progress"] == [
        "start", "phase", "warning", "phase", "phase", "end"
    ]  # fmt: skip
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] and progress[-1]["unit"] == "MiB"

    merged = tmp_path / "merged"
    manifest = json.loads((merged / "manifest.json").read_text())
    copied = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    copied -= {"README.md", "pytorch_model.bin", "consolidated.safetensors", "notes.txt"}
    assert {file["path"] for file in manifest["files"]} == copied | {"README.md"}
    for name in copied - {path.name for path in base.glob("model-*.safetensors")}:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    for path in base.glob("model-*.safetensors"):
        with safe_open(path, "pt") as old, safe_open(merged / path.name, "pt") as new:
            assert new.metadata() == old.metadata() == {"format": "pt"}
            assert list(new.keys()) == list(old.keys())
    weights = sum(path.stat().st_size for path in base.glob("model-*.safetensors"))
    assert manifest["metrics"] == {"tensors": 21, "merged": 2, "replaced": 1, "bytes": weights}
    assert 0.05 < manifest["measured"]["peak_memory_gib"] < 1
    assert set(manifest["versions"]) == {"python", "torch", "safetensors"}
    assert (manifest["stage"], manifest["predicted"]) == ("merge", {"duration_s": 60})
    assert transformers.AutoModelForCausalLM.from_pretrained(merged).config.vocab_size == 384


def test_killed_in_the_middle(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    base, output = shutil.copytree(bases("llama"), tmp_path / "base"), tmp_path / "merged"
    add_sparse_shard(base, 400_000_000)  # long enough to copy that the kill below always lands inside it
    process = start(make_run(base, adapters("llama"), output), tmp_path)
    assert process.stdout
    for line in process.stdout:
        if '"event": "progress"' in line:
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(output.iterdir()) != [] and not (output / "manifest.json").exists()

    script.merge(make_run(base, adapters("llama"), output))
    assert (output / "manifest.json").exists()
    assert (output / "zeros.safetensors").stat().st_size == (base / "zeros.safetensors").stat().st_size
    shutil.rmtree(output)  # pytest would keep it for three more runs


def add_sparse_shard(base: Path, size: int, name: str = "zeros.safetensors") -> None:
    """Add a tensor of `size` zero bytes in a file of its own that takes no disk."""
    header = json.dumps({"zeros": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (base / name).open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + size)
    index = base / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=placed | {"zeros": name})


def test_too_little_disk(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    add_sparse_shard(base, shutil.disk_usage(tmp_path).total + 10**12)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, hard))  # a merge without the check must not fill this disk
    try:
        with pytest.raises(script.InputError, match="GB of free disk, this stage writes about"):
            script.merge(make_run(base, adapters("llama"), tmp_path / "merged"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "merged").iterdir()) == []


def test_finished_artifact_is_left_alone(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    run = make_run(bases("llama"), adapters("llama"), tmp_path / "merged")
    script.merge(run)
    before = (tmp_path / "merged" / "manifest.json").read_bytes()
    with pytest.raises(script.InputError, match="already holds a finished artifact"):
        script.merge(run)
    assert (tmp_path / "merged" / "manifest.json").read_bytes() == before


def test_refusal_through_the_front_door(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", use_qalora=True)
    process = start(make_run(bases("llama"), adapter, tmp_path / "merged"), tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == (
        "error: adapter_config.json: `use_qalora` is set, which cannot be merged here: "
        "QA-LoRA belongs to a quantised base\n\n"
        "hint: train without `use_qalora`, or use the adapter with PEFT, unmerged\n"
    )
    assert [event["event"] for event in events_in(out)] == ["start", "phase", "error"]
    assert not (tmp_path / "merged").exists()


SETTINGS = {  # adapter_config.json fields: the error
    "peft_type": ("LOHA", "`peft_type` is `LOHA`, only `LORA` can be merged here"),
    "bias": ("all", "`bias` is `all`, only `none` can be merged here"),
    "lora_bias": (True, "`lora_bias` is set, which cannot be merged here: it trained a bias"),
    "fan_in_fan_out": (True, "`fan_in_fan_out` is set, .* stores these layers transposed"),
    "target_parameters": (["experts.down_proj"], "`target_parameters` is set, .* mixture-of-experts"),
    "trainable_token_indices": ([1, 2], "`trainable_token_indices` is set, .* single rows of the embeddings"),
    "alora_invocation_tokens": ([5], "`alora_invocation_tokens` is set, .* no single set of weights"),
    "use_qalora": (True, "`use_qalora` is set, .* quantised base"),
    "layer_replication": ([[0, 2]], "`layer_replication` is set, .* repeats layers"),
    "kasa_config": ({"beta": 1e-4}, "`kasa_config` is set, .* changes the base"),
    "arrow_config": ({"top_k": 3}, "`arrow_config` is set, .* for each token"),
    "velora_config": ({"scale": 1.0}, "`velora_config` is set, .* does not know what it does"),
    "from_the_future": ("yes", "`from_the_future` is set, .* does not know what it does"),
    "use_dora": (True, "`use_dora` is `True`, the tensors of `model.layers.0.self_attn.q_proj` disagree"),
    "r": (8, r"`model.layers.0.self_attn.q_proj.weight` .* \[64, 4\] and \[4, 64\] where .* says rank 8"),
    "rank_pattern": ({"q_proj": 2}, "says rank 2"),
    "alpha_pattern": ({"(": 2}, r"`alpha_pattern` has `\(`"),
    "init_lora_weights": ("mica", "`init_lora_weights` is `mica`, which this script does not know"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_refuses_setting(
    key: str, bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    value, message = SETTINGS[key]
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **{key: value})
    refuse(script, bases("llama"), adapter, message)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_refuses_init_that_changed_the_base(
    init: str, bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", init_lora_weights=init)
    refuse(script, bases("llama"), adapter, f"`init_lora_weights` is `{init}`, which changed the base")


def refuse(script: ModuleType, base: Path, adapter: Path, message: str) -> None:
    """The merge ends in this error, with a hint, and has not touched its output folder."""
    output = adapter.parent / "merged"
    with pytest.raises(script.InputError, match=message) as caught:
        script.merge(make_run(base, adapter, output))
    assert caught.value.hint
    assert not output.exists()


TRAINED = {  # family, LoraConfig fields: the error
    "lora on embeddings": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"`base_model\S+embed_tokens.base_layer.weight` cannot be merged: it is a copy .* LoRA is on an embedding",
    ),
    "lora on embeddings, base not saved": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "embeddings": False},
        r"`base_model.model.model.embed_tokens.lora_embedding_A` cannot be merged: it is LoRA on an embedding",
    ),
    "token rows": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
        "`trainable_token_indices`",
    ),
    "tied embeddings": (
        "qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "trained `model.embed_tokens.weight`, but the base ties",
    ),
    "tied lm_head": (
        "gemma3_text",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "trained `lm_head.weight`, but the base ties its embeddings",
    ),
    "tied lm_head of a vision model": (
        "gemma3_vl_hub",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "trained `lm_head.weight`, but the base ties its embeddings",
    ),
    "lora on a tied lm_head": (
        "qwen3",
        {"target_modules": ["lm_head"], "embeddings": False},
        "trained `lm_head.weight`, but the base ties",
    ),
    "convolution": (
        "gemma3_vl_hub",
        {"target_modules": ["patch_embedding"]},
        r"`vision_tower\S+patch_embedding.weight` has shape \[32, 3, 14, 14\]: only LoRA on linear layers",
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_refuses_adapter(case: str, script: ModuleType, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, settings, message = TRAINED[case]
    refuse(script, bases(family), make_adapter(bases(family), tmp_path / "adapter", r=4, **settings), message)


def rename(tensors: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def drop(tensors: dict[str, Any], part: str) -> None:
    del tensors[next(name for name in tensors if part in name)]


def spoil(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def add(tensors: dict[str, Any], name: str, shape: tuple[int, ...], dtype: str = "float32") -> None:
    import torch

    tensors[f"base_model.model.{name}"] = torch.zeros(shape, dtype=getattr(torch, dtype))


FIRST = "layers.0.self_attn.q_proj"
WEIGHTS = {  # what happens to adapter_model.safetensors: the error
    "other layer": (lambda t: rename(t, "layers.1", "layers.7"), r"`model.layers.7.\S+` matches no tensor of the base"),
    "no prefix": (lambda t: rename(t, "base_model.model.", ""), "does not begin with `base_model.model.`"),
    "adapter name": (lambda t: rename(t, "lora_A.", "lora_A.default."), "does not know its kind"),
    "half": (lambda t: drop(t, "lora_B"), "only half of `model.layers.0.self_attn.q_proj`: `lora_B.weight` is missing"),
    "empty": (dict.clear, "holds no tensors"),
    "bias": (lambda t: add(t, f"model.{FIRST}.lora_B.bias", (64,)), "it is the bias of a LoRA layer"),
    "magnitude": (
        lambda t: add(t, f"model.{FIRST}.lora_magnitude_vector", (64,)),
        "`use_dora` is `False`, the tensors",
    ),
    "integers": (lambda t: add(t, "lm_head.weight", (384, 64), "int8"), "`base_model.model.lm_head.weight` in .* `I8`"),
    "resized": (
        lambda t: add(t, "lm_head.weight", (390, 64)),
        r"`base_model.model.lm_head.weight` has shape \[390, 64\], the base's `lm_head.weight` \[384, 64\]",
    ),
    "twice": (
        lambda t: add(t, f"language_model.{FIRST}.weight", (64, 64)),
        f"two tensors of the adapter change `model.{FIRST}.weight`",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_refuses_adapter_weights(
    case: str, bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    change, message = WEIGHTS[case]
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    rewrite(adapter / "adapter_model.safetensors", change)
    refuse(script, bases("llama"), adapter, message)


def test_not_a_number_leaves_no_manifest(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    rewrite(adapter / "adapter_model.safetensors", spoil)
    with pytest.raises(script.InputError, match=r"`base_model\S+lora_A.weight` holds NaN or infinity"):
        script.merge(make_run(bases("llama"), adapter, tmp_path / "merged"))
    assert not (tmp_path / "merged" / "manifest.json").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def move_tensor_in_index(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=placed | {"lm_head.weight": "model-00001-of-00002.safetensors"})


def keep_pickle_only(base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").touch()


def as_an_adapter(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")


def climb_out(base: Path) -> None:
    edit_json(
        base / "model.safetensors.index.json", weight_map={"lm_head.weight": "../adapter/adapter_model.safetensors"}
    )


def store_as_float64(base: Path) -> None:
    rewrite(
        base / "model-00001-of-00002.safetensors",
        lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()}),
    )


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BROKEN_BASES = {  # what happens to the base folder: the error
    "no config": (lambda b: (b / "config.json").unlink(), "has no config.json"),
    "adapter as base": (as_an_adapter, "has no config.json"),
    "broken config": (lambda b: cut(b / "config.json"), "config.json` is not JSON"),
    "pickle only": (keep_pickle_only, "has its weights in a pickle only: `pytorch_model.bin`"),
    "no weights": (lambda b: [p.unlink() for p in b.glob("model*")], "has neither model.safetensors nor"),
    "missing shard": (
        lambda b: (b / "model-00002-of-00002.safetensors").unlink(),
        "`model.safetensors.index.json` names `model-00002-of-00002.safetensors`, which is missing",
    ),
    "shard elsewhere": (climb_out, r"names `\.\./adapter/adapter_model.safetensors`, which is missing"),
    "cut shard": (
        lambda b: cut(b / "model-00002-of-00002.safetensors"),
        r"model-00002-of-00002.safetensors` has \d+ bytes, its header promises \d+",
    ),
    "shard that is no safetensors file": (
        lambda b: (b / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        r"model-00002-of-00002.safetensors` \(42 bytes\) has no readable safetensors header",
    ),
    "empty shard": (lambda b: (b / "model-00002-of-00002.safetensors").write_bytes(b""), "has no readable safetensors"),
    "index of another version": (move_tensor_in_index, "places `lm_head.weight` in `model-00001-of-00002.safetensors`"),
    "the same tensor twice": (
        lambda b: shutil.copyfile(b / "model-00001-of-00002.safetensors", b / "model-00002-of-00002.safetensors"),
        r"both `model-00001-of-00002.safetensors` and `model-00002-of-00002.safetensors` hold `\S+`",
    ),
    "quantised": (
        lambda b: edit_json(b / "config.json", quantization_config=QUANTISED),
        r"is quantised \(`bitsandbytes`\): config.json has `quantization_config`",
    ),
    "quantised text part": (
        lambda b: edit_json(b / "config.json", text_config={"quantization_config": QUANTISED}),
        "config.json has `quantization_config`",
    ),
    "float64": (store_as_float64, "`model.layers.0.self_attn.q_proj.weight` in `model-00001.* is stored as `F64`"),
}


@pytest.mark.parametrize("case", BROKEN_BASES)
def test_refuses_base(
    case: str, bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    change, message = BROKEN_BASES[case]
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    change(base)
    refuse(script, base, adapter, message)


BROKEN_ADAPTERS = {  # what happens to the adapter folder: the error
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "whole model": (lambda a: (a / "adapter_config.json").rename(a / "config.json"), "has no adapter_config.json"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickle": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        "has no adapter_model.safetensors",
    ),
    "cut": (lambda a: cut(a / "adapter_model.safetensors"), "adapter_model.safetensors` has .* its header promises"),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_refuses_adapter_folder(
    case: str, bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    change, message = BROKEN_ADAPTERS[case]
    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    change(adapter)
    refuse(script, bases("llama"), adapter, message)


@pytest.mark.parametrize(
    ("says", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({}, False),
    ],
)
def test_tied_as_the_config_says(
    says: dict[str, Any], tied: bool, bases: Callable[[str], Path], script: ModuleType
) -> None:
    assert script.is_tied(replace(script.read_base(bases("phi3")), config=says)) is tied


def test_tied_by_what_is_on_disk(bases: Callable[[str], Path], script: ModuleType, tmp_path: Path) -> None:
    """A config that does not say, and the same bytes as embeddings and as output layer: one tensor, saved twice."""
    base = shutil.copytree(bases("phi3"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(bases("phi3"), tmp_path / "adapter", r=4, target_modules=FUSED, modules_to_save=["lm_head"])
    rewrite(base / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    refuse(script, base, adapter, "but the base ties its embeddings")


def test_ambiguous_name(script: ModuleType) -> None:
    on_disk = ["language_model.model.layers.0.mlp.fc1.weight", "vision_model.model.layers.0.mlp.fc1.weight"]
    tables = script.name_tables(on_disk)
    assert script.find_target("model.language_model.layers.0.mlp.fc1.weight", tables) == on_disk[0]
    assert script.find_target("vision_model.model.layers.0.mlp.fc1.weight", tables) == on_disk[1]
    with pytest.raises(script.InputError, match=r"`layers.0.mlp.fc1.weight` fits several .*`language_\S+, `vision_"):
        script.find_target("layers.0.mlp.fc1.weight", tables)


def test_added_tokens(
    bases: Callable[[str], Path], adapters: Callable[[str], Path], script: ModuleType, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    adapter = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(bases("llama"))
    tokenizer.save_pretrained(adapter)  # saved anew, nothing added: no reason to refuse
    script.merge(make_run(bases("llama"), adapter, tmp_path / "same"))
    tokenizer.add_tokens(["<coach>", "<client>"])
    tokenizer.save_pretrained(adapter)
    refuse(script, bases("llama"), adapter, "has 2 tokens that the base's has not: `<coach>`, `<client>`")

    base = shutil.copytree(bases("llama"), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # like a base with nothing but a sentencepiece model
        (base / name).unlink()
    refuse(script, base, adapter, "has 2 tokens that the base's has not")


def warnings_of(script: ModuleType, run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    script.merge(run)
    return [event["message"] for event in events_in(capsys.readouterr().out) if event["event"] == "warning"]


def test_warnings(
    bases: Callable[[str], Path],
    adapters: Callable[[str], Path],
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = shutil.copytree(bases("llama"), tmp_path / "b"), shutil.copytree(adapters("llama"), tmp_path / "a")
    settings = adapter / "adapter_config.json"
    run = make_run(base, adapter, tmp_path / "m1", base={"model": "acme/base", "revision": None})
    edit_json(settings, base_model_name_or_path="acme/other")
    assert warnings_of(script, run, capsys) == [
        "the adapter was trained on `acme/other`, it is merged into `acme/base`"
    ]
    for number, same in enumerate(("acme/base", str(base), "/cache/models--acme--base/snapshots/5d2", None)):
        edit_json(settings, base_model_name_or_path=same)
        assert warnings_of(script, run | {"output": {"path": str(tmp_path / f"same{number}")}}, capsys) == []
    shutil.move(base / "chat_template.jinja", adapter / "chat_template.jinja")
    assert warnings_of(script, run | {"output": {"path": str(tmp_path / "m2")}}, capsys) == [
        "the adapter folder has a chat template, the base has none: the merged model will have none"
    ]


CARD = """\
---
base_model: "acme/base"
base_model_relation: "finetune"
library_name: "transformers"
pipeline_tag: "text-generation"
datasets: ["acme/coach"]
tags: ["mergetune", "lora", "qlora"]
---

# quickstart

A fine-tuned model. Its trained adapter is merged into the
weights, so it loads and runs like its base; tokenizer and chat template are the base's own.

## What was expected

````text
Better.
```
---
<img src=x> [a](b)
````

## How it was made

- Run: quickstart-0f3a9c21
- Fingerprint: FINGERPRINT
- Base model: acme/base
- Base revision: 96b
- Dataset: acme/coach
- Dataset revision: 5d2
- Method: LoRA on a base quantised to 4 bits (QLoRA), rank 4, alpha 8

`manifest.json` has the checksums, versions and durations.
"""


def test_model_card(script: ModuleType, tmp_path: Path) -> None:
    import yaml

    run = make_run(tmp_path, tmp_path, tmp_path, hypothesis="Better.\n```\n---\n<img src=x> [a](b)\n")
    run["experiment"] |= {"base": {"model": "acme/base", "revision": "96b"}, "train": {"method": "qlora"}}
    card = script.model_card(run, {"r": 4, "lora_alpha": 8})
    assert card == CARD.replace("FINGERPRINT", "0f3a9c21" * 8)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "acme/base"


@pytest.mark.parametrize(
    ("quantize", "said"),
    [(True, "LoRA on a base quantised to 4 bits (QLoRA), preference tuning"), (False, "LoRA, preference tuning")],
)
def test_model_card_of_preferences(script: ModuleType, tmp_path: Path, quantize: bool, said: str) -> None:
    run = make_run(tmp_path, tmp_path, tmp_path)
    run["experiment"]["train"] = {"method": "dpo", "dpo": {"quantize": quantize}}
    card = script.model_card(run, {"r": 4, "lora_alpha": 8})
    assert f"- Method: {said} (DPO), rank 4, alpha 8" in card
    assert 'tags: ["mergetune", "lora", "dpo"]' in card


def test_model_card_names_no_local_path(script: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path, tmp_path)
    run["experiment"]["data"]["dataset"] = "data/coach_<b>.jsonl"
    card = script.model_card(run, {"use_dora": True})
    assert str(tmp_path) not in card and "base_model" not in card and "datasets" not in card
    assert "- Base model: a local folder\n- Dataset: coach\\_\\<b\\>.jsonl\n" in card
    assert "- Method: DoRA, rank 8, alpha 8" in card


def test_help() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "python scripts/merge_adapter.py run.json" in done.stdout
