"""The twin of a base: its config.json with every size shrunk and every kind of layer kept. Builds no weights."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

# K-quants work on rows of 256 numbers (llama.cpp ggml-common.h, QK_K): every matrix of the twin has such rows.
HIDDEN, FFN, HEADS, HEAD = 256, 512, 4, 64
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
VOCAB = 512  # of a tokenizer made for the twin
LONGEST_PERIOD = 8  # a pattern of layers up to this long is kept whole (Gemma 3: five sliding, one full)
WINDOW = 32  # tokens: short, so that the rows of a rehearsal reach over it
EXPERTS = 4
# The first ids of a tokenizer made for the twin; the reserved ones stand for image and audio markers of a base.
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", *(f"<reserved_{number}>" for number in range(8)))
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
class Family:
    """A model type when no config can be had: its class, TRL's copy of its chat template, markers of its turns.

    `spm`: llama.cpp's converter takes our SentencePiece tokenizer for it, with equal ids. The others need the published
    tokenizer (Qwen and Phi get a space before each text), so a twin without the base's own files becomes no GGUF.
    """

    architecture: str
    template: str | None
    markers: tuple[str, ...] = ()
    extra: Config | None = None
    spm: bool = True


_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_QWEN = ("<|im_start|>", "<|im_end|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GPT_OSS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
_GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
_SLIDING: Config = {"layer_types": _GEMMA_LAYERS, "sliding_window": WINDOW, "num_hidden_layers": 6}
_NO_LAYER_INPUT: Config = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_MOE: Config = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
# The shapes of the published config.json files, as far as the classes' own defaults do not give them.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama3", _LLAMA, {"tie_word_embeddings": False}),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2_5", _QWEN, {"tie_word_embeddings": True}, spm=False),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", _QWEN, {"tie_word_embeddings": True}, spm=False),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "qwen3", _QWEN, {**_MOE, "num_experts": EXPERTS}, spm=False),
    "gemma3_text": Family("Gemma3ForCausalLM", "gemma3", _GEMMA, _SLIDING),
    "gemma3": Family("Gemma3ForConditionalGeneration", "gemma3", _GEMMA, {"text_config": _SLIDING}),
    "gemma4_text": Family("Gemma4ForCausalLM", "gemma4", ("<|turn>", "<turn|>"), {**_SLIDING, **_NO_LAYER_INPUT}),
    "mistral": Family("MistralForCausalLM", None, ("[INST]", "[/INST]"), {"tie_word_embeddings": False}),
    "phi3": Family("Phi3ForCausalLM", "phi3", _PHI, {"tie_word_embeddings": False}, spm=False),
    "gpt_oss": Family("GptOssForCausalLM", "gptoss", _GPT_OSS, {**_MOE, "num_local_experts": EXPERTS}, spm=False),
    "smollm3": Family("SmolLM3ForCausalLM", "qwen3", _QWEN, {"num_hidden_layers": 4, "tie_word_embeddings": True}),
}
# TRL ships no template of Mistral's: the turns of its published one, without tools.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
_NAMES = (
    (r"gemma-?4", "gemma4_text"),
    (r"gemma-?3-(1b|270m)", "gemma3_text"),
    (r"gemma", "gemma3"),
    (r"qwen-?3.*-a\d+b", "qwen3_moe"),
    (r"qwen-?3", "qwen3"),
    (r"qwen", "qwen2"),
    (r"gpt-oss", "gpt_oss"),
    (r"smollm3", "smollm3"),
    (r"mi[sn]i?stral", "mistral"),
    (r"phi-?[34]", "phi3"),
    (r"llama", "llama"),
)


@dataclass(frozen=True)
class TwinSpec:
    """What `scripts/dev/make_twin.py` builds. `tokenizer` is a folder to copy from; None makes one from `texts`."""

    config: Config
    tokenizer: str | None
    template: str | None
    markers: tuple[str, ...]
    specials: tuple[str, ...]
    vocab: int
    texts: tuple[str, ...]
    seed: int
    gguf: bool
    substituted: tuple[str, ...]

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
    return TwinSpec(config, str(folder), None, (), (), vocab, (), seed, True, ())


def read_config(folder: Path) -> Config | None:
    """The config.json of a model folder, or None when it has none that can be read."""
    try:
        loaded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def family_of(model: str, model_type: str | None) -> tuple[str, str]:
    """The family that stands in for a base, and why that one, in words."""
    if model_type in FAMILIES:
        return model_type, f"the defaults of `{model_type}` stand in for its config, tokenizer and chat template"
    name = model.rpartition("/")[2].lower()
    for pattern, family in _NAMES:
        if re.search(pattern, name):
            return family, f"by its name it is `{family}`, whose defaults stand in"
    return "llama", "its family is unknown, a Llama stands in"


def default_config(family: str) -> Config:
    """A minimal config of a family, already of the twin's size, for a tokenizer made for the twin."""
    known = FAMILIES[family]
    text = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text |= {"num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 4096, "vocab_size": VOCAB}
    extra = dict(known.extra or {})
    config: Config = {"model_type": family, "architectures": [known.architecture], "dtype": "bfloat16"}
    if "text_config" in extra:
        config["text_config"] = {"model_type": f"{family}_text", **text, **extra.pop("text_config")}
        config |= {"vision_config": dict(VISION), "mm_tokens_per_image": 4, **extra}
        config |= {f"{name}_token_index": 10**6 for name in ("boi", "eoi", "image")}
    else:
        config |= {**text, **extra}
    if family == "phi3":  # its class has no such field, and takes hidden size / heads
        config.pop("head_dim")
    return config


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
    known = FAMILIES[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = _with_ids(default_config(family), ids)
    template = known.template or MISTRAL_TEMPLATE
    return TwinSpec(config, None, template, known.markers, SPECIALS, VOCAB, texts, seed, known.spm, (why,))
