"""Rules about the file itself: names, pins, paths, money. Nothing here looks at hardware or data."""

import math

from pipeline.errors import Severity
from pipeline.experiment import Backend, nearest
from pipeline.fields import is_path
from pipeline.flavors import FLAVORS
from pipeline.hypothesis import Claim, read_claims
from pipeline.plan import make_plan, mlx_base
from pipeline.rules.rule import Subject, Verdict

MARGIN = 1.3  # of the expected duration: what a timeout must leave


def name_is_the_files_name(subject: Subject) -> Verdict | None:
    """`name` equals the file's name

    Why: Runs, tags and comments carry the name; a reader must find the file from it.
    Fix: Rename the file, or change `name`.
    """
    name, stem = subject.file.experiment.name, subject.file.path.stem
    if name == stem:
        return None
    return Verdict("name", f"`name: {name}` in a file called `{stem}`", f"write `name: {stem}`, or rename the file")


def revision_pinned(subject: Subject) -> Verdict | None:
    """Base and dataset are pinned to a revision

    Why: A branch can move between the reviewed plan and the launch, and the same file then means another result.
    Fix: Write the commit as `revision`.
    """
    experiment = subject.file.experiment
    if not is_path(experiment.base.model) and experiment.base.revision is None:
        hint = f"add `revision: <commit>` under `base` (the commit `{experiment.base.model}` is at today)"
        return Verdict("base.model", f"`{experiment.base.model}` is not pinned", hint, Severity.WARNING)
    if not is_path(experiment.data.dataset) and experiment.data.revision is None:
        hint = f"add `revision: <commit>` under `data` (the commit `{experiment.data.dataset}` is at today)"
        return Verdict("data.dataset", f"`{experiment.data.dataset}` is not pinned", hint, Severity.WARNING)
    mlx = experiment.train.mlx
    if mlx and mlx.base and not is_path(mlx.base) and mlx.revision is None:
        hint = f"add `revision: <commit>` under `train.mlx` (the commit `{mlx.base}` is at today)"
        return Verdict("train.mlx.base", f"`{mlx.base}` is not pinned", hint, Severity.WARNING)
    return None


def hypothesis_is_measured(subject: Subject) -> Verdict | None:
    """What the hypothesis claims is measured by a stage

    Why: The results hold a hypothesis to every loss and perplexity that it names, and after `method: dpo` to every
    reward margin and accuracy. One that nothing measures stays open.
    Fix: Hold rows out with `data.eval`; a perplexity and a fall in percent need the `evaluate` stage too, which asks
    the base as well. Preference tuning has neither: name a reward margin or accuracy.
    """
    experiment = subject.file.experiment
    for claim in read_claims(experiment.hypothesis):
        needs_base = claim.percent or claim.metric.endswith("perplexity")
        if claim.is_reward and not experiment.train.is_dpo:
            return _unmeasured(claim, "only `method: dpo` has rewards", "name a held-out loss instead")
        if claim.metric.startswith("held-out") and experiment.data.eval is None:
            return _unmeasured(claim, "no rows are held out", "add `eval: {fraction: 0.05}` under `data`")
        if needs_base and experiment.train.is_dpo:
            return _unmeasured(claim, "no stage gives it after `method: dpo`", "name a reward margin or accuracy")
        if needs_base and (experiment.evaluate is None or claim.metric.startswith("training")):
            hint = "add `evaluate: {timeout: 1h}`" if experiment.evaluate is None else "name a held-out one instead"
            return _unmeasured(claim, "nothing compares with the base" if claim.percent else "no stage gives it", hint)
    return None


def _unmeasured(claim: Claim, why: str, hint: str) -> Verdict:
    return Verdict("hypothesis", f"`{claim}` will not be measured: {why}", hint, Severity.WARNING)


def files_are_there(subject: Subject) -> Verdict | None:
    """Every in-repo path exists

    Why: The job would start, be billed for its start, and fail at the first read.
    Fix: Commit the file, or correct the path; paths count from the repository's root.
    """
    if not subject.facts.missing:
        return None
    path = subject.facts.missing[0]
    key = _key_of(subject, path)
    kind = "folder" if key in ("base.model", "train.mlx.base") else "file"
    return Verdict(key, f"`{path}` is no {kind} of this repository", f"commit that {kind}, or correct the path")


def namespace_allowed(subject: Subject) -> Verdict | None:
    """The output goes to a namespace this repository may write to

    Why: A typo in the namespace would put the result into somebody else's account, or fail hours later.
    Fix: Use one of `tool.mergetune.namespaces`, or add yours there.
    """
    allowed = subject.settings.namespaces
    repo = subject.file.experiment.output.repo
    namespace, name = repo.split("/")
    if not allowed or namespace in allowed:
        return None
    near = nearest(namespace, allowed) or allowed[0]
    return Verdict("output.repo", f"namespace `{namespace}` is not allowed here", f"write `repo: {near}/{name}`")


def flavors_exist(subject: Subject) -> Verdict | None:
    """Every flavor exists

    Why: Hugging Face Jobs refuses an unknown flavor at submit, after the merge.
    Fix: Use a flavor of the catalogue (`mergetune plan` lists those that fit).
    """
    experiment = subject.file.experiment
    for section in ("train", "merge", "gguf", "evaluate"):
        stage = getattr(experiment, section)
        if section == "train" and experiment.train.backend is Backend.MLX:
            continue  # a chip, and another rule's
        if stage is not None and stage.flavor not in FLAVORS:
            near = nearest(stage.flavor, FLAVORS) or "a10g-large"
            return Verdict(f"{section}.flavor", f"there is no flavor `{stage.flavor}`", f"write `flavor: {near}`")
    return None


def worst_case_within_budget(subject: Subject) -> Verdict | None:
    """The worst case stays within the budget

    Why: A job that hangs is billed until its timeout; the reviewer approved `budget.max_usd`, not more.
    Fix: Shorten the timeout, choose a cheaper flavor, or raise the budget.
    """
    if flavors_exist(subject) or subject.facts.missing:
        return None
    plan = make_plan(subject.file.experiment, subject.facts)
    budget = subject.file.experiment.budget.max_usd
    if plan.worst_usd <= budget:
        return None
    train = plan.stages[0]
    rest = plan.worst_usd - train.cost.worst_usd
    price = train.usd_per_minute  # nothing on a Mac
    minutes = int((budget - rest) / price) if price else 0
    fits = f"write `timeout: {minutes}m` under `train`, or " if minutes > 0 else ""
    message = f"every stage running into its timeout costs ${plan.worst_usd:.2f}, the budget is ${budget:.2f}"
    return Verdict("budget.max_usd", message, f"{fits}write `max_usd: {plan.worst_usd:.2f}`")


def timeouts_hold(subject: Subject) -> Verdict | None:
    """Every stage ends well before its timeout

    Why: A job killed by its timeout is paid for, and leaves at best a checkpoint.
    Fix: A longer timeout, a faster flavor, fewer epochs. The estimate times 1.3 must fit.
    """
    if flavors_exist(subject) or subject.facts.missing:
        return None
    sweep = subject.file.experiment.sweep
    for stage in make_plan(subject.file.experiment, subject.facts).stages:
        needed, limit = stage.cost.needed_s, math.inf
        if stage.variants and sweep and sweep.max_usd and stage.flavor.usd_per_minute:
            limit = sweep.max_usd / stage.flavor.usd_per_minute * 60  # then no further variant is started
        if needed is not None and min(needed * MARGIN, limit) > stage.timeout_s:
            minutes = math.ceil(min(needed * MARGIN, limit) / 60)
            words = f"`{stage.name}` takes about {needed / 60:.0f} minutes on {stage.where}"
            message = f"{words}, its timeout is {stage.timeout_s / 60:.0f}"
            return Verdict(f"{stage.name}.timeout", message, f"write `timeout: {minutes}m` under `{stage.name}`")
    return None


def budget_within_settings(subject: Subject) -> Verdict | None:
    """The budget stays within the repository's cap

    Why: `tool.mergetune.max_usd_per_run` is the owner's limit, above any experiment's.
    Fix: Lower `budget.max_usd`, or have the owner raise the cap.
    """
    cap = subject.settings.max_usd_per_run
    budget = subject.file.experiment.budget.max_usd
    if budget <= cap:
        return None
    return Verdict("budget.max_usd", f"${budget:.2f} is above this repository's cap", f"write `max_usd: {cap:g}`")


def _key_of(subject: Subject, path: str) -> str:
    """The dotted key that names `path`."""
    experiment = subject.file.experiment
    evaluate, held_out = experiment.evaluate, experiment.data.eval
    named = {"base.model": experiment.base.model, "data.dataset": experiment.data.dataset}
    named |= {"train.script": experiment.train.script or "", "evaluate.prompts": (evaluate and evaluate.prompts) or ""}
    named |= {"train.mlx.base": mlx_base(experiment) or ""}
    named |= {"data.eval.dataset": (held_out and held_out.dataset) or ""}
    return next(key for key, value in named.items() if value == path)
