"""HTTP plumbing of the loopback Hub: a request in, an answer out. Knows nothing of repositories or jobs."""

import contextlib
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from servers.hub_faults import Action, Faults

BODY_KEPT = 64 * 1024  # Bytes of a request body that a test can look at.
IN_MEMORY = 1024 * 1024  # Longer bodies are spooled to disk.


class HubError(Exception):
    """An answer of the Hub that is not a success; `code` becomes the X-Error-Code header."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def answer(self) -> "Answer":
        """The error as the Hub writes it: in the body and in two headers."""
        headers = {**self.headers, "X-Error-Message": self.message.split("\n")[0]}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_answer({"error": self.message}, self.status, **headers)


@dataclass(frozen=True)
class Request:
    """One request as a test sees it afterwards. The Authorization header is not kept anywhere."""

    n: int
    method: str
    path: str  # with query
    status: int  # 0 where the socket was closed without an answer
    user: str | None
    body: bytes  # the first 64 KiB; the values of job secrets are masked


@dataclass(frozen=True)
class Call:
    """One request as a view sees it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    stream: BinaryIO
    secret: str | None  # the bearer token

    def body(self) -> bytes:
        """The whole body, for requests that are small by nature."""
        self.stream.seek(0)
        return self.stream.read()

    def start_of_body(self) -> bytes:
        """What a record of requests keeps."""
        self.stream.seek(0)
        return self.stream.read(BODY_KEPT)

    def json(self) -> Any:
        """The body as JSON; a 400 where it is not."""
        try:
            return json.loads(self.body() or b"{}")
        except ValueError:
            raise HubError(400, "Invalid JSON body") from None

    def first(self, name: str, default: str = "") -> str:
        """A query parameter given once."""
        return self.query.get(name, [default])[0]


@dataclass
class Answer:
    """Status, headers and one of three bodies: bytes, a slice of a file, or a stream that ends with the socket."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    offset: int = 0
    length: int = 0
    stream: Iterator[bytes] | None = None

    def size(self) -> int:
        """Bytes announced by Content-Length."""
        return self.length if self.file else len(self.body)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON body."""
    return Answer(status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(value).encode())


View = Callable[..., Answer]


@dataclass(frozen=True)
class Route:
    """A method, a pattern of the undecoded path, and the view that gets the decoded groups by name."""

    method: str
    pattern: re.Pattern[str]
    view: View


def route(method: str, pattern: str, view: View) -> Route:
    """`{name}` in the pattern is one path segment, `{name:path}` is the rest of the path."""
    pattern = re.sub(r"\{(\w+):path\}", r"(?P<\1>.*)", pattern)
    return Route(method, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)), view)


def dispatch(routes: list[Route], world: Any, call: Call) -> Answer:
    """The first route that matches answers; HEAD is GET without its body."""
    method = "GET" if call.method == "HEAD" else call.method
    for candidate in routes:
        found = candidate.pattern.fullmatch(call.path)
        if candidate.method == method and found:
            groups = {name: unquote(value) for name, value in found.groupdict().items()}
            try:
                return candidate.view(world, call, **groups)
            except HubError as error:
                return error.answer()
    return HubError(404, f"No such route: {call.method} {call.path}").answer()


@dataclass
class Front:
    """What the handler threads share."""

    perform: Callable[[Call], Answer]
    user_of: Callable[[str | None], str | None]
    redact: Callable[[Call], bytes]
    on_request: Callable[[Request], None]
    faults: Faults
    spool: Path
    clock: Callable[[], float]
    stop: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, call: Call, target: str, status: int) -> None:
        """Remember the request, then tell the test, which may kill the client before it hears the answer."""
        body = self.redact(call)
        with self.lock:
            request = Request(len(self.requests) + 1, call.method, target, status, self.user_of(call.secret), body)
            self.requests.append(request)
        self.on_request(request)


class Server(ThreadingHTTPServer):
    """One thread per connection; hung connections do not hold up the end of a test."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, front: Front) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.front = front
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection."""
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self.open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Hang up: a client that kept its connection would be served beyond the end of the server."""
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is what several tests are about; everything else is a bug and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, applies a planted fault, sends the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms per request
    wbufsize = 64 * 1024
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """Every method goes the same way."""
        front = self.server.front
        action = front.faults.take(self.command, self.path)
        with tempfile.SpooledTemporaryFile(IN_MEMORY, dir=front.spool) as stream:
            self._read_body(stream)
            call = self._call(stream)
            front.stop.wait(action.delay_s)
            answer = front.perform(call) if action.perform else Answer()
            if action.answer:
                answer = HubError(*action.answer).answer()
            front.record(call, self.path, 0 if action.close else answer.status)
        if action.close:
            self.close_connection = True
            return
        self._send(answer, action)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  (names that http.server looks up)

    def _call(self, stream: Any) -> Call:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        scheme, _, secret = headers.pop("authorization", "").partition(" ")
        query = parse_qs(parts.query, keep_blank_values=True)
        return Call(self.command, parts.path, query, headers, stream, secret if scheme == "Bearer" else None)

    def _read_body(self, stream: Any) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self._copy(stream, size)
                self.rfile.readline()
            self.rfile.readline()
            return
        self._copy(stream, int(self.headers.get("Content-Length") or 0))

    def _copy(self, stream: Any, size: int) -> None:
        while size > 0:
            piece = self.rfile.read(min(size, IN_MEMORY))
            if not piece:
                raise ConnectionResetError("the client closed the connection inside its body")
            stream.write(piece)
            size -= len(piece)

    def _send(self, answer: Answer, action: Action) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if not (action.strip_link and name == "Link"):
                self.send_header(name, value)
        if answer.stream is not None:
            self.send_header("Connection", "close")
            self.end_headers()
            return self._send_stream(answer.stream)
        self.send_header("Content-Length", str(answer.size()))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if action.cut_body:
            self.close_connection = True
            self.wfile.write(answer.body[: len(answer.body) // 2])
        elif answer.file:
            self._send_file(answer)
        else:
            self.wfile.write(answer.body)
        return None

    def _send_stream(self, stream: Iterator[bytes]) -> None:
        self.close_connection = True
        for piece in stream:
            self.wfile.write(piece)
            self.wfile.flush()

    def _send_file(self, answer: Answer) -> None:
        assert answer.file is not None
        with answer.file.open("rb") as source:
            source.seek(answer.offset)
            if answer.offset + answer.length == answer.file.stat().st_size:
                shutil.copyfileobj(source, self.wfile, IN_MEMORY)
            else:
                self.wfile.write(source.read(answer.length))

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header by the Hub's own clock: the client compares log timestamps with it."""
        return formatdate(self.server.front.clock() if timestamp is None else timestamp, usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the requests are in `hub.requests`."""
