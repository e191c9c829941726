"""The golden files: what each is about, and how it is made."""

from __future__ import annotations

import base64
import json
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import df11
from df11.formats import framing, layout
from tests.vectors import forge

NAN_PAYLOADS: Final = (0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFFF)
SPECIAL: Final = (*NAN_PAYLOADS, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x0080)


@dataclass(frozen=True)
class Golden:
    """A golden file: its bytes, its tensors (name -> decoded bytes), what it is about."""

    name: str
    about: str
    file: bytes = field(repr=False)
    tensors: dict[str, bytes] = field(repr=False)


MAKERS: Final[list[Callable[[], Golden]]] = []


def golden(make: Callable[[], tuple[bytes, Sequence[forge.Tensor]]]) -> Callable[[], Golden]:
    """Register a maker; its name is the file's, its docstring says what the file is about."""

    def maker() -> Golden:
        file, tensors = make()
        return Golden(
            make.__name__,
            " ".join((make.__doc__ or "").split()),
            file,
            {tensor.name: tensor.decoded for tensor in tensors},
        )

    MAKERS.append(maker)
    return maker


def weights_of(symbols: Sequence[int], mantissas: Callable[[int], int] = lambda i: 37 * i & 0xFF) -> list[int]:
    """Two weights per symbol; the sign/mantissa byte of weight i is ``mantissas(i)``."""
    exponents = [e for value in symbols for e in (value & 255, value >> 8)]
    return [(mantissas(i) & 0x80) << 8 | e << 7 | mantissas(i) & 0x7F for i, e in enumerate(exponents)]


def drawn(lengths: forge.Lengths, count: int, seed: int) -> list[int]:
    """Random symbols, each as frequent as its code is short. Uses random() alone, which no Python release changes."""
    rng = random.Random(seed)
    codes = {code: value for value, code in forge.canonical_codes(lengths).items()}
    symbols = []
    for _ in range(count):
        code = ""
        while code not in codes:
            code += "01"[rng.random() < 0.5]
        symbols.append(codes[code])
    return symbols


def gaussian(count: int, seed: int, scale: float = 0.02) -> list[float]:
    """Numbers with an approximately normal distribution."""
    rng = random.Random(seed)
    return [scale * (sum(rng.random() for _ in range(12)) - 6) for _ in range(count)]


def truncated(values: Sequence[float]) -> list[int]:
    """Numbers as BF16 bits, truncated."""
    return [bits >> 16 for bits in struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))]


def coded(name: str, weights: Sequence[int], lengths: forge.Lengths, **options: Any) -> forge.Tensor:
    """A tensor in a record of one coded segment."""
    return forge.bf16(name, weights, forge.record([(forge.coded_segment(weights, lengths, **options), weights)]))


def file_of(*tensors: forge.Tensor, **options: Any) -> tuple[bytes, Sequence[forge.Tensor]]:
    """The container of some tensors."""
    return forge.container(tensors, **options), tensors


PAIRS: Final = [forge.symbol(a, b) for a in (118, 119, 120) for b in (118, 119, 120)]


@golden
def empty() -> tuple[bytes, Sequence[forge.Tensor]]:
    """No tensors at all."""
    return file_of()


@golden
def verbatim() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A verbatim tensor of every dtype of safetensors, an empty one, a 0-d one, and names that need escapes."""
    tensors = []
    for dtype, bits in sorted(framing.DTYPE_BITS.items(), key=lambda item: (-item[1], item[0])):
        tensors.append(forge.Tensor(f"layer.{dtype}", dtype, (2, 4), bytes(range(bits))))
    tensors.append(forge.Tensor("scalar", "BF16", (), b"\x80\x3f"))
    tensors.append(forge.Tensor("empty", "BF16", (3, 0, 2), b""))
    tensors += [
        forge.Tensor(name, "U8", (1,), b"\x07") for name in ("", 'a "quoted"\\name', "größe/名前", "__metadata")
    ]
    return file_of(*tensors)


@golden
def raw_sizes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Raw segments of 1, 2, 3, 7, 8 and 9 weights: one, a pair, around a lane's part of a chunk."""
    tensors = []
    for count in (1, 2, 3, 7, 8, 9):
        weights = [(5 * i + 0x3F80) & 0xFFFF for i in range(count)]
        tensors.append(forge.bf16(f"raw.{count}", weights, forge.record([(forge.raw_segment(weights), weights)])))
    return file_of(*tensors)


@golden
def special_weights() -> tuple[bytes, Sequence[forge.Tensor]]:
    """NaNs with payloads, infinities, subnormals and zeros of both signs, raw and coded, in two dimensions."""
    weights = [SPECIAL[i % len(SPECIAL)] for i in range(1024)]
    symbols = {
        forge.symbol(forge.exponent(a), forge.exponent(b)) for a, b in zip(weights[::2], weights[1::2], strict=True)
    }
    raw = forge.record([(forge.raw_segment(weights), weights)])
    return file_of(
        forge.bf16("raw", weights, raw, (32, 32)),
        forge.bf16("coded", weights, coded("", weights, forge.balanced(symbols)).stored, (4, 8, 32)),
    )


@golden
def single_code() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A table with one code, of length 1. Both bits stand for its pair: one tensor has only 0 bits, one only 1 bits."""
    pair = forge.symbol(127, 127)
    weights = weights_of([pair] * 200)
    return file_of(coded("zeros", weights, {pair: 1}), coded("ones", weights, {pair: 1}, codes={pair: "1"}))


@golden
def longest_codes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Code lengths 1, 2, 3 and so on to 12: the longest code there may be."""
    lengths = forge.staircase(
        [forge.symbol(100 + i % 4, 100 + i // 4) for i in (5, 0, 7, 2, 9, 12, 11, 4, 1, 6, 15, 10, 3)]
    )
    return file_of(coded("w", weights_of([*drawn(lengths, 600, 1), *lengths]), lengths))


@golden
def most_codes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """4096 codes of 12 bits each, in a grid that is full."""
    symbols = [forge.symbol(64 + a, 64 + b) for b in range(64) for a in range(64)]
    order = [symbols[1237 * i % 4096] for i in range(5 * 1024)]
    return file_of(coded("w", weights_of(order, lambda i: i & 0xFF), forge.balanced(symbols)))


@golden
def largest_alphabet() -> tuple[bytes, Sequence[forge.Tensor]]:
    """All 256 exponents in the alphabet: the largest code table, 33024 bytes."""
    symbols = [forge.symbol(i, 255 - i) for i in range(256)]
    frequent = symbols[:2]
    lengths = dict.fromkeys(frequent, 2) | {value: length + 1 for value, length in forge.balanced(symbols[2:]).items()}
    order = [symbols[i // 80 % 256] if i % 80 == 0 else frequent[i // 3 % 2] for i in range(40960 // 2)]
    return file_of(coded("w", weights_of(order, lambda i: i >> 8 & 0xFF), lengths))


@golden
def odd_alphabet() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Alphabets of 1 and 3 exponents: K x K is odd, the last half byte of the table is unused."""
    return file_of(
        coded("one", weights_of([forge.symbol(9, 9)] * 150), {forge.symbol(9, 9): 1}),
        coded("three", weights_of(drawn(forge.balanced(PAIRS), 300, 2)), forge.balanced(PAIRS)),
    )


@golden
def chunk_sizes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Coded segments of 511, 512, 513 weights: no partner for the last weight, full last chunk, one of one weight."""
    lengths = forge.balanced(PAIRS[:4])
    weights = weights_of(drawn(lengths, 257, 3))
    return file_of(*(coded(f"w.{count}", weights[:count], lengths) for count in (511, 512, 513)))


@golden
def tile_sizes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Coded segments of 8191, 8192, 8193 and 16385 weights: around one tile, and two tiles and one weight."""
    lengths = forge.staircase(PAIRS)
    weights = weights_of(drawn(lengths, 8193, 4), lambda i: i >> 5 & 0xFF)
    return file_of(*(coded(f"w.{count}", weights[:count], lengths) for count in (8191, 8192, 8193, 16385)))


@golden
def exceptions() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Exceptions on the first, second and both weights of a pair, on a last weight without partner, on a whole lane."""
    lengths = forge.balanced(PAIRS[:4])
    weights = weights_of(drawn(lengths, 4151, 5), lambda i: i >> 4 & 0xFF)[:-1]
    for at in (0, 301, 510, 511, 8190, 8200, len(weights) - 1):
        weights[at] = SPECIAL[at % len(SPECIAL)]
    lane = [SPECIAL[i % len(SPECIAL)] if i // 8 % 32 == 31 else weight for i, weight in enumerate(weights[:8192])]
    return file_of(coded("few", weights, lengths), coded("lane", lane, lengths))


@golden
def lane_bytes() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Lane lengths of two bytes: where lanes differ by more than 255 bits, and where one byte would do."""
    lengths = forge.staircase(PAIRS)
    short, *_, long = sorted(lengths, key=lengths.__getitem__)
    unequal = weights_of([long if i // 4 % 4 == 3 else short for i in range(2500)], lambda i: i >> 3 & 0xFF)
    equal = weights_of(drawn(lengths, 400, 6))
    return file_of(coded("needed", unequal, lengths, lane_bytes=2), coded("not_needed", equal, lengths, lane_bytes=2))


@golden
def segments() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A record of three segments, coded, raw and coded, each with a table of its own; the last has 300 weights."""
    first, third = forge.staircase(PAIRS), forge.balanced(PAIRS[:2])
    random_bits = [40503 * i & 0xFFFF for i in range(8192)]
    parts = [weights_of(drawn(first, 4096, 7), lambda i: i >> 4 & 0xFF), random_bits, weights_of(drawn(third, 150, 8))]
    encoded = [forge.coded_segment(parts[0], first), forge.raw_segment(parts[1]), forge.coded_segment(parts[2], third)]
    weights = [weight for part in parts for weight in part]
    return file_of(forge.bf16("w", weights, forge.record(list(zip(encoded, parts, strict=True)), 8192), (4171, 4)))


@golden
def padding() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Padding bytes that are not zero. No writer may make them, every reader must ignore them."""
    lengths = forge.balanced(PAIRS)
    weights = weights_of(drawn(lengths, 250, 9))[:-1]
    raw = weights[:9]
    return file_of(
        coded("coded", weights, lengths, pad=0xA5),
        forge.bf16("raw", raw, forge.record([(forge.raw_segment(raw, pad=0x5A), raw)])),
    )


@golden
def unknown_keys() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Metadata keys and members of their objects that version 1 does not know, to be ignored."""

    def add(header: dict[str, Any]) -> None:
        header["__metadata__"] |= {"format": "pt", "df11.later": "{"}
        for key in ("df11.source", "df11.tensors"):
            with forge.json_value(header, key) as value:
                (value if key == "df11.source" else value["w"])["later"] = [1]

    lengths = forge.balanced(PAIRS)
    return file_of(coded("w", weights_of(drawn(lengths, 250, 10)), lengths), edit=add)


@golden
def unsorted_header() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Container and source headers that list tensors in another order than their data; both are padded."""
    lengths = forge.balanced(PAIRS[:4])
    tensors = [
        coded("a", weights_of(drawn(lengths, 200, 11)), lengths),
        forge.Tensor("b", "I64", (3,), bytes(range(24))),
    ]
    size = len(tensors[0].decoded)
    source = {
        "b": {"dtype": "I64", "shape": [3], "data_offsets": [size, size + 24]},
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]},
    }

    def turn(header: dict[str, Any]) -> None:
        for name in list(header)[::-1]:
            header[name] = header.pop(name)

    return file_of(*tensors, edit=turn, source_header=json.dumps(source, indent=1).encode() + b" " * 13)


@golden
def cast() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Tensors cast from F32, in records and verbatim, one of them rounded, so that the source cannot be restored."""
    lengths = forge.balanced(PAIRS)
    weights = weights_of(drawn(lengths, 300, 12))
    stored = coded("", weights, lengths).stored
    few = list(SPECIAL)
    tensors = [
        forge.Tensor("exact", "BF16", (20, 30), forge.u16s(weights), stored, True, widened(weights)),
        forge.Tensor("rounded", "BF16", (600,), forge.u16s(weights), stored, False, widened(weights, 1)),
        forge.Tensor("verbatim", "BF16", (2, 7), forge.u16s(few), None, True, widened(few)),
    ]
    return file_of(*tensors)


@golden
def cast_exact() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Tensors cast from F32 that are all exact: the source, with 16 zero bits below each weight, can be restored."""
    lengths = forge.balanced(PAIRS[:3])
    weights = weights_of(drawn(lengths, 300, 13))
    few = [weight for weight in SPECIAL if weight & 0x7FFF <= 0x7F80] + [0xFFFF]
    tensors = [
        forge.Tensor(
            "record", "BF16", (600,), forge.u16s(weights), coded("", weights, lengths).stored, True, widened(weights)
        ),
        forge.Tensor("verbatim", "BF16", (10,), forge.u16s(few), None, True, widened(few)),
    ]
    return file_of(*tensors)


def widened(weights: Sequence[int], low: int = 0) -> bytes:
    """F32 values: the weights above the 16 bits ``low``."""
    return struct.pack(f"<{len(weights)}I", *(weight << 16 | low for weight in weights))


@golden
def exceptions_alone() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Exceptions whose sign/mantissa byte is not the weight's own, and exceptions that were not needed."""
    lengths = forge.balanced(PAIRS[:4])
    weights = weights_of(drawn(lengths, 200, 20), lambda i: 91 * i & 0xFF)
    weights[77], weights[256] = 0xFF81, 0x0001
    needless = [(8, weights[8]), (9, weights[9]), (399, weights[399])]

    def add(tiles: list[forge.Tile]) -> None:
        tiles[0].exceptions.extend(needless)
        tiles[0].exceptions.sort(key=lambda listed: (listed[0] // 8 % 32, listed[0]))

    segment = bytearray(forge.coded_segment(weights, lengths, edit=add))
    start = layout.SEGMENT_HEADER.unpack(segment)["sign_mantissa_offset"]
    for at in (77, 256, 9):
        segment[start + at] ^= 0xD3
    return file_of(forge.bf16("w", weights, forge.record([(bytes(segment), weights)])))


@golden
def every_weight_an_exception() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Seven tiles; in the third, all 8192 weights are exceptions. The fifth has 300, more than a byte counts."""
    pair = forge.symbol(127, 127)
    lengths = {pair: 1, forge.symbol(126, 126): 1}
    weights = weights_of([pair] * (6 * 4096 + 100), lambda i: i >> 5 & 0xFF)
    for i in range(8192):
        weights[2 * 8192 + i] = (40503 * i & 0x807F) | 3 << 7
    for i in range(300):
        weights[4 * 8192 + 17 * i] = 0x7F80 + i % 99
    return file_of(coded("w", weights, lengths))


@golden
def shortest_lane() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A shortest_lane that is less than that of any lane, and one that is 0."""
    lengths = forge.staircase(PAIRS)
    weights = weights_of(drawn(lengths, 300, 21))
    tensors = []
    for name, most in (("less", 7), ("zero", 1 << 16)):
        segment = bytearray(forge.coded_segment(weights, lengths, lane_bytes=2))
        header = layout.SEGMENT_HEADER.unpack(segment)
        tile: dict[str, Any] = layout.TILE_DESCRIPTOR.unpack(segment, header["tiles_offset"])
        by = min(most, tile["shortest_lane"])
        tile["shortest_lane"] -= by
        segment[header["tiles_offset"] : header["tiles_offset"] + 8] = layout.TILE_DESCRIPTOR.pack(**tile)
        excess = struct.unpack_from("<32H", segment, header["lanes_offset"])
        struct.pack_into("<32H", segment, header["lanes_offset"], *(value + by for value in excess))
        tensors.append(forge.bf16(name, weights, forge.record([(bytes(segment), weights)])))
    return file_of(*tensors)


@golden
def padding_bits() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Bits after the codes of a tile that are not zero: from 1 to 31 of them. No writer may make them."""
    lengths = forge.staircase(PAIRS)
    tensors = []
    for count in (99, 250, 251, 260):
        weights = weights_of(drawn(lengths, count, count))[:-1]
        tensors.append(coded(f"w.{count}", weights, lengths, pad=0xFF))
    return file_of(*tensors)


@golden
def as_large_as_raw() -> tuple[bytes, Sequence[forge.Tensor]]:
    """Coded segments as large as raw ones, the smallest there are: of 96 and of 95 weights."""
    weights = weights_of([forge.symbol(127, 127)] * 48)
    lengths = {forge.symbol(127, 127): 1}
    return file_of(*(coded(f"w.{count}", weights[:count], lengths) for count in (96, 95)))


@golden
def many_segments() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A record of six segments of one tile, and a last one of a single weight."""
    lengths = {forge.symbol(127, 127): 1, forge.symbol(126, 126): 1}
    weights = weights_of([forge.symbol(127 - i % 2, 127 - i % 2) for i in range(6 * 4096)], lambda i: i >> 7 & 0xFF)
    weights.append(0x1234)
    parts = [weights[first : first + 8192] for first in range(0, len(weights), 8192)]
    encoded = [forge.coded_segment(part, lengths) for part in parts[:-1]] + [forge.raw_segment(parts[-1])]
    return file_of(forge.bf16("w", weights, forge.record(list(zip(encoded, parts, strict=True)), 8192)))


@golden
def order() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A record of a tensor without dimensions; a record after a verbatim tensor and after an empty one."""
    lengths = forge.balanced(PAIRS)
    return file_of(
        forge.Tensor("first", "I32", (2, 2), bytes(range(16))),
        forge.bf16("scalar", [0xC049], forge.record([(forge.raw_segment([0xC049]), [0xC049])]), ()),
        forge.Tensor("empty", "BF16", (0, 2**31, 2**30), b""),
        coded("last", weights_of(drawn(lengths, 150, 22)), lengths),
    )


@golden
def json_text() -> tuple[bytes, Sequence[forge.Tensor]]:
    """JSON with escapes, white space, unknown members of an entry, and lists inside each other as deep as allowed."""
    lengths = forge.balanced(PAIRS)
    tensors = [
        coded("wörter/\U0001f600", weights_of(drawn(lengths, 150, 23)), lengths),
        forge.Tensor("n", "I16", (4,), bytes(range(8))),
    ]
    deep: list[Any] = []
    for _ in range(124):
        deep = [deep]

    def change(header: dict[str, Any]) -> None:
        header["n"] = {"x": {"dtype": [1.5e3, -0.0, None, True]}, "deep": deep} | header["n"]
        with forge.json_value(header, "df11.tensors") as value:
            value["n"] = {"deep": deep} | value["n"]
        for key in ("df11.source", "df11.tensors"):
            header["__metadata__"][key] = json.dumps(json.loads(header["__metadata__"][key]), indent="\t") + "\r\n"

    document, data = forge.split(forge.container(tensors, edit=change))
    text = json.dumps(json.loads(document), indent=2).replace("dtype", "\\u0064type").encode()
    return forge.with_header(text + b"\n\t", data), tensors


@golden
def large() -> tuple[bytes, Sequence[forge.Tensor]]:
    """A stream_position beyond 65,535 and an element_count beyond 2^20, from more than a MiB of exceptions."""
    count = 5 * 2**18
    pair = forge.symbol(127, 127)
    lengths = {pair: 1, forge.symbol(126, 126): 1}
    tile = weights_of([pair] * 4096, lambda i: i >> 5 & 0xFF)
    for i in range(1800):
        tile[4 * i] = 0x4000 | i & 0x7F
    return file_of(coded("w", tile * (count // 8192) + tile[:5], lengths))


# What the writer makes. These files depend on the encoder's choices and change with them.


def converted(source: Sequence[forge.Tensor], **options: Any) -> bytes:
    """The container that df11.convert makes, with fixed values for what depends on releases: writer, source header."""
    with tempfile.TemporaryDirectory() as folder:
        header, data = forge.safetensors_file(source)
        path = Path(folder, "source.safetensors")
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        df11.convert(path, path.with_suffix(".df11"), threads=1, **options)
        document_bytes, body = forge.split(path.with_suffix(".df11").read_bytes())
    document = json.loads(document_bytes)
    document["__metadata__"] |= {
        "df11.writer": "df11 test vectors",
        "df11.source_header": base64.b64encode(forge.raw_frame(header)).decode(),
    }
    return forge.with_header(forge.compact(document), body)


@golden
def writer() -> tuple[bytes, Sequence[forge.Tensor]]:
    """df11.convert: weights like a model's, all BF16 values, very unequal lanes, small tensors, other dtypes."""
    unequal = [0x3F80 if i // 8 % 2 else value for i, value in enumerate(truncated(gaussian(9000, 1, 3.0)))]
    tensors = [
        forge.bf16("all_values", [40503 * i & 0xFFFF for i in range(3000)], None),
        forge.bf16("gaussian", truncated(gaussian(17000, 2)), None, (170, 100)),
        forge.Tensor("bytes", "U8", (5,), bytes(5)),
        forge.bf16("constant", [0xBF80] * 1001, None),
        forge.bf16("small", [1, 2, 3], None),
        forge.bf16("unequal_lanes", unequal, None),
        forge.Tensor("numbers", "F32", (4,), struct.pack("<4f", 1, 2, 3, 4)),
        forge.Tensor("nothing", "BF16", (0,), b""),
    ]
    # As release 0.1 wrote it: today's writer stores these F32 numbers as BF16.
    return Path(__file__).with_name("golden").joinpath("writer.df11").read_bytes(), tensors


@golden
def writer_exceptions() -> tuple[bytes, Sequence[forge.Tensor]]:
    """df11.convert: pairs so rare that they become exceptions, on the first, second and both weights; odd count."""
    weights = truncated(gaussian(33001, 3))
    for i, at in enumerate(range(700, 33000, 4801)):
        weights[at] = 0x7F80 + i
        if i % 3 == 0:
            weights[at ^ 1] = 0x7A80
    weights[-1] = 0x0081
    tensors = [forge.bf16("w", weights, None)]
    return converted(tensors), tensors


@golden
def writer_cast() -> tuple[bytes, Sequence[forge.Tensor]]:
    """df11.convert --cast bf16: a tensor that was BF16 before, a rounded one, NaNs, ties, overflow and subnormals."""
    exact = truncated(gaussian(900, 4))
    full = list(struct.unpack("<900I", struct.pack("<900f", *gaussian(900, 5))))
    edge = [
        0x7F800001,
        0xFFC00000,
        0xFFFF0000,
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x7F7FFFFF,
        0xFF7F8000,
        0x00000001,
        0x00008001,
        0x807FFFFF,
    ]
    tensors = [
        forge.Tensor("exact", "BF16", (30, 30), forge.u16s(exact), None, True, widened(exact)),
        forge.Tensor(
            "rounded", "BF16", (900,), forge.u16s(map(rounded, full)), None, False, struct.pack("<900I", *full)
        ),
        forge.Tensor("edge", "BF16", (11,), forge.u16s(map(rounded, edge)), None, False, struct.pack("<11I", *edge)),
    ]
    return converted(tensors, cast="bf16"), tensors


def rounded(bits: int) -> int:
    """F32 bits to BF16 bits: to nearest, ties to even, NaN to 0xFFFF."""
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0xFFFF
    low = bits & 0xFFFF
    return (bits >> 16) + (low > 0x8000 or (low == 0x8000 and bits >> 16 & 1))
