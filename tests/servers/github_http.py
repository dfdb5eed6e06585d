"""HTTP plumbing of the loopback GitHub: who asks, may they, which page. Knows no pull request."""

import io
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from servers.github_description import body_faults, find
from servers.hub_faults import Faults
from servers.hub_http import Answer, Call, Handler, Route, Server, json_answer

DOCS = "https://docs.github.com/rest"
DEFAULT_PAGE, LARGEST_PAGE = 30, 100


class Refused(Exception):
    """An answer of GitHub that is not a success."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def answer(self) -> Answer:
        """The error as GitHub writes it."""
        body = {"message": self.message, "documentation_url": DOCS, "status": str(self.status)}
        return json_answer(body, self.status, **self.headers)


@dataclass(frozen=True)
class Exchange:
    """One request with its answer, as a test sees it afterwards. The Authorization header is not kept anywhere."""

    n: int
    method: str
    path: str  # below the API's prefix, with query
    status: int  # 0 where the socket was closed without an answer
    user: str | None
    headers: dict[str, str]
    body: bytes
    answer: bytes

    def json(self) -> Any:
        """The request's body."""
        return json.loads(self.body)


@dataclass
class GitHubFront:
    """What the handler threads share."""

    perform: Callable[[Call], Answer]
    user_of: Callable[[str | None], str | None]
    prefix: str
    faults: Faults
    clock: Callable[[], float]
    on_request: Callable[[Exchange], None]
    stop: threading.Event = field(default_factory=threading.Event)
    requests: list[Exchange] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class GitHubServer(Server):
    """The loopback Hub's server with GitHub's manners."""

    def __init__(self, front: GitHubFront) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), GitHubHandler)
        self.front = front  # type: ignore[assignment]
        self.open = set()


class GitHubHandler(Handler):
    """Reads a request, applies a planted fault, sends the answer."""

    def do_GET(self) -> None:  # noqa: N802
        """Every method goes the same way."""
        front: Any = self.server.front
        stream = io.BytesIO()
        self._read_body(stream)
        call = self._call(stream)
        action = front.faults.take(self.command, self.path)
        front.stop.wait(action.delay_s)
        answer = front.perform(call) if action.perform else Answer()
        if action.answer:
            answer = Refused(*action.answer).answer()
        answer.headers.update(getattr(action, "headers", {}))
        path = self.path.removeprefix(front.prefix)
        status = 0 if action.close else answer.status
        with front.lock:
            n, user = len(front.requests) + 1, front.user_of(call.secret)
            exchange = Exchange(n, self.command, path, status, user, call.headers, call.body(), answer.body)
            front.requests.append(exchange)
        front.on_request(exchange)
        self.close_connection = self.close_connection or action.close
        if not action.close:
            self._send(answer, action)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815  (names that http.server looks up)

    def _call(self, stream: Any) -> Call:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        scheme, _, secret = headers.pop("authorization", "").partition(" ")
        query = parse_qs(parts.query, keep_blank_values=True)
        token = secret if scheme.lower() in ("bearer", "token") else None
        return Call(self.command, parts.path, query, headers, stream, token)


def answer_call(routes: list[Route], world: Any, call: Call) -> Answer:
    """What the first route that matches answers; a body that the description refuses is a 422."""
    path = call.path.removeprefix(world.prefix)
    try:
        if not call.path.startswith(f"{world.prefix}/"):
            raise Refused(404, "Not Found")
        world.require_known(call)
        for candidate in routes:
            found = candidate.pattern.fullmatch(path)
            if candidate.method == call.method and found:
                _require_body(call, path)
                with world.lock:
                    return candidate.view(world, call, **{k: unquote(v) for k, v in found.groupdict().items()})
        raise Refused(404, "Not Found")
    except Refused as refused:
        return refused.answer()


def _require_body(call: Call, path: str) -> None:
    body = call.body()
    if not body:
        return
    try:
        faults = body_faults(call.method, find(call.method, path)[0], body)
    except ValueError:
        raise Refused(400, "Problems parsing JSON") from None
    if faults:
        raise Refused(422, f"Invalid request.\n\n{faults[0]}")


def page(world: Any, call: Call, rows: list[Any], key: str | None = None, **more: Any) -> Answer:
    """One page of the rows with its Link header; under `key`, with the total, where GitHub wraps them."""
    size = min(_number(call, "per_page", DEFAULT_PAGE), LARGEST_PAGE)
    number, last = _number(call, "page", 1), max(1, -(-len(rows) // size))
    shown = rows[(number - 1) * size : number * size]
    links = [("prev", number - 1)] * (number > 1) + [("next", number + 1), ("last", last)] * (number < last)
    query = {name: values[0] for name, values in call.query.items()}
    text = ", ".join(
        f'<{world.url}{call.path}?{urlencode({**query, "page": target})}>; rel="{name}"' for name, target in links
    )
    body = shown if key is None else {"total_count": len(rows), key: shown, **more}
    return json_answer(body, **({"Link": text} if text else {}))


def _number(call: Call, name: str, default: int) -> int:
    text = call.first(name, str(default))
    return max(1, int(text)) if re.fullmatch(r"\d{1,9}", text) else default
