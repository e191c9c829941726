"""The kernels of one checkout, one call at a time: ``python kernels.py WEIGHTS``, with the checkout on PYTHONPATH.

WEIGHTS is a file of raw BF16. Each line on standard input names a kernel, "names" lists them; the answer is the seconds
of one run over all weights, in segments as the converter makes them, on one thread. Only encoding makes checksums, as it
does for the converter. Imports nothing of benchmarks and only what all versions of df11 have, so that it runs on any
checkout.
"""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from df11.converter.encode import SegmentEncoder
from df11.converter.plan import SEGMENT_WEIGHTS
from df11.formats import layout
from df11.formats.record import Place, Segment, SegmentPlace

REPEATS = 8
"""Runs that are timed together, as one takes a few milliseconds."""
SLACK = 1 << 14
"""More bytes than any version's encoder asks for beyond the largest segment."""


def kernels(weights: Any) -> dict[str, Callable[[], object]]:
    """Functions to time, by name. Raises SystemExit if a segment is not decoded to what was encoded."""
    try:
        native = import_module("df11.converter.native")  # as it was while the kernels were Numba's
    except ModuleNotFoundError:
        native = import_module("df11.converter.kernels")
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
    wide = (weights[:SEGMENT_WEIGHTS].astype(np.uint32) << 16) + np.uint32(1)  # not exact, so that all is rounded

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
            native.count_exponents(part)

    def cast() -> None:
        for part in parts:
            native.cast_f32(wide[: len(part)], out[: len(part)])

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
    """Answer line by line."""
    found = kernels(np.fromfile(sys.argv[1], np.uint16))
    for function in found.values():
        function()  # once, to touch memory and to compile what must be compiled
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
