"""The shape of a model from its config.json: what memory and cost estimates need to know. Loads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AS_OF = "2026-11-22"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. Counts are parameters; `linear` are the ones 4-bit quantisation reaches."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads x head size
    key_value: int  # key/value heads x head size
    vocab: int
    tied: bool
    experts: int = 0
    other_linear: int = 0  # of a vision tower, by the family's published size

    @property
    def linear(self) -> int:
        """Attention and MLP weights of the decoder (gated MLP: three matrices), plus the vision tower's."""
        attention = self.hidden * (2 * self.query + 2 * self.key_value)
        mlp = 3 * self.hidden * self.intermediate * max(self.experts, 1)
        return self.layers * (attention + mlp) + self.other_linear

    @property
    def embedding(self) -> int:
        """Token embeddings, and the output head unless it is the same matrix."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights; norms are below one in ten thousand and counted with two vectors a layer."""
        return self.linear + self.embedding + 2 * self.layers * self.hidden

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Adapter weights for `rank` on `targets` (None: every linear layer): r x (inputs + outputs) each."""
        h, i, q, kv = self.hidden, self.intermediate, self.query, self.key_value
        ends = {"q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h}
        ends |= {"gate_proj": h + i, "up_proj": h + i, "down_proj": i + h}
        ends |= {"qkv_proj": h + q + 2 * kv, "gate_up_proj": h + 2 * i}
        plain = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        chosen = plain if targets is None else targets
        return self.layers * rank * sum(ends.get(name, 0) for name in chosen)


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape a Hugging Face `config.json` describes, or None when it is not a decoder we can size."""
    text = config.get("text_config", config)
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if not all(isinstance(text.get(key), int) for key in needed):
        return None
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    experts = text.get("num_local_experts") or text.get("num_experts") or 0
    width = text.get("moe_intermediate_size") if experts else None
    return ModelShape(
        model_type=str(config.get("model_type", "unknown")),
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        intermediate=width or text.get("intermediate_size") or 4 * text["hidden_size"],
        query=heads * head,
        key_value=(text.get("num_key_value_heads") or heads) * head,
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        experts=experts,
        other_linear=_vision_linear(config.get("vision_config")),
    )


def _vision_linear(vision: Any) -> int:
    """Attention (4 square matrices) and a two-matrix MLP per layer of a vision transformer."""
    if not isinstance(vision, Mapping) or not isinstance(vision.get("hidden_size"), int):
        return 0
    h, i = vision["hidden_size"], vision.get("intermediate_size") or 4 * vision["hidden_size"]
    layers = vision.get("num_hidden_layers")
    return layers * (4 * h * h + 2 * h * i) if isinstance(layers, int) else 0


_SIGLIP = 27 * (4 * 1152 * 1152 + 2 * 1152 * 4304)
# Well-known bases, so that `plan` answers offline. Each from the config.json its repository publishes.
CATALOGUE = {
    "google/gemma-3-4b-it": ModelShape("gemma3", 34, 2560, 10240, 2048, 1024, 262208, True, 0, _SIGLIP),
    "google/gemma-3-12b-it": ModelShape("gemma3", 48, 3840, 15360, 4096, 2048, 262208, True, 0, _SIGLIP),
    "google/gemma-3-27b-it": ModelShape("gemma3", 62, 5376, 21504, 4096, 2048, 262208, True, 0, _SIGLIP),
    "meta-llama/Llama-3.1-8B-Instruct": ModelShape("llama", 32, 4096, 14336, 4096, 1024, 128256, False),
    "meta-llama/Llama-3.2-3B-Instruct": ModelShape("llama", 28, 3072, 8192, 3072, 1024, 128256, True),
    "meta-llama/Llama-3.2-1B-Instruct": ModelShape("llama", 16, 2048, 8192, 2048, 512, 128256, True),
    "Qwen/Qwen3-0.6B": ModelShape("qwen3", 28, 1024, 3072, 2048, 1024, 151936, True),
    "Qwen/Qwen3-4B": ModelShape("qwen3", 36, 2560, 9728, 4096, 1024, 151936, True),
    "Qwen/Qwen3-8B": ModelShape("qwen3", 36, 4096, 12288, 4096, 1024, 151936, False),
    "Qwen/Qwen3-14B": ModelShape("qwen3", 40, 5120, 17408, 5120, 1024, 151936, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ModelShape("mistral", 32, 4096, 14336, 4096, 1024, 32768, False),
    "HuggingFaceTB/SmolLM3-3B": ModelShape("smollm3", 36, 2048, 11008, 2048, 512, 128256, True),
}
