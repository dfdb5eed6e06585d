"""Rules about what only preference tuning does. Not about its rows: those are with the other data."""

from pipeline.errors import Severity
from pipeline.flavors import FLAVORS, gpu_flavors
from pipeline.rules.rule import Subject, Verdict


def preferences_use_one_gpu(subject: Subject) -> Verdict | None:
    """Preference tuning runs on a flavor with one GPU

    Why: The training script prefers answers in one process. Several GPUs need batches of equal size, and a pair that
    only fills one up would count in the loss and in every reward.
    Fix: The flavor with one GPU of the kind; a 4-bit base (`dpo: {quantize: true}`) where memory is short.
    """
    train = subject.file.experiment.train
    flavor = FLAVORS.get(train.flavor)
    if not train.is_dpo or train.script or flavor is None or flavor.gpus < 2:
        return None
    one = next((one.name for one in gpu_flavors() if one.gpu == flavor.gpu), "l40sx1")
    message = f"`method: dpo` trains on one GPU, `{flavor.name}` has {flavor.gpus}"
    return Verdict("train.flavor", message, f"write `flavor: {one}`")


def dropout_is_honoured(subject: Subject) -> Verdict | None:
    """With `method: dpo`, dropout in the adapter has an effect

    Why: DPOTrainer turns all dropout off (`disable_dropout`), as it makes policy and reference differ by chance.
    `lora.dropout` alone is then passed over in silence.
    Fix: Remove `dropout`, or write `sft: {disable_dropout: false}` beside it.
    """
    train = subject.file.experiment.train
    if not train.is_dpo or train.lora is None or not train.lora.dropout or train.sft.get("disable_dropout") is False:
        return None
    message = f"`dropout: {train.lora.dropout:g}` has no effect: DPOTrainer turns dropout off"
    hint = "remove `dropout`, or write `sft: {disable_dropout: false}` under `train`"
    return Verdict("train.lora.dropout", message, hint, Severity.WARNING)
