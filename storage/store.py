"""A place that holds files by name: a folder, or a repository on the Hub. Code that uses one works with both."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from df11.formats import errors
from df11.storage.address import Address, is_address
from df11.storage.atomic import ANY_MODE
from df11.storage.entry import Entry
from df11.storage.file import File
from df11.storage.journal import Journal

MAX_WHOLE_BYTES = 32 << 20
"""Largest file that is read whole: about the size of the index of 100,000 tensors."""


@dataclass(frozen=True, slots=True)
class Put:
    """A file that a store holds, or will hold after the next commit. Can be pickled."""

    entry: Entry
    payload: Any
    """What the commit needs; only the store knows."""


class Store(ABC):
    """Files by name. Can be pickled, so that any process can open and put files."""

    label: str
    """Its name in messages: a path or an address."""
    address: Address | None = None
    """The address of a repository; None for a folder."""
    head: str | None = None
    """The commit of a repository that was last seen or made; None if there is none yet."""
    private: bool | None = None
    """Whether a repository is private; None if unknown."""
    is_file: bool = False
    """Whether this is a single file; for a repository, known once :meth:`list` has run."""
    versioned: bool = False
    """Whether what is replaced or removed can be had back."""
    refused: Mapping[str, errors.Df11Error] = {}
    """What the last :meth:`list` has seen that is no file of a model, by name, with the error for who wants it.

    Links that lead out of a folder, or nowhere, pipes and devices. Folders have a ``/`` at their ends."""
    remarks: tuple[str, ...] = ()
    """What the last :meth:`list` found that readers should know, a line each."""

    @abstractmethod
    def refresh(self) -> bool:
        """Find out whether anything is there, and its newest state, which later calls list and read.

        Raises ConflictError if somebody else has changed it since the last refresh or commit.
        """

    @abstractmethod
    def missing(self) -> errors.Df11Error:
        """The error for a store that does not exist."""

    @abstractmethod
    def list(self) -> tuple[Entry, ...]:
        """All files that belong to a model (:mod:`df11.storage.names`), sorted by name."""

    @abstractmethod
    def find(self, names: Collection[str]) -> dict[str, Entry]:
        """Those of the files that exist, by name. A repository returns all its files, as it lists them anyway.

        Raises UsageError if something else has one of the names.
        """

    def entry(self, name: str) -> Entry:
        """A file that was there a moment ago. Raises ConflictError if it is gone."""
        entry = self.find([name]).get(name)
        if entry is None:
            hint = "run the same command again"
            raise errors.ConflictError("this file was removed in the meantime", file=self.locate(name), hint=hint)
        return entry

    @abstractmethod
    def locate(self, name: str) -> str:
        """A file's name in messages: its path, or hf://owner/name@commit/path."""

    @abstractmethod
    def open(self, entry: Entry) -> File:
        """A file, open for reading at any position."""

    def read(self, entry: Entry) -> bytes:
        """All of a small file, checked against the listed hash."""
        where = self.locate(entry.name)
        if entry.size > MAX_WHOLE_BYTES:
            raise errors.UsageError(
                "too large to read whole",
                file=where,
                expected=f"at most {MAX_WHOLE_BYTES} bytes",
                found=entry.size,
            )
        out = np.empty(entry.size, np.uint8)
        with self.open(entry) as file:
            if file.size != entry.size:
                raise file.changed()
            file.read(0, out)
        if entry.is_hashed:
            entry.check(Entry.of(entry.name, out.tobytes()), where)
        return out.tobytes()

    def mode(self, entry: Entry) -> int:
        """Permissions of a file, which its copies do not exceed. A file on the Hub has those of any new file."""
        del entry
        return ANY_MODE

    @abstractmethod
    def hashed(self, entry: Entry) -> Entry:
        """The entry with a hash; a local file is read for it."""

    def is_direct(self, name: str) -> bool:
        """Whether no link lies between this store and a file in it."""
        return bool(name)

    def check_name(self, name: str) -> bool:
        """Whether a file here can have this name."""
        return bool(name)

    @abstractmethod
    def contains(self, other: Store) -> bool:
        """Whether another store is this one, or lies inside it."""

    @abstractmethod
    def create(self, *, private: bool | None) -> None:
        """Create the folder or repository if it does not exist.

        ``private``: for a new repository; None leaves it to the server.
        """

    @abstractmethod
    def place(self, name: str, staging: Path | None) -> tuple[Path, Path]:
        """A folder, and the path below it where a file is written that is to be put.

        That is under its final name, or, if it is uploaded from there, in ``staging``.
        """

    @abstractmethod
    def staging(self, work: Path, most: int) -> AbstractContextManager[Path | None]:
        """A folder in ``work`` for files of up to ``most`` bytes on their way here; None if none is needed."""

    def original_card(self) -> bytes | None:
        """The repository's README.md, if this is a folder of it; None if there is none, or if unknown."""
        return None

    def free_bytes(self) -> int | None:
        """Bytes available for more files; None if unknown."""
        return None

    @abstractmethod
    def staged_bytes(self, size: int) -> int:
        """Bytes of disk that a file of ``size`` takes on its way here, besides the store itself."""

    def journal(self) -> Journal | None:
        """What keeps other runs away and knows this one's files: of a folder. A repository needs none."""
        return None

    def stamp(self, names: Iterable[str]) -> Mapping[str, object]:
        """By what a change of files can be seen later; a repository sees it by its commits."""
        return {}

    def check_stamp(self, name: str, stamp: object) -> None:
        """Raise ConflictError if a file is another one than when it had this stamp, and still there."""
        if self.stamp([name]).get(name) not in (None, stamp):
            what = "somebody else has changed this file in the meantime"
            raise errors.ConflictError(what, file=self.locate(name), hint="run the same command again")

    def clean(self, names: Iterable[str]) -> None:  # noqa: B027 - a repository has no such thing
        """Remove what killed runs have left for files of these names."""

    def had(self, name: str, there: Entry) -> bool:
        """Whether a file had this content here before: only a repository knows."""
        return False

    @abstractmethod
    def put(self, name: str, content: Path | bytes, *, mode: int = ANY_MODE) -> Put:
        """Bring a file here, from its :meth:`place` or from memory. The next commit makes it visible, if not sooner."""

    @abstractmethod
    def commit(self, puts: Sequence[Put], removed: Sequence[str], message: str) -> None:
        """Remove files, and make others visible in order.

        Raises ConflictError if somebody else has changed the store since it was refreshed.
        """


def has_content(store: Store, there: Entry, wanted: Entry) -> bool:
    """Whether a file of a store has the wanted content. It is read only if the listed hashes cannot tell."""
    same = wanted.same_content(there)
    if same is None and not wanted.is_hashed:
        return True  # Only its size is known.
    if same is None:
        same = wanted.same_content(store.hashed(there))
    if same is None:  # A repository lists one kind of hash; the other is wanted.
        same = wanted.same_content(Entry.of(there.name, store.read(there)))
    return bool(same)


def same_content(one: Store, entry: Entry, other: Store, there: Entry) -> bool:
    """Whether two files of two stores have the same content."""
    if entry.size != there.size:
        return False
    same = entry.same_content(there)
    return has_content(other, there, one.hashed(entry)) if same is None else same


def open_source(place: str | os.PathLike[str]) -> Store:
    """Open a path or an ``hf://`` address for reading. A repository is read at the current commit of its revision.

    Raises a Df11Error if nothing is there.
    """
    store = open_store(place)
    if store.address is None:
        from df11.storage.local import LocalStore, snapshot_in

        store = LocalStore(snapshot_in(Path(place)))
        store.label = str(place)
    if not store.refresh():
        raise store.missing()
    return store


def open_store(place: str | os.PathLike[str]) -> Store:
    """The store of a path or an ``hf://`` address, whether it exists or not."""
    if isinstance(place, str) and is_address(place):
        from df11.storage.hub import HubStore

        return HubStore(Address.parse(place))
    from df11.storage.local import LocalStore

    return LocalStore(Path(place))
