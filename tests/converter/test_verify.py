"""Verification finds every kind of damage and any difference from the source, says where, and exits with 1."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import df11
from df11.formats import errors, layout
from df11.formats.record import header_checksum
from tests.support import commands, sources
from tests.support.sources import SEGMENT, Tensor, bf16, f32, random_tensor

TENSORS = [
    bf16("first", (150, 100), 1),
    Tensor(
        "rare",
        "BF16",
        (9000,),
        np.where(np.arange(9000) % 1000 == 7, 0x7F12, sources.gaussian(9000, 2)).astype("<u2").tobytes(),
    ),
    random_tensor("verbatim", "F16", (400,), 3),
    random_tensor("odd", "U8", (33,), 4),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Bytes of a source and of its container."""
    folder = tmp_path_factory.mktemp("pristine")
    source = sources.write(folder / "x.safetensors", TENSORS, metadata={"format": "pt"})
    df11.convert(source, folder / "x.df11")
    return source.read_bytes(), (folder / "x.df11").read_bytes()


@pytest.fixture
def paths(pristine, tmp_path):
    """The same as files."""
    for name, data in zip(("x.safetensors", "x.df11"), pristine, strict=True):
        (tmp_path / name).write_bytes(data)
    return tmp_path / "x.safetensors", tmp_path / "x.df11"


def place(container: bytes, tensor: str, offset: int = 0) -> int:
    """Where byte ``offset`` of a tensor lies in a container."""
    size = int.from_bytes(container[:8], "little")
    return 8 + size + json.loads(container[8 : 8 + size])[tensor]["data_offsets"][0] + offset


def reframed(container: bytes, change) -> bytes:
    """A container whose header ``change(header)`` has changed, framed as SPEC.md demands."""
    size = int.from_bytes(container[:8], "little")
    header = json.loads(container[8 : 8 + size])
    change(header)
    text = json.dumps(header, ensure_ascii=False).encode()
    return sources.framed(text, container[8 + size :], padding=-(8 + len(text)) % 64)


def refuse(container, code, *words) -> str:
    return commands.run("verify", container).error(code, container, *words)


# Damage to the data. Offsets of fields are those of SPEC.md.

SEGMENT_START = 48 + 32
FIELDS = {
    "magic": 0,
    "record version": 4,
    "record dtype": 5,
    "reserved_0": 6,
    "element_count": 8,
    "record_size": 16,
    "segment_count": 24,
    "segment_elements": 28,
    "header_checksum": 32,
    "reserved_1": 40,
    "directory segment_offset": 48,
    "directory segment_size": 56,
    "directory element_count": 60,
    "stored_checksum": 64,
    "decoded_checksum": 72,
    "segment encoding": SEGMENT_START,
    "lane_bytes": SEGMENT_START + 1,
    "alphabet_size": SEGMENT_START + 2,
    "tiles_offset": SEGMENT_START + 8,
    "stream_offset": SEGMENT_START + 20,
    "exception_count": SEGMENT_START + 28,
    "alphabet": SEGMENT_START + 32,
    "code lengths": SEGMENT_START + 80,
}


@pytest.mark.parametrize("tensor", ["first", "rare"])
@pytest.mark.parametrize("field", FIELDS)
def test_damage_to_a_field_of_a_record_is_found(field, tensor, paths):
    _, container = paths
    data = bytearray(container.read_bytes())
    data[place(data, tensor, FIELDS[field])] ^= 0x04
    container.write_bytes(data)
    refuse(container, 1, f"tensor '{tensor}'", "offset")


@pytest.mark.parametrize("bit", [0, 7])
def test_damage_anywhere_in_the_data_is_found(bit, pristine, paths):
    # Any byte, even padding inside a segment: a checksum covers all of them.
    _, container = paths
    start = 8 + int.from_bytes(pristine[1][:8], "little")
    for offset in np.random.default_rng(bit).integers(start, len(pristine[1]), 150).tolist():
        data = bytearray(pristine[1])
        data[offset] ^= 1 << bit
        container.write_bytes(data)
        with pytest.raises(errors.FormatError) as caught:
            df11.verify(container)
        assert caught.value.file == str(container)
        assert caught.value.tensor in {tensor.name for tensor in TENSORS}


def test_damage_in_a_later_segment_is_found(tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [bf16("w", (2 * SEGMENT + 100_000,))])
    container = tmp_path / "x.df11"
    df11.convert(source, container)
    data = bytearray(container.read_bytes())
    data[-1000] ^= 1
    container.write_bytes(data)
    for jobs in (1, 3):
        commands.run("verify", container, "--jobs", jobs).error(1, container, "'w'")


@pytest.mark.parametrize("tensor", ["verbatim", "odd"])
def test_damage_to_a_verbatim_tensor_is_found(tensor, paths):
    _, container = paths
    data = bytearray(container.read_bytes())
    data[place(data, tensor, 20)] ^= 1
    container.write_bytes(data)
    refuse(container, 1, f"tensor '{tensor}'")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -20, -10_000])
def test_a_truncated_container_is_found(size, paths):
    _, container = paths
    data = container.read_bytes()
    container.write_bytes(data[: size if size >= 0 else len(data) + size])
    refuse(container, 1)


def test_bytes_after_the_end_are_found(paths):
    _, container = paths
    container.write_bytes(container.read_bytes() + b"\0")
    refuse(container, 1)


# Damage to the header.


def metadata(edit):
    """An edit of the metadata."""
    return lambda header: edit(header["__metadata__"])


def member(key, edit):
    """An edit of the JSON that a key of the metadata holds."""

    def whole(header):
        value = json.loads(header["__metadata__"][key])
        edit(value)
        header["__metadata__"][key] = json.dumps(value)

    return whole


def tensors(edit):
    """An edit of df11.tensors."""
    return member("df11.tensors", edit)


def origin(edit):
    """An edit of df11.source."""
    return member("df11.source", edit)


EDITS = {
    "another version": metadata(lambda keys: keys.update({"df11.version": "2"})),
    "version as a word": metadata(lambda keys: keys.update({"df11.version": "one"})),
    "no version": metadata(lambda keys: keys.pop("df11.version")),
    "an unknown feature": metadata(lambda keys: keys.update({"df11.requires": '["frobnication"]'})),
    "features no list": metadata(lambda keys: keys.update({"df11.requires": "{}"})),
    "features no JSON": metadata(lambda keys: keys.update({"df11.requires": "["})),
    "no features": metadata(lambda keys: keys.pop("df11.requires")),
    "no writer": metadata(lambda keys: keys.pop("df11.writer")),
    "no source": metadata(lambda keys: keys.pop("df11.source")),
    "source without sha256": origin(lambda value: value.pop("sha256")),
    "source with another sha256": origin(lambda value: value.update(sha256="0" + value["sha256"][1:])),
    "source with a short sha256": origin(lambda value: value.update(sha256="ab")),
    "source with an unknown cast": origin(lambda value: value.update(cast="fp8")),
    "source of another size": origin(lambda value: value.update(bytes=value["bytes"] + 1)),
    "source with bytes as text": origin(lambda value: value.update(bytes="1")),
    "no source header": metadata(lambda keys: keys.pop("df11.source_header")),
    "source header no base64": metadata(lambda keys: keys.update({"df11.source_header": "???"})),
    "source header cut short": metadata(
        lambda keys: keys.update({"df11.source_header": keys["df11.source_header"][:-8]})
    ),
    "no tensors": metadata(lambda keys: keys.pop("df11.tensors")),
    "tensors no object": metadata(lambda keys: keys.update({"df11.tensors": "[]"})),
    "a tensor less": tensors(lambda value: value.pop("odd")),
    "a tensor more": tensors(lambda value: value.update(new=value["odd"])),
    "an unknown encoding": tensors(lambda value: value["first"].update(encoding="zip")),
    "a record of another shape": tensors(lambda value: value["first"].update(shape=[150, 101])),
    "a record of another dtype": tensors(lambda value: value["first"].update(dtype="F16")),
    "a verbatim tensor of another dtype": tensors(lambda value: value["verbatim"].update(dtype="I16")),
    "exact without a cast": tensors(lambda value: value["first"].update(exact=True)),
    "no checksum of a verbatim tensor": tensors(lambda value: value["odd"].pop("xxh3")),
    "a wrong checksum of a verbatim tensor": tensors(lambda value: value["odd"].update(xxh3="0" * 16)),
    "a record said to be U16": lambda header: header["first"].update(
        dtype="U16", shape=[header["first"]["shape"][0] // 2]
    ),
    "an entry without its data": lambda header: header["odd"].update(shape=[0], data_offsets=[0, 0]),
    "an unknown dtype": lambda header: header["odd"].update(dtype="U7"),
}


def test_the_header_may_be_written_in_another_way(pristine, paths):
    # The basis of the tests below: only what they change makes the difference.
    _, container = paths
    container.write_bytes(
        reframed(pristine[1], metadata(lambda keys: keys.update({"another.key": "x", "df11.writer": "someone else"})))
    )
    assert df11.verify(container, paths[0]).compared


@pytest.mark.parametrize("edit", EDITS)
def test_damage_to_the_header_is_found(edit, pristine, paths):
    _, container = paths
    container.write_bytes(reframed(pristine[1], EDITS[edit]))
    line = refuse(container, 1)
    if edit == "an unknown feature":
        assert "frobnication" in line


def test_a_hash_that_is_not_the_sources_is_found_with_the_source(pristine, paths):
    source, container = paths
    edit = origin(lambda value: value.update(sha256="0" + value["sha256"][1:]))
    container.write_bytes(reframed(pristine[1], edit))
    commands.run("verify", container, "--against", source).error(1, source, "SHA-256 0")


def test_data_that_start_at_an_odd_place_are_refused(pristine, paths):
    _, container = paths
    size = int.from_bytes(pristine[1][:8], "little")
    container.write_bytes(
        (size + 8).to_bytes(8, "little") + pristine[1][8 : 8 + size] + b" " * 8 + pristine[1][8 + size :]
    )
    refuse(container, 1, "64")


def test_no_damage_to_the_header_makes_it_crash(pristine, paths):
    # Not all damage can be found without the source, but nothing except a Df11Error may escape.
    source, container = paths
    size = int.from_bytes(pristine[1][:8], "little")
    found = 0
    for offset in np.random.default_rng(0).integers(0, 8 + size, 300).tolist():
        data = bytearray(pristine[1])
        data[offset] ^= 1 << offset % 8
        container.write_bytes(data)
        try:
            df11.verify(container, source)
        except df11.Df11Error:
            found += 1
    assert found > 150


def test_a_swap_of_names_is_found_with_the_source(tmp_path):
    source = sources.write(
        tmp_path / "s.safetensors", [random_tensor("a", "F16", (64,), 1), random_tensor("b", "F16", (64,), 2)]
    )
    container = tmp_path / "s.df11"
    df11.convert(source, container)

    def swap(header):
        header["a"], header["b"] = header["b"], header["a"]
        tensors(lambda value: value.update(a=value["b"], b=value["a"]))(header)

    container.write_bytes(reframed(container.read_bytes(), swap))
    commands.run("verify", container, "--against", source).error(1, container)
    commands.run("restore", container, tmp_path / "back").error(1, container)


# Compared with the source.


@pytest.mark.parametrize("tensor", ["first", "rare", "verbatim", "odd"])
def test_one_bit_of_the_source_makes_a_difference(tensor, paths):
    source, container = paths
    data = bytearray(source.read_bytes())
    data[place(data, tensor, 32)] ^= 1
    source.write_bytes(data)
    commands.run("verify", container, "--against", source).error(1, f"tensor '{tensor}'")
    commands.run("verify", container).fine()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [3, 100_000], ids=["verbatim", "coded"])
@pytest.mark.parametrize("bit", [0, 17, 31])
def test_one_bit_of_a_source_that_was_cast_makes_a_difference(bit, count, exact, tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [f32("w", (count,), exact=exact)])
    container = tmp_path / "x.df11"
    df11.convert(source, container, cast="bf16")
    assert df11.verify(container, source).compared
    data = bytearray(source.read_bytes())
    data[place(data, "w", 8 + bit // 8)] ^= 1 << bit % 8
    source.write_bytes(data)
    commands.run("verify", container, "--against", source).error(1)


def test_another_header_of_the_source_makes_a_difference(paths):
    source, container = paths
    sources.write(source, TENSORS, metadata={"format": "tf"})
    commands.run("verify", container, "--against", source).error(1, source, "header")


def test_a_source_that_is_missing_or_none(paths, tmp_path):
    source, container = paths
    commands.run("verify", container, "--against", tmp_path / "none.safetensors").error(4, "none.safetensors")
    commands.run("verify", container, "--against", tmp_path).error(2, tmp_path)
    source.write_bytes(source.read_bytes()[:-1])
    result = commands.run("verify", container, "--against", source)
    assert result.code in (1, 2)
    result.error(result.code, source)


def test_a_source_that_changes_while_it_is_compared(paths):
    source, container = paths
    with pytest.raises(errors.ConflictError):
        df11.verify(container, source, on_progress=lambda _: os.utime(source, (1, 1)))


# What it says.


def test_what_verify_reports(paths):
    source, container = paths
    size = sum(len(tensor.data) for tensor in TENSORS)
    report = df11.verify(container)
    assert (report.files, report.tensors, report.bytes, report.compared) == (1, 4, size, False)
    result = commands.run("verify", container, "--against", source, "--json", "--quiet").fine()
    assert not result.err
    assert result.events == [{"event": "done", "files": 1, "tensors": 4, "bytes": size, "compared": True}]


def test_a_tree_is_verified_whole(paths, tmp_path):
    _, container = paths
    for name in ("a", "b/c", "b/d"):
        target = tmp_path / "tree" / f"{name}.df11"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(container.read_bytes())
    (tmp_path / "tree" / "config.json").write_text("{}")
    assert df11.verify(tmp_path / "tree").files == 3
    data = bytearray(container.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    commands.run("verify", tmp_path / "tree").error(1, target)


def test_what_cannot_be_verified(paths, tmp_path):
    source, _ = paths
    (tmp_path / "empty").mkdir()
    commands.run("verify", tmp_path / "none").error(4, "none")
    commands.run("verify", tmp_path / "empty").error(2, "empty")
    commands.run("verify", source).error(1, source, "container")


@pytest.mark.parametrize("with_source", [False, True])
def test_a_wrong_decoded_checksum_is_found(paths, with_source):
    source, container = paths
    data = bytearray(container.read_bytes())
    record = data.index(b"DF11\x01\x01")
    entry = record + layout.RECORD_HEADER.size
    data[entry + 24] ^= 1  # decoded_checksum of the first record's only segment
    checksum = header_checksum(bytes(data[record:entry]), bytes(data[entry : entry + layout.DIRECTORY_ENTRY.size]))
    data[record + 32 : record + 40] = checksum.to_bytes(8, "little")
    container.write_bytes(data)
    with pytest.raises(errors.ChecksumError, match="decoded weights"):
        df11.verify(container, source if with_source else None)


def test_what_people_edit_is_theirs(tmp_path):
    source = tmp_path / "source"
    sources.write(source / "m.safetensors", [bf16("w", (64, 64))])
    for name in ("README.md", ".gitattributes", "config.json"):
        (source / name).write_text("{}")
    df11.convert(source, tmp_path / "t")
    (tmp_path / "t" / "README.md").write_text("mine")
    (tmp_path / "t" / ".gitattributes").unlink()
    df11.verify(tmp_path / "t", source)
    (tmp_path / "t" / "config.json").write_text("mine")
    with pytest.raises(errors.DifferenceError, match="not the file that df11 wrote"):
        df11.verify(tmp_path / "t")
