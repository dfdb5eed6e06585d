"""The open sections of the plan comment: stages, data, findings, changes, next commands. Decides and posts nothing."""

import shlex
from collections.abc import Sequence, Set

from pipeline.dataset_facts import DatasetFacts, Lines, TokenFacts
from pipeline.errors import Finding, redact
from pipeline.experiment import Experiment, Method
from pipeline.facts import Facts
from pipeline.markdown import code, details, fence, money, percent, plural, prose, table
from pipeline.plan import Stage, StageName
from pipeline.plan_changes import Changes, EstimateChange, FieldChange
from pipeline.plan_preview import Preview, expected_cost, expected_time, held_out_rows, span_of, timeout_words
from pipeline.progress import duration

FINDINGS, FIELDS, VALUE = 25, 40, 120  # shown of each; characters of one value
SENTENCE = 500  # characters of one message
ESTIMATES = {
    "memory_gib": "memory",
    "expected_s": "time",
    "expected_usd": "cost",
    "worst_usd": "at most",
}


def stages_section(preview: Preview) -> str:
    """One row a stage, and their sums where there are several."""
    if preview.plan is None:
        return ""
    plan, stages = preview.plan, preview.plan.stages
    shows_memory = any(_memory(stage) for stage in stages)
    rows = [_stage_row(stage) for stage in stages]
    if len(stages) > 1:
        span = span_of(stages)
        whole = f"~{duration(span.expected)}" if span else "not known"
        cost = "not known" if plan.expected_usd is None else money(plan.expected_usd)
        timeout = duration(sum(stage.timeout_s for stage in stages if not stage.flavor.local))
        rows.append(("**all**", "", "", f"**{whole}**", timeout, f"**{cost}**", f"**{money(plan.worst_usd)}**"))
    head = ("stage", "flavor", "memory", "expected time", "timeout", "expected cost", "at most")
    if shows_memory:
        return table(head, rows, "llrrrrr")
    return table((*head[:2], *head[3:]), [(*row[:2], *row[3:]) for row in rows], "llrrrr")


def data_section(preview: Preview) -> str:
    """Rows and tokens, then what is wrong with them; says so where nothing was counted."""
    experiment, facts = preview.experiment, preview.facts
    if experiment is None:
        return ""
    heading = f"### Data: {code(experiment.data.dataset)}"
    if facts.dataset is None or facts.dataset.tokens is None:
        return f"{heading}\n\n{_not_counted(facts)}"
    dataset, tokens = facts.dataset, facts.dataset.tokens
    about = "" if dataset.exact else "~"
    row = (
        f"{dataset.training_rows:,}",
        f"{held_out_rows(dataset):,}",
        f"{about}{tokens.total:,}",
        f"{about}{percent(tokens.trained, tokens.total)}",
        f"{about}{tokens.longest:,} of {experiment.train.max_length:,}",
        f"{about}{tokens.lost:,}",
    )
    head = ("rows", "held out", "tokens a pass", "trained on", "longest row", "tokens cut off")
    notes = _data_notes(experiment, dataset, tokens, {finding.rule for finding in preview.findings})
    return "\n\n".join([heading, table(head, [row], "rrrrrr"), *(["\n".join(notes)] if notes else [])])


def findings_section(preview: Preview) -> str:
    """Errors, then warnings, each with its place, its rule and its hint."""
    errors, warnings = preview.errors, preview.warnings
    if not errors and not warnings:
        return ""
    counts = [plural(len(errors), "error")] if errors else []
    counts += [plural(len(warnings), "warning")] if warnings else []
    listed = [*errors, *warnings]
    lines = [_finding(finding) for finding in listed[:FINDINGS]]
    if len(listed) > FINDINGS:
        lines.append(f"- and {len(listed) - FINDINGS:,} more: `mergetune check` lists them")
    return f"### {', '.join(counts).capitalize()}\n\n" + "\n".join(lines)


def changes_section(preview: Preview) -> str:
    """Fields and estimates that differ from the previous run, and whether this is another run at all."""
    heading = "### Against the previous run"
    if preview.not_compared:
        return f"{heading}\n\nNot compared: {prose(_short(preview.not_compared))}"
    changes = preview.changes
    if changes is None:
        return ""
    heading += f" {code(changes.before.run_id)}" if changes.before else ""
    parts = [heading, " ".join(words for words in (_same_words(changes), _moved(changes)) if words)]
    # The reviewer's question is what changes the result; the rest is in the tables above already, or in the settings.
    deciding = [change for change in changes.fields if change.decides or change.written]
    others = [change for change in changes.fields if change not in deciding]
    if deciding:
        parts.append(_field_table(deciding))
    if others:
        parts.append(details(f"{plural(len(others), 'field')} that do not decide the result", _field_table(others)))
    return "\n\n".join(parts)


def next_section(preview: Preview) -> str:
    """Commands for whoever wants to know more, and what an approval approves."""
    path = shlex.quote(preview.path)
    commands = [(f"mergetune check {path}", "every rule, with file, line and hint")]
    if preview.plan is not None and not preview.errors:
        commands = [(f"mergetune rehearse {path}", "the whole chain on your CPU, on a tiny twin of the base")]
    if preview.plan is not None and preview.facts.shape is not None and preview.plan.stages[0].flavor.gpu:
        commands.append((f"mergetune fit {path}", "which flavors fit at which max_length"))
    width = max(len(command) for command, _ in commands)
    shell = fence("\n".join(f"{command:<{width}}  # {why}" for command, why in commands), "sh")
    return "\n\n".join(["### Next", shell, *_approved(preview)])


def _approved(preview: Preview) -> list[str]:
    """Which stages, at which worst price, writing where: what this plan asks leave for."""
    plan = preview.plan
    if plan is None or preview.errors:
        return []
    order = " → ".join(stage.name for stage in plan.stages)
    output = plan.experiment.output
    places = {
        StageName.TRAIN: output.repo if plan.experiment.train.method is Method.FULL else f"{output.repo}-adapter",
        StageName.MERGE: output.repo,
        StageName.GGUF: f"{output.repo}-GGUF",
    }
    written = ", ".join(code(places[stage.name]) for stage in plan.stages if stage.name in places)
    seen = "private" if output.private else "**public**"
    return [f"An approval covers: {order}, at most {money(plan.worst_usd)}, written to {written} ({seen})."]


def _stage_row(stage: Stage) -> tuple[str, ...]:
    times = expected_time(stage), timeout_words(stage)
    return (
        str(stage.name),
        stage.where,
        _memory(stage),
        *times,
        expected_cost(stage),
        money(stage.cost.worst_usd),
    )


def _memory(stage: Stage) -> str:
    found = stage.traced or stage.memory
    if found is None or stage.flavor.gpu is None:
        return ""
    return f"{found.total:.1f} of {stage.flavor.vram_gib:g} GiB{stage.parallel.words}"


def _not_counted(facts: Facts) -> str:
    """What is known of rows whose tokens were not counted."""
    if facts.dataset is not None:
        why = f" ({prose(_short(facts.dataset.estimated))})" if facts.dataset.estimated else ""
        return f"{plural(facts.dataset.rows, 'row')}; their tokens could not be counted{why}."
    return "Not counted: these rows were not read. How long training takes depends on them."


def _data_notes(experiment: Experiment, dataset: DatasetFacts, tokens: TokenFacts, said: Set[str]) -> list[str]:
    """One line for each thing about the rows that a reviewer may want to change, less what a finding says."""
    length, over = experiment.train.max_length, tokens.over_limit
    lost = f"{tokens.lost:,} tokens ({percent(tokens.lost, tokens.uncut)}) are cut off"
    troubles = (
        ("DAT007", over, f"longer than `max_length: {length}`: {_rows(over)}; {lost}"),
        ("DAT008", tokens.dropped, f"dropped, with no token left to train on: {_rows(tokens.dropped)}"),
        ("DAT010", dataset.duplicates, f"the same as an earlier row: {_rows(dataset.duplicates)}"),
        ("DAT014", dataset.same, f"pairs of two equal answers, left out: {_rows(dataset.same)}"),
        ("DAT011", dataset.leaked, f"in the held-out file too: {_rows(dataset.leaked)}"),
    )
    notes = [f"- {words}" for rule, lines, words in troubles if lines.count and rule not in said]
    if dataset.exact and not any(lines.count for _, lines, _ in troubles):
        notes.append("Every row was counted: nothing is cut off, no row repeats.")
    if not dataset.exact and dataset.estimated:
        notes.append(f"- counts are estimates: {prose(_short(dataset.estimated))}")
    return notes


def _rows(lines: Lines) -> str:
    """`31 rows (lines 3, 17, …)`."""
    shown = ", ".join(f"{line:,}" for line in lines.first) + (", …" if lines.count > len(lines.first) else "")
    return f"{plural(lines.count, 'row')} ({'line' if lines.count == 1 else 'lines'} {shown})"


def _finding(finding: Finding) -> str:
    place = f"{finding.at.path}:{finding.at.line}" if finding.at.line else finding.at.path
    head = f"- **{finding.severity}** {code(finding.rule)} {code(place)}: {prose(_short(finding.message))}"
    return f"{head}\n  - hint: {prose(_short(finding.hint))}" if finding.hint else head


def _same_words(changes: Changes) -> str:
    if changes.same_run is True:
        return "**The same run**: nothing that decides the result changes."
    if changes.same_run is False:
        return "**A new run**: what decides the result changes."
    paths = ", ".join(code(path) for path in changes.not_compared)
    return f"No field that decides the result changes; what {paths} held before is not known here."


def _field_table(changes: Sequence[FieldChange]) -> str:
    rows = [_field_row(change) for change in changes[:FIELDS]]
    shown = table(("field", "before", "now", "the result"), rows, "llll")
    return shown if len(changes) <= FIELDS else f"{shown}\n\n{len(changes) - FIELDS:,} more fields differ."


def _moved(changes: Changes) -> str:
    """The estimates that read differently now, in a sentence."""
    if not changes.estimates:
        return ""
    moved = [words for estimate in changes.estimates if (words := _estimate(estimate))]
    return f"Expected: {', '.join(moved)}." if moved else "No estimate changes."


def _field_row(change: FieldChange) -> tuple[str, ...]:
    before, now = ("" if text is None else code(text, VALUE) for text in (change.before, change.after))
    match change.written:
        case "now":
            return code(change.field), f"{before} by default", f"{now} written", "same value, new run"
        case "before":
            return code(change.field), f"{before} written", f"{now} by default", "same value, new run"
        case "":
            return code(change.field), before, now, "**changes**" if change.decides else "stays the same"


def _estimate(estimate: EstimateChange) -> str:
    """`cost $4.40 → $8.20`, empty when both sides read the same."""
    before, after = _amount(estimate.name, estimate.before), _amount(estimate.name, estimate.after)
    return "" if before == after else f"{ESTIMATES[estimate.name]} {before} → {after}"


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return "not known"
    if name.endswith("_gib"):
        return f"{value:.1f} GiB"
    return duration(value) if name.endswith("_s") else money(value)


def _short(text: str) -> str:
    """A sentence of bounded length. Redacted first: half a token is not recognised as one."""
    text = redact(text)
    return text if len(text) <= SENTENCE else f"{text[: SENTENCE - 1]}…"
