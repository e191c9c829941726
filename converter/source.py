"""Read a safetensors source, and notice if it changes meanwhile."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import IO, Final, Self

import numpy as np

from df11.converter.kernels import Sha256
from df11.formats import errors, framing
from df11.formats.record import Bytes

Progress = Callable[[int], None]
"""Called with the bytes of source that have been dealt with since the last call; these may be none. An error that it raises ends the work."""


AHEAD_BYTES: Final = 32 << 20
"""How far the kernel is asked to read ahead: enough that no thread waits for a disk that is fast enough."""


def ignore(_: object) -> None:
    """A callback for those who do not want to know."""


class Source(ABC):
    """An open safetensors file whose header has been checked. A context manager."""

    path: str
    """What messages and reports call it: a path or an address."""
    size: int
    header: framing.Header
    memory: int = 0
    """Bytes of memory that reading takes, besides the caller's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    @abstractmethod
    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the data from byte ``start`` of the data on."""

    def stop(self) -> None:  # noqa: B027 - nobody waits for a disk
        """Let no thread wait any longer for data to come: reads end with an error from now on."""

    def check_unchanged(self) -> None:  # noqa: B027 - a commit on the Hub does not change
        """Raise a ConflictError if the file is not the one that was opened."""

    def changed(self, tensor: str | None = None) -> errors.Df11Error:
        """The error for a source that is not what it was."""
        return errors.ConflictError(
            "the source has changed while it was read", file=self.path, tensor=tensor, hint="run the same command again"
        )

    def sha256(self, progress: Progress) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        digest = self.start_sha256()
        progress(self.header.data_start)
        buffer = np.empty(4 << 20, np.uint8)
        size = self.size - self.header.data_start
        for start in range(0, size, len(buffer)):
            chunk = buffer[: min(len(buffer), size - start)]
            self.read(start, chunk)
            digest.update(chunk)
            progress(len(chunk))
        self.check_unchanged()
        return digest.hexdigest()

    def start_sha256(self) -> Sha256:
        """A SHA-256 that has seen the header: the data are to follow."""
        return Sha256(len(self.header.raw).to_bytes(8, "little") + self.header.raw)


class LocalSource(Source):
    """A source on a disk. ``label``: what to call it if not by its path."""

    def __init__(self, path: str | os.PathLike[str], *, label: str | None = None) -> None:
        self.path = label or os.fspath(path)
        try:
            self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        try:
            self._state = self._stat()
            self.size = self._state[0]
            self.header = framing.read_header(self._file, self.path)
        except OSError as error:
            self._file.close()
            raise errors.from_os_error(error, file=path) from None
        except BaseException:
            self._file.close()
            raise
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check_unchanged(self) -> None:
        """Raise a ConflictError if the file is not the one that was opened."""
        if self._stat() != self._state:
            raise self.changed()

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the data from byte ``start`` of the data on. Safe in several threads."""
        position = self.header.data_start + start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), position + len(out), AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        if not framing.read_at(self._file, position, out, self.path):
            raise self.changed()


class MemorySource(Source):
    """A small source that is in memory as a whole."""

    def __init__(self, data: bytes, label: str) -> None:
        self.path = label
        self.size = self.memory = len(data)
        length = framing.header_length(data[:8], self.size, label)
        self.header = framing.parse_header(data[8 : 8 + length], self.size - 8 - length, label)
        self._data = np.frombuffer(data, np.uint8, offset=8 + length)

    def close(self) -> None:
        """Let go of the data."""
        self._data = self._data[:0]

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the data from byte ``start`` of the data on."""
        out[:] = self._data[start : start + len(out)]
