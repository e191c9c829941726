"""Launches of the decoding kernels for the emulator: records, ranges and rows as cases with guarded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from df11.formats import layout
from df11.formats.record import Bytes, Weights, weights_dtype
from df11.runtime import kernels
from df11.runtime.kernels import Range
from tests.support.cuda.emulator import Address, Buffer, Case, Struct, run_batch

KERNEL_TABLE = Path(__file__).with_name("decode_kernels.h")
UNWRITTEN = 0x5A5A


@dataclass(frozen=True)
class Part:
    """Weights ``first`` to ``last`` of a record that claims ``elements``; ``misalign``: output offset in weights."""

    record: Bytes
    elements: int
    segment_elements: int
    first: int
    last: int
    misalign: int = 0
    kind: layout.Kind = layout.BF16


@dataclass(frozen=True)
class Outcome:
    """What a launch wrote for each part, and its status word."""

    weights: list[Weights]
    status: int


def unwritten(count: int, kind: layout.Kind = layout.BF16) -> Weights:
    """What the memory of so many weights holds before a launch."""
    pattern = np.full(4, UNWRITTEN, np.uint16).view(weights_dtype(kind))
    return np.full(count, pattern[0])


def decode_case(parts: Sequence[Part], *, kernel: str = kernels.DECODE, tiles: int = 8, seed: int = 0) -> Case:
    """A decoding launch. Outputs: the status word, then the memory of each part."""
    status = Buffer(np.zeros(1, np.uint32))
    outputs = [Buffer(unwritten(part.misalign + part.last - part.first, part.kind)) for part in parts]
    ranges = [
        Range(0, len(part.record), part.elements, part.segment_elements, part.first, part.last, 0) for part in parts
    ]
    (table, count, per_block), blocks = kernels.pack(ranges, tiles)
    addresses = {}
    for i, (part, output) in enumerate(zip(parts, outputs, strict=True)):
        addresses[i * kernels.RANGE.itemsize] = Address(Buffer(part.record))
        addresses[i * kernels.RANGE.itemsize + 8] = Address(output, part.kind.bytes * part.misalign)
    assert len(parts) <= kernels.MOST_RANGES and all(part.first < part.last for part in parts)
    return Case(
        kernel,
        blocks,
        kernels.THREADS[kernel],
        [Struct(table, addresses), count, per_block, Address(status)],
        [status, *outputs],
        seed,
    )


def gather_case(part: Part, row_weights: int, rows: int, ids: npt.NDArray[np.int64], *, seed: int = 0) -> Case:
    """A gathering launch. Outputs: the status word, then the rows."""
    status, output = Buffer(np.zeros(1, np.uint32)), Buffer(unwritten(len(ids) * row_weights, part.kind))
    matrix = kernels.pack_one(Range(0, len(part.record), part.elements, part.segment_elements, 0, part.elements, 0))
    addresses = {0: Address(Buffer(part.record)), 8: Address(output)}
    arguments: list[Any] = [
        Struct(matrix, addresses),
        Address(Buffer(ids, 8)),
        np.uint64(row_weights),
        np.uint64(rows),
        Address(status),
    ]
    return Case(kernels.GATHER_ROWS, len(ids), kernels.THREADS[kernels.GATHER_ROWS], arguments, [status, output], seed)


def run(
    cases: Sequence[Case],
    timeout: float = 250,
    files: tuple[Path, Path] = (kernels.SOURCE, KERNEL_TABLE),
    kind: layout.Kind = layout.BF16,
) -> list[Outcome]:
    """Run under the sanitizers. ``files``: what to run, and its list of kernels; the CUDA source if not given.

    ``kind``: what all records hold.
    """
    # Of other kinds than BF16, few cases are run: compiling takes longer.
    options = [f"-DDF11_KIND={kind.code}", *([] if kind is layout.BF16 else ["-O0"])]
    return [
        Outcome([np.asarray(memory, weights_dtype(kind)) for memory in outputs], int(status[0]))
        for status, *outputs in run_batch(*files, cases, timeout, options)
    ]
