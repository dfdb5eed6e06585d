"""The rows of a rehearsal: the first ones of a data file, shortened, or made ones. Checks no row: the stages do."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

TEXT_KEYS = {"content", "value", "text", "prompt", "completion", "chosen", "rejected"}
SHORTEST = 24  # characters that every text keeps, however many share a row


def copy_first_rows(source: Path, target: Path, count: int, budget: int) -> list[str]:
    """Write the first rows of a data file to `target` in its format, their texts cut to `budget` characters a row.

    Returns the rows as JSON lines. A line that is no JSON object stays, for its stage to name.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if source.suffix == ".parquet":
            return _copy_parquet(source, target, count, budget)
        with source.open(encoding="utf-8", errors="replace") as handle:
            lines = [shorten(line.rstrip("\n"), budget) for line in islice(handle, count)]
    except (OSError, ValueError) as error:
        raise UserError(f"`{source}` cannot be read: {error}", "check that the file is whole") from error
    write_lines(target, lines)
    return lines


def write_lines(target: Path, lines: Iterable[str]) -> None:
    """Write JSON lines."""
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def shorten(line: str, budget: int) -> str:
    """A row with its texts cut to `budget` characters together."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return json.dumps(_shorter(row, budget), ensure_ascii=False)


def synthetic_rows(count: int) -> list[str]:
    """Conversations in the shape every `loss_on` takes, for data that is not in the repository."""
    rows = []
    for number in range(count):
        question = f"What is the depth of the channel at buoy {number}, and who keeps its light?"
        answer = f"At buoy {number} it is {number + 3} metres at low water. The harbour master keeps the light."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    return rows


def made_rows(count: int, pairs: bool) -> tuple[list[str], str]:
    """Rows for data that is not in the repository, and what they are."""
    return (synthetic_pairs(count), "pairs") if pairs else (synthetic_rows(count), "conversations")


def synthetic_pairs(count: int) -> list[str]:
    """Pairs of answers, for preference data that is not in the repository."""
    pairs = []
    for row in map(json.loads, synthetic_rows(count)):
        *asked, answer = row["messages"]
        worse = {**answer, "content": "Nobody knows how deep it is there. Ask somebody else."}
        pairs.append(json.dumps({"prompt": asked, "chosen": [answer], "rejected": [worse]}))
    return pairs


def texts_of(lines: Iterable[str]) -> Iterator[str]:
    """Every text of JSON lines that a row would be trained on or asked with; other lines have none."""
    for line in lines:
        try:
            yield from _texts_in(json.loads(line))
        except (ValueError, RecursionError):
            continue


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _texts_in(item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and key in TEXT_KEYS:
                yield inner
            else:
                yield from _texts_in(inner)


def _copy_parquet(source: Path, target: Path, count: int, budget: int) -> list[str]:
    """Columns keep their types, so that the job script meets what the whole file would give it."""
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        hint = 'install what trains: `pip install "mergetune[train]"`'
        raise UserError(f"`{source}` cannot be read: pyarrow is not installed", hint) from error
    try:
        with parquet.ParquetFile(source) as file:
            batch = next(file.iter_batches(batch_size=count), None)
            rows = [_shorter(row, budget) for row in batch.to_pylist()] if batch else []
            parquet.write_table(arrow.Table.from_pylist(rows, schema=file.schema_arrow), target)
    except arrow.ArrowException as error:
        raise UserError(f"`{source}` cannot be read: {error}", "check that the file is whole") from error
    return [json.dumps(row, ensure_ascii=False, default=str) for row in rows]


def _shorter(row: Any, budget: int) -> Any:
    texts = len(list(_texts_in(row)))
    shorter = _cut(row, max(SHORTEST, budget // max(texts, 1)))
    if isinstance(row, dict) and "chosen" in row and shorter["chosen"] == shorter.get("rejected"):
        return row  # answers that differ late: cut, there would be nothing to prefer
    return shorter


def _cut(value: Any, limit: int) -> Any:
    if isinstance(value, list):
        return [_cut(item, limit) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner[:limit] if isinstance(inner, str) and key in TEXT_KEYS else _cut(inner, limit)
        for key, inner in value.items()
    }
