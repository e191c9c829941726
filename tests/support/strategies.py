"""Hypothesis strategies for weights, codes and safetensors files, and the profile for the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from df11.formats import framing, layout
from df11.formats.record import weights_dtype

settings.register_profile(
    "df11",
    max_examples=40,
    deadline=None,  # Kernels are compiled when first called.
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("df11")

Weights = npt.NDArray[np.uint16]
Flavour = Callable[[np.random.Generator, int], Weights]

BOUNDARY_SIZES = (1, 2, 3, 7, 8, 9, 255, 256, 257, 8191, 8192, 8193, 2 * 8192 - 1, 2 * 8192, 2 * 8192 + 1)
"""Sizes around a pair, a lane's part of a chunk, a chunk and a tile."""

SPECIAL_WEIGHTS = (
    0x0000,
    0x8000,
    0x0001,
    0x807F,
    0x0080,
    0x7F7F,
    0x7F80,
    0xFF80,
    0x7F81,
    0x7FC0,
    0xFFC1,
    0xFFFF,
    0x3F80,
)
"""Zeros, subnormals, the smallest and largest numbers, infinities, NaNs with payloads, one."""


def bf16(values: npt.NDArray[Any]) -> Weights:
    """Numbers as BF16 bits, truncated."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def gaussian(rng: np.random.Generator, n: int) -> Weights:
    """Like the weights of a model."""
    return bf16(rng.standard_normal(n) * 10.0 ** rng.uniform(-4, 1))


def constant(rng: np.random.Generator, n: int) -> Weights:
    """One value: a code of one pair."""
    return np.full(n, rng.integers(65536), np.uint16)


def one_exponent(rng: np.random.Generator, n: int) -> Weights:
    """One exponent, any sign and mantissa."""
    return (rng.integers(256, size=n) & 0x7F | rng.integers(2, size=n) << 15 | int(rng.integers(256)) << 7).astype(
        np.uint16
    )


def two_exponents(rng: np.random.Generator, n: int) -> Weights:
    """Two exponents, one of them rare."""
    e = np.where(rng.random(n) < 0.05, rng.integers(256), rng.integers(256))
    return (e << 7 | rng.integers(128, size=n)).astype(np.uint16)


def all_values(rng: np.random.Generator, n: int) -> Weights:
    """Every BF16 value in turn."""
    return ((np.arange(n) + rng.integers(65536)) & 0xFFFF).astype(np.uint16)


def random_bits(rng: np.random.Generator, n: int) -> Weights:
    """Bits that cannot be compressed."""
    return rng.integers(65536, size=n, dtype=np.uint16)


def special(rng: np.random.Generator, n: int) -> Weights:
    """Zeros, subnormals, infinities and NaNs."""
    return rng.choice(np.array(SPECIAL_WEIGHTS, np.uint16), n)


def unequal_lanes(rng: np.random.Generator, n: int) -> Weights:
    """Lanes of a tile alternate between constant and rich exponents.

    From some 3000 weights on, their lengths differ by more than 255 bits.
    """
    rich = bf16(2.0 ** rng.integers(-8, 8, size=n) * rng.choice([-1, 1], n))
    return np.where(np.arange(n) // 8 % 2 == 0, np.uint16(0x3F80), rich).astype(np.uint16)


def skewed(rng: np.random.Generator, n: int) -> Weights:
    """Exponents with probabilities 1/2, 1/4 and so on: an optimal code would exceed the length limit."""
    e = np.minimum(rng.geometric(0.5, n) + int(rng.integers(200)), 255)
    return (e << 7 | rng.integers(128, size=n)).astype(np.uint16)


def rare(rng: np.random.Generator, n: int) -> Weights:
    """Gaussian, with exponents so rare that their pairs are exceptions from some 40,000 weights on.

    On the first, the second or both weights.
    """
    weights = gaussian(rng, n) & 0xBFFF
    for at in rng.integers(0, n, size=12 if n >= 100 else 1):
        weights[at] = int(rng.integers(200, 256)) << 7 | 3
        if at % 3 == 0:
            weights[(at ^ 1) % n] = int(rng.integers(200, 256)) << 7 | 5
    return weights


def stepped(rng: np.random.Generator, n: int) -> Weights:
    """A new scale every few thousand weights, so that tiles differ."""
    return bf16(rng.standard_normal(n) * 2.0 ** (np.arange(n) // 3000 * 5 % 60))


FLAVOURS: dict[str, Flavour] = {
    flavour.__name__: flavour
    for flavour in (
        gaussian,
        constant,
        one_exponent,
        two_exponents,
        all_values,
        random_bits,
        special,
        unequal_lanes,
        skewed,
        rare,
        stepped,
    )
}


def as_kind(weights: Weights, kind: layout.Kind, seed: int) -> Weights:
    """BF16 weights as weights of another dtype: the same exponents, as far as they fit, and other bits at random."""
    if kind is layout.BF16:
        return weights
    dtype = weights_dtype(kind)
    bits = np.random.default_rng(seed).integers(1 << 8 * kind.bytes, size=len(weights), dtype=np.uint64)
    ones = (1 << kind.exponent_bits) - 1 << kind.mantissa_bits
    return (bits & ~np.uint64(ones) | (weights.astype(np.uint64) >> 7 << kind.mantissa_bits) & ones).astype(dtype)


def make(flavour: str, size: int, seed: int) -> Weights:
    """The weights of a flavour."""
    return FLAVOURS[flavour](np.random.default_rng(seed), size)


def sizes(largest: int = 2 * 8192 + 1) -> st.SearchStrategy[int]:
    """Numbers of weights; half of them at boundaries."""
    return st.sampled_from([size for size in BOUNDARY_SIZES if size <= largest]) | st.integers(1, largest)


def weights(largest: int = 2 * 8192 + 1) -> st.SearchStrategy[Weights]:
    """Weights of every flavour and size."""
    return st.builds(make, st.sampled_from(sorted(FLAVOURS)), sizes(largest), st.integers(0, 2**32 - 1))


@st.composite
def codes(draw: st.DrawFn) -> dict[int, int]:
    """Code lengths by symbol: any complete code with lengths of at most 12, for any symbols."""
    lengths = [0]
    for _ in range(draw(st.integers(0, 40))):
        splittable = [place for place, length in enumerate(lengths) if length < 12]
        place = draw(st.sampled_from(splittable))
        lengths[place] += 1
        lengths.append(lengths[place])
    exponents = st.sampled_from(draw(st.lists(st.integers(0, 255), min_size=7, max_size=16, unique=True)))
    symbols = draw(
        st.lists(
            st.builds(lambda a, b: a | b << 8, exponents, exponents),
            min_size=len(lengths),
            max_size=len(lengths),
            unique=True,
        )
    )
    return dict(zip(symbols, lengths if len(lengths) > 1 else [1], strict=True))


# safetensors files.


@dataclass(frozen=True)
class SafetensorsFile:
    """A valid safetensors file and what it holds: name -> (dtype, shape, bytes)."""

    data: bytes
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    metadata: dict[str, str]


NAMES = st.sampled_from(
    [
        "weight",
        "model.layers.0.mlp.up_proj.weight",
        "a/b\\c",
        'quo"te',
        "naïve 名前 🤗",
        " ",
        "",
        "__metadata",
        "df11.tensors",
    ]
)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def names() -> st.SearchStrategy[str]:
    """Tensor names: dots, slashes, quotes, any Unicode, the empty one."""
    return (NAMES | _TEXT).filter(lambda name: name != "__metadata__")


@st.composite
def shapes(draw: st.DrawFn, dtype: str) -> tuple[int, ...]:
    """Small shapes, including 0-d and empty ones, that take whole bytes."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    return (*shape, 4) if framing.DTYPE_BITS[dtype] < 8 else tuple(shape)


@st.composite
def tensors(draw: st.DrawFn, largest: int) -> tuple[str, tuple[int, ...], bytes]:
    """(dtype, shape, bytes) of a tensor; half of them are BF16, of up to ``largest`` weights."""
    if draw(st.booleans()):
        values = draw(weights(largest))
        columns = draw(st.sampled_from([1, 2, 8]))
        shape = (len(values),) if len(values) % columns else (len(values) // columns, columns)
        return "BF16", shape, values.tobytes()
    dtype = draw(st.sampled_from(sorted(framing.DTYPE_BITS)))
    shape = draw(shapes(dtype))
    size = int(np.prod(shape, dtype=np.int64)) * framing.DTYPE_BITS[dtype] // 8
    return dtype, shape, np.random.default_rng(draw(st.integers(0, 2**32 - 1))).bytes(size)


@st.composite
def safetensors_files(draw: st.DrawFn, largest: int = 3000) -> SafetensorsFile:
    """Valid files: every dtype, any order of the header, padding, escapes, metadata."""
    held = draw(st.dictionaries(names(), tensors(largest), max_size=5))
    metadata = draw(st.none() | st.dictionaries(_TEXT, _TEXT, max_size=3))
    entries: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in held.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    document = {name: entries[name] for name in draw(st.permutations(list(entries)))}
    if metadata is not None:
        document["__metadata__"] = metadata
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 0])))
    header = text.encode() + b" " * draw(st.integers(0, 70))
    return SafetensorsFile(len(header).to_bytes(8, "little") + header + data, held, metadata or {})
