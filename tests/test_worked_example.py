"""docs/worked-example.md: every number on the page is computed here, or quoted from the procedure it is compared with.

python tests/test_worked_example.py     # writes the computed blocks anew
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.cost import BAND, estimate_cost, estimate_train_seconds, setup_seconds, stage_seconds
from pipeline.dataset_facts import DatasetFacts, TokenFacts
from pipeline.fit import largest_max_length
from pipeline.flavors import FLAVORS
from pipeline.host_memory import disk_gb, evaluate_vram_gib, weights_gb
from pipeline.loader import load_experiment
from pipeline.memory import Loss, estimate_need, spec_of
from pipeline.models import CATALOGUE
from pipeline.rules.experiment import MARGIN

ROOT = Path(__file__).resolve().parents[1]
PAGE, FILE = ROOT / "docs/worked-example.md", ROOT / "experiments/examples/sop-gemma3-12b.yaml"
EXPERIMENT = load_experiment(FILE).experiment
SHAPE = CATALOGUE[EXPERIMENT.base.model]
A10G, A100 = FLAVORS["a10g-large"], FLAVORS["a100-large"]
ROWS, MEANS = 1000, (500, 1000, 1500, 2000)  # of the procedure's project; tokens of a row on average: assumed
# Said by the procedure, of January 2026. Numbers in the page's prose must stand in one of these.
QUOTES = {
    "work": "1000 examples, 3 epochs",
    "training": "~2-3 hours",
    "training cost": "~$4-5",
    "conversion": "~30 min",
    "conversion cost": "~$0.75",
    "total": "~3-4 hours",
    "total cost": "~$5-6",
    "A10G": "~$1.50",
    "A100": "~$4.00",
    "A10G length": "max_length=2048 (safe), max_length=3072 (risky)",
    "A100 length": "max_length=16384 (safe)",
    "logits": "4.3 GB",
    "timeout": "4h",
}
FITS = {True: "fits", False: "does not", None: "may fit"}
BLOCK = re.compile(r"(<!-- computed: (\w+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def rows_of(mean: int) -> DatasetFacts:
    """The project's rows, each as long as the mean."""
    tokens = TokenFacts(sequences=ROWS, total=ROWS * mean, trained=ROWS * mean, longest=mean)
    return DatasetFacts("assumed", ROWS, ROWS, "messages", is_chat=True, tokens=tokens)


def training(mean: int, flavor: Any = A10G) -> Any:
    """Cost of the train stage for rows of this length, with no timeout in the way."""
    seconds = estimate_train_seconds(EXPERIMENT, SHAPE, rows_of(mean), flavor)
    return estimate_cost(seconds, 7 * 86400, flavor, setup_seconds(SHAPE))


@lru_cache
def plan() -> dict[str, Any]:
    """What the command prints."""
    command = [sys.executable, "-m", "pipeline", "plan", FILE.relative_to(ROOT).as_posix(), "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def stage(name: str) -> dict[str, Any]:
    return next(one for one in plan()["stages"] if one["name"] == name)


def table(head: str, *rows: str) -> str:
    columns = head.count("|") + 1
    return "\n".join(f"| {row} |" for row in (head, " | ".join(["---"] * columns), *rows))


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def after_training() -> tuple[float, float]:
    """Seconds and dollars of merge and gguf together."""
    parts = [stage(name) for name in ("merge", "gguf")]
    return sum(p["expected_s"] for p in parts), sum(p["expected_usd"] for p in parts)


def mean_for(wanted_s: float) -> int:
    """Tokens of a row, to the nearest 50, with which training takes this long."""
    return min(range(50, 4000, 50), key=lambda mean: abs(training(mean).needed_s - wanted_s))


def verdict(holds: bool) -> str:
    return "holds" if holds else "stale"


def block_stages() -> str:
    """The plan, stage by stage."""
    lines = []
    for one in plan()["stages"]:
        known = one["expected_s"] is not None
        took = hours(one["expected_s"]) if known else "depends on the rows"
        cost = f"${one['expected_usd']:.2f}" if known else "see below"
        lines.append(f"{one['name']} | `{one['flavor']}` | {took} | {cost} | ${one['worst_usd']:.2f}")
    worst = f"**all** | | | | **${plan()['worst_usd']:.2f}** of a budget of ${plan()['max_usd']:.2f}"
    return table("stage | flavor | expected | expected cost | at most", *lines, worst)


def block_tokens() -> str:
    """Duration and price for assumed lengths."""
    more_s, more_usd = after_training()
    lines = []
    for mean in MEANS:
        cost, fast = training(mean), training(mean, A100)
        low, high = (hours(cost.needed_s * (1 + part)) for part in (-BAND, BAND))
        enough = "" if cost.needed_s * MARGIN <= EXPERIMENT.train.timeout else ": too near the timeout"
        both = f"{hours(cost.needed_s)} ({low} to {high}){enough} | ${cost.expected_usd:.2f}"
        whole = f"{hours(cost.needed_s + more_s)}, ${cost.expected_usd + more_usd:.2f}"
        lines.append(f"{mean} | {both} | {whole} | {hours(fast.needed_s)}, ${fast.expected_usd:.2f}")
    return table("tokens a row | training | cost | whole chain | training on `a100-large` instead", *lines)


def block_against() -> str:
    """The procedure's table of costs against ours."""
    fast, slow = (training(mean) for mean in (500, 1500))
    more_s, more_usd = after_training()
    on_a10g = estimate_cost(stage_seconds("gguf", SHAPE, 2), 7200, A10G)
    ours = f"{hours(fast.needed_s)} to {hours(slow.needed_s)}, ${fast.expected_usd:.2f} to ${slow.expected_usd:.2f}"
    small, large = mean_for(2 * 3600), mean_for(3 * 3600)
    total = f"{hours(fast.needed_s + more_s)} to {hours(slow.needed_s + more_s)}, "
    total += f"${fast.expected_usd + more_usd:.2f} to ${slow.expected_usd + more_usd:.2f}"
    price = A10G.usd_per_hour
    return table(
        "phase | SOP | here, for 500 to 1500 tokens a row | remark",
        f'training | "{QUOTES["training"]}", "{QUOTES["training cost"]}" | {ours} | the same hours for about '
        f"{small} to {large} tokens a row; those hours cost ${2 * price:.2f} to ${3 * price:.2f}",
        f'merge and GGUF | "{QUOTES["conversion"]}", "{QUOTES["conversion cost"]}" | '
        f"{hours(more_s)}, ${more_usd:.2f} | the GGUF alone on an A10G: ${on_a10g.expected_usd:.2f}; "
        "the work is the processor's",
        f'total | "{QUOTES["total"]}", "{QUOTES["total cost"]}" | {total} | '
        f"at these prices, the SOP's hours cost ${3 * price:.2f} to ${4 * price:.2f}",
        f'worst case | "{QUOTES["timeout"]}" for training: ${4 * price:.2f} | ${plan()["worst_usd"]:.2f} | '
        "every stage into its timeout; a budget may not be less",
    )


def block_memory() -> str:
    """Need by length: with the pinned loss, and with logits written out."""
    spec, lines = spec_of(EXPERIMENT, SHAPE), []
    for length in (2048, 3072, 4096, 8192, 16384):
        needs = [estimate_need(replace(spec, seq=length, loss=loss), SHAPE) for loss in (Loss.FUSED, Loss.LOGITS)]
        cells = []
        for need in needs:
            words = [f"{flavor.gpu} {FITS[need.fits(flavor)]}" for flavor in (A10G, A100)]
            cells.append(f"{need.total:.1f} GiB: {', '.join(words)}")
        logits = f"{length * SHAPE.vocab * 4 / 1e9:.1f} GB"
        lines.append(f"{length} | {logits} | {cells[1]} | {cells[0]}")
    longest = " and ".join(
        f"{largest_max_length(EXPERIMENT, SHAPE, flavor)} on `{flavor.name}` ({flavor.vram_gib:g} GiB)"
        for flavor in (A10G, A100)
    )
    head = "`max_length` | logits in float32 | with logits, as when the SOP was written | with the pinned TRL"
    return f"{table(head, *lines)}\n\nLongest rows that surely fit: {longest}."


def block_host() -> str:
    """Disk of each stage."""
    lines = []
    for name in ("train", "merge", "gguf"):
        flavor, need = FLAVORS[stage(name)["flavor"]], disk_gb(name, EXPERIMENT, SHAPE)
        cheap = FLAVORS["cpu-upgrade"].disk_gb
        lines.append(
            f"{name} | {need.least:.0f} to {need.likely:.0f} GB | `{flavor.name}`: {flavor.disk_gb} GB | {cheap} GB"
        )
    vram = f"{weights_gb(SHAPE):.1f} GB in bf16; evaluating it takes {evaluate_vram_gib(SHAPE).least:.1f} GiB of a GPU"
    return (
        table("stage | disk | chosen | `cpu-upgrade`", *lines)
        + f"\n\nThe model is {vram}, an A10G has {A10G.vram_gib:g}."
    )


def block_stale() -> str:
    """Claims that no longer hold, or still do."""
    spec = replace(spec_of(EXPERIMENT, SHAPE), seq=4096)
    head = estimate_need(spec, SHAPE).total - estimate_need(replace(spec, seq=2048), SHAPE).total
    longest = {flavor.gpu: largest_max_length(EXPERIMENT, SHAPE, flavor) for flavor in (A10G, A100)}
    return table(
        "SOP | today | verdict",
        f'A10G "{QUOTES["A10G"]}" an hour | ${A10G.usd_per_hour:.2f} | {verdict(A10G.usd_per_hour == 1.5)}',
        f'A100 "{QUOTES["A100"]}" an hour | ${A100.usd_per_hour:.2f} | {verdict(A100.usd_per_hour == 4.0)}',
        f'A10G: "{QUOTES["A10G length"]}" | surely fits up to {longest["A10G"]} | {verdict(longest["A10G"] <= 3072)}',
        f'A100: "{QUOTES["A100 length"]}" | surely fits up to {longest["A100"]} | {verdict(longest["A100"] >= 16384)}',
        f'logits of 4096 tokens take "{QUOTES["logits"]}" | from 2048 to 4096 tokens training needs '
        f"{head:.1f} GiB more in all; logits are never whole | {verdict(head > 4)}",
        f'conversion "{QUOTES["conversion cost"]}" on an A10G | ${stage("gguf")["expected_usd"]:.2f} on '
        f"`{stage('gguf')['flavor']}` | {verdict(stage('gguf')['expected_usd'] > 0.6)}",
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "stages": block_stages,
    "tokens": block_tokens,
    "against": block_against,
    "memory": block_memory,
    "host": block_host,
    "stale": block_stale,
}


def computed(text: str) -> str:
    """The page with every block as it should be."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}", text)


def test_every_number_of_the_blocks_is_computed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {found[2] for found in BLOCK.finditer(text)} == set(BLOCKS)
    assert text == computed(text), "run `python tests/test_worked_example.py`"


def test_every_number_of_the_prose_is_quoted_or_written_in_the_experiment() -> None:
    prose = BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    known = " ".join([*QUOTES.values(), FILE.read_text(encoding="utf-8"), json.dumps(EXPERIMENT.resolved()), "2026"])
    # A number that belongs to a name (`a10g-large`, TRN005, sha256) says nothing here.
    for number in re.findall(r"(?<![\w.-])\d[\d.,]*(?![\w-])", prose):
        plain = number.rstrip(".,").replace(",", "")
        assert re.search(rf"(?<![\d.]){re.escape(plain)}(?![\d])", known), f"where does {number} come from?"


def test_the_plan_is_what_the_pages_blocks_use() -> None:
    """The command's train stage knows no duration: the dataset lies on the Hub, and the page assumes lengths."""
    assert (plan()["expected_usd"], stage("train")["expected_s"]) == (None, None)
    assert plan()["worst_usd"] == sum(one["worst_usd"] for one in plan()["stages"]) <= EXPERIMENT.budget.max_usd
    cost = estimate_cost(stage_seconds("merge", SHAPE), 3600, FLAVORS[stage("merge")["flavor"]])
    assert stage("merge")["expected_s"] == cost.expected_s


def test_settings_are_the_procedures() -> None:
    train, lora = EXPERIMENT.train, EXPERIMENT.train.lora
    assert lora is not None
    assert (train.epochs, train.batch_size, train.gradient_accumulation, train.max_length) == (3, 1, 8, 2048)
    assert (train.learning_rate, train.flavor, train.timeout) == (2e-4, "a10g-large", 4 * 3600)
    assert (lora.r, lora.alpha, lora.dropout, len(lora.targets)) == (64, 128, 0.05, 4)


if __name__ == "__main__":
    PAGE.write_text(computed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
