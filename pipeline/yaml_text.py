"""YAML text to plain data with the position of every key and value. Knows YAML's traps; knows no schema.

Scalars stay text (`Plain` when unquoted): the schema, not YAML, decides what `2e-4`, `1:30`, `no` or `5e2` mean.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

import yaml

from pipeline.errors import Finding, InvalidExperiment, Place, Severity, excerpt
from pipeline.yaml_hints import problem_of, syntax_hint

MAX_BYTES = 256 * 1024  # An experiment is a page or two; beyond this it is the wrong file.
MAX_DEPTH = 12
MAX_NODES = 5_000
NULLS = ("", "~", "null", "Null", "NULL")

# What hides in an editor or a terminal: control characters, line ends that only YAML sees, marks that turn text around.
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff]")
# Tags that a plain value gets by its looks; written out (`!!str`) they change nothing here.
STANDARD = "tag:yaml.org,2002:"
IMPLICIT_TAGS = ("null", "bool", "int", "float", "timestamp", "str", "map", "seq", "merge", "value")
ALLOWED_TAGS = {STANDARD + name for name in IMPLICIT_TAGS}

Keys = tuple[str | int, ...]
Spot = tuple[int, int]


class Plain(str):
    """An unquoted YAML scalar, as written."""


@dataclass(frozen=True)
class YamlText:
    """The data of one YAML file, and where each value (`values`) and each mapping key (`keys`) stands.

    Line and column, from 0: of thousands of files hardly a place is ever asked for.
    """

    path: str
    data: Any
    values: Mapping[Keys, Spot] = field(repr=False)
    keys: Mapping[Keys, Spot] = field(repr=False)

    def at(self, keys: Keys) -> Place:
        """The place of a value, or of the nearest parent that was written."""
        while keys and keys not in self.values:
            keys = keys[:-1]
        return _at(self.path, self.values.get(keys))

    def find(self, dotted: str, below: Keys = ()) -> Keys:
        """The path of a dotted key, as far as it is written. A key of the file may hold dots itself: `lora.r`."""
        parts, keys = dotted.split("."), below
        while parts:
            for count in range(len(parts), 0, -1):
                word = ".".join(parts[:count])
                found = [(*keys, key) for key in (word, int(word) if word.isdecimal() else word)]
                if known := next((path for path in found if path in self.values), None):
                    keys, parts = known, parts[count:]
                    break
            else:
                return keys
        return keys

    def at_key(self, keys: Keys) -> Place:
        """The place of a key."""
        return _at(self.path, self.keys[keys]) if keys in self.keys else self.at(keys)


def invalid(at: Place, message: str, hint: str = "", rule: str = "EXP001") -> InvalidExperiment:
    """The exception for one fault of a file."""
    return InvalidExperiment((Finding(rule, Severity.ERROR, at, message, hint),))


def load_yaml(path: Path, shown: str) -> YamlText:
    """Read one YAML mapping from `path`, shown to people as `shown`.

    Raises:
        InvalidExperiment: missing, unreadable, too big, binary, not UTF-8, not YAML, or one of YAML's traps.
    """
    return parse_yaml(_read(path, Place(shown)), shown)


def parse_yaml(text: str, shown: str) -> YamlText:
    """Parse one YAML mapping; see `load_yaml`."""
    top = Place(shown)
    _refuse_control_characters(text, shown)
    try:
        _refuse_deep_nesting(text, shown)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise invalid(
            _place(shown, error.problem_mark), f"not YAML: {problem_of(error)}", syntax_hint(error, text)
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        hint = "start from `mergetune init NAME`"
        raise invalid(top, f"not YAML: {str(error).splitlines()[0]}", hint) from error
    if node is None or _is_null(node):
        raise invalid(top, "the file is empty", "start from `mergetune init NAME`")
    builder = _Builder(shown)
    data = builder.build(node, (), 0)
    if not isinstance(data, dict):
        at = _place(shown, node.start_mark)
        raise invalid(at, "the file must be a mapping of keys to values", "start from `mergetune init NAME`")
    return YamlText(shown, data, builder.values, builder.keys)


def resolve_plain(value: Any) -> Any:
    """Turn `Plain` text into numbers and booleans by the YAML 1.2 core schema, through lists and mappings.

    Only for values without a schema of their own; quoted text stays text.
    """
    if isinstance(value, dict):
        return {key: resolve_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_plain(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,300}", value):  # Python refuses to read 4,300 digits
        return int(value)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", value):
        number = float(value)
        return number if math.isfinite(number) else str(value)
    return str(value)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's loader where PyYAML was built with it: the same nodes, many times faster."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of what has none written: which one is not asked here, and finding it out takes a regex a word."""
        return f"{STANDARD}str"


def _read(path: Path, at: Place) -> str:
    hint = f"check the path, or create it with `mergetune init {path.stem}`"
    try:
        if path.is_dir():
            raise invalid(at, "is a folder, not a YAML file", "pass a file inside it")
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise invalid(at, "no such file", hint) from error
    except OSError as error:
        raise invalid(at, f"cannot be read: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise invalid(at, f"cannot be read: {error}", "check the path") from error
    if len(raw) > MAX_BYTES:
        raise invalid(at, f"larger than {MAX_BYTES // 1024} KiB", "an experiment is one short file; is this the data?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message, hint = f"not UTF-8 text: byte 0x{raw[error.start]:02x}", "save the file as UTF-8"
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            message = "not UTF-8 text but UTF-16"
        elif b"\0" in raw:
            message, hint = f"not UTF-8 text but a binary file ({len(raw)} bytes)", "pass the experiment's YAML file"
        raise invalid(Place(at.path, line, 1), message, hint) from error


def _refuse_control_characters(text: str, shown: str) -> None:
    found = HIDDEN.search(text)
    if not found:
        return
    line = text.count("\n", 0, found.start()) + 1
    column = found.start() - text.rfind("\n", 0, found.start())
    raise _hidden(Place(shown, line, column), found.group())


def _hidden(at: Place, character: str) -> InvalidExperiment:
    name = f"control character U+{ord(character):04X}"
    if character in "\0\x03\x04\x14":
        return invalid(at, name, "remove it; is this a binary file?")
    return invalid(at, f"{name}: a reviewer would not see what stands here", "remove it")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in NULLS


def _refuse_deep_nesting(text: str, shown: str) -> None:
    """Count levels without recursion: libyaml composes by recursion, and 50,000 levels overflow the stack.

    Each level takes a bracket or a column, so text with few of both needs no look.
    """
    if text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0) < 1000:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:  # the mapping at the top is level 0 of the data
            raise _too_deep(_place(shown, event.start_mark))


def _too_deep(at: Place) -> InvalidExperiment:
    return invalid(at, "nested too deep or too large for an experiment", "flatten it")


def _at(shown: str, spot: Spot | None) -> Place:
    return Place(shown, spot[0] + 1, spot[1] + 1) if spot else Place(shown)


def _place(shown: str, mark: Any) -> Place:
    return Place(shown, mark.line + 1, mark.column + 1) if mark else Place(shown)


class _Builder:
    """Walks the node tree once, collecting positions; refuses what an experiment must not contain."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.values: dict[Keys, Spot] = {}
        self.keys: dict[Keys, Spot] = {}
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, keys: Keys, depth: int) -> Any:
        mark = node.start_mark
        self.values[keys] = mark.line, mark.column
        if depth > MAX_DEPTH or len(self.values) > MAX_NODES:
            raise _too_deep(_place(self.shown, mark))
        # An alias gives the same node object twice: anchors would let one line mean another (and bombs explode).
        if id(node) in self.seen:
            hint = "write the value out: one file says all"
            raise invalid(_place(self.shown, mark), "YAML anchors and aliases are not allowed", hint)
        self.seen.add(id(node))
        self._refuse_tag(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*keys, index), depth + 1) for index, item in enumerate(node.value)]
        self._refuse_hidden(node)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, keys: Keys, depth: int) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                hint = "quote a key that starts with `{` or `[`"
                raise invalid(_place(self.shown, mark), "a key must be plain text", hint)
            self._refuse_hidden(key_node)
            key = intern(str(key_node.value))  # one text for the key in all files
            below = (*keys, key)
            if key == "<<" and not key_node.style:
                hint = "write the keys out: one file says all"
                raise invalid(_place(self.shown, mark), "YAML merge keys are not allowed", hint)
            if key in built:
                hint = f"keep one: it also stands on line {self.keys[below][0] + 1}"
                raise invalid(_place(self.shown, mark), f"duplicate key `{excerpt(key)}`", hint)
            self.keys[below] = mark.line, mark.column
            built[key] = self.build(value_node, below, depth + 1)
        return built

    def _refuse_tag(self, node: yaml.Node) -> None:
        if node.tag in ALLOWED_TAGS:
            return
        at, written = _place(self.shown, node.start_mark), str(node.tag or "")
        if not written.startswith(STANDARD):
            raise invalid(at, f"YAML tag `{excerpt(written)}` is not allowed", "remove it, or quote a value with `!`")
        raise invalid(at, f"YAML tag `{excerpt(written.replace(STANDARD, '!!'))}` is not allowed", "remove the tag")

    def _refuse_hidden(self, node: yaml.Node) -> None:
        """Double quotes can spell what the file itself may not hold: `\\0`, `\\u202E`."""
        if isinstance(node, yaml.ScalarNode) and node.style == '"' and (found := HIDDEN.search(node.value)):
            raise _hidden(_place(self.shown, node.start_mark), found.group())


def _scalar(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise TypeError(f"not a scalar node: {node!r}")
    if node.style:  # `"`, `'`, `|` or `>`; empty when unquoted
        return str(node.value)
    if node.value in NULLS:
        return None
    return Plain(node.value)
