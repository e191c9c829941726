"""Decoding kernels for the CPU, compiled by Numba. ``native.py`` is the way to call them.

A kernel trusts the sizes that its caller has checked (``record.py``), and nothing that it reads from the segment itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from df11.formats.layout import CHUNK_WEIGHTS, CODE_LIMIT, LANES, STREAM_END, TILE_WEIGHTS
from df11.formats.native import (
    BAD_ALPHABET,
    BAD_EXCEPTION,
    BAD_LANE,
    BAD_LENGTH,
    BAD_TILE,
    DECODE_SCRATCH,
    DIFFERENT,
    INCOMPLETE_CODE,
    OK,
)

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile with Numba, as part of an export. Kernels must not allocate: there is no Numba to do it when they run."""
    compiled: Any = njit(error_model="numpy")(function)
    return cast(Function, compiled)


_intrinsic: Any = intrinsic
_proxy: Any = cgutils.create_struct_proxy


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, bits: int) -> Any:
    data = _proxy(array_type)(context, builder, array).data
    data = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(data, [offset]), ir.IntType(bits).as_pointer())


@_intrinsic
def load_u64(typing_context: Any, array: Any, offset: Any) -> Any:  # noqa: ARG001
    """The u64 at byte ``offset`` of an array's memory, at any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        return builder.load(pointer, align=1)

    return types.uint64(array, types.uint64), generate


@_intrinsic
def store_u64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:  # noqa: ARG001
    """Store a u64 at byte ``offset`` of an array's memory, at any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        builder.store(arguments[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@_intrinsic
def _pointer_at(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    # The void pointer of an address that came as i64.

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@njit
def u8_array(arguments: Any, i: int) -> np.ndarray:
    """The u8 array whose address and size are the arguments i and i + 1 of an export."""
    return carray(_pointer_at(arguments[i]), (arguments[i + 1],), np.uint8)


@njit
def u16_array(arguments: Any, i: int) -> np.ndarray:
    """The same, u16."""
    return carray(_pointer_at(arguments[i]), (arguments[i + 1],), np.uint16)


@njit
def u32_array(arguments: Any, i: int) -> np.ndarray:
    """The same, u32."""
    return carray(_pointer_at(arguments[i]), (arguments[i + 1],), np.uint32)


@njit
def i64_array(arguments: Any, i: int) -> np.ndarray:
    """The same, i64."""
    return carray(_pointer_at(arguments[i]), (arguments[i + 1],), np.int64)


U64 = np.uint64
_LANES: Final = LANES
_TILE: Final = TILE_WEIGHTS
_TILE_PAIRS: Final = TILE_WEIGHTS // 2
_CHUNK: Final = CHUNK_WEIGHTS
_LIMIT: Final = CODE_LIMIT
_TABLE: Final = 1 << CODE_LIMIT
_WINDOW: Final = U64(_TABLE - 1)
_STREAM_END: Final = STREAM_END


@kernel
def build_decode_table(section: np.ndarray, alphabet_size: int, table: np.ndarray, scratch: np.ndarray) -> int:
    """Expand a code table section (SPEC.md, section 6) into the 4096-entry decoding table.

    ``section`` u8, ``table`` u32[4096]. Entry = e1 << 23 | e0 << 7 | length, indexed by the next 12 bits of a lane: the
    exponents stand where two BF16 values in a u32 have them. ``scratch`` i64[26]. Returns ``OK`` or what is wrong.
    """
    counts = scratch[: _LIMIT + 1]
    next_code = scratch[_LIMIT + 1 : 2 * _LIMIT + 2]
    counts[:] = 0
    for i in range(1, alphabet_size):
        if section[i] <= section[i - 1]:
            return BAD_ALPHABET
    cells = alphabet_size * alphabet_size
    codes = 0
    kraft = 0
    for cell in range(cells):
        length = (section[alphabet_size + (cell >> 1)] >> ((cell & 1) * 4)) & 15
        if length > _LIMIT:
            return BAD_LENGTH
        if length:
            counts[length] += 1
            codes += 1
            kraft += _TABLE >> length
    if (cells & 1) and section[alphabet_size + (cells >> 1)] >> 4:
        return BAD_LENGTH
    single = codes == 1 and counts[1] == 1
    if kraft != _TABLE and not single:
        return INCOMPLETE_CODE
    code = 0
    for length in range(1, _LIMIT + 1):
        code = (code + counts[length - 1]) << 1
        next_code[length] = code
    for cell in range(cells):
        length = np.int64((section[alphabet_size + (cell >> 1)] >> ((cell & 1) * 4)) & 15)
        if length:
            code = next_code[length]
            next_code[length] += 1
            reverse = 0
            for bit in range(length):
                reverse |= ((code >> bit) & 1) << (length - 1 - bit)
            e0 = np.uint32(section[cell % alphabet_size])
            e1 = np.uint32(section[cell // alphabet_size])
            entry = np.uint32((e1 << np.uint32(23)) | (e0 << np.uint32(7)) | np.uint32(length))
            step = 1 if single else 1 << length
            for slot in range(0 if single else reverse, _TABLE, step):
                table[slot] = entry
    return OK


@kernel
def _assemble(pairs: np.ndarray, sign_mantissa: np.ndarray, out: np.ndarray) -> None:
    # pairs: u32, decoding table entries; sign_mantissa: u16, the two bytes of two weights -> out: u32, two weights.
    for i in range(len(sign_mantissa)):
        s = np.uint32(sign_mantissa[i])
        low = (s & np.uint32(0x7F)) | ((s & np.uint32(0x80)) << np.uint32(8))
        high = ((s & np.uint32(0x7F00)) << np.uint32(8)) | ((s & np.uint32(0x8000)) << np.uint32(16))
        out[i] = (pairs[i] & np.uint32(0x7F807F80)) | low | high


@kernel
def _decode_lanes(segment: np.ndarray, table: np.ndarray, position: np.ndarray, limit: U64, chunks: int, pairs: np.ndarray) -> None:
    # All lanes take turns, chunk by chunk: 32 independent chains of look-ups, and sequential stores.
    # position: u64[32], bits from the start of the segment; limit: last bit where an 8-byte load is inside.
    target = U64(0)
    for _ in range(chunks):
        for lane in range(_LANES):
            bit = position[U64(lane)]
            window = load_u64(segment, bit >> U64(3)) >> (bit & U64(7))
            a = U64(table[window & _WINDOW])
            window >>= a & U64(63)
            b = U64(table[window & _WINDOW])
            window >>= b & U64(63)
            c = U64(table[window & _WINDOW])
            window >>= c & U64(63)
            d = U64(table[window & _WINDOW])
            position[U64(lane)] = min(bit + ((a + b + c + d) & U64(63)), limit)
            pairs[target] = a
            pairs[target + U64(1)] = b
            pairs[target + U64(2)] = c
            pairs[target + U64(3)] = d
            target += U64(4)


@kernel
def _decode_tile(
    segment: np.ndarray,
    table: np.ndarray,
    tile: int,
    weights: int,
    lane_bytes: int,
    tiles_offset: int,
    lanes_offset: int,
    stream_offset: int,
    stream_end: int,
    start: np.ndarray,
    position: np.ndarray,
    pairs: np.ndarray,
) -> int:
    # Decode the exponents of one tile into pairs (u32[4096]); start is left with the lanes' first bits and, at 32, the end.
    chunks = (weights + _CHUNK - 1) // _CHUNK
    word = load_u64(segment, U64(tiles_offset + 8 * tile))
    shortest = (word >> U64(32)) & U64(0xFFFF)
    exceptions = word >> U64(48)
    bit = (U64(stream_offset) + ((word & U64(0xFFFFFFFF)) << U64(4))) << U64(3)
    longest = U64(chunks * 4 * _LIMIT)
    for lane in range(_LANES):
        start[lane] = bit
        position[lane] = bit
        at = lanes_offset + (tile * _LANES + lane) * lane_bytes
        length = shortest + U64(segment[at])
        if lane_bytes == 2:
            length += U64(segment[at + 1]) << U64(8)
        if length < U64(chunks * 4) or length > longest:
            return BAD_TILE
        bit += length
    start[_LANES] = bit
    end = ((bit + U64(31)) >> U64(5)) * U64(4) + U64(4) * exceptions
    if exceptions > U64(weights) or end > U64(stream_end - _STREAM_END):
        return BAD_TILE
    _decode_lanes(segment, table, position, U64(stream_end - 8) << U64(3), chunks, pairs)
    for lane in range(_LANES):
        if position[lane] != start[lane + 1]:
            return BAD_LANE
    return OK


@kernel
def _apply_exceptions(segment: np.ndarray, descriptor: int, end_bit: U64, weights: int, out: np.ndarray) -> int:
    # out: u16, the weights of the tile. end_bit: the bit after the last lane.
    count = np.int64(load_u64(segment, U64(descriptor)) >> U64(48))
    at = np.int64((end_bit + U64(31)) >> U64(5)) * 4
    previous = np.int64(-1)
    for i in range(count):
        position = np.int64(segment[at + 4 * i]) | (np.int64(segment[at + 4 * i + 1]) << 8)
        place = (((position >> 3) & (_LANES - 1)) << 16) | position  # Lane by lane.
        if position >= weights or place <= previous:
            return BAD_EXCEPTION
        previous = place
        out[position] = np.uint16(segment[at + 4 * i + 2]) | (np.uint16(segment[at + 4 * i + 3]) << np.uint16(8))
    return OK


@kernel
def decode_tiles(
    segment: np.ndarray,
    table: np.ndarray,
    elements: int,
    lane_bytes: int,
    tiles_offset: int,
    lanes_offset: int,
    sign_mantissa_offset: int,
    stream_offset: int,
    first: int,
    last: int,
    out: np.ndarray,
    compare: int,
    scratch: np.ndarray,
) -> tuple[int, int]:
    """Decode the tiles ``first`` to ``last`` (exclusive) of a coded segment.

    ``segment`` u8, the whole segment; ``table`` u32[4096]; ``out`` u16, the weights of these tiles. With ``compare`` nothing is
    written: the decoded weights are compared with ``out``. ``scratch`` i64[DECODE_SCRATCH]. Returns (``OK`` or what is wrong, tile).
    """
    words = scratch.view(np.uint64)
    start = words[: _LANES + 1]
    position = words[_LANES + 1 : 2 * _LANES + 1]
    pairs = scratch[128 : 128 + _TILE_PAIRS // 2].view(np.uint32)
    halves = pairs.view(np.uint16)
    checked = scratch[128 + _TILE_PAIRS // 2 : DECODE_SCRATCH].view(np.uint16)
    stream_end = len(segment)
    for tile in range(first, last):
        weights = min(_TILE, elements - tile * _TILE)
        status = _decode_tile(
            segment, table, tile, weights, lane_bytes, tiles_offset, lanes_offset, stream_offset, stream_end, start, position, pairs
        )
        if status != OK:
            return status, tile
        target = out[(tile - first) * _TILE : (tile - first) * _TILE + weights]
        decoded = checked[:weights] if compare else target
        even = weights & ~1
        at = sign_mantissa_offset + tile * _TILE
        if even:
            _assemble(pairs, segment[at : at + even].view(np.uint16), decoded[:even].view(np.uint32))
        if weights & 1:
            s = np.uint16(segment[at + even])
            decoded[even] = (halves[even] & np.uint16(0x7F80)) | (s & np.uint16(0x7F)) | ((s & np.uint16(0x80)) << np.uint16(8))
        status = _apply_exceptions(segment, tiles_offset + 8 * tile, start[_LANES], weights, decoded)
        if status != OK:
            return status, tile
        if compare:
            different = np.uint16(0)
            for i in range(weights):
                different |= decoded[i] ^ target[i]
            if different:
                return DIFFERENT, tile
    return OK, last


def _export_build_decode_table(a: Any) -> int:
    return build_decode_table(u8_array(a, 0), a[2], u32_array(a, 3), i64_array(a, 5))


def _export_decode_tiles(a: Any) -> int:
    status, tile = decode_tiles(
        u8_array(a, 0), u32_array(a, 2), a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], u16_array(a, 12), a[14], i64_array(a, 15)
    )
    return status << 32 | tile


EXPORTS: Final = {"build_decode_table": _export_build_decode_table, "decode_tiles": _export_decode_tiles}
