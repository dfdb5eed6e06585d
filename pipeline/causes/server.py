"""Causes that the server of jobs names itself, in a job's message or cancel reason; read in lower case."""

from pipeline.causes.cause import Cause, Weight

CAUSES = (
    Cause(
        "job-timeout",
        "the job ran into its timeout",
        ("job timeout", "job timed out", "due to time limit", "deadlineexceeded"),
        "raise `{stage}.timeout`, then `mergetune retry {name}`",
        rule="TIM003",
        weight=Weight.STRONG,
    ),
    Cause(
        "no-credit",
        "no credit is left",
        ("no_credits", "no_subscription"),
        "add credit to `{namespace}`, then `mergetune retry {name}`",
        rule="HUB013",
        weight=Weight.STRONG,
    ),
    Cause(
        "resource-limit",
        "the resource group's limit is reached",
        ("resource_group_limit",),
        "raise it, then `mergetune retry {name}`",
        weight=Weight.STRONG,
    ),
    Cause(
        "machine-lost",
        "the machine was lost",
        ("node lost", "node was lost", "preempt", "evicted", "hardware fail", "hardware fault"),
        "",
        transient=True,
        weight=Weight.STRONG,
    ),
)
