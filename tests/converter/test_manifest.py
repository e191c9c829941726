"""The manifest: rows of the converter and of a finished container are the same, and a Parquet file from anywhere is believed nothing."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import df11
from df11.converter import kernels
from df11.converter import manifest as manifests
from df11.converter.manifest import (
    FILE_NAME,
    TOOL,
    ExponentCounts,
    FileRow,
    Manifest,
    Origin,
    collect,
    scan,
    up_to_date,
)
from df11.formats import errors
from tests.support import commands, sources, strategies

ORIGIN = Origin("owner/name", "0" * 40, "sub/folder")


def numpy_counts(data: bytes) -> np.ndarray:
    """How often each exponent occurs in BF16 bytes, apart from df11's way."""
    return np.bincount((np.frombuffer(data, "<u2").astype(np.int64) // 128) % 256, minlength=256)


def numpy_entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(abs(-(shares * np.log2(shares)).sum()))


def convert(folder: Path, name: str, data: bytes, **options) -> df11.converter.convert.FileReport:
    source = folder / f"{name}.safetensors"
    source.write_bytes(data)
    return df11.convert(source, folder / f"{name}.df11", **options).files[0]


def file_row(report) -> FileRow:
    output, source = Path(report.output).name, Path(report.source).name
    return FileRow(output, report.output_bytes, None, source, report.source_bytes, report.source_sha256)


def check_rows(rows, tensors, container: Path, *, cast: bool = False) -> None:
    """``tensors``: name -> (dtype, shape, bytes) of the source."""
    assert rows == scan(container, container.name, jobs=2)
    with df11.open(container) as opened:
        assert [row.name for row in rows] == opened.keys()
        assert up_to_date(rows, opened)
        for row in rows:
            info = opened.info(row.name)
            dtype, shape, data = tensors[row.name]
            is_cast = cast and dtype == "F32"
            data = sources.round_to_bf16(data) if is_cast else data
            assert (row.file, row.dtype, row.shape) == (container.name, "BF16" if is_cast else dtype, shape)
            assert (row.encoding, row.stored_bytes, row.exact) == (info.encoding, info.stored_bytes, info.exact)
            assert (row.elements, row.bits_per_weight, row.decoded_bytes) == (
                info.elements,
                info.bits_per_weight,
                len(data),
            )
            if row.encoding == "df11":
                segments = opened.record(row.name).segments
                assert row.stored_xxh3 == tuple(segment.stored_checksum for segment in segments)
                assert row.decoded_xxh3 == tuple(segment.decoded_checksum for segment in segments)
            else:
                assert row.stored_xxh3 == row.decoded_xxh3 == (opened.checksum(row.name),)
            if row.dtype != "BF16" or not data:
                assert row.exponent_entropy is row.exponent_counts is None
                continue
            counts = numpy_counts(data)
            assert row.exponent_entropy == pytest.approx(numpy_entropy(counts), abs=2e-9)
            assert (row.exponent_counts is not None) == (row.elements >= 65_536)
            if row.exponent_counts is not None:
                assert np.array_equal(row.exponent_counts.array(), counts)
                assert row.exponent_counts.entropy() == row.exponent_entropy


@pytest.mark.parametrize("cast", [None, "bf16"])
@pytest.mark.parametrize("kind", sources.KINDS)
def test_rows_of_every_kind(kind, cast, tmp_path):
    data = sources.KINDS[kind]()
    report = convert(tmp_path, "x", data, cast=cast)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    body = data[8 + int.from_bytes(data[:8], "little") :]
    tensors = {
        name: (e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])])
        for name, e in header.items()
        if name != "__metadata__"
    }
    assert len(report.rows) == len(tensors)
    check_rows(report.rows, tensors, tmp_path / "x.df11", cast=cast is not None)


@given(file=strategies.safetensors_files(), cast=st.sampled_from([None, "bf16"]))
def test_rows_of_any_file(file, cast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    report = convert(folder, "x", file.data, cast=cast)
    check_rows(report.rows, file.tensors, folder / "x.df11", cast=cast is not None)
    manifest = Manifest(ORIGIN, cast, TOOL, (file_row(report),), report.rows)
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest


@given(weights=strategies.weights(70_000))
def test_the_kernel_counts(weights):
    assert np.array_equal(kernels.count_exponents(weights), numpy_counts(weights.tobytes()))


def test_records_with_raw_segments_are_counted(half_coded):
    rows = {row.name: row for row in half_coded.rows}
    assert {row.encoding for row in rows.values()} == {"df11"}
    assert all(len(row.stored_xxh3) == len(row.decoded_xxh3) == 2 for row in rows.values())
    assert rows["a"].exponent_counts == rows["b"].exponent_counts


@pytest.fixture(scope="module")
def half_coded(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("half"), "x", sources.KINDS["raw and coded segments"]())


def test_a_tensor_that_does_not_shrink_is_counted_still(tmp_path):
    tensor = sources.random_tensor("a", "BF16", (sources.SEGMENT + 70_000,), 1)
    (row,) = convert(tmp_path, "x", sources.file_bytes([tensor])).rows
    assert row.encoding == "verbatim"
    check_rows((row,), {"a": (tensor.dtype, tensor.shape, tensor.data)}, tmp_path / "x.df11")


@pytest.mark.parametrize("count", [65_535, 65_536])
def test_counts_are_kept_from_65536_weights_on(count, tmp_path):
    (row,) = convert(tmp_path, "x", sources.file_bytes([sources.bf16("a", (count,))])).rows
    assert (row.exponent_counts is not None) == (count == 65_536)
    assert row.exponent_entropy == pytest.approx(
        numpy_entropy(numpy_counts(sources.bf16("a", (count,)).data)), abs=2e-9
    )


def test_a_damaged_container_is_not_described(tmp_path):
    convert(
        tmp_path, "x", sources.file_bytes([sources.bf16("a", (100_000,)), sources.random_tensor("b", "I64", (1000,))])
    )
    path = tmp_path / "x.df11"
    data = bytearray(path.read_bytes())
    for place in (-100, -50_000):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(errors.FormatError):
            scan(path, "x.df11")


@given(st.lists(st.integers(0, 2**40), min_size=256, max_size=256).filter(any))
def test_counts_are_kept_exactly(counts):
    kept = ExponentCounts.of(counts)
    assert kept.array().tolist() == counts
    assert (
        kept.entropy() == manifests.entropy(counts) == pytest.approx(numpy_entropy(np.array(counts, float)), abs=1e-8)
    )


@pytest.mark.parametrize(
    ("counts", "bits"), [([7], 0), ([1, 1], 1), ([5, 5, 5, 5], 2), ([2, 1, 1], 1.5), ([1] * 256, 8)]
)
def test_known_entropies(counts, bits):
    assert manifests.entropy([0, *counts, 0]) == bits


# The Parquet file.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with three containers and its manifest, without tests' leave to change it."""
    folder = tmp_path_factory.mktemp("tree")
    kinds = {"a": "every dtype, large", "b": "shapes, scalar and empty", "c": "no tensors"}
    reports = [convert(folder, name, sources.KINDS[kind](), cast="bf16") for name, kind in kinds.items()]
    reports.append(
        convert(folder, "d", sources.file_bytes([sources.bf16("big", (3 * sources.SEGMENT // 2,), 3)]), cast="bf16")
    )
    files = [(file_row(report), report.rows) for report in reports]
    return folder, files, collect(folder, ORIGIN, "bf16", files)


def test_the_documented_columns(tree):
    folder, _, manifest = tree
    file = pq.ParquetFile(folder / FILE_NAME)
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
    assert list(document) == ["version", "tool", "source", "options", "files"]
    assert (document["version"], document["tool"]) == (1, f"df11 {df11.__version__}")
    assert document["source"] == {"repository": "owner/name", "commit": "0" * 40, "path": "sub/folder"}
    assert document["options"] == {"cast": "bf16"}
    assert [entry["file"] for entry in document["files"]] == ["a.df11", "b.df11", "c.df11", "d.df11"]
    path = folder / "a.safetensors"
    assert document["files"][0] == {
        "file": "a.df11",
        "bytes": (folder / "a.df11").stat().st_size,
        "sha256": None,
        "source": {"file": "a.safetensors", "bytes": path.stat().st_size, "sha256": sources.sha256(path)},
    }
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
    folder, _, manifest = tree
    data = (folder / FILE_NAME).read_bytes()
    assert data == manifest.to_bytes()
    assert Manifest.from_bytes(data, "x") == manifests.read(folder) == manifests.read(folder / FILE_NAME) == manifest
    assert str(folder).encode() not in data
    assert b"pandas" not in data


def test_the_same_bytes_however_it_was_made(tree, tmp_path):
    folder, files, manifest = tree
    data = manifest.to_bytes()
    for options in ({"jobs": 1}, {"jobs": 7}, {"max_memory": "1GiB", "verify": False}):
        other = tmp_path / str(len(list(tmp_path.iterdir())))
        other.mkdir()
        reports = [
            convert(other, name, (folder / f"{name}.safetensors").read_bytes(), cast="bf16", **options)
            for name in "abcd"
        ]
        collect(other, ORIGIN, "bf16", [(file_row(report), report.rows) for report in reports])
        assert (other / FILE_NAME).read_bytes() == data
    # Some, or all, were there already; with and without a manifest.
    for fresh in (set(), {"b.df11"}):
        for there in (True, False):
            if not there:
                (other / FILE_NAME).unlink()
            assert (
                collect(
                    other,
                    ORIGIN,
                    "bf16",
                    [(file, rows if file.file in fresh else None) for file, rows in files],
                    jobs=2,
                )
                == manifest
            )
            assert (other / FILE_NAME).read_bytes() == data


def test_it_is_written_only_if_it_changes(tree):
    folder, files, _ = tree
    before = (folder / FILE_NAME).stat()
    collect(folder, ORIGIN, "bf16", [(file, None) for file, _ in files])
    after = (folder / FILE_NAME).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def copied(tree, folder: Path) -> Path:
    folder.mkdir()
    for path in tree[0].glob("*.df11"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_finished_files_are_decoded_only_without_a_manifest(tree, tmp_path, monkeypatch):
    _, files, manifest = tree
    folder = copied(tree, tmp_path / "t")
    scanned = []
    monkeypatch.setattr(
        manifests, "scan", lambda path, file, **options: scanned.append(file) or scan(path, file, **options)
    )
    again = [(file, None) for file, _ in files]
    assert collect(folder, ORIGIN, "bf16", again) == manifest
    assert len(scanned) == 4
    scanned.clear()
    assert collect(folder, ORIGIN, "bf16", again) == manifest
    assert scanned == ["c.df11"]  # It has no rows, which are quick to find.


@pytest.mark.parametrize("kind", ["another conversion's", "damaged", "a folder's name"])
def test_a_stale_manifest_is_not_trusted(kind, tree, tmp_path):
    _, files, manifest = tree
    folder = copied(tree, tmp_path / "t")
    if kind == "damaged":
        (folder / FILE_NAME).write_bytes(manifest.to_bytes()[:-1])
    elif kind == "another conversion's":
        other = convert(
            tmp_path, "a", sources.file_bytes([sources.bf16("big", (3 * sources.SEGMENT // 2,), 4)]), cast="bf16"
        )
        manifests.write(folder, manifest.with_file(replace(file_row(other), file="d.df11"), other.rows))
        assert manifests.read(folder) != manifest
    else:
        (folder / FILE_NAME).mkdir()
        with pytest.raises(errors.Df11Error):
            collect(folder, ORIGIN, "bf16", [(file, None) for file, _ in files])
        return
    assert collect(folder, ORIGIN, "bf16", [(file, None) for file, _ in files]) == manifest
    assert manifests.read(folder) == manifest


def test_up_to_date_compares_everything_that_the_header_tells(tree):
    folder, files, _ = tree
    rows = files[3][1]
    with df11.open(folder / "d.df11") as container:
        assert up_to_date(rows, container)
        assert not up_to_date((), container)
        assert not up_to_date(rows + rows, container)
        for change in (
            {"name": "other"},
            {"dtype": "F16"},
            {"shape": (1, *rows[0].shape)},
            {"encoding": "verbatim"},
            {"stored_bytes": rows[0].stored_bytes + 1},
            {"exact": True},
            {"stored_xxh3": (1, 2)},
            {"decoded_xxh3": rows[0].decoded_xxh3[::-1]},
            {"exponent_entropy": 1.0},
        ):
            assert not up_to_date((replace(rows[0], **change),), container), change


def test_a_file_name_that_is_not_utf8(tmp_path):
    report = convert(tmp_path, "x", sources.file_bytes([sources.bf16("a", (10,))]))
    row = replace(file_row(report), file="a\udcff.df11", source_file="a\udcff.safetensors")
    (tmp_path / "x.df11").rename(tmp_path / row.file)
    first = collect(tmp_path, ORIGIN, None, [(row, report.rows)])
    assert manifests.read(tmp_path).files[0].file == "a\\udcff.df11"
    assert collect(tmp_path, ORIGIN, None, [(row, None)]) == first


def test_the_same_command_makes_a_lost_manifest_again(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name, kind in (("a", "every dtype, large"), ("sub/b", "many segments")):
        path = source / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sources.KINDS[kind]())
    commands.run("convert", source, target, "--cast", "bf16", "--jobs", "2").fine()
    data = (target / FILE_NAME).read_bytes()
    manifest = Manifest.from_bytes(data, target)
    assert (manifest.origin, manifest.cast) == (Origin(), "bf16")
    assert [(file.file, file.source_file) for file in manifest.files] == [
        ("a.df11", "a.safetensors"),
        ("sub/b.df11", "sub/b.safetensors"),
    ]
    for lost in ([FILE_NAME], ["sub/b.df11"], [FILE_NAME, "a.df11"], [], None):
        if lost is None:
            (target / FILE_NAME).write_bytes(data[:-10])
        for name in lost or []:
            (target / name).unlink()
        commands.run("convert", source, target, "--cast", "bf16", "--jobs", "1").fine()
        assert (target / FILE_NAME).read_bytes() == data


# What needs no file.


def test_files_are_added_replaced_and_ordered(tree):
    _, files, manifest = tree
    empty = Manifest(ORIGIN, "bf16", TOOL, (), ())
    backwards = empty
    for file, rows in reversed(files):
        backwards = backwards.with_file(file, [replace(row, file="elsewhere") for row in rows])
    assert [file.file for file in backwards.files] == ["d.df11", "c.df11", "b.df11", "a.df11"]
    assert backwards.ordered([file.file for file, _ in files]) == manifest
    assert backwards.ordered(["x", "b.df11"]).files == (files[1][0],)
    assert backwards.ordered(["x", "b.df11"]).tensors == manifest.rows_of("b.df11") == files[1][1]
    smaller = manifest.with_file(replace(files[1][0], sha256="0" * 64), files[1][1][:1])
    assert [file.file for file in smaller.files] == [file.file for file in manifest.files]
    assert smaller.files[1].sha256 == "0" * 64
    assert smaller.rows_of("b.df11") == files[1][1][:1]
    assert manifest.rows_of("nothing") == ()


# Forged files.


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(errors.ManifestError) as caught:
        Manifest.from_bytes(data, "some/where.parquet")
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
    report = convert(folder, "x", sources.file_bytes(tensors), cast="bf16")
    return Manifest(ORIGIN, "bf16", TOOL, (file_row(report),), report.rows)


def test_truncated_anywhere(small):
    data = small.to_bytes()
    assert Manifest.from_bytes(data, "x") == small
    for size in [*range(0, len(data), max(len(data) // 300, 1)), len(data) - 1]:
        refused(data[:size])
    refused(data + b"\0")


@pytest.mark.slow
def test_flipped_anywhere(small):
    data = small.to_bytes()
    footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    refusals = [0, 0]
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        try:
            read = Manifest.from_bytes(bytes(flipped), "x")
        except errors.ManifestError:
            refusals[place >= footer] += 1
        else:
            assert read.tensors == small.tensors
    # What remains are statistics and the like, which nobody reads here, and the texts of the metadata.
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
        manifests.read(tmp_path)


def test_absurd_sizes(small, monkeypatch):
    from df11.converter import parquet

    data = small.to_bytes()
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
        small.to_bytes()


def table_of(manifest: Manifest) -> tuple[pa.Table, dict]:
    file = pq.ParquetFile(io.BytesIO(manifest.to_bytes()))
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
    assert Manifest.from_bytes(written(table, document), "x") == small
    more = table.append_column("more", pa.array([1] * len(table)))
    assert Manifest.from_bytes(written(more, document | {"more": 1}), "x") == small


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
    "dtype": ["", "BF17", "F16"],
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
    # Less than a megabyte, that would be a terabyte.
    table, document = table_of(small)
    many = pa.concat_tables([table] * 30_000)
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(many), np.int32)), pa.array(["x" * 10_000_000]))
    refused(written(many.set_column(1, "name", long), document, store_schema=False), "names are too long")


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
        ("options/cast", ["f16", 1, []]),
        ("files", [..., None, {}, [], [1], ["x"]]),
        ("files/0/file", [..., 1, "", "/x.df11", "../x.df11", "a//b", "./x.df11", "x\0.df11", "y.df11"]),
        ("files/0/bytes", [..., -1, 2**63, 1.5, "1", True, None]),
        ("files/0/sha256", ["", "0" * 63, "G" * 64, 1]),
        ("files/0/source", [..., None, []]),
        ("files/0/source/file", [..., "/etc/passwd", "..", 1]),
        ("files/0/source/bytes", [..., -1]),
        ("files/0/source/sha256", [..., None, "x"]),
    ],
)
def test_the_metadata_must_be_as_documented(path, values, small):
    table, document = table_of(small)
    for value in values:
        refused(written(table, changed(document, path, value)))
    refused(written(table, document | {"files": document["files"] * 2}), "twice")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"null", b"1", b'"x"', b"{", b"[" * 100_000, b"{}"])
def test_metadata_that_are_not_json(text, small):
    refused(written(table_of(small)[0], text))


def test_rows_out_of_order(tree):
    table, document = table_of(tree[2])
    refused(written(table.take(pa.array(range(len(table) - 1, -1, -1))), document), "order")


# Memory, and what is imported.


@pytest.mark.slow
def test_memory_of_many_tensors(tmp_path):
    count = 15_000
    source, target = tmp_path / "x.safetensors", tmp_path / "x.df11"
    sources.write(source, [sources.Tensor(str(index), "BF16", (1,), b"\x80\x3f") for index in range(count)], padding=0)
    line = commands.run("convert", source, target, "--max-memory", "1MiB").error(6)
    needed = int(line.split("at least ")[1].split("MiB")[0])
    assert commands.peak_memory("convert", source, target, "--max-memory", f"{needed}MiB") <= needed << 20
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from df11.converter.manifest import *\n"
        "row = FileRow('x.df11', 1, None, 'x.safetensors', 1, '0' * 64)\n"
        "assert len(collect(Path(sys.argv[1]), Origin(), None, [(row, None)], jobs=2).tensors) == int(sys.argv[2])\n"
    )
    for _ in range(2):  # From the container, and from the manifest that is there then.
        assert measured_memory(program, tmp_path, count) <= 256 << 20
    assert (tmp_path / FILE_NAME).is_file()


def measured_memory(program: str, *arguments: object) -> int:
    command = [sys.executable, "-S", "-c", commands._MEASURE, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=commands.environment())
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_a_single_file_needs_no_pyarrow(tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [sources.bf16("a", (100,))])
    commands.run_without(["pyarrow"], tmp_path / "hide", "convert", source, tmp_path / "x.df11").fine()


def test_what_is_said_without_pyarrow(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "df11.converter.parquet", raising=False)
    monkeypatch.delattr("df11.converter.parquet", raising=False)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'df11\[convert\]'"):
        small.to_bytes()
