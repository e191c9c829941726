"""What the manifest of a converted model folder holds: a row per tensor, and where the model came from.

``docs/manifest.md`` describes the file. :mod:`df11.converter.parquet` reads and writes it; :mod:`df11.converter.scan`
makes rows from containers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from df11.converter.cast import Cast
from df11.converter.exponents import ExponentCounts
from df11.formats import framing
from df11.storage.store import Store
from df11.version import __version__

FILE_NAME: Final = "df11-manifest.parquet"
"""Name of the manifest in a converted model folder."""
TOOL: Final = f"df11 {__version__}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the source came from: a repository of the Hub at a commit, or neither for a local one.

    ``path`` is the folder in it, or "" for the whole repository.
    """

    repository: str | None = None
    commit: str | None = None
    path: str = ""

    @classmethod
    def of(cls, store: Store) -> Origin:
        """The origin of what a store holds."""
        address = store.address
        return cls() if address is None else cls(address.repository, store.head, address.path)


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

    def rows_of(self, file: str) -> tuple[TensorRow, ...]:
        """The tensors of one file; none if the file is unknown."""
        return tuple(row for row in self.tensors if row.file == file)

    def with_file(self, file: FileRow, rows: Iterable[TensorRow]) -> Manifest:
        """The manifest with a file and its tensors, whose ``file`` is set. Replaces the file's entry or appends one."""
        files = {known.file: known for known in self.files} | {file.file: file}
        placed = tuple(row if row.file == file.file else dataclasses.replace(row, file=file.file) for row in rows)
        return self._of(files.values(), {**self.by_file(), file.file: placed})

    def ordered(self, files: Sequence[str]) -> Manifest:
        """The manifest with just these files, as far as they exist, in this order."""
        known = {file.file: file for file in self.files}
        return self._of([known[name] for name in files if name in known], self.by_file())

    def by_file(self) -> dict[str, tuple[TensorRow, ...]]:
        """The tensors of each file that has any."""
        rows: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            rows.setdefault(row.file, []).append(row)
        return {file: tuple(of_file) for file, of_file in rows.items()}

    def _of(self, files: Iterable[FileRow], rows: dict[str, tuple[TensorRow, ...]]) -> Manifest:
        files = tuple(files)
        return dataclasses.replace(
            self, files=files, tensors=tuple(row for file in files for row in rows.get(file.file, ()))
        )
