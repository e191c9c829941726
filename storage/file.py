"""An open file, wherever it is: bytes at any position. Nothing here knows what they mean."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, Final, Self

import numpy as np
import numpy.typing as npt

from df11.formats import errors
from df11.storage.entry import Entry
from df11.storage.paths import open_regular

Bytes = npt.NDArray[np.uint8]

CHUNK: Final = 4 << 20
"""Bytes that are copied or compared at a time."""
PREFETCH_BYTES: Final = 32 << 20
"""How far the kernel is asked to read ahead: enough that no thread waits for a fast disk."""


class File(ABC):
    """An open file. A context manager; reads are safe in several threads."""

    label: str
    """Its name in messages and reports: a path or an address."""
    size: int
    memory: int = 0
    """Bytes of memory that reading takes, besides the caller's buffers."""
    state: object = None
    """By what it can be seen that another file has taken its place, or has been written to."""
    sources: tuple[Entry, ...] = ()
    """The files that this one is made from while it is read; none if it is one itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on. Raises a Df11Error."""

    def expect(self, position: int, end: int | None = None) -> None:  # noqa: B027 - a disk needs no warning
        """Announce that the file is read in sequence from ``position`` on, up to ``end`` or its own."""

    def stop(self) -> None:  # noqa: B027 - nobody waits for a disk
        """Wake all threads that wait for bytes: from now on, reads raise an error."""

    def check_unchanged(self) -> None:  # noqa: B027 - a commit on the Hub does not change
        """Raise a ConflictError if the file has changed since it was opened."""

    def changed(self, tensor: str | None = None) -> errors.Df11Error:
        """The error for a file that has changed."""
        hint = "run the same command again"
        return errors.ConflictError(
            "the source changed while it was being read", file=self.label, tensor=tensor, hint=hint
        )

    def hashed_sources(self) -> tuple[Entry, ...]:
        """The files that this one is made from, with their SHA-256."""
        return self.sources

    def chunks(self, start: int = 0) -> Iterator[Bytes]:
        """The bytes from ``start`` on, in order; each chunk is valid until the next one."""
        self.expect(start)
        buffer = np.empty(min(CHUNK, max(self.size - start, 1)), np.uint8)
        for position in range(start, self.size, CHUNK):
            chunk = buffer[: self.size - position]
            self.read(position, chunk)
            yield chunk


class LocalFile(File):
    """A file on a disk. ``label``: its name in messages, if that is not its path. ``file``: it, opened already."""

    def __init__(
        self, path: str | os.PathLike[str], *, label: str | None = None, file: IO[bytes] | None = None
    ) -> None:
        self.label = label or os.fspath(path)
        self._file = open_regular(path) if file is None else file
        self.state: tuple[int, int, int] = self._now()
        self.size = self.state[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def expect(self, position: int, end: int | None = None) -> None:
        """Have the kernel read ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), position, 0, os.POSIX_FADV_SEQUENTIAL)

    def check_unchanged(self) -> None:
        """Raise a ConflictError if the file is not the one that was opened."""
        if self._now() != self.state:
            raise self.changed()

    @property
    def mode(self) -> int:
        """Permissions."""
        return os.fstat(self._file.fileno()).st_mode & 0o777

    def _now(self) -> tuple[int, int, int]:
        # Times can be set back, but not that of the last change of anything.
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on."""
        view = memoryview(out)
        try:
            if hasattr(os, "posix_fadvise"):
                end = position + len(out)
                os.posix_fadvise(self._file.fileno(), end, PREFETCH_BYTES, os.POSIX_FADV_WILLNEED)
            while view:
                count = os.preadv(self._file.fileno(), [view], position)
                if not count:
                    raise self.changed()
                view, position = view[count:], position + count
        except OSError as error:
            raise errors.from_os_error(error, file=self.label) from None


class MemoryFile(File):
    """A small file, held in memory whole."""

    def __init__(self, data: bytes, label: str) -> None:
        self.label = label
        self.size = self.memory = len(data)
        self._data = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Release the data."""
        self._data = self._data[:0]

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on."""
        out[:] = self._data[position : position + len(out)]
