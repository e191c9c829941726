"""The way back: the source file byte for byte, or an error and no file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors

import df11
from df11.formats import errors
from tests.support import commands, sources
from tests.support.sources import SEGMENT, Tensor, bf16, f32, random_tensor, tree_bytes


@pytest.fixture
def source(tmp_path):
    """A source with tensors of all kinds."""
    return sources.write(
        tmp_path / "x.safetensors", [bf16("a", (300, 100)), f32("b", (60, 60), 1), random_tensor("c", "U8", (7,), 2)]
    )


@pytest.fixture
def container(source, tmp_path):
    """The container of that source."""
    df11.convert(source, tmp_path / "x.df11")
    return tmp_path / "x.df11"


def test_the_report_says_what_was_written(source, container, tmp_path):
    (file,) = df11.restore(container, tmp_path / "y.safetensors").files
    assert (file.source, file.output) == (str(container), str(tmp_path / "y.safetensors"))
    assert (file.bytes, file.sha256) == (source.stat().st_size, sources.sha256(source))
    assert (file.bf16, file.status) == (False, "restored")


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("cast", [None, "bf16"])
def test_any_number_of_jobs_gives_the_source(jobs, cast, tmp_path):
    tensors = [
        random_tensor("odd", "U8", (5,)),
        f32("f", (2 * SEGMENT + 7,), exact=True),
        bf16("b", (2 * SEGMENT + 9,), 1),
        f32("g", (3,), 2, exact=True),
    ]
    source = sources.write(tmp_path / "x.safetensors", tensors)
    df11.convert(source, tmp_path / "x.df11", cast=cast)
    df11.restore(tmp_path / "x.df11", tmp_path / "y.safetensors", threads=jobs)
    assert sources.sha256(tmp_path / "y.safetensors") == sources.sha256(source)


def test_restore_makes_the_folders_above(source, container, tmp_path):
    df11.restore(container, tmp_path / "a" / "b" / "y.safetensors")
    assert (tmp_path / "a" / "b" / "y.safetensors").read_bytes() == source.read_bytes()


def test_what_is_there_and_right_is_left_alone(source, container, tmp_path):
    target = tmp_path / "y.safetensors"
    target.write_bytes(source.read_bytes())
    before = target.stat()
    (file,) = df11.restore(container, target).files
    assert (file.status, file.sha256) == ("skipped", sources.sha256(source))
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_there_and_wrong_is_only_replaced_by_force(source, container, tmp_path):
    target = tmp_path / "y.safetensors"
    target.write_bytes(b"mine")
    commands.run("restore", container, target).error(2, target, "--force")
    assert target.read_bytes() == b"mine"
    commands.run("restore", container, target, "--force").fine()
    assert target.read_bytes() == source.read_bytes()


# A cast that changed values.


def cast_file(tmp_path, metadata):
    tensors = [
        random_tensor("bytes", "U8", (5,), 1),
        f32("exact", (70, 70), 2, exact=True),
        f32("rounded", (SEGMENT + 33,), 3),
        Tensor("nan", "F32", (3,), np.array([0x7FC00000, 0xFFC00001, 0x3F800000], "<u4").tobytes()),
        bf16("weight", (90, 90), 4),
        random_tensor("random", "F32", (999,), 5),
        f32("none", (0, 4), 6),
        f32("scalar", (), 7),
        random_tensor("ids", "I64", (3, 3), 8),
    ]
    source = sources.write(tmp_path / "x.safetensors", tensors, metadata=metadata, padding=1)
    df11.convert(source, tmp_path / "x.df11", cast="bf16")
    return tensors


def test_what_was_rounded_cannot_be_restored(tmp_path):
    cast_file(tmp_path, None)
    line = commands.run("restore", tmp_path / "x.df11", tmp_path / "y.safetensors").error(
        2, tmp_path / "x.df11", "--bf16"
    )
    assert any(f"'{name}'" in line for name in ("rounded", "nan", "random", "scalar"))
    assert not any(f"'{name}'" in line for name in ("exact", "bytes", "weight", "none", "ids"))
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ключ": "значення"}])
def test_what_was_rounded_can_be_written_as_bf16(metadata, tmp_path):
    tensors = cast_file(tmp_path, metadata)
    target = tmp_path / "y.safetensors"
    (file,) = df11.restore(tmp_path / "x.df11", target, bf16=True).files
    assert (file.bf16, file.bytes, file.sha256) == (True, target.stat().st_size, sources.sha256(target))
    data = target.read_bytes()
    stock = dict(safetensors.deserialize(data))
    assert set(stock) == {tensor.name for tensor in tensors}
    for tensor in tensors:
        cast = tensor.dtype == "F32"
        assert stock[tensor.name]["dtype"] == ("BF16" if cast else tensor.dtype)
        assert stock[tensor.name]["shape"] == list(tensor.shape)
        assert bytes(stock[tensor.name]["data"]) == (sources.round_to_bf16(tensor.data) if cast else tensor.data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.get("__metadata__") == metadata
    # It is a good source in turn.
    df11.convert(target, tmp_path / "z.df11")
    df11.restore(tmp_path / "z.df11", tmp_path / "z.safetensors")
    assert (tmp_path / "z.safetensors").read_bytes() == data


def test_bf16_makes_no_difference_where_nothing_was_lost(source, container, tmp_path):
    (file,) = df11.restore(container, tmp_path / "y.safetensors", bf16=True).files
    assert not file.bf16
    assert (tmp_path / "y.safetensors").read_bytes() == source.read_bytes()


def test_a_tree_in_which_one_file_was_rounded_is_not_touched(tmp_path):
    sources.write(tmp_path / "model" / "a.safetensors", [bf16("a", (900,))])
    sources.write(tmp_path / "model" / "b.safetensors", [f32("b", (900,))])
    df11.convert(tmp_path / "model", tmp_path / "out", cast="bf16")
    commands.run("restore", tmp_path / "out", tmp_path / "back").error(2, "b.df11", "'b'", "--bf16")
    assert not (tmp_path / "back").exists()
    commands.run("restore", tmp_path / "out", tmp_path / "back", "--bf16").fine()
    assert (tmp_path / "back" / "a.safetensors").read_bytes() == (tmp_path / "model" / "a.safetensors").read_bytes()
    assert set(tree_bytes(tmp_path / "back")) == {"a.safetensors", "b.safetensors"}


# A container that is not what it says.


def test_a_wrong_hash_of_the_source_is_found(container, tmp_path):
    data = container.read_bytes()
    with df11.open(container) as opened:
        digest = opened.source.sha256.encode()
    assert data.count(digest) == 1
    container.write_bytes(data.replace(digest, digest[::-1]))
    commands.run("restore", container, tmp_path / "y.safetensors").error(
        1, container, digest[::-1].decode(), digest.decode()
    )
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11"}


@pytest.mark.parametrize("place", ["record", "verbatim"])
def test_damage_is_found_and_nothing_is_written(place, container, tmp_path):
    data = bytearray(container.read_bytes())
    data[{"record": data.index(b"DF11") + 5000, "verbatim": -3}[place]] ^= 0x10
    container.write_bytes(data)
    target = tmp_path / "y.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(errors.ChecksumError) as caught:
        df11.restore(container, target, force=True)
    assert caught.value.tensor == {"record": "a", "verbatim": "c"}[place]
    assert target.read_bytes() == b"mine"
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11", "y.safetensors"}


def test_a_file_that_is_no_container_is_refused(source, tmp_path):
    commands.run("restore", source, tmp_path / "y.safetensors").error(2, source)
    commands.run("restore", tmp_path / "none.df11", tmp_path / "y.safetensors").error(4, "none.df11")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


def test_json_says_what_was_restored(source, container, tmp_path):
    result = commands.run("restore", container, tmp_path / "y.safetensors", "--json", "--quiet").fine()
    assert not result.err
    file, done = result.events
    assert file["event"] == "file"
    assert (file["output"], file["bytes"], file["sha256"]) == (
        str(tmp_path / "y.safetensors"),
        source.stat().st_size,
        sources.sha256(source),
    )
    assert (done["event"], done["files"], done["bytes"]) == ("done", 1, source.stat().st_size)


def test_a_container_that_changes_before_it_is_read_is_noticed(container, tmp_path):
    other = tmp_path / "other.df11"
    df11.convert(sources.write(tmp_path / "other.safetensors", [bf16("w", (7, 9))]), other)
    with pytest.raises(errors.ConflictError, match="changed since the run began"):
        df11.restore(container, tmp_path / "back", on_total=lambda _: other.replace(container))
    assert not (tmp_path / "back").exists()


def test_what_was_restored_needs_its_container_no_longer(source, container, tmp_path):
    size = source.stat().st_size
    done = []

    def progress(count):
        done.append(count)
        if sum(done) == size:
            container.unlink()

    report = df11.restore(container, tmp_path / "back", on_progress=progress)
    assert report.files[0].status == "restored"
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert not container.exists()
