"""Records made and edited with their structure in mind, and sealed again so that deep checks are reached."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from df11.formats import errors, layout
from df11.formats.record import Place, Segment, SegmentPlace, weights_dtype
from tests.fuzz.edits import edit_bytes, number
from tests.support import strategies
from tests.vectors import forge

HEADER, ENTRY, SEGMENT = layout.RECORD_HEADER, layout.DIRECTORY_ENTRY, layout.SEGMENT_HEADER
_SIZES = (1, 2, 3, 8, 9, 255, 256, 257, *(513, 1000, 1500, 2000, 3000) * 3)  # Few weights are seldom worth a code.


def new_segment(random: Random, dtype: layout.Kind, count: int | None = None) -> tuple[bytes, list[int]]:
    """A segment of some weights, in any legal code or raw, and the weights."""
    count = count or random.choice(_SIZES)
    flavour = random.choice(sorted(strategies.FLAVOURS))
    bits = strategies.as_kind(strategies.make(flavour, count, random.getrandbits(32)), dtype, random.getrandbits(32))
    weights: list[int] = bits.tolist()
    if random.random() < 0.15:
        return forge.raw_segment(weights, dtype), weights
    exponents = [forge.exponent(weight, dtype) for weight in weights]
    pairs = list(zip(exponents[::2], exponents[1::2], strict=False)) or [(exponents[0], exponents[0])]
    symbols = list(
        dict.fromkeys(
            forge.symbol(*pair) for pair in random.sample(pairs, min(len(pairs), random.choice((1, 2, 3, 8, 13, 40))))
        )
    )
    kind = forge.staircase if len(symbols) in range(2, 14) and random.random() < 0.5 else forge.balanced
    coded = forge.coded_segment(weights, kind(symbols), dtype, lane_bytes=2, pad=random.choice((0, 0, 255)))
    if len(coded) > layout.raw_segment_size(count, dtype):
        return forge.raw_segment(weights, dtype), weights
    return coded, weights


def new_record(random: Random) -> bytes:
    """A valid record of one segment, rarely of two."""
    dtype = random.choice([layout.BF16, *layout.KINDS.values()])
    if random.random() < 0.1:
        parts = [new_segment(random, dtype, layout.TILE_WEIGHTS), new_segment(random, dtype)]
        return forge.record(parts, layout.TILE_WEIGHTS, dtype)
    return forge.record([new_segment(random, dtype)], kind=dtype)


def edit_record(data: bytes, random: Random) -> bytes:
    """A record with one to three edits, most often sealed again."""
    if random.random() < 0.05:
        return new_record(random)
    for _ in range(random.choice((1, 1, 2, 3))):
        data = _edit(data, random)
    if random.random() < 0.9:
        data = sealed(data, decoded=random.random() < 0.8)
    return data


def _edit(data: bytes, random: Random) -> bytes:
    place = _segment(data, random)
    if place is None:
        return edit_bytes(data, random)
    at, entry = place
    start = entry["segment_offset"]
    record = bytearray(data)
    if random.random() < 0.12:
        _set(record, 0, HEADER, random)
    elif random.random() < 0.12:
        _set(record, at, ENTRY, random)
    elif random.random() < 0.2:
        _set(record, start, SEGMENT, random)
    elif random.random() < 0.15:
        return _resized(record, at, entry, random)
    else:
        _edit_section(record, start, SEGMENT.unpack(record, start), random)
    return bytes(record)


def _segment(data: bytes, random: Random) -> tuple[int, dict[str, int]] | None:
    # Where the directory entry of some segment is, and what it says; None if there is no such segment.
    if len(data) < HEADER.size + ENTRY.size:
        return None
    count = min(HEADER.unpack(data)["segment_count"], (len(data) - HEADER.size) // ENTRY.size)
    at = HEADER.size + ENTRY.size * random.randrange(max(count, 1))
    entry = ENTRY.unpack(data, at)
    start, size = entry["segment_offset"], entry["segment_size"]
    return (at, entry) if size >= SEGMENT.size and start + size <= len(data) else None


def _set(record: bytearray, at: int, structure: layout.Structure, random: Random) -> None:
    offset, size, _ = random.choice(structure.table())
    old = int.from_bytes(record[at + offset : at + offset + size], "little")
    record[at + offset : at + offset + size] = number(random, old, 8 * size).to_bytes(size, "little")


def _edit_section(record: bytearray, start: int, header: dict[str, int], random: Random) -> None:
    names = ("tiles_offset", "lanes_offset", "sign_mantissa_offset", "stream_offset", "segment_size")
    bounds = [SEGMENT.size, *(header[name] for name in names)]
    which = random.randrange(len(bounds) - 1)
    begin, end = start + bounds[which], min(start + bounds[which + 1], len(record))
    if not start < begin < end:
        return
    match which:
        case 0 if random.random() < 0.5:  # Two codes change their lengths, or the alphabet its order.
            for _ in range(2):
                at = random.randrange(begin, end)
                record[at] = random.choice((0, record[at] ^ 0x11, 0x11, 0xCC, 0xDD, (record[at] + 1) & 255))
        case 1:
            tile = begin + 8 * random.randrange(max((end - begin) // 8, 1))
            if tile + 8 <= len(record):
                _set(record, tile, layout.TILE_DESCRIPTOR, random)
        case 2 if random.random() < 0.7:  # Their sum stays, and with it the sizes of the tiles.
            one, other = random.randrange(begin, end), random.randrange(begin, end)
            step = random.choice((1, 2, 12, 100))
            record[one], record[other] = (record[one] + step) & 255, (record[other] - step) & 255
        case 4 if random.random() < 0.4:  # Where exceptions are.
            at = max(end - 4 * random.randrange(1, 12), begin)
            record[at : at + 4] = number(random, bits=32).to_bytes(4, "little")
        case _:
            for _ in range(random.choice((1, 2, 8))):
                record[random.randrange(begin, end)] = random.randrange(256)


def _resized(record: bytearray, at: int, entry: dict[str, Any], random: Random) -> bytes:
    # Some bytes more or less, or another segment; sizes and offsets that follow are made right.
    kind = layout.KINDS_BY_CODE.get(record[5], layout.BF16)
    start, size = entry["segment_offset"], entry["segment_size"]
    segment = record[start : start + size]
    where = random.choice((SEGMENT.size, size - 16, size, random.randrange(size + 1)))
    match random.randrange(3):
        case 0:
            segment[where:where] = bytes(random.choice((16, 16, 32, 8192)))
        case 1:
            del segment[where : where + random.choice((16, 16, 32, 256))]
        case _:
            segment = bytearray(
                new_segment(random, kind, entry["element_count"] if entry["element_count"] < 2000 else None)[0]
            )
    if len(segment) < SEGMENT.size:
        return bytes(record)
    offset = next(offset for offset, _, name in SEGMENT.table() if name == "segment_size")
    segment[offset : offset + 4] = len(segment).to_bytes(4, "little")
    entry["segment_size"] = len(segment)
    record[start : start + size] = segment
    record[at : at + ENTRY.size] = ENTRY.pack(**entry)
    end = min(HEADER.size + ENTRY.size * HEADER.unpack(record)["segment_count"], len(record) - ENTRY.size + 1)
    for later in range(at + ENTRY.size, end, ENTRY.size):
        moved: dict[str, Any] = ENTRY.unpack(record, later)
        moved["segment_offset"] = max(moved["segment_offset"] + len(segment) - size, 0) % (1 << 64)
        record[later : later + ENTRY.size] = ENTRY.pack(**moved)
    record[16:24] = len(record).to_bytes(8, "little")
    return bytes(record)


def sealed(data: bytes, *, decoded: bool) -> bytes:
    """A record with right checksums of what is stored and, with ``decoded``, of what a decoder makes of it."""
    if len(data) < HEADER.size:
        return data
    record = bytearray(forge.resealed(data))
    end = HEADER.size + ENTRY.size * HEADER.unpack(record)["segment_count"]
    if not decoded or end > len(record):
        return bytes(record)
    for at in range(HEADER.size, end, ENTRY.size):
        entry: dict[str, Any] = ENTRY.unpack(record, at)
        weights = decode(record, entry)
        if weights is not None:
            entry["decoded_checksum"] = forge.xxh3(weights)
            record[at : at + ENTRY.size] = ENTRY.pack(**entry)
    return forge.resealed(bytes(record))


def decode(record: bytes | bytearray, entry: dict[str, int]) -> bytes | None:
    """The weights of a segment, whatever its checksums are; None if it is refused."""
    start, size = entry["segment_offset"], entry["segment_size"]
    segment = np.frombuffer(bytes(record[start : start + size]), np.uint8)
    kind = layout.KINDS_BY_CODE.get(record[5], layout.BF16)
    smallest, largest = layout.segment_size_range(entry["element_count"], kind)
    if len(segment) != size or not SEGMENT.size < smallest <= size <= largest or size % layout.RECORD_ALIGNMENT:
        return None
    place = SegmentPlace(start, size, entry["element_count"], 0, 0, 0)
    out = np.zeros(entry["element_count"], weights_dtype(kind))
    try:
        Segment(segment, place, Place(), kind, trusted=True).decode(out)
    except errors.Df11Error:
        return None
    return out.tobytes()
