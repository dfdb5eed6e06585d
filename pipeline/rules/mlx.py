"""Rules about `backend: mlx`: what a Mac needs, what MLX has no word for, and which two bases belong together."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.apple import CHIPS, MACS, MEMORY_GB, WIRED
from pipeline.errors import Severity, excerpt
from pipeline.experiment import Backend, Method, nearest
from pipeline.fields import rows_at_once
from pipeline.mac import bits_by_name, estimate_mac_memory, learning_layers, mlx_bits, smallest_mac
from pipeline.mlx_models import MLX, MLX_LM, MODEL_TYPES
from pipeline.models import shape_of
from pipeline.plan import MLX_SCRIPT, mlx_base
from pipeline.rules.rule import Subject, Verdict
from pipeline.train_sections import Lora

INSTALL = f'`pip install "mlx=={MLX}" "mlx-lm=={MLX_LM}"` on a Mac, `"mlx[cpu]=={MLX}"` on Linux'
# What scripts/train_mlx.py honours of `train.sft` (its SFT; a test compares).
SFT: tuple[str, ...] = (
    *("optim", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing"),
)
# What a repository's name has besides the base's, as in `gemma-3-12b-it-8bit` or `Qwen3-8B-MLX-4bit-DWQ`.
_FORMS = r"mlx|q?[2-8][-_]?bit|q[2-8]|bf16|fp16|mxfp[48]|nvfp4|dwq|awq|qat|g\d+"
_FORM = re.compile(rf"[-_.](?:{_FORMS})(?![a-z0-9])", re.IGNORECASE)


def mlx_is_here(subject: Subject) -> Verdict | None:
    """The machine that is to train has MLX

    Why: MLX trains on Macs with Apple Silicon, and slowly on the CPU of a Linux PC; it is not installed with the rest.
    Fix: Install it for the Python that runs `mergetune`, or take another backend.
    """
    here = subject.facts.mlx_here
    if here is None or subject.file.experiment.train.backend is not Backend.MLX:
        return None
    lacks = [name for name, version in (("mlx", here.mlx), ("mlx-lm", here.mlx_lm)) if version is None]
    if not lacks:
        return None
    message = f"`{'` and `'.join(lacks)}` cannot be found for this Python"
    return Verdict("train.backend", message, f"install it: {INSTALL}")


def flavor_is_a_chip(subject: Subject) -> Verdict | None:
    """With `backend: mlx`, `train.flavor` is a chip of Apple's

    Why: MLX does not train on the GPUs of Hugging Face; who reads `a10g-large` expects a job, and a bill.
    Fix: Remove `flavor`, or name the chip of your Mac: then the plan says how long it takes.
    """
    train = subject.file.experiment.train
    if train.backend is not Backend.MLX or train.flavor in MACS:
        return None
    near = nearest(train.flavor.lower().replace(" ", "-"), CHIPS) or "m3-max"
    message = f"`backend: mlx` trains on a Mac, and `{excerpt(train.flavor)}` is no chip of Apple's"
    return Verdict("train.flavor", message, f"remove `flavor`, or name your chip: `flavor: {near}`")


def timeout_is_left_out(subject: Subject) -> Verdict | None:
    """With `backend: mlx` there is no `train.timeout`

    Why: A timeout bounds what a job may cost. Nothing stops a training on your own machine, whatever the file says.
    Fix: Remove it; Ctrl-C stops the training, and running it again goes on from its checkpoint.
    """
    train = subject.file.experiment.train
    if train.backend is not Backend.MLX or train.timeout is None:
        return None
    return Verdict("train.timeout", "`timeout` bounds a job; nothing stops a training with MLX", "remove `timeout`")


def mlx_has_a_word(subject: Subject) -> Verdict | None:
    """Every training field is one that MLX can honour

    Why: mlx-lm passes over keys it does not know, and the result is then another one than the file says.
    Fix: Remove the field, or train with torch.
    """
    if subject.file.experiment.train.backend is not Backend.MLX:
        return None
    for field, value, hint in _without_a_word(subject):
        shown = value.value if isinstance(value, Method) else str(value).lower() if isinstance(value, bool) else value
        message = f"`{field}: {excerpt(shown)}` cannot be honoured by MLX"
        return Verdict(f"train.{field}", message, f"{hint}, or train with torch: `backend: torch`")
    return None


def quantised_as_said(subject: Subject) -> Verdict | None:
    """`method: qlora` has a quantised MLX base, and `method: lora` has none

    Why: MLX does not quantise while it loads: a 4-bit or 8-bit base is a repository of its own.
    Fix: Name it as `train.mlx.base`, such as one of mlx-community, or write the method that the base is for.
    """
    experiment = subject.file.experiment
    train, bits = experiment.train, mlx_bits(experiment, subject.facts.mlx_config)
    if train.backend is not Backend.MLX or bits is None or train.method is Method.FULL:
        return None
    shown = excerpt(mlx_base(experiment) or experiment.base.model)
    if train.method is Method.QLORA and bits >= 16:
        name = experiment.base.model.rstrip("/").split("/")[-1]
        hint = f"write `mlx: {{base: mlx-community/{name}-4bit}}` under `train`, or `method: lora`"
        return Verdict("train.method", f"`method: qlora`, and `{shown}` is not quantised", hint)
    if train.method is Method.LORA and bits < 16:
        message = f"`method: lora`, and `{shown}` is quantised to {bits} bits"
        hint = "write `method: qlora`, or a base that is not quantised"
        return Verdict("train.method", message, hint, Severity.WARNING)
    return None


def base_can_be_merged_into(subject: Subject) -> Verdict | None:
    """`base.model` is the Hugging Face base, not an MLX form of it

    Why: The merge writes the adapter into 16-bit weights of Hugging Face's layout; quantised ones have no room for it,
    and torch cannot load MLX's.
    Fix: Name the original as `base.model`, and the quantised one as `train.mlx.base`.
    """
    experiment, config = subject.file.experiment, subject.facts.config or {}
    model = experiment.base.model
    by_name = model.lower().startswith("mlx-community/") and (bits_by_name(model) or 16) < 16
    if "quantization" not in config and not by_name:
        return None
    original = _FORM.sub("", model.split("/")[-1])
    message = f"`{excerpt(model)}` is quantised by MLX: nothing can be merged into it"
    hint = f"write the original, `…/{excerpt(original)}`, as `base.model`, and `{excerpt(model)}` as `train.mlx.base`"
    return Verdict("base.model", message, f"{hint} with `backend: mlx`")


def bases_are_one_model(subject: Subject) -> Verdict | None:
    """`train.mlx.base` is a form of `base.model`

    Why: An adapter is the difference to one set of weights. Merged into another model it is noise.
    Fix: The MLX form of the same base; its name says which, and the training compares configuration and tokens.
    """
    experiment, other = subject.file.experiment, mlx_base(subject.file.experiment)
    if other is None:
        return None
    ours, theirs = subject.facts.shape, shape_of(subject.facts.mlx_config or {})
    for what in ("layers", "hidden", "vocab", "intermediate", "query", "key_value"):
        if ours and theirs and getattr(ours, what) != getattr(theirs, what):
            message = f"`{excerpt(other)}` has {what.replace('_', '/')} {getattr(theirs, what)}, "
            message += f"`{excerpt(experiment.base.model)}` has {getattr(ours, what)}"
            return Verdict("train.mlx.base", message, "name the MLX form of the same base")
    names = [_FORM.sub("", name.rstrip("/").split("/")[-1]).lower() for name in (other, experiment.base.model)]
    if theirs or names[0] == names[1]:
        return None
    message = f"`{excerpt(other)}` does not look like a form of `{excerpt(experiment.base.model)}`"
    return Verdict("train.mlx.base", message, "check that the merge is into the same model", Severity.WARNING)


def mlx_knows_base(subject: Subject) -> Verdict | None:
    """The pinned mlx-lm has the base's architecture

    Why: An unknown one is refused when the base is loaded, after the download.
    Fix: Another base, or torch.
    """
    config, train = subject.facts.config, subject.file.experiment.train
    if train.backend is not Backend.MLX or config is None or config.get("model_type") in MODEL_TYPES:
        return None
    kind = str(config.get("model_type"))
    near = nearest(kind, MODEL_TYPES)
    hint = "remove `backend: mlx`" + (f"; it knows the similar `{near}`" if near else "")
    return Verdict("base.model", f"mlx-lm {MLX_LM} has no module for `model_type: {excerpt(kind)}`", hint)


def layers_are_there(subject: Subject) -> Verdict | None:
    """`train.mlx.num_layers` is at most what the base has

    Why: MLX refuses more, after loading the base.
    Fix: Fewer, or none: then every layer learns.
    """
    mlx, shape = subject.file.experiment.train.mlx, subject.facts.shape
    if mlx is None or mlx.num_layers is None or shape is None or mlx.num_layers <= shape.layers:
        return None
    message = f"`num_layers: {mlx.num_layers}`, and the base has {shape.layers} layers"
    return Verdict("train.mlx.num_layers", message, f"write at most {shape.layers}, or remove it: all learn then")


def training_fits_a_mac(subject: Subject) -> Verdict | None:
    """Some common Mac has the memory for the training

    Why: macOS swaps, and a training that swaps does not end.
    Fix: A quantised base, a smaller `max_length` or `batch_size`, or fewer layers that learn.
    """
    experiment, shape = subject.file.experiment, subject.facts.shape
    bits = mlx_bits(experiment, subject.facts.mlx_config)
    if experiment.train.backend is not Backend.MLX or shape is None or bits is None:
        return None
    memory = estimate_mac_memory(experiment, shape, bits)
    if smallest_mac(memory, surely=False) is not None:
        return None
    ways = ["`batch_size: 1`"] if rows_at_once(experiment.train.batch_size) > 1 else []
    ways += [f"`max_length: {experiment.train.max_length // 2}`"] if experiment.train.max_length > 256 else []
    ways += ["a base of 4 bits as `train.mlx.base`"] if bits > 4 else []
    learning = learning_layers(experiment, shape)
    ways += [f"`num_layers: {learning // 2}` under `train.mlx`"] if learning > 1 else []
    most = MEMORY_GB[-1]
    message = f"about {memory.total:.0f} GiB are needed, and a Mac with {most} GB gives its GPU {WIRED * most:.0f}"
    return Verdict("train", message, "try " + " or ".join(ways), Severity.WARNING)


def _without_a_word(subject: Subject) -> Iterator[tuple[str, Any, str]]:
    """Field, value and hint of what scripts/train_mlx.py refuses, in its order."""
    train = subject.file.experiment.train
    lora = train.lora or Lora()
    custom = train.script is not None and train.script != MLX_SCRIPT
    refused: tuple[tuple[str, Any, bool, str], ...] = (
        ("method", train.method, train.method in (Method.FULL, Method.DPO), "write `method: lora`"),
        ("packing", train.packing, train.packing, "remove `packing`"),
        ("tracking", train.tracking.value, train.tracking.value != "none", "remove `tracking`"),
        ("script", train.script, custom, "remove `script`"),
        ("lora.exclude", lora.exclude, lora.exclude is not None, "name what to train in `lora.targets`"),
        ("lora.modules_to_save", lora.modules_to_save, bool(lora.modules_to_save), "remove `modules_to_save`"),
        ("lora.rank_pattern", lora.rank_pattern, bool(lora.rank_pattern), f"write one `r: {lora.r}`"),
        ("lora.alpha_pattern", lora.alpha_pattern, bool(lora.alpha_pattern), f"write one `alpha: {lora.alpha:g}`"),
        *((f"sft.{key}", value, key not in SFT, _sft_hint(key)) for key, value in train.sft.items()),
    )
    yield from ((field, value, hint) for field, value, is_refused, hint in refused if is_refused)


def _sft_hint(key: str) -> str:
    near = nearest(key, SFT)
    return f"write `{near}`" if near else f"remove `{excerpt(key)}` (MLX knows {', '.join(SFT)})"
