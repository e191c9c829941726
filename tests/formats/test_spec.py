"""formats/SPEC.md says what formats/layout.py declares: its tables are read and compared, and its links hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from df11.formats import framing, json_text, layout, reference
from tests.vectors import forge, worked_example

SPEC = (Path(__file__).parents[2] / "formats" / "SPEC.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d+) .*?\n(.*?)(?=^## |\Z)", SPEC, re.MULTILINE | re.DOTALL))


def flat(text: str) -> str:
    """A text on one line: a sentence may be broken anywhere."""
    return " ".join(text.split())


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a text: rows of cells, without the rule below the first row."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in block.splitlines()
            if not line.startswith("|---")
        ]
        for block in blocks
    ]


def table_under(title: str) -> list[list[str]]:
    """The table that follows a line ``**title, ...**``, without its first row."""
    match = re.search(rf"^\*\*{title}.*\*\*\n\n((?:^\|.*\n)+)", SPEC, re.MULTILINE)
    assert match, f"no table {title}"
    return tables(match[1])[0][1:]


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=lambda structure: structure.name)
def test_structures(structure: layout.Structure) -> None:
    assert [(int(row[0]), int(row[1]), row[2]) for row in table_under(structure.name)] == structure.table()
    assert f"**{structure.name}, {structure.size} bytes**" in SPEC


def test_every_structure_of_the_specification_is_declared() -> None:
    declared = {(structure.name, str(structure.size)) for structure in layout.STRUCTURES}
    assert set(re.findall(r"^\*\*(.*), (\d+) bytes\*\*$", SPEC, re.MULTILINE)) == declared


def number(text: str) -> int:
    """The number at the start of a cell: 1,000 or 2^40 or 12."""
    match = re.match(r"2\^(\d+)|[\d,]+", text)
    assert match, text
    return 1 << int(match[1]) if match[1] else int(match[0].replace(",", ""))


def test_limits() -> None:
    rows = {row[0]: row[1] for row in tables(SECTIONS["10"])[0][1:]}
    codes = layout.LANES * layout.LANE_WEIGHTS // 2 * layout.CODE_LIMIT // 8
    assert {name: number(value) for name, value in rows.items() if not name.startswith("size of a segment")} == {
        "JSON header, of the container and of the source": layout.MAX_JSON_HEADER,
        "source header, besides": layout.MAX_SOURCE_HEADER_BASE,
        "depth of JSON": layout.MAX_JSON_DEPTH,
        "tensors in a file": layout.MAX_TENSORS,
        "dimensions of a tensor": layout.MAX_DIMENSIONS,
        "weights in a record": layout.MAX_RECORD_WEIGHTS,
        "weights in a segment": layout.MAX_SEGMENT_WEIGHTS,
        "code length": layout.CODE_LIMIT,
        "size of a tile's codes": codes,
    }


@dataclass(frozen=True)
class Row:
    """A dtype in the table of section 1."""

    dtype: str
    code: int
    bits: int
    exponent_bits: int
    mantissa_bits: int
    planes: tuple[int, ...]
    feature: str | None

    def plane_sizes(self, n: int) -> list[int]:
        """Section 5: bytes of each plane of n weights."""
        return [n if bits == 8 else 32 * bits * -(-n // 256) for bits in self.planes]


ROWS = [
    Row(row[0], *map(int, row[1:5]), tuple(map(int, row[5].split(", "))), row[6] or None)
    for row in tables(SECTIONS["1"])[0][1:]
]
LEFT_OUT = {"F32": 2, "F16": 1}


def test_the_dtypes_of_records() -> None:
    declared = [
        Row(kind.dtype, kind.code, 8 * kind.bytes, kind.exponent_bits, kind.mantissa_bits, kind.planes, kind.feature)
        for kind in layout.KINDS.values()
    ]
    assert declared == ROWS
    for row in ROWS:
        assert row.bits == 1 + row.exponent_bits + row.mantissa_bits
        assert sum(row.planes) == 1 + row.mantissa_bits
        assert row.bits == framing.DTYPE_BITS[row.dtype]
    assert "of F32 one or two, of F16 one, of other dtypes none" in flat(SECTIONS["5"])
    assert {kind.dtype: kind.most_left_out for kind in layout.KINDS.values() if kind.most_left_out} == LEFT_OUT


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.dtype)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 8192, 1 << 24])
def test_sizes_of_a_segment(n: int, row: Row) -> None:
    (cell,) = (row[1] for row in tables(SECTIONS["10"])[0] if row[0].startswith("size of a segment"))
    sums = re.findall(r"align16\((.*?)\)", cell.replace(" x ", " * "))
    p = -(-n * sum(row.planes[: len(row.planes) - LEFT_OUT.get(row.dtype, 0)]) // 8)
    kind = layout.KINDS[row.dtype]
    found = tuple(layout.align(int(eval(text, {"n": n, "p": p, "W": row.bits}))) for text in sums)
    assert found == layout.segment_size_range(n, kind)
    assert "segment_size = align16(32 + n x W / 8)" in flat(SECTIONS["5"])
    assert layout.raw_segment_size(n, kind) == layout.align(32 + row.bits // 8 * n)


def test_metadata_keys() -> None:
    keys, members = tables(SECTIONS["3"])
    required = {row[0].strip("`"): row[2] for row in keys[1:]}
    assert required == {**dict.fromkeys(layout.METADATA_KEYS, "yes"), layout.METADATA_MADE_FROM: "no"}
    assert [row[0].strip("`") for row in members[1:]] == ["encoding", "dtype", "shape", "exact", "xxh3"]
    assert f'the version of this document, `"{layout.VERSION}"`, exactly' in keys[1][1]
    assert {row.feature for row in ROWS if row.dtype != "BF16"} == layout.KNOWN_FEATURES
    assert '`"[]"` if all records are BF16' in keys[2][1]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("1", f"**tile**: {layout.TILE_WEIGHTS} weights of a segment"),
        ("1", f"the part of a tile that one thread decodes, {layout.LANE_WEIGHTS} weights"),
        (
            "1",
            f"**chunk**: {layout.CHUNK_WEIGHTS} consecutive weights of a tile, "
            f"{layout.CHUNK_LANE_WEIGHTS} from every lane",
        ),
        ("1", "up to 2^24 consecutive weights"),
        ("2", f"at most {layout.MAX_JSON_HEADER:,}; N bytes of JSON"),
        ("2", f"a list of at most {layout.MAX_DIMENSIONS} sizes"),
        ("2", "is at most 8 x (2^63 - 1)"),
        ("2", f"at most {layout.MAX_JSON_DEPTH} deep"),
        ("3", f"at most {layout.MAX_SOURCE_HEADER_BASE:,} + {layout.MAX_SOURCE_HEADER_RATIO}N"),
        ("10", f"at most {json_text.most_values(0):,} + N / 3 values"),
        ("2", f"multiple of {layout.DATA_ALIGNMENT} in the file"),
        ("2", f"multiple of {layout.RECORD_ALIGNMENT} of the data"),
        ("4", f'`{layout.MAGIC.hex(" ")}` ("{layout.MAGIC.decode()}")'),
        ("4", f"a multiple of {layout.TILE_WEIGHTS}, from {layout.TILE_WEIGHTS} to 2^24"),
        ("4", f"its dtype: 1 to {len(layout.KINDS)}, section 1 |"),
        ("4", f"at offset {layout.RECORD_HEADER.size}: segment_count entries"),
        ("4", f"the first starts at {layout.RECORD_HEADER.size} + {layout.DIRECTORY_ENTRY.size} x segment_count"),
        ("5", f"| encoding | {layout.ENCODING_RAW} | {layout.ENCODING_CODED} + L"),
        ("5", f"T = ceil(n / {layout.TILE_WEIGHTS}) tiles"),
        ("5", f"| {layout.TILE_DESCRIPTOR.size} x T |"),
        ("5", f"| {layout.LANES} x lane_bytes x T |"),
        ("6", f"other lengths are 1 to {layout.CODE_LIMIT}."),
        ("6", f"the sum of 2^({layout.CODE_LIMIT} - length) over all codes is {1 << layout.CODE_LIMIT}"),
        ("7", f"Lane l (0 to {layout.LANES - 1})"),
        ("7", f"in units of {layout.STREAM_UNIT} bytes"),
        ("7", f"the stream has {layout.STREAM_END} bytes of padding"),
        ("7", f"A lane has 4C to {4 * layout.CODE_LIMIT}C bits"),
        ("8", f"bit {8 * layout.STREAM_UNIT} x stream_position"),
    ],
)
def test_constants(section: str, sentence: str) -> None:
    assert sentence in flat(SECTIONS[section])


@pytest.mark.parametrize(
    ("weights", "alphabet", "lane_bytes"), [(2, 1, 1), (8192, 40, 1), (8193, 3, 2), (1 << 21, 256, 2)]
)
@pytest.mark.parametrize(("row", "left_out"), [(row, n) for row in ROWS for n in range(LEFT_OUT.get(row.dtype, 0) + 1)])
def test_sections_of_a_segment(weights: int, alphabet: int, lane_bytes: int, row: Row, left_out: int) -> None:
    # The column "starts at", evaluated as Python.
    names = {"K": alphabet, "n": weights, "T": -(-weights // 8192), "lane_bytes": lane_bytes, "align16": layout.align}
    names["P"] = sum(map(layout.align, row.plane_sizes(weights)[: len(row.planes) - left_out]))
    found = {}
    for _, starts, _ in tables(SECTIONS["5"])[1][2:]:
        name, _, formula = starts.partition(" = ")
        formula = formula.replace("ceil(K x K / 2)", "(K * K + 1) // 2").replace(" x ", " * ")
        found[name] = names[name] = eval(formula, {}, names)
    assert found == layout.segment_sections(weights, alphabet, lane_bytes, layout.KINDS[row.dtype], left_out)


def test_the_cast_names_the_dtypes_of_a_record() -> None:
    assert {"BF16", "F32", "U8"} <= framing.DTYPE_BITS.keys()
    assert "`(u + 0x7FFF + ((u >> 16) & 1)) >> 16`" in flat(SECTIONS["3"])


def test_the_dtypes_and_their_bits() -> None:
    rows = tables(SECTIONS["2"])[0][1:]
    assert {dtype: int(bits) for bits, dtypes in rows for dtype in dtypes.split(", ")} == framing.DTYPE_BITS


def test_the_limit_of_values_is_that_of_the_reader() -> None:
    assert [json_text.most_values(3 * size) - json_text.most_values(0) for size in (1, 10**6)] == [1, 10**6]
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    assert len(entry) - 1 == 51
    assert json_text.count_values(entry[:-1]) == 16


def test_the_python_of_the_specification_decodes() -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS["8"], re.MULTILINE | re.DOTALL)
    assert len(text.splitlines()) < 45
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    for segment, weights in (
        (worked_example.SEGMENT, worked_example.WEIGHTS),
        (forge.coded_segment(worked_example.TWO_TILES, worked_example.THREE), worked_example.TWO_TILES),
        (forge.coded_segment(worked_example.TWO_TILES[-3:], {0x7F7F: 1}), worked_example.TWO_TILES[-3:]),
    ):
        header = layout.SEGMENT_HEADER.unpack(segment)
        k = header["alphabet_size"]
        grid = segment[32 + k : 32 + k + (k * k + 1) // 2]
        lengths = [grid[j // 2] >> 4 * (j % 2) & 15 for j in range(k * k)]
        table = namespace["build_table"](segment[32 : 32 + k], lengths)
        decoded = []
        for tile in range(layout.tile_count(len(weights))):
            values = layout.TILE_DESCRIPTOR.unpack(segment, header["tiles_offset"] + 8 * tile)
            at = header["lanes_offset"] + 32 * tile
            lanes = [values["shortest_lane"] + excess for excess in segment[at : at + 32]]
            at = header["sign_mantissa_offset"] + 8192 * tile
            signs = segment[at : min(at + 8192, header["sign_mantissa_offset"] + len(weights))]
            stream = segment[header["stream_offset"] :]
            position, count = values["stream_position"], values["exception_count"]
            decoded += namespace["decode_tile"](stream, table, position, lanes, count, signs)
        assert decoded == weights


def test_the_stages_are_those_of_the_vectors() -> None:
    stages = [row[0] for row in tables(SECTIONS["15"])[0][1:]]
    assert stages == ["open", "decode a tensor", "decode a range", "restore"]


def test_sections_are_numbered_and_listed() -> None:
    headings = re.findall(r"^## (\d+) (.*)$", SPEC, re.MULTILINE)
    assert [int(place) for place, _ in headings] == list(range(1, len(headings) + 1))
    links = re.findall(r"\[(\d+ [^\]]+)\]\(#([^)]+)\)", SPEC)
    assert links == [(f"{place} {title}", f"{place}-{title.lower().replace(' ', '-')}") for place, title in headings]


def test_sections_referred_to_exist() -> None:
    referred = set(re.findall(r"section (\d+)", SPEC))
    assert referred
    assert referred <= SECTIONS.keys()
    for source in (Path(layout.__file__).parent).glob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert set(re.findall(r"SPEC\.md, sections? (\d+)", text)) <= SECTIONS.keys(), source


def test_the_worked_examples_are_those_in_the_specification() -> None:
    assert SECTIONS["13"].strip() == worked_example.markdown().strip()


def test_the_worked_record_decodes() -> None:
    assert reference.decode_record(worked_example.RECORD) == forge.u16s(worked_example.WEIGHTS)
    assert len(worked_example.markdown().splitlines()) < 140


def test_the_worked_container_decodes() -> None:
    tensors = {"w": forge.u16s(worked_example.WEIGHTS), "n": worked_example.NUMBERS.decoded}
    assert reference.decode_file(worked_example.CONTAINER) == tensors
    assert reference.restore_file(reference.open_file(worked_example.CONTAINER)) is not None


def test_the_worked_tiles_decode() -> None:
    segment = forge.coded_segment(worked_example.TWO_TILES, worked_example.THREE)
    assert reference.decode_segment(segment, len(worked_example.TWO_TILES), layout.BF16) == forge.u16s(
        worked_example.TWO_TILES
    )
