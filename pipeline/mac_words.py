"""What a plan says of training on a Mac: against which base, how long on which chip, on which Macs. Decides nothing."""

import shlex

from pipeline.apple import CHIPS, MEMORY_GB
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.mac import BAND, mlx_bits, seconds_by_chip, smallest_mac
from pipeline.markdown import code, details, fence, table
from pipeline.memory import MemoryEstimate
from pipeline.plan import Plan, mlx_base
from pipeline.progress import duration

WHY_WIDE = "short rows leave a GPU waiting, a hot laptop slows down, and few people have published what they measured"


def mac_section(plan: Plan, facts: Facts, path: str) -> str:
    """The plan comment's part about it; empty for a training that is a job."""
    if not plan.stages[0].flavor.local:
        return ""
    lines = [f"- {words}" for words in mac_lines(plan, facts)]
    parts = ["### Training with MLX", "\n".join(lines), fence("\n".join(_commands(plan, path)), "sh")]
    chips = _chip_table(plan.experiment, facts)
    return "\n\n".join([*parts, *([details("How long on which chip", chips)] if chips else [])])


def mac_lines(plan: Plan, facts: Facts) -> list[str]:
    """A sentence for each thing to know; none for a training that is a job."""
    train = plan.stages[0]
    if not train.flavor.local:
        return []
    where = "Trained on the Mac of whoever runs it, never as a job; `submit-adapter` hands the adapter to the chain."
    return [where, _base_words(plan.experiment, facts), _time_words(plan, facts), _memory_words(train.memory)]


def _base_words(experiment: Experiment, facts: Facts) -> str:
    """Which base is trained on, which one the merge uses, and what it means that they differ."""
    base, other = code(experiment.base.model), mlx_base(experiment)
    if other is None:
        return f"Trained on {base}, which the merge uses too."
    bits = mlx_bits(experiment, facts.mlx_config)
    kind = {None: "how far it is quantised is not known", 16: "not quantised"}.get(bits, f"{bits} bits a weight")
    words = f"Trained on {code(other)} ({kind}), merged into {base}"
    if bits == 16:
        return f"{words}."
    return f"{words}: an adapter fitted to quantised weights, so the merged model may answer a little differently."


def _time_words(plan: Plan, facts: Facts) -> str:
    train = plan.stages[0]
    band = f"±{BAND:.0%}: {WHY_WIDE}"
    if train.cost.expected_s is not None:
        return f"About {duration(train.cost.expected_s)} on an {CHIPS[train.flavor.name].shown}, {band}."
    if facts.shape is None or facts.dataset is None:
        return "How long it takes cannot be known: the base's shape or the rows are not at hand."
    seconds = seconds_by_chip(plan.experiment, facts.shape, facts.dataset, mlx_bits(plan.experiment, facts.mlx_config))
    fast, slow = min(seconds, key=lambda name: seconds[name]), max(seconds, key=lambda name: seconds[name])
    ends = [f"{duration(seconds[name])} on an {CHIPS[name].shown}" for name in (fast, slow)]
    return f"About {ends[0]}, {ends[1]}, {band}. `flavor: m3-max` under `train` names your chip."


def _memory_words(memory: MemoryEstimate | None) -> str:
    if memory is None:
        return "How much memory it takes cannot be known."
    parts = f"weights {memory.weights:.1f}, adapter and optimizer {memory.adapter + memory.optimizer:.1f}, "
    parts += f"activations {memory.activations:.1f}, head {memory.head:.1f}, MLX {memory.context:.1f}"
    need = f"About {memory.total:.1f} GiB of unified memory ({memory.low:.1f} to {memory.high:.1f}: {parts})"
    size = smallest_mac(memory)
    macs = f"a Mac with {size} GB or more" if size else f"more than a Mac with {MEMORY_GB[-1]} GB gives"
    return f"{need}: {macs}; Metal gives three quarters to the GPU."


def _commands(plan: Plan, path: str) -> list[str]:
    """From the training to the chain, after the merge."""
    folder = f"runs/{plan.run_id}/train/artifact"
    return [
        f"mergetune run {shlex.quote(path)} --backend mlx",
        f"mergetune submit-adapter {plan.experiment.name} {folder}",
    ]


def _chip_table(experiment: Experiment, facts: Facts) -> str:
    if facts.shape is None or facts.dataset is None:
        return ""
    seconds = seconds_by_chip(experiment, facts.shape, facts.dataset, mlx_bits(experiment, facts.mlx_config))
    rows = [
        (CHIPS[name].shown, f"~{duration(s)}", f"{duration(s * (1 - BAND))} to {duration(s * (1 + BAND))}")
        for name, s in seconds.items()
    ]
    return table(("chip", "training", "between"), rows, "lrr")
