"""What the text of a job script says: its header, its packages, its calls, what it prints. Runs and judges nothing."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

HEADER = re.compile(r"(?m)^# /// script$\s(?P<body>(?:^#(?:| .*)$\s)+?)^# ///$")  # the block PEP 723 describes
SECRET_NAME = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
# A cheap look before the syntax tree: most scripts read no secret.
READS_SECRET = re.compile(
    r"(?:environ|getenv)[^\n]{0,40}(?:TOKEN(?!IZ)|SECRET|PASSWORD|API_?KEY|CREDENTIAL)"
    r"|get_token\(|(?:print|emit|debug|info|write)\([^\n]*\benviron\b",
    re.IGNORECASE,
)
PRINTERS = {"print", "emit", "debug", "info", "warning", "error", "critical", "exception", "log", "write"}


@lru_cache(maxsize=256)
def header_of(text: str) -> dict[str, Any] | None:
    """The PEP 723 header as TOML; None without one, or when it cannot be read."""
    found = HEADER.search(text)
    if found is None:
        return None
    lines = found["body"].splitlines()
    try:
        return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    except tomllib.TOMLDecodeError:
        return None


def jobs_table(text: str) -> dict[str, Any]:
    """`[tool.hf-jobs]` of a script's header."""
    tool = (header_of(text) or {}).get("tool")
    table = tool.get("hf-jobs") if isinstance(tool, dict) else None
    return table if isinstance(table, dict) else {}


def requirements(text: str) -> list[str]:
    """The dependencies of a script's header as written."""
    wanted = (header_of(text) or {}).get("dependencies", [])
    return [str(one) for one in wanted] if isinstance(wanted, list) else []


def packages_of(text: str) -> set[str]:
    """Names of the packages a script's header installs, in their canonical spelling."""
    return {package(wanted) for wanted in requirements(text)}


def package(wanted: str) -> str:
    """`Flash_Attn[x] >= 2` is `flash-attn`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;@(]", wanted.strip())[0]).lower()


def is_pinned(wanted: str) -> bool:
    """One exact version, or a direct reference to a commit or a wheel."""
    version = wanted.split(";")[0]
    if "@" in version:
        return bool(re.search(r"@[0-9a-f]{40}\b|\.whl\b|#sha256=", version))
    return bool(re.search(r"(?<![<>!~=])={2,3}\s*[^\s,*]+\s*$", version))


@lru_cache(maxsize=256)
def tree_of(text: str) -> ast.Module:
    """The syntax tree; empty for text that is not Python, which a rule of its own reports."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def source_of(node: ast.AST) -> str:
    """An expression as text; empty for one nested too deep to write."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""


def called(call: ast.Call) -> str:
    """The last name of what is called: `push_to_hub` of `trainer.push_to_hub()`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


@lru_cache(maxsize=256)
def printing_line(text: str) -> int:
    """The first line that prints something read as a secret."""
    if not READS_SECRET.search(text):
        return 0
    nodes = list(ast.walk(tree_of(text)))
    names = {name for node in nodes for name in _secret_names(node)}
    prints = (node for node in nodes if isinstance(node, ast.Call) and called(node) in PRINTERS)
    return next((node.lineno for node in prints if _shows_secret(node, names)), 0)


def _reads_secret(node: Any) -> bool:
    """An expression that is a secret of the environment: `os.environ["…TOKEN"]`, `getenv`, `get_token()`."""
    if isinstance(node, ast.Subscript):
        return source_of(node.value).endswith("environ") and bool(SECRET_NAME.search(source_of(node.slice)))
    if isinstance(node, ast.Call) and called(node) in ("get", "getenv", "pop"):
        is_environment = called(node) == "getenv" or "environ" in source_of(node.func)
        return is_environment and any(SECRET_NAME.search(source_of(argument)) for argument in node.args[:1])
    return isinstance(node, ast.Call) and called(node) == "get_token"


def _secret_names(node: ast.AST) -> Iterator[str]:
    """Names a statement gives to a secret."""
    if isinstance(node, ast.Assign) and _reads_secret(node.value):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and isinstance(node.target, ast.Name):
        yield from [node.target.id] if _reads_secret(node.value) else []


def _shows_secret(call: ast.Call, names: set[str]) -> bool:
    """True when an argument's text would contain a secret; `bool(x)`, `len(x)` and comparisons do not."""
    waiting: list[Any] = [*call.args, *(keyword.value for keyword in call.keywords)]
    while waiting:
        node = waiting.pop()
        if _reads_secret(node) or (isinstance(node, ast.Name) and node.id in names) or _is_environment(node):
            return True
        if isinstance(node, ast.Subscript) and _is_environment(node.value):
            waiting.append(node.slice)  # one variable, and not a secret one
        elif isinstance(node, ast.Call) and called(node) in ("get", "getenv", "pop", "bool", "len", "sorted", "list"):
            waiting += node.args[1:]
        elif not isinstance(node, ast.Compare):
            waiting += ast.iter_child_nodes(node)
    return False


def _is_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"
