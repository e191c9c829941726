"""The vectors have not drifted; readers decode what the index says, and refuse broken files with the right error."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest

import df11
from df11.formats import errors, layout, reference
from df11.formats.container import NUMPY_DTYPES, Container
from tests.vectors import generate

INDEX = json.loads((generate.FOLDER / generate.INDEX).read_text(encoding="utf-8"))
GOLDEN = pytest.mark.parametrize("vector", INDEX["golden"], ids=lambda vector: vector["name"])
MUST_FAIL = pytest.mark.parametrize("vector", INDEX["must_fail"], ids=lambda vector: vector["name"])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def path(vector: dict[str, Any], tmp_path: Path) -> Path:
    """The vector's file, uncompressed."""
    stored = generate.FOLDER / vector["file"]
    if stored.suffix != generate.COMPRESSED:
        return stored
    unpacked = tmp_path / stored.stem
    unpacked.write_bytes(generate.read(vector["file"]))
    return unpacked


def hashes(vector: dict[str, Any]) -> dict[str, str]:
    return {name: tensor["sha256"] for name, tensor in vector["tensors"].items()}


def test_no_drift() -> None:
    files = generate.build()
    assert generate.stored() == files.keys()
    for path, data in files.items():
        assert generate.read(path) == data, path


def test_the_vectors_are_small() -> None:
    assert sum((generate.FOLDER / path).stat().st_size for path in generate.stored()) < 1_200_000


@GOLDEN
def test_reference(vector: dict[str, Any], path: Path) -> None:
    data = path.read_bytes()
    assert sha256(data) == vector["sha256"]
    assert {name: sha256(tensor) for name, tensor in reference.decode_file(data).items()} == hashes(vector)
    restored = reference.restore_file(reference.open_file(data))
    assert (restored is not None) == vector["source"]["restorable"]
    assert restored is None or sha256(restored) == vector["source"]["sha256"]


@GOLDEN
def test_container(vector: dict[str, Any], path: Path) -> None:
    with df11.open(path) as container:
        assert {name: sha256(container.tensor(name).tobytes()) for name in container.keys()} == hashes(vector)
        assert {entry.name for entry in container.source_header.entries} == vector["tensors"].keys()
        for name, tensor in vector["tensors"].items():
            info = container.info(name)
            assert (info.dtype, list(info.shape)) == (tensor["dtype"], tensor["shape"])
        assert container.source.sha256 == vector["source"]["sha256"]


@GOLDEN
def test_rows(vector: dict[str, Any], path: Path) -> None:
    with df11.open(path) as container:
        for name in container.keys():
            info = container.info(name)
            if not info.shape or info.dtype not in NUMPY_DTYPES:
                continue
            count = info.shape[0]
            cuts = sorted({0, min(1, count), count // 3, count - count // 5, count})
            parts = b"".join(container.rows(name, first, last).tobytes() for first, last in itertools.pairwise(cuts))
            assert sha256(parts) == hashes(vector)[name]


@GOLDEN
def test_restore(vector: dict[str, Any], path: Path, tmp_path: Path) -> None:
    target = tmp_path / "restored.safetensors"
    if not vector["source"]["restorable"]:
        with pytest.raises(errors.UsageError, match="cannot be restored"):
            df11.restore(path, target)
        return
    df11.restore(path, target)
    assert sha256(target.read_bytes()) == vector["source"]["sha256"]


@MUST_FAIL
def test_must_fail(vector: dict[str, Any], path: Path, tmp_path: Path) -> None:
    assert sha256(path.read_bytes()) == vector["sha256"]
    stage = "open"
    with pytest.raises(errors.Df11Error) as caught, Container(path) as container:
        stage = "decode"
        for name in container.keys():
            container.tensor(name)
        stage = "restore"
        df11.restore(path, tmp_path / "restored.safetensors")
    assert type(caught.value).__name__ == vector["error"]
    stages = ["open", "decode", "restore"]
    assert stages.index(stage) <= stages.index(vector["stage"])
    assert str(path) in str(caught.value)


def refusal(data: bytes) -> str | None:
    """The first rule that the reference decoder finds broken, if any."""
    try:
        container = reference.open_file(data)
        for name in container.entries.keys() & container.tensors.keys():
            reference.decode_tensor(container, name)
        reference.restore_file(container)
    except errors.FormatError as error:
        return error.what.removeprefix("reference decoder: ")
    return None


SOURCE = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))


def rules(function: str) -> set[str]:
    """The names of the rules that the reference decoder checks with a function; parts that vary are asterisks."""
    found = set()
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            rule = node.args[1]
            parts = rule.values if isinstance(rule, ast.JoinedStr) else [rule]
            found.add("".join(part.value if isinstance(part, ast.Constant) else "*" for part in parts))
    return found


@MUST_FAIL
def test_no_must_fail_file_breaks_another_rule(
    vector: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = path.read_bytes()
    assert refusal(data) == vector["rule"]
    if vector["rule"] in rules("require"):
        monkeypatch.setattr(reference, "ignored", {vector["rule"]})
        assert refusal(data) is None
    else:  # Nothing more can be read. All that can be before was right.
        assert any(fnmatch.fnmatchcase(vector["rule"], rule) for rule in rules("demand"))


def test_every_rule_has_a_must_fail_file() -> None:
    broken = {vector["rule"] for vector in INDEX["must_fail"]}
    assert rules("require") <= broken
    # What no file can break, other rules being kept: without its size, "the bits are codes" follows from completeness.
    unbroken = {rule for rule in rules("demand") if not fnmatch.filter(broken, rule)}
    assert unbroken == {"the bits are codes", "a segment holds its header"}


def test_every_error_of_files_has_a_must_fail_vector() -> None:
    def leaves(error: type[errors.Df11Error]) -> set[str]:
        below = error.__subclasses__()
        return set().union(*map(leaves, below)) if below else {error.__name__}

    told = {vector["error"] for vector in INDEX["must_fail"]}
    assert told == leaves(errors.SafetensorsError) | leaves(errors.FormatError) | {"DifferenceError"}


def test_the_golden_files_have_what_decoders_must_know(tmp_path: Path) -> None:
    headers: list[dict[str, int]] = []
    lengths: set[int] = set()
    exceptions: set[tuple[bool, bool]] = set()
    tiles: list[dict[str, int]] = []
    segments: set[int] = set()
    for vector in INDEX["golden"]:
        path = tmp_path / "golden.df11"
        path.write_bytes(generate.read(vector["file"]))
        with df11.open(path) as container:
            for name in container.keys():
                if container.info(name).encoding == "verbatim":
                    continue
                record = container.record(name)
                segments.add(len(record.segments))
                for index in range(len(record.segments)):
                    segment = record.read_segment(index)
                    headers.append(segment.header)
                    if segment.coded:
                        size = segment.header["alphabet_size"]
                        table = segment.data[32 + size : 32 + size + (size * size + 1) // 2]
                        lengths |= {int(byte) & 15 for byte in table} | {int(byte) >> 4 for byte in table}
                        exceptions |= exception_kinds(segment.data.tobytes(), segment.header)
                        start = segment.header["tiles_offset"]
                        ends = start + 8 * layout.tile_count(segment.entry.elements)
                        tiles += [layout.TILE_DESCRIPTOR.unpack(segment.data, at) for at in range(start, ends, 8)]
    assert {header["encoding"] for header in headers} == {0, 1, 2, 3}
    assert {header["lane_bytes"] for header in headers} == {0, 1, 2}
    assert {1, 2, 3, 64, 256} <= {header["alphabet_size"] for header in headers}
    assert {count % 2 for count in (header["element_count"] for header in headers)} == {0, 1}
    assert lengths == set(range(13))
    assert max(tile["stream_position"] for tile in tiles) > 0xFFFF
    assert {0, 300, layout.TILE_WEIGHTS} <= {tile["exception_count"] for tile in tiles}
    assert max(segments) > 5
    assert exceptions == {(True, False), (False, True), (True, True)}


def exception_kinds(segment: bytes, header: dict[str, int]) -> set[tuple[bool, bool]]:
    # Which weights of a pair are exceptions, over all pairs that have any.
    kinds = set()
    for tile in range(layout.tile_count(header["element_count"])):
        descriptor = layout.TILE_DESCRIPTOR.unpack(segment, header["tiles_offset"] + 8 * tile)
        at = header["lanes_offset"] + 32 * header["lane_bytes"] * tile
        excess = (
            sum(segment[at : at + 32]) if header["lane_bytes"] == 1 else sum(struct.unpack_from("<32H", segment, at))
        )
        start = (
            header["stream_offset"]
            + 16 * descriptor["stream_position"]
            + -(-(32 * descriptor["shortest_lane"] + excess) // 32) * 4
        )
        positions = {
            layout.EXCEPTION.unpack(segment, start + 4 * i)["position"] for i in range(descriptor["exception_count"])
        }
        kinds |= {(first in positions, first + 1 in positions) for first in {position & ~1 for position in positions}}
    return kinds
