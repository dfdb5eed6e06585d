"""Rules about adapters on mixtures of experts."""

from pipeline.rules.rule import Subject, Verdict

# Whose experts PEFT adapts as stacked parameters, by what their configs call themselves: the two families of
# `_MODEL_TO_CONVERSION_PATTERN` in transformers 5.23's conversion_mapping.py that PEFT 0.21.2 rewrites targets for.
STACKED = frozenset(
    [
        "afmoe",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "longcat_flash",
        "mellum",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "solar_open",
    ]
)
EXPERT_LAYERS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def experts_are_left_out(subject: Subject) -> Verdict | None:
    """An adapter on stacked experts cannot be merged

    Why: In these models PEFT turns targets in the experts into adapters of stacked parameters. Such an adapter trains,
    and the merge stage then refuses it: the training would be paid for nothing.
    Fix: Name the attention's layers, which all tokens pass: `targets: [q_proj, k_proj, v_proj, o_proj]`.
    """
    experiment = subject.file.experiment
    lora, config, shape = experiment.train.lora, subject.facts.config, subject.facts.shape
    kind = str(config.get("model_type")) if config is not None else shape.model_type if shape else None
    if experiment.merge is None or kind not in STACKED:
        return None
    targets = lora.targets if lora else "all-linear"
    named = {target.rsplit(".", 1)[-1] for target in targets} if isinstance(targets, list) else set()
    if targets != "all-linear" and not named & EXPERT_LAYERS:
        return None
    said = "all-linear" if targets == "all-linear" else ", ".join(sorted(named & EXPERT_LAYERS))
    message = f"`{said}` reaches the stacked experts of `{experiment.base.model}`, and such an adapter cannot be merged"
    return Verdict("train.lora.targets", message, "write `targets: [q_proj, k_proj, v_proj, o_proj]` under `lora`")
