# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate==1.15.0",
#   "bitsandbytes==0.50.2",
#   "peft==0.21.2",
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "trl==1.16.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-22T00:00:00Z"
# ///
"""Trace one training step of an experiment on tensors without data, and print what a GPU would have to allocate.

    python scripts/trace_memory.py request.json

The request holds `config` (the base's config.json), `train` (the resolved section of the experiment), `gpus`, and
`full_depth`. The step runs the modelling code of transformers, PEFT, bitsandbytes and TRL as `train_sft.py` does, on
fake tensors: no weights, no download, no GPU. A few layers of each kind are traced and the rest is added by the
straight line through them, which is exact because every phase of a step grows by the same bytes with each layer.

What a CUDA device does otherwise than the CPU, in the kernels it picks and in what they keep, is put in by hand:
everything of that sort stands under "As on CUDA". One JSON document goes to stdout. Exit codes: 0 done, 1 this training
cannot be traced, 2 the request cannot be read.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import math
import os
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# Families whose trace was compared with closed form and, layer by layer, with a trace of their full depth.
FAMILIES = ("gemma3", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# Settings of `train.sft` that change what is allocated in ways that no fake tensor shows.
UNTRACED = ("activation_offloading", "use_liger_kernel", "torch_compile", "deepspeed", "fsdp", "neftune_noise_alpha")
UNTRACED += ("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "padding_free")
# Layers outside the text tower that LoRA would also find; as in train_sft.py.
NOT_TEXT = r".*(vision|visual|image|audio|multi_modal_projector|mm_projector|connector).*"
GIB = 2**30
BLOCK = 512  # bytes; CUDA's caching allocator rounds every request up to this
FUSED_ROWS = 1536  # up to so many rows bitsandbytes may multiply without writing the weight out
ALONE = 4  # references to a tensor that only the engine holds, seen from inside a dispatch mode
PAGED_FROM = 100_000  # elements; bitsandbytes keeps the state of smaller parameters on the GPU even when paged
CATEGORIES = ("weights", "adapter", "optimizer", "activations", "head", "scratch")


class Refused(Exception):
    """Why this training cannot be traced. Printed as `error:` and `hint:`."""

    def __init__(self, message: str, hint: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code


def main() -> int:
    """Read the request, trace, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", help="path of the request, `-` for standard input")
    try:
        request = read_request(parser.parse_args().request)
        check_request(request)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        warnings.simplefilter("ignore")
        print(json.dumps(trace(request)), flush=True)
        os._exit(0)  # without the collection at the end of a Python process: see `trace`
    except Refused as refused:
        print(f"error: {refused.message}\n\nhint: {refused.hint}", file=sys.stderr)
        return refused.exit_code
    return 0


def read_request(path: str) -> dict:
    """The request.

    Raises:
        Refused: it cannot be read, or is none.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        request = json.loads(text)
    except OSError as error:
        raise Refused(f"cannot read `{path}`: {error.strerror}", "pass the path of a request", 2) from error
    except ValueError as error:
        raise Refused(f"`{path}` is not JSON: {error}", "pass the request that mergetune wrote", 2) from error
    if not isinstance(request, dict) or not all(isinstance(request.get(key), dict) for key in ("config", "train")):
        raise Refused(f"`{path}` is no request", "it needs `config` and `train`", 2)
    return request


def check_request(request: dict) -> None:
    """Refuse, before anything heavy is imported, what would be traced wrongly."""
    config, train = request["config"], request["train"]
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise Refused(f"`{kind}` cannot be traced; known: {', '.join(FAMILIES)}", "use the closed form")
    if train.get("script"):
        raise Refused(f"what `{train['script']}` allocates is not known", "use the closed form")
    sft = train.get("sft") or {}
    if found := next((key for key in UNTRACED if sft.get(key)), None):
        raise Refused(f"`train.sft.{found}` cannot be traced", "remove it, or use the closed form")
    if train["packing"] and not flash(sft):
        raise Refused("packed rows need a flash-attention kernel", "set `attn_implementation`, or remove `packing`")


def flash(sft: dict) -> bool:
    """Whether attention is computed by a flash-attention kernel of its own, which is given no mask."""
    said = str((sft.get("model_init_kwargs") or {}).get("attn_implementation", ""))
    return "flash" in said


def trace(request: dict, step: Any = None) -> dict:
    """The answer: what the peak is made of, and where in the step it is. `step` replaces the Step of today's libraries.

    Raises:
        Refused: the model cannot be built, or does something that no fake tensor can.
    """
    # Collecting fake tensors whose storages are watched crashes torch 2.13. Without it the trace is the same every
    # time, too: what hangs in a cycle of references stays allocated, as it may on a GPU.
    gc.disable()
    whole = full_config(request["config"])
    kinds = layer_kinds(whole.get_text_config())
    choices = [list(range(len(kinds)))] if request.get("full_depth") else traced_layers(kinds)
    runs = []
    with as_on_cuda():
        for layers in choices:
            try:
                runs.append((step or Step)(request, layers, kinds).run())
            except Refused:
                raise
            except Exception as error:  # of libraries that were not made for this: their words are the reason
                said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
                message = f"`{request['config']['model_type']}` cannot be traced with these settings: {said}"
                raise Refused(message, "use the closed form") from error
    phases = extrapolated(runs, choices, kinds)
    name, peak = max(phases.items(), key=lambda item: sum(item[1].values()))
    parts = {category: round(peak.get(category, 0) / GIB, 4) for category in CATEGORIES}
    return {
        "allocated_gib": round(sum(peak.values()) / GIB, 4),
        "parts": parts,
        "phase": name,
        "phases": {phase: round(sum(sizes.values()) / GIB, 4) for phase, sizes in phases.items()},
        "layers": len(kinds),
        "traced_layers": [len(layers) for layers in choices],
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl", "peft", "bitsandbytes")
        },
    }


# Layers: which are traced, and the line through them


def full_config(config: dict) -> Any:
    """The configuration object of the base, every default filled in."""
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        return AutoConfig.for_model(**given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refused(f"config.json cannot be read: {error}", "use the closed form") from error


def layer_kinds(text: Any) -> list[str]:
    """What distinguishes each layer: the values of every list that has one entry a layer."""
    count = text.num_hidden_layers
    columns = [value for value in text.to_dict().values() if isinstance(value, list) and len(value) == count > 1]
    return [" ".join([*(str(column[layer]) for column in columns), "layer"]) for layer in range(count)]


def traced_layers(kinds: list[str]) -> list[list[int]]:
    """Layers of each trace: the first and the last of each kind, then for each kind one more from its middle."""
    places = {kind: [layer for layer, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
    if any(len(own) < 3 for own in places.values()):
        return [list(range(len(kinds)))]
    base = sorted(layer for own in places.values() for layer in (own[0], own[-1]))
    return [base, *(sorted([*base, own[len(own) // 2]]) for own in places.values())]


def cut_config(config: dict, layers: list[int]) -> Any:
    """The configuration with these layers alone."""
    whole = full_config(config)
    text = whole.get_text_config()
    count = text.num_hidden_layers
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count > 1:
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return whole


def extrapolated(runs: list[dict], choices: list[list[int]], kinds: list[str]) -> dict:
    """Bytes by category at the peak of each phase, at full depth.

    The first run has some layers of each kind; each further one has one more of one kind, which is what every missing
    layer of that kind adds.
    """
    first, counts = runs[0], Counter(kinds)
    had = Counter(kinds[layer] for layer in choices[0])
    result = {phase: dict(sizes) for phase, sizes in first.items()}
    for run, layers in zip(runs[1:], choices[1:], strict=True):
        kind = kinds[next(iter(set(layers) - set(choices[0])))]
        for phase, sizes in result.items():
            for category in CATEGORIES:
                more = run[phase].get(category, 0) - first[phase].get(category, 0)
                sizes[category] = sizes.get(category, 0) + more * (counts[kind] - had[kind])
    return result


# One step of training


class Step:
    """A model of some layers, trained on one micro-batch under a ledger. `run` returns the peaks by phase."""

    dtype = "bfloat16"  # what train_sft.py loads
    adapter_dtype: str | None = "bfloat16"  # what TRL casts an adapter on a quantised base to

    def __init__(self, request: dict, layers: list[int], kinds: list[str]) -> None:
        self.train, self.gpus = request["train"], request.get("gpus", 1)
        self.sft, self.method = self.train.get("sft") or {}, self.train["method"]
        self.dpo = self.train["dpo"] if self.method == "dpo" else None
        self.quantised = self.dpo["quantize"] if self.dpo else self.method == "qlora"
        self.config, self.kinds = cut_config(request["config"], layers), [kinds[layer] for layer in layers]
        self.ledger = make_ledger()

    def run(self) -> dict:
        """Peaks by phase: `{phase: {category: bytes}}`."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        ledger = self.ledger
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            model = self.build()
            watch(model, self.kinds, ledger)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            held = self.first_step(model, parameters)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(ledger.keep_gradient)
            ledger.enter("forward of the embedding", "activations")
            loss = self.loss(model)
            ledger.enter("backward of the output head", "head")
            ledger.in_backward = True
            loss.backward()
            del held
        return ledger.peaks

    def build(self) -> Any:
        """The model as the trainer has it: quantised, with its adapter and TRL's fused output head."""
        import torch
        from peft import get_peft_model
        from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

        self.ledger.enter("load", "weights")
        implementation = (self.sft.get("model_init_kwargs") or {}).get("attn_implementation")
        model = base = load_base(self.config, self.dtype, FLASH if flash(self.sft) else implementation)
        if self.quantised:
            quantise(base, self.ledger)
        if self.method != "full":
            self.ledger.enter("load", "adapter")
            model = get_peft_model(base, lora_config(self.train["lora"], hasattr(self.config, "vision_config")))
            for name, parameter in model.named_parameters() if self.quantised and self.adapter_dtype else ():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(getattr(torch, self.adapter_dtype))
        if self.sft.get("gradient_checkpointing") is not False:
            base.gradient_checkpointing_enable()
            if self.method != "full":
                model.enable_input_require_grads()
        asked = ("log_probs", "entropy", "is_top1")  # by SFTTrainer; DPOTrainer has one more
        add_fused_lm_head(base, outputs=(*asked, "mean_logits") if self.dpo else asked)
        if self.dpo and self.sft.get("disable_dropout") is not False:
            disable_dropout_in_model(model)
        return model.train()

    def first_step(self, model: Any, parameters: list) -> list:
        """What the first step leaves behind: optimizer state and, while micro-batches add up, gradients."""
        import torch

        self.ledger.peaks.clear()  # loading goes tensor by tensor: its peak is not that of this building
        self.ledger.enter("optimizer step", "adapter")
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        buckets = [torch.empty_like(parameter) for parameter in parameters] if self.gpus > 1 else []
        self.ledger.enter("optimizer step", "optimizer")
        name = self.sft.get("optim", "adamw_8bit" if self.quantised else "adamw_torch_fused")
        optimizer = step_optimizer(name, self.sft, model, parameters, self.ledger)
        if self.train["gradient_accumulation"] == 1:
            optimizer.zero_grad(set_to_none=True)
        return [optimizer, buckets]

    def loss(self, model: Any) -> Any:
        """The loss of one micro-batch, as TRL's trainers compute it under the Trainer's `bf16: true`."""
        import torch
        from accelerate.utils import convert_outputs_to_fp32

        rows, length = self.train["batch_size"] * (2 if self.dpo else 1), self.train["max_length"]
        flat = self.train["packing"] or flash(self.sft)  # packed, or laid end to end without padding
        shape = (1, rows * length) if flat else (rows, length)
        ids = torch.zeros(shape, dtype=torch.int64)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if rows > 1 and not flat:  # rows of different lengths
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.__call__))
        if self.dpo:
            return self.preference(model, lambda: forward(**inputs, labels=ids, fused_lm_head=True).log_probs)
        if smoothing := self.sft.get("label_smoothing_factor"):
            from transformers.trainer_pt_utils import LabelSmoother

            loss = LabelSmoother(epsilon=smoothing)(forward(**inputs), ids, shift_labels=True)
            with torch.no_grad():
                forward(**inputs, labels=ids, fused_lm_head=True)
            return loss
        return -forward(**inputs, labels=ids, fused_lm_head=True).log_probs.sum() / ids.numel()

    def preference(self, model: Any, log_probs: Callable[[], Any]) -> Any:
        """DPOTrainer's sigmoid loss: the policy's forward pass is kept while the base alone is asked, adapter off."""
        import torch
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        policy = log_probs()
        self.ledger.passing = "reference: "
        with torch.no_grad(), disable_gradient_checkpointing(model), use_adapter(model, None):
            reference = log_probs()
        self.ledger.passing = ""
        chosen, rejected = (policy.sum(dim=1) - reference.sum(dim=1)).chunk(2)
        return -torch.nn.functional.logsigmoid(self.dpo["beta"] * (chosen - rejected)).mean()


def load_base(config: Any, dtype: str, attention: str | None) -> Any:
    """The model class that the config names, its weights without values."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    chosen = {"attn_implementation": attention} if attention else {}
    with no_init_weights():
        model = architecture._from_config(config, dtype=getattr(torch, dtype), **chosen)
    model.tie_weights()
    return model


def quantise(model: Any, ledger: Any) -> None:
    """The linear layers that transformers hands to bitsandbytes, as NF4 with double quantisation."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    biases = {name: getattr(module, "bias", None) for name, module in model.named_modules()}
    kept = get_keys_to_not_convert(model)
    with ledger.paused(), unset_fake_temporarily():
        replace_with_bnb_linear(model, kept, nf4)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            fill_shell(module, biases[name])
    model.is_loaded_in_4bit = True


def fill_shell(module: Any, bias: Any) -> None:
    """Give a Linear4bit its packed weight and quantisation state; its own parameter class cannot hold fake tensors."""
    import torch
    from bitsandbytes.functional import QuantState

    shape, count = (module.out_features, module.in_features), module.out_features * module.in_features
    blocks = math.ceil(count / 64)
    absmax = QuantState(torch.empty(math.ceil(blocks / 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size(shape),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=absmax,
    )
    weight = torch.nn.Parameter(torch.empty((math.ceil(count / 2), 1), dtype=torch.uint8), requires_grad=False)
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", True
    weight.blocksize, weight.quant_storage, weight.bnb_quantized = 64, torch.uint8, True
    module.weight, module.bias, module.quant_state = weight, bias, state


def lora_config(lora: dict, has_vision: bool) -> Any:
    """PEFT's names for the LoRA choices of the experiment; as in train_sft.py."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        exclude_modules=lora["exclude"] or (NOT_TEXT if has_vision else None),
        use_rslora=lora["rslora"],
        use_dora=lora["dora"],
        modules_to_save=lora["modules_to_save"] or None,
        rank_pattern=lora["rank_pattern"],
        alpha_pattern=lora["alpha_pattern"],
    )


def step_optimizer(name: str, sft: dict, model: Any, parameters: list, ledger: Any) -> Any:
    """The Trainer's optimizer of that name after one step: its state is there. bitsandbytes' kernels are left out."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager
    from bitsandbytes.optim.optimizer import Optimizer8bit
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir="trace", optim=name, optim_args=sft.get("optim_args"), use_cpu=True)
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if options.keys() & {"params", "model", "optimizer_dict"} or not isinstance(made, type):
        raise Refused(f"`train.sft.optim: {name}` cannot be traced", "use another optimizer, or the closed form")
    with ledger.paused(), unset_fake_temporarily():  # bitsandbytes computes its tables of 256 numbers
        optimizer = made(parameters, **options)
    if not isinstance(optimizer, Optimizer8bit):
        optimizer.step()
        return optimizer
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # the Trainer keeps the state of embeddings in 32 bits
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer.check_overrides()
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            in_host_memory = optimizer.is_paged and parameter.numel() >= PAGED_FROM
            with ledger.paused() if in_host_memory else ExitStack():
                optimizer.init_state(group, parameter, number, index)
    return optimizer


# The ledger: every storage, when it comes and when it goes


def make_ledger() -> Any:
    """A Ledger that sees every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return type("Ledger", (Ledger, TorchDispatchMode), {})()


class Ledger:
    """A TorchDispatchMode that books every storage under the category of the moment, and keeps the peak by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()
        self.live: dict[int, tuple[int, str]] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase = self.category = ""
        self.passing = ""  # words before each phase of a pass of its own
        self.total = self.highest = 0
        self.counts = True
        self.in_backward = False

    def enter(self, phase: str, category: str) -> None:
        """What happens from now on belongs to this phase, what is allocated to this category."""
        self.phase, self.category = self.passing + phase, category
        self.highest = sum(self.peaks.get(self.phase, {}).values())
        self.look()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is allocated meanwhile is not on the GPU."""
        self.counts, before = False, self.counts
        yield
        self.counts = before

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        import torch

        stand_in = ON_CUDA.get(str(function))
        result = stand_in(self, *args, **kwargs or {}) if stand_in else NotImplemented
        if result is NotImplemented:
            result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.book(result)
        elif isinstance(result, list | tuple):
            for one in result:
                if isinstance(one, torch.Tensor):
                    self.book(one)
        return result

    def book(self, tensor: Any) -> None:
        """Count a storage that was not seen before, until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or not self.counts:
            return
        size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
        self.live[key] = (size, self.category)
        self.sizes[self.category] += size
        self.total += size
        weakref.finalize(storage, self.free, key).atexit = False
        self.look()

    def free(self, key: int) -> None:
        """A storage is gone."""
        size, category = self.live.pop(key)
        self.sizes[category] -= size
        self.total -= size

    def pass_by(self, size: int) -> None:
        """Bytes that a CUDA kernel allocates and frees within one operation."""
        self.sizes[self.category] += size
        self.total += size
        self.look()
        self.sizes[self.category] -= size
        self.total -= size

    def look(self) -> None:
        """Keep the highest state of the phase."""
        if self.total > self.highest or self.phase not in self.peaks:
            self.highest = self.total
            self.peaks[self.phase] = dict(self.sizes)

    def keep_gradient(self, parameter: Any) -> None:
        """A gradient that stays belongs to what is trained, wherever it was computed."""
        key = parameter.grad.untyped_storage()._cdata
        size, category = self.live[key]
        self.live[key] = (size, "adapter")
        self.sizes[category] -= size
        self.sizes["adapter"] += size


def watch(model: Any, kinds: list[str], ledger: Any) -> None:
    """Tell the ledger where the step is: hooks around each layer, and on the gradients that pass between them.

    Checkpointing computes a layer's `forward` again in the backward pass, without its hooks.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.get_decoder().layers
    for number, layer in enumerate(layers):
        kind = kinds[number]
        same = [place for place, own in enumerate(kinds) if own == kind]
        end = "last" if number == same[-1] else "first" if number == same[0] else "a middle"
        layer.register_forward_pre_hook(functools.partial(before_layer, ledger, kind, number == 0))
        layer.register_forward_hook(functools.partial(after_layer, ledger, f"{end} {kind}", number == len(kinds) - 1))


def before_layer(ledger: Any, kind: str, is_first: bool, layer: Any, args: tuple) -> None:
    ledger.enter(f"forward of a {kind}", "activations")
    if is_first and args[0].requires_grad:
        args[0].register_hook(lambda gradient: ledger.enter("backward of the embedding", "scratch"))


def after_layer(ledger: Any, place: str, is_last: bool, layer: Any, args: tuple, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:  # not in the second pass of label smoothing
        hidden.register_hook(lambda gradient: ledger.enter(f"backward of the {place}", "scratch"))
    if is_last:
        ledger.enter("forward of the output head", "head")


# As on CUDA: what the device does otherwise than the CPU


FLASH = "traced"  # our name for a flash-attention kernel of its own: transformers makes no mask for it


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Kernels that a CUDA device would use in the place of the CPU's. Private names: the versions are pinned."""
    import torch
    from peft.tuners.lora import dora
    from transformers import AttentionInterface, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    AttentionInterface.register(FLASH, sdpa_attention_forward)
    enabled = torch.is_autocast_enabled
    changes: list[tuple[Any, str, Any]] = [
        (torch.nn.functional, "scaled_dot_product_attention", cuda_attention()),
        (torch.nn.functional, "dropout", cuda_dropout),
        # PEFT asks whether the GPU computes under autocast.
        (torch, "is_autocast_enabled", lambda device="cpu": enabled(device)),
        # A module of fake parameters cannot be moved, and there is nowhere to move it to.
        (torch.nn.Module, "to", lambda module, *args, **kwargs: module),
        # One row is one text: on real values this says so, on fake ones it builds a mask to be safe.
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        # TRL's Triton kernels work in place on a tile of logits; its stand-ins for the CPU copy that tile.
        (chunked_logprob, "_forward_tile", lambda *args, **kwargs: None),
        (chunked_logprob, "_backward_tile", lambda *args, **kwargs: None),
        (chunked_logprob, "_addmm_fp32", lambda *args: None),
        (utils, "_use_triton", lambda device: True),
        (dora, "dequantize_module_weight", dequantized),
        # It takes a norm of a copy, for FSDP's sake. A copied fake tensor crashes torch when it goes.
        (dora, "deepcopy", lambda layer: layer),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def dequantized(module: Any) -> Any:
    """What DoRA takes the norm of. PEFT knows a 4-bit weight by a class that our shells do not have."""
    from bitsandbytes.functional import dequantize_4bit

    weight = module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight
    state = getattr(weight, "quant_state", None)
    return weight if state is None else dequantize_4bit(weight, state)


def cuda_dropout(tensor: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """CUDA keeps a mask of booleans; the CPU keeps the noise."""
    import torch

    return torch.native_dropout(tensor, p, True)[0] if training and p else tensor


def cuda_attention() -> Callable[..., Any]:
    """Scaled dot product attention by the flash kernel, or under a mask by the memory-efficient one.

    Both keep queries, keys and values, the output and one fp32 number a row and head. The flash kernel shares
    key/value heads and keeps them once; its backward pass adds up their gradients from one for each query head. Both
    add up the gradient of the queries in fp32.
    """
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
            batch, heads, rows, _ = query.shape
            output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
            sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
            ctx.save_for_backward(query, key, value, mask, output, sums)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            query, key, value, *_ = ctx.saved_tensors
            added = torch.empty_like(query, dtype=torch.float32)
            wide = [one.new_empty(*query.shape[:3], one.shape[-1]) for one in (key, value)]
            shared = key.shape[1] != query.shape[1]
            narrow = [torch.empty_like(one) for one in (key, value)] if shared else wide
            result = torch.empty_like(query)
            del added
            return result, *narrow, None

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
    ) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.empty((), dtype=query.dtype))  # torch adds it to the scores
        return Attention.apply(query, key, value, attn_mask)

    return attention


def cuda_gemm_4bit(ledger: Any, rows: Any, packed: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    """Many rows: bitsandbytes writes the scales and the whole weight out, then multiplies."""
    count = shape[0] * shape[1]
    if rows.numel() // rows.shape[-1] > FUSED_ROWS:
        ledger.pass_by(count * rows.element_size() + count // 64 * 4)
    return NotImplemented


def cuda_index(ledger: Any, tensor: Any, indices: list) -> Any:
    """All positions that a mask selects: every one, as rows are full of trained tokens."""
    import torch

    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool:
        return NotImplemented
    ledger.pass_by(8 * mask.dim() * mask.numel())  # their places, as int64
    return tensor.new_empty(mask.numel(), *tensor.shape[mask.dim() :])


def cuda_index_put(ledger: Any, tensor: Any, indices: list, values: Any, *args: Any, **kwargs: Any) -> Any:
    """The way back."""
    import torch

    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool:
        return NotImplemented
    ledger.pass_by(8 * (mask.dim() + 3) * mask.numel())  # their places, sorted
    return tensor


def engine_add(ledger: Any, left: Any, right: Any, **kwargs: Any) -> Any:
    """Autograd adds a gradient into an earlier one that nobody else holds; under a dispatch mode it makes a third."""
    import torch

    if not ledger.in_backward or torch.is_grad_enabled() or not isinstance(right, torch.Tensor) or kwargs:
        return NotImplemented
    for into, other in ((left, right), (right, left)):
        storage = into.untyped_storage()
        alone = into._use_count() == ALONE and torch._C._storage_Use_Count(storage._cdata) == 2
        dense = storage.nbytes() == into.numel() * into.element_size()
        if alone and dense and (into.shape, into.dtype) == (other.shape, other.dtype):
            return into.add_(other)
    return NotImplemented


def cuda_masked_scatter_backward(ledger: Any, gradient: Any, mask: Any, sizes: Any) -> Any:
    """The gradient of every selected place."""
    return gradient.new_empty(sizes)


ON_CUDA: dict[str, Callable[..., Any]] = {
    "bitsandbytes.gemm_4bit.default": cuda_gemm_4bit,
    "aten.add.Tensor": engine_add,
    "aten.index.Tensor": cuda_index,
    "aten._index_put_impl_.default": cuda_index_put,
    "aten.masked_scatter_backward.default": cuda_masked_scatter_backward,
}


if __name__ == "__main__":
    raise SystemExit(main())
