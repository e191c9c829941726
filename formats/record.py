"""A record: check its header and directory, check and decode its segments (SPEC.md, sections 4 to 9)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from df11.formats import errors, kernels, layout

Bytes = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.unsignedinteger[Any]]
"""The bits of weights: u8, u16 or u32."""

_HEADER: Final = layout.RECORD_HEADER
_ENTRY: Final = layout.DIRECTORY_ENTRY


def weights_dtype(kind: layout.Kind) -> np.dtype[np.unsignedinteger[Any]]:
    """The NumPy dtype of a kind's bits."""
    return np.dtype(f"<u{kind.bytes}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies, for error messages: file, tensor name, offset of the record in the file."""

    file: str | os.PathLike[str] | None = None
    tensor: str | None = None
    offset: int = 0

    def at(self, offset: int) -> dict[str, Any]:
        """Keywords of a Df11Error for byte ``offset`` of the record."""
        return {"file": self.file, "tensor": self.tensor, "offset": self.offset + offset}


class Scratch:
    """Memory that is reused: touching fresh pages costs more time than decoding into them."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def take(self, size: int) -> Bytes:
        """``size`` bytes, u8, of unknown content; overwrites what was taken before."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


@dataclass(frozen=True, slots=True)
class SegmentPlace:
    """A directory entry, and the first weight of its segment."""

    offset: int
    size: int
    elements: int
    stored_checksum: int
    decoded_checksum: int
    first_element: int

    def check_stored(self, data: Bytes, place: Place) -> None:
        """Raise ChecksumError unless ``data`` is the bytes of the segment. ``place`` is that of the record."""
        found = xxhash.xxh3_64_intdigest(data)
        if found != self.stored_checksum:
            raise errors.ChecksumError(
                "the stored bytes are damaged",
                **place.at(self.offset),
                expected=f"{self.stored_checksum:016x}",
                found=f"{found:016x}",
            )


@dataclass(frozen=True, slots=True)
class Record:
    """A record with a checked header and directory. ``read(offset, out)`` fills ``out`` with bytes of the record."""

    kind: layout.Kind
    element_count: int
    segment_elements: int
    size: int
    segments: tuple[SegmentPlace, ...]
    read: Callable[[int, Bytes], None]
    place: Place

    def read_segment(self, index: int, scratch: Scratch | None = None) -> Segment:
        """Read one segment into ``scratch``; check its stored checksum, its header and its tiles."""
        entry = self.segments[index]
        data = (scratch or Scratch()).take(entry.size)
        self.read(entry.offset, data)
        return Segment(data, entry, self.place, self.kind)

    def read_whole(self) -> Bytes:
        """The bytes of the record, u8 [size]; every segment is checked against its stored checksum."""
        data = np.empty(self.size, np.uint8)
        self.read(0, data)
        for segment in self.segments:
            segment.check_stored(data[segment.offset : segment.offset + segment.size], self.place)
        return data

    def decode(self, first: int = 0, last: int | None = None) -> Weights:
        """The bits of the weights ``first`` to ``last`` (exclusive), unsigned integers of the size of a weight.

        Reads only the segments that hold them.

        Each is checked against its stored checksum, and against its decoded checksum if all of it is decoded.
        """
        last = self.element_count if last is None else last
        if not 0 <= first <= last <= self.element_count:
            raise errors.UsageError(
                "range of weights", file=self.place.file, tensor=self.place.tensor, found=(first, last)
            )
        out = np.empty(last - first, weights_dtype(self.kind))
        if first == last:
            return out
        for index in range(first // self.segment_elements, (last - 1) // self.segment_elements + 1):
            entry = self.segments[index]
            begin = max(first - entry.first_element, 0)
            end = min(last - entry.first_element, entry.elements)
            target = out[entry.first_element + begin - first : entry.first_element + end - first]
            segment = self.read_segment(index)
            if begin == 0 and end == entry.elements:
                segment.decode(target)
            else:
                segment.decode_range(begin, end, target)
        return out


def open_record(read: Callable[[int, Bytes], None], size: int, place: Place, kind: layout.Kind | None = None) -> Record:
    """Check the header and the directory of a record of ``size`` bytes, of any kind unless one is given.

    Raises RecordHeaderError, VersionError, LimitError, DirectoryError or ChecksumError.
    """
    if size < _HEADER.size + _ENTRY.size or size % layout.RECORD_ALIGNMENT:
        raise errors.RecordHeaderError("a record cannot have this size", **place.at(0), found=size)
    header_bytes = _read_bytes(read, 0, _HEADER.size)
    header = _HEADER.unpack(header_bytes)

    def require(
        field: str, expected: object, correct: bool, error: type[errors.Df11Error] = errors.RecordHeaderError
    ) -> None:
        if not correct:
            offset = next(row[0] for row in _HEADER.table() if row[2] == field)
            raise error(f"record header: {field}", **place.at(offset), expected=expected, found=header[field])

    magic = int.from_bytes(layout.MAGIC, "little")
    require("magic", magic, header["magic"] == magic)
    require("version", layout.VERSION, header["version"] == layout.VERSION, errors.VersionError)
    found = layout.KINDS_BY_CODE.get(header["dtype"])
    if found is None or kind not in (None, found):
        require("dtype", f"1 to {len(layout.KINDS)}" if kind is None else kind.code, False)
    kind = found
    assert kind is not None
    require("reserved_0", 0, header["reserved_0"] == 0)
    require("reserved_1", 0, header["reserved_1"] == 0)
    elements, per_segment, count = header["element_count"], header["segment_elements"], header["segment_count"]
    require(
        "element_count",
        f"1 to {layout.MAX_RECORD_WEIGHTS}",
        1 <= elements <= layout.MAX_RECORD_WEIGHTS,
        errors.LimitError,
    )
    require("record_size", size, header["record_size"] == size)
    require(
        "segment_elements",
        f"a multiple of {layout.TILE_WEIGHTS} up to {layout.MAX_SEGMENT_WEIGHTS}",
        0 < per_segment <= layout.MAX_SEGMENT_WEIGHTS and per_segment % layout.TILE_WEIGHTS == 0,
        errors.LimitError,
    )
    require("segment_count", -(-elements // per_segment), count == -(-elements // per_segment))
    directory_size = _ENTRY.size * count
    require("segment_count", "a directory inside the record", _HEADER.size + directory_size <= size)
    directory = _read_bytes(read, _HEADER.size, directory_size)
    checksum = header_checksum(header_bytes, directory)
    require("header_checksum", checksum, header["header_checksum"] == checksum, errors.ChecksumError)
    segments = tuple(_check_directory(header, directory, kind, place))
    return Record(kind, elements, per_segment, size, segments, read, place)


def _read_bytes(read: Callable[[int, Bytes], None], offset: int, size: int) -> bytes:
    data = np.empty(size, np.uint8)
    read(offset, data)
    return data.tobytes()


def pack_front(segments: Sequence[SegmentPlace], segment_elements: int, kind: layout.Kind = layout.BF16) -> bytes:
    """The header and directory of a record made of these segments, in this order. Their offsets are ignored.

    A segment does not hold its own offset, so that some segments of a record, behind a front of their own, form a
    record too.
    """
    position = _HEADER.size + _ENTRY.size * len(segments)
    directory = b""
    for segment in segments:
        directory += _ENTRY.pack(
            segment_offset=position,
            segment_size=segment.size,
            element_count=segment.elements,
            stored_checksum=segment.stored_checksum,
            decoded_checksum=segment.decoded_checksum,
        )
        position += segment.size
    fields: dict[str, int | bytes] = {
        "magic": layout.MAGIC,
        "version": layout.VERSION,
        "dtype": kind.code,
        "reserved_0": 0,
        "element_count": sum(segment.elements for segment in segments),
        "record_size": position,
        "segment_count": len(segments),
        "segment_elements": segment_elements,
        "header_checksum": 0,
        "reserved_1": 0,
    }
    fields["header_checksum"] = header_checksum(_HEADER.pack(**fields), directory)
    return _HEADER.pack(**fields) + directory


def header_checksum(header: bytes, directory: bytes) -> int:
    """XXH3 of a record header, with zero as its checksum, and of the directory."""
    offset = next(row[0] for row in _HEADER.table() if row[2] == "header_checksum")
    return xxhash.xxh3_64_intdigest(header[:offset] + bytes(8) + header[offset + 8 :] + directory)


def _check_directory(header: dict[str, int], directory: bytes, kind: layout.Kind, place: Place) -> list[SegmentPlace]:
    segments = []
    position = _HEADER.size + len(directory)
    first = 0
    for index in range(header["segment_count"]):
        entry = _ENTRY.unpack(directory, _ENTRY.size * index)
        at = place.at(_HEADER.size + _ENTRY.size * index)
        elements = min(header["segment_elements"], header["element_count"] - first)
        size = entry["segment_size"]
        if entry["segment_offset"] != position:
            raise errors.DirectoryError(
                f"segment {index}: offset", **at, expected=position, found=entry["segment_offset"]
            )
        if entry["element_count"] != elements:
            raise errors.DirectoryError(
                f"segment {index}: element_count", **at, expected=elements, found=entry["element_count"]
            )
        smallest, largest = layout.segment_size_range(elements, kind)
        if not smallest <= size <= largest or size % layout.RECORD_ALIGNMENT:
            raise errors.DirectoryError(
                f"segment {index}: size", **at, expected=f"a multiple of 16 from {smallest} to {largest}", found=size
            )
        segments.append(
            SegmentPlace(position, size, elements, entry["stored_checksum"], entry["decoded_checksum"], first)
        )
        position += size
        first += elements
    if position != header["record_size"]:
        raise errors.DirectoryError(
            "the segments do not end with the record",
            **place.at(_HEADER.size),
            expected=header["record_size"],
            found=position,
        )
    return segments


class Segment:
    """One segment in memory, checked: stored checksum, header, code table, tiles."""

    def __init__(
        self,
        data: Bytes,
        entry: SegmentPlace,
        place: Place,
        kind: layout.Kind = layout.BF16,
        *,
        trusted: bool = False,
    ) -> None:
        """``trusted``: both checksums have just been computed, or checked, and are not checked again."""
        self.data = data
        self.entry = entry
        self.place = place
        self.kind = kind
        self._trusted = trusted
        if not trusted:
            entry.check_stored(data, place)
        self.header = layout.SEGMENT_HEADER.unpack(data[: layout.SEGMENT_HEADER.size].tobytes())
        self._check_header()
        self.coded = self.header["encoding"] != layout.ENCODING_RAW
        if self.coded:
            self._check_tiles()
            self.table = self._build_table()

    def _check_header(self) -> None:
        header, entry = self.header, self.entry
        expected = {"element_count": entry.elements, "segment_size": entry.size}
        left_out = header["encoding"] - layout.ENCODING_CODED
        if 0 <= left_out <= self.kind.most_left_out:
            if not 1 <= header["alphabet_size"] <= 256:
                raise errors.SegmentHeaderError(
                    "segment header: alphabet_size", **self._at(2), expected="1 to 256", found=header["alphabet_size"]
                )
            if header["lane_bytes"] not in (1, 2):
                raise errors.SegmentHeaderError(
                    "segment header: lane_bytes", **self._at(1), expected="1 or 2", found=header["lane_bytes"]
                )
            expected |= layout.segment_sections(
                entry.elements, header["alphabet_size"], header["lane_bytes"], self.kind, left_out
            )
        elif header["encoding"] == layout.ENCODING_RAW:
            names = (
                "lane_bytes",
                "alphabet_size",
                "tiles_offset",
                "lanes_offset",
                "sign_mantissa_offset",
                "exception_count",
            )
            expected |= dict.fromkeys(names, 0) | {"stream_offset": layout.SEGMENT_HEADER.size}
            if entry.size != layout.raw_segment_size(entry.elements, self.kind):
                raise errors.SegmentHeaderError(
                    "a raw segment does not have the size of its weights",
                    **self._at(24),
                    expected=layout.raw_segment_size(entry.elements, self.kind),
                    found=entry.size,
                )
        else:
            raise errors.SegmentHeaderError(
                "segment header: encoding",
                **self._at(0),
                expected=f"0 to {layout.ENCODING_CODED + self.kind.most_left_out}",
                found=header["encoding"],
            )
        for offset, _, field in layout.SEGMENT_HEADER.table():
            if field in expected and header[field] != expected[field]:
                raise errors.SegmentHeaderError(
                    f"segment header: {field}", **self._at(offset), expected=expected[field], found=header[field]
                )
        if header["encoding"] != layout.ENCODING_RAW and header["stream_offset"] + layout.STREAM_END > entry.size:
            raise errors.SegmentHeaderError(
                "the sections do not fit the segment",
                **self._at(20),
                expected=entry.size,
                found=header["stream_offset"],
            )

    def _check_tiles(self) -> None:
        header = self.header
        tiles = layout.tile_count(self.entry.elements)
        start = header["tiles_offset"]
        words = self.data[start : start + 8 * tiles].view("<u8")
        positions = (words & np.uint64(0xFFFFFFFF)).astype(np.int64)
        shortest = ((words >> np.uint64(32)) & np.uint64(0xFFFF)).astype(np.int64)
        exceptions = (words >> np.uint64(48)).astype(np.int64)
        start, size = header["lanes_offset"], layout.LANES * header["lane_bytes"] * tiles
        lanes = self.data[start : start + size].view(f"<u{header['lane_bytes']}").reshape(tiles, layout.LANES)
        bits = lanes.sum(axis=1, dtype=np.int64) + layout.LANES * shortest
        units = -(-(-(-bits // 32) * 4 + 4 * exceptions) // layout.STREAM_UNIT)
        ends = np.cumsum(units)
        wrong = np.flatnonzero(positions != ends - units)
        if wrong.size:
            tile = int(wrong[0])
            raise errors.TileError(
                f"tile {tile}: stream_position",
                **self._at(header["tiles_offset"] + 8 * tile),
                expected=int(ends[tile] - units[tile]),
                found=int(positions[tile]),
            )
        end = header["stream_offset"] + layout.STREAM_UNIT * int(ends[-1]) + layout.STREAM_END
        if end != self.entry.size:
            raise errors.TileError(
                "the tiles do not fill the stream",
                **self._at(header["tiles_offset"]),
                expected=self.entry.size,
                found=end,
            )
        total = int(exceptions.sum())
        if total != header["exception_count"]:
            raise errors.TileError(
                "exceptions of the tiles", **self._at(28), expected=header["exception_count"], found=total
            )

    def _build_table(self) -> kernels.Table:
        section = self.data[layout.SEGMENT_HEADER.size : self.header["tiles_offset"]]
        table = kernels.build_decode_table(section, self.header["alphabet_size"], self.kind)
        if isinstance(table, int):
            what = {
                kernels.BAD_ALPHABET: "the alphabet does not ascend, or beyond the exponents of the dtype",
                kernels.BAD_LENGTH: "a code length is beyond 12",
                kernels.INCOMPLETE_CODE: "the code is not complete",
            }
            raise errors.CodeTableError(f"code table: {what[table]}", **self._at(layout.SEGMENT_HEADER.size))
        return table

    def _at(self, offset: int) -> dict[str, Any]:
        return self.place.at(self.entry.offset + offset)

    def decode(self, out: Weights) -> None:
        """Decode all weights into ``out`` and, unless the segment is trusted, check the decoded checksum."""
        self._decode_tiles(0, layout.tile_count(self.entry.elements), out, compare=False)
        if not self._trusted:
            self._check_decoded(out)

    def _check_decoded(self, weights: Weights) -> None:
        decoded = xxhash.xxh3_64_intdigest(weights)
        if decoded != self.entry.decoded_checksum:
            raise errors.ChecksumError(
                "the decoded weights are not the encoded ones",
                **self._at(0),
                expected=f"{self.entry.decoded_checksum:016x}",
                found=f"{decoded:016x}",
            )

    def decode_range(self, first: int, last: int, out: Weights) -> None:
        """Decode the weights ``first`` to ``last`` (exclusive) of the segment into ``out``. Other tiles are skipped."""
        tile, end = first // layout.TILE_WEIGHTS, layout.tile_count(last)
        count = min(end * layout.TILE_WEIGHTS, self.entry.elements) - tile * layout.TILE_WEIGHTS
        whole = np.empty(count, weights_dtype(self.kind))
        self._decode_tiles(tile, end, whole, compare=False)
        out[:] = whole[first - tile * layout.TILE_WEIGHTS : last - tile * layout.TILE_WEIGHTS]

    def compare(self, weights: Weights) -> None:
        """Decode all weights, compare them with ``weights``, and check the decoded checksum.

        Raises a DifferenceError that names the tile that differs.
        """
        self._decode_tiles(0, layout.tile_count(self.entry.elements), weights, compare=True)
        if not self._trusted:
            self._check_decoded(weights)

    def _decode_tiles(self, first: int, last: int, out: Weights, *, compare: bool) -> None:
        header = self.header
        if not self.coded:
            width = self.kind.bytes
            begin = layout.SEGMENT_HEADER.size + width * layout.TILE_WEIGHTS * first
            weights = self.data[begin : begin + width * len(out)].view(weights_dtype(self.kind))
            if not compare:
                out[:] = weights
                return
            for start in range(0, len(out), layout.TILE_WEIGHTS):  # In small steps, as a comparison takes memory.
                if not np.array_equal(
                    out[start : start + layout.TILE_WEIGHTS], weights[start : start + layout.TILE_WEIGHTS]
                ):
                    raise errors.DifferenceError("decoded weights differ", **self._at(begin + width * start))
            return
        status, tile = kernels.decode_tiles(self.data, self.table, self.kind, header, first, last, out, compare=compare)
        if status == kernels.OK:
            return
        at = self._at(header["tiles_offset"] + 8 * tile)
        if status == kernels.DIFFERENT:
            raise errors.DifferenceError(f"tile {tile}: decoded weights differ", **at)
        if status == kernels.BAD_LANE:
            raise errors.LaneError(f"tile {tile}: a lane does not end where its length says", **at)
        what = (
            "lane lengths or exceptions do not fit"
            if status == kernels.BAD_TILE
            else "an exception lies outside the tile or out of order"
        )
        raise errors.TileError(f"tile {tile}: {what}", **at)
