"""Names of things on the Hub: ``hf://owner/name[@revision][/path]``. Text only: nothing is requested or opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import quote, unquote, urlsplit

from df11.formats import errors

SCHEME: Final = "hf://"
DEFAULT_ENDPOINT: Final = "https://huggingface.co"

MOST_OF_A_NAME: Final = 255
"""Bytes of a file's or a folder's own name that file systems take."""
MOST_OF_A_PATH: Final = 1000
"""Characters of a path below a folder. Systems take 1,024 to 4,096 bytes with the folder's own path."""

_EXAMPLE: Final = "hf://owner/name, hf://owner/name@revision, hf://owner/name/folder"
_ADDRESS: Final = re.compile(r"hf://([^/@]*)/([^/@]*)(?:@(refs/(?:pr|convert)/[^/]+|[^/]*))?(?:/(.*))?", re.DOTALL)
_SPECIAL: Final = re.compile(r"refs/(?:pr|convert)/[^/]+")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OTHER_KINDS: Final = ("datasets", "spaces", "buckets", "kernels", "models")


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
            raise errors.UsageError(f"{owner}/ cannot own models", file=self._text(), hint=f"write {_EXAMPLE}")
        if not is_repository(self.repository):
            raise errors.UsageError("not the address of a model on the Hub", file=self._text(), expected=_EXAMPLE)
        if self.revision is not None and (
            not self.revision or ".." in self.revision or re.search(r"[\x00-\x20\x7f\ud800-\udfff]", self.revision)
        ):
            raise errors.UsageError(
                "not a valid name for a revision", file=self._text(), found=errors.shortened(self.revision)
            )
        if self.path and not is_safe_path(self.path):
            raise errors.UsageError(
                "not a valid path in a repository", file=self._text(), found=errors.shortened(self.path)
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
                revision = "@%72efs"  # Otherwise a path pr/1 after it would change the revision.
        return _printable(SCHEME + self.repository + revision + (f"/{self.path}" if self.path else ""))


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def is_address(path: object) -> bool:
    """Whether ``path`` is an address on the Hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def is_repository(name: str) -> bool:
    """Whether ``name`` is a valid ``owner/name`` on the Hub. Such a name is safe in an address and in a shell."""
    return _REPOSITORY.fullmatch(name) is not None


MOST_DEPTH: Final = 100
"""Folders in each other. No model has more than a few; many more exhaust the stack of whoever walks through them."""


def is_safe_path(path: str) -> bool:
    """Whether a path from a repository is a valid file name that stays inside the folder it is joined to."""
    if len(path) > MOST_OF_A_PATH or re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", path):
        return False
    parts = path.split("/")
    return len(parts) <= MOST_DEPTH and all(
        part not in ("", ".", "..") and len(part.encode()) <= MOST_OF_A_NAME for part in parts
    )


def endpoint() -> str:
    """The Hub's address without a trailing slash: ``HF_ENDPOINT``, as it is now."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def origin_of(url: str) -> tuple[str, str]:
    """Scheme and host with port of an address, which say who is asked; the name of a user is no part of it."""
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.rpartition("@")[2].lower()
