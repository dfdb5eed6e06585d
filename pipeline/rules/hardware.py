"""Rules about GPUs: does training fit those of its flavor, and does it use all of them?"""

from pipeline.errors import Severity
from pipeline.experiment import Backend, Experiment, Method
from pipeline.fields import AUTO, rows_at_once
from pipeline.fit import cheapest_flavor, largest_max_length
from pipeline.flavors import FLAVORS, Flavor, gpu_flavors
from pipeline.memory import MemoryEstimate, spec_of
from pipeline.models import ModelShape
from pipeline.parallel import Parallel, Sharing, estimate_memory, need_of, parallel_of
from pipeline.rules.rule import Subject, Verdict
from pipeline.settled import settle
from pipeline.traced import TracedMemory


def training_fits(subject: Subject) -> Verdict | None:
    """Training fits the GPU of its flavor

    Why: Out of memory at step 1 costs the start of a machine and an hour of somebody's attention. The closed form is
    right to ±10 %; where `mergetune plan --trace` was asked for, or preflight could trace, the trace decides.
    Fix: A larger flavor, a smaller `max_length` or `batch_size`, or `method: qlora`.
    """
    experiment, shape = subject.file.experiment, subject.facts.shape
    flavor, traced = FLAVORS.get(experiment.train.flavor), subject.facts.traced
    if flavor is None or flavor.gpu is None or quantised_base_is_whole(subject):
        return None
    if traced is not None:
        keeps_all = not settle(experiment, shape).recomputes
        return _by_trace(traced, estimate_memory(experiment, shape) if shape else None, flavor, keeps_all)
    return _by_closed_form(experiment, shape, flavor) if shape else None


def _by_closed_form(experiment: Experiment, shape: ModelShape, flavor: Flavor) -> Verdict | None:
    estimate = estimate_memory(experiment, shape)
    fits = estimate.fits(flavor)
    if fits is True:
        return None
    cheapest = cheapest_flavor(experiment, shape)
    largest = largest_max_length(experiment, shape, flavor)
    ways = [f"`flavor: {cheapest.name}`"] if cheapest else []
    ways += [f"`max_length: {largest}`"] if largest else []
    hint = "write " + " or ".join(ways) if ways else "no flavor fits: write `method: qlora`, or a smaller base"
    word = "needs" if fits is False else "may need"
    where = parallel_of(experiment, shape).words
    needed = f"{estimate.low:.1f} to {estimate.high:.1f} GiB{where}"
    message = f"training {word} {needed}, `{flavor.name}` has {flavor.vram_gib:g} GiB"
    severity = Severity.ERROR if fits is False else Severity.WARNING
    return Verdict("train.flavor", message, hint, severity)


def _by_trace(traced: TracedMemory, estimate: MemoryEstimate | None, flavor: Flavor, keeps_all: bool) -> Verdict | None:
    """The trace blocks; a closed form that it contradicts only warns."""
    need = f"{traced.total:.1f} GiB"
    if not traced.fits(flavor):
        larger = next((other for other in gpu_flavors() if traced.fits(other)), None)
        hint = f"write `flavor: {larger.name}`, or a smaller `max_length`" if larger else "write a smaller `max_length`"
        if keeps_all:
            hint = f"write `sft: {{gradient_checkpointing: true}}`, or {hint.removeprefix('write ')}"
        return Verdict("train.flavor", f"training needs {need} (traced), `{flavor.name}` has {flavor.vram_gib:g}", hint)
    if estimate is None or estimate.fits(flavor) is not False:
        return None
    message = (
        f"by the closed form training needs {estimate.low:.1f} to {estimate.high:.1f} GiB, by the trace {need}:"
        f" it fits the {flavor.vram_gib:g} GiB of `{flavor.name}`"
    )
    return Verdict(
        "train.flavor", message, "leave it: the trace counts what the closed form estimates", Severity.WARNING
    )


def quantised_base_is_whole(subject: Subject) -> Verdict | None:
    """A 4-bit base fits every single GPU of its flavor

    Why: FSDP2 cannot share the weights that bitsandbytes packs: accelerate leaves them whole on every GPU. More GPUs
    make QLoRA faster, they give it no room.
    Fix: One GPU with more memory, or `method: lora`, whose bf16 base is shared.
    """
    experiment, shape = subject.file.experiment, subject.facts.shape
    parallel, flavor = parallel_of(experiment, shape), FLAVORS.get(experiment.train.flavor)
    if shape is None or flavor is None or parallel.gpus < 2 or not experiment.train.quantised:
        return None
    estimate = estimate_memory(experiment, shape)
    if estimate.fits(flavor) is not False:
        return None
    cheapest = cheapest_flavor(experiment, shape)
    ways = [f"`flavor: {cheapest.name}`"] if cheapest else []
    lora = experiment.model_copy(update={"train": experiment.train.model_copy(update={"method": Method.LORA})})
    if need_of(spec_of(lora, shape), shape, Parallel(parallel.gpus, Sharing.PARTS)).fits(flavor):
        ways.append("`method: lora`")
    message = f"a 4-bit base is not shared: it needs {estimate.low:.1f} to {estimate.high:.1f} GiB on each GPU, "
    message += f"those of `{flavor.name}` have {flavor.vram_gib:g}"
    hint = "write " + " or ".join(ways) if ways else "no flavor fits: write a smaller `max_length`, or a smaller base"
    return Verdict("train.flavor", message, hint)


def batches_are_shared(subject: Subject) -> Verdict | None:
    """Every GPU gets as many of a step's batches as the others

    Why: A step's `gradient_accumulation` batches are shared by the GPUs, so that an experiment learns the same on any
    number of them. With fewer batches than GPUs, some would be paid for and have nothing to do.
    Fix: A multiple of the number of GPUs; with `batch_size` divided by as much, a step sees the same rows.
    """
    train = subject.file.experiment.train
    parallel = parallel_of(subject.file.experiment, subject.facts.shape)
    total, gpus = train.gradient_accumulation, parallel.gpus
    if total % gpus == 0:
        return None
    rows = total * rows_at_once(train.batch_size)
    same = [n for n in range(gpus, rows + 1, gpus) if n > total and rows % n == 0]
    hint = f"write `gradient_accumulation: {same[0] if same else -(-total // gpus) * gpus}`"
    if same:
        hint += f" and `batch_size: {rows // same[0]}`: a step sees the same {rows} rows"
    where = f"{parallel.nodes} `{train.flavor}`" if parallel.nodes > 1 else f"`{train.flavor}`"
    message = f"`gradient_accumulation: {total}` batches cannot be shared evenly by the {gpus} GPUs of {where}"
    return Verdict("train.gradient_accumulation", message, hint)


def gpus_are_used(subject: Subject) -> Verdict | None:
    """Stages after training have no more GPUs than they use

    Why: Merging and converting compute on the CPU, and an evaluation on one GPU: the others are paid for and idle.
    Fix: The flavor with one GPU of the kind, or `cpu-upgrade`.
    """
    for stage in ("merge", "gguf", "evaluate"):
        section = getattr(subject.file.experiment, stage)
        flavor = FLAVORS.get(section.flavor) if section else None
        if flavor is None or flavor.gpus < 2:
            continue
        one = next(f for f in gpu_flavors() if f.gpu == flavor.gpu) if stage == "evaluate" else FLAVORS["cpu-upgrade"]
        uses = "one GPU" if stage == "evaluate" else "no GPU"
        message = f"`{stage}` uses {uses}, `{flavor.name}` has {flavor.gpus}"
        return Verdict(f"{stage}.flavor", message, f"write `flavor: {one.name}` under `{stage}`", Severity.WARNING)
    return None


def auto_can_be_settled(subject: Subject) -> Verdict | None:
    """`batch_size: auto` can become a number

    Why: The estimator fills it in from the sizes of the base. Where it does not know them, every row would be computed
    alone, and the GPU would wait most of the time.
    Fix: A number, or `--online`, which fetches the base's config.json.
    """
    train = subject.file.experiment.train
    if train.batch_size != AUTO:
        return None
    if train.backend is Backend.MLX or train.script is not None:
        who = "MLX" if train.backend is Backend.MLX else f"`{train.script}`"
        return Verdict("train.batch_size", f"`batch_size: auto` is not known for {who}", "write `batch_size: 1`")
    if subject.facts.shape is not None:
        return None
    message = f"`batch_size: auto` needs the sizes of `{subject.file.experiment.base.model}`, which are not known here"
    return Verdict("train.batch_size", message, "write `batch_size: 1`, or add `--online` to fetch its config.json")
