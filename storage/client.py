"""The Hub's client as df11 uses it: with limits, df11's errors, and retries with growing waits.

huggingface_hub (1.31 to 2.x) is imported on first use and left as the application set it up. Its login, endpoint,
progress bars, log level and environment are not touched. It uses httpx, and httpx2 from 2.0 on; neither is named here.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from df11.formats import errors
from df11.storage.address import Address
from df11.storage.address import endpoint as endpoint
from df11.storage.answers import AGAIN, LaterError, explained
from df11.storage.limits import Asked, limits
from df11.storage.secrets import without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WAITS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between tries: a minute in all, enough for a server to restart. Each varies by a quarter, so that many
clients spread out."""
LONGEST_WAIT: Final = 3600.0
"""Longest wait, in seconds, that a server may ask for: some of the Hub's limits are hourly."""

log: Final = logging.getLogger("df11")
"""Logs each retry at level INFO, with ``event="retry"``, ``error`` and ``seconds``."""

T = TypeVar("T")


def call(action: Callable[[HfApi], T], where: str, *, is_one_page: bool = False) -> T:
    """Run ``action`` with the client, and retry while that may help. Only for what may safely be done twice.

    ``where``: the address that an error names. ``is_one_page``: see :func:`once`. Raises a Df11Error.
    """
    return retrying(lambda: once(action, where, is_one_page=is_one_page))


def retrying(action: Callable[[], T]) -> T:
    """Call ``action`` until it does not raise a RetryLaterError; give up after :data:`WAITS`."""
    for wait in WAITS:
        try:
            return action()
        except errors.RetryLaterError as error:
            pause(error, wait)
    return action()


def once(action: Callable[[HfApi], T], where: str, *, is_one_page: bool = False) -> T:
    """Run ``action`` with the client, once. Raises a Df11Error.

    It must hold nothing but the client's own calls: any other error in it, but one of the operating system, would be
    taken for a response from the Hub that the client does not understand. ``is_one_page``: answers end after their
    first page.
    """
    hub = library()
    with asking(where, is_one_page=is_one_page):
        return action(hub.HfApi(endpoint=endpoint(), library_name="df11"))


@contextmanager
def asking(where: str, *, is_one_page: bool = False, patience: Callable[[], float] | None = None) -> Iterator[None]:
    """What the client does in here, in this thread, has limits, and only errors of df11 and of the system.

    ``patience``: for contents, of which the caller takes no more than it wants: seconds since the request in which they
    must have come so far. Whatever else comes is an answer, and is limited in size.
    """
    library()
    try:
        with limits(Asked(where, is_one_page, patience)), explained(where):
            yield
    except (errors.Df11Error, OSError, MemoryError):
        raise
    except Exception as error:  # Of a server that says what no Hub would.
        what = f"the Hub's response cannot be read ({type(error).__name__})"
        raise LaterError(what, file=where, hint=AGAIN) from None


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
        raise errors.UsageError(what, found=ascii(without_secrets(text)), hint="check HF_ENDPOINT")


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
    """The URL of a file's content, and the request headers, which include the token. To be called in :func:`asking`."""
    hub = library()
    url = hub.hf_hub_url(address.repository, address.path, revision=address.revision, endpoint=endpoint())
    return url, hub.utils.build_hf_headers(library_name="df11")


def check_card(text: str, where: str) -> None:
    """Have the Hub check a model card. Raises a UsageError with the Hub's words, which name the field."""

    def ask(_: object) -> str:
        from huggingface_hub import get_session, hf_raise_for_status

        body = {"repoType": "model", "content": text}
        response = get_session().post(f"{endpoint()}/api/validate-yaml", json=body)
        if response.status_code != 400:
            hf_raise_for_status(response)
        found = response.json().get("errors") or []
        return "; ".join(str(one.get("message", one)) if isinstance(one, dict) else str(one) for one in found)

    words = call(ask, where)
    if words:
        what = f"the Hub refuses this model card: {errors.shortened(words)}"
        raise errors.UsageError(
            what, file=where, hint="fix the source's README.md, or set the field in [model.card] of a job"
        )
