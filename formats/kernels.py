"""Call the decoding kernels, written in C (``decode.c``), with types and documented results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from df11 import _kernels
from df11.formats.layout import ENCODING_CODED, Kind

if TYPE_CHECKING:
    from df11._kernels import Table as Table  # the table that codes decode with; it cannot be changed

OK: Final = _kernels.OK
BAD_TILE: Final = _kernels.BAD_TILE
BAD_LANE: Final = _kernels.BAD_LANE
BAD_EXCEPTION: Final = _kernels.BAD_EXCEPTION
DIFFERENT: Final = _kernels.DIFFERENT
BAD_ALPHABET: Final = _kernels.BAD_ALPHABET
BAD_LENGTH: Final = _kernels.BAD_LENGTH
INCOMPLETE_CODE: Final = _kernels.INCOMPLETE_CODE


def build_decode_table(section: npt.NDArray[np.uint8], alphabet_size: int, kind: Kind) -> Table | int:
    """Expand a code table section, u8 (SPEC.md, section 6). Returns the table, or a status for what is wrong."""
    return _kernels.build_decode_table(section, alphabet_size, kind.code)


def decode_tiles(
    segment: npt.NDArray[np.uint8],
    table: Table,
    kind: Kind,
    header: dict[str, int],
    first: int,
    last: int,
    weights: npt.NDArray[np.unsignedinteger[Any]],
    *,
    compare: bool,
) -> tuple[int, int]:
    """Decode the tiles ``first`` to ``last`` (exclusive) of a checked segment, or compare them with ``weights``.

    ``segment``: u8, all of it. ``weights``: those of these tiles, unsigned integers of the size of the kind's weights;
    written or, with ``compare``, only read.
    Returns (``OK`` or what is wrong, the tile where it was found). Raises ValueError for sizes and offsets that do not
    fit.
    """
    function = _kernels.compare_tiles if compare else _kernels.decode_tiles
    return function(
        segment,
        table,
        kind.code,
        header["encoding"] - ENCODING_CODED,
        header["element_count"],
        header["lane_bytes"],
        header["tiles_offset"],
        header["lanes_offset"],
        header["sign_mantissa_offset"],
        header["stream_offset"],
        first,
        last,
        weights,
    )
