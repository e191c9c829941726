"""What becomes of the files of a model folder: names there and back, adapters, attributes, and index files."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

import df11
import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.converter import parquet
from df11.converter.files import (
    ATTRIBUTES_LINE,
    Assignment,
    Completeness,
    assign,
    check_shards,
    container_name,
    index_names,
    is_shard,
    list_containers,
    original_name,
    raise_if_missing,
    second_copies,
    with_attributes,
)
from df11.converter.manifest import FILE_NAME
from df11.formats import errors
from df11.storage.entry import Entry
from tests.support import sources
from tests.support.sources import bf16, tree_bytes

ADAPTERS = [
    "adapter_model.safetensors",
    "adapter_model-1.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.fp16.safetensors",
    "learned_embeds.safetensors",
    "learned_embeds_2.sft",
    "ip-adapter_sd15.safetensors",
    "ip-adapter.safetensors",
]
SHARDS = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "x.sft",
    "adapter_models.safetensors",
    "my_adapter_model.safetensors",
    "lora.safetensors",
    ".safetensors",
    "a.safetensors.safetensors",
]
OTHERS = ["config.json", "x.df11", "model.safetensors.bak", "pytorch_model.bin", "x.SAFETENSORS", "safetensors", "sft"]


def entries(*names: str) -> list[Entry]:
    return [Entry(name, 1) for name in names]


def index(**weight_map: str) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


# Names.


@pytest.mark.parametrize("name", ADAPTERS + SHARDS + OTHERS)
@pytest.mark.parametrize("folder", ["", "unet/", "adapter_model.safetensors/"])
def test_which_files_are_converted(name, folder):
    path = folder + name
    assert is_shard(path) == (name in SHARDS)
    stem = name.removesuffix(".safetensors") if name.endswith(".safetensors") else name.removesuffix(".sft")
    assert container_name(path) == (f"{folder}{stem}.df11" if name in SHARDS else path)


@pytest.mark.parametrize(
    ("known", "name"),
    [
        (None, "a/x.safetensors"),
        ("a/x.sft", "a/x.sft"),
        ("a/x.safetensors", "a/x.safetensors"),
        # Only a different suffix is believed.
        ("a/y.sft", "a/x.safetensors"),
        ("../x.sft", "a/x.safetensors"),
        ("x.sft", "a/x.safetensors"),
        ("a/x.sh", "a/x.safetensors"),
        ("a/x", "a/x.safetensors"),
        ("", "a/x.safetensors"),
    ],
)
def test_what_a_container_was_called(known, name):
    originals = {"b.df11": "b.sft"} | ({} if known is None else {"a/x.df11": known})
    assert original_name("a/x.df11", originals) == name
    assert original_name("a/x.txt", originals) == "a/x.txt"


NAMES = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["", "a/", "a/b/"]),
        st.sampled_from(["x", "y", "adapter_model", "model-00001-of-00002", "z.safetensors", ""]),
        st.sampled_from(
            [".safetensors", ".sft", ".json", ".safetensors.index.json", ".safetensors.index.fp16.json", ".bin"]
        ),
    )
    | st.sampled_from([".gitattributes", "a/.gitattributes", FILE_NAME, f"a/{FILE_NAME}"]),
    unique=True,
    max_size=8,
)


@given(names=NAMES)
def test_every_file_has_a_place_and_comes_back(names):
    containers = [container_name(name) for name in names if is_shard(name)]
    if len(set(containers)) < len(containers):
        with pytest.raises(errors.UsageError, match="both"):
            assign(entries(*names), "convert")
        return
    there = assign(entries(*names), "convert")
    assert sorted(one.entry.name for one in there) == sorted(set(names) - {FILE_NAME})
    assert {one.name for one in there if one.kind == "convert"} == set(containers)
    order = ["convert", "copy", "attributes", "index"]
    assert [order.index(one.kind) for one in there] == sorted(order.index(one.kind) for one in there)
    originals = {one.name: one.entry.name for one in there}
    back = assign(entries(FILE_NAME, *(one.name for one in there)), "restore", originals)
    assert {one.entry.name: one.name for one in back} == originals
    kinds = {"convert": "restore", "copy": "copy", "attributes": "attributes", "index": "index"}
    assert {one.entry.name: one.kind for one in back} == {one.name: kinds[one.kind] for one in there}


@given(names=NAMES)
def test_a_copy_leaves_names_as_they_are(names):
    listed = entries(*names, "x.df11")
    assert assign(listed, "copy") == [Assignment("copy", entry, entry.name) for entry in listed]


@pytest.mark.parametrize("both", [("x.safetensors", "x.sft"), ("x.sft", "x.safetensors")])
def test_two_files_of_one_name_are_refused(both):
    with pytest.raises(errors.UsageError, match=f"{both[0]} and {both[1]}") as caught:
        assign(entries(*both), "convert")
    assert caught.value.file == "x.df11"
    assert "--exclude" in caught.value.hint


def test_adapters_and_other_suffixes_there_and_back(tmp_path):
    source = tmp_path / "source"
    for seed, name in enumerate([*ADAPTERS, "unet/model.safetensors", "vae/x.sft", "y.sft"]):
        sources.write(source / name, [bf16("w", (600,), seed)])
    before = tree_bytes(source)
    df11.convert(source, tmp_path / "out")
    out = tree_bytes(tmp_path / "out")
    assert set(out) == {FILE_NAME, *ADAPTERS, "unet/model.df11", "vae/x.df11", "y.df11"}
    assert {name: out[name] for name in ADAPTERS} == {name: before[name] for name in ADAPTERS}
    named = {file.file: file.source_file for file in parquet.read(tmp_path / "out").files}
    assert named == {"unet/model.df11": "unet/model.safetensors", "vae/x.df11": "vae/x.sft", "y.df11": "y.sft"}
    df11.verify(tmp_path / "out", source)
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == before
    (tmp_path / "out" / FILE_NAME).unlink()  # Nothing remembers .sft now.
    df11.restore(tmp_path / "out", tmp_path / "again")
    assert tree_bytes(tmp_path / "again") == {
        name.replace(".sft", ".safetensors") if name not in ADAPTERS else name: data for name, data in before.items()
    }


def test_adapters_alone_are_copied_with_a_word(tmp_path, caplog):
    sources.write(tmp_path / "source" / ADAPTERS[0], [bf16("w", (600,))])
    df11.convert(tmp_path / "source", tmp_path / "out")
    assert set(tree_bytes(tmp_path / "out")) == {ADAPTERS[0], FILE_NAME}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "only adapters" in record.getMessage()


def test_permissions_are_those_of_the_source(tmp_path):
    source = sources.write(tmp_path / "source" / "x.safetensors", [bf16("w", (600,))]).parent
    (source / "secret.txt").write_bytes(b"secret")
    modes = {"x.safetensors": 0o600, "secret.txt": 0o640}
    for name, mode in modes.items():
        (source / name).chmod(mode)
    df11.convert(source, tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "out" / "x.df11").stat().st_mode & 0o777 == 0o600
    for folder in ("out", "back"):
        assert (tmp_path / folder / "secret.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "back" / "x.safetensors").stat().st_mode & 0o777 == 0o600


# Attributes.


@given(data=st.binary(max_size=40) | st.binary(max_size=9).map(lambda data: data + ATTRIBUTES_LINE))
def test_attributes_come_back(data):
    there = with_attributes(data, "convert")
    assert there == data + ATTRIBUTES_LINE
    assert with_attributes(there, "restore") == data
    if not data.endswith(ATTRIBUTES_LINE):
        assert with_attributes(data, "restore") == data


@pytest.mark.parametrize("data", [b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", b"no line end", b""])
def test_git_keeps_containers_in_lfs(data, tmp_path):
    source = sources.write(tmp_path / "source" / "x.safetensors", [bf16("w", (600,))]).parent
    (source / ".gitattributes").write_bytes(data)
    for _ in range(2):
        df11.convert(source, tmp_path / "out")
        assert (tmp_path / "out" / ".gitattributes").read_bytes() == data + ATTRIBUTES_LINE
    lines = (tmp_path / "out" / ".gitattributes").read_bytes().splitlines()
    assert lines[-1] == b"*.df11 filter=lfs diff=lfs merge=lfs -text"
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / ".gitattributes").read_bytes() == data


def test_attributes_of_another_repository_stay(tmp_path):
    source = sources.write(tmp_path / "source" / "x.safetensors", [bf16("w", (600,))]).parent
    (source / ".gitattributes").write_bytes(b"theirs\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitattributes").write_bytes(b"mine\n")
    df11.convert(source, tmp_path / "out", force=True)
    assert (tmp_path / "out" / ".gitattributes").read_bytes() == b"mine\n"


# What index files say.


@pytest.mark.parametrize(
    ("indexes", "names", "missing", "unnamed"),
    [
        ({"m.safetensors.index.json": index(a="a.safetensors")}, ["a.safetensors"], [], []),
        ({"m.safetensors.index.json": index(a="./a.safetensors")}, ["a.safetensors"], [], []),
        ({"m.safetensors.index.json": index(a="a.safetensors")}, [], ["a.safetensors"], []),
        ({"m.safetensors.index.json": index(a="./a.safetensors")}, [], ["a.safetensors"], []),
        ({"d/m.safetensors.index.json": index(a="a.safetensors")}, ["d/a.safetensors"], [], []),
        ({"d/m.safetensors.index.json": index(a="a.safetensors")}, ["a.safetensors"], ["d/a.safetensors"], []),
        ({"d/m.safetensors.index.json": index(a="../a.safetensors")}, ["a.safetensors"], [], []),
        ({"m.safetensors.index.json": index(a="d/a.safetensors")}, ["d/a.safetensors"], [], []),
        ({"m.safetensors.index.json": index(a="../../etc/x")}, [], ["../../etc/x"], []),
        # A shard of several tensors is reported missing once.
        ({"m.safetensors.index.json": index(a="x.safetensors", b="x.safetensors")}, [], ["x.safetensors"], []),
        ({"m.safetensors.index.json": index(a="z.bin", b="y.bin")}, [], ["y.bin", "z.bin"], []),
        # Beside an index, but in none.
        (
            {"m.safetensors.index.json": index(a="a.safetensors")},
            ["a.safetensors", "b.safetensors", "d/c.safetensors", "x.df11", "config.json", ADAPTERS[0]],
            [],
            ["b.safetensors"],
        ),
        (
            {
                "m.safetensors.index.json": index(a="a.safetensors"),
                "n.safetensors.index.json": index(b="b.safetensors"),
            },
            ["a.safetensors", "b.safetensors"],
            [],
            [],
        ),
        ({"m.df11.index.json": index(a="a.df11")}, ["a.df11", "b.df11", "c.safetensors"], [], ["b.df11"]),
        ({"d/m.df11.index.json": index(a="a.df11")}, ["d/a.df11", "b.df11", "d/e/c.df11"], [], []),
        ({}, ["a.safetensors"], [], []),
    ],
)
def test_what_is_missing_and_what_is_not_named(indexes, names, missing, unnamed):
    found = check_shards(indexes, [*names, *indexes], "where")
    assert [shard for _, shard in found.missing] == missing
    assert {name for name, _ in found.missing} <= set(indexes)
    assert list(found.unnamed) == unnamed


def test_an_index_that_is_none_is_named():
    with pytest.raises(errors.SafetensorsError) as caught:
        check_shards({"d/m.safetensors.index.json": b"[]"}, [], "where")
    assert caught.value.file == "where/d/m.safetensors.index.json"


def test_what_is_said_of_missing_shards():
    raise_if_missing(Completeness((), ("x",)), "where")
    one = Completeness((("m.index.json", "a.safetensors"),), ())
    many = Completeness((*one.missing, ("m.index.json", "b"), ("m.index.json", "c")), ())
    with pytest.raises(errors.MissingError, match=r"m\.index\.json.*names it.*--allow-missing") as caught:
        raise_if_missing(one, "where")
    assert caught.value.file == "where/a.safetensors"
    with pytest.raises(errors.MissingError, match="and 2 more") as caught:
        raise_if_missing(many, "where", may_allow=False)
    assert "--allow-missing" not in str(caught.value)


def test_which_files_are_indexes():
    names = [
        *("m.safetensors.index.json", "a/m.safetensors.index.fp16.json", "m.df11.index.json", "m.sft.index.json"),
        *("pytorch_model.bin.index.json", "model_index.json", "adapter_model.safetensors.index.json"),
        *(".cache/m.safetensors.index.json", "m.safetensors", "config.json"),
    ]
    assert index_names(names) == names[:4]


@pytest.mark.parametrize("spelt", ["{}", "./{}", "../unet/{}"])
def test_an_index_of_shards_with_another_suffix_comes_back(spelt, tmp_path):
    source = tmp_path / "source"
    for name in ("unet/a.sft", "unet/b.safetensors", "vae/a.safetensors"):
        sources.write(source / name, [bf16("w", (600,))])
    (source / "unet" / "m.safetensors.index.json").write_bytes(
        index(a=spelt.format("a.sft"), b=spelt.format("b.safetensors"))
    )
    df11.convert(source, tmp_path / "out")
    there = json.loads((tmp_path / "out" / "unet" / "m.df11.index.json").read_bytes())["weight_map"]
    assert there == {"a": spelt.format("a.df11"), "b": spelt.format("b.df11")}
    df11.verify(tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


@pytest.mark.parametrize("allow", [False, True])
def test_a_missing_shard_is_found_before_anything_is_written(allow, tmp_path, caplog):
    source = sources.write(tmp_path / "source" / "a.safetensors", [bf16("a", (600,))]).parent
    sources.write(source / "c.safetensors", [bf16("c", (600,))])
    (source / "m.safetensors.index.json").write_bytes(index(a="./a.safetensors", b="./b.safetensors"))
    if not allow:
        with pytest.raises(errors.MissingError) as caught:
            df11.convert(source, tmp_path / "out")
        assert caught.value.file == str(source / "b.safetensors")
        assert not (tmp_path / "out").exists()
        return
    df11.convert(source, tmp_path / "out", allow_missing=True)
    said = [record.getMessage() for record in caplog.records]
    assert any("b.safetensors" in line and "does not exist" in line for line in said)
    assert any("c.safetensors" in line and "does not name" in line for line in said)
    assert json.loads((tmp_path / "out" / "m.df11.index.json").read_bytes())["weight_map"] == {
        "a": "./a.df11",
        "b": "./b.df11",
    }
    with pytest.raises(errors.MissingError, match=r"b\.df11"):
        df11.verify(tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back", allow_missing=True)
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


# Second copies.


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]),
        (
            ["model-1.safetensors", "consolidated.00.safetensors", "consolidated.01.safetensors"],
            ["consolidated.00.safetensors", "consolidated.01.safetensors"],
        ),
        (["consolidated.safetensors"], []),
        (["consolidated.00.safetensors", "consolidated.01.safetensors"], []),
        (["a/consolidated.safetensors", "b/model.safetensors"], []),
        (["a/consolidated.safetensors", "a/model.safetensors"], ["a/consolidated.safetensors"]),
        (["consolidated.json", "model.safetensors"], []),
        (["consolidated.safetensors", ADAPTERS[0], "config.json"], []),
    ],
)
def test_second_copies_of_a_model(names, copies):
    assert second_copies(names) == copies


def test_a_second_copy_is_told_of_and_can_be_left_out(tmp_path, caplog):
    source = tmp_path / "source"
    for name in ("model.safetensors", "consolidated.safetensors"):
        sources.write(source / name, [bf16("w", (9000,))])
    df11.convert(source, tmp_path / "out")
    (record,) = caplog.records
    assert str(source / "consolidated.safetensors") in record.getMessage()
    assert "--exclude" in record.getMessage()
    caplog.clear()
    df11.convert(source, tmp_path / "less", exclude=["consolidated*"])
    assert set(tree_bytes(tmp_path / "less")) == {"model.df11", FILE_NAME}
    assert not caplog.records


# Containers of a path.


def test_containers_of_a_path(tmp_path):
    for name in ("b.df11", "a/c.df11", ".cache/d.df11", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_containers(tmp_path) == [tmp_path / "a/c.df11", tmp_path / "b.df11"]
    assert list_containers(tmp_path / "e.txt") == [tmp_path / "e.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UsageError, match=r"no \.df11 file") as caught:
        list_containers(tmp_path / "empty")
    assert caught.value.file == str(tmp_path / "empty")
    with pytest.raises(errors.MissingError):
        list_containers(tmp_path / "none")
