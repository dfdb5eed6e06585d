"""The script that makes the quickstart's base model, and the model folder it made. Not the quickstart."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dev" / "make_tiny_base.py"
COMMITTED = ROOT / "experiments" / "examples" / "tiny-docs-llama"
LIMIT = 6_000_000
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does len do?"},
    {"role": "assistant", "content": "Return."},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does len do?<|im_end|>\n"
    "<|im_start|>assistant\nReturn.<|im_end|>\n"
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The finished script."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of `folder` by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_base", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_base"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--tokens", "0"], "error: `--tokens` is 0\n", "use at least 1"),
        (["--tokens", "many"], "error: argument --tokens: invalid int value: 'many'\n", "--help"),
        (["--epochs", "3"], "error: unrecognized arguments: --epochs 3\n", "--help"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], error: str, hint: str) -> None:
    done = run("--out", tmp_path / "model", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(error)
    assert hint in done.stderr.partition("\n\nhint: ")[2]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: `{tmp_path}` exists\n\nhint: remove it first (`rm -r {tmp_path}`), or choose another `--out`\n"
    )
    assert contents(tmp_path) == {"kept": b"mine"}


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("Return the length.\n\n    More.", "Return the length. More."),
        ("len(x) -> int\n\nReturn the *length* of\n``x``", "Return the length of `x`."),
        ("dict() -> new empty dictionary\ndict(x) -> filled\n    (by x)", "New empty dictionary."),
        ("See :func:`os.walk`\n\n    >>> 1\n    1", "See os.walk."),
        ("Codes are:\n\n- one\n- two", "Codes are."),
        (">>> 1 + 1\n2", ""),
    ],
)
def test_an_answer_is_the_first_sentences(script: ModuleType, doc: str, answer: str) -> None:
    assert script.prose(script.clean(doc)) == answer


def test_a_long_answer_stops_at_a_sentence(script: ModuleType) -> None:
    text = " ".join(["This sentence has quite a few words in it."] * 20)
    assert script.prose(text, limit=100) == "This sentence has quite a few words in it. " * 1 + text[:42]


def test_phrasings_repeat_with_the_seed(script: ModuleType) -> None:
    entry = script.make_entry("list.sort", "call", "Sort the list in place.", 6)
    first, second = ([script.exchange(entry, rng) for _ in range(20)] for rng in (random.Random(1), random.Random(1)))
    assert first == second
    assert len({user["content"] for user, _ in first}) > 5
    assert {assistant["content"] for _, assistant in first} <= {
        "Sort the list in place.",
        "Use list.sort(). Sort the list in place.",
    }


@pytest.mark.slow
def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    from safetensors import safe_open

    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / "one", tmp_path / "two"]
        for done in pool.map(lambda folder: run("--out", folder, "--tokens", 4608, "--seed", 7), folders):
            assert done.returncode == 0, done.stderr
            assert "step 3/3  loss " in done.stdout
    files = contents(tmp_path / "one")
    assert files == contents(tmp_path / "two")
    assert set(files) == FILES
    assert sum(map(len, files.values())) < LIMIT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            piece = weights.get_slice(key)
            assert piece.get_dtype() == "BF16"
            assert piece.get_shape()[-1] % 256 == 0, key


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(SCRIPT), "--out", str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "documented names" in process.stdout.readline()
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_the_committed_folder_is_small_and_safe() -> None:
    files = contents(COMMITTED)
    assert set(files) == FILES
    assert sum(map(len, files.values())) < LIMIT
    config = json.loads(files["config.json"])
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert config["tie_word_embeddings"] is True
    assert json.loads(files["generation_config.json"])["eos_token_id"] == config["eos_token_id"] == 2
    card = files["README.md"].decode()
    assert "PSF License" in card
    assert "scripts/dev/make_tiny_base.py --tokens" in card


@pytest.mark.slow
def test_the_committed_tokenizer(script: ModuleType) -> None:
    import sentencepiece
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(COMMITTED)
    pieces = sentencepiece.SentencePieceProcessor(model_file=os.fspath(COMMITTED / "tokenizer.model"))
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(script.SPECIALS)
    assert all(pieces.is_control(i) for i in range(1, 5))
    texts = [
        "  two spaces",
        "a\n\nb\n",
        "naïve 日本語 🙂",
        "x" + " " * 17 + "y",
        "=" * 41,
        "def f(a):\n    return a",
        "",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED
    opened = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert opened == RENDERED.removesuffix("Return.<|im_end|>\n")
    masked = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, on in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(learned) == "Return.<|im_end|>"
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("What does str.upper do?", "Return a copy of the string converted to uppercase."),
        ("What does print do?", "Prints the values to a stream"),
        ("What is a dict?", "A mapping object maps hashable values"),
    ],
)
def test_the_committed_model_answers_and_stops(script: ModuleType, question: str, part: str) -> None:
    made = script.answer(COMMITTED, question)
    assert part in made
    assert made.endswith("<|im_end|>")
