"""Write a file that appears under its name only when it is complete: sibling temporary file, lock, fsync, rename."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from df11.formats import errors

FLUSH_BYTES: Final = 64 << 20
"""Ask for write-back after this many bytes, so that the disk works while the processor does."""


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Return the name of the temporary file of ``path``."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def lock(file: int | IO[bytes]) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError if another process has it, OSError where there are no locks."""
    try:
        import fcntl
    except ModuleNotFoundError:
        raise errors.UsageError("df11 reads on Windows, but does not write there yet", hint="use WSL") from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class AtomicWriter:
    """A binary file, written from its start, that takes its name in :meth:`commit`; without it nothing is left behind.

    The temporary file has a fixed name and is locked: a second writer of the same path gets a ConflictError, and what a killed
    writer left is overwritten.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.partial = partial_path(path)
        self.position = 0
        self._committed = False
        self._flushed = 0
        self._flush: Future[None] | None = None
        self._flusher = ThreadPoolExecutor(1, "df11-flush")
        self._file = self._open()

    def _open(self) -> IO[bytes]:
        while True:
            try:
                file = open(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115 - closed in __exit__
            except OSError as error:
                raise errors.from_os_error(error, file=self.path) from None
            try:
                lock(file)
            except BlockingIOError:
                file.close()
                raise errors.ConflictError(
                    "another process is writing this file", file=self.path, hint="wait for it to end"
                ) from None
            except errors.UsageError:
                file.close()
                self.partial.unlink()
                raise
            except OSError as error:  # Some network file systems have no locks.
                file.close()
                raise errors.from_os_error(error, file=self.path) from None
            try:
                if os.fstat(file.fileno()).st_ino == self.partial.stat().st_ino:
                    break
            except FileNotFoundError:
                pass
            file.close()  # Its last writer renamed or removed it between our open and our lock.
        os.ftruncate(file.fileno(), 0)
        return file

    def write(self, data: object, offset: int | None = None) -> None:
        """Write bytes (any buffer) at ``offset``, by default after what has been written so far."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        start = self.position if offset is None else offset
        end = start + len(view)
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, start)
                view, start = view[count:], start + count
            self.position = max(self.position, end)
            if self.position - self._flushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
                if self._flush is not None:
                    self._flush.result()  # The kernel reports an error of write-back once: not to us again.
                self._flushed = self.position
                self._flush = self._flusher.submit(self._sync)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def _sync(self) -> None:
        os.fsync(self._file.fileno())

    def rewind(self, position: int) -> None:
        """Drop everything from ``position`` on."""
        try:
            os.ftruncate(self._file.fileno(), position)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None
        self.position = position

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        try:
            if self._flush is not None:
                self._flush.result()
            self._sync()
            self.partial.replace(self.path)
            self._committed = True
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flusher.shutdown(wait=True)
        if not self._committed:
            self.partial.unlink(missing_ok=True)
        self._file.close()


def make_parents(path: str | os.PathLike[str]) -> None:
    """Create the folders above ``path``."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.from_os_error(error, file=Path(path).parent) from None
