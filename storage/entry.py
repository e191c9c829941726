"""A file's name and content: what a store lists, and how two files are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from df11.formats import errors

GIT_BYTES: Final = 10 << 20
"""The Hub may keep files up to this size in plain git, and lists git's hash for those. Larger ones have a SHA-256."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a store. Can be pickled. Hashes are hexadecimal; None if nobody has computed them."""

    name: str
    """Its path in the store, with ``/``."""
    size: int
    """Bytes."""
    sha256: str | None = None
    blob_id: str | None = None
    """The id that git gives this content. The Hub lists it for files outside LFS."""

    @classmethod
    def of(cls, name: str, data: bytes) -> Self:
        """The entry of some bytes, with both hashes."""
        return cls.of_chunks(name, len(data), [data])

    @classmethod
    def of_chunks(cls, name: str, size: int, chunks: Iterable[Any]) -> Self:
        """The entry of ``size`` bytes that come in chunks. Git's hash is computed only for files that may be in git."""
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= GIT_BYTES else None
        for chunk in chunks:
            sha256.update(chunk)
            if blob is not None:
                blob.update(chunk)
        return cls(name, size, sha256.hexdigest(), None if blob is None else blob.hexdigest())

    def same_content(self, other: Entry) -> bool | None:
        """Whether both have the same content; None if they have no hash in common."""
        if self.size != other.size:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        if self.blob_id is not None and other.blob_id is not None:
            return self.blob_id == other.blob_id
        return None

    @property
    def is_hashed(self) -> bool:
        """Whether any hash is known."""
        return self.sha256 is not None or self.blob_id is not None

    def check(self, found: Entry, where: str) -> None:
        """Raise a DifferenceError unless ``found``, received from ``where``, has the listed content."""
        if not self.same_content(found):
            raise self.differs(found.sha256 if self.sha256 is not None else found.blob_id, where)

    def differs(self, found: str | None, where: str) -> errors.DifferenceError:
        """The error for content received from ``where`` whose hash is ``found``."""
        kind = "git blob" if self.sha256 is None else "SHA-256"
        return errors.DifferenceError(
            f"what was received is not the file that the Hub lists: its {kind} differs",
            file=where,
            expected=self.sha256 or self.blob_id,
            found=found,
            hint="run the same command again; if that does not help, the file on the Hub is damaged",
        )
