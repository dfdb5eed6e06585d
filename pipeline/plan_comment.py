"""The plan comment of a pull request: the decision first, what it rests on below, details folded. Posts nothing."""

from dataclasses import dataclass

from pipeline.hypothesis import read_claims
from pipeline.mac_words import mac_section
from pipeline.markdown import code, details, money, plural, quote
from pipeline.plan import Plan, Stage
from pipeline.plan_changes import plan_hash
from pipeline.plan_details import estimate_basis, flavors_that_fit, memory_parts, settings_written
from pipeline.plan_preview import Preview, Verdict, span_of, verdict_of
from pipeline.plan_sections import changes_section, data_section, findings_section, next_section, stages_section
from pipeline.preferences import method_words
from pipeline.progress import duration
from pipeline.sweep_sections import variants_section

LIMIT = 60_000  # characters; GitHub refuses a comment of more than 65,536
MARKS = {True: "✅", None: "⚠️", False: "❌"}


@dataclass(frozen=True)
class Section:
    """A part of the comment that can be left out as a whole, under the name the reader is told."""

    name: str
    text: str


def plan_comment(preview: Preview, limit: int = LIMIT) -> str:
    """The whole comment, at most `limit` characters: a section that does not fit is left out, and named at the end."""
    opening = "\n\n".join(part for part in (marker(preview), *_opening(preview)) if part)
    return _within(opening, [section for section in _sections(preview) if section.text], limit, preview.path)


def marker(preview: Preview) -> str:
    """The hidden first line by which a later tick finds its own comment, and what was reviewed in it.

    `memory=traced`: a trace has shown that the training fits. A tick cannot trace, and takes it from here.
    """
    fingerprint = preview.plan.fingerprint if preview.plan else "none"
    approved = plan_hash(preview.plan) if preview.plan else "none"
    train = preview.plan.stages[0] if preview.plan else None
    fits = " memory=traced" if train and train.traced and train.traced.fits(train.flavor) else ""
    return f"<!-- mergetune:plan:{preview.name} fingerprint={fingerprint}{fits} plan={approved} -->"


def _opening(preview: Preview) -> list[str]:
    good, words = _decision(preview)
    heading = f"## {MARKS[good]} {words}"
    if preview.experiment is None or preview.plan is None:
        hypothesis = quote(preview.experiment.hypothesis) if preview.experiment else ""
        return [heading, f"{_counted(preview).capitalize()}; no plan can be made of {code(preview.path)}.", hypothesis]
    said = preview.experiment.hypothesis
    return [heading, _verdict_line(preview, preview.plan), quote(said), _held_to(said), _what(preview.plan)]


def _held_to(hypothesis: str) -> str:
    """How the results will read it: a reviewer can still have it said more clearly."""
    claims = ", ".join(f"**{claim}**" for claim in read_claims(hypothesis))
    return f"The results will hold it to {claims}." if claims else ""


def _decision(preview: Preview) -> tuple[bool | None, str]:
    """What the reviewer reads first: good, bad or not known, and why in a few words."""
    name = code(preview.name)
    if preview.experiment is None:
        return False, f"{name} is not a valid experiment"
    if preview.plan is None:
        return False, f"{name} cannot run: {plural(len(preview.errors), 'error')}"
    train = preview.plan.stages[0]
    flavor = f"`{train.flavor.name}`"
    match verdict_of(train):
        case Verdict.DOES_NOT_FIT:
            return False, f"{name} does not fit {flavor}"
        case _ if preview.errors:
            return False, f"{name} cannot run: {plural(len(preview.errors), 'error')}"
        case Verdict.MAY_NOT_FIT:
            return None, f"{name} may not fit {flavor}"
        case Verdict.LOCAL:
            words = f"{name} trains on a Mac with MLX"
            known = span_of(preview.plan.stages) is not None
            return True if known else None, words if known else f"{words}; how long depends on its chip"
        case Verdict.UNKNOWN:
            return None, f"{name}: whether it fits {flavor} cannot be known"
        case Verdict.FITS | Verdict.NO_GPU as known:
            words = f"fits {flavor}" if known is Verdict.FITS else f"trains on {flavor}, without a GPU"
            if span_of(preview.plan.stages) is None:
                return None, f"{name} {words}; its duration cannot be known"
            return True, f"{name} {words}"


def _verdict_line(preview: Preview, plan: Plan) -> str:
    """Cost, duration with its band, memory against the GPU, and how many findings: one line."""
    train, span = plan.stages[0], span_of(plan.stages)
    cost = "cannot be known" if plan.expected_usd is None else f"{money(plan.expected_usd)} expected"
    parts = [
        f"**Cost** {cost}, at most {money(plan.worst_usd)} of a {money(plan.experiment.budget.max_usd)} budget",
        f"**Time** {_time_words(span.expected, span.low, span.high)}" if span else _time_unknown(plan),
    ]
    if train.flavor.gpu is not None:
        parts.append(f"**Memory** {_memory_words(train)} of {train.flavor.vram_gib:g} GiB")
    return " · ".join([*parts, _counted(preview)])


def _memory_words(train: Stage) -> str:
    memory = train.memory
    if train.traced is not None:
        beside = f" (closed form {memory.total:.1f})" if memory else ""
        return f"{train.traced.total:.1f} GiB, traced{beside}"
    return "cannot be known" if memory is None else f"{memory.total:.1f} GiB ({memory.low:.1f} to {memory.high:.1f})"


def _time_words(expected: float, low: float, high: float) -> str:
    return f"about {duration(expected)} ({duration(low)} to {duration(high)})"


def _time_unknown(plan: Plan) -> str:
    if plan.stages[0].flavor.local:
        return "**Time** depends on the chip"
    return f"**Time** cannot be known, at most {duration(sum(stage.timeout_s for stage in plan.stages))}"


def _counted(preview: Preview) -> str:
    errors, warnings = len(preview.errors), len(preview.warnings)
    if not errors and not warnings:
        return "no findings"
    counted = [plural(errors, "error")] if errors else []
    return ", ".join(counted + ([plural(warnings, "warning")] if warnings else []))


def _what(plan: Plan) -> str:
    """What is trained on what, and where it goes."""
    experiment = plan.experiment
    seen = "private" if experiment.output.private else "public"
    return (
        f"{method_words(experiment.train)} of {code(experiment.base.model)} on {code(experiment.data.dataset)}, "
        f"into {code(experiment.output.repo)} ({seen})."
    )


def _sections(preview: Preview) -> list[Section]:
    return [
        Section("stages", stages_section(preview)),
        Section("variants", variants_section(preview.plan) if preview.plan else ""),
        Section("training with MLX", mac_section(preview.plan, preview.facts, preview.path) if preview.plan else ""),
        Section("data", data_section(preview)),
        Section("findings", findings_section(preview)),
        Section("changes", changes_section(preview)),
        Section("memory by part", _folded("Memory of training, by part", memory_parts(preview))),
        Section("flavors", _folded("Flavors that fit", flavors_that_fit(preview))),
        Section("basis of the estimates", _folded("What the estimates rest on", estimate_basis(preview))),
        Section("settings", _folded("Every setting, defaults included", settings_written(preview))),
        Section("next commands", next_section(preview)),
    ]


def _folded(summary: str, body: str) -> str:
    return details(summary, body) if body else ""


def _within(opening: str, sections: list[Section], limit: int, path: str) -> str:
    """The opening and every section that there is room for, in order."""

    def closing(names: list[str]) -> str:
        listed = ", ".join(names)
        return f"Left out, to stay under {limit:,} characters: {listed}. See `mergetune check` and {code(path)}."

    room = limit - len(opening) - 1 - len("\n\n" + closing([section.name for section in sections]))
    kept, cut = [opening], []
    for section in sections:
        if len(section.text) + 2 <= room:
            kept.append(section.text)
            room -= len(section.text) + 2
        else:
            cut.append(section.name)
    return "\n\n".join([*kept, *([closing(cut)] if cut else [])]) + "\n"
