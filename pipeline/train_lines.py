"""One line each about how a plan trains: its GPUs and machines, what was chosen for them, what a trace found. Pure."""

from pipeline.markdown import code, money, plural
from pipeline.parallel import Sharing
from pipeline.plan import Plan, Stage
from pipeline.settled import as_written
from pipeline.variants import numbered


def gpus_line(plan: Plan) -> str:
    """How several GPUs share a step, and that the result does not depend on it; empty for one."""
    parallel, settled = plan.stages[0].parallel, plan.stages[0].settled or as_written(plan.experiment)
    if parallel.gpus < 2:
        return ""
    held = "a part of the model" if parallel.sharing is Sharing.PARTS else "all of the model"
    total, share = settled.accumulation, settled.accumulation / parallel.gpus
    whom = "GPU" if plan.stages[0].flavor.gpus else "machine"
    who = plural(parallel.gpus, whom)
    shared = (
        f"{who} share each step ({parallel.sharing}: each holds {held}), {share:g} of its {total} "
        f"batches of {plural(settled.batch, 'row')} for each: one {whom} would learn the same."
    )
    return f"{nodes_line(plan.stages[0])} {shared}".strip()


def nodes_line(train: Stage) -> str:
    """What several machines are and cost together; empty for one."""
    parallel = train.parallel
    if parallel.nodes < 2:
        return ""
    gpus = f" × {plural(parallel.per_node, 'GPU')}" if train.flavor.gpus else ""
    price = f"{money(60 * train.usd_per_minute)}/h"
    return f"{parallel.nodes} nodes{gpus} ({parallel.sharing}), {price}: a job each, one attempt together."


def settled_line(train: Stage) -> str:
    """What the estimate chose for this GPU without changing what is learned; empty where it chose nothing."""
    said: dict[str, list[int]] = {"; ".join(train.settled.words): []} if train.settled else {}
    for variant in train.variants:
        said.setdefault("; ".join(variant.settled.words), []).append(variant.number)
    whose = {words: f"{numbered(numbers)}: " if len(said) > 1 else "" for words, numbers in said.items()}
    return "\n\n".join(f"On `{train.flavor.name}`: {whose[words]}{words}." for words in said if words)


def traced_line(train: Stage) -> str:
    """What a trace found beside the closed form, and whether the device has it; empty where nothing was traced."""
    traced, memory, flavor = train.traced, train.memory, train.flavor
    if traced is None or flavor.gpu is None:
        return ""
    beside = f" (closed form {memory.allocated:.1f})" if memory else ""
    verdict = "fits" if traced.fits(flavor) else "does not fit"
    return (
        f"Traced: {traced.allocated:.1f} GiB allocated{beside}, {traced.total:.1f} of the {flavor.vram_gib:g} GiB of "
        f"`{flavor.name}` with fragmentation and CUDA: {verdict}. The peak: {code(traced.phase)}."
    )
