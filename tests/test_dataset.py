"""Facts of data files: what is in them, held out as training holds out, counted as training counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from examples import GOOD, changed

from pipeline.dataset import Limits, read_dataset
from pipeline.dataset_facts import DatasetFacts, Lines, Problem
from pipeline.loader import load_experiment, parse_experiment

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "experiments/examples/tiny-docs-llama"
QUICKSTART = ROOT / "experiments/examples/quickstart.yaml"
TEXT = changed("dataset: acme/coach", "dataset: data/coach.jsonl", changed("  revision: 5d2\n", ""))
TINY = changed(r"base: .*", "base: {model: ./base}", TEXT)


def chat(number: int, words: int = 3) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"Answer {number}" + " word" * words}
    return {"messages": [{"role": "user", "content": f"Question {number}?"}, answer]}


Reader = Callable[..., DatasetFacts]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    """Writes rows (dicts, or lines as they are) and reads them back as facts."""

    def write(name: str, rows: list[Any]) -> None:
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "data" / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def reader(
        rows: list[Any], text: str = TEXT, held_out: list[Any] | None = None, limits: Limits | None = None
    ) -> DatasetFacts:
        write("coach.jsonl", rows)
        if held_out is not None:
            write("held.jsonl", held_out)
            text = changed("fraction: 0.05", "dataset: data/held.jsonl", text)
        if "./base" in text and not (tmp_path / "base").exists():
            (tmp_path / "base").symlink_to(BASE)
        facts = read_dataset(parse_experiment(text).experiment, tmp_path, limits)
        assert facts is not None
        return facts

    return reader


NO_EVAL = changed("  eval: .*\n", "", TEXT)
TINY_ALL = changed("  eval: .*\n", "", TINY)


def test_what_is_not_a_file_here_is_unknown(tmp_path: Path) -> None:
    for text in (GOOD, TEXT, changed("coach.jsonl", "coach.parquet", TEXT)):
        assert read_dataset(parse_experiment(text).experiment, tmp_path) is None


def test_good_rows(read: Reader) -> None:
    facts = read([chat(i) for i in range(20)], TINY_ALL)
    assert (facts.path, facts.rows, facts.training_rows) == ("coach.jsonl", 20, 20)
    assert (facts.format, facts.is_chat, facts.has_template) == ("messages", True, True)
    assert facts.issues == ()
    assert facts.exact
    assert facts.tokens is not None
    assert facts.tokens.sequences == 20
    assert 0 < facts.tokens.trained < facts.tokens.total
    assert facts.tokens.lost == 0


def test_problems_are_named_by_line(read: Reader) -> None:
    rows: list[Any] = [chat(0), "", "{not json", {"text": "x"}, {"a": 1}, *[{"messages": []}] * 7]
    facts = read(rows, NO_EVAL)
    assert facts.rows == 11
    assert {found.problem: found.count for found in facts.issues} == {
        Problem.JSON: 1,
        Problem.MIXED: 1,
        Problem.FORMAT: 1,
        Problem.CONTENT: 7,
    }
    broken, empty = facts.issue(Problem.JSON), facts.issue(Problem.CONTENT)
    assert broken is not None
    assert empty is not None
    assert broken.first[0].line == 3  # blank lines count as lines
    assert [issue.line for issue in empty.first] == [6, 7, 8, 9, 10]
    assert not facts.exact


def test_a_byte_order_mark_and_an_empty_file(read: Reader) -> None:
    assert read(["\ufeff" + json.dumps(chat(0))], NO_EVAL).issues == ()
    empty = read([], NO_EVAL)
    assert (empty.rows, empty.format, empty.tokens) == (0, None, None)


def test_a_refusing_template_is_a_problem_of_the_row(read: Reader) -> None:
    tool = {"messages": [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]}
    found = read([chat(0), tool], TINY_ALL).issue(Problem.TEMPLATE)
    assert found is not None
    assert (found.count, found.first[0].line) == (1, 2)
    assert "unknown role: tool" in found.first[0].message


def test_without_the_bases_files_a_count_is_an_estimate(read: Reader) -> None:
    facts = read([chat(i) for i in range(20)], NO_EVAL)
    assert (facts.exact, facts.has_template) == (False, None)
    assert facts.estimated == "the base's tokenizer is not at hand"
    assert facts.tokens is not None
    assert facts.tokens.total > 0


def test_a_base_without_a_template(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    facts = read([chat(0)], TINY_ALL)
    assert (facts.has_template, facts.issues) == (False, ())
    assert facts.estimated == "the base has no chat template"


def test_long_rows_are_cut_and_dropped(read: Reader) -> None:
    text = changed("max_length: 2048", "max_length: 40", TINY_ALL)
    prompt = chat(2)
    prompt["messages"][0]["content"] = "word " * 60
    tokens = read([chat(0), chat(1, words=60), prompt], text).tokens
    assert tokens is not None
    assert tokens.over_limit == Lines(2, (2, 3))
    assert tokens.dropped == Lines(1, (3,))
    assert tokens.sequences == 2
    assert tokens.longest > 60
    assert tokens.uncut == tokens.total + tokens.lost > tokens.total


def test_copies_and_leaks(read: Reader) -> None:
    rows = [chat(0), chat(1), chat(0), chat(2), chat(0)]
    facts = read(rows, held_out=[chat(9), chat(1), {"messages": []}])
    assert facts.duplicates == Lines(2, (3, 5))
    assert facts.leaked == Lines(1, (2,))
    assert facts.eval_file is not None
    assert facts.eval_file.path == "held.jsonl"
    assert facts.eval_file.issue(Problem.CONTENT) is not None
    assert facts.training_rows == 5


def test_turns_out_of_order_are_noted(read: Reader) -> None:
    again = {"messages": [*chat(1)["messages"], {"role": "assistant", "content": "And more."}]}
    assert read([chat(0), again], NO_EVAL).not_alternating == Lines(1, (2,))


def test_large_files_are_sampled_and_say_so(read: Reader) -> None:
    rows = [chat(i) for i in range(1000)]
    whole = read(rows, TINY_ALL)
    part = read(rows, TINY_ALL, limits=Limits(rows=400))
    few = read(rows, TINY_ALL, limits=Limits(tokenized=100))
    small = read(rows, TINY_ALL, limits=Limits(bytes=20_000))
    short = read(rows, TINY_ALL, limits=Limits(characters=5_000))
    assert (whole.sampled, part.sampled, few.sampled, small.sampled) == (False, True, False, True)
    for facts in (part, few, small, short):
        assert (facts.rows, facts.training_rows, facts.exact) == (1000, 1000, False)
        assert facts.tokens is not None
        assert whole.tokens is not None
        assert facts.tokens.total == pytest.approx(whole.tokens.total, rel=0.1)
        assert facts.estimated


def test_a_row_longer_than_what_is_read_is_no_fault_of_the_file(read: Reader) -> None:
    facts = read([chat(0, words=10_000), chat(1)], TEXT, limits=Limits(bytes=1000))
    assert (facts.rows, facts.training_rows, facts.issues, facts.sampled) == (2, 2, (), True)


def test_a_template_that_rewrites_history_gives_an_estimate(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    (tmp_path / "base/chat_template.jinja").write_text(template)
    facts = read([{"messages": chat(0)["messages"] * 2}], TINY_ALL)
    assert facts.tokens is not None
    assert (facts.tokens.sequences, facts.exact) == (2, False)
    assert "rewrites earlier turns" in facts.estimated


def test_parquet(tmp_path: Path, read: Reader) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [chat(i) for i in range(30)]
    jsonl = read(rows, TINY_ALL)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/coach.parquet")
    text = changed("coach.jsonl", "coach.parquet", TINY_ALL)
    facts = read_dataset(parse_experiment(text).experiment, tmp_path)
    assert facts is not None
    assert (facts.rows, facts.tokens, facts.exact) == (30, jsonl.tokens, True)
    (tmp_path / "data/coach.parquet").write_bytes(b"PAR1")
    broken = read_dataset(parse_experiment(text).experiment, tmp_path)
    assert broken is not None
    assert broken.issue(Problem.JSON) is not None


def test_the_quickstart_is_exact() -> None:
    facts = read_dataset(load_experiment(QUICKSTART).experiment, ROOT)
    assert facts is not None
    assert facts.eval_file is not None
    assert (facts.rows, facts.eval_file.rows) == (260, 40)
    assert (facts.exact, facts.issues, facts.duplicates.count, facts.leaked.count) == (True, (), 0, 0)
    assert facts.tokens is not None
    # The manifest of a run of four epochs says: tokens_seen 89,824, tokens_trained 60,760, longest_row_tokens 167.
    assert (facts.tokens.total * 4, facts.tokens.trained * 4, facts.tokens.longest) == (89_824, 60_760, 167)


def test_a_seed_counts_only_where_rows_are_held_out() -> None:
    text = QUICKSTART.read_text(encoding="utf-8")
    held_out = "  eval: {dataset: experiments/examples/data/quickstart-heldout.jsonl}\n"

    def seen(drawn: str, seed: int) -> DatasetFacts | None:
        said = text.replace(held_out, drawn).replace("  batch_size: 4\n", f"  batch_size: 4\n  seed: {seed}\n")
        return read_dataset(parse_experiment(said).experiment, ROOT)

    assert seen("", 1) is seen("", 2)  # read and counted once for all seeds of a sweep
    assert seen("  eval: {fraction: 0.4}\n", 1) != seen("  eval: {fraction: 0.4}\n", 2)


def test_pairs_count_both_answers(read: Reader) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": f"Who knows {'w ' * i}"} for i in range(6)]
    pairs = changed("learning_rate: 2e-4", "learning_rate: 5e-6", changed("method: qlora", "method: dpo", NO_EVAL))
    facts = read(rows, changed("base: .*", "base: {model: ./base}", pairs))
    assert (facts.format, facts.is_chat, facts.exact, facts.same) == ("chosen/rejected", False, True, Lines())
    assert facts.tokens is not None
    assert facts.tokens.sequences == 6
    assert facts.tokens.longest < facts.tokens.total / 6
    same = [{**rows[0], "rejected": "It is 0."}, rows[1], {"messages": []}]
    found = read(same, pairs)
    assert found.same == Lines(1, (1,))
    assert found.issue(Problem.FORMAT) is not None


@pytest.mark.slow
def test_tokens_of_pairs_are_those_of_training(read: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_tokens import training_script

    def pair(number: int) -> dict[str, Any]:
        row = chat(number, words=number % 40)
        worse = {"role": "assistant", "content": "Nobody knows" + " it" * (number % 30)}
        return {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [worse]}

    text = changed("max_length: 2048", "max_length: 40", changed("2e-4", "5e-6", changed("qlora", "dpo", TINY)))
    tokens = read([pair(i) for i in range(60)], text).tokens
    script = training_script(monkeypatch)
    experiment = parse_experiment(text).experiment.resolved()
    run = {"experiment": experiment, "inputs": {"data": {"path": str(tmp_path / "data/coach.jsonl")}}}
    run["work"] = str(tmp_path / "work")
    rows, tokenizer = script.split_rows(run)[0], script.load_tokenizer(BASE)
    made, counts = script.tokenize_pairs(run, tokenizer, rows, 40)
    prompts, chosen, rejected = (sum(map(len, made[name])) for name in script.PARTS)
    assert tokens is not None
    assert tokens.sequences == len(made) == counts["examples"]
    assert (tokens.total, tokens.trained) == (2 * prompts + chosen + rejected, chosen + rejected)
    assert tokens.longest == counts["longest_row_tokens"]
    assert counts["truncated_rows"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_held_out_rows_and_tokens_are_those_of_training(
    read: Reader, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's `tokens_seen` and `tokens_trained` of one epoch, computed by the script's own functions."""
    from test_tokens import training_script

    rows = [chat(i, words=i % 50) for i in range(101)]
    text = changed("max_length: 2048", "max_length: 48", changed("fraction: 0.05", f"fraction: {fraction}", TINY))
    tokens = read(rows, text).tokens
    script = training_script(monkeypatch)
    experiment = parse_experiment(text).experiment.resolved()
    run = {"experiment": experiment, "inputs": {"data": {"path": str(tmp_path / "data/coach.jsonl")}}}
    examples = script.encode_rows(script.split_rows(run)[0], script.load_tokenizer(BASE), "assistant")
    kept = [short for short in (example.cut(48) for example in examples) if short.trained()]
    assert tokens is not None
    assert (tokens.sequences, tokens.total) == (len(kept), sum(len(example.ids) for example in kept))
    assert tokens.trained == sum(example.trained() for example in kept)
    assert tokens.longest == max(len(example.ids) for example in examples)
