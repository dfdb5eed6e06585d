"""Data files to `DatasetFacts`: reads, counts, holds out as training will. Judges nothing."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.chat_template import FILES, has_template
from pipeline.dataset_facts import SHOWN, DatasetFacts, Issues, Lines, Problem, TokenFacts
from pipeline.errors import excerpt
from pipeline.experiment import Experiment
from pipeline.facts import NOTHING, FromHub
from pipeline.fields import is_path
from pipeline.read_rows import ReadRows
from pipeline.rows import parse_line, shown
from pipeline.tokens import Counter, RoughCounter, RowCount, count_pairs, make_counter, scaled, token_facts


@dataclass(frozen=True)
class Limits:
    """How much of a file is looked at: rows and bytes that are parsed, rows and characters that are tokenized."""

    rows: int = 20_000
    bytes: int = 16_000_000
    tokenized: int = 2_000
    characters: int = 4_000_000


@dataclass(frozen=True)
class _Raw:
    """A parsed row, or the error of one that could not be parsed; or `skipped` rows beyond the limits."""

    line: int
    value: Any = None
    error: str = ""
    skipped: int = 0


@dataclass(frozen=True)
class _Source:
    """What decides a reading; the stamps are times of change, so that an edited file is read again."""

    name: str
    paths: tuple[Path, ...]
    base: Path | None
    loss_on: str
    pairs: bool
    limits: Limits
    stamps: tuple[int, ...]


@dataclass(frozen=True)
class _Counted:
    """A file, read and counted: sequences by position of the row, for a sample of the rows."""

    read: ReadRows
    counts: dict[int, RowCount]
    counter: Counter
    has_template: bool | None
    duplicates: Lines
    uneven: Lines


def read_dataset(
    experiment: Experiment, root: Path, limits: Limits | None = None, fetched: FromHub = NOTHING
) -> DatasetFacts | None:
    """Facts of the experiment's data files, or None when they are not readable files of this repository or `fetched`.

    Parquet needs pyarrow; without it such a file stays unknown. A base that is at hand counts tokens exactly.
    """
    limits = limits or Limits()
    train, held_out = experiment.train, experiment.data.eval
    base = root / experiment.base.model if is_path(experiment.base.model) else fetched.base

    def source_of(name: str | None, others: tuple[Path, ...]) -> _Source | None:
        path = data_path(name, root) if name else None
        paths = (path,) if path else tuple(other for other in others if can_read(other))
        return _source(experiment, paths, base, limits) if paths else None

    source = source_of(experiment.data.dataset, fetched.data)
    fraction = held_out.fraction if held_out else None
    seed = train.seed if fraction is not None else 0  # without a draw the seeds of a sweep see the same rows
    facts = _facts(source, train.max_length, seed, fraction) if source else None
    eval_source = source_of(held_out.dataset, fetched.held_out) if held_out else None
    eval_facts = _facts(eval_source, train.max_length) if eval_source else None
    if not (facts and source and eval_facts and eval_source):
        return facts
    return replace(facts, eval_file=eval_facts, leaked=_leaked(source, eval_source))


def _source(experiment: Experiment, paths: tuple[Path, ...], base: Path | None, limits: Limits) -> _Source:
    read = [*(base / name for name in FILES), *paths] if base else paths
    stamps = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in read)
    name = paths[0].name if len(paths) == 1 else experiment.data.dataset
    train = experiment.train
    return _Source(name, paths, base, train.loss_on.value, train.is_dpo, limits, stamps)


@lru_cache(maxsize=4)  # a large file's rows take 100 MB; what is made of them is remembered below
def _counted(source: _Source) -> _Counted:
    """Read and count once, however many experiments share the file."""
    read = _read(source)
    chat = bool(read.rows) and read.rows[0][1].is_chat
    counter, known = _counter(source.base, source.stamps[: len(FILES)] if source.base else (), chat)
    # A sample is spread over the file: its order may have a meaning.
    chosen = range(0, len(read.rows), _stride(read, source.limits))
    sample = [read.rows[position][1] for position in chosen]
    counts = count_pairs(counter, sample) if source.pairs else counter.count(sample, source.loss_on)
    counted = dict(zip(chosen, counts, strict=False))
    for position, count in counted.items():
        if count.fault:
            hint = "change the order or the roles of its turns, or remove the row"
            message = f"the base's chat template refuses this row: {shown(count.fault, 200)}"
            read.add(Problem.TEMPLATE, read.rows[position][0], message, hint)
    uneven = Lines.of([line for line, row in read.rows if row.is_chat and not row.alternates()])
    return _Counted(read, counted, counter, known, read.duplicates(), uneven)


def _stride(read: ReadRows, limits: Limits) -> int:
    """Every how many rows one is counted."""
    return max(1, -(-len(read.rows) // limits.tokenized), -(-read.characters() // limits.characters))


@lru_cache(maxsize=4)
def _counter(base: Path | None, stamps: tuple[int, ...], chat: bool) -> tuple[Counter, bool | None]:
    """The base's counter, and whether it has a chat template: looked at once for all data, by the base's stamps."""
    files = base_files(base) if base else {}
    known = has_template(files) if files else None
    if chat and known is False:
        return RoughCounter("the base has no chat template"), known
    return make_counter(files, datetime.now()), known


def data_path(name: str, root: Path) -> Path | None:
    """The data file of that name, or None for a Hub dataset, a file that is not there, or Parquet without pyarrow."""
    path = root / name
    known = can_read(path) and is_path(name) and path.is_file()
    return path if known and path.resolve().is_relative_to(root.resolve()) else None  # a link may lead outside


def can_read(path: Path) -> bool:
    """Whether rows of such a file can be read with what is installed."""
    return path.suffix == ".jsonl" or (path.suffix == ".parquet" and find_spec("pyarrow") is not None)


def base_files(base: Path) -> dict[str, str]:
    """Texts of the tokenizer files in a base's folder, by name."""
    paths = [base / name for name in FILES]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _read(source: _Source) -> ReadRows:
    """Every row checked, as far as the limits allow for all files together; lines are counted through them."""
    limits, read = source.limits, ReadRows(source.pairs)
    left = limits.bytes
    for path in source.paths:
        jsonl, before = path.suffix == ".jsonl", read.total
        within = replace(limits, rows=max(0, limits.rows - before), bytes=max(1, left))
        left -= path.stat().st_size
        mend = "write one JSON object per line, in UTF-8", "write the file again, or convert it to `.jsonl`"
        for raw in _jsonl(path, within) if jsonl else _parquet(path, within):
            read.total += raw.skipped or 1
            if raw.skipped:
                read.sampled = True
            elif raw.error:
                read.add(Problem.JSON, before + raw.line, raw.error, mend[not jsonl])
            else:
                read.check(before + raw.line, raw.value)
    return read


def _jsonl(path: Path, limits: Limits) -> Iterator[_Raw]:
    """Rows with their line numbers; blank lines are no rows. Beyond the limits lines are counted, not parsed."""
    size = 0
    with path.open("rb") as handle:
        for line, text in enumerate(_lines_of(handle, limits.bytes), 1):
            size += len(text)
            if line > limits.rows or size > limits.bytes:
                yield _Raw(line, skipped=1 + _lines_left(handle))
                return
            if text.strip():
                yield _Raw(line, *parse_line(text))


def _lines_of(handle: BinaryIO, longest: int) -> Iterator[bytes]:
    """Lines, of which only the first part is kept where one alone passes the limit."""
    while text := handle.readline(longest + 1):
        rest = text
        while len(rest) > longest and not rest.endswith(b"\n"):
            rest = handle.readline(longest + 1)
        yield text


def _lines_left(handle: BinaryIO) -> int:
    return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 20), b""))


def _parquet(path: Path, limits: Limits) -> Iterator[_Raw]:
    from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        return iter([_Raw(1, error=f"not a complete Parquet file: {excerpt(error)}")])
    return _parquet_rows(file, limits)


def _parquet_rows(file: Any, limits: Limits) -> Iterator[_Raw]:
    number = size = 0
    for batch in file.iter_batches(batch_size=1000):
        within = number < limits.rows and size < limits.bytes
        size += batch.nbytes
        for value in batch.to_pylist() if within else [None] * batch.num_rows:
            number += 1
            yield _Raw(number, value, skipped=int(not within))


def _training_rows(count: int, seed: int, fraction: float | None) -> list[int]:
    """Positions of the rows that are trained on: drawn as `split_rows` of the training script draws them."""
    order = list(range(count))
    if fraction is None:
        return order
    random.Random(seed).shuffle(order)
    return sorted(order[max(1, round(count * fraction)) :])


@lru_cache(maxsize=1024)
def _facts(source: _Source, limit: int, seed: int = 0, fraction: float | None = None) -> DatasetFacts:
    """What was read, with the tokens of the rows to train on, cut at `limit`; once for all that ask the same."""
    counted = _counted(source)
    read = counted.read
    chosen = _training_rows(len(read.rows), seed, fraction)
    tokens, why = _tokens(counted, chosen, limit)
    issues = [Issues(kind, len(found), tuple(found[:SHOWN])) for kind, found in sorted(read.problems.items())]
    first = read.rows[0][1] if read.rows else None
    part = len(chosen) / len(read.rows) if read.rows else 1.0
    return DatasetFacts(
        path=source.name,
        rows=read.total,
        training_rows=len(chosen) if not read.sampled else round(read.total * part),
        format=first.format if first else None,
        is_chat=bool(first and first.is_chat),
        issues=tuple(issues),
        duplicates=counted.duplicates,
        same=read.same(),
        not_alternating=counted.uneven,
        tokens=tokens,
        exact=tokens is not None and not why and not read.problems,
        estimated=why,
        sampled=read.sampled,
        has_template=counted.has_template,
        base_fault=counted.counter.estimated if counted.counter.broken else "",
    )


def _tokens(counted: _Counted, chosen: list[int], limit: int) -> tuple[TokenFacts | None, str]:
    """Token statistics of the chosen rows, and why they are an estimate (empty: they are not)."""
    read = counted.read
    known = [(read.rows[position][0], counted.counts[position]) for position in chosen if position in counted.counts]
    good = [(line, count) for line, count in known if not count.fault]
    if not good:
        return None, counted.counter.estimated or "no row could be counted"
    facts = token_facts(good, limit)
    if len(known) == len(chosen) and not read.sampled:
        return facts, counted.counter.estimated or _rewritten(good)
    scale = len(chosen) / len(known) * (read.total / len(read.rows) if read.sampled else 1)
    return scaled(facts, scale), counted.counter.estimated or f"{len(known):,} of {read.total:,} rows were counted"


def _rewritten(counted: list[tuple[int, RowCount]]) -> str:
    """TRL has copies of some templates that keep history; where ours rewrites it, training may read fewer tokens."""
    split = any(len(count.examples) > 1 for _, count in counted)
    return "the chat template rewrites earlier turns, one sequence for each reply is assumed" if split else ""


@lru_cache(maxsize=1024)
def _leaked(source: _Source, eval_source: _Source) -> Lines:
    """Training rows that the held-out file repeats."""
    digests = {row.digest() for _, row in _counted(eval_source).read.rows}
    return Lines.of([line for line, row in _counted(source).read.rows if row.digest() in digests])
