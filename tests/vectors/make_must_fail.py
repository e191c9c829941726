"""The files that must be refused: each breaks one rule of formats/SPEC.md, and all checksums but the one that it is about are right."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from df11.formats import errors
from tests.vectors import forge

CODE: Final = forge.balanced([forge.symbol(a, b) for a in (120, 121) for b in (120, 121)])
WEIGHTS: Final = [(i * 77 & 0x80) << 8 | (120 + (i * i >> 3) % 2) << 7 | i & 0x7F for i in range(299)] + [0x7FC0]
"""300 weights; the last is an exception."""


@dataclass(frozen=True)
class MustFail:
    """A file to refuse: the rule it breaks, the error that readers raise, and whether the reference decoder looks at this rule."""

    name: str
    rule: str
    error: type[errors.Df11Error]
    file: bytes = field(repr=False)
    reference: bool


Change = Callable[[dict[str, Any]], None]
CASES: Final[list[MustFail]] = []


def case(name: str, rule: str, error: type[errors.Df11Error], file: bytes, *, reference: bool = True) -> None:
    """Register a file."""
    CASES.append(MustFail(name, rule, error, file, reference))


def one(record: bytes, weights: Sequence[int] = WEIGHTS) -> bytes:
    """A container of one record."""
    return forge.container([forge.bf16("w", weights, record)])


def coded(weights: Sequence[int] = WEIGHTS, code: forge.Lengths = CODE, **options: Any) -> bytes:
    """A container of one record of one coded segment."""
    return one(forge.record([(forge.coded_segment(weights, code, **options), weights)]), weights)


def raw(**fields: int) -> bytes:
    """A container of one record of one raw segment of nine weights."""
    weights = WEIGHTS[:9]
    return one(forge.record([(forge.raw_segment(weights, **fields), weights)]), weights)


def patched(segment: bytes, offset: int, data: bytes) -> bytes:
    """A container of one record whose segment holds ``data`` at ``offset``."""
    segment = segment[:offset] + data + segment[offset + len(data) :]
    return one(forge.record([(segment, WEIGHTS)]))


GOOD_SEGMENT: Final = forge.coded_segment(WEIGHTS, CODE)
GOOD_RECORD: Final = forge.record([(GOOD_SEGMENT, WEIGHTS)])
RECORD: Final = forge.bf16("w", WEIGHTS, GOOD_RECORD)
NUMBERS: Final = forge.Tensor("n", "I16", (4,), bytes(range(8)))


def changed(change: Change, *tensors: forge.Tensor) -> bytes:
    """A container of a record and a verbatim tensor, or of other tensors, with its header changed."""
    return forge.container(tensors or (RECORD, NUMBERS), edit=change)


def metadata(key: str, value: str | None) -> Change:
    """Set a key of the metadata, or, with None, remove it."""

    def change(header: dict[str, Any]) -> None:
        del header["__metadata__"][key]
        if value is not None:
            header["__metadata__"][key] = value

    return change


def member(key: str, path: tuple[str, ...], value: object) -> Change:
    """Set a member of the JSON value of a metadata key, or, with ``...``, remove it."""

    def change(header: dict[str, Any]) -> None:
        with forge.json_value(header, key) as inner:
            for name in path[:-1]:
                inner = inner[name]
            del inner[path[-1]]
            if value is not ...:
                inner[path[-1]] = value

    return change


def added(key: str, path: tuple[str, ...], value: object) -> Change:
    """Add a member to the JSON value of a metadata key."""

    def change(header: dict[str, Any]) -> None:
        with forge.json_value(header, key) as inner:
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value

    return change


def entry(name: str, **members: object) -> Change:
    """Change members of an entry of the header."""
    return lambda header: header[name].update(members)


# Section 2: safetensors framing.

GOOD: Final = changed(forge.unchanged)
SIZE: Final = len(GOOD_RECORD)
HEADER, DATA = forge.split(GOOD)


def with_text(header: bytes, data: bytes = DATA) -> bytes:
    """A file with a header that is given as text."""
    return forge.with_header(header.rstrip(b" "), data)


case("file_too_short", "a file has at least the 8 bytes of its header's size", errors.TruncatedFileError, GOOD[:7])
case("file_ends_in_header", "a file holds its whole header", errors.TruncatedFileError, GOOD[:100])
case("file_ends_in_data", "a file holds all its data", errors.TruncatedFileError, GOOD[:-1])
case("file_goes_on", "the data end with the file", errors.TensorRangeError, GOOD + bytes(16), reference=False)
case(
    "header_too_large",
    "a JSON header has at most 100,000,000 bytes",
    errors.HeaderTooLargeError,
    (10**8 + 56).to_bytes(8, "little") + GOOD[8:],
)
case("header_not_json", "the header is JSON", errors.HeaderJsonError, with_text(HEADER.replace(b":", b";", 1)))
case(
    "header_starts_with_space",
    "the header starts with {",
    errors.HeaderJsonError,
    with_text(b" " + HEADER),
    reference=False,
)
case("header_is_a_list", "the header is an object", errors.HeaderJsonError, with_text(b"[]", b""))
case(
    "header_not_utf8",
    "the header is UTF-8",
    errors.HeaderJsonError,
    with_text(HEADER.replace(b"test vectors", b"test \xff", 1)),
)
case(
    "name_twice",
    "names are unique",
    errors.HeaderJsonError,
    with_text(HEADER.replace(b'{"__meta', b'{"w":{},"__meta', 1)),
    reference=False,
)
case(
    "name_not_unicode",
    "names are Unicode",
    errors.HeaderJsonError,
    with_text(HEADER.replace(b'"n":', b'"\\ud800":', 1)),
)
case(
    "metadata_not_text",
    "__metadata__ maps strings to strings",
    errors.HeaderJsonError,
    GOOD.replace(b'"df11.version":"1"', b'"df11.version":1.0'),
)
case(
    "entry_lacks_dtype",
    "an entry has dtype, shape and data_offsets",
    errors.HeaderJsonError,
    changed(lambda h: h["n"].pop("dtype")),
    reference=False,
)
case(
    "entry_shape_negative",
    "sizes are not negative",
    errors.HeaderJsonError,
    changed(entry("n", shape=[-4])),
    reference=False,
)
case(
    "entry_offsets_three",
    "data_offsets are two numbers",
    errors.HeaderJsonError,
    changed(entry("n", data_offsets=[0, 8, 8])),
)
case(
    "entry_dtype_unknown",
    "dtypes are those of safetensors",
    errors.DtypeError,
    changed(entry("n", dtype="I128")),
    reference=False,
)
case(
    "entry_dimensions",
    "a tensor has at most 64 dimensions",
    errors.LimitError,
    changed(entry("n", shape=[4, *[1] * 64])),
    reference=False,
)
case(
    "entry_size",
    "data_offsets fit dtype and shape",
    errors.TensorSizeError,
    changed(entry("n", shape=[5])),
    reference=False,
)
case(
    "entry_size_huge",
    "data_offsets fit dtype and shape, however large",
    errors.TensorSizeError,
    changed(entry("n", shape=[2**62] * 40)),
    reference=False,
)
case(
    "entries_overlap",
    "the data have no overlaps",
    errors.TensorRangeError,
    changed(entry("n", data_offsets=[SIZE - 8, SIZE])),
)
case(
    "entries_leave_hole",
    "the data have no holes",
    errors.TensorRangeError,
    forge.with_header(
        HEADER.replace(b"[%d,%d]" % (SIZE, SIZE + 8), b"[%d,%d]" % (SIZE + 16, SIZE + 24)),
        DATA[:SIZE] + bytes(16) + DATA[SIZE:],
    ),
    reference=False,
)

# Section 2: entries. Section 3: metadata.

FOREIGN: Final = with_text(b'{"n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")
case("no_df11_metadata", "a container has df11 metadata", errors.NotDf11Error, FOREIGN)
case("version_2", "df11.version is 1", errors.VersionError, changed(metadata("df11.version", "2")))
case(
    "feature_unknown",
    "every required feature is known",
    errors.FeatureError,
    changed(metadata("df11.requires", '["holograms"]')),
)
case(
    "requires_not_a_list",
    "df11.requires is a list of names",
    errors.MetadataError,
    changed(metadata("df11.requires", '{"a":1}')),
)
case("requires_missing", "df11.requires is there", errors.MetadataError, changed(metadata("df11.requires", None)))
case(
    "writer_missing",
    "df11.writer is there",
    errors.MetadataError,
    changed(metadata("df11.writer", None)),
    reference=False,
)
case(
    "source_missing",
    "df11.source is there",
    errors.MetadataError,
    changed(metadata("df11.source", None)),
    reference=False,
)
case(
    "source_header_missing",
    "df11.source_header is there",
    errors.MetadataError,
    changed(metadata("df11.source_header", None)),
    reference=False,
)
case("tensors_missing", "df11.tensors is there", errors.MetadataError, changed(metadata("df11.tensors", None)))
case("tensors_not_json", "df11.tensors is JSON", errors.MetadataError, changed(metadata("df11.tensors", "{")))
case(
    "tensors_lack_a_name",
    "df11.tensors and the entries have the same names",
    errors.MetadataError,
    changed(member("df11.tensors", ("n",), ...)),
)
case(
    "tensors_have_a_name_more",
    "df11.tensors and the entries have the same names",
    errors.MetadataError,
    changed(added("df11.tensors", ("m",), {})),
)
case(
    "tensor_not_an_object",
    "df11.tensors holds objects",
    errors.MetadataError,
    changed(member("df11.tensors", ("n",), 7)),
)
case(
    "encoding_unknown",
    "encoding is df11 or verbatim",
    errors.MetadataError,
    changed(member("df11.tensors", ("w", "encoding"), "zip")),
)
case(
    "dtype_not_text",
    "dtype is one of safetensors'",
    errors.MetadataError,
    changed(member("df11.tensors", ("n", "dtype"), ["I16"])),
    reference=False,
)
case(
    "shape_not_a_list",
    "shape is a list of sizes",
    errors.MetadataError,
    changed(member("df11.tensors", ("w", "shape"), 300)),
    reference=False,
)
case(
    "exact_without_cast",
    "exact is only for tensors that were cast",
    errors.MetadataError,
    changed(added("df11.tensors", ("w", "exact"), True)),
    reference=False,
)
case(
    "exact_is_a_number",
    "exact is true or false",
    errors.MetadataError,
    forge.container(
        [forge.Tensor("w", "BF16", (1,), b"\x80\x3f", None, True, b"\0\0\x80\x3f")],
        edit=member("df11.tensors", ("w", "exact"), 1),
    ),
    reference=False,
)
case(
    "xxh3_missing",
    "a verbatim tensor has xxh3",
    errors.MetadataError,
    changed(member("df11.tensors", ("n", "xxh3"), ...)),
)
UPPER: Final = f"{forge.xxh3(NUMBERS.decoded):016X}"
case(
    "xxh3_upper_case",
    "hexadecimal digits are lower case",
    errors.MetadataError,
    changed(member("df11.tensors", ("n", "xxh3"), UPPER)),
)
case("verbatim_damaged", "xxh3 is that of the entry's bytes", errors.ChecksumError, GOOD[:-1] + b"\xff")
case(
    "verbatim_dtype",
    "a verbatim entry has the dtype of its tensor object",
    errors.EntryError,
    changed(entry("n", dtype="U16")),
    reference=False,
)
case(
    "verbatim_shape",
    "a verbatim entry has the shape of its tensor object",
    errors.EntryError,
    changed(entry("n", shape=[2, 2])),
    reference=False,
)
case(
    "record_not_u8", "the entry of a record is U8", errors.EntryError, changed(entry("w", dtype="I8")), reference=False
)
case(
    "record_two_dimensions",
    "the entry of a record has one dimension",
    errors.EntryError,
    changed(entry("w", shape=[4, SIZE // 4])),
    reference=False,
)
case(
    "record_of_f16",
    "a record decodes to BF16",
    errors.EntryError,
    changed(member("df11.tensors", ("w", "dtype"), "F16")),
    reference=False,
)
case(
    "record_shape",
    "a record has as many weights as its shape",
    errors.EntryError,
    one(GOOD_RECORD, WEIGHTS[:299]),
    reference=False,
)
case(
    "record_misaligned",
    "a record starts at a multiple of 16 of the data",
    errors.EntryError,
    changed(forge.unchanged, NUMBERS, RECORD),
)
case(
    "data_misaligned", "the data start at a multiple of 64", errors.EntryError, forge.container([RECORD], alignment=48)
)
for name, key, value in (
    ("source_bytes_negative", "bytes", -1),
    ("source_bytes_text", "bytes", "700"),
    ("source_sha256_upper_case", "sha256", "A" * 64),
    ("source_sha256_short", "sha256", "a" * 63),
    ("source_header_bytes_too_many", "header_bytes", 10**8 + 1),
    ("source_cast_unknown", "cast", "fp8"),
    ("source_member_missing", "cast", ...),
):
    case(
        name,
        f"df11.source: {key} is as specified",
        errors.MetadataError,
        changed(member("df11.source", (key,), value)),
        reference=False,
    )

SOURCE_HEADER: Final = forge.safetensors_file([RECORD, NUMBERS])[0]


def source_header(text: bytes, frame: bytes | None = None, data_size: int = len(RECORD.decoded) + 8) -> bytes:
    """A container whose source header is another one; its size in df11.source is right unless a frame is given."""

    def change(header: dict[str, Any]) -> None:
        stored = base64.b64encode(forge.raw_frame(text) if frame is None else frame).decode()
        header["__metadata__"]["df11.source_header"] = stored
        with forge.json_value(header, "df11.source") as source:
            source["bytes"] = 8 + len(text) + data_size
            source["header_bytes"] = len(text)

    return changed(change)


for name, rule, text, frame in (
    ("source_header_not_zstandard", "df11.source_header is a Zstandard frame", SOURCE_HEADER, b"zip" + bytes(20)),
    ("source_header_cut", "df11.source_header is a whole frame", SOURCE_HEADER, forge.raw_frame(SOURCE_HEADER)[:-1]),
    (
        "source_header_two_frames",
        "df11.source_header is one frame",
        SOURCE_HEADER,
        forge.raw_frame(SOURCE_HEADER) + forge.raw_frame(b""),
    ),
    (
        "source_header_size",
        "the source header has header_bytes bytes",
        SOURCE_HEADER,
        forge.raw_frame(SOURCE_HEADER + b" "),
    ),
    ("source_header_names", "the source has the same tensors", SOURCE_HEADER.replace(b'"n"', b'"m"'), None),
    (
        "source_header_dtype",
        "a tensor has the dtype that it has in the source",
        SOURCE_HEADER.replace(b'"I16"', b'"U16"'),
        None,
    ),
    (
        "source_header_shape",
        "a tensor has the shape that it has in the source",
        SOURCE_HEADER.replace(b"[4]", b"[2,2]"),
        None,
    ),
    (
        "source_header_not_json",
        "the source header is that of a safetensors file",
        SOURCE_HEADER.replace(b":", b";"),
        None,
    ),
    (
        "source_header_hole",
        "the source is a safetensors file: no holes",
        SOURCE_HEADER.replace(b"[600,608]", b"[601,609]"),
        None,
    ),
):
    case(name, rule, errors.SourceHeaderError, source_header(text, frame), reference=False)
FEWER: Final = source_header(forge.safetensors_file([RECORD])[0], data_size=len(RECORD.decoded))
case("source_header_lacks_a_name", "the source has all tensors", errors.SourceHeaderError, FEWER, reference=False)
case(
    "source_header_not_base64",
    "df11.source_header is base64",
    errors.SourceHeaderError,
    changed(metadata("df11.source_header", "KLUv/SA*")),
    reference=False,
)

# Section 4: the record and its directory.

for name, field_name, value, error in (
    ("magic", "magic", b"DF12", errors.RecordHeaderError),
    ("version", "version", 2, errors.VersionError),
    ("dtype", "dtype", 2, errors.RecordHeaderError),
    ("reserved_0", "reserved_0", 1, errors.RecordHeaderError),
    ("reserved_1", "reserved_1", 1, errors.RecordHeaderError),
    ("element_count", "element_count", 0, errors.LimitError),
    ("record_size", "record_size", len(GOOD_RECORD) + 16, errors.RecordHeaderError),
    ("segment_count", "segment_count", 2, errors.RecordHeaderError),
    ("segment_elements_not_a_multiple", "segment_elements", 8200, errors.LimitError),
    ("segment_elements_too_large", "segment_elements", (1 << 24) + 8192, errors.LimitError),
):
    changed_field: dict[str, Any] = {field_name: value}
    case(
        f"record_header_{name}",
        f"record header: {field_name}",
        error,
        one(forge.record([(GOOD_SEGMENT, WEIGHTS)], **changed_field)),
    )
case(
    "record_header_checksum",
    "record header: header_checksum",
    errors.ChecksumError,
    one(GOOD_RECORD[:32] + bytes(8) + GOOD_RECORD[40:]),
)
case("record_too_short", "a record has at least one segment", errors.RecordHeaderError, one(forge.record([]), []))
for field_name, value, error in (
    ("segment_offset", 96, errors.DirectoryError),
    ("segment_size", len(GOOD_SEGMENT) - 16, errors.DirectoryError),
    ("element_count", 299, errors.DirectoryError),
    ("stored_checksum", 1, errors.ChecksumError),
    ("decoded_checksum", 1, errors.ChecksumError),
):
    case(
        f"directory_{field_name}",
        f"directory entry: {field_name}",
        error,
        one(forge.record([(GOOD_SEGMENT, WEIGHTS)], entry={field_name: value})),
    )
case(
    "directory_bytes_after_the_last_segment",
    "the last segment ends at record_size",
    errors.DirectoryError,
    one(forge.record([(GOOD_SEGMENT, WEIGHTS)], record_size=len(GOOD_RECORD) + 16) + bytes(16)),
)
SHORT: Final = forge.raw_segment(WEIGHTS[:140], element_count=300)
case(
    "segment_smaller_than_its_signs",
    "a segment has at least a byte for each weight",
    errors.DirectoryError,
    one(forge.record([(SHORT, WEIGHTS)])),
)
case("segment_larger_than_raw", "a segment is not larger than a raw one", errors.DirectoryError, coded(WEIGHTS[:90]))

# Section 5: the segment.

for name, segment_fields in (
    ("encoding", {"encoding": 2}),
    ("lane_bytes_0", {"lane_bytes": 0}),
    ("lane_bytes_3", {"lane_bytes": 3}),
    ("alphabet_size_0", {"alphabet_size": 0}),
    ("alphabet_size_257", {"alphabet_size": 257}),
    ("element_count", {"element_count": 299}),
    ("tiles_offset", {"tiles_offset": 64}),
    ("lanes_offset", {"lanes_offset": 80}),
    ("sign_mantissa_offset", {"sign_mantissa_offset": 112}),
    ("stream_offset", {"stream_offset": 384}),
    ("segment_size", {"segment_size": len(GOOD_SEGMENT) + 16}),
):
    case(
        f"segment_{name}",
        f"coded segment: {next(iter(segment_fields))}",
        errors.SegmentHeaderError,
        coded(**segment_fields),
    )
for name in ("lane_bytes", "alphabet_size", "tiles_offset", "lanes_offset", "sign_mantissa_offset", "exception_count"):
    case(f"raw_segment_{name}", f"raw segment: {name} is 0", errors.SegmentHeaderError, raw(**{name: 1}))
case(
    "raw_segment_stream_offset",
    "raw segment: the weights start at 32",
    errors.SegmentHeaderError,
    raw(stream_offset=48),
)
case(
    "raw_segment_too_short",
    "raw segment: the size is that of n weights",
    errors.SegmentHeaderError,
    one(forge.record([(forge.raw_segment(WEIGHTS[:280], element_count=300), WEIGHTS)])),
)
CUT: Final = patched(GOOD_SEGMENT[:400], 24, (400).to_bytes(4, "little"))
case(
    "segment_ends_after_sections",
    "coded segment: the stream has at least its 16 zero bytes",
    errors.SegmentHeaderError,
    CUT,
)

# Section 6: the code table. The segment starts with its header, 32 bytes, then two exponents, then four lengths in two bytes.

case("alphabet_descends", "the alphabet ascends", errors.CodeTableError, patched(GOOD_SEGMENT, 32, b"\x79\x78"))
case("alphabet_repeats", "the alphabet ascends strictly", errors.CodeTableError, patched(GOOD_SEGMENT, 32, b"\x78\x78"))
case("code_incomplete", "the code is complete", errors.CodeTableError, patched(GOOD_SEGMENT, 34, b"\x22\x32"))
case(
    "code_oversubscribed",
    "the code is complete, not more",
    errors.CodeTableError,
    patched(GOOD_SEGMENT, 34, b"\x22\x12"),
)
case("code_of_none", "at least one pair has a code", errors.CodeTableError, patched(GOOD_SEGMENT, 34, b"\x00\x00"))
SINGLE: Final = forge.symbol(120, 120)
ALIKE: Final = [weight & 0x807F | 120 << 7 for weight in WEIGHTS]
case(
    "single_code_of_two_bits",
    "a single code has length 1",
    errors.CodeTableError,
    coded(ALIKE, {SINGLE: 2}, codes={SINGLE: "00"}),
)
case(
    "last_half_byte",
    "an unused last half byte is zero",
    errors.CodeTableError,
    patched(forge.coded_segment(ALIKE, {SINGLE: 1}), 33, b"\x11"),
)
STEPS: Final = forge.staircase([forge.symbol(a, b) for a in range(118, 122) for b in range(118, 122)][:14])
case("code_of_13_bits", "a code has at most 12 bits", errors.CodeTableError, coded([120 << 7] * 600, STEPS))

# Section 7: tiles and lanes.


def lanes(change: Callable[[list[str]], None]) -> Callable[[list[forge.Tile]], None]:
    """Change the lanes of the first tile."""
    return lambda tiles: change(tiles[0].lanes)


def moved(bits: int) -> Callable[[list[forge.Tile]], None]:
    """Let lane 0 say that it ends some bits later than it does; the codes stay where they are."""

    def change(lanes_: list[str]) -> None:
        both = lanes_[0] + lanes_[1]
        at = len(lanes_[0]) + bits
        lanes_[0], lanes_[1] = both[:at], both[at:]

    return lanes(change)


def excepted(*listed: tuple[int, int]) -> Callable[[list[forge.Tile]], None]:
    """Replace the exceptions of the last tile."""

    def change(tiles: list[forge.Tile]) -> None:
        tiles[-1].exceptions[:] = listed

    return change


ONE_BIT: Final = {forge.symbol(120, 120): 1, forge.symbol(121, 121): 1}
LONG: Final = forge.staircase([forge.symbol(a, b) for b in (117, 118, 119, 120) for a in (118, 119, 120, 121)][:13])
LONGEST: Final = max(LONG, key=LONG.__getitem__)
SHORTEST: Final = min(LONG, key=LONG.__getitem__)
TWO_LONG_LANES: Final = [((LONGEST if i // 8 % 32 < 2 else SHORTEST) >> 8 * (i % 2) & 255) << 7 for i in range(600)]
UNIT: Final = (1).to_bytes(4, "little")
case("stream_position", "the first tile lies at stream_position 0", errors.TileError, patched(GOOD_SEGMENT, 48, UNIT))
case("lane_ends_early", "a lane ends where its length says", errors.LaneError, coded(edit=moved(1)))
case("lane_ends_late", "a lane ends where its length says", errors.LaneError, coded(edit=moved(-1)))
LOOSE: Final = lanes(lambda lanes_: lanes_.append(lanes_.pop() + "0"))
case("last_lane_ends_early", "the last lane ends where its length says", errors.LaneError, coded(edit=LOOSE))
case("lane_too_short", "a lane has at least 4 bits a chunk", errors.TileError, coded(ALIKE, ONE_BIT, edit=moved(-1)))
case(
    "lane_too_long", "a lane has at most 48 bits a chunk", errors.TileError, coded(TWO_LONG_LANES, LONG, edit=moved(1))
)
for name, size in (("stream_goes_on", len(GOOD_SEGMENT) + 16), ("stream_too_short", len(GOOD_SEGMENT) - 16)):
    resized = patched((GOOD_SEGMENT + bytes(16))[:size], 24, size.to_bytes(4, "little"))
    case(name, "after the last tile the stream has 16 bytes", errors.TileError, resized)
case(
    "exceptions_of_the_segment_more",
    "exception_count is the sum over the tiles",
    errors.TileError,
    coded(exception_count=2),
)
case(
    "exceptions_of_the_segment_fewer",
    "exception_count is the sum over the tiles",
    errors.TileError,
    coded(exception_count=0),
)
case(
    "exception_beyond_the_tile",
    "an exception is a weight of the tile",
    errors.TileError,
    coded(edit=excepted((300, 0x7FC0))),
)
case("exception_twice", "a weight is listed once", errors.TileError, coded(edit=excepted((299, 0), (299, 0x7FC0))))
SWAPPED: Final = excepted(*((at, WEIGHTS[at]) for at in (8, 7, 299)))
case("exceptions_not_in_order_of_lanes", "exceptions are listed lane by lane", errors.TileError, coded(edit=SWAPPED))
BACK: Final = excepted(*((at, WEIGHTS[at]) for at in (257, 2, 299)))
case(
    "exceptions_not_in_order_of_positions",
    "within a lane exceptions are listed by rising position",
    errors.TileError,
    coded(edit=BACK),
)
MANY: Final = [120 << 7] * 8193
ALL_ZEROS: Final = forge.coded_segment(MANY, ONE_BIT)
SECOND: Final = one(forge.record([(ALL_ZEROS[:56] + bytes(4) + ALL_ZEROS[60:], MANY)]), MANY)
case("stream_position_of_the_second_tile", "a tile lies where the one before it ends", errors.TileError, SECOND)
TWICE: Final = excepted((0, 0), (0, 120 << 7))
case(
    "exceptions_more_than_weights",
    "a tile has at most as many exceptions as weights",
    errors.TileError,
    coded(MANY, ONE_BIT, edit=TWICE),
)
