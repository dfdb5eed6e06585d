"""The traced memory of training beside the closed form, on published runs, and on a GPU beside what torch allocated.

    python benchmarks/trace.py
    python benchmarks/trace.py --published
    python benchmarks/trace.py --gpu

Plain: configuration, closed form, trace, their ratio and the CPU seconds of the child process. No weights, no GPU.
`--published` traces the steps of the four published runs that say everything, with the loss of their older stack.
`--gpu` trains each configuration for two steps with SFTTrainer on random weights of the base's shape, and prints
`torch.cuda.max_memory_allocated` of those steps. What is larger than the GPU by the trace is skipped.
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.memory import GIB, Loss, MemorySpec, estimate_need, spec_of
from pipeline.models import CATALOGUE, ModelShape, config_of
from pipeline.trace import trace_memory, trace_request

ROOT = Path(__file__).resolve().parents[1]
GEMMA, LLAMA = "google/gemma-3-{}-it", "meta-llama/Llama-3.{}-Instruct"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LONG = {"max_length": 8192}


@dataclass(frozen=True)
class Case:
    """One training: the base and what differs from the experiment's defaults, with the adapter under `lora`."""

    model: str
    method: str
    train: dict[str, Any]
    lora: dict[str, Any]

    @property
    def experiment(self) -> Experiment:
        """An experiment of it."""
        lora = {} if self.method == "full" else {"lora": self.lora}
        # As the case says, and not as a plan would choose on a GPU this large.
        said = {"gradient_checkpointing": True, "model_init_kwargs": {"attn_implementation": "sdpa"}}
        sft = {**said, **self.train.get("sft", {})}
        train = {"method": self.method, "flavor": "h200", "timeout": "1h", **self.train, "sft": sft, **lora}
        values = {"name": "traced", "hypothesis": "the trace tells what is allocated", "base": {"model": self.model}}
        values |= {"data": {"dataset": "acme/rows"}, "train": train, "output": {"repo": "acme/traced"}}
        return Experiment.model_validate({**values, "budget": {"max_usd": 10}})

    @property
    def facts(self) -> Facts:
        """What a trace and the closed form start from."""
        return Facts(shape=CATALOGUE[self.model])

    @property
    def words(self) -> str:
        """For the first columns of a table."""
        train = self.experiment.train
        adapter = f"r={train.lora.r} {'qkvo' if train.lora.targets != 'all-linear' else 'all'}" if train.lora else "–"
        said = ", ".join(f"{key}={value}" for key, value in {**self.train.get("sft", {}), **_other(self.lora)}.items())
        name = self.model.split("/")[1]
        return f"{name} | {self.method} {adapter} | {train.batch_size} × {train.max_length:,} | {said}"


def _other(lora: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in lora.items() if key not in ("r", "targets")}


CASES = (
    Case(GEMMA.format("12b"), "qlora", {}, {"r": 64, "targets": ATTENTION, "dropout": 0.05}),
    Case(GEMMA.format("12b"), "qlora", LONG, {"r": 64, "targets": ATTENTION, "dropout": 0.05}),
    Case(GEMMA.format("4b"), "qlora", {"max_length": 4096}, {"r": 16}),
    Case(GEMMA.format("27b"), "qlora", {}, {"r": 16}),
    Case(LLAMA.format("1-8B"), "qlora", {}, {"r": 16}),
    Case(LLAMA.format("1-8B"), "qlora", LONG, {"r": 16}),
    Case(LLAMA.format("1-8B"), "lora", {}, {"r": 16}),
    Case(LLAMA.format("1-8B"), "qlora", {}, {"r": 16, "dora": True}),
    Case(LLAMA.format("2-1B"), "full", {}, {}),
    Case(LLAMA.format("2-3B"), "lora", {"max_length": 1024, "sft": {"gradient_checkpointing": False}}, {"r": 32}),
    Case("Qwen/Qwen3-8B", "qlora", {"max_length": 1024, "batch_size": 4}, {"r": 16}),
    Case("Qwen/Qwen3-0.6B", "full", {"max_length": 1024, "batch_size": 4, "gradient_accumulation": 1}, {}),
    Case("Qwen/Qwen3-14B", "qlora", {"max_length": 4096}, {"r": 16}),
    Case("Qwen/Qwen3-4B", "qlora", {"max_length": 1024, "sft": {"label_smoothing_factor": 0.1}}, {"r": 16}),
    Case("mistralai/Mistral-7B-Instruct-v0.3", "qlora", {"max_length": 4096}, {"r": 16, "dropout": 0.05}),
    Case("HuggingFaceTB/SmolLM3-3B", "lora", {"batch_size": 2}, {"r": 64, "targets": ATTENTION}),
)
# benchmarks/memory_rows.csv, by id: layers, hidden, intermediate, rows of 4,096 tokens, dtype of what is not quantised,
# bytes allocated. Mistral 7B, Llama 2 70B; r=16 on q, k, v, o; flash attention.
PUBLISHED = {
    "fms-a100_80gb-76-alloc": (32, 4096, 14336, 4, "bfloat16", 16373838336),
    "fms-a100_80gb-78-alloc": (32, 4096, 14336, 8, "bfloat16", 28412178944),
    "fms-a100_80gb-92-alloc": (80, 8192, 28672, 4, "bfloat16", 68126381056),
    "fms-a100_80gb-56-alloc": (32, 4096, 14336, 4, "float32", 20669338112),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--published", action="store_true", help="the published runs instead")
    choice.add_argument("--gpu", action="store_true", help="also train two steps of each on the GPU of this machine")
    arguments = parser.parse_args()
    if arguments.published:
        published()
        return 0
    print(
        "| base | training | rows | settings | closed form, GiB | trace, GiB | ratio | CPU s | measured, GiB | error |"
    )
    print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    errors = [error for case in CASES if (error := row(case, arguments.gpu)) is not None]
    if errors:
        worst, mean = max(errors), sum(errors) / len(errors)
        print(f"\n{len(errors)} measured; mean absolute error of the trace {mean:.1%}, worst {worst:.1%} (target 3 %)")
    return 0


def row(case: Case, on_gpu: bool) -> float | None:
    """Print one row; the absolute error of the trace where it was measured."""
    experiment, shape = case.experiment, CATALOGUE[case.model]
    closed = estimate_need(spec_of(experiment, shape), shape).allocated
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    traced = trace_memory(experiment, case.facts).allocated
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    measured = measure(case, "cuda") if on_gpu and room(traced) else None
    found = f"{measured:.2f} | {traced / measured - 1:+.1%}" if measured else "not measured | "
    print(
        f"| {case.words} | {closed:.2f} | {traced:.2f} | {closed / traced:.3f} | {seconds:.0f} | {found} |", flush=True
    )
    return abs(traced / measured - 1) if measured else None


# Published runs


def tracer() -> ModuleType:
    """scripts/trace_memory.py as a module."""
    spec = importlib.util.spec_from_file_location("trace_memory", ROOT / "scripts/trace_memory.py")
    if spec is None or spec.loader is None:
        raise ImportError("scripts/trace_memory.py is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def older_step(module: ModuleType, loaded_as: str) -> type:
    """The step of transformers 4.48 and TRL 0.13: adapters stay in fp32, and all logits are written out."""

    class OlderStep(module.Step):  # type: ignore[misc, name-defined]
        dtype, adapter_dtype = loaded_as, None

        def loss(self, model: Any) -> Any:
            import torch

            ids = torch.zeros((self.train["batch_size"], self.train["max_length"]), dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
                upcast = logits.float()  # both stay alive, in the callers of that loss
                shifted = upcast[:, :-1].contiguous()
                return torch.nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), ids[:, 1:].reshape(-1))

    return OlderStep


def apart(work: Callable[[], Any]) -> Any:
    """What `work` returns, JSON-ready, in a forked process: a trace leaves things behind that must not be collected."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        gc.disable()
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as answer:
        said = answer.read()
    os.wait()
    return json.loads(said)


def published_shape(name: str) -> ModelShape:
    """The base of a published run."""
    layers, hidden, intermediate, *_ = PUBLISHED[name]
    return ModelShape("mistral", layers, hidden, intermediate, hidden, 1024, 32000, False, heads=hidden // 128)


def traced_published(module: ModuleType, name: str) -> float:
    """GiB that the step of a published run allocates by its trace."""
    *_, rows, dtype, _ = PUBLISHED[name]
    flash = {"optim": "adamw_torch", "model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
    train = {"max_length": 4096, "batch_size": rows, "sft": flash}
    case = Case("mistralai/Mistral-7B-Instruct-v0.3", "qlora", train, {"r": 16, "targets": ATTENTION})
    request = trace_request(case.experiment, case.facts) | {"config": config_of(published_shape(name))}
    found: float = apart(lambda: module.trace(request, older_step(module, dtype))["allocated_gib"])
    return found


def published() -> None:
    """Print closed form, trace and measurement of the published runs."""
    module = tracer()
    print("| run | measured, GiB | trace | error | closed form | error |\n|---|--:|--:|--:|--:|--:|")
    for name, (*_, rows, dtype, allocated) in PUBLISHED.items():
        spec = MemorySpec(4096, rows, rank=16, targets=tuple(ATTENTION), adapter_bytes=4, optimizer="adamw_torch")
        spec = replace(spec, attention="flash_attention_2", loss=Loss.LOGITS, logit_bytes=14)
        spec = replace(spec, other_bytes=4 if dtype == "float32" else 2)
        closed = estimate_need(spec, published_shape(name)).allocated
        traced, measured = traced_published(module, name), allocated / GIB
        errors = traced / measured - 1, closed / measured - 1
        print(f"| {name} | {measured:.2f} | {traced:.2f} | {errors[0]:+.1%} | {closed:.2f} | {errors[1]:+.1%} |")


# A GPU


def room(traced: float) -> bool:
    """Whether the GPU of this machine has as much, and a tenth more."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU\n\nhint: leave out `--gpu`")
    return traced * 1.1 * GIB < torch.cuda.get_device_properties(0).total_memory


def measure(case: Case, device: str) -> float | None:
    """GiB that torch allocated at the peak of two steps with random weights; None on the CPU, which keeps no count."""
    import torch

    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, device, folder)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    del trainer
    gc.collect()
    return peak


def make_trainer(case: Case, device: str, folder: str) -> Any:
    """SFTTrainer as train_sft.py sets it up, on rows of the full length, every token trained."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    module, request = tracer(), trace_request(case.experiment, case.facts)
    train = request["train"]
    sft = {key: value for key, value in train["sft"].items() if key != "model_init_kwargs"}  # of the loading below
    rows, length = 2 * train["batch_size"] * train["gradient_accumulation"], train["max_length"]
    # One row in a batch is a token short: batches of several rows are padded, as they are in earnest.
    ids = [[5] * (length - (row % train["batch_size"] > 0)) for row in range(rows)]
    settings = SFTConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        max_steps=2,
        per_device_train_batch_size=train["batch_size"],
        gradient_accumulation_steps=train["gradient_accumulation"],
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"optim": "adamw_8bit" if case.method == "qlora" else "adamw_torch_fused", **sft},
    )
    return SFTTrainer(
        model=random_model(module, request, device),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer(),
        peft_config=None
        if case.method == "full"
        else module.lora_config(train["lora"], "vision_config" in request["config"]),
    )


def random_model(module: ModuleType, request: dict[str, Any], device: str) -> Any:
    """The base with random weights, on the device; for QLoRA its linear layers in NF4, quantised one after another."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    model = module.load_base(module.full_config(request["config"]), "bfloat16", None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    if request["train"]["method"] == "qlora":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        linear = {name: child for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **nf4)
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
        for name, child in model.named_modules():
            if isinstance(child, Linear4bit):
                old = linear.pop(name)
                child.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=child)
                child.weight = child.weight.to(device)
                child.bias, child.support_avx512bf16_for_cpu = old.bias, False
        model.is_loaded_in_4bit = True  # what PEFT and TRL ask
    return torch.nn.Module.to(model, device)


def tokenizer() -> Any:
    """Any tokenizer: the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    raise SystemExit(main())
