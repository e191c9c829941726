"""A slow decoder in pure Python, in the order of SPEC.md, to test the fast ones against. It favours reading over speed.

Run ``python -m df11.formats.reference FILE.df11`` to print the SHA-256 of every decoded tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import sys

import xxhash

from df11.formats.errors import FormatError


def require(condition: bool, rule: str) -> None:
    """Refuse what breaks a rule of the specification."""
    if not condition:
        raise FormatError(f"reference decoder: {rule}")


def align16(value: int) -> int:
    """Section 0: rounded up to a multiple of 16."""
    return -(-value // 16) * 16


# Section 2: the file, and section 3: metadata.


def decode_file(data: bytes) -> dict[str, bytes]:
    """All tensors of a `.df11` file: name -> decoded bytes, little-endian."""
    (header_size,) = struct.unpack_from("<Q", data, 0)
    header = json.loads(data[8 : 8 + header_size])
    metadata = header.pop("__metadata__")
    require(metadata["df11.version"] == "1", "df11.version is 1")
    require(json.loads(metadata["df11.requires"]) == [], "no unknown feature")
    require((8 + header_size) % 64 == 0, "data start at a multiple of 64")
    tensors = json.loads(metadata["df11.tensors"])
    require(tensors.keys() == header.keys(), "the same names")
    result = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        stored = data[8 + header_size + start : 8 + header_size + end]
        if tensors[name]["encoding"] == "df11":
            require(start % 16 == 0, "a record starts at a multiple of 16")
            result[name] = decode_record(stored)
        else:
            require(xxhash.xxh3_64_hexdigest(stored) == tensors[name]["xxh3"], "xxh3 of a verbatim tensor")
            result[name] = stored
    return result


# Section 4: the record.


def decode_record(record: bytes) -> bytes:
    """The weights of a record, u16 little-endian."""
    require(len(record) >= 80, "a record holds a header and a directory entry")
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
    require(magic == b"DF11" and version == 1 and dtype == 1, "magic, version, dtype")
    require(reserved_0 == 0 and reserved_1 == 0, "reserved bytes are zero")
    require(record_size == len(record) and record_size % 16 == 0, "record_size")
    require(element_count >= 1, "element_count")
    require(segment_elements % 8192 == 0 and 8192 <= segment_elements <= 1 << 24, "segment_elements")
    require(segment_count == -(-element_count // segment_elements), "segment_count")
    directory_end = 48 + 32 * segment_count
    require(directory_end <= len(record), "the directory lies in the record")
    covered = record[:32] + bytes(8) + record[40:directory_end]
    require(xxhash.xxh3_64_intdigest(covered) == header_checksum, "header_checksum")
    weights = b""
    position = directory_end
    for index in range(segment_count):
        offset, size, count, stored_checksum, decoded_checksum = struct.unpack_from("<QIIQQ", record, 48 + 32 * index)
        require(offset == position and offset + size <= len(record), "segments without gaps")
        require(
            count == min(segment_elements, element_count - index * segment_elements), "element_count of the segment"
        )
        segment = record[offset : offset + size]
        require(xxhash.xxh3_64_intdigest(segment) == stored_checksum, "stored_checksum")
        decoded = decode_segment(segment, count)
        require(xxhash.xxh3_64_intdigest(decoded) == decoded_checksum, "decoded_checksum")
        weights += decoded
        position += size
    require(position == len(record), "the last segment ends the record")
    return weights


# Section 5: the segment.


def decode_segment(segment: bytes, count: int) -> bytes:
    """The weights of a segment, u16 little-endian."""
    require(align16(32 + count) <= len(segment) <= align16(32 + 2 * count) and len(segment) % 16 == 0, "segment_size")
    (
        encoding,
        lane_bytes,
        k,
        n,
        tiles_offset,
        lanes_offset,
        sign_mantissa_offset,
        stream_offset,
        size,
        exception_count,
    ) = struct.unpack_from("<BBHIIIIIII", segment)
    require(n == count and size == len(segment), "element_count and segment_size")
    if encoding == 0:
        require(
            (lane_bytes, k, tiles_offset, lanes_offset, sign_mantissa_offset, exception_count) == (0,) * 6,
            "a raw header",
        )
        require(stream_offset == 32 and size == align16(32 + 2 * n), "a raw segment")
        return segment[32 : 32 + 2 * n]
    require(encoding == 1 and lane_bytes in (1, 2) and 1 <= k <= 256, "a coded header")
    tiles = -(-n // 8192)
    require(tiles_offset == align16(32 + k + (k * k + 1) // 2), "tiles_offset")
    require(lanes_offset == align16(tiles_offset + 8 * tiles), "lanes_offset")
    require(sign_mantissa_offset == lanes_offset + 32 * lane_bytes * tiles, "sign_mantissa_offset")
    require(stream_offset == align16(sign_mantissa_offset + n), "stream_offset")
    require(stream_offset + 16 <= size, "the sections lie in the segment")
    codes = read_codes(segment[32:tiles_offset], k)
    exponents_and_fixes = []
    position = exceptions_seen = 0
    for tile in range(tiles):
        stream_position, shortest_lane, exceptions = struct.unpack_from("<IHH", segment, tiles_offset + 8 * tile)
        require(stream_position == position, "tiles without gaps")
        start = lanes_offset + 32 * lane_bytes * tile
        lanes = [
            shortest_lane
            + int.from_bytes(segment[start + lane_bytes * lane : start + lane_bytes * (lane + 1)], "little")
            for lane in range(32)
        ]
        m = min(8192, n - 8192 * tile)
        require(exceptions <= m, "exception_count of the tile")
        tile_size = -(-sum(lanes) // 32) * 4 + 4 * exceptions
        begin = stream_offset + 16 * stream_position
        require(begin + align16(tile_size) <= size - 16, "the tile lies in the stream")
        exponents_and_fixes.append(decode_tile(segment[begin : begin + tile_size], lanes, m, exceptions, codes))
        position += align16(tile_size) // 16
        exceptions_seen += exceptions
    require(stream_offset + 16 * position + 16 == size, "the stream ends the segment")
    require(exceptions_seen == exception_count, "exception_count")
    # Section 8: put the weights together.
    weights = []
    for tile, (exponents, fixes) in enumerate(exponents_and_fixes):
        for j, exponent in enumerate(exponents):
            s = segment[sign_mantissa_offset + 8192 * tile + j]
            weights.append(fixes.get(j, ((s & 0x80) << 8) | (exponent << 7) | (s & 0x7F)))
    return struct.pack(f"<{n}H", *weights)


# Section 6: the code table.


def read_codes(section: bytes, k: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(length, code with its first bit as the most significant) -> (e0, e1)."""
    alphabet = section[:k]
    require(all(a < b for a, b in itertools.pairwise(alphabet)), "the alphabet ascends")
    nibbles = [(section[k + j // 2] >> (4 * (j % 2))) & 15 for j in range(k * k + k % 2)]
    require(k % 2 == 0 or nibbles.pop() == 0, "the last half byte is zero")
    pairs = sorted((length, j) for j, length in enumerate(nibbles) if length)
    require(all(length <= 12 for length, _ in pairs), "code length")
    codes = {}
    code = previous = 0
    for length, j in pairs:
        code <<= length - previous
        codes[length, code] = (alphabet[j % k], alphabet[j // k])
        code += 1
        previous = length
    if len(pairs) == 1:
        require(pairs[0][0] == 1, "a single code has length 1")
        codes[1, 1] = codes[1, 0]
    require(sum(1 << (12 - length) for length, _ in codes) == 4096, "the code is complete")
    return codes


# Section 7: tiles and lanes.


def decode_tile(
    data: bytes, lanes: list[int], m: int, exception_count: int, codes: dict[tuple[int, int], tuple[int, int]]
) -> tuple[list[int], dict[int, int]]:
    """Exponents of the m weights of a tile, and its exceptions: position -> weight."""
    chunks = -(-m // 256)
    exponents = [0] * (256 * chunks)
    bits = int.from_bytes(data[: -(-sum(lanes) // 32) * 4], "little")
    start = 0
    for lane, length in enumerate(lanes):
        position = start
        for chunk in range(chunks):
            for pair in range(4):
                code = code_length = 0
                while (code_length, code) not in codes:
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
        require(position < m and place > previous, "exceptions lane by lane, by position")
        previous = place
        fixes[position] = weight
    return exponents[:m], fixes


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        for tensor_name, tensor in decode_file(file.read()).items():
            print(hashlib.sha256(tensor).hexdigest(), tensor_name)
