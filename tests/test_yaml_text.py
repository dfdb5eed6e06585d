"""YAML traps: each is closed with its place and a way out."""

import time
from pathlib import Path

import pytest

from pipeline.errors import InvalidExperiment, Place
from pipeline.yaml_text import MAX_BYTES, load_yaml, parse_yaml, resolve_plain


def fault(text: str) -> tuple[str, str, Place]:
    with pytest.raises(InvalidExperiment) as caught:
        parse_yaml(text, "x.yaml")
    finding = caught.value.findings[0]
    return finding.message, finding.hint, finding.at


@pytest.mark.parametrize(
    ("text", "message", "hint", "line"),
    [
        ("", "the file is empty", "mergetune init", 0),
        ("# only a comment\n", "the file is empty", "mergetune init", 0),
        ("just words\n", "must be a mapping", "mergetune init", 1),
        ("- a\n- b\n", "must be a mapping", "mergetune init", 1),
        ("a: 1\nb: 2\na: 3\n", "duplicate key `a`", "line 1", 3),
        ("a: &x 1\nb: *x\n", "anchors and aliases", "write the value out", 1),
        ("a:\n  <<: {b: 1}\n", "merge keys", "write the keys out", 2),
        ("a: !!python/object:os.system x\n", "YAML tag", "remove the tag", 1),
        ("a: !secret x\n", "YAML tag `!secret`", "quote", 1),
        ("? [a, b]\n: 1\n", "a key must be plain text", "quote", 1),
        ("a: 1\n---\nb: 2\n", "not YAML", "one experiment per file", 2),
        ("a:\n\tb: 1\n", "not YAML", "spaces, not tabs", 2),
        ("a: 1\n\tb: 1\n", "not YAML", "spaces, not tabs", 2),
        ("a: @acme\n", "not YAML", "cannot start with `@`", 1),
        ("a: b: c\n", "not YAML", "quote the value", 1),
        ("a: [1, 2\n", "not YAML", "indentation and quotes", 2),
        ("a: *unknown\n", "not YAML", "quote a value that starts with `*`", 1),
        ("a: \x00b\n", "control character U+0000", "binary", 1),
        ("a: 1\nb: x\u202ey\n", "control character U+202E", "remove it", 2),
    ],
)
def test_trap(text: str, message: str, hint: str, line: int) -> None:
    said, way_out, at = fault(text)
    assert message in said
    assert hint in way_out
    assert at.line == line


def test_bomb_is_refused_by_its_first_anchor() -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    started = time.monotonic()
    message, _, at = fault("\n".join(["l0: &l0 [a, a]", *levels]))
    assert "anchors and aliases" in message
    assert at.line == 1
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("deep", ["a: " + "[" * 5000 + "]" * 5000, "a: " + "{b: " * 3000 + "1" + "}" * 3000])
def test_deep_nesting_is_refused(deep: str) -> None:
    assert "nested too deep" in fault(deep)[0]


def test_positions_of_values_and_keys() -> None:
    text = parse_yaml("a:\n  b: 1\n  c: [x, yy]\n", "x.yaml")
    assert text.at(("a", "b")) == Place("x.yaml", 2, 6)
    assert text.at_key(("a", "c")) == Place("x.yaml", 3, 3)
    assert text.at(("a", "c", 1)) == Place("x.yaml", 3, 10)
    assert text.at(("a", "missing")) == Place("x.yaml", 2, 3)


def test_scalars_stay_text_until_a_schema_reads_them() -> None:
    data = parse_yaml("a: 2e-4\nb: 1:30\nc: no\nd: 5e2\ne:\nf: '3'\n", "x.yaml").data
    assert data == {"a": "2e-4", "b": "1:30", "c": "no", "d": "5e2", "e": None, "f": "3"}


def test_resolve_plain_follows_yaml_1_2() -> None:
    data = parse_yaml("{a: 2e-4, b: 1:30, c: no, d: true, e: '3', f: [1, .5], g: 1e999, h: 007}", "x.yaml").data
    expected = {"a": 2e-4, "b": "1:30", "c": "no", "d": True, "e": "3", "f": [1, 0.5], "g": "1e999", "h": 7}
    assert resolve_plain(data) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(InvalidExperiment) as caught:
            load_yaml(path, path.name)
        assert caught.value.exit_code == 2
        return caught.value.as_text()

    assert "missing.yaml: error: no such file" in said(tmp_path / "missing.yaml")
    assert "is a folder" in said(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a: " + b"x" * MAX_BYTES)
    assert "larger than 256 KiB" in said(big)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: 1\nb: caf\xe9\n".encode("latin-1"))
    assert "latin.yaml:2:1: error: not UTF-8 text: byte 0xe9" in said(latin)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    assert "not UTF-8" in said(binary) or "control character" in said(binary)
