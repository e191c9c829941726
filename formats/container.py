"""Read a `.df11` file: list tensors, decode whole ones or rows, check all that is read (SPEC.md, sections 2 and 3)."""

from __future__ import annotations

import base64
import binascii
import functools
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from df11.formats import errors, framing, json_text, layout
from df11.formats.record import Bytes, Place, Record, open_record

NUMPY_DTYPES: Final[Mapping[str, str]] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "C64": "<c8",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
    "BF16": "<u2",
    "F8_E5M2": "u1",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1",
    "F8_E5M2FNUZ": "u1",
}
"""safetensors dtype -> NumPy dtype.

NumPy has no BF16 and no F8: their bits come as unsigned integers. F4 and F6 come as packed bytes."""

BLOCK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the container says of a tensor. ``dtype`` and ``shape`` are those of the decoded tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Literal["df11", "verbatim"]
    stored_bytes: int
    exact: bool | None
    """For a tensor cast from F32: whether every value was exactly a BF16 value. None if it was not cast."""

    @property
    def elements(self) -> int:
        """Elements of the decoded tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per element; None for an empty tensor."""
        return 8 * self.stored_bytes / self.elements if self.elements else None


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The safetensors file that the container was made from."""

    bytes: int
    sha256: str
    header_bytes: int
    cast: str | None


@dataclass(frozen=True, slots=True)
class OriginalFile:
    """A file that the source was decoded from. Sizes in bytes, SHA-256 in hexadecimal."""

    file: str
    bytes: int
    sha256: str


class Container:
    """An open `.df11` file: a context manager that several threads may read from."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file and check its header. Raises a :class:`~df11.formats.errors.Df11Error`."""
        self.path = os.fspath(path)
        try:
            mode = Path(path).stat().st_mode
            if not stat.S_ISREG(mode):
                what = "this is a folder, not a file" if stat.S_ISDIR(mode) else "this is not a regular file"
                raise errors.UsageError(what, file=path)
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        except ValueError:  # A null character, for example.
            raise errors.UsageError("this cannot be the name of a file", file=repr(self.path)) from None
        try:
            self._open()
        except OSError as error:
            self._file.close()
            raise errors.from_os_error(error, file=path) from None
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        self._header = framing.read_header(self._file, self.path)
        self.size = self._header.data_start + (self._header.entries[-1].end if self._header.entries else 0)
        metadata = self._header.metadata
        if layout.METADATA_VERSION not in metadata:
            raise errors.NotDf11Error("not a df11 container: it has no df11 metadata", file=self.path)
        version = metadata[layout.METADATA_VERSION]
        if version != str(layout.VERSION):
            raise errors.VersionError(
                "container version",
                file=self.path,
                expected=layout.VERSION,
                found=errors.shortened(version),
                hint="install a newer df11",
            )
        for key in layout.METADATA_KEYS:
            if key not in metadata:
                raise errors.MetadataError(f"the metadata lacks {key}", file=self.path)
        requires = self._requires = self._json(layout.METADATA_REQUIRES)
        if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
            raise errors.MetadataError("df11.requires must be a list of names", file=self.path)
        unknown = sorted(set(requires) - layout.KNOWN_FEATURES)
        if unknown:
            raise errors.FeatureError(
                "the file requires features that this df11 does not know",
                file=self.path,
                found=", ".join(map(errors.shortened, unknown)),
                hint="install a newer df11",
            )
        if self._header.data_start % layout.DATA_ALIGNMENT:
            raise errors.EntryError(
                f"the data must start at a multiple of {layout.DATA_ALIGNMENT}",
                file=self.path,
                found=self._header.data_start,
            )
        self.writer = metadata[layout.METADATA_WRITER]
        self.source = self._parse_source(self._json(layout.METADATA_SOURCE))
        self.made_from = self._read_made_from()
        """The files that the source was decoded from; none if the source was a file itself."""
        self._entries = {entry.name: entry for entry in self._header.entries}
        self._infos: dict[str, TensorInfo] = {}
        self._checksums: dict[str, int] = {}
        tensors = self._json(layout.METADATA_TENSORS)
        if not isinstance(tensors, dict) or tensors.keys() != self._entries.keys():
            raise errors.MetadataError("df11.tensors does not name the same tensors as the file", file=self.path)
        for entry in self._header.entries:
            self._infos[entry.name] = self._parse_tensor(entry, tensors[entry.name])
        if self.source.cast is not None and all(info.exact is None for info in self._infos.values()):
            raise errors.MetadataError("df11.source names a cast, but no tensor was cast", file=self.path)

    def _json(self, key: str) -> Any:
        return json_text.parse(
            self._header.metadata[key],
            what=key,
            where={"file": self.path},
            error=errors.MetadataError,
            values=json_text.most_values(len(self._header.raw)),
            depth=None if key == layout.METADATA_TENSORS else layout.MAX_JSON_DEPTH,
        )

    def _parse_source(self, value: Any) -> SourceInfo:
        try:
            info = SourceInfo(value["bytes"], value["sha256"], value["header_bytes"], value["cast"])
        except (TypeError, KeyError):
            raise errors.MetadataError("df11.source lacks a member", file=self.path) from None
        if (
            not framing.is_size(info.bytes)
            or not framing.is_size(info.header_bytes)
            or info.header_bytes + 8 > info.bytes
            or not _is_hexadecimal(info.sha256, 64)
            or info.cast not in (None, "bf16")
        ):
            raise errors.MetadataError("df11.source has an invalid member", file=self.path)
        # The container names the same tensors, and holds the source's header compressed. So a small file cannot make a
        # reader unpack and parse a large one.
        most = layout.most_source_header(len(self._header.raw))
        if info.header_bytes > most:
            raise errors.LimitError(
                "the header of the source would be too large for this file",
                file=self.path,
                expected=f"at most {most} bytes",
                found=info.header_bytes,
            )
        return info

    def _read_made_from(self) -> tuple[OriginalFile, ...]:
        # No reader needs it: what is not as it should be is as good as missing.
        try:
            files = [OriginalFile(**value) for value in self._json(layout.METADATA_MADE_FROM)]
        except (errors.FormatError, TypeError, KeyError):
            return ()
        is_valid = all(
            isinstance(one.file, str) and framing.is_size(one.bytes) and _is_hexadecimal(one.sha256, 64)
            for one in files
        )
        return tuple(files) if is_valid else ()

    def _parse_tensor(self, entry: framing.Entry, value: Any) -> TensorInfo:
        where: dict[str, Any] = {"file": self.path, "tensor": entry.name}
        if not isinstance(value, dict):
            raise errors.MetadataError("df11.tensors must hold objects", **where)
        encoding, dtype, shape, exact = (
            value.get("encoding"),
            value.get("dtype"),
            value.get("shape"),
            value.get("exact"),
        )
        if len(value) > (4 if encoding == "verbatim" else 3):
            json_text.check_depth(value, layout.MAX_JSON_DEPTH - 1, what=layout.METADATA_TENSORS, where=where)
        if encoding not in ("df11", "verbatim"):
            raise errors.MetadataError("unknown encoding", **where, found=repr(encoding)[:80])
        if not isinstance(dtype, str) or dtype not in framing.DTYPE_BITS or not isinstance(shape, list):
            raise errors.MetadataError("dtype or shape is invalid", **where)
        if (
            not all(map(framing.is_size, shape))
            or not (exact is None or isinstance(exact, bool))
            or (exact is None and "exact" in value)
        ):
            raise errors.MetadataError("shape or exact is invalid", **where)
        if exact is not None and (self.source.cast is None or dtype != "BF16"):
            raise errors.MetadataError("exact is only for tensors that were cast", **where)
        info = TensorInfo(entry.name, dtype, tuple(shape), encoding, entry.size, exact)
        if encoding == "df11":
            framing.check_shape(shape, dtype, where)
            if "xxh3" in value:
                raise errors.MetadataError("xxh3 is only for verbatim tensors", **where)
            kind = layout.KINDS.get(dtype)
            if entry.dtype != "U8" or entry.shape != (entry.size,) or kind is None:
                raise errors.EntryError(
                    f"a record must be a one-dimensional U8 tensor that decodes to one of {', '.join(layout.KINDS)}",
                    **where,
                    found=f"{entry.dtype} {entry.shape}, {dtype}",
                )
            if kind.feature is not None and kind.feature not in self._requires:
                raise errors.MetadataError(f"df11.requires lacks {kind.feature}", **where)
            # So a forged shape cannot claim much more memory than the file has bytes.
            least = kind.least_size(info.elements)
            if least > entry.size:
                raise errors.EntryError(
                    "the record is too small for its shape",
                    **where,
                    expected=f"{least} bytes or more",
                    found=entry.size,
                )
            if entry.start % layout.RECORD_ALIGNMENT:
                raise errors.EntryError("a record must start at a multiple of 16", **where, offset=entry.start)
        else:
            if (entry.dtype, entry.shape) != (dtype, tuple(shape)):
                raise errors.EntryError(
                    "a verbatim entry must have the dtype and shape of its tensor",
                    **where,
                    expected=(dtype, shape),
                    found=(entry.dtype, entry.shape),
                )
            if not _is_hexadecimal(value.get("xxh3"), 16):
                raise errors.MetadataError("xxh3 of a verbatim tensor", **where, found=repr(value.get("xxh3"))[:80])
            self._checksums[entry.name] = int(value["xxh3"], 16)
        return info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of their data in this file."""
        return list(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and encoding of a tensor."""
        if name not in self._infos:
            raise errors.MissingError("no such tensor", file=self.path, tensor=name)
        return self._infos[name]

    def read(self, offset: int, out: Bytes) -> None:
        """Fill ``out`` with data, from byte ``offset`` of the data section on."""
        if not framing.read_at(self._file, self._header.data_start + offset, out, self.path):
            raise errors.TruncatedFileError("the file was truncated while it was read", file=self.path)

    def record(self, name: str) -> Record:
        """The record of a tensor with encoding ``df11``, its header and directory checked."""
        info, entry = self.info(name), self._entries[name]
        if info.encoding != "df11":
            raise errors.UsageError("this tensor is stored verbatim", file=self.path, tensor=name)
        place = Place(self.path, name, self._header.data_start + entry.start)
        record = open_record(
            lambda offset, out: self.read(entry.start + offset, out), entry.size, place, layout.KINDS[info.dtype]
        )
        if record.element_count != info.elements:
            raise errors.EntryError(
                "the record has another number of weights than its shape",
                file=self.path,
                tensor=name,
                expected=info.elements,
                found=record.element_count,
            )
        return record

    def span(self, name: str) -> tuple[int, int]:
        """Where a tensor's data starts and ends (exclusive), in bytes from the start of the data section."""
        self.info(name)
        return self._entries[name].start, self._entries[name].end

    def verbatim_blocks(self, name: str) -> Iterator[Bytes]:
        """The bytes of a verbatim tensor, a few MiB at a time. Raises ChecksumError at the end if any are damaged."""
        start, end = self.span(name)
        checksum = xxhash.xxh3_64()
        for position in range(start, end, BLOCK_BYTES):
            block = np.empty(min(BLOCK_BYTES, end - position), np.uint8)
            self.read(position, block)
            checksum.update(block)
            yield block
        self.check_verbatim(name, checksum.intdigest())

    def read_verbatim(self, name: str, out: Bytes) -> None:
        """Fill ``out``, u8 [stored_bytes], with a verbatim tensor. Raises ChecksumError if its bytes are damaged."""
        start, end = self.span(name)
        checksum = xxhash.xxh3_64()
        for position in range(0, end - start, BLOCK_BYTES):
            block = out[position : position + BLOCK_BYTES]  # Hashed while still in the cache.
            self.read(start + position, block)
            checksum.update(block)
        self.check_verbatim(name, checksum.intdigest())

    def checksum(self, name: str) -> int:
        """The XXH3 that the file states for a verbatim tensor."""
        if self.info(name).encoding != "verbatim":
            raise errors.UsageError("this tensor is a record", file=self.path, tensor=name)
        return self._checksums[name]

    def check_verbatim(self, name: str, found: int) -> None:
        """Raise ChecksumError unless ``found`` is the XXH3 that the file states for a verbatim tensor."""
        expected = self._checksums[name]
        if found != expected:
            raise errors.ChecksumError(
                "the stored bytes are damaged",
                file=self.path,
                tensor=name,
                expected=f"{expected:016x}",
                found=f"{found:016x}",
            )

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor, decoded and checked.

        BF16 and F8 come as unsigned integers that hold their bits, F4 and F6 as packed bytes in one dimension.
        """
        info = self.info(name)
        if info.encoding == "df11":
            return self.record(name).decode().view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        data = np.empty(info.stored_bytes, np.uint8)
        self.read_verbatim(name, data)
        return data.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape) if info.dtype in NUMPY_DTYPES else data

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension, like ``tensor(name)[start:stop]``.

        Nothing else is read. Rows of a record are checked by the stored checksums of their segments; rows of a verbatim
        tensor cannot be checked.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise errors.UsageError(
                "no such rows", file=self.path, tensor=name, expected=f"within {info.shape}", found=(start, stop)
            )
        if info.dtype not in NUMPY_DTYPES:
            raise errors.UsageError(
                "rows of a tensor of this dtype cannot be addressed", file=self.path, tensor=name, found=info.dtype
            )
        row = math.prod(info.shape[1:])
        shape = (stop - start, *info.shape[1:])
        if info.encoding == "df11":
            weights = self.record(name).decode(start * row, stop * row)
            return weights.view(NUMPY_DTYPES[info.dtype]).reshape(shape)
        dtype = np.dtype(NUMPY_DTYPES[info.dtype])
        data = np.empty((stop - start) * row * dtype.itemsize, np.uint8)
        self.read(self._entries[name].start + start * row * dtype.itemsize, data)
        return data.view(dtype).reshape(shape)

    @functools.cached_property
    def source_header(self) -> framing.Header:
        """The header of the source file, checked against the tensors of this container."""
        where: dict[str, Any] = {"file": self.path}
        try:
            text = self._header.metadata[layout.METADATA_SOURCE_HEADER]
            frame = base64.b64decode(text, validate=True)
            if base64.b64encode(frame).decode() != text:
                raise ValueError("bits that base64 leaves over are not zero")
            if zstandard.frame_content_size(frame) not in (self.source.header_bytes, -1):
                raise errors.SourceHeaderError(
                    "the stored source header has another size", **where, expected=self.source.header_bytes
                )
            raw = zstandard.ZstdDecompressor().decompress(
                frame, max_output_size=self.source.header_bytes, allow_extra_data=False
            )
        except (binascii.Error, ValueError, zstandard.ZstdError) as error:
            raise errors.SourceHeaderError(f"the stored source header cannot be read ({error})", **where) from None
        if len(raw) != self.source.header_bytes:
            raise errors.SourceHeaderError(
                "the stored source header has another size", **where, expected=self.source.header_bytes, found=len(raw)
            )
        try:
            header = framing.parse_header(
                raw,
                self.source.bytes - 8 - len(raw),
                self.path,
                most_values=json_text.most_values(len(self._header.raw)),
            )
        except (errors.SafetensorsError, errors.LimitError) as error:
            raise errors.SourceHeaderError(
                f"the stored source header is not a safetensors header: {error.what}", **where
            ) from None
        if {entry.name for entry in header.entries} != self._infos.keys():
            raise errors.SourceHeaderError("the source header names other tensors", **where)
        for entry in header.entries:
            info = self._infos[entry.name]
            dtype = info.dtype if info.exact is None else "F32"
            if (entry.dtype, entry.shape) != (dtype, info.shape):
                raise errors.SourceHeaderError(
                    "the source header gives another dtype or shape",
                    **where,
                    tensor=entry.name,
                    expected=(dtype, info.shape),
                    found=(entry.dtype, entry.shape),
                )
        return header


_HEXADECIMAL: Final = re.compile("[0-9a-f]+")


def _is_hexadecimal(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and _HEXADECIMAL.fullmatch(value) is not None


def open_container(path: str | os.PathLike[str]) -> Container:
    """Open a `.df11` file; see :class:`Container`."""
    return Container(path)
