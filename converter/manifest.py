"""The manifest of a converted tree: a row a tensor, and where the whole has come from. ``docs/manifest.md`` describes the Parquet file.

Rows come from the converter as it goes, or from a finished container alone (:func:`scan`): they are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

from df11.converter.kernels import count_exponents
from df11.converter.ordered import ordered
from df11.converter.plan import Cast
from df11.converter.source import Progress, ignore
from df11.formats import errors, framing, layout
from df11.formats.container import Container, TensorInfo
from df11.formats.record import Record, Scratch
from df11.formats.writer import AtomicWriter
from df11.version import __version__

FILE_NAME: Final = "df11-manifest.parquet"
"""Name of the manifest in a converted tree."""
TOOL: Final = f"df11 {__version__}"
COUNTED_WEIGHTS: Final = 65_536
"""A tensor of fewer weights has an entropy in its row, but no counts."""
MAX_BYTES: Final = 256 << 20
"""Largest manifest that is read: some hundred times that of a model of a hundred thousand tensors."""

Counts = npt.NDArray[np.int64]
"""i64 [256]: how often each exponent occurs."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the source came from: a repository of the Hub at a commit, or neither for a local one. ``path``: the part of it, "" for all."""

    repository: str | None = None
    commit: str | None = None
    path: str = ""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A container and the shard that it was made from; files are relative to their trees, with "/". Sizes in bytes, SHA-256 in hexadecimal."""

    file: str
    bytes: int
    sha256: str | None
    """None unless a job has computed it for an upload."""
    source_file: str
    source_bytes: int
    source_sha256: str


@dataclass(frozen=True, slots=True)
class ExponentCounts:
    """How often each exponent occurs, kept small: ``exponents`` that occur, u8 ascending; ``counts`` of them, little-endian u64."""

    exponents: bytes
    counts: bytes

    @classmethod
    def of(cls, counts: Sequence[int] | Counts) -> Self:
        """From 256 counts."""
        array = np.asarray(counts, np.int64)
        present = np.flatnonzero(array)
        return cls(present.astype(np.uint8).tobytes(), array[present].astype("<u8").tobytes())

    def array(self) -> Counts:
        """All counts, i64 [256]."""
        counts = np.zeros(256, np.int64)
        counts[np.frombuffer(self.exponents, np.uint8)] = np.frombuffer(self.counts, "<u8")
        return counts

    def entropy(self) -> float:
        """Their entropy in bits."""
        return entropy(np.frombuffer(self.counts, "<u8").tolist())


def entropy(counts: Iterable[int]) -> float:
    """Shannon entropy of counts (not all zero), in bits, rounded to 9 decimals: libraries for logarithms differ in the last bits."""
    present = [count for count in counts if count]
    total = sum(present)
    return round(max(math.log2(total) - math.fsum(count * math.log2(count) for count in present) / total, 0.0), 9)


Exponents = ExponentCounts | float | None
"""What a row says of exponents: the counts; of a tensor that is too small for them the entropy; of one without BF16 weights nothing."""


def summarized(counts: Counts, weights: int) -> ExponentCounts | float:
    """What is kept of the counts of (a part of) a tensor of so many weights."""
    return ExponentCounts.of(counts) if weights >= COUNTED_WEIGHTS else entropy(counts.tolist())


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
    """Bits; of BF16 tensors that are not empty."""
    exponent_counts: ExponentCounts | None
    """Of those of them with COUNTED_WEIGHTS weights or more."""
    exact: bool | None
    """Whether the cast from F32 has kept every value; None if there was none."""
    stored_xxh3: tuple[int, ...]
    """XXH3-64 of the stored bytes, one a segment; of a verbatim tensor one."""
    decoded_xxh3: tuple[int, ...]
    """The same of the decoded bytes."""

    @property
    def elements(self) -> int:
        """Elements of the decoded tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits an element; None for an empty tensor."""
        elements = self.elements
        return 8 * self.stored_bytes / elements if elements else None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.elements * framing.DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted tree holds. ``tensors``: file by file in the order of ``files``, in a file as they lie in the container."""

    origin: Origin
    cast: Cast
    tool: str
    files: tuple[FileRow, ...]
    tensors: tuple[TensorRow, ...]

    def to_bytes(self) -> bytes:
        """The Parquet file; the same manifest gives the same bytes. Needs pyarrow."""
        from df11.converter import parquet

        return parquet.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes, where: str | os.PathLike[str]) -> Manifest:
        """Read and check a Parquet file that may come from anywhere; ``where`` is for messages. Raises ManifestError. Needs pyarrow."""
        from df11.converter import parquet

        return parquet.from_bytes(data, where)

    def rows_of(self, file: str) -> tuple[TensorRow, ...]:
        """The tensors of one file; none if it is not here."""
        return tuple(row for row in self.tensors if row.file == file)

    def with_file(self, file: FileRow, rows: Iterable[TensorRow]) -> Manifest:
        """With this file and its tensors (whose ``file`` is set): in the place of what was known of it, else at the end."""
        files = {known.file: known for known in self.files} | {file.file: file}
        return self._of(files.values(), {**self._by_file(), file.file: _placed(rows, file.file)})

    def ordered(self, files: Sequence[str]) -> Manifest:
        """Those of these files that are here, in this order, and nothing else."""
        known = {file.file: file for file in self.files}
        return self._of([known[name] for name in files if name in known], self._by_file())

    def _by_file(self) -> dict[str, tuple[TensorRow, ...]]:
        rows: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            rows.setdefault(row.file, []).append(row)
        return {file: tuple(of_file) for file, of_file in rows.items()}

    def _of(self, files: Iterable[FileRow], rows: dict[str, tuple[TensorRow, ...]]) -> Manifest:
        files = tuple(files)
        return dataclasses.replace(
            self, files=files, tensors=tuple(row for file in files for row in rows.get(file.file, ()))
        )


def _placed(rows: Iterable[TensorRow], file: str) -> tuple[TensorRow, ...]:
    return tuple(row if row.file == file else dataclasses.replace(row, file=file) for row in rows)


def scan(
    path: str | os.PathLike[str], file: str, *, jobs: int = 1, progress: Progress = ignore
) -> tuple[TensorRow, ...]:
    """The rows of the container at ``path``, called ``file`` in its tree: decodes everything, checks every checksum, counts exponents.

    ``jobs``: threads; ``progress`` gets stored bytes. Raises a Df11Error if the container is damaged.
    """
    with Container(path) as container:
        exponents = dict(_count(container, jobs, progress))
        return tuple(_row(container, name, file, exponents.get(name)) for name in container.keys())


def up_to_date(rows: Sequence[TensorRow], container: Container) -> bool:
    """Whether rows are those of this container, as far as its header and directories tell: names, dtypes, shapes, sizes, checksums."""
    names = container.keys()
    if len(rows) != len(names):
        return False
    for row, name in zip(rows, names, strict=True):
        known: Exponents = row.exponent_counts or row.exponent_entropy
        if row.name != name or row != _row(container, name, row.file, known):
            return False
    return True


def row_of(
    file: str, info: TensorInfo, stored_xxh3: tuple[int, ...], decoded_xxh3: tuple[int, ...], exponents: Exponents
) -> TensorRow:
    """The row of a tensor."""
    counts = exponents if isinstance(exponents, ExponentCounts) else None
    return TensorRow(
        file,
        info.name,
        info.dtype,
        info.shape,
        info.encoding,
        info.stored_bytes,
        counts.entropy() if counts else exponents,  # type: ignore[arg-type]
        counts,
        info.exact,
        stored_xxh3,
        decoded_xxh3,
    )


def has_exponents(dtype: str, elements: int) -> bool:
    """Whether the row of a tensor has an entropy: if it is BF16, neither empty nor too large for a record."""
    return dtype == "BF16" and 0 < elements <= layout.MAX_RECORD_WEIGHTS


def _row(container: Container, name: str, file: str, exponents: Exponents) -> TensorRow:
    info = container.info(name)
    if info.encoding == "verbatim":
        checksum = (container.checksum(name),)
        return row_of(file, info, checksum, checksum, exponents)
    segments = container.record(name).segments
    return row_of(
        file,
        info,
        tuple(segment.stored_checksum for segment in segments),
        tuple(segment.decoded_checksum for segment in segments),
        exponents,
    )


def _count(container: Container, jobs: int, progress: Progress) -> Iterator[tuple[str, Exponents]]:
    # The exponents of every tensor that has some; all others are read and checked, too.
    def tasks() -> Iterator[tuple[str, Record, int]]:
        for name in container.keys():
            if container.info(name).encoding == "df11":
                record = container.record(name)
                for index in range(len(record.segments)):
                    yield name, record, index

    def count(task: tuple[str, Record, int], scratch: tuple[Scratch, ...]) -> Counts:
        _, record, index = task
        segment = record.read_segment(index, scratch[0])
        weights = scratch[1].take(2 * segment.entry.elements).view(np.uint16)
        segment.decode(weights)
        return count_exponents(weights)

    total = np.zeros(256, np.int64)
    for (name, record, index), counts in ordered(count, tasks(), jobs):
        total += counts
        progress(record.segments[index].size)
        if index == len(record.segments) - 1:
            yield name, summarized(total, record.element_count)
            total[:] = 0
    for name in container.keys():
        info = container.info(name)
        if info.encoding == "verbatim":
            counted = has_exponents(info.dtype, info.elements)
            for chunk in container.verbatim_chunks(name):
                if counted:
                    total += count_exponents(chunk.view(np.uint16))
                progress(len(chunk))
            if counted:
                yield name, summarized(total, info.elements)
                total[:] = 0


def check_installed() -> None:
    """Raise a MissingExtraError if no manifest could be read or written. Nothing is imported: that takes memory."""
    if importlib.util.find_spec("pyarrow") is None:
        raise errors.missing_extra("pyarrow", "convert")


def read(path: str | os.PathLike[str]) -> Manifest:
    """The manifest in a file, or in a folder under its name. Raises a Df11Error."""
    path = Path(path)
    try:
        path = path / FILE_NAME if path.is_dir() else path
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    return Manifest.from_bytes(data, path)


def write(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the manifest of a folder, unless it is there already, to the byte."""
    path = Path(folder) / FILE_NAME
    data = manifest.to_bytes()
    try:
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    with AtomicWriter(path) as writer:
        writer.write(data)
        writer.commit()


def collect(
    folder: str | os.PathLike[str],
    origin: Origin,
    cast: Cast,
    files: Iterable[tuple[FileRow, Sequence[TensorRow] | None]],
    *,
    jobs: int = 1,
    progress: Progress = ignore,
) -> Manifest:
    """Write the manifest of a converted folder and return it.

    ``files``: every container, in order, with its rows if it has been converted just now. Of a container that was there already they come from
    the manifest that the folder has, if that belongs to it, else from the container itself, which is decoded for it by ``jobs`` threads;
    ``progress`` gets the stored bytes of these.
    """
    folder = Path(folder)
    known: Manifest | None = None
    with contextlib.suppress(errors.MissingError, errors.ManifestError):
        known = read(folder)
    known_rows = {} if known is None else known._by_file()
    rows: list[TensorRow] = []
    file_rows: list[FileRow] = []
    for file, fresh in files:
        file_rows.append(file)
        rows += _placed(
            _finished(folder / file.file, file.file, known_rows.get(file.file), jobs, progress)
            if fresh is None
            else fresh,
            file.file,
        )
    manifest = Manifest(origin, cast, TOOL, tuple(file_rows), tuple(rows))
    write(folder, manifest)
    return manifest


def _finished(
    path: Path, file: str, rows: Sequence[TensorRow] | None, jobs: int, progress: Progress
) -> Sequence[TensorRow]:
    if rows:
        with Container(path) as container:
            if up_to_date(rows, container):
                return rows
    return scan(path, file, jobs=jobs, progress=progress)
