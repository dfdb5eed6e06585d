"""Rules about training settings against the base's architecture: its layers, attention, experts and vision tower."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.attention import FLASH, attention_of, said_attention
from pipeline.errors import Severity, excerpt
from pipeline.experiment import nearest
from pipeline.fields import is_path
from pipeline.flavors import FLAVORS
from pipeline.rules.loss import answers_can_be_found
from pipeline.rules.rule import Subject, Verdict
from pipeline.rules.script_text import packages_of
from pipeline.train_sections import Lora

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
# Linear layers of the text decoder by `model_type`: `nn.Linear` in models/*/modeling_*.py of transformers 5.23.0 (a
# test looks there). An architecture that is not here is not judged.
PLAIN_DECODERS = (
    *("llama", "mistral", "mistral3", "ministral3", "qwen2", "qwen3", "qwen3_moe", "qwen3_vl", "smollm3"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "granite", "olmo2", "olmo3"),
)
PER_LAYER = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PLAIN_DECODERS, ATTENTION + MLP),
    **dict.fromkeys(("gemma4", "gemma4_text"), ATTENTION + MLP + PER_LAYER),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), ATTENTION + MLP + LINEAR_ATTENTION),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
}
EMBEDDINGS = ("embed_tokens", "lm_head")
# Names a vision tower goes by in the module path, and linear layers it shares with the text decoder.
TOWERS = ("vision", "visual", "image", "audio")
# Where transformers 5.23.0 has no scaled-dot-product attention, for its soft-capped scores.
NO_SDPA = ("gemma2",)
# Recurrent layers, and families that are made of them without a list of `layer_types`.
STATEFUL_LAYERS = ("linear_attention", "conv", "mamba", "recurrent")
STATEFUL: tuple[str, ...] = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "mamba",
    "nemotron_h",
    "recurrent_gemma",
)
STATEFUL += ("rwkv", "zamba")


def base_has_a_config(subject: Subject) -> Verdict | None:
    """The base's config.json describes a model

    Why: Nothing can load the base without it: training ends in its first minute, paid for.
    Fix: Copy the file from where the base comes from.
    """
    if not subject.facts.config_fault:
        return None
    base = subject.file.experiment.base.model
    hint = f"copy the `config.json` of the original base into `{base}`"
    if not is_path(base):
        hint = f"write another base than `{base}`, or a `revision` that has one"
    return Verdict("base.model", f"`config.json` of `{base}` {subject.facts.config_fault}", hint)


def base_can_read_text(subject: Subject) -> Verdict | None:
    """The base's tokenizer and chat template can be used

    Why: Training loads the same files and stops there. A template is also bounded in what it may do: one that loops
    without end would hold up every check, and every job.
    Fix: Copy the files from where the base comes from.
    """
    data = subject.facts.dataset
    if data is None or not data.base_fault or answers_can_be_found(subject):
        return None
    base = subject.file.experiment.base.model
    hint = f"copy the tokenizer's files of the original base into `{base}`"
    if not is_path(base):
        hint = f"write another base than `{base}`, or a `revision` whose files can be read"
    return Verdict("base.model", f"`{base}` cannot be used: {excerpt(data.base_fault)}", hint)


def targets_are_layers(subject: Subject) -> Verdict | None:
    """Every LoRA target is a layer of the base

    Why: When none matches, PEFT raises after the download; when one does not, it is skipped without a word.
    Fix: The names of this architecture, or `all-linear`.
    """
    lora, kind = subject.file.experiment.train.lora, _model_type(subject)
    known = LAYERS.get(kind or "")
    if lora is None or known is None or isinstance(lora.targets, str):
        return None
    for target in lora.targets:
        last = target.split(".")[-1]
        if last not in known and last not in EMBEDDINGS:
            near = nearest(last, known)
            word = f"write `{near}` instead of `{target}`" if near else f"write `targets: [{', '.join(known)}]`"
            return Verdict(
                "train.lora.targets", f"`{target}` is no layer of `{kind}`", f"{word}, or `targets: all-linear`"
            )
    return None


def head_is_no_target(subject: Subject) -> Verdict | None:
    """`lm_head` is no LoRA target

    Why: The pinned TRL multiplies with the head's weight itself: an adapter there would never train, and it refuses.
    Fix: Remove it; `modules_to_save: [lm_head]` trains the head whole.
    """
    lora = subject.file.experiment.train.lora
    if lora is None or isinstance(lora.targets, str):
        return None
    wrong = next((target for target in lora.targets if target.split(".")[-1] == "lm_head"), None)
    if wrong is None:
        return None
    rest = [target for target in lora.targets if target != wrong]
    return Verdict("train.lora.targets", f"TRL cannot train an adapter on `{wrong}`", f"write `targets: {_list(rest)}`")


def tower_left_out(subject: Subject) -> Verdict | None:
    """LoRA stays out of the vision tower

    Why: Text never passes it: its adapter costs memory and never sees a gradient (12 % of the adapter of Gemma 3 12B).
    Fix: Remove `exclude`: the training script then leaves vision out; or name the tower in it.
    """
    train = subject.file.experiment.train
    if train.lora is None or train.script is not None or train.lora.exclude is None:
        return None
    exclude = train.lora.exclude
    try:
        re.compile(exclude)
    except (re.error, RecursionError, OverflowError) as error:
        message = f"`exclude: {exclude[:60]}` is not a regular expression: {error}"
        return Verdict("train.lora.exclude", message, r"write `exclude: .*vision.*`, or remove `exclude`")
    if "vision_config" not in (subject.facts.config or {}) or any(word in exclude for word in TOWERS):
        return None
    if _targets_only_text(train.lora):
        return None
    message = f"`exclude: {exclude[:60]}` replaces the one that leaves the vision tower out"
    hint = f"write `exclude: {exclude[:60]}|.*(vision|visual).*`, or remove `exclude`"
    return Verdict("train.lora.exclude", message, hint, Severity.WARNING)


def packing_needs_flash(subject: Subject) -> Verdict | None:
    """Packed rows on a GPU have a flash-attention kernel

    Why: Packing lays rows end to end. A flash kernel is told where each row begins; without one a mask keeps them
    apart, as large as the square of `max_length`, and most of what it computes is thrown away.
    Fix: `packing: false`, or a flavor with an Ampere GPU or a later one, for which the script brings the kernel.
    """
    train, shape = subject.file.experiment.train, subject.facts.shape
    flavor = FLAVORS.get(train.flavor)
    if not train.packing or flavor is None or flavor.gpu is None or shape is None:
        return None
    attention = attention_of(train, shape, flavor)
    if "flash" in attention:
        return None
    message = f"`packing: true` without a flash-attention kernel: `{attention}` on `{flavor.name}` needs a mask"
    other = said_attention(train) and attention_of(train.model_copy(update={"sft": {}}), shape, flavor) == FLASH
    hint = "remove `attn_implementation`: the script brings the kernel" if other else "write `packing: false`"
    return Verdict("train.packing", message, hint, Severity.WARNING)


def rows_stay_apart(subject: Subject) -> Verdict | None:
    """No row reads its neighbour in a pack

    Why: `wrapped` fills packs without saying where a row begins, so that every row attends to the one before it; and
    a state that is carried from token to token, as in Mamba or linear attention, is carried over every boundary.
    Fix: Remove `packing_strategy`, or `packing: false`. The script also tries it on the loaded model before it trains.
    """
    train, config = subject.file.experiment.train, subject.facts.config or {}
    if not train.packing:
        return None
    if train.sft.get("packing_strategy") == "wrapped":
        message = "`packing_strategy: wrapped` lets packed rows read the rows before them"
        return Verdict("train.sft.packing_strategy", message, "remove `packing_strategy`: `bfd` keeps them apart")
    kind = _model_type(subject) or ""
    if not kind.startswith(STATEFUL) and not _stateful_layers(config):
        return None
    message = f"layers of `{kind}` carry a state from each packed row into the next"
    return Verdict("train.packing", message, "write `packing: false`")


def attention_can_load(subject: Subject) -> Verdict | None:
    """The attention asked for can be loaded

    Why: transformers fetches flash attention through the `kernels` package, and refuses `sdpa` where the base has none:
    both after the download. Our own script brings `kernels` for the flash kernel of `kernels-community` alone.
    Fix: Remove `attn_implementation`, or add `kernels` to the script's header.
    """
    asked, kind = said_attention(subject.file.experiment.train), _model_type(subject)
    at = "train.sft.model_init_kwargs.attn_implementation"
    if asked == "sdpa" and kind in NO_SDPA:
        return Verdict(at, f"`{kind}` has no `sdpa` attention", "write `attn_implementation: eager`")
    packages = _packages(subject)
    brought = asked == FLASH and subject.file.experiment.train.script is None
    if packages and ("flash" in asked or "/" in asked) and not brought and not packages & {"kernels", "flash-attn"}:
        message = f"`attn_implementation: {asked[:60]}` needs `kernels`, which `{_script(subject)}` does not install"
        hint = f"remove `attn_implementation`, or add `kernels==0.18.2` to the header of `{_script(subject)}`"
        return Verdict(at, message, hint)
    return None


def experts_stay_large(subject: Subject) -> Verdict | None:
    """QLoRA of a mixture of experts is known to stay large

    Why: The experts are one parameter for all of them, and 4-bit loading reaches only linear layers: most of the
    weights stay in bf16.
    Fix: `method: lora` says the same honestly, on a flavor with the memory; or a dense base.
    """
    experiment = subject.file.experiment
    shape, config = subject.facts.shape, subject.facts.config or {}
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    experts = (shape.experts if shape else 0) or text.get("num_local_experts") or text.get("num_experts")
    if not experiment.train.quantised or not isinstance(experts, int) or experts < 1:
        return None
    said, plain = ("method: qlora", "method: lora")
    if experiment.train.is_dpo:
        said, plain = "dpo: {quantize: true}", "dpo: {quantize: false}"
    message = f"`{said}` leaves the {experts} experts of `{experiment.base.model}` in bf16"
    return Verdict("train.method", message, f"write `{plain}`, or choose a dense base", Severity.WARNING)


def _model_type(subject: Subject) -> str | None:
    config, shape = subject.facts.config, subject.facts.shape
    if config is not None:
        return str(config.get("model_type"))
    return shape.model_type if shape else None


def _stateful_layers(config: Mapping[str, Any]) -> bool:
    """Whether a config lists layers that are no attention over the tokens themselves."""
    text = config.get("text_config")
    kinds = (text if isinstance(text, Mapping) else config).get("layer_types")
    return isinstance(kinds, list) and any(kind in STATEFUL_LAYERS for kind in kinds)


def _script(subject: Subject) -> str:
    return subject.file.experiment.train.script or "scripts/train_sft.py"


def _packages(subject: Subject) -> set[str]:
    """What the training script installs; empty when its text was not looked up."""
    return packages_of(subject.facts.scripts.get(_script(subject), ""))


def _targets_only_text(lora: Lora) -> bool:
    """Targets that name the text decoder, such as `language_model.layers.0.self_attn.q_proj`."""
    return not isinstance(lora.targets, str) and all("language_model" in target for target in lora.targets)


def _list(names: list[str]) -> str:
    return f"[{', '.join(names)}]" if names else "all-linear"
