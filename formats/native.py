"""Call the decoding kernels."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from df11.formats.compiled import Library

OK: Final = 0
BAD_TILE: Final = 1
BAD_LANE: Final = 2
BAD_EXCEPTION: Final = 3
DIFFERENT: Final = 4
BAD_ALPHABET: Final = 5
BAD_LENGTH: Final = 6
INCOMPLETE_CODE: Final = 7

DECODE_SCRATCH: Final = 128 + 2048 + 2048
"""i64s: lane positions, one tile of pairs, one tile of weights to compare."""

_LIBRARY: Final = Library("df11.formats.kernels", "df11.formats.layout", "df11.formats.native")


def load() -> None:
    """Load the decoding kernels now rather than at their first call: loading takes memory that can be used for other things afterwards."""
    _LIBRARY.load()


def build_decode_table(section: npt.NDArray[np.uint8], alphabet_size: int, table: npt.NDArray[np.uint32]) -> int:
    """Expand a code table section into the decoding table u32[4096]; see :func:`df11.formats.kernels.build_decode_table`."""
    return _LIBRARY["build_decode_table"](section, alphabet_size, table, np.empty(26, np.int64))


def decode_tiles(
    segment: npt.NDArray[np.uint8],
    table: npt.NDArray[np.uint32],
    elements: int,
    header: dict[str, int],
    first: int,
    last: int,
    out: npt.NDArray[np.uint16],
    *,
    compare: bool,
) -> tuple[int, int]:
    """Decode the tiles ``first`` to ``last`` (exclusive) of a checked segment: (status, tile); see :func:`df11.formats.kernels.decode_tiles`."""
    scratch: npt.NDArray[Any] = np.empty(DECODE_SCRATCH, np.int64)
    result = _LIBRARY["decode_tiles"](
        segment,
        table,
        elements,
        header["lane_bytes"],
        header["tiles_offset"],
        header["lanes_offset"],
        header["sign_mantissa_offset"],
        header["stream_offset"],
        first,
        last,
        out,
        compare,
        scratch,
    )
    return result >> 32, result & 0xFFFFFFFF
