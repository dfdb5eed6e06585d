"""The events that job scripts print among the other lines of their logs. Reads one line; follows no log."""

import json
from typing import Any

EVENT_PREFIX = "MERGETUNE "


def parse_event(line: str) -> dict[str, Any] | None:
    """The event on a log line, or None for any other line."""
    if not line.startswith(EVENT_PREFIX):
        return None
    try:
        event = json.loads(line.removeprefix(EVENT_PREFIX))
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
