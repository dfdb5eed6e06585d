"""The texts of everything that is said on a pull request, less the plan comment. Posts nothing."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.book import Closed, Verdict
from pipeline.charts import sparkline
from pipeline.markdown import code, defang, details, fence, money, prose, quote, table
from pipeline.plan import StageName
from pipeline.progress import duration
from pipeline.pull_request import marker_of

LOGIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,38})")
STRIP = {"done": "●", "now": "◐", "next": "○", "failed": "✗"}
HEADS = {
    Verdict.DONE: ("✅", "is done"),
    Verdict.FAILED: ("❌", "failed"),
    Verdict.CANCELLED: ("⛔", "was cancelled"),
    Verdict.SUPERSEDED: ("⛔", "was stopped for a newer version"),
    Verdict.ADOPTED: ("·", "was here before mergetune, and is not launched"),
}
POINTS = 60  # of a chart
# Mermaid's own first colour of a line cannot be seen on white, and its dark ground is a grey box on GitHub's.
LOOK = (
    '%%{init: {"xyChart": {"height": 300}, '
    '"themeVariables": {"xyChart": {"plotColorPalette": "#2f81f7", "backgroundColor": "transparent"}}}}%%'
)
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
    """Where one run stands. `stages` are those of its plan with a word of `STRIP` each; `live`: it is not over."""

    name: str
    run_id: str
    headline: str
    stages: tuple[tuple[StageName, str], ...] = ()
    text: str = ""
    hint: str = ""
    job_url: str = ""
    live: bool = True


@dataclass(frozen=True)
class Ending:
    """A finished round and who is told. `history` are the loss points of the training, `hint` a way on."""

    name: str
    closed: Closed
    people: tuple[str, ...] = ()
    hint: str = ""
    endpoint: str = "https://huggingface.co"
    history: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


def run_key(name: str) -> str:
    """The key of the comment that says where an experiment's run stands."""
    return f"run:{name}"


def result_id(closed: Closed) -> str:
    """The id under which a round's final comment is posted once: a retried run ends once more."""
    return closed.run_id if closed.round == 1 else f"{closed.run_id}.{closed.round}"


def run_comment(view: RunView) -> str:
    """The comment that is edited while a run goes on. Without times: it changes when the run does."""
    strip = " → ".join(f"{STRIP[word]} {stage}" for stage, word in view.stages)
    job = f"[log and machine of the job]({view.job_url})" if re.fullmatch(r"https?://[^\s()<>]+", view.job_url) else ""
    parts = [
        f"{marker_of(run_key(view.name))} -->",
        f"### {code(view.name)} {view.headline}",
        strip,
        prose(view.text.removesuffix(": first attempt")),  # as `attempt 1` says
        f"**What to do:** {prose(view.hint)}" if view.hint else "",
        job,
        f"Run {code(view.run_id)}. {_follows(view)}",
    ]
    return _joined(parts)


def result_comment(ending: Ending) -> str:
    """The comment that is new when a run ends, since an edit notifies nobody."""
    closed, summary = ending.closed, ending.closed.summary
    mark, words = HEADS[closed.verdict]
    people = " ".join(f"@{login}" for login in dict.fromkeys(ending.people) if LOGIN.fullmatch(login))
    hypothesis = str(summary.get("hypothesis") or "")
    parts = [
        f"{marker_of(f'result:{result_id(closed)}')} -->",
        f"## {mark} {code(ending.name)} {words}",
        " · ".join(part for part in (people, prose(closed.text)) if part),
        quote(hypothesis) if hypothesis else "",
        _verdict_of(summary),
        _stages(summary, ending.endpoint),
        _cost(closed),
        loss_chart(ending.history),
        _metrics(summary),
        f"**What to do:** {prose(ending.hint)}" if ending.hint else "",
        _next(ending),
    ]
    return _joined(parts)


def _follows(view: RunView) -> str:
    if view.live:
        return f"This comment follows it; `/cancel {view.name}` stops it."
    return "It is over: how it ended is said in a comment of its own."


def loss_chart(history: Sequence[Mapping[str, Any]]) -> str:
    """A sparkline and, for those who see it drawn, the same as Mermaid; empty for fewer than two points."""
    points = [(int(point["step"]), float(point["loss"])) for point in history if {"step", "loss"} <= point.keys()]
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(finite) < 2:
        return ""
    losses = [loss for _, loss in finite]
    line = f"Training loss `{sparkline(losses)}` {losses[0]:.3f} → {losses[-1]:.3f}"
    every = math.ceil(len(finite) / POINTS)
    drawn = [sum(losses[at : at + every]) / len(losses[at : at + every]) for at in range(0, len(losses), every)]
    low, high = min(drawn), max(drawn)
    pad = (high - low) * 0.1 or 0.1
    chart = [
        "```mermaid",
        LOOK,
        "xychart-beta",
        f'    x-axis "step" {finite[0][0]} --> {finite[-1][0]}',
        f'    y-axis "training loss" {low - pad:.4f} --> {high + pad:.4f}',
        f"    line [{', '.join(f'{value:.4f}' for value in drawn)}]",
        "```",
    ]
    return line + "\n\n" + "\n".join(chart)


def left_comment(name: str) -> str:
    """The plan comment of an experiment that the pull request no longer changes: nothing is approved by it."""
    key = f"{marker_of(f'plan:{name}')} fingerprint=none plan=none -->"
    return _joined([key, f"### {code(name)} is no longer part of this pull request"])


def answer_key(comment_id: int) -> str:
    """The key of the answer to one command."""
    return f"answer:{comment_id}"


def answer_comment(comment_id: int, login: str, command: str, text: str) -> str:
    """The answer to a command; `text` is Markdown already. It mentions nobody: who asked is looking."""
    return _joined([f"{marker_of(answer_key(comment_id))} -->", f"{code(command)} by {code(login)}", text])


def refusal(message: str, hint: str) -> str:
    """Why a command was not carried out, and what to do."""
    return _joined([f"❌ {prose(message)}", f"**What to do:** {prose(hint)}" if hint else ""]).strip()


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


def _verdict_of(summary: Mapping[str, Any]) -> str:
    """Held-out loss before and after, where it was measured."""
    metrics = _of_stage(summary, "evaluate").get("metrics") or {}
    change, before, after = metrics.get("loss_change_percent"), metrics.get("before"), metrics.get("after")
    if not isinstance(change, int | float) or not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ""
    word = "fell" if change < 0 else "rose"
    head = f"**Held-out loss {word} by {abs(change):.1f} %**"
    if not all(isinstance(part.get("loss"), int | float) for part in (before, after)):
        return head
    return f"{head}, from {before['loss']:.3f} to {after['loss']:.3f}"


def _stages(summary: Mapping[str, Any], endpoint: str) -> str:
    rows = []
    for name in StageName:
        stage = _of_stage(summary, name)
        if stage:
            took = stage.get("duration_s")
            shown = duration(took) if isinstance(took, int | float) else "–"
            rows.append(
                (name.value, shown, _link(str(stage.get("repo", "")), str(stage.get("revision", "")), endpoint))
            )
    return table(("stage", "took", "made"), rows, "lrl") if rows else ""


def _link(repo: str, revision: str, endpoint: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return code(repo)
    at = f"/tree/{revision}" if re.fullmatch(r"[0-9a-f]{7,64}", revision) else ""
    return f"[{code(repo)}]({endpoint}/{repo}{at})"


def _cost(closed: Closed) -> str:
    parts = [f"**Cost** {money(closed.usd)}"]
    expected, worst = closed.summary.get("expected_usd"), closed.summary.get("worst_usd")
    if isinstance(expected, int | float):
        parts.append(f"{money(expected)} was expected")
    if isinstance(worst, int | float):
        parts.append(f"at most {money(worst)} was approved")
    return ", ".join(parts) if closed.attempts else ""


def _metrics(summary: Mapping[str, Any]) -> str:
    rows = []
    for name in StageName:
        for key, value in (_of_stage(summary, name).get("metrics") or {}).items():
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                shown = (
                    f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
                )
                rows.append((name.value, code(str(key)), code(str(shown))))
    return details("Every metric", table(("stage", "metric", "value"), rows, "llr")) if rows else ""


def _of_stage(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    stages = summary.get("stages")
    found = stages.get(name) if isinstance(stages, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _next(ending: Ending) -> str:
    closed = ending.closed
    if closed.verdict in (Verdict.FAILED, Verdict.CANCELLED) and ending.name:
        return f"Comment `/retry {ending.name}` to go on from the last artifact or checkpoint."
    gguf = str(_of_stage(closed.summary, "gguf").get("repo", ""))
    if closed.verdict is Verdict.DONE and re.fullmatch(r"[\w.-]+/[\w.-]+", gguf):
        return "Use it:\n\n" + fence(f"llama-server -hf {gguf}", "sh")
    return ""


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
