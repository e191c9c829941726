"""Defects to put into df11: a check that does not find them finds nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from df11.converter import apply, work
from df11.storage import atomic, hub, journal, local


def _nothing(*_: object, **__: object) -> None:
    return None


def writes_in_place() -> None:
    """A file has its final name while it is written."""

    def commit(self: atomic.AtomicWriter, check: object = None) -> None:
        del check
        data = self.partial.read_bytes()
        with self.path.open("wb", buffering=0) as file:
            file.write(data[:10])
            file.write(data[10:])

    atomic.AtomicWriter.commit = commit  # type: ignore[method-assign]


def does_not_sync_files() -> None:
    """A file gets its name before its content is on the disk."""
    atomic.AtomicWriter._sync = _nothing  # type: ignore[method-assign]


def does_not_sync_folders() -> None:
    """A name is not on the disk when the command ends."""
    for module in (atomic, journal):
        module.sync_folder = _nothing  # type: ignore[attr-defined]


def keeps_no_journal() -> None:
    """Nobody knows what a killed run has written."""
    for module in (apply, work):
        module.append = _nothing  # type: ignore[attr-defined]


def locks_nothing() -> None:
    """Two runs write to one folder."""
    for module in (atomic, journal, hub):
        module.Lock = type("NoLock", (), {"__init__": _nothing, "close": _nothing})  # type: ignore[attr-defined]


def ignores_errors() -> None:
    """A full disk is not noticed."""
    write = os.pwrite

    def pwrite(file: int, data: Any, offset: int) -> int:
        with contextlib.suppress(OSError):
            return write(file, data, offset)
        return len(data)

    os.pwrite = pwrite


def believes_short_writes() -> None:
    """What a call has not written is lost."""
    write = os.pwrite

    def pwrite(file: int, data: Any, offset: int) -> int:
        write(file, data, offset)
        return len(data)

    os.pwrite = pwrite


def leaves_temporary_files() -> None:
    """What a killed run has left stays."""
    local.remove_abandoned = _nothing
    atomic.AtomicWriter._remove = _nothing  # type: ignore[method-assign]


def crashes_on_errors() -> None:
    """An error of the system is none of df11's."""

    def fsync(self: atomic.AtomicWriter) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RuntimeError from error

    atomic.AtomicWriter._sync = fsync  # type: ignore[method-assign]


DEFECTS: dict[str, Callable[[], None]] = {
    defect.__name__: defect
    for defect in (
        writes_in_place,
        does_not_sync_files,
        does_not_sync_folders,
        keeps_no_journal,
        locks_nothing,
        ignores_errors,
        believes_short_writes,
        leaves_temporary_files,
        crashes_on_errors,
    )
}
