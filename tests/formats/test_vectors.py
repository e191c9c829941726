"""The vectors: they have not drifted, every reader gives what the index says, and every broken file is refused with the error that it should."""

from __future__ import annotations

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


def path_of(kind: str, vector: dict[str, Any]) -> Path:
    return generate.FOLDER / kind / f"{vector['name']}.df11"


def test_no_drift() -> None:
    files = generate.build()
    assert generate.stored() == files.keys()
    for path, data in files.items():
        assert (generate.FOLDER / path).read_bytes() == data, path


def test_the_vectors_are_small() -> None:
    assert sum((generate.FOLDER / path).stat().st_size for path in generate.stored()) < 600_000


@GOLDEN
def test_reference(vector: dict[str, Any]) -> None:
    data = path_of("golden", vector).read_bytes()
    assert sha256(data) == vector["sha256"]
    assert {name: sha256(tensor) for name, tensor in reference.decode_file(data).items()} == vector["tensors"]


@GOLDEN
def test_container(vector: dict[str, Any]) -> None:
    with df11.open(path_of("golden", vector)) as container:
        assert {name: sha256(container.tensor(name).tobytes()) for name in container.keys()} == vector["tensors"]
        assert {entry.name for entry in container.source_header.entries} == vector["tensors"].keys()


@GOLDEN
def test_rows(vector: dict[str, Any]) -> None:
    with df11.open(path_of("golden", vector)) as container:
        for name in container.keys():
            info = container.info(name)
            if not info.shape or info.dtype not in NUMPY_DTYPES:
                continue
            count = info.shape[0]
            cuts = sorted({0, min(1, count), count // 3, count - count // 5, count})
            parts = b"".join(container.rows(name, first, last).tobytes() for first, last in itertools.pairwise(cuts))
            assert sha256(parts) == vector["tensors"][name]


@GOLDEN
def test_restore(vector: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "restored.safetensors"
    with df11.open(path_of("golden", vector)) as container:
        expected = container.source.sha256
        inexact = any(container.info(name).exact is False for name in container.keys())
    if inexact:
        with pytest.raises(errors.UsageError, match="cannot be written back"):
            df11.restore(path_of("golden", vector), target)
        return
    df11.restore(path_of("golden", vector), target)
    assert sha256(target.read_bytes()) == expected


@MUST_FAIL
def test_must_fail(vector: dict[str, Any]) -> None:
    path = path_of("must_fail", vector)
    assert sha256(path.read_bytes()) == vector["sha256"]
    with pytest.raises(errors.Df11Error) as caught, Container(path) as container:
        container.source_header  # noqa: B018 - read and checked when first asked for
        for name in container.keys():
            container.tensor(name)
    assert type(caught.value).__name__ == vector["error"]
    assert str(path) in str(caught.value)


@MUST_FAIL
def test_must_fail_in_the_reference(vector: dict[str, Any]) -> None:
    # It looks at the rules of records; of the rest, at what it needs.
    data = path_of("must_fail", vector).read_bytes()
    if vector["reference"]:
        with pytest.raises((errors.FormatError, ValueError, KeyError, TypeError, AttributeError, struct.error)):
            reference.decode_file(data)
    else:
        reference.decode_file(data)


def test_every_error_of_files_has_a_must_fail_vector() -> None:
    def leaves(error: type[errors.Df11Error]) -> set[str]:
        below = error.__subclasses__()
        return set().union(*map(leaves, below)) if below else {error.__name__}

    assert {vector["error"] for vector in INDEX["must_fail"]} == leaves(errors.SafetensorsError) | leaves(
        errors.FormatError
    )


def test_the_golden_files_have_what_decoders_must_know() -> None:
    headers: list[dict[str, int]] = []
    lengths: set[int] = set()
    exceptions: set[tuple[bool, bool]] = set()
    for vector in INDEX["golden"]:
        with df11.open(path_of("golden", vector)) as container:
            for name in container.keys():
                if container.info(name).encoding == "verbatim":
                    continue
                record = container.record(name)
                for index in range(len(record.segments)):
                    segment = record.read_segment(index)
                    headers.append(segment.header)
                    if segment.coded:
                        size = segment.header["alphabet_size"]
                        table = segment.data[32 + size : 32 + size + (size * size + 1) // 2]
                        lengths |= {int(byte) & 15 for byte in table} | {int(byte) >> 4 for byte in table}
                        exceptions |= exception_kinds(segment.data.tobytes(), segment.header)
    assert {header["encoding"] for header in headers} == {0, 1}
    assert {header["lane_bytes"] for header in headers} == {0, 1, 2}
    assert {1, 2, 3, 64, 256} <= {header["alphabet_size"] for header in headers}
    assert {count % 2 for count in (header["element_count"] for header in headers)} == {0, 1}
    assert lengths == set(range(13))
    assert exceptions == {(True, False), (False, True), (True, True)}


def exception_kinds(segment: bytes, header: dict[str, int]) -> set[tuple[bool, bool]]:
    # Which weights of a pair are exceptions, over all pairs with any.
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
