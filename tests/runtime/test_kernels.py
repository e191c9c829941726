"""The CUDA source itself, on the CPU, under sanitizers, with threads in random order: the reference decoder's bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from df11.formats import errors, layout, reference
from df11.formats.container import Container
from df11.formats.record import Bytes, Weights
from df11.runtime import kernels
from df11.runtime.cpu import Cpu
from df11.runtime.kernels import DECODE, DECODE_SMALL, GATHER_ROWS, Range
from tests.support import records, strategies
from tests.support.cuda import cases
from tests.support.cuda.cases import Outcome, Part
from tests.support.cuda.emulator import Case
from tests.vectors.generate import FOLDER

SOURCE = kernels.SOURCE.read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("kernel", [DECODE, DECODE_SMALL])
BATCHES, BATCH = 10, 1000


def constant(name: str) -> int:
    found = re.search(rf"constexpr u32 {name} = (.*?);", SOURCE)
    assert found, name
    return int(
        eval(found[1], {n: constant(n) for n in re.findall(r"\b[A-Z][A-Z_]+\b", found[1])})
    )  # arithmetic with other constants


def whole(record: Bytes, weights: Weights, segment_elements: int) -> Part:
    return Part(record, len(weights), segment_elements, 0, len(weights))


def assert_decoded(outcome: Outcome, *expected: Weights) -> None:
    for found, weights in zip(outcome.weights, expected, strict=True):
        np.testing.assert_array_equal(found, weights)
    assert outcome.status == 0


def golden_records() -> Iterator[tuple[str, Bytes, Weights, int]]:
    for path in sorted((FOLDER / "golden").glob("*.df11")):
        with Container(path) as container:
            for name in container.keys():
                info = container.info(name)
                if info.encoding == "df11" and info.dtype == "BF16":
                    record = container.record(name)
                    yield (
                        f"{path.stem}/{name}",
                        record.read_whole(),
                        container.tensor(name).reshape(-1),
                        record.segment_elements,
                    )


# What the host and the device must agree on.


def test_constants_are_those_of_the_format() -> None:
    assert (constant("LANES"), constant("TILE_WEIGHTS"), constant("CODE_LIMIT")) == (
        layout.LANES,
        layout.TILE_WEIGHTS,
        layout.CODE_LIMIT,
    )
    assert (constant("CHUNK_WEIGHTS"), constant("STREAM_END")) == (layout.CHUNK_WEIGHTS, layout.STREAM_END)
    sizes = (layout.RECORD_HEADER.size, layout.DIRECTORY_ENTRY.size, layout.SEGMENT_HEADER.size)
    assert (
        constant("RECORD_HEADER_BYTES"),
        constant("DIRECTORY_ENTRY_BYTES"),
        constant("SEGMENT_HEADER_BYTES"),
    ) == sizes
    assert constant("MOST_RANGES") == kernels.MOST_RANGES
    assert {
        DECODE: constant("WIDE_THREADS"),
        DECODE_SMALL: constant("SMALL_THREADS"),
        GATHER_ROWS: constant("SMALL_THREADS"),
    } == kernels.THREADS
    assert kernels.DAMAGE.keys() == {int(value) for value in re.findall(r"constexpr u32 BAD_\w+ = (\d+);", SOURCE)}
    assert set(kernels.THREADS) == set(re.findall(r"\n    (df11_\w+)\(", SOURCE))


def test_a_stage_holds_what_can_be_read_from_it() -> None:
    # The furthest window: that of the last chunk of a lane that starts at the end of the codes, after codes of 12 bits
    # only.
    furthest = constant("STAGE_FRONT") + constant("STAGE_TILE") + (constant("TILE_CHUNKS") - 1) * 4 * 12 // 8 + 12
    assert furthest <= constant("STAGE_BYTES")
    assert constant("STAGE_BYTES") % 16 == constant("STAGE_TILE") % 16 == constant("STAGE_FRONT") % 16 == 0
    assert kernels.RANGES.itemsize + 16 <= 4096  # bytes of parameters


# The same bytes.


@BOTH
def test_golden_vectors(kernel: str) -> None:
    vectors = list(golden_records())
    assert len(vectors) > 30
    launches = [
        cases.decode_case([whole(record, weights, s)], kernel=kernel, seed=i)
        for i, (_, record, weights, s) in enumerate(vectors)
    ]
    for (name, _, weights, _), outcome in zip(vectors, cases.run(launches), strict=True):
        assert outcome.status == 0, name
        np.testing.assert_array_equal(outcome.weights[0], weights, name)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_generated_records(batch: int) -> None:
    # Ten thousand in total: the reference decoder, the CPU decoder, and the CUDA source give the same bytes.
    made = [records.generate(seed) for seed in range(batch * BATCH, (batch + 1) * BATCH)]
    launches: list[Case] = []
    for i, (weights, segment_elements, record) in enumerate(made):
        assert reference.decode_record(record.tobytes()) == weights.tobytes()
        out = np.zeros_like(weights)
        aligned = np.zeros(len(record) + 16, np.uint8)
        aligned = aligned[-aligned.ctypes.data % 16 :][: len(record)]
        aligned[:] = record
        Cpu().decode(
            [Range(aligned.ctypes.data, len(record), len(weights), segment_elements, 0, len(weights), out.ctypes.data)]
        )
        np.testing.assert_array_equal(out, weights)
        part = whole(record, weights, segment_elements)
        launches.append(cases.decode_case([part], kernel=(DECODE, DECODE_SMALL)[i % 2], tiles=8 + 8 * (i % 3), seed=i))
    for (weights, _, _), outcome in zip(made, cases.run(launches), strict=True):
        assert_decoded(outcome, weights)


@BOTH
def test_tiles_too_large_for_the_stage(kernel: str) -> None:
    weights = (
        strategies.make("random_bits", 3 * 8192, 1) & 0x87FF | 0x3000
    )  # 16 exponents, equally frequent: 4 bits each
    record = records.encode(weights)
    stream = layout.SEGMENT_HEADER.unpack(record[80:112].tobytes())
    assert (stream["segment_size"] - stream["stream_offset"]) / 3 > constant("STAGE_TILE")
    assert_decoded(cases.run([cases.decode_case([whole(record, weights, 1 << 21)], kernel=kernel)])[0], weights)


@BOTH
def test_several_tiles_a_warp(kernel: str) -> None:
    # The stage is reused and the table kept; tiles that fit the stage beside some that do not.
    weights = strategies.make("gaussian", 41 * 8192 + 5, 2)
    weights[8192 * 9 : 8192 * 12] = strategies.make("random_bits", 3 * 8192, 1) & 0x87FF | 0x3000
    record = records.encode(weights)
    launches = [
        cases.decode_case([whole(record, weights, 1 << 21)], kernel=kernel, tiles=tiles, seed=seed)
        for tiles in (32, 41, 64)
        for seed in range(4)
    ]
    for outcome in cases.run(launches):
        assert_decoded(outcome, weights)


@BOTH
def test_many_records_in_one_launch(kernel: str) -> None:
    made = [records.generate(seed, 9000) for seed in range(kernels.MOST_RANGES)]
    for count in (2, 3, 33, 63, 64):
        parts = [whole(record, weights, s) for weights, s, record in made[:count]]
        assert_decoded(
            cases.run([cases.decode_case(parts, kernel=kernel, seed=count)])[0],
            *(weights for weights, _, _ in made[:count]),
        )


@BOTH
def test_ranges(kernel: str) -> None:
    # Any weights of a record, to any address: the bytes before and after must not change (the sanitizers check, and the
    # front of the output).
    rng = np.random.default_rng(5)
    launches, expected = [], []
    for seed in range(300):
        weights, segment_elements, record = records.generate(seed, 5 * 8192)
        cuts = rng.integers(0, len(weights) + 1, 2) // int(rng.choice([1, 8]))
        first, last = sorted((int(cuts[0]), int(cuts[1])))
        last = max(last, first + 1)
        misalign = int(rng.choice([0, 0, 1, 3, 8]))
        if last <= len(weights):
            part = Part(record, len(weights), segment_elements, first, last, misalign)
            launches.append(cases.decode_case([part], kernel=kernel, tiles=int(rng.choice([1, 3, 8])), seed=seed))
            expected.append(np.concatenate([np.full(misalign, cases.UNWRITTEN, np.uint16), weights[first:last]]))
    assert len(launches) > 250
    for outcome, weights in zip(cases.run(launches), expected, strict=True):
        assert_decoded(outcome, weights)


def test_rows() -> None:
    rng = np.random.default_rng(6)
    launches, expected = [], []
    for seed in range(200):
        rows, columns = int(rng.integers(1, 40)), int(rng.choice([1, 3, 8, 320, 2520]))
        weights = strategies.make(
            str(rng.choice(["gaussian", "rare", "random_bits", "unequal_lanes"])), rows * columns, seed
        )
        segment_elements = int(rng.choice([8192, 3 * 8192, 1 << 21]))
        ids = rng.integers(0, rows, int(rng.integers(1, 9)))
        part = whole(records.encode(weights, segment_elements), weights, segment_elements)
        launches.append(cases.gather_case(part, columns, rows, ids, seed=seed))
        expected.append(weights.reshape(rows, columns)[ids].reshape(-1))
    for outcome, weights in zip(cases.run(launches), expected, strict=True):
        assert_decoded(outcome, weights)


def test_a_row_that_does_not_exist_becomes_nan() -> None:
    weights = strategies.make("gaussian", 30, 0)
    ids = np.array([2, 3, -1, 1 << 40, 0])
    [outcome] = cases.run([cases.gather_case(whole(records.encode(weights), weights, 1 << 21), 10, 3, ids)])
    rows = outcome.weights[0].reshape(5, 10)
    np.testing.assert_array_equal(rows[[0, 4]], weights.reshape(3, 10)[[2, 0]])
    assert (rows[1:4] == 0xFFFF).all()
    assert outcome.status == 32


# Damage: never a crash, a hang, or an access to other bytes.


def damaged(seed: int) -> tuple[Weights, int, Bytes]:
    """A record with some wrong bytes after the fixed part of its header, more often where sizes and tables are."""
    rng = np.random.default_rng(seed)
    weights, segment_elements, record = records.generate(seed, 3 * 8192)
    bad = record.copy()
    stop = len(record) if rng.random() < 0.5 else min(len(record), 400)
    for place in rng.integers(layout.RECORD_HEADER.size, stop, int(rng.choice([1, 1, 2, 8]))):
        bad[place] = rng.choice([0, 255, rng.integers(256), int(bad[place]) ^ 1 << int(rng.integers(8))])
    if rng.random() < 0.1:
        bad[layout.RECORD_HEADER.size :] = rng.integers(0, 256, len(record) - layout.RECORD_HEADER.size)
    return weights, segment_elements, bad


@pytest.mark.parametrize("batch", range(4))
def test_damaged_records(batch: int) -> None:
    made = [damaged(seed) for seed in range(10**6 + batch * BATCH, 10**6 + (batch + 1) * BATCH)]
    launches = [
        cases.decode_case([whole(record, weights, s)], kernel=(DECODE, DECODE_SMALL)[i % 2], seed=i)
        for i, (weights, s, record) in enumerate(made)
    ]
    noticed = wrong = 0
    for (weights, _, _), outcome in zip(made, cases.run(launches), strict=True):
        same = np.array_equal(outcome.weights[0], weights)
        noticed += outcome.status != 0
        wrong += not same
        if not same:  # The checksum of the decoded weights tells, even where the kernel could not.
            assert xxhash.xxh3_64_intdigest(outcome.weights[0]) != xxhash.xxh3_64_intdigest(weights)
    assert wrong > BATCH // 4
    assert noticed > BATCH // 4


@BOTH
def test_a_directory_that_is_not_there(kernel: str) -> None:
    parts = [Part(np.full(size, 255, np.uint8), 5 * 8192, 8192, 0, 5 * 8192) for size in (48, 80, 96, 48 + 32 * 5)]
    for outcome in cases.run([cases.decode_case([part], kernel=kernel) for part in parts]):
        assert outcome.status == 1
        assert (outcome.weights[0] == 0xFFFF).all()


@BOTH
def test_code_tables_of_any_bytes(kernel: str) -> None:
    # The largest possible alphabet: its grid can claim 65,536 codes, of any length.
    [(_, original, weights, segment_elements)] = [
        found for found in golden_records() if found[0].startswith("largest_alphabet/")
    ]
    header = layout.SEGMENT_HEADER.unpack(original[80:112].tobytes())
    assert header["alphabet_size"] == 256
    grid = slice(80 + 32 + 256, 80 + header["tiles_offset"])
    launches = []
    for seed, cells in enumerate([*(0x11 * length for length in range(16)), 0x1C, 0xC1, 0x2B, None]):
        record = original.copy()
        record[grid] = np.random.default_rng(seed).integers(0, 256, grid.stop - grid.start) if cells is None else cells
        launches.append(cases.decode_case([whole(record, weights, segment_elements)], kernel=kernel, seed=seed))
    assert all(outcome.status & 2 for outcome in cases.run(launches))


def test_damaged_rows() -> None:
    launches = []
    for seed in range(500):
        weights, segment_elements, record = damaged(2 * 10**6 + seed)
        ids = np.array([0, len(weights) - 1, len(weights) // 2])
        launches.append(cases.gather_case(whole(record, weights, segment_elements), 1, len(weights), ids, seed=seed))
    assert any(outcome.status for outcome in cases.run(launches))


def test_every_weight_is_written_whatever_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [damaged(3 * 10**6 + seed) for seed in range(300)]
    runs = []
    for unwritten in (0x5A5A, 0xA5A5):
        monkeypatch.setattr(cases, "UNWRITTEN", unwritten)
        runs.append(
            cases.run(
                [cases.decode_case([whole(record, weights, s)], seed=i) for i, (weights, s, record) in enumerate(made)]
            )
        )
    for one, other in zip(*runs, strict=True):
        assert not ((one.weights[0] == 0x5A5A) & (other.weights[0] == 0xA5A5)).any()


def test_files_that_must_fail() -> None:
    # Those that a GPU would see: the header of the file is valid, and a record is not.
    launches = []
    for path in sorted(Path(FOLDER / "must_fail").glob("*.df11")):
        try:
            with Container(path) as container:
                for name in container.keys():
                    begin, end = container.span(name)
                    elements = container.info(name).elements
                    if container.info(name).encoding == "df11" and elements and end > begin:
                        record = np.empty(end - begin, np.uint8)
                        container.read(begin, record)
                        launches += [
                            cases.decode_case([Part(record, elements, 1 << 21, 0, elements)], kernel=k)
                            for k in (DECODE, DECODE_SMALL)
                        ]
        except errors.Df11Error:
            continue
    assert len(launches) > 60
    assert sum(outcome.status != 0 for outcome in cases.run(launches)) > 20


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("offset", 1),
        ("encoding", 1),
        ("lane_bytes", 1),
        ("alphabet_size", 1),
        ("code", 2),
        ("position", 4),
        ("exceptions", 4),
        ("lane", 8),
        ("exception", 16),
    ],
)
@BOTH
def test_what_is_noticed(what: str, status: int, kernel: str) -> None:
    # Pairs too rare for a code, so that there are exceptions; one segment.
    weights = strategies.make("rare", 60_000, 3)
    record = records.encode(weights).copy()
    header = layout.SEGMENT_HEADER.unpack(record[80:112].tobytes())
    assert header["encoding"] == 1
    assert header["exception_count"]
    tiles, lanes = 80 + header["tiles_offset"], 80 + header["lanes_offset"]
    if what == "offset":
        record[48:56] = np.frombuffer((1 << 60).to_bytes(8, "little"), np.uint8)
    elif what == "encoding":
        record[80] = 2
    elif what == "lane_bytes":
        record[81] = 3
    elif what == "alphabet_size":
        record[82:84] = (1, 1)  # 257
    elif what == "code":
        grid = 112 + header["alphabet_size"]
        cell = grid + int(np.flatnonzero(record[grid:tiles])[0])
        record[cell] = 0
    elif what == "position":
        record[tiles : tiles + 4] = 255
    elif what == "exceptions":
        record[tiles + 6 : tiles + 8] = 255
    elif what == "lane":
        record[lanes] += 1
        record[lanes + 1] -= 1
    else:
        counts = [int.from_bytes(record[tiles + 8 * t + 6 : tiles + 8 * t + 8].tobytes(), "little") for t in range(8)]
        tile = next(t for t in range(8) if counts[t])
        at = tiles + 8 * tile
        position, shortest = (
            int.from_bytes(record[at : at + 4].tobytes(), "little"),
            int.from_bytes(record[at + 4 : at + 6].tobytes(), "little"),
        )
        bits = 32 * shortest + int(record[lanes + 32 * tile : lanes + 32 * tile + 32].astype(int).sum())
        exception = 80 + header["stream_offset"] + 16 * position + math.ceil(bits / 32) * 4
        record[exception : exception + 2] = 255
    [outcome] = cases.run([cases.decode_case([whole(record, weights, 1 << 21)], kernel=kernel)])
    assert outcome.status & status
    with pytest.raises(kernels.DAMAGE[status][0]):
        kernels.check_errors(outcome.status & status)
