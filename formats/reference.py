"""A slow decoder in pure Python, to test the fast ones against. It follows SPEC.md section by section, to be readable.

It checks every rule of the specification, each by a name; a test takes them out one at a time (:data:`ignored`), and
then the files that break just this one are accepted. What follows from other rules has no check of its own.

Run ``python -m df11.formats.reference FILE.df11`` to print the SHA-256 of every decoded tensor.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import struct
import sys
from dataclasses import dataclass
from typing import Any

import xxhash
import zstandard

from df11.formats.errors import FormatError
from df11.formats.framing import DTYPE_BITS
from df11.formats.layout import KINDS, KNOWN_FEATURES, Kind
from df11.formats.layout import align as align16

ignored: set[str] = set()
"""Rules that are not checked: for tests."""


def require(condition: bool, rule: str) -> None:
    """Raise a FormatError if a rule of the specification is broken."""
    if not condition and rule not in ignored:
        raise FormatError(f"reference decoder: {rule}")


def demand(condition: bool, rule: str) -> None:
    """The same, for a rule without which nothing more can be read."""
    if not condition:
        raise FormatError(f"reference decoder: {rule}")


# Section 2: the file, a safetensors file.


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors header; ``start`` and ``end`` count bytes from the start of the data."""

    dtype: str
    shape: list[int]
    start: int
    end: int


def read_json(text: str, what: str) -> Any:
    """The value of a JSON text."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "an object names a member once")
        return dict(pairs)

    def constant(_: str) -> None:
        require(False, "NaN and Infinity are not JSON")

    def integer(digits: str) -> int | float:
        return int(digits) if digits.isdigit() else float(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
    except (ValueError, RecursionError):
        demand(False, f"{what} is JSON")
    require(depth(value) <= 127, "JSON is at most 127 deep")
    require(
        "\\u" not in text or not re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)), "text is Unicode"
    )
    return value


def depth(value: Any) -> int:
    """Lists and objects inside each other."""
    levels, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        levels += 1
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return levels


def require_size(value: Any) -> int:
    """A size or a position."""
    require(type(value) is int and 0 <= value < 1 << 63, "a size is an integer in digits, below 2^63")
    return int(value)


def read_header(raw: bytes) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, metadata and the size of the data, from the JSON header of a container or a source."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        demand(False, "a header is UTF-8")
    header = read_json(text, "a header")
    demand(isinstance(header, dict), "a header is an object")
    require(raw[:1] == b"{", "a header starts with {")
    metadata = header.pop("__metadata__", None) or {}
    demand(isinstance(metadata, dict), "__metadata__ is an object")
    require(all(isinstance(value, str) for value in metadata.values()), "__metadata__ holds strings")
    entries = {}
    for name, value in header.items():
        demand(isinstance(value, dict), "an entry is an object")
        demand({"dtype", "shape", "data_offsets"} <= value.keys(), "an entry has dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        demand(isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list), "an entry's members")
        require(len(offsets) == 2, "data_offsets are two numbers")
        start, end, *_ = map(require_size, offsets)
        entries[name] = Entry(dtype, shape, start, end)
        require(dtype in DTYPE_BITS, "a dtype is one of safetensors'")
        require(len(shape) <= 64, "a tensor has at most 64 dimensions")
        sizes = [require_size(size) for size in shape]
        bits = DTYPE_BITS.get(dtype, 8)
        require(math.prod(filter(None, sizes)) * bits < 1 << 66, "the sizes that are not 0 make less than 2^63 bytes")
        bits *= math.prod(sizes)
        require(bits % 8 == 0, "a tensor fills its last byte")
        require(end - start == -(-bits // 8) or dtype not in DTYPE_BITS, "data_offsets fit dtype and shape")
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        require(entry.start == position, "a tensor starts where the one before it ends")
        position = entry.end
    return entries, metadata, position


# Section 3: metadata.


@dataclass(frozen=True)
class Container:
    """What is known when a file has been opened."""

    entries: dict[str, Entry]
    tensors: dict[str, Any]
    source: dict[str, Any]
    source_header: str
    data: bytes


def open_file(file: bytes) -> Container:
    """The checks that are due when a file is opened."""
    demand(len(file) >= 8, "a file holds the size of its header")
    header_size = int.from_bytes(file[:8], "little")
    demand(header_size <= 100_000_000, "a header has at most 100,000,000 bytes")
    demand(8 + header_size <= len(file), "a file holds its header")
    entries, metadata, size = read_header(file[8 : 8 + header_size])
    data = file[8 + header_size :]
    require(size <= len(data), "a file holds its data")
    require(size >= len(data), "the data end with the file")
    demand("df11.version" in metadata, "df11.version is there")
    require(metadata["df11.version"] == "1", "df11.version is 1")
    for key in ("requires", "source", "source_header", "tensors"):
        demand(f"df11.{key}" in metadata, f"df11.{key} is there")
    require("df11.writer" in metadata, "df11.writer is there")
    features = read_json(metadata["df11.requires"], "df11.requires")
    named = isinstance(features, list) and all(isinstance(name, str) for name in features)
    require(named, "df11.requires is a list of names")
    require(not named or KNOWN_FEATURES.issuperset(features), "every required feature is known")
    require((8 + header_size) % 64 == 0, "the data start at a multiple of 64")
    source = read_json(metadata["df11.source"], "df11.source")
    demand(isinstance(source, dict), "df11.source is an object")
    demand({"bytes", "sha256", "header_bytes", "cast"} <= source.keys(), "df11.source has its members")
    require_size(source["bytes"])
    require(require_size(source["header_bytes"]) <= 8 * header_size + (8 << 20), "header_bytes is in proportion")
    require(is_hexadecimal(source["sha256"], 64), "sha256 is 64 lower-case digits")
    require(source["cast"] in (None, "bf16"), "cast is bf16 or null")
    tensors = read_json(metadata["df11.tensors"], "df11.tensors")
    demand(isinstance(tensors, dict), "df11.tensors is an object")
    require(tensors.keys() == entries.keys(), "df11.tensors names the same tensors")
    for name in entries.keys() & tensors.keys():
        check_tensor_object(entries[name], tensors[name], features)
    cast = any("exact" in tensor for tensor in tensors.values())
    require(cast == (source["cast"] is not None), "cast says whether a tensor was cast")
    return Container(entries, tensors, source, metadata["df11.source_header"], data)


def is_hexadecimal(value: Any, length: int) -> bool:
    """Whether this is so many lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value) is not None


def check_tensor_object(entry: Entry, tensor: Any, features: list[str]) -> None:
    """A tensor object, and its entry."""
    demand(isinstance(tensor, dict), "a tensor object is an object")
    demand({"encoding", "dtype", "shape"} <= tensor.keys(), "a tensor object has encoding, dtype and shape")
    encoding, dtype, shape = tensor["encoding"], tensor["dtype"], tensor["shape"]
    require(encoding in ("df11", "verbatim"), "an encoding is df11 or verbatim")
    demand(isinstance(dtype, str) and isinstance(shape, list), "a tensor object's dtype and shape")
    require(dtype in DTYPE_BITS, "a dtype is one of safetensors'")
    require(len(shape) <= 64, "a tensor has at most 64 dimensions")
    sizes = [require_size(size) for size in shape]
    bits = DTYPE_BITS.get(dtype, 8)
    require(math.prod(filter(None, sizes)) * bits < 1 << 66, "the sizes that are not 0 make less than 2^63 bytes")
    if "exact" in tensor:
        require(isinstance(tensor["exact"], bool), "exact is true or false")
        require(dtype == "BF16", "a tensor that was cast is BF16")
    if encoding == "df11":
        require(entry.dtype == "U8", "the entry of a record is U8")
        require(len(entry.shape) == 1, "the entry of a record has one dimension")
        demand(dtype in KINDS, "a record is of a dtype that has records")
        require(KINDS[dtype].feature in (None, *features), "df11.requires names the dtypes of records")
        require(entry.start % 16 == 0, "a record starts at a multiple of 16")
        require("xxh3" not in tensor, "a record has no xxh3")
    else:
        require(entry.dtype == dtype, "a verbatim entry has the dtype of its tensor object")
        require(entry.shape == shape, "a verbatim entry has the shape of its tensor object")
        require(is_hexadecimal(tensor.get("xxh3"), 16), "xxh3 is 16 lower-case digits")


def decode_tensor(container: Container, name: str) -> bytes:
    """A tensor, little-endian, as it was in the source or after the cast."""
    entry, tensor = container.entries[name], container.tensors[name]
    stored = container.data[entry.start : entry.end]
    if tensor["encoding"] == "df11":
        return decode_record(stored, math.prod(tensor["shape"]), tensor["dtype"])
    if isinstance(tensor.get("xxh3"), str):
        require(xxhash.xxh3_64_hexdigest(stored) == tensor["xxh3"].lower(), "xxh3 of a verbatim tensor")
    return stored


def decode_file(file: bytes) -> dict[str, bytes]:
    """All tensors of a `.df11` file."""
    container = open_file(file)
    return {name: decode_tensor(container, name) for name in container.entries if name in container.tensors}


# Sections 3 and 11: the source.


def read_source_header(container: Container) -> tuple[bytes, dict[str, Entry]]:
    """The JSON header of the source, and its entries."""
    source, text = container.source, container.source_header
    letters = re.sub("[^A-Za-z0-9+/]", "", text)
    letters = letters[: len(letters) - (len(letters) % 4 == 1)]  # One letter alone is no byte.
    frame = base64.b64decode(letters + "=" * 3)[: len(letters) * 3 // 4]
    require(base64.b64encode(frame).decode() == text, "base64 is RFC 4648, section 4, without anything else")
    demand(len(frame) > 5 and frame[:4] == bytes.fromhex("28b52ffd"), "df11.source_header is a Zstandard frame")
    dictionary = (0, 1, 2, 4)[frame[4] & 3]
    require(not dictionary, "the frame has no dictionary")
    if dictionary:  # Only a test gets here. Its frame has no window descriptor before the dictionary's ID.
        frame = frame[:4] + bytes([frame[4] & 0xFC]) + frame[5 + dictionary :]
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        raw = decompressor.decompress(frame)
    except zstandard.ZstdError:
        demand(False, "df11.source_header is a Zstandard frame")
    demand(decompressor.eof, "the frame is whole")
    require(not decompressor.unused_data, "there is one frame")
    require(len(raw) == source["header_bytes"], "the source header has header_bytes bytes")
    entries, _, size = read_header(raw)
    require(source["bytes"] == 8 + source["header_bytes"] + size, "bytes is the size of the source")
    require(entries.keys() == container.entries.keys(), "the source has the same tensors")
    for name in entries.keys() & container.tensors.keys():
        tensor = container.tensors[name]
        require(entries[name].dtype == ("F32" if "exact" in tensor else tensor["dtype"]), "the source's dtypes")
        require(entries[name].shape == tensor["shape"], "the source's shapes")
    return raw, entries


def restore_file(container: Container) -> bytes | None:
    """The source, or None if a cast has changed values."""
    raw, entries = read_source_header(container)
    if any(tensor.get("exact") is False for tensor in container.tensors.values()):
        return None
    restored = len(raw).to_bytes(8, "little") + raw
    for name, _ in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if name in container.entries.keys() & container.tensors.keys():
            content = decode_tensor(container, name)
            if "exact" in container.tensors[name]:
                content = b"".join(b"\0\0" + content[i : i + 2] for i in range(0, len(content), 2))
            restored += content
    require(hashlib.sha256(restored).hexdigest() == str(container.source["sha256"]).lower(), "sha256 of the source")
    return restored


# Section 4: the record.


def decode_record(record: bytes, weights_of_the_shape: int | None = None, dtype_of_the_tensor: str = "BF16") -> bytes:
    """The weights of a record, little-endian."""
    kind = KINDS[dtype_of_the_tensor]
    demand(len(record) >= 48, "a record holds its header")
    (
        magic,
        version,
        dtype,
        reserved_0,
        element_count,
        record_size,
        segment_count,
        segment_elements,
        header_checksum,
        reserved_1,
    ) = struct.unpack_from("<4sBBHQQIIQQ", record)
    require(magic == b"DF11", "magic")
    require(version == 1, "version of the record")
    require(dtype == kind.code, "dtype of the record")
    require(reserved_0 == 0, "reserved_0")
    require(reserved_1 == 0, "reserved_1")
    require(record_size == len(record), "record_size")
    require(1 <= element_count <= 1 << 40, "element_count of the record")
    require(element_count == weights_of_the_shape or weights_of_the_shape is None, "element_count fits the shape")
    demand(segment_elements > 0, "segment_elements is not 0")
    require(segment_elements % 8192 == 0, "segment_elements is a multiple of 8192")
    require(segment_elements <= 1 << 24, "segment_elements is at most 2^24")
    require(segment_count == -(-element_count // segment_elements), "segment_count")
    directory_end = 48 + 32 * segment_count
    demand(directory_end <= len(record), "the directory lies in the record")
    covered = record[:32] + bytes(8) + record[40:directory_end]
    require(xxhash.xxh3_64_intdigest(covered) == header_checksum, "header_checksum")
    weights = b""
    position = directory_end
    for index in range(segment_count):
        offset, size, count, stored_checksum, decoded_checksum = struct.unpack_from("<QIIQQ", record, 48 + 32 * index)
        require(offset == position, "segment_offset")
        demand(position + size <= len(record), "a segment lies in the record")
        whole = min(segment_elements, element_count - index * segment_elements)
        require(count == whole, "element_count of the directory entry")
        require(size <= align16(32 + kind.bytes * whole), "a segment is not larger than a raw one")
        segment = record[position : position + size]
        require(xxhash.xxh3_64_intdigest(segment) == stored_checksum, "stored_checksum")
        decoded = decode_segment(segment, whole, kind)
        require(xxhash.xxh3_64_intdigest(decoded) == decoded_checksum, "decoded_checksum")
        weights += decoded
        position += size
    require(position == len(record), "the last segment ends the record")
    return weights


# Section 5: the segment.


def decode_segment(segment: bytes, n: int, kind: Kind) -> bytes:
    """The weights of a segment, little-endian."""
    demand(len(segment) >= 32, "a segment holds its header")
    (
        encoding,
        lane_bytes,
        k,
        element_count,
        tiles_offset,
        lanes_offset,
        sign_mantissa_offset,
        stream_offset,
        segment_size,
        exception_count,
    ) = struct.unpack_from("<BBHIIIIIII", segment)
    require(element_count == n, "element_count of the segment")
    require(segment_size == len(segment), "segment_size is that of the directory")
    require(encoding <= 1 + kind.most_left_out, "encoding of the segment")
    if encoding == 0:
        unused = (lane_bytes, k, tiles_offset, lanes_offset, sign_mantissa_offset, exception_count)
        require(unused == (0,) * 6, "the fields that a raw segment does not use")
        require(stream_offset == 32, "a raw segment's weights start at 32")
        require(segment_size == align16(32 + kind.bytes * n), "a raw segment has the size of its weights")
        return segment[32 : 32 + kind.bytes * n]
    require(lane_bytes in (1, 2), "lane_bytes")
    demand(1 <= k <= 256, "alphabet_size")
    tiles = -(-n // 8192)
    tiles_at = align16(32 + k + (k * k + 1) // 2)
    lanes_at = align16(tiles_at + 8 * tiles)
    signs_at = stream_at = lanes_at + 32 * lane_bytes * tiles
    planes: list[tuple[int, int]] = []  # of those that are stored: bits of a weight, start
    left_out = encoding - 1 if encoding <= 1 + kind.most_left_out else 0
    for bits, size in list(zip(kind.planes, kind.plane_sizes(n), strict=True))[: len(kind.planes) - left_out]:
        planes.append((bits, stream_at))
        stream_at += align16(size)
    require(tiles_offset == tiles_at, "tiles_offset")
    require(lanes_offset == lanes_at, "lanes_offset")
    require(sign_mantissa_offset == signs_at, "sign_mantissa_offset")
    require(stream_offset == stream_at, "stream_offset")
    demand(stream_at <= len(segment), "the sections lie in the segment")
    codes = read_codes(segment[32:tiles_at], k, kind)
    weights = bytearray()
    position = exceptions_seen = 0
    for tile in range(tiles):
        stream_position, shortest_lane, exceptions = struct.unpack_from("<IHH", segment, tiles_at + 8 * tile)
        require(stream_position == position, "stream_position")
        start = lanes_at + 32 * lane_bytes * tile
        excess = [segment[start + lane_bytes * lane : start + lane_bytes * (lane + 1)] for lane in range(32)]
        lanes = [shortest_lane + int.from_bytes(stored, "little") for stored in excess]
        tile_size = -(-sum(lanes) // 32) * 4 + 4 * exceptions
        begin = stream_at + 16 * position
        demand(begin + tile_size <= len(segment), "a tile lies in the segment")
        m = min(8192, n - 8192 * tile)
        exponents, fixes = decode_tile(segment[begin : begin + tile_size], lanes, m, exceptions, codes)
        # Section 8: put the weights together.
        for j, exponent in enumerate(exponents):
            weight = join(exponent, [read_plane(segment, *plane, 8192 * tile + j) for plane in planes], kind)
            if j in fixes:
                require(fixes[j] < 256**kind.bytes, "an exception is not wider than a weight")
                weight = (fixes[j] << 16) | (weight & 0xFFFF) if kind.bytes == 4 else fixes[j] % 256**kind.bytes
            weights += weight.to_bytes(kind.bytes, "little")
        position += align16(tile_size) // 16
        exceptions_seen += exceptions
    require(stream_at + 16 * position + 16 == len(segment), "after the last tile, 16 bytes end the segment")
    require(exceptions_seen == exception_count, "exception_count is the sum over the tiles")
    return bytes(weights)


def read_plane(segment: bytes, bits: int, start: int, weight: int) -> int:
    """The bits of a weight in a plane."""
    chunk, x = divmod(weight, 256)
    row, column = divmod(x, 32 * bits)
    return (segment[start + 32 * bits * chunk + column] >> (bits * row)) & ((1 << bits) - 1)


def join(exponent: int, parts: list[int], kind: Kind) -> int:
    """A weight from its exponent and its bits in the planes; those that are not stored are zero."""
    raw = 0
    for i, bits in enumerate(kind.planes):
        raw = (raw << bits) | (parts[i] if i < len(parts) else 0)
    sign, mantissa = divmod(raw, 1 << kind.mantissa_bits)
    return (sign << (8 * kind.bytes - 1)) | (exponent << kind.mantissa_bits) | mantissa


# Section 6: the code table.

Codes = dict[tuple[int, int], tuple[int, int]]
"""(length, code with its first bit as the most significant) -> (e0, e1)"""


def read_codes(section: bytes, k: int, kind: Kind) -> Codes:
    """The codes of a code table."""
    alphabet = section[:k]
    require(all(a < b for a, b in itertools.pairwise(alphabet)), "the alphabet ascends")
    require(max(alphabet) < 1 << kind.exponent_bits, "the alphabet's exponents fit the dtype")
    lengths = [(section[k + j // 2] >> (4 * (j % 2))) & 15 for j in range(k * k + k % 2)]
    require(k % 2 == 0 or lengths.pop() == 0, "the last half byte is zero")
    pairs = sorted((length, j) for j, length in enumerate(lengths[: k * k]) if length)
    require(all(length <= 12 for length, _ in pairs), "a code has at most 12 bits")
    alone = [length for length, _ in pairs] == [1]
    require(alone or sum(2.0**-length for length, _ in pairs) == 1, "the code is complete")
    codes = {}
    code = previous = 0
    for length, j in pairs:
        code <<= length - previous
        codes[length, code] = (alphabet[j % k], alphabet[j // k])
        code += 1
        previous = length
    if alone:
        codes[1, 1] = codes[1, 0]
    return codes


# Section 7: tiles and lanes.


def decode_tile(
    data: bytes, lanes: list[int], m: int, exception_count: int, codes: Codes
) -> tuple[list[int], dict[int, int]]:
    """Exponents of the m weights of a tile, and its exceptions: position -> weight."""
    chunks = -(-m // 256)
    exponents = [0] * (256 * chunks)
    bits = int.from_bytes(data[: -(-sum(lanes) // 32) * 4], "little")
    start = 0
    for lane, length in enumerate(lanes):
        position = start
        for chunk, pair in itertools.product(range(chunks), range(4)):
            code = code_length = 0
            while (code_length, code) not in codes:
                demand(code_length < 15, "the bits are codes")
                code = (code << 1) | ((bits >> position) & 1)
                code_length += 1
                position += 1
            at = 256 * chunk + 8 * lane + 2 * pair
            exponents[at], exponents[at + 1] = codes[code_length, code]
        start += length
        require(position == start, "a lane ends where its length says")
    fixes = {}
    previous = (-1, -1)
    for i in range(exception_count):
        position, weight = struct.unpack_from("<HH", data, len(data) - 4 * exception_count + 4 * i)
        place = (position // 8 % 32, position)
        require(position < m, "an exception is a weight of the tile")
        require(place > previous, "exceptions come lane by lane, by position")
        previous = place
        fixes[position] = weight
    return exponents[:m], fixes


def main() -> None:
    """Print the SHA-256 of every decoded tensor of a file."""
    with open(sys.argv[1], "rb") as file:
        for name, tensor in decode_file(file.read()).items():
            sys.stdout.write(f"{hashlib.sha256(tensor).hexdigest()} {name!r}\n")


if __name__ == "__main__":
    main()
