"""Every structure, constant and limit of the container, declared once. tests/formats/test_spec.py compares SPEC.md."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

VERSION: Final = 1

LANES: Final = 32
"""Lanes of a tile, one for each thread of a warp."""
LANE_WEIGHTS: Final = 256
TILE_WEIGHTS: Final = LANES * LANE_WEIGHTS
CHUNK_LANE_WEIGHTS: Final = 8
"""Consecutive weights of one lane in a chunk: a 16-byte store."""
CHUNK_WEIGHTS: Final = LANES * CHUNK_LANE_WEIGHTS
CODE_LIMIT: Final = 12
"""The longest code in bits; the decoding table has 2**12 entries."""
DEFAULT_SEGMENT_WEIGHTS: Final = 1 << 21

RECORD_ALIGNMENT: Final = 16
DATA_ALIGNMENT: Final = 64
STREAM_UNIT: Final = 16
"""Unit of a tile's stream position, in bytes."""
STREAM_END: Final = 16
"""Zero bytes after the last tile, so that 8-byte loads stay inside."""

MAX_JSON_HEADER: Final = 100_000_000
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 64
MAX_TENSOR_BYTES: Final = (1 << 63) - 1
"""Of the sizes of a tensor that are not 0: what NumPy and torch can hold, who count strides of empty tensors, too."""
MAX_JSON_DEPTH: Final = 127
"""Objects and lists inside each other, the outermost one included: safetensors' own."""
MAX_SOURCE_HEADER_BASE: Final = 8 << 20
MAX_SOURCE_HEADER_RATIO: Final = 8
MAX_RECORD_WEIGHTS: Final = 1 << 40
MAX_SEGMENT_WEIGHTS: Final = 1 << 24

MAGIC: Final = b"DF11"
ENCODING_RAW: Final = 0
ENCODING_CODED: Final = 1
"""With all planes; each one that is left out at the end adds 1."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A dtype that records can hold, and how its weights are split: SPEC.md, section 1."""

    dtype: str
    """As safetensors spells it."""
    code: int
    """``dtype`` of the record header."""
    bytes: int
    """Of a weight."""
    exponent_bits: int
    planes: tuple[int, ...]
    """Bits of a weight in each plane of its other bits, from the sign down."""
    feature: str | None
    """What ``df11.requires`` names if a file has such a record."""

    @property
    def mantissa_bits(self) -> int:
        """Bits below the exponent."""
        return 8 * self.bytes - 1 - self.exponent_bits

    @property
    def most_left_out(self) -> int:
        """Planes at the end that may be left out: those of whole bytes, but not the first."""
        return sum(bits == 8 for bits in self.planes[1:])

    def least_size(self, weights: int) -> int:
        """Bytes that the bits of weights take in planes that cannot be left out."""
        return -(-weights * sum(self.planes[: len(self.planes) - self.most_left_out]) // 8)

    def plane_sizes(self, weights: int) -> tuple[int, ...]:
        """Bytes of each plane of a segment of this many weights, without padding."""
        chunks = -(-weights // CHUNK_WEIGHTS)
        return tuple(weights if bits == 8 else CHUNK_WEIGHTS // 8 * bits * chunks for bits in self.planes)


BF16: Final = Kind("BF16", 1, 2, 8, (8,), None)
F16: Final = Kind("F16", 2, 2, 5, (1, 2, 8), "F16-records")
F32: Final = Kind("F32", 3, 4, 8, (8, 8, 8), "F32-records")
F8_E4M3: Final = Kind("F8_E4M3", 4, 1, 4, (4,), "F8_E4M3-records")
F8_E5M2: Final = Kind("F8_E5M2", 5, 1, 5, (1, 2), "F8_E5M2-records")
KINDS: Final[Mapping[str, Kind]] = {kind.dtype: kind for kind in (BF16, F16, F32, F8_E4M3, F8_E5M2)}
"""By dtype, as safetensors spells it."""
KINDS_BY_CODE: Final[Mapping[int, Kind]] = {kind.code: kind for kind in KINDS.values()}
KNOWN_FEATURES: Final = frozenset(kind.feature for kind in KINDS.values() if kind.feature is not None)

METADATA_VERSION: Final = "df11.version"
METADATA_REQUIRES: Final = "df11.requires"
METADATA_WRITER: Final = "df11.writer"
METADATA_SOURCE: Final = "df11.source"
METADATA_SOURCE_HEADER: Final = "df11.source_header"
METADATA_TENSORS: Final = "df11.tensors"
METADATA_MADE_FROM: Final = "df11.made_from"
"""Not required."""
METADATA_KEYS: Final = (
    METADATA_VERSION,
    METADATA_REQUIRES,
    METADATA_WRITER,
    METADATA_SOURCE,
    METADATA_SOURCE_HEADER,
    METADATA_TENSORS,
)


class Structure:
    """A little-endian structure without gaps: field name -> `struct` format character(s)."""

    def __init__(self, name: str, fields: Mapping[str, str]) -> None:
        self.name = name
        self.fields = dict(fields)
        self._struct = struct.Struct("<" + "".join(fields.values()))

    @property
    def size(self) -> int:
        """Bytes of the structure."""
        return self._struct.size

    def table(self) -> list[tuple[int, int, str]]:
        """(offset, size, field) of each field; sizes in bytes."""
        rows, offset = [], 0
        for field, code in self.fields.items():
            size = struct.calcsize("<" + code)
            rows.append((offset, size, field))
            offset += size
        return rows

    def pack(self, **values: int | bytes) -> bytes:
        """The bytes of the structure; every field must be given."""
        return self._struct.pack(*(values[field] for field in self.fields))

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> dict[str, int]:
        """Field values of the structure that starts at ``offset``. Bytes come as little-endian integers."""
        values = self._struct.unpack_from(data, offset)
        return {
            field: int.from_bytes(value, "little") if isinstance(value, bytes) else value
            for field, value in zip(self.fields, values, strict=True)
        }


RECORD_HEADER: Final = Structure(
    "Record header",
    {
        "magic": "4s",
        "version": "B",
        "dtype": "B",
        "reserved_0": "H",
        "element_count": "Q",
        "record_size": "Q",
        "segment_count": "I",
        "segment_elements": "I",
        "header_checksum": "Q",
        "reserved_1": "Q",
    },
)
DIRECTORY_ENTRY: Final = Structure(
    "Directory entry",
    {"segment_offset": "Q", "segment_size": "I", "element_count": "I", "stored_checksum": "Q", "decoded_checksum": "Q"},
)
SEGMENT_HEADER: Final = Structure(
    "Segment header",
    {
        "encoding": "B",
        "lane_bytes": "B",
        "alphabet_size": "H",
        "element_count": "I",
        "tiles_offset": "I",
        "lanes_offset": "I",
        "sign_mantissa_offset": "I",
        "stream_offset": "I",
        "segment_size": "I",
        "exception_count": "I",
    },
)
TILE_DESCRIPTOR: Final = Structure(
    "Tile descriptor", {"stream_position": "I", "shortest_lane": "H", "exception_count": "H"}
)
EXCEPTION: Final = Structure("Exception", {"position": "H", "weight": "H"})
STRUCTURES: Final = (RECORD_HEADER, DIRECTORY_ENTRY, SEGMENT_HEADER, TILE_DESCRIPTOR, EXCEPTION)


def align(value: int, alignment: int = RECORD_ALIGNMENT) -> int:
    """``value`` rounded up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment


def most_source_header(header: int) -> int:
    """The largest source header, in bytes, that a container may hold whose own header has ``header`` bytes."""
    return min(MAX_JSON_HEADER, MAX_SOURCE_HEADER_BASE + MAX_SOURCE_HEADER_RATIO * header)


def tile_count(weights: int) -> int:
    """Tiles that cover this many weights."""
    return -(-weights // TILE_WEIGHTS)


def raw_segment_size(weights: int, kind: Kind = BF16) -> int:
    """Bytes of a raw segment of this many weights."""
    return align(SEGMENT_HEADER.size + kind.bytes * weights)


def segment_size_range(weights: int, kind: Kind = BF16) -> tuple[int, int]:
    """Smallest and largest size in bytes of a segment of this many weights: what is never left out of it, and raw."""
    return align(SEGMENT_HEADER.size + kind.least_size(weights)), raw_segment_size(weights, kind)


def segment_sections(
    weights: int, alphabet_size: int, lane_bytes: int, kind: Kind = BF16, left_out: int = 0
) -> dict[str, int]:
    """The four section offsets of a coded segment, in bytes from its start (SPEC.md, section 5).

    ``left_out``: planes that are left out at the end.
    """
    tiles = tile_count(weights)
    tiles_offset = align(SEGMENT_HEADER.size + alphabet_size + (alphabet_size * alphabet_size + 1) // 2)
    lanes_offset = align(tiles_offset + TILE_DESCRIPTOR.size * tiles)
    sign_mantissa_offset = lanes_offset + LANES * lane_bytes * tiles
    planes = kind.plane_sizes(weights)[: len(kind.planes) - left_out]
    return {
        "tiles_offset": tiles_offset,
        "lanes_offset": lanes_offset,
        "sign_mantissa_offset": sign_mantissa_offset,
        "stream_offset": sign_mantissa_offset + sum(map(align, planes)),
    }
