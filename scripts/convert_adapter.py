# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy==2.4.6",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Convert a LoRA or DoRA adapter from MLX's layout to PEFT's, or back. Needs neither MLX nor torch.

    python scripts/convert_adapter.py to-peft adapters peft-adapter --base models/base
    python scripts/convert_adapter.py to-mlx peft-adapter adapters --base models/base

`--base` is the folder of the bfloat16 base, whose names and shapes the adapter must fit; its config.json is enough for
a base whose weights are not here. The numbers are moved as they are: there and back gives the same bytes. What the
other layout has no place for is refused by name.

Exit codes: 0 done, 2 the caller's input.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Something the caller can fix. Printed as `error:` and `hint:`; the script exits with code 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


# --- shared: mlx adapter. The same lines stand in train_mlx.py and convert_adapter.py; a test compares them. ---
PEFT_PREFIX = "base_model.model."
# One layer is `model.layers.0…`, `language_model.model.layers.0…` or `model.language_model.layers.0…`, by who names it.
WRAPPERS = {"model", "language_model", "text_model"}
# numpy has no bfloat16: its two bytes are moved, and never computed with.
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Keys of PEFT's adapter_config.json that say nothing about the weights, or that are read below.
HARMLESS = """
auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules inference_mode
init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core
peft_type peft_version qalora_group_size r revision target_modules task_type use_dora use_rslora
"""
NOT_CARRIED = {
    "rank_pattern": "an MLX adapter has one rank",
    "alpha_pattern": "an MLX adapter has one scale",
    "modules_to_save": "an MLX adapter has no modules that are trained whole",
    "trainable_token_indices": "an MLX adapter has no single rows of the embeddings",
    "target_parameters": "experts are stacked differently in MLX",
    "lora_bias": "MLX's LoRA layers have no bias",
    "fan_in_fan_out": "MLX stores these layers the other way round",
}
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Where LoRA also finds linear layers, and text never passes; MLX leaves these parts of a base out.
NOT_TEXT = r".*(vision|visual|image|audio|multi_modal_projector|mm_projector|connector).*"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file; bfloat16 as plain 16-bit numbers."""

    dtype: str
    values: Any

    def turned(self) -> "Tensor":
        return Tensor(self.dtype, self.values.T)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The base that an adapter is for: its config, and the shapes of its weights by their names on disk."""

    folder: Path
    config: dict
    shapes: dict[str, tuple[int, ...] | None]  # None: the index names it, the file is not here

    def text_config(self) -> dict:
        return self.config.get("text_config") or self.config

    def modules(self) -> dict[str, str]:
        """The name on disk of each module, by its name without wrappers."""
        return {bare(name): name for name in (n.removesuffix(".weight") for n in self.shapes if n.endswith(".weight"))}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in neither layout. `parts`: by bare module name `a` (rank × in), `b` (out × rank), DoRA's `m`."""

    rank: int
    scale: float
    dropout: float
    dora: bool
    parts: dict[str, dict[str, Tensor]]
    rslora: bool = False


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_header(path: Path) -> tuple[dict, int]:
    """The tensors that a safetensors file promises, and where their bytes begin. Raises InputError if it is cut off."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length if length < size else 0))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"`{path}` has no readable safetensors header", "fetch that file again") from None
    if size != end:
        raise InputError(f"`{path}` is truncated: {size} of {end} bytes", "fetch that file again")
    return header, 8 + length


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        InputError: no such file, not whole, or with numbers of another type than adapters have.
    """
    import numpy

    if not path.is_file():
        raise InputError(f"`{path.parent}` has no {path.name}", "give the folder of an adapter, with all its files")
    header, start = read_header(path)
    content, tensors = path.read_bytes(), {}
    for name, entry in header.items():
        if entry["dtype"] not in NUMPY_TYPES:
            message = f"`{name}` in `{path}` is stored as `{entry['dtype']}`"
            raise InputError(message, f"save it as one of: {', '.join(NUMPY_TYPES)}")
        first, last = entry["data_offsets"]
        flat = numpy.frombuffer(content[start + first : start + last], NUMPY_TYPES[entry["dtype"]])
        tensors[name] = Tensor(entry["dtype"], flat.reshape(entry["shape"]))
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], made_for: str) -> None:
    """A safetensors file, its tensors by name; `made_for` is what its readers look for."""
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    chunks, position = [], 0
    for name, tensor in sorted(tensors.items()):
        chunks.append(tensor.values.tobytes())  # rows first, also of a matrix that was turned
        offsets = [position, position + len(chunks[-1])]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.values.shape), "data_offsets": offsets}
        position = offsets[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(chunks))


def bare(name: str) -> str:
    """A module's name without the wrappers that libraries put around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def layer_of(module: str) -> tuple[int, str] | None:
    """Number of the layer and name in it, or None for a module that is in no layer."""
    found = re.fullmatch(r"(?:.+\.)?layers\.(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else None


def quantization_of(config: dict) -> dict | None:
    """`bits` and `group_size` of a base that MLX quantised, else None."""
    found = config.get("quantization") or (config.get("text_config") or {}).get("quantization")
    return {key: found.get(key) for key in ("bits", "group_size")} if found else None


def read_weights(folder: Path) -> Weights:
    """What an adapter is for. Raises InputError unless it is an unquantised base in Hugging Face's layout."""
    config = read_json(folder / "config.json")
    if not config:
        raise InputError(f"the base `{folder}` has no readable config.json", "give the folder of a Hugging Face base")
    text = config.get("text_config") or {}
    if found := quantization_of(config):
        message = (
            f"the base `{folder}` is quantised by MLX ({found['bits']} bits, groups of {found['group_size']}), and "
        )
        message += "an adapter is merged into full weights"
        raise InputError(message, f"give {original_of(folder)}")
    if "quantization_config" in config or "quantization_config" in text:
        raise InputError(f"the base `{folder}` is quantised already", f"give {original_of(folder)}")
    index = read_json(folder / "model.safetensors.index.json").get("weight_map") or {}
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(index)
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}
    return Weights(folder, config, shapes)


def original_of(folder: Path) -> str:
    """The base that a quantised one was made from, in words: by the name on its card where it has one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        card = ""
    named = re.search(r"(?m)^base_model:\s*(?:\n- )?([\w.-]+/[\w.-]+)\s*$", card.partition("\n---")[0])
    return f"`{named[1]}`, the base it was made from" if named else "the bfloat16 base it was made from"


def read_mlx(folder: Path, weights: Weights) -> Adapter:
    """An adapter that MLX trained.

    Raises:
        InputError: it is none, or it has what PEFT cannot carry, or it is for another base.
    """
    config = read_json(folder / "adapter_config.json")
    if "peft_type" in config:
        raise InputError(f"`{folder}` is a PEFT adapter", "it needs no conversion to PEFT; `to-mlx` is the other way")
    kind, chosen = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind not in ("lora", "dora"):
        raise InputError(
            f"`{folder}`: `fine_tune_type` is `{kind}`, which is no adapter", "train with `lora` or `dora`"
        )
    if missing := {"rank", "scale"} - set(chosen):
        message = f"`{folder}`: adapter_config.json has no `lora_parameters.{min(missing)}`"
        raise InputError(message, "give the folder that `mlx_lm.lora` wrote, with its adapter_config.json")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / "adapters.safetensors").items():
        found = re.fullmatch(r"(.+)\.(?:lora_([ab])|(m))", name)
        if not found:
            raise InputError(f"`{name}` is trained whole, which PEFT has no place for here", "train with LoRA alone")
        if found[2] and tensor.values.ndim != 2:
            message = f"`{name}` is for experts that MLX stacks, and PEFT's layout differs"
            raise InputError(message, "train without `switch_mlp` in `lora_parameters.keys`")
        parts.setdefault(bare(found[1]), {})[found[2] or found[3]] = tensor.turned() if found[2] else tensor
    dropout = float(chosen.get("dropout", 0.0))
    adapter = Adapter(int(chosen["rank"]), float(chosen["scale"]), dropout, kind == "dora", parts)
    check_adapter(adapter, weights)
    return adapter


def read_peft(folder: Path, weights: Weights) -> Adapter:
    """An adapter that PEFT saved.

    Raises:
        InputError: it is none, or it has what MLX cannot carry, or it is for another base.
    """
    config = read_json(folder / "adapter_config.json")
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise InputError(f"`{folder}` is an MLX adapter", "it needs no conversion to MLX; `to-peft` is the other way")
    for key, only in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(key) != only:
            message = f"`{folder}`: `{key}` is `{config.get(key)}`, and MLX knows only `{only}`"
            raise InputError(message, f"train with `{key}: {only}`, or use the adapter with PEFT")
    for key in sorted(set(config) - set(HARMLESS.split())):
        if config[key]:
            reason = NOT_CARRIED.get(key, "MLX has no word for it")
            raise InputError(f"`{folder}`: `{key}` is set, and {reason}", f"train without `{key}`")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGED_BASE_INITS):
        message = f"`{folder}`: `init_lora_weights` is `{config['init_lora_weights']}`, which changed the base"
        raise InputError(message, "train with the default, or save it with `path_initial_model_for_weight_conversion`")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.(?:lora_([AB])\.weight|lora_(m)agnitude_vector)", name)
        if not found:
            raise InputError(
                f"`{name}` is neither half of a LoRA layer, and MLX has no place for it", "train without it"
            )
        parts.setdefault(bare(found[1]), {})[found[2].lower() if found[2] else found[3]] = tensor
    rank, rslora = int(config["r"]), bool(config.get("use_rslora"))
    scale = config["lora_alpha"] / (math.sqrt(rank) if rslora else rank)
    dropout, dora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_dora"))
    adapter = Adapter(rank, scale, dropout, dora, parts, rslora)
    check_adapter(adapter, weights)
    return adapter


def check_adapter(adapter: Adapter, weights: Weights) -> None:
    """Raise InputError unless every part of the adapter is there and fits a layer of the base."""
    known, wanted = weights.modules(), {"a", "b", *("m" if adapter.dora else "")}
    if not adapter.parts:
        raise InputError("the adapter holds no tensors", "look at its training: it saved nothing")
    for module, parts in adapter.parts.items():
        if layer_of(module) is None or re.fullmatch(NOT_TEXT, module):
            message = f"the adapter changes `{module}`, which is no linear layer of the base's text layers"
            raise InputError(message, "train without embeddings, output layer and vision tower")
        if parts.keys() != wanted:
            odd = min(parts.keys() ^ wanted)
            raise InputError(f"the adapter's `{module}` lacks `{odd}`, or has it too much", "fetch the adapter again")
        if known and module not in known:
            message = f"`{module}` of the adapter is no layer of the base `{weights.folder}`"
            raise InputError(message, "give the base that it was trained on; layers that MLX joins cannot be carried")
        shape = weights.shapes.get(f"{known.get(module, module)}.weight")
        made = (parts["b"].values.shape[0], parts["a"].values.shape[1])
        ranks = {parts["b"].values.shape[1], parts["a"].values.shape[0], adapter.rank}
        if (shape and made != shape) or len(ranks) > 1 or (adapter.dora and parts["m"].values.shape != made[:1]):
            message = f"`{module}` of the adapter is for {list(made)} with rank {min(ranks)} to {max(ranks)}, the base "
            message += f"has {list(shape or made)}, its config rank {adapter.rank}"
            raise InputError(message, "give the base that it was trained on")


def named_as(module: str, weights: Weights, wrapper: str) -> str:
    """The full name of a module: as on disk, or with the given wrapper where a vision-language base has one."""
    name = weights.modules().get(module, f"model.{module}")
    return f"{wrapper}.{module}" if "language_model" in name.split(".") or "text_config" in weights.config else name


def write_mlx(adapter: Adapter, weights: Weights, folder: Path) -> None:
    """`adapters.safetensors` and `adapter_config.json` as `mlx_lm` reads them."""
    tensors: dict[str, Tensor] = {}
    for module, parts in adapter.parts.items():
        name = named_as(module, weights, "language_model.model")
        tensors |= {f"{name}.lora_{half}": parts[half].turned() for half in ("a", "b")}
        tensors |= {f"{name}.m": parts["m"]} if adapter.dora else {}
    places = [place for module in adapter.parts if (place := layer_of(module))]
    first = min(number for number, _ in places)
    chosen = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout}
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": weights.text_config()["num_hidden_layers"] - first,
        "lora_parameters": chosen | {"keys": sorted({name for _, name in places})},
    }
    write_tensors(folder / "adapters.safetensors", tensors, "mlx")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_peft(adapter: Adapter, weights: Weights, folder: Path, model: str, revision: str | None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` as PEFT and merge_adapter.py read them."""
    tensors: dict[str, Tensor] = {}
    for module, parts in adapter.parts.items():
        name = PEFT_PREFIX + named_as(module, weights, "model.language_model")
        tensors |= {f"{name}.lora_{half.upper()}.weight": parts[half] for half in ("a", "b")}
        tensors |= {f"{name}.lora_magnitude_vector": parts["m"]} if adapter.dora else {}
    places = [place for module in adapter.parts if (place := layer_of(module))]
    numbers = sorted({number for number, _ in places})
    alpha = adapter.scale * (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_modules": sorted({name.rpartition(".")[2] for _, name in places}),
        "exclude_modules": NOT_TEXT if "vision_config" in weights.config else None,
        "layers_to_transform": None if len(numbers) == weights.text_config()["num_hidden_layers"] else numbers,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, "pt")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- end shared: mlx adapter ---


def main() -> int:
    """Convert; map what the caller can fix to exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=["to-peft", "to-mlx"])
    parser.add_argument("adapter", type=Path, help="folder of the adapter to read")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--base", type=Path, required=True, help="folder of the bfloat16 Hugging Face base")
    parser.add_argument("--model", help="what adapter_config.json calls the base; else the base's folder")
    parser.add_argument("--revision", help="the base's revision, for adapter_config.json")
    try:
        return convert(parser.parse_args())
    except InputError as error:
        print(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2


def convert(asked: argparse.Namespace) -> int:
    """Read one layout, check it against the base, write the other."""
    weights = read_weights(asked.base)
    read = read_mlx if asked.direction == "to-peft" else read_peft
    adapter = read(asked.adapter, weights)
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise InputError(f"`{asked.out}` is there already", "name a new folder")
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.direction == "to-peft":
        write_peft(adapter, weights, asked.out, asked.model or str(asked.base), asked.revision)
    else:
        write_mlx(adapter, weights, asked.out)
    print(f"{len(adapter.parts)} modules of rank {adapter.rank} are in `{asked.out}`", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
