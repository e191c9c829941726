"""The CPU as a decoding device: the same interface as :class:`df11.runtime.gpu.Gpu`, on all cores."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from df11.formats import errors, layout
from df11.formats.record import Bytes, Place, Record, Segment, Weights, open_record, weights_dtype
from df11.runtime.kernels import Range

_LARGE_PAGE: Final = 2 << 20

_pools: Final[dict[int, ThreadPoolExecutor]] = {}


def pool() -> ThreadPoolExecutor:
    """The decoding threads of this process, one per core; a forked child gets its own."""
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="df11")
    return _pools[process]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_large_pages(address: int, size: int) -> None:
    """Ask for pages of 2 MiB for fresh memory, where available: touching small ones costs as much time as decoding."""
    first, last = -(-address // _LARGE_PAGE) * _LARGE_PAGE, (address + size) // _LARGE_PAGE * _LARGE_PAGE
    if first < last and hasattr(mmap, "MADV_HUGEPAGE"):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(first, last - first, mmap.MADV_HUGEPAGE)  # Only advice: nothing is lost if it is refused.


MOST_KEPT: Final = 64 << 20
"""Bytes of what is kept of records in memory, at most: room for 3,120 segments, or 6.5 billion weights."""
SEGMENT_KEPT: Final = 21 << 10
"""Bytes that are kept of a segment: a table of 16 KiB, its header, and Python's objects.

Measured: 20,835 for each of 3,000 records of one segment."""


@dataclass(frozen=True, slots=True)
class _Opened:
    data: Bytes
    front: bytes
    record: Record
    segments: dict[int, Segment]

    def segment(self, index: int) -> Segment:
        found = self.segments.get(index)
        if found is None:
            entry = self.record.segments[index]
            data = self.data[entry.offset : entry.offset + entry.size]
            found = self.segments[index] = Segment(data, entry, self.record.place, self.record.kind, trusted=True)
        return found


class Records:
    """Records in memory: header and directory checked, and tables built, at their first use.

    All of that is kept until the record's memory is freed, or another record is written there, up to ``most`` bytes
    for all records together; what comes later is opened for each use. (An order of recent use would not help: a model
    uses all of its records in turn.)
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._kept: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], tuple[_Opened, weakref.finalize[..., Any]]]]
        self._kept = weakref.WeakKeyDictionary()
        self._bytes = 0
        self._freed: list[int] = []  # Finalizers run at any time, within the lock too: they only append.
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """About how much is kept."""
        with self._lock:
            return self._settle()

    def _settle(self) -> int:
        while self._freed:
            self._bytes -= self._freed.pop()
        return self._bytes

    def open(self, part: Range) -> _Opened:
        """The record of a range. Raises what :func:`open_record` raises, and EntryError if it has another shape."""
        place = (part.record, part.record_size)
        data = _array(part.record, part.record_size, np.dtype(np.uint8))
        with self._lock:
            known = self._kept.get(part.owner, {}).get(place) if part.owner is not None else None
        # Header and directory hold checksums of all the rest: if they are the same, so is the record.
        is_same = known is not None and data[: len(known[0].front)].tobytes() == known[0].front
        if known is not None and is_same and known[0].record.kind is part.kind:
            opened = known[0]
        else:
            opened = _open(data, part.kind)
            if part.owner is not None:
                self._keep(part.owner, place, opened)
        found = (opened.record.element_count, opened.record.segment_elements)
        if found != (part.element_count, part.segment_elements):
            raise errors.EntryError(
                "the record does not match its shape",
                expected=(part.element_count, part.segment_elements),
                found=found,
            )
        return opened

    def _keep(self, owner: object, place: tuple[int, int], opened: _Opened) -> None:
        size = SEGMENT_KEPT * len(opened.record.segments)
        with self._lock:
            of_owner = self._kept.setdefault(owner, {})
            if place in of_owner:
                of_owner.pop(place)[1]()
            if self._settle() + size <= self._most:
                finalizer = weakref.finalize(owner, self._freed.append, size)
                finalizer.atexit = False
                of_owner[place] = (opened, finalizer)
                self._bytes += size


class Cpu:
    """Decodes records in memory whose checksums were checked when they were read. Damage raises at once."""

    def __init__(self) -> None:
        self.records = Records()

    def prepare(self, kind: layout.Kind) -> None:
        """Nothing is to be made ready."""

    def decode(self, ranges: Sequence[Range], *, background: bool = False) -> None:  # noqa: ARG002 - the interface of Gpu
        """Decode ranges; every segment of each is a task."""
        tasks = [
            (record, index, part)
            for part in ranges
            if part.first < part.last
            for record in [self.records.open(part)]
            for index in _segments(part)
        ]
        if len(tasks) == 1:
            _decode_segment(*tasks[0])
            return
        for done in [pool().submit(_decode_segment, *task) for task in tasks]:
            done.result()

    def gather_rows(self, matrix: Range, ids: int, count: int, row_weights: int, rows: int) -> None:
        """Decode ``count`` rows of a matrix; ``ids`` is the address of their indices, i64."""
        if not count or not row_weights:
            return
        numbers = _array(ids, count, np.dtype(np.int64))
        wrong = numbers[(numbers < 0) | (numbers >= rows)]
        if wrong.size:
            raise errors.UsageError("no such row", expected=f"0 to {rows - 1}", found=int(wrong[0]))
        record, out = (
            self.records.open(matrix),
            _array(matrix.output, count * row_weights, weights_dtype(matrix.kind)).reshape(count, row_weights),
        )
        order = np.argsort(numbers, kind="stable")
        # Rows that share tiles are decoded together, so that no tile is decoded twice; one segment at most.
        firsts = numbers[order] * row_weights
        apart = np.flatnonzero(
            (firsts[1:] // layout.TILE_WEIGHTS > (firsts[:-1] + row_weights - 1) // layout.TILE_WEIGHTS)
            | (firsts[1:] // matrix.segment_elements != firsts[:-1] // matrix.segment_elements)
        )
        runs = np.split(order, apart + 1)
        for done in [pool().submit(_gather_run, record, matrix, numbers, run, out) for run in runs]:
            done.result()

    def check_errors(self) -> None:
        """Nothing is left to raise."""


def _open(data: Bytes, kind: layout.Kind) -> _Opened:
    def read(offset: int, out: Bytes) -> None:
        out[:] = data[offset : offset + len(out)]

    record = open_record(read, len(data), Place(), kind)
    return _Opened(data, data[: record.segments[0].offset].tobytes(), record, {})


def _segments(part: Range) -> range:
    return range(part.first // part.segment_elements, (part.last - 1) // part.segment_elements + 1)


def _decode_segment(record: _Opened, index: int, part: Range) -> None:
    start = index * part.segment_elements
    segment = record.segment(index)
    low = max(part.first - start, 0)
    high = min(part.last - start, segment.entry.elements)
    out = _array(part.output + part.kind.bytes * (start + low - part.first), high - low, weights_dtype(part.kind))
    if low == 0 and high == segment.entry.elements:
        segment.decode(out)
    else:
        segment.decode_range(low, high, out)


def _gather_run(
    record: _Opened, matrix: Range, numbers: npt.NDArray[np.int64], run: npt.NDArray[np.int64], out: Weights
) -> None:
    # Decode rows numbers[run], in ascending order, by decoding everything from the first to the last.
    row_weights = out.shape[1]
    first, last = int(numbers[run[0]]), int(numbers[run[-1]]) + 1
    rows = np.empty((last - first, row_weights), weights_dtype(matrix.kind))
    part = dataclasses.replace(matrix, first=first * row_weights, last=last * row_weights, output=rows.ctypes.data)
    for index in _segments(part):
        _decode_segment(record, index, part)
    out[run] = rows[numbers[run] - first]


def _array(address: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype)
