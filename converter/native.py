"""Call the encoding kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from df11.formats.compiled import Library
from df11.formats.record import Bytes, Weights

OVERFLOW: Final = -1
NOT_SMALLER: Final = -2

CODE_SCRATCH: Final = 25408 + 7 * 4096
"""i64s: two grids of code lengths, small tables, package-merge of up to 4096 codes."""
ENCODE_SCRATCH: Final = 2336 + 1024
"""i64s: lane lengths, marked groups, one padded tile, its pairs."""

_LIBRARY: Final = Library("df11.converter.kernels", "df11.converter.native", "df11.formats.kernels", "df11.formats.layout", "df11.formats.native")


def load() -> None:
    """Load the encoding kernels; see :func:`df11.formats.native.load`."""
    _LIBRARY.load()


@dataclass(frozen=True, slots=True)
class Code:
    """The code of a segment. ``section``: code table section; ``bits``: of all codes and exceptions; ``filler``: a symbol."""

    alphabet_size: int
    section: Bytes
    bits: int
    filler: int


class Encoder:
    """The encoding kernels with their scratch memory, about 2 MB. One thread at a time."""

    def __init__(self) -> None:
        self._histogram = np.empty(2 * 65536, np.uint32)
        self._symbols = np.empty(4096, np.uint16)
        self._used = np.empty(65536, np.int64)
        self._counts = np.empty(65536, np.int64)
        self._section = np.empty(256 + 256 * 256 // 2, np.uint8)
        self._table = np.empty(65536, np.uint32)
        self._code_scratch = np.empty(CODE_SCRATCH, np.int64)
        self._scratch = np.empty(ENCODE_SCRATCH, np.int64)
        self._results = np.empty(4, np.int64)
        self.exponents = np.empty(256, np.int64)
        """How often each exponent occurs in the weights seen last."""

    def count_exponents(self, weights: Weights) -> None:
        """Count exponents, for weights that :meth:`build_code` does not see."""
        self.exponents[:] = count_exponents(weights)

    def build_code(self, weights: Weights) -> Code:
        """Count the pairs of ``weights`` (at least two) and choose their code, which :meth:`encode_tiles` then uses."""
        n = _LIBRARY["count_pairs"](weights, self._histogram, self._symbols, self._used, self._counts, self.exponents)
        used, counts = self._used[:n], self._counts[:n]
        order = np.argsort(-counts, kind="stable")
        last_exponent = -1
        if len(weights) % 2:
            last_exponent = int(weights[-1] >> 7) & 0xFF
            self.exponents[last_exponent] += 1
        _LIBRARY["build_code"](used, counts, order, last_exponent, self._section, self._table, self._code_scratch, self._results)
        alphabet_size, section_size, bits, filler = self._results.tolist()
        return Code(alphabet_size, self._section[:section_size], bits, filler)

    def encode_tiles(self, weights: Weights, code: Code, lane_bytes: int, sections: dict[str, int], end: int, out: Bytes) -> tuple[int, int]:
        """Encode the tiles into ``out``: (size of the segment, exceptions); see :func:`df11.converter.kernels.encode_tiles`."""
        _LIBRARY["encode_tiles"](
            weights,
            self._table,
            code.filler,
            lane_bytes,
            out,
            sections["tiles_offset"],
            sections["lanes_offset"],
            sections["sign_mantissa_offset"],
            sections["stream_offset"],
            end,
            self._scratch,
            self._results,
        )
        size, exceptions = self._results[:2].tolist()
        return size, exceptions


def count_exponents(weights: Weights) -> npt.NDArray[np.int64]:
    """How often each exponent occurs in up to 2**32 weights: i64 [256]."""
    counts = np.empty((4, 256), np.uint32)
    _LIBRARY["count_exponents"](weights, counts)
    total: npt.NDArray[np.int64] = counts.sum(axis=0, dtype=np.int64)
    return total


def cast_f32(source: npt.NDArray[np.uint32], out: Weights) -> bool:
    """Round F32 bits to BF16 bits as SPEC.md, section 3; returns whether every value is exact."""
    return bool(_LIBRARY["cast_f32"](source, out))
