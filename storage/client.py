"""The Hub's client as df11 uses it: timeouts, df11's errors, and retries with growing waits.

huggingface_hub (1.31 to 2.x) is imported on first use and left as the application set it up. Its login, endpoint,
progress bars, log level and environment are not touched. It uses httpx, and httpx2 from 2.0 on; neither is named here.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from df11.formats import errors
from df11.storage.address import DEFAULT_ENDPOINT, Address

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUTS: dict[str, float] = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
"""Seconds to wait for a connection, for the next bytes, for sending, and for a turn. They apply where the client
sets no timeout, as in most calls: it would wait forever."""
WAITS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between tries: a minute in all, enough for a server to restart. Each varies by a quarter, so that many
clients spread out."""
LONGEST_WAIT: Final = 3600.0
"""Longest wait, in seconds, that a server may ask for: some of the Hub's limits are hourly."""

MOST_ANSWER: Final = 64 << 20
"""Bytes of an answer to the client's questions: a page of a listing has up to a thousand files."""
LONGEST_ANSWER: Final = 300.0
"""Seconds in which such an answer must have come."""

log: Final = logging.getLogger("df11")
"""Logs each retry at level INFO, with ``event="retry"``, ``error`` and ``seconds``."""

T = TypeVar("T")


def endpoint() -> str:
    """The Hub's address without a trailing slash: ``HF_ENDPOINT``, as it is now."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def call(action: Callable[[HfApi], T], where: str) -> T:
    """Run ``action`` with the client, and retry while that may help. Only for what may safely be done twice.

    ``where``: the address that an error names. Raises a Df11Error.
    """
    return retrying(lambda: once(action, where))


def retrying(action: Callable[[], T]) -> T:
    """Call ``action`` until it does not raise a RetryLaterError; give up after :data:`WAITS`."""
    for wait in WAITS:
        try:
            return action()
        except errors.RetryLaterError as error:
            pause(error, wait)
    return action()


def once(action: Callable[[HfApi], T], where: str) -> T:
    """Run ``action`` with the client, once. Raises a Df11Error.

    It must hold nothing but the client's own calls: any other error in it would be taken for a response from the Hub
    that the client does not understand.
    """
    hub = library()
    try:
        with limits(), explained(where):
            return action(hub.HfApi(endpoint=endpoint(), library_name="df11"))
    except (LookupError, TypeError, AttributeError, ValueError):  # Valid JSON of the wrong shape.
        raise LaterError("the Hub's response cannot be read", file=where, hint=_AGAIN) from None


class _Limits:
    # What holds for requests of the client while a call of ours is under way. The client has no setting for a call, so
    # hooks of its session do it: timeouts for all threads, as it has some of its own, the rest for the caller's thread.
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._mine = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from huggingface_hub import get_session

        try:
            hooks = get_session().event_hooks
        except Exception as error:  # Of whatever the environment says of proxies and certificates.
            hint = "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
            what = f"no connection can be set up ({type(error).__name__}: {without_secrets(str(error))})"
            raise errors.UsageError(what, hint=hint) from None
        with self._lock:
            self._calls += 1
            for hook, kind in ((self._request, "request"), (self._response, "response")):
                if hook not in hooks[kind]:
                    hooks[kind].append(hook)
        self._mine.depth = getattr(self._mine, "depth", 0) + 1
        try:
            yield
        finally:
            self._mine.depth -= 1
            with self._lock:
                self._calls -= 1

    def _request(self, request: Any) -> None:
        if not self._calls:
            return
        asked = request.extensions.get("timeout") or {}
        given = {name: seconds for name, seconds in asked.items() if seconds is not None}
        request.extensions["timeout"] = TIMEOUTS | given
        if not getattr(self._mine, "depth", 0):
            return
        if request.url.path.endswith("/api/agent-harnesses"):  # Telemetry; the client would keep the answer for a day.
            raise LaterError("df11 does not ask for this")
        if origin_of(str(request.url)) != origin_of(endpoint()):  # A page that follows another may be anywhere.
            request.headers.pop("authorization", None)
        request.headers["accept-encoding"] = "identity"

    def _response(self, response: Any) -> None:
        if not getattr(self._mine, "depth", 0):
            return
        where = without_secrets(str(response.request.url).partition("?")[0])
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise LaterError("the Hub sends a compressed answer, which was not asked for", file=where, hint=_AGAIN)
        response.stream = _bounded(response.stream, where)


limits: Final = _Limits()


def _bounded(stream: Any, where: str) -> Any:
    # The bytes of an answer as they come, up to a number and for some time: a server may send without end.
    kind = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")
    started = time.monotonic()

    def chunks(_: object) -> Iterator[bytes]:
        left = MOST_ANSWER
        for chunk in stream:
            left -= len(chunk)
            if left < 0:
                raise LaterError("the Hub's answer does not end", file=where, hint=_AGAIN)
            if time.monotonic() - started > LONGEST_ANSWER:
                raise LaterError("the Hub's answer takes too long", file=where, hint=_AGAIN)
            yield chunk

    return type("Bounded", (kind,), {"__iter__": chunks, "close": lambda _: stream.close()})()


def origin_of(url: str) -> tuple[str, str]:
    """Scheme and host with port of an address, which say who is asked; the name of a user is no part of it."""
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.rpartition("@")[2].lower()


def without_secrets(text: str) -> str:
    """A text in which no address has a user's name or password any more."""
    return re.sub(r"//[^/\s@]*@", "//***@", text)


def library() -> Any:
    """The Hub's client. Raises UsageError if the environment does not let it be imported."""
    _check_endpoint()
    try:
        import huggingface_hub
        import huggingface_hub.hf_api  # Its part that reads the environment, which it imports on first use.
    except ModuleNotFoundError:
        raise errors.missing_extra("huggingface_hub", "hub") from None
    except ValueError as error:  # It reads numbers from the environment.
        what = f"the Hub's client cannot be imported (ValueError: {without_secrets(str(error))})"
        raise errors.UsageError(what, hint="check the variables whose names start with HF_") from None
    return huggingface_hub


def _check_endpoint() -> None:
    text = endpoint()
    try:
        parts = urlsplit(text)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        what = "this is not the address of a Hub"
        raise errors.UsageError(what, found=without_secrets(ascii(text)), hint="check HF_ENDPOINT")


class LaterError(errors.RetryLaterError):
    """A RetryLaterError that knows how long to wait.

    ``wait``: seconds; infinite if a retry is useless; None if unknown.
    """

    def __init__(
        self, what: str, *, wait: float | None = None, file: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, file=file, hint=hint)
        self.wait = wait


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise the client's errors as a Df11Error. ``where``: the address that the message names, hf://owner/name...

    Errors that come neither from the Hub nor from the network pass unchanged. No message holds a token or a signed URL.
    """
    try:
        yield
    except errors.Df11Error:
        raise
    except Exception as error:
        explanation = _explain(error, where)
        if explanation is None:
            raise
        raise explanation from None


def _explain(error: BaseException, where: str) -> errors.Df11Error | None:
    import huggingface_hub.errors as client

    http = importlib.import_module(client.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    match error:
        case client.OfflineModeIsEnabled():
            hint = "unset it and run the same command again"
            return LaterError("the Hub is switched off by HF_HUB_OFFLINE", wait=math.inf, file=where, hint=hint)
        case client.GatedRepoError():
            hint = f"ask on {without_secrets(endpoint())}/{_repository(where)}" + (
                "" if _had_token(error.response) else f", then {_LOG_IN}"
            )
            return errors.NotAllowedError("access to this repository must be requested", file=where, hint=hint)
        case client.DisabledRepoError():
            return errors.NotAllowedError("this repository has been disabled", file=where)
        case client.RepositoryNotFoundError() if _had_token(error.response):
            what = "the repository is missing, or private and this token cannot see it"
            return errors.MissingError(what, file=where, hint=f"{_CHECK}, or use a token that can see it")
        case client.RepositoryNotFoundError():
            what = "the repository is missing, or private, and no token was given"
            return errors.MissingError(what, file=where, hint=f"{_CHECK}, or {_LOG_IN}")
        case client.RevisionNotFoundError():
            return errors.MissingError("no such branch, tag or commit", file=where, hint=_CHECK)
        case client.RemoteEntryNotFoundError():
            return errors.MissingError("no such file or folder in this repository", file=where, hint=_CHECK)
        case client.HfHubHTTPError() | http.HTTPStatusError():
            return explain_response(error.response, where, getattr(error, "server_message", None))
        case client.LocalEntryNotFoundError() | client.RevisionResolutionError() | client.FileMetadataError():
            cause = error.__cause__ or error.__context__
            reason = None if cause is None else _explain(cause, where)
            return reason or LaterError("the Hub could not be reached", file=where, hint=_AGAIN)
        case client.OIDCError() | client.LocalTokenNotFoundError() | http.LocalProtocolError() | UnicodeEncodeError():
            # The last two: characters that a header cannot hold. Their messages quote the header.
            return errors.NotAllowedError("the Hub's token cannot be used", file=where, hint=_refused_hint())
        case http.UnsupportedProtocol() | http.InvalidURL():
            what = "this is not the address of a Hub"
            return errors.UsageError(what, file=where, found=without_secrets(endpoint()), hint="check HF_ENDPOINT")
        case client.HFValidationError():
            return errors.UsageError("not a valid name for a repository", file=where, hint=_CHECK)
        case http.TimeoutException():
            return LaterError("the Hub did not respond in time", file=where, hint=_AGAIN)
        case http.ConnectError():
            return LaterError(f"no connection to the Hub ({error})", file=where, hint=_AGAIN)
        case json.JSONDecodeError():
            return LaterError("the Hub's response cannot be read", file=where, hint=_AGAIN)
        case http.HTTPError() | http.StreamError() | ConnectionError() | TimeoutError():
            return LaterError(f"the connection to the Hub broke off ({type(error).__name__})", file=where, hint=_AGAIN)
        case RuntimeError() | ValueError() if error.__cause__ is not None:
            return _explain(error.__cause__, where)  # Errors of an upload arrive like this.
        case _:
            return None


_AGAIN: Final = "run the same command again"
_CHECK: Final = "check the address"
_LOG_IN: Final = "log in: hf auth login, or set HF_TOKEN"


def _had_token(response: Any) -> bool:
    return "authorization" in response.request.headers


def _refused_hint() -> str:
    return "check HF_TOKEN, which is set" if os.environ.get("HF_TOKEN") else _LOG_IN


def explain_response(response: Any, where: str, words: str | None = None) -> errors.Df11Error:
    """The error for a response with an unexpected status, with the Hub's own ``words`` if there are any."""
    status, headers = response.status_code, response.headers
    text = " ".join((words or headers.get("x-error-message", "")).split())
    told = f": {errors.shortened(text)}" if text else ""
    match status:
        case 401:
            what = f"the Hub rejects this token, or requires one (401){told}"
            return errors.NotAllowedError(what, file=where, hint=_refused_hint())
        case 403:
            what = f"the Hub does not allow this (403){told}"
            return errors.NotAllowedError(what, file=where, hint=None if _had_token(response) else _LOG_IN)
        case 404 | 410:
            return errors.MissingError(f"the Hub does not have this ({status}){told}", file=where, hint=_CHECK)
        case 409 | 412:
            what = f"somebody else has changed this on the Hub in the meantime ({status}){told}"
            return errors.ConflictError(what, file=where, hint=_AGAIN)
        case 429:
            wait = _wait_asked(headers)
            asked = "a while" if wait is None else f"{wait:.0f} s"
            what = f"the Hub has had too many requests and asks to wait {asked}"
            return LaterError(f"{what} (429){told}", wait=wait, file=where, hint=_AGAIN)
        case _ if status == 408 or status >= 500:
            what = f"the Hub has a problem ({status}){told}"
            return LaterError(what, wait=_wait_asked(headers), file=where, hint=_AGAIN)
        case _:
            return errors.UsageError(f"the Hub refuses this request ({status}){told}", file=where)


def _wait_asked(headers: Mapping[str, str]) -> float | None:
    # Seconds, from Retry-After (a number or a date) or from the Hub's own header, such as '"api";r=0;t=55'.
    text = headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) < 20:
        return float(text)
    from email.utils import parsedate_to_datetime  # It imports sockets: only where the Hub is used.

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):  # What is not understood is no value.
        limit = re.search(r"\br=0;\s*t=(\d+)", headers.get("ratelimit", ""))
        return float(limit[1]) if limit else None


def _repository(where: str) -> str:
    try:
        return Address.parse(where).repository
    except errors.UsageError:
        return ""


def pause(error: errors.RetryLaterError, wait: float, *, sleep: Callable[[float], object] | None = None) -> None:
    """Wait before a retry: as long as the server asked for, up to :data:`LONGEST_WAIT`, or about ``wait`` seconds.

    Raises ``error`` if a retry is useless.
    """
    asked = error.wait if isinstance(error, LaterError) else None
    if asked == math.inf:
        raise error
    seconds = random.uniform(0.75, 1.25) * wait if asked is None else min(asked, LONGEST_WAIT)
    extra = {"event": "retry", "error": error, "seconds": seconds}
    log.info("%s; retrying in %.0f s", error, seconds, extra=extra)
    (sleep or time.sleep)(seconds)


def request(address: Address) -> tuple[str, dict[str, str]]:
    """The URL of a file's content, and the request headers, which include the token."""
    hub = library()
    url = hub.hf_hub_url(address.repository, address.path, revision=address.revision, endpoint=endpoint())
    with limits():
        return url, hub.utils.build_hf_headers(library_name="df11")


def check_card(text: str, where: str) -> None:
    """Have the Hub check a model card. Raises a UsageError with the Hub's words, which name the field."""

    def ask(_: object) -> Any:
        from huggingface_hub import get_session, hf_raise_for_status

        body = {"repoType": "model", "content": text}
        response = get_session().post(f"{endpoint()}/api/validate-yaml", json=body)
        if response.status_code != 400:
            hf_raise_for_status(response)
        return response.json()

    found = call(ask, where).get("errors") or []
    words = "; ".join(
        str(problem.get("message", problem)) if isinstance(problem, dict) else str(problem) for problem in found
    )
    if words:
        what = f"the Hub refuses this model card: {errors.shortened(words)}"
        raise errors.UsageError(
            what, file=where, hint="fix the source's README.md, or set the field in [model.card] of a job"
        )
