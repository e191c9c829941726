"""The entropy bound: what an ideal code for single exponents needs, without tables, offsets or checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks import safetensors_file, synthetic
from benchmarks.safetensors_file import Tensor

_BLOCK: Final = 1 << 20
"""Bytes that are read at once."""


@dataclass(frozen=True, slots=True)
class EntropyBound:
    """The entropy bound of some tensors.

    ``weights``: number of floating-point weights that are BF16 or become BF16. ``bf16_bytes``: all tensors, with these
    weights as BF16. ``bound_bytes``: all tensors, with each of these weights taking 8 bits and the entropy of its
    tensor's exponents, and the others verbatim.
    """

    weights: int
    bf16_bytes: int
    bound_bytes: float

    def __add__(self, other: EntropyBound) -> EntropyBound:
        return EntropyBound(
            self.weights + other.weights, self.bf16_bytes + other.bf16_bytes, self.bound_bytes + other.bound_bytes
        )

    @property
    def ratio(self) -> float:
        """The bound as a share of BF16."""
        return self.bound_bytes / self.bf16_bytes


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits per symbol of an ideal code for symbols with these counts."""
    used = counts[counts > 0]
    shares = used / used.sum()
    return float(-(shares * np.log2(shares)).sum())


def measure_entropy_bound(path: Path, *, cast: bool = False, every: int = 1) -> EntropyBound:
    """The entropy bound of a file, or of all files in a folder. With ``cast``, F32 tensors count as rounded to BF16.

    ``every`` = k looks only at every k-th mebibyte of a tensor.
    """
    total = EntropyBound(0, 0, 0.0)
    for file in safetensors_file.files_below(path):
        for tensor in safetensors_file.read_header(file):
            if tensor.dtype == "BF16" or (cast and tensor.dtype == "F32"):
                bits = 8 + entropy(_count_exponents(file, tensor, every)) if tensor.elements else 0
                total += EntropyBound(tensor.elements, 2 * tensor.elements, tensor.elements * bits / 8)
            else:
                total += EntropyBound(0, tensor.size, tensor.size)
    return total


def _count_exponents(path: Path, tensor: Tensor, every: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(512, np.int64)
    with path.open("rb") as file:
        for data in safetensors_file.read_blocks(file, tensor, _BLOCK, every):
            weights = (
                data.view(np.uint16)
                if tensor.dtype == "BF16"
                else synthetic.round_to_bf16(data.view(np.float32).copy())
            )
            counts += np.bincount(weights >> np.uint16(7), minlength=512)
    return counts[:256] + counts[256:]
