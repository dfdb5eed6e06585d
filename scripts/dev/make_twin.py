"""Build the twin of a base: a tiny model of its architecture with random weights, and a tokenizer. Trains no weight.

    python scripts/dev/make_twin.py SPEC.json OUT

SPEC.json is what `pipeline.twin.TwinSpec.as_json` writes. The tokenizer and its chat template are the base's own files,
byte for byte, or ones made from the rows of the rehearsal: byte-level BPE that cuts text as the family does, or a
SentencePiece model, as llama.cpp's converter reads them for the family; with the chat template that TRL ships for it.
Needs torch, transformers, trl, sentencepiece; no network.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
from importlib import util
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken")
TOKENIZER_FILES += ("tekken.json", "*.jinja", "chat_template.json", "generation_config.json", "*processor_config.json")
# Text that is always there, so that a piece model can be made from no rows at all.
TEXT = """system user assistant model tool
The harbour master counts the boats at noon, and the tide turns before three o'clock in the afternoon.
What does it do? It returns the number of items in a list, a string or a dictionary; it raises an error otherwise.
def add(a, b): return a + b  # 0123456789
"""


def write_tokenizer(folder: Path, spec: dict[str, Any]) -> None:
    """A tokenizer made from the spec's texts, its special tokens at its first ids."""
    made = spec["made"]
    text = "\n".join([TEXT, *spec["texts"]])
    make = write_bytes_tokenizer if made["cut"] else write_pieces_tokenizer
    special, vocab = [*made["specials"], *made["markers"]], make(folder, made, text, spec["vocab"])
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = {
        "tokenizer_class": made["kind"],
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=False)),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), False),
        "add_prefix_space": made["space"],
        "extra_special_tokens": special[4:],
        "added_tokens_decoder": {str(vocab[token]): {"content": token, **plain} for token in special},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(made["template"]), encoding="utf-8")


def write_bytes_tokenizer(folder: Path, made: dict[str, Any], text: str, size: int) -> dict[str, int]:
    """Byte-level BPE that cuts text into words by the family's expression; returns the ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [AddedToken(token, special=True, normalized=False) for token in (*made["specials"], *made["markers"])]
    raw = Tokenizer(models.BPE(ignore_merges=made["ignore_merges"]))
    cut = pre_tokenizers.Split(Regex(made["cut"]), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    raw.train_from_iterator(text.splitlines(keepends=True), trainer)
    (folder / "tokenizer.json").write_text(raw.to_str(), encoding="utf-8")
    return raw.get_vocab()


def write_pieces_tokenizer(folder: Path, made: dict[str, Any], text: str, size: int) -> dict[str, int]:
    """The same pieces for llama.cpp (tokenizer.model) and for transformers (tokenizer.json); returns the ids."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = train_pieces(made, text, size)
    reader = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = {reader.id_to_piece(number): number for number in range(reader.get_piece_size())}
    special = [*made["specials"], *made["markers"]]
    merges = [
        (number, piece[:cut], piece[cut:])
        for piece, number in vocab.items()
        for cut in range(1, len(piece))
        if piece not in special and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (merge[0], vocab[merge[1]], vocab[merge[2]]))  # a lower id was merged first
    pairs = [(left, right) for _, left, right in merges]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=special[0], fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if made["space"] else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if made["space"] else steps)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "tokenizer.json").write_text(raw.to_str(), encoding="utf-8")
    return vocab


def train_pieces(made: dict[str, Any], text: str, size: int) -> bytes:
    """A SentencePiece BPE model, with bytes for what it never saw."""
    import sentencepiece

    unk, bos, eos, pad, *control = made["specials"]
    # A letter costs an id, and Chinese has more of them than the vocabulary: what is not ASCII stays bytes.
    known = re.sub(r"[^\x20-\x7e\n]", "\n", text)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line[:2000] for line in known.splitlines() if line.strip()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=made["space"],
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=unk,
        bos_piece=bos,
        eos_piece=eos,
        pad_piece=pad,
        control_symbols=[*control, *made["markers"]],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def chat_template(name: str) -> str:
    """TRL's copy of a family's template, or the template itself where `name` is one."""
    if "{" in name:
        return name
    found = util.find_spec("trl")  # not imported: that takes seconds, and the file lies beside it
    if found is None or found.origin is None:
        raise SystemExit('error: trl is not installed\n\nhint: pip install "mergetune[train]"')
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The base's own files: a tokenizer saved again would not be the same to llama.cpp."""
    for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def write_model(folder: Path, spec: dict[str, Any]) -> int:
    """Random bf16 weights of the spec's config; returns how many."""
    import torch
    import transformers

    torch.manual_seed(spec["seed"])
    config = dict(spec["config"])
    architecture = getattr(transformers, (config.get("architectures") or ["?"])[0], None)
    if architecture is None:
        raise SystemExit(f"error: transformers {transformers.__version__} has no class `{config.get('architectures')}`")
    made = transformers.AutoConfig.for_model(**{**config, "dtype": "bfloat16"})
    torch.set_default_dtype(torch.bfloat16)
    model = architecture(made)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_processor(folder: Path, config: dict[str, Any]) -> None:
    """Gemma 3 loads an image processor with its tokenizer, even for text."""
    if config["model_type"] == "gemma3" and not (folder / "preprocessor_config.json").exists():
        size = config["vision_config"]["image_size"]
        processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": size, "width": size}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def main() -> None:
    """Build in a folder beside, and rename it when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="the JSON of a TwinSpec")
    parser.add_argument("out", type=Path, help="the model folder to make; must not exist yet")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = json.loads(options.spec.read_text(encoding="utf-8"))
    if options.out.exists():
        parser.error(f"`{options.out}` exists")
    part = options.out.with_name(f"{options.out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        count = write_model(part, spec)
        if spec["tokenizer"]:
            copy_tokenizer(Path(spec["tokenizer"]), part)
        else:
            write_tokenizer(part, spec)
        write_processor(part, spec["config"])
        part.rename(options.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{options.out}: {count:,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
