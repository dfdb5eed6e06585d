"""Rehearsals by the real job scripts: the example, every family from training to evaluation, and failures."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.loader import load_experiment, parse_experiment
from pipeline.progress import PlainDisplay
from pipeline.rehearse import Found, lay_out, rehearse
from pipeline.workspace import read_facts

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 600
STAGES = ["twin", "train", "merge", "gguf", "evaluate"]
HUB = """\
name: hub
hypothesis: the chain runs on a stand-in for a base that is not here
base: {model: MODEL}
data: {dataset: acme/conversations, eval: {fraction: 0.1}}
train:
  method: qlora
  flavor: a10g-large
  timeout: 1h
  loss_on: assistant
  sft: {warmup_steps: 10, weight_decay: 0.01}
  lora: {r: 8, targets: TARGETS}
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q4_K_M]}
evaluate: {timeout: 10m}
output: {repo: acme/hub}
budget: {max_usd: 1}
"""
HERE = """\
name: here
hypothesis: a fault shows in the rehearsal
base: {model: ./base}
data: {dataset: ./rows.parquet, eval: {fraction: 0.2}}
train:
  method: lora
  flavor: t4-small
  timeout: 1h
  lora: {r: 8, targets: all-linear}
merge: {timeout: 10m}
gguf:
  timeout: 10m
  quants: [Q8_0]
output: {repo: acme/here}
budget: {max_usd: 1}
"""
FAMILIES = {
    "Llama 3": ("meta-llama/Llama-3.1-8B-Instruct", "all-linear"),
    "Qwen 3": ("Qwen/Qwen3-4B", "all-linear"),
    "Qwen 3 MoE": ("Qwen/Qwen3-30B-A3B", "[q_proj, v_proj]"),
    "Gemma 3 text": ("google/gemma-3-1b-it", "[q_proj, v_proj]"),
    "Gemma 3 vision": ("google/gemma-3-12b-it", "[q_proj, v_proj]"),
    "Gemma 4": ("google/gemma-4-12b-it", "all-linear"),
    "Mistral": ("mistralai/Mistral-7B-Instruct-v0.3", "[q_proj, v_proj]"),
    "Phi 3": ("microsoft/Phi-3-mini-4k-instruct", "[qkv_proj, o_proj]"),
    "Phi 4": ("microsoft/phi-4", "[qkv_proj, o_proj]"),
    "gpt-oss": ("openai/gpt-oss-20b", "all-linear"),
    "SmolLM3": ("HuggingFaceTB/SmolLM3-3B", "all-linear"),
}


@dataclass(frozen=True)
class Outcome:
    """What a rehearsal told, and the log of its training when it failed. Plain values: it comes from a process."""

    stages: list[str]
    proves: tuple[str, ...]
    cannot_prove: tuple[str, ...]
    substituted: tuple[str, ...]
    shown: str
    failure: str | None
    log: str | None


def rehearse_family(name: str) -> Outcome:
    model, targets = FAMILIES[name]
    return outcome(HUB.replace("MODEL", model).replace("TARGETS", targets), ROOT)


def bad_setting() -> Outcome:
    model, targets = FAMILIES["Qwen 3"]
    text = HUB.replace("MODEL", model).replace("TARGETS", targets)
    return outcome(text.replace("weight_decay: 0.01", "lr_scheduler_type: cosine_with_min_lr"), ROOT)


def bad_template() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        root = small_repository(Path(folder))
        (root / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m.role.first.last }}{% endfor %}")
        return outcome(HERE, root)


def bad_tokenizer() -> Outcome:
    """One that cuts digit by digit, as no tokenizer that llama.cpp knows does it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    before = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = ["<unk>", "<|startoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = before, decoders.ByteLevel()
    raw.train_from_iterator(["The pilot waits for the tide."] * 9, trainer)
    with tempfile.TemporaryDirectory() as folder:
        root = small_repository(Path(folder))
        (root / "base/tokenizer.model").unlink()
        (root / "base/tokenizer.json").write_text(raw.to_str())
        (root / "base/tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}'
        )
        return outcome(HERE, root)


def small_repository(root: Path) -> Path:
    """The example's base, and its rows as Parquet."""
    import pyarrow.json
    import pyarrow.parquet

    examples = ROOT / "experiments/examples"
    shutil.copytree(examples / "tiny-docs-llama", root / "base")
    pyarrow.parquet.write_table(pyarrow.json.read_json(examples / "data/quickstart-train.jsonl"), root / "rows.parquet")
    (root / "scripts").symlink_to(ROOT / "scripts", target_is_directory=True)
    return root


def outcome(text: str, root: Path) -> Outcome:
    """Rehearse without a token, with a Hub that nobody answers for."""
    os.environ |= {"HF_TOKEN": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    file, shown = parse_experiment(text, "experiments/it.yaml"), StringIO()
    result = rehearse(file, read_facts(file.experiment, root), root, PlainDisplay(shown))
    logs = result.folder.glob("runs/*/*/log.txt") if result.folder else ()
    log = "\n".join(path.read_text(encoding="utf-8") for path in logs) if result.folder else None
    if result.folder:
        shutil.rmtree(result.folder)
    failure = result.failure.as_text() if result.failure else None
    told = (result.proves, result.cannot_prove, result.substituted, shown.getvalue())
    return Outcome(list(result.seconds), *told, failure, log)


def several_gpus() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        text = HERE.replace("lora: {r: 8, targets: all-linear}", "gradient_accumulation: 4").replace("lora", "full")
        text = text.replace("t4-small", "l4x4").replace("merge: {timeout: 10m}\n", "").replace("[Q8_0]", "[F16]")
        return outcome(text, small_repository(Path(folder)))


def preferences() -> Outcome:
    """Pairs that are not in the repository, on a 4-bit stand-in."""
    text = HUB.replace("MODEL", "Qwen/Qwen3-4B").replace("TARGETS", "[q_proj, v_proj]").replace("qlora", "dpo")
    text = text.replace("  loss_on: assistant\n", "  learning_rate: 5e-6\n").replace(
        "warmup_steps: 10", "warmup_steps: 0"
    )
    return outcome(text, ROOT)


CASES: dict[str, Callable[[], Outcome]] = {
    "several GPUs": several_gpus,
    "preferences": preferences,
    "bad setting": bad_setting,
    "bad template": bad_template,
    "bad tokenizer": bad_tokenizer,
}


def carry_out(case: str) -> Outcome:
    return rehearse_family(case) if case in FAMILIES else CASES[case]()


@pytest.fixture(scope="module")
def rehearsed(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Outcome]]:
    """The rehearsals that were selected, two at a time: one alone waits for imports on one core."""
    mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = [str(item.callspec.params["case"]) for item in mine if "case" in item.callspec.params]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        started = {case: pool.submit(carry_out, case) for case in wanted}
        yield lambda case: started[case].result(timeout=LIMIT_S)
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_whole_chain_on_the_stand_in_of_a_family(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    told = rehearsed(case)
    assert told.failure is None
    assert told.stages == STAGES
    assert f"`{FAMILIES[case][0]}` is not in this repository" in told.substituted[0]
    assert "made conversations stand in" in told.substituted[1]
    assert "llama.cpp converts, quantizes and runs it: Q4_K_M" in told.proves
    assert "that the base's own tokenizer and chat template pass: stand-ins took their place" in told.cannot_prove


@pytest.mark.parametrize("case", ["bad setting"])
def test_a_bad_setting_is_named_with_its_line(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    told = rehearsed(case)
    assert told.failure is not None and told.log is not None
    assert told.failure.startswith("error: experiments/it.yaml:10:27: train failed with exit code 1: ValueError: ")
    assert "hint: change `train.sft.lr_scheduler_type: cosine_with_min_lr`; the whole log: `" in told.failure
    assert "min_lr" in told.log
    assert "`Qwen/Qwen3-4B` is not in this repository" in told.substituted[0]


@pytest.mark.parametrize("case", ["bad template"])
def test_a_template_that_fails_is_shown_with_the_row(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    told = rehearsed(case)
    assert told.stages == ["twin", "train"]
    assert told.failure is not None
    assert told.failure.startswith("error: experiments/it.yaml:4:8: train: rows.parquet row 1: the base's chat templ")


@pytest.mark.parametrize("case", ["bad tokenizer"])
def test_a_tokenizer_unknown_to_llama_cpp_is_shown_at_the_base(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    told = rehearsed(case)
    assert told.stages == ["twin", "train", "merge", "gguf"]
    assert told.failure is not None
    assert told.failure.startswith("error: experiments/it.yaml:3:8: gguf: convert_hf_to_gguf.py failed")
    assert "BPE pre-tokenizer was not recognized" in told.failure


@pytest.mark.parametrize("case", ["several GPUs"])
def test_two_processes_stand_for_several_gpus(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    done = rehearsed(case)
    assert done.failure is None, (done.failure, done.log)
    assert "2 processes share each step (FSDP2), as the GPUs will" in done.proves
    assert done.stages == ["twin", "train", "gguf"]


@pytest.mark.parametrize("case", ["preferences"])
def test_preferences_from_training_to_evaluation(case: str, rehearsed: Callable[[str], Outcome]) -> None:
    done = rehearsed(case)
    assert done.failure is None, (done.failure, done.log)
    assert done.stages == STAGES
    assert "`dpo` training starts, learns, checkpoints and saves with these settings" in done.proves
    assert "the trainer takes every value of `train.sft`: warmup_steps, weight_decay" in done.proves
    assert "16 made pairs stand in for its rows" in done.substituted[1]


def test_files_that_were_fetched_take_the_place_of_stand_ins(tmp_path: Path) -> None:
    text = HUB.replace("MODEL", "acme/base").replace("TARGETS", "all-linear")
    experiment = parse_experiment(text).experiment
    examples = ROOT / "experiments/examples"
    found = Found(examples / "tiny-docs-llama", examples / "data/quickstart-train.jsonl")
    spec, changed, notes = lay_out(experiment, read_facts(experiment, ROOT), ROOT, tmp_path, found)
    assert (spec.tokenizer, spec.substituted) == (str(examples / "tiny-docs-llama"), ())
    assert changed.data.dataset == "./rows/quickstart-train.jsonl"
    assert len((tmp_path / changed.data.dataset).read_text().splitlines()) == 16
    assert notes == (
        "the first 16 rows of `acme/conversations`, their texts cut to 600 characters, stand for all of it",
    )


def test_the_quickstart_from_training_to_evaluation() -> None:
    path = ROOT / "experiments/examples/quickstart.yaml"
    file = load_experiment(path, path.relative_to(ROOT).as_posix())
    shown = StringIO()
    result = rehearse(file, read_facts(file.experiment, ROOT), ROOT, PlainDisplay(shown))
    assert result.failure is None, result.failure
    assert list(result.seconds) == STAGES
    assert result.folder is None
    assert "train: train · step 2/2" in shown.getvalue()
    assert "llama.cpp converts, quantizes and runs it: Q8_0, Q4_K_M" in result.proves
    assert all("stand for all of it" in note for note in result.substituted)
    assert result.summary().startswith("rehearsal passed in ")
