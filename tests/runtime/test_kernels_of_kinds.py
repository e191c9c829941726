"""The CUDA source for each dtype besides BF16: on the CPU under sanitizers, and as PTX with its memory watched."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.gpu import cubins
from df11.formats import layout
from df11.formats.container import Container
from df11.formats.record import Bytes, Weights, weights_dtype
from df11.runtime import kernels
from df11.runtime.kernels import DECODE, DECODE_SMALL
from tests.support import records, strategies
from tests.support.cuda import cases, ptx
from tests.support.cuda.cases import Outcome, Part
from tests.support.cuda.emulator import Case
from tests.vectors.generate import FOLDER
from tests.vectors.make_kinds import KINDS

SOURCE = kernels.SOURCE.read_text(encoding="utf-8")
COMPILER = (12, "80")
BOTH = (DECODE, DECODE_SMALL)
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.dtype)


def run(launches: Sequence[Case], kind: layout.Kind, compiled: str) -> list[Outcome]:
    """``compiled``: "source", by g++, or "ptx", by NVRTC."""
    if compiled == "source":
        return cases.run(launches, kind=kind)
    text = cubins.compile_ptx(SOURCE, COMPILER[1], cubins.nvrtc_library(COMPILER[0]), kind)
    return cases.run(launches, kind=kind, files=ptx.write(text))


def whole(record: Bytes, elements: int, segment_elements: int, kind: layout.Kind) -> Part:
    return Part(record, elements, segment_elements, 0, elements, 0, kind)


class Expected:
    """Launches, and what each must write."""

    def __init__(self, kind: layout.Kind) -> None:
        self.kind = kind
        self.launches: list[Case] = []
        self.weights: list[Weights] = []

    def decode(self, part: Part, weights: Weights, *, tiles: int = 8) -> None:
        """A range, by either kernel."""
        seed = len(self.launches)
        for kernel in BOTH:
            self.launches.append(cases.decode_case([part], kernel=kernel, tiles=tiles, seed=seed))
            self.weights.append(
                np.concatenate([cases.unwritten(part.misalign, self.kind), weights[part.first : part.last]])
            )

    def gather(self, part: Part, weights: Weights, columns: int, ids: Sequence[int]) -> None:
        """Rows."""
        rows = weights[: len(weights) // columns * columns].reshape(-1, columns)
        numbers = np.array(ids, np.int64) % len(rows)
        self.launches.append(cases.gather_case(part, columns, len(rows), numbers, seed=len(self.launches)))
        self.weights.append(rows[numbers].reshape(-1))

    def check(self, compiled: str) -> None:
        """Run all."""
        for i, (outcome, weights) in enumerate(zip(run(self.launches, self.kind, compiled), self.weights, strict=True)):
            assert outcome.status == 0, i
            np.testing.assert_array_equal(outcome.weights[0], weights, str(i))


def several_tiles(kind: layout.Kind) -> Weights:
    """Tiles that fit the stage beside some that do not, if exponents have enough bits; some with exceptions."""
    weights = strategies.make("gaussian", 9 * 8192 + 5, 2)
    weights[8192 * 7 : 8192 * 9] = strategies.make("random_bits", 2 * 8192, 1) & 0x87FF | 0x3000
    weights[::9001] = 0x3F80
    return strategies.as_kind(weights, kind, 2)


def golden_records(kind: layout.Kind) -> list[tuple[Bytes, Weights, int]]:
    found = []
    for path in sorted((FOLDER / "golden").glob("*.df11")):
        with Container(path) as container:
            for name in container.keys():
                info = container.info(name)
                if (info.encoding, info.dtype) == ("df11", kind.dtype):
                    record = container.record(name)
                    weights = container.tensor(name).reshape(-1).view(weights_dtype(kind))
                    found.append((record.read_whole(), weights, record.segment_elements))
    return found


@pytest.mark.parametrize("compiled", ["source", "ptx"])
@EACH_KIND
def test_the_same_bytes(kind: layout.Kind, compiled: str) -> None:
    expected = Expected(kind)
    golden = golden_records(kind)
    assert len(golden) > 7
    for record, weights, segment_elements in golden:
        part = whole(record, len(weights), segment_elements, kind)
        expected.decode(part, weights)
        expected.gather(part, weights, 1, [0, len(weights) // 2, -1])
    rng = np.random.default_rng(5)
    for seed in range(40 if compiled == "source" else 12):
        weights, segment_elements, record = records.generate(seed, 3 * 8192, kind)
        part = whole(record, len(weights), segment_elements, kind)
        expected.decode(part, weights)
        first, last = sorted(rng.integers(0, len(weights) + 1, 2).tolist())
        if first < last:
            misalign = int(rng.choice([0, 1, 3, 8]))
            expected.decode(
                Part(record, len(weights), segment_elements, first, last, misalign, kind), weights, tiles=1 + seed % 3
            )
        columns = next(c for c in (320, 97, 12, 7, 3, 2, 1) if len(weights) >= c)
        expected.gather(whole(record, len(weights), segment_elements, kind), weights, columns, rng.integers(0, 99, 3))
    mixed = several_tiles(kind)
    expected.decode(whole(records.encode(mixed, 1 << 21, kind), len(mixed), 1 << 21, kind), mixed, tiles=32)
    part = whole(records.encode(mixed, 8192, kind), len(mixed), 8192, kind)
    expected.gather(part, mixed, 12_000, [1, 0])  # Each row lies in two segments.
    expected.check(compiled)


@EACH_KIND
def test_damage_is_noticed_and_stays_inside(kind: layout.Kind) -> None:
    launches = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        weights, segment_elements, record = records.generate(seed, 2 * 8192, kind)
        bad = record.copy()
        stop = len(record) if rng.random() < 0.5 else min(len(record), 400)
        for place in rng.integers(layout.RECORD_HEADER.size, stop, int(rng.choice([1, 2, 8]))):
            bad[place] = rng.choice([0, 255, rng.integers(256), int(bad[place]) ^ 1 << int(rng.integers(8))])
        part = whole(bad, len(weights), segment_elements, kind)
        launches.append(cases.decode_case([part], kernel=BOTH[seed % 2], seed=seed))
        if seed % 8 == 0:
            ids = np.array([0, len(weights) - 1])
            launches.append(cases.gather_case(part, 1, len(weights), ids, seed=seed))
    assert sum(outcome.status != 0 for outcome in run(launches, kind, "source")) > 40


@EACH_KIND
def test_more_planes_left_out_than_the_dtype_allows(kind: layout.Kind) -> None:
    weights = strategies.as_kind(strategies.make("gaussian", 9000, 1), kind, 1)
    record = records.encode(weights, kind=kind).copy()
    assert record[80] == layout.ENCODING_CODED
    record[80] += kind.most_left_out + 1
    [outcome] = run([cases.decode_case([whole(record, 9000, 1 << 21, kind)])], kind, "source")
    assert outcome.status == 1
    assert (outcome.weights[0].view(np.uint8) == 255).all()


@EACH_KIND
def test_a_row_that_does_not_exist_becomes_nan(kind: layout.Kind) -> None:
    weights = strategies.as_kind(strategies.make("gaussian", 30, 0), kind, 0)
    part = whole(records.encode(weights, kind=kind), 30, 1 << 21, kind)
    [outcome] = run([cases.gather_case(part, 10, 3, np.array([2, 3, -1]))], kind, "source")
    rows = outcome.weights[0].reshape(3, 10)
    np.testing.assert_array_equal(rows[0], weights[20:])
    assert (rows[1:].view(np.uint8) == 255).all()
    assert outcome.status == 32


def test_the_source_splits_each_dtype_as_the_format_does() -> None:
    [table] = re.findall(r"SPLITS\[\] = \{\{\}, \{(.*)\}\};", SOURCE)
    found = [tuple(int(number, 0) for number in part.split(",")) for part in table.split("}, {")]
    assert found == [
        (kind.bytes, len(kind.planes), sum(bits << 4 * i for i, bits in enumerate(kind.planes)), kind.most_left_out)
        for kind in layout.KINDS_BY_CODE.values()
    ]
    for code, kind in layout.KINDS_BY_CODE.items():
        assert f"constexpr u32 {kind.dtype} = {code};" in SOURCE
