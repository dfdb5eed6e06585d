"""Values of manifests, tags and logs, that somebody else may have written: of the type that is needed, or nothing."""

from collections.abc import Mapping
from typing import Any

LARGEST = 1e15  # a number beyond it is no loss, duration or size


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: object) -> float | None:
    """A finite number that can be reckoned with; JSON's true is none, and NaN is smaller than nothing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if -LARGEST < value < LARGEST else None
