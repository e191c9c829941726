"""Write and read safetensors files as a stream, independently of df11, which the benchmarks measure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

BYTES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes per element, in the order in which the safetensors serializer ranks dtypes (it writes the last one first)."""

_RANK: Final = {dtype: rank for rank, dtype in enumerate(BYTES)}
_ALIGNMENT: Final = 8
_MAX_HEADER: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, dtype (as in safetensors) and shape of one tensor; ``start`` is its first byte in the file, once known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return self.elements * BYTES[self.dtype]


Fill = Callable[[Tensor], Iterable[memoryview]]
"""Gives the bytes of a tensor in blocks. A block need not stay valid once the next one is requested."""


def serializer_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The order in which safetensors' own serializer stores tensors: by dtype, the widest first, then by name."""
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name))


def header(tensors: Sequence[Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """The length prefix and the header, as safetensors' own serializer writes them: padded to 8 bytes with spaces."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: Iterable[Tensor], fill: Fill, metadata: Mapping[str, str] | None = None) -> int:
    """Write a file and return its size. Memory: one block of ``fill``.

    Metadata defaults to what torch writes, ``format: pt``.
    """
    ordered = serializer_order(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        total = _write_all(file, memoryview(header(ordered, {"format": "pt"} if metadata is None else metadata)))
        for tensor in ordered:
            written = sum(_write_all(file, block.cast("B")) for block in fill(tensor))
            if written != tensor.size:
                raise ValueError(f"{tensor.name}: {written} bytes were given for a tensor of {tensor.size}")
            total += written
    return total


def _write_all(file: Any, block: memoryview) -> int:
    # An unbuffered file may accept less than it is given: Linux writes at most 2 GiB at once.
    done = 0
    while done < len(block):
        done += file.write(block[done:])
    return done


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a file in the order of their data."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError(f"{path}: not a safetensors file")
        table = json.loads(file.read(size))
    table.pop("__metadata__", None)
    tensors = [
        Tensor(name, row["dtype"], tuple(row["shape"]), 8 + size + row["data_offsets"][0])
        for name, row in table.items()
    ]
    return sorted(tensors, key=lambda tensor: tensor.start)


def read_blocks(file: BinaryIO, tensor: Tensor, block_bytes: int, every: int = 1) -> Iterator[npt.NDArray[np.uint8]]:
    """The data of one tensor in blocks; with ``every`` = k only every k-th block, starting with the first."""
    for start in range(0, tensor.size, block_bytes * every):
        file.seek(tensor.start + start)
        data = file.read(min(block_bytes, tensor.size - start))
        yield np.frombuffer(data, np.uint8)


def files_below(path: Path, suffix: str = ".safetensors") -> list[Path]:
    """The file itself, or all files with that suffix in a folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names if name.endswith(suffix))
