"""Compile every kernel into Numba's cache: ``python -m df11.converter.warm``."""

from __future__ import annotations

import numpy as np

from df11.converter import kernels
from df11.converter.encode import ENCODE_SLACK, SegmentEncoder
from df11.formats import layout
from df11.formats.record import Place, Segment, SegmentPlace


def main() -> None:
    """Encode and decode a little of everything."""
    weights = np.empty(2 * layout.TILE_WEIGHTS + 1, np.uint16)
    kernels.cast_f32(np.arange(len(weights), dtype=np.uint32) << np.uint32(11), weights)
    out = np.empty(layout.raw_segment_size(len(weights)) + ENCODE_SLACK, np.uint8)
    segment = SegmentEncoder().encode(weights, out, verify=True)
    place = SegmentPlace(0, len(segment.data), len(weights), segment.stored_checksum, segment.decoded_checksum, 0)
    Segment(segment.data, place, Place()).decode(weights)


if __name__ == "__main__":
    main()
