"""The twin of a base: its config.json with every size shrunk and every kind of layer kept. Builds no weights."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.twin_families import (
    EXPERTS,
    FAMILIES,
    FFN,
    HEAD,
    HEADS,
    HIDDEN,
    VISION,
    VOCAB,
    WINDOW,
    Config,
    Made,
    default_config,
    family_of,
)

LONGEST_PERIOD = 8  # a pattern of layers up to this long is kept whole (Gemma 3: five sliding, one full)
TOWERS = ("vision_config", "audio_config")
_TOKEN_KEY = re.compile(r"\w+_token_(id|index)")
# What to set, when the config has the key at all.
_SIZES: Config = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": HIDDEN,
    "shared_expert_intermediate_size": HIDDEN,
    "intermediate_size_mlp": FFN,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": HIDDEN,
    "num_kv_shared_layers": 0,
}


@dataclass(frozen=True)
class TwinSpec:
    """What `scripts/dev/make_twin.py` builds. `tokenizer` is a folder to copy from; None makes `made` from `texts`."""

    config: Config
    vocab: int
    seed: int
    tokenizer: str | None = None
    made: Made | None = None
    texts: tuple[str, ...] = ()
    substituted: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The spec as the maker reads it."""
        return json.dumps(asdict(self), ensure_ascii=False)


def twin_of(model: str, folder: Path | None, model_type: str | None, texts: Iterable[str], seed: int) -> TwinSpec:
    """The twin of a base: from its own files when `folder` holds them, else from the defaults of its family.

    `model_type` is what is known of a base that is not here; `texts` are what a tokenizer is made from.
    """
    own = read_config(folder) if folder else None
    if folder is None or own is None:
        family, why = family_of(model, model_type)
        return _default_twin(family, f"`{model}` is not in this repository: {why}", tuple(texts), seed)
    vocab = int(own.get("text_config", own).get("vocab_size", VOCAB))
    config = shrink_config(own, vocab)
    return TwinSpec(config, vocab, seed, tokenizer=str(folder))


def read_config(folder: Path) -> Config | None:
    """The config.json of a model folder, or None when it has none that can be read."""
    try:
        loaded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def shrink_config(config: Mapping[str, Any], vocab: int, ids: Mapping[str, int] | None = None) -> Config:
    """A config of the same class with tiny sizes: every kind of layer kept, vision tower and experts shrunk too.

    `ids` replaces token ids by name (`bos_token_id`: 1), for a tokenizer that is not the base's.
    """
    small: Config = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    vocabularies = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocab)
    if isinstance(text := config.get("text_config"), Mapping):
        small["text_config"] = _shrink_text(text) | {k: v for k, v in vocabularies.items() if k in text}
    else:
        small = _shrink_text(small) | {k: v for k, v in vocabularies.items() if k in small}
    for tower in TOWERS:
        if isinstance(config.get(tower), Mapping):
            small[tower] = _shrink_tower(config[tower])
    if "mm_tokens_per_image" in small:
        small["mm_tokens_per_image"] = (VISION["image_size"] // VISION["patch_size"]) ** 2
    return _with_ids(small, ids) if ids is not None else small


def layer_choice(config: Mapping[str, Any]) -> list[int]:
    """The layers a twin keeps: the beginning with one of each kind if that is short, else the first of each kind."""
    count = int(config.get("num_hidden_layers", 2))
    columns = [value for value in config.values() if _is_per_layer(value, count)]
    kinds = [tuple(str(column[layer]) for column in columns) for layer in range(count)]
    if not columns and isinstance(pattern := config.get("sliding_window_pattern"), int) and pattern > 1:
        kinds = [("full" if (layer + 1) % pattern == 0 else "sliding",) for layer in range(count)]
    dense = config.get("first_k_dense_replace")
    firsts = sorted({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())
    needed = max(firsts[-1] + 1, 2 + bool(dense)) if firsts else 2
    if needed <= LONGEST_PERIOD:
        return list(range(min(needed, count)))
    return firsts


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 1 and len({str(item) for item in value}) <= 3


def _shrink_text(config: Mapping[str, Any]) -> Config:
    count = int(config.get("num_hidden_layers", 2))
    kept = layer_choice(config)
    small: Config = {}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count > 1:
            small[key] = [value[layer] for layer in kept]
        elif isinstance(value, list) and key in ("mlp_only_layers", "full_attn_idxs"):
            small[key] = [layer for layer in value if layer < len(kept)]
        elif isinstance(value, Mapping) and value and all(str(inner).isdigit() for inner in value):
            small[key] = {layer: _sized(inner) for layer, inner in value.items() if int(layer) < len(kept)}
        elif key.startswith("rope_") and isinstance(value, Mapping):
            small[key] = _shrink_rope(value, config)
        else:
            small[key] = value
    small = _sized(small)
    small["num_hidden_layers"] = len(kept)
    if isinstance(config.get("sliding_window"), int):
        small["sliding_window"] = min(config["sliding_window"], WINDOW)
    return small


def _sized(values: Any) -> Any:
    """Values with the twin's sizes, where they have them at all; heads stay grouped as they were."""
    if not isinstance(values, Mapping):
        return values
    small = {**values, **{key: size for key, size in _SIZES.items() if isinstance(values.get(key), int)}}
    for key in ("num_key_value_heads", "num_global_key_value_heads"):
        if isinstance(groups := values.get(key), int):
            small[key] = HEADS if groups == values.get("num_attention_heads") else min(groups, 2)
    return small


def _shrink_rope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Config:
    """Factors per rotated pair of a head, cut to the smaller head; sections keep their proportions."""
    rotary = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    pairs = int(HEAD * rotary) // 2
    small = dict(rope)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            small[key] = _shrink_rope(value, config)
        elif key in ("long_factor", "short_factor"):
            small[key] = (list(value) * pairs)[:pairs]
        elif key == "mrope_section":
            parts = [number * pairs // sum(value) for number in value]
            small[key] = [parts[0] + pairs - sum(parts), *parts[1:]]
    return small


def _shrink_tower(tower: Mapping[str, Any]) -> Config:
    names = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "embed_dim": "hidden_size"}
    small = dict(tower)
    for key, value in tower.items():
        if isinstance(value, int) and not isinstance(value, bool):
            small[key] = VISION.get(names.get(key, key), value)
    if "out_hidden_size" in tower:
        small["out_hidden_size"] = HIDDEN
    if "deepstack_visual_indexes" in tower:
        small["deepstack_visual_indexes"] = [0]
    return small


def _with_ids(config: Config, ids: Mapping[str, int]) -> Config:
    """Every token id set by name, and any other one to a reserved token."""
    reserved = iter(range(max(ids.values()) + 1, VOCAB))
    changed: Config = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key in ("text_config", *TOWERS):
            changed[key] = _with_ids(dict(value), ids)
        elif _TOKEN_KEY.fullmatch(key):
            changed[key] = ids[key] if key in ids else value if value is None else next(reserved)
        else:
            changed[key] = value
    return changed | ({} if "text_config" in config or "patch_size" in config else dict(ids))


def _default_twin(family: str, why: str, texts: tuple[str, ...], seed: int) -> TwinSpec:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = _with_ids(default_config(family), ids)
    return TwinSpec(config, VOCAB, seed, made=FAMILIES[family].tokenizer, texts=texts, substituted=(why,))
