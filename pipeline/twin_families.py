"""What stands in for a base that cannot be read: shape, tokenizer and template of its family. Data, reads no file."""

import re
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

# K-quants work on rows of 256 numbers (llama.cpp ggml-common.h, QK_K): every matrix of the twin has such rows.
HIDDEN, FFN, HEADS, HEAD = 256, 512, 4, 64
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
VOCAB = 512  # of a tokenizer made for the twin
WINDOW = 32  # tokens: short, so that the rows of a rehearsal reach over it
EXPERTS = 4
# The first ids of a tokenizer made for the twin; the reserved ones stand for image and audio markers of a base.
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", *(f"<reserved_{number}>" for number in range(8)))
# How byte-level BPE tokenizers cut a text into words: the expressions of the published tokenizer.json files.
# scripts/convert_gguf.py knows each by llama.cpp's name; a test compares the two.
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA_3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
QWEN_2 = LLAMA_3.replace("{1,3}", "")  # each digit by itself
GPT_4O = "|".join(
    (
        f"{_CASED[0]}{_CASED[1]}*{_CASED[2]}+{_SHORT}?",
        f"{_CASED[0]}{_CASED[1]}+{_CASED[2]}*{_SHORT}?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _TAIL,
    )
)


@dataclass(frozen=True)
class Made:
    """A tokenizer to make: the kind that the family's class in llama.cpp's converter reads, with VOCAB tokens.

    `cut` makes it byte-level BPE, without it is SentencePiece; `space`: each text begins with one (as Llama 2's).
    `template`: TRL's copy of the family's chat template by name, or the text of one.
    """

    template: str
    markers: tuple[str, ...]
    cut: str | None = None
    ignore_merges: bool = False
    space: bool = False
    kind: str = "PreTrainedTokenizerFast"
    specials: tuple[str, ...] = SPECIALS


@dataclass(frozen=True)
class Family:
    """A model class and its tokenizer; `extra` is what its config needs beside the sizes."""

    model_type: str
    architecture: str
    tokenizer: Made
    extra: Config


# TRL ships no template of Mistral's: the turns of its published one, without tools.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# Phi-4's turns; unlike Phi-3's they have a separator.
PHI_4_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
_CHATML = ("<|im_start|>", "<|im_end|>")
_GEMMA_3 = Made("gemma3", ("<start_of_turn>", "<end_of_turn>"))
_GEMMA_4 = Made("gemma4", ("<|turn>", "<turn|>"))
_LLAMA_MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA = Made("llama3", _LLAMA_MARKERS, LLAMA_3, ignore_merges=True)
_QWEN = Made("qwen3", _CHATML, QWEN_2, kind="Qwen2Tokenizer")
_PHI_3 = Made("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), space=True)
# The class name by which the converter tells Phi-4's tokenizer from Phi-3's.
_PHI_4 = Made(PHI_4_TEMPLATE, (*_CHATML, "<|im_sep|>", "<|endoftext|>"), LLAMA_3, kind="GPT2Tokenizer")
_GPT_OSS = Made("gptoss", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), GPT_4O)
_SMOLLM = Made("qwen3", _CHATML, LLAMA_3, ignore_merges=True)
_GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
_SLIDING: Config = {"layer_types": _GEMMA_LAYERS, "sliding_window": WINDOW, "num_hidden_layers": 6}
_NO_LAYER_INPUT: Config = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_TIED: Config = {"tie_word_embeddings": True}
_UNTIED: Config = {"tie_word_embeddings": False}
_MOE: Config = {"num_experts_per_tok": 2, **_UNTIED}
_QWEN_MOE: Config = {**_MOE, "num_experts": EXPERTS, "moe_intermediate_size": HIDDEN}
_OSS: Config = {**_MOE, "num_local_experts": EXPERTS, "sliding_window": WINDOW}
# The shapes of the published config.json files, as far as the classes' own defaults do not give them.
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA, _UNTIED),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", Made("qwen2_5", _CHATML, QWEN_2, kind="Qwen2Tokenizer"), _TIED),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN, _TIED),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN, _QWEN_MOE),
    "gemma3_text": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA_3, _SLIDING),
    "gemma3": Family("gemma3", "Gemma3ForConditionalGeneration", _GEMMA_3, {"text_config": _SLIDING}),
    "gemma4_text": Family("gemma4_text", "Gemma4ForCausalLM", _GEMMA_4, {**_SLIDING, **_NO_LAYER_INPUT}),
    "mistral": Family("mistral", "MistralForCausalLM", Made(MISTRAL_TEMPLATE, ("[INST]", "[/INST]")), _UNTIED),
    "phi3": Family("phi3", "Phi3ForCausalLM", _PHI_3, _UNTIED),
    "phi4": Family("phi3", "Phi3ForCausalLM", _PHI_4, _UNTIED),
    "gpt_oss": Family("gpt_oss", "GptOssForCausalLM", _GPT_OSS, _OSS),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _SMOLLM, {"num_hidden_layers": 4, **_TIED}),
}
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
    (r"phi-?4", "phi4"),
    (r"phi-?3", "phi3"),
    (r"llama", "llama"),
)


def family_of(model: str, model_type: str | None) -> tuple[str, str]:
    """The family that stands in for a base, and why that one, in words. Of two of one type the name decides."""
    name = model.rpartition("/")[2].lower()
    named = next((family for pattern, family in _NAMES if re.search(pattern, name)), None)
    known = [family for family, made in FAMILIES.items() if made.model_type == model_type]
    if known:
        family = named if named in known else known[0]
        return family, f"the defaults of `{family}` stand in for its config, tokenizer and chat template"
    if named:
        return named, f"by its name it is `{named}`, whose defaults stand in"
    return "llama", "its family is unknown, a Llama stands in"


def default_config(family: str) -> Config:
    """A minimal config of a family, already of the twin's size, for a tokenizer made for the twin."""
    known = FAMILIES[family]
    text = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text |= {"num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 4096, "vocab_size": VOCAB}
    extra = dict(known.extra)
    config: Config = {"model_type": known.model_type, "architectures": [known.architecture], "dtype": "bfloat16"}
    if "text_config" in extra:
        config["text_config"] = {"model_type": f"{known.model_type}_text", **text, **extra.pop("text_config")}
        config |= {"vision_config": dict(VISION), "mm_tokens_per_image": 4, **extra}
        config |= {f"{name}_token_index": 10**6 for name in ("boi", "eoi", "image")}
    else:
        config |= {**text, **extra}
    if known.model_type == "phi3":  # its class has no such field, and takes hidden size / heads
        config.pop("head_dim")
    return config
