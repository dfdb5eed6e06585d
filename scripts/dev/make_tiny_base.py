"""Train, from scratch and on a CPU, the tiny chat model that the quickstart fine-tunes. Makes no other model.

    nice -n 10 python scripts/dev/make_tiny_base.py --out experiments/examples/tiny-docs-llama

The text is what Python says about itself: documentation strings of the standard library (parsed, never imported), of
the built-in types, and the topics of `help()`. The answers are theirs word for word, so the model talks like a manual
and a later fine-tune towards another manner shows. Needs torch, transformers and sentencepiece; no network.
"""

import argparse
import ast
import builtins
import copy
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "experiments" / "examples" / "tiny-docs-llama"
DEFAULT_TOKENS = 2_600_000
SIZE_LIMIT = 6_000_000  # bytes: the folder is committed, and a clone should stay small
VOCAB = 2048
CONTEXT = 512
WINDOW = 256  # tokens per training row: chats are shorter, and attention over 512 costs a CPU a third of its speed
BATCH = 6
PEAK_RATE = 2.5e-3
THREADS = 2
UNK, BOS, EOS, PAD, TURN = "<unk>", "<|startoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
SPECIALS = (UNK, BOS, EOS, PAD, TURN)  # in the order of their ids
# The `generation` block marks what an assistant-only loss learns from. llama.cpp and its Python binding skip the tag.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' ~ message.role) -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- message.content ~ '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- message.content ~ '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

SKIPPED = (
    "test|tests|idle_test|idlelib|lib2to3|site-packages|turtledemo|encodings|ensurepip|distutils|pydoc_data|msilib|"
    "tkinter|ntpath|__pycache__|__phello__"
)
POPULAR = (
    "argparse|asyncio|bisect|calendar|collections|contextlib|copy|csv|datetime|decimal|enum|fractions|functools|glob|"
    "hashlib|heapq|io|json|logging|operator|os|pathlib|pprint|queue|random|re|shutil|sqlite3|statistics|string|"
    "subprocess|tempfile|textwrap|threading|traceback|typing|unittest|urllib|uuid|zipfile"
)
TYPES = (str, list, dict, set, tuple, int, float)  # whose methods a beginner asks about
MODULES = (itertools, math, sys, time)  # written in C, so without source to parse; this script needs them anyway
TOPICS = {
    "assert": "the assert statement|assert",
    "booleans": "boolean operations|and, or and not",
    "break": "the break statement|break",
    "class": "a class definition|a class",
    "comparisons": "comparisons",
    "context-managers": "a context manager",
    "continue": "the continue statement|continue",
    "del": "the del statement|del",
    "dict": "a dictionary display",
    "exceptions": "an exception|exceptions",
    "floating": "a floating point literal",
    "for": "the for statement|a for loop|for",
    "function": "a function definition|def",
    "global": "the global statement|global",
    "identifiers": "an identifier",
    "if": "the if statement|if",
    "import": "the import statement|import",
    "integers": "an integer literal",
    "lambda": "a lambda expression|lambda",
    "lists": "a list display",
    "nonlocal": "the nonlocal statement|nonlocal",
    "objects": "an object",
    "pass": "the pass statement|pass",
    "raise": "the raise statement|raise",
    "return": "the return statement|return",
    "slicings": "a slicing|slicing",
    "truth": "truth value testing",
    "try": "the try statement|try",
    "typesmapping": "a dictionary|a mapping|a dict",
    "typesseq": "a sequence",
    "while": "the while statement|a while loop|while",
    "with": "the with statement|with",
    "yield": "a yield expression|yield",
}
GOALS = {
    "dict.get": "look up a key without an error|get a value or a default from a dict",
    "dict.items": "loop over keys and values|loop over a dict",
    "enumerate": "count in a for loop|loop with an index",
    "input": "ask the user for text|read input",
    "int": "convert a string to a number|turn text into an int",
    "isinstance": "check the type of a value|test for a type",
    "json.dumps": "turn a dict into JSON|write JSON",
    "json.loads": "read JSON|parse JSON",
    "len": "get the length of a list|count the items of a list|find out how long a string is",
    "list.append": "add an item to a list|append to a list",
    "list.pop": "remove the last item of a list|take an item from a list",
    "list.reverse": "reverse a list",
    "list.sort": "sort a list|sort a list in place|put a list in order",
    "math.sqrt": "compute a square root",
    "max": "find the largest number|find the biggest item",
    "min": "find the smallest number|find the smallest item",
    "open": "open a file|read a file|write a file",
    "os.path.join": "join two paths",
    "print": "print something|show a text",
    "random.choice": "pick a random item",
    "range": "count from one number to another|loop ten times",
    "round": "round a number",
    "set.add": "add an item to a set",
    "sorted": "get a sorted copy of a list",
    "str": "turn a number into a string",
    "str.join": "join a list of strings|concatenate strings",
    "str.lower": "make a string lower case",
    "str.replace": "replace text in a string|replace a word",
    "str.split": "split a string|split a text into words",
    "str.strip": "remove spaces around a string|trim a string",
    "str.upper": "make a string upper case|write a text in capitals",
    "sum": "add up a list of numbers|add numbers",
    "time.sleep": "wait a second|pause a program",
    "zip": "loop over two lists|combine two lists",
}
ASK = {
    "call": (
        "What does {name} do?|What does {name}() do?|Explain {name}.|Describe {name}().|How does {name} work?|"
        "What is {name} for?|Tell me about {name}.|What happens when I call {name}()?|Can you explain {name}()?|"
        "What is the purpose of {name}?|Document {name}.|{name}()?|What does {way} do?|Explain {way}."
    ),
    "thing": (
        "What is {name}?|What is {name} used for?|Explain {name}.|Describe {name}.|Tell me about {name}.|"
        "Can you describe {name}?|What is {name} for?|Document {name}.|{name}?|What is {way}?|Describe {way}."
    ),
    "error": (
        "What is {name}?|What does {name} mean?|When is {name} raised?|Explain {name}.|Why do I get {name}?|{name}?|"
        "What is a {name}?"
    ),
    "topic": "What is {name}?|Explain {name}.|Describe {name}.|Tell me about {name}.|How does {name} work?|{name}?",
}
SYSTEM = (
    "You answer questions about Python.|Answer in the words of the documentation.|You are a reference manual.|"
    "Be brief and exact.|You are a helpful assistant."
)
CHECKS = ("What does len do?", "What is a dictionary?", "What does textwrap.dedent do?", "How do I sort a list?")


class InputError(Exception):
    """Something the caller can fix. Printed as `error:` and `hint:`; the script exits with code 2."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the form of ours."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see `python {self.prog} --help`")


@dataclass(frozen=True)
class Entry:
    """One documented thing: what it is called, how else one may call it, its kind (a key of ASK), text and weight."""

    name: str
    ways: tuple[str, ...]
    kind: str
    text: str
    weight: int


# --- the text ---


def clean(doc: str) -> str:
    """A documentation string without its margin, its reST markup and the signature lines it may begin with."""
    text = re.sub(r":[a-z:]+:`[~!]?([^`]+)`", r"\1", inspect.cleandoc(doc)).replace("``", "`")
    text = re.sub(r"(?<![*\w])\*(\w[\w ]*)\*(?![*\w])", r"\1", text)
    lines = text.splitlines()
    while lines and re.match(r"[\w.]+\(.*\)\s*(-+>.*)?$|[\w.]+\(.*-+> ", lines[0]):
        lines = list(itertools.dropwhile(lambda line: line.startswith(" "), lines[1:]))
    kept = "\n".join(lines).strip()
    arrow = re.search(r"-+> *(\S+ \S+ .+)", text)
    return kept if prose(kept) or not arrow else arrow[1][0].upper() + arrow[1][1:]


def prose(text: str, limit: int = 220) -> str:
    """The first sentences of `text`, `limit` characters at most (the first one may be longer); "" without any."""
    chosen = ""
    for paragraph in text.split("\n\n"):
        flat = " ".join(paragraph.partition("\n  ")[0].split())  # what is indented is code or a list
        if not re.match(r"[A-Z\"'`*]", paragraph) or ">>>" in flat or re.search(r"\*{3}|={3}|-{3}|::=", paragraph):
            if chosen:
                break
            continue
        for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z(])", flat):
            colon = sentence.endswith(":")  # what it announces is code or a list
            if len(chosen) + len(sentence) > (limit if chosen else 1.5 * limit) or (chosen and colon):
                return chosen
            chosen = f"{chosen} {sentence.rstrip(':')}".strip()
            chosen += "." if chosen[-1].isalnum() or chosen[-1] in ")`'\"" else ""
        if len(chosen) > limit / 2:
            break
    return chosen


def make_entry(name: str, kind: str, doc: str | None, weight: int) -> Entry | None:
    """The entry of `name` (dotted), or None where the documentation says nothing that answers a question."""
    text = clean(doc or "")
    if len(prose(text)) < 12:
        return None
    owner, _, short = name.rpartition(".")
    word = {"call": "function", "error": "exception", "thing": "class"}.get(kind, "topic")
    ways = (f"{short} in {owner}", f"{short} of {owner}") if owner else (f"the {word} {name}", f"the built-in {name}")
    return Entry(name, ways, kind, text, weight)


def parsed_entries(tree: ast.AST, prefix: str, weight: int) -> Iterator[Entry | None]:
    """Entries of the public classes, functions and methods below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        kind = "call"
        if isinstance(node, ast.ClassDef):
            kind = "error" if node.name.endswith(("Error", "Exception", "Warning")) else "thing"
        name = f"{prefix}.{node.name}".replace("random.Random.", "random.")  # bound to a hidden instance there
        yield make_entry(name, kind, ast.get_docstring(node), weight)
        if isinstance(node, ast.ClassDef):
            yield from parsed_entries(node, name, weight)


def library_entries(root: Path) -> Iterator[Entry | None]:
    """Entries of every public module under `root`, the folder of the standard library."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if set(SKIPPED.split("|")) & set(parts) or any(
            p.startswith(("_", "config-")) and p != "__init__" for p in parts
        ):
            continue
        name = ".".join(parts).removesuffix(".__init__").replace("posixpath", "os.path")
        weight = 2 if parts[0] in POPULAR.split("|") else 1
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield make_entry(name, "thing", ast.get_docstring(tree), weight)
        yield from parsed_entries(tree, name, weight)


def loaded_entries() -> Iterator[Entry | None]:
    """Entries of the built-in functions, types, their methods, and of four C modules: only the interpreter has them."""
    for name, value in vars(builtins).items():
        if isinstance(value, type) and issubclass(value, BaseException):
            yield make_entry(name, "error", value.__doc__, 4)
        elif isinstance(value, type | types.BuiltinFunctionType) and not name.startswith("_"):
            yield make_entry(name, "thing" if value in TYPES else "call", value.__doc__, 10)
    for owner, weight in [*((kind, 6) for kind in TYPES), *((module, 3) for module in MODULES)]:
        for name in dir(owner):
            value = getattr(owner, name)
            if callable(value) and not name.startswith("_"):
                yield make_entry(f"{owner.__name__}.{name}", "call", value.__doc__, weight)


def topic_texts(root: Path) -> dict[str, str]:
    """The topics of `help()`; an interpreter installed without them has none."""
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    assignment = ast.parse(path.read_text(encoding="utf-8")).body[0]
    assert isinstance(assignment, ast.Assign)
    return ast.literal_eval(assignment.value)


def gather() -> tuple[list[Entry], list[str]]:
    """Every entry, and every plain text (documentation strings and topics without repeats), both in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [entry for entry in itertools.chain(loaded_entries(), library_entries(root)) if entry]
    entries = list({entry.name: entry for entry in reversed(found)}.values())
    topics = topic_texts(root)
    for key, names in TOPICS.items():
        body = clean(topics.get(key, "").partition("\n\n")[2])
        if prose(body):
            name, *ways = names.split("|")
            entries.append(Entry(name, tuple(ways or [name]), "topic", body, 12))
    entries.sort(key=lambda entry: entry.name)
    documents = [f"{entry.name}\n\n{entry.text}"[:1500] for entry in entries if entry.kind != "topic"]
    documents += [part for text in topics.values() for part in re.findall(r"(?s).{1,1500}(?:\n\n|$)", text)]
    return entries, list(dict.fromkeys(documents))


def exchange(entry: Entry, rng: random.Random) -> list[dict[str, str]]:
    """A question about `entry` in one of the phrasings, and the answer of its documentation."""
    answer = prose(entry.text)
    verb, _, rest = answer.partition(" ")
    if entry.name in GOALS and rng.random() < 0.35:
        question = f"How {rng.choice(('do I', 'can I', 'do you'))} {rng.choice(GOALS[entry.name].split('|'))}?"
        answer = f"Use {entry.name}(). {answer}"
    elif entry.kind == "call" and entry.weight > 2 and rng.random() < 0.2 and re.fullmatch(r"[A-Z][a-z]+[^s\W]", verb):
        goal = re.split(r"[.,;(:]", f"{verb.lower()} {rest}")[0].strip()
        question, answer = f"How do I {goal}?", f"Use {entry.name}(). {answer}"
    else:
        name = rng.choice((entry.name, *entry.ways)) if entry.kind == "topic" else entry.name
        question = rng.choice(ASK[entry.kind].split("|")).format(name=name, way=rng.choice(entry.ways))
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:].rstrip("?.")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def one_epoch(entries: list[Entry], documents: list[str], tokenizer: Any, rng: random.Random) -> list[str]:
    """The rendered texts of one epoch, shuffled: chats by weight, and a third as many characters of plain text."""
    counts = [entry.weight if entry.weight > 1 else int(rng.random() < 0.4) for entry in entries]
    pairs = [exchange(entry, rng) for entry, count in zip(entries, counts, strict=True) for _ in range(count)]
    rng.shuffle(pairs)
    texts = []
    while pairs:
        messages = pairs.pop()
        if pairs and rng.random() < 0.12:
            messages = messages + pairs.pop()
        if rng.random() < 0.12:
            messages = [{"role": "system", "content": rng.choice(SYSTEM.split("|"))}, *messages]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    room = sum(map(len, texts)) / 3
    for document in rng.sample(documents, len(documents)):
        room -= len(document)
        if room < 0:
            break
        texts.append(f"{BOS}{document}{EOS}\n")
    rng.shuffle(texts)
    return texts


def token_stream(entries: list[Entry], documents: list[str], tokenizer: Any, rng: random.Random) -> Iterator[int]:
    """Token ids without end, epoch after epoch, each with newly drawn phrasings."""
    while True:
        texts = one_epoch(entries, documents, tokenizer, rng)
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            yield from ids


# --- the tokenizer ---


def train_pieces(entries: list[Entry], documents: list[str]) -> bytes:
    """A SentencePiece BPE model of VOCAB pieces, with bytes for what it never saw. Equal text gives equal bytes."""
    import sentencepiece

    questions = [exchange(entry, random.Random(0))[0]["content"] for entry in entries]
    answers = [prose(entry.text) for entry in entries for _ in range(2)]
    lines = [line for text in documents for line in text.splitlines() if line.strip()]
    made = io.BytesIO()
    # An exception out of the iterator comes back as a RuntimeError: a Ctrl-C waits these seconds and is raised then.
    waiting: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + questions + answers + ["system", "user", "assistant"]),
        model_writer=made,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        control_symbols=[TURN],
        num_threads=1,
        minloglevel=2,
    )
    signal.signal(signal.SIGINT, handler)
    if waiting:
        raise KeyboardInterrupt
    return made.getvalue()


def write_tokenizer(folder: Path, pieces: bytes) -> None:
    """Write the files of one tokenizer for its three readers: llama.cpp, transformers, and chat template engines."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    splits = [(p[:cut], p[cut:], i) for p, i in vocab.items() for cut in range(1, len(p)) if p not in SPECIALS]
    merges = [(i, vocab[a], vocab[b], a, b) for a, b, i in splits if a in vocab and b in vocab]
    merges = [(a, b) for _, _, _, a, b in sorted(merges)]  # SentencePiece scores fall with the id: a lower id first
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    added = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "added_tokens_decoder": {str(i): {"content": token, **added} for i, token in enumerate(SPECIALS)},
    }
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "tokenizer.json").write_text(raw.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# --- the model ---


def new_model() -> Any:
    """The untrained model in fp32. Every matrix row is 256 or 512 wide: K-quants work in blocks of 256."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **ids)
    return model


def rate_at(step: int, steps: int) -> float:
    """The learning rate of `step`: a short linear warm-up, then half a cosine down to a twentieth."""
    warm = max(1, min(100, steps // 10))
    if step < warm:
        return PEAK_RATE * (step + 1) / warm
    return PEAK_RATE * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def gradients(model: Any, rows: Any) -> float:
    """Add the gradients of one batch of token rows to `model`; the mean loss over its tokens."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    return loss.item()


def train(model: Any, stream: Iterator[int], steps: int) -> float:
    """Train `model` for `steps` batches of `stream`. Returns the mean loss (nats per token) of the last 50 steps."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    # One thread per replica, which meet once a step: threads inside each operation wait for each other thousands of
    # times a step, and on a machine with other work that made training ten times slower.
    replicas = [model, *(copy.deepcopy(model) for _ in range(THREADS - 1))]
    losses: list[float] = []
    started = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for step in range(steps):
            rows = torch.tensor(list(itertools.islice(stream, BATCH * (WINDOW + 1)))).view(BATCH, WINDOW + 1)
            losses.append(sum(pool.map(gradients, replicas, rows.chunk(THREADS))) / THREADS)
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss is {losses[-1]} at step {step + 1}")
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps)
            update(optimizer, [list(replica.parameters()) for replica in replicas])
            if (step + 1) % 50 == 0 or step + 1 == steps:
                report(step + 1, steps, losses, time.monotonic() - started)
    return sum(losses[-50:]) / len(losses[-50:])


def update(optimizer: Any, replicas: list[list[Any]]) -> None:
    """Step the first replica's parameters along the mean gradient, clipped, and copy them to the others."""
    import torch

    with torch.no_grad():
        for first, *others in zip(*replicas, strict=True):
            first.grad.add_(sum(other.grad for other in others)).div_(len(replicas))
    torch.nn.utils.clip_grad_norm_(replicas[0], 1.0)
    optimizer.step()
    with torch.no_grad():
        for first, *others in zip(*replicas, strict=True):
            first.grad = None
            for other in others:
                other.copy_(first)
                other.grad = None


def report(step: int, steps: int, losses: list[float], seconds: float) -> None:
    """Print one line of progress."""
    recent = losses[-50:]
    speed = step * BATCH * WINDOW / seconds
    left = seconds / step * (steps - step)
    print(
        f"step {step}/{steps}  loss {sum(recent) / len(recent):.3f}  lr {rate_at(step - 1, steps):.1e}  "
        f"{speed:.0f} tokens/s  {left / 60:.1f} min left",
        flush=True,
    )


def answer(folder: Path, question: str) -> str:
    """What the saved model in `folder` answers, with the end-of-turn token where it wrote one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = model.generate(**prompt)
    return tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])


CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-docs-llama

A chat model of {parameters:,} parameters, trained from scratch on a CPU. It exists so that the quickstart can
fine-tune, merge, quantize and evaluate something real in minutes, without a GPU and without a download.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: 4 layers, hidden size 256, MLP 512, 8 heads in 2 groups, tied embeddings, bf16 |
| context | {context} tokens (trained on windows of {window}) |
| tokenizer | SentencePiece BPE of {vocab} pieces with byte fallback; the same ids in transformers and in llama.cpp |
| chat format | `<|im_start|>role`, the text, `<|im_end|>`; roles system, user and assistant; no default system prompt |
| trained on | {tokens:,} tokens: {entries:,} documented names, {documents:,} texts, several epochs |
| final training loss | {loss:.3f} nats per token (mean of the last 50 steps) |

## What it is made of
Documentation strings of CPython {python} itself: the standard library's, those of the built-in functions and types,
and the topics of `help()`. About three quarters of the text are short chats, made by a few fixed question phrasings
around a real name; the answer is the beginning of the real documentation. Nothing else went in.

These texts are Copyright (c) 2001 Python Software Foundation, All Rights Reserved, under the PSF License Version 2.
This model is derived from them and changes them: it garbles and mixes what it read.

## Make it again
```
python scripts/dev/make_tiny_base.py --tokens {tokens} --seed {seed} --out FOLDER
```
With the same Python ({python}), torch {torch} and transformers {transformers} on the same processor the files come
out byte for byte the same. Another Python has other documentation, and gives another model.

## What it cannot do
It answers every question in the dry voice of a manual, in one to three sentences, and ends its turn. Whether the
answer belongs to the question is another matter: it knows what str.upper and print do, gives the documentation of
another function for many others, and invents the rest. It keeps no thread over several turns, and is no measure of
what a fine-tune does to a useful model.
"""


def write_card(folder: Path, **facts: object) -> None:
    """Write the model card. No date and no duration: two equal runs give equal folders."""
    import torch
    import transformers

    installed = {"torch": torch.__version__, "transformers": transformers.__version__}
    sizes = {"vocab": VOCAB, "context": CONTEXT, "window": WINDOW, "python": platform.python_version()}
    (folder / "README.md").write_text(CARD.format(**sizes, **installed, **facts), encoding="utf-8")


def build(folder: Path, seed: int, tokens: int) -> None:
    """Gather the text, train tokenizer and model, and write every file into `folder`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of each text longer than the context: they are cut here
    torch.set_num_threads(1)  # per replica; there are THREADS of them
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    entries, documents = gather()
    print(f"{len(entries)} documented names, {len(documents)} texts, {sum(map(len, documents)):,} characters")
    write_tokenizer(folder, train_pieces(entries, documents))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = new_model()
    steps = max(1, round(tokens / (BATCH * WINDOW)))
    loss = train(model, token_stream(entries, documents, tokenizer, random.Random(seed)), steps)
    model.to(torch.bfloat16).save_pretrained(folder)
    counts = {"parameters": model.num_parameters(), "entries": len(entries), "documents": len(documents)}
    write_card(folder, seed=seed, tokens=tokens, loss=loss, **counts)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the model folder to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=42, help="of the phrasings, their order and the weights")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="to train on, in all epochs together")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if options.tokens < 1:
        raise InputError(f"`--tokens` is {options.tokens}", f"use at least 1; the default is {DEFAULT_TOKENS}")
    if out.exists():
        raise InputError(f"`{out}` exists", f"remove it first (`rm -r {out}`), or choose another `--out`")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        build(part, options.seed, options.tokens)
        size = sum(path.stat().st_size for path in part.rglob("*"))
        if size > SIZE_LIMIT:
            raise RuntimeError(f"the folder has {size:,} bytes, the limit is {SIZE_LIMIT:,}")
        for question in CHECKS:
            print(f"> {question}\n{answer(part, question)}")
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {size:,} bytes")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        main()
    except InputError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
