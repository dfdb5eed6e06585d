"""Markdown for humans: the report of a run, and the table of what fits. Returns text; writes and posts none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.charts import sparkline
from pipeline.fit import Fit
from pipeline.flavors import AS_OF
from pipeline.markdown import code, fence, quote, size, table
from pipeline.plan import Plan, StageName
from pipeline.preferences import reward_rows
from pipeline.progress import duration
from pipeline.result_sections import answers_list
from pipeline.sweep_sections import comparison_section

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What a run left: its plan, the manifests of the stages that are done, and its folder."""

    plan: Plan
    manifests: Mapping[StageName, Manifest]
    folder: Path

    def artifact(self, stage: StageName) -> Path:
        """The folder of a stage's artifact."""
        return self.folder / stage / "artifact"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for `--format json`."""
        stages = {
            name: {"artifact": str(self.artifact(name)), "metrics": manifest.get("metrics", {})}
            for name, manifest in self.manifests.items()
        }
        return {"run_id": self.plan.run_id, "report": str(self.folder / "report.md"), "stages": stages}


def render_report(result: RunResult) -> str:
    """The whole report of a run in Markdown."""
    sections = [
        _heading(result),
        answers_list(result.plan.experiment.hypothesis, result.manifests),
        _verdict(result),
        _training(result.manifests.get(StageName.TRAIN)),
        comparison_section(result.manifests.get(StageName.TRAIN, {})),
        _samples(result.manifests.get(StageName.EVALUATE)),
        _artifacts(result),
        _usage(result),
        _stages(result),
        _reproducibility(result),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_fit(fits: Sequence[Fit], title: str) -> str:
    """Flavors against `max_length`: GiB needed, marked where they do not or may not fit."""
    lengths = [length for length, _ in fits[0].needs]
    head = "| flavor | $/h | GiB | " + " | ".join(f"{length:,}" for length in lengths) + " | longest that fits |"
    rows = [_fit_row(fit) for fit in fits]
    note = f"GiB that training needs at each `max_length`; `?` may not fit, `-` does not. Prices of {AS_OF}."
    shown = "\n".join([head, "|---|" + "--:|" * (len(lengths) + 3), *rows])
    return f"## {title}\n\n{shown}\n\n{note}\n"


def fit_as_dict(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """The table, JSON-ready: GiB by `max_length`, and the longest rows that surely fit (None: none do)."""
    return [
        {
            "flavor": fit.flavor.name,
            "usd_per_hour": fit.flavor.usd_per_hour,
            "vram_gib": fit.flavor.vram_gib,
            "needs_gib": {str(length): round(need.total, 2) for length, need in fit.needs},
            "largest_max_length": fit.largest,
        }
        for fit in fits
    ]


def _fit_row(fit: Fit) -> str:
    signs = {True: "", None: " ?", False: " -"}
    cells = [f"{need.total:.1f}{signs[need.fits(fit.flavor)]}" for _, need in fit.needs]
    largest = f"{fit.largest:,}" if fit.largest else "none"
    flavor = fit.flavor
    return f"| `{flavor.name}` | {flavor.usd_per_hour:.2f} | {flavor.vram_gib:g} | {' | '.join(cells)} | {largest} |"


def _heading(result: RunResult) -> str:
    done = ", ".join(result.manifests)
    return f"# {result.plan.run_id}\n\n{quote(result.plan.experiment.hypothesis)}\n\nStages done: {done}."


def _verdict(result: RunResult) -> str:
    evaluate, train = (result.manifests.get(stage, {}) for stage in (StageName.EVALUATE, StageName.TRAIN))
    if rows := reward_rows(evaluate, train):
        return "Of held-out pairs:\n\n" + table(("", "before", "after", "change"), rows, "lrrr")
    metrics = evaluate.get("metrics", {})
    change = metrics.get("loss_change_percent")
    if change is None:
        return ""
    before, after = metrics["before"], metrics["after"]
    word = "fell" if change < 0 else "rose"
    return (
        f"**Held-out loss {word} by {abs(change):.1f} %**, over {metrics['tokens']:,} tokens of {metrics['rows']:,} "
        "rows the training never saw.\n\n"
        "| | before | after |\n|---|--:|--:|\n"
        f"| loss (nats per token) | {before['loss']:.3f} | {after['loss']:.3f} |\n"
        f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} |"
    )


def _training(train: Manifest | None) -> str:
    if train is None:
        return ""
    metrics = train.get("metrics", {})
    losses = [float(point["loss"]) for point in train.get("history", [])]
    lines = ["## Training"]
    if losses:
        lines.append(f"`{sparkline(losses)}` training loss {losses[0]:.2f} → {losses[-1]:.2f}")
    held_out = [float(point["eval_loss"]) for point in train.get("eval_history", [])]
    if held_out:
        lines.append(f"`{sparkline(held_out)}` held-out loss {held_out[0]:.2f} → {held_out[-1]:.2f}")
    facts = [
        f"{metrics['steps']} steps",
        f"{metrics['rows']:,} rows",
        f"{metrics['tokens_trained']:,} tokens carried loss",
    ]
    if metrics.get("tokens_per_s"):
        facts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    facts.append(f"peak memory {train['measured']['peak_memory_gib']:.2f} GiB")
    return "\n\n".join([*lines, " · ".join(facts) + "."])


def _samples(evaluate: Manifest | None) -> str:
    samples = evaluate.get("samples", []) if evaluate else []
    if not samples:
        return ""
    parts = ["## Before and after"]
    for sample in samples:
        parts += [quote(sample["prompt"]), "Before:", fence(sample["before"]), "After:", fence(sample["after"])]
    return "\n\n".join(parts)


def _artifacts(result: RunResult) -> str:
    rows = []
    for name, manifest in result.manifests.items():
        files = [file for file in manifest["files"] if file["path"].endswith((".safetensors", ".gguf"))]
        rows += [
            f"| {name} | `{result.artifact(name) / file['path']}` | {size(file['bytes'])} | `{file['sha256'][:12]}` |"
            for file in files
        ]
    head = "## Artifacts\n\n| stage | file | size | sha256 |\n|---|---|--:|---|\n"
    return head + "\n".join(rows) if rows else ""


def gguf_files(result: RunResult) -> list[Path]:
    """The GGUF files of a run, in the order of `gguf.quants`."""
    manifest = result.manifests.get(StageName.GGUF)
    section = result.plan.experiment.gguf
    if manifest is None or section is None:
        return []
    names = [file["path"] for file in manifest["files"]]
    ordered = [name for quant in section.quants for name in names if name.endswith(f"-{quant}.gguf")]
    return [result.artifact(StageName.GGUF) / name for name in ordered]


def _usage(result: RunResult) -> str:
    files = gguf_files(result)
    if not files:
        return ""
    best = files[0]
    return (
        "## Use it\n\nWith llama.cpp, as a server with a chat page on port 8080, or in the terminal:\n\n"
        f"```sh\nllama-server -m {best} --port 8080\nllama-cli -m {best} -cnv\n```"
    )


def _stages(result: RunResult) -> str:
    rows = []
    for stage in result.plan.stages:
        manifest = result.manifests.get(stage.name)
        if manifest:
            peak = manifest.get("measured", {}).get("peak_memory_gib")
            memory = "" if peak is None else f"{peak:.2f} GiB"
            rows.append(f"| {stage.name} | {duration(manifest['duration_s'])} | {memory} | {manifest['attempt']} |")
    return "## Stages\n\n| stage | took | peak memory | attempt |\n|---|--:|--:|--:|\n" + "\n".join(rows)


def _reproducibility(result: RunResult) -> str:
    experiment = result.plan.experiment
    versions: dict[str, str] = {}
    for manifest in result.manifests.values():
        versions.update(manifest.get("versions", {}))
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        "## To make it again\n\n"
        f"- fingerprint `{result.plan.fingerprint}`\n"
        f"- base `{experiment.base.model}` at `{experiment.base.revision or 'the content in this repository'}`\n"
        f"- data `{experiment.data.dataset}` at `{experiment.data.revision or 'the content in this repository'}`\n"
        f"- seed {experiment.train.seed}\n{_trained_on(result)}- {listed}"
    )


def _trained_on(result: RunResult) -> str:
    """A line where the training read another form of the base than the one that is merged into."""
    found = result.manifests.get(StageName.TRAIN, {}).get("trained_on")
    quantised = found.get("quantization") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(quantised, Mapping):
        return ""
    return f"- trained on {code(str(found.get('model')))}, quantised to {code(str(quantised.get('bits')))} bits\n"
