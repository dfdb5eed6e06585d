"""What to do about a text that is not YAML, from the words of the parser. Reads and parses nothing."""

import re

import yaml


def problem_of(error: yaml.MarkedYAMLError) -> str:
    """What the parser says, on one line."""
    words = [part for part in (error.context, error.problem) if part]
    return ", ".join(words) or "syntax error"


def syntax_hint(error: yaml.MarkedYAMLError, text: str) -> str:
    """The edit that most likely mends it."""
    problem = error.problem or ""
    lines = text.splitlines()
    at_line, column = (error.problem_mark.line, error.problem_mark.column) if error.problem_mark else (0, 0)
    line = lines[at_line] if at_line < len(lines) else ""
    if "tab character" in problem or line[: column + 1].lstrip(" ")[:1] == "\t":
        return "indent with spaces, not tabs"
    if "cannot start any token" in problem:
        return f"quote the value: plain text cannot start with `{line[column : column + 1]}`"
    if "mapping values are not allowed" in problem:
        return _colon_hint(lines, at_line)
    if "unknown escape character" in problem:
        return "write the text in single quotes, or each `\\` twice"
    opened = error.context_mark.line + 1 if error.context_mark else 0
    if "could not find expected ':'" in problem:
        return f"write `: ` after the key on line {opened}"
    if at_line > error.context_mark.line if error.context_mark else False:
        if "quoted scalar" in (error.context or ""):
            return f"close the quote of line {opened}"
        if "flow" in (error.context or ""):
            return f"close the bracket of line {opened}, or check the indentation and quotes after it"
    if "expected a single document" in problem_of(error):
        return "one experiment per file: remove the `---`"
    if "undefined alias" in problem:
        return "quote a value that starts with `*`"
    return "check the indentation and quotes on this line and the one above"


def _colon_hint(lines: list[str], at: int) -> str:
    """Why a `: ` stands where none may: in a value, after a line without one, or on a line indented too far."""
    line = lines[at] if at < len(lines) else ""
    before = lines[at - 1] if at else ""
    if re.fullmatch(r"\s*[\w-]+:\S+", before):
        return f"write a space after the colon on line {at}"
    if len(re.findall(r":(?: |$)", line)) == 1 and len(line) - len(line.lstrip()) > len(before) - len(before.lstrip()):
        return f"indent it like line {at}"
    return "quote the value if it contains `: `"
