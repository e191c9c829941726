"""Folders: every file of a model finds its place, and the whole model folder comes back byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import df11
from df11.converter.manifest import FILE_NAME
from df11.formats import errors
from tests.support import commands, sources
from tests.support.sources import bf16, f32, random_tensor, tree_bytes


def sharded(folder: Path) -> Path:
    """A checkpoint as transformers writes it: two shards, an index, other files."""
    names = {"model-00001-of-00002.safetensors": "first.weight", "model-00002-of-00002.safetensors": "second.weight"}
    for seed, (file, name) in enumerate(names.items()):
        sources.write(
            folder / file,
            [bf16(name, (9000,), seed), random_tensor(f"{name}.ids", "I64", (4,))],
            metadata={"format": "pt"},
        )
    weight_map = {key: file for file, name in names.items() for key in (name, f"{name}.ids")}
    index = {"metadata": {"total_size": 36064, "note": "first.weight"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text('{"model_type": "ünïcode"}\n', encoding="utf-8")
    (folder / "empty.txt").touch()
    return folder


def diffusers(folder: Path) -> Path:
    """A pipeline as diffusers writes it: components in folders, one of them sharded, one in F32."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    sharded(folder / "transformer")
    sources.write(folder / "vae" / "diffusion_pytorch_model.safetensors", [f32("vae", (500,))])
    (folder / "vae" / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer" / "deep" / "er").mkdir(parents=True)
    (folder / "tokenizer" / "deep" / "er" / "merges.txt").write_bytes(bytes(range(256)) * 100)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def convert_and_restore(source: Path, folder: Path) -> tuple[df11.ConversionReport, dict[str, bytes]]:
    """Convert, verify and restore a model folder, and compare it with the source.

    Returns the report and the files of the converted folder.
    """
    before = tree_bytes(source)
    report = df11.convert(source, folder / "out")
    assert df11.verify(folder / "out").files == len(report.files)
    assert df11.verify(folder / "out", source).compared
    restored = df11.restore(folder / "out", folder / "back")
    assert tree_bytes(folder / "back") == before
    assert (len(restored.files), restored.copied) == (len(report.files), report.copied)
    assert tree_bytes(source) == before
    return report, tree_bytes(folder / "out")


def test_a_sharded_checkpoint(tmp_path):
    source = sharded(tmp_path / "model")
    report, out = convert_and_restore(source, tmp_path)
    assert set(out) == {
        FILE_NAME,
        "model-00001-of-00002.df11",
        "model-00002-of-00002.df11",
        "model.df11.index.json",
        "config.json",
        "empty.txt",
    }
    assert (len(report.files), report.copied) == (2, 3)
    assert report.source_bytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert report.output_bytes == sum(len(data) for name, data in out.items() if name.endswith(".df11"))
    # In the index, only the values of weight_map change, not even whitespace elsewhere.
    before = (source / "model.safetensors.index.json").read_text()
    after = out["model.df11.index.json"].decode()
    assert after == before.replace("of-00002.safetensors", "of-00002.df11")
    assert set(json.loads(after)["weight_map"].values()) == {"model-00001-of-00002.df11", "model-00002-of-00002.df11"}


def test_a_pipeline_of_components(tmp_path):
    source = diffusers(tmp_path / "pipeline")
    report, out = convert_and_restore(source, tmp_path)
    assert [Path(file.output).relative_to(tmp_path / "out").as_posix() for file in report.files] == [
        "transformer/model-00001-of-00002.df11",
        "transformer/model-00002-of-00002.df11",
        "vae/diffusion_pytorch_model.df11",
    ]
    assert [Path(file.source).name for file in report.files][2] == "diffusion_pytorch_model.safetensors"
    assert set(out) == {
        FILE_NAME,
        "model_index.json",
        "image.png",
        "scheduler/scheduler_config.json",
        "tokenizer/deep/er/merges.txt",
        "transformer/config.json",
        "transformer/empty.txt",
        "transformer/model-00001-of-00002.df11",
        "transformer/model-00002-of-00002.df11",
        "transformer/model.df11.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.df11",
    }


INDEXES = {
    "one line": json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}),
    "tabs and no metadata": json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}, indent="\t"),
    "no space after colons": json.dumps({"weight_map": {"a": "a.safetensors"}}, separators=(",", ":")),
    "shards in a folder": json.dumps({"weight_map": {"a": "sub/a.safetensors", "b": "./b.safetensors"}}),
    "other files too": json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.bin"}}),
    "escaped name": json.dumps({"weight_map": {"a": "é.safetensors", "ü": "b.safetensors"}}),
    "name as it is": json.dumps({"weight_map": {"a": "é.safetensors", "ü": "b.safetensors"}}, ensure_ascii=False),
    "metadata name the shard": json.dumps(
        {"metadata": {"base": "a.safetensors"}, "weight_map": {"a": "a.safetensors"}}
    ),
    "metadata name the container": json.dumps({"metadata": {"base": "a.df11"}, "weight_map": {"a": "a.safetensors"}}),
    "a tensor named as the shard": json.dumps({"weight_map": {"a.safetensors": "a.safetensors"}}),
    "line ends of Windows": json.dumps({"weight_map": {"a": "a.safetensors"}}, indent=2).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES)
def test_an_index_is_rewritten_and_restored(text, variant, tmp_path):
    source = tmp_path / "model"
    sources.write(source / "a.safetensors", [bf16("a", (600,))])
    (source / f"m.safetensors.index{variant}.json").write_bytes(text.encode())
    df11.convert(source, tmp_path / "out", allow_missing=True)
    before, after = json.loads(text), json.loads((tmp_path / "out" / f"m.df11.index{variant}.json").read_bytes())
    expected = {
        name: file.removesuffix(".safetensors") + ".df11" if file.endswith(".safetensors") else file
        for name, file in before["weight_map"].items()
    }
    assert after == {**before, "weight_map": expected}
    df11.restore(tmp_path / "out", tmp_path / "back", allow_missing=True)
    assert (tmp_path / "back" / f"m.safetensors.index{variant}.json").read_bytes() == text.encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": null}',
        "\ufeff{}",
        "[" * 100_000,
    ],
)
def test_an_index_that_is_none_is_refused(text, tmp_path):
    sources.write(tmp_path / "model" / "a.safetensors", [bf16("a", (600,))])
    (tmp_path / "model" / "m.safetensors.index.json").write_text(text, encoding="utf-8")
    commands.run("convert", tmp_path / "model", tmp_path / "out").error(2, "m.safetensors.index.json")
    assert not (tmp_path / "out" / "m.df11.index.json").exists()


# Links.


def hub_cache(folder: Path) -> Path:
    """A repository as the Hub's client keeps it: the files of a snapshot are links to blobs. Returns the snapshot."""
    model = sharded(folder / "plain")
    repository = folder / ".cache" / "huggingface" / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "nested").mkdir(parents=True)
    for path in sorted(model.iterdir()):
        blob = repository / "blobs" / sources.sha256(path)
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (snapshot / "nested" / "again.safetensors").symlink_to((snapshot / "model-00001-of-00002.safetensors").resolve())
    return snapshot


def test_a_snapshot_of_the_hubs_cache(tmp_path):
    # The cache is in a folder .cache: only such folders inside the model folder are left out.
    snapshot = hub_cache(tmp_path)
    _, out = convert_and_restore(snapshot, tmp_path)
    assert "nested/again.df11" in out
    assert out["nested/again.df11"] == out["model-00001-of-00002.df11"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_one_file_through_a_link(tmp_path):
    snapshot = hub_cache(tmp_path)
    link = snapshot / "model-00001-of-00002.safetensors"
    df11.convert(link, tmp_path / "x.df11")
    df11.restore(tmp_path / "x.df11", tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == link.read_bytes()
    assert link.is_symlink()


def test_a_folder_through_a_link(tmp_path):
    sharded(tmp_path / "model" / "unet")
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    df11.convert(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "model-00001-of-00002.df11").is_file()


@pytest.mark.parametrize("what", ["id_ed25519", "folder"])
@pytest.mark.parametrize("command", ["convert", "restore"])
def test_links_that_lead_out_of_the_folder_are_refused(what, command, tmp_path):
    sharded(tmp_path / "model")
    source = tmp_path / "model"
    if command == "restore":
        df11.convert(source, tmp_path / "df11")
        source = tmp_path / "df11"
    (tmp_path / "home" / "folder").mkdir(parents=True)
    (tmp_path / "home" / "id_ed25519").write_text("secret")
    (source / "notes").symlink_to(tmp_path / "home" / what)
    name = "notes/" if what == "folder" else "notes"
    commands.run(command, source, tmp_path / "out").error(2, source / "notes", "leads out", f"--exclude '{name}'")
    assert not (tmp_path / "out").exists()
    commands.run(command, source, tmp_path / "out", "--exclude", name).fine()
    assert not (tmp_path / "out" / "notes").exists()


@pytest.mark.parametrize("target", [".", "..", "../sub"])
def test_a_link_to_a_folder_above_is_refused(target, tmp_path):
    source = sharded(tmp_path / "model")
    (source / "sub").mkdir()
    (source / "sub" / "loop").symlink_to(target, target_is_directory=True)
    commands.run("convert", source, tmp_path / "out").error(2, f"{source / 'sub' / 'loop'}: ", "link")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "notes.txt"])
def test_a_link_that_leads_nowhere_is_refused(name, tmp_path):
    source = sharded(tmp_path / "model")
    (source / name).symlink_to("gone")
    commands.run("convert", source, tmp_path / "out").error(4, name)
    assert not (tmp_path / "out").exists()


def test_links_to_themselves_are_refused(tmp_path):
    source = sharded(tmp_path / "model")
    (source / "x.safetensors").symlink_to("x.safetensors")
    result = commands.run("convert", source, tmp_path / "out")
    assert result.code in (2, 4)
    result.error(result.code, "x.safetensors")
    assert not (tmp_path / "out").exists()


# What is left out, and what is refused.


def test_bookkeeping_is_left_out(tmp_path):
    source = sharded(tmp_path / "model")
    for folder in (".git", ".cache", "unet/.git", "unet/.cache/huggingface"):
        sources.write(source / folder / "hidden.safetensors", [bf16("w", (600,))])
        (source / folder / "HEAD").write_text("x")
    (source / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (source / "unet" / "config.json").write_text("{}")
    (source / "unet" / ".diffusion.df11.partial").write_text("what a killed conversion left")
    df11.convert(source, tmp_path / "out")
    assert set(tree_bytes(tmp_path / "out")) == {
        FILE_NAME,
        ".gitattributes",
        "config.json",
        "empty.txt",
        "model-00001-of-00002.df11",
        "model-00002-of-00002.df11",
        "model.df11.index.json",
        "unet/config.json",
    }


@pytest.mark.parametrize("target", ["model", "model/out", "model/../model/deep/out", "link/out"])
def test_a_target_in_the_source_is_refused(target, tmp_path):
    source = sharded(tmp_path / "model")
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    before = tree_bytes(source)
    commands.run("convert", source, tmp_path / target).error(2, "source")
    commands.run("convert", source, tmp_path / target, "--force").error(2, "source")
    assert tree_bytes(source) == before


@pytest.mark.parametrize("target", ["a.safetensors", "hard.safetensors", "link.safetensors"])
def test_a_file_onto_itself_is_refused(target, tmp_path):
    source = sources.write(tmp_path / "a.safetensors", [bf16("a", (600,))])
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    commands.run("convert", source, tmp_path / target, "--force").error(2, target)
    assert source.read_bytes() == before


def test_a_source_within_the_target_is_fine(tmp_path):
    source = sharded(tmp_path / "all" / "model")
    df11.convert(source, tmp_path / "all")
    assert (tmp_path / "all" / "model-00001-of-00002.df11").is_file()


@pytest.mark.parametrize("taken", ["a.df11", "notes.df11", "m.df11.index.json", "sub/x.df11"])
def test_a_source_that_holds_containers_is_refused(taken, tmp_path):
    # On the way back they would be taken for what df11 has made.
    source = tmp_path / "model"
    sources.write(source / "a.safetensors", [bf16("a", (600,))])
    (source / "m.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    (source / taken).parent.mkdir(exist_ok=True)
    (source / taken).write_text("{}")
    commands.run("convert", source, tmp_path / "out").error(2, taken, "holds .df11 files already")
    assert not (tmp_path / "out").exists()
    commands.run("convert", source, tmp_path / "out", "--exclude", "*.df11*").fine()
    df11.restore(tmp_path / "out", tmp_path / "back")
    (source / taken).unlink()
    assert tree_bytes(tmp_path / "back") == tree_bytes(source)


def test_a_file_needs_a_file_and_a_folder_a_folder(tmp_path):
    source = sharded(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    commands.run("convert", source / "model-00001-of-00002.safetensors", tmp_path / "folder").error(2, "folder")
    commands.run("convert", source, tmp_path / "file", "--force").error(2, "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert not any((tmp_path / "folder").iterdir())


def test_a_folder_without_shards_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for command in ("convert", "restore"):
        commands.run(command, tmp_path / "model", tmp_path / "out").error(2, "model")
    assert not (tmp_path / "out").exists()


def test_other_files_are_copied_as_they_are(tmp_path):
    source = sharded(tmp_path / "model")
    (source / "tool.sh").write_bytes(b"#!/bin/sh\r\n\x00\xff")
    df11.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tool.sh").read_bytes() == b"#!/bin/sh\r\n\x00\xff"
    # A copy that differs is replaced only by force.
    (tmp_path / "out" / "config.json").write_text("edited")
    commands.run("convert", source, tmp_path / "out").error(2, "config.json", "--force")
    assert (tmp_path / "out" / "config.json").read_text() == "edited"
    commands.run("convert", source, tmp_path / "out", "--force").fine()
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_an_index_that_was_edited_is_only_replaced_by_force(tmp_path):
    source = sharded(tmp_path / "model")
    df11.convert(source, tmp_path / "out")
    index = tmp_path / "out" / "model.df11.index.json"
    right = index.read_bytes()
    index.write_text("{}")
    commands.run("convert", source, tmp_path / "out").error(2, index, "--force")
    commands.run("convert", source, tmp_path / "out", "--force").fine()
    assert index.read_bytes() == right


def test_verify_against_a_tree_names_what_differs(tmp_path):
    source = diffusers(tmp_path / "pipeline")
    df11.convert(source, tmp_path / "out")
    shard = source / "transformer" / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.DifferenceError) as caught:
        df11.verify(tmp_path / "out", source)
    assert caught.value.tensor == "second.weight"
    assert caught.value.file.endswith("model-00002-of-00002.df11")
    shard.unlink()
    with pytest.raises(errors.MissingError, match=r"model-00002-of-00002\.safetensors"):
        df11.verify(tmp_path / "out", source)
    shutil.rmtree(source)
    with pytest.raises(errors.MissingError):
        df11.verify(tmp_path / "out", source)
