"""The Hub from df11's side: addresses, the client with timeouts, its errors as df11's, and tries that wait longer and longer.

huggingface_hub (1.31 to 2.x) is imported when it is first used. It speaks through httpx, from 2.0 on through httpx2: never named here.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import quote, unquote

from df11.formats import errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME: Final = "hf://"
DEFAULT_ENDPOINT: Final = "https://huggingface.co"

TIMEOUTS: dict[str, float] = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
"""Seconds that a request waits for a connection, for the next bytes, to send, and for its turn. They hold where the client sets none."""
WAITS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between tries: a minute in all, which a server that restarts needs. Each is varied by a quarter, so that many clients part ways."""
LONGEST_WAIT: Final = 300.0
"""Seconds that a server may make a try wait: the Hub counts requests in windows of five minutes."""

_EXAMPLE: Final = "hf://owner/name, hf://owner/name@revision, hf://owner/name/folder"
_ADDRESS: Final = re.compile(r"hf://([^/@]*)/([^/@]*)(?:@(refs/(?:pr|convert)/[^/]+|[^/]*))?(?:/(.*))?", re.DOTALL)
_SPECIAL: Final = re.compile(r"refs/(?:pr|convert)/[^/]+")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OTHER_KINDS: Final = ("datasets", "spaces", "buckets", "kernels", "models")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """A model repository on the Hub, or a folder or file in it: ``hf://owner/name[@revision][/path]``."""

    repository: str
    """``owner/name``."""
    revision: str | None = None
    """A branch, a tag, a commit, or a reference such as ``refs/pr/1``; None is the default branch."""
    path: str = ""
    """A folder or file, without ``..``, ``.`` or empty parts; ``""`` is all of the repository."""

    def __post_init__(self) -> None:
        owner = self.repository.partition("/")[0]
        if owner in _OTHER_KINDS:
            raise errors.UsageError(f"{owner}/ is no owner of models", file=self._text(), hint=f"write {_EXAMPLE}")
        if not is_repository(self.repository):
            raise errors.UsageError("not the address of a model on the Hub", file=self._text(), expected=_EXAMPLE)
        if self.revision is not None and (
            not self.revision or ".." in self.revision or re.search(r"[\x00-\x20\x7f\ud800-\udfff]", self.revision)
        ):
            raise errors.UsageError(
                "no revision can have this name", file=self._text(), found=errors.shortened(self.revision)
            )
        if self.path and not is_safe_path(self.path):
            raise errors.UsageError(
                "no path in a repository can have this name", file=self._text(), found=errors.shortened(self.path)
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address that ``text`` spells. One ``/`` at its end is allowed. Raises a UsageError."""
        match = _ADDRESS.fullmatch(text)
        if not match:
            raise errors.UsageError("not the address of a model on the Hub", file=_printable(text), expected=_EXAMPLE)
        owner, name, revision, path = match.groups()
        return cls(f"{owner}/{name}", None if revision is None else unquote(revision), (path or "").removesuffix("/"))

    def __str__(self) -> str:
        return self._text()

    def _text(self) -> str:
        revision = ""
        if self.revision is not None:
            revision = "@" + quote(
                self.revision, safe="/" if _SPECIAL.fullmatch(self.revision) else "", errors="replace"
            )
            if self.revision == "refs":
                revision = "@%72efs"  # Else a path pr/1 after it would make another revision of it.
        return _printable(SCHEME + self.repository + revision + (f"/{self.path}" if self.path else ""))


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def is_address(path: object) -> bool:
    """Whether ``path`` means something on the Hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def is_repository(name: str) -> bool:
    """Whether this can be the name of a repository, ``owner/name``, as the Hub allows them: safe in an address and in a shell."""
    return _REPOSITORY.fullmatch(name) is not None


def is_safe_path(path: str) -> bool:
    """Whether a path from a repository stays in a folder that it is joined to, and can be the name of a file."""
    return all(part not in ("", ".", "..") for part in path.split("/")) and not re.search(
        r"[\x00-\x1f\x7f\\\ud800-\udfff]", path
    )


def endpoint() -> str:
    """The Hub's address, without a slash at its end: ``HF_ENDPOINT``, as it is now."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def api() -> HfApi:
    """The client, with timeouts on all that it does; endpoint and token are those of the environment at this moment.

    Xet, another protocol for transfers, is switched off unless the environment says otherwise: its memory has no bound.
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise errors.missing_extra("huggingface_hub", "hub") from None
    _set_up()
    return HfApi(endpoint=endpoint(), library_name="df11")


@functools.cache
def _set_up() -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import disable_progress_bars

    build = _http._GLOBAL_CLIENT_FACTORY  # An application's own, with its proxies, or the library's.

    def factory() -> Any:
        client = build()
        # Not as the client's default timeout: huggingface_hub asks for None in many calls, which would be for ever.
        client.event_hooks["request"].append(_limit)
        return client

    set_client_factory(factory)
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()  # There is one bar, and it is ours.
    if "HF_HUB_VERBOSITY" not in os.environ:
        # Its warnings about tries would be lines between ours; the last error is ours to tell.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _limit(request: Any) -> None:
    asked = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = TIMEOUTS | {name: seconds for name, seconds in asked.items() if seconds is not None}


class LaterError(errors.RetryLaterError):
    """A RetryLaterError that knows how long to wait: ``wait`` in seconds, infinite where another try is useless; None if nobody said."""

    def __init__(
        self, what: str, *, wait: float | None = None, file: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, file=file, hint=hint)
        self.wait = wait


@contextmanager
def explained(where: str, *, missing_hint: str = "check the address") -> Iterator[None]:
    """Raise what the client raises as a Df11Error. ``where``: the address that the line is to name, hf://owner/name...

    What is no error of the Hub or of the network is raised as it is. No line has a token or a signed address in it.
    """
    try:
        yield
    except errors.Df11Error:
        raise
    except Exception as error:
        explanation = _explain(error, where, missing_hint)
        if explanation is None:
            raise
        raise explanation from None


def _explain(error: BaseException, where: str, missing_hint: str) -> errors.Df11Error | None:
    import huggingface_hub.errors as client

    http = importlib.import_module(client.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    match error:
        case client.OfflineModeIsEnabled():
            return LaterError(
                "the Hub is switched off by HF_HUB_OFFLINE",
                wait=math.inf,
                file=where,
                hint="unset it and run the same command again",
            )
        case client.GatedRepoError():
            page = f"{endpoint()}/{_repository(where)}, then {_LOG_IN}"
            return errors.NotAllowedError(
                "access to this repository must be asked for", file=where, hint=f"ask on {page}"
            )
        case client.DisabledRepoError():
            return errors.NotAllowedError("this repository has been disabled", file=where)
        case client.RepositoryNotFoundError():
            return errors.MissingError(
                "the repository is missing, or private and this token may not see it"
                if "authorization" in error.response.request.headers
                else "the repository is missing, or private, and no token was given",
                file=where,
                hint=f"{missing_hint}, or log in: hf auth login, or set HF_TOKEN",
            )
        case client.RevisionNotFoundError():
            return errors.MissingError("no such branch, tag or commit", file=where, hint=missing_hint)
        case client.RemoteEntryNotFoundError():
            return errors.MissingError("no such file or folder in this repository", file=where, hint=missing_hint)
        case client.HfHubHTTPError() | http.HTTPStatusError():
            return explain_status(error.response.status_code, error.response.headers, where)
        case client.LocalEntryNotFoundError() | client.RevisionResolutionError() | client.FileMetadataError():
            cause = error.__cause__ or error.__context__
            reason = None if cause is None else _explain(cause, where, missing_hint)
            return reason or LaterError("the Hub could not be reached", file=where, hint=_AGAIN)
        case client.OIDCError() | client.LocalTokenNotFoundError() | http.LocalProtocolError() | UnicodeEncodeError():
            # The last two: characters that no header may have. Their texts quote the header.
            return errors.NotAllowedError("the Hub's token cannot be used", file=where, hint=_login_hint())
        case http.UnsupportedProtocol() | http.InvalidURL():
            return errors.UsageError(
                "the address of the Hub is none", file=where, found=endpoint(), hint="check HF_ENDPOINT"
            )
        case client.HFValidationError():
            return errors.UsageError("no repository can have this name", file=where, hint=missing_hint)
        case http.TimeoutException():
            return LaterError("the Hub did not answer in time", file=where, hint=_AGAIN)
        case http.ConnectError():
            return LaterError(f"no connection to the Hub ({error})", file=where, hint=_AGAIN)
        case json.JSONDecodeError():
            return LaterError("the Hub's answer cannot be read", file=where, hint=_AGAIN)
        case http.HTTPError() | http.StreamError() | ConnectionError() | TimeoutError():
            return LaterError(f"the connection to the Hub broke off ({type(error).__name__})", file=where, hint=_AGAIN)
        case RuntimeError() | ValueError() if error.__cause__ is not None:
            return _explain(error.__cause__, where, missing_hint)  # What goes wrong in an upload comes so.
        case LookupError() | TypeError() | AttributeError() | ValueError() | NameError() if _comes_from_client(error):
            return LaterError("the Hub's answer cannot be read", file=where, hint=_AGAIN)  # JSON, but of another shape.
        case _:
            return None


def _comes_from_client(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("huggingface_hub.")


_AGAIN: Final = "run the same command again"
_LOG_IN: Final = "log in: hf auth login, or set HF_TOKEN"


def _login_hint() -> str:
    return "check HF_TOKEN, which is set" if os.environ.get("HF_TOKEN") else _LOG_IN


def explain_status(status: int, headers: Mapping[str, str], where: str) -> errors.Df11Error:
    """The error for an HTTP status that is not the one that was hoped for."""
    match status:
        case 401:
            return errors.NotAllowedError(
                "the Hub does not accept this token, or wants one (401)", file=where, hint=_login_hint()
            )
        case 403:
            return errors.NotAllowedError(
                "the Hub does not allow this (403)", file=where, hint=f"{_LOG_IN}, with a token that may do this"
            )
        case 404 | 410:
            return errors.MissingError(f"the Hub does not have this ({status})", file=where, hint="check the address")
        case 409 | 412:
            return errors.ConflictError(
                f"somebody else has changed this on the Hub meanwhile ({status})", file=where, hint=_AGAIN
            )
        case 429:
            wait = _wait_asked(headers)
            told = "a while" if wait is None else f"{wait:.0f} s"
            return LaterError(
                f"the Hub has had too many requests and asks to wait {told} (429)", wait=wait, file=where, hint=_AGAIN
            )
        case _ if status == 408 or status >= 500:
            return LaterError(f"the Hub has trouble ({status})", wait=_wait_asked(headers), file=where, hint=_AGAIN)
        case _:
            told = errors.shortened(headers.get("x-error-message", ""))
            return errors.UsageError(
                f"the Hub refuses this request ({status})", file=where, found=None if told == "''" else told
            )


def _wait_asked(headers: Mapping[str, str]) -> float | None:
    # Seconds, from Retry-After (a number or a date) or from the Hub's own header, such as '"api";r=0;t=55'.
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    from email.utils import (
        parsedate_to_datetime,
    )  # It brings sockets, which nobody needs who does not speak to the Hub.

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        limit = re.search(r"\br=0;\s*t=(\d+)", headers.get("ratelimit", ""))
        return float(limit[1]) if limit else None


def _repository(where: str) -> str:
    try:
        return Address.parse(where).repository
    except errors.UsageError:
        return ""


def retrying(action: Callable[[], T], where: str) -> T:
    """Call ``action``, under :func:`explained`, until it ends otherwise than by a RetryLaterError; give up after :data:`WAITS`.

    Only for what may be done twice. Between tries: :func:`pause`.
    """
    for wait in WAITS:
        try:
            with explained(where):
                return action()
        except errors.RetryLaterError as error:
            pause(error, wait)
    with explained(where):
        return action()


on_pause: Callable[[errors.Df11Error, float], object] = lambda _error, _seconds: None  # noqa: E731 - a place for somebody who keeps a log
"""Called with the error and the seconds before each new try."""


def pause(error: errors.RetryLaterError, wait: float, *, sleep: Callable[[float], object] = time.sleep) -> None:
    """Wait before another try: as long as the server asked for, up to :data:`LONGEST_WAIT`, or about ``wait`` seconds.

    Raises ``error`` if another try is useless.
    """
    asked = error.wait if isinstance(error, LaterError) else None
    if asked == math.inf:
        raise error
    seconds = random.uniform(0.75, 1.25) * wait if asked is None else min(asked, LONGEST_WAIT)
    on_pause(error, seconds)
    sleep(seconds)


def request(address: Address) -> tuple[str, dict[str, str]]:
    """URL and headers, with the token, for the content of a file."""
    api()
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(address.repository, address.path, revision=address.revision, endpoint=endpoint())
    return url, build_hf_headers(library_name="df11")
