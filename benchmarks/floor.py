"""The entropy floor: what an ideal code of single exponents would need, with nothing added for tables, offsets or checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks import safetensors_file, synthetic
from benchmarks.safetensors_file import Tensor

_PIECE: Final = 1 << 20
"""Bytes that are read at once."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The floor of some tensors.

    ``weights``: floating-point weights that are BF16, or become BF16; ``bf16_bytes``: all tensors with these weights as BF16;
    ``floor_bytes``: all tensors, each of those weights with 8 bits and the entropy of its tensor's exponents, the others verbatim.
    """

    weights: int
    bf16_bytes: int
    floor_bytes: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.weights + other.weights, self.bf16_bytes + other.bf16_bytes, self.floor_bytes + other.floor_bytes
        )

    @property
    def ratio(self) -> float:
        """Floor to BF16."""
        return self.floor_bytes / self.bf16_bytes


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits a symbol of an ideal code for symbols that occur so often."""
    used = counts[counts > 0]
    shares = used / used.sum()
    return float(-(shares * np.log2(shares)).sum())


def measure_floor(path: Path, *, cast: bool = False, every: int = 1) -> Floor:
    """The floor of a file, or of all files below a directory. With ``cast``, F32 tensors count as rounded to BF16.

    ``every`` = k looks at each k-th mebibyte of a tensor only.
    """
    total = Floor(0, 0, 0.0)
    for file in safetensors_file.files_below(path):
        for tensor in safetensors_file.read_header(file):
            if tensor.dtype == "BF16" or (cast and tensor.dtype == "F32"):
                bits = 8 + entropy(_count_exponents(file, tensor, every)) if tensor.elements else 0
                total += Floor(tensor.elements, 2 * tensor.elements, tensor.elements * bits / 8)
            else:
                total += Floor(0, tensor.size, tensor.size)
    return total


def _count_exponents(path: Path, tensor: Tensor, every: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(512, np.int64)
    with path.open("rb") as file:
        for data in safetensors_file.read_pieces(file, tensor, _PIECE, every):
            weights = (
                data.view(np.uint16)
                if tensor.dtype == "BF16"
                else synthetic.round_to_bf16(data.view(np.float32).copy())
            )
            counts += np.bincount(weights >> np.uint16(7), minlength=512)
    return counts[:256] + counts[256:]
