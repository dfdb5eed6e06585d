"""Data files of this repository to `DatasetFacts`: reads, counts, holds out as training will. Judges nothing."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.chat_template import FILES, has_template
from pipeline.dataset_facts import SHOWN, DatasetFacts, Issues, Lines, Problem, RowIssue, TokenFacts
from pipeline.experiment import Experiment
from pipeline.fields import is_path
from pipeline.rows import BadRow, DataRow, check_row
from pipeline.tokens import Counter, RoughCounter, RowCount, make_counter, scaled, token_facts


@dataclass(frozen=True)
class Limits:
    """How much of a file is looked at: rows and bytes that are parsed, rows and characters that are tokenized."""

    rows: int = 20_000
    bytes: int = 16_000_000
    tokenized: int = 2_000
    characters: int = 4_000_000


@dataclass
class _Read:
    """A file while it is read."""

    total: int = 0
    rows: list[tuple[int, DataRow]] = field(default_factory=list)
    problems: dict[Problem, list[RowIssue]] = field(default_factory=dict)
    sampled: bool = False

    def add(self, problem: Problem, line: int, message: str, hint: str) -> None:
        self.problems.setdefault(problem, []).append(RowIssue(line, message, hint))


@dataclass(frozen=True)
class _Raw:
    """A parsed row, or the error of one that could not be parsed; `skipped` when it lies beyond the limits."""

    line: int
    value: Any = None
    error: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class _Source:
    """What decides a reading; the stamps are times of change, so that an edited file is read again."""

    path: Path
    base: Path | None
    loss_on: str
    limits: Limits
    stamps: tuple[int, ...]


@dataclass(frozen=True)
class _Counted:
    """A file, read and counted: sequences by position of the row, for a sample of the rows."""

    read: _Read
    counts: dict[int, RowCount]
    estimated: str
    has_template: bool | None


def read_dataset(experiment: Experiment, root: Path, limits: Limits | None = None) -> DatasetFacts | None:
    """Facts of the experiment's data files, or None when they are not readable files of this repository.

    Parquet needs pyarrow; without it such a file stays unknown. A base in this repository counts tokens exactly.
    """
    limits = limits or Limits()
    held_out = experiment.data.eval
    path = data_path(experiment.data.dataset, root)
    eval_path = data_path(held_out.dataset, root) if held_out and held_out.dataset else None
    counted = _counted(_source(experiment, path, root, limits)) if path else None
    if path is None or counted is None:
        return None
    facts = _facts(experiment, path, counted, _training_rows(experiment, counted.read))
    eval_counted = _counted(_source(experiment, eval_path, root, limits)) if eval_path else None
    if eval_path is None or eval_counted is None:
        return facts
    eval_facts = _facts(experiment, eval_path, eval_counted, list(range(len(eval_counted.read.rows))))
    return _with_eval(facts, counted.read, eval_facts, eval_counted.read)


def _source(experiment: Experiment, path: Path, root: Path, limits: Limits) -> _Source:
    base = root / experiment.base.model if is_path(experiment.base.model) else None
    read = [path, *(base / name for name in FILES)] if base else [path]
    stamps = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in read)
    return _Source(path, base, experiment.train.loss_on.value, limits, stamps)


@lru_cache(maxsize=32)
def _counted(source: _Source) -> _Counted | None:
    """Read and count once, however many experiments share the file; None for Parquet that cannot be read here."""
    read = _read(source.path, source.limits)
    if read is None:
        return None
    files = base_files(source.base) if source.base else {}
    counter = _counter(files, read)
    # A sample is spread over the file: its order may have a meaning.
    chosen = range(0, len(read.rows), _stride(read, source.limits))
    counts = counter.count([read.rows[position][1] for position in chosen], source.loss_on)
    for position, count in zip(chosen, counts, strict=True):
        if count.fault:
            hint = "change the order or the roles of its turns, or remove the row"
            message = f"the base's chat template refuses this row: {count.fault}"
            read.add(Problem.TEMPLATE, read.rows[position][0], message, hint)
    known = has_template(files) if files else None
    return _Counted(read, dict(zip(chosen, counts, strict=True)), counter.estimated, known)


def _stride(read: _Read, limits: Limits) -> int:
    """Every how many rows one is counted."""
    characters = sum(len(str(message["content"])) for _, row in read.rows for message in row.messages)
    characters += sum(len(row.prompt) + len(row.completion) for _, row in read.rows if not row.is_chat)
    return max(1, -(-len(read.rows) // limits.tokenized), -(-characters // limits.characters))


def _counter(files: dict[str, str], read: _Read) -> Counter:
    if files and not has_template(files) and read.rows and read.rows[0][1].is_chat:
        return RoughCounter("the base has no chat template")
    return make_counter(files, datetime.now())


def data_path(name: str, root: Path) -> Path | None:
    """The data file of that name, or None for a Hub dataset or a file that is not there."""
    path = root / name
    return path if is_path(name) and path.is_file() and path.suffix in (".jsonl", ".parquet") else None


def base_files(base: Path) -> dict[str, str]:
    """Texts of the tokenizer files in a base's folder, by name."""
    paths = [base / name for name in FILES]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _read(path: Path, limits: Limits) -> _Read | None:
    """Every row checked, as far as the limits allow; None for Parquet that cannot be read here."""
    raws = _jsonl(path, limits) if path.suffix == ".jsonl" else _parquet(path, limits)
    if raws is None:
        return None
    read = _Read()
    for raw in raws:
        read.total += 1
        if raw.skipped:
            read.sampled = True
        elif raw.error:
            read.add(Problem.JSON, raw.line, raw.error, "write one JSON object per line, in UTF-8")
        else:
            _check(read, raw)
    return read


def _check(read: _Read, raw: _Raw) -> None:
    try:
        row = check_row(raw.value)
    except BadRow as error:
        read.add(error.problem, raw.line, error.message, error.hint)
        return
    if read.rows and row.kind != read.rows[0][1].kind:
        line, first = read.rows[0]
        message = f"this row is {row.kind}, line {line} is {first.kind}"
        read.add(Problem.MIXED, raw.line, message, "use one format for the whole file")
        return
    read.rows.append((raw.line, row))


def _jsonl(path: Path, limits: Limits) -> Iterator[_Raw]:
    """Rows with their line numbers; blank lines are no rows. Beyond the limits rows are counted, not parsed."""
    rows = size = 0
    with path.open("rb") as handle:
        for line, text in enumerate(_lines_of(handle, limits.bytes), 1):
            if not text.strip():
                continue
            rows, size = rows + 1, size + len(text)
            if rows > limits.rows or size > limits.bytes:
                yield _Raw(line, skipped=True)
                continue
            try:
                yield _Raw(line, json.loads(text.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield _Raw(line, error=f"not JSON: {error}")


def _lines_of(handle: BinaryIO, longest: int) -> Iterator[bytes]:
    """Lines, of which only the first part is kept where one alone passes the limit."""
    while text := handle.readline(longest + 1):
        rest = text
        while len(rest) > longest and not rest.endswith(b"\n"):
            rest = handle.readline(longest + 1)
        yield text


def _parquet(path: Path, limits: Limits) -> Iterator[_Raw] | None:
    try:
        from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        return iter([_Raw(1, error=f"not a complete Parquet file: {error}")])
    return _parquet_rows(file, limits)


def _parquet_rows(file: Any, limits: Limits) -> Iterator[_Raw]:
    number = size = 0
    for batch in file.iter_batches(batch_size=1000):
        within = number < limits.rows and size < limits.bytes
        size += batch.nbytes
        for value in batch.to_pylist() if within else [None] * batch.num_rows:
            number += 1
            yield _Raw(number, value, skipped=not within)


def _training_rows(experiment: Experiment, read: _Read) -> list[int]:
    """Positions of the rows that are trained on: drawn as `split_rows` of the training script draws them."""
    held_out = experiment.data.eval
    order = list(range(len(read.rows)))
    if held_out is None or held_out.fraction is None:
        return order
    random.Random(experiment.train.seed).shuffle(order)
    return sorted(order[max(1, round(len(order) * held_out.fraction)) :])


def _facts(experiment: Experiment, path: Path, counted: _Counted, chosen: list[int]) -> DatasetFacts:
    """What was read, with the tokens of the chosen rows: those to train on."""
    read = counted.read
    tokens, why = _tokens(counted, chosen, experiment.train.max_length)
    issues = [Issues(kind, len(found), tuple(found[:SHOWN])) for kind, found in sorted(read.problems.items())]
    first = read.rows[0][1] if read.rows else None
    uneven = [line for line, row in read.rows if row.is_chat and not row.alternates()]
    part = len(chosen) / len(read.rows) if read.rows else 1.0
    return DatasetFacts(
        path=path.name,
        rows=read.total,
        training_rows=len(chosen) if not read.sampled else round(read.total * part),
        format=first.format if first else None,
        is_chat=bool(first and first.is_chat),
        issues=tuple(issues),
        duplicates=_duplicates(read),
        not_alternating=Lines.of(uneven),
        tokens=tokens,
        exact=tokens is not None and not why and not read.problems,
        estimated=why,
        sampled=read.sampled,
        has_template=counted.has_template,
    )


def _tokens(counted: _Counted, chosen: list[int], limit: int) -> tuple[TokenFacts | None, str]:
    """Token statistics of the chosen rows, and why they are an estimate (empty: they are not)."""
    read = counted.read
    known = [(read.rows[position][0], counted.counts[position]) for position in chosen if position in counted.counts]
    good = [(line, count) for line, count in known if not count.fault]
    if not good:
        return None, counted.estimated
    facts = token_facts(good, limit)
    if len(known) == len(chosen) and not read.sampled:
        return facts, counted.estimated or _rewritten(good)
    scale = len(chosen) / len(known) * (read.total / len(read.rows) if read.sampled else 1)
    return scaled(facts, scale), counted.estimated or f"{len(known):,} of {read.total:,} rows were counted"


def _rewritten(counted: list[tuple[int, RowCount]]) -> str:
    """TRL has copies of some templates that keep history; where ours rewrites it, training may read fewer tokens."""
    split = any(len(count.sequences) > 1 for _, count in counted)
    return "the chat template rewrites earlier turns, one sequence for each reply is assumed" if split else ""


def _duplicates(read: _Read) -> Lines:
    """Rows that repeat an earlier one."""
    seen: set[str] = set()
    repeated = []
    for line, row in read.rows:
        digest = row.digest()
        if digest in seen:
            repeated.append(line)
        seen.add(digest)
    return Lines.of(repeated)


def _with_eval(facts: DatasetFacts, read: _Read, eval_facts: DatasetFacts, eval_read: _Read) -> DatasetFacts:
    """Both files together: training rows that the held-out file repeats."""
    held_out = {row.digest() for _, row in eval_read.rows}
    leaked = [line for line, row in read.rows if row.digest() in held_out]
    return replace(facts, eval_file=eval_facts, leaked=Lines.of(leaked))
