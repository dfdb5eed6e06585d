"""Rules about timeouts beyond the money (pipeline/rules/experiment.py): was the limit chosen, or only inherited?"""

from pipeline.plan import make_plan
from pipeline.rules.experiment import flavors_exist
from pipeline.rules.rule import Subject, Verdict

# What Hugging Face Jobs takes when none is sent; also what its examples show. We always send one: `train.timeout` has
# no default in the schema, and the stages after it have one hour.
SERVER_DEFAULT_S = 30 * 60
USUAL_MINUTES = 4 * 60


def timeout_is_chosen(subject: Subject) -> Verdict | None:
    """Training gets more than the server's 30 minutes, or is known to need less

    Why: 30 minutes is what a job gets when nobody chose; most trainings are killed by it, and paid for. It is fine
    where the estimate says so, and there is no estimate for a dataset or a base that is not at hand.
    Fix: A timeout for this training; the hint's stays within the budget.
    """
    if flavors_exist(subject) or subject.facts.missing:
        return None
    plan = make_plan(subject.file.experiment, subject.facts)
    train = plan.stages[0]
    if train.timeout_s != SERVER_DEFAULT_S or train.cost.needed_s is not None:
        return None
    message = "`timeout: 30m` is the server's default, and how long this training takes is not known"
    left = subject.file.experiment.budget.max_usd - (plan.worst_usd - train.cost.worst_usd)
    minutes = min(USUAL_MINUTES, int(left / train.usd_per_minute))
    if minutes <= SERVER_DEFAULT_S // 60:
        cost = plan.worst_usd - train.cost.worst_usd + USUAL_MINUTES * train.usd_per_minute
        return Verdict("train.timeout", message, f"write `timeout: 4h`, and `max_usd: {cost:.2f}` under `budget`")
    return Verdict("train.timeout", message, f"write `timeout: {minutes}m` under `train`")
