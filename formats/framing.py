"""safetensors framing: parse and check the JSON header of a source or container; write the header of a container."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from df11.formats import errors, json_text, layout

DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element, for every dtype of safetensors."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header. ``start`` and ``end`` are in bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: entries in the order of their data, metadata, and the JSON as it was read."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes = field(repr=False)

    @property
    def data_start(self) -> int:
        """Where the data starts in the file, in bytes."""
        return 8 + len(self.raw)


def read_header(file: IO[bytes], path: str | os.PathLike[str]) -> Header:
    """Read and check the header of an open safetensors file.

    Raises a :class:`~df11.formats.errors.SafetensorsError` at the first violation. Sizes are checked before memory is
    allocated for them.
    """
    size = os.fstat(file.fileno()).st_size
    length = header_length(_read(file, 8), size, path)
    raw = _read(file, length)
    if len(raw) != length:
        raise errors.TruncatedFileError(
            "the file ends inside its header", file=path, expected=f"{length} bytes", found=len(raw)
        )
    return parse_header(raw, size - 8 - length, path)


def _read(file: IO[bytes], size: int) -> bytes:
    # One call may give less than it is asked for: file systems in user space and in networks do.
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def header_length(prefix: bytes, size: int, path: str | os.PathLike[str]) -> int:
    """Size of the JSON header in bytes, from the first 8 bytes of a file of ``size`` bytes.

    Checked against the limit and the size of the file.
    """
    if len(prefix) < 8:
        raise errors.TruncatedFileError(
            "not a safetensors file: it is too short to hold a header",
            file=path,
            expected="at least 8 bytes",
            found=f"{size} bytes",
        )
    length = int.from_bytes(prefix, "little")
    if prefix == b"version ":  # As a size it would be beyond any limit.
        hint = "fetch the file itself: git lfs pull"
        raise errors.SafetensorsError("this is a Git LFS pointer, not the file", file=path, offset=0, hint=hint)
    if length > layout.MAX_JSON_HEADER:
        raise errors.HeaderTooLargeError(
            "not a safetensors file, or a damaged one: its header size is beyond the limit",
            file=path,
            offset=0,
            expected=f"at most {layout.MAX_JSON_HEADER}",
            found=length,
        )
    if length > size - 8:
        raise errors.TruncatedFileError(
            "the file ends inside its header",
            file=path,
            offset=0,
            expected=f"{length + 8} bytes",
            found=f"{size} bytes",
            hint="download it again",
        )
    return length


def read_at(file: IO[bytes], position: int, out: npt.NDArray[np.uint8], path: str | os.PathLike[str]) -> bool:
    """Fill ``out`` with the bytes from ``position`` on; False if the file ends before that. Thread-safe."""
    view = memoryview(out)
    while view:
        try:
            count = os.preadv(file.fileno(), [view], position)
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        if not count:
            return False
        view, position = view[count:], position + count
    return True


def parse_header(raw: bytes, data_size: int, path: str | os.PathLike[str], *, most_values: int | None = None) -> Header:
    """Check the JSON header ``raw`` against ``data_size``, the bytes that follow it in the file.

    ``most_values``: of the JSON (see :func:`df11.formats.json_text.parse`), if its size does not tell.
    """
    document = _parse_json(raw, path, most_values)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise errors.HeaderJsonError("__metadata__ must map strings to strings", file=path)
    if len(document) > layout.MAX_TENSORS:
        raise errors.LimitError(
            "too many tensors", file=path, expected=f"at most {layout.MAX_TENSORS}", found=len(document)
        )
    entries = [_parse_entry(name, value, path) for name, value in document.items()]
    entries.sort(key=operator.attrgetter("start", "end"))
    _check_ranges(entries, data_size, path)
    return Header(tuple(entries), metadata, raw)


def _parse_json(raw: bytes, path: str | os.PathLike[str], most_values: int | None) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise errors.HeaderJsonError(
            "not a safetensors file: its header does not start with '{'", file=path, offset=8, found=repr(raw[:1])
        )
    document: dict[str, Any] = json_text.parse(
        raw,
        what="the header",
        where={"file": path, "offset": 8},
        error=errors.HeaderJsonError,
        values=most_values,
        depth=None,
    )
    return document


def is_size(value: object) -> bool:
    """Whether a value of JSON can be a size or a position: an integer written in digits alone, below 2^63."""
    return type(value) is int and 0 <= value < 1 << 63


def check_shape(shape: Sequence[int], dtype: str, where: Mapping[str, Any]) -> None:
    """Raise a LimitError for a shape that no array can have: of an empty one, too, the sizes beyond 0 are multiplied.

    ``where``: keywords of a Df11Error.
    """
    if len(shape) > layout.MAX_DIMENSIONS:
        raise errors.LimitError(
            "too many dimensions", **where, expected=f"at most {layout.MAX_DIMENSIONS}", found=len(shape)
        )
    if math.prod(filter(None, shape)) * DTYPE_BITS[dtype] > 8 * layout.MAX_TENSOR_BYTES:
        raise errors.LimitError("the product of the sizes in the shape is beyond 2^63 - 1 bytes", **where)


def _parse_entry(name: str, value: object, path: str | os.PathLike[str]) -> Entry:
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]  # type: ignore[index]
    except (TypeError, KeyError):
        raise errors.HeaderJsonError(
            "a tensor must have dtype, shape and data_offsets", file=path, tensor=name
        ) from None
    if len(value) > 3:  # type: ignore[arg-type]
        what = "the header"
        json_text.check_depth(value, layout.MAX_JSON_DEPTH - 1, what=what, where={"file": path, "tensor": name})
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise errors.DtypeError("unknown dtype", file=path, tensor=name, found=repr(dtype))
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise errors.HeaderJsonError("shape must be a list of sizes", file=path, tensor=name, found=repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise errors.HeaderJsonError("data_offsets must be two sizes", file=path, tensor=name, found=repr(offsets)[:80])
    start, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    wrong = 8 * (end - start) != bits
    if wrong or not bits or len(shape) > layout.MAX_DIMENSIONS:
        check_shape(shape, dtype, {"file": path, "tensor": name})
    if wrong:
        raise errors.TensorSizeError(
            "data_offsets do not fit dtype and shape",
            file=path,
            tensor=name,
            offset=start,
            expected=f"{-(-bits // 8)} bytes",
            found=end - start,
        )
    return Entry(name, dtype, tuple(shape), start, end)


def _check_ranges(entries: Sequence[Entry], data_size: int, path: str | os.PathLike[str]) -> None:
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise errors.TensorRangeError(
                what, file=path, tensor=entry.name, offset=entry.start, expected=position, found=entry.start
            )
        position = entry.end
    if position > data_size:
        name = entries[-1].name
        raise errors.TruncatedFileError(
            "the file ends before its data does",
            file=path,
            tensor=name,
            expected=f"{position} bytes of data",
            found=data_size,
            hint="download it again",
        )
    if position < data_size:
        raise errors.TensorRangeError(
            "bytes after the last tensor", file=path, offset=position, expected=position, found=data_size
        )


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a container's header, without the 8 bytes of its size and without padding."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    return compact_json(document)


def compact_json(value: object) -> bytes:
    """JSON without white space, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def indented_json(value: object) -> bytes:
    """JSON for people, as the config.json of a model is written."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
