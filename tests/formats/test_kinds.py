"""Records of every dtype: all bit patterns come back, and the reference decoder agrees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from df11 import _kernels
from df11.converter.encode import EncodedSegment, SegmentEncoder
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import errors, layout, reference
from df11.formats.record import Place, Segment, SegmentPlace, Weights, weights_dtype
from tests.support import strategies
from tests.vectors import forge

ENCODER = SegmentEncoder()
KINDS = pytest.mark.parametrize("kind", layout.KINDS.values(), ids=lambda kind: kind.dtype)


def encoded(weights: Weights, kind: layout.Kind) -> EncodedSegment:
    out = np.full(layout.raw_segment_size(len(weights), kind) + ENCODE_SLACK, 0xA5, np.uint8)
    return ENCODER.encode(weights, out, kind, verify=True)


def opened(segment: EncodedSegment, kind: layout.Kind) -> Segment:
    checksums = segment.stored_checksum, segment.decoded_checksum
    return Segment(segment.data, SegmentPlace(0, len(segment.data), segment.elements, *checksums, 0), Place(), kind)


def round_trip(weights: Weights, kind: layout.Kind, *, slowly: bool = True) -> EncodedSegment:
    """Encode, decode with both decoders, whole and in part; whatever differs is found."""
    segment = encoded(weights, kind)
    found = opened(segment, kind)
    out = np.empty_like(weights)
    found.decode(out)
    assert out.tobytes() == weights.tobytes()
    if slowly:
        assert reference.decode_segment(segment.data.tobytes(), len(weights), kind) == weights.tobytes()
    first, last = len(weights) // 3, len(weights) - len(weights) // 5
    part = np.empty(last - first, weights.dtype)
    found.decode_range(first, last, part)
    assert part.tobytes() == weights[first:last].tobytes()
    changed = weights.copy()
    changed[len(weights) // 2] ^= weights.dtype.type(1 << len(weights) % (8 * kind.bytes))
    with pytest.raises(errors.DifferenceError):
        found.compare(changed)
    return segment


def of(values: object, kind: layout.Kind) -> Weights:
    return np.array(values, np.uint64).astype(weights_dtype(kind))


def with_exponents(exponents: object, others: object, kind: layout.Kind) -> Weights:
    """Weights with these exponents, and the bits of ``others`` beside them."""
    ones = (1 << kind.exponent_bits) - 1 << kind.mantissa_bits
    bits = np.array(others, np.uint64) & np.uint64(~ones & (1 << 8 * kind.bytes) - 1)
    return of(bits | np.array(exponents, np.uint64) << np.uint64(kind.mantissa_bits), kind)


@pytest.mark.parametrize("kind", [layout.BF16, layout.F16], ids=lambda kind: kind.dtype)
def test_all_values_of_16_bits(kind: layout.Kind) -> None:
    values = np.arange(65_536)
    round_trip(of(values, kind), kind, slowly=False)
    often = np.concatenate([np.zeros(3 * 65_536, np.int64), np.random.default_rng(0).permutation(values)])
    assert round_trip(of(often, kind), kind, slowly=False).coded


@pytest.mark.parametrize("kind", [layout.F8_E4M3, layout.F8_E5M2], ids=lambda kind: kind.dtype)
def test_all_values_of_8_bits_beside_each_other(kind: layout.Kind) -> None:
    pairs = np.arange(65_536)
    values = np.stack([pairs >> 8, pairs & 255], 1).ravel()
    round_trip(of(values, kind), kind, slowly=False)
    round_trip(of(np.tile(np.arange(256), 3), kind), kind)
    often = np.concatenate([np.zeros(5 * 131_072, np.int64), values])
    assert round_trip(of(often, kind), kind, slowly=False).coded


def test_special_values_of_f32() -> None:
    special = [
        *(0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000),  # zeros, subnormals, the smallest normal
        *(0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF),  # infinities, the largest
        *(0x7F800001, 0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFBFFFFF),  # NaN, quiet and signalling
    ]
    rng = np.random.default_rng(1)
    weights = with_exponents(np.full(40_000, 120), rng.integers(1 << 32, size=40_000, dtype=np.uint64), layout.F32)
    weights[rng.permutation(40_000)[: 20 * len(special)]] = np.array(special * 20, np.uint32)
    assert round_trip(weights, layout.F32).coded


@KINDS
@pytest.mark.parametrize("size", strategies.BOUNDARY_SIZES)
def test_sizes(kind: layout.Kind, size: int) -> None:
    for flavour in ("gaussian", "constant", "special"):
        round_trip(strategies.as_kind(strategies.make(flavour, size, size), kind, size), kind)


@settings(max_examples=60)
@given(weights=strategies.weights(), kind=st.sampled_from(list(layout.KINDS.values())), seed=st.integers(0, 99))
def test_any_weights_of_any_kind(weights: Weights, kind: layout.Kind, seed: int) -> None:
    round_trip(strategies.as_kind(weights, kind, seed), kind, slowly=len(weights) < 3000)


@KINDS
@pytest.mark.parametrize("size", [1 << 14, (1 << 16) + 1, 1 << 18])
def test_random_bits_hardly_grow(kind: layout.Kind, size: int) -> None:
    weights = of(np.random.default_rng(2).integers(1 << 8 * kind.bytes, size=size, dtype=np.uint64), kind)
    segment = round_trip(weights, kind, slowly=False)
    assert not segment.coded
    assert len(segment.data) <= weights.nbytes + 47


@KINDS
def test_exceptions(kind: layout.Kind) -> None:
    """Rare pairs become exceptions, whose bits come back from where they are listed and from the planes."""
    rng = np.random.default_rng(3)
    exponents = rng.choice([3, 4], 200_000)
    exponents[rng.permutation(200_000)[:5]] = (1 << kind.exponent_bits) - 1
    weights = with_exponents(exponents, rng.integers(1 << 63, size=200_000, dtype=np.uint64), kind)
    segment = round_trip(weights, kind, slowly=False)
    assert layout.SEGMENT_HEADER.unpack(segment.data.tobytes())["exception_count"] == 5


@pytest.mark.parametrize(
    ("kind", "zeros", "left_out"),
    [
        *((layout.F32, 8, 1), (layout.F32, 15, 1), (layout.F32, 16, 2), (layout.F32, 23, 2), (layout.F32, 7, 0)),
        *((layout.F16, 8, 1), (layout.F16, 10, 1), (layout.F16, 7, 0), (layout.F8_E5M2, 2, 0), (layout.F8_E4M3, 3, 0)),
    ],
)
def test_low_bytes_that_are_zero_are_left_out(kind: layout.Kind, zeros: int, left_out: int) -> None:
    rng = np.random.default_rng(4)
    for count in (5000, 8191, 20_001):
        others = rng.integers(1 << 63, size=count, dtype=np.uint64) >> np.uint64(zeros) << np.uint64(zeros)
        exponents = rng.choice([3, 4, 5, 31 % (1 << kind.exponent_bits)], count, p=[0.5, 0.3, 0.1999, 0.0001])
        weights = with_exponents(exponents, others, kind)
        weights[-1] |= weights.dtype.type(1 << zeros)
        segment = round_trip(weights, kind, slowly=count < 9000)
        assert segment.data[0] == 1 + left_out
        weights[count // 2] |= weights.dtype.type(1)
        assert round_trip(weights, kind, slowly=False).data[0] == (1 if zeros < 24 else 1 + left_out)


@KINDS
def test_a_forged_code_decodes_alike(kind: layout.Kind) -> None:
    """Any legal code, not only the encoder's: forge is a second encoder, written apart."""
    lengths = forge.staircase([forge.symbol(a, b) for a in (1, 2, 3) for b in (1, 2, 3)])
    rng = np.random.default_rng(5)
    exponents = rng.choice([1, 2, 3, 7], 9000, p=[0.6, 0.2, 0.199, 0.001])
    weights = with_exponents(exponents, rng.integers(1 << 63, size=9000, dtype=np.uint64), kind)
    data = forge.coded_segment(weights.tolist(), lengths, kind, lane_bytes=2, pad=0xFF)
    entry = SegmentPlace(0, len(data), 9000, forge.xxh3(data), forge.xxh3(weights.tobytes()), 0)
    out = np.empty_like(weights)
    Segment(np.frombuffer(data, np.uint8), entry, Place(), kind).decode(out)
    assert out.tobytes() == weights.tobytes() == reference.decode_segment(data, 9000, kind)


@KINDS
def test_weights_of_another_size_are_refused(kind: layout.Kind) -> None:
    other = np.zeros(100, np.uint64 if kind.bytes == 4 else np.uint32)
    with pytest.raises(ValueError, match="weights"):
        _kernels.build_code(_kernels.new_encoder(), other, kind.code)
    with pytest.raises(ValueError, match="weights"):
        _kernels.count_exponents(other, np.zeros(256, np.int64), kind.code)


@pytest.mark.parametrize("code", [0, 6, 255])
def test_a_kind_that_does_not_exist_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="kind"):
        _kernels.any_bits(np.zeros(4, np.uint8), code)
    with pytest.raises(ValueError, match="kind"):
        _kernels.build_decode_table(np.array([1, 1], np.uint8), 1, code)


@KINDS
def test_any_bits_of_any_weights(kind: layout.Kind) -> None:
    for count in (0, 1, 2, 3, 5, 1023, 4097):
        for place in {0, count // 2, count - 1} - {-1}:
            weights = np.zeros(count, weights_dtype(kind))
            if count:
                weights[place] = 1 << 8 * kind.bytes - 1
            found = _kernels.any_bits(weights.view(np.uint8), kind.code)
            assert found == (1 << 8 * kind.bytes - 1 if count else 0)
