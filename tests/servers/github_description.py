"""GitHub's API description, cut by scripts/dev/cut_github_openapi.py: examples, and checks against its schemas."""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

FILE = Path(__file__).with_name("github_openapi.json.gz")
NAME = "urn:github"


@cache
def description() -> dict[str, Any]:
    """The whole cut, as published (OpenAPI 3.0)."""
    return json.loads(gzip.decompress(FILE.read_bytes()))


@cache
def example_text(name: str) -> str:
    """A published example as JSON text."""
    return json.dumps(description()["components"]["examples"][name]["value"])


@cache
def operations() -> list[tuple[str, str, re.Pattern[str]]]:
    """Method, template and pattern of every described operation; fewer parameters come first."""
    rows = [
        (method, template, re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))))
        for template, item in description()["paths"].items()
        for method in item
        if method != "parameters"
    ]
    return sorted(rows, key=lambda row: row[1].count("{"))


def find(method: str, path: str) -> tuple[str, dict[str, str]]:
    """The template of a request's path (without prefix and query) and its parameters; KeyError when not described."""
    for known, template, pattern in operations():
        found = pattern.fullmatch(path)
        if known == method.lower() and found:
            return template, {name: unquote(value) for name, value in found.groupdict().items()}
    raise KeyError(f"GitHub's description has no {method} {path}")


def request_faults(method: str, target: str, body: bytes) -> list[str]:
    """What the description says against a request."""
    parts = urlsplit(target)
    template, given = find(method, parts.path)
    operation = description()["paths"][template][method.lower()]
    query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    faults = list(_parameter_faults(operation, given, query))
    if "requestBody" not in operation:
        return faults + (["a body that the description does not know"] if body else [])
    if not body:
        return faults + (["no body"] if operation["requestBody"].get("required") else [])
    return faults + body_faults(method, template, body)


def body_faults(method: str, template: str, body: bytes) -> list[str]:
    """What the described schema says against a request's body."""
    return _faults(["paths", template, method.lower(), "requestBody"], json.loads(body))


def response_faults(method: str, target: str, status: int, body: bytes) -> list[str]:
    """What the description says against an answer."""
    template, _given = find(method, urlsplit(target).path)
    responses = description()["paths"][template][method.lower()]["responses"]
    if str(status) not in responses:
        return [f"status {status} is not one of {', '.join(responses)}"]
    where = ["paths", template, method.lower(), "responses", str(status)]
    if "$ref" in responses[str(status)]:
        where = responses[str(status)]["$ref"].removeprefix("#/").split("/")
    if "content" not in _at(description(), where):
        return ["a body where there is none"] if body else []
    return _faults(where, json.loads(body))


def _parameter_faults(operation: dict[str, Any], path: dict[str, str], query: dict[str, str]) -> Iterator[str]:
    known = [_at(description(), p["$ref"][2:].split("/")) if "$ref" in p else p for p in operation["parameters"]]
    for name in query.keys() - {p["name"] for p in known if p["in"] == "query"}:
        yield f"no such parameter: {name}"
    for parameter in known:
        value = {"path": path, "query": query}[parameter["in"]].get(parameter["name"])
        if value is None:
            if parameter.get("required"):
                yield f"{parameter['name']} is missing"
            continue
        typed: Any = int(value) if parameter["schema"].get("type") == "integer" and value.isdigit() else value
        for fault in Draft202012Validator(_nullable(parameter["schema"])).iter_errors(typed):
            yield f"{parameter['name']}: {fault.message}"


def _faults(where: list[str], value: Any) -> list[str]:
    fault = best_match(_validator((*where, "content", "application/json", "schema")).iter_errors(value))
    return [f"{fault.json_path}: {fault.message[:300]}"] if fault else []


@cache
def _validator(where: tuple[str, ...]) -> Draft202012Validator:
    pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in where)
    return Draft202012Validator({"$ref": f"{NAME}#/{pointer}"}, registry=_registry())


@cache
def _registry() -> Registry:
    return Registry().with_resource(NAME, Resource(contents=_nullable(description()), specification=DRAFT202012))


def _at(node: Any, where: list[str]) -> Any:
    for part in where:
        node = node[part]
    return node


def _nullable(node: Any) -> Any:
    """OpenAPI 3.0's `nullable` in the words of JSON Schema 2020-12."""
    if isinstance(node, list):
        return [_nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {key: _nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [schema, {"type": "null"}]} if node.get("nullable") is True else schema
