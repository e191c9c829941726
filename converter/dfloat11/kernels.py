"""Typed calls of the kernels for DFloat11's layout, which are in C (``kernels.c``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from df11 import _kernels
from df11.formats.record import Bytes, Weights

if TYPE_CHECKING:
    from df11._kernels import DFloat11Table as Table

SLACK: Final = _kernels.DFLOAT11_SLACK
"""Zero bytes that follow codes which are decoded."""
PROBLEMS: Final = {
    _kernels.DFLOAT11_BAD_TABLE: "luts: an entry points to a table that does not exist",
    _kernels.DFLOAT11_BAD_LENGTH: "luts: a code of more than 32 bits, or for an exponent from 240 on",
    _kernels.DFLOAT11_BAD_CODE: "encoded_exponent: bits that luts gives no code for",
    _kernels.DFLOAT11_BAD_GAP: "gaps: a thread's first code starts elsewhere",
    _kernels.DFLOAT11_BAD_POSITION: "output_positions: a block's codes are of another number of weights",
    _kernels.DFLOAT11_BAD_END: "encoded_exponent: the codes end before or behind the end of their bytes",
}
"""What a status means."""


def build_table(luts: Bytes) -> Table | int:
    """A table to decode with, from ``luts``, u8 [2 to 18, 256]; or a status for what is wrong."""
    return _kernels.dfloat11_table(luts, len(luts))


def decode_blocks(
    table: Table,
    codes: Bytes,
    bits: int,
    gaps: Bytes,
    positions: npt.NDArray[np.uint32],
    threads: int,
    sign_mantissa: Bytes,
    out: Weights,
    *,
    last: bool,
) -> tuple[int, int]:
    """Decode consecutive blocks of a unit: (0 or what is wrong, the block where it was found).

    ``codes``: u8, 8 bytes for each of the ``threads`` of each block, and ``SLACK``; ``bits``: of codes from here to the
    unit's end. ``gaps``: packed, of the threads of these blocks and, unless it is the ``last``, of the next block.
    ``positions``: of each block, and where the last one ends; they must rise by at most 64 * ``threads``.
    ``sign_mantissa`` and ``out``: of these weights.
    """
    return _kernels.dfloat11_decode(table, codes, bits, gaps, positions, threads, last, sign_mantissa, out)


class Stream:
    """Codes that are written one after the other, in words of 64 bits.

    ``lengths``: u8 [256], at most 32; 0 for exponents without a code. ``codes``: u32 [256]. ``threads``: of a block.
    """

    def __init__(self, lengths: Bytes, codes: npt.NDArray[np.uint32], threads: int) -> None:
        self._lengths, self._codes, self._threads = lengths, codes, threads
        self._state = np.zeros(4, np.uint64)

    def encode(self, weights: Weights) -> tuple[Bytes, Bytes, npt.NDArray[np.uint32]]:
        """Append the codes of ``weights``.

        Returns the bytes of all words that they complete; for each, the gap of the word after it, u8; and for each
        block that they complete, the index of the first weight behind it. Raises ValueError if a weight has no code.
        """
        words, blocks = self.words, self.words // self._threads
        out = np.empty(8 * (len(weights) // 2 + 1), np.uint8)
        gaps = np.empty(len(weights) // 2 + 1, np.uint8)
        positions = np.empty(len(gaps) // self._threads + 1, np.uint32)
        failed = _kernels.dfloat11_encode(
            weights, self._lengths, self._codes, self._state, self._threads, out, gaps, positions
        )
        if failed >= 0:
            raise ValueError(f"no code for exponent {failed}")
        more = self.words - words
        return out[: 8 * more], gaps[:more], positions[: self.words // self._threads - blocks]

    @property
    def words(self) -> int:
        """Complete words so far."""
        return int(self._state[2])

    def rest(self) -> Bytes:
        """The bytes of the last word, if it is not complete; the bits behind the last code are 0."""
        size = (int(self._state[1]) + 7) // 8
        return np.frombuffer(int(self._state[0]).to_bytes(8, "big")[:size], np.uint8)


def split(weights: Weights, out: Bytes) -> None:
    """The sign and mantissa of each weight: bit 7 the sign, bits 6 to 0 the mantissa."""
    _kernels.dfloat11_split(weights, out)
