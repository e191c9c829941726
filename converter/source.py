"""A safetensors file to convert, wherever it is: its checked header, and its data."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Self

import numpy as np

from df11.converter.kernels import Sha256
from df11.converter.settings import BASE_MEMORY, HEADER_MEMORY, SMALL_HEADER, too_little_memory
from df11.formats import errors, framing
from df11.formats.record import Bytes
from df11.storage.entry import Entry
from df11.storage.file import CHUNK, File, LocalFile

Progress = Callable[[int], None]
"""Called with the number of source bytes processed since the last call, which may be zero. An error that it raises
ends the work."""

HEAD_BYTES: Final = 256 << 10
"""Bytes that are read first: most headers fit, so one request is enough to check a file on the Hub."""


def ignore(_: object) -> None:
    """A callback that does nothing."""


class Source:
    """An open safetensors file whose header has been checked. A context manager; closing it closes the file.

    Raises a Df11Error if it is not a valid one.
    """

    def __init__(self, file: File, *, max_memory: int | None = None) -> None:
        self._file = file
        self.path = file.label
        """Its name in messages and reports: a path or an address."""
        self.size = file.size
        self.memory = file.memory
        """Bytes of memory that reading takes, besides the caller's buffers."""
        self.sources = file.sources
        """The files that it is made from while it is read; none if it is a file itself."""
        try:
            head = np.empty(min(file.size, HEAD_BYTES), np.uint8)
            file.read(0, head)
            end = 8 + framing.header_length(head[:8].tobytes(), file.size, self.path)
            needed = BASE_MEMORY + HEADER_MEMORY * end
            if max_memory is not None and end > SMALL_HEADER and needed > max_memory:  # Before it becomes so much.
                raise too_little_memory(self.path, needed, max_memory)
            raw = np.empty(end, np.uint8)
            raw[: len(head)] = head[:end]
            file.read(len(head), raw[len(head) :])
            self.header = framing.parse_header(raw[8:].tobytes(), file.size - end, self.path)
        except BaseException:
            file.close()
            raise
        file.expect(end)

    @classmethod
    def local(cls, path: str | os.PathLike[str]) -> Self:
        """A source on a disk."""
        return cls(LocalFile(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with data from byte ``start`` of the data on. Thread-safe."""
        self._file.read(self.header.data_start + start, out)

    def hashed_sources(self) -> tuple[Entry, ...]:
        """The files that it is made from, with their SHA-256."""
        return self._file.hashed_sources()

    def stop(self) -> None:
        """Wake all threads that wait for data: from now on, reads raise an error."""
        self._file.stop()

    def check_unchanged(self) -> None:
        """Raise a ConflictError if the file has changed since it was opened."""
        self._file.check_unchanged()

    def changed(self, tensor: str | None = None) -> errors.Df11Error:
        """The error for a source that has changed."""
        return self._file.changed(tensor)

    def sha256(self, progress: Progress) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        digest = self.start_sha256()
        progress(self.header.data_start)
        size = self.size - self.header.data_start
        buffer = np.empty(min(CHUNK, max(size, 1)), np.uint8)
        for start in range(0, size, CHUNK):
            chunk = buffer[: size - start]
            self.read(start, chunk)
            digest.update(chunk)
            progress(len(chunk))
        self.check_unchanged()
        return digest.hexdigest()

    def start_sha256(self) -> Sha256:
        """A SHA-256 that has seen the header; the data comes next."""
        return Sha256(len(self.header.raw).to_bytes(8, "little") + self.header.raw)
