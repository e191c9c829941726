"""A container split into batches: runs of its data that are read, checked, copied to a device and decoded in one go."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from df11.formats import layout
from df11.formats.container import Container
from df11.formats.record import Bytes, Place, Record, SegmentPlace, pack_front
from df11.runtime.kernels import MOST_RANGES


@dataclass(frozen=True, slots=True)
class RecordPart:
    """A record in a batch: a whole one, or some of its segments behind a front of their own."""

    name: str
    start: int
    """First byte, within the batch."""
    size: int
    elements: int
    segment_elements: int
    first_element: int
    """The first weight that is here, within the tensor."""
    kind: layout.Kind


@dataclass(frozen=True, slots=True)
class VerbatimPart:
    """Bytes of a verbatim tensor in a batch."""

    name: str
    start: int
    size: int
    offset: int
    """The first byte that is here, within the tensor."""
    last: bool


@dataclass(slots=True)
class Batch:
    """``front``, then the bytes ``begin`` to ``end`` of the container's data."""

    begin: int
    end: int
    front: bytes = b""
    records: list[RecordPart] = field(default_factory=list)
    verbatim: list[VerbatimPart] = field(default_factory=list)
    segments: list[tuple[int, SegmentPlace, Place]] = field(default_factory=list)
    """First byte within the batch, segment, and the record's place in the file: what is checked after reading."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.front) + self.end - self.begin

    def read(self, container: Container, out: Bytes) -> None:
        """Fill ``out``, u8 [size], and check the stored checksums of its segments."""
        out[: len(self.front)] = np.frombuffer(self.front, np.uint8)
        container.read(self.begin, out[len(self.front) :])
        for start, segment, place in self.segments:
            segment.check_stored(out[start : start + segment.size], place)


def cut(container: Container, capacity: int, names: Collection[str]) -> Iterator[Batch]:
    """Those tensors of a container with these names that are not empty, in the order of its data.

    Only a single segment may make a batch larger than ``capacity``.
    """
    batch = Batch(0, 0)
    for name in container.keys():
        if name not in names:
            if batch.size:
                yield batch
            batch = Batch(0, 0)
            continue
        begin, end = container.span(name)
        if not batch.size:
            batch = Batch(begin, begin)
        coded = container.info(name).encoding == "df11"
        if batch.size and (batch.size + end - begin > capacity or len(batch.records) == MOST_RANGES):
            yield batch
            batch = Batch(begin, begin)
        if end - begin > capacity:
            yield from (
                _record_batches(container.record(name), name, begin, capacity)
                if coded
                else _verbatim_batches(name, begin, end, capacity)
            )
            batch = Batch(end, end)
            continue
        start = batch.size
        batch.end = end
        if not coded:
            batch.verbatim.append(VerbatimPart(name, start, end - begin, 0, True))
            continue
        record = container.record(name)
        batch.records.append(
            RecordPart(name, start, record.size, record.element_count, record.segment_elements, 0, record.kind)
        )
        batch.segments += [(start + segment.offset, segment, record.place) for segment in record.segments]
    if batch.size:
        yield batch


def _verbatim_batches(name: str, begin: int, end: int, capacity: int) -> Iterator[Batch]:
    for start in range(begin, end, capacity):
        stop = min(start + capacity, end)
        yield Batch(start, stop, verbatim=[VerbatimPart(name, 0, stop - start, start - begin, stop == end)])


def _record_batches(record: Record, name: str, begin: int, capacity: int) -> Iterator[Batch]:
    first = 0
    while first < len(record.segments):
        last = first + 1
        size = layout.RECORD_HEADER.size + layout.DIRECTORY_ENTRY.size + record.segments[first].size
        while (
            last < len(record.segments) and size + layout.DIRECTORY_ENTRY.size + record.segments[last].size <= capacity
        ):
            size += layout.DIRECTORY_ENTRY.size + record.segments[last].size
            last += 1
        segments = record.segments[first:last]
        front = pack_front(segments, record.segment_elements, record.kind)
        elements = sum(segment.elements for segment in segments)
        shift = len(front) - segments[0].offset
        yield Batch(
            begin + segments[0].offset,
            begin + segments[-1].offset + segments[-1].size,
            front,
            [RecordPart(name, 0, size, elements, record.segment_elements, segments[0].first_element, record.kind)],
            segments=[(segment.offset + shift, segment, record.place) for segment in segments],
        )
        first = last
