"""Lay out a container as it is written: records, verbatim tensors, and at last the header in the room that was kept for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Final

import xxhash
import zstandard

from df11.converter.encode import EncodedSegment
from df11.converter.manifest import Exponents, TensorRow, row_of
from df11.converter.plan import SEGMENT_WEIGHTS, Cast, TensorPlan
from df11.converter.source import Source
from df11.formats import errors, framing, layout
from df11.formats.container import TensorInfo
from df11.formats.record import Bytes, SegmentPlace, pack_front
from df11.formats.writer import AtomicWriter
from df11.version import __version__

SOURCE_HEADER_LEVEL: Final = 19
"""Zstandard level of the source header: part of what makes the output the same everywhere."""


class ContainerOutput:
    """The container of one source. Tensors come one after the other, each in as many parts as the caller likes."""

    def __init__(self, writer: AtomicWriter, source: Source, plans: Sequence[TensorPlan], cast: Cast) -> None:
        self._writer = writer
        self._source = source
        self._cast = cast if any(plan.cast for plan in plans) else None
        self._entries: dict[str, framing.Entry] = {}
        self._objects: dict[str, dict[str, Any]] = {}
        self._directory: list[SegmentPlace] = []
        self.rows: list[TensorRow] = []
        """Of the tensors that are finished, in their order."""
        self._checksum = xxhash.xxh3_64()
        self._source_header = base64.b64encode(
            zstandard.ZstdCompressor(level=SOURCE_HEADER_LEVEL).compress(source.header.raw)
        ).decode()
        self._data_start = layout.align(8 + self._header_room(plans), layout.DATA_ALIGNMENT)
        if self._data_start - 8 > layout.MAX_JSON_HEADER:
            raise errors.LimitError(
                "the header of the container would be too large",
                file=source.path,
                expected=f"at most {layout.MAX_JSON_HEADER}",
                found=self._data_start - 8,
                hint="split the file into shards",
            )
        self._start = writer.position = self._data_start

    def write_segment(self, plan: TensorPlan, segment: EncodedSegment) -> None:
        """Append a segment to the record of a tensor; the first one starts the record."""
        if not self._directory:
            self._start = self._writer.position
            segments = -(-plan.entry.elements // SEGMENT_WEIGHTS)
            self._writer.position += layout.RECORD_HEADER.size + layout.DIRECTORY_ENTRY.size * segments
        offset = self._writer.position - self._start
        self._directory.append(
            SegmentPlace(
                offset, len(segment.data), segment.elements, segment.stored_checksum, segment.decoded_checksum, 0
            )
        )
        self._writer.write(segment.data)

    def end_record(self, plan: TensorPlan, exponents: Exponents, *, exact: bool) -> bool:
        """Finish the record of a tensor with these exponents; if it is not smaller than the tensor itself, drop it and return False."""
        size = self._writer.position - self._start
        directory, self._directory = self._directory, []
        if size >= plan.target_size:
            self._writer.rewind(self._start)
            return False
        self._writer.write(pack_front(directory, SEGMENT_WEIGHTS), self._start)
        entry = _record_entry(plan, self._start - self._data_start, size)
        stored = tuple(segment.stored_checksum for segment in directory)
        decoded = tuple(segment.decoded_checksum for segment in directory)
        self._add(entry, _record_object(plan, exact), plan.entry.shape, stored, decoded, exponents)
        return True

    def write_verbatim(
        self, plan: TensorPlan, data: Bytes, exponents: Exponents = None, *, last: bool, exact: bool = True
    ) -> None:
        """Append bytes of a verbatim tensor; with ``last`` the tensor ends."""
        self._writer.write(data)
        self._checksum.update(data)
        if last:
            end = self._writer.position - self._data_start
            entry = framing.Entry(plan.entry.name, plan.target_dtype, plan.entry.shape, end - plan.target_size, end)
            checksum = (self._checksum.intdigest(),)
            self._add(
                entry,
                _verbatim_object(plan, exact, self._checksum.hexdigest()),
                entry.shape,
                checksum,
                checksum,
                exponents,
            )
            self._checksum = xxhash.xxh3_64()

    def _add(
        self,
        entry: framing.Entry,
        value: dict[str, Any],
        shape: tuple[int, ...],
        stored: tuple[int, ...],
        decoded: tuple[int, ...],
        exponents: Exponents,
    ) -> None:
        self._entries[entry.name] = entry
        self._objects[entry.name] = value
        info = TensorInfo(entry.name, value["dtype"], shape, value["encoding"], entry.size, value.get("exact"))
        self.rows.append(row_of(self._writer.path.name, info, stored, decoded, exponents))

    def finish(self, source_sha256: str) -> None:
        """Write the header, when all tensors are there."""
        header = self._header(list(self._entries.values()), self._objects, source_sha256)
        room = self._data_start - 8
        header += b" " * (room - len(header))
        self._writer.write(room.to_bytes(8, "little") + header, 0)

    def _header(self, entries: Sequence[framing.Entry], objects: dict[str, dict[str, Any]], sha256: str) -> bytes:
        source = {
            "bytes": self._source.size,
            "sha256": sha256,
            "header_bytes": len(self._source.header.raw),
            "cast": self._cast,
        }
        metadata = {
            layout.METADATA_VERSION: str(layout.VERSION),
            layout.METADATA_REQUIRES: "[]",
            layout.METADATA_WRITER: f"df11 {__version__}",
            layout.METADATA_SOURCE: framing.compact_json(source).decode(),
            layout.METADATA_SOURCE_HEADER: self._source_header,
            layout.METADATA_TENSORS: framing.compact_json(objects).decode(),
        }
        return framing.encode_header(entries, metadata)

    def _header_room(self, plans: Sequence[TensorPlan]) -> int:
        # The size of the largest header that can come of these tensors: for each, the longer of its two forms, with large numbers.
        end = self._source.size + layout.RECORD_ALIGNMENT * len(plans)
        entries = []
        objects = {}
        for plan in plans:
            record = (_record_entry(plan, end, end), _record_object(plan, exact=False))
            verbatim = (
                framing.Entry(plan.entry.name, plan.target_dtype, plan.entry.shape, end, end),
                _verbatim_object(plan, False, "f" * 16),
            )
            entry, objects[plan.entry.name] = max(
                record, verbatim, key=lambda form: len(_entry_json(form[0])) + len(_object_json(form[1]))
            )
            entries.append(entry)
        return len(self._header(entries, objects, "f" * 64))


def _record_entry(plan: TensorPlan, start: int, size: int) -> framing.Entry:
    return framing.Entry(plan.entry.name, "U8", (size,), start, start + size)


def _record_object(plan: TensorPlan, exact: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"encoding": "df11", "dtype": "BF16", "shape": list(plan.entry.shape)}
    return value | {"exact": exact} if plan.cast else value


def _verbatim_object(plan: TensorPlan, exact: bool, checksum: str) -> dict[str, Any]:
    value: dict[str, Any] = {"encoding": "verbatim", "dtype": plan.target_dtype, "shape": list(plan.entry.shape)}
    return (value | {"exact": exact} if plan.cast else value) | {"xxh3": checksum}


def _entry_json(entry: framing.Entry) -> bytes:
    return framing.encode_header([entry], {})


def _object_json(value: dict[str, Any]) -> str:
    # As it stands in the header: JSON in a JSON string.
    return json.dumps(framing.compact_json(value).decode())
