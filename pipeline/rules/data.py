"""Rules about data files of this repository: does training read every row, and learn from it what was meant?"""

from pipeline.dataset_facts import DatasetFacts, Issues, Lines, Problem
from pipeline.errors import Severity
from pipeline.experiment import LossOn
from pipeline.fields import is_path, rows_at_once
from pipeline.rows import FORMATS, PAIRS
from pipeline.rules.rule import Subject, Verdict


def rows_are_json(subject: Subject) -> Verdict | None:
    """Every line of a data file is JSON

    Why: Training stops at the first line it cannot parse, after a machine was started and the base downloaded.
    Fix: Correct the lines named; a file has one JSON object per line, in UTF-8.
    """
    return _refused(subject, Problem.JSON)


def rows_have_a_format(subject: Subject) -> Verdict | None:
    """Every row has the columns of a known format

    Why: Columns with other names (`instruction`, `output`) are not guessed: a wrong guess trains on the wrong text.
    Preference tuning learns from pairs of answers, every other method from one answer.
    Fix: Write `messages`, `prompt` + `completion`, `conversations` or `text`; with `method: dpo` `prompt` + `chosen` +
    `rejected`, or whole conversations as `chosen` + `rejected`.
    """
    for key, facts in _files(subject):
        if facts.rows == 0:
            known = PAIRS if subject.file.experiment.train.is_dpo else FORMATS
            return Verdict(key, f"`{facts.path}` holds no rows", f"write at least one row of {known}")
    return _refused(subject, Problem.FORMAT)


def rows_share_a_format(subject: Subject) -> Verdict | None:
    """All rows of a file have the same format

    Why: Rows of another format would get another loss, and training refuses the file.
    Fix: Convert the rows named, or put them into a file of their own.
    """
    return _refused(subject, Problem.MIXED)


def rows_have_roles(subject: Subject) -> Verdict | None:
    """Every conversation has known roles, in an order that the base's chat template accepts

    Why: Templates of Gemma and Mistral raise at a conversation that does not alternate; training stops there.
    Fix: Merge neighbouring turns of one speaker, start with the user, and end with the assistant.
    """
    refused = _refused(subject, Problem.ROLES, Problem.TEMPLATE)
    if refused:
        return refused
    for key, facts in _files(subject):
        if facts.estimated and facts.not_alternating.count:
            message = f"{_named(facts, facts.not_alternating)} not in turns of user and assistant"
            hint = "merge neighbouring turns of one speaker, or use a base in this repository to try its chat template"
            return Verdict(key, message, hint, Severity.WARNING)
    return None


def rows_have_content(subject: Subject) -> Verdict | None:
    """No message or text is empty

    Why: An empty answer teaches the model to say nothing; a null is rendered as the word `None` by some templates.
    Fix: Write the text, or remove the row.
    """
    return _refused(subject, Problem.CONTENT)


def base_has_a_chat_template(subject: Subject) -> Verdict | None:
    """A base that learns from conversations has a chat template

    Why: Without one nothing says how a conversation becomes text, and training refuses the rows.
    Fix: Use the instruction-tuned base, or write `text` rows.
    """
    facts = subject.facts.dataset
    if facts is None or not facts.is_chat or facts.has_template is not False:
        return None
    message = f"`{facts.path}` holds conversations, and the base has no chat template"
    return Verdict("base.model", message, "use the instruction-tuned base, or write `text` rows")


def rows_fit_max_length(subject: Subject) -> Verdict | None:
    """Rows fit `max_length`

    Why: What lies beyond is cut off, and with it the end of the answers. Losing more than half of all tokens is
    an error.
    Fix: Raise `max_length` to the longest row, or split the rows.
    """
    facts, limit = subject.facts.dataset, subject.file.experiment.train.max_length
    if facts is None or facts.tokens is None or not facts.tokens.over_limit.count or not facts.tokens.sequences:
        return None
    tokens = facts.tokens
    part = 100 * tokens.lost / tokens.uncut
    message = f"{_named(facts, tokens.over_limit)} longer than `max_length: {limit}`: {tokens.lost:,} tokens are lost"
    message += f" ({part:.0f} %{_estimated(facts)})"
    severity = Severity.ERROR if 2 * tokens.lost > tokens.uncut else Severity.WARNING
    return Verdict("train.max_length", message, f"write `max_length: {tokens.longest}`, or split those rows", severity)


def rows_keep_their_loss(subject: Subject) -> Verdict | None:
    """Every row has something to learn within `max_length`

    Why: A row whose prompt alone fills `max_length` is dropped without a trace in the loss.
    Fix: Raise `max_length`, or shorten the prompts.
    """
    facts, train = subject.facts.dataset, subject.file.experiment.train
    if facts is None or facts.tokens is None or not facts.tokens.dropped.count:
        return None
    tokens = facts.tokens
    left = f"no token with a loss (`loss_on: {train.loss_on}`) is left"
    if train.is_dpo:
        left = "an answer of the pair has no token left"
    message = f"{_named(facts, tokens.dropped)} dropped: {left} within `max_length: {train.max_length}`"
    message += _estimated(facts)
    cut = tokens.longest > train.max_length
    hint = f"write `max_length: {tokens.longest}`" if cut else "write answers into those rows, or `loss_on: all`"
    return Verdict("train.max_length", message, hint, Severity.WARNING if tokens.sequences else Severity.ERROR)


def loss_has_turns(subject: Subject) -> Verdict | None:
    """`loss_on` can be honoured by the rows

    Why: A `text` row does not say which part of it is the answer.
    Fix: Write `loss_on: all`, or rows of `prompt` + `completion` or `messages`.
    """
    loss_on = subject.file.experiment.train.loss_on
    for _, facts in _files(subject):
        if facts.format == "text" and loss_on is not LossOn.ALL:
            message = f"`{facts.path}` has `text` rows without turns, so `loss_on: {loss_on}` cannot be honoured"
            return Verdict("train.loss_on", message, "write `loss_on: all`, or rows of `prompt` + `completion`")
    return None


def answers_differ(subject: Subject) -> Verdict | None:
    """Both answers of a pair differ

    Why: Where `chosen` and `rejected` are the same there is nothing to prefer; training leaves such pairs out.
    Fix: Remove them, or write an answer that is worse.
    """
    for key, facts in _files(subject):
        if facts.same.count:
            every = facts.same.count == facts.rows
            message = f"{_named(facts, facts.same)} left out: `chosen` and `rejected` are the same"
            hint = f"write another `rejected`, or remove {_those(facts.same)}"
            return Verdict(key, message, hint, Severity.ERROR if every else Severity.WARNING)
    return None


def rows_are_unique(subject: Subject) -> Verdict | None:
    """No row stands twice

    Why: A repeated row is learned by heart, and a copy of it among the held-out rows makes their loss look better.
    Fix: Remove the copies.
    """
    for key, facts in _files(subject):
        if facts.duplicates.count:
            message = f"{_named(facts, facts.duplicates)} the same as an earlier row"
            return Verdict(key, message, f"remove {_those(facts.duplicates)}", Severity.WARNING)
    return None


def eval_rows_are_unseen(subject: Subject) -> Verdict | None:
    """No held-out row is trained on

    Why: The held-out loss then measures memory, and the comparison before and after is worth nothing.
    Fix: Remove the rows from one of the two files.
    """
    facts = subject.facts.dataset
    if facts is None or facts.eval_file is None or not facts.leaked.count:
        return None
    message = f"{_named(facts, facts.leaked)} also in `{facts.eval_file.path}`"
    return Verdict("data.eval.dataset", message, f"remove {_those(facts.leaked)} from `{facts.path}`")


def rows_fill_a_batch(subject: Subject) -> Verdict | None:
    """There are enough rows for one optimizer step

    Why: With fewer rows than `batch_size` x `gradient_accumulation` a pass is one short step, and the learning rate,
    chosen for a full batch, does not fit.
    Fix: Lower `gradient_accumulation` or `batch_size`, or add rows.
    """
    facts, train = subject.facts.dataset, subject.file.experiment.train
    if facts is None or not facts.training_rows or facts.issues:
        return None
    rows = facts.tokens.sequences if facts.tokens and facts.tokens.sequences else facts.training_rows
    if train.packing and facts.tokens:
        rows = max(1, facts.tokens.total // train.max_length)
    at_once = rows_at_once(train.batch_size)
    step = at_once * train.gradient_accumulation
    if rows >= step:
        return None
    said = f"`batch_size: {train.batch_size}` x `gradient_accumulation: {train.gradient_accumulation}`"
    message = (
        f"`{facts.path}` gives {rows} {'packed ' if train.packing else ''}training rows, a step takes {step} ({said})"
    )
    if rows < at_once:
        return Verdict("train.batch_size", message, f"write `batch_size: {rows}` and `gradient_accumulation: 1`")
    hint = f"write `gradient_accumulation: {rows // at_once}`"
    return Verdict("train.gradient_accumulation", message, hint)


def split_leaves_rows(subject: Subject) -> Verdict | None:
    """Holding rows out leaves rows to train on

    Why: At least one row is held out, so a file of one row has none left; a single file has no splits to choose from.
    Fix: Add rows, remove `data.eval`, or name a second file as `data.eval.dataset`.
    """
    facts, held_out = subject.facts.dataset, subject.file.experiment.data.eval
    if facts is None or held_out is None:
        return None
    if held_out.split is not None and is_path(subject.file.experiment.data.dataset):
        message = f"`split: {held_out.split}`, but `{facts.path}` is one file without splits"
        return Verdict("data.eval.split", message, "write `eval: {fraction: 0.05}`, or a second file as `dataset`")
    if held_out.fraction is None or facts.training_rows or not facts.rows or facts.issues:
        return None
    message = f"`fraction: {held_out.fraction:g}` of {facts.rows} rows leaves nothing to train on"
    return Verdict("data.eval.fraction", message, f"add rows to `{facts.path}`, or remove `eval`")


def _files(subject: Subject) -> list[tuple[str, DatasetFacts]]:
    """The training file and the held-out file, each with the key that names it."""
    facts = subject.facts.dataset
    if facts is None:
        return []
    return [("data.dataset", facts)] + ([("data.eval.dataset", facts.eval_file)] if facts.eval_file else [])


def _refused(subject: Subject, *problems: Problem) -> Verdict | None:
    """The first rows that training refuses for one of these problems."""
    for key, facts in _files(subject):
        if found := facts.issue(*problems):
            return Verdict(key, f"`{facts.path}:{found.first[0].line}`: {_issue(found)}", found.first[0].hint)
    return None


def _issue(found: Issues) -> str:
    """The first row's fault, and where the others are."""
    others = [str(issue.line) for issue in found.first[1:]]
    if not others:
        return found.first[0].message
    more = found.count - len(found.first)
    where = ", ".join(others) + (f" and {more} more" if more else "")
    return f"{found.first[0].message} ({found.count} rows in all: also {where})"


def _named(facts: DatasetFacts, lines: Lines) -> str:
    """`data.jsonl` with the first lines, and the verb that fits their number."""
    shown = ", ".join(str(line) for line in lines.first)
    if lines.count == 1:
        return f"`{facts.path}:{shown}` is"
    more = lines.count - len(lines.first)
    return f"{lines.count} rows of `{facts.path}` ({shown}{f' and {more} more' if more else ''}) are"


def _those(lines: Lines) -> str:
    return f"line {lines.first[0]}" if lines.count == 1 else "those rows"


def _estimated(facts: DatasetFacts) -> str:
    return f", estimated: {facts.estimated}" if facts.estimated else ""
