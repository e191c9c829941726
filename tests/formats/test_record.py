"""Records and segments: every way to decode restores the weights, and damage only ever raises a Df11Error."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from df11.converter.encode import SegmentEncoder
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import errors, layout, reference
from df11.formats.record import Bytes, Place, Record, Segment, SegmentPlace, Weights, open_record
from tests.support import strategies
from tests.vectors import forge

ENCODER = SegmentEncoder()


def encode_segment(weights: Weights) -> bytes:
    out = np.empty(layout.raw_segment_size(len(weights)) + ENCODE_SLACK, np.uint8)
    return ENCODER.encode(weights, out, verify=True).data.tobytes()


def encode_record(weights: Weights, segment_elements: int) -> bytes:
    parts = [weights[first : first + segment_elements] for first in range(0, len(weights), segment_elements)]
    return forge.record([(encode_segment(part), part.tolist()) for part in parts], segment_elements)


def opened(record: bytes) -> Record:
    data = np.frombuffer(bytearray(record), np.uint8)

    def read(offset: int, out: Bytes) -> None:
        out[:] = data[offset : offset + len(out)]

    return open_record(read, len(record), Place("file", "tensor"))


def opened_segment(segment: bytes | Bytes, elements: int, decoded_checksum: int = 0) -> Segment:
    data = np.frombuffer(bytearray(segment), np.uint8) if isinstance(segment, bytes) else segment
    return Segment(data, SegmentPlace(0, len(data), elements, forge.xxh3(data.tobytes()), decoded_checksum, 0), Place())


@given(strategies.weights())
def test_round_trip(weights: Weights) -> None:
    record = encode_record(weights, layout.DEFAULT_SEGMENT_WEIGHTS)
    assert np.array_equal(opened(record).decode(), weights)
    assert reference.decode_record(record) == weights.tobytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["rare", "stepped", "skewed"]), st.integers(65536, 100000))
@settings(max_examples=10)
def test_round_trip_of_many_tiles(seed: int, flavour: str, size: int) -> None:
    weights = strategies.make(flavour, size, seed)
    record = encode_record(weights, layout.DEFAULT_SEGMENT_WEIGHTS)
    assert np.array_equal(opened(record).decode(), weights)
    assert reference.decode_record(record) == weights.tobytes()


@given(st.data(), strategies.weights(4 * 8192))
def test_a_range_is_a_slice(data: st.DataObject, weights: Weights) -> None:
    record = opened(encode_record(weights, layout.TILE_WEIGHTS * data.draw(st.integers(1, 2))))
    first = data.draw(st.integers(0, len(weights)))
    last = data.draw(st.integers(first, len(weights)))
    assert np.array_equal(record.decode(first, last), weights[first:last])


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4), (4, 4)])
def test_a_range_outside_is_refused(first: int, last: int) -> None:
    record = opened(forge.record([(forge.raw_segment([1, 2, 3]), [1, 2, 3])]))
    with pytest.raises(errors.UsageError, match="range of weights"):
        record.decode(first, last)


def test_only_the_segments_of_a_range_are_read() -> None:
    weights = strategies.make("gaussian", 5 * 8192, 0)
    record = encode_record(weights, 8192)
    places = opened(record).segments
    damaged = bytearray(record)
    for place in (places[0], places[3]):
        damaged[place.offset + 40] ^= 1
    intact = opened(bytes(damaged))
    assert np.array_equal(intact.decode(8192, 3 * 8192), weights[8192 : 3 * 8192])
    with pytest.raises(errors.ChecksumError) as caught:
        intact.decode(8192, 3 * 8192 + 1)
    assert caught.value.offset == places[3].offset


@given(st.data(), strategies.weights(9000))
def test_compare_finds_any_difference(data: st.DataObject, weights: Weights) -> None:
    segment = opened_segment(encode_segment(weights), len(weights), forge.xxh3(weights.tobytes()))
    segment.compare(weights)
    at = data.draw(st.integers(0, len(weights) - 1))
    other = weights.copy()
    other[at] ^= 1 << data.draw(st.integers(0, 15))
    with pytest.raises(
        errors.DifferenceError, match=f"tile {at // 8192}" if segment.coded else "decoded weights differ"
    ):
        segment.compare(other)


@given(
    strategies.codes(),
    st.sampled_from([2047, 2304, 4100, 8191, 8192, 8193, 8450]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 255),
)
def test_any_legal_code_decodes(lengths: dict[int, int], size: int, seed: int, pad: int) -> None:
    # What our encoder would not make: any code, exceptions that could have been coded, any padding. A complete code is
    # a distribution of pairs.
    rng = np.random.default_rng(seed)
    pairs = rng.choice(
        list(lengths), size // 2 + 1, p=None if len(lengths) == 1 else [2.0**-length for length in lengths.values()]
    )
    exponents = np.stack([pairs & 255, pairs >> 8], axis=1).reshape(-1)[:size]
    exponents[rng.integers(0, size, size=20)] = rng.integers(0, 256, size=20)
    weights = (exponents << 7 | rng.integers(0, 65536, size=size) & 0x807F).astype(np.uint16)
    try:
        segment = forge.coded_segment(weights.tolist(), lengths, pad=pad)
    except OverflowError:  # The lanes differ by more than one byte can say.
        segment = forge.coded_segment(weights.tolist(), lengths, pad=pad, lane_bytes=2)
    record = forge.record([(segment, weights.tolist())])
    assert reference.decode_record(record) == weights.tobytes()
    assert np.array_equal(opened(record).decode(), weights)


# Damage.


def read_all(record: bytes) -> bytes:
    return opened(record).decode().tobytes()


flips = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4)


def flipped(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for at, mask in changes:
        changed[at % len(changed)] ^= mask
    return bytes(changed)


@given(strategies.weights(9000), flips)
@settings(max_examples=100)
def test_flipped_bytes_are_found(weights: Weights, changes: list[tuple[int, int]]) -> None:
    record = encode_record(weights, 8192)
    damaged = flipped(record, changes)
    assume(damaged != record)
    with pytest.raises(errors.FormatError):  # Every byte of a record is covered by a checksum.
        read_all(damaged)


@given(strategies.weights(9000), flips)
@settings(max_examples=150)
@example(np.full(300, 0x3F80, np.uint16), [(80 + 24, 1)])
def test_flipped_bytes_under_right_checksums_are_found_or_harmless(
    weights: Weights, changes: list[tuple[int, int]]
) -> None:
    damaged = forge.resealed(flipped(encode_record(weights, 8192), changes))
    try:
        decoded = read_all(damaged)
    except errors.FormatError:
        return
    assert decoded == weights.tobytes()


@given(strategies.weights(3000), st.data())
def test_a_record_cut_short_is_refused(weights: Weights, data: st.DataObject) -> None:
    record = encode_record(weights, 8192)
    with pytest.raises(errors.FormatError):
        read_all(record[: data.draw(st.integers(0, len(record) - 1))])


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(errors.FormatError):
        read_all(data)
    with pytest.raises(errors.FormatError):
        read_all(b"DF11\x01\x01" + data)


class Guarded:
    """Memory with a forbidden page at its start or end: a kernel that leaves it is killed."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self.size = -(-size // page) * page
        self.memory = mmap.mmap(-1, self.size + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (start, start + page + self.size):
            assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0

    def hold(self, data: bytes, *, at_end: bool) -> Bytes:
        """The bytes of ``data`` as an array next to one of the guards."""
        whole = np.frombuffer(self.memory, np.uint8)[mmap.PAGESIZE : mmap.PAGESIZE + self.size]
        held = whole[self.size - len(data) :] if at_end else whole[: len(data)]
        held[:] = np.frombuffer(data, np.uint8)
        return held


@pytest.fixture(scope="module")
def guarded() -> Guarded:
    return Guarded(layout.raw_segment_size(9000))


@given(weights=strategies.weights(9000), changes=flips, at_end=st.booleans())
@settings(max_examples=150)
def test_damage_never_makes_the_decoder_read_elsewhere(
    guarded: Guarded, weights: Weights, changes: list[tuple[int, int]], at_end: bool
) -> None:
    segment = encode_segment(weights)
    damaged = guarded.hold(flipped(segment, changes), at_end=at_end)
    try:
        opened_segment(damaged, len(weights)).decode_range(0, len(weights), np.empty(len(weights), np.uint16))
    except errors.FormatError:
        return


@pytest.mark.parametrize("weights", [8192, 8192 + 256, 257])
def test_lanes_that_run_on_stay_in_the_segment(guarded: Guarded, weights: int) -> None:
    # All bits are ones, which are codes of 12 bits, and all lanes claim one bit per code: they would run on for 176
    # bytes.
    lengths = forge.staircase(range(13))
    codes = dict.fromkeys(lengths, "1")
    segment = forge.coded_segment([0] * weights, lengths, codes=codes, pad=0xFF)
    held = guarded.hold(segment, at_end=True)
    with pytest.raises(errors.LaneError):
        opened_segment(held, weights).decode_range(weights - 1, weights, np.empty(1, np.uint16))


def test_the_largest_lies_allocate_nothing() -> None:
    # 5 MB that claim to hold 2**40 weights.
    count = 1 << 16
    segment = forge.raw_segment([0] * 8)
    header = {
        "magic": layout.MAGIC,
        "version": 1,
        "dtype": 1,
        "reserved_0": 0,
        "element_count": count << 24,
        "record_size": 48 + (32 + 48) * count,
        "segment_count": count,
        "segment_elements": 1 << 24,
        "reserved_1": 0,
    }
    directory = b"".join(
        layout.DIRECTORY_ENTRY.pack(
            segment_offset=48 + 32 * count + 48 * place,
            segment_size=48,
            element_count=1 << 24,
            stored_checksum=forge.xxh3(segment),
            decoded_checksum=0,
        )
        for place in range(count)
    )
    with pytest.raises(errors.FormatError):
        read_all(forge.seal(header, directory) + segment * count)
