"""Files that must be refused: each breaks one rule of formats/SPEC.md and keeps all others.

That includes the checksums of what a reader without that rule would decode: :func:`sealed` asks the reference decoder.
tests/formats/test_vectors.py proves it, by taking the rule out of that decoder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from df11.formats import errors, layout, reference
from tests.vectors import forge

CODE: Final = forge.balanced([forge.symbol(a, b) for a in (120, 121) for b in (120, 121)])
WEIGHTS: Final = [(i * 77 & 0x80) << 8 | (120 + (i * i >> 3) % 2) << 7 | i & 0x7F for i in range(299)] + [0x7FC0]
"""300 weights; the last is an exception."""


@dataclass(frozen=True)
class MustFail:
    """A file to refuse: the rule it breaks, as the reference decoder calls it, and the error that df11 raises."""

    name: str
    rule: str
    error: type[errors.Df11Error]
    file: bytes = field(repr=False)


Change = Callable[[dict[str, Any]], None]
CASES: Final[list[MustFail]] = []


def case(name: str, rule: str, error: type[errors.Df11Error], file: bytes) -> None:
    """Register a file."""
    CASES.append(MustFail(name, rule, error, sealed(file, rule)))


CHECKSUMS: Final = {"decoded_checksum", "sha256 of the source"}


def sealed(file: bytes, rule: str) -> bytes:
    """The file with the checksums of what a decoder makes of it that does not know the rule."""
    if rule in CHECKSUMS:
        return file
    reference.ignored |= CHECKSUMS | {rule}
    try:
        container = reference.open_file(file)
        for name, entry in container.entries.items():
            if container.tensors.get(name, {}).get("encoding") == "df11":
                record = container.data[entry.start : entry.end]
                dtype = container.tensors[name]["dtype"]
                reference.decode_record(record, None, dtype)
                file = file.replace(record, with_decoded_checksums(record, layout.KINDS[dtype]))
        restored = reference.restore_file(reference.open_file(file))
    except reference.FormatError:  # Without this rule nothing can be decoded.
        return file
    finally:
        reference.ignored.clear()
    stated = str(container.source["sha256"]).encode()
    return file if restored is None else file.replace(stated, hashlib.sha256(restored).hexdigest().encode())


def with_decoded_checksums(record: bytes, kind: layout.Kind) -> bytes:
    """A record whose directory states the checksums of what the reference decoder decodes."""
    header = layout.RECORD_HEADER.unpack(record)
    position = 48 + 32 * header["segment_count"]
    changed = bytearray(record)
    for index in range(header["segment_count"]):
        at = 48 + 32 * index
        entry: dict[str, Any] = layout.DIRECTORY_ENTRY.unpack(record, at)
        count = min(header["segment_elements"], header["element_count"] - index * header["segment_elements"])
        segment = record[position : position + entry["segment_size"]]
        entry["decoded_checksum"] = forge.xxh3(reference.decode_segment(segment, count, kind))
        changed[at : at + 32] = layout.DIRECTORY_ENTRY.pack(**entry)
        position += entry["segment_size"]
    return record if changed == record else forge.resealed(bytes(changed))


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


def patched(segment: bytes, offset: int, data: bytes, weights: Sequence[int] = WEIGHTS) -> bytes:
    """A container of one record whose segment holds ``data`` at ``offset``."""
    segment = segment[:offset] + data + segment[offset + len(data) :]
    return one(forge.record([(segment, weights)]), weights)


GOOD_SEGMENT: Final = forge.coded_segment(WEIGHTS, CODE)
GOOD_RECORD: Final = forge.record([(GOOD_SEGMENT, WEIGHTS)])
RECORD: Final = forge.bf16("w", WEIGHTS, GOOD_RECORD)
NUMBERS: Final = forge.Tensor("n", "I16", (4,), bytes(range(8)))


def changed(change: Change, *tensors: forge.Tensor) -> bytes:
    """A container of a record and a verbatim tensor, or of other tensors, with its header changed."""
    return forge.container(tensors or (RECORD, NUMBERS), edit=change)


def with_numbers(dtype: str, shape: tuple[Any, ...], data: bytes) -> bytes:
    """A container of a record and a verbatim tensor that is the same in all its places."""
    return forge.container([RECORD, forge.Tensor("n", dtype, shape, data)])


def metadata(key: str, value: object) -> Change:
    """Set a key of the metadata, or, with ``...``, remove it."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop(key, None)
        if value is not ...:
            header["__metadata__"][key] = value

    return change


def replaced(key: str, old: str, new: str) -> Change:
    """Replace a piece of the text of a metadata key, once."""

    def change(header: dict[str, Any]) -> None:
        assert old in header["__metadata__"][key]
        header["__metadata__"][key] = header["__metadata__"][key].replace(old, new, 1)

    return change


def member(key: str, path: tuple[str, ...], value: object) -> Change:
    """Set or add a member of the JSON value of a metadata key, or, with ``...``, remove it."""

    def change(header: dict[str, Any]) -> None:
        with forge.json_value(header, key) as inner:
            for name in path[:-1]:
                inner = inner[name]
            inner.pop(path[-1], None)
            if value is not ...:
                inner[path[-1]] = value

    return change


def floated(key: str) -> Change:
    """Write a member of df11.source with a point and a zero."""

    def change(header: dict[str, Any]) -> None:
        with forge.json_value(header, "df11.source") as source:
            source[key] = float(source[key])

    return change


def entry(name: str, **members: object) -> Change:
    """Change members of an entry of the header."""
    return lambda header: header[name].update(members)


# Section 2: the file.

GOOD: Final = changed(forge.unchanged)
SIZE: Final = len(GOOD_RECORD)
HEADER, DATA = forge.split(GOOD)
TRUNCATED, JSON, RANGE = errors.TruncatedFileError, errors.HeaderJsonError, errors.TensorRangeError


def with_text(header: bytes, data: bytes = DATA) -> bytes:
    """A file with a header that is given as text."""
    return forge.with_header(header.rstrip(b" "), data)


def header_with(old: bytes, new: bytes) -> bytes:
    """A file with a piece of its header replaced, once."""
    assert old in HEADER
    return with_text(HEADER.replace(old, new, 1))


SHORTER: Final = member("df11.tensors", ("n", "xxh3"), f"{forge.xxh3(NUMBERS.decoded[:7]):016x}")
TOO_DEEP: Final = b"[" * 126 + b"]" * 126
case("file_too_short", "a file holds the size of its header", TRUNCATED, GOOD[:7])
case("file_ends_in_header", "a file holds its header", TRUNCATED, GOOD[:100])
case("file_ends_in_data", "a file holds its data", TRUNCATED, changed(SHORTER)[:-1])
case("file_goes_on", "the data end with the file", RANGE, GOOD + bytes(16))
TOO_LARGE: Final = (10**8 + 56).to_bytes(8, "little") + GOOD[8:]
case("header_too_large", "a header has at most 100,000,000 bytes", errors.HeaderTooLargeError, TOO_LARGE)
case("header_not_json", "a header is JSON", JSON, header_with(b":", b";"))
case("header_with_a_comma_more", "a header is JSON", JSON, with_text(HEADER.rstrip(b" ")[:-1] + b",}"))
case("header_goes_on", "a header is JSON", JSON, with_text(HEADER.rstrip(b" ") + b"{}"))
case(
    "header_with_zero_bytes",
    "a header is JSON",
    JSON,
    GOOD[: 8 + len(HEADER)].rstrip(b" ").ljust(8 + len(HEADER), b"\0") + DATA,
)
case("header_starts_with_space", "a header starts with {", JSON, with_text(b" " + HEADER))
case("header_is_a_list", "a header is an object", JSON, with_text(b"[]", b""))
case("header_not_utf8", "a header is UTF-8", JSON, header_with(b"test vectors", b"test \xff"))
case("header_with_nan", "NaN and Infinity are not JSON", JSON, header_with(b'"n":{', b'"n":{"x":NaN,'))
case(
    "header_too_deep", "JSON is at most 127 deep", errors.LimitError, header_with(b'"n":{', b'"n":{"x":%s,' % TOO_DEEP)
)
case("name_twice", "an object names a member once", JSON, header_with(b'{"__meta', b'{"w":{},"__meta'))
case("member_twice", "an object names a member once", JSON, header_with(b'"n":{', b'"n":{"dtype":"I16",'))
case("inner_member_twice", "an object names a member once", JSON, header_with(b'"n":{', b'"n":{"x":[{"a":1,"a":1}],'))
case("text_not_unicode", "text is Unicode", JSON, header_with(b'"n":{', b'"n":{"x":"\\udfff\\ud800",'))
case("metadata_not_text", "__metadata__ holds strings", JSON, changed(metadata("x", 1.0)))
case("metadata_a_list", "__metadata__ is an object", JSON, with_text(b'{"__metadata__":["df11.version"]}', b""))
case("entry_not_an_object", "an entry is an object", JSON, changed(lambda h: h.update(n=[])))
case("entry_lacks_dtype", "an entry has dtype, shape and data_offsets", JSON, changed(lambda h: h["n"].pop("dtype")))
case("entry_shape_a_number", "an entry's members", JSON, changed(entry("n", shape=4)))
case("entry_offsets_three", "data_offsets are two numbers", JSON, changed(entry("n", data_offsets=[SIZE, SIZE + 8, 8])))
DIGITS: Final = "a size is an integer in digits, below 2^63"
case("entry_shape_negative", DIGITS, JSON, with_numbers("I16", (-2, -2), bytes(8)))
case("entry_shape_float", DIGITS, JSON, changed(entry("n", shape=[4.0])))
case(
    "entry_shape_minus_zero",
    DIGITS,
    JSON,
    forge.container([forge.Tensor("n", "I16", (-0.0,), b"")]).replace(b"[-0.0]", b"  [-0]"),
)  # type: ignore[arg-type]
case("entry_shape_true", DIGITS, JSON, with_numbers("I16", (4, True), bytes(8)))
case("entry_offset_float", DIGITS, JSON, changed(entry("n", data_offsets=[SIZE, SIZE + 8.0])))
case("entry_dtype_unknown", "a dtype is one of safetensors'", errors.DtypeError, with_numbers("I128", (8,), bytes(8)))
case(
    "entry_dimensions",
    "a tensor has at most 64 dimensions",
    errors.LimitError,
    with_numbers("I16", (4, *[1] * 64), bytes(8)),
)
STRIDES: Final = "the sizes that are not 0 make less than 2^63 bytes"
case("entry_strides", STRIDES, errors.LimitError, with_numbers("BF16", (0, 2**31, 2**31), b""))
case("entry_size", "data_offsets fit dtype and shape", errors.TensorSizeError, with_numbers("I16", (5,), bytes(8)))
case("entry_half_a_byte", "a tensor fills its last byte", errors.TensorSizeError, with_numbers("F4", (3,), bytes(2)))
ORDER: Final = "a tensor starts where the one before it ends"
ZEROS: Final = forge.Tensor("n", "I16", (4,), bytes(8))
EMPTY: Final = forge.Tensor("e", "I16", (0,), b"")
case("entries_overlap", ORDER, RANGE, changed(entry("n", data_offsets=[SIZE - 8, SIZE]), RECORD, ZEROS)[:-8])
MOVED: Final = HEADER.replace(b"[%d,%d]" % (SIZE, SIZE + 8), b"[%d,%d]" % (SIZE + 16, SIZE + 24))
case("entries_leave_hole", ORDER, RANGE, with_text(MOVED, DATA[:SIZE] + bytes(16) + DATA[SIZE:]))
case("empty_tensor_misplaced", ORDER, RANGE, changed(entry("e", data_offsets=[4, 4]), RECORD, NUMBERS, EMPTY))
case(
    "data_misaligned", "the data start at a multiple of 64", errors.EntryError, forge.container([RECORD], alignment=48)
)

# Section 3: metadata.

META: Final = errors.MetadataError
FOREIGN: Final = with_text(b'{"n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")
case("no_df11_metadata", "df11.version is there", errors.NotDf11Error, FOREIGN)
for name, value in (("version_2", "2"), ("version_1_0", "1.0"), ("version_01", "01")):
    case(name, "df11.version is 1", errors.VersionError, changed(metadata("df11.version", value)))
KNOWN: Final = "every required feature is known"
case("feature_unknown", KNOWN, errors.FeatureError, changed(metadata("df11.requires", '["holograms"]')))
case("requires_an_object", "df11.requires is a list of names", META, changed(metadata("df11.requires", "{}")))
case("requires_numbers", "df11.requires is a list of names", META, changed(metadata("df11.requires", "[1]")))
case("requires_not_json", "df11.requires is JSON", META, changed(metadata("df11.requires", "[")))
for key in ("requires", "writer", "source", "source_header", "tensors"):
    case(f"{key}_missing", f"df11.{key} is there", META, changed(metadata(f"df11.{key}", ...)))
case("source_not_json", "df11.source is JSON", META, changed(metadata("df11.source", "")))
case("source_not_an_object", "df11.source is an object", META, changed(metadata("df11.source", "[]")))
case("source_member_missing", "df11.source has its members", META, changed(member("df11.source", ("cast",), ...)))
ONCE: Final = "an object names a member once"
case("source_member_twice", ONCE, META, changed(replaced("df11.source", '{"bytes"', '{"bytes":1,"bytes"')))
for key in ("bytes", "header_bytes"):
    case(f"source_{key}_float", DIGITS, META, changed(floated(key)))
case(
    "source_cast_of_nothing",
    "cast says whether a tensor was cast",
    META,
    changed(member("df11.source", ("cast",), "bf16")),
)
CAST: Final = forge.Tensor("w", "BF16", (1,), b"\x80\x3f", None, True, b"\0\0\x80\x3f")
LOSSY: Final = forge.Tensor("w", "BF16", (1,), b"\x80\x3f", None, False, b"\1\0\x80\x3f")
"""Its source cannot be restored, so that its hash is of no account."""
HASH: Final = "sha256 is 64 lower-case digits"
case("source_sha256_upper_case", HASH, META, changed(member("df11.source", ("sha256",), "A" * 64), LOSSY))
case("source_sha256_short", HASH, META, changed(member("df11.source", ("sha256",), "a" * 63), LOSSY))
case(
    "exact_without_cast",
    "cast says whether a tensor was cast",
    META,
    changed(member("df11.source", ("cast",), None), CAST),
)
case("source_cast_unknown", "cast is bf16 or null", META, changed(member("df11.source", ("cast",), "fp8"), CAST))
case("exact_is_a_number", "exact is true or false", META, changed(member("df11.tensors", ("w", "exact"), 1), CAST))
F16: Final = forge.Tensor("w", "F16", (1,), b"\x80\x3f", None, True, b"\0\0\x80\x3f")
case("exact_of_f16", "a tensor that was cast is BF16", META, forge.container([F16]))
case("tensors_not_json", "df11.tensors is JSON", META, changed(metadata("df11.tensors", "{")))
case("tensors_a_list", "df11.tensors is an object", META, changed(metadata("df11.tensors", "[]")))
case("tensors_member_twice", ONCE, META, changed(replaced("df11.tensors", '"dtype"', '"dtype":"","dtype"')))
case(
    "tensors_with_infinity",
    "NaN and Infinity are not JSON",
    META,
    changed(replaced("df11.tensors", '"dtype"', '"x":-Infinity,"dtype"')),
)
case(
    "tensors_not_unicode", "text is Unicode", META, changed(replaced("df11.tensors", '"dtype"', '"\\ud800":1,"dtype"'))
)
case(
    "tensors_too_deep",
    "JSON is at most 127 deep",
    errors.LimitError,
    changed(replaced("df11.tensors", '"dtype"', f'"x":{TOO_DEEP.decode()},"dtype"')),
)
SAME: Final = "df11.tensors names the same tensors"
case("tensors_lack_a_name", SAME, META, changed(member("df11.tensors", ("e",), ...), RECORD, NUMBERS, EMPTY))
case("tensors_have_a_name_more", SAME, META, changed(member("df11.tensors", ("m",), {})))
case("tensor_not_an_object", "a tensor object is an object", META, changed(member("df11.tensors", ("n",), 7)))
MEMBERS: Final = "a tensor object has encoding, dtype and shape"
case("tensor_lacks_shape", MEMBERS, META, changed(member("df11.tensors", ("n", "shape"), ...)))
case(
    "encoding_unknown",
    "an encoding is df11 or verbatim",
    META,
    changed(member("df11.tensors", ("n", "encoding"), "zip")),
)
TYPES: Final = "a tensor object's dtype and shape"
case("dtype_not_text", TYPES, META, changed(member("df11.tensors", ("n", "dtype"), ["I16"])))
case("shape_not_a_list", TYPES, META, changed(member("df11.tensors", ("w", "shape"), 300)))
case("shape_float", DIGITS, META, changed(member("df11.tensors", ("w", "shape"), [300.0])))
DIGEST: Final = f"{forge.xxh3(NUMBERS.decoded):016x}"
XXH3: Final = "xxh3 is 16 lower-case digits"
case("xxh3_missing", XXH3, META, changed(member("df11.tensors", ("n", "xxh3"), ...)))
case("xxh3_upper_case", XXH3, META, changed(member("df11.tensors", ("n", "xxh3"), DIGEST.upper())))
case("xxh3_of_a_record", "a record has no xxh3", META, changed(member("df11.tensors", ("w", "xxh3"), DIGEST)))
case("verbatim_damaged", "xxh3 of a verbatim tensor", errors.ChecksumError, GOOD[:-1] + b"\xff")
ENTRY: Final = errors.EntryError
case("verbatim_dtype", "a verbatim entry has the dtype of its tensor object", ENTRY, changed(entry("n", dtype="U16")))
case("verbatim_shape", "a verbatim entry has the shape of its tensor object", ENTRY, changed(entry("n", shape=[2, 2])))
case("record_not_u8", "the entry of a record is U8", ENTRY, changed(entry("w", dtype="I8")))
case(
    "record_two_dimensions", "the entry of a record has one dimension", ENTRY, changed(entry("w", shape=[4, SIZE // 4]))
)
case("record_shape", "element_count fits the shape", ENTRY, one(GOOD_RECORD, WEIGHTS[:299]))
case("record_misaligned", "a record starts at a multiple of 16", ENTRY, changed(forge.unchanged, NUMBERS, RECORD))

# Sections 3 and 11: the source.

SOURCE: Final = errors.SourceHeaderError
SOURCE_HEADER: Final = forge.safetensors_file([RECORD, NUMBERS])[0]
DATA_SIZE: Final = len(RECORD.decoded) + 8


def source_header(text: bytes, frame: bytes | None = None, data_size: int = DATA_SIZE, *tensors: forge.Tensor) -> bytes:
    """A container with another source header, whose size in df11.source is right; ``frame`` if its frame is another."""

    def change(header: dict[str, Any]) -> None:
        stored = base64.b64encode(forge.raw_frame(text) if frame is None else frame).decode()
        header["__metadata__"]["df11.source_header"] = stored
        with forge.json_value(header, "df11.source") as source:
            source["bytes"] = 8 + len(text) + data_size
            source["header_bytes"] = len(text)

    return changed(change, *tensors)


def source_with(old: bytes, new: bytes) -> bytes:
    """A container whose source header has a piece replaced, once."""
    assert old in SOURCE_HEADER
    return source_header(SOURCE_HEADER.replace(old, new, 1))


FRAME: Final = forge.raw_frame(SOURCE_HEADER)
NO_FRAME: Final = "df11.source_header is a Zstandard frame"
case("source_header_not_zstandard", NO_FRAME, SOURCE, source_header(SOURCE_HEADER, b"zip" + bytes(20)))
SKIPPABLE: Final = bytes.fromhex("502a4d18 04000000 00000000")
case("source_header_skippable_frame", NO_FRAME, SOURCE, source_header(SOURCE_HEADER, SKIPPABLE + FRAME))
case("source_header_cut", "the frame is whole", SOURCE, source_header(SOURCE_HEADER, FRAME[:-1]))
case(
    "source_header_two_frames", "there is one frame", SOURCE, source_header(SOURCE_HEADER, FRAME + forge.raw_frame(b""))
)
case("source_header_goes_on", "there is one frame", SOURCE, source_header(SOURCE_HEADER, FRAME + b"\0"))
WITH_ID: Final = FRAME[:4] + bytes([FRAME[4] | 1]) + b"\x07" + FRAME[5:]
case("source_header_dictionary", "the frame has no dictionary", SOURCE, source_header(SOURCE_HEADER, WITH_ID))
STATED: Final = "the source header has header_bytes bytes"
case("source_header_longer", STATED, SOURCE, source_header(SOURCE_HEADER, forge.raw_frame(SOURCE_HEADER + b" ")))
case("source_header_shorter", STATED, SOURCE, source_header(SOURCE_HEADER + b" ", FRAME))
LARGE: Final = forge.padded_frame(SOURCE_HEADER, (8 << 20) + 65536)
case(
    "source_header_out_of_proportion",
    "header_bytes is in proportion",
    errors.LimitError,
    source_header(SOURCE_HEADER.ljust((8 << 20) + 65536), LARGE),
)
BASE64: Final = "base64 is RFC 4648, section 4, without anything else"
SPARE: Final = next(n for n in range(3) if len(forge.raw_frame(SOURCE_HEADER + b" " * n)) % 3 == 2)
"""Spaces that make the base64 end in one `=`."""
SPARED: Final = SOURCE_HEADER + b" " * SPARE
ONE_PAD: Final = base64.b64encode(forge.raw_frame(SPARED)).decode()


def based(text: str) -> bytes:
    """A container with this base64 of a source header."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["df11.source_header"] = text
        with forge.json_value(header, "df11.source") as source:
            source["bytes"] += SPARE
            source["header_bytes"] += SPARE

    return changed(change)


ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
BITS: Final = ONE_PAD[:-2] + ALPHABET[ALPHABET.index(ONE_PAD[-2]) | 1] + "="
case("base64_line_break", BASE64, SOURCE, based(ONE_PAD[:76] + "\n" + ONE_PAD[76:]))
case("base64_space", BASE64, SOURCE, based(ONE_PAD + " "))
case("base64_without_padding", BASE64, SOURCE, based(ONE_PAD[:-1]))
case("base64_spare_bits", BASE64, SOURCE, based(BITS))
case("source_header_not_json", "a header is JSON", SOURCE, source_with(b":", b";"))
case("source_header_starts_with_space", "a header starts with {", SOURCE, source_header(b" " + SOURCE_HEADER))
case("source_header_name_twice", ONCE, SOURCE, source_with(b'{"w"', b'{"n":{},"w"'))
case("source_header_shape_float", DIGITS, SOURCE, source_with(b"[4]", b"[4.0]"))
HOLE: Final = SOURCE_HEADER.replace(b"[600,608]", b"[601,609]")
case("source_header_hole", ORDER, SOURCE, source_header(HOLE, None, DATA_SIZE + 1))
case(
    "source_header_size",
    "data_offsets fit dtype and shape",
    SOURCE,
    source_header(SOURCE_HEADER.replace(b"[600,608]", b"[600,609]"), None, DATA_SIZE + 1),
)
THE_SAME: Final = "the source has the same tensors"
FEWER: Final = forge.safetensors_file([RECORD, NUMBERS])[0]
case("source_header_lacks_a_name", THE_SAME, SOURCE, source_header(FEWER, None, DATA_SIZE, RECORD, NUMBERS, EMPTY))
MORE: Final = forge.safetensors_file([RECORD, NUMBERS, EMPTY])[0]
case("source_header_has_a_name_more", THE_SAME, SOURCE, source_header(MORE))
case("source_header_dtype", "the source's dtypes", SOURCE, source_with(b'"I16"', b'"U16"'))
case("source_header_shape", "the source's shapes", SOURCE, source_with(b"[4]", b"[2,2]"))
ALREADY: Final = forge.safetensors_file([forge.Tensor("w", "BF16", (1,), b"\x80\x3f")])[0]
case("source_header_of_no_cast", "the source's dtypes", SOURCE, source_header(ALREADY, None, 2, CAST))
for step in (-1, 1):
    name = f"source_bytes_{'less' if step < 0 else 'more'}"
    case(name, "bytes is the size of the source", SOURCE, source_header(SOURCE_HEADER, None, DATA_SIZE + step))
case(
    "source_sha256",
    "sha256 of the source",
    errors.DifferenceError,
    changed(member("df11.source", ("sha256",), "a" * 64)),
)

# Section 4: the record.

HEAD: Final = errors.RecordHeaderError


def record_with(**fields: int | bytes) -> bytes:
    """A container of a record with other fields in its header."""
    return one(forge.record([(GOOD_SEGMENT, WEIGHTS)], **fields))  # type: ignore[arg-type]


case("record_header_magic", "magic", HEAD, record_with(magic=b"DF12"))
case("record_header_version", "version of the record", errors.VersionError, record_with(version=2))
case("record_header_dtype", "dtype of the record", HEAD, record_with(dtype=2))
case("record_header_reserved_0", "reserved_0", HEAD, record_with(reserved_0=1))
case("record_header_reserved_1", "reserved_1", HEAD, record_with(reserved_1=1))
case("record_header_record_size", "record_size", HEAD, record_with(record_size=len(GOOD_RECORD) + 16))
case(
    "record_header_checksum",
    "header_checksum",
    errors.ChecksumError,
    one(GOOD_RECORD[:32] + bytes(8) + GOOD_RECORD[40:]),
)
case("record_without_weights", "element_count of the record", HEAD, one(forge.record([]), []))
case("record_too_short", "a record holds its header", HEAD, one(GOOD_RECORD[:32], WEIGHTS[:20]))
for name, value in (("0", 0), ("not_a_multiple", 8200), ("too_large", (1 << 24) + 8192)):
    rule = {"0": "is not 0", "not_a_multiple": "is a multiple of 8192", "too_large": "is at most 2^24"}[name]
    file = record_with(segment_elements=value)
    case(f"record_header_segment_elements_{name}", f"segment_elements {rule}", errors.LimitError, file)
MANY: Final = [120 << 7] * 8193
ONE_BIT: Final = {forge.symbol(120, 120): 1, forge.symbol(121, 121): 1}
FIRST: Final = (forge.coded_segment(MANY[:8192], ONE_BIT), MANY[:8192])
FEW: Final = forge.record([FIRST], 8192, element_count=8193)
case("record_header_segment_count", "segment_count", HEAD, one(FEW, MANY))
FOUR: Final = forge.record([], 8192, record_size=96, segment_count=4, element_count=4 * 8192) + bytes(48)
case("record_header_directory", "the directory lies in the record", ENTRY, one(FOUR, [1] * 4 * 8192))
DIRECTORY: Final = errors.DirectoryError


def directory_with(**fields: int) -> bytes:
    """A container of a record with other fields in its directory entry."""
    return one(forge.record([(GOOD_SEGMENT, WEIGHTS)], entry=fields))


case("directory_segment_offset", "segment_offset", DIRECTORY, directory_with(segment_offset=96))
case("directory_element_count", "element_count of the directory entry", DIRECTORY, directory_with(element_count=299))
case("directory_stored_checksum", "stored_checksum", errors.ChecksumError, directory_with(stored_checksum=1))
case("directory_decoded_checksum", "decoded_checksum", errors.ChecksumError, directory_with(decoded_checksum=1))
case(
    "directory_segment_size",
    "a segment lies in the record",
    DIRECTORY,
    directory_with(segment_size=len(GOOD_SEGMENT) + 16),
)
LONGER: Final = forge.record([(GOOD_SEGMENT, WEIGHTS)], record_size=len(GOOD_RECORD) + 16) + bytes(16)
case("directory_bytes_after_the_last_segment", "the last segment ends the record", DIRECTORY, one(LONGER))
case("segment_larger_than_raw", "a segment is not larger than a raw one", DIRECTORY, coded(WEIGHTS[:90]))

# Section 5: the segment.

SEGMENT: Final = errors.SegmentHeaderError
ALIKE: Final = [weight & 0x807F | 120 << 7 for weight in WEIGHTS]
case("segment_encoding", "encoding of the segment", SEGMENT, coded(encoding=2))
case("segment_lane_bytes_0", "lane_bytes", SEGMENT, coded(ALIKE, ONE_BIT, lane_bytes=0))
case("segment_lane_bytes_3", "lane_bytes", SEGMENT, coded(lane_bytes=3))
case("segment_alphabet_size_0", "alphabet_size", SEGMENT, coded(alphabet_size=0))
case("segment_alphabet_size_257", "alphabet_size", SEGMENT, coded(alphabet_size=257))
case("segment_element_count", "element_count of the segment", SEGMENT, coded(element_count=299))
for key in ("tiles", "lanes", "sign_mantissa", "stream"):
    case(f"segment_{key}_offset", f"{key}_offset", SEGMENT, coded(**{f"{key}_offset": 0}))
TOLD: Final = "segment_size is that of the directory"
case("segment_segment_size", TOLD, SEGMENT, coded(segment_size=len(GOOD_SEGMENT) + 16))
UNUSED: Final = "the fields that a raw segment does not use"
for key in ("lane_bytes", "alphabet_size", "tiles_offset", "lanes_offset", "sign_mantissa_offset", "exception_count"):
    case(f"raw_segment_{key}", UNUSED, SEGMENT, raw(**{key: 1}))
case("raw_segment_stream_offset", "a raw segment's weights start at 32", SEGMENT, raw(stream_offset=48))
SHORT: Final = forge.raw_segment(WEIGHTS[:280], element_count=300)
case(
    "raw_segment_too_short", "a raw segment has the size of its weights", SEGMENT, one(forge.record([(SHORT, WEIGHTS)]))
)
LEAST: Final = forge.raw_segment(WEIGHTS[:140], element_count=300)
SIGNS: Final = "a raw segment has the size of its weights"
case("segment_smaller_than_its_signs", SIGNS, DIRECTORY, one(forge.record([(LEAST, WEIGHTS)])))
CUT: Final = forge.raw_segment(WEIGHTS)[:-64]
case("raw_segment_cut", TOLD, SEGMENT, one(forge.record([(CUT, WEIGHTS)])))
NO_STREAM: Final = patched(GOOD_SEGMENT[:400], 24, (400).to_bytes(4, "little"))
case("segment_ends_after_sections", "a tile lies in the segment", SEGMENT, NO_STREAM)
BIG: Final = forge.coded_segment(MANY[:340], {forge.symbol(i, i): 8 for i in range(256)} | {forge.symbol(120, 120): 8})
NO_SECTIONS: Final = BIG[:400]
case(
    "segment_ends_in_its_table",
    "the sections lie in the segment",
    SEGMENT,
    patched(NO_SECTIONS, 24, (400).to_bytes(4, "little"), MANY[:340]),
)

# Section 6: the code table. The segment begins with its header, 32 bytes, then two exponents, then four lengths in two
# bytes.

TABLE: Final = errors.CodeTableError
case("alphabet_descends", "the alphabet ascends", TABLE, patched(GOOD_SEGMENT, 32, b"\x79\x78"))
case("alphabet_repeats", "the alphabet ascends", TABLE, patched(GOOD_SEGMENT, 32, b"\x78\x78"))
COMPLETE: Final = "the code is complete"
case(
    "code_incomplete",
    COMPLETE,
    TABLE,
    coded(code={value: length + (value == max(CODE)) for value, length in CODE.items()}),
)
AA, BA, AB, BB = sorted(CODE)
case("code_oversubscribed", COMPLETE, TABLE, coded(ALIKE, {AA: 1, BA: 2, AB: 2, BB: 2}, codes={AA: "0"}))
SINGLE: Final = forge.symbol(120, 120)
case("single_code_of_two_bits", COMPLETE, TABLE, coded(ALIKE, {SINGLE: 2}, codes={SINGLE: "00"}))
case(
    "last_half_byte",
    "the last half byte is zero",
    TABLE,
    patched(forge.coded_segment(ALIKE, {SINGLE: 1}), 33, b"\x11", ALIKE),
)
STEPS: Final = forge.staircase([forge.symbol(a, b) for a in range(118, 122) for b in range(118, 122)][:14])
case("code_of_13_bits", "a code has at most 12 bits", TABLE, coded([120 << 7] * 600, STEPS))

# Section 7: tiles and lanes.


def lanes(change: Callable[[list[str]], None]) -> Callable[[list[forge.Tile]], None]:
    """Change the lanes of the first tile."""
    return lambda tiles: change(tiles[0].lanes)


def moved(bits: int) -> Callable[[list[forge.Tile]], None]:
    """Let lane 0 claim to end some bits later than it does; the codes stay where they are."""

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


TILE: Final = errors.TileError
LONG: Final = forge.staircase([forge.symbol(a, b) for b in (117, 118, 119, 120) for a in (118, 119, 120, 121)][:13])
LONGEST: Final = max(LONG, key=LONG.__getitem__)
SHORTEST: Final = min(LONG, key=LONG.__getitem__)
TWO_LONG_LANES: Final = [((LONGEST if i // 8 % 32 < 2 else SHORTEST) >> 8 * (i % 2) & 255) << 7 for i in range(600)]
case("stream_position", "stream_position", TILE, patched(GOOD_SEGMENT, 48, (1).to_bytes(4, "little")))
ALL_ZEROS: Final = forge.coded_segment(MANY, ONE_BIT)
SECOND: Final = one(forge.record([(ALL_ZEROS[:56] + bytes(4) + ALL_ZEROS[60:], MANY)]), MANY)
case("stream_position_of_the_second_tile", "stream_position", TILE, SECOND)
ENDS: Final = "a lane ends where its length says"
LOOSE: Final = lanes(lambda lanes_: lanes_.append(lanes_.pop() + "0"))
case("lane_ends_early", ENDS, errors.LaneError, coded(edit=moved(1)))
case("lane_ends_late", ENDS, errors.LaneError, coded(edit=moved(-1)))
case("last_lane_ends_early", ENDS, errors.LaneError, coded(edit=LOOSE))
case("lane_too_short", ENDS, TILE, coded(ALIKE, ONE_BIT, edit=moved(-1)))
case("lane_too_long", ENDS, TILE, coded(TWO_LONG_LANES, LONG, edit=moved(1)))
FILLED: Final = "after the last tile, 16 bytes end the segment"
for name, size in (("goes_on", len(GOOD_SEGMENT) + 16), ("too_short", len(GOOD_SEGMENT) - 16)):
    resized = patched((GOOD_SEGMENT + bytes(16))[:size], 24, size.to_bytes(4, "little"))
    case(f"stream_{name}", FILLED, TILE, resized)
ODD: Final = len(GOOD_SEGMENT) + 8
case("segment_size_not_a_multiple", FILLED, HEAD, patched(GOOD_SEGMENT + bytes(8), 24, ODD.to_bytes(4, "little")))
SUM: Final = "exception_count is the sum over the tiles"
case("exceptions_of_the_segment_more", SUM, TILE, coded(exception_count=2))
case("exceptions_of_the_segment_fewer", SUM, TILE, coded(exception_count=0))
INSIDE: Final = "an exception is a weight of the tile"
case("exception_beyond_the_tile", INSIDE, TILE, coded(edit=excepted((300, 0x7FC0))))
SORTED: Final = "exceptions come lane by lane, by position"
case("exception_twice", SORTED, TILE, coded(edit=excepted((299, 0), (299, 0x7FC0))))
SWAPPED: Final = excepted(*((at, WEIGHTS[at]) for at in (8, 7, 299)))
case("exceptions_not_in_order_of_lanes", SORTED, TILE, coded(edit=SWAPPED))
BACK: Final = excepted(*((at, WEIGHTS[at]) for at in (257, 2, 299)))
case("exceptions_not_in_order_of_positions", SORTED, TILE, coded(edit=BACK))
TWICE: Final = excepted((0, 0), (0, 120 << 7))
case("exceptions_more_than_weights", SORTED, TILE, coded(MANY, ONE_BIT, edit=TWICE))
