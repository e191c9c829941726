"""Bounds for a stranger's Parquet file, checked before Arrow sees it: what its pages unfold to, what its footer lists.

Levels and dictionary indices are coded in runs: a page of some bytes can stand for billions of values, and Arrow takes
memory for as many as a header says. So the headers of all pages are read here first. Arrow gets the pages with a footer
that is written here, from numbers that were checked: it cannot read the stranger's footer in another way than this
module did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MAGIC: Final = b"PAR1"
FEW_VALUES: Final = 2 << 20
"""Values that the pages of any file may have; a large one may have more."""
VALUES_PER_BYTE: Final = 4
"""A row has about 270 values, most of them counts, in about 90 bytes."""
BYTES_PER_VALUE: Final = 8
"""Of what the pages unfold to before they are decoded."""
FEW_CHUNKS: Final = 1000
"""Columns of all row groups that any file may have; a large one may have more."""
BYTES_PER_CHUNK: Final = 50
"""In the file: what the footer says of a column, and the header of a page."""
_MOST_DEPTH: Final = 20

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DICTIONARY_PAGE: Final = 2
_DATA_PAGE_2: Final = 8
_HEADERS: Final = {0: 5, _DICTIONARY_PAGE: 7, 3: _DATA_PAGE_2}
"""Types of pages: where their own header is."""
_ENCODINGS: Final = frozenset({0, 2, 3, 4, 8})
"""PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY: in others, a value can be longer than its bytes, or a page
has a count of its own."""

# Members of structures by their numbers: a type and, of lists and structures, what is in them. Others are skipped.
_Shape = Mapping[int, tuple[int, Any]]
_COUNTS: Final[_Shape] = {1: (_I32, None), 2: (_I32, None)}
_PAGE: Final[_Shape] = {
    1: (_I32, None),
    2: (_I32, None),
    3: (_I32, None),
    5: (_STRUCT, _COUNTS),
    7: (_STRUCT, _COUNTS),
    8: (_STRUCT, {1: (_I32, None), 4: (_I32, None)}),
}
_CHUNK: Final[_Shape] = {
    1: (_I32, None),
    2: (_LIST, _I32),
    3: (_LIST, _BINARY),
    4: (_I32, None),
    **dict.fromkeys((5, 6, 7, 9, 11), (_I64, None)),
}
_GROUP: Final[_Shape] = {1: (_LIST, {3: (_STRUCT, _CHUNK)}), 3: (_I64, None)}
_FILE: Final[_Shape] = {
    1: (_I32, None),
    2: (_LIST, {}),
    3: (_I64, None),
    4: (_LIST, _GROUP),
    5: (_LIST, {1: (_BINARY, None), 2: (_BINARY, None)}),
}
_RAW: Final = -1
"""Among the members that were read: where the structure starts and ends."""


class DamageError(Exception):
    """A file that is not Parquet, or beyond a limit: what is wrong, and what was expected and found."""

    def __init__(self, what: str, expected: object = None, found: object = None) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


@dataclass(frozen=True, slots=True)
class Checked:
    """``file``: the same pages and a new footer, for Arrow. ``decoded_bytes``: of all pages, as they are encoded."""

    file: bytes
    rows: int
    decoded_bytes: int
    metadata: Mapping[bytes, bytes]


def check(data: bytes, most_rows: int) -> Checked:
    """Read the footer and the headers of all pages. Raises DamageError."""
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise DamageError("not a Parquet file")
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if start < len(MAGIC):
        raise DamageError("the footer is larger than the file")
    footer = _Reader(data, start, len(data) - 8).struct(_FILE)
    groups, schema, rows = _needed(footer, 4), _needed(footer, 2), _size(footer, 3)
    if rows > most_rows:
        raise DamageError("too many rows", f"at most {most_rows}", rows)
    chunks = [chunk.get(3) for group in groups for chunk in _needed(group, 1)]
    most = FEW_CHUNKS + len(data) // BYTES_PER_CHUNK
    if len(chunks) > most or len(schema) > FEW_CHUNKS:
        raise DamageError("too many columns or row groups", f"at most {most}", len(chunks))
    values = decoded = 0
    most = FEW_VALUES + VALUES_PER_BYTE * len(data)
    for chunk in chunks:
        of_chunk = _check_chunk(data, start, chunk)
        values, decoded = values + of_chunk[0], decoded + of_chunk[1]
        if values > most or decoded > BYTES_PER_VALUE * most:
            raise DamageError("its columns are too large", f"at most {most} values", values)
    if rows != sum(_size(group, 3) for group in groups):
        raise DamageError("the rows of the row groups are not those of the file")
    metadata = {pair.get(1, b""): pair.get(2, b"") for pair in footer.get(5, [])}
    return Checked(data[:start] + _footer(footer, data), rows, decoded, metadata)


def _check_chunk(data: bytes, end_of_pages: int, chunk: Any) -> tuple[int, int]:
    # Values in the pages of a column, and bytes that they unfold to. Arrow reads the pages one after another, too.
    if not isinstance(chunk, dict):
        raise DamageError("a column without metadata")
    place = _size(chunk, 9)
    if 0 < chunk.get(11, 0) < place:
        place = chunk[11]
    end = place + _size(chunk, 7)
    if not len(MAGIC) <= place <= end <= end_of_pages:
        raise DamageError("a column outside of the file", found=place)
    known = values = decoded = 0
    while place < end:
        reader = _Reader(data, place, end)
        page = reader.struct(_PAGE)
        kind, size, stored = _size(page, 1), _size(page, 2), _size(page, 3)
        member = _HEADERS.get(kind, 0)
        if member not in page:
            raise DamageError("a page of an unknown type", found=kind)
        count, encoding = _size(page[member], 1), page[member].get(4 if member == _DATA_PAGE_2 else 2)
        if encoding not in _ENCODINGS:
            raise DamageError("a page in an encoding that is not read", "plain or dictionary", encoding)
        values, decoded = values + count, decoded + size
        known += count if kind != _DICTIONARY_PAGE else 0
        place = reader.place + stored
    if place != end or known != _size(chunk, 5):
        raise DamageError("the pages of a column do not fit its sizes", expected=chunk.get(5), found=known)
    return values, decoded


def _needed(fields: Mapping[int, Any], number: int) -> Any:
    if number not in fields:
        raise DamageError("the footer lacks a member", found=number)
    return fields[number]


def _size(fields: Mapping[int, Any], number: int) -> int:
    value = fields.get(number, -1)
    if not 0 <= value < 1 << 62:
        raise DamageError("a size or a count", found=value)
    return int(value)


class _Reader:
    # Thrift's compact protocol. Every value is there: a list of a million items takes a million bytes.

    def __init__(self, data: bytes, place: int, end: int) -> None:
        self._data, self.place, self._end = data, place, end
        self._items_left = 10 * (FEW_CHUNKS + len(data) // BYTES_PER_CHUNK)

    def struct(self, shape: _Shape, depth: int = 0) -> dict[int, Any]:
        """The members of a structure that ``shape`` names."""
        if depth > _MOST_DEPTH:
            raise DamageError("nested too deeply")
        fields: dict[int, Any] = {}
        number, start = 0, self.place
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed(16)
            if not 0 < number < 1 << 15:
                raise DamageError("a member's number", found=number)
            kind, inner = shape.get(number, (0, None))
            if head & 15 == kind:
                fields[number] = self._value(kind, inner, depth)
            else:
                self._value(head & 15, None, depth)
        fields[_RAW] = (start, self.place)
        return fields

    def _value(self, kind: int, inner: Any, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return None
        if kind in (_I16, _I32, _I64):
            return self._signed({_I16: 16, _I32: 32, _I64: 64}[kind])
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind == _STRUCT:
            return self.struct(inner or {}, depth + 1)
        if kind in (_LIST, _SET):
            return self._list(inner, depth + 1)
        if kind in (_BYTE, _DOUBLE):
            return self._bytes(1 if kind == _BYTE else 8)
        raise DamageError("a value of an unknown type", found=kind)

    def _list(self, inner: Any, depth: int) -> list[Any]:
        head = self._byte()
        count, kind = head >> 4 if head < 0xF0 else self._unsigned(), head & 15
        wanted = _STRUCT if isinstance(inner, dict) else inner
        if count > self._end - self.place or depth > _MOST_DEPTH or wanted not in (None, kind):
            raise DamageError("a list that is damaged", found=count)
        if wanted is not None:  # A byte of the file becomes hundreds in memory.
            self._items_left -= count
            if self._items_left < 0:
                raise DamageError("too many columns or row groups")
        items = []
        for _ in range(count):  # In a list, true and false take a byte.
            item = self._byte() if kind in (_TRUE, _FALSE) else self._value(kind, inner if wanted else None, depth)
            if wanted is not None:
                items.append(item)
        return items

    def _byte(self) -> int:
        if self.place >= self._end:
            raise DamageError("it ends too early")
        self.place += 1
        return self._data[self.place - 1]

    def _bytes(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > self._end:
            raise DamageError("it ends too early")
        return self._data[start : self.place]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise DamageError("a number that is too long")

    def _signed(self, bits: int) -> int:
        # Arrow would cut a number that is too large for its type.
        value = self._unsigned()
        if value >= 1 << bits:
            raise DamageError("a number that is too large")
        return value >> 1 ^ -(value & 1)


# Writing the same protocol.


def _footer(footer: Mapping[int, Any], data: bytes) -> bytes:
    # What Arrow needs. It ignores the type of a list's items, so it could read lists in another way; a schema has none.
    schema = [data[start:end] for start, end in (element[_RAW] for element in footer[2])]
    groups = [_group(group) for group in footer[4]]
    members = (
        _member(1, _I32, _number(footer.get(1, 2))),
        _member(2, _LIST, _list(_STRUCT, schema)),
        _member(3, _I64, _number(footer[3])),
        _member(4, _LIST, _list(_STRUCT, groups)),
    )
    written = _struct(members)
    return written + len(written).to_bytes(4, "little") + MAGIC


def _group(group: Mapping[int, Any]) -> bytes:
    chunks = [_struct((_member(2, _I64, _number(0)), _member(3, _STRUCT, _chunk(one[3])))) for one in group[1]]
    size = sum(one[3][6] for one in group[1])
    return _struct(
        (
            _member(1, _LIST, _list(_STRUCT, chunks)),
            _member(2, _I64, _number(size)),
            _member(3, _I64, _number(group[3])),
        )
    )


def _chunk(chunk: Mapping[int, Any]) -> bytes:
    members = []
    for number, (kind, inner) in sorted(_CHUNK.items()):
        if kind == _LIST:
            write = _text if inner == _BINARY else _number
            members.append(_member(number, kind, _list(inner, [write(item) for item in _needed(chunk, number)])))
        elif number in chunk or number != 11:  # Without a dictionary, nothing says where it is.
            members.append(_member(number, kind, _number(_needed(chunk, number))))
    return _struct(members)


def _struct(members: Iterable[bytes]) -> bytes:
    return b"".join(members) + b"\0"


def _member(number: int, kind: int, value: bytes) -> bytes:
    return bytes([kind]) + _number(number) + value


def _list(kind: int, items: Sequence[bytes]) -> bytes:
    return bytes([0xF0 | kind]) + _unsigned(len(items)) + b"".join(items)


def _text(value: bytes) -> bytes:
    return _unsigned(len(value)) + value


def _number(value: int) -> bytes:
    return _unsigned(2 * value if value >= 0 else -2 * value - 1)


def _unsigned(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
