"""Run books for the board: a season of realistic runs, drawn from a seed, as tags would hold them."""

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.board import Board, OnMain, Place, Standing, State, make_board
from pipeline.board_summary import Summary
from pipeline.book import Book, Closed, Tag, Verdict, finish_message, make_book, retry_message

NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
PLACE = Place("https://github.com/acme/tunes")
COMMIT = "3c" * 20
BASES = {
    "coach-gemma3-12b": ("google/gemma-3-12b-it", "acme/coach-conversations", "a10g-large", 1.5),
    "support-qwen3-8b": ("Qwen/Qwen3-8B", "acme/support-tickets", "l4x1", 0.8),
    "sql-llama31-8b": ("meta-llama/Llama-3.1-8B-Instruct", "acme/text-to-sql", "a10g-small", 1.0),
    "triage-smollm3": ("HuggingFaceTB/SmolLM3-3B", "data/triage.jsonl", "t4-medium", 0.6),
}
IDEAS = (
    "r=64 LoRA on 1,000 coaching dialogues lowers the held-out loss below 1.2 without losing instruction following.",
    "Half the learning rate keeps the early gain and stops the rise after epoch two.",
    "Packing at 4,096 halves the wall time at the same loss.",
    "Training on the assistant's words alone beats training on the whole conversation, because the user's turns are "
    "noise that the model should read and never write; we expect two percent lower held-out loss and shorter answers "
    "in the samples, at the same cost.",
    "DoRA is worth its extra memory on this data.",
)
FAILURES = (
    "train: out of memory on the GPU: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.31 GiB",
    "gguf: the tokenizer of the file does not agree with the base's: 3 of 40 texts differ",
    "train: no machine came in 24 h",
)


def curves(draw: random.Random, start: float, end: float, steps: int) -> dict[str, list[list[float]]]:
    """A loss that falls with noise, and the held-out loss every tenth of it."""
    fall = [(s, end + (start - end) * math.exp(-3.5 * s / steps)) for s in range(1, steps + 1, max(1, steps // 120))]
    loss = [[s, round(y * (1 + draw.gauss(0, 0.03)), 4)] for s, y in fall]
    held_out = [[s, round(y * 1.05 + 0.08 * (s / steps) ** 2, 4)] for s, y in fall[:: max(1, len(fall) // 10)]]
    return {"loss": loss, "eval_loss": held_out}


def summary_of(draw: random.Random, name: str, number: int = 0, *, done: bool = True) -> dict[str, Any]:
    """What the controller writes at the end of a run."""
    base, dataset, flavor, price = BASES[name]
    hours, steps = draw.uniform(0.4, 3.8), draw.randrange(150, 900)
    start, end = draw.uniform(1.8, 2.6), draw.uniform(0.85, 1.25)
    said = {
        "experiment": name,
        "base": base,
        "dataset": dataset,
        "flavor": flavor,
        "expected_usd": round(price * hours * 0.9, 2),
        "worst_usd": round(price * 6, 2),
        "hypothesis": IDEAS[number % len(IDEAS)],
        "pull_request": 100 + number,
        "commit": COMMIT,
    }
    repo = f"acme/{name}"
    if not done:
        return said
    curve = curves(draw, start, end, steps)
    trained = {"train_loss": end * 1.2, "eval_loss": curve["eval_loss"][-1][1], "steps": steps}
    metrics = {"before": {"loss": start}, "after": {"loss": end}, "loss_change_percent": 100 * (end / start - 1)}
    stages = {
        "train": {
            "repo": f"{repo}-adapter",
            "revision": COMMIT,
            "duration_s": hours * 3600,
            "metrics": {**trained, "tokens_trained": int(hours * 3.1e6)},
        },
        "merge": {"repo": repo, "revision": COMMIT, "duration_s": 410, "metrics": {}},
        "gguf": {"repo": f"{repo}-GGUF", "revision": COMMIT, "duration_s": 1730, "metrics": {}},
        "evaluate": {"repo": repo, "revision": COMMIT, "duration_s": 300, "metrics": metrics},
    }
    return {**said, "stages": stages, "curve": curve}


def finish(closed: Closed) -> Tag:
    """The tag of a round."""
    name = f"run/{closed.run_id}" + (f".{closed.round}" if closed.round > 1 else "")
    return Tag(name, COMMIT, finish_message(closed))


def retry(run_id: str, number: int = 1) -> Tag:
    """The tag that reopens a run."""
    return Tag(f"retry/{run_id}.{number}", COMMIT, retry_message(f"retry/{run_id}.{number}", "ada", NOW))


def season(runs: int = 40, seed: int = 1) -> Book:
    """So many closed runs over some months, one in six of them with a round that failed before."""
    draw = random.Random(seed)
    names = list(BASES)
    verdicts = [Verdict.DONE] * 14 + [Verdict.FAILED] * 3 + [Verdict.CANCELLED, Verdict.SUPERSEDED, Verdict.ADOPTED]
    tags: list[Tag] = []
    for number in range(runs):
        name, verdict = names[number % len(names)], draw.choice(verdicts)
        run_id = f"{name}-{draw.randrange(16**8):08x}"
        at = NOW - timedelta(hours=5 + 31 * number + draw.random() * 12)
        said = summary_of(draw, name, number, done=verdict is Verdict.DONE)
        usd = 0.0 if verdict is Verdict.ADOPTED else round(said["expected_usd"] * draw.uniform(0.5, 1.3), 2)
        texts = {Verdict.FAILED: draw.choice(FAILURES), Verdict.DONE: "4 of 4 stages are done"}
        texts |= {Verdict.CANCELLED: "cancelled by a person", Verdict.SUPERSEDED: "the experiment was edited"}
        text, number_of_round = texts.get(verdict, "it was here before mergetune was"), 1
        if draw.random() < 0.16 and verdict is not Verdict.ADOPTED:
            ended, why = at - timedelta(hours=20), draw.choice(FAILURES)
            tags += [finish(Closed(run_id, 1, Verdict.FAILED, why, ended, 0.4, {"train": 1})), retry(run_id)]
            number_of_round = 2
        said = {"experiment": name} if verdict is Verdict.ADOPTED else said
        tags.append(finish(Closed(run_id, number_of_round, verdict, text, at, usd, {"train": 1}, said)))
    return make_book(tags)


def under_way() -> tuple[list[OnMain], list[Standing]]:
    """Open runs of main, and what the Hub says of them."""
    main, live = [], []
    told = (
        (State.LIVE, "train is running", "", 2.4),
        (State.LIVE, "gguf is queued", "", 3.05),
        (State.BLOCKED, "needs review: the price changed since then", "`/plan` shows the plan of today", None),
    )
    for number, (state, text, hint, usd) in enumerate(told):
        name = list(BASES)[number]
        base, dataset, flavor, _ = BASES[name]
        run_id = f"{name}-0000000{number}"
        said = Summary(name, IDEAS[number], base, dataset, flavor, 4.1, 9.0)
        main.append(OnMain(run_id, f"experiments/{name}.yaml", said))
        at = NOW - timedelta(minutes=97 * (number + 1)) if usd else None
        url = f"https://huggingface.co/jobs/acme/{number}" if usd else ""
        live.append(Standing(name, run_id, state, text, hint, at, usd, url))
    return main, live


def full_board(runs: int = 37) -> Board:
    """The season, and three runs under way."""
    main, live = under_way()
    return make_board(season(runs), main, live, PLACE, NOW, ("the runs of two branches are not shown",))


BREAKOUT = (
    '"></td></table><script>window.hacked=1</script><img src=x onerror="window.hacked=1"><style>*{color:red}</style>'
)
TOKEN = "hf_" + "Ab1" * 10


def hostile_board() -> Board:
    """Everything that an author, a model, a log or a foreign tag can choose, chosen to act, to hide or to burst."""
    long = "w" * 500
    said = {
        "experiment": f"{BREAKOUT}",
        "hypothesis": f"{BREAKOUT} {TOKEN} \u202egnp.exe <!-- --> {{{{ x }}}} {long}",
        "base": "javascript:alert(1)",
        "dataset": f"acme/{'d' * 90}",
        "flavor": BREAKOUT,
        "expected_usd": "1e999",
        "worst_usd": True,
        "commit": "../../../evil",
        "pull_request": "12",
        "curve": {"loss": [[1, 2], [BREAKOUT, 3], [2, None], "x", [3, 1.0, 4]], "eval_loss": {"a": 1}},
        "stages": {
            "train": {"repo": 'acme/x" onclick="alert(1)', "revision": BREAKOUT, "metrics": {"train_loss": BREAKOUT}},
            "merge": {"repo": "acme/fine", "revision": BREAKOUT, "duration_s": -5, "metrics": [1]},
            "evaluate": {"metrics": {"before": 3, "after": {"loss": 2**62}, "loss_change_percent": 1e18}},
            "gguf": "gone",
        },
    }
    tags = [
        finish(Closed("evil-00000000", 1, Verdict.FAILED, f"{BREAKOUT} {long}", NOW, 2**62, {}, said)),
        finish(Closed("bare-00000000", 1, Verdict.DONE, "", NOW, 0, {}, {"stages": 3, "curve": 7, "hypothesis": [1]})),
        Tag(f"run/{BREAKOUT}", COMMIT, None),
        Tag("run/by-hand", COMMIT, "I stopped it"),
        Tag("run/", COMMIT, None),
    ]
    live = [Standing(BREAKOUT, f"{BREAKOUT}-1", State.LIVE, BREAKOUT, BREAKOUT, NOW, 1.0, "javascript:window.hacked=1")]
    return make_board(make_book(tags), [], live, PLACE, NOW, (BREAKOUT,))
