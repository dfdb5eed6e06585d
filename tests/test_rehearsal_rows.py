"""The rows of a rehearsal: the first ones of a file in its own format, and made ones."""

import json
import sys
from datetime import date
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.rehearsal_rows import copy_first_rows, made_rows, shorten, synthetic_rows, texts_of
from pipeline.rows import check_row


def test_a_row_is_shortened_text_by_text() -> None:
    turns = [{"role": "user", "content": "q" * 900}, {"role": "assistant", "content": "a"}]
    short = json.loads(shorten(json.dumps({"messages": turns, "id": "x" * 900}), 600))
    assert short["messages"] == [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a"}]
    assert short["id"] == "x" * 900
    assert shorten("{not json", 600) == "{not json"
    many = json.dumps({"messages": [{"role": "user", "content": "q" * 90}] * 100})
    assert all(len(text) == 24 for text in texts_of([shorten(many, 600)]))


def test_answers_of_a_pair_stay_apart() -> None:
    pair = {"prompt": "q" * 900, "chosen": "a" * 900, "rejected": "b" * 900}
    assert [len(text) for text in texts_of([shorten(json.dumps(pair), 600)])] == [200, 200, 200]
    late = {**pair, "rejected": "a" * 900 + "b"}
    assert json.loads(shorten(json.dumps(late), 600)) == late
    turns = [[{"role": "assistant", "content": text}] for text in ("a" * 900, "a" * 899 + "b")]
    chats = {"prompt": [{"role": "user", "content": "q"}], "chosen": turns[0], "rejected": turns[1]}
    assert json.loads(shorten(json.dumps(chats), 300)) == chats


def test_made_pairs_are_pairs() -> None:
    lines, what = made_rows(16, pairs=True)
    rows = [check_row(json.loads(line), pairs=True) for line in lines]
    assert what == "pairs"
    assert len({row.digest() for row in rows}) == 16
    assert not any(row.is_same for row in rows)
    assert made_rows(3, pairs=False) == (synthetic_rows(3), "conversations")


def test_the_first_lines_stay_where_they_are(tmp_path: Path) -> None:
    path, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n')
    lines = copy_first_rows(path, copy, 3, 600)
    assert lines == copy.read_text().splitlines() == ['{"text": "a"}', "", '{"text": "b"}']
    assert list(texts_of([*lines, "{not json", "3"])) == ["a", "b"]


def test_made_rows_differ() -> None:
    assert len({*synthetic_rows(16)}) == 16


def test_parquet_stays_parquet_with_its_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, copy = tmp_path / "rows.parquet", tmp_path / "copy.parquet"
    turns = [{"role": "user", "content": "q" * 900}, {"role": "assistant", "content": "a" * 900}]
    rows = [{"messages": turns, "day": date(2026, 11, number + 1), "raw": b"\x00"} for number in range(9)]
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, path, row_group_size=2)
    lines = copy_first_rows(path, copy, 4, 600)
    assert len(lines) == 4
    assert [len(text) for text in texts_of(lines)] == [300] * 8
    assert parquet.read_schema(copy).equals(table.schema)
    assert parquet.read_table(copy).to_pylist()[3]["day"] == date(2026, 11, 4)
    empty = tmp_path / "empty.parquet"
    parquet.write_table(table.slice(0, 0), empty)
    assert copy_first_rows(empty, tmp_path / "none.parquet", 4, 600) == []


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"rows\.parquet` cannot be read") as caught:
        copy_first_rows(path, tmp_path / "copy.parquet", 4, 600)
    assert caught.value.hint == "check that the file is whole"
    with pytest.raises(UserError, match=r"gone\.jsonl` cannot be read"):
        copy_first_rows(tmp_path / "gone.jsonl", tmp_path / "copy.jsonl", 4, 600)


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(UserError, match="pyarrow is not installed") as caught:
        copy_first_rows(tmp_path / "rows.parquet", tmp_path / "copy.parquet", 4, 600)
    assert caught.value.hint == 'install what trains: `pip install "mergetune[train]"`'
