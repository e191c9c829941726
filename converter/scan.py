"""The rows of a manifest from finished containers, and a folder's manifest from the rows of its files.

Rows come from a running conversion or from a finished container (:func:`scan`): they are the same.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence

import numpy as np

from df11.converter.exponents import Counts, ExponentCounts, Exponents, has_exponents, summarized
from df11.converter.kernels import count_exponents
from df11.converter.manifest import FileRow, TensorRow
from df11.converter.ordered import ordered
from df11.converter.source import Progress, ignore
from df11.formats import errors
from df11.formats.container import Container, TensorInfo
from df11.formats.layout import BF16
from df11.formats.record import Record, Scratch, weights_dtype


def scan(
    path: str | os.PathLike[str], file: str, *, threads: int = 1, progress: Progress = ignore
) -> tuple[TensorRow, ...]:
    """The rows of the container at ``path``, called ``file`` in its model folder.

    Decodes everything, checks every checksum, counts exponents. ``threads`` decode; ``progress`` gets stored bytes.
    Raises a Df11Error if the container is damaged.
    """
    with Container(path) as container:
        exponents = dict(_count(container, threads, progress))
        return tuple(_row(container, name, file, exponents.get(name)) for name in container.keys())


def up_to_date(rows: Sequence[TensorRow], container: Container) -> bool:
    """Whether rows describe this container, as far as its header and directories tell.

    Compares names, dtypes, shapes, sizes and checksums.
    """
    names = container.keys()
    if len(rows) != len(names):
        return False
    for row, name in zip(rows, names, strict=True):
        known: Exponents = row.exponent_counts or row.exponent_entropy
        if row.name != name or row != _row(container, name, row.file, known):
            return False
    return True


def check_described(row: FileRow | None, container: Container) -> None:
    """Raise a DifferenceError if a manifest's row is about another container than the one that has its name."""
    if row is not None and row.source_sha256 != container.source.sha256:
        what = "this container was made from another file than the manifest says"
        hint = "convert the model again, or remove the manifest if this is meant to be so"
        raise errors.DifferenceError(
            what, file=container.path, expected=row.source_sha256, found=container.source.sha256, hint=hint
        )


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


def _count(container: Container, threads: int, progress: Progress) -> Iterator[tuple[str, Exponents]]:
    # The exponents of every record and every BF16 tensor; all other tensors are read and checked, too.
    def tasks() -> Iterator[tuple[str, Record, int]]:
        for name in container.keys():
            if container.info(name).encoding == "df11":
                record = container.record(name)
                for index in range(len(record.segments)):
                    yield name, record, index

    def count(task: tuple[str, Record, int], scratch: tuple[Scratch, ...]) -> Counts:
        _, record, index = task
        segment = record.read_segment(index, scratch[0])
        weights = scratch[1].take(record.kind.bytes * segment.entry.elements).view(weights_dtype(record.kind))
        segment.decode(weights)
        return count_exponents(weights, record.kind)

    total = np.zeros(256, np.int64)
    for (name, record, index), counts in ordered(count, tasks(), threads):
        total += counts
        progress(record.segments[index].size)
        if index == len(record.segments) - 1:
            yield name, summarized(total, record.element_count)
            total[:] = 0
    for name in container.keys():
        info = container.info(name)
        if info.encoding == "verbatim":
            counted = has_exponents(info.encoding, info.dtype, info.elements)
            for chunk in container.verbatim_blocks(name):
                if counted:
                    total += count_exponents(chunk.view(np.uint16), BF16)
                progress(len(chunk))
            if counted:
                yield name, summarized(total, info.elements)
                total[:] = 0


def check_installed() -> None:
    """Raise a MissingExtraError if manifests could not be read or written. Imports nothing: that takes memory."""
    if importlib.util.find_spec("pyarrow") is None:
        raise errors.missing_extra("pyarrow", "convert")
