"""The worked examples of formats/SPEC.md, section 13: ``python -m tests.vectors.worked_example`` prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from df11.formats import layout
from tests.vectors import forge

LENGTHS: Final = {forge.symbol(127, 127): 1, forge.symbol(126, 127): 2, forge.symbol(127, 126): 2}
EXCEPTION: Final = 9
WEIGHTS: Final = [0xFF80 if i == EXCEPTION else (127 if i % 5 else 126) << 7 | i & 0x7F for i in range(257)]
SEGMENT: Final = forge.coded_segment(WEIGHTS, LENGTHS)
RECORD: Final = forge.record([(SEGMENT, WEIGHTS)])
START: Final = len(RECORD) - len(SEGMENT)
"""Where the segment starts."""


def other_weights(kind: layout.Kind) -> list[int]:
    """The same for another dtype: two exponents, an exception with the highest one, and any other bits."""
    ones = (1 << kind.exponent_bits) - 1 << kind.mantissa_bits
    others = [0x9E3779B1 * i & (1 << 8 * kind.bytes) - 1 & ~ones for i in range(511)]
    weights = [(9 if i % 5 else 8) << kind.mantissa_bits | other for i, other in enumerate(others)]
    weights[EXCEPTION] |= ones
    return weights


def other_record(kind: layout.Kind) -> bytes:
    """A record of those weights."""
    weights = other_weights(kind)
    lengths = {forge.symbol(9, 9): 1, forge.symbol(8, 9): 2, forge.symbol(9, 8): 2}
    return forge.record([(forge.coded_segment(weights, lengths, kind), weights)], kind=kind)


_WIDTH: Final = 47


def _line(offset: int, data: bytes, note: str) -> str:
    return f"{offset:3d}  {data.hex(' '):{_WIDTH}}  {note}"


def _structure(structure: layout.Structure, start: int) -> Iterator[str]:
    values = structure.unpack(RECORD, start)
    for offset, size, field in structure.table():
        note = f"{field} = " + (f"{values[field]:#x}" if size == 8 and values[field] >> 32 else str(values[field]))
        if field == "magic":
            note = 'magic = "DF11"'
        yield _line(start + offset, RECORD[start + offset : start + offset + size], note)


def _rows(start: int, end: int, note: str) -> Iterator[str]:
    for at in range(start, end, 16):
        yield _line(at, RECORD[at : min(at + 16, end)], note if at == start else "").rstrip()


def dump() -> str:
    """The bytes of the record, with their meaning. Offsets count from the start of the record, in decimal."""
    header = layout.SEGMENT_HEADER.unpack(SEGMENT)
    tiles, lanes, signs, stream = (
        START + header[f"{name}_offset"] for name in ("tiles", "lanes", "sign_mantissa", "stream")
    )
    tile = forge.encode_tile(WEIGHTS, forge.canonical_codes(LENGTHS))
    codes = -(-sum(map(len, tile.lanes)) // 32) * 4
    exception = stream + codes
    end = len(RECORD) - layout.STREAM_END
    lines = [
        "record header",
        *_structure(layout.RECORD_HEADER, 0),
        "directory entry",
        *_structure(layout.DIRECTORY_ENTRY, 48),
        "segment header",
        *_structure(layout.SEGMENT_HEADER, START),
        "code table, tile descriptor, lane lengths",
        _line(START + 32, RECORD[START + 32 : START + 34], "alphabet: 126, 127"),
        _line(
            START + 34,
            RECORD[START + 34 : START + 36],
            "lengths of (126, 126): none, (127, 126): 2, (126, 127): 2, (127, 127): 1",
        ),
        _line(START + 36, RECORD[START + 36 : tiles], "padding"),
        *_structure(layout.TILE_DESCRIPTOR, tiles),
        _line(tiles + 8, RECORD[tiles + 8 : lanes], "padding"),
        *_rows(lanes, signs, "bits of the 32 lanes beyond shortest_lane"),
        "sign/mantissa bytes, code stream",
        _line(signs, RECORD[signs : signs + 16], "of the weights 0 to 15"),
        f"     {'...':{_WIDTH}}  of weight i: i & 0x7f",
        *_rows(signs + 256, stream, "of the weight 256, padding"),
        *_rows(stream, exception, f"codes, {sum(map(len, tile.lanes))} bits, and zero bits"),
        _line(exception, RECORD[exception : exception + 2], f"position = {EXCEPTION}"),
        _line(exception + 2, RECORD[exception + 2 : exception + 4], f"weight = {WEIGHTS[EXCEPTION]:#x}"),
        *([_line(exception + 4, RECORD[exception + 4 : end], "padding")] if exception + 4 < end else []),
        _line(end, RECORD[end:], "end of the stream"),
    ]
    return "\n".join(lines)


def _quoted(parts: list[str]) -> str:
    return " ".join(f"`{part}`" for part in parts)


def record_markdown() -> str:
    """The worked record."""
    codes = forge.canonical_codes(LENGTHS)
    names = ", ".join(f"`{code}` for ({value & 255}, {value >> 8})" for value, code in codes.items())
    lane = forge.encode_tile(WEIGHTS, codes).lanes[0]
    parts, at = [], 0
    while at < len(lane):
        length = next(length for length in (1, 2) if lane[at : at + length] in codes.values())
        parts.append(lane[at : at + length])
        at += length
    first = RECORD[START + layout.SEGMENT_HEADER.unpack(SEGMENT)["stream_offset"]]
    paragraphs = [
        f"A record of 257 weights, {len(RECORD)} bytes. Weight i has the exponent 126 if i is a multiple of 5, else"
        f" 127, is positive, and has the mantissa i mod 128; but weight {EXCEPTION} is `0xff80`, minus infinity, with"
        " the exponent 255. (The reference writer would code this one pair; here it is an exception, to show one.)"
        " Offsets count from the start of the record, in decimal.",
        f"The three codes, first bit first, for the exponents (e0, e1): {names}. The tile has C = 2 chunks, so each"
        f" lane codes 8 pairs. The first byte of the stream, `{first:02x}`, is `{f'{first:08b}'[::-1]}` from bit 0 on."
        f" Lane 0 has {len(lane)} bits: {_quoted(parts[:4])} for the weights 0 to 7, {_quoted(parts[4:])} for"
        " 256 to 263, of which only 256 exists: (127, 127) serves it, as it serves pairs that do not exist at all."
        f" Weights 8 and {EXCEPTION}, (127, 255), are coded in lane 1 as (127, 127); then the exception"
        f" replaces weight {EXCEPTION}, whose sign/mantissa byte is of no account.",
    ]
    return f"{_wrapped(paragraphs[0])}\n\n```\n{dump()}\n```\n\n{_wrapped(paragraphs[1])}\n"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


# Two tiles, with an alphabet of three exponents.

TWO_TILES: Final = [(125 + (i // 2) % 3) << 7 for i in range(8192)] + [127 << 7] * 3
THREE: Final = {forge.symbol(125, 125): 2, forge.symbol(126, 126): 2, forge.symbol(127, 127): 1}


def trace_markdown() -> str:
    """The decoding of a segment of two tiles."""
    segment = forge.coded_segment(TWO_TILES, THREE)
    header = layout.SEGMENT_HEADER.unpack(segment)
    lines = [
        _line(32, segment[32:35], "alphabet: K = 3"),
        _line(35, segment[35:40], "grid: 9 half bytes, the last one 0"),
    ]
    for tile in range(2):
        at = header["tiles_offset"] + 8 * tile
        values = layout.TILE_DESCRIPTOR.unpack(segment, at)
        note = f"tile {tile}: " + ", ".join(f"{field} = {value}" for field, value in values.items())
        lines.append(_line(at, segment[at : at + 8], note))
    for tile in range(2):
        at = header["lanes_offset"] + 32 * tile
        lines.append(_line(at, segment[at : at + 4], f"tile {tile}: lanes 0 to 3 beyond shortest_lane"))
    bits = int.from_bytes(segment[header["stream_offset"] :], "little")
    codes = {code: value for value, code in forge.canonical_codes(THREE).items()}
    lines += ["", "tile  lane  first bit  bits  codes                                   weights: exponents"]
    for tile, lane, shown in ((0, 0, 6), (0, 1, 6), (1, 0, 4), (1, 1, 4)):
        values = layout.TILE_DESCRIPTOR.unpack(segment, header["tiles_offset"] + 8 * tile)
        at = header["lanes_offset"] + 32 * tile
        lengths = [values["shortest_lane"] + extra for extra in segment[at : at + 32]]
        start = position = 128 * values["stream_position"] + sum(lengths[:lane])
        pairs, places = [], []
        for pair in range(shown):
            code = ""
            while code not in codes:
                code += str(bits >> position & 1)
                position += 1
            place = 256 * (pair // 4) + 8 * lane + 2 * (pair % 4)
            pairs.append(code)
            places.append(f"{place}: {codes[code] & 255}" if tile * 8192 + place < len(TWO_TILES) else f"{place}: none")
        more = " ..." if position - start < lengths[lane] else ""
        text = " ".join(pairs) + more
        lines.append(f"{tile:4d}  {lane:4d}  {start:9d}  {lengths[lane]:4d}  {text:38}  {', '.join(places)}{more}")
    named = ", ".join(f"`{code}` for {value & 255}" for code, value in codes.items())
    paragraphs = [
        f"The trace of a coded segment of {len(TWO_TILES)} weights, all positive with mantissa 0: in the first tile,"
        " pairs of the exponents 125, 126, 127 in turn; in the second, three weights of exponent 127. The codes, each"
        f" for a pair of the same exponent, are {named}. Offsets count from the start of the segment; its code stream"
        f" starts at {header['stream_offset']}.",
        "The second tile has m = 3 and C = 1: every lane codes 4 pairs, though only lane 0 has any weights. The"
        " weight 3 does not exist either: the decoder drops it.",
    ]
    return f"{_wrapped(paragraphs[0])}\n\n```\n" + "\n".join(lines) + f"\n```\n\n{_wrapped(paragraphs[1])}\n"


# A container.

NUMBERS: Final = forge.Tensor("n", "I16", (2,), bytes.fromhex("0100ffff"))
CONTAINER: Final = forge.container([forge.bf16("w", WEIGHTS, RECORD), NUMBERS])


def container_markdown() -> str:
    """The worked container."""
    header, data = forge.split(CONTAINER)
    text = header.decode().rstrip(" ")
    for piece in (',"df11.', '},"w":', '},"n":', ',\\"n\\"'):
        text = text.replace(piece, piece[: piece.index(",") + 1] + "\n " + piece[piece.index(",") + 1 :])
    source_header = forge.safetensors_file([forge.bf16("w", WEIGHTS, RECORD), NUMBERS])[0].decode()
    lines = [line if len(line) < 180 else f"{line[:100]}...{line[-20:]}" for line in text.splitlines()]
    size = len(header)
    body = [
        f"{0:5d}  {CONTAINER[:8].hex(' ')}   N = {size}",
        f"{8:5d}  JSON, {size - (spaces := size - len(header.rstrip(b' ')))} bytes, and {spaces} spaces",
        f"{8 + size:5d}  the record of w, {len(RECORD)} bytes: see below",
        f"{8 + size + len(RECORD):5d}  {data[len(RECORD) :].hex(' ')}               n, verbatim; the end of the file",
    ]
    intro = (
        f"A container of {len(CONTAINER)} bytes, with the record below as the tensor `w` and a verbatim tensor `n`."
        " Offsets count from the start of the file."
    )
    json_intro = "Its JSON, with line breaks that are not in the file, and one long value shortened:"
    end = f"`df11.source_header` holds the {len(source_header)} bytes"
    return (
        f"{_wrapped(intro)}\n\n```\n"
        + "\n".join(body)
        + f"\n```\n\n{json_intro}\n\n```\n"
        + "\n".join(lines)
        + f"\n```\n\n{end}\n\n```\n{source_header}\n```\n"
    )


def markdown() -> str:
    """Section 13 without its heading."""
    return "\n".join(
        [
            f"**A container**\n\n{container_markdown()}",
            f"**A record**\n\n{record_markdown()}",
            f"**Two tiles, K odd**\n\n{trace_markdown()}",
        ]
    )


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
