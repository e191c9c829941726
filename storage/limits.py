"""Limits on what the Hub's client takes from a server while it is asked something: in time, bytes, values and pages."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from df11.formats import errors
from df11.storage.address import endpoint, origin_of
from df11.storage.answers import AGAIN, LaterError, no_connection, wait_asked
from df11.storage.secrets import PROXIES, has_proxy_password, without_secrets

TIMEOUTS: dict[str, float] = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
"""Seconds to wait for a connection, for the next bytes, for sending, and for a turn. They apply where the client
sets no timeout, as in most calls: it would wait forever."""
MOST_ANSWER: Final = 64 << 20
"""Bytes of an answer to the client's questions: a page of a listing has up to a thousand files."""
MOST_VALUES: Final = 2_000_000
"""JSON values of such an answer, a list or an object counted as four, with commas and brackets in texts: it takes up to
200 MiB in memory. That is a listing of a hundred thousand files."""
LONGEST_ANSWER: Final = 300.0
"""Seconds in which such an answer must have come, from the request on."""
MOST_PAGES: Final = 2000
LONGEST_LISTING: Final = 900.0
"""Pages, and seconds for all of them, of one question."""


class Asked:
    """What is asked in one call, and how much of the answer has come. The arguments are those of ``client.asking``."""

    def __init__(self, where: str, is_one_page: bool, patience: Callable[[], float] | None) -> None:
        self.where, self.is_one_page, self.patience = where, is_one_page, patience
        self.started = time.monotonic()
        self.answering = math.inf  # When the answer to the last request was begun to be waited for.
        self.pages = 0
        self.links: dict[int, int] = {}
        """Pages, and the ones that named them, as hashes: an address may have 100,000 characters."""

    def left(self) -> float:
        """Seconds in which more of the answer must have come. Raises a LaterError if there are none."""
        most = LONGEST_ANSWER if self.patience is None else self.patience()
        left = self.answering + most - time.monotonic()
        if left <= 0:
            what = "the Hub's answer takes too long" if self.patience is None else "the Hub sends too slowly"
            raise LaterError(what, file=self.where, hint=AGAIN)
        return left

    def count_page(self) -> None:
        """Raise a UsageError if there have been too many pages, or for too long."""
        self.pages += 1
        seconds = time.monotonic() - self.started
        if self.pages > MOST_PAGES or seconds > LONGEST_LISTING:
            found = f"{self.pages - 1:,} pages in {seconds:.0f} s"
            raise errors.UsageError("the Hub's answer does not end", file=self.where, found=found)

    def follow(self, page: str, following: str) -> None:
        """Raise a UsageError if a page leads back to an earlier one."""
        if following == page or self.links.setdefault(hash(following), hash(page)) != hash(page):
            what = "the Hub's answer does not end: a page leads back to an earlier one"
            raise errors.UsageError(what, file=self.where)


class _Limits:
    # What holds for requests of the client while a call of ours is under way. The client has no setting for a call, so
    # hooks of its session do it: timeouts for all threads, as it has some of its own, the rest for the caller's thread.
    # What comes before a response's hook is seen by the trace that its HTTP library calls, and by the connection.
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._mine = threading.local()

    @property
    def _asked(self) -> Asked | None:
        return getattr(self._mine, "asked", None)

    @contextmanager
    def __call__(self, asked: Asked) -> Iterator[None]:
        from huggingface_hub import get_session

        try:
            hooks = get_session().event_hooks
        except Exception as error:  # Of whatever the environment says of proxies and certificates.
            hint = f"check {', '.join(PROXIES)} and SSL_CERT_FILE"
            # Part of a password that is taken for something else may be in the message.
            told = "" if has_proxy_password() else f": {without_secrets(str(error))}"
            what = f"no connection can be set up ({type(error).__name__}{told})"
            raise errors.UsageError(what, hint=hint) from None
        with self._lock:
            self._calls += 1
            for hook, kind in ((self._request, "request"), (self._response, "response")):
                if hook not in hooks[kind]:
                    hooks[kind].append(hook)
        before, self._mine.asked = self._asked, asked
        try:
            yield
        finally:
            self._mine.asked = before
            with self._lock:
                self._calls -= 1

    def _request(self, request: Any) -> None:
        if not self._calls:
            return
        timeout = request.extensions.get("timeout") or {}
        given = {name: seconds for name, seconds in timeout.items() if seconds is not None}
        request.extensions["timeout"] = TIMEOUTS | given
        asked = self._asked
        if asked is None:
            return
        if request.url.path.endswith("/api/agent-harnesses"):  # Telemetry; the client would keep the answer for a day.
            raise LaterError("df11 does not ask for this")
        asked.answering = math.inf
        if request.method == "GET":
            asked.count_page()
        if origin_of(str(request.url)) != origin_of(endpoint()):  # A page that follows another may be anywhere.
            request.headers.pop("authorization", None)
        request.headers["accept-encoding"] = "identity"
        request.extensions["trace"] = self._traced

    def _traced(self, event: str, values: Mapping[str, Any]) -> None:
        asked = self._asked
        if asked is None:
            return
        if event.endswith("receive_response_headers.started"):
            asked.answering = time.monotonic()
        elif event.endswith(".complete"):  # Of making a connection: its result is read from.
            self._guard(values.get("return_value"))
        elif event.endswith(".failed") and type(values["exception"]).__name__ == "ConnectError":
            # The client would try again, silently, with another session, which has none of these limits.
            raise no_connection(values["exception"], asked.where)

    def _guard(self, connection: Any) -> None:
        # Let nobody who reads from a connection wait for longer than the call of this thread may last. The client waits
        # only for the next byte.
        read = getattr(connection, "read", None)
        if read is None or hasattr(read, "is_guarded"):
            return

        def guarded(size: int, timeout: float | None = None) -> Any:
            asked = self._asked
            if asked is None or asked.answering == math.inf:
                return read(size, timeout)
            left = asked.left()
            try:
                return read(size, left if timeout is None else min(left, timeout))
            except Exception:
                asked.left()
                raise

        guarded.is_guarded = True  # type: ignore[attr-defined]
        connection.read = guarded

    def _response(self, response: Any) -> None:
        asked = self._asked
        if asked is None:
            return
        self._guard(response.extensions.get("network_stream"))  # Of a connection that was there before the first call.
        if asked.patience is not None and response.status_code in (200, 206):
            return
        url = str(response.request.url)
        where = without_secrets(url.partition("?")[0])
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise LaterError("the Hub sends a compressed answer, which was not asked for", file=where, hint=AGAIN)
        response.stream = _bounded(response.stream, where)
        if asked.is_one_page:
            response.headers.pop("link", None)
        if following := response.links.get("next", {}).get("url"):
            asked.follow(url, str(following))
        if asked.patience is None and (response.status_code in (408, 429) or response.status_code >= 500):
            self._refuse(response)

    def _refuse(self, response: Any) -> None:
        # The client would try again itself: silently, and after as long a wait as the server likes. Only part of an
        # upload is left to it, as all of the file would have to be sent again; then it waits as long as it likes.
        wait = wait_asked(response.headers)
        if response.request.method == "PUT" and (wait is None or wait <= _LONGEST_WAIT_OF_CLIENT):
            response.headers.pop("retry-after", None)
            response.headers.pop("ratelimit", None)
            return
        from huggingface_hub import hf_raise_for_status

        response.read()
        hf_raise_for_status(response)


limits: Final = _Limits()
_LONGEST_WAIT_OF_CLIENT: Final = 8.0


def _bounded(stream: Any, where: str) -> Any:
    # The bytes of an answer as they come, up to a number of bytes and of values that the client would make of them.
    kind = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    def chunks(_: object) -> Iterator[bytes]:
        left, values = MOST_ANSWER, MOST_VALUES
        for chunk in stream:
            left -= len(chunk)
            values -= chunk.count(b",") + 4 * (chunk.count(b"[") + chunk.count(b"{"))
            if left < 0:
                raise LaterError("the Hub's answer does not end", file=where, hint=AGAIN)
            if values < 0:
                raise errors.LimitError("the Hub's answer has too many values", file=where)
            yield chunk

    return type("Bounded", (kind,), {"__iter__": chunks, "close": lambda _: stream.close()})()
