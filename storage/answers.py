"""What the Hub's answers, and the errors of its client, mean: as errors of df11, in one line, without secrets."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from df11.formats import errors
from df11.storage.address import Address, endpoint
from df11.storage.secrets import without_secrets


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
            return reason or LaterError("the Hub could not be reached", file=where, hint=AGAIN)
        case client.OIDCError() | client.LocalTokenNotFoundError() | http.LocalProtocolError() | UnicodeEncodeError():
            # The last two: characters that a header cannot hold. Their messages quote the header.
            return errors.NotAllowedError("the Hub's token cannot be used", file=where, hint=_refused_hint())
        case http.UnsupportedProtocol() | http.InvalidURL():
            what = "this is not the address of a Hub"
            return errors.UsageError(what, file=where, found=without_secrets(endpoint()), hint="check HF_ENDPOINT")
        case client.HFValidationError():
            return errors.UsageError("not a valid name for a repository", file=where, hint=_CHECK)
        case http.TimeoutException():
            return LaterError("the Hub did not respond in time", file=where, hint=AGAIN)
        case http.ConnectError():
            return no_connection(error, where)
        case json.JSONDecodeError():
            return LaterError("the Hub's response cannot be read", file=where, hint=AGAIN)
        case http.HTTPError() | http.StreamError() | ConnectionError() | TimeoutError():
            return LaterError(f"the connection to the Hub broke off ({type(error).__name__})", file=where, hint=AGAIN)
        case RuntimeError() | ValueError() if error.__cause__ is not None:
            return _explain(error.__cause__, where)  # Errors of an upload arrive like this.
        case _:
            return None


def no_connection(error: BaseException, where: str) -> LaterError:
    """The error for a connection that could not be made."""
    return LaterError(f"no connection to the Hub ({without_secrets(str(error))})", file=where, hint=AGAIN)


AGAIN: Final = "run the same command again"
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
            return errors.ConflictError(what, file=where, hint=AGAIN)
        case 429:
            wait = wait_asked(headers)
            asked = "a while" if wait is None else f"{wait:.0f} s"
            what = f"the Hub has had too many requests and asks to wait {asked}"
            return LaterError(f"{what} (429){told}", wait=wait, file=where, hint=AGAIN)
        case _ if status == 408 or status >= 500:
            what = f"the Hub has a problem ({status}){told}"
            return LaterError(what, wait=wait_asked(headers), file=where, hint=AGAIN)
        case _:
            return errors.UsageError(f"the Hub refuses this request ({status}){told}", file=where)


def wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds, from Retry-After (a number or a date) or from the Hub's own header, such as ``"api";r=0;t=55``."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) < 20:
        return float(text)
    from email.utils import parsedate_to_datetime  # It imports sockets: only where the Hub is used.

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):  # What is not understood is no value.
        limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
        return float(limit[1]) if limit else None


def _repository(where: str) -> str:
    try:
        return Address.parse(where).repository
    except errors.UsageError:
        return ""
