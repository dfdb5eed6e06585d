"""Faults that a test plants in the loopback GitHub, beside those of the loopback Hub. Sends nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from servers.hub_faults import Action, status

SECONDARY = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
PRIMARY = "API rate limit exceeded for installation."


@dataclass(frozen=True)
class Headed(Action):
    """An answer with headers of the test's choice."""

    headers: Mapping[str, str] = field(default_factory=dict)


def secondary_limit(retry_after_s: int | None = 1, code: int = 403) -> Headed:
    """Too many at once; without `retry_after_s` GitHub does not say how long."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return Headed(perform=False, answer=(code, SECONDARY), headers=headers)


def primary_limit(reset_at: int, code: int = 403) -> Headed:
    """The hour's requests are used up until `reset_at` (seconds since 1970)."""
    headers = {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(reset_at)}
    return Headed(perform=False, answer=(code, PRIMARY), headers=headers)


def bad_gateway(*, performed: bool = False) -> Action:
    """502; `performed` = GitHub did the work and then failed to say so."""
    return status(502, "Server Error", performed=performed)


def next_page(url: str) -> Headed:
    """A proper answer whose Link names this as the next page."""
    return Headed(headers={"Link": f'<{url}>; rel="next"'})
