"""What df11 may replace or remove in a target is what it has written there, by its content and not by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import df11
from df11.converter import parquet
from df11.storage.atomic import temporary_path
from tests.support import commands, sources
from tests.support.sources import bf16, f32, tree_bytes


def shard(name: str, seed: int = 0) -> bytes:
    return sources.file_bytes([bf16(name, (100, 64), seed)])


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode()
    files = {"a.safetensors": shard("a"), "b.safetensors": shard("b", 1), "m.safetensors.index.json": index}
    return put(tmp_path / "model", files | {"config.json": b"{}"})


def other_container(tmp_path: Path, seed: int = 9) -> bytes:
    """A container of somebody's own."""
    put(tmp_path / "theirs", {"x.safetensors": shard("x", seed)})
    df11.convert(tmp_path / "theirs" / "x.safetensors", tmp_path / "theirs" / "x.df11", force=True)
    return (tmp_path / "theirs" / "x.df11").read_bytes()


def test_somebodys_container_under_a_known_name(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    theirs = other_container(tmp_path)
    put(out, {"a.df11": theirs})
    commands.run("convert", model, out).error(2, out / "a.df11", "--force")
    assert (out / "a.df11").read_bytes() == theirs
    # Neither is it removed when the shard is gone.
    (model / "a.safetensors").unlink()
    (model / "m.safetensors.index.json").unlink()
    commands.run("convert", model, out).fine()
    assert (out / "a.df11").read_bytes() == theirs
    assert not (out / "m.df11.index.json").exists()


def test_an_index_that_was_edited_is_not_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    put(out, {"m.df11.index.json": b'{"weight_map": {"mine": "b.df11"}}'})
    for path in (model / "a.safetensors", model / "m.safetensors.index.json"):
        path.unlink()
    df11.convert(model, out)
    assert b"mine" in (out / "m.df11.index.json").read_bytes()


def test_what_a_manifest_names_beyond_a_link_is_not_removed(model: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    put(model, {"sub/c.safetensors": shard("c", 2)})
    df11.convert(model, out)
    shutil.move(out / "sub", elsewhere)
    (out / "sub").symlink_to(elsewhere)
    shutil.rmtree(model / "sub")
    df11.convert(model, out)
    assert (elsewhere / "c.df11").is_file()
    put(model, {"sub/c.safetensors": shard("c", 3)})
    commands.run("convert", model, out).error(2, out / "sub", "link")


def test_a_file_in_the_way_of_a_folder_is_known_before(model: Path, tmp_path: Path) -> None:
    put(model, {"sub/c.safetensors": shard("c", 2)})
    put(tmp_path / "out", {"sub": b"mine"})
    commands.run("convert", model, tmp_path / "out").error(2, tmp_path / "out" / "sub", "in the way")
    assert tree_bytes(tmp_path / "out") == {"sub": b"mine"}


def test_what_appears_during_a_run_is_not_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(_: object) -> None:
        put(out, {"m.df11.index.json": b"mine"})

    with pytest.raises(df11.Df11Error, match="already exists"):
        df11.convert(model, out, on_file=meanwhile)
    assert (out / "m.df11.index.json").read_bytes() == b"mine"


def test_a_container_whose_shard_is_missing_is_kept_with_its_index(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    (model / "b.safetensors").unlink()
    commands.run("convert", model, out, "--allow-missing").fine()
    df11.verify(out)
    assert (out / "b.df11").is_file()


def test_an_index_may_not_name_what_is_left_out(model: Path, tmp_path: Path) -> None:
    line = commands.run("convert", model, tmp_path / "out", "--exclude", "b.safetensors").error(4, "b.safetensors")
    assert "m.safetensors.index.json" in line
    assert not (tmp_path / "out").exists()
    commands.run("convert", model, tmp_path / "out", "--exclude", "b.safetensors", "--exclude", "*.index.json").fine()
    # What the target has from an earlier run is not missing.
    df11.convert(model, tmp_path / "out")
    commands.run("convert", model, tmp_path / "out", "--exclude", "b.safetensors").fine()
    df11.verify(tmp_path / "out")


def test_a_run_with_another_cast_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    model = put(
        tmp_path / "model",
        {
            name: sources.file_bytes([f32(name, (100, 64), seed)])
            for seed, name in enumerate(["a.safetensors", "b.safetensors"])
        },
    )
    out = tmp_path / "out"
    df11.convert(model, out)
    commands.run("convert", model, out, "--cast", "bf16", "--exclude", "a*").error(2, "a.df11", "another conversion")
    df11.convert(model, out, cast="bf16")
    assert {row.dtype for row in parquet.read(out).tensors} == {"BF16"}
    for name in ("a.df11", "b.df11"):
        with df11.open(out / name) as container:
            assert container.source.cast == "bf16"


def test_ones_own_container_that_is_damaged_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    good = (out / "a.df11").read_bytes()
    (out / "df11-manifest.parquet").unlink()  # So that nobody knows its checksums.
    damaged = bytearray(good)
    damaged[-100] ^= 1
    put(out, {"a.df11": bytes(damaged)})
    df11.convert(model, out)
    assert (out / "a.df11").read_bytes() == good


def test_what_killed_runs_have_left_is_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    left = [temporary_path(out / name, kind) for name in ("a.df11", "config.json") for kind in ("partial", "download")]
    for path in left:
        path.write_bytes(b"half")
    (out / ".mine.partial").write_bytes(b"not of a file of this model")
    df11.convert(model, out)
    assert not [path for path in left if path.exists()]
    assert (out / ".mine.partial").exists()


def test_a_file_is_no_folder_to_fill(model: Path, tmp_path: Path) -> None:
    put(tmp_path, {"file": b"mine"})
    for command in ("convert", "restore"):
        source = model if command == "convert" else tmp_path / "out"
        commands.run(command, source, tmp_path / "file").error(2, tmp_path / "file")
        df11.convert(model, tmp_path / "out")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_that_looks_like_the_hubs_cache_is_an_ordinary_target(model: Path, tmp_path: Path) -> None:
    target = put(tmp_path / "models--x--y", {"snapshots/abc/config.json": b"theirs"})
    df11.convert(model, target)
    assert (target / "a.df11").is_file()
    assert [path.name for path in (target / "snapshots" / "abc").iterdir()] == ["config.json"]


def change(model: Path) -> None:
    put(model, {"a.safetensors": shard("a", 7), "b.safetensors": shard("b", 8), "config.json": b'{"new": 1}'})


@pytest.mark.parametrize("when", ["a.df11", "b.df11", "index"])
def test_what_a_run_that_was_killed_has_written_may_be_replaced(when: str, model: Path, tmp_path: Path) -> None:
    # Its files have their names, but no manifest names them yet; then the source changes, too.
    out, whole = tmp_path / "out", tmp_path / "whole"

    def stop(*arguments: object) -> None:
        done = [getattr(one, "output", "") for one in arguments]
        if when == "index" or done[0].endswith(when):
            raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        if when == "index":
            patch.setattr("df11.converter.parquet.to_bytes", stop)
        df11.convert(model, out, on_file=(lambda _: None) if when == "index" else stop)
    assert (out / "a.df11").exists()
    change(model)
    df11.convert(model, out)
    df11.convert(model, whole)
    assert tree_bytes(out) == tree_bytes(whole)


def test_a_file_in_place_of_one_that_a_killed_run_wrote_stays(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        df11.convert(model, out, on_file=lambda _: 1 / 0)
    theirs = other_container(tmp_path)
    put(out, {"a.df11": theirs})
    commands.run("convert", model, out).error(2, out / "a.df11", "--force")
    assert (out / "a.df11").read_bytes() == theirs


def test_what_a_killed_run_wrote_goes_with_its_shard(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        df11.convert(model, out, on_file=lambda _: 1 / 0)
    for name in ("a.safetensors", "m.safetensors.index.json"):
        (model / name).unlink()
    put(out, {".b.df11.partial": b"half"})
    df11.convert(model, out)
    assert set(tree_bytes(out)) == {"b.df11", "config.json", "df11-manifest.parquet"}


def test_only_one_run_writes_to_a_folder(model: Path, tmp_path: Path) -> None:
    out, results = tmp_path / "out", []
    df11.convert(model, out, on_file=lambda _: results.append(commands.run("convert", model, out)))
    for result in results:
        result.error(7, out, "another df11")
    df11.verify(out)


def test_a_folder_that_changes_after_the_plan_is_a_conflict(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    df11.convert(model, out)
    put(model, {"config.json": b'{"new": 1}'})

    def meanwhile(_: object) -> None:
        put(out, {"a.df11": (out / "a.df11").read_bytes()})

    with pytest.raises(df11.Df11Error, match="changed this folder"):
        df11.convert(model, out, on_total=meanwhile)
    assert not (out / ".df11-run").exists()
    df11.convert(model, out)


@pytest.mark.parametrize("action", ["restore", "convert"])
def test_another_run_does_not_take_what_a_killed_one_wrote(action: str, model: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", put(tmp_path / "other", {"z.safetensors": shard("z", 3)})
    df11.convert(other, tmp_path / "other-out")
    with pytest.raises(ZeroDivisionError):
        df11.convert(model, out, on_file=lambda _: 1 / 0)
    before = tree_bytes(out)
    source = tmp_path / "other-out" if action == "restore" else other
    commands.run(action, source, out).error(7, out, f"convert of '{model}'", "choose another target")
    assert tree_bytes(out) == before
    df11.convert(model, out)
    assert set(tree_bytes(out)) == {"a.df11", "b.df11", "m.df11.index.json", "config.json", "df11-manifest.parquet"}
    commands.run(action, source, tmp_path / "out").fine()  # It has ended: the folder is free.


@pytest.mark.parametrize("how", ["a link to nothing", "a link out", "a folder elsewhere", "a folder that is away"])
def test_what_is_named_but_cannot_be_read_is_not_gone(how: str, model: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    put(model, {"sub/c.safetensors": shard("c", 3)})
    df11.convert(model, out)
    name = "sub" if "folder" in how else "b.safetensors"
    (model / name).rename(elsewhere)
    (model / name).symlink_to(elsewhere)
    if how in ("a link to nothing", "a folder that is away"):
        elsewhere.rename(tmp_path / "away")
    (model / "m.safetensors.index.json").unlink()
    before = {name: data for name, data in tree_bytes(out).items() if name.endswith(".df11")}
    line = commands.run("convert", model, out).error(
        4 if "elsewhere" not in how and "out" not in how else 2, "--exclude"
    )
    commands.run("convert", model, out, "--exclude", line.split("--exclude '")[1].split("'")[0]).fine()
    assert {name: data for name, data in tree_bytes(out).items() if name.endswith(".df11")} == before
    (model / name).unlink()
    commands.run("convert", model, out).fine()  # Now it is.
    assert set(before) - set(tree_bytes(out)) == {"sub/c.df11" if name == "sub" else "b.df11"}
