"""The Parquet file of a manifest: as documented, always the same bytes; one from anywhere is not trusted."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME, TOOL, Manifest, Origin
from df11.formats import errors
from df11.formats.container import OriginalFile
from tests.support import sources
from tests.support.conversions import convert, file_row, numpy_counts

ORIGIN = Origin("owner/name", "0" * 40, "sub/folder")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source, the folder converted from it, which no test may change, and its manifest as of a repository."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for name, kind in {"a": "every dtype, large", "b": "shapes, scalar and empty", "c": "no tensors"}.items():
        (source / f"{name}.safetensors").write_bytes(sources.KINDS[kind]())
    sources.write(source / "d.safetensors", [sources.bf16("big", (3 * sources.SEGMENT // 2,), 3)])
    (source / "config.json").write_bytes(b"{}")
    df11.convert(source, out, cast="bf16")
    return source, out, replace(parquet.read(out), origin=ORIGIN)


def test_the_documented_columns(tree):
    source, folder, manifest = tree
    file = pq.ParquetFile(io.BytesIO(parquet.to_bytes(manifest)))
    assert {field.name: str(field.type) for field in file.schema_arrow} == {
        "file": "string",
        "name": "string",
        "dtype": "string",
        "shape": "list<element: int64 not null>",
        "encoding": "string",
        "stored_bytes": "int64",
        "elements": "int64",
        "bits_per_weight": "double",
        "exponent_entropy": "double",
        "exponent_counts": "list<element: int64 not null>",
        "exact": "bool",
        "stored_xxh3": "list<element: uint64 not null>",
        "decoded_xxh3": "list<element: uint64 not null>",
    }
    assert list(file.metadata.metadata) == [b"df11"]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    document = json.loads(file.metadata.metadata[b"df11"])
    assert list(document) == ["version", "tool", "source", "options", "files", "others", "renamed"]
    assert (document["version"], document["tool"]) == (1, f"df11 {df11.__version__}")
    assert document["source"] == {
        "repository": "owner/name",
        "commit": "0" * 40,
        "path": "sub/folder",
        "private": None,
    }
    assert document["options"] == {"cast": "bf16"}
    assert [entry["file"] for entry in document["files"]] == ["a.df11", "b.df11", "c.df11", "d.df11"]
    path = source / "a.safetensors"
    assert document["files"][0] == {
        "file": "a.df11",
        "bytes": (folder / "a.df11").stat().st_size,
        "sha256": None,
        "source": {"file": "a.safetensors", "bytes": path.stat().st_size, "sha256": sources.sha256(path)},
    }
    assert document["others"] == {"config.json": sources.sha256(source / "config.json")}
    rows = file.read().to_pylist()
    assert [(row["file"], row["name"]) for row in rows] == [(row.file, row.name) for row in manifest.tensors]
    big = rows[-1]
    assert (big["shape"], big["elements"], len(big["stored_xxh3"])) == (
        [3 * sources.SEGMENT // 2],
        3 * sources.SEGMENT // 2,
        2,
    )
    assert big["exponent_counts"] == numpy_counts(sources.bf16("big", (3 * sources.SEGMENT // 2,), 3).data).tolist()
    assert big["bits_per_weight"] == 8 * big["stored_bytes"] / big["elements"]
    empty = next(row for row in rows if row["elements"] == 0)
    assert empty["bits_per_weight"] is empty["exponent_entropy"] is empty["exponent_counts"] is None


def test_round_trip_and_nothing_of_this_machine(tree):
    source, folder, of_a_repository = tree
    data = (folder / FILE_NAME).read_bytes()
    manifest = replace(of_a_repository, origin=Origin())
    assert data == parquet.to_bytes(manifest)
    assert parquet.from_bytes(data, "x") == parquet.read(folder) == parquet.read(folder / FILE_NAME) == manifest
    for name in (str(folder), str(source), str(source.parent)):
        assert name.encode() not in data
    assert b"pandas" not in data
    again = parquet.to_bytes(of_a_repository)
    assert again != data
    assert parquet.from_bytes(again, "x") == of_a_repository
    for private in (True, False):
        known = replace(of_a_repository, origin=replace(ORIGIN, private=private))
        assert parquet.from_bytes(parquet.to_bytes(known), "x") == known


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(errors.ManifestError) as caught:
        parquet.from_bytes(data, "some/where.parquet")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    for word in ("some/where.parquet", *words):
        assert word in line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A manifest of a few rows, with counts."""
    folder = tmp_path_factory.mktemp("small")
    tensors = [sources.bf16("a", (70_000,)), sources.f32("b", (10,)), sources.random_tensor("c", "I64", (3, 4))]
    done = convert(folder, "x", sources.file_bytes(tensors), cast="bf16")
    others = (("config.json", "1" * 64), ("x.df11.index.json", "2" * 64))
    return Manifest(ORIGIN, "bf16", TOOL, (file_row(done),), done.tensors, others)


def test_truncated_anywhere(small):
    data = parquet.to_bytes(small)
    assert parquet.from_bytes(data, "x") == small
    for size in [*range(0, len(data), max(len(data) // 300, 1)), len(data) - 1]:
        refused(data[:size])
    refused(data + b"\0")


@pytest.mark.slow
def test_flipped_anywhere(small):
    data = parquet.to_bytes(small)
    footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    refusals = [0, 0]
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        try:
            read = parquet.from_bytes(bytes(flipped), "x")
        except errors.ManifestError:
            refusals[place >= footer] += 1
        else:
            assert read.tensors == small.tensors
    # What remains is statistics and the like, which nobody reads here, and the texts of the metadata.
    assert refusals[0] > 0.6 * footer
    assert refusals[1] > 0.4 * (len(data) - footer)


def test_other_files(tmp_path):
    refused(b"", "not a manifest")
    refused(b"PAR1", "not a manifest")
    refused(b"PAR1PAR1PAR1", "not a manifest")
    refused(b"not Parquet " * 1000, "not a manifest")
    other = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), other)
    refused(other.getvalue(), "no df11 metadata")
    with pytest.raises(errors.MissingError):
        parquet.read(tmp_path)


def test_files_that_a_source_was_decoded_from(small):
    files = (OriginalFile("a.safetensors", 12, "1" * 64), OriginalFile("b.safetensors", 34, "2" * 64))
    made = replace(small, files=tuple(replace(row, made_from=files) for row in small.files))
    assert parquet.from_bytes(parquet.to_bytes(made), "x") == made
    table, document = table_of(made)
    for wrong in (
        1,
        [1],
        [{}],
        [{"file": "/a", "bytes": 1, "sha256": "1" * 64}],
        [{"file": "a", "bytes": -1, "sha256": "1" * 64}],
    ):
        document["files"][0]["made_from"] = wrong
        refused(written(table, document))


def test_absurd_sizes(small, monkeypatch):
    data = parquet.to_bytes(small)
    for name, value, words in (
        ("MAX_BYTES", len(data) - 1, "too large"),
        ("MAX_ROWS", 2, "too many rows"),
        ("MAX_DECODED_BYTES", 100, "too large"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, name, value)
            refused(data, words)
    monkeypatch.setattr(parquet, "MAX_ROWS", 2)
    with pytest.raises(errors.LimitError):
        parquet.to_bytes(small)


def table_of(manifest: Manifest) -> tuple[pa.Table, dict]:
    file = pq.ParquetFile(io.BytesIO(parquet.to_bytes(manifest)))
    return file.read(), json.loads(file.metadata.metadata[b"df11"])


def written(table: pa.Table, document: object, **options) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"df11": text})
    return sink.getvalue()


def test_another_writer_may_have_written_it(small):
    table, document = table_of(small)
    assert parquet.from_bytes(written(table, document), "x") == small
    more = table.append_column("more", pa.array([1] * len(table)))
    assert parquet.from_bytes(written(more, document | {"more": 1}), "x") == small


def test_every_column_is_needed_with_its_type(small):
    table, document = table_of(small)
    for index, field in enumerate(table.schema):
        refused(written(table.remove_column(index), document), field.name)
        refused(written(table.append_column(field, table.column(index)), document))
        wrong = pa.array([{"a": 1}] * len(table))
        refused(written(table.set_column(index, field.name, wrong), document), field.name)
        if field.name not in ("bits_per_weight", "exponent_entropy", "exponent_counts", "exact"):
            nulls = pa.array([None] * len(table), field.type)
            refused(written(table.set_column(index, pa.field(field.name, field.type), nulls), document), field.name)
    refused(
        written(table.set_column(5, "stored_bytes", table["stored_bytes"].cast(pa.int32())), document), "int64", "int32"
    )


VALUES = {
    "file": ["", "y.df11", "../x.df11", "x" * 100_000],
    "dtype": ["", "BF17", "I16"],
    "shape": [[], [-1], [2**62] * 64, [1] * 65, [70_001]],
    "encoding": ["", "raw", "verbatim"],
    "stored_bytes": [-1, 0, 2**63 - 1],
    "elements": [-1, 0, 69_999],
    "bits_per_weight": [None, 0.0, math.nan, math.inf],
    "exponent_entropy": [None, -1.0, 8.5, math.nan, 1.0],
    "exponent_counts": [None, [], [0] * 255, [0] * 256, [-1, 70_001, *[0] * 254], [70_000, *[0] * 255], [2**62] * 256],
    "stored_xxh3": [[], [1, 2]],
    "decoded_xxh3": [[], [1, 2]],
}


@pytest.mark.parametrize("column", VALUES)
def test_rows_must_be_as_documented(column, small):
    table, document = table_of(small)
    index = table.schema.get_field_index(column)
    field = table.schema.field(column)
    assert small.tensors[0].name == "a"
    for value in VALUES[column]:
        values = [value, *table.column(column).to_pylist()[1:]]
        refused(written(table.set_column(index, pa.field(column, field.type), pa.array(values, field.type)), document))
    rows = [row.name for row in small.tensors]
    exact = table.set_column(10, "exact", pa.array([name != "b" for name in rows]))
    refused(written(exact, document), "exact")
    refused(written(table, document | {"options": {"cast": None}}), "exact")


def test_a_long_text_that_is_named_often(small):
    # Less than a megabyte here, but a terabyte once repeated.
    table, document = table_of(small)
    many = pa.concat_tables([table] * 60_000)
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(many), np.int32)), pa.array(["x" * 10_000_000]))
    refused(written(many.set_column(1, "name", long), document, store_schema=False), "too many rows")
    few = table.slice(0, 1)
    refused(written(pa.concat_tables([few] * 2), document), "a tensor is named twice")
    names = pa.array([f"{index:0100000}" for index in range(100)])
    many = pa.concat_tables([few] * len(names)).set_column(1, "name", names)
    small_file = written(many, document, store_schema=False, write_statistics=False, compression="zstd")
    assert len(small_file) < 100_000
    refused(small_file, "names are too long")


def changed(document: dict, path: str, value: object) -> dict:
    *folders, last = path.split("/")
    copy = json.loads(json.dumps(document))
    place = copy
    for folder in folders:
        place = place[int(folder) if folder.isdigit() else folder]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("version", [..., 2, "1", True, None]),
        ("tool", [..., 1, None]),
        ("source", [..., None, [], "x"]),
        ("source/repository", [1, [], {}]),
        ("source/commit", [1, []]),
        ("source/path", [..., None, 1]),
        ("source/private", ["no", 0, []]),
        ("options/cast", ["f16", 1, []]),
        ("files", [..., None, {}, [], [1], ["x"]]),
        ("files/0/file", [..., 1, "", "/x.df11", "../x.df11", "a//b", "./x.df11", "x\0.df11", "y.df11"]),
        ("files/0/bytes", [..., -1, 2**63, 1.5, "1", True, None]),
        ("files/0/sha256", ["", "0" * 63, "G" * 64, 1]),
        ("files/0/source", [..., None, []]),
        ("files/0/source/file", [..., "/etc/passwd", "..", 1]),
        ("files/0/source/bytes", [..., -1]),
        ("files/0/source/sha256", [..., None, "x"]),
        ("others", [None, [], [["x", "0" * 64]], 1, "x"]),
        ("renamed", [None, [], "x", {"x": 1}, {"x": "../y"}, {"/x": "y"}, {"": "y"}, {"x": None}]),
        ("others/config.json", [None, 1, "", "0" * 63, "0" * 65, "G" * 64, "F" * 64, ["0" * 64]]),
    ],
)
def test_the_metadata_must_be_as_documented(path, values, small):
    table, document = table_of(small)
    for value in values:
        refused(written(table, changed(document, path, value)))
    refused(written(table, document | {"files": document["files"] * 2}), "twice")


def test_an_earlier_manifest_does_not_say_whether_its_source_was_private(small):
    table, document = table_of(replace(small, origin=replace(ORIGIN, private=True)))
    assert parquet.from_bytes(written(table, document), "x").origin.private
    assert parquet.from_bytes(written(table, changed(document, "source/private", ...)), "x").origin == ORIGIN


@pytest.mark.parametrize(
    "name", ["", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./x", "x/", "a//b", "x\0", ".", "x/./y"]
)
def test_other_files_must_be_in_the_folder(name, small):
    table, document = table_of(small)
    refused(written(table, changed(document, "others", {"fine": "0" * 64, name: "0" * 64})), "relative")


def test_other_files_of_any_name(small):
    others = tuple((name, f"{number:064x}") for number, name in enumerate(("a/b/c.txt", "ключ 🗝", " ", "...", "a\\b")))
    manifest = replace(small, others=others)
    assert parquet.from_bytes(parquet.to_bytes(manifest), "x") == manifest


def test_names_of_any_kind(small):
    names = (("a/b.df11", "a/b.sft"), ("ключ 🗝.df11.index.json", "ключ 🗝.sft.index.json"), ("\\udcff", "\\"))
    assert parquet.from_bytes(parquet.to_bytes(replace(small, renamed=names)), "x").renamed == names
    table, document = table_of(small)
    assert parquet.from_bytes(written(table, changed(document, "renamed", ...)), "x") == small


def test_files_of_the_first_release_name_no_others(small):
    table, document = table_of(small)
    assert document["others"] == dict(small.others)
    assert parquet.from_bytes(written(table, changed(document, "others", ...)), "x") == replace(small, others=())


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"null", b"1", b'"x"', b"{", b"[" * 100_000, b"{}"])
def test_metadata_that_are_not_json(text, small):
    refused(written(table_of(small)[0], text))


def test_rows_out_of_order(tree):
    table, document = table_of(tree[2])
    refused(written(table.take(pa.array(range(len(table) - 1, -1, -1))), document), "order")


def test_what_is_said_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "df11.converter.parquet", raising=False)
    monkeypatch.delattr("df11.converter.parquet", raising=False)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'df11\[convert\]'"):
        importlib.import_module("df11.converter.parquet")
