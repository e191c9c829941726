"""A model folder comes back as it was, with all its names, or df11 says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import df11
import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.converter import parquet
from df11.converter.files import assign, container_name, is_shard, named_files, original_name, renamed
from df11.converter.manifest import FILE_NAME
from df11.formats import errors
from df11.storage.entry import Entry
from tests.support import commands, sources
from tests.support.sources import bf16, tree_bytes

A, B = (sources.file_bytes([bf16(name, (600,), seed)]) for seed, name in enumerate("ab"))


def index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2).encode()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# Names there and back.

FOLDERS = {
    "an index beside .sft": {"a.sft": A, "m.safetensors.index.json": index(a="a.sft")},
    "an .sft index beside .safetensors": {"a.safetensors": A, "m.sft.index.json": index(a="a.safetensors")},
    "an .sft index above its shards": {"x/a.sft": A, "m.sft.index.json": index(a="x/a.sft")},
    "an index above .sft": {"x/a.sft": A, "m.safetensors.index.json": index(a="./x/a.sft")},
    "both suffixes": {"a.sft": A, "b.safetensors": B, "m.sft.index.json": index(a="a.sft", b="b.safetensors")},
    "a variant": {"a.sft": A, "m.sft.index.fp16.json": index(a="a.sft")},
    "a missing .sft": {"a.safetensors": A, "m.safetensors.index.json": index(a="a.safetensors", b="b.sft")},
    "a missing .sft in a folder": {"a.sft": A, "x/m.safetensors.index.json": index(a="../a.sft", b="./b.sft")},
    "a line after the name": {"a.safetensors": A, "m.safetensors.index.json\n": index(a="a.safetensors")},
    "a folder that looks like an index": {"a.safetensors": A, "a.safetensors.index.v/y.json": b"{}"},
    "no stem": {".sft": A, ".sft.index.json": index(a=".sft")},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_comes_back(files, tmp_path):
    source = put(tmp_path / "source", files)
    for _ in range(2):  # Again, with all that is there.
        df11.convert(source, tmp_path / "out", allow_missing=True)
        assert all(".df11" in name for name in tree_bytes(tmp_path / "out") if name.endswith(("sft", "safetensors")))
        df11.restore(tmp_path / "out", tmp_path / "back", allow_missing=True)
        assert tree_bytes(tmp_path / "back") == files
    assert dict(parquet.read(tmp_path / "out").renamed).keys() <= {
        name.replace(".sft", ".df11") for name in [*files, "b.sft", "x/b.sft"]
    }


STEMS = st.sampled_from(["a", "b", "x/a", "x/b", "m", ""])
SHARDS = st.builds("{}{}".format, STEMS, st.sampled_from([".safetensors", ".sft"]))
INDEXES = st.builds(
    "{}{}{}".format, STEMS, st.sampled_from([".safetensors", ".sft"]), st.sampled_from([".index.json", ".index.v.json"])
)
NAMED = SHARDS | st.builds("./{}".format, SHARDS) | st.builds("../{}".format, SHARDS) | st.sampled_from(["a.bin", "."])


@given(
    shards=st.lists(SHARDS, unique=True, max_size=4),
    indexes=st.dictionaries(INDEXES, st.lists(NAMED, max_size=4), max_size=3),
)
def test_every_name_comes_back_or_is_refused(shards, indexes):
    texts = {name: index(**{str(place): shard for place, shard in enumerate(of)}) for name, of in indexes.items()}
    try:
        there = assign([Entry(name, 1) for name in [*shards, *texts]], "convert")
        found = renamed(there, texts, "where")
    except errors.UsageError as error:
        assert "would both be" in error.what or "could not be restored" in error.what
        named = {*shards, *(shard for _, shard in named_files(texts, "where"))}
        targets = [container_name(name) for name in named if is_shard(name)]
        of_indexes = [name.replace(".sft.", ".safetensors.") for name in texts]
        leads_out = any(name.startswith("..") for name in named)
        assert leads_out or len({*targets}) < len(targets) or len({*of_indexes}) < len(of_indexes)
        return
    assert {one.name: original_name(one.name, found) for one in there} == {one.name: one.entry.name for one in there}
    back = {one.name: one.name for one in there if original_name(one.name, {}) == one.entry.name}
    assert not found.keys() & back.keys()
    for _, shard in named_files(texts, "where"):
        assert original_name(container_name(shard), found) == shard


def test_an_index_whose_names_would_not_come_back_is_refused(tmp_path):
    name = "m.safetensors.index.json"
    source = put(tmp_path / "source", {"b.safetensors": B, name: index(a="b.sft", b="b.safetensors")})
    arguments = ["convert", source, tmp_path / "out", "--allow-missing"]
    commands.run(*arguments).error(2, source / name, "'b.sft'", "--exclude")
    assert not (tmp_path / "out").exists()
    commands.run(*arguments, "--exclude", name).fine()


def test_what_is_left_out_keeps_its_name(tmp_path):
    files = FOLDERS["a missing .sft"] | {"m.sft.index.json": index(a="a.safetensors")}
    del files["m.safetensors.index.json"]
    source = put(tmp_path / "source", files | {"x/n.safetensors.index.json": index(b="b.sft")})
    before = tree_bytes(source)
    df11.convert(source, tmp_path / "out", allow_missing=True)
    renamed_before = parquet.read(tmp_path / "out").renamed
    assert renamed_before == (("m.df11.index.json", "m.sft.index.json"), ("x/b.df11", "x/b.sft"))
    df11.convert(source, tmp_path / "out", allow_missing=True, exclude=["*.json"])
    assert parquet.read(tmp_path / "out").renamed == renamed_before
    df11.restore(tmp_path / "out", tmp_path / "back", allow_missing=True)
    assert tree_bytes(tmp_path / "back") == before
    for name in ("m.sft.index.json", "x/n.safetensors.index.json"):
        (source / name).unlink()
    df11.convert(source, tmp_path / "out")
    assert parquet.read(tmp_path / "out").renamed == ()


# Without a manifest that says it.


def test_a_manifest_that_cannot_be_read_is_not_passed_over(tmp_path):
    source = put(tmp_path / "source", {"a.sft": A})
    df11.convert(source, tmp_path / "out")
    manifest = tmp_path / "out" / FILE_NAME
    manifest.write_bytes(manifest.read_bytes()[:-1])
    commands.run("restore", tmp_path / "out", tmp_path / "back").error(2, manifest, f"--exclude {FILE_NAME}")
    assert not (tmp_path / "back").exists()
    result = commands.run("restore", tmp_path / "out", tmp_path / "back", "--exclude", FILE_NAME).fine()
    assert f"without {FILE_NAME}, shards and indexes get the suffix .safetensors" in result.err
    assert tree_bytes(tmp_path / "back") == {"a.safetensors": A}
    result = commands.run("convert", source, tmp_path / "out").fine()
    assert f"warning: {manifest}" in result.err
    commands.run("restore", tmp_path / "out", tmp_path / "again").fine()
    assert tree_bytes(tmp_path / "again") == {"a.sft": A}


def test_a_manifest_that_is_lost_is_told(tmp_path):
    df11.convert(put(tmp_path / "source", {"a.sft": A}), tmp_path / "out")
    (tmp_path / "out" / FILE_NAME).unlink()
    result = commands.run("restore", tmp_path / "out", tmp_path / "back").fine()
    assert f"warning: {tmp_path / 'out'}: without {FILE_NAME}" in result.err
    assert tree_bytes(tmp_path / "back") == {"a.safetensors": A}


def test_a_conversion_that_has_not_ended_is_not_restored(tmp_path):
    source = put(tmp_path / "source", {"a.sft": A, "b.sft": B})
    with pytest.raises(ZeroDivisionError):
        df11.convert(source, tmp_path / "out", on_file=lambda _: 1 / 0)
    commands.run("restore", tmp_path / "out", tmp_path / "back").error(7, tmp_path / "out", "run it again", ".df11-run")
    df11.convert(source, tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == {"a.sft": A, "b.sft": B}


# A folder that is not what its manifest says.


@pytest.fixture
def converted(tmp_path) -> Path:
    source = put(tmp_path / "source", {"a.safetensors": A, "b.safetensors": B, "x/config.json": b"{}"})
    df11.convert(source, tmp_path / "out")
    return tmp_path / "out"


def test_containers_that_were_swapped(converted, tmp_path):
    a, b = ((converted / f"{name}.df11").read_bytes() for name in "ab")
    put(converted, {"a.df11": b, "b.df11": a})
    commands.run("restore", converted, tmp_path / "back").error(1, converted / "a.df11", "manifest")
    commands.run("verify", converted).error(1, converted / "a.df11", "manifest")
    assert not (tmp_path / "back").exists()
    (converted / FILE_NAME).unlink()  # By themselves, they are sound.
    assert df11.verify(converted).files == 2


def test_a_container_that_is_missing(converted, tmp_path):
    (converted / "b.df11").unlink()
    for command in (["verify", converted], ["restore", converted, tmp_path / "back"]):
        line = commands.run(*command).error(4, converted / "b.df11", FILE_NAME)
        assert ("--allow-missing" in line) == (command[0] == "restore")
    assert not (tmp_path / "back").exists()
    commands.run("restore", converted, tmp_path / "back", "--exclude", "b.*").fine()
    commands.run("restore", converted, tmp_path / "back", "--allow-missing").fine()
    assert tree_bytes(tmp_path / "back") == {"a.safetensors": A, "x/config.json": b"{}"}
    (converted / FILE_NAME).unlink()
    commands.run("verify", converted).fine()
    commands.run("verify", converted, "--against", tmp_path / "source").error(4, converted / "b.df11", "b.safetensors")


@pytest.mark.parametrize("change", [b"[]", b"{ }", None])
def test_another_file_that_was_edited_or_removed(change, converted):
    path = converted / "x" / "config.json"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    commands.run("verify", converted).error(4 if change is None else 1, path, "manifest")
    (converted / FILE_NAME).unlink()
    commands.run("verify", converted).fine()


def test_progress_of_verify_counts_all_files(converted):
    total, done = [], []
    df11.verify(converted, on_total=total.append, on_progress=done.append)
    assert total == [sum(len(data) for name, data in tree_bytes(converted).items() if name != FILE_NAME)]
    assert sum(done) == total[0]


# Files that cannot be in one folder.


@pytest.mark.parametrize(
    "name",
    [
        ".df11-run/x",
        "x/.config.json.partial/x",
        ".a.df11.partial/x",
        ".a.df11.download/x",
        f"{FILE_NAME}/x",
        "a.df11/x",
    ],
)
def test_names_that_would_be_in_the_way_are_refused_before(name, tmp_path):
    source = put(tmp_path / "source", {"a.safetensors": A, "x/config.json": b"{}", name: b"x"})
    commands.run("convert", source, tmp_path / "out").error(2, name.rpartition("/")[0], "--exclude")
    assert not (tmp_path / "out").exists()
    commands.run("convert", source, tmp_path / "out", "--exclude", name).fine()
    df11.verify(tmp_path / "out", source)


def test_a_name_that_becomes_too_long_is_refused_before(tmp_path):
    source = put(tmp_path / "source", {"a.safetensors": A, f"{'m' * 251}.sft": B})
    commands.run("convert", source, tmp_path / "out").error(2, "mmm", "too long")
    assert not (tmp_path / "out").exists()
