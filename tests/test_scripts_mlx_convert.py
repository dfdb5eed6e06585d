"""scripts/convert_adapter.py, and the adapters of train_mlx.py: the same model in MLX, PEFT and merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from mlx_runs import (
    PLAIN,
    convert,
    copied,
    inline,
    load,
    make_run,
    make_twin,
    manifest,
    merged,
    mlx_logits,
    mlx_model,
    quantised,
    torch_logits,
    write_rows,
)

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "qwen3", "gemma3_text")
IDS = [1, 40, 300, 77, 5, 410, 63, 210, 90, 33, 158, 499, 20, 71]  # longer than Gemma's window of 8
ROUNDING = 2.0**-8  # bfloat16 keeps 8 bits: what one rounding changes, at most
CHAT = [{"role": "user", "content": "How many sailors?"}, {"role": "assistant", "content": "42 sailors watch."}]
# Steps so large that the adapter changes more than rounding does.
LOUD = {"max_steps": 3, "learning_rate": 0.01, "sft": PLAIN, "lora": {"r": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny bases by family, each made once."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_twin(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return base


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, bases: Any) -> Any:
    """Artifacts of a job script by script, family and LoRA choices, each trained once."""
    made: dict[str, Path] = {}

    def adapter(script: str, family: str, **lora: Any) -> Path:
        key = json.dumps([script, family, lora])
        if key not in made:
            folder = tmp_path_factory.mktemp("adapters")
            data = write_rows(folder / "data.jsonl", [{"messages": CHAT}] * 4)
            changes = {**LOUD, "lora": LOUD["lora"] | lora}
            run = make_run(folder / "run", bases(family), data, **changes)
            with pytest.MonkeyPatch.context() as patch:
                assert inline(load(script), run, patch) == 0
            made[key] = folder / "run" / "out"
        return made[key]

    return adapter


def distance(one: Any, other: Any) -> float:
    """The largest difference, as a part of the largest score."""
    return float(abs(one - other).max() / abs(other).max())


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    read = load("convert_adapter").read_tensors(path)
    return {name: (f"{t.dtype} {t.values.shape}", t.values.tobytes()) for name, t in read.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_mlx_trained_is_the_same_model_everywhere(bases: Any, adapters: Any, family: str, tmp_path: Path) -> None:
    """Merged weights differ from MLX's fused ones by rounding: we add in float32 and round once, MLX rounds the
    update, then the sum. In the scores that is at most two roundings a layer, which passes them on to the next.
    PEFT, unmerged, rounds nothing, and agrees to float32."""
    base, out = bases(family), adapters("train_mlx", family)
    plain = torch_logits(base, IDS)
    assert distance(mlx_logits(mlx_model(base), IDS), plain) < 1e-4
    unfused = mlx_logits(mlx_model(base, out / "mlx"), IDS)
    moved = distance(unfused, plain)
    assert moved > 0.05
    assert distance(torch_logits(base, IDS, out), unfused) < 1e-4
    ours = merged(base, out, tmp_path / "merge")
    fused = mlx_model(base, out / "mlx", fuse=True)
    check_weights_agree(fused, mlx_model(base), mlx_model(ours))
    allowed = 2 * len(fused.layers) * ROUNDING
    assert distance(mlx_logits(fused, IDS), torch_logits(ours, IDS)) < min(allowed, moved / 4)


def check_weights_agree(fused: Any, before: Any, ours: Any) -> None:
    """Each weight within three roundings: of MLX's update, of its sum and of our sum."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    sides = [dict(tree_flatten(model.parameters())) for model in (fused, before, ours)]
    assert sides[0].keys() == sides[2].keys()
    changed = 0
    for name in sides[0]:
        one, base, other = (numpy.array(side[name].astype(mx.float32)) for side in sides)
        allowed = ROUNDING * (abs(other - base) + abs(one) + abs(other)) + 1e-9
        assert (abs(one - other) <= allowed).all(), name
        changed += not numpy.array_equal(base, other)
    assert changed >= 14


@pytest.mark.parametrize("family", FAMILIES)
def test_what_torch_trained_is_the_same_model_in_mlx(bases: Any, adapters: Any, family: str, tmp_path: Path) -> None:
    base, out = bases(family), adapters("train_sft", family)
    done = convert("to-mlx", out, tmp_path / "mlx", "--base", base)
    assert done.returncode == 0, done.stderr
    here = mlx_logits(mlx_model(base, tmp_path / "mlx"), IDS)
    assert distance(here, torch_logits(base, IDS)) > 0.05
    assert distance(here, torch_logits(base, IDS, out)) < 1e-4


@pytest.mark.parametrize(
    "lora", [{"dora": True}, {"rslora": True, "r": 8}, {"targets": ["q_proj", "down_proj"]}], ids=str
)
def test_forms_of_lora_that_both_know(bases: Any, adapters: Any, lora: dict, tmp_path: Path) -> None:
    base, out = bases("qwen3"), adapters("train_mlx", "qwen3", **lora)
    here = mlx_logits(mlx_model(base, out / "mlx"), IDS)
    assert distance(here, torch_logits(base, IDS)) > 0.05
    assert distance(torch_logits(base, IDS, out), here) < 1e-4
    assert distance(torch_logits(merged(base, out, tmp_path / "merge"), IDS), here) < 4 * ROUNDING
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == ("dora" in lora, "rslora" in lora)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=["lora", "dora"])
def test_there_and_back_gives_the_same_bytes(
    bases: Any, adapters: Any, family: str, lora: dict, tmp_path: Path
) -> None:
    base, mlx = bases(family), adapters("train_mlx", family, **lora) / "mlx"
    for direction, source, target in (("to-peft", mlx, "peft"), ("to-mlx", tmp_path / "peft", "mlx")):
        done = convert(direction, source, tmp_path / target, "--base", base, "--model", "acme/tiny")
        assert (done.returncode, done.stderr.count("modules of rank 4")) == (0, 1), done.stderr
    assert tensors(tmp_path / "mlx" / "adapters.safetensors") == tensors(mlx / "adapters.safetensors")
    told = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert json.loads((mlx / "adapter_config.json").read_text()) == {"model": "acme/tiny", **told}
    # The artifact's own adapter is what the conversion makes of MLX's files.
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        made = json.loads((tmp_path / "peft" / name).read_text()) if name.endswith("json") else None
        ours = mlx.parent / name
        if made is None:
            assert tensors(tmp_path / "peft" / name) == tensors(ours)
        else:
            assert json.loads(ours.read_text()) == made | {"revision": "abc"}


def test_bfloat16_adapters_keep_their_bytes(bases: Any, adapters: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = copied(adapters("train_sft", "llama"), tmp_path / "peft")
    halves = {name: t.to(torch.bfloat16) for name, t in load_file(source / "adapter_model.safetensors").items()}
    save_file(halves, source / "adapter_model.safetensors")
    assert convert("to-mlx", source, tmp_path / "mlx", "--base", bases("llama")).returncode == 0
    assert convert("to-peft", tmp_path / "mlx", tmp_path / "back", "--base", bases("llama")).returncode == 0
    assert tensors(tmp_path / "back" / "adapter_model.safetensors") == tensors(source / "adapter_model.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "back" / "adapter_model.safetensors").values()} == {torch.bfloat16}


# Refusals

PEFT_REFUSALS = {
    "rank_pattern": ({"q_proj": 2}, "`rank_pattern` is set, and an MLX adapter has one rank"),
    "alpha_pattern": ({"q_proj": 2}, "`alpha_pattern` is set"),
    "modules_to_save": (["embed_tokens"], "`modules_to_save` is set"),
    "trainable_token_indices": ([3], "`trainable_token_indices` is set"),
    "target_parameters": (["experts.gate_up_proj"], "`target_parameters` is set"),
    "lora_bias": (True, "`lora_bias` is set"),
    "fan_in_fan_out": (True, "`fan_in_fan_out` is set"),
    "layer_replication": ([[0, 1]], "`layer_replication` is set, and MLX has no word for it"),
    "bias": ("all", "`bias` is `all`"),
    "peft_type": ("LOHA", "`peft_type` is `LOHA`"),
    "init_lora_weights": ("pissa_niter_4", "which changed the base"),
    "use_dora": (True, "lacks `m`"),
    "r": (3, "with rank 3 to 4"),
    "fine_tune_type": ("lora", "is an MLX adapter"),
}


@pytest.mark.parametrize("key", PEFT_REFUSALS)
def test_what_mlx_cannot_carry_is_refused_by_name(bases: Any, adapters: Any, key: str, tmp_path: Path) -> None:
    value, said = PEFT_REFUSALS[key]
    refuse("to-mlx", copied(adapters("train_mlx", "qwen3"), tmp_path / "in", **{key: value}), bases("qwen3"), said)


MLX_REFUSALS = {
    "fine_tune_type": ("full", "`fine_tune_type` is `full`, which is no adapter"),
    "lora_parameters": ({"rank": 4}, "has no `lora_parameters.scale`"),
    "peft_type": ("LORA", "is a PEFT adapter"),
}


@pytest.mark.parametrize("key", MLX_REFUSALS)
def test_what_is_no_mlx_adapter_is_refused_by_name(bases: Any, adapters: Any, key: str, tmp_path: Path) -> None:
    value, said = MLX_REFUSALS[key]
    source = copied(adapters("train_mlx", "qwen3") / "mlx", tmp_path / "in", **{key: value})
    refuse("to-peft", source, bases("qwen3"), said)


def refuse(direction: str, source: Path, base: Path, said: str) -> None:
    """The conversion ends with that message and a hint, and writes nothing."""
    out = source.parent / "refused"
    done = convert(direction, source, out, "--base", base)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert "\n\nhint: " in done.stderr
    assert not out.exists()


MLX_TENSORS = {
    "model.layers.0.mlp.switch_mlp.up_proj.lora_a": ((2, 4, 64), "experts that MLX stacks"),
    "model.layers.0.self_attn.q_proj.linear.weight": ((64, 64), "is trained whole"),
    "model.embed_tokens.lora_a": ((512, 4), "`embed_tokens`, which is no linear layer"),
    "lm_head.lora_a": ((64, 4), "`lm_head`, which is no linear layer"),
    "vision_tower.encoder.layers.0.self_attn.q_proj.lora_a": ((64, 4), "is no linear layer of the base's text layers"),
    "model.layers.7.self_attn.q_proj.lora_a": ((64, 4), "`layers.7.self_attn.q_proj` lacks `b`"),
}


@pytest.mark.parametrize("name", MLX_TENSORS)
def test_tensors_that_peft_has_no_place_for(bases: Any, adapters: Any, name: str, tmp_path: Path) -> None:
    module, source = load("convert_adapter"), copied(adapters("train_mlx", "qwen3") / "mlx", tmp_path / "in")
    shape, said = MLX_TENSORS[name]
    held = module.read_tensors(source / "adapters.safetensors")
    held[name] = module.Tensor("F32", numpy.zeros(shape, "<f4"))
    module.write_tensors(source / "adapters.safetensors", held, "mlx")
    refuse("to-peft", source, bases("qwen3"), said)


def test_a_base_that_it_was_not_trained_on(bases: Any, adapters: Any, tmp_path: Path) -> None:
    refuse("to-peft", adapters("train_mlx", "gemma3_text") / "mlx", bases("qwen3"), "`layers.2.mlp.down_proj` of the")
    refuse("to-mlx", adapters("train_mlx", "qwen3", targets=["q_proj"]), bases("phi3"), "is no layer of the base")
    cut = copied(adapters("train_mlx", "qwen3"), tmp_path / "cut")
    path = cut / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refuse("to-mlx", cut, bases("qwen3"), "is truncated")
    missing = copied(adapters("train_mlx", "qwen3"), tmp_path / "missing")
    (missing / "adapter_model.safetensors").unlink()
    refuse("to-mlx", missing, bases("qwen3"), "has no adapter_model.safetensors")


def test_a_quantised_base_names_the_one_to_give_instead(bases: Any, adapters: Any, tmp_path: Path) -> None:
    base = quantised(bases("qwen3"), tmp_path / "8bit", 8)
    (base / "README.md").write_text("---\nlibrary_name: mlx\nbase_model: Qwen/Qwen3-0.6B\n---\n# A card\n")
    adapter = adapters("train_mlx", "qwen3")
    said = "is quantised by MLX (8 bits, groups of 32), and an adapter is merged into full weights\n\n"
    refuse("to-peft", adapter / "mlx", base, said + "hint: give `Qwen/Qwen3-0.6B`, the base it was made from")
    (base / "README.md").unlink()
    refuse("to-mlx", adapter, base, "hint: give the bfloat16 base it was made from")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_of_a_quantised_base_goes_into_the_full_one(bases: Any, bits: int, tmp_path: Path) -> None:
    base = bases("qwen3")
    small = quantised(base, tmp_path / "small", bits)
    data = write_rows(tmp_path / "data.jsonl", [{"messages": CHAT}] * 4)
    run = make_run(tmp_path / "run", base, data, **{**LOUD, "method": "qlora"})
    request = json.loads(run.read_text())
    request["inputs"]["mlx_base"] = {"path": str(small)}
    request["experiment"]["train"]["mlx"] = {"base": f"acme/tiny-{bits}bit", "num_layers": 1}
    run.write_text(json.dumps(request))
    with pytest.MonkeyPatch.context() as patch:
        assert inline(load("train_mlx"), run, patch) == 0
    told, out = manifest(run), run.parent / "out"
    form = {"bits": bits, "group_size": 32}
    assert told["trained_on"] == {
        "model": f"acme/tiny-{bits}bit",
        "revision": None,
        "path": str(small),
        "quantization": form,
    }
    assert told["warnings"] == [
        f"the adapter is trained against `acme/tiny-{bits}bit`, quantised to {bits} bits in groups of 32; "
        "the merge puts it into `acme/tiny`"
    ]
    assert f"| trained on | a local folder, {bits} bits in groups of 32 |" in (out / "README.md").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["layers_to_transform"]) == ("acme/tiny", [1])
    in_full = torch_logits(merged(base, out, tmp_path / "merge"), IDS)
    assert distance(in_full, torch_logits(base, IDS)) > 0.05
    assert distance(in_full, mlx_logits(mlx_model(base, out / "mlx"), IDS)) < 4 * ROUNDING
    # Against the base it was trained on it differs by what quantisation changed, and not by more.
    quantisation = distance(mlx_logits(mlx_model(small), IDS), torch_logits(base, IDS))
    assert distance(mlx_logits(mlx_model(small, out / "mlx"), IDS), in_full) < 4 * quantisation + 4 * ROUNDING
    shutil.rmtree(small)
