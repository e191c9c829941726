"""safetensors framing: what is accepted, safetensors itself reads the same; what is refused gets df11's own errors."""

from __future__ import annotations

import io
import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from df11.formats import errors, framing, layout
from tests.support import strategies

TENSOR = {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}


def parse(header: bytes, data_size: int) -> framing.Header:
    return framing.parse_header(header, data_size, "file")


def stock(data: bytes) -> dict[str, Any]:
    """What the safetensors library reads; raises SafetensorError."""
    return dict(safetensors.deserialize(data))


@given(strategies.safetensors_files())
def test_valid_files(file: strategies.SafetensorsFile) -> None:
    size = int.from_bytes(file.data[:8], "little")
    header = parse(file.data[8 : 8 + size], len(file.data) - 8 - size)
    assert header.metadata == file.metadata
    assert header.data_start == 8 + size
    data = file.data[header.data_start :]
    found = {entry.name: (entry.dtype, entry.shape, data[entry.start : entry.end]) for entry in header.entries}
    assert found == file.tensors
    assert [entry.start for entry in header.entries] == sorted(entry.start for entry in header.entries)
    assert {
        name: (value["dtype"], tuple(value["shape"]), bytes(value["data"])) for name, value in stock(file.data).items()
    } == file.tensors


@given(strategies.safetensors_files())
def test_a_header_written_is_read(file: strategies.SafetensorsFile) -> None:
    size = int.from_bytes(file.data[:8], "little")
    header = parse(file.data[8 : 8 + size], len(file.data) - 8 - size)
    written = framing.encode_header(header.entries, header.metadata)
    again = parse(written, len(file.data) - 8 - size)
    assert (again.entries, again.metadata) == (header.entries, header.metadata)
    assert again.raw == written


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 10)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["I16", "F4", "", "shape", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)


def agreed(header: bytes, data: bytes) -> None:
    """Either df11 refuses with its own error, or it reads what safetensors reads."""
    try:
        parsed = parse(header, len(data))
    except errors.Df11Error as error:
        assert isinstance(error, errors.SafetensorsError | errors.LimitError)
        assert "\n" not in str(error)
        return
    read = stock(len(header).to_bytes(8, "little") + header + data)
    assert {entry.name: (entry.dtype, list(entry.shape)) for entry in parsed.entries} == {
        name: (value["dtype"], value["shape"]) for name, value in read.items()
    }


@given(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__", "x"]), VALUES, st.booleans())
@settings(max_examples=300)
@example("__metadata__", {"x": "\ud800"}, False)
@example("__metadata__", {"\ud800": "x"}, False)
@example("__metadata__", None, False)
@example("x", 1, True)
@example("shape", [float("inf")], True)
def test_any_value_anywhere(place: str, value: object, inside: bool) -> None:
    entry = {**TENSOR, place: value} if inside else TENSOR
    document = {"a": entry} if inside else {"a": entry, place: value}
    agreed(json.dumps(document).encode(), bytes(4))


@given(strategies.safetensors_files(largest=50), st.data())
@settings(max_examples=150)
def test_any_byte_changed(file: strategies.SafetensorsFile, data: st.DataObject) -> None:
    size = int.from_bytes(file.data[:8], "little")
    header = bytearray(file.data[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        # No minus: Python reads -0 as 0, which the library refuses.
        header[data.draw(st.integers(0, size - 1))] = data.draw(
            st.sampled_from(b'0123456789{}[]",:\\ue. \x00\xff') | st.integers(46, 255)
        )
    agreed(bytes(header), file.data[8 + size :])


@given(st.binary(max_size=60))
def test_any_bytes(header: bytes) -> None:
    agreed(header, b"")
    agreed(b'{"a":' + header, b"")


@pytest.mark.parametrize(
    ("header", "data_size", "error"),
    [
        (b"", 0, errors.HeaderJsonError),
        (b"[]", 0, errors.HeaderJsonError),
        (b'{"a":1}', 0, errors.HeaderJsonError),
        (b"{" * 100_000, 0, errors.LimitError),
        (b'{"a":' + b"[" * 5_000, 0, errors.LimitError),
        (b'{"__metadata__":' + b"[" * 100_000, 0, errors.LimitError),
        (b'{"__metadata__":{"a":NaN}}', 0, errors.HeaderJsonError),
        (b'{"a":{"dtype":"I16","shape":[-0],"data_offsets":[0,0]}}', 0, errors.HeaderJsonError),
        (json.dumps({"a": {**TENSOR, "x": {"a": "\ud800"}}}).encode(), 4, errors.HeaderJsonError),
        (
            json.dumps({"a": {**TENSOR, "shape": [0, 2**31, 2**31], "data_offsets": [0, 0]}}).encode(),
            0,
            errors.LimitError,
        ),
        (json.dumps({"a": {**TENSOR, "shape": [2**62] * 40}}).encode(), 4, errors.LimitError),
        (b'{"__metadata__":{"a":' + b"9" * 10_000 + b"}}", 0, errors.HeaderJsonError),
        (b'{"__metadata__":{"a":"1","a":"1"}}', 0, errors.HeaderJsonError),
        (json.dumps({"a": {**TENSOR, "shape": [2.0]}}).encode(), 4, errors.HeaderJsonError),
        (json.dumps({"a": {**TENSOR, "shape": [True, 2]}}).encode(), 4, errors.HeaderJsonError),
        (json.dumps({"a": {**TENSOR, "shape": [1] * 64 + [2]}}).encode(), 4, errors.LimitError),
        (json.dumps({"a": {**TENSOR, "dtype": "F6_E2M3", "data_offsets": [0, 1]}}).encode(), 1, errors.TensorSizeError),
        (json.dumps({"a": {**TENSOR, "data_offsets": [4, 0]}}).encode(), 4, errors.TensorSizeError),
        (json.dumps({"a": TENSOR, "b": {**TENSOR, "data_offsets": [5, 9]}}).encode(), 9, errors.TensorRangeError),
        (json.dumps({"a": TENSOR}).encode(), 3, errors.TruncatedFileError),
        (json.dumps({"a": TENSOR}).encode(), 5, errors.TensorRangeError),
    ],
)
def test_refused(header: bytes, data_size: int, error: type[errors.Df11Error]) -> None:
    with pytest.raises(errors.Df11Error) as caught:
        parse(header, data_size)
    assert type(caught.value) is error
    assert caught.value.file == "file"


def test_extra_members_are_ignored_as_safetensors_does() -> None:
    nested: list[object] = []
    for _ in range(124):
        nested = [nested]
    for extra, fine in ((nested, True), ([nested], False)):
        header = json.dumps({"a": {**TENSOR, "x": extra}}).encode()
        if fine:
            assert parse(header, 4).entries[0].elements == 2
            assert list(stock(len(header).to_bytes(8, "little") + header + bytes(4))) == ["a"]
        else:
            with pytest.raises(errors.LimitError, match="nested too deeply"):
                parse(header, 4)
            with pytest.raises(safetensors.SafetensorError, match="recursion limit"):
                stock(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("unit", [b"[],", b'{"":0},', b"[[[[[[[[]]]]]]]],"])
def test_memory_of_a_header_is_a_multiple_of_its_size(unit: bytes) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":[' + unit * (3_000_000 // len(unit)) + b"0]}}"
    tracemalloc.start()
    try:
        with pytest.raises(errors.LimitError, match="too many values"):
            parse(header, 1)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_64_dimensions_are_fine() -> None:
    (entry,) = parse(json.dumps({"a": {**TENSOR, "shape": [1] * 63 + [2]}}).encode(), 4).entries
    assert entry.elements == 2


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_TENSORS", 2)
    entries = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in "abc"}
    with pytest.raises(errors.LimitError, match="too many tensors"):
        parse(json.dumps(entries).encode(), 0)
    del entries["c"]
    assert len(parse(json.dumps(entries).encode(), 0).entries) == 2


def test_the_dtypes_are_those_of_safetensors() -> None:
    header = json.dumps({"a": {**TENSOR, "dtype": "?"}}).encode()
    with pytest.raises(safetensors.SafetensorError) as caught:
        stock(len(header).to_bytes(8, "little") + header + bytes(4))
    known = str(caught.value).partition("expected one of ")[2]
    assert set(re.findall(r"`(\w+)`", known)) == framing.DTYPE_BITS.keys()


@pytest.mark.parametrize("dtype", sorted(framing.DTYPE_BITS))
def test_sizes_are_those_of_safetensors(dtype: str) -> None:
    size = framing.DTYPE_BITS[dtype]  # Bytes of eight elements.
    header = json.dumps({"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}).encode()
    assert list(stock(len(header).to_bytes(8, "little") + header + bytes(size))) == ["a"]
    assert parse(header, size).entries[0].size == size


def open_file(path: Path) -> framing.Header:
    with path.open("rb", buffering=0) as file:
        return framing.read_header(file, path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", errors.TruncatedFileError),
        (bytes(7), errors.TruncatedFileError),
        (struct.pack("<Q", 3) + b"{}", errors.TruncatedFileError),
        (struct.pack("<Q", layout.MAX_JSON_HEADER) + b"{}", errors.TruncatedFileError),
        (struct.pack("<Q", layout.MAX_JSON_HEADER + 1) + b"{}", errors.HeaderTooLargeError),
        (struct.pack("<Q", 2**64 - 1) + b"{}", errors.HeaderTooLargeError),
    ],
)
def test_files_refused(tmp_path: Path, content: bytes, error: type[errors.Df11Error]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(errors.Df11Error) as caught:
            open_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # Sizes are checked before memory is allocated.
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert caught.value.file == str(path)


@given(strategies.safetensors_files(largest=50), st.data())
def test_a_file_cut_short_is_refused(
    tmp_path_factory: pytest.TempPathFactory, file: strategies.SafetensorsFile, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    path.write_bytes(file.data[: data.draw(st.integers(0, len(file.data) - 1))])
    with pytest.raises(errors.TruncatedFileError):
        open_file(path)


class Halving(io.FileIO):
    """A file of which one call reads half of what it is asked for."""

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        assert size is not None
        return super().read((size + 1) // 2)


@given(strategies.safetensors_files(largest=50))
def test_short_reads_go_on(tmp_path_factory: pytest.TempPathFactory, file: strategies.SafetensorsFile) -> None:
    path = tmp_path_factory.mktemp("short") / "a.safetensors"
    path.write_bytes(file.data)
    with Halving(path) as opened:
        assert framing.read_header(opened, path) == open_file(path)


class Shrinking(io.FileIO):
    """A file that loses its end after its size was read."""

    def readall_after(self, change: Callable[[], None]) -> None:
        self.change = change

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        data = super().read(size)
        self.change()
        return data


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100) + b"{" + b" " * 99)
    with Shrinking(path) as file:
        file.readall_after(lambda: path.write_bytes(bytes(20)))
        with pytest.raises(errors.TruncatedFileError, match="ends inside its header"):
            framing.read_header(file, path)
