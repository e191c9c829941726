"""Encoding kernels, compiled by Numba. ``native.py`` is the way to call them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from df11.converter.native import CODE_SCRATCH, ENCODE_SCRATCH, NOT_SMALLER, OVERFLOW
from df11.formats.kernels import i64_array, kernel, load_u64, store_u64, u8_array, u16_array, u32_array
from df11.formats.layout import CHUNK_WEIGHTS, CODE_LIMIT, LANE_WEIGHTS, LANES, TILE_WEIGHTS

U64 = np.uint64
_LANES: Final = LANES
_TILE: Final = TILE_WEIGHTS
_TILE_PAIRS: Final = TILE_WEIGHTS // 2
_LANE_PAIRS: Final = LANE_WEIGHTS // 2
_CHUNK: Final = CHUNK_WEIGHTS
_CHUNK_BYTES: Final = CHUNK_WEIGHTS  # A chunk has half as many pairs, of two bytes each.
_LIMIT: Final = CODE_LIMIT
_KRAFT: Final = 1 << CODE_LIMIT

EXCEPTION_BITS: Final = 32
FIRST_IS_EXCEPTION: Final = 1 << 24
SECOND_IS_EXCEPTION: Final = 1 << 25
_CODE_AND_LENGTH: Final = U64(0xFFFFFF)


@kernel
def _pair_symbols(words: np.ndarray, symbols: np.ndarray) -> None:
    # words: u32, two weights each -> symbols: u16, e1 << 8 | e0.
    for i in range(len(words)):
        w = words[i]
        symbols[i] = ((w >> np.uint32(7)) & np.uint32(0xFF)) | ((w >> np.uint32(15)) & np.uint32(0xFF00))


@kernel
def _sign_mantissa(words: np.ndarray, out: np.ndarray) -> None:
    # words: u32, two weights each -> out: u16, two sign/mantissa bytes each.
    for i in range(len(words)):
        w = words[i]
        r = ((w >> np.uint32(8)) & np.uint32(0x00800080)) | (w & np.uint32(0x007F007F))
        out[i] = r | (r >> np.uint32(8))


@kernel
def count_pairs(weights: np.ndarray, histogram: np.ndarray, symbols: np.ndarray) -> None:
    """Count the pairs of a segment; a last weight without a partner is not counted.

    ``weights`` u16; ``histogram`` u32[2 * 65536], overwritten, its halves to be added (two, so that equal neighbours do not
    wait for each other); ``symbols`` u16[4096], scratch.
    """
    histogram[:] = 0
    pairs = len(weights) // 2
    words = weights[: 2 * pairs].view(np.uint32)
    even = histogram[:65536]
    odd = histogram[65536:]
    for first in range(0, pairs, _TILE_PAIRS):
        count = min(_TILE_PAIRS, pairs - first)
        _pair_symbols(words[first : first + count], symbols)
        for i in range(0, count & ~3, 4):
            q = load_u64(symbols, U64(2 * i))
            even[q & U64(0xFFFF)] += np.uint32(1)
            odd[(q >> U64(16)) & U64(0xFFFF)] += np.uint32(1)
            even[(q >> U64(32)) & U64(0xFFFF)] += np.uint32(1)
            odd[q >> U64(48)] += np.uint32(1)
        for i in range(count & ~3, count):
            even[symbols[i]] += np.uint32(1)


@kernel
def collect_pairs(histogram: np.ndarray, used: np.ndarray, counts: np.ndarray, exponents: np.ndarray) -> int:
    """List the symbols that occur: ``used`` i64[65536] ascending, ``counts`` i64[65536], ``exponents`` i64[256]; returns how many there are."""
    exponents[:] = 0
    n = 0
    for symbol in range(65536):
        count = np.int64(histogram[symbol]) + np.int64(histogram[65536 + symbol])
        if count:
            used[n] = symbol
            counts[n] = count
            exponents[symbol & 255] += count
            exponents[symbol >> 8] += count
            n += 1
    return n


@kernel
def count_exponents(weights: np.ndarray, counts: np.ndarray) -> None:
    """Count exponents: ``weights`` u16; ``counts`` u32[4 * 256], overwritten, its quarters to be added, as above."""
    counts[:] = 0
    for i in range(0, len(weights) & ~3, 4):
        q = load_u64(weights, U64(2 * i))
        for which in range(4):
            counts[U64(256 * which) | ((q >> U64(16 * which + 7)) & U64(0xFF))] += np.uint32(1)
    for i in range(len(weights) & ~3, len(weights)):
        counts[(weights[i] >> np.uint16(7)) & np.uint16(0xFF)] += np.uint32(1)


@kernel
def package_merge(counts: np.ndarray, lengths: np.ndarray, scratch: np.ndarray) -> None:
    """Optimal code lengths of at most 12 bits (Larmore and Hirschberg, 1990).

    ``counts`` i64[m] ascending, 2 <= m <= 4096; ``lengths`` i64[m], overwritten: a complete code; ``scratch`` i64[7 * m].
    """
    m = len(counts)
    packages = scratch[: 2 * m]
    merged = scratch[2 * m : 4 * m]
    is_leaf = scratch[4 * m : 7 * m].view(np.uint8)  # [12, 2 * m]
    package_count = 0
    for level in range(_LIMIT):
        i = 0
        j = 0
        total = m + package_count
        for k in range(total):
            if j >= package_count or (i < m and counts[i] <= packages[j]):
                merged[k] = counts[i]
                is_leaf[level * 2 * m + k] = 1
                i += 1
            else:
                merged[k] = packages[j]
                is_leaf[level * 2 * m + k] = 0
                j += 1
        package_count = total // 2
        for k in range(package_count):
            packages[k] = merged[2 * k] + merged[2 * k + 1]
    lengths[:] = 0
    need = 2 * m - 2
    for level in range(_LIMIT - 1, -1, -1):
        leaves = 0
        for k in range(need):
            if is_leaf[level * 2 * m + k]:
                leaves += 1
        for k in range(leaves):
            lengths[k] += 1
        need = 2 * (need - leaves)


@kernel
def _shortest(used: np.ndarray, grid: np.ndarray, by_first: np.ndarray, by_second: np.ndarray) -> int:
    # used: i64[n], symbols, ascending; grid: u8[65536], code length of each of them or 0. For every first (second) exponent the symbol
    # with the shortest code, or -1; returns the symbol with the shortest code of all. Ties go to the smaller symbol.
    by_first[:] = -1
    by_second[:] = -1
    best = np.int64(-1)
    for i in range(len(used)):
        symbol = used[i]
        length = grid[symbol]
        if length:
            first = symbol & 255
            second = symbol >> 8
            if by_first[first] < 0 or length < grid[by_first[first]]:
                by_first[first] = symbol
            if by_second[second] < 0 or length < grid[by_second[second]]:
                by_second[second] = symbol
            if best < 0 or length < grid[best]:
                best = symbol
    return best


@kernel
def _stand_in(symbol: int, best: int, grid: np.ndarray, by_first: np.ndarray, by_second: np.ndarray) -> tuple[int, int]:
    # The coded symbol for one that has no code, and which of its weights are then exceptions.
    a = by_first[symbol & 255]
    b = by_second[symbol >> 8]
    if a >= 0 and (b < 0 or grid[a] <= grid[b]):
        return a, SECOND_IS_EXCEPTION
    if b >= 0:
        return b, FIRST_IS_EXCEPTION
    return best, FIRST_IS_EXCEPTION | SECOND_IS_EXCEPTION


@kernel
def _alphabet(used: np.ndarray, grid: np.ndarray, index_of: np.ndarray) -> int:
    # index_of: i64[256], place of each exponent that a coded pair has among them, or -1; returns how many there are.
    index_of[:] = -1
    for i in range(len(used)):
        if grid[used[i]]:
            index_of[used[i] & 255] = 0
            index_of[used[i] >> 8] = 0
    size = 0
    for e in range(256):
        if index_of[e] == 0:
            index_of[e] = size
            size += 1
    return size


@kernel
def build_code(
    used: np.ndarray,
    count_of: np.ndarray,
    order: np.ndarray,
    last_exponent: int,
    section: np.ndarray,
    encode_table: np.ndarray,
    scratch: np.ndarray,
) -> tuple[int, int, int, int]:
    """Choose which pairs get a code, and their lengths; make the code table section and the encoding table.

    ``used`` i64[n], the symbols that occur, ascending; ``count_of`` i64[n], how often; ``order`` i64[n], places in ``used`` by falling count,
    equal counts by symbol; ``last_exponent``: the exponent of a last weight without a partner, or -1; ``section`` u8[256 + 32768],
    overwritten: the code table section (SPEC.md, section 6); ``encode_table`` u32[65536]: entries of all symbols that occur are set: code << 8 |
    flags | length; ``scratch`` i64[CODE_SCRATCH]. Returns (alphabet size, bytes of the section, bits of all codes and exceptions,
    symbol for weights that do not exist).
    """
    n = len(used)
    total = count_of.sum()
    grid = scratch[:8192].view(np.uint8)
    best_grid = scratch[8192:16384].view(np.uint8)
    index_of = scratch[16384:16640]
    by_first = scratch[16640:16896]
    by_second = scratch[16896:17152]
    length_counts = scratch[17152 : 17152 + _LIMIT + 1]
    next_code = scratch[17184 : 17184 + _LIMIT + 1]
    grid[:] = 0
    best_grid[:] = 0
    length_counts[:] = 0
    best_bits = np.int64(-1)
    best_total = np.int64(0)
    previous = -1
    # A pair that is rarer than about 2**-16 costs less as an exception than as a code of 12 bits, which takes 2**-12 of the code
    # space from all others. Try a few limits around that.
    for exponent in range(14, 18):
        kept = 0
        while kept < n and kept < _KRAFT and (count_of[order[kept]] << exponent) >= total:
            kept += 1
        kept = max(kept, 1)
        if kept == previous:
            continue
        previous = kept
        counts = scratch[17216 : 17216 + kept]
        lengths = scratch[21312 : 21312 + kept]
        lengths[:] = 1
        for i in range(kept):
            counts[i] = count_of[order[kept - 1 - i]]
        if kept > 1:
            package_merge(counts, lengths, scratch[25408:CODE_SCRATCH])
        bits = np.int64(0)
        for i in range(n):
            grid[used[i]] = 0
        for i in range(kept):
            grid[used[order[kept - 1 - i]]] = lengths[i]
            bits += counts[i] * lengths[i]
        size = _alphabet(used, grid, index_of)
        table_bits = 8 * size + 4 * size * size
        best = _shortest(used, grid, by_first, by_second)
        for i in range(kept, n):
            symbol, flags = _stand_in(used[order[i]], best, grid, by_first, by_second)
            weights = 2 if flags == (FIRST_IS_EXCEPTION | SECOND_IS_EXCEPTION) else 1
            bits += count_of[order[i]] * (grid[symbol] + weights * EXCEPTION_BITS)
        if best_bits < 0 or bits + table_bits < best_total:
            best_bits = bits
            best_total = bits + table_bits
            best_grid[:] = grid
    best = _shortest(used, best_grid, by_first, by_second)
    alphabet_size = _alphabet(used, best_grid, index_of)
    for e in range(256):
        if index_of[e] >= 0:
            section[index_of[e]] = e
    size = alphabet_size + (alphabet_size * alphabet_size + 1) // 2
    section[alphabet_size:size] = 0
    for i in range(n):
        symbol = used[i]
        length = best_grid[symbol]
        if length:
            length_counts[length] += 1
            cell = index_of[symbol >> 8] * alphabet_size + index_of[symbol & 255]
            section[alphabet_size + (cell >> 1)] |= length << ((cell & 1) * 4)
    code = 0
    for length in range(1, _LIMIT + 1):
        code = (code + length_counts[length - 1]) << 1
        next_code[length] = code
    for i in range(n):
        symbol = used[i]
        length = np.int64(best_grid[symbol])
        if length:
            code = next_code[length]
            next_code[length] += 1
            reverse = 0
            for bit in range(length):
                reverse |= ((code >> bit) & 1) << (length - 1 - bit)
            encode_table[symbol] = (reverse << 8) | length
    for i in range(n):
        if not best_grid[used[i]]:
            symbol, flags = _stand_in(used[i], best, best_grid, by_first, by_second)
            encode_table[used[i]] = encode_table[symbol] | flags
    if last_exponent >= 0:
        symbol = (best & 0xFF00) | last_exponent
        occurs = False
        for i in range(n):
            occurs |= used[i] == symbol
        if not occurs:
            # Only the first weight exists: any partner will do, and only the first can be an exception.
            a = by_first[last_exponent]
            encode_table[symbol] = encode_table[a] if a >= 0 else encode_table[best] | np.uint32(FIRST_IS_EXCEPTION)
    return alphabet_size, size, best_bits, best


@kernel
def _encode_lanes(
    symbols: np.ndarray, table: np.ndarray, chunks: int, stream: np.ndarray, start: int, lane_bits: np.ndarray, marked: np.ndarray
) -> tuple[int, int]:
    # Append the codes of all lanes from byte start on. Four codes are joined first, so that only one step in eight weights waits for the
    # one before it. marked: u16[1024], overwritten: the groups of four pairs with a pair that is coded as another, by the place of their
    # first pair. Returns (bits written, groups marked).
    at = U64(start)
    pending = U64(0)
    pending_bits = U64(0)
    groups = 0
    previous = U64(0)
    for lane in range(_LANES):
        offset = U64(8 * lane)
        for _ in range(chunks):
            q = load_u64(symbols, offset)
            a = U64(table[q & U64(0xFFFF)])
            b = U64(table[(q >> U64(16)) & U64(0xFFFF)])
            c = U64(table[(q >> U64(32)) & U64(0xFFFF)])
            d = U64(table[q >> U64(48)])
            # Lengths are the low six bits of entries and, as they stay below 64, of sums of four; flags are above all codes in both.
            first_two = a + b
            all_four = first_two + (c + d)
            if all_four > _CODE_AND_LENGTH:
                marked[groups] = offset >> U64(1)
                groups += 1
                a &= _CODE_AND_LENGTH
                b &= _CODE_AND_LENGTH
                c &= _CODE_AND_LENGTH
                d &= _CODE_AND_LENGTH
            offset += U64(_CHUNK_BYTES)
            low = (a >> U64(8)) | ((b >> U64(8)) << (a & U64(63)))
            high = (c >> U64(8)) | ((d >> U64(8)) << (c & U64(63)))
            pending |= (low | (high << (first_two & U64(63)))) << pending_bits
            store_u64(stream, at, pending)
            pending_bits += all_four & U64(63)
            at += pending_bits >> U64(3)
            pending >>= pending_bits & U64(0x78)
            pending_bits &= U64(7)
        now = (at - U64(start)) * U64(8) + pending_bits
        lane_bits[lane] = now - previous
        previous = now
    return np.int64(previous), groups


@kernel
def _list_exceptions(symbols: np.ndarray, table: np.ndarray, weights: np.ndarray, marked: np.ndarray, out: np.ndarray, at: int, end: int) -> int:
    # The exceptions of the marked groups of a tile, from byte at on; returns how many, or -1 if they do not end before byte end.
    count = 0
    for group in range(len(marked)):
        first = np.int64(marked[group])
        for pair in range(first, first + 4):
            flags = table[symbols[pair]]
            for which in range(2):
                position = 2 * pair + which
                if flags & np.uint32(FIRST_IS_EXCEPTION << which) and position < len(weights):
                    if at + 4 > end:
                        return -1
                    weight = weights[position]
                    out[at] = position & 0xFF
                    out[at + 1] = position >> 8
                    out[at + 2] = weight & np.uint16(0xFF)
                    out[at + 3] = weight >> np.uint16(8)
                    at += 4
                    count += 1
    return count


@kernel
def encode_tiles(
    weights: np.ndarray,
    table: np.ndarray,
    filler: int,
    lane_bytes: int,
    out: np.ndarray,
    tiles_offset: int,
    lanes_offset: int,
    sign_mantissa_offset: int,
    stream_offset: int,
    end: int,
    scratch: np.ndarray,
) -> tuple[int, int]:
    """Encode all tiles of a segment into ``out``, from the tile descriptors on.

    ``weights`` u16; ``table`` u32[65536] of :func:`build_code`; ``filler``: the symbol for weights that do not exist; ``out`` u8, at
    least ``end`` + 8192 bytes; ``end``: the size that the segment must stay below; ``scratch`` i64[ENCODE_SCRATCH]. Returns (size of
    the segment, exceptions); the size is OVERFLOW if the lanes of a tile differ by more than lane_bytes can say, NOT_SMALLER if ``end`` is reached.
    """
    elements = len(weights)
    lane_bits = scratch[:_LANES].view(np.uint64)
    marked = scratch[32:288].view(np.uint16)
    padded = scratch[288:2336].view(np.uint16)
    symbols = scratch[2336:ENCODE_SCRATCH].view(np.uint16)
    at = stream_offset
    exceptions = 0
    for tile in range((elements + _TILE - 1) // _TILE):
        first = tile * _TILE
        count = min(_TILE, elements - first)
        chunks = (count + _CHUNK - 1) // _CHUNK
        source = weights[first : first + count]
        if count < _TILE:
            for i in range(count):
                padded[i] = source[i]
            for i in range(count, _TILE, 1):
                padded[i] = ((filler >> (8 * (i & 1))) & 0xFF) << 7
            words = padded.view(np.uint32)
        else:
            words = source.view(np.uint32)
        _pair_symbols(words, symbols)
        target = sign_mantissa_offset + first
        _sign_mantissa(words[: count // 2], out[target : target + (count & ~1)].view(np.uint16))
        if count & 1:
            w = source[count - 1]
            out[target + count - 1] = ((w >> np.uint16(8)) & np.uint16(0x80)) | (w & np.uint16(0x7F))
        bits, groups = _encode_lanes(symbols, table, chunks, out, at, lane_bits, marked)
        shortest = lane_bits[0]
        longest = lane_bits[0]
        for lane in range(_LANES):
            shortest = min(shortest, lane_bits[lane])
            longest = max(longest, lane_bits[lane])
        if lane_bytes == 1 and longest - shortest > U64(255):
            return OVERFLOW, 0
        for lane in range(_LANES):
            excess = lane_bits[lane] - shortest
            if lane_bytes == 1:
                out[lanes_offset + tile * _LANES + lane] = excess
            else:
                store = lanes_offset + (tile * _LANES + lane) * 2
                out[store] = excess & U64(0xFF)
                out[store + 1] = excess >> U64(8)
        codes_end = at + (bits + 7) // 8
        here = at + ((bits + 31) // 32) * 4
        for i in range(codes_end, here):
            out[i] = 0
        tile_exceptions = _list_exceptions(symbols, table, source, marked[:groups], out, here, end)
        if tile_exceptions < 0:
            return NOT_SMALLER, 0
        here += 4 * tile_exceptions
        exceptions += tile_exceptions
        position = U64((at - stream_offset) >> 4)
        store_u64(out, U64(tiles_offset + 8 * tile), position | (shortest << U64(32)) | (U64(tile_exceptions) << U64(48)))
        at = ((here + 15) >> 4) << 4
        for i in range(here, at):
            out[i] = 0
        if at + 16 > end:
            return NOT_SMALLER, 0
    for i in range(at, at + 16):
        out[i] = 0
    return at + 16, exceptions


@kernel
def cast_f32(source: np.ndarray, out: np.ndarray) -> int:
    """Round F32 bits (u32) to BF16 bits (u16) as SPEC.md, section 3; returns 1 if every value is exact, else 0."""
    lost = np.uint32(0)
    for i in range(len(source)):
        u = source[i]
        rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        value = np.uint32(0xFFFF) if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint32(rounded)
        out[i] = value
        lost |= u ^ (value << np.uint32(16))
    return 1 if lost == np.uint32(0) else 0


def _export_count_pairs(a: Any) -> int:
    histogram = u32_array(a, 2)
    count_pairs(u16_array(a, 0), histogram, u16_array(a, 4))
    return collect_pairs(histogram, i64_array(a, 6), i64_array(a, 8), i64_array(a, 10))


def _export_count_exponents(a: Any) -> int:
    count_exponents(u16_array(a, 0), u32_array(a, 2))
    return 0


def _export_build_code(a: Any) -> int:
    results = i64_array(a, 13)
    results[0], results[1], results[2], results[3] = build_code(
        i64_array(a, 0), i64_array(a, 2), i64_array(a, 4), a[6], u8_array(a, 7), u32_array(a, 9), i64_array(a, 11)
    )
    return 0


def _export_encode_tiles(a: Any) -> int:
    results = i64_array(a, 15)
    results[0], results[1] = encode_tiles(
        u16_array(a, 0), u32_array(a, 2), a[4], a[5], u8_array(a, 6), a[8], a[9], a[10], a[11], a[12], i64_array(a, 13)
    )
    return 0


def _export_cast_f32(a: Any) -> int:
    return cast_f32(u32_array(a, 0), u16_array(a, 2))


EXPORTS: Final = {
    "count_pairs": _export_count_pairs,
    "count_exponents": _export_count_exponents,
    "build_code": _export_build_code,
    "encode_tiles": _export_encode_tiles,
    "cast_f32": _export_cast_f32,
}
