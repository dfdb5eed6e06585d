"""Rules about Trackio: what can stop a run for its metrics, or publish them. Looks nothing up."""

from pipeline.errors import Severity
from pipeline.experiment import Tracking
from pipeline.plan import SCRIPTS, StageName
from pipeline.rules.rule import Subject, Verdict
from pipeline.rules.script_text import packages_of


def tracking_stays_private(subject: Subject) -> Verdict | None:
    """A custom script with Trackio keeps private metrics private

    Why: Left to itself, the trainer makes a public static Space with each push to the Hub; and a token that may not
    make Spaces ends the run there.
    Fix: `trackio_static_space_id=False` in its SFTConfig, as scripts/train_sft.py has it.
    """
    experiment = subject.file.experiment
    script = experiment.train.script
    text = subject.facts.scripts.get(script or "")
    if script is None or text is None or experiment.train.tracking is not Tracking.TRACKIO:
        return None
    if not experiment.output.private or "trackio_static_space_id" in text:
        return None
    message = f"`{script}` with `tracking: trackio` may publish a Space, and the output is private"
    hint = f"pass `trackio_static_space_id=False` to SFTConfig in `{script}`, or write `tracking: none`"
    return Verdict("train.tracking", message, hint, Severity.WARNING)


def tracking_in_one_place(subject: Subject) -> Verdict | None:
    """No Trackio key stands in `train.sft`

    Why: A Space or bucket named there is made, public, with the job's token, and a refusal ends the run.
    Fix: Remove it; `train.tracking` is the choice.
    """
    for key in subject.file.experiment.train.sft:
        if key.startswith("trackio_"):
            message = f"`{key}` would make a Space or bucket with the job's token"
            return Verdict(f"train.sft.{key}", message, f"remove `{key}`; `tracking: trackio` logs inside the job")
    return None


def trackio_is_installed(subject: Subject) -> Verdict | None:
    """The training script installs Trackio when it is to track

    Why: Without the package the script stops before it trains.
    Fix: Add it to the script's header, or write `tracking: none`.
    """
    train = subject.file.experiment.train
    script = train.script or SCRIPTS[StageName.TRAIN]
    text = subject.facts.scripts.get(script)
    if train.tracking is not Tracking.TRACKIO or text is None or "trackio" in packages_of(text):
        return None
    message = f"`tracking: trackio`, and `{script}` does not install `trackio`"
    return Verdict("train.tracking", message, f"write `tracking: none`, or add `trackio` to the header of `{script}`")
