"""What the choices behind version 1 of the format cost or gain. ``python -m benchmarks.format_choices`` prints Markdown tables.

Sizes come from a model of the format that takes one choice at a time away from version 1; for version 1 itself the model must give exactly the
bytes that the encoder writes, which is checked first. Every bit of a record counts; the JSON header of the file does not. Speeds are those of
tile decoders on one thread of a CPU, compiled from one source for each kind of code; only their ratios mean anything.
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
File = list[Words]
"""BF16 matrices; their sizes are multiples of 256, as the model leaves out chunks that are not full."""
Total = Counter[str]
Cell = Callable[[Total], str]

SIGMAS: Final = (0.01, 0.02, 0.03, 0.05)
SHAPE: Final = (2048, 2048)
UNLIMITED: Final = 32  # A longer code needs at least F(35) = 9.2 million pairs (Fibonacci), more than a segment has.
PARTS: Final = ("codes", "exceptions", "lane lengths", "tile descriptors", "tile padding", "tables", "headers, ends")
U64 = np.uint64


@dataclass(frozen=True, slots=True)
class Choice:
    """Version 1, unless changed.

    ``thresholds``: pairs rarer than 2**-threshold get no code, with the best of these; ``exceptions``: their bits, 0 if every pair that occurs
    has a code. ``field``: "u8", excess over the shortest lane (u16 in segments where that overflows); "u16", offset in the tile (u32 where that
    overflows); "packed", excess in as many bits as the tile needs. ``zeros``: bits after a tile; if 0, 16 bytes end a segment. ``rows`` of a
    matrix in a segment, if not 0. ``shared``: one table a file.
    """

    pairs: bool = True
    limit: int = 12
    thresholds: tuple[float, ...] = (14.0, 15.0, 16.0, 17.0)
    exceptions: int = 32
    lane: int = 256
    field: str = "u8"
    align: int = 128
    zeros: int = 0
    segment: int = 1 << 21
    rows: int = 0
    shared: bool = False


V1: Final = Choice()
SINGLES: Final = Choice(pairs=False, exceptions=0)
LIMIT: Final = {limit: Choice(limit=limit, thresholds=tuple(np.arange(limit - 1, limit + 9.5, 0.5).tolist())) for limit in range(10, 15)}


@dataclass(frozen=True, slots=True)
class Code:
    """Code length of each symbol (of its stand-in, if it has none), and how many of its weights are then exceptions."""

    lengths: npt.NDArray[np.uint8]
    changed: npt.NDArray[np.uint8]
    codes: int
    grid_bits: int
    list_bits: int
    """If the table were a list: how many codes each length has, then the symbols in canonical order."""


def _minilm() -> File:
    path = synthetic.minilm_path()
    tensors = [tensor for tensor in safetensors_file.read_header(path) if tensor.dtype == "F32" and tensor.elements >= 10_000]
    with path.open("rb") as file:
        pieces = [next(safetensors_file.read_pieces(file, tensor, tensor.size)) for tensor in tensors]
    return [synthetic.round_to_bf16(piece.view(np.float32).copy()).reshape(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


def _gaussian(sigma: float) -> File:
    return [synthetic.round_to_bf16(synthetic.generator(f"{sigma}").standard_normal(SHAPE, np.float32) * np.float32(sigma))]


def _outliers(spread: float) -> File:
    # A scale a row and a scale a column, as in the worst layers of the OmniGen2 stand-in: hard on lanes, which each have columns of their own here.
    numbers = synthetic.generator(f"outliers {spread}")
    values, rows, columns = (numbers.standard_normal(shape, np.float32) for shape in (SHAPE, (SHAPE[0], 1), SHAPE[1]))
    scales = np.float32(0.02) * np.exp(np.float32(synthetic.ROW_SPREAD) * rows + np.float32(spread) * columns)
    return [synthetic.round_to_bf16(values * scales)]


def _package_merge(counts: Integers, limit: int) -> Integers:
    # Code lengths for ascending counts, as the encoder finds them.
    m = len(counts)
    packages, leaves = np.empty(0, np.int64), []
    for _ in range(limit):
        merged = np.concatenate([counts, packages])
        order = np.argsort(merged, kind="stable")
        leaves.append(order < m)
        packages = merged[order][: len(merged) // 2 * 2].reshape(-1, 2).sum(axis=1)
    lengths = np.full(m, m == 1, np.int64)
    need = 2 * m - 2
    for is_leaf in reversed(leaves):
        used = int(is_leaf[:need].sum())
        lengths[:used] += 1
        need = 2 * (need - used)
    return lengths


def _code(order: Integers, counts: Integers, kept: int, choice: Choice) -> tuple[int, Code]:
    # order: symbols by falling count, of which kept get a code. Returns (bits of codes, exceptions and table, the code).
    lengths, changed = np.zeros(65536, np.int64), np.zeros(65536, np.int64)
    coded, rest = order[:kept], order[kept:]
    lengths[coded] = _package_merge(counts[coded][::-1], choice.limit)[::-1]
    by_length = coded[np.lexsort((coded, lengths[coded]))][::-1]
    stand_ins = np.full((2, 256), -1)
    for which, part in enumerate((by_length & 255, by_length >> 8)):
        stand_ins[which, part] = by_length
    a, b = stand_ins[0, rest & 255], stand_ins[1, rest >> 8]
    if not choice.pairs:
        a[:] = b[:] = by_length[-1]
    cost_a, cost_b = np.where(a >= 0, lengths[a], 99), np.where(b >= 0, lengths[b], 99)
    neither = (a < 0) & (b < 0)
    changed[rest] = np.where(neither, 2, 1)
    lengths[rest] = lengths[np.where(neither, by_length[-1], np.where(cost_a <= cost_b, a, b))]
    size = int((stand_ins >= 0).any(axis=0).sum())
    grid = -(-(8 * size + (4 if choice.limit < 16 else 8) * size * size) // 8) * 8 if choice.pairs else 8 * kept + 4 * (kept + kept % 2)
    bits = int((counts * (lengths + choice.exceptions * changed)).sum()) + grid
    return bits, Code(lengths.astype(np.uint8), changed.astype(np.uint8), kept, grid, 16 * (choice.limit + kept))


def _best_code(symbols: npt.NDArray[Any], choice: Choice) -> Code:
    counts = np.bincount(symbols, minlength=65536)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if not choice.exceptions and len(order) > 1 << min(choice.limit, 16):
        raise ValueError("more symbols than codes")
    wanted = [int((counts >= counts.sum() / 2**x).sum()) for x in choice.thresholds] if choice.exceptions else [len(order)]
    candidates = [_code(order, counts, max(1, min(kept, 1 << choice.limit)), choice) for kept in dict.fromkeys(wanted)]
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _symbols(weights: Words, choice: Choice) -> npt.NDArray[Any]:
    exponents = ((weights >> np.uint16(7)) & np.uint16(0xFF)).astype(np.uint8)
    return exponents.view(np.uint16) if choice.pairs else exponents


def _segments(file: File, choice: Choice) -> Iterator[Words]:
    for item in file:
        step = choice.rows * item.shape[1] or choice.segment
        for first in range(0, item.size, step):
            yield item.reshape(-1)[first : first + step]


def _measure_segment(symbols: npt.NDArray[Any], n: int, code: Code, choice: Choice, total: Total) -> None:
    step = len(symbols) * 8 // n
    lengths = code.lengths[symbols].reshape(-1, step)
    chunks = sum((lengths[:, i] for i in range(step)), np.zeros(len(lengths), np.uint32)).reshape(-1, layout.LANES)
    lanes = np.add.reduceat(chunks, np.arange(0, len(chunks), choice.lane // 8), axis=0, dtype=np.int64)
    tiles = len(lanes)
    at = np.flatnonzero(code.changed[symbols])
    exceptions = np.bincount(at // (4 * choice.lane * step), weights=code.changed[symbols[at]], minlength=tiles).astype(np.int64)
    excess = lanes.max(axis=1) - lanes.min(axis=1)
    over = {"u8": excess > 255, "u16": lanes[:, :-1].sum(axis=1) > 65535, "packed": excess < 0}[choice.field]
    field_bits = {"u8": 8 * tiles, "u16": 16 * tiles, "packed": int(np.ceil(np.log2(excess + 1)).sum())}[choice.field]
    fields = layout.LANES * field_bits * (2 if over.any() else 1)
    codes = lanes.sum(axis=1)
    listed = choice.exceptions * exceptions
    grain = min(choice.align, 8 if choice.exceptions == 24 else 32)
    stream = int((-(-(-(-codes // grain) * grain + listed + choice.zeros) // choice.align) * choice.align).sum())
    table_bits = 0 if choice.shared else code.grid_bits
    ends = 512 + (0 if choice.zeros else 128) + sum(-part % 128 for part in (table_bits, 64 * tiles, fields, 8 * n, stream))
    bits = (int(codes.sum()), int(listed.sum()), fields, 64 * tiles, stream - int((codes + listed).sum()), table_bits, ends)
    total.update(dict(zip(PARTS, bits, strict=True)))
    total.update({"bits": sum(bits) + 8 * n, "weights": n, "segments": 1, "tiles": tiles, "number of codes": code.codes})
    total.update({"excess": int(excess.sum()), "tiles over": int(over.sum()), "exceptional": int(exceptions.sum())})
    total.update({"grid": code.grid_bits, "list": code.list_bits, "segments over": int(over.any()), "expanded": int(not choice.shared)})
    total["largest excess"] = max(total["largest excess"], int(excess.max()))


def measure(files: Sequence[File], choice: Choice) -> Total:
    """Bits of everything, by part and in total, and other counts."""
    total: Total = Counter()
    for file in files:
        shared = None
        if choice.shared:
            shared = _best_code(np.concatenate([_symbols(item.reshape(-1), choice) for item in file]), choice)
            total.update({"tables": shared.grid_bits, "bits": shared.grid_bits, "expanded": 1})
        for weights in _segments(file, choice):
            symbols = _symbols(weights, choice)
            _measure_segment(symbols, len(weights), shared or _best_code(symbols, choice), choice, total)
        headers = 8 * layout.RECORD_HEADER.size * len(file)
        total.update({PARTS[-1]: headers, "bits": headers})
    return total


def check(files: Sequence[File]) -> None:
    """The model of version 1 must give the bytes of the encoder."""
    encoder = SegmentEncoder()
    out = np.empty(layout.raw_segment_size(V1.segment) + (1 << 16), np.uint8)
    written = sum(layout.RECORD_HEADER.size * len(file) for file in files)
    for file in files:
        for weights in _segments(file, V1):
            written += len(encoder.encode(weights, out, verify=False).data) + layout.DIRECTORY_ENTRY.size
    modelled = measure(files, V1)["bits"]
    if modelled != 8 * written:
        raise SystemExit(f"the model says {modelled / 8:,.0f} bytes, the encoder writes {written:,}")


@kernel
def _pack(symbols: Any, codes: Any, step: int, out: Any, starts: Any) -> None:
    # Tiles of 32 lanes of 256 weights; step: symbols of a lane in a chunk; codes: u64, code << 8 | length.
    bit = U64(0)
    for tile in range(len(starts) // 32):
        bit = ((bit + U64(127)) >> U64(7)) << U64(7)
        for lane in range(32):
            starts[32 * tile + lane] = bit
            for chunk in range(32):
                for i in range(step):
                    code = codes[symbols[(32 * (32 * tile + chunk) + lane) * step + i]]
                    byte = bit >> U64(3)
                    store_u64(out, byte, load_u64(out, byte) | ((code >> U64(8)) << (bit & U64(7))))
                    bit += code & U64(255)


def _decoder(limit: int, *, pairs: bool) -> Callable[..., None]:
    mask = U64((1 << limit) - 1)
    loads = 1 if pairs else 2

    @kernel
    def decode(stream: Any, starts: Any, entries: Any, sign_mantissa: Any, position: Any, scratch: Any, out: Any) -> None:
        # As the decoder of the package, but for exceptions: first all exponents of a tile, its lanes taking turns, then the weights.
        exponents = scratch.view(np.uint32)
        for tile in range(len(starts) // 32):
            for lane in range(32):
                position[lane] = starts[32 * tile + lane]
            target = U64(0)
            for turn in range(32 * 32):
                bit = position[turn & 31]
                for _ in range(loads):
                    window = load_u64(stream, bit >> U64(3)) >> (bit & U64(7))
                    a = U64(entries[window & mask])
                    window >>= a & U64(63)
                    b = U64(entries[window & mask])
                    window >>= b & U64(63)
                    c = U64(entries[window & mask])
                    window >>= c & U64(63)
                    d = U64(entries[window & mask])
                    bit += (a + b + c + d) & U64(63)
                    if pairs:
                        store_u64(scratch, target, a | (b << U64(32)))
                        store_u64(scratch, target + U64(8), c | (d << U64(32)))
                        target += U64(16)
                    else:
                        store_u64(scratch, target, a | (b << U64(16)) | (c << U64(32)) | (d << U64(48)))
                        target += U64(8)
                position[turn & 31] = bit
            for i in range(4096):
                s = np.uint32(sign_mantissa[4096 * tile + i])
                low = (s & np.uint32(0x7F)) | ((s & np.uint32(0x80)) << np.uint32(8))
                high = ((s & np.uint32(0x7F00)) << np.uint32(8)) | ((s & np.uint32(0x8000)) << np.uint32(16))
                out[4096 * tile + i] = (exponents[i] & np.uint32(0x7F807F80)) | low | high

    return decode


def _speed_case(weights: Words, choice: Choice) -> Callable[[], None]:
    # A function to time, which decodes the weights; it has been run once and its result compared.
    symbols = _symbols(weights, choice)
    code = _best_code(symbols, choice)
    coded = np.flatnonzero((code.lengths > 0) & (code.changed == 0))
    coded = coded[np.lexsort((coded, code.lengths[coded]))]
    codes, entries = np.zeros(65536, np.uint64), np.zeros(1 << choice.limit, np.uint32)
    number, previous = 0, 0
    for symbol in coded.tolist():
        length = int(code.lengths[symbol])
        number <<= length - previous
        reverse = int(f"{number:0{length}b}"[::-1], 2)
        codes[symbol] = reverse << 8 | length
        entries[reverse :: 1 << length] = (symbol >> 8) << 23 | (symbol & 255) << 7 | length
        number, previous = number + 1, length
    # Rare pairs that have no code are decoded as the first of all, and left out of the comparison.
    codes[code.changed > 0] = codes[coded[0]]
    stream, starts, out = np.zeros(2 * len(weights), np.uint8), np.zeros(len(weights) // 256, np.uint64), np.zeros(len(weights) // 2, np.uint32)
    _pack(symbols, codes, 4 if choice.pairs else 8, stream, starts)
    sign_mantissa = (((weights >> np.uint16(8)) & np.uint16(0x80)) | (weights & np.uint16(0x7F))).astype(np.uint8).view(np.uint16)
    arguments = (stream, starts, entries, sign_mantissa, np.zeros(32, np.uint64), np.zeros(2048, np.uint64), out)
    decode = _decoder(choice.limit, pairs=choice.pairs)
    decode(*arguments)
    if not ((out == weights.view(np.uint32)) | (choice.pairs and code.changed[symbols] > 0)).all():
        raise SystemExit("a decoder does not restore the weights")
    return lambda: decode(*arguments)


def decoding_speeds(weights: Words, choices: Sequence[Choice]) -> list[float]:
    """Speed relative to the first choice: the best of several rounds, each of which runs every decoder."""
    cases = [_speed_case(weights, choice) for choice in choices]
    best = [float("inf")] * len(cases)
    for _ in range(100):
        for i, case in enumerate(cases):
            start = time.perf_counter()
            case()
            best[i] = min(best[i], time.perf_counter() - start)
    return [best[0] / seconds for seconds in best]


def _share(*parts: str, of: str = "weights", scale: float = 1, digits: int = 4) -> Cell:
    return lambda total: f"{scale * sum(total[part] for part in parts) / total[of]:.{digits}f}"


def _totals(samples: Sequence[File]) -> None:
    measured = [measure([file], V1) for file in samples]
    rows = [[part, *(_share(part)(total) for total in measured)] for part in PARTS]
    rows += [["**together, and 8 for sign and mantissa**", *(f"**{_share('bits')(total)}**" for total in measured)]]
    for name, choice in (("floor: 8 + entropy of singles, by tensor", SINGLES), ("8 + half the entropy of pairs, by tensor", V1)):
        floors = [sum(x.size * entropy(np.bincount(_symbols(x.reshape(-1), choice))) / (1 + choice.pairs) for x in file) for file in samples]
        rows.append([name, *(f"{8 + bits / sum(x.size for x in file):.4f}" for bits, file in zip(floors, samples, strict=True))])
    codes = [total["codes"] / total["weights"] for total in (measure([file], replace(SINGLES, limit=UNLIMITED)) for file in samples)]
    # Five bits for every 8 bytes of codes, four bytes for every 4096.
    rows.append(["DFloat11's layout, calculated, without tables", *(f"{8 + bits * (1 + 5 / 64 + 32 / 32768):.4f}" for bits in codes)])
    print("\n## Total, bits a weight\n\n" + table.markdown(["part", "MiniLM", *(f"sigma {sigma}" for sigma in SIGMAS)], rows), flush=True)


def main() -> None:
    """Measure everything."""
    print(f"# What the format's choices cost\n\n{machine.as_text(machine.describe())}", flush=True)
    real, gaussians = _minilm(), [_gaussian(sigma) for sigma in SIGMAS]
    sets = ([real], gaussians, [_outliers(spread) for spread in synthetic.OUTLIER_COLUMN_SPREADS.values()])
    for files in sets:
        check(files)
    v1 = [measure(files, V1)["bits"] for files in sets]

    def compare(title: str, cases: dict[str, Choice], cells: dict[str, Cell], speeds: dict[Choice, str] | None = None, count: int = 2) -> None:
        # A row a choice: size of each set and what that is more than version 1's, then the other cells: one value a set, or one for all.
        rows = []
        for name, choice in cases.items():
            found = [measure(files, choice) for files in sets[:count]]
            row = [name]
            for total, bits in zip(found, v1, strict=False):
                row += [_share("bits")(total), f"{(total['bits'] - bits) / total['weights']:+.4f}"]
            for cell in cells.values():
                values = [cell(total) for total in found]
                row.append(" / ".join(values) if len(set(values)) > 1 else values[0])
            rows.append([*row, speeds.get(choice, "")] if speeds else row)
        head = [cell for name in ("MiniLM", "Gaussian", "outliers")[:count] for cell in (name, "to v1")]
        text = table.markdown(["", *head, *cells, *(["CPU speed"] if speeds else [])], rows)
        print(f"\n## {title} ({', '.join(head[::2])})\n\n{text}", flush=True)

    _totals([real, *gaussians])
    timed = [LIMIT[12], LIMIT[11], LIMIT[13], SINGLES]
    ratios = [decoding_speeds(item.reshape(-1)[: V1.segment], timed) for item in (max(real, key=len), gaussians[1][0])]
    speeds = {choice: " / ".join(f"{ratio[i]:.2f}" for ratio in ratios) for i, choice in enumerate(timed)}
    some = replace(V1, pairs=False, thresholds=tuple(np.arange(4, 20.5, 0.5).tolist()))
    symbols = {"pairs, at most 12 bits (v1)": V1, "pairs, all coded, no limit (bound)": replace(V1, limit=UNLIMITED, exceptions=0)}
    symbols |= {"singles, all coded, at most 12 bits": SINGLES, "singles, rare ones as exceptions, at most 12 bits": some}
    symbols |= {"singles, at most 6 bits, two a look-up": replace(some, limit=6)}
    cells = {part: _share(part) for part in ("codes", "exceptions", "tables")}
    compare("Symbols", symbols, cells, {**speeds, V1: speeds[LIMIT[12]]})
    exceptions = {
        "codes a segment": _share("number of codes", of="segments", digits=0),
        "exceptions in 10^4 weights": _share("exceptional", scale=1e4, digits=1),
    }
    limits = {f"{limit} bits, {4 << limit:,} bytes of table": choice for limit, choice in LIMIT.items()}
    compare("Code length limit, each with the best of 21 thresholds", limits, exceptions, speeds)
    lanes = {f"{lane} {field}": replace(V1, lane=lane, field=field) for lane in (64, 128, 256, 512) for field in ("u8", "u16", "packed")}
    cells = {part: _share(part, digits=3) for part in PARTS[2:5]}
    cells |= {"mean excess": _share("excess", of="tiles", digits=0), "largest": lambda t: f"{t['largest excess']}"}
    cells |= {f"% of {part} over": _share(f"{part} over", of=part, scale=100, digits=1) for part in ("tiles", "segments")}
    compare("Weights a lane, and how lanes are found", lanes, cells, count=3)
    padding = {"16 bytes, and 16 zero bytes a segment (v1)": V1, "4 bytes, 16 a segment": replace(V1, align=32)}
    padding |= {"none, 16 a segment": replace(V1, align=1)}
    padding |= {f"{align // 8} bytes, 8 zero bytes a tile": replace(V1, align=align, zeros=64) for align in (128, 32)}
    compare("Alignment and padding of tiles", padding, {PARTS[4]: _share(PARTS[4])})
    entries = {"32 bits, v1's writer": V1, "32 bits, best of 21 thresholds": LIMIT[12]}
    entries |= {"24 bits, best of 21 thresholds": replace(LIMIT[12], exceptions=24), "none: all pairs coded": replace(V1, exceptions=0)}
    compare(
        "Exceptions",
        entries,
        {**exceptions, "their bits": _share("exceptions"), "table bytes": _share("tables", of="segments", scale=1 / 8, digits=0)},
    )
    scopes = {"file: its tensors share one": replace(V1, segment=1 << 24, shared=True)}
    scopes |= {f"tensor, at most 2^{power}": replace(V1, segment=1 << power) for power in range(24, 17, -1)} | {"64 rows": replace(V1, rows=64)}
    cells = {"codes + exceptions": _share("codes", "exceptions"), "tables + headers": _share("tables", PARTS[-1])}
    cells |= {"segments": lambda t: f"{t['segments']}", "16 KiB for each, bits a weight": _share("expanded", scale=8 * 16384, digits=3)}
    cells |= {f"bytes as {kind}": _share(kind, of="segments", scale=1 / 8, digits=0) for kind in ("grid", "list")}
    compare("Scope of a table", scopes, cells)
    small = replace(LIMIT[13], exceptions=24, lane=512, field="packed", align=1, segment=1 << 20)
    compare("Everything that makes files smaller, at once", {"13 bits, lanes of 512, packed, no alignment, 24-bit exceptions, 2^20": small}, {})


if __name__ == "__main__":
    main()
