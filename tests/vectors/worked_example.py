"""The worked record of formats/SPEC.md, section 13: ``python -m tests.vectors.worked_example`` prints its Markdown."""

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
    """The bytes of the record, each with what it means. Offsets count from the start of the record, in decimal."""
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


def markdown() -> str:
    """Section 13 without its heading."""
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
        f"A record of 257 weights, {len(RECORD)} bytes. Weight i has the exponent 126 if i is a multiple of 5, else 127, is positive, and has "
        f"the mantissa i mod 128; but weight {EXCEPTION} is `0xff80`, minus infinity, with the exponent 255. (The reference writer would code "
        "this one pair; here it is an exception, to show one.) Offsets count from the start of the record, in decimal.",
        f"The three codes, first bit first, for the exponents (e0, e1): {names}. The tile has C = 2 chunks, so each lane codes 8 pairs. "
        f"The first byte of the stream, `{first:02x}`, is `{f'{first:08b}'[::-1]}` from bit 0 on. Lane 0 has {len(lane)} bits: "
        f"{_quoted(parts[:4])} for the weights 0 to 7, {_quoted(parts[4:])} for 256 to 263, of which only 256 exists: (127, 127) serves it, "
        f"as it serves pairs that do not exist at all. Weights 8 and {EXCEPTION}, (127, 255), are coded in lane 1 as (127, 127); then the "
        f"exception replaces weight {EXCEPTION}, whose sign/mantissa byte is of no account.",
    ]
    wrapped = [
        textwrap.fill(paragraph, 140, break_long_words=False, break_on_hyphens=False) for paragraph in paragraphs
    ]
    return f"{wrapped[0]}\n\n```\n{dump()}\n```\n\n{wrapped[1]}\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
