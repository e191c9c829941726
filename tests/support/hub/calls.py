"""A request as the endpoints of the Hub for tests see it, and their answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tests.support.hub.repository import Refusal, Repository

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer

PIECE = 1 << 20


@dataclass(frozen=True)
class Slice:
    """Bytes of a file, sent without being held in memory."""

    path: Path
    start: int
    size: int


@dataclass
class Answer:
    """A response; Content-Length and Date are added when it is sent."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Slice = b""

    @property
    def size(self) -> int:
        return self.body.size if isinstance(self.body, Slice) else len(self.body)


def pieces(body: bytes | Slice, size: int) -> Iterator[bytes]:
    """A body in pieces of `size` bytes."""
    if isinstance(body, bytes):
        yield from (body[start : start + size] for start in range(0, len(body), size))
        return
    left = body.size
    with body.path.open("rb") as file:
        file.seek(body.start)
        while piece := file.read(min(size, left)):
            left -= len(piece)
            yield piece


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(value).encode()
    )


def refused(refusal: Refusal) -> Answer:
    headers = {**refusal.headers, "X-Error-Message": refusal.message}
    if refusal.error_code:
        headers["X-Error-Code"] = refusal.error_code
    return json_answer({"error": refusal.message}, refusal.code, headers)


class Readable(Protocol):
    """The body of a request."""

    def read(self, size: int = ..., /) -> bytes:
        """At most this many bytes, or all; none at the end."""


@dataclass
class Call:
    """A request as an endpoint sees it. `path` is not decoded, as a revision may contain an encoded slash."""

    hub: HubServer
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Readable
    arguments: tuple[str, ...] = ()
    keep_range: bool = True

    def json(self) -> Any:
        return json.loads(self.body.read() or b"{}")

    def argument(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[-1]

    @property
    def user(self) -> str | None:
        """The user of the token; None without a token. Refusal (401) for an unknown token."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if not kind:
            return None
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def signed_in(self) -> str:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def repository(self) -> Repository:
        """The repository of the first argument, if the user may see it."""
        user = self.user
        repository = self.hub.repositories.get(self.arguments[0])
        if repository is None or (repository.private and user != repository.owner and user not in repository.readers):
            # Without a token, nobody is told whether it exists.
            raise Refusal(
                404 if user else 401,
                "Repository not found" if user else "Invalid username or password.",
                "RepoNotFound",
            )
        return repository

    def writable(self) -> Repository:
        repository = self.repository()
        if self.signed_in() != repository.owner:
            raise Refusal(403, f"Authorization error: you may not write to {repository.name}")
        return repository
