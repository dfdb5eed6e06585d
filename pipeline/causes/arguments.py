"""Causes of failure in what the trainer is told: arguments, values, numbers, evaluation."""

from pipeline.causes.cause import Cause, Weight

STRONG = Weight.STRONG
CAUSES = (
    Cause(
        "bad-argument",
        "a library does not know the argument `{argument}`",
        (
            "got an unexpected keyword argument '{argument}'",
            "error: unrecognized arguments: {argument}",
            "got an unexpected keyword argument {argument}",
            "are not used by the HfArgumentParser: ['{argument}'",
            "got multiple values for keyword argument '{argument}'",
            "got multiple values for argument '{argument}'",
            "No such option: {argument}",
        ),
        "remove or rename `{argument}`, in `train.sft` or in the script: `mergetune check {path}` says what it is now",
        rule="TRN001",
        weight=STRONG,
    ),
    Cause(
        "missing-argument",
        "a library misses the argument `{argument}`",
        (
            "missing 1 required positional argument: '{argument}'",
            "missing 1 required keyword-only argument: '{argument}'",
            "required positional arguments: '{argument}'",
            "error: the following arguments are required: {argument}",
        ),
        "give it, or pin the versions that the script was written for",
        rule="SCR007",
    ),
    Cause(
        "bad-value",
        "a setting has a value that the trainer does not know: `{value}`",
        (
            "{value} is not a valid OptimizerNames",
            "{value} is not a valid SchedulerType",
            "{value} is not a valid IntervalStrategy",
            "{value} is not a valid SaveStrategy",
            "{value} is not a valid HubStrategy",
            "{value} is not supported, only ",
            "argument {value}: invalid choice:",
            "Unknown split strategy {value}",
            "Unknown loss type: {value}",
            "Unknown loss_type {value}",
            "is not one of the allowed values: {value}",
        ),
        "mend it in `train.sft`: `mergetune check {path}` knows the allowed ones",
        rule="TRN003",
        weight=STRONG,
    ),
    Cause(
        "number-as-text",
        "a number was read as text: YAML takes `2e-4` for a word",
        (
            "not supported between instances of 'float' and 'str'",
            "not supported between instances of 'str' and 'float'",
            "not supported between instances of 'str' and 'int'",
            "not supported between instances of 'int' and 'str'",
            "unsupported operand type(s) for *: 'float' and 'str'",
            "Invalid learning rate: ",
        ),
        "write it with a point (`2.0e-4`), or put it into the experiment, whose schema reads numbers",
        rule="TRN003",
    ),
    Cause(
        "eval-settings",
        "the settings ask to evaluate or to save in a way that does not go together",
        (
            "but you didn't pass an `eval_dataset`",
            "Trainer: evaluation requires an eval_dataset",
            "requires the save and eval strategy to match",
            "the saving steps to be a round multiple of the evaluation steps",
            "early stopping requires metric_for_best_model",
            "EarlyStoppingCallback requires",
            "The `metric_for_best_model` training argument is set to",
        ),
        "set `data.eval`, or remove the evaluation from `train.sft`",
        rule="TRN003",
        weight=STRONG,
    ),
)
