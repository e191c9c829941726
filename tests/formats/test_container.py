"""Containers: every tensor comes back, by rows and in threads too; what safetensors sees; damage raises a Df11Error."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import df11
from df11.formats import container as container_module
from df11.formats import errors, framing, reference
from df11.formats.container import NUMPY_DTYPES, Container
from tests.support import strategies
from tests.vectors import forge, make_golden

LENGTHS = forge.balanced(make_golden.PAIRS)
WEIGHTS = make_golden.weights_of(make_golden.drawn(LENGTHS, 300, 0))
RECORD = forge.bf16("a/record", WEIGHTS, make_golden.coded("", WEIGHTS, LENGTHS).stored, (30, 20))
NUMBERS = forge.Tensor("numbers", "I32", (5, 2), bytes(range(40)))
BITS = forge.Tensor("bits", "F4", (4, 2), bytes(range(4)))
SCALAR = forge.Tensor("scalar", "F16", (), b"\x00\x3c")
EMPTY = forge.Tensor("empty", "F64", (0, 3), b"")
TENSORS = (RECORD, NUMBERS, BITS, SCALAR, EMPTY)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container with a record, three verbatim tensors and an empty one."""
    path = tmp_path_factory.mktemp("small") / "small.df11"
    path.write_bytes(forge.container(TENSORS))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("containers")


def read_all(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with Container(path) as container:
        assert {entry.name for entry in container.source_header.entries} == set(container.keys())
        return {
            name: (container.info(name).dtype, container.info(name).shape, container.tensor(name).tobytes())
            for name in container.keys()
        }


@given(file=strategies.safetensors_files())
def test_what_is_converted_is_read(folder: Path, file: strategies.SafetensorsFile) -> None:
    source, target = folder / "a.safetensors", folder / "a.df11"
    source.write_bytes(file.data)
    df11.convert(source, target, threads=1, force=True)
    assert read_all(target) == file.tensors
    assert reference.decode_file(target.read_bytes()) == {
        name: content for name, (_, _, content) in file.tensors.items()
    }
    with Container(target) as container:
        assert container.source.sha256 == hashlib.sha256(file.data).hexdigest()
        assert container.source.bytes == len(file.data)
        assert container.source_header.metadata == file.metadata
        assert container.source_header.raw == file.data[8 : 8 + container.source.header_bytes]
        assert container.size == target.stat().st_size


@given(file=strategies.safetensors_files())
@settings(max_examples=20)
def test_the_safetensors_library_reads_the_container(folder: Path, file: strategies.SafetensorsFile) -> None:
    source, target = folder / "b.safetensors", folder / "b.df11"
    source.write_bytes(file.data)
    df11.convert(source, target, threads=1, force=True)
    stored = {
        name: (value["dtype"], bytes(value["data"])) for name, value in safetensors.deserialize(target.read_bytes())
    }
    assert stored.keys() == file.tensors.keys()
    with Container(target) as container, safetensors.safe_open(target, "np") as library:
        assert set(library.keys()) == set(container.keys())
        assert library.metadata()["df11.version"] == "1"
        for name, (dtype, content) in stored.items():
            info = container.info(name)
            assert len(content) == info.stored_bytes
            if info.encoding == "verbatim":
                assert (dtype, content) == (info.dtype, file.tensors[name][2])
            else:
                assert dtype == "U8"
                assert content[:4] == b"DF11"


def test_uniformly_random_weights_grow_by_the_header_only(folder: Path) -> None:
    weights = np.random.default_rng(0).integers(65536, size=2**21 + 5, dtype=np.uint16)
    header, data = forge.safetensors_file([forge.Tensor("w", "BF16", (len(weights),), weights.tobytes())])
    source = folder / "random.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header + data)
    df11.convert(source, source.with_suffix(".df11"))
    growth = source.with_suffix(".df11").stat().st_size - source.stat().st_size
    assert 0 < growth < 1024  # The df11 metadata of one tensor; 0.03 % of these 4 MB.
    assert growth < source.stat().st_size * 0.001


# Reading.


def test_what_a_container_says(small: Path) -> None:
    with df11.open(small) as container:
        assert container.keys() == [tensor.name for tensor in TENSORS]
        assert len(container) == len(TENSORS)
        assert "numbers" in container
        assert "number" not in container
        assert container.writer == "df11 test vectors"
        record, empty = container.info("a/record"), container.info("empty")
        assert (record.dtype, record.shape, record.elements, record.encoding, record.exact) == (
            "BF16",
            (30, 20),
            600,
            "df11",
            None,
        )
        assert record.bits_per_weight == 8 * len(RECORD.stored_bytes) / 600
        assert (empty.elements, empty.bits_per_weight, empty.encoding) == (0, None, "verbatim")


def test_arrays_have_dtype_and_shape(small: Path) -> None:
    with df11.open(small) as container:
        assert container.tensor("a/record").tolist() == np.reshape(WEIGHTS, (30, 20)).tolist()
        assert container.tensor("numbers").dtype == "<i4"
        assert container.tensor("numbers").shape == (5, 2)
        assert container.tensor("scalar").shape == ()
        assert container.tensor("scalar") == 1
        assert container.tensor("empty").shape == (0, 3)
        assert container.tensor("bits").tolist() == [0, 1, 2, 3]


@given(data=st.data())
def test_rows_are_slices(small: Path, data: st.DataObject) -> None:
    with df11.open(small) as container:
        tensor = container.tensor(data.draw(st.sampled_from(["a/record", "numbers", "empty"])))
        name = {(30, 20): "a/record", (5, 2): "numbers", (0, 3): "empty"}[tensor.shape]
        start = data.draw(st.integers(0, len(tensor)))
        stop = data.draw(st.integers(start, len(tensor)))
        rows = container.rows(name, start, stop)
        assert rows.dtype == tensor.dtype
        assert rows.tobytes() == tensor[start:stop].tobytes()
        assert rows.shape == tensor[start:stop].shape


def test_rows_across_segments(folder: Path) -> None:
    # Rows of three weights, so that they start at odd places of every segment.
    first = make_golden.weights_of(make_golden.drawn(LENGTHS, 4096, 1))
    parts = [first, [w ^ 1 for w in first], first[: 8190 - 8192 % 3]]
    weights = [w for part in parts for w in part][: 3 * 8190]
    parts = [weights[i : i + 8192] for i in range(0, len(weights), 8192)]
    record = forge.record([(forge.coded_segment(part, LENGTHS), part) for part in parts], 8192)
    path = folder / "rows.df11"
    path.write_bytes(forge.container([forge.bf16("w", weights, record, (len(weights) // 3, 3))]))
    with df11.open(path) as container:
        expected = np.array(weights, np.uint16).reshape(-1, 3)
        for start, stop in [
            (0, 1),
            (2729, 2733),
            (2730, 2731),
            (1, len(expected)),
            (2731, 5462),
            (5460, len(expected)),
            (7, 7),
        ]:
            assert np.array_equal(container.rows("w", start, stop), expected[start:stop])


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda c: c.tensor("missing"), errors.MissingError),
        (lambda c: c.info("missing"), errors.MissingError),
        (lambda c: c.rows("missing", 0, 1), errors.MissingError),
        (lambda c: c.record("numbers"), errors.UsageError),
        (lambda c: c.rows("numbers", 0, 6), errors.UsageError),
        (lambda c: c.rows("numbers", -1, 2), errors.UsageError),
        (lambda c: c.rows("numbers", 3, 2), errors.UsageError),
        (lambda c: c.rows("scalar", 0, 0), errors.UsageError),
        (lambda c: c.rows("bits", 0, 1), errors.UsageError),
    ],
)
def test_asked_for_what_is_not_there(
    small: Path, act: Callable[[Container], object], error: type[errors.Df11Error]
) -> None:
    with df11.open(small) as container, pytest.raises(error) as caught:
        act(container)
    assert caught.value.file == str(small)
    assert caught.value.tensor


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingError) as caught:
        df11.open(tmp_path / "missing.df11")
    assert caught.value.file == str(tmp_path / "missing.df11")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError):
        df11.open(tmp_path)


def test_a_file_that_may_not_be_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:  # Root may read regardless of permissions.
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(container_module, "open", refuse, raising=False)
    with pytest.raises(errors.NotAllowedError):
        df11.open(small)


def test_refusing_a_file_closes_it(small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.df11"
    bad.write_bytes(small.read_bytes()[:-1])
    os.close(lowest := os.dup(0))
    for _ in range(3):
        with pytest.raises(errors.TruncatedFileError):
            df11.open(bad)
    os.close(now := os.dup(0))
    assert now == lowest


def test_verbatim_blocks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "BLOCK_BYTES", 16)
    with df11.open(small) as container:
        assert [block.tobytes() for block in container.verbatim_blocks("numbers")] == [
            bytes(range(16)),
            bytes(range(16, 32)),
            bytes(range(32, 40)),
        ]
        assert container.tensor("numbers").tobytes() == bytes(range(40))
        assert list(container.verbatim_blocks("empty")) == []


def test_threads_share_a_container(folder: Path) -> None:
    tensors = []
    for seed in range(8):
        weights = make_golden.weights_of(make_golden.drawn(LENGTHS, 5000, seed))
        tensors.append(
            make_golden.coded(f"w{seed}", weights, LENGTHS) if seed % 2 else forge.bf16(f"w{seed}", weights, None)
        )
    path = folder / "threads.df11"
    path.write_bytes(forge.container(sorted(tensors, key=lambda tensor: tensor.stored is None)))
    expected = {tensor.name: tensor.decoded for tensor in tensors}

    def read(container: Container, name: str) -> bool:
        whole, part = container.tensor(name), container.rows(name, 4000, 9001)
        return (
            whole.tobytes() == expected[name]
            and part.tobytes() == expected[name][8000:18002]
            and len(container.source_header.entries) == 8
        )

    with df11.open(path) as container, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: read(container, f"w{i % 8}"), range(160)))


def test_short_reads_go_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: honest(descriptor, [views[0][:7]], offset))
    assert read_all(small) == {tensor.name: (tensor.dtype, tensor.shape, tensor.decoded) for tensor in TENSORS}


def test_a_disk_that_fails(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with df11.open(small) as container:
        monkeypatch.setattr(os, "preadv", fail)
        for name in ("a/record", "numbers"):
            with pytest.raises(errors.UsageError, match="Input/output error"):
                container.tensor(name)


# Damage.


def test_a_file_that_shrinks(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.df11"
    path.write_bytes(small.read_bytes())
    with df11.open(path) as container:
        os.truncate(path, container.size - 60)
        with pytest.raises(errors.TruncatedFileError, match="truncated"):
            container.tensor("numbers")


@given(data=st.data())
@settings(max_examples=300)
def test_changed_bytes_are_found_or_harmless(small: Path, folder: Path, data: st.DataObject) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789{}[]",:\\ \x00\xff') | st.integers(0, 255))
    path = folder / "changed.df11"
    path.write_bytes(content)
    try:
        found = read_all(path)
    except errors.Df11Error as error:
        assert error.file == str(path)
        assert "\n" not in str(error)
        return
    assert found == {tensor.name: (tensor.dtype, tensor.shape, tensor.decoded) for tensor in TENSORS}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 700)
    | st.integers()
    | st.floats()
    | st.sampled_from(["df11", "verbatim", "BF16", "", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["encoding", "dtype", "shape", "exact"]), inner, max_size=4)
    ),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        ("df11.requires", ()),
        ("df11.source", ()),
        *[("df11.source", (key,)) for key in ("bytes", "sha256", "header_bytes", "cast")],
        ("df11.tensors", ()),
        ("df11.tensors", ("scalar",)),
        *[
            ("df11.tensors", (name, key))
            for name in ("a/record", "scalar")
            for key in ("encoding", "dtype", "shape", "exact", "xxh3")
        ],
    ]
)


@given(place=PLACES, value=VALUES)
@settings(max_examples=300)
def test_any_value_anywhere_in_the_metadata(folder: Path, place: tuple[str, tuple[str, ...]], value: object) -> None:
    key, path = place

    def edit(header: dict[str, Any]) -> None:
        document: Any = json.loads(header["__metadata__"][key])
        inner = outer = {"": document}
        name = ""
        for step in path:
            inner, name = inner[name], step
        inner[name] = value
        header["__metadata__"][key] = json.dumps(outer[""])

    target = folder / "metadata.df11"
    target.write_bytes(forge.container(TENSORS, edit=edit))
    try:
        found = read_all(target)
    except errors.Df11Error as error:
        assert error.file == str(target)
        return
    assert found == {tensor.name: (tensor.dtype, tensor.shape, tensor.decoded) for tensor in TENSORS}


@pytest.mark.parametrize("level", [-5, 3, 19])
@pytest.mark.parametrize("with_size", [True, False])
def test_any_frame_of_the_source_header_is_read(tmp_path: Path, level: int, with_size: bool) -> None:
    header = forge.safetensors_file(TENSORS)[0] + b" " * 3000
    frame = zstandard.ZstdCompressor(level=level, write_content_size=with_size).compress(header)

    def edit(document: dict[str, Any]) -> None:
        document["__metadata__"]["df11.source_header"] = base64.b64encode(frame).decode()

    path = tmp_path / "a.df11"
    path.write_bytes(forge.container(TENSORS, source_header=header, edit=edit))
    with df11.open(path) as container:
        assert container.source_header.raw == header


@pytest.mark.parametrize("with_size", [True, False])
def test_a_source_header_larger_than_it_says_is_refused(tmp_path: Path, with_size: bool) -> None:
    frame = zstandard.ZstdCompressor(level=1, write_content_size=with_size).compress(bytes(1 << 28))

    def edit(document: dict[str, Any]) -> None:
        document["__metadata__"]["df11.source_header"] = base64.b64encode(frame).decode()

    path = tmp_path / "a.df11"
    path.write_bytes(forge.container(TENSORS, edit=edit))
    tracemalloc.start()
    try:
        with df11.open(path) as container, pytest.raises(errors.SourceHeaderError):
            container.source_header  # noqa: B018 - read and checked on first access
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_every_numpy_dtype_has_the_size_of_its_tensor() -> None:
    assert {name: 8 * np.dtype(dtype).itemsize for name, dtype in NUMPY_DTYPES.items()} == {
        name: bits for name, bits in framing.DTYPE_BITS.items() if bits >= 8
    }
