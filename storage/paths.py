"""Paths of the caller, asked about: whatever the system, or Python, says of one that cannot be used is a Df11Error."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from df11.formats import errors

StrPath = str | os.PathLike[str]
Kind = Literal["file", "folder", "other"]


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Raise what goes wrong with a path as a Df11Error that names it."""
    try:
        yield
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    except (ValueError, RuntimeError):  # A null character, half a surrogate pair; in older versions a loop of links.
        raise errors.UsageError("this cannot be the name of a file", file=ascii(os.fspath(path))) from None


def kind_of(path: StrPath) -> Kind | None:
    """What is at a path, links followed; None if nothing is."""
    with naming(path):
        try:
            mode = Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def open_regular(path: StrPath) -> IO[bytes]:
    """A file, to be read, links followed. Nothing waits for the other end of a pipe."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    return _regular(descriptor, path)


def _regular(descriptor: int, path: StrPath) -> IO[bytes]:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        what = "this is a folder, not a file" if is_folder else "this is not a regular file"
        raise errors.UsageError(what, file=path)
    return open(descriptor, "rb", buffering=0)


def open_below(root: StrPath, name: str) -> IO[bytes]:
    """A file below a folder, to be read; ``name`` has ``/``. No part of the way below ``root`` may be a link.

    Raises a Df11Error; a ConflictError where a link has taken the place of what was there.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    path = Path(root, name)
    if not flags & getattr(os, "O_NOFOLLOW", 0):  # Windows, where only those who administer the machine make links.
        return open_regular(path)
    *folders, last = name.split("/")
    with naming(path):
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in folders:
                inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(last, flags | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                hint = "run the same command again"
                what = "this was replaced by something else after it was listed"
                raise errors.ConflictError(what, file=path, hint=hint) from None
            raise
        finally:
            os.close(folder)
    return _regular(descriptor, path)


def read_file(path: StrPath, most: int) -> bytes:
    """All of a file of up to ``most`` bytes. Raises LimitError for a larger one, before it is read."""
    with open_regular(path) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise errors.LimitError("this file is too large", file=path, expected=f"at most {most} bytes", found=size)
        parts = []
        while part := file.read(size + 1):  # One read may give less than all of it.
            parts.append(part)
        return b"".join(parts)


def existing(path: Path) -> Path:
    """The path, or the folder nearest above it that exists."""
    while kind_of(path) is None and path != path.parent:
        path = path.parent
    return path


def same(one: Path, other: Path) -> bool:
    """Whether both are the same file or folder; what is not there is no other's."""
    with naming(one):
        return kind_of(one) is not None and kind_of(other) is not None and one.samefile(other)


def name_of(path: Path) -> str:
    """The last part of a path, without links and dots."""
    with naming(path):
        return path.resolve().name
