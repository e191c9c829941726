"""A store in which some files are made from those of another: read only, and nothing is made before it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from df11.formats import errors
from df11.storage.address import Address
from df11.storage.atomic import ANY_MODE
from df11.storage.entry import Entry
from df11.storage.file import File, MemoryFile
from df11.storage.store import Put, Store


class Made(Protocol):
    """A file that is made when it is read. Can be pickled."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sources(self) -> tuple[Entry, ...]:
        """The files that it is made from, as the other store lists them."""

    def open(self, store: Store, label: str) -> File:
        """The file, made from those of the other store. ``label``: its name in messages."""


class Overlay(Store):
    """``store`` without the ``hidden`` files, with ``made`` ones and small ``texts`` in their place, by name."""

    def __init__(
        self,
        store: Store,
        made: Mapping[str, Made],
        texts: Mapping[str, bytes] = {},
        hidden: Collection[str] = (),
    ) -> None:
        self._store = store
        self._made, self._texts = dict(made), dict(texts)
        self._hashes: dict[str, Entry] = {}
        self._hidden = frozenset(hidden) | made.keys() | texts.keys()
        self.label = store.label
        self.address: Address | None = store.address
        self.head, self.private, self.is_file = store.head, store.private, store.is_file
        self.refused, self.remarks = store.refused, store.remarks

    def refresh(self) -> bool:
        """Whether it is there."""
        return self._store.refresh()

    def missing(self) -> errors.Df11Error:
        """The error of the other store."""
        return self._store.missing()

    def list(self) -> tuple[Entry, ...]:
        """All files, made ones without hashes."""
        found = [entry for entry in self._store.list() if entry.name not in self._hidden]
        self.refused, self.remarks = self._store.refused, self._store.remarks
        found += [Entry(name, made.size) for name, made in self._made.items()]
        found += [Entry.of(name, data) for name, data in self._texts.items()]
        return tuple(sorted(found, key=lambda entry: entry.name))

    def find(self, names: Collection[str]) -> dict[str, Entry]:
        """Those of the files that exist."""
        # Not by a new list: links that have come since the last one are not followed.
        found = {name: entry for name, entry in self._store.find(names).items() if name not in self._hidden}
        found |= {name: Entry(name, self._made[name].size) for name in names if name in self._made}
        return found | {name: Entry.of(name, self._texts[name]) for name in names if name in self._texts}

    def locate(self, name: str) -> str:
        """A file's name in messages: where it would be in the other store."""
        return self._store.locate(name)

    def open(self, entry: Entry) -> File:
        """A file."""
        if entry.name in self._texts:
            return MemoryFile(self._texts[entry.name], self.locate(entry.name))
        if entry.name in self._made:
            return self._made[entry.name].open(self._store, self.locate(entry.name))
        return self._store.open(entry)

    def made_from(self, entry: Entry) -> tuple[Entry, ...]:
        """The files that a file is made from, with their SHA-256."""
        made = self._made.get(entry.name)
        for one in () if made is None else made.sources:
            if one.name not in self._hashes:
                self._hashes[one.name] = _hashed(self._store, one)
        return () if made is None else tuple(self._hashes[one.name] for one in made.sources)

    def mode(self, entry: Entry) -> int:
        """Permissions of a file: of a made one, those of any new file."""
        return ANY_MODE if entry.name in self._hidden else self._store.mode(entry)

    def hashed(self, entry: Entry) -> Entry:
        """The entry with a hash, for which a made file is made."""
        if entry.is_hashed or (entry.name not in self._made and entry.name not in self._texts):
            return entry if entry.is_hashed else self._store.hashed(entry)
        with self.open(entry) as file:
            return Entry.of_chunks(entry.name, file.size, file.chunks())

    def is_direct(self, name: str) -> bool:
        """Whether no link lies between the store and a file in it."""
        return self._store.is_direct(name)

    def contains(self, other: Store) -> bool:
        """Whether another store lies inside the other one."""
        return self._store.contains(other)

    def original_card(self) -> bytes | None:
        """The repository's README.md, if this is a folder of it."""
        return self._store.original_card()

    # It is only read.

    def create(self, *, private: bool | None) -> None:
        """Nothing is created here."""
        raise self._read_only()

    def place(self, name: str, staging: Path | None) -> tuple[Path, Path]:
        """Nothing is written here."""
        raise self._read_only()

    def staging(self, work: Path, most: int) -> AbstractContextManager[Path | None]:
        """Nothing is written here."""
        raise self._read_only()

    def staged_bytes(self, size: int) -> int:
        """Nothing is written here."""
        raise self._read_only()

    def put(self, name: str, content: Path | bytes, *, mode: int = ANY_MODE) -> Put:
        """Nothing is written here."""
        raise self._read_only()

    def commit(self, puts: Sequence[Put], removed: Sequence[str], message: str) -> None:
        """Nothing is written here."""
        raise self._read_only()

    def _read_only(self) -> errors.Df11Error:
        return errors.UsageError("this is only read", file=self.label)


def _hashed(store: Store, entry: Entry) -> Entry:
    # With its SHA-256, which a repository does not list for small files.
    entry = store.hashed(entry)
    return entry if entry.sha256 is not None else Entry.of(entry.name, store.read(entry))
