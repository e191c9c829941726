"""The code of a unit in DFloat11's layout: canonical, within what its tables and its kernel can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from df11.formats.record import Bytes

EXPONENTS: Final = 240
"""Exponents from here on cannot be stored: in a table, they are pointers."""
LONGEST: Final = 16
"""Bits of the longest code, at first. That layout has room for 32, but longer ones save nothing that can be seen."""
SHORTEST: Final = 2
"""Bits. With one, a block of 512 threads could hold more weights than fit the 48 KiB of memory that its kernel gets."""
TABLES: Final = 17
ROW: Final = 256

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class UnitCode:
    """``lengths``: u8 [256], 0 for exponents that do not occur; ``codes``: u32 [256]; ``luts``: u8 [rows, 256]."""

    lengths: Bytes
    codes: npt.NDArray[np.uint32]
    luts: Bytes

    def size(self, counts: Counts) -> int:
        """Bytes of the codes of weights with these exponents."""
        return (int((counts * self.lengths).sum()) + 7) // 8


def choose_code(counts: Counts) -> UnitCode:
    """The code for exponents that occur so often, i64 [256]; none from 240 on may occur, and one must.

    Codes of 16 bits at most, or of fewer, until 16 tables besides the first suffice: for codes of 8 bits, none is
    needed.
    """
    used = np.flatnonzero(counts)
    assert len(used) and used[-1] < EXPONENTS
    for limit in range(LONGEST, 7, -1):
        lengths = np.zeros(ROW, np.uint8)
        lengths[used] = np.maximum(limited_lengths(counts[used], limit), SHORTEST)
        codes = _canonical(lengths)
        luts = _tables(lengths, codes)
        if len(luts) - 1 <= TABLES:
            break
    return UnitCode(lengths, codes, luts)


def limited_lengths(counts: Counts, limit: int) -> npt.NDArray[np.int64]:
    """Lengths of the best prefix code of at most ``limit`` bits for symbols that occur so often: i64, like ``counts``.

    Package-merge: Larmore and Hirschberg, A fast algorithm for optimal length-limited Huffman codes, 1990.
    """
    if len(counts) == 1:
        return np.ones(1, np.int64)
    single = [
        (int(count), place, row)
        for place, (count, row) in enumerate(zip(counts, np.eye(len(counts), dtype=np.int64), strict=True))
    ]
    level = sorted(single, key=lambda item: item[:2])
    for _ in range(limit - 1):
        packages = [
            (one[0] + other[0], len(counts) + place, one[2] + other[2])
            for place, (one, other) in enumerate(zip(level[::2], level[1::2], strict=False))
        ]
        level = sorted([*single, *packages], key=lambda item: item[:2])
    lengths: npt.NDArray[np.int64] = np.sum([item[2] for item in level[: 2 * len(counts) - 2]], axis=0)
    return lengths


def _canonical(lengths: Bytes) -> npt.NDArray[np.uint32]:
    # Codes in order of length, then exponent.
    codes = np.zeros(ROW, np.uint32)
    code = last = 0
    for length, exponent in sorted((int(lengths[one]), int(one)) for one in np.flatnonzero(lengths)):
        code <<= length - last
        codes[exponent], last = code, length
        code += 1
    return codes


def _tables(lengths: Bytes, codes: npt.NDArray[np.uint32]) -> Bytes:
    # A table for each whole number of bytes that a longer code begins with, those of fewer bytes first; then lengths.
    used = [int(one) for one in np.flatnonzero(lengths)]
    prefixes = {(0, 0)}
    for one in used:
        length, code = int(lengths[one]), int(codes[one])
        prefixes |= {(size, code >> (length - 8 * size)) for size in range(1, (length - 1) // 8 + 1)}
    rows = {prefix: row for row, prefix in enumerate(sorted(prefixes))}
    # What no code leads to gets an exponent that has one: the kernel decodes what is behind the end, too.
    luts = np.full((len(rows) + 1, ROW), used[0], np.uint8)
    luts[-1] = lengths
    if len(rows) > TABLES:
        return luts
    for one in used:
        length, code = int(lengths[one]), int(codes[one])
        size = (length - 1) // 8
        left = length - 8 * size
        first = (code & ((1 << left) - 1)) << (8 - left)
        luts[rows[size, code >> left], first : first + (1 << (8 - left))] = one
    for (size, prefix), row in rows.items():
        if size:
            luts[rows[size - 1, prefix >> 8], prefix & 255] = ROW - row
    return luts
