"""The texts that follow a run on a pull request, and the answers to commands. Posts nothing.

The plan and the results have files of their own: `plan_comment.py`, `result_comment.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.curve_notes import notes
from pipeline.live import Live
from pipeline.loss_chart import loss_lines, read_curve
from pipeline.markdown import code, defang, money, percent, prose, table
from pipeline.plan import StageName
from pipeline.progress import duration
from pipeline.pull_request import marker_of

LOGIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,38})")
STRIP = {"done": "●", "now": "◐", "next": "○", "failed": "✗"}
CHECKS_START, CHECKS_END = "<!-- mergetune:checklist -->", "<!-- /mergetune:checklist -->"
COMMANDS = (
    ("/plan", "check and plan again; on a merged pull request, review the new plan"),
    ("/status", "where the runs of this pull request stand"),
    ("/cancel NAME", "stop every job of an experiment and close its run"),
    ("/retry NAME", "reopen a closed run: it goes on from its last artifact or checkpoint"),
    ("/help", "this table"),
)


@dataclass(frozen=True)
class RunView:
    """Where one run stands. `stages` are those of its plan with a word of `STRIP` each; `live`: it is not over.

    `job` is what the log of its job says, `usd` what that job has cost so far and `most_usd` may cost.
    """

    name: str
    run_id: str
    headline: str
    stages: tuple[tuple[StageName, str], ...] = ()
    text: str = ""
    hint: str = ""
    job_url: str = ""
    node_urls: tuple[str, ...] = ()  # of the other nodes' jobs
    live: bool = True
    job: Live | None = None
    usd: float | None = None
    most_usd: float | None = None
    learning_rate: float | None = None


def run_key(name: str) -> str:
    """The key of the comment that says where an experiment's run stands."""
    return f"run:{name}"


def _job_links(view: RunView) -> str:
    """The job, and where there are several nodes each of them by its number."""
    words = ["log and machine of the job", *(f"of node {n}" for n in range(2, len(view.node_urls) + 2))]
    links = zip(words, (view.job_url, *view.node_urls), strict=True)
    return " · ".join(f"[{word}]({url})" for word, url in links if re.fullmatch(r"https?://[^\s()<>]+", url))


def run_comment(view: RunView) -> str:
    """The comment that is edited while a run goes on. It names no moment: it changes when the run does."""
    strip = " → ".join(f"{STRIP[word]} {stage}" for stage, word in view.stages)
    link = _job_links(view)
    parts = [
        f"{marker_of(run_key(view.name))} -->",
        f"### {code(view.name)} {view.headline}",
        strip,
        prose(view.text.removesuffix(": first attempt")),  # as `attempt 1` says
        *_progress(view),
        f"**What to do:** {prose(view.hint)}" if view.hint else "",
        link,
        f"Run {code(view.run_id)}. {_follows(view)}",
    ]
    return joined(parts)


def _progress(view: RunView) -> list[str]:
    """How far the job is, its curve, and what the curve says in words."""
    if view.job is None:
        return []
    progress, facts = view.job.progress, []
    if progress.variant:
        facts.append(progress.sweep_words)
    if progress.total:
        done = f"{progress.done:,} of {progress.total:,}"
        facts.append(f"{defang(progress.unit)} {done} ({percent(progress.done, progress.total)})".strip())
    elif progress.phase:
        facts.append(f"phase {code(progress.phase)}")
    if len(view.job.held_out) == 1:  # two are a curve
        facts.append(f"held-out loss {view.job.held_out[0][1]:.3f}")
    if progress.tokens_per_s:
        facts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.eta_s is not None:
        facts.append(f"~{duration(progress.eta_s)} left")
    if view.usd is not None:
        most = f" of at most {money(view.most_usd)}" if view.most_usd is not None else ""
        facts.append(f"this job so far {money(view.usd)}{most}")
    lines = loss_lines(read_curve(view.job.losses), read_curve(view.job.held_out))
    said = [f"> [!NOTE]\n> {prose(note)}" for note in notes(view.job, view.learning_rate)[:1]]
    warned = [f"⚠ {defang(text[:300])}" for text in view.job.warnings[-1:]]
    return [" · ".join(facts), lines, *said, *warned]


def _follows(view: RunView) -> str:
    if view.live:
        return f"This comment follows it; `/cancel {view.name}` stops it."
    return "It is over: how it ended is said in a comment of its own."


def left_comment(name: str) -> str:
    """The plan comment of an experiment that the pull request no longer changes: nothing is approved by it."""
    key = f"{marker_of(f'plan:{name}')} fingerprint=none plan=none -->"
    return joined([key, f"### {code(name)} is no longer part of this pull request"])


def answer_key(comment_id: int) -> str:
    """The key of the answer to one command."""
    return f"answer:{comment_id}"


def answer_comment(comment_id: int, login: str, command: str, text: str) -> str:
    """The answer to a command; `text` is Markdown already. It mentions nobody: who asked is looking."""
    return joined([f"{marker_of(answer_key(comment_id))} -->", f"{code(command)} by {code(login)}", text])


def refusal(message: str, hint: str) -> str:
    """Why a command was not carried out, and what to do."""
    return joined([f"❌ {prose(message)}", f"**What to do:** {prose(hint)}" if hint else ""]).strip()


def help_text(unknown: str = "") -> str:
    """Every command there is."""
    rows = [(f"`{command}`", words) for command, words in COMMANDS]
    head = f"There is no command {code(unknown)}.\n\n" if unknown else ""
    return head + table(("command", "does"), rows, "ll") + "\n\nOnly people with write access are answered."


def status_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Experiment, state and words of each commit status; a sentence where there are none."""
    if not rows:
        return "No run of this pull request is known: `mergetune` reports one after the merge."
    return table(("experiment", "state", "what"), [(code(n), code(s), defang(w)) for n, s, w in rows], "lll")


def findings_text(lines: Sequence[str]) -> str:
    """Things that could not be said elsewhere, for a workflow run's summary."""
    return "\n".join(f"- {prose(line)}" for line in lines)


def tick_boxes(body: str, answers: Sequence[bool]) -> str:
    """A pull request's text with the boxes of our checklist as they are now; unchanged where there is none."""
    start, end = body.find(CHECKS_START), body.find(CHECKS_END)
    if start < 0 or end < start:
        return body
    boxes = iter(answers)

    def box(found: re.Match[str]) -> str:
        return f"{found[1]}[{'x' if next(boxes, False) else ' '}]"

    inside = re.sub(r"(?m)^([ \t]*[-*] )\[[ xX]\]", box, body[start:end])
    return body[:start] + inside + body[end:]


def joined(parts: Sequence[str]) -> str:
    """The parts that are there, as paragraphs."""
    return "\n\n".join(part for part in parts if part) + "\n"
