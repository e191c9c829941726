"""Weights and their records, for the checks and the benchmarks on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks import synthetic
from df11 import runtime
from df11.converter.encode import encode_records
from df11.formats.record import Bytes, Weights
from df11.runtime import cpu

if TYPE_CHECKING:
    import torch

SIGMA: Final = 0.02
_BLOCK: Final = 1 << 26


def gaussian(count: int, seed: int, device: str | torch.device) -> torch.Tensor:
    """BF16 [count] on the device, Gaussian like the weights of a matrix."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(count, dtype=torch.bfloat16, device=device)
    for start in range(0, count, _BLOCK):
        part = out[start : start + _BLOCK]
        part.copy_(torch.randn(len(part), generator=generator, device=device).mul_(SIGMA))
    return out


def random_bits(count: int, seed: int, device: str | torch.device) -> torch.Tensor:
    """BF16 [count] on the device: all values, NaNs and infinities too, equally often. Stored raw."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator, dtype=torch.int16, device=device).view(
        torch.bfloat16
    )


def spread(count: int, seed: int, device: str | torch.device) -> torch.Tensor:
    """BF16 [count] on the device with exponents of 3.6 bits, like the outlier layers of OmniGen2's language model."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    columns = torch.randn(2048, generator=generator, device=device).mul_(synthetic.OUTLIER_COLUMN_SPREADS[1]).exp_()
    weights = gaussian(count, seed, device)
    whole = count // 2048 * 2048
    weights[:whole].view(-1, 2048).mul_(columns.to(torch.bfloat16))
    return weights


def encode(weights: torch.Tensor) -> Bytes:
    """The record of BF16 weights, made by the converter's code on all cores."""
    import torch

    values: Weights = weights.reshape(-1).view(torch.int16).cpu().numpy().view(np.uint16)
    with ThreadPoolExecutor(cpu.cores()) as threads:
        return encode_records([values], threads)[0]


def compress(weights: torch.Tensor) -> runtime.CompressedTensor:
    """The same weights compressed, on the same device."""
    import torch

    return runtime.CompressedTensor(torch.from_numpy(encode(weights).copy()).to(weights.device), weights.shape)


def block_shapes(layer: int = 0) -> dict[str, tuple[int, int]]:
    """Name and shape of each matrix of a block of OmniGen2's transformer."""
    shapes: dict[str, tuple[int, int]] = {}
    for file, tensors in synthetic.omnigen2()["files"].items():
        if file.startswith("transformer/"):
            shapes |= {
                name: (shape[0], shape[1])
                for name, shape in tensors.items()
                if name.startswith(f"layers.{layer}.") and len(shape) == 2
            }
    return shapes
