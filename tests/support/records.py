"""Records made by the encoder: one or several segments, of any weights."""

from __future__ import annotations

import numpy as np

from df11.converter.encode import SegmentEncoder
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import layout
from df11.formats.record import Bytes, SegmentPlace, Weights, pack_front
from tests.support import strategies

_ENCODER = SegmentEncoder()


def encode(
    weights: Weights, segment_elements: int = layout.DEFAULT_SEGMENT_WEIGHTS, kind: layout.Kind = layout.BF16
) -> Bytes:
    """A record of some weights, u8. Unlike the converter's, its segments may have any size, and it may be large."""
    places: list[SegmentPlace] = []
    parts: list[bytes] = []
    for first in range(0, len(weights), segment_elements):
        part = weights[first : first + segment_elements]
        segment = _ENCODER.encode(
            part, np.empty(layout.raw_segment_size(len(part), kind) + ENCODE_SLACK, np.uint8), kind, verify=False
        )
        places.append(
            SegmentPlace(0, len(segment.data), len(part), segment.stored_checksum, segment.decoded_checksum, first)
        )
        parts.append(segment.data.tobytes())
    return np.frombuffer(pack_front(places, segment_elements, kind) + b"".join(parts), np.uint8)


def generate(seed: int, largest: int = 2 * 8192 + 1, kind: layout.Kind = layout.BF16) -> tuple[Weights, int, Bytes]:
    """Weights of a random flavour and size, often at boundaries; the segment size, often small; their record."""
    rng = np.random.default_rng(seed)
    size = int(
        rng.choice(strategies.BOUNDARY_SIZES)
        if rng.random() < 0.4
        else rng.integers(1, 1 + int(largest ** rng.uniform(0.3, 1)))
    )
    weights = strategies.as_kind(strategies.make(str(rng.choice(sorted(strategies.FLAVOURS))), size, seed), kind, seed)
    segment_elements = int(rng.choice([layout.TILE_WEIGHTS, 2 * layout.TILE_WEIGHTS, layout.DEFAULT_SEGMENT_WEIGHTS]))
    return weights, segment_elements, encode(weights, segment_elements, kind)
