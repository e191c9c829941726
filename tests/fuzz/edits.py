"""Edits of bytes, numbers and JSON that fit no structure in particular."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 8191, 8192, 8193, 65535, 65536, 1 << 20, 1 << 21)
LARGE = tuple(1 << bits for bits in (24, 31, 32, 40, 53, 61, 62, 63, 64, 70))
TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "\x1b[31m",
    "\u202e",
    "\U0001f917",
    "é",
    "..",
    "/",
    "a/../b",
    "x" * 300,
    "0" * 64,
    "BF16",
    "F32",
    "U8",
    "F4",
    "F64",
    "df11",
    "verbatim",
    "bf16",
    "[]",
    "{}",
    "null",
    "__metadata__",
    "weight_map",
    "a.safetensors",
    "a.df11",
    "hf://owner/name@main/path",
)


def number(random: Random, old: int = 0, bits: int = 64) -> int:
    """A number near another one, or at a boundary, of at most ``bits`` bits."""
    new = random.choice(
        (
            old + random.choice((-1, 1, 16, -16, 8192)),
            old ^ 1 << random.randrange(bits),
            random.choice(NUMBERS),
            random.choice(LARGE) - random.randrange(2),
            (1 << bits) - 1 - random.randrange(2),
            random.getrandbits(bits),
        )
    )
    return new % (1 << bits)


def edit_bytes(data: bytes, random: Random) -> bytes:
    """Bits and bytes changed, taken out, put in or repeated."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
            case 2:
                del changed[at : at + random.choice((1, 2, 4, 16, 100))]
            case 3:
                changed[at:at] = random.randbytes(random.choice((1, 2, 4, 8)))
            case 4:
                changed[at:at] = changed[at : at + random.choice((1, 4, 16, 64))] * random.choice((1, 2, 8))
            case _:
                end = random.randrange(len(changed) + 1)
                changed[at : at + 8] = changed[end : end + 8]
    return bytes(changed)


def edit_text(data: bytes, random: Random) -> bytes:
    """The same for text: what matters there is punctuation."""
    if random.random() < 0.3:
        return edit_bytes(data, random)
    text = bytearray(data)
    at = random.randrange(len(text) + 1)
    pieces = (
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\\u0061",
        b"\\ud800",
        b" ",
        b"\n",
        b"-0",
        b"1e5",
        b"NaN",
    )
    pieces += (b"\xff", b"\xef\xbb\xbf", b"\0", b"#", b"=", b"'''", b"[" * 200, b'{"a":' * 130, b"1" * 5000)
    text[at : at + random.choice((0, 0, 1, 4))] = random.choice(pieces)
    return bytes(text)


def value(random: Random) -> Any:
    """A value of JSON."""
    match random.randrange(8):
        case 0:
            return random.choice(NUMBERS + LARGE)
        case 1:
            return random.choice((-1, -(1 << 63), 0.5, 1e308, 1.0, True, False, None))
        case 2 | 3:
            return random.choice(TEXTS)
        case 4:
            return [value(random) for _ in range(random.randrange(3))]
        case 5:
            return {random.choice(TEXTS): value(random) for _ in range(random.randrange(3))}
        case 6:
            nested: Any = 0
            for _ in range(random.choice((2, 60, 126, 127, 128, 500))):
                nested = [nested] if random.random() < 0.8 else {"a": nested}
            return nested
        case _:
            return [random.choice(NUMBERS)] * random.choice((1, 2, 64, 65, 1000))


def edit_json(document: Any, random: Random) -> Any:
    """A copy of a value of JSON with one member or item changed, taken out, renamed, copied or put in."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def walk(outer: Any) -> None:
        for key in list(outer) if isinstance(outer, dict) else range(len(outer)):
            places.append((outer, key))
            if isinstance(outer[key], dict | list):
                walk(outer[key])

    if not isinstance(document, dict | list):
        return value(random)
    walk(document)
    if not places:
        return value(random)
    outer, key = random.choice(places)
    old = outer[key]
    match random.randrange(9):
        case 0:
            del outer[key]
        case 1 if isinstance(outer, dict):
            outer[random.choice(TEXTS)] = outer.pop(key)
        case 2 if isinstance(outer, list):
            outer.insert(key, copy.deepcopy(old))
        case 3:
            other, place = random.choice(places)
            outer[key] = copy.deepcopy(other[place])
        case 4 if isinstance(outer, dict):
            outer[random.choice(TEXTS)] = value(random)
        case 5 | 6 if type(old) is int:
            outer[key] = number(random, old)
        case 5 | 6 if isinstance(old, str):
            at = random.randrange(len(old) + 1)
            outer[key] = old[:at] + random.choice(TEXTS) + old[at + random.randrange(2) :]
        case _:
            outer[key] = value(random)
    return document


def json_text(document: Any, random: Random) -> bytes:
    """JSON in one of several styles."""
    text = json.dumps(
        document,
        ensure_ascii=random.random() < 0.2,
        indent=random.choice((None, None, None, 1)),
        separators=random.choice(((",", ":"), (", ", ": "))),
    )
    return text.encode("utf-8", "surrogatepass")


def edit_json_text(data: bytes, random: Random) -> bytes:
    """A JSON text with an edit of its values, or of its characters if it is not JSON or too deep to be copied."""
    try:
        return json_text(edit_json(json.loads(data), random), random)
    except (ValueError, RecursionError):
        return edit_text(data, random)
