"""Rows from the converter and from a finished container: they are the same, and right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import df11
from df11.converter import parquet
from df11.converter.manifest import TOOL, Manifest, Origin
from df11.converter.scan import scan, up_to_date
from df11.formats import errors
from tests.support import sources, strategies
from tests.support.conversions import convert, file_row, numpy_counts, numpy_entropy, rows_named, tensors_of


def check_rows(rows, tensors, container, *, cast=False):
    """``tensors``: name -> (dtype, shape, bytes) of the source."""
    assert rows == scan(container, container.name, threads=2)
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
            if (row.encoding == "verbatim" and row.dtype != "BF16") or not data:
                assert row.exponent_entropy is row.exponent_counts is None
                continue
            counts = numpy_counts(data, row.dtype)
            assert row.exponent_entropy == pytest.approx(numpy_entropy(counts), abs=2e-9)
            assert (row.exponent_counts is not None) == (row.elements >= 65_536)
            if row.exponent_counts is not None:
                assert np.array_equal(row.exponent_counts.array(), counts)
                assert row.exponent_counts.entropy() == row.exponent_entropy


@pytest.mark.parametrize("cast", [None, "bf16"])
@pytest.mark.parametrize("kind", sources.KINDS)
def test_rows_of_every_kind(kind, cast, tmp_path):
    data = sources.KINDS[kind]()
    done = convert(tmp_path, "x", data, cast=cast)
    tensors = tensors_of(data)
    assert len(done.tensors) == len(tensors)
    check_rows(done.tensors, tensors, tmp_path / "x.df11", cast=cast is not None)
    path = tmp_path / "x.safetensors"
    assert (done.row.file, done.row.bytes, done.row.sha256) == ("x.df11", (tmp_path / "x.df11").stat().st_size, None)
    assert (done.row.source_file, done.row.source_bytes, done.row.source_sha256) == (
        "x.safetensors",
        len(data),
        sources.sha256(path),
    )


@given(file=strategies.safetensors_files(), cast=st.sampled_from([None, "bf16"]))
def test_rows_of_any_file(file, cast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    done = convert(folder, "x", file.data, cast=cast)
    check_rows(done.tensors, file.tensors, folder / "x.df11", cast=cast is not None)
    manifest = Manifest(Origin("owner/name", "0" * 40, "sub/folder"), cast, TOOL, (file_row(done),), done.tensors)
    assert parquet.from_bytes(parquet.to_bytes(manifest), "x") == manifest


@pytest.fixture(scope="module")
def half_coded(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("half"), "x", sources.KINDS["raw and coded segments"]())


def test_records_with_raw_segments_are_counted(half_coded):
    rows = rows_named(half_coded.tensors)
    assert {row.encoding for row in rows.values()} == {"df11"}
    assert all(len(row.stored_xxh3) == len(row.decoded_xxh3) == 2 for row in rows.values())
    assert rows["a"].exponent_counts == rows["b"].exponent_counts


def test_a_tensor_that_does_not_shrink_is_counted_still(tmp_path):
    tensor = sources.random_tensor("a", "BF16", (sources.SEGMENT + 70_000,), 1)
    (row,) = convert(tmp_path, "x", sources.file_bytes([tensor])).tensors
    assert row.encoding == "verbatim"
    check_rows((row,), {"a": (tensor.dtype, tensor.shape, tensor.data)}, tmp_path / "x.df11")


@pytest.mark.parametrize("count", [65_535, 65_536])
def test_counts_are_kept_from_65536_weights_on(count, tmp_path):
    (row,) = convert(tmp_path, "x", sources.file_bytes([sources.bf16("a", (count,))])).tensors
    assert (row.exponent_counts is not None) == (count == 65_536)
    assert row.exponent_entropy == pytest.approx(
        numpy_entropy(numpy_counts(sources.bf16("a", (count,)).data)), abs=2e-9
    )


def test_progress_is_in_stored_bytes(half_coded):
    told = []
    rows = scan(half_coded.path, "elsewhere/y.df11", threads=2, progress=told.append)
    assert rows == tuple(replace(row, file="elsewhere/y.df11") for row in half_coded.tensors)
    assert 0.99 * half_coded.row.bytes < sum(told) <= half_coded.row.bytes


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


def test_up_to_date_compares_everything_that_the_header_tells(tmp_path):
    tensor = sources.bf16("big", (3 * sources.SEGMENT // 2,), 3)
    rows = convert(tmp_path, "d", sources.file_bytes([tensor]), cast="bf16").tensors
    with df11.open(tmp_path / "d.df11") as container:
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
