"""The shape of a model from its config.json: what memory and cost estimates need to know. Loads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AS_OF = "2026-11-22"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Families whose attention normalises queries and keys: two more copies of both are kept for the backward pass.
QK_NORM = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3", "smollm4")
POST_NORM = ("gemma2", "gemma3", "gemma4")
# Families that PyTorch's scaled_dot_product_attention cannot compute: soft-capped logits, or attention sinks.
NO_SDPA = ("gemma2", "gpt_oss")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. Counts are parameters; `linear` are the ones in matrices that a layer applies."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int  # of one expert, in a mixture
    query: int  # heads x head size
    key_value: int  # key/value heads x head size
    vocab: int
    tied: bool
    experts: int = 0
    other_linear: int = 0  # of a vision tower, by the family's published size
    heads: int = 0  # 0: of 128 each
    window: int = 0  # tokens a sliding-window layer sees; 0: there is no such layer
    experts_per_token: int = 0
    shared_intermediate: int = 0  # of the MLP every token passes beside the experts
    gated: bool = True  # the MLP has a gate: three matrices, not two

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.hidden * (2 * self.query + 2 * self.key_value)

    @property
    def expert_linear(self) -> int:
        """Weights of all experts: transformers 5 keeps them in 3-D parameters, which bitsandbytes does not quantise."""
        return self.layers * self.experts * self.mlp_matrices * self.hidden * self.intermediate

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP."""
        return 3 if self.gated else 2

    @property
    def linear(self) -> int:
        """Attention and MLP weights of the decoder, plus the vision tower's."""
        width = self.shared_intermediate if self.experts else self.intermediate
        dense = self.attention + self.mlp_matrices * self.hidden * width
        return self.layers * dense + self.expert_linear + self.other_linear

    @property
    def embedding(self) -> int:
        """Token embeddings, and the output head unless it is the same matrix."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights; norms are below one in ten thousand and counted with two vectors a layer."""
        return self.linear + self.embedding + 2 * self.layers * self.hidden

    @property
    def active_intermediate(self) -> int:
        """MLP width that one token passes through in one layer."""
        if not self.experts:
            return self.intermediate
        return self.intermediate * max(self.experts_per_token, 1) + self.shared_intermediate

    @property
    def head_count(self) -> int:
        """Query heads."""
        return self.heads or max(self.query // 128, 1)

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalised."""
        return self.model_type.startswith(QK_NORM)

    @property
    def post_norm(self) -> bool:
        """There is a norm behind attention and MLP too."""
        return self.model_type.startswith(POST_NORM)

    @property
    def refuses_sdpa(self) -> bool:
        """The default attention falls back to the one that writes out every score."""
        return self.model_type.startswith(NO_SDPA)

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Adapter weights for `rank` on `targets` (None: every linear layer): r x (inputs + outputs) each."""
        ends = {name: sum(widths) for name, widths in self._widths().items()}
        chosen = (*ATTENTION, *(MLP if self.gated else ("up_proj", "down_proj"))) if targets is None else targets
        return self.layers * rank * sum(ends.get(name, 0) for name in chosen)

    def lora_inputs(self, targets: tuple[str, ...] | None, down: bool = True) -> int:
        """Elements per token that enter the adapted matrices of one layer."""
        chosen = (*ATTENTION, *MLP) if targets is None else targets
        return sum(self._widths().get(name, (0, 0))[0] for name in chosen if down or name != "down_proj")

    def _widths(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every matrix an adapter can sit on. Experts are no matrices of their own."""
        h, q, kv = self.hidden, self.query, self.key_value
        i = self.shared_intermediate if self.experts else self.intermediate
        widths = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h), "qkv_proj": (h, q + 2 * kv)}
        if i:
            widths |= {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h), "gate_up_proj": (h, 2 * i)}
        return widths


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape a Hugging Face `config.json` describes, or None when it is not a decoder we can size."""
    text = config.get("text_config", config)
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if not isinstance(text, Mapping) or not all(_is_count(text.get(key)) for key in needed):
        return None
    heads = text["num_attention_heads"]
    head = _count(text, "head_dim") or text["hidden_size"] // heads
    experts = _count(text, "num_local_experts", "num_experts", "n_routed_experts")
    width = _count(text, "moe_intermediate_size") if experts else 0
    shared = _count(text, "shared_expert_intermediate_size") or width * _count(text, "n_shared_experts")
    kind = str(config.get("model_type", "unknown"))
    return ModelShape(
        model_type=kind,
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        intermediate=width or _count(text, "intermediate_size") or 4 * text["hidden_size"],
        query=heads * head,
        key_value=(_count(text, "num_key_value_heads") or heads) * head,
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", kind.startswith("gemma")))),
        experts=experts,
        other_linear=_vision_linear(config.get("vision_config")),
        heads=heads,
        window=_window(text),
        experts_per_token=_count(text, "num_experts_per_tok", "experts_per_token") if experts else 0,
        shared_intermediate=shared if experts else 0,
        gated=not kind.startswith(("gpt2", "gpt_bigcode", "gpt_neox", "phi-msft", "falcon", "starcoder2", "bloom")),
    )


def config_of(shape: ModelShape) -> dict[str, Any]:
    """A `config.json` of this shape, as far as sizes go: of a base that is known from the catalogue alone."""
    seen = shape.other_linear > 0
    text: dict[str, Any] = {
        "model_type": "gemma3_text" if shape.model_type == "gemma3" else shape.model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.head_count,
        "num_key_value_heads": shape.key_value * shape.head_count // shape.query,
        "head_dim": shape.query // shape.head_count,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "sliding_window": shape.window or None,
    }
    if not seen:
        return text
    return {"model_type": shape.model_type, "text_config": text, "vision_config": dict(_SIGLIP_CONFIG)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(config: Mapping[str, Any], *names: str) -> int:
    """The first of these keys that holds a positive integer, or 0."""
    return next((int(config[name]) for name in names if _is_count(config.get(name))), 0)


def _window(text: Mapping[str, Any]) -> int:
    """Tokens of the sliding window, where a layer uses it."""
    if text.get("use_sliding_window") is False:
        return 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return 0
    return _count(text, "sliding_window")


def _vision_linear(vision: Any) -> int:
    """Attention (4 square matrices) and a two-matrix MLP per layer of a vision transformer."""
    if not isinstance(vision, Mapping) or not _is_count(vision.get("hidden_size")):
        return 0
    h, i = _count(vision, "hidden_size"), _count(vision, "intermediate_size") or 4 * _count(vision, "hidden_size")
    return _count(vision, "num_hidden_layers") * (4 * h * h + 2 * h * i)


# Gemma 3's vision tower, the same in every size.
_SIGLIP_CONFIG = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_SIGLIP_CONFIG |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14}
_SIGLIP_CONFIG |= {"vision_use_head": False}
_SIGLIP = _vision_linear(_SIGLIP_CONFIG)
_S = ModelShape
# Well-known bases, so that `plan` answers offline. Each from the config.json its repository publishes.
CATALOGUE = {
    "google/gemma-3-4b-it": _S("gemma3", 34, 2560, 10240, 2048, 1024, 262208, True, 0, _SIGLIP, 8, 1024),
    "google/gemma-3-12b-it": _S("gemma3", 48, 3840, 15360, 4096, 2048, 262208, True, 0, _SIGLIP, 16, 1024),
    "google/gemma-3-27b-it": _S("gemma3", 62, 5376, 21504, 4096, 2048, 262208, True, 0, _SIGLIP, 32, 1024),
    "meta-llama/Llama-3.1-8B-Instruct": _S("llama", 32, 4096, 14336, 4096, 1024, 128256, False, heads=32),
    "meta-llama/Llama-3.2-3B-Instruct": _S("llama", 28, 3072, 8192, 3072, 1024, 128256, True, heads=24),
    "meta-llama/Llama-3.2-1B-Instruct": _S("llama", 16, 2048, 8192, 2048, 512, 128256, True, heads=32),
    "Qwen/Qwen3-0.6B": _S("qwen3", 28, 1024, 3072, 2048, 1024, 151936, True, heads=16),
    "Qwen/Qwen3-4B": _S("qwen3", 36, 2560, 9728, 4096, 1024, 151936, True, heads=32),
    "Qwen/Qwen3-8B": _S("qwen3", 36, 4096, 12288, 4096, 1024, 151936, False, heads=32),
    "Qwen/Qwen3-14B": _S("qwen3", 40, 5120, 17408, 5120, 1024, 151936, False, heads=40),
    "mistralai/Mistral-7B-Instruct-v0.3": _S("mistral", 32, 4096, 14336, 4096, 1024, 32768, False, heads=32),
    "HuggingFaceTB/SmolLM3-3B": _S("smollm3", 36, 2048, 11008, 2048, 512, 128256, True, heads=16),
}
