"""Encode one segment: count pairs, choose the code, write header, table, tiles and stream, and prove it by decoding.

Also whole records in memory, for weights that were never in a file as they are held.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from df11.converter.kernels import ENCODE_SLACK, LANE_OVERFLOW, Encoder, Sha256, any_bits, count_exponents
from df11.formats import errors, layout
from df11.formats.record import Bytes, Place, Segment, SegmentPlace, Weights, pack_front

_HEADER_SIZE: Final = layout.SEGMENT_HEADER.size
_threads: Final = threading.local()


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A finished segment. ``data`` is a view of the caller's buffer."""

    data: Bytes
    elements: int
    coded: bool
    stored_checksum: int
    decoded_checksum: int


class SegmentEncoder:
    """Encodes segments; holds about 2 MB of scratch memory. One thread at a time."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self.exponents: npt.NDArray[np.int64] = np.zeros(256, np.int64)
        """How often each exponent occurs in the segment encoded last."""

    def hash_weights(self, digest: Sha256, data: Bytes) -> None:
        """Append the bytes of the weights that will be encoded next to ``digest``.

        If the CPU has SHA instructions, this also counts their pairs.
        """
        digest.update_counting(data, self._encoder)

    def encode(self, weights: Weights, out: Bytes, kind: layout.Kind = layout.BF16, *, verify: bool) -> EncodedSegment:
        """Encode the bits of ``weights`` (1 to 2**24) into ``out``: u8, at least raw_segment_size + ENCODE_SLACK bytes.

        With ``verify``, the written bytes are decoded and compared. A DifferenceError then means a defect in df11 or
        in the machine's memory.
        """
        n = len(weights)
        size = (self._encode_coded(weights, kind, out) if n > 1 else 0) or _encode_raw(weights, kind, out)
        data = out[:size]
        coded = bool(data[0] != layout.ENCODING_RAW)
        self.exponents = self._encoder.exponents() if n > 1 else count_exponents(weights, kind)
        segment = EncodedSegment(data, n, coded, xxhash.xxh3_64_intdigest(data), xxhash.xxh3_64_intdigest(weights))
        if verify:
            place = SegmentPlace(0, size, n, segment.stored_checksum, segment.decoded_checksum, 0)
            try:
                Segment(data, place, Place(), kind, trusted=True).compare(weights)
            except errors.FormatError as error:
                raise errors.DifferenceError(str(error)) from None
        return segment

    def _encode_coded(self, weights: Weights, kind: layout.Kind, out: Bytes) -> int:
        # Returns the size, or 0 if coding does not save anything.
        n = len(weights)
        end = layout.raw_segment_size(n, kind) - layout.RECORD_ALIGNMENT
        code = self._encoder.build_code(weights, kind)
        left_out = _empty_planes(weights, kind)
        for lane_bytes in (1, 2):
            sections = layout.segment_sections(n, code.alphabet_size, lane_bytes, kind, left_out)
            if sections["stream_offset"] + code.bits // 8 + layout.STREAM_END > end:
                return 0  # Certainly too large; close cases are found while encoding.
            size, exceptions = self._encoder.encode_tiles(weights, kind, left_out, code, lane_bytes, sections, end, out)
            if size != LANE_OVERFLOW:
                break
        if size < 0:
            return 0
        header = layout.SEGMENT_HEADER.pack(
            encoding=layout.ENCODING_CODED + left_out,
            lane_bytes=lane_bytes,
            alphabet_size=code.alphabet_size,
            element_count=n,
            segment_size=size,
            exception_count=exceptions,
            **sections,
        )
        out[:_HEADER_SIZE] = np.frombuffer(header, np.uint8)
        table_end = _HEADER_SIZE + len(code.section)
        out[_HEADER_SIZE:table_end] = code.section
        out[table_end : sections["tiles_offset"]] = 0
        out[
            sections["tiles_offset"] + layout.TILE_DESCRIPTOR.size * layout.tile_count(n) : sections["lanes_offset"]
        ] = 0
        at = sections["sign_mantissa_offset"]
        for plane in kind.plane_sizes(n)[: len(kind.planes) - left_out]:
            out[at + plane : at + layout.align(plane)] = 0
            at += layout.align(plane)
        return int(size)


def _empty_planes(weights: Weights, kind: layout.Kind) -> int:
    # How many planes that may be left out are zero in all weights.
    used = any_bits(weights.view(np.uint8), kind) if kind.most_left_out else 0
    return next((n for n in range(kind.most_left_out) if used >> 8 * n & 0xFF), kind.most_left_out)


def _encode_raw(weights: Weights, kind: layout.Kind, out: Bytes) -> int:
    size = layout.raw_segment_size(len(weights), kind)
    header = layout.SEGMENT_HEADER.pack(
        encoding=layout.ENCODING_RAW,
        lane_bytes=0,
        alphabet_size=0,
        element_count=len(weights),
        tiles_offset=0,
        lanes_offset=0,
        sign_mantissa_offset=0,
        stream_offset=_HEADER_SIZE,
        segment_size=size,
        exception_count=0,
    )
    out[:_HEADER_SIZE] = np.frombuffer(header, np.uint8)
    end = _HEADER_SIZE + kind.bytes * len(weights)
    out[_HEADER_SIZE:end] = weights.view(np.uint8)
    out[end:size] = 0
    return size


def encode_records(tensors: Sequence[Weights], threads: Executor) -> list[Bytes]:
    """The records, u8, of some tensors, each u16 of 1 to 2**40 weights; ``threads`` work on segments of 2**21 weights.

    Every segment is decoded and compared; see :meth:`SegmentEncoder.encode`.
    """
    size = layout.DEFAULT_SEGMENT_WEIGHTS
    pending = [
        [threads.submit(_encode_segment, weights[first : first + size]) for first in range(0, len(weights), size)]
        for weights in tensors
    ]
    records = []
    for segments in pending:
        places, parts = zip(*(segment.result() for segment in segments), strict=True)
        records.append(np.frombuffer(b"".join([pack_front(places, size), *parts]), np.uint8))
    return records


def _encode_segment(weights: Weights) -> tuple[SegmentPlace, bytes]:
    if not hasattr(_threads, "encoder"):
        _threads.encoder = SegmentEncoder()
    out = np.empty(layout.raw_segment_size(len(weights)) + ENCODE_SLACK, np.uint8)
    segment = _threads.encoder.encode(weights, out, verify=True)
    place = SegmentPlace(0, len(segment.data), segment.elements, segment.stored_checksum, segment.decoded_checksum, 0)
    return place, segment.data.tobytes()
