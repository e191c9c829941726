"""What the choices behind version 1 of the format cost or gain. ``python -m benchmarks.format_choices`` prints Markdown tables.

Sizes come from a model of the format that takes one choice at a time away from version 1; for version 1 itself the model must give exactly the
bytes that the encoder writes, which is checked first. Every bit of a record counts, the JSON header of the file does not.
Speeds are of tile decoders on one CPU thread, compiled for other code lengths from the same source; only their ratios mean anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import machine, safetensors_file, synthetic, table
from benchmarks.floor import entropy
from df11.converter.encode import SegmentEncoder
from df11.formats import layout
from df11.formats.kernels import kernel, load_u64, store_u64

Words = npt.NDArray[np.uint16]
Integers = npt.NDArray[np.int64]

MIN_WEIGHTS: Final = 10_000
SIGMAS: Final = (0.01, 0.02, 0.03, 0.05)
GAUSSIAN_SHAPE: Final = (4096, 1024)
LIMITS: Final = (10, 11, 12, 13, 14)
WRITER: Final = (14.0, 15.0, 16.0, 17.0)
UNLIMITED: Final = 32
"""A longer code needs at least F(35) = 9.2 million pairs (Fibonacci), more than a segment has."""
ROUNDS: Final = 15
OUTLIER_SPREAD: Final = 1.0
"""Of the columns' log scales: of those in the stand-in (0.6 to 1.68) the one with the most uneven lanes."""
U64 = np.uint64


def _range(first: float, last: float) -> tuple[float, ...]:
    return tuple(np.arange(first, last + 0.25, 0.5).tolist())


@dataclass(frozen=True, slots=True)
class Choice:
    """Version 1, unless changed."""

    pairs: bool = True
    limit: int = 12
    thresholds: tuple[float, ...] = WRITER
    """Pairs rarer than 2**-threshold get no code; the best of these is taken."""
    exception_bits: int = 32
    """0: every pair that occurs has a code."""
    lane_weights: int = 256
    lane_field: str = "u8"
    """u8: excess over the shortest lane, u16 for segments where that overflows; u16: offset from the tile's start; packed: as many bits as the tile needs."""
    tile_align: int = 128
    tile_zeros: int = 0
    """Zero bits after each tile; 0: 16 bytes after a segment's last."""
    segment: int = 1 << 21
    rows: int = 0
    """Rows of a matrix in a segment, if not 0."""
    table: str = "grid"
    """grid: lengths of all pairs of the alphabet; list: the symbols that have a code; shared: one grid a file."""


V1: Final = Choice()


@dataclass(frozen=True, slots=True)
class Matrix:
    """One tensor: weights, and the symbols of both kinds."""

    columns: int
    weights: Words
    exponents: npt.NDArray[np.uint8]
    pairs: Words


File = list[Matrix]


@dataclass(frozen=True, slots=True)
class Code:
    """Code length of each symbol (of its stand-in, if it has no code), and how many of its weights are then exceptions."""

    lengths: npt.NDArray[np.uint8]
    changed: npt.NDArray[np.uint8]
    codes: int
    table_bits: int
    list_bits: int


def matrix(weights: Words, columns: int) -> Matrix:
    """A tensor for the model, which leaves out the case of a chunk that is not full."""
    assert len(weights) % layout.CHUNK_WEIGHTS == 0
    exponents = ((weights >> np.uint16(7)) & np.uint16(0xFF)).astype(np.uint8)
    return Matrix(columns, weights, exponents, exponents.view(np.uint16))


def minilm() -> File:
    """The real weights."""
    path = synthetic.minilm_path()
    result = []
    with path.open("rb") as file:
        for tensor in safetensors_file.read_header(path):
            if tensor.dtype == "F32" and tensor.elements >= MIN_WEIGHTS:
                data = next(safetensors_file.read_pieces(file, tensor, tensor.size))
                result.append(matrix(synthetic.round_to_bf16(data.view(np.float32).copy()), tensor.shape[-1]))
    return result


def gaussian(sigma: float) -> File:
    """One matrix."""
    values = synthetic.generator(f"format-choices-{sigma}").standard_normal(GAUSSIAN_SHAPE, dtype=np.float32).reshape(-1)
    values *= np.float32(sigma)
    return [matrix(synthetic.round_to_bf16(values), GAUSSIAN_SHAPE[1])]


# The code


def package_merge(counts: Integers, limit: int) -> Integers:
    """Code lengths for ascending counts, as the encoder finds them."""
    m = len(counts)
    packages = np.empty(0, np.int64)
    leaves = []
    for _ in range(limit):
        merged = np.concatenate([counts, packages])
        order = np.argsort(merged, kind="stable")
        leaves.append(order < m)
        packages = merged[order][: len(merged) // 2 * 2].reshape(-1, 2).sum(axis=1)
    lengths = np.zeros(m, np.int64)
    need = 2 * m - 2
    for is_leaf in reversed(leaves):
        used = int(is_leaf[:need].sum())
        lengths[:used] += 1
        need = 2 * (need - used)
    return lengths if m > 1 else np.ones(1, np.int64)


def _code(order: Integers, counts: Integers, kept: int, choice: Choice) -> tuple[int, Code]:
    # order: symbols by falling count. Returns (bits of codes, exceptions and table, the code).
    lengths = np.zeros(65536, np.int64)
    changed = np.zeros(65536, np.int64)
    coded = order[:kept]
    lengths[coded] = package_merge(counts[coded][::-1], choice.limit)[::-1]
    rest = order[kept:]
    by_length = coded[np.lexsort((coded, lengths[coded]))][::-1]
    by_first, by_second = np.full(256, -1), np.full(256, -1)
    by_first[by_length & 255] = by_length
    by_second[by_length >> 8] = by_length
    if len(rest) and choice.pairs:
        a, b = by_first[rest & 255], by_second[rest >> 8]
        cost_a, cost_b = np.where(a >= 0, lengths[a], 99), np.where(b >= 0, lengths[b], 99)
        neither = (a < 0) & (b < 0)
        changed[rest] = np.where(neither, 2, 1)
        lengths[rest] = lengths[np.where(neither, by_length[-1], np.where(cost_a <= cost_b, a, b))]
    elif len(rest):
        changed[rest] = 1
        lengths[rest] = lengths[by_length[-1]]
    # A list by canonical order: how many codes each length has, then the symbols.
    if choice.pairs:
        size = int(((by_first >= 0) | (by_second >= 0)).sum())
        bits_a_length = 8 if choice.limit > 15 else 4
        grid = 8 * size + bits_a_length * size * size
        grid += -grid % 8
        listed = 16 * choice.limit + 16 * kept
    else:
        grid = listed = 8 * kept + 4 * (kept + kept % 2)
    bits = int((counts * (lengths + choice.exception_bits * changed)).sum()) + grid
    return bits, Code(lengths.astype(np.uint8), changed.astype(np.uint8), kept, grid, listed)


def build_code(counts: Integers, choice: Choice) -> Code:
    """The best code for symbols that occur so often."""
    counts = np.pad(counts, (0, 65536 - len(counts)))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if not choice.exception_bits:
        if len(order) > 1 << choice.limit:
            raise ValueError("more symbols than codes")
        return _code(order, counts, len(order), choice)[1]
    best: tuple[int, Code] | None = None
    for kept in dict.fromkeys(int((counts >= counts.sum() / 2**x).sum()) for x in choice.thresholds):
        candidate = _code(order, counts, max(1, min(kept, 1 << choice.limit)), choice)
        if best is None or candidate[0] < best[0]:
            best = candidate
    assert best
    return best[1]


# Sizes


def segments(file: File, choice: Choice) -> Iterator[tuple[Matrix, int, int]]:
    """Matrix, first and last weight (exclusive) of each segment."""
    for item in file:
        step = choice.rows * item.columns or choice.segment
        for first in range(0, len(item.weights), step):
            yield item, first, min(first + step, len(item.weights))


def symbols_of(item: Matrix, first: int, last: int, choice: Choice) -> npt.NDArray[Any]:
    """The symbols of some weights."""
    return item.pairs[first // 2 : last // 2] if choice.pairs else item.exponents[first:last]


def lanes_of(lengths: npt.NDArray[np.uint8], choice: Choice) -> Integers:
    """Bits of each lane of each tile."""
    step = 4 if choice.pairs else 8
    eights = lengths[::step].astype(np.uint32)
    for i in range(1, step):
        eights += lengths[i::step]
    chunks = eights.reshape(-1, layout.LANES)
    return np.add.reduceat(chunks, np.arange(0, len(chunks), choice.lane_weights // 8), axis=0, dtype=np.int64)


def _up(bits: Any, alignment: int) -> Any:
    return -(-bits // alignment) * alignment


def _lane_fields(lanes: Integers, choice: Choice, total: Counter[str]) -> int:
    excess = lanes.max(axis=1) - lanes.min(axis=1)
    offsets = lanes.sum(axis=1) - lanes[:, -1]
    over = excess > 255 if choice.lane_field == "u8" else offsets > 65535
    total["tiles"] += len(lanes)
    total["tiles over"] += int(over.sum())
    total["segments over"] += bool(over.any())
    total["excess"] += int(excess.sum())
    total["longest excess"] = max(total["longest excess"], int(excess.max()))
    if choice.lane_field == "packed":
        return 32 * int(np.ceil(np.log2(excess + 1)).sum())
    return 32 * len(lanes) * {"u8": 8, "u16": 16}[choice.lane_field] * (2 if over.any() else 1)


def _segment(item: Matrix, first: int, last: int, code: Code, choice: Choice, total: Counter[str]) -> None:
    n = last - first
    symbols = symbols_of(item, first, last, choice)
    lanes = lanes_of(code.lengths[symbols], choice)
    tile_symbols = 32 * choice.lane_weights // (2 if choice.pairs else 1)
    listed = np.zeros(len(lanes), np.int64)
    if code.changed.any():
        changed = code.changed[symbols]
        at = np.flatnonzero(changed)
        listed = np.bincount(at // tile_symbols, weights=changed[at], minlength=len(lanes)).astype(np.int64)
    codes = lanes.sum(axis=1)
    grain = min(choice.tile_align, 8 if choice.exception_bits == 24 else 32)
    tiles = _up(_up(codes, grain) + choice.exception_bits * listed + choice.tile_zeros, choice.tile_align)
    table_bits = {"grid": code.table_bits, "list": code.list_bits, "shared": 0}[choice.table]
    fields = _lane_fields(lanes, choice, total)
    parts = {
        "codes": int(codes.sum()),
        "exceptions": choice.exception_bits * int(listed.sum()),
        "lanes": fields,
        "descriptors": 64 * len(lanes),
        "tile padding": int((tiles - codes - choice.exception_bits * listed).sum()),
        "table": table_bits,
        "segment": 256 + 256 + (0 if choice.tile_zeros else 128),
    }
    parts["segment"] += -(256 + table_bits) % 128 + -parts["descriptors"] % 128 + -fields % 128 + -8 * n % 128 + -int(tiles.sum()) % 128
    total.update(parts)
    total["bits"] += sum(parts.values()) + 8 * n
    total["weights"] += n
    total["segments"] += 1
    total["exceptional weights"] += int(listed.sum())
    total["number of codes"] += code.codes
    total["grid bits"] += code.table_bits
    total["list bits"] += code.list_bits


def measure(files: Sequence[File], choice: Choice) -> Counter[str]:
    """Bits of everything, by part and in total, and other counts."""
    total: Counter[str] = Counter()
    for file in files:
        shared = None
        if choice.table == "shared":
            shared = build_code(sum((np.bincount(item.pairs, minlength=65536) for item in file), np.zeros(65536, np.int64)), choice)
            total.update({"table": shared.table_bits, "bits": shared.table_bits})
        for item, first, last in segments(file, choice):
            code = shared or build_code(np.bincount(symbols_of(item, first, last, choice)), choice)
            _segment(item, first, last, code, choice, total)
        total["bits"] += 8 * layout.RECORD_HEADER.size * len(file)
        total["segment"] += 8 * layout.RECORD_HEADER.size * len(file)
    return total


def outliers() -> File:
    """A matrix with a scale a row and a scale a column, as in the worst layers of the OmniGen2 stand-in: hard on lanes, which share columns."""
    numbers = synthetic.generator("format-choices-outliers")
    columns = 2048
    values = numbers.standard_normal((2048, columns), dtype=np.float32)
    values *= np.exp(synthetic.ROW_SPREAD * numbers.standard_normal((2048, 1), dtype=np.float32)) * np.float32(0.02)
    values *= np.exp(np.float32(OUTLIER_SPREAD) * numbers.standard_normal(columns, dtype=np.float32))
    return [matrix(synthetic.round_to_bf16(values.reshape(-1)), columns)]


def check(files: Sequence[File]) -> None:
    """The model of version 1 must give the bytes of the encoder."""
    encoder = SegmentEncoder()
    out = np.empty(layout.raw_segment_size(V1.segment) + (1 << 16), np.uint8)
    written = 0
    for file in files:
        written += sum(layout.RECORD_HEADER.size for _ in file)
        for item, first, last in segments(file, V1):
            written += len(encoder.encode(item.weights[first:last], out, verify=False).data) + layout.DIRECTORY_ENTRY.size
    modelled = measure(files, V1)["bits"]
    if modelled != 8 * written:
        raise SystemExit(f"the model says {modelled / 8:,.0f} bytes, the encoder writes {written:,}")


# Decoding speed


@kernel
def _pack(symbols: Any, codes: Any, step: int, out: Any, starts: Any) -> None:
    # Tiles of 32 lanes of 256 weights; step: symbols of a lane in a chunk; codes: u64, code << 8 | length.
    bit = U64(0)
    tile_symbols = 32 * 32 * step
    for tile in range(len(symbols) // tile_symbols):
        bit = ((bit + U64(127)) >> U64(7)) << U64(7)
        for lane in range(32):
            starts[32 * tile + lane] = bit
            for chunk in range(32):
                for i in range(step):
                    code = codes[symbols[tile * tile_symbols + (32 * chunk + lane) * step + i]]
                    byte = bit >> U64(3)
                    store_u64(out, byte, load_u64(out, byte) | ((code >> U64(8)) << (bit & U64(7))))
                    bit += code & U64(255)


def _decoder(limit: int, *, pairs: bool) -> Callable[..., None]:
    window_mask = U64((1 << limit) - 1)
    loads = 1 if pairs else 2

    @kernel
    def decode(stream: Any, starts: Any, entries: Any, sign_mantissa: Any, position: Any, scratch: Any, out: Any) -> None:
        halves = scratch.view(np.uint32)
        for tile in range(len(starts) // 32):
            for lane in range(32):
                position[lane] = starts[32 * tile + lane]
            target = U64(0)
            for _ in range(32):
                for lane in range(32):
                    bit = position[U64(lane)]
                    for _ in range(loads):
                        window = load_u64(stream, bit >> U64(3)) >> (bit & U64(7))
                        a = U64(entries[window & window_mask])
                        window >>= a & U64(63)
                        b = U64(entries[window & window_mask])
                        window >>= b & U64(63)
                        c = U64(entries[window & window_mask])
                        window >>= c & U64(63)
                        d = U64(entries[window & window_mask])
                        bit += (a + b + c + d) & U64(63)
                        if pairs:
                            store_u64(scratch, target, a | (b << U64(32)))
                            store_u64(scratch, target + U64(8), c | (d << U64(32)))
                            target += U64(16)
                        else:
                            store_u64(scratch, target, a | (b << U64(16)) | (c << U64(32)) | (d << U64(48)))
                            target += U64(8)
                    position[U64(lane)] = bit
            for i in range(4096):
                s = np.uint32(sign_mantissa[4096 * tile + i])
                low = (s & np.uint32(0x7F)) | ((s & np.uint32(0x80)) << np.uint32(8))
                high = ((s & np.uint32(0x7F00)) << np.uint32(8)) | ((s & np.uint32(0x8000)) << np.uint32(16))
                out[4096 * tile + i] = (halves[i] & np.uint32(0x7F807F80)) | low | high

    return decode


def _speed_case(weights: Words, choice: Choice) -> Callable[[], None]:
    # Something to time that decodes the weights; it has been run once and its result compared.
    item = matrix(weights, 1)
    symbols = symbols_of(item, 0, len(weights), choice)
    counts = np.bincount(symbols, minlength=65536)
    code = build_code(counts, choice)
    used = np.flatnonzero((counts > 0) & (code.changed == 0))
    codes = np.zeros(65536, np.uint64)
    entries = np.zeros(1 << choice.limit, np.uint32)
    next_code, previous = 0, 0
    for symbol in used[np.lexsort((used, code.lengths[used]))].tolist():
        length = int(code.lengths[symbol])
        next_code <<= length - previous
        reverse = int(f"{next_code:0{length}b}"[::-1], 2)
        codes[symbol] = reverse << 8 | length
        entries[reverse :: 1 << length] = (symbol >> 8) << 23 | (symbol & 255) << 7 | length
        next_code, previous = next_code + 1, length
    assert next_code == 1 << previous
    # The stand-in's own bits do not matter here: such pairs get the code of the commonest one, and are left out of the comparison.
    codes[code.changed > 0] = codes[int(np.argmax(counts))]
    stream = np.zeros(2 * len(weights), np.uint8)
    starts = np.zeros(len(weights) // 256, np.uint64)
    _pack(symbols, codes, 4 if choice.pairs else 8, stream, starts)
    sign_mantissa = (((weights >> np.uint16(8)) & np.uint16(0x80)) | (weights & np.uint16(0x7F))).astype(np.uint8).view(np.uint16)
    out = np.zeros(len(weights) // 2, np.uint32)
    arguments = (stream, starts, entries, sign_mantissa, np.zeros(32, np.uint64), np.zeros(2048, np.uint64), out)
    decode = _decoder(choice.limit, pairs=choice.pairs)
    decode(*arguments)
    right = (out == weights.view(np.uint32)) | (code.changed[item.pairs] > 0 if choice.pairs else False)
    if not right.all():
        raise SystemExit("a decoder does not restore the weights")
    return lambda: decode(*arguments)


def decoding_speeds(weights: Words, choices: Sequence[Choice]) -> list[float]:
    """Speed relative to the first choice: the best of several rounds, each of which runs every decoder."""
    cases = [_speed_case(weights, choice) for choice in choices]
    best = [float("inf")] * len(cases)
    for _ in range(ROUNDS):
        for i, case in enumerate(cases):
            start = time.perf_counter()
            case()
            best[i] = min(best[i], time.perf_counter() - start)
    return [best[0] / seconds for seconds in best]


# The report


class Report:
    """Measures choices on the real and the Gaussian weights and prints tables."""

    def __init__(self) -> None:
        self.minilm = minilm()
        self.gaussians = [gaussian(sigma) for sigma in SIGMAS]
        self.sets: tuple[list[File], ...] = ([self.minilm], self.gaussians)
        for files in self.sets:
            check(files)
        self._v1 = self.both(V1)

    def both(self, choice: Choice) -> list[Counter[str]]:
        """On either set."""
        return [measure(files, choice) for files in self.sets]

    def bits(self, totals: Sequence[Counter[str]]) -> list[str]:
        """For either set: bits a weight, and how much more than version 1."""
        cells = []
        for total, v1 in zip(totals, self._v1, strict=True):
            value, known = per_weight(total, "bits"), per_weight(v1, "bits")
            cells += [f"{value:.4f}", f"{value - known:+.4f}"]
        return cells

    def totals(self) -> None:
        """Version 1, part by part, and the references."""
        parts = ("codes", "exceptions", "lanes", "descriptors", "tile padding", "table", "segment")
        rows = [["sign and mantissa", "8", "8"]]
        rows += [[part, *(f"{per_weight(total, part):.4f}" for total in self._v1)] for part in parts]
        rows += [["**version 1**", *(f"**{per_weight(total, 'bits'):.4f}**" for total in self._v1)]]
        for name, pairs in (("8 + entropy of single exponents", False), ("8 + entropy of pairs / 2", True)):
            rows.append([f"{name}, by tensor", *(f"{8 + _entropy(files, pairs=pairs):.4f}" for files in self.sets)])
        rows.append(["DFloat11, published, for other models", "10.8-11.1", "-"])
        show("Total", ["bits a weight", "MiniLM", "Gaussian"], rows)
        rows = []
        for sigma, file in zip(SIGMAS, self.gaussians, strict=True):
            floors = [f"{8 + _entropy([file], pairs=pairs):.4f}" for pairs in (False, True)]
            rows.append([f"{sigma}", *floors, f"{per_weight(measure([file], V1), 'bits'):.4f}"])
        show("Gaussian weights by sigma", ["sigma", "8 + H(single)", "8 + H(pair) / 2", "version 1"], rows)

    def symbols(self, speeds: dict[Choice, list[str]]) -> None:
        """Single exponents or pairs."""
        wide = _range(4, 20)
        cases = {
            "pairs, at most 12 bits (version 1)": V1,
            "pairs, no limit, no exceptions": replace(V1, limit=UNLIMITED, exception_bits=0),
            "singles, at most 12 bits, no exceptions": SINGLES,
            "singles, at most 12 bits, exceptions": replace(V1, pairs=False, thresholds=wide),
            "singles, at most 6 bits, two a look-up": replace(V1, pairs=False, limit=6, thresholds=wide),
        }
        rows = []
        for name, choice in cases.items():
            totals = self.both(choice)
            parts = [
                f"{per_weight(total, 'codes'):.4f} + {per_weight(total, 'exceptions'):.4f} + {per_weight(total, 'table'):.4f}" for total in totals
            ]
            rows.append([name, *self.bits(totals), *parts, *speeds.get(choice, ["", ""])])
        show("Symbols", ["symbols", *SIZES, "MiniLM: codes + exceptions + table", "Gaussian: same", *SPEEDS], rows)

    def limits(self, speeds: dict[Choice, list[str]]) -> None:
        """The longest code."""
        rows = []
        for choice in LIMIT_CHOICES:
            totals = self.both(choice)
            kept = [f"{total['number of codes'] / total['segments']:.0f}" for total in totals]
            share = [f"{1e4 * per_weight(total, 'exceptional weights'):.1f}" for total in totals]
            size = f"{4 << choice.limit:,}"
            rows.append([str(choice.limit), size, *self.bits(totals), " / ".join(kept), " / ".join(share), *speeds.get(choice, ["", ""])])
        head = ["limit", "table bytes", *SIZES, "codes a segment", "exceptions in 10^4", *SPEEDS]
        show("Code length limit (MiniLM / Gaussian), pairs with a code chosen best for each", head, rows)

    def lanes(self) -> None:
        """Weights a lane, and how lanes are found."""
        rows = []
        hard = outliers()
        tensors = [t.elements for name in synthetic.omnigen2()["files"] for t in synthetic.omnigen2_tensors(name)]
        sizes = np.sort(tensors)
        middle = int(sizes[np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)])
        for lane_weights in (64, 128, 256, 512):
            for field in ("u8", "u16", "packed"):
                choice = replace(V1, lane_weights=lane_weights, lane_field=field)
                totals = self.both(choice)
                worst = measure([hard], choice)
                parts = [f"{per_weight(totals[0], part):.4f}" for part in ("lanes", "descriptors", "tile padding")]
                excess = " / ".join(f"{t['excess'] / t['tiles']:.0f}, {t['longest excess']}" for t in (*totals, worst))
                over = " / ".join("-" if field == "packed" else f"{t['tiles over']} of {t['tiles']}" for t in (*totals, worst))
                warps = f"{-(-middle // (32 * lane_weights)):,}"
                rows.append([f"{lane_weights} {field}", *self.bits(totals), f"{per_weight(worst, 'bits'):.4f}", *parts, excess, over, warps])
        head = ["lane", *SIZES, "outliers", "lanes", "descriptors", "padding", "excess: mean, largest", "tiles that overflow", "warps"]
        show("Weights a lane (MiniLM / Gaussian / outliers)", head, rows)
        print(f"\nWarps: tiles of a matrix of {middle:,} weights; half of OmniGen2's weights are in matrices of at most that size.")

    def simple(self, title: str, first: str, cases: dict[str, Choice], extra: dict[str, Callable[[Counter[str]], str]]) -> None:
        """A table of choices with further columns, each for both sets."""
        rows = []
        for name, choice in cases.items():
            totals = self.both(choice)
            rows.append([name, *self.bits(totals), *(" / ".join(cell(total) for total in totals) for cell in extra.values())])
        show(title, [first, *SIZES, *extra], rows)


SIZES: Final = ("MiniLM", "against v1", "Gaussian", "against v1")
SPEEDS: Final = ("speed, MiniLM", "speed, Gaussian")
SINGLES: Final = replace(V1, pairs=False, exception_bits=0)
LIMIT_CHOICES: Final = tuple(replace(V1, limit=limit, thresholds=_range(limit - 1, limit + 9)) for limit in LIMITS)
WIDE: Final = LIMIT_CHOICES[2].thresholds


def per_weight(total: Counter[str], part: str) -> float:
    """Bits (or whatever is counted) a weight."""
    return total[part] / total["weights"]


def _entropy(files: Sequence[File], *, pairs: bool) -> float:
    items = [item for file in files for item in file]
    bits = sum(len(item.weights) * entropy(np.bincount(item.pairs if pairs else item.exponents)) / (2 if pairs else 1) for item in items)
    return bits / sum(len(item.weights) for item in items)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a heading and a table."""
    print(f"\n## {title}\n\n{table.markdown(head, rows)}", flush=True)


def main() -> None:
    """Measure everything."""
    print(f"# What the format's choices cost\n\n{machine.as_text(machine.describe())}", flush=True)
    report = Report()
    report.totals()
    timed = [LIMIT_CHOICES[2], LIMIT_CHOICES[1], LIMIT_CHOICES[3], SINGLES]
    largest = max(report.minilm, key=lambda item: len(item.weights)).weights
    samples = [decoding_speeds(weights[: V1.segment], timed) for weights in (largest, report.gaussians[1][0].weights)]
    speeds = {choice: [f"{sample[i]:.2f}" for sample in samples] for i, choice in enumerate(timed)}
    report.symbols({**speeds, V1: speeds[LIMIT_CHOICES[2]]})
    report.limits(speeds)
    report.lanes()
    padding = {
        "16 bytes, and 16 zero bytes a segment (version 1)": V1,
        "4 bytes, 16 zero bytes a segment": replace(V1, tile_align=32),
        "no alignment, 16 zero bytes a segment": replace(V1, tile_align=1),
        "16 bytes, 8 zero bytes a tile": replace(V1, tile_zeros=64),
        "4 bytes, 8 zero bytes a tile": replace(V1, tile_align=32, tile_zeros=64),
    }
    report.simple("Alignment and padding of tiles", "tiles", padding, {"tile padding": lambda t: f"{per_weight(t, 'tile padding'):.4f}"})
    exceptions = {
        "32 bits, version 1's writer": V1,
        "32 bits, best of more thresholds": replace(V1, thresholds=WIDE),
        "24 bits, best of more thresholds": replace(V1, exception_bits=24, thresholds=WIDE),
        "none: all pairs have codes": replace(V1, exception_bits=0),
    }
    counts: dict[str, Callable[[Counter[str]], str]] = {
        "exceptions in 10^4 weights": lambda t: f"{1e4 * per_weight(t, 'exceptional weights'):.1f}",
        "their bits a weight": lambda t: f"{per_weight(t, 'exceptions'):.4f}",
        "codes a segment": lambda t: f"{t['number of codes'] / t['segments']:.0f}",
        "table bytes a segment": lambda t: f"{t['table'] / 8 / t['segments']:.0f}",
    }
    report.simple("Exceptions", "entry", exceptions, counts)
    scopes = {
        "file: all its tensors share one": replace(V1, segment=1 << 24, table="shared"),
        **{f"tensor, at most 2^{power}": replace(V1, segment=1 << power) for power in range(24, 17, -1)},
        "64 rows": replace(V1, rows=64),
    }
    scope_counts: dict[str, Callable[[Counter[str]], str]] = {
        "codes + exceptions": lambda t: f"{per_weight(t, 'codes') + per_weight(t, 'exceptions'):.4f}",
        "table + headers": lambda t: f"{per_weight(t, 'table') + per_weight(t, 'segment'):.4f}",
        "segments": lambda t: f"{t['segments']}",
        "16 KiB each, bits a weight": lambda t: f"{8 * 16384 * t['segments'] / t['weights']:.3f}",
    }
    report.simple("Scope of a table (2^21 is version 1)", "scope", scopes, scope_counts)
    stored: dict[str, Callable[[Counter[str]], str]] = {
        "bytes a table": lambda t: f"{t['table'] / 8 / t['segments']:.0f}",
        "codes": lambda t: f"{t['number of codes'] / t['segments']:.0f}",
    }
    kinds = {"grid of 4-bit lengths (version 1)": V1, "list of 16-bit symbols": replace(V1, table="list")}
    report.simple("Storing a table", "table", kinds, stored)


if __name__ == "__main__":
    main()
