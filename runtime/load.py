"""Decode a whole container into torch tensors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from df11.formats import errors
from df11.formats.container import Container

if TYPE_CHECKING:
    import torch

_TORCH_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def load_file(path: str | os.PathLike[str], device: str | torch.device = "cuda") -> dict[str, torch.Tensor]:
    """All tensors of a `.df11` file, decoded and checked, as ``safetensors.torch.load_file`` gives those of a safetensors file.

    Decoding takes place on the processor for now; the tensors are then copied to ``device``.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise errors.missing_extra("torch", "torch") from None
    with Container(path) as container:
        return {name: _tensor(container, name, torch).to(device) for name in container.keys()}


def _tensor(container: Container, name: str, torch: Any) -> Any:
    info = container.info(name)
    dtype = getattr(torch, _TORCH_NAMES.get(info.dtype, ""), None)
    if dtype is None:
        raise errors.DtypeError("torch has no such dtype", file=container.path, tensor=name, found=info.dtype)
    array = container.tensor(name)
    return torch.from_numpy(array.reshape(-1)).view(dtype).reshape(info.shape)
