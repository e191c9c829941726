"""Lay out a container while it is written: records, verbatim tensors, and at the end the header, in reserved space."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

import xxhash
import zstandard

from df11.converter.batches import SEGMENT_WEIGHTS, Fate, SourceTensor
from df11.converter.encode import EncodedSegment
from df11.converter.exponents import Exponents
from df11.converter.manifest import TensorRow
from df11.converter.scan import row_of
from df11.converter.source import Source
from df11.formats import errors, framing, layout
from df11.formats.container import OriginalFile, TensorInfo
from df11.formats.record import Bytes, SegmentPlace, pack_front
from df11.storage.atomic import AtomicWriter
from df11.storage.entry import Entry
from df11.version import __version__

SOURCE_HEADER_LEVEL: Final = 19
"""Zstandard level of the source header: fixed, so that the output is the same everywhere."""


MOST_OF_A_TENSOR: Final = 0.97
"""A record that is not smaller than this share of its tensor is not worth its decoding; of BF16 any that is smaller is,
as in release 0.1."""


class ContainerOutput:
    """The container of one source. Tensors come one after the other, each in any number of parts."""

    def __init__(self, writer: AtomicWriter, source: Source, tensors: Sequence[SourceTensor]) -> None:
        self._writer = writer
        self._source = source
        self._entries: dict[str, framing.Entry] = {}
        self._objects: dict[str, dict[str, Any]] = {}
        self._directory: list[SegmentPlace] = []
        self.rows: list[TensorRow] = []
        """The finished tensors, in order."""
        self.made_from: tuple[OriginalFile, ...] = ()
        """The files that the source was decoded from; known once it is finished."""
        self._checksum = xxhash.xxh3_64()
        self._source_header = base64.b64encode(
            zstandard.ZstdCompressor(level=SOURCE_HEADER_LEVEL).compress(source.header.raw)
        ).decode()
        self._data_start = layout.align(8 + self._header_room(tensors), layout.DATA_ALIGNMENT)
        if self._data_start - 8 > layout.MAX_JSON_HEADER:
            raise errors.LimitError(
                "the header of the container would be too large",
                file=source.path,
                expected=f"at most {layout.MAX_JSON_HEADER}",
                found=self._data_start - 8,
                hint="split the file into shards",
            )
        most = layout.most_source_header(self._data_start - 8)
        if len(source.header.raw) > most:
            raise errors.LimitError(
                "no reader would take the header of this file from a container: its size is out of proportion",
                file=source.path,
                expected=f"at most {most} bytes",
                found=len(source.header.raw),
                hint="write the file anew, with less padding or metadata",
            )
        self._start = writer.position = self._data_start

    def write_segment(self, tensor: SourceTensor, segment: EncodedSegment) -> None:
        """Append a segment to the record of a tensor; the first one starts the record."""
        if not self._directory:
            segments = -(-tensor.entry.elements // SEGMENT_WEIGHTS)
            self._writer.position += layout.RECORD_HEADER.size + layout.DIRECTORY_ENTRY.size * segments
        offset = self._writer.position - self._start
        self._directory.append(
            SegmentPlace(
                offset, len(segment.data), segment.elements, segment.stored_checksum, segment.decoded_checksum, 0
            )
        )
        self._writer.write(segment.data)

    def end_record(self, tensor: SourceTensor, dtype: str, exponents: Exponents, *, exact: bool) -> bool:
        """Finish the record of a tensor of this dtype with these exponents.

        If it does not pay, drop it and return False.
        """
        size = self._writer.position - self._start
        directory = self._directory
        if size >= tensor.size_as(dtype) * (1 if dtype == "BF16" else MOST_OF_A_TENSOR):
            self.drop()
            return False
        self._writer.write(pack_front(directory, SEGMENT_WEIGHTS, layout.KINDS[dtype]), self._start)
        entry = _record_entry(tensor, self._start - self._data_start, size)
        stored = tuple(segment.stored_checksum for segment in directory)
        decoded = tuple(segment.decoded_checksum for segment in directory)
        self._add(entry, _object(tensor, dtype, exact), tensor.entry.shape, stored, decoded, exponents)
        return True

    def drop(self) -> None:
        """Forget what has been written of the tensor at hand."""
        self._writer.rewind(self._start)
        self._start_tensor()

    def _start_tensor(self) -> None:
        self._start, self._directory, self._checksum = self._writer.position, [], xxhash.xxh3_64()

    def write_verbatim(
        self,
        tensor: SourceTensor,
        dtype: str,
        data: Bytes,
        exponents: Exponents = None,
        *,
        last: bool,
        exact: bool = True,
    ) -> None:
        """Append bytes of a verbatim tensor of this dtype; with ``last`` the tensor ends."""
        self._writer.write(data)
        self._checksum.update(data)
        if last:
            end = self._writer.position - self._data_start
            entry = framing.Entry(tensor.entry.name, dtype, tensor.entry.shape, end - tensor.size_as(dtype), end)
            checksum = (self._checksum.intdigest(),)
            self._add(
                entry,
                _object(tensor, dtype, exact, self._checksum.hexdigest()),
                entry.shape,
                checksum,
                checksum,
                exponents,
            )

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
        self._start_tensor()
        self.rows.append(row_of(self._writer.path.name, info, stored, decoded, exponents))

    def finish(self, source_sha256: str) -> None:
        """Write the header, once all tensors are written."""
        records = {value["dtype"] for value in self._objects.values() if value["encoding"] == "df11"}
        sources = self._source.hashed_sources()
        self.made_from = original_files(sources)
        header = self._header(list(self._entries.values()), self._objects, source_sha256, records, sources)
        room = self._data_start - 8
        header += b" " * (room - len(header))
        self._writer.write(room.to_bytes(8, "little") + header, 0)

    def _header(
        self,
        entries: Sequence[framing.Entry],
        objects: dict[str, dict[str, Any]],
        sha256: str,
        records: Iterable[str],
        made_from: Sequence[Entry],
    ) -> bytes:
        # ``records``: the dtypes of records.
        features = [feature for dtype in records if (feature := layout.KINDS[dtype].feature) is not None]
        source = {
            "bytes": self._source.size,
            "sha256": sha256,
            "header_bytes": len(self._source.header.raw),
            "cast": "bf16" if any("exact" in value for value in objects.values()) else None,
        }
        metadata = {
            layout.METADATA_VERSION: str(layout.VERSION),
            layout.METADATA_REQUIRES: framing.compact_json(sorted(features)).decode(),
            layout.METADATA_WRITER: f"df11 {__version__}",
            layout.METADATA_SOURCE: framing.compact_json(source).decode(),
            layout.METADATA_SOURCE_HEADER: self._source_header,
            layout.METADATA_TENSORS: framing.compact_json(objects).decode(),
        }
        if made_from:
            files = [asdict(one) for one in original_files(made_from)]
            metadata[layout.METADATA_MADE_FROM] = framing.compact_json(files).decode()
        return framing.encode_header(entries, metadata)

    def _header_room(self, tensors: Sequence[SourceTensor]) -> int:
        # The size of the largest possible header for these tensors: for each, the longer form, with large numbers.
        end = self._source.size + layout.RECORD_ALIGNMENT * len(tensors)
        entries = []
        objects = {}
        for tensor in tensors:
            forms = []
            for dtype in tensor.dtypes:
                verbatim = framing.Entry(tensor.entry.name, dtype, tensor.entry.shape, end, end)
                forms += [
                    (_record_entry(tensor, end, end), _object(tensor, dtype, exact=False)),
                    (verbatim, _object(tensor, dtype, False, "f" * 16)),
                ]
            entry, objects[tensor.entry.name] = max(
                forms, key=lambda form: len(_entry_json(form[0])) + len(_object_json(form[1]))
            )
            entries.append(entry)
        records = {dtype for tensor in tensors if tensor.fate is Fate.CODE for dtype in tensor.dtypes}
        return len(self._header(entries, objects, "f" * 64, records, self._source.sources))


def original_files(entries: Sequence[Entry]) -> tuple[OriginalFile, ...]:
    """Files that a source is made from, as a container names them; a SHA-256 that is not known yet has its length."""
    return tuple(OriginalFile(one.name, one.size, one.sha256 or "f" * 64) for one in entries)


def _record_entry(tensor: SourceTensor, start: int, size: int) -> framing.Entry:
    return framing.Entry(tensor.entry.name, "U8", (size,), start, start + size)


def _object(tensor: SourceTensor, dtype: str, exact: bool, checksum: str | None = None) -> dict[str, Any]:
    # A tensor object: of a verbatim tensor if there is a checksum, else of a record.
    encoding = "df11" if checksum is None else "verbatim"
    value: dict[str, Any] = {"encoding": encoding, "dtype": dtype, "shape": list(tensor.entry.shape)}
    value |= {"exact": exact} if dtype != tensor.entry.dtype else {}
    return value if checksum is None else value | {"xxh3": checksum}


def _entry_json(entry: framing.Entry) -> bytes:
    return framing.encode_header([entry], {})


def _object_json(value: dict[str, Any]) -> str:
    # As it appears in the header: JSON inside a JSON string.
    return json.dumps(framing.compact_json(value).decode())
