"""The Hub's API description, cut by scripts/dev/cut_openapi.py: checks request bodies against it. Reads one file."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from servers.hub_http import HubError

FILE = Path(__file__).with_name("hub_openapi.json.gz")


@cache
def description() -> dict[str, Any]:
    """The whole cut."""
    return json.loads(gzip.decompress(FILE.read_bytes()))


@cache
def _validator(method: str, template: str) -> Draft202012Validator:
    operation = description()["paths"][template][method]
    return Draft202012Validator(operation["requestBody"]["content"]["application/json"]["schema"])


def require_body(method: str, template: str, body: Any) -> dict[str, Any]:
    """The body where it obeys the described schema; a 400 that names the place where it does not."""
    fault = best_match(_validator(method, template).iter_errors(body))
    if fault is not None:
        raise HubError(400, f"Invalid input: {fault.message} at {fault.json_path}")
    return body
