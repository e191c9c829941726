"""Where the files of a tree come from: a disk, or a repository on the Hub (:mod:`df11.converter.hub`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Final, Protocol

from df11.converter.manifest import Origin
from df11.converter.source import LocalSource, Source
from df11.formats import errors
from df11.formats.hub import Address, is_address
from df11.formats.writer import AtomicWriter

SKIPPED_FOLDERS: Final = frozenset({".git", ".cache"})
"""Bookkeeping of git and of the Hub's client, not part of a model."""
LEFT_OVERS: Final = (".partial", ".download")
"""Ends of hidden files that a killed run has left."""
CHUNK: Final = 4 << 20
"""Bytes that are copied or compared at once."""


class SourceFile(Protocol):
    """One file of a tree. Can be pickled."""

    @property
    def name(self) -> PurePosixPath:
        """Its path in the tree; of a tree that is one file: the file's name."""
        ...

    @property
    def label(self) -> str:
        """What messages, reports and logs call it: its path, or hf://owner/name@commit/path."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def sha256(self) -> str | None:
        """SHA-256 in hexadecimal, as the Hub lists it for files in LFS; what is read is held to it."""
        ...

    @property
    def blob_id(self) -> str | None:
        """The id of the content in git (of an LFS file: of its pointer), as the Hub lists it."""
        ...

    def open(self) -> Source:
        """The file as a safetensors source."""
        ...

    def read_bytes(self) -> bytes:
        """All of a small file."""
        ...

    def copy_to(self, writer: AtomicWriter) -> None:
        """Write the content to ``writer``, in pieces; what is wrong with it is raised before this returns."""
        ...

    def has_content(self, path: Path) -> bool:
        """Whether the local file ``path`` has the same content."""
        ...


class Tree:
    """A file, or a folder with all that is in it."""

    label: str
    origin: Origin
    path: Path | None
    """On this machine, if it is there."""
    is_file: bool
    files: Sequence[SourceFile]
    """In the order of their names."""


def open_tree(src: str | os.PathLike[str]) -> Tree:
    """The tree that a path or an ``hf://`` address means. Raises a Df11Error."""
    if isinstance(src, str) and is_address(src):
        from df11.converter.hub import HubTree

        return HubTree(Address.parse(src))
    return LocalTree(Path(src))


def missing(path: Path) -> errors.MissingError:
    """The error for a path where nothing is."""
    hint = "check the path"
    if path.parts[0] == "hf:":  # Of an address, which has lost a slash on its way.
        hint = "this reads files on this machine only; first: df11 hub pull hf://OWNER/NAME FOLDER"
    elif path.parts[0] in ("http:", "https:"):
        hint = "for a model on the Hub: hf://OWNER/NAME"
    return errors.MissingError("no such file or folder", file=path, hint=hint)


def is_left_out(name: PurePath) -> bool:
    """Whether a file is none of the model's."""
    hidden = name.name.startswith(".") and name.name.endswith(LEFT_OVERS)
    return hidden or any(folder in SKIPPED_FOLDERS for folder in name.parts[:-1])


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A :class:`SourceFile` on a disk."""

    name: PurePosixPath
    path: Path
    size: int
    sha256: None = None
    blob_id: None = None

    @property
    def label(self) -> str:
        """Its path."""
        return str(self.path)

    def open(self) -> Source:
        """The file as a safetensors source."""
        return LocalSource(self.path)

    def read_bytes(self) -> bytes:
        """All of the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def copy_to(self, writer: AtomicWriter) -> None:
        """Write the content to ``writer``, in pieces."""
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    writer.write(chunk)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def has_content(self, path: Path) -> bool:
        """Whether the file ``path`` has the same content."""
        if self.path.stat().st_size != path.stat().st_size:
            return False
        with self.path.open("rb") as mine, path.open("rb") as other:
            while chunk := mine.read(CHUNK):
                if chunk != other.read(len(chunk)):
                    return False
        return True


class LocalTree(Tree):
    """A file or folder on a disk. Links are followed, as the Hub's cache makes them."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise missing(path)
        self.path = path
        self.label = str(path)
        self.origin = Origin()
        self.is_file = path.is_file()
        found = [path] if self.is_file else walk(path)
        self.files = [
            LocalFile(PurePosixPath(file.relative_to(path.parent if self.is_file else path)), file, file.stat().st_size)
            for file in found
        ]


def walk(folder: Path) -> list[Path]:
    """All files of a folder and the folders in it, links followed, in the order of their paths."""
    return sorted(_walk(folder, frozenset()))


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise errors.UsageError("a link leads back to a folder above it", file=folder)
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise errors.from_os_error(error, file=folder) from None
    for entry in entries:
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from _walk(folder / entry.name, above | {real})
        elif entry.is_file():
            if not is_left_out(PurePath(entry.name)):
                yield folder / entry.name
        else:
            raise errors.MissingError("neither a file nor a folder, or a link that leads nowhere", file=entry.path)
