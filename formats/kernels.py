"""Call the decoding kernels, which are C (``decode.c``): typed, and with the meaning of what they return."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from df11 import _kernels
from df11.formats import layout

OK: Final = _kernels.OK
BAD_TILE: Final = _kernels.BAD_TILE
BAD_LANE: Final = _kernels.BAD_LANE
BAD_EXCEPTION: Final = _kernels.BAD_EXCEPTION
DIFFERENT: Final = _kernels.DIFFERENT
BAD_ALPHABET: Final = _kernels.BAD_ALPHABET
BAD_LENGTH: Final = _kernels.BAD_LENGTH
INCOMPLETE_CODE: Final = _kernels.INCOMPLETE_CODE


def build_decode_table(section: npt.NDArray[np.uint8], alphabet_size: int, table: npt.NDArray[np.uint32]) -> int:
    """Expand a code table section (SPEC.md, section 6) into ``table``, u32 [4096]; returns ``OK`` or what is wrong.

    An entry is e1 << 23 | e0 << 7 | length, indexed by the next 12 bits of a lane.
    """
    return _kernels.build_decode_table(section, alphabet_size, table)


def decode_tiles(
    segment: npt.NDArray[np.uint8],
    table: npt.NDArray[np.uint32],
    elements: int,
    header: dict[str, int],
    first: int,
    last: int,
    weights: npt.NDArray[np.uint16],
    *,
    compare: bool,
) -> tuple[int, int]:
    """Decode the tiles ``first`` to ``last`` (exclusive) of a checked segment, or compare them with ``weights``.

    ``segment`` u8, the whole of it; ``table`` u32 [4096]; ``weights`` u16, those of these tiles: written, or with
    ``compare`` only read. Returns (``OK`` or what is wrong, the tile that has it).
    """
    function = _kernels.compare_tiles if compare else _kernels.decode_tiles
    sections = (header[name] for name in layout.SECTION_OFFSETS)
    return function(segment, table, elements, header["lane_bytes"], *sections, first, last, weights)
