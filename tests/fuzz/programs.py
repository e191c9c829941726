"""The kernels as programs under sanitizers: damaged records in, the same status and weights as this process's out.

They run many inputs at a time, as starting one takes longer than a thousand inputs.
"""

from __future__ import annotations

import functools
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from df11.formats import errors, layout
from tests.fuzz.containers import RECORD
from tests.fuzz.segments import ENTRY, HEADER, SEGMENT
from tests.support import cpu_kernels

MOST_WEIGHTS = 20_000


@dataclass(frozen=True)
class Program:
    """``run`` reads inputs and returns, for each that it could not read as it should, the input and what was wrong."""

    name: str
    run: Callable[[Sequence[bytes]], list[tuple[bytes, str]]]
    seeds: Callable[[], list[bytes]] = RECORD.seeds
    mutate: Callable[[bytes, Random], bytes] = RECORD.mutate
    largest: int = RECORD.largest
    batch: int = 500
    """Inputs of a run."""


def _one_by_one(run: Callable[[Sequence[bytes]], object], inputs: Sequence[bytes]) -> list[tuple[bytes, str]]:
    # Which of the inputs fail, in a run that fails.
    faults = []
    for data in inputs:
        try:
            run([data])
        except Exception as error:
            faults.append((data, f"{type(error).__name__}: {error}"))
    return faults or [(b"".join(inputs), "a batch fails, and none of its inputs does")]


# The C decoder.


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="df11-fuzz-")


@functools.cache
def _sanitized() -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    return cpu_kernels.build(compiler, Path(_folder().name), "-O1", *cpu_kernels.SANITIZERS)


def segment_of(data: bytes) -> cpu_kernels.Segment | None:
    """The first segment of a record as the kernels get it: its sizes checked, and nothing else."""
    if len(data) < HEADER.size + ENTRY.size + SEGMENT.size:
        return None
    entry = ENTRY.unpack(data, HEADER.size)
    start = entry["segment_offset"]
    stored = np.frombuffer(data[start : start + entry["segment_size"]], np.uint8)
    if len(stored) < SEGMENT.size:
        return None
    header = SEGMENT.unpack(stored.tobytes())
    elements, size, lane_bytes = header["element_count"], header["alphabet_size"], header["lane_bytes"]
    kind = layout.KINDS_BY_CODE.get(data[5])
    left_out = header["encoding"] - layout.ENCODING_CODED
    if kind is None or not 0 <= left_out <= kind.most_left_out:
        return None
    if not 0 < elements <= MOST_WEIGHTS or not 0 < size <= 256 or lane_bytes not in (1, 2):
        return None
    sections = layout.segment_sections(elements, size, lane_bytes, kind, left_out)
    if sections["stream_offset"] + layout.STREAM_END > len(stored):
        return None
    tiles = layout.tile_count(elements)
    first = len(data) % tiles
    last = max(first + 1, tiles - len(data) // 16 % 2)
    return cpu_kernels.Segment(stored, kind, left_out, size, elements, lane_bytes, first, last)


def _decode_in_c(inputs: Sequence[bytes]) -> list[tuple[bytes, str]]:
    segments = [(data, segment) for data in inputs if (segment := segment_of(data)) is not None]

    def ask(records: Sequence[bytes]) -> None:
        asked = [cpu_kernels.ask_to_decode(segment) for data, segment in segments if data in records]
        for instructions in ("portable", "own"):
            answers = cpu_kernels.run([_sanitized(), instructions], [question for question, _ in asked])
            assert answers == b"".join(answer for _, answer in asked), f"{instructions}: other answers"

    records = [data for data, _ in segments]
    try:
        ask(records)
    except AssertionError:
        return _one_by_one(ask, records)
    return []


# The CUDA kernels.


def _decode_in_cuda(inputs: Sequence[bytes]) -> list[tuple[bytes, str]]:
    from tests.support.cuda import cases, emulator

    parts = [(data, part) for data in inputs if (part := _part(data)) is not None]

    def launch(chosen: Sequence[bytes]) -> list[cases.Outcome]:
        launches = [
            cases.decode_case([part], kernel=(cases.kernels.DECODE, cases.kernels.DECODE_SMALL)[i % 2], seed=len(data))
            for i, (data, part) in enumerate(parts)
            if data in chosen
        ]
        return cases.run(launches)

    records = [data for data, _ in parts]
    try:
        outcomes = launch(records)
    except emulator.LaunchError:
        return _one_by_one(launch, records)
    return [
        (data, what)
        for (data, part), outcome in zip(parts, outcomes, strict=True)
        if (what := _difference(part, outcome)) is not None
    ]


def _part(data: bytes) -> cases.Part | None:  # noqa: F821 - what is imported only where there is a compiler
    from tests.support.cuda.cases import Part

    if len(data) < HEADER.size + ENTRY.size or len(data) % layout.RECORD_ALIGNMENT:
        return None
    header = HEADER.unpack(data)
    elements, per_segment = header["element_count"], header["segment_elements"]
    if header["dtype"] != layout.BF16.code:
        return None
    if not 0 < elements <= MOST_WEIGHTS or per_segment % layout.TILE_WEIGHTS or not 0 < per_segment <= 1 << 24:
        return None
    return Part(np.frombuffer(data, np.uint8), elements, per_segment, 0, elements)


def _difference(part: cases.Part, outcome: cases.Outcome) -> str | None:  # noqa: F821
    # What the C decoder makes of a record whose checksums nobody asks for, the kernel must make, too. It need not see
    # all damage, but lanes that do not end where they should.
    from df11.runtime.cpu import Cpu
    from df11.runtime.kernels import Range

    room = np.zeros(len(part.record) + 16, np.uint8)
    record = room[-room.ctypes.data % 16 :][: len(part.record)]
    record[:] = part.record
    out = np.zeros(part.elements, np.uint16)
    size, segment_elements = len(record), part.segment_elements
    try:
        Cpu().decode(
            [Range(record.ctypes.data, size, part.elements, segment_elements, 0, part.elements, out.ctypes.data)]
        )
    except errors.LaneError:
        return None if outcome.status else "a lane that ends elsewhere goes unnoticed"
    except errors.Df11Error:
        return None
    if outcome.status:
        return f"only the kernel refuses it, with status {outcome.status}"
    return None if np.array_equal(out, outcome.weights[0]) else "the kernel decodes other weights"


C = Program("kernel-c", _decode_in_c)
CUDA = Program("kernel-cuda", _decode_in_cuda, batch=200)
