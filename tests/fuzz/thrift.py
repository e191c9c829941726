"""Thrift's compact protocol, as a tree that is read, edited and written: for footers and page headers of Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)


@dataclass
class Field:
    """A member of a structure: its number, its type, and an integer, bytes, a `List` or a list of `Field`."""

    number: int
    kind: int
    value: Any


@dataclass
class List:
    """A list, whose items have one type. ``claimed``: a number of items to write that is not their number."""

    kind: int
    items: list[Any]
    claimed: int | None = None


class Reader:
    """Reads from ``place`` on, which moves."""

    def __init__(self, data: bytes, place: int = 0) -> None:
        self.data, self.place = data, place

    def byte(self) -> int:
        """One byte."""
        self.place += 1
        return self.data[self.place - 1]

    def unsigned(self) -> int:
        """A number of any length."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def signed(self) -> int:
        """The same with a sign."""
        value = self.unsigned()
        return value >> 1 ^ -(value & 1)

    def taken(self, size: int) -> bytes:
        """Some bytes."""
        self.place += size
        return self.data[self.place - size : self.place]

    def struct(self) -> list[Field]:
        """A structure."""
        fields, number = [], 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.signed()
            fields.append(Field(number, head & 15, self._value(head & 15)))
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self.byte()
        if kind in INTEGERS:
            return self.signed()
        if kind == DOUBLE:
            return self.taken(8)
        if kind == BINARY:
            return self.taken(self.unsigned())
        if kind in (LIST, SET):
            head = self.byte()
            count, inner = head >> 4 if head < 0xF0 else self.unsigned(), head & 15
            return List(inner, [self.byte() if inner in (TRUE, FALSE) else self._value(inner) for _ in range(count)])
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"type {kind}")


def _unsigned(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])


def _signed(value: int) -> bytes:
    return _unsigned((value << 1 ^ value >> 63) & (1 << 64) - 1)


def struct(fields: list[Field]) -> bytes:
    """A structure as bytes."""
    written, before = b"", 0
    for field in fields:
        kind = (TRUE if field.value else FALSE) if field.kind in (TRUE, FALSE) else field.kind
        step = field.number - before
        written += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _signed(field.number)
        written += b"" if kind in (TRUE, FALSE) else _value(kind, field.value)
        before = field.number
    return written + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE, BYTE):
        return bytes([int(value) & 255])
    if kind in INTEGERS:
        return _signed(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _unsigned(len(value)) + value
    if kind in (LIST, SET):
        count = len(value.items) if value.claimed is None else value.claimed
        head = bytes([count << 4 | value.kind]) if count < 15 else bytes([0xF0 | value.kind]) + _unsigned(count)
        return head + b"".join(_value(value.kind, item) for item in value.items)
    return struct(value)


def get(fields: list[Field], *path: int) -> Any:
    """The value of a member, of a member of that, and so on; None if one is missing."""
    value: Any = fields
    for number in path:
        value = next((field.value for field in value if field.number == number), None)
        if value is None:
            return None
    return value


def put(fields: list[Field], number: int, value: Any) -> None:
    """Change a member, if it is there."""
    for field in fields:
        if field.number == number:
            field.value = value


def walk(fields: list[Field]) -> Iterator[tuple[list[Field], Field]]:
    """Every member at any depth, with the structure that it is in."""
    for field in fields:
        yield fields, field
        inner = field.value.items if isinstance(field.value, List) else [field.value]
        if field.kind == STRUCT or (isinstance(field.value, List) and field.value.kind == STRUCT):
            for one in inner:
                yield from walk(one)
