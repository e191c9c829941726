"""Write safetensors sources of every kind byte by byte, with neither the safetensors library nor df11.

``write(path, tensors, ...)`` writes one file; ``kinds()`` returns one file of every kind that a converter may meet."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEGMENT = 1 << 21
"""Weights per segment."""
TILE = 8192

# dtype -> bits per element: every dtype of safetensors 0.8.
DTYPES: Mapping[str, int] = {
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


@dataclass(frozen=True)
class Tensor:
    """One tensor: its bytes must fit its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self):
        bits = math.prod(self.shape) * DTYPES[self.dtype]
        if bits != 8 * len(self.data):
            raise ValueError(f"{self.name}: {len(self.data)} bytes for {bits} bits")


def random_tensor(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A tensor of uniformly random bits."""
    size = math.prod(shape) * DTYPES[dtype] // 8
    return Tensor(name, dtype, shape, np.random.default_rng(seed).bytes(size))


def gaussian(count: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """BF16 bits (u16) of weights like a model's."""
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(scale)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def bf16(name: str, shape: tuple[int, ...], seed: int = 0, scale: float = 0.02) -> Tensor:
    """A BF16 tensor that compresses like a model's."""
    return Tensor(name, "BF16", shape, gaussian(math.prod(shape), seed, scale).tobytes())


def f32(name: str, shape: tuple[int, ...], seed: int = 0, *, exact: bool = False) -> Tensor:
    """An F32 tensor; with ``exact``, of values that BF16 can represent."""
    count = math.prod(shape)
    if exact:
        bits = gaussian(count, seed).astype(np.uint32) << 16
    else:
        bits = (np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)).view(np.uint32)
    return Tensor(name, "F32", shape, bits.astype("<u4").tobytes())


def round_to_bf16(data: bytes) -> bytes:
    """F32 bytes rounded to the nearest BF16, ties to even, NaN to 0xFFFF: independent of df11's formula."""
    bits = np.frombuffer(data, "<u4").astype(np.int64)
    upper, lower = bits >> 16, bits & 0xFFFF
    up = (lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, 0xFFFF, upper + up).astype("<u2").tobytes()


def header(
    tensors: Sequence[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    metadata_last: bool = False,
    order: Sequence[int] | None = None,
    indent: int | None = None,
    ascii_only: bool = False,
) -> bytes:
    """The JSON of a header. ``tensors``: in the order of their data; ``order``: of their names in the JSON."""
    entries = {}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(tensor.data)],
        }
        position += len(tensor.data)
    names = [tensors[index].name for index in (order if order is not None else range(len(tensors)))]
    document: dict[str, object] = {}
    if metadata is not None and not metadata_last:
        document["__metadata__"] = dict(metadata)
    document |= {name: entries[name] for name in names}
    if metadata is not None and metadata_last:
        document["__metadata__"] = dict(metadata)
    separators = (",", ":") if indent is None else None
    return json.dumps(document, ensure_ascii=ascii_only, indent=indent, separators=separators).encode()


def framed(json_header: bytes, data: bytes, *, padding: int | None = None) -> bytes:
    """A whole file. ``padding``: spaces after the JSON; None pads to a multiple of 8, like the safetensors library."""
    spaces = -len(json_header) % 8 if padding is None else padding
    json_header += b" " * spaces
    return len(json_header).to_bytes(8, "little") + json_header + data


def file_bytes(
    tensors: Sequence[Tensor], *, padding: int | None = None, metadata: Mapping[str, str] | None = None, **options
) -> bytes:
    """A whole file of these tensors; ``options`` as in :func:`header`."""
    return framed(
        header(tensors, metadata=metadata, **options), b"".join(tensor.data for tensor in tensors), padding=padding
    )


def write(path: Path, tensors: Sequence[Tensor], **options) -> Path:
    """Write a file and return its path; ``options`` as in :func:`file_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(tensors, **options))
    return path


def write_large(
    path: Path, dtype: str, size: int, *, name: str = "weight", uniform: bool = False, sparse: bool = False
) -> Path:
    """A file of one tensor of ``size`` bytes, made quickly: repeated random values or, if ``sparse``, a hole."""
    elements = size * 8 // DTYPES[dtype]
    text = json.dumps({name: {"dtype": dtype, "shape": [elements], "data_offsets": [0, size]}}).encode()
    block = 24 << 20
    if uniform:
        data = np.random.default_rng(1).bytes(block)
    elif dtype == "F32":
        data = f32("", (block // 4,), 1).data
    else:
        data = gaussian(block // 2, 1).tobytes()
    with path.open("wb") as file:
        file.write(framed(text, b""))
        if sparse:
            file.truncate(file.tell() + size)
        for start in range(0, 0 if sparse else size, block):
            file.write(data[: min(block, size - start)])
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """All files in a folder, hidden ones too: relative path -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# One file of every kind.


def _every_dtype() -> bytes:
    shapes = {"F4": (3, 6), "F6_E2M3": (4, 3), "F6_E3M2": (2, 4)}
    tensors = [random_tensor(f"t.{dtype}", dtype, shapes.get(dtype, (3, 5)), seed) for seed, dtype in enumerate(DTYPES)]
    return file_bytes(tensors, metadata={"format": "pt"})


def _every_dtype_large() -> bytes:
    tensors = []
    for seed, dtype in enumerate(DTYPES):
        tensors += (
            [bf16("t.BF16", (300, 100), seed)]
            if dtype == "BF16"
            else [random_tensor(f"t.{dtype}", dtype, (300, 100), seed)]
        )
    return file_bytes(tensors)


def _sizes() -> bytes:
    counts = [1, 2, 3, 7, 8, 9, 255, 256, 257, TILE - 1, TILE, TILE + 1, 3 * TILE + 100]
    return file_bytes([bf16(f"w{count}", (count,), count) for count in counts])


def _shapes() -> bytes:
    shapes = [(), (1,), (1, 1, 1), (17, 1, 31), (2,) * 12, (64, 64), (5, 0), (0,), (0, 3, 0), (1,) * 64]
    tensors = [bf16(f"b{index}", shape, index) for index, shape in enumerate(shapes)]
    tensors += [random_tensor(f"i{index}", "I64", shape, index) for index, shape in enumerate(shapes)]
    return file_bytes(tensors)


def _unaligned() -> bytes:
    # Every tensor after the first starts at an odd byte, F32 and F64 included.
    tensors = [
        random_tensor("a", "U8", (3,)),
        bf16("b", (20_000,), 1),
        bf16("c", (7,), 2),
        f32("d", (5_000,), 3),
        random_tensor("e", "BOOL", (2,), 4),
        random_tensor("f", "F64", (9,), 5),
        bf16("g", (9_001,), 6),
    ]
    return file_bytes(tensors, padding=3)


def _names() -> bytes:
    names = [
        "",
        " ",
        "weight",
        "мірило.вага",
        "重み",
        "🤗",
        'quote"quote',
        "back\\slash",
        "new\nline\ttab",
        "a/b/../c",
        "\x7f\x01",
        "e\u0301",
        "é",
        "x" * 5000,
    ]
    return file_bytes(
        [bf16(name, (600 + index,), index) for index, name in enumerate(names)], metadata={"über": "ключ 🗝", "": ""}
    )


def _escaped_names() -> bytes:
    return file_bytes(
        [bf16(name, (600,), index) for index, name in enumerate(["重み", "🤗", "é"])],
        metadata={"k": "🗝"},
        ascii_only=True,
    )


def _unsorted() -> bytes:
    tensors = [bf16(f"layer.{index}", (1000 + index,), index) for index in range(20)]
    return file_bytes(tensors, order=[int(index) for index in np.random.default_rng(0).permutation(20)])


def _many_small() -> bytes:
    generator = np.random.default_rng(5)
    tensors = []
    for index in range(3000):
        count = int(generator.integers(0, 200))
        dtype = ("BF16", "BF16", "F32", "U8", "I64")[index % 5]
        tensors += [
            bf16(f"m.{index}", (count,), index)
            if dtype == "BF16"
            else random_tensor(f"m.{index}", dtype, (count,), index)
        ]
    return file_bytes(tensors)


def _many_segments() -> bytes:
    tensors = [
        bf16("short", (100,)),
        bf16("long", (2 * SEGMENT + 12345,), 1),
        bf16("exact", (SEGMENT,), 2),
        random_tensor("i", "I32", (50,), 3),
    ]
    return file_bytes(tensors)


def _half_coded() -> bytes:
    # A segment of weights and one of random bits, and the reverse: records with raw and coded segments.
    random = random_tensor("", "BF16", (SEGMENT,), 9).data
    weights = gaussian(SEGMENT, 10).tobytes()
    return file_bytes(
        [Tensor("a", "BF16", (2, SEGMENT), weights + random), Tensor("b", "BF16", (2 * SEGMENT,), random + weights)]
    )


def _odd_values() -> bytes:
    generator = np.random.default_rng(3)
    ramp = np.arange(65536, dtype=np.uint16)
    tensors = {
        "zeros": np.zeros(30_000, np.uint16),
        "minus zeros": np.full(30_001, 0x8000, np.uint16),
        "all values": ramp,
        "all values shuffled": generator.permutation(np.tile(ramp, 4)),
        "nan and infinity": generator.choice(np.array([0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81], np.uint16), 20_000),
        "subnormal": generator.integers(0, 128, 20_000, dtype=np.uint16),
        "one of another kind": np.where(np.arange(40_000) == 39_999, 0x7F00, 0x3C00).astype(np.uint16),
        "two exponents in turn": np.tile(np.array([0x3F80, 0x0080], np.uint16), 10_000),
    }
    return file_bytes(
        [Tensor(name, "BF16", (len(values),), values.astype("<u2").tobytes()) for name, values in tensors.items()]
    )


_TWO = (bf16("a", (4000,), 1), random_tensor("b", "F32", (333,), 2))

KINDS: Mapping[str, Callable[[], bytes]] = {
    "every dtype": _every_dtype,
    "every dtype, large": _every_dtype_large,
    "sizes around tiles": _sizes,
    "shapes, scalar and empty": _shapes,
    "unaligned": _unaligned,
    "names": _names,
    "names escaped in the JSON": _escaped_names,
    "unsorted": _unsorted,
    "many small": _many_small,
    "many segments": _many_segments,
    "raw and coded segments": _half_coded,
    "odd values": _odd_values,
    "no padding": lambda: file_bytes(_TWO, padding=0),
    "odd header size": lambda: file_bytes(_TWO, padding=1 + len(header(_TWO)) % 2),
    "much padding": lambda: file_bytes(_TWO, padding=100_000),
    "metadata last": lambda: file_bytes(
        _TWO, metadata={"format": "pt", "note": 'a "quoted" \\ note\n'}, metadata_last=True
    ),
    "empty metadata": lambda: file_bytes(_TWO, metadata={}),
    "JSON with white space": lambda: file_bytes(_TWO, metadata={"format": "pt"}, indent=2),
    "no tensors": lambda: file_bytes([]),
    "no tensors but metadata": lambda: file_bytes([], metadata={"format": "pt"}),
    "only empty tensors": lambda: file_bytes([Tensor("a", "BF16", (0,), b""), Tensor("b", "F32", (0, 4), b"")]),
    "nothing to code": lambda: file_bytes([random_tensor("a", "F16", (77, 13)), random_tensor("b", "U8", (5,), 1)]),
    "metadata of a container": lambda: file_bytes(_TWO, metadata={"df11.version": "9", "df11.tensors": "{}"}),
}
"""Name of a kind -> a function that returns its bytes."""
