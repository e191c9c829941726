"""A second encoder, as simple as the reference decoder: records and containers made by hand, for vectors and tests.

It shares nothing with df11.converter but the structures of df11.formats.layout, which tests/formats/test_spec.py checks
against SPEC.md. It can make what the reference writer never makes: any legal code, order and padding, and files that
break one rule."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from df11.formats import layout

Lengths = Mapping[int, int]
"""Code length in bits of each symbol, e1 << 8 | e0."""


def exponent(weight: int, kind: layout.Kind = layout.BF16) -> int:
    """The exponent of a weight: of BF16 the bits 14-7."""
    return weight >> kind.mantissa_bits & (1 << kind.exponent_bits) - 1


def planes(weights: Sequence[int], kind: layout.Kind, left_out: int = 0, pad: int = 0) -> list[bytes]:
    """The planes of weights, without padding; bits of weights that do not exist are those of ``pad``."""
    sign = 8 * kind.bytes - 1
    raw = [weight >> sign << kind.mantissa_bits | weight & (1 << kind.mantissa_bits) - 1 for weight in weights]
    found, shift = [], kind.mantissa_bits + 1
    for bits in kind.planes[: len(kind.planes) - left_out]:
        shift -= bits
        plane = bytearray()
        for first in range(0, len(raw), 256):
            chunk = bytearray([pad]) * (32 * bits)
            for x, value in enumerate(raw[first : first + 256]):
                at, low = x % (32 * bits), x // (32 * bits) * bits
                mask = (1 << bits) - 1
                chunk[at] = chunk[at] & ~(mask << low) | (value >> shift & mask) << low
            plane += chunk
        found.append(bytes(plane[: len(raw)] if bits == 8 else plane))
    return found


def symbol(first: int, second: int) -> int:
    """The symbol of two exponents."""
    return second << 8 | first


def u16s(weights: Iterable[int], kind: layout.Kind = layout.BF16) -> bytes:
    """Weights as bytes."""
    values = list(weights)
    return struct.pack(f"<{len(values)}{' BH I'[kind.bytes]}", *values)


def padded(data: bytes, pad: int = 0, alignment: int = 16) -> bytes:
    """``data``, padded with bytes ``pad`` to a multiple of ``alignment``."""
    return data + bytes([pad]) * (-len(data) % alignment)


# The code.


def balanced(symbols: Collection[int]) -> dict[int, int]:
    """A complete code whose lengths differ by at most one; a single symbol gets length 1."""
    ordered = sorted(symbols)
    if len(ordered) == 1:
        return {ordered[0]: 1}
    longer = (len(ordered) - 1).bit_length()
    short = 2**longer - len(ordered)
    return {symbol: longer - (place < short) for place, symbol in enumerate(ordered)}


def staircase(symbols: Sequence[int]) -> dict[int, int]:
    """A complete code with lengths 1, 2, 3 and so on; the last two are equal."""
    return {symbol: min(place + 1, len(symbols) - 1) for place, symbol in enumerate(symbols)}


def canonical_codes(lengths: Lengths) -> dict[int, str]:
    """The canonical code of each symbol, as text of 0 and 1, first bit first."""
    codes = {}
    code = previous = 0
    for length, value in sorted((length, value) for value, length in lengths.items()):
        code <<= length - previous
        codes[value] = f"{code:0{length}b}"
        code += 1
        previous = length
    return codes


def code_table(lengths: Lengths) -> tuple[int, bytes]:
    """(alphabet size, the code table section without padding)."""
    alphabet = sorted({e for value in lengths for e in (value & 255, value >> 8)})
    grid = [lengths.get(symbol(first, second), 0) for second in alphabet for first in alphabet]
    halves = iter([*grid, 0] if len(grid) % 2 else grid)
    return len(alphabet), bytes(alphabet) + bytes(low | high << 4 for low, high in zip(halves, halves, strict=True))


def unchanged(_: object) -> None:
    """Change nothing."""


# The segment.


@dataclass(frozen=True)
class Tile:
    """The codes of 32 lanes, as text, and the exceptions, (position, weight)."""

    lanes: list[str]
    exceptions: list[tuple[int, int]]

    def stored(self, pad: int) -> bytes:
        """The tile's bytes in the code stream."""
        bits = "".join(self.lanes)
        bits += f"{pad:08b}"[-1] * (-len(bits) % 32)
        codes = int(bits[::-1], 2).to_bytes(len(bits) // 8, "little")
        listed = b"".join(
            layout.EXCEPTION.pack(position=position, weight=weight) for position, weight in self.exceptions
        )
        return padded(codes + listed, pad)


@functools.cache
def _stand_in(wanted: tuple[int, ...], codes: tuple[tuple[int, int], ...]) -> int:
    # The coded symbol for a pair without a code, or for its only existing weight: the shortest code that shares an
    # exponent with it (on a tie, the first exponent), else the shortest code. codes: (symbol, length), by length, then
    # by symbol.
    sharing = [
        (length, place, value)
        for place, e in enumerate(wanted)
        for value, length in codes
        if (value >> 8 * place) & 255 == e
    ]
    return min(sharing)[2] if sharing else codes[0][0]


def encode_tile(weights: Sequence[int], codes: Mapping[int, str], kind: layout.Kind = layout.BF16) -> Tile:
    """The tile of at most 8192 weights."""
    lanes, exceptions = [], []
    listed = tuple((value, len(code)) for value, code in codes.items())
    for lane in range(32):
        bits = []
        for chunk in range(-(-len(weights) // 256)):
            for at in range(256 * chunk + 8 * lane, 256 * chunk + 8 * lane + 8, 2):
                pair = weights[at : at + 2]
                wanted = tuple(exponent(weight, kind) for weight in pair)
                coded = symbol(*wanted) if len(pair) == 2 and symbol(*wanted) in codes else _stand_in(wanted, listed)
                bits.append(codes[coded])
                exceptions += [
                    (at + i, weight >> 16 if kind.bytes == 4 else weight)
                    for i, weight in enumerate(pair)
                    if exponent(weight, kind) != (coded >> 8 * i) & 255
                ]
        lanes.append("".join(bits))
    return Tile(lanes, exceptions)


def coded_segment(
    weights: Sequence[int],
    lengths: Lengths,
    kind: layout.Kind = layout.BF16,
    *,
    left_out: int = 0,
    lane_bytes: int = 1,
    pad: int = 0,
    codes: Mapping[int, str] | None = None,
    edit: Callable[[list[Tile]], None] = unchanged,
    **fields: int,
) -> bytes:
    """A coded segment.

    ``left_out``: planes at the end. ``pad``: value of padding bytes. ``codes``: to use instead of the canonical ones.
    ``edit`` changes the tiles. ``fields``: of the header.
    """
    tiles = [
        encode_tile(weights[first : first + 8192], codes or canonical_codes(lengths), kind)
        for first in range(0, len(weights), 8192)
    ]
    edit(tiles)
    alphabet_size, table = code_table(lengths)
    sections = {"tiles_offset": padded(bytes(32) + table, pad)}
    descriptors, lane_lengths, stream = b"", b"", b""
    for tile in tiles:
        shortest = min(map(len, tile.lanes))
        descriptors += layout.TILE_DESCRIPTOR.pack(
            stream_position=len(stream) // 16, shortest_lane=shortest, exception_count=len(tile.exceptions)
        )
        lane_lengths += b"".join((len(lane) - shortest).to_bytes(lane_bytes, "little") for lane in tile.lanes)
        stream += tile.stored(pad)
    sections["lanes_offset"] = padded(sections["tiles_offset"] + descriptors, pad)
    sections["sign_mantissa_offset"] = sections["lanes_offset"] + lane_lengths
    stored = b"".join(padded(plane, pad) for plane in planes(weights, kind, left_out, pad))
    sections["stream_offset"] = sections["sign_mantissa_offset"] + stored
    segment = sections["stream_offset"] + stream + bytes([pad]) * 16
    header: dict[str, Any] = {name: len(data) for name, data in sections.items()}
    header |= {
        "encoding": 1 + left_out,
        "lane_bytes": lane_bytes,
        "alphabet_size": alphabet_size,
        "element_count": len(weights),
        "segment_size": len(segment),
        "exception_count": sum(len(tile.exceptions) for tile in tiles),
    }
    return layout.SEGMENT_HEADER.pack(**header | fields) + segment[32:]


def raw_segment(weights: Sequence[int], kind: layout.Kind = layout.BF16, *, pad: int = 0, **fields: int) -> bytes:
    """A raw segment; ``fields`` of the header."""
    segment = padded(bytes(32) + u16s(weights, kind), pad)
    header = dict.fromkeys(layout.SEGMENT_HEADER.fields, 0) | {
        "element_count": len(weights),
        "stream_offset": 32,
        "segment_size": len(segment),
    }
    return layout.SEGMENT_HEADER.pack(**header | fields) + segment[32:]


# The record.


def xxh3(data: bytes) -> int:
    """XXH3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def seal(header: Mapping[str, Any], directory: bytes) -> bytes:
    """A record header with its checksum, and the directory."""
    unsealed = layout.RECORD_HEADER.pack(**dict(header) | {"header_checksum": 0})
    return layout.RECORD_HEADER.pack(**dict(header) | {"header_checksum": xxh3(unsealed + directory)}) + directory


def record(
    segments: Sequence[tuple[bytes, Sequence[int]]],
    segment_elements: int = layout.DEFAULT_SEGMENT_WEIGHTS,
    kind: layout.Kind = layout.BF16,
    *,
    entry: Mapping[str, int] | None = None,
    **fields: int | bytes,
) -> bytes:
    """A record of (segment, its weights) pairs.

    ``entry`` changes fields of the last directory entry, ``fields`` those of the record header.
    """
    position = 48 + 32 * len(segments)
    directory = b""
    for place, (segment, weights) in enumerate(segments):
        values = {
            "segment_offset": position,
            "segment_size": len(segment),
            "element_count": len(weights),
            "stored_checksum": xxh3(segment),
            "decoded_checksum": xxh3(u16s(weights, kind)),
        }
        last = place == len(segments) - 1
        directory += layout.DIRECTORY_ENTRY.pack(**values | dict(entry or {}) if last else values)
        position += len(segment)
    header: dict[str, Any] = {
        "magic": layout.MAGIC,
        "version": 1,
        "dtype": kind.code,
        "reserved_0": 0,
        "element_count": sum(len(weights) for _, weights in segments),
        "record_size": position,
        "segment_count": len(segments),
        "segment_elements": segment_elements,
        "reserved_1": 0,
    }
    return seal(header | fields, directory) + b"".join(segment for segment, _ in segments)


def resealed(data: bytes) -> bytes:
    """A record with changed bytes, and corrected checksums of stored bytes where its directory still makes sense."""
    changed = bytearray(data)
    count = layout.RECORD_HEADER.unpack(changed)["segment_count"]
    end = 48 + 32 * count
    if end > len(changed):
        return data
    for at in range(48, end, 32):
        entry: dict[str, Any] = layout.DIRECTORY_ENTRY.unpack(changed, at)
        start = entry["segment_offset"]
        entry["stored_checksum"] = xxh3(bytes(changed[start : start + entry["segment_size"]]))
        changed[at : at + 32] = layout.DIRECTORY_ENTRY.pack(**entry)
    header: dict[str, Any] = layout.RECORD_HEADER.unpack(changed)
    header["magic"] = bytes(changed[:4])
    changed[:end] = seal(header, bytes(changed[48:end]))
    return bytes(changed)


# The container.


@dataclass(frozen=True)
class Tensor:
    """A tensor to store.

    ``stored``: its record, or its own bytes if verbatim. ``exact``: if it was cast, whether nothing was lost.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    decoded: bytes
    stored: bytes | None = None
    exact: bool | None = None
    source: bytes | None = None
    """The bytes in the source, if they are not ``decoded``."""

    @property
    def source_bytes(self) -> bytes:
        """The tensor's bytes in the source file."""
        return self.decoded if self.source is None else self.source

    @property
    def stored_bytes(self) -> bytes:
        """The entry's bytes in the container."""
        return self.decoded if self.stored is None else self.stored


def bf16(name: str, weights: Sequence[int], stored: bytes | None, shape: tuple[int, ...] | None = None) -> Tensor:
    """A BF16 tensor, one-dimensional unless a shape is given; verbatim if ``stored`` is None."""
    return Tensor(name, "BF16", (len(weights),) if shape is None else shape, u16s(weights), stored)


def of_kind(name: str, weights: Sequence[int], kind: layout.Kind, stored: bytes | None) -> Tensor:
    """A one-dimensional tensor of any dtype that has records."""
    return Tensor(name, kind.dtype, (len(weights),), u16s(weights, kind), stored)


def compact(value: object) -> bytes:
    """JSON in UTF-8 without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def raw_frame(data: bytes) -> bytes:
    """A Zstandard frame that stores ``data`` uncompressed (RFC 8878), independent of a compressor's release."""
    blocks = [data[start : start + (1 << 17)] for start in range(0, len(data), 1 << 17)] or [b""]
    stored = b"".join(
        (len(block) << 3 | (place == len(blocks) - 1)).to_bytes(3, "little") + block
        for place, block in enumerate(blocks)
    )
    return bytes.fromhex("28b52ffd a0") + len(data).to_bytes(4, "little") + stored


def padded_frame(data: bytes, size: int) -> bytes:
    """The same with spaces behind, up to ``size`` bytes, in blocks of one repeated byte."""
    frame = raw_frame(data)
    last = len(frame) - len(data) - 3  # Where the header of its only block is.
    frame = frame[:5] + size.to_bytes(4, "little") + bytes([frame[last] & 0xFE]) + frame[last + 1 :]
    left = size - len(data)
    while left:
        count = min(left, 1 << 17)
        left -= count
        frame += (count << 3 | 2 | (not left)).to_bytes(3, "little") + b" "
    return frame


def safetensors_file(
    tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None, padding: int = 0
) -> tuple[bytes, bytes]:
    """(header, data) of the source of some tensors."""
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for tensor in tensors:
        content = tensor.source_bytes
        dtype = tensor.dtype if tensor.exact is None else "F32"
        document[tensor.name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return compact(document) + b" " * padding, data


def container(
    tensors: Sequence[Tensor],
    *,
    source_header: bytes | None = None,
    source_data: bytes | None = None,
    edit: Callable[[dict[str, Any]], None] = unchanged,
    alignment: int = 64,
) -> bytes:
    """A `.df11` file of the tensors in the given order.

    ``edit`` changes its header before it is written; ``alignment``: that of the data.
    """
    default_header, default_data = safetensors_file(tensors)
    source_header = default_header if source_header is None else source_header
    source_data = default_data if source_data is None else source_data
    source = len(source_header).to_bytes(8, "little") + source_header + source_data
    objects: dict[str, dict[str, Any]] = {}
    entries: dict[str, Any] = {}
    data = b""
    for tensor in tensors:
        stored = tensor.stored_bytes
        value: dict[str, Any] = {
            "encoding": "verbatim" if tensor.stored is None else "df11",
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
        }
        if tensor.exact is not None:
            value["exact"] = tensor.exact
        if tensor.stored is None:
            value["xxh3"] = f"{xxh3(stored):016x}"
        objects[tensor.name] = value
        entries[tensor.name] = {
            "dtype": tensor.dtype if tensor.stored is None else "U8",
            "shape": list(tensor.shape) if tensor.stored is None else [len(stored)],
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    cast = "bf16" if any(tensor.exact is not None for tensor in tensors) else None
    dtypes = {tensor.dtype for tensor in tensors if tensor.stored is not None}
    metadata = {
        "df11.version": "1",
        "df11.requires": compact(
            [kind.feature for kind in layout.KINDS.values() if kind.dtype in dtypes - {"BF16"}]
        ).decode(),
        "df11.writer": "df11 test vectors",
        "df11.source": compact(
            {
                "bytes": len(source),
                "sha256": hashlib.sha256(source).hexdigest(),
                "header_bytes": len(source_header),
                "cast": cast,
            }
        ).decode(),
        "df11.source_header": base64.b64encode(raw_frame(source_header)).decode(),
        "df11.tensors": compact(objects).decode(),
    }
    document = {"__metadata__": metadata, **entries}
    edit(document)
    return with_header(compact(document), data, alignment)


def with_header(header: bytes, data: bytes, alignment: int = 64) -> bytes:
    """A safetensors file. Its header is padded so that the data starts at a multiple of ``alignment``."""
    header = padded(bytes(8) + header, 0x20, alignment)[8:]
    return len(header).to_bytes(8, "little") + header + data


def split(file: bytes) -> tuple[bytes, bytes]:
    """(JSON header, data) of a safetensors file."""
    size = int.from_bytes(file[:8], "little")
    return file[8 : 8 + size], file[8 + size :]


@contextmanager
def json_value(document: Mapping[str, Any], key: str) -> Iterator[Any]:
    """The JSON value of a metadata key, to be changed in place."""
    value = json.loads(document["__metadata__"][key])
    yield value
    document["__metadata__"][key] = compact(value).decode()
