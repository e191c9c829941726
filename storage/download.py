"""Download a file of a store to the disk, continuing where an earlier run stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from df11.formats import errors
from df11.storage.atomic import Lock, check_platform, held_elsewhere, open_folder, open_own, remove, temporary_path
from df11.storage.entry import Entry
from df11.storage.file import CHUNK, File, LocalFile
from df11.storage.ranges import CLIENT_MEMORY
from df11.storage.store import Store


@contextmanager
def downloaded(store: Store, entry: Entry, target: Path, root: Path | None) -> Iterator[File]:
    """A file as it is on the disk beside ``target``, from where it is removed when it has been used.

    ``root``: a folder below which ``target`` lies; folders on the way are made.

    Raises a DifferenceError, and removes it, if it is not what the store lists.
    """
    path = temporary_path(target, "download")
    check_platform()
    folder = open_folder(path.parent, root)
    try:
        opened = open_own(path, folder, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    finally:
        os.close(folder)
    with opened as partial:  # For its lock, as long as the file is used.
        try:
            lock = Lock(partial, path)
        except BlockingIOError as error:
            raise held_elsewhere("another process is downloading this file", path, error) from None
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        try:
            try:
                _download(store, entry, partial, path)
            except OSError as error:
                raise errors.from_os_error(error, file=path) from None
            with LocalFile(path, label=store.locate(entry.name)) as file:
                file.memory = CLIENT_MEMORY
                yield file
            remove(path, root)
        finally:
            lock.close()


def _download(store: Store, entry: Entry, partial: IO[bytes], path: Path) -> None:
    size = partial.seek(0, os.SEEK_END)
    if size > entry.size:
        partial.truncate(0)
    resumed = 0 < size <= entry.size
    partial.seek(0)
    digest = hashlib.sha256()
    while chunk := partial.read(CHUNK):
        digest.update(chunk)
    with store.open(entry) as file:
        for data in file.chunks(partial.tell()):
            digest.update(data)
            view = memoryview(data)
            while view:
                view = view[partial.write(view) :]
    if digest.hexdigest() != entry.sha256:
        partial.truncate(0)
        if resumed:  # The start may come from another commit.
            _download(store, entry, partial, path)
            return
        path.unlink(missing_ok=True)
        raise entry.differs(digest.hexdigest(), store.locate(entry.name))
