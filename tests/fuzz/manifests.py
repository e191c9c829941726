"""Manifests: the Parquet file with its footer, pages and levels, and the JSON document in a valid one."""

from __future__ import annotations

import copy
import functools
import io
import json
import zlib
from dataclasses import dataclass, replace
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from df11.converter import parquet
from df11.converter.exponents import ExponentCounts
from df11.formats import errors
from tests.fuzz import thrift
from tests.fuzz.edits import edit_bytes, edit_json, edit_json_text, edit_text, json_text, number
from tests.fuzz.oracle import Fault, Target
from tests.fuzz.thrift import Field, List, get, put
from tests.support import manifests

ZSTD, PLAIN = 6, 0
_NUM_VALUES = {0: (5, 1), 2: (7, 1), 3: (8, 1)}
"""Where the header of a page of a type has its number of values."""


def read_manifest(data: bytes) -> None:
    """What is accepted is written again, and read again, without a change."""
    manifest = parquet.from_bytes(data, "a")
    try:
        again = parquet.from_bytes(parquet.to_bytes(manifest), "a")
    except (errors.ManifestError, UnicodeError) as error:
        raise Fault(f"what was read cannot be written: {error}") from None
    if again != manifest:
        raise Fault("what was read is another manifest when written and read again")


def read_document(data: bytes) -> None:
    """The same for a JSON document, in a file whose rows are sound."""
    footer = copy.deepcopy(footer_of(seeds()[0]))
    put(get(footer, 5).items[0], 2, data)
    read_manifest(with_footer(body_of(seeds()[0]), footer))


# A file taken apart.


@dataclass
class Page:
    header: list[Field]
    body: bytes

    def values(self) -> bytes:
        """Levels and values. In version 2 of a page, levels are not compressed."""
        levels = (get(self.header, 8, 5) or 0) + (get(self.header, 8, 6) or 0)
        if get(self.header, 8, 7) is False:
            return self.body
        return self.body[:levels] + self._unpacked(self.body[levels:])

    def _unpacked(self, body: bytes) -> bytes:
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 24)

    def set_values(self, values: bytes) -> None:
        """Other ones, and the sizes that follow."""
        self.body = zstandard.ZstdCompressor().compress(values)
        put(self.header, 2, len(values))
        if version_2 := get(self.header, 8):
            put(version_2, 7, False)
            self.body = values


def footer_of(data: bytes) -> list[Field]:
    return thrift.Reader(data, _start_of_footer(data)).struct()


def _start_of_footer(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def body_of(data: bytes) -> bytes:
    return data[: _start_of_footer(data)]


def with_footer(body: bytes, footer: list[Field]) -> bytes:
    written = thrift.struct(footer)
    return body + written + len(written).to_bytes(4, "little") + b"PAR1"


def chunks(footer: list[Field]) -> list[list[Field]]:
    return [get(chunk, 3) for group in get(footer, 4).items for chunk in get(group, 1).items]


def _start(chunk: list[Field]) -> int:
    return get(chunk, 11) or get(chunk, 9)


def pages_of(data: bytes, chunk: list[Field]) -> list[Page]:
    pages, at = [], _start(chunk)
    end = at + get(chunk, 7)
    while at < end:
        reader = thrift.Reader(data, at)
        header = reader.struct()
        pages.append(Page(header, reader.taken(get(header, 3))))
        at = reader.place
    return pages


def rebuilt(footer: list[Field], pages: list[list[Page]]) -> bytes:
    # Pages one after another; offsets, sizes and checksums as they must be.
    body = b"PAR1"
    for chunk, inside in zip(chunks(footer), pages, strict=True):
        start, raw = len(body), 0
        for page in inside:
            put(page.header, 3, len(page.body))
            crc = zlib.crc32(page.body)
            put(page.header, 4, crc - (crc >> 31 << 32))
            header = thrift.struct(page.header)
            if get(page.header, 1) == 2:
                put(chunk, 11, len(body))
            else:
                put(chunk, 9, len(body))
            body += header + page.body
            raw += len(header) + get(page.header, 2)
        put(chunk, 7, len(body) - start)
        put(chunk, 6, raw)
        if len(inside) > 1:
            put(chunk, 9, start + len(thrift.struct(inside[0].header)) + len(inside[0].body))
    return with_footer(body, footer)


# Edits.


def edit_manifest(data: bytes, random: Random) -> bytes:
    """A manifest with edits of its footer, its pages, what is in them, or of any bytes."""
    try:
        for _ in range(random.choice((1, 1, 2, 3))):
            data = _edit(data, random)
    except Exception:  # It no longer has the structure.
        return edit_bytes(data, random)
    return data


def _edit(data: bytes, random: Random) -> bytes:
    footer, kind = footer_of(data), random.randrange(10)
    if kind == 0:
        return edit_bytes(data, random)
    if kind <= 3:
        _edit_struct(footer, random)
        return with_footer(body_of(data), footer)
    if kind == 4:
        item = get(footer, 5).items[0]
        put(item, 2, json_text(edit_json(json.loads(get(item, 2)), random), random))
        return with_footer(body_of(data), footer)
    pages = [pages_of(data, chunk) for chunk in chunks(footer)]
    which = random.randrange(len(pages))
    page = random.choice(pages[which])
    if kind == 5:
        _edit_struct(page.header, random)
    elif kind == 6:
        page.set_values(edit_bytes(page.values(), random))
    elif kind == 7:  # A few bytes stand for many values.
        count = random.choice((1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 27, (1 << 31) - 1))
        levels, width = random.choice((0, 1, 2)), random.choice((1, 1, 2, 4))
        run = run_of(count, random.choice((0, 1, 1, 2, 3)), width)
        page.set_values(run * levels + random.choice((page.values(), b"\1" + run_of(count, 0, 1)[4:], bytes(64))))
        path = _NUM_VALUES.get(get(page.header, 1), (5, 1))
        put(get(page.header, path[0]), path[1], count)
        if random.random() < 0.7:
            put(chunks(footer)[which], 5, count)
    elif kind == 8:  # Many zeros, in few bytes.
        page.set_values(page.values() + bytes(random.choice((1 << 10, 1 << 20, 1 << 24))))
    else:
        pages[which] = random.choice(pages)[: random.choice((1, 2))] * random.choice((1, 2, 5))
    return rebuilt(footer, pages)


def run_of(count: int, value: int, width: int) -> bytes:
    # Levels of one value, with the size before them.
    run = thrift._unsigned(count << 1) + value.to_bytes(width, "little")
    return len(run).to_bytes(4, "little") + run


def _edit_struct(fields: list[Field], random: Random) -> None:
    # A member at any depth: another number, text, or number of items; missing, twice, of another type.
    inside, field = random.choice(list(thrift.walk(fields)))
    match random.randrange(8):
        case 0:
            inside.remove(field)
        case 1:
            inside.insert(inside.index(field), copy.deepcopy(field))
        case 2:
            field.number = random.randrange(1, 16)
        case 3 if field.kind in thrift.INTEGERS:
            field.kind = random.choice(thrift.INTEGERS)
        case _ if field.kind in thrift.INTEGERS:
            field.value = number(random, field.value) - random.choice((0, 1 << 63))
        case _ if field.kind == thrift.BINARY:
            field.value = edit_bytes(field.value, random)
        case _ if isinstance(field.value, List):
            _edit_list(field.value, random)


def _edit_list(found: List, random: Random) -> None:
    match random.randrange(4):
        case 0:
            found.claimed = number(random, len(found.items), 32)
        case 1 if found.items:
            found.items.append(copy.deepcopy(random.choice(found.items)))
        case 2 if found.items:
            found.items.pop(random.randrange(len(found.items)))
        case _ if found.items:
            found.items[:] = found.items * random.choice((2, 10))


def edit_document(data: bytes, random: Random) -> bytes:
    """A JSON document with an edit."""
    return edit_text(data, random) if random.random() < 0.2 else edit_json_text(data, random)


# Seeds.


@functools.cache
def seeds() -> list[bytes]:
    rows = [
        manifests.tensor("a.df11", "model.up.weight", (512, 256)),
        manifests.tensor("a.df11", "norm", (64,), exact=True),
        manifests.tensor("a.df11", "ids", (3, 4), dtype="I64"),
        manifests.tensor("sub/b.df11", "empty", (0,), bits=16),
    ]
    manifest = replace(manifests.manifest(*rows, cast=True), others=(("config.json", "1" * 64),))
    assert isinstance(rows[0].exponent_counts, ExponentCounts)
    small = parquet.to_bytes(manifest)
    file = pq.ParquetFile(io.BytesIO(small))
    return [small, *(_by_another_writer(file, **options) for options in _OPTIONS)]


_OPTIONS: tuple[dict[str, object], ...] = (
    {"data_page_version": "2.0", "compression": "zstd"},
    {"compression": "zstd", "use_dictionary": True, "row_group_size": 2, "write_statistics": False},
)


def _by_another_writer(file: pq.ParquetFile, *, row_group_size: int | None = None, **options: object) -> bytes:
    table, sink = file.read(), io.BytesIO()
    with pq.ParquetWriter(sink, pa.schema(table.schema), store_schema=False, write_page_checksum=True, **options) as to:
        to.write_table(table, row_group_size=row_group_size)
        to.add_key_value_metadata({parquet.METADATA_KEY: file.metadata.metadata[parquet.METADATA_KEY]})
    return sink.getvalue()


def _documents() -> list[bytes]:
    return [get(get(footer_of(seeds()[0]), 5).items[0], 2)]


MANIFEST = Target("manifest", seeds, edit_manifest, read_manifest, 64 << 10)
DOCUMENT = Target("manifest-document", _documents, edit_document, read_document, 16 << 10)
