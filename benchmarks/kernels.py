"""The CPU kernels of one checkout, one call at a time: ``python kernels.py WEIGHTS``, with the checkout on PYTHONPATH.

WEIGHTS is a file of raw BF16. Each line on standard input names a kernel; "names" lists them. The answer is the seconds
of one run over all weights, in the converter's segments, on one thread. Only encoding computes checksums, as it does in
the converter. This imports nothing of the benchmarks and uses no recent part of df11, so that it runs on other
checkouts.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from df11.converter import kernels
from df11.converter.batches import SEGMENT_WEIGHTS
from df11.converter.encode import SegmentEncoder
from df11.formats import layout
from df11.formats.record import Place, Segment, SegmentPlace

REPEATS = 8
"""Runs that are timed together, as one takes only milliseconds."""
SLACK = 1 << 14
"""More bytes than the encoder of any version needs beyond the largest segment."""


def kernel_calls(weights: Any) -> dict[str, Callable[[], object]]:
    """Functions to time, by name. Raises SystemExit if decoding does not restore a segment."""
    parts = [weights[start : start + SEGMENT_WEIGHTS] for start in range(0, len(weights), SEGMENT_WEIGHTS)]
    sizes = [layout.raw_segment_size(len(part)) + SLACK for part in parts]
    targets, stored = ([np.zeros(size, np.uint8) for size in sizes] for _ in range(2))
    encoder = SegmentEncoder()
    coded = []
    for part, target in zip(parts, stored, strict=True):
        segment = encoder.encode(part, target, verify=True)
        checksums = segment.stored_checksum, segment.decoded_checksum
        place = SegmentPlace(0, len(segment.data), segment.elements, *checksums, 0)
        coded.append((segment.data, place))
    out = np.zeros(SEGMENT_WEIGHTS, np.uint16)
    # not exact, so that everything is rounded
    wide = (weights[:SEGMENT_WEIGHTS].astype(np.uint32) << 16) + np.uint32(1)

    def encode(*, verify: bool) -> None:
        for part, target in zip(parts, targets, strict=True):
            encoder.encode(part, target, verify=verify)

    def decode() -> None:
        for data, place in coded:
            Segment(data, place, Place(), trusted=True).decode(out[: place.elements])

    def compare() -> None:
        for part, (data, place) in zip(parts, coded, strict=True):
            Segment(data, place, Place(), trusted=True).compare(part)

    def count() -> None:
        for part in parts:
            kernels.count_exponents(part)

    def cast() -> None:
        for part in parts:
            kernels.cast_f32(wide[: len(part)], out[: len(part)])

    compare()
    decode()
    if not np.array_equal(out[: len(parts[-1])], parts[-1]):
        raise SystemExit("df11 does not restore the segment")
    return {
        "encode": lambda: encode(verify=False),
        "encode, verified": lambda: encode(verify=True),
        "decode": decode,
        "compare": compare,
        "count exponents": count,
        "cast from F32": cast,
    }


def main() -> None:
    """Answer the lines on standard input."""
    found = kernel_calls(np.fromfile(sys.argv[1], np.uint16))
    for function in found.values():
        function()  # once, to touch memory
    for line in sys.stdin:
        if line.strip() == "names":
            print("|".join(found), flush=True)
        else:
            start = time.perf_counter()
            for _ in range(REPEATS):
                found[line.strip()]()
            print((time.perf_counter() - start) / REPEATS, flush=True)


if __name__ == "__main__":
    main()
