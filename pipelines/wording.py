"""Names and numbers for people. Names come from untrusted files and may contain anything."""

from __future__ import annotations

from urllib.parse import quote

from df11.formats import errors
from df11.storage.address import DEFAULT_ENDPOINT, is_repository


def fitted(name: str, length: int) -> str:
    """The name with every character visible, and with an ellipsis in it if it is longer than ``length`` characters.

    It keeps more of the end than of the start, as the end says more.
    """
    text = errors.printable(name, None)
    if len(text) <= length:
        return text
    first = (length - 1) // 3
    return f"{text[:first]}…{text[len(text) - (length - 1 - first) :]}"


def size(count: float) -> str:
    """Bytes in decimal units, with four digits: ``45.43 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.95 or unit == "TB":
            break
        count /= 1000
    if unit == "bytes":
        return "1 byte" if count == 1 else f"{count:.0f} bytes"
    return f"{count:.{1 if count >= 100 else 2}f} {unit}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal: ``66.9 %``. A dash for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def bits(value: float | None) -> str:
    """Bits per weight with two decimals. A dash for None."""
    return "-" if value is None else f"{value:.2f}"


def count(number: int, one: str, many: str | None = None) -> str:
    """A number and its noun: ``1 tensor``, ``1,650 tensors``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def hub_page(repository: str | None, commit: str | None, path: str = "") -> str | None:
    """URL of a repository's page on the Hub, at a commit if given; None if this is not a valid repository."""
    if repository is None or not is_repository(repository):
        return None
    page = f"{DEFAULT_ENDPOINT}/{repository}"
    if commit is None:
        return page
    return "/".join([page, "tree", quote(commit, safe=""), *([quote(path)] if path else [])])


def folder_name(repository: str | None) -> str:
    """The name of a repository's converted model folder in example commands: safe in a shell."""
    name = repository.split("/")[1] if repository is not None and is_repository(repository) else "MODEL"
    return f"{name}-df11"
