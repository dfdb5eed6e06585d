"""GitHub's REST API for one repository: one connection, bounded waits, typed errors. Knows no pull request.

A question is asked again after a bad moment. What may not happen twice is asked once (`repeat=False`): its caller must
look before asking again. Waits for a rate limit are bounded; what takes longer is an error, never an empty list.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from pipeline import __version__
from pipeline.errors import redact
from pipeline.pull_request import Access, GitHubError

T = TypeVar("T")
# The oldest version that github.com serves; Enterprise Server knows it, and refuses versions that it does not know.
API_VERSION = "2022-11-28"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[\w.-]+")
PAGE = 100  # rows; GitHub gives no more at once
PAGES = 100  # of one list: 10,000 comments are no conversation of ours
UNTOLD_WAIT_S = 60.0  # what GitHub's documentation asks for where a secondary limit comes without a time
STATUSES = {401: Access.UNAUTHORIZED, 403: Access.FORBIDDEN, 404: Access.MISSING, 410: Access.MISSING}
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True)
class Setback:
    """Why one attempt failed, and after how many seconds another may help; None: it will not, or must not be tried."""

    error: GitHubError
    pause_s: float | None = None


@dataclass(frozen=True)
class Api:
    """One repository with one token; every method raises `GitHubError` for an answer that is not yes."""

    client: httpx2.Client = field(repr=False)
    url: str
    repository: str
    secret: str | None = field(repr=False)
    attempts: int
    patience_s: float  # how long one question may wait in all
    sleep: Callable[[float], None] = field(repr=False)
    clock: Callable[[], float] = field(repr=False)

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON at a path of the repository."""
        return self.json(self.ask("GET", path, params=params))

    def items(self, path: str, params: Mapping[str, str] | None = None, key: str | None = None) -> list[Any]:
        """Every row of a list, over all its pages; under `key` where GitHub wraps them."""
        target = path
        query: dict[str, str] | None = {**(params or {}), "per_page": str(PAGE)}
        rows: list[Any] = []
        for _ in range(PAGES):
            response = self.ask("GET", target, params=query)
            body = self.json(response)
            found = body.get(key) if key and isinstance(body, dict) else body
            if not isinstance(found, list):
                raise self._strange(f"no list at `{path}`")
            rows += found
            following = response.links.get("next", {}).get("url")
            if not following:
                return rows
            target, query = self._below(following), None
        raise GitHubError(Access.INCOMPLETE, f"`{path}` has more than {PAGES * PAGE:,} rows")

    def ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        repeat: bool = True,
    ) -> httpx2.Response:
        """The answer to a request below the repository (or to a whole URL), after waits that may help."""
        base = f"{self.url}/repos/{self.repository}"
        url = path if path.startswith(f"{self.url}/") else f"{base}/{path}" if path else base
        waited, attempt = 0.0, 1
        while True:
            answer = self._once(method, url, params, body, repeat, attempt)
            if isinstance(answer, httpx2.Response):
                return answer
            pause = answer.pause_s
            if pause is None or attempt >= self.attempts:
                raise answer.error
            if waited + pause > self.patience_s:
                words = (
                    f"{answer.error.detail} (to be asked again in {pause:.0f} s; no longer than {self.patience_s:g} s)"
                )
                raise GitHubError(answer.error.access, words)
            self.sleep(pause)
            waited, attempt = waited + pause, attempt + 1

    def json(self, response: httpx2.Response) -> Any:
        """The body of an answer."""
        try:
            return response.json()
        except ValueError:
            raise self._strange("a body that is not JSON") from None

    def read(self, reader: Callable[[Any], T], body: Any) -> T:
        """What the reader makes of a body; what it cannot read is an outage."""
        try:
            return reader(body)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as failure:
            raise self._strange(f"`{type(failure).__name__}: {failure}`") from None

    def _once(
        self, method: str, url: str, params: Mapping[str, str] | None, body: object, repeat: bool, attempt: int
    ) -> httpx2.Response | Setback:
        backoff = 2.0 ** (attempt - 1)
        try:
            response = self.client.request(method, url, params=params, json=body)
        except NOT_SENT as failure:
            return Setback(self._outage(failure), backoff)
        except httpx2.HTTPError as failure:
            return Setback(self._outage(failure), backoff if repeat else None)
        except (httpx2.InvalidURL, ValueError) as failure:
            return Setback(GitHubError(Access.REFUSED, self._clean(str(failure))))
        if response.is_success:
            return response
        return self._setback(response, backoff, repeat, attempt)

    def _setback(self, response: httpx2.Response, backoff: float, repeat: bool, attempt: int) -> Setback:
        status, said = response.status_code, _message(response)
        words = self._clean(f"{status} {said or response.reason_phrase}")
        if _limited(response, said):
            # Refused before anything was done: safe to ask again, whatever it was.
            return Setback(GitHubError(Access.LIMITED, words), self._told_wait(response, attempt))
        if status >= 500 or status == 408:
            return Setback(GitHubError(Access.UNREACHABLE, words), backoff if repeat else None)
        if status == 403 and "locked" in said.lower():
            return Setback(GitHubError(Access.LOCKED, words))
        if response.is_redirect:
            words += f"; `{self.repository}` may have a new name"
        return Setback(GitHubError(STATUSES.get(status, Access.REFUSED), words))

    def _told_wait(self, response: httpx2.Response, attempt: int) -> float:
        """How long GitHub wants us to wait; a minute more each time where it does not say."""
        after, reset = response.headers.get("Retry-After", ""), response.headers.get("X-RateLimit-Reset", "")
        if after.isdigit():
            return float(after)
        if response.headers.get("X-RateLimit-Remaining") == "0" and reset.isdigit():
            return max(float(reset) - self.clock(), 0.0) + 1.0
        return UNTOLD_WAIT_S * attempt

    def _outage(self, failure: httpx2.HTTPError) -> GitHubError:
        words = "no answer in time" if isinstance(failure, httpx2.TimeoutException) else str(failure)
        return GitHubError(Access.UNREACHABLE, self._clean(words or type(failure).__name__))

    def _strange(self, what: str) -> GitHubError:
        return GitHubError(Access.UNREACHABLE, self._clean(f"an answer that is not GitHub's: {what}"))

    def _below(self, url: str) -> str:
        """The address of a next page, which is asked with our token: never anywhere but below the API."""
        if not url.startswith(f"{self.url}/"):
            raise self._strange("its next page is on another server")
        return url

    def _clean(self, words: str) -> str:
        """One short line in which the token, whatever its shape, does not stand."""
        if self.secret:
            words = words.replace(self.secret, "<token>")
        return redact(" ".join(words.split()))[:300]


def open_api(
    api_url: str,
    token: str | None,
    repository: str,
    *,
    timeout_s: float = 30.0,
    attempts: int = 4,
    patience_s: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Api:
    """A repository at `api_url` (GITHUB_API_URL, with its prefix); without a token, what everybody may read."""
    if not REPOSITORY.fullmatch(repository):
        raise GitHubError(Access.REFUSED, f"`{redact(repository)[:80]}` is not `owner/name`")
    secret = (token or "").strip() or None
    if secret and not (secret.isascii() and secret.isprintable()):
        raise GitHubError(Access.UNAUTHORIZED, "the token has characters that no token has")
    headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": API_VERSION}
    headers["User-Agent"] = f"mergetune/{__version__}"
    headers |= {"Authorization": f"Bearer {secret}"} if secret else {}
    client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout_s), follow_redirects=False)
    return Api(client, api_url.rstrip("/"), repository, secret, attempts, patience_s, sleep, clock)


def _limited(response: httpx2.Response, said: str) -> bool:
    """Whether an answer is a rate limit, primary or secondary, and not a lack of rights."""
    if response.status_code == 429:
        return True
    told = "Retry-After" in response.headers or response.headers.get("X-RateLimit-Remaining") == "0"
    return response.status_code == 403 and (told or "rate limit" in said.lower())


def _message(response: httpx2.Response) -> str:
    """GitHub's own words about a failure."""
    try:
        body = json.loads(response.text)
    except ValueError:
        return ""
    if not isinstance(body, dict):
        return ""
    details = body.get("errors")
    more = "; ".join(_detail(row) for row in details) if isinstance(details, list) else ""
    return " ".join(part for part in (str(body.get("message", "")), more and f"({more})") if part)


def _detail(row: Any) -> str:
    if not isinstance(row, dict):
        return str(row)
    return str(row.get("message") or " ".join(str(row[name]) for name in ("field", "code") if name in row))
