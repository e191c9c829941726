"""The manifest of a converted folder: the same however it was made, made again if it does not fit, and small."""

from __future__ import annotations

from dataclasses import replace

import pytest

import df11
from df11.converter import apply, parquet, work
from df11.converter.manifest import FILE_NAME, TOOL, FileRow, Origin
from df11.converter.scan import scan
from df11.formats import errors
from df11.storage.store import open_source
from tests.support import commands, sources
from tests.support.conversions import convert, file_row
from tests.support.manifests import with_file

ORIGIN = Origin("owner/name", "0" * 40, "sub/folder")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source of four shards and two other files, the folder converted from it, and its manifest; read-only."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for name, kind in {"a": "every dtype, large", "b": "shapes, scalar and empty", "c": "no tensors"}.items():
        (source / f"{name}.safetensors").write_bytes(sources.KINDS[kind]())
    sources.write(source / "d.safetensors", [sources.bf16("big", (3 * sources.SEGMENT // 2,), 3)])
    (source / "sub").mkdir()
    (source / "sub" / "config.json").write_bytes(b'{"a": 1}')
    (source / "d.safetensors.index.json").write_bytes(b'{"weight_map": {"big": "d.safetensors"}}')
    df11.convert(source, out, cast="bf16")
    return source, out, parquet.read(out)


@pytest.fixture
def copied(tree, tmp_path):
    """A copy of the converted folder, with its manifest."""
    folder = tmp_path / "copied"
    for name, data in sources.tree_bytes(tree[1]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def scanned(monkeypatch):
    """The files whose rows are made from their containers, as it happens."""
    names: list[str] = []
    monkeypatch.setattr(work, "scan", lambda path, file, **options: names.append(file) or scan(path, file, **options))
    return names


# What is in it.


def test_it_says_what_the_containers_hold(tree):
    source, folder, manifest = tree
    assert (manifest.origin, manifest.cast, manifest.tool) == (Origin(), "bf16", TOOL)
    assert [file.file for file in manifest.files] == ["a.df11", "b.df11", "c.df11", "d.df11"]
    for file in manifest.files:
        path = source / file.source_file
        assert file.source_file == file.file.replace(".df11", ".safetensors")
        assert (file.bytes, file.sha256) == ((folder / file.file).stat().st_size, None)
        assert (file.source_bytes, file.source_sha256) == (path.stat().st_size, sources.sha256(path))
        assert manifest.rows_of(file.file) == scan(folder / file.file, file.file, threads=2)
    assert len(manifest.tensors) == sum(len(manifest.rows_of(file.file)) for file in manifest.files)


def test_rows_are_those_of_the_converter(tree, tmp_path):
    source, _, manifest = tree
    for name in "abcd":
        done = convert(tmp_path, name, (source / f"{name}.safetensors").read_bytes(), cast="bf16")
        assert done.tensors == manifest.rows_of(f"{name}.df11")
        assert file_row(done) in manifest.files


def test_where_the_source_came_from(hub, client, tmp_path):
    del client
    path = sources.write(tmp_path / "x.safetensors", [sources.bf16("a", (100,))])
    head = hub.create("me/m").commit({"sub/x.safetensors": path})
    assert Origin.of(open_source("hf://me/m/sub")) == Origin("me/m", head, "sub", private=False)
    assert Origin.of(open_source(tmp_path)) == Origin()
    df11.convert("hf://me/m/sub", tmp_path / "out")
    assert parquet.read(tmp_path / "out").origin == Origin("me/m", head, "sub", private=False)


# The same, however it was made.


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 7}, {"max_memory": "1GiB", "verify": False}])
def test_the_same_bytes_whatever_the_options(options, tree, tmp_path):
    source, folder, _ = tree
    df11.convert(source, tmp_path / "out", cast="bf16", **options)
    assert sources.tree_bytes(tmp_path / "out") == sources.tree_bytes(folder)


@pytest.mark.parametrize("lost", [[], ["b.df11"], ["a.df11", "d.df11"], ["sub/config.json"], ["d.df11.index.json"]])
@pytest.mark.parametrize("manifest", ["there", "lost", "damaged"])
def test_the_same_bytes_whatever_was_there(lost, manifest, tree, copied):
    source, folder, _ = tree
    for name in lost:
        (copied / name).unlink()
    if manifest == "lost":
        (copied / FILE_NAME).unlink()
    if manifest == "damaged":
        (copied / FILE_NAME).write_bytes((folder / FILE_NAME).read_bytes()[:-1])
    report = df11.convert(source, copied, cast="bf16", threads=2)
    assert [file.status for file in report.files] == [
        "converted" if f"{name}.df11" in lost else "skipped" for name in "abcd"
    ]
    assert sources.tree_bytes(copied) == sources.tree_bytes(folder)


def test_it_is_written_only_if_it_changes(tree, copied):
    before = (copied / FILE_NAME).stat()
    df11.convert(tree[0], copied, cast="bf16")
    after = (copied / FILE_NAME).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_finished_files_are_decoded_only_without_a_manifest(tree, copied, scanned):
    (copied / FILE_NAME).unlink()
    df11.convert(tree[0], copied, cast="bf16")
    assert scanned == ["a.df11", "b.df11", "c.df11", "d.df11"]
    assert parquet.read(copied) == tree[2]
    scanned.clear()
    df11.convert(tree[0], copied, cast="bf16")
    assert scanned == []
    assert parquet.read(copied) == tree[2]


def test_a_manifest_of_another_conversion_is_not_trusted(tree, copied, tmp_path, scanned):
    source, _, manifest = tree
    other = convert(
        tmp_path, "a", sources.file_bytes([sources.bf16("big", (3 * sources.SEGMENT // 2,), 4)]), cast="bf16"
    )
    forged = with_file(manifest, replace(file_row(other), file="d.df11"), other.tensors)
    assert forged != manifest
    (copied / FILE_NAME).write_bytes(parquet.to_bytes(forged))
    df11.convert(source, copied, cast="bf16")
    assert parquet.read(copied) == manifest
    assert scanned == ["d.df11"]


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 1},
        {"source_file": "other.safetensors"},
        {"source_bytes": 1},
        {"source_sha256": "0" * 64},
    ],
    ids=str,
)
def test_a_file_that_is_described_otherwise_is_not_trusted(change, tree, copied):
    # Such as a row of a shard with the same tensors and another header.
    source, _, manifest = tree
    row = next(file for file in manifest.files if file.file == "d.df11")
    forged = with_file(manifest, replace(row, **change), manifest.rows_of("d.df11"))
    (copied / FILE_NAME).write_bytes(parquet.to_bytes(forged))
    df11.convert(source, copied, cast="bf16")
    assert parquet.read(copied) == manifest


def test_a_folder_of_its_name_is_in_the_way(tree, copied):
    (copied / FILE_NAME).unlink()
    (copied / FILE_NAME).mkdir()
    with pytest.raises(errors.Df11Error) as caught:
        df11.convert(tree[0], copied, cast="bf16")
    assert caught.value.file == str(copied / FILE_NAME)


@pytest.mark.parametrize("name", ["a\udcff.safetensors", "b\udcff.txt", "c\udcff/d.json"])
def test_names_that_are_not_utf8(name, tmp_path):
    source = sources.write(tmp_path / "source" / "a.safetensors", [sources.bf16("a", (10,))]).parent
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes((source / "a.safetensors").read_bytes())
    line = commands.run("convert", source, tmp_path / "out").error(2, "not UTF-8", ascii(name)[1:-1], "--exclude")
    assert line.isascii()
    assert not (tmp_path / "out").exists()
    commands.run("convert", source, tmp_path / "out", "--exclude", name).fine()
    assert [file.file for file in parquet.read(tmp_path / "out").files] == ["a.df11"]


def test_names_that_no_file_can_have(tree, copied):
    source, _, manifest = tree
    row = FileRow("x-ud800-.df11", 1, None, "x.safetensors", 1, "0" * 64)
    data = parquet.to_bytes(with_file(manifest, row, ())).replace(b"x-ud800-", b"x\\ud800 ")  # JSON's escape.
    (copied / FILE_NAME).write_bytes(data)
    with pytest.raises(errors.ManifestError, match="Unicode"):
        parquet.read(copied)
    df11.convert(source, copied, cast="bf16")
    assert parquet.read(copied).files == manifest.files


def test_the_same_command_makes_a_lost_manifest_again(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name, kind in (("a", "every dtype, large"), ("sub/b", "many segments")):
        path = source / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sources.KINDS[kind]())
    commands.run("convert", source, target, "--cast", "bf16", "--threads", "2").fine()
    data = (target / FILE_NAME).read_bytes()
    manifest = parquet.from_bytes(data, target)
    assert (manifest.origin, manifest.cast) == (Origin(), "bf16")
    assert [(file.file, file.source_file) for file in manifest.files] == [
        ("a.df11", "a.safetensors"),
        ("sub/b.df11", "sub/b.safetensors"),
    ]
    for lost in ([FILE_NAME], ["sub/b.df11"], [FILE_NAME, "a.df11"], [], None):
        if lost is None:
            (target / FILE_NAME).write_bytes(data[:-10])
        for name in lost or []:
            (target / name).unlink()
        commands.run("convert", source, target, "--cast", "bf16", "--threads", "1").fine()
        assert (target / FILE_NAME).read_bytes() == data


# Files beside the containers.


def test_it_names_the_files_that_were_written(tree):
    _, folder, manifest = tree
    written = ["d.df11.index.json", "sub/config.json"]
    assert manifest.others == tuple((name, sources.sha256(folder / name)) for name in written)
    assert {*written, FILE_NAME, *(file.file for file in manifest.files)} == set(sources.tree_bytes(folder))


def test_what_is_still_as_it_was_written_may_be_replaced(tmp_path):
    source = sources.write(tmp_path / "source" / "x.safetensors", [sources.bf16("a", (100,))]).parent
    config, out = source / "config.json", tmp_path / "out"
    config.write_bytes(b"1")
    out.mkdir()
    (out / "mine.txt").write_bytes(b"mine")
    df11.convert(source, out)
    assert [name for name, _ in parquet.read(out).others] == ["config.json"]
    config.write_bytes(b"2")
    df11.convert(source, out)
    assert (out / "config.json").read_bytes() == b"2"
    assert parquet.read(out).others == (("config.json", sources.sha256(config)),)
    # What somebody has edited or written may not, unless it equals the source.
    (out / "config.json").write_bytes(b"3")
    config.write_bytes(b"4")
    with pytest.raises(errors.UsageError, match="already exists") as caught:
        df11.convert(source, out)
    assert caught.value.file == str(out / "config.json")
    assert (out / "config.json").read_bytes() == b"3"
    config.write_bytes(b"3")
    df11.convert(source, out)
    assert parquet.read(out).others == (("config.json", sources.sha256(config)),)
    # The same after a run that was killed before it could write its manifest: the next change needs no force.
    config.write_bytes(b"5")
    df11.convert(source, out)
    assert (out / "config.json").read_bytes() == b"5"
    (source / "mine.txt").write_bytes(b"theirs")
    with pytest.raises(errors.UsageError, match="already exists"):
        df11.convert(source, out)
    df11.convert(source, out, force=True)
    assert [name for name, _ in parquet.read(out).others] == ["config.json", "mine.txt"]


def test_a_forged_manifest_is_one_line(tree, copied):
    source, folder, manifest = tree
    before = sources.tree_bytes(folder.parent)
    data = parquet.to_bytes(replace(manifest, others=(("sub/config.json", "0" * 64),)))
    for name in (b"../a/config.jsn", b"/tmp/config.jso", b"sub/../config.j"):
        assert len(name) == len(b"sub/config.json")
        with pytest.raises(errors.ManifestError, match="relative"):
            parquet.from_bytes(data.replace(b"sub/config.json", name), "x")
        (copied / FILE_NAME).write_bytes(data.replace(b"sub/config.json", name))
        df11.convert(source, copied, cast="bf16")  # Makes it again.
        assert parquet.read(copied) == manifest
    assert sources.tree_bytes(folder.parent) == before


# What needs no file.


def test_files_of_a_manifest(tree):
    _, _, manifest = tree
    known = manifest.by_file()
    assert list(known) == [file.file for file in manifest.files]
    assert [known[name][1] for name in known] == [manifest.rows_of(name) for name in known]
    backwards = manifest.holding(reversed(known.values()))
    assert [file.file for file in backwards.files] == ["d.df11", "c.df11", "b.df11", "a.df11"]
    assert backwards.by_file() == known
    assert backwards.holding(known.values()) == manifest
    assert manifest.holding([known["b.df11"]]).tensors == manifest.rows_of("b.df11")
    assert manifest.holding(()) == replace(manifest, files=(), tensors=())
    assert manifest.rows_of("nothing") == ()


@pytest.mark.parametrize(("every", "count"), [(256 << 20, 2), (1, 11), (3000, 7)])
def test_it_is_written_now_and_then(every, count, tmp_path, monkeypatch):
    for seed in range(12):
        sources.write(tmp_path / "source" / f"{seed:02}.safetensors", [sources.bf16("a", (1000,), seed)])
    written, to_bytes = [], parquet.to_bytes

    def counted(manifest):
        written.append(len(manifest.files))
        return to_bytes(manifest)

    monkeypatch.setattr(apply, "MANIFEST_EVERY", every)
    monkeypatch.setattr(parquet, "to_bytes", counted)
    df11.convert(tmp_path / "source", tmp_path / "out")
    assert 1500 < (tmp_path / "out" / "00.df11").stat().st_size < 3000
    assert (len(written), written[-1]) == (count, 12)


# Memory, and what is imported.


@pytest.mark.slow
def test_memory_of_many_tensors(tmp_path):
    count = 15_000
    folder, source, target = tmp_path / "source", tmp_path / "source" / "x.safetensors", tmp_path / "x.df11"
    sources.write(source, [sources.Tensor(str(index), "BF16", (1,), b"\x80\x3f") for index in range(count)], padding=0)
    line = commands.run("convert", source, target, "--max-memory", "1MiB").error(6)
    needed = int(line.split("at least ")[1].split("MiB")[0])
    assert commands.peak_memory("convert", source, target, "--max-memory", f"{needed}MiB") <= needed << 20
    out = tmp_path / "out"
    for lost in ([], [], [FILE_NAME]):  # Converted; from the manifest of that run; from the container.
        for name in lost:
            (out / name).unlink()
        assert commands.peak_memory("convert", folder, out) <= 256 << 20
        assert len(parquet.read(out).tensors) == count


def test_a_single_file_needs_no_pyarrow(tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [sources.bf16("a", (100,))])
    commands.run_without(["pyarrow"], tmp_path / "hide", "convert", source, tmp_path / "x.df11").fine()
