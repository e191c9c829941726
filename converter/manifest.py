"""What the manifest of a converted model folder holds: a row per tensor, and where the model came from.

``docs/manifest.md`` describes the file. :mod:`df11.converter.parquet` reads and writes it; :mod:`df11.converter.scan`
makes rows from containers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from df11.converter.cast import Cast
from df11.converter.exponents import ExponentCounts
from df11.formats import errors, framing
from df11.formats.container import OriginalFile
from df11.storage.entry import Entry
from df11.storage.store import Store
from df11.version import __version__

FILE_NAME: Final = "df11-manifest.parquet"
"""Name of the manifest in a converted model folder."""
TOOL: Final = f"df11 {__version__}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the source came from: a repository of the Hub at a commit, or neither for a local one.

    ``path`` is the folder in it, or "" for the whole repository. ``private``: whether the repository was private; None
    if unknown, as for a local source.
    """

    repository: str | None = None
    commit: str | None = None
    path: str = ""
    private: bool | None = None

    @classmethod
    def of(cls, store: Store) -> Origin:
        """The origin of what a store holds."""
        address = store.address
        return cls() if address is None else cls(address.repository, store.head, address.path, store.private)


@dataclass(frozen=True, slots=True)
class FileRow:
    """A container and the shard it was made from. Sizes in bytes, SHA-256 in hexadecimal.

    File names are relative to their model folders and use "/".
    """

    file: str
    bytes: int
    sha256: str | None
    """None unless it was computed for an upload."""
    source_file: str
    source_bytes: int
    source_sha256: str
    made_from: tuple[OriginalFile, ...] = ()
    """The files that the source was decoded from, as of a DFloat11 checkpoint; none if it was a file itself."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor of a container. ``dtype`` and ``shape`` are those of the decoded tensor."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Literal["df11", "verbatim"]
    stored_bytes: int
    exponent_entropy: float | None
    """In bits; None for tensors that are empty, and for verbatim ones that are not BF16."""
    exponent_counts: ExponentCounts | None
    """None for tensors without an entropy and those of fewer than COUNTED_WEIGHTS weights."""
    exact: bool | None
    """Whether the cast from F32 kept every value; None if there was no cast."""
    stored_xxh3: tuple[int, ...]
    """XXH3-64 of the stored bytes, one per segment; a verbatim tensor has one."""
    decoded_xxh3: tuple[int, ...]
    """The same for the decoded bytes."""

    @property
    def elements(self) -> int:
        """Elements of the decoded tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per element; None for an empty tensor."""
        elements = self.elements
        return 8 * self.stored_bytes / elements if elements else None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.elements * framing.DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted model folder holds.

    ``tensors`` come file by file in the order of ``files``, and within a file in the order of the container.
    """

    origin: Origin
    cast: Cast
    tool: str
    files: tuple[FileRow, ...]
    tensors: tuple[TensorRow, ...]
    others: tuple[tuple[str, str], ...] = ()
    """The other files that df11 wrote, with their SHA-256. One that still has it may be replaced."""
    renamed: tuple[tuple[str, str], ...] = ()
    """What files were called in the source if their names do not say it: index files, and missing shards in them."""

    @property
    def originals(self) -> dict[str, str]:
        """What containers, and other files whose names do not say it, were called in the source."""
        return dict(self.renamed) | {row.file: row.source_file for row in self.files}

    def rows_of(self, file: str) -> tuple[TensorRow, ...]:
        """The tensors of one file; none if the file is unknown."""
        return tuple(row for row in self.tensors if row.file == file)

    def holding(self, files: Iterable[tuple[FileRow, Sequence[TensorRow]]]) -> Manifest:
        """The manifest with just these files and their tensors, in this order."""
        files = tuple(files)
        rows = tuple(itertools.chain.from_iterable(tensors for _, tensors in files))
        return dataclasses.replace(self, files=tuple(row for row, _ in files), tensors=rows)

    def by_file(self) -> dict[str, tuple[FileRow, tuple[TensorRow, ...]]]:
        """Each file and its tensors, by its name and in order."""
        rows: dict[str, list[TensorRow]] = {file.file: [] for file in self.files}
        for row in self.tensors:
            rows[row.file].append(row)
        return {file.file: (file, tuple(rows[file.file])) for file in self.files}


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a store; None if it has none. Raises ManifestError if it cannot be read."""
    entry = store.find([FILE_NAME]).get(FILE_NAME)
    if entry is None:
        return None
    from df11.converter import parquet  # It imports pyarrow, which takes memory.

    where = store.locate(FILE_NAME)
    if entry.size > parquet.MAX_BYTES:
        what = "too large for a manifest"
        raise errors.ManifestError(what, file=where, expected=f"at most {parquet.MAX_BYTES} bytes")
    with store.open(entry) as file:
        data = b"".join(chunk.tobytes() for chunk in file.chunks())
    if entry.is_hashed:
        entry.check(Entry.of(FILE_NAME, data), where)
    return parquet.from_bytes(data, where)


def is_relative(name: object) -> bool:
    """Whether this can be the name of a file in a manifest: it leads to a file in the folder, and is text."""
    if not isinstance(name, str) or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return False
    return is_text(name)


def is_text(name: str) -> bool:
    """Whether a file's name is text. Other ones cannot be written to a manifest, nor have a file on the Hub."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
