"""Rules about training settings: `train.sft` against the pinned TRL, and numbers that rarely work. Not about LoRA."""

from typing import Any

from pipeline.errors import Severity, excerpt
from pipeline.experiment import OWNED_BY_TRAIN, Backend, Method, nearest
from pipeline.fields import rows_at_once
from pipeline.rules.rule import Subject, Verdict
from pipeline.train_sections import OWNED_BY_DPO

# What scripts/train_sft.py decides (its FIELD_OF and OWNED; a test compares), less what another rule explains.
_OWNED = """
output_dir run_name project use_cpu bf16 fp16 trust_remote_code remove_unused_columns label_names ignore_data_skip
train_sampling_strategy push_to_hub hub_strategy hub_token hub_private_repo hub_always_push hub_revision
trackio_space_id trackio_static_space_id save_strategy save_total_limit save_only_model resume_from_checkpoint
load_best_model_at_end eval_strategy eval_steps do_eval per_device_eval_batch_size eval_packing disable_tqdm
logging_strategy logging_steps logging_nan_inf_filter dataset_kwargs dataset_text_field chat_template_path eos_token
pad_token fsdp fsdp_config deepspeed parallelism_config average_tokens_across_devices
"""
OWNED = frozenset(_OWNED.split())
_OWNED_WITH_DPO = """
truncation_mode padding_free loss_weights precompute_ref_log_probs precompute_ref_batch_size sync_ref_model
ref_model_mixup_alpha ref_model_sync_steps
"""
OWNED_WITH_DPO = frozenset(_OWNED_WITH_DPO.split())
# The schema already refuses its own table; the script also decides `data_seed`, and the rest it owns without a field.
EXPERIMENT_FIELD = {key: field for key, field in OWNED_BY_TRAIN.items() if key not in OWNED} | {
    "data_seed": "train.seed"
}
# DPOTrainer passes over `label_smoothing_factor` in silence; the schema refuses the others.
FIELD_WITH_DPO = OWNED_BY_DPO | {"label_smoothing_factor": "train.sft.label_smoothing"}
OWNED_LOADING = ("dtype", "torch_dtype", "quantization_config", "device_map", "revision", "trust_remote_code")
# Names that SFTConfig had, or that people expect it to have, and what says it now. `{}` is the value written.
MOVED = {
    "max_seq_length": "`max_length: {}` under `train`",
    "max_prompt_length": "nothing: `train.max_length` counts a prompt with its answer",
    "max_completion_length": "nothing: `train.max_length` counts a prompt with its answer",
    "warmup_ratio": "`warmup_steps: {}`: below 1 it is a part of all steps",
    "evaluation_strategy": "nothing: held-out rows come from `data.eval`",
    "tokenizer": "nothing: the base's tokenizer is used",
    "processing_class": "nothing: the base's tokenizer is used",
    "group_by_length": "nothing: the training script keeps the order of the rows",
    "no_cuda": "nothing: `train.flavor` decides between GPU and CPU",
    "overwrite_output_dir": "nothing: every run has a folder of its own",
    "logging_dir": "nothing: `train.tracking` decides where metrics go",
    "save_safetensors": "nothing: weights are always safetensors",
    "push_to_hub_model_id": "`repo: {}` under `output`",
    "push_to_hub_token": "nothing: the job gets its token from the repository's secret",
    "torch_dtype": "nothing: the training script loads bfloat16",
    "dtype": "nothing: the training script loads bfloat16",
    "load_in_4bit": "`method: qlora` under `train`",
    "load_in_8bit": "`method: qlora` under `train`",
    "use_4bit": "`method: qlora` under `train`",
    "per_gpu_train_batch_size": "`batch_size: {}` under `train`",
    "adafactor": "`optim: adafactor`",
    "attn_implementation": "`model_init_kwargs: {{attn_implementation: {}}}`",
    "lora_r": "`r: {}` under `train.lora`",
    "lora_alpha": "`alpha: {}` under `train.lora`",
    "lora_dropout": "`dropout: {}` under `train.lora`",
    "lora_target_modules": "`targets: {}` under `train.lora`",
    "target_modules": "`targets: {}` under `train.lora`",
}
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
}
EXAMPLES = {"int": "8", "float": "0.1", "bool": "true", "str": "cosine", "list": "[a, b]", "dict": "{key: value}"}
# A tenth and ten times of what the TRL documentation starts from: 2e-5 for all weights, ten times that for LoRA; with
# preferences 5e-6 for LoRA (trl/scripts/dpo.py).
LEARNING_RATES = {Method.FULL: (2e-6, 2e-4), Method.LORA: (2e-5, 2e-3), Method.QLORA: (2e-5, 2e-3)}
LEARNING_RATES[Method.DPO] = (5e-7, 5e-5)
EFFECTIVE_BATCH = (4, 256)
# Peak over baseline when full logits are built, as a multiple of the fp32 logits: measured on CPU, 262,144 tokens.
LOGIT_COPIES = 3.1


def sft_fields_exist(subject: Subject) -> Verdict | None:
    """Every key of `train.sft` is a field of the pinned SFTConfig

    Why: A name of an older TRL is a TypeError after the machine was started. With `method: dpo` it is DPOConfig's.
    Fix: The name of today; the hint says it.
    """
    known = subject.facts.sft_fields
    for key, value in subject.file.experiment.train.sft.items():
        if not known or key in known:
            continue
        if key in MOVED:
            said = MOVED[key].format(excerpt(value))
            hint = f"remove `{key}`; {said.removeprefix('nothing: ')}"
            hint = hint if said.startswith("nothing") else f"write {said} instead"
        else:
            near = nearest(key, known)
            hint = f"did you mean `{near}`?" if near else f"remove `{excerpt(key)}`"
        return Verdict(f"train.sft.{key}", f"{_config(subject)} has no field `{excerpt(key)}`", hint)
    return None


def sft_fields_current(subject: Subject) -> Verdict | None:
    """No key of `train.sft` has been renamed

    Why: The old name still works, with a warning, until the next TRL.
    Fix: Write the new one.
    """
    if subject.file.experiment.train.backend is Backend.MLX:
        return None  # no SFTConfig: the names are those of scripts/train_mlx.py
    for key, value in subject.file.experiment.train.sft.items():
        if key in RENAMED:
            hint = f"write `{RENAMED[key]}: {_yaml(value)}`"
            return Verdict(f"train.sft.{key}", f"`{key}` is now `{RENAMED[key]}`", hint, Severity.WARNING)
    return None


def sft_values_typed(subject: Subject) -> Verdict | None:
    """Every value of `train.sft` has its field's type, and is one the field knows

    Why: SFTConfig accepts `"2e-4"` as text and fails at the first optimizer step; an unknown optimizer fails there too.
    Fix: Write the value without quotes, or one of the values the field knows.
    """
    types, choices = {**subject.facts.sft_fields, "model_init_kwargs": "dict"}, subject.facts.sft_choices
    for key, value in subject.file.experiment.train.sft.items():
        at = f"train.sft.{key}"
        if value is not None and not _is_a(value, types.get(key, "any")):
            hint = f"write `{key}: {_as_type(value, types[key])}`"
            return Verdict(at, f"`{key}` is {_kind(value)}, {_config(subject)} wants {types[key]}", hint)
        if isinstance(value, str) and key in choices and value not in choices[key]:
            near = nearest(value, choices[key]) or choices[key][0]
            return Verdict(at, f"`{key}` cannot be `{excerpt(value)}`", f"write `{key}: {near}`")
    return None


def sft_keys_are_free(subject: Subject) -> Verdict | None:
    """No key of `train.sft` is one the training script decides

    Why: The script refuses it on the machine: it would break a promise such as where results go, or resuming.
    Fix: Remove it; what can be chosen has a field of its own.
    """
    train = subject.file.experiment.train
    if train.script is not None:
        return None
    fields, owned = EXPERIMENT_FIELD, OWNED
    if train.is_dpo:
        fields, owned = fields | FIELD_WITH_DPO, owned | OWNED_WITH_DPO
    for key in train.sft:
        if key in fields:
            field = fields[key]
            return Verdict(
                f"train.sft.{key}", f"`{key}` is decided by `{field}`", f"remove `{key}` and write `{field}`"
            )
        if key in owned and key != "logging_nan_inf_filter" and not key.startswith("trackio_"):
            return Verdict(f"train.sft.{key}", f"`{key}` is set by the training script", f"remove `{key}`")
    for key in _loading(subject):
        if key in OWNED_LOADING and key not in ("dtype", "torch_dtype"):
            at = f"train.sft.model_init_kwargs.{key}"
            return Verdict(at, f"`model_init_kwargs.{key}` is set by the training script", f"remove `{key}`")
    return None


def quantisation_by_method(subject: Subject) -> Verdict | None:
    """4-bit loading is asked for by `method`, not flat in `model_init_kwargs`

    Why: transformers 5 passes `load_in_4bit` on to the model's class, which raises a TypeError after the download.
    Fix: `method: qlora`; to prefer answers `dpo: {quantize: true}`.
    """
    for key in _loading(subject):
        if key.startswith(("load_in_4bit", "load_in_8bit", "bnb_")):
            at, message = f"train.sft.model_init_kwargs.{key}", f"`model_init_kwargs.{key}` is no longer an argument"
            said = "dpo: {quantize: true}" if subject.file.experiment.train.is_dpo else "method: qlora"
            return Verdict(at, message, f"remove `{key}` and write `{said}` under `train`")
    return None


def dtype_spelled(subject: Subject) -> Verdict | None:
    """`dtype` is a torch dtype's name

    Why: `bf16` is refused when the base is loaded; our training script loads bfloat16 whatever the file says.
    Fix: Remove it; a custom script may want `bfloat16`.
    """
    custom = subject.file.experiment.train.script is not None
    for key in ("dtype", "torch_dtype"):
        value = str(_loading(subject).get(key, ""))
        if value and (value in DTYPES or not custom):
            wrong = f"`{key}: {excerpt(value)}` is not a dtype of torch"
            message = wrong if value in DTYPES else f"`model_init_kwargs.{key}` is set by the training script"
            hint = f"write `{key}: {DTYPES[value]}`" if custom else f"remove `{key}`; the script loads bfloat16"
            return Verdict(f"train.sft.model_init_kwargs.{key}", message, hint)
    return None


def nan_is_shown(subject: Subject) -> Verdict | None:
    """A loss that is not a number is not hidden

    Why: `logging_nan_inf_filter` logs 0 instead, and a run that learned nothing ends as a success.
    Fix: Remove it; the training script turns it off.
    """
    if not subject.file.experiment.train.sft.get("logging_nan_inf_filter"):
        return None
    message = "`logging_nan_inf_filter` shows a loss of 0 where it is not a number"
    return Verdict("train.sft.logging_nan_inf_filter", message, "remove `logging_nan_inf_filter`")


def learning_rate_sane(subject: Subject) -> Verdict | None:
    """The learning rate is within ten times of what usually works

    Why: Too large diverges, too small learns nothing, and both cost the same as a good run.
    Fix: About 2e-4 for LoRA and QLoRA, about 2e-5 for all weights, about 5e-6 for preference tuning.
    """
    train = subject.file.experiment.train
    low, high = LEARNING_RATES[train.method]
    if low <= train.learning_rate <= high:
        return None
    word = "small" if train.learning_rate < low else "large"
    usual = (low * high) ** 0.5
    message = f"a learning rate of {train.learning_rate:g} is {word} for `{train.method.value}`"
    return Verdict("train.learning_rate", message, f"write `learning_rate: {usual:.0e}`", Severity.WARNING)


def batch_sane(subject: Subject) -> Verdict | None:
    """Each optimizer step sees a usual number of rows

    Why: Below 4 rows steps are noise; above 256 there are few steps left, and the learning rate no longer fits.
    Fix: `gradient_accumulation` changes it without changing memory.
    """
    train = subject.file.experiment.train
    at_once = rows_at_once(train.batch_size)
    rows, (low, high) = at_once * train.gradient_accumulation, EFFECTIVE_BATCH
    if low <= rows <= high:
        return None
    wanted = max(1, 16 // at_once)
    message = f"each step sees {rows} row{'s' * (rows > 1)} (`batch_size` x `gradient_accumulation`)"
    hint = f"write `gradient_accumulation: {wanted}`" if at_once <= high else "write `batch_size: 1`"
    return Verdict("train.gradient_accumulation", message, hint, Severity.WARNING)


def logits_stay_fused(subject: Subject) -> Verdict | None:
    """No loss option builds the full logits

    Why: The pinned TRL computes the loss without them; label smoothing brings them back, vocabulary x length large.
    Fix: Remove `label_smoothing_factor`.
    """
    train, shape = subject.file.experiment.train, subject.facts.shape
    factor = train.sft.get("label_smoothing_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0 or train.is_dpo:
        return None
    tokens = rows_at_once(train.batch_size) * train.max_length
    gib = LOGIT_COPIES * 4 * tokens * (shape.vocab if shape else 0) / 2**30
    cost = f", about {gib:.1f} GiB more" if gib else ", gigabytes with a large vocabulary"
    message = f"`label_smoothing_factor` builds the logits of {tokens} tokens{cost}"
    return Verdict("train.sft.label_smoothing_factor", message, "remove `label_smoothing_factor`", Severity.WARNING)


def _config(subject: Subject) -> str:
    return "DPOConfig" if subject.file.experiment.train.is_dpo else "SFTConfig"


def _loading(subject: Subject) -> dict[str, Any]:
    given = subject.file.experiment.train.sft.get("model_init_kwargs")
    return given if isinstance(given, dict) else {}


def _is_a(value: object, word: str) -> bool:
    if isinstance(value, bool):
        return word in ("bool", "any")
    return word == "any" or isinstance(value, KINDS[word])


def _kind(value: object) -> str:
    """The value in words, as the file says it."""
    if isinstance(value, str):
        return f"the text `{excerpt(value)}`"
    names = {dict: "a mapping", list: "a list", bool: "a boolean", int: "an integer", float: "a number"}
    return names.get(type(value), "something else")


def _as_type(value: object, word: str) -> str:
    """The caller's own value in the wanted type where that is plain, else an example."""
    text = excerpt(value)
    if word == "bool" and text.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0", "1.0", "0.0"):
        return "true" if text.lower() in ("true", "yes", "on", "1", "1.0") else "false"
    if word in ("int", "float") and not isinstance(value, bool):
        try:
            number = float(text)
            return str(int(number)) if word == "int" else text
        except (ValueError, OverflowError):
            return EXAMPLES[word]
    if word == "list" and isinstance(value, str):
        return f"[{text}]"
    return EXAMPLES[word]


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else excerpt(value)
