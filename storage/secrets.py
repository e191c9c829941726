"""Names and passwords in addresses, kept out of whatever text goes out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Final

PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables of the environment that programs also read in lower case."""
_SHORTEST: Final = 4
"""Characters of a password that is replaced where it stands alone: a shorter one is part of many words."""
_USER: Final = re.compile(r"(?<![^\s:'\"(=<\[])(?<!hf:)//[^\s\"]*@")
"""What comes before the last @ of an address. In those of files on the Hub, hf://owner/name@revision, that is no name
of a user."""


def without_secrets(text: str) -> str:
    """A text in which no address has a user's name or password any more, however it is spelled."""
    for secret in sorted(_known(), key=len, reverse=True):
        for spelled in (secret, ascii(secret)[1:-1], json.dumps(secret)[1:-1]):
            text = text.replace(spelled, "***")
    return _USER.sub("//***@", text)


def has_proxy_password() -> bool:
    """Whether a variable that names a proxy has a user's name in it."""
    return any("@" in os.environ.get(name, "") for name in _both_cases(PROXIES))


def _known() -> Iterator[str]:
    for name in _both_cases(("HF_ENDPOINT", *PROXIES)):
        value = os.environ.get(name, "")
        user = value[value.find("//") + 2 if "//" in value else 0 :].rpartition("@")[0]
        password = user.partition(":")[2]
        yield from (one for one in (user, password) if len(one) >= _SHORTEST)


def _both_cases(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        yield from (name, name.lower())
