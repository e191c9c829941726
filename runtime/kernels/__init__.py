"""The CUDA kernels, and what the host must know about them. ``decode.cu`` is compiled for the GPU on first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from df11.formats import errors, layout

SOURCE: Final = Path(__file__).with_name("decode.cu")

DECODE: Final = "df11_decode"
DECODE_SMALL: Final = "df11_decode_small"
GATHER_ROWS: Final = "df11_gather_rows"
THREADS: Final = {DECODE: 256, DECODE_SMALL: 128, GATHER_ROWS: 128}
"""Threads per block; each warp decodes one tile at a time."""
OLDEST_CAPABILITY: Final = (8, 0)

MOST_RANGES: Final = 64
"""Ranges per launch: they are passed by value, and kernel parameters are limited to 4 KB."""
RANGE: Final = np.dtype(
    [
        ("record", "<u8"),
        ("output", "<u8"),
        ("record_size", "<u8"),
        ("element_count", "<u8"),
        ("first", "<u8"),
        ("last", "<u8"),
        ("segment_elements", "<u4"),
        ("first_block", "<u4"),
    ]
)
"""``struct Range`` of decode.cu: weights first to last (exclusive) of a record, and two addresses."""
RANGES: Final = np.dtype([("range", RANGE, (MOST_RANGES,))])

DAMAGE: Final[dict[int, tuple[type[errors.Df11Error], str]]] = {
    1: (errors.SegmentHeaderError, "a segment with a wrong offset, encoding or section"),
    2: (errors.CodeTableError, "an incomplete code table"),
    4: (errors.TileError, "a tile with a wrong offset, lane lengths or exceptions"),
    8: (errors.LaneError, "a lane that does not end where its length says"),
    16: (errors.TileError, "an exception outside its tile"),
    32: (errors.UsageError, "a row index outside the matrix; the row was filled with NaN"),
}
"""Bits that the kernels set in the status word."""


@dataclass(frozen=True, slots=True)
class Range:
    """Weights ``first`` to ``last`` (exclusive) of a record in device memory, and where they go.

    ``record``, ``output``: addresses, of the record's first byte (a multiple of 16) and of the first weight written.
    Whoever makes a Range guarantees its sizes: ``record_size`` bytes can be read, ``last - first`` weights written, and
    ``last <= element_count``. ``owner``: what holds the record's memory, if the record stays there for longer than a
    call; a decoder may keep what it has learnt of the record for as long. ``kind``: what the record holds.
    """

    record: int
    record_size: int
    element_count: int
    segment_elements: int
    first: int
    last: int
    output: int
    owner: object = None
    kind: layout.Kind = layout.BF16


def nvrtc_options(kind: layout.Kind) -> tuple[str, ...]:
    """The options that compile the kernels for records of a kind."""
    return ("--std=c++17", f"-DDF11_KIND={kind.code}")


def blocks_of(part: Range, tiles_per_block: int) -> int:
    """Blocks of a launch for a range.

    Each segment that the range touches gets as many blocks as its first segment has groups of ``tiles_per_block``
    tiles.
    """
    if part.first >= part.last:
        return 0
    segments = (part.last - 1) // part.segment_elements - part.first // part.segment_elements + 1
    return segments * -(-layout.tile_count(min(part.segment_elements, part.element_count)) // tiles_per_block)


def tiles_per_block(kernel: str, tiles: int, multiprocessors: int) -> int:
    """Tiles per block for a launch over this many tiles.

    A block expands a code table, which costs about a quarter of the time in which its warps decode one tile each.
    Several tiles per warp therefore save work. But there should be a few blocks for each one that the GPU runs at once,
    so that the last ones do not run alone.
    """
    warps = THREADS[kernel] // layout.LANES
    places = 4 * multiprocessors * warps
    return warps * max(1, min(4, tiles // (4 * places)))


def pack(ranges: Sequence[Range], tiles: int) -> tuple[tuple[Any, ...], int]:
    """The first arguments of a decoding launch, and its number of blocks. ``tiles``: tiles per block."""
    table = np.zeros(1, RANGES)
    blocks = 0
    packed = 0
    for part in ranges:
        if part.first < part.last:
            table["range"][0, packed] = _fields(part, blocks)
            blocks += blocks_of(part, tiles)
            packed += 1
    return (table, np.uint32(packed), np.uint32(tiles)), blocks


def pack_one(part: Range) -> npt.NDArray[Any]:
    """The first argument of a gathering launch."""
    return np.array([_fields(part, 0)], RANGE)


def _fields(part: Range, first_block: int) -> tuple[int, ...]:
    return (
        part.record,
        part.output,
        part.record_size,
        part.element_count,
        part.first,
        part.last,
        part.segment_elements,
        first_block,
    )


def check_errors(status: int) -> None:
    """Raise the error for a status word written by a kernel; 0 means none."""
    found = [entry for bit, entry in DAMAGE.items() if status & bit]
    if found:
        raise found[0][0](
            f"decoding on the GPU found {'; '.join(what for _, what in found)}", hint="check the file: df11 verify FILE"
        )
