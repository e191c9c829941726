"""The Parquet file of a manifest: written reproducibly, and never trusted when read.

Needs pyarrow, which no other module imports.
"""

from __future__ import annotations

import math
import os
import string
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from df11.converter import parquet_bounds
from df11.converter.exponents import COUNTED_WEIGHTS, ExponentCounts, has_exponents
from df11.converter.manifest import FILE_NAME, FileRow, Manifest, Origin, TensorRow, is_relative
from df11.formats import errors, framing, json_text, layout
from df11.formats.container import OriginalFile
from df11.storage.paths import kind_of, read_file

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError:
    raise errors.missing_extra("pyarrow", "convert") from None

VERSION: Final = 1
METADATA_KEY: Final = b"df11"
MAX_BYTES: Final = 256 << 20
"""Largest manifest that is read: about a hundred times that of a model of a hundred thousand tensors."""
MAX_ROWS: Final = 4_000_000
FEW_ROWS: Final = 20_000
"""Rows that any file may have; a large one may have more."""
MAX_NAMES: Final = 1 << 20
"""Characters of all names that any file may have; a large one may have more."""
MAX_DECODED_BYTES: Final = 4 << 30
"""Most bytes that the columns of a file may claim to take, encoded but not compressed."""
ROW_GROUP: Final = 1024
"""Rows per row group: their counts take 2 MiB while they are written."""
_BATCH: Final = 1024
_ENTROPY_SLACK: Final = 1e-6
"""Largest difference between an entropy and that of its counts: logarithms differ slightly, and some programs round."""

_CHECKSUMS: Final = pa.list_(pa.field("element", pa.uint64(), nullable=False))
_NUMBERS: Final = pa.list_(pa.field("element", pa.int64(), nullable=False))
COLUMNS: Final = (
    pa.field("file", pa.string(), nullable=False),
    pa.field("name", pa.string(), nullable=False),
    pa.field("dtype", pa.string(), nullable=False),
    pa.field("shape", _NUMBERS, nullable=False),
    pa.field("encoding", pa.string(), nullable=False),
    pa.field("stored_bytes", pa.int64(), nullable=False),
    pa.field("elements", pa.int64(), nullable=False),
    pa.field("bits_per_weight", pa.float64()),
    pa.field("exponent_entropy", pa.float64()),
    pa.field("exponent_counts", _NUMBERS),
    pa.field("exact", pa.bool_()),
    pa.field("stored_xxh3", _CHECKSUMS, nullable=False),
    pa.field("decoded_xxh3", _CHECKSUMS, nullable=False),
)
_TEXTS: Final = [field.name for field in COLUMNS if field.type == pa.string()]


def to_bytes(manifest: Manifest) -> bytes:
    """The Parquet file; the same manifest gives the same bytes. Raises LimitError for too many tensors."""
    if len(manifest.tensors) > MAX_ROWS:
        raise errors.LimitError(
            "too many tensors for a manifest", expected=f"at most {MAX_ROWS}", found=len(manifest.tensors)
        )
    schema = pa.schema(COLUMNS)
    # Arrow's own pools keep freed memory, which would count against the memory of a conversion.
    pool = pa.system_memory_pool()
    sink = pa.BufferOutputStream(pool)
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=["file", "dtype", "encoding"],
        store_schema=False,
        write_page_checksum=True,
    ) as writer:
        for start in range(0, len(manifest.tensors), ROW_GROUP):
            rows = manifest.tensors[start : start + ROW_GROUP]
            arrays = [
                pa.array([_cell(row, field.name) for row in rows], field.type, memory_pool=pool) for field in COLUMNS
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)
        writer.add_key_value_metadata({METADATA_KEY: framing.compact_json(_document(manifest))})
    return bytes(sink.getvalue())


def _cell(row: TensorRow, column: str) -> Any:
    value = getattr(row, column)
    if isinstance(value, ExponentCounts):
        return value.array()
    return value


def _document(manifest: Manifest) -> dict[str, Any]:
    origin = manifest.origin
    return {
        "version": VERSION,
        "tool": manifest.tool,
        "source": {
            "repository": origin.repository,
            "commit": origin.commit,
            "path": origin.path,
            "private": origin.private,
        },
        "options": {"cast": manifest.cast},
        "files": [
            {
                "file": file.file,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "source": {"file": file.source_file, "bytes": file.source_bytes, "sha256": file.source_sha256},
                **({"made_from": [asdict(one) for one in file.made_from]} if file.made_from else {}),
            }
            for file in manifest.files
        ],
        "others": dict(manifest.others),
        "renamed": dict(manifest.renamed),
    }


def from_bytes(data: bytes, where: str | os.PathLike[str]) -> Manifest:
    """Read and check an untrusted Parquet file; ``where`` is for messages. Raises ManifestError."""
    if len(data) > MAX_BYTES:
        raise errors.ManifestError("too large for a manifest", file=where, expected=f"at most {MAX_BYTES} bytes")
    try:
        return _Reader(data, where).manifest()
    # Everything that Arrow is known to raise for damage; its exceptions derive from these.
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        reason = str(error).splitlines()
        raise errors.ManifestError(
            f"not a manifest, or a damaged one ({reason[0][:200] if reason else type(error).__name__})", file=where
        ) from None


def read(path: str | os.PathLike[str]) -> Manifest:
    """The manifest in a file, or in a folder under its name. Raises a Df11Error."""
    path = Path(path) / FILE_NAME if kind_of(path) == "folder" else Path(path)
    return from_bytes(read_file(path, MAX_BYTES), path)


class _Reader:
    # Reads one file. Everything in it may be forged.

    def __init__(self, data: bytes, where: str | os.PathLike[str]) -> None:
        self._where = where
        self._size = len(data)
        # Two checksums in each row, which no compression makes smaller, unless tensors are equal: few, then.
        most = min(MAX_ROWS, FEW_ROWS + self._size // 16)
        try:
            self._checked = parquet_bounds.check(data, most)
        except parquet_bounds.DamageError as damage:
            self._refuse(
                f"{damage.what}: not a manifest, or a damaged one", expected=damage.expected, found=damage.found
            )

    def _open(self, **options: Any) -> Any:
        file = pa.BufferReader(self._checked.file)
        return pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True, **options)

    def _refuse(
        self, what: str, *, tensor: str | None = None, expected: object = None, found: object = None
    ) -> NoReturn:
        raise errors.ManifestError(f"manifest: {what}", file=self._where, tensor=tensor, expected=expected, found=found)

    def manifest(self) -> Manifest:
        document = self._read_document()
        origin, cast, tool, files = self._check_document(document)
        others = self._check_others(document.get("others", {}))  # Files of 0.1 have none.
        renamed = self._check_renamed(document.get("renamed", {}))
        self._check_columns()
        return Manifest(origin, cast, tool, files, self._read_rows(files, cast), others, renamed)

    def _read_document(self) -> Any:
        raw = self._checked.metadata.get(METADATA_KEY)
        if raw is None:
            self._refuse("the file has no df11 metadata: another Parquet file")
        try:
            return json_text.parse(raw, what="the df11 metadata", where={})
        except errors.FormatError as error:
            self._refuse(error.what)

    def _check_document(self, document: Any) -> tuple[Origin, Any, str, tuple[FileRow, ...]]:
        version = _member(document, "version")
        if type(version) is not int or version != VERSION:
            self._refuse("version", expected=VERSION, found=repr(version)[:80])
        tool, source, cast = document.get("tool"), document.get("source"), _member(document.get("options"), "cast")
        repository, commit, path = (_member(source, key) for key in ("repository", "commit", "path"))
        private = _member(source, "private")  # Earlier files have none.
        if not (
            isinstance(tool, str)
            and isinstance(repository, str | None)
            and isinstance(commit, str | None)
            and isinstance(path, str)
            and isinstance(private, bool | None)
        ):
            self._refuse("tool or source is not as specified")
        if cast not in (None, "bf16"):
            self._refuse("options.cast", expected="bf16 or null", found=repr(cast)[:80])
        files = document.get("files")
        if not isinstance(files, list):
            self._refuse("files must be a list")
        rows = tuple(map(self._check_file, files))
        if len({row.file for row in rows}) != len(rows):
            self._refuse("a file is named twice")
        return Origin(repository, commit, path, private), cast, tool, rows

    def _check_file(self, value: Any) -> FileRow:
        source = _member(value, "source")
        row = FileRow(
            _member(value, "file"),
            _member(value, "bytes"),
            _member(value, "sha256"),
            _member(source, "file"),
            _member(source, "bytes"),
            _member(source, "sha256"),
            tuple(map(self._check_original, value.get("made_from", ()) if isinstance(value, dict) else ())),
        )
        if not (is_relative(row.file) and is_relative(row.source_file)):
            self._refuse(
                "the name of a file must be relative to its model folder", found=repr((row.file, row.source_file))[:200]
            )
        if not (_is_size(row.bytes) and _is_size(row.source_bytes)):
            self._refuse("the size of a file", found=repr((row.bytes, row.source_bytes))[:80])
        if not (row.sha256 is None or _is_sha256(row.sha256)) or not _is_sha256(row.source_sha256):
            self._refuse("a SHA-256", found=repr((row.sha256, row.source_sha256))[:200])
        return row

    def _check_original(self, value: Any) -> OriginalFile:
        found = OriginalFile(_member(value, "file"), _member(value, "bytes"), _member(value, "sha256"))
        if not (is_relative(found.file) and _is_size(found.bytes) and _is_sha256(found.sha256)):
            self._refuse("a file in made_from", found=repr(value)[:200])
        return found

    def _check_others(self, value: Any) -> tuple[tuple[str, str], ...]:
        if not isinstance(value, dict) or not all(map(_is_sha256, value.values())):
            self._refuse("others must map names to SHA-256")
        if not all(map(is_relative, value)):
            self._refuse("the name of a file must be relative to its folder", found=repr(sorted(value))[:200])
        return tuple(value.items())

    def _check_renamed(self, value: Any) -> tuple[tuple[str, str], ...]:
        if not isinstance(value, dict) or not all(map(is_relative, [*value, *value.values()])):
            self._refuse("renamed must map names to names, relative to the folder", found=repr(value)[:200])
        return tuple(value.items())

    def _check_columns(self) -> None:
        size = self._checked.decoded_bytes
        if size > MAX_DECODED_BYTES:
            self._refuse("its columns are too large", expected=f"at most {MAX_DECODED_BYTES} bytes", found=size)
        schema = self._open().schema_arrow
        for field in COLUMNS:
            if schema.names.count(field.name) != 1:
                self._refuse(f"the column {field.name} is missing or duplicated")
            found = schema.field(field.name).type
            if found != field.type:
                self._refuse(f"type of the column {field.name}", expected=field.type, found=found)

    def _read_rows(self, files: tuple[FileRow, ...], cast: str | None) -> tuple[TensorRow, ...]:
        order = {file.file: place for place, file in enumerate(files)}
        rows: list[TensorRow] = []
        place = length = 0
        seen: set[tuple[str, str]] = set()
        for row in self._rows(cast):
            if (row.file, row.name) in seen:
                self._refuse("a tensor is named twice", tensor=row.name)
            seen.add((row.file, row.name))
            if order.get(row.file, -1) < place:
                self._refuse(
                    "a row's file is unknown, or not in the order of the files", tensor=row.name, found=row.file[:200]
                )
            place = order[row.file]
            length += len(row.name)
            if length > MAX_NAMES + 64 * self._size:  # A few bytes can repeat a long name in every row.
                self._refuse("its names are too long", expected=f"at most {MAX_NAMES + 64 * self._size} characters")
            rows.append(row)
        if len(rows) != self._checked.rows:
            self._refuse("rows are missing", expected=self._checked.rows, found=len(rows))
        return tuple(rows)

    def _rows(self, cast: str | None) -> Iterator[TensorRow]:
        names = [field.name for field in COLUMNS]
        # As dictionaries, so that a long text is not stored once per row.
        for batch in self._open(read_dictionary=_TEXTS).iter_batches(_BATCH, columns=names, use_threads=False):
            if any(len(batch.column(name).dictionary) > self._checked.rows for name in _TEXTS):
                self._refuse("more texts than rows")
            batch.validate(full=True)  # Arrow does not check the indices and offsets of a page.
            columns = {}
            for field in COLUMNS:
                column = batch.column(field.name)
                if column.null_count and not field.nullable:
                    self._refuse(f"the column {field.name} has a null")
                if pa.types.is_dictionary(column.type):
                    used, places = np.unique(column.indices.to_numpy(), return_inverse=True)
                    texts = column.dictionary.take(pa.array(used)).to_pylist()  # It is that of all batches.
                    columns[field.name] = [texts[place] for place in places]
                elif field.type in (_NUMBERS, _CHECKSUMS) and not self._fits(column):
                    self._refuse(f"a list in the column {field.name} is too long")
                elif field.name == "exponent_counts":
                    columns[field.name] = [scalar.values if scalar.is_valid else None for scalar in column]
                else:
                    columns[field.name] = column.to_pylist()
            for values in zip(*columns.values(), strict=True):
                yield self._check_row(dict(zip(names, values, strict=True)), cast)

    def _fits(self, lists: Any) -> bool:
        # Before they become Python's objects. Counts are the most that a row has, but for checksums, which no
        # compression makes smaller, unless they are equal.
        return len(lists.flatten()) <= _BATCH * 256 + self._size // 8

    def _check_row(self, value: dict[str, Any], cast: str | None) -> TensorRow:
        name, dtype, shape = value["name"], value["dtype"], tuple(value["shape"])
        if (
            dtype not in framing.DTYPE_BITS
            or len(shape) > layout.MAX_DIMENSIONS
            or not all(map(_is_size, shape))
            or not _is_size(math.prod(shape))
        ):
            self._refuse("dtype or shape", tensor=name, found=f"{dtype} {shape}"[:200])
        counts = None if value["exponent_counts"] is None else self._check_counts(name, value["exponent_counts"])
        row = TensorRow(
            value["file"],
            name,
            dtype,
            shape,
            value["encoding"],
            value["stored_bytes"],
            value["exponent_entropy"],
            counts,
            value["exact"],
            tuple(value["stored_xxh3"]),
            tuple(value["decoded_xxh3"]),
        )
        if row.encoding == "df11":
            right = (
                dtype in layout.KINDS
                and row.elements > 0
                and 0 < len(row.stored_xxh3) == len(row.decoded_xxh3)
                and row.stored_bytes > 0
            )
        else:
            right = (
                row.encoding == "verbatim"
                and row.stored_bytes == row.decoded_bytes
                and row.stored_xxh3 == row.decoded_xxh3
            )
            right = right and len(row.stored_xxh3) == 1
        if not right or None in row.stored_xxh3 or None in row.decoded_xxh3:
            self._refuse("encoding, size or checksums do not fit the tensor", tensor=name)
        if (row.elements, row.bits_per_weight) != (value["elements"], value["bits_per_weight"]):
            self._refuse("elements or bits_per_weight", tensor=name, expected=(row.elements, row.bits_per_weight))
        if row.exact is not None and (dtype != "BF16" or (cast is None and not row.exact)):
            self._refuse("exact is only for F32 tensors stored as BF16, and false only for a cast", tensor=name)
        self._check_exponents(row)
        return row

    def _check_counts(self, name: str, values: Any) -> ExponentCounts:
        if len(values) != 256 or values.null_count:
            self._refuse("exponent_counts", tensor=name, expected="256 counts", found=len(values))
        array = values.to_numpy()
        if array.min() < 0:
            self._refuse("exponent_counts", tensor=name, found=int(array.min()))
        return ExponentCounts.of(array)

    def _check_exponents(self, row: TensorRow) -> None:
        counted = has_exponents(row.encoding, row.dtype, row.elements)
        entropy, counts = row.exponent_entropy, row.exponent_counts
        if (entropy is not None) != counted or (counts is not None) != (counted and row.elements >= COUNTED_WEIGHTS):
            self._refuse("exponent_entropy or exponent_counts is missing or superfluous", tensor=row.name)
        if entropy is not None and not 0 <= entropy <= 8:
            self._refuse("exponent_entropy", tensor=row.name, expected="0 to 8", found=entropy)
        if counts is not None and entropy is not None:
            total = sum(np.frombuffer(counts.counts, "<u8").tolist())
            if total != row.elements or abs(counts.entropy() - entropy) > _ENTROPY_SLACK:
                self._refuse(
                    "exponent_counts do not fit elements or entropy",
                    tensor=row.name,
                    expected=row.elements,
                    found=total,
                )


def _member(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set(string.digits + "abcdef")
