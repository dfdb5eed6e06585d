"""`scripts/convert_gguf.py` on a tiny Llama, through its command line; checks of one defect each, on the functions.

The first run on a machine builds llama.cpp into the user's cache (minutes); every later one finds it there.
"""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_gguf.py"
SENTENCES = [
    "The ferry leaves the old harbour at seven, and the gulls follow it as far as the lighthouse.",
    "A lighthouse keeper writes 365 lines a year: wind, rain, ships, oil.",
    "def knots(metres, seconds):\n    return metres / seconds * 1.94384  # speed of a boat",
    "What does the bell on the rocks say? It says: keep away, keep away.",
]
MARKERS = ["<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_gguf", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_gguf"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def save_tokenizer(folder: Path) -> int:
    """A SentencePiece tokenizer, which the converter reads without a list of known hashes; returns its size."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=MARKERS,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(i): {"content": token, **flags} for i, token in enumerate(["<unk>", "<s>", "</s>", *MARKERS])}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "add_prefix_space": False, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return size


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights; 256 and 512 wide, so that K-quants fit without fallback."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gguf") / "merged"
    folder.mkdir()
    vocab = save_tokenizer(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 5, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **ids, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture(scope="session")
def tools() -> Path:
    """llama.cpp in the user's cache, as every run uses it."""
    return script.prepare_llama_cpp()


def write_run(folder: Path, model: Path, quants: list[str]) -> Path:
    run = {
        "schema": 1,
        "run_id": "harbour-0f3a9c21",
        "fingerprint": "0f3a9c21" * 8,
        "stage": "gguf",
        "attempt": 1,
        "experiment": {"name": "harbour", "gguf": {"flavor": "cpu-upgrade", "timeout": 3600, "quants": quants}},
        "inputs": {"model": {"path": str(model)}},
        "output": {"path": str(folder / "artifact")},
        "work": str(folder / "work"),
        "device": "cpu",
        "predicted": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(run))
    return path


def call(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("MERGETUNE ")) for line in output.splitlines() if line.startswith("MERGETUNE")]


def changed_copy(model: Path, folder: Path, **files: object) -> Path:
    """A copy of the model folder with some JSON files updated (`config={"vocab_size": 1}`)."""
    shutil.copytree(model, folder)
    for name, update in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **update}))
    return folder


# --- the stage ---


@pytest.fixture(scope="session")
def killed_then_done(
    model: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """A run killed while it quantises, then run again: the artifact, what the kill left, the second run's events."""
    folder = tmp_path_factory.mktemp("gguf-run")
    run = write_run(folder, model, ["Q8_0", "Q4_K_M"])
    with subprocess.Popen([sys.executable, str(SCRIPT), str(run)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        for line in first.stdout:
            if '"quantize Q4_K_M"' in line:
                first.kill()
                break
    left = sorted(path.name for path in (folder / "artifact").iterdir())
    second = call(run)
    assert second.returncode == 0, second.stdout + second.stderr
    return folder / "artifact", left, events(second.stdout)


def test_a_killed_run_leaves_no_artifact(killed_then_done: tuple[Path, list[str], Any]) -> None:
    _, left, _ = killed_then_done
    assert "harbour-Q8_0.gguf" in left
    assert not {"manifest.json", "harbour-Q4_K_M.gguf"} & set(left)


def test_the_run_after_it_makes_every_quant_and_checks_it(killed_then_done: tuple[Path, Any, Any]) -> None:
    artifact, _, _ = killed_then_done
    assert sorted(path.name for path in artifact.iterdir()) == [
        "harbour-Q4_K_M.gguf",
        "harbour-Q8_0.gguf",
        "manifest.json",
    ]
    manifest = json.loads((artifact / "manifest.json").read_text())
    small, large = manifest["metrics"]["quants"][1], manifest["metrics"]["quants"][0]
    for quant in (small, large):
        generation = quant["checks"].pop("generation")  # a random model may repeat itself
        assert set(quant["checks"].values()) == {"ok"} and generation
        assert quant["bytes"] == (artifact / quant["file"]).stat().st_size
        assert quant["sample"]["prompt"] == script.QUESTION
    assert (large["quant"], small["quant"]) == ("Q8_0", "Q4_K_M")
    assert small["types"].keys() == {"Q4_K", "Q6_K", "F32"}
    assert 4.5 < small["bits_per_weight"] < 5.5 < 8.5 < large["bits_per_weight"] < 9
    assert 0 < large["kl_vs_bf16"] < 2e-3 and large["kl_vs_bf16"] < small["kl_vs_bf16"] < 0.1
    assert manifest["metrics"]["llama_cpp"]["commit"] == script.LLAMA_CPP_COMMIT
    assert manifest["measured"]["peak_memory_gib"] > 0.05
    assert not (artifact.parent / "work" / "gguf").exists(), "the bf16 file is removed"


def test_its_events_tell_the_phases(killed_then_done: tuple[Any, Any, list[dict[str, Any]]]) -> None:
    _, _, told = killed_then_done
    phases = [event["name"] for event in told if event["event"] == "phase"]
    made = [f"{verb} {quant}" for quant in ("Q8_0", "Q4_K_M") for verb in ("quantize", "verify")]
    assert phases == ["tokenize", "convert", "verify BF16", *made]
    assert (told[0]["event"], told[-1]["event"]) == ("start", "end")
    assert [event for event in told if event["event"] == "progress"][-1]["unit"] == "tensors"


def test_a_finished_artifact_is_not_made_twice(killed_then_done: tuple[Path, Any, Any]) -> None:
    result = call(killed_then_done[0].parent / "run.json")
    assert result.returncode == 2 and "already holds a finished artifact" in result.stderr


# --- bad input: said at once, exit code 2, no artifact ---


def no_config(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def lost_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def truncated_shard(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def no_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def quantised_base(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))


@pytest.mark.parametrize(
    ("damage", "fact", "hint"),
    [
        (no_config, "has no config.json", "merge the adapter into its base first"),
        (no_weights, "has no `model*.safetensors`", "merge the model as safetensors"),
        (lost_shard, "which its index names", "copy or merge it again"),
        (truncated_shard, "is truncated or damaged", "copy or merge it again"),
        (no_template, "has no chat template", "chat_template.jinja"),
        (no_tokenizer, "has no tokenizer files", "copy the base model's tokenizer files"),
        (quantised_base, "holds quantised weights", "in bfloat16, not in 4 bit"),
    ],
)
def test_a_bad_model_folder_is_refused(tmp_path: Path, model: Path, damage: Any, fact: str, hint: str) -> None:
    copy = changed_copy(model, tmp_path / "model")
    damage(copy)
    with pytest.raises(script.InputError) as caught:
        script.check_model(copy)
    assert fact in caught.value.message and hint in caught.value.hint


def test_a_bad_model_folder_ends_the_script_with_2_and_no_artifact(tmp_path: Path, model: Path) -> None:
    copy = changed_copy(model, tmp_path / "model")
    truncated_shard(copy)
    result = call(write_run(tmp_path, copy, ["Q8_0"]))
    assert result.returncode == 2
    assert "error: `" in result.stderr and "\n\nhint: copy or merge it again" in result.stderr
    assert not (tmp_path / "artifact").exists()


def test_a_mistyped_quant_gets_the_nearest_name(tmp_path: Path, model: Path) -> None:
    result = call(write_run(tmp_path, model, ["Q8_0", "q4km"]))
    assert result.returncode == 2
    assert result.stderr == "error: `gguf.quants`: `q4km` is not a quant this script makes\n\nhint: use `Q4_K_M`\n"


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    source = script.check_model(changed_copy(model, tmp_path / "model", config={"vocab_size": 300}))
    with pytest.raises(script.InputError, match=r"ids up to \d+, `vocab_size` in config.json is 300"):
        script.expect(source)


def test_a_template_that_fails_is_refused(tmp_path: Path, model: Path) -> None:
    broken = {"chat_template": "{{ raise_exception('no user please') }}"}
    source = script.check_model(changed_copy(model, tmp_path / "model", tokenizer_config=broken))
    with pytest.raises(script.InputError, match="no user please"):
        script.expect(source)


def test_too_little_disk_is_said_before_converting(tmp_path: Path) -> None:
    source = script.Source(tmp_path, {"vocab_size": 1000}, {"big": 10**15})
    with pytest.raises(script.InputError, match="of free disk"):
        script.check_disk(source, ["Q4_K_M"], tmp_path, tmp_path)


# --- defects with which the converter still exits 0 ---


def test_a_missing_tensor_and_markers_typed_as_text_are_found(tmp_path: Path, model: Path, tools: Path) -> None:
    """The markers: transformers 5 saved the tokenizer anew beside tokenizer.model, and plain text looks right."""
    import transformers
    from safetensors.torch import load_file, save_file

    copy = changed_copy(model, tmp_path / "model")
    tensors = {name: t for path in sorted(copy.glob("*.safetensors")) for name, t in load_file(path).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    no_weights(copy)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(copy)
    source = script.check_model(copy)
    script.convert(tools, source, tmp_path / "model.gguf")

    expected = script.expect(source)
    with pytest.raises(script.InputError, match=r"`special_tokens`: `<\|user\|>` has token type 1") as caught:
        script.verify(script.Job(tools, tmp_path, source, expected), tmp_path / "model.gguf", "BF16", [], None)
    assert "byte for byte" in caught.value.hint
    job = script.Job(tools, tmp_path, source, replace(expected, added={}))
    with pytest.raises(script.InputError, match=r"tensor 'blk\.1\.ffn_up\.weight' not found") as caught:
        script.verify(job, tmp_path / "model.gguf", "BF16", [], None)
    assert "merge again" in caught.value.hint


def test_an_unknown_architecture_is_said(tmp_path: Path, model: Path, tools: Path) -> None:
    unknown = {"architectures": ["LighthouseForCausalLM"], "model_type": "lighthouse"}
    copy = changed_copy(model, tmp_path / "model", config=unknown)
    with pytest.raises(script.InputError, match="Model LighthouseForCausalLM is not supported") as caught:
        script.convert(tools, script.check_model(copy), tmp_path / "model.gguf")
    assert "remove `gguf:`" in caught.value.hint


EXPECTED = script.Expected(
    texts={"chat": "<u>hi"},
    ids={"chat": [7, 20]},
    spaced={"chat": [[[7]], [[20], [30, 20]]]},
    added={7: "<u>", 0: "<unk>"},
    unknown=0,
    bos=1,
    eos=2,
    ends=[2],
    size=100,
    template="{{ messages }}",
)
LAYER = {f"blk.{i}.{name}": ["BF16", 10] for i in (0, 1) for name in ("attn_q.weight", "ffn_up.weight")}
FACTS = {
    "architecture": "llama",
    "file_type": 32,
    "block_count": 2,
    "context_length": 512,
    "bos": 1,
    "eos": 2,
    "template": "{{ messages }}\n",
    "vocab_size": 100,
    "token_types": {"7": 3, "0": 2},
    "tensors": {"output.weight": ["BF16", 5], **LAYER},
    "mapped": {"q": "blk.0.attn_q.weight", "head": "output.weight", "vision.tower": None},
}
SOURCE = script.Source(
    Path(), {"num_hidden_layers": 2, "max_position_embeddings": 512}, {"q": 10, "head": 5, "vision.tower": 9}
)
FILE = Path("harbour-Q4_K_M.gguf.part")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"file_type": 1}, "`file_type` is 1, expected 32"),
        ({"block_count": 1}, "`block_count` is 1, expected 2"),
        ({"context_length": 4096}, "`context_length` is 4096, expected 512"),
        ({"bos": None}, "`bos` is None, expected 1"),
        ({"eos": 0}, "`eos` is 0, expected 2"),
    ],
)
def test_wrong_metadata_is_found(change: dict[str, Any], fact: str) -> None:
    assert script.check_metadata(FILE, FACTS, "BF16", SOURCE, EXPECTED) == "ok"
    with pytest.raises(script.InputError) as caught:
        script.check_metadata(FILE, {**FACTS, **change}, "BF16", SOURCE, EXPECTED)
    assert caught.value.message == f"`harbour-Q4_K_M.gguf` failed the check `metadata`: {fact}"


def test_a_vocabulary_cut_short_is_found() -> None:
    assert script.check_vocabulary(FILE, FACTS, EXPECTED) == "ok"
    with pytest.raises(script.InputError, match="100 tokens, the tokenizer has 101"):
        script.check_vocabulary(FILE, FACTS, replace(EXPECTED, size=101))


def test_another_chat_template_is_found() -> None:
    assert script.check_template(FILE, FACTS, EXPECTED) == "ok"
    with pytest.raises(script.InputError, match="is not the model folder's"):
        script.check_template(FILE, {**FACTS, "template": ""}, EXPECTED)


def test_lost_tensors_and_layers_are_found() -> None:
    assert script.check_tensors(FILE, FACTS, SOURCE) == "ok"
    headless = {name: tensor for name, tensor in FACTS["tensors"].items() if name != "output.weight"}
    short = {name: tensor for name, tensor in FACTS["tensors"].items() if "blk.1" not in name}
    lost = {**FACTS, "tensors": headless, "mapped": {**FACTS["mapped"], "b": "blk.0.ffn_up.weight"}}
    lost["mapped"] |= {f"rest {name}": name for name in headless}
    with pytest.raises(script.InputError, match="`head` and 0 more are missing"):
        script.check_tensors(FILE, lost, SOURCE)
    tied = replace(SOURCE, config={**SOURCE.config, "tie_word_embeddings": True})
    assert script.check_tensors(FILE, lost, tied) == "ok", "a tied output head is not written twice"
    with pytest.raises(script.InputError, match="1 of 2 layers have tensors"):
        script.check_tensors(FILE, {**FACTS, "tensors": short}, SOURCE)
    mixed = {**FACTS["tensors"], "blk.1.ffn_gate.weight": ["BF16", 10]}
    assert script.check_tensors(FILE, {**FACTS, "tensors": mixed}, SOURCE) == "2 kinds of layers"
    with pytest.raises(script.InputError, match="4 tensors, the bf16 file has 5"):
        script.check_same_tensors(FILE, {"tensors": headless}, FACTS)


def test_token_ids_may_differ_by_a_space_but_not_by_a_cut_marker() -> None:
    def check(ids: list[int]) -> str:
        return script.check_ids(FILE, {"chat": ids}, EXPECTED, ["chat"])

    assert check([7, 20]) == "ok"
    assert check([7, 30, 20]) == "llama.cpp adds a space before some text where transformers does not"
    with pytest.raises(
        script.InputError, match=r"on `chat` ids differ .* position 0: \[60, 61, 20\], expected \[7, 20\]"
    ):
        check([60, 61, 20])


def test_fallback_quantisation_is_a_warning_and_a_missing_type_a_defect() -> None:
    log = ["llama_model_quantize_impl: WARNING: 9 of 21 tensor(s) required fallback quantization"]
    assert "9 of 21 tensors" in script.check_types(FILE, FACTS, "Q4_K_M", log)
    with pytest.raises(script.InputError, match="no tensor has type Q4_K"):
        script.check_types(FILE, FACTS, "Q4_K_M", [])


def test_a_crash_in_a_child_is_told_by_its_signal() -> None:
    code, lines = script.run_child(
        [sys.executable, "-c", "import os; print('loading', flush=True); os.kill(os.getpid(), 11)"]
    )
    with pytest.raises(script.InputError, match="verify was ended by SIGSEGV: loading") as caught:
        script.require_success("verify", code, lines)
    assert "crashed" in caught.value.hint


# --- llama.cpp: fetched, checked, built once ---


def test_an_archive_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own settings decide where it looks; here it finds a real file under the right name, of other content."""
    with tarfile.open(tmp_path / f"llama_cpp_python-{script.SDIST_VERSION}.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(f"llama_cpp_python-{script.SDIST_VERSION}/PKG-INFO"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "download"
    folder.mkdir()
    with pytest.raises(script.InputError, match="DO NOT MATCH THE HASHES") as caught:
        script.fetch_sdist(folder, "0" * 64)
    assert "another file under this name" in caught.value.hint
    with pytest.raises(script.InputError, match="has sha256"):
        script.require_hash(next(tmp_path.glob("*.tar.gz")), script.SDIST_SHA256)


def test_extraction_takes_what_is_needed_and_stays_in_its_folder(tmp_path: Path) -> None:
    def archive(*names: str) -> Path:
        with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(f"llama_cpp_python-{script.SDIST_VERSION}/{name}"))
        return tmp_path / "sdist.tar.gz"

    tree = "vendor/llama.cpp"
    script.extract(archive(f"{tree}/src/llama.cpp", f"{tree}/models/big.gguf", "llama_cpp/_ggml.py"), tmp_path / "out")
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == ["bindings/llama_cpp/__init__.py", "bindings/llama_cpp/_ggml.py", "llama.cpp/src/llama.cpp"]
    with pytest.raises(tarfile.OutsideDestinationError):
        script.extract(archive(f"{tree}/src/../../../../../../escaped"), tmp_path / "out")


BUILDER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {scripts!r})
    import convert_gguf

    def build(folder, lock):
        with (folder.parent / "log").open("a") as log:
            log.write("built\\n")
        print("building", flush=True)
        time.sleep({seconds})
        folder.mkdir()

    convert_gguf.build_once(Path({folder!r}), build)
"""


def start_builder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(BUILDER).format(scripts=str(SCRIPT.parent), folder=str(folder), seconds=seconds)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def test_two_at_once_build_once(tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp"
    first = start_builder(folder, 2.0)
    assert first.stdout and first.stdout.readline() == "building\n"
    second = start_builder(folder, 2.0)
    told, _ = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (tmp_path / "log").read_text() == "built\n"
    assert [event["name"] for event in events(told)] == ["waiting for llama.cpp build"]


def test_a_killed_build_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp"
    first = start_builder(folder, 60.0)
    assert first.stdout and first.stdout.readline() == "building\n"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert not folder.exists()
    second = start_builder(folder, 0.0)
    second.communicate(timeout=60)
    assert folder.is_dir() and (tmp_path / "log").read_text() == "built\n" * 2


def test_prepare_with_a_full_cache_does_nothing(tools: Path) -> None:
    result = call("prepare")
    assert result.returncode == 0
    assert [(event["event"], event["folder"]) for event in events(result.stdout)] == [("end", str(tools))]


def test_prepare_without_a_compiler_says_how_to_get_one(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "MERGETUNE_CACHE": str(tmp_path / "cache")}
    result = call("prepare", env=environment)
    assert result.returncode == 2
    assert "needs a C++ compiler" in result.stderr and "apt-get install g++" in result.stderr
