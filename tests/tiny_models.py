"""Tiny models of real architectures for tests: random weights, a real tokenizer, TRL's copy of the chat template."""

import json
from pathlib import Path

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog, and 42 sailors watch from the harbour wall.",
    "def add(a, b):\n    return a + b  # the sum of two numbers",
    "Return the length of a string; raise ValueError if it is empty. Naïve café, 日本語, 🙂.",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
TEMPLATES = {
    "llama": "llama3",
    "llama3_1": "llama3_1",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3_vl": "gemma3",
    "phi3": "phi3",
}


def save_tokenizer(folder: Path, family: str, vocab: int = 512) -> None:
    """Train a byte-level BPE of at most `vocab` tokens and save it with the family's chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator(TEXT * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=SPECIAL[3:]
    )
    if family == "mistral":
        tokenizer.chat_template = MISTRAL_TEMPLATE
    else:
        template = Path(trl.__file__).parent / "chat_templates" / f"{TEMPLATES[family]}.jinja"
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def config_of(family: str, vocab: int = 512, **changes: object) -> transformers.PretrainedConfig:
    """A two-layer, 64-wide config of the family's own class (`changes` override its fields)."""
    ids = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {**SIZES, **GROUPED, **ids, **changes}
    match family:
        case "llama" | "llama3_1":
            return transformers.LlamaConfig(**{"tie_word_embeddings": False, **common})
        case "mistral":
            return transformers.MistralConfig(**{"tie_word_embeddings": False, **common})
        case "qwen3":
            return transformers.Qwen3Config(**{"tie_word_embeddings": True, **common})
        case "phi3":
            common.pop("head_dim")
            return transformers.Phi3Config(**{"tie_word_embeddings": False, **common})
        case "gemma3_text":
            return transformers.Gemma3TextConfig(**common)
        case "gemma3_vl":
            vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            vision |= {"image_size": 28, "patch_size": 14}
            return transformers.Gemma3Config(
                text_config=common, vision_config=vision, mm_tokens_per_image=4, image_token_index=7
            )
    raise ValueError(family)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama3_1": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3_vl": "Gemma3ForConditionalGeneration",
}


def make_tiny(folder: Path, family: str = "llama", *, vocab: int = 512, seed: int = 0, **changes: object) -> Path:
    """Save a random bf16 model of `family` with its tokenizer into `folder`; keyword `changes` go to the config."""
    torch.manual_seed(seed)
    config = config_of(family, vocab, **changes)
    model = getattr(transformers, CLASSES[family])(config).to(torch.bfloat16)
    shard = {"max_shard_size": "200KB"} if family == "llama" else {}
    model.save_pretrained(folder, **shard)
    save_tokenizer(folder, family, vocab)
    if family == "gemma3_vl":
        processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
