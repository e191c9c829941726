"""The kernels for DFloat11's layout, called as they are: what they check, and that no bytes lead them astray."""

from __future__ import annotations

import numpy as np
import pytest

from df11.converter.dfloat11 import kernels
from df11.converter.dfloat11.codes import choose_code
from tests.support.dfloat11 import with_exponents
from tests.support.sources import gaussian

RNG = np.random.default_rng(11)
THREADS = 32


def encoded(weights: np.ndarray, pieces: int = 1):
    """What :func:`kernels.decode_blocks` takes, from the stream kernel; and the table."""
    counts = np.bincount(weights >> 7 & 0xFF, minlength=256)
    code = choose_code(counts)
    stream = kernels.Stream(code.lengths, code.codes, THREADS)
    codes, gaps, starts = zip(*(stream.encode(one) for one in np.array_split(weights, pieces)), strict=True)
    data = np.concatenate([*codes, stream.rest()])
    assert len(data) == code.size(counts)
    blocks = -(-len(data) // (8 * THREADS))
    gap = np.zeros(blocks * THREADS + 8, np.uint8)
    found = np.concatenate(gaps)[: len(gap) - 1]
    gap[1 : 1 + len(found)] = found
    packed = np.packbits(np.unpackbits(gap.reshape(-1, 1), axis=1)[:, 3:])
    positions = np.concatenate([np.zeros(1, np.uint32), *starts])[:blocks]
    positions = np.append(positions, np.uint32(len(weights)))
    padded = np.zeros(8 * THREADS * blocks + kernels.SLACK, np.uint8)
    padded[: len(data)] = data
    signs = np.empty(len(weights), np.uint8)
    kernels.split(weights, signs)
    table = kernels.build_table(code.luts)
    assert not isinstance(table, int)
    return table, padded, 8 * len(data), packed, positions, signs


@pytest.mark.parametrize("pieces", [1, 7, 400])
@pytest.mark.parametrize(
    "weights",
    [gaussian(9000, 1), with_exponents(RNG.integers(0, 240, 5000)), with_exponents([7] * 3000), with_exponents([200])],
    ids=len,
)
def test_what_is_encoded_decodes(weights, pieces):
    table, codes, bits, gaps, positions, signs = encoded(weights, pieces)
    out = np.empty(len(weights), np.uint16)
    assert kernels.decode_blocks(table, codes, bits, gaps, positions, THREADS, signs, out, last=True)[0] == 0
    assert np.array_equal(out, weights)
    blocks = len(positions) - 1
    for first in range(0, blocks - 1, 3):  # Any blocks but the last.
        each = 8 * THREADS
        part = codes[first * each : (first + 1) * each + kernels.SLACK]
        gap = gaps[5 * THREADS // 8 * first :]
        start, end = positions[first : first + 2]
        one = np.empty(end - start, np.uint16)
        status = kernels.decode_blocks(
            table, part, bits, gap, positions[first : first + 2], THREADS, signs[start:end], one, last=False
        )
        assert status == (0, 0)
        assert np.array_equal(one, weights[start:end])


def test_random_bytes_lead_nowhere():
    statuses = set()
    for _ in range(600):
        rows = int(RNG.integers(2, 19))
        luts = RNG.integers(0, 256, (rows, 256), np.uint8)
        luts[:-1][luts[:-1] >= 240] = RNG.choice([256 - row for row in range(1, max(rows - 1, 2))])
        luts[-1] = RNG.integers(0, RNG.choice([3, 9, 33]), 256)
        luts[-1, 240:] = 0
        if RNG.random() < 0.3:
            luts[:-1] = luts[:-1, :1]
        table = kernels.build_table(luts)
        if isinstance(table, int):
            statuses.add(table)
            continue
        blocks = int(RNG.integers(1, 4))
        codes = RNG.integers(0, 256, 8 * THREADS * blocks + kernels.SLACK, np.uint8)
        gaps = RNG.integers(0, 256, 5 * THREADS * blocks // 8 + 1, np.uint8) * np.uint8(RNG.random() < 0.5)
        positions = np.cumsum(RNG.integers(0, 64 * THREADS + 1, blocks + 1)).astype(np.uint32)
        count = int(positions[-1] - positions[0])
        out = np.empty(count, np.uint16)
        last = bool(RNG.random() < 0.5)
        bits = int(RNG.integers(0, 1 << 14))
        status, block = kernels.decode_blocks(
            table, codes, bits, gaps, positions, THREADS, np.zeros(count, np.uint8), out, last=last
        )
        assert 0 <= block < blocks
        statuses.add(status)
    assert len(statuses) > 2


def test_sizes_are_checked():
    table, codes, bits, gaps, positions, signs = encoded(gaussian(3000, 1))
    out = np.empty(3000, np.uint16)
    good = {"codes": codes, "gaps": gaps, "positions": positions, "sign_mantissa": signs, "out": out}
    for name, value in {
        "codes": codes[:-1],
        "gaps": gaps[:20],
        "positions": positions[:1],
        "sign_mantissa": signs[:-1],
        "out": out[:-1],
    }.items():
        with pytest.raises(ValueError, match=name):
            kernels.decode_blocks(table, bits=bits, threads=THREADS, last=True, **(good | {name: value}))
    for wrong in (positions[::-1].copy(), positions * np.uint32(40)):
        with pytest.raises(ValueError, match="positions"):
            kernels.decode_blocks(table, bits=bits, threads=THREADS, last=True, **(good | {"positions": wrong}))
    for threads in (0, 1025):
        with pytest.raises(ValueError, match="threads"):
            kernels.decode_blocks(table, bits=bits, threads=threads, last=True, **good)
    for rows in (1, 19):
        with pytest.raises(ValueError, match="luts"):
            kernels.build_table(np.zeros((rows, 256), np.uint8))


def test_codes_are_checked():
    lengths, codes = np.full(256, 8, np.uint8), np.arange(256, dtype=np.uint32)
    for wrong, other in ((np.full(256, 33, np.uint8), codes), (lengths, codes + np.uint32(1)), (lengths[:255], codes)):
        with pytest.raises(ValueError, match=r"codes|lengths"):
            kernels.Stream(wrong, other, THREADS).encode(gaussian(10, 1))
    lengths[120] = 0
    codes[120] = 0
    with pytest.raises(ValueError, match="no code for exponent 120"):
        kernels.Stream(lengths, codes, THREADS).encode(with_exponents([119, 120]))
