"""Golden and must-fail files of the dtypes besides BF16: importing this adds them to the others."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from df11.formats import errors, layout
from tests.vectors import forge
from tests.vectors.make_golden import converted, drawn, file_of, gaussian, golden
from tests.vectors.make_must_fail import case

KINDS: Final = [layout.F16, layout.F32, layout.F8_E4M3, layout.F8_E5M2]
PAIRS: Final = [forge.symbol(a, b) for a in (9, 10, 11) for b in (9, 10, 11)]
ALL_BITS: Final = (1 << 32) - 1


def weights_of(symbols: Sequence[int], kind: layout.Kind, seed: int, mask: int = ALL_BITS) -> list[int]:
    """Two weights per symbol, with random other bits, as far as ``mask`` allows."""
    rng = random.Random(seed)
    exponents = [e for value in symbols for e in (value & 255, value >> 8)]
    others = ~(((1 << kind.exponent_bits) - 1) << kind.mantissa_bits) & (1 << 8 * kind.bytes) - 1 & mask
    return [e << kind.mantissa_bits | int(rng.random() * (1 << 32)) & others for e in exponents]


def coded(name: str, weights: Sequence[int], lengths: forge.Lengths, kind: layout.Kind, **options: Any) -> forge.Tensor:
    """A tensor in a record of one coded segment."""
    segment = forge.coded_segment(weights, lengths, kind, **options)
    return forge.of_kind(name, weights, kind, forge.record([(segment, weights)], kind=kind))


def of_each_kind(make: Callable[[layout.Kind], list[forge.Tensor]]) -> tuple[bytes, Sequence[forge.Tensor]]:
    """A file with tensors of each kind."""
    return file_of(*(tensor for kind in KINDS for tensor in make(kind)))


@golden
def kinds() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Records of F16, F32, F8_E4M3 and F8_E5M2: around a chunk and a tile; with padding that is not zero."""
    lengths = forge.balanced(PAIRS)

    def make(kind: layout.Kind) -> list[forge.Tensor]:
        return [
            coded(
                f"{kind.dtype}.{count}",
                weights_of(drawn(lengths, 5000, count), kind, count)[:count],
                lengths,
                kind,
                pad=0xA5,
            )
            for count in (1500, 1536, 8193)
        ]

    return of_each_kind(make)


@golden
def kinds_raw() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Raw segments of each dtype; records of two segments, coded and raw."""
    lengths = forge.staircase(PAIRS)

    def make(kind: layout.Kind) -> list[forge.Tensor]:
        few = weights_of([0x0102, 0x0304], kind, 1)[:3]
        many = weights_of(drawn(lengths, 4096, 2), kind, 2)
        segments = [(forge.coded_segment(many, lengths, kind), many), (forge.raw_segment(few, kind, pad=0x5A), few)]
        return [
            forge.of_kind(
                f"{kind.dtype}.raw", few, kind, forge.record([(forge.raw_segment(few, kind), few)], kind=kind)
            ),
            forge.of_kind(f"{kind.dtype}.two", many + few, kind, forge.record(segments, 8192, kind)),
        ]

    return of_each_kind(make)


@golden
def kinds_exceptions() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Exceptions of each dtype, with all bits set and none; of F32 the lower halves are in the planes."""
    lengths = forge.balanced(PAIRS)

    def make(kind: layout.Kind) -> list[forge.Tensor]:
        weights = weights_of(drawn(lengths, 600, 3), kind, 3)
        for at in range(0, len(weights), 97):
            ones = (1 << 8 * kind.bytes) - 1
            weights[at] = ones if at % 2 else weights[at] & 0xFFFF if kind.bytes == 4 else 0
        return [coded(kind.dtype, weights, lengths, kind)]

    return of_each_kind(make)


@golden
def planes_left_out() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Planes that are zero and left out: one and two of F32, one of F16; and stored although they are zero."""
    lengths = forge.balanced(PAIRS)
    tensors = []
    for kind in (layout.F16, layout.F32):
        for zeros in range(1, kind.most_left_out + 1):
            weights = weights_of(drawn(lengths, 700, 4), kind, zeros, ALL_BITS << 8 * zeros & ALL_BITS)[:-1]
            weights[500] = (1 << 8 * kind.bytes) - (1 << 8 * zeros)
            tensors += [
                coded(f"{kind.dtype}.{zeros}.{left_out}", weights, lengths, kind, left_out=left_out)
                for left_out in range(zeros + 1)
            ]
    return file_of(*tensors)


@golden
def kinds_every_exponent() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Every exponent of F16 and FP8 has a code beside each other one."""
    tensors = []
    for kind in (layout.F16, layout.F8_E4M3, layout.F8_E5M2):
        exponents = range(1 << kind.exponent_bits)
        first, *others = [forge.symbol(a, b) for a in exponents for b in exponents]
        lengths = {first: 1} | {value: length + 1 for value, length in forge.balanced(others).items()}
        weights = weights_of([*others, *drawn(lengths, 5000, 6)], kind, 6)
        tensors.append(coded(kind.dtype, weights, lengths, kind, lane_bytes=2))
    return file_of(*tensors)


@golden
def writer_of_kinds() -> tuple[bytes, Sequence[forge.Tensor]]:
    """df11.convert: weights like a model's of every dtype, F32 of BF16 values, zeros, what does not pay."""
    values = gaussian(5001, 5)
    words = list(struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values)))
    halves = list(struct.unpack(f"<{len(values)}H", struct.pack(f"<{len(values)}e", *values)))
    as_f32 = [word >> 16 << 16 for word in words]
    tensors = [
        forge.of_kind("f16", halves, layout.F16, None),
        forge.of_kind("f32", words, layout.F32, None),
        forge.of_kind("f32_zeros", [word >> 8 << 8 for word in words], layout.F32, None),
        forge.of_kind("e5m2", [half >> 8 for half in halves], layout.F8_E5M2, None),
        forge.of_kind("e4m3", [(half >> 8 & 0x80) | (half >> 7 & 0x7F) for half in halves], layout.F8_E4M3, None),
        forge.of_kind("zeros", [0] * 3000, layout.F16, None),
        forge.of_kind("small", halves[:8], layout.F16, None),
        forge.of_kind("random", [40_503 * i % (1 << 32) * 3 % (1 << 32) for i in range(2000)], layout.F32, None),
    ]
    narrowed = [
        forge.Tensor(
            name,
            "BF16",
            (len(part),),
            forge.u16s(word >> 16 for word in part),
            None,
            True,
            forge.u16s(part, layout.F32),
        )
        for name, part in (("bf16", as_f32), ("bf16_small", as_f32[:3]))
    ]
    return converted([*tensors, *narrowed]), [*tensors, *narrowed]


# What must fail.

LENGTHS: Final = forge.balanced(PAIRS)
HALVES: Final = weights_of(drawn(LENGTHS, 700, 9), layout.F16, 9)
BYTES: Final = weights_of(drawn(LENGTHS, 700, 9), layout.F8_E5M2, 9)
FOURS: Final = weights_of(drawn(LENGTHS, 700, 9), layout.F8_E4M3, 9)


def one(weights: Sequence[int], kind: layout.Kind, lengths: forge.Lengths = LENGTHS, **options: Any) -> bytes:
    """A container of one coded tensor."""
    return forge.container([coded("w", weights, lengths, kind, **options)])


def requires(text: str) -> Callable[[dict[str, Any]], None]:
    """A change of a header."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["df11.requires"] = text

    return change


NAMED: Final = "df11.requires names the dtypes of records"
TENSOR: Final = coded("w", HALVES, LENGTHS, layout.F16)
case("kind_not_required", NAMED, errors.MetadataError, forge.container([TENSOR], edit=requires("[]")))
case("kind_other_required", NAMED, errors.MetadataError, forge.container([TENSOR], edit=requires('["F32-records"]')))
case(
    "kind_without_records",
    "a record is of a dtype that has records",
    errors.EntryError,
    forge.container([forge.Tensor("w", "I16", TENSOR.shape, TENSOR.decoded, TENSOR.stored)]),
)
case(
    "kind_of_another_dtype",
    "dtype of the record",
    errors.RecordHeaderError,
    forge.container(
        [
            forge.of_kind(
                "w",
                HALVES,
                layout.F16,
                forge.record([(forge.coded_segment(HALVES, LENGTHS, layout.F16), HALVES)], kind=layout.F16, dtype=1),
            )
        ]
    ),
)
ENCODING: Final = "encoding of the segment"
for kind, weights in ((layout.F16, HALVES), (layout.F8_E5M2, BYTES), (layout.F8_E4M3, FOURS)):
    file = one(weights, kind, encoding=2 + kind.most_left_out)
    case(f"kind_planes_left_out_{kind.dtype}", ENCODING, errors.SegmentHeaderError, file)
case(
    "kind_exponent_too_large",
    "the alphabet's exponents fit the dtype",
    errors.CodeTableError,
    one(FOURS, layout.F8_E4M3, {**forge.balanced([*PAIRS, forge.symbol(16, 16)])}),
)


def widen(tiles: list[forge.Tile]) -> None:
    """Set a bit above those of the weight in an exception."""
    position, weight = tiles[0].exceptions[0]
    tiles[0].exceptions[0] = position, weight | 0x100


case(
    "kind_exception_too_wide",
    "an exception is not wider than a weight",
    errors.TileError,
    one([0xFF, *BYTES[1:]], layout.F8_E5M2, edit=widen),
)
