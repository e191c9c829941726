"""The encoder: complete and optimal codes, bytes as specified, and no coding where it does not pay."""

from __future__ import annotations

import ctypes
import hashlib
import heapq
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from df11 import _kernels
from df11.converter import kernels
from df11.converter.encode import EncodedSegment, SegmentEncoder, encode_records
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import errors, layout
from df11.formats.kernels import BAD_ALPHABET, BAD_LENGTH, INCOMPLETE_CODE, OK, build_decode_table
from df11.formats.record import Place, Segment, Weights, open_record
from tests.support import records, strategies
from tests.vectors import forge

ENCODER = SegmentEncoder()


def encoded(weights: Weights, *, verify: bool = True) -> EncodedSegment:
    out = np.empty(layout.raw_segment_size(len(weights)) + ENCODE_SLACK, np.uint8)
    return ENCODER.encode(weights, out, verify=verify)


def lengths_of(section: bytes, size: int) -> dict[int, int]:
    """Code lengths by symbol, from a code table section."""
    alphabet, grid = section[:size], section[size:]
    lengths = {}
    for cell in range(size * size):
        if length := grid[cell // 2] >> 4 * (cell % 2) & 15:
            lengths[forge.symbol(alphabet[cell % size], alphabet[cell // size])] = length
    return lengths


def code_of(weights: Weights) -> dict[int, int]:
    """The code that the encoder chooses, even if it would not use it."""
    code = kernels.Encoder().build_code(weights, layout.BF16)
    return lengths_of(code.section.tobytes(), code.alphabet_size)


# The code.


@given(strategies.weights().filter(lambda weights: len(weights) > 1))
def test_the_code_is_complete_and_limited(weights: Weights) -> None:
    lengths = code_of(weights)
    symbols = {int(a) | int(b) << 8 for a, b in zip(weights[:-1:2] >> 7 & 0xFF, weights[1::2] >> 7 & 0xFF, strict=True)}
    assert lengths.keys() <= symbols
    assert max(lengths.values()) <= 12
    assert sum(2 ** (12 - length) for length in lengths.values()) == (4096 if len(lengths) > 1 else 2048)


def weights_with(counts: list[int]) -> Weights:
    """Weights whose pairs occur as often as ``counts`` says: pair i has the symbol 1000 + 7 i."""
    symbols = np.repeat(1000 + 7 * np.arange(len(counts)), counts)
    return (np.stack([symbols & 255, symbols >> 8], axis=1).reshape(-1) << 7).astype(np.uint16)


def cost(counts: list[int]) -> int:
    """Bits of all codes that the encoder chooses; every pair must have one."""
    lengths = code_of(weights_with(counts))
    assert len(lengths) == len(counts)
    return sum(count * lengths[1000 + 7 * i] for i, count in enumerate(counts))


def huffman(counts: list[int]) -> tuple[int, int]:
    """(bits of all codes, longest code) by Huffman's algorithm; ties make the shallower tree."""
    nodes = [(count, 0) for count in counts]
    heapq.heapify(nodes)
    bits = 0
    while len(nodes) > 1:
        (a, deep_a), (b, deep_b) = heapq.heappop(nodes), heapq.heappop(nodes)
        bits += a + b
        heapq.heappush(nodes, (a + b, 1 + max(deep_a, deep_b)))
    return bits, nodes[0][1]


def best(counts: list[int], limit: int) -> int:
    """Fewest bits of all codes of at most ``limit`` bits: tries every tree, level by level."""
    rising = sorted(counts, reverse=True)
    rest = [sum(rising[i:]) for i in range(len(rising) + 1)]

    @cache
    def below(depth: int, placed: int, nodes: int) -> float:
        # Of the `nodes` nodes at this depth, some become leaves, largest counts first; the others have two children.
        if placed == len(rising):
            return 0 if nodes == 0 else float("inf")
        if depth > limit or nodes == 0 or nodes > len(rising) - placed:
            return float("inf")
        return min(
            rest[placed + leaves] + below(depth + 1, placed + leaves, 2 * (nodes - leaves))
            for leaves in range(nodes + 1)
        )

    return int(rest[0] + below(1, 0, 2))


FIBONACCI = [1, 1]
while len(FIBONACCI) < 18:
    FIBONACCI.append(FIBONACCI[-2] + FIBONACCI[-1])


@given(st.lists(st.integers(1, 60), min_size=2, max_size=100))
def test_the_code_is_huffmans_where_that_is_short(counts: list[int]) -> None:
    bits, longest = huffman(counts)
    assert cost(counts) == bits if longest <= 12 else cost(counts) > bits


@given(st.lists(st.sampled_from(FIBONACCI), min_size=2, max_size=18))
@example(FIBONACCI)
@example(FIBONACCI[:14])
@example([1, 987, *6 * [2584]])
@settings(max_examples=30)
def test_no_code_within_the_limit_is_better(counts: list[int]) -> None:
    if len(code_of(weights_with(counts))) == len(counts):
        assert cost(counts) == best(counts, 12)
    else:  # A rare pair becomes an exception if that shortens the other codes.
        assert min(counts) == 1


def test_the_limit_makes_a_difference() -> None:
    bits, longest = huffman(FIBONACCI)
    assert longest == 17
    assert cost(FIBONACCI) == best(FIBONACCI, 12) > bits == best(FIBONACCI, 17)


def test_4096_codes_are_the_most() -> None:
    symbols = np.arange(5000)
    weights = (np.stack([symbols % 71, symbols // 71], axis=1).reshape(-1) << 7).astype(np.uint16)
    assert set(code_of(weights).values()) == {12}
    assert len(code_of(weights)) == 4096


# Its bytes.


@given(
    st.sampled_from(["gaussian", "skewed", "unequal_lanes", "two_exponents", "constant", "rare"]),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
@example("rare", 256, 1)
@example("rare", 256, 2)
def test_the_bytes_are_those_of_another_encoder(flavour: str, chunks: int, seed: int) -> None:
    # Given the code lengths, all else follows from the specification, if no chunk is cut short.
    weights = strategies.make(flavour, 256 * chunks, seed)
    segment = encoded(weights)
    if segment.coded:
        header = layout.SEGMENT_HEADER.unpack(segment.data)
        lengths = lengths_of(segment.data[32 : header["tiles_offset"]].tobytes(), header["alphabet_size"])
        assert forge.coded_segment(weights.tolist(), lengths, lane_bytes=header["lane_bytes"]) == segment.data.tobytes()
    else:
        assert forge.raw_segment(weights.tolist()) == segment.data.tobytes()


@given(strategies.weights())
def test_raw_segments_are_those_of_another_encoder(weights: Weights) -> None:
    segment = encoded(weights)
    assert segment.coded or forge.raw_segment(weights.tolist()) == segment.data.tobytes()
    assert segment.elements == len(weights)
    assert segment.stored_checksum == forge.xxh3(segment.data.tobytes())
    assert segment.decoded_checksum == forge.xxh3(weights.tobytes())
    assert len(segment.data) % 16 == 0


@given(
    st.sampled_from(["gaussian", "all_values", "random_bits", "special", "stepped"]),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_a_segment_is_coded_if_and_only_if_that_makes_it_smaller(flavour: str, chunks: int, seed: int) -> None:
    weights = strategies.make(flavour, 256 * chunks, seed)
    lengths = code_of(weights)
    try:
        coded = forge.coded_segment(weights.tolist(), lengths)
    except OverflowError:  # The lanes differ by more than one byte can express.
        coded = forge.coded_segment(weights.tolist(), lengths, lane_bytes=2)
    assert encoded(weights).coded == (len(coded) < layout.raw_segment_size(len(weights)))


@pytest.mark.parametrize("size", [1, 2, 3, 8191, 8192, 1 << 20])
def test_random_bits_grow_by_the_segment_header(size: int) -> None:
    # 32 bytes and padding: from 24 KB on, less than 0.1 %. The container then stores the tensor verbatim, which
    # tests/formats/test_container.py checks.
    segment = encoded(strategies.random_bits(np.random.default_rng(size), size))
    assert not segment.coded
    assert len(segment.data) == layout.raw_segment_size(size) <= 2 * size + 47


def test_weights_like_a_models_shrink_by_a_third() -> None:
    weights = strategies.gaussian(np.random.default_rng(0), 1 << 20)
    assert 0.6 < len(encoded(weights).data) / weights.nbytes < 0.68


def test_the_encoder_leaves_no_trace_in_the_next_segment() -> None:
    first, second = (strategies.make(flavour, 50_000, 3) for flavour in ("all_values", "rare"))
    alone = encoded(second).data.tobytes()
    for before in (first, second, strategies.make("random_bits", 8191, 0), strategies.make("constant", 3, 0)):
        encoded(before)
        assert encoded(second).data.tobytes() == alone
    assert SegmentEncoder().encode(second, np.full(200_000, 0xAA, np.uint8), verify=False).data.tobytes() == alone


@pytest.mark.parametrize("seed", range(6))
def test_rare_exponents_become_exceptions(seed: int) -> None:
    segment = encoded(strategies.make("rare", 60_001 + seed, seed))
    assert segment.coded
    assert layout.SEGMENT_HEADER.unpack(segment.data)["exception_count"] >= 8


@pytest.mark.parametrize("seed", range(6))
def test_lanes_that_differ_much_take_two_bytes(seed: int) -> None:
    segment = encoded(strategies.make("unequal_lanes", 8192, seed))
    assert layout.SEGMENT_HEADER.unpack(segment.data)["lane_bytes"] == 2
    assert layout.SEGMENT_HEADER.unpack(encoded(strategies.make("gaussian", 8192, seed)).data)["lane_bytes"] == 1


@pytest.mark.parametrize(("shorter", "lane_bytes"), [(1, 1), (0, 2)])
def test_one_byte_says_a_difference_of_255_bits_not_256(shorter: int, lane_bytes: int) -> None:
    # Codes of 1, 2, 3 and 3 bits. Lane 0 has 128 codes of 3 bits, except none or one of 2; the shortest lane has 128
    # of 1 bit.
    pairs = np.full((32, 32, 4), forge.symbol(120, 120))
    pairs[:, 0] = [forge.symbol(121, 120), forge.symbol(120, 121)] * 2
    pairs[:, 1:5, 0] = forge.symbol(121, 121)
    pairs[:shorter, 0, 0] = forge.symbol(121, 121)
    weights = (np.stack([pairs.reshape(-1) & 255, pairs.reshape(-1) >> 8], axis=1).reshape(-1) << 7).astype(np.uint16)
    assert sorted(code_of(weights).values()) == [1, 2, 3, 3]
    assert layout.SEGMENT_HEADER.unpack(encoded(weights).data)["lane_bytes"] == lane_bytes


@pytest.mark.parametrize("exponent", [0, 5, 120, 250])
def test_a_last_weight_without_a_partner_and_without_a_code(exponent: int) -> None:
    # Its exponent occurs nowhere else, or only second in pairs, or in pairs that have a code.
    weights = strategies.gaussian(np.random.default_rng(1), 50_001)
    weights[-1] = exponent << 7 | 5
    for other in (0, 1, 2):
        weights[1 : 2 * other : 2] = exponent << 7
        assert encoded(weights).coded


# Proof by decoding.


@pytest.mark.parametrize("at", [0.05, 0.5, 0.99])
def test_what_does_not_decode_is_noticed(monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    weights = strategies.gaussian(np.random.default_rng(2), 20_000)
    honest = kernels.Encoder.encode_tiles

    def broken(self: kernels.Encoder, *arguments: object) -> tuple[int, int]:
        size, exceptions = honest(self, *arguments)  # type: ignore[arg-type]
        out = arguments[-1]
        assert isinstance(out, np.ndarray)
        out[int(size * at)] ^= 1
        return size, exceptions

    monkeypatch.setattr(kernels.Encoder, "encode_tiles", broken)
    assert encoded(weights, verify=False).coded
    with pytest.raises(errors.DifferenceError):
        encoded(weights)


def test_memory_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = strategies.gaussian(np.random.default_rng(2), 20_000)
    honest = Segment.compare

    def compare(self: Segment, source: Weights) -> None:
        changed = source.copy()
        changed[12_345] ^= 0x8000
        honest(self, changed)

    monkeypatch.setattr(Segment, "compare", compare)
    with pytest.raises(errors.DifferenceError, match="tile 1"):
        encoded(weights)


# The decoding table.


POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def table_of(lengths: dict[int, int], edit: tuple[int, int] | None = None) -> tuple[int, npt.NDArray[np.uint32]]:
    size, section = forge.code_table(lengths)
    data = np.frombuffer(bytearray(section), np.uint8)
    if edit is not None:
        data[edit[0]] = edit[1]
    table = build_decode_table(data, size, layout.BF16)
    if isinstance(table, int):
        return table, np.empty(0, np.uint32)
    return OK, np.frombuffer(ctypes.string_at(POINTER(table, b"df11.table"), 4 * 4096), np.uint32)


@given(strategies.codes())
def test_the_decoding_table_has_every_window(lengths: dict[int, int]) -> None:
    status, table = table_of(lengths)
    assert status == OK
    codes = {code[::-1]: value for value, code in forge.canonical_codes(lengths).items()}
    if len(codes) == 1:
        codes = {bit: value for bit in "01" for value in codes.values()}
    for window in range(4096):
        entry = int(table[window])
        code = f"{window:012b}"[12 - (entry & 63) :]
        assert codes[code] == forge.symbol(entry >> 7 & 255, entry >> 23)


FOUR = forge.balanced([forge.symbol(a, b) for a in (1, 2) for b in (1, 2)])
SINGLE = {forge.symbol(9, 9): 1}


@pytest.mark.parametrize(
    ("lengths", "edit", "status"),
    [
        (FOUR, (1, 1), BAD_ALPHABET),
        (FOUR, (1, 0), BAD_ALPHABET),
        (FOUR, (2, 0x2D), BAD_LENGTH),
        (FOUR, (2, 0x2F), BAD_LENGTH),
        (FOUR, (2, 0x23), INCOMPLETE_CODE),
        (FOUR, (2, 0x21), INCOMPLETE_CODE),
        ({1: 1, 2: 2, 3: 3}, None, INCOMPLETE_CODE),
        (SINGLE, (1, 0x00), INCOMPLETE_CODE),
        (SINGLE, (1, 0x02), INCOMPLETE_CODE),
        (SINGLE, (1, 0x0C), INCOMPLETE_CODE),
        (SINGLE, (1, 0x0D), BAD_LENGTH),
        (SINGLE, (1, 0x11), BAD_LENGTH),
    ],
)
def test_a_bad_table_is_refused(lengths: dict[int, int], edit: tuple[int, int] | None, status: int) -> None:
    assert table_of(lengths, edit)[0] == status


# The cast. What torch 2.13 gives on x86-64 with AVX2: torch.full((256,), x).to(torch.bfloat16).

TORCH = [
    *[
        (0x00000000, 0x0000),
        (0x80000000, 0x8000),
        (0x00000001, 0x0000),
        (0x00007FFF, 0x0000),
        (0x00008000, 0x0000),
        (0x00008001, 0x0001),
    ],
    *[
        (0x00017FFF, 0x0001),
        (0x00018000, 0x0002),
        (0x007FFFFF, 0x0080),
        (0x00800000, 0x0080),
        (0x807F8000, 0x8080),
        (0x80008001, 0x8001),
    ],
    *[
        (0x3F800000, 0x3F80),
        (0x3F807FFF, 0x3F80),
        (0x3F808000, 0x3F80),
        (0x3F808001, 0x3F81),
        (0x3F817FFF, 0x3F81),
        (0x3F818000, 0x3F82),
    ],
    *[
        (0x3F818001, 0x3F82),
        (0x3FFF7FFF, 0x3FFF),
        (0x3FFF8000, 0x4000),
        (0xBF808000, 0xBF80),
        (0xBF818000, 0xBF82),
        (0x7F7F0000, 0x7F7F),
    ],
    *[
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7F8000, 0x7F80),
        (0x7F7FFFFF, 0x7F80),
        (0xFF7F7FFF, 0xFF7F),
        (0xFF7F8000, 0xFF80),
        (0xFF7FFFFF, 0xFF80),
    ],
    *[
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F800001, 0xFFFF),
        (0x7F80FFFF, 0xFFFF),
        (0x7F810000, 0xFFFF),
        (0x7FBFFFFF, 0xFFFF),
    ],
    *[
        (0x7FC00000, 0xFFFF),
        (0x7FFFFFFF, 0xFFFF),
        (0xFF800001, 0xFFFF),
        (0xFFC00000, 0xFFFF),
        (0xFFFF0000, 0xFFFF),
        (0xFFFFFFFF, 0xFFFF),
    ],
    *[(0x33800000, 0x3380), (0x477FE000, 0x4780), (0x12345678, 0x1234), (0xDEADBEEF, 0xDEAE)],
]


def cast(bits: list[int]) -> tuple[list[int], bool]:
    out = np.zeros(len(bits), np.uint16)
    exact = kernels.cast_f32(np.array(bits, np.uint32), out)
    return out.tolist(), exact


def test_the_cast_is_torchs() -> None:
    assert cast([bits for bits, _ in TORCH])[0] == [expected for _, expected in TORCH]


@pytest.mark.parametrize(("bits", "expected"), TORCH)
def test_a_value_is_exact_if_it_comes_back(bits: int, expected: int) -> None:
    for size, at in [(1, 0), (40, 0), (40, 39), (40, 17)]:
        values = [0x3F800000] * size
        values[at] = bits
        assert cast(values)[1] == (expected << 16 == bits)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_the_cast_rounds_to_nearest(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    found = np.array(cast(bits)[0], np.uint32)
    back = (found << 16).astype(np.uint32).view(np.float32)
    for value, near, code in zip(values.tolist(), back.tolist(), found.tolist(), strict=True):
        if value != value:
            assert code == 0xFFFF
        elif abs(near) != float("inf") and value:
            assert abs(near - value) <= abs(value) * 2**-8 or abs(value) < 2**-126


def test_no_weights_are_exact() -> None:
    assert cast([]) == ([], True)


# Records in memory.


@pytest.mark.parametrize("sizes", [[1], [3, 8193, 1], [layout.DEFAULT_SEGMENT_WEIGHTS + 1, 300]])
def test_records_in_memory_are_those_of_a_file(sizes: list[int]) -> None:
    tensors = [strategies.make("gaussian", size, seed) for seed, size in enumerate(sizes)]
    with ThreadPoolExecutor(2) as threads:
        made = encode_records(tensors, threads)
    for weights, data in zip(tensors, made, strict=True):
        assert data.tobytes() == records.encode(weights).tobytes()
        record = open_record(
            lambda at, out, data=data: out.__setitem__(slice(None), data[at : at + len(out)]), len(data), Place()
        )
        assert np.array_equal(record.decode(), weights)


def test_records_that_do_not_decode_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise errors.ChecksumError("decoded otherwise")

    monkeypatch.setattr(Segment, "compare", fail)
    with ThreadPoolExecutor(1) as threads, pytest.raises(errors.DifferenceError, match="decoded otherwise"):
        encode_records([strategies.make("gaussian", 100, 0)], threads)


# SHA-256, and counting along.


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_sha256_is_hashlibs(parts):
    ours, theirs = kernels.Sha256(), hashlib.sha256()
    for part in parts:
        ours.update(part)
        theirs.update(part)
        assert ours.hexdigest() == theirs.hexdigest()


@given(strategies.weights(), st.binary(max_size=130))
def test_what_is_counted_while_it_is_hashed_gives_the_same_code(weights, before):
    assume(len(weights) > 1)
    alone, along, digest = kernels.Encoder(), kernels.Encoder(), kernels.Sha256(before)
    digest.update_counting(weights.view(np.uint8), along)
    assert digest.hexdigest() == hashlib.sha256(before + weights.tobytes()).hexdigest()
    expected, code = alone.build_code(weights, layout.BF16), along.build_code(weights, layout.BF16)
    assert code.section.tobytes() == expected.section.tobytes()
    assert (code.bits, code.filler) == (expected.bits, expected.filler)
    assert np.array_equal(along.exponents(), alone.exponents())


@pytest.mark.skipif("sha" not in _kernels.INSTRUCTIONS, reason="nothing is counted along on this CPU")
def test_counts_of_other_weights_are_not_used():
    encoder, digest, weights = kernels.Encoder(), kernels.Sha256(), np.zeros(100, np.uint16)
    expected = encoder.build_code(weights[:50], layout.BF16).section.tobytes()
    digest.update_counting(weights.view(np.uint8) + 1, encoder)
    with pytest.raises(ValueError, match="other weights"):
        encoder.build_code(weights[:50], layout.BF16)
    assert encoder.build_code(weights[:50], layout.BF16).section.tobytes() == expected  # The counts are dropped.
    for _ in range(2):  # An abandoned segment: the next one counts again.
        digest.update_counting(weights.view(np.uint8), encoder)
    fresh = kernels.Encoder().build_code(weights, layout.BF16)
    assert encoder.build_code(weights, layout.BF16).section.tobytes() == fresh.section.tobytes()
