"""A Hugging Face Hub for tests: the endpoints that the client needs, on this machine, with faults on demand.

    with HubServer(folder) as hub:
        hub.create("me/model").commit({"config.json": b"{}"})
        hub.inject("GET", "/cdn/.*model.safetensors", cut(after=1000))
        subprocess.run(command, env=hub.environment(home))

The API is at 127.0.0.1. As with the real Hub, LFS contents have another origin (localhost, another port): they come
from `/cdn/OWNER/NAME/SHA256?filename=PATH&…`, and go to `/upload/OWNER/NAME/SHA256[/UPLOAD/PART]?…`. A request for
`/OWNER/NAME/resolve/REVISION/PATH` is redirected (302) to such an address, so faults in LFS data are for `/cdn/`.
Model repositories only.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.hub import endpoints
from tests.support.hub.calls import PIECE, Answer, Call, pieces, refused
from tests.support.hub.repository import Commit, Refusal, Repository, Storage

__all__ = [
    "Action",
    "Commit",
    "HubServer",
    "Repository",
    "Request",
    "corrupt",
    "cut",
    "drip",
    "hang",
    "ignore_range",
    "landed",
    "slow",
    "status",
    "truncated",
]


@dataclass(frozen=True)
class Action:
    """What happens to a request instead of, or besides, the proper answer. Made by the functions below."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    perform: bool = True
    hang: bool = False
    wait: float = 0
    cut: int | None = None
    shorten: int = 0
    corrupt: int | None = None
    rate: float | None = None
    ignore_range: bool = False


def status(
    code: int,
    headers: Mapping[str, str] | None = None,
    error_code: str | None = None,
    error_message: str | None = None,
    body: bytes = b"",
) -> Action:
    """Answer this and do nothing."""
    named = {"X-Error-Code": error_code, "X-Error-Message": error_message}
    return Action(
        status=code,
        headers={**(headers or {}), **{name: value for name, value in named.items() if value}},
        body=body,
        perform=False,
    )


def landed(code: int | None = 500) -> Action:
    """Do what is asked, then answer with an error, or with None, close the connection without an answer."""
    return Action(cut=-1) if code is None else Action(status=code)


def cut(after: int) -> Action:
    """Close the connection after this many bytes of a body.

    That is the request's body, if it has one (nothing is done then), else the answer's.
    """
    return Action(cut=after)


def truncated(by: int) -> Action:
    """Leave out the end of the answer's body; Content-Length is that of the rest."""
    return Action(shorten=by)


def corrupt(offset: int) -> Action:
    """Flip a bit of the byte at this offset of the answer's body, or of its last byte if it is shorter."""
    return Action(corrupt=offset)


def slow(seconds: float) -> Action:
    """Wait before anything is done."""
    return Action(wait=seconds)


def drip(bytes_per_second: float) -> Action:
    """Send the answer's body slowly."""
    return Action(rate=bytes_per_second)


hang = Action(hang=True)
"""Read nothing and answer nothing until the server closes."""
ignore_range = Action(ignore_range=True)
"""Answer 200 with the whole file if a range is requested."""


@dataclass
class Request:
    """A request that arrived. Sizes are of bodies, as far as they got; `status` is 0 until an answer is begun."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """The names are in lower case."""
    cdn: bool
    time: float
    """The time of its arrival: `time.monotonic()`."""
    received: int = 0
    sent: int = 0
    status: int = 0


class _Closed(Exception):  # noqa: N818
    """The connection should end without (more of) an answer."""


class _Body:
    """The body of a request, with a length or in chunks."""

    def __init__(self, file: BufferedIOBase, request: Request):
        self._file = file
        self._request = request
        self._chunked = request.headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = 0 if self._chunked else int(request.headers.get("content-length", 0))
        self._ended = not self._chunked
        self.exists = self._chunked or self._left > 0

    def read(self, size: int = -1) -> bytes:
        """This many bytes, or all; fewer only at the end. _Closed if the client went away."""
        parts, wanted = [], size if size >= 0 else 1 << 62
        while wanted and (self._left or not self._ended):
            if not self._left:
                self._left = int(self._file.readline().split(b";")[0] or b"0", 16)
                self._ended = not self._left
            elif piece := self._file.read(min(wanted, self._left, PIECE)):
                parts.append(piece)
                wanted -= len(piece)
                self._left -= len(piece)
                self._request.received += len(piece)
            else:
                raise _Closed
            if self._chunked and not self._left:
                self._file.readline()
        return b"".join(parts)

    def drain(self) -> None:
        while self.read(PIECE):
            pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.hub.lock:
            self.server.connections.add(self.connection)
            if self.server.hub.closing.is_set():  # it came too late for `stop`
                self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        with self.server.hub.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Tests read `HubServer.requests`."""

    def handle_any(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.server is hub.servers[1], time.monotonic())
        action = hub.begin(request)
        body = _Body(self.rfile, request)
        try:
            if action.hang:
                hub.closing.wait()
                raise _Closed
            if action.wait and hub.closing.wait(action.wait):
                raise _Closed
            if action.cut is not None and action.cut >= 0 and body.exists:
                body.read(action.cut)
                raise _Closed
            answer = self.answer(action, body) if action.perform else Answer()
            body.drain()
            if action.status is not None:
                answer = Answer(action.status, dict(action.headers), action.body)
            self.send(answer, action, request)
        except (_Closed, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def answer(self, action: Action, body: _Body) -> Answer:
        """Do what is asked."""
        hub, url = self.server.hub, urlsplit(self.path)
        call = Call(
            hub,
            self.command,
            url.path,
            parse_qs(url.query, keep_blank_values=True),
            self.headers,
            body,
            keep_range=not action.ignore_range,
        )
        try:
            if self.server is hub.servers[0]:
                return endpoints.answer(call, endpoints.HUB)
            if "Authorization" in self.headers:
                return refused(
                    Refusal(400, "Only one auth mechanism allowed: this address is signed, and a token came with it")
                )
            return endpoints.answer(call, endpoints.CDN)
        except (_Closed, ConnectionError):
            raise
        except Exception:  # a defect in this server, or a request that no client should send
            hub.errors.append(traceback.format_exc())
            return Answer(500, body=traceback.format_exc().encode())

    def send(self, answer: Answer, action: Action, request: Request) -> None:
        if action.cut == -1:
            raise _Closed
        size = max(0, answer.size - action.shorten)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = size if action.cut is None else min(size, action.cut)
        flipped = None if action.corrupt is None else min(action.corrupt, size - 1)
        for whole in pieces(answer.body, PIECE if action.rate is None else max(1, int(action.rate / 20))):
            piece = whole[: limit - request.sent]
            if flipped is not None and request.sent <= flipped < request.sent + len(piece):
                changed = bytearray(piece)
                changed[flipped - request.sent] ^= 1
                piece = bytes(changed)
            if action.rate is not None and self.server.hub.closing.wait(len(piece) / action.rate):
                raise _Closed
            request.sent += len(piece)
            self.wfile.write(piece)
            if request.sent == limit:
                break
        if action.cut is not None:
            raise _Closed


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    """Threads are waited for: nothing continues after the end of a test."""
    request_queue_size = 128

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hub-{self.server_port}")
        self._thread.start()

    def handle_error(self, *_: object) -> None:
        """A connection that was reset; anything else is caught by the handler."""

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        with self.hub.lock:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # closed by the client
        self.server_close()


@dataclass
class _Rule:
    method: str
    pattern: re.Pattern[str]
    action: Action
    times: int
    after: int


class HubServer:
    """The Hub, while in `with`. LFS objects are files in `folder`, named by their SHA-256; all else is in memory.

    `tokens` maps tokens to users. `requests` has every request so far, `errors` the tracebacks of this server's own
    defects, and `leaks` the requests to the other origin that carried a token. Listings have `page_size` entries per
    page. LFS files above `multipart_bytes` go in parts of `chunk_bytes`.
    """

    def __init__(self, folder: Path):
        self.storage = Storage(folder)
        self.tokens = {"hf_test": "me"}
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.page_size = 1000
        self.multipart_bytes = 8 << 20
        self.chunk_bytes = 4 << 20
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.servers: list[_Server] = []
        self._rules: list[_Rule] = []

    def __enter__(self) -> HubServer:
        for _ in range(2):
            self.servers.append(_Server(self))
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers:
            server.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def cdn(self) -> str:
        """The origin of LFS contents."""
        return f"http://localhost:{self.servers[1].server_port}"

    @property
    def leaks(self) -> list[Request]:
        return [request for request in list(self.requests) if request.cdn and "authorization" in request.headers]

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A new repository, "owner/name", with the Hub's first commit."""
        with self.lock:
            if name in self.repositories:
                raise ValueError(f"{name} exists")
            self.renamed.pop(name, None)
            self.repositories[name] = Repository(name, self.storage, self.lock, private=private, gated=gated)
            return self.repositories[name]

    def repository(self, name: str) -> Repository:
        return self.repositories[name]

    def rename(self, old: str, new: str) -> None:
        """From now on the old name answers with a redirect (307) to the new one."""
        with self.lock:
            repository = self.repositories.pop(old)
            repository.name = new
            self.repositories[new] = repository
            self.renamed[old] = new

    def inject(self, method: str, pattern: str, action: Action, *, times: int = 1, after: int = 0) -> None:
        """Apply an action to the next `times` requests with this method whose path and query match the pattern.

        The first `after` such requests pass. If several rules apply to a request, the oldest is used.
        """
        with self.lock:
            self._rules.append(_Rule(method, re.compile(pattern), action, times, after))

    def count(self, method: str, pattern: str) -> int:
        """How many such requests there were (patterns as for `inject`)."""
        return sum(
            1
            for request in list(self.requests)
            if re.fullmatch(method, request.method) and re.search(pattern, request.path)
        )

    def begin(self, request: Request) -> Action:
        """Record a request; returns what should happen to it."""
        with self.lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times > 0 and re.fullmatch(rule.method, request.method) and rule.pattern.search(request.path):
                    if rule.after == 0:
                        rule.times -= 1
                        return rule.action
                    rule.after -= 1
        return Action()

    def environment(self, home: Path, token: str | None = "hf_test") -> dict[str, str]:
        """A complete environment for a process whose client uses this Hub: this process's own, less what interferes."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match(r"(?i)HF_|HUGGING|.*_PROXY$|TRANSFORMERS_", name)
        }
        client: dict[str, Any] = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        if token is not None:
            client["HF_TOKEN"] = token
        return {
            **kept,
            **client,
            **dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1"),
        }
