"""The sections of a result: tables, curve, samples, artifacts, commands. Each is empty where its numbers are not known.

`stages` are manifests by stage, as far as they could be read. They come from repositories that others may write to: no
value of theirs is trusted to have its type, and no text of theirs acts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.book import Closed
from pipeline.curve_notes import notes_on
from pipeline.hypothesis import judge, read_claims
from pipeline.live import Point
from pipeline.loss_chart import loss_chart, read_curve
from pipeline.markdown import code, defang, details, fence, money, prose, size, table, visible
from pipeline.plan import StageName
from pipeline.preferences import reward_rows
from pipeline.progress import duration
from pipeline.unvouched import mapping, number
from pipeline.usage import COMMIT, REPO, Made, again, llama_cpp, peft, question_of, transformers

Manifest = Mapping[str, Any]
Stages = Mapping[StageName, Manifest]
SAMPLES, SAMPLE_CHARACTERS = 8, 700  # shown of each
OPEN_SAMPLES = 3
HELD = {True: "✅", False: "❌", None: "❔"}


def answers_list(hypothesis: str, stages: Stages) -> str:
    """A line for each number that a hypothesis names: held or not, and what was measured."""
    metrics = [mapping(mapping(stages.get(name)).get("metrics")) for name in (StageName.EVALUATE, StageName.TRAIN)]
    answers = [judge(claim, *metrics) for claim in read_claims(hypothesis)]
    return "\n".join(f"- {HELD[answer.held]} **{answer.claim}**: {answer.measured}" for answer in answers)


def before_after(evaluate: Manifest, train: Manifest) -> str:
    """Held-out loss and perplexity of the base and of the result, on the same tokens; of preferences the rewards."""
    metrics = mapping(evaluate.get("metrics"))
    before, after = mapping(metrics.get("before")), mapping(metrics.get("after"))
    rows = reward_rows(evaluate, train)
    for name, words in (("loss", "held-out loss (nats per token)"), ("perplexity", "held-out perplexity")):
        old, new = number(before.get(name)), number(after.get(name))
        if old is not None and new is not None:
            rows.append((words, f"{old:.3f}", f"**{new:.3f}**", f"{100 * (new / old - 1):+.1f} %" if old else ""))
    if not rows:
        return ""
    tokens, count = number(metrics.get("tokens")), number(metrics.get("rows"))
    over = f"{tokens:,.0f} tokens of {count:,.0f} rows" if tokens and count else ""
    if "reward" in rows[0][0]:
        pairs = count or number(mapping(train.get("metrics")).get("eval_rows"))
        over = f"{pairs:,.0f} pairs of answers" if pairs else ""
    about = f"\n\n<sub>Over {over} that the training never saw.</sub>" if over else ""
    return table(("", "before", "after", "change"), rows, "lrrr") + about


def estimates_section(stages: Stages, closed: Closed) -> str:
    """Each stage's duration, and the training's memory, beside what the plan said."""
    rows = []
    for name in StageName:
        took, expected = number(stages[name].get("duration_s")), number(_predicted(stages[name]).get("duration_s"))
        if took is not None:
            rows.append((f"{name} took", duration(expected) if expected else "–", duration(took), _off(took, expected)))
    train = stages[StageName.TRAIN]
    peak, said = number(mapping(train.get("measured")).get("peak_memory_gib")), _predicted(train)
    allocated = number(said.get("allocated_gib"))
    if peak is not None and allocated is not None and said.get("gpu"):
        rows.append(("peak GPU memory", f"{allocated:.1f} GiB", f"{peak:.1f} GiB", _off(peak, allocated)))
    metrics = mapping(train.get("metrics"))
    trained, speed = number(metrics.get("tokens_trained")), number(metrics.get("tokens_per_s"))
    facts = [f"{number(metrics.get('steps')):,.0f} steps"] if number(metrics.get("steps")) else []
    facts += [f"{trained:,.0f} tokens carried loss"] if trained else []
    facts += [f"{speed:,.0f} tokens/s"] if speed else []
    told = " · ".join(facts)
    if not rows:
        return told
    return table(("", "expected", "measured", "off by"), rows, "lrrr") + (f"\n\n{told}" if told else "")


def curve_section(stages: Stages, summary: Mapping[str, Any]) -> str:
    """Training and held-out loss: from the manifest, else the shorter one that the tag keeps."""
    train, kept = stages[StageName.TRAIN], mapping(summary.get("curve"))
    losses = read_curve(train.get("history")) or read_curve(kept.get("loss"))
    held_out = read_curve(train.get("eval_history"), "eval_loss") or read_curve(kept.get("eval_loss"))
    before = number(mapping(mapping(stages[StageName.EVALUATE].get("metrics")).get("before")).get("loss"))
    if before is not None:  # a sweep has measured it too, at step 0
        held_out = tuple((step, loss) for step, loss in held_out if step > 0)
    margin = 0.0 if summary.get("method") == "dpo" else None
    points = tuple(Point(int(step), loss, reward_margin=margin) for step, loss in losses)
    said = notes_on(points, tuple((int(step), loss) for step, loss in held_out))
    chart = loss_chart(losses, held_out, before)
    return "\n\n".join([chart, *(f"> [!NOTE]\n> {prose(note)}" for note in said[:2])]) if chart else ""


def samples_section(evaluate: Manifest) -> str:
    """Answers to the prompts of the evaluation, before and after side by side."""
    samples = [sample for sample in _list(evaluate.get("samples")) if isinstance(sample, Mapping)]
    rows = [tuple(_cell(sample.get(key)) for key in ("prompt", "before", "after")) for sample in samples[:SAMPLES]]
    if not rows:
        return ""
    head = ("asked", "before", "after")
    shown = table(head, rows[:OPEN_SAMPLES], "lll")
    rest = table(head, rows[OPEN_SAMPLES:], "lll") if len(rows) > OPEN_SAMPLES else ""
    more = len(samples) - len(rows)
    left = f"\n\n<sub>{more} more are in the manifest of the evaluation.</sub>" if more > 0 else ""
    folded = details(f"{len(rows) - OPEN_SAMPLES} more", rest) if rest else ""
    return "\n\n".join(part for part in ("### Before and after", shown, folded) if part) + left


def artifacts_section(stages: Stages, endpoint: str) -> str:
    """Every repository at its commit, and every GGUF file with its size and what the quantisation cost in quality."""
    rows = []
    for name in StageName:
        made = made_by(stages[name])
        if made.repo:
            files = [entry for entry in _list(stages[name].get("files")) if isinstance(entry, Mapping)]
            total = sum(number(entry.get("bytes")) or 0 for entry in files)
            rows.append((name.value, _link(made, endpoint), size(total) if total else "–"))
    shown = "### Artifacts\n\n" + table(("stage", "made", "size"), rows, "llr") if rows else ""
    return "\n\n".join(part for part in (shown, _quants(stages[StageName.GGUF])) if part)


def usage_section(stages: Stages, summary: Mapping[str, Any]) -> str:
    """How to use what was made: commands that work when pasted."""
    samples = _list(stages[StageName.EVALUATE].get("samples"))
    first = next((sample.get("prompt") for sample in samples if isinstance(sample, Mapping)), None)
    question = question_of(first)
    snippets = []
    for entry in quants_of(stages[StageName.GGUF])[:1]:
        snippets += llama_cpp(made_by(stages[StageName.GGUF]), str(entry.get("file")), question)
    tuned = StageName.MERGE if made_by(stages[StageName.MERGE]).repo else StageName.TRAIN
    chat = summary.get("loss_on") != "all"  # rows of plain text have no chat template to go by
    is_adapter = tuned is StageName.TRAIN and summary.get("method") != "full"
    snippets += peft(made_by(stages[tuned])) if is_adapter else transformers(made_by(stages[tuned]), question, chat)
    parts = [f"{snippet.title}:\n\n{fence(snippet.text, snippet.language)}" for snippet in snippets]
    return "\n\n".join(["### Use it", *parts]) if parts else ""


def comparison(closed: Closed, rivals: Sequence[tuple[str, Closed]]) -> str:
    """This run beside others: one row a run."""
    if not rivals:
        return ""
    rows = [_rival("**this run**", closed), *(_rival(why, one) for why, one in rivals)]
    head = ("", "run", "held-out loss", "training loss", "cost", "ended")
    note = "<sub>Held-out loss compares where the held-out rows are the same.</sub>"
    return f"### Compared\n\n{table(head, rows, 'llrrrl')}\n\n{note}"


def reproduction(closed: Closed, stages: Stages) -> str:
    """What decides the result, and the commands that make it again."""
    train = stages[StageName.TRAIN]
    source, inputs = mapping(train.get("provenance")), mapping(train.get("inputs"))
    versions: dict[str, str] = {}
    for name in StageName:
        versions |= {str(key): str(value) for key, value in mapping(stages[name].get("versions")).items()}
    lines = [f"run {code(closed.run_id)}", f"fingerprint {code(str(train.get('fingerprint') or ''))}"]
    lines += [f"commit {code(str(source.get('commit')))}"] if source.get("commit") else []
    for key in ("base", "data", "eval_data"):
        if given := mapping(inputs.get(key)):
            what, at = given.get("repo") or given.get("path"), given.get("revision") or given.get("sha256")
            lines.append(f"{key.replace('_', ' ')} {code(str(what))} at {code(str(at))}")
    lines += [f"seed {code(str(train['seed']))}"] if "seed" in train else []
    listed = ", ".join(f"{key} {value}" for key, value in sorted(versions.items()))
    lines += [defang(listed)] if listed else []
    commands = again(str(source.get("commit")), str(source.get("path")), closed.run_id)
    shown = [f"{one.title}, on this repository:\n\n{fence(one.text, one.language)}" for one in commands]
    return "\n\n".join(["\n".join(f"- {line}" for line in lines), *shown])


def every_metric(stages: Stages) -> str:
    """Numbers of every stage, folded away."""
    rows = []
    for name in StageName:
        for key, value in mapping(stages[name].get("metrics")).items():
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                rows.append((name.value, code(str(key)), code(_metric(value))))
    return details("Every metric", table(("stage", "metric", "value"), rows[:80], "llr")) if rows else ""


def quants_of(gguf: Manifest) -> list[Manifest]:
    """The GGUF files of a manifest, in the order of `gguf.quants`."""
    return [entry for entry in _list(mapping(gguf.get("metrics")).get("quants")) if isinstance(entry, Mapping)]


def held_out_loss(closed: Closed) -> float | None:
    """The held-out loss a finished round ended with: of the evaluation, else of the training's last measurement."""
    stages = mapping(closed.summary.get("stages"))
    evaluated = mapping(mapping(mapping(stages.get("evaluate")).get("metrics")).get("after")).get("loss")
    trained = mapping(mapping(stages.get("train")).get("metrics")).get("eval_loss")
    return number(evaluated) if number(evaluated) is not None else number(trained)


def made_by(manifest: Manifest) -> Made:
    """The repository of a stage at the commit it left."""
    return Made(str(manifest.get("repo") or ""), str(manifest.get("revision") or ""))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _predicted(manifest: Manifest) -> Mapping[str, Any]:
    return mapping(manifest.get("predicted"))


def _off(measured: float, expected: float | None) -> str:
    return f"{100 * (measured / expected - 1):+.0f} %" if expected else "–"


def _cell(value: object) -> str:
    """An answer as one cell: its lines stay lines, and nothing in it acts."""
    if isinstance(value, list):  # a conversation: its last question
        value = next((turn.get("content") for turn in reversed(value) if isinstance(turn, Mapping)), "")
    text = visible(str(value)).strip()
    text = text if len(text) <= SAMPLE_CHARACTERS else f"{text[: SAMPLE_CHARACTERS - 1]}…"
    return "<br>".join(defang(line) for line in text.splitlines()) or "–"


def _link(made: Made, endpoint: str) -> str:
    if not REPO.fullmatch(made.repo):
        return code(made.repo)
    at = f"/tree/{made.revision}" if COMMIT.fullmatch(made.revision) else ""
    return f"[{code(made.repo)}]({endpoint}/{made.repo}{at})"


def _quants(gguf: Manifest) -> str:
    rows = []
    for entry in quants_of(gguf):
        bits, lost = number(entry.get("bits_per_weight")), number(entry.get("kl_vs_bf16"))
        checks = [text for text in mapping(entry.get("checks")).values() if text != "ok"]
        shown = (
            code(str(entry.get("file"))),
            size(number(entry.get("bytes")) or 0),
            "–" if bits is None else f"{bits:.2f}",
            "–" if lost is None else f"{lost:.4f}",
            defang("; ".join(map(str, checks))) if checks else "all pass" if "checks" in entry else "–",
        )
        rows.append(shown)
    if not rows:
        return ""
    head = ("file", "size", "bits per weight", "KL from the 16-bit file", "checks")
    note = "<sub>KL: by how many nats per token its next-token distribution differs, on a short chat.</sub>"
    return f"{table(head, rows, 'lrrrl')}\n\n{note}"


def _rival(why: str, closed: Closed) -> tuple[str, ...]:
    loss = held_out_loss(closed)
    train = mapping(mapping(closed.summary.get("stages")).get("train"))
    trained = number(mapping(train.get("metrics")).get("train_loss"))
    shown = ["–" if value is None else f"{value:.3f}" for value in (loss, trained)]
    return (why, code(closed.run_id), *shown, money(closed.usd), f"{closed.at:%Y-%m-%d}")


def _metric(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
