"""What a neighbour has put where df11 writes: it is refused or left alone, and what it leads to is not touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from df11.converter import work
from df11.formats import errors
from df11.storage import journal
from df11.storage.atomic import AtomicWriter, temporary_path, write_bytes
from df11.storage.local import LocalStore
from tests.support import commands, sources
from tests.support.sources import bf16


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "precious"
    path.parent.mkdir()
    path.write_bytes(b"precious")
    return path


def link(path: Path, to: Path) -> None:
    path.symlink_to(to)


def hard_link(path: Path, to: Path) -> None:
    path.hardlink_to(to)


def dangling(path: Path, to: Path) -> None:
    path.symlink_to(to.with_name("gone"))


def fifo(path: Path, to: Path) -> None:
    del to
    os.mkfifo(path)


def folder(path: Path, to: Path) -> None:
    del to
    path.mkdir()


@pytest.mark.parametrize("plant", [link, hard_link, dangling, fifo, folder])
@pytest.mark.parametrize("command", ["convert", "restore"])
def test_under_a_temporary_name(
    plant: Callable[[Path, Path], None], command: str, precious: Path, tmp_path: Path
) -> None:
    source = sources.write(tmp_path / "x.safetensors", [bf16("w", (64, 64))])
    commands.run("convert", source, tmp_path / "x.df11").fine()
    target = tmp_path / "t" / "y"
    target.parent.mkdir()
    plant(temporary_path(target, "partial"), precious)
    origin = source if command == "convert" else tmp_path / "x.df11"
    commands.run(command, origin, target).error(2, ".y.partial", "remove it")
    assert precious.read_bytes() == b"precious"
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]
    assert not target.exists()


def test_the_file_that_is_held_open_is_the_one_that_gets_the_name(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with pytest.raises(errors.ConflictError, match="taken the name"), AtomicWriter(target) as first:
        first.write(b"mine")
        temporary_path(target, "partial").unlink()
        with AtomicWriter(target) as second:  # Nobody holds this one's lock.
            second.write(b"half of another")
            first.commit()
    assert not target.exists()
    assert not list(tmp_path.iterdir())


def test_another_writers_file_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "x"
    given_up = AtomicWriter(target)
    temporary_path(target, "partial").unlink()
    with AtomicWriter(target) as other:
        other.write(b"other")
        given_up.__exit__(None, None, None)
        other.commit()
    assert target.read_bytes() == b"other"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_device_is_not_replaced(force: list[str], tmp_path: Path) -> None:
    source = sources.write(tmp_path / "x.safetensors", [bf16("w", (64, 64))])
    for name, make in (("fifo", os.mkfifo), ("folder", os.mkdir)):
        target = tmp_path / name
        make(target)
        before = target.stat()
        result = commands.run("convert", source, target, *force)
        assert result.code == 2
        assert name in result.err
        assert target.stat().st_ino == before.st_ino


def test_a_link_at_the_targets_name_is_replaced_and_not_followed(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(precious)
    write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert precious.read_bytes() == b"precious"


def test_links_on_the_way_are_not_followed(precious: Path, tmp_path: Path) -> None:
    root = tmp_path / "t"
    root.mkdir()
    (root / "sub").symlink_to(precious.parent)
    store = LocalStore(root)
    with pytest.raises(errors.UsageError, match="link") as caught:
        write_bytes(root / "sub" / "x", b"new", root=root)
    assert caught.value.file == str(root / "sub")
    with pytest.raises(errors.UsageError, match="link"):
        store.commit([store.put("sub/deep/x", b"new")], [], "")
    with pytest.raises(errors.UsageError, match="link"):
        store.commit([], ["sub/precious"], "")
    model = tmp_path / "model"
    sources.write(model / "sub" / "m.safetensors", [bf16("w", (64, 64))])
    commands.run("convert", model, root).error(2, root / "sub", "link")
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]
    # The way to the target itself is the user's.
    (tmp_path / "link").symlink_to(model)
    commands.run("convert", model, tmp_path / "link" / ".." / "out").fine()


def test_a_folder_that_can_be_written_but_not_listed(tmp_path: Path) -> None:
    root = tmp_path / "drop"
    root.mkdir()
    root.chmod(0o300)
    write_bytes(root / "x", b"new", root=root)
    root.chmod(0o700)
    assert (root / "x").read_bytes() == b"new"


def test_a_clean_up_that_fails_does_not_hide_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(RuntimeError, match="first") as caught, AtomicWriter(tmp_path / "x") as writer:
        writer.write(b"1")
        monkeypatch.setattr(os, "unlink", refuse)
        raise RuntimeError("first")
    monkeypatch.undo()
    assert ".x.partial" in caught.value.__notes__[0]
    # Its lock is not held any more.
    write_bytes(tmp_path / "x", b"new")


def test_nothing_more_open_than_it_was_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_bytes(tmp_path / "x", b"secret", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


# What is exchanged while a run is under way.


def test_a_link_that_came_after_the_listing_is_not_followed(precious: Path, tmp_path: Path) -> None:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "c"):
        (root / name).write_bytes(b"12345678")
    (root / "c").rename(root / "blob")
    (root / "c").symlink_to("blob")
    store = LocalStore(root)
    entries = {entry.name: entry for entry in store.list()}
    assert {store.read(entry) for entry in entries.values()} == {b"12345678"}
    (root / "a").unlink()
    (root / "a").symlink_to(precious)
    (root / "sub").rename(tmp_path / "old")
    (root / "sub").symlink_to(precious.parent)
    precious.with_name("b").write_bytes(b"precious")
    (root / "blob").unlink()
    (root / "blob").symlink_to(precious)
    for name in ("a", "sub/b", "c"):
        with pytest.raises(errors.ConflictError, match="replaced by something else after it was listed"):
            store.read(entries[name])
        with pytest.raises(errors.ConflictError):
            store.mode(entries[name])


def test_blobs_of_the_hubs_cache_are_read_through_their_links(precious: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--me--m"
    snapshot = model / "snapshots" / ("c" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1234").write_bytes(b"12345678")
    (snapshot / "sub" / "x").symlink_to("../../../blobs/1234")
    store = LocalStore(snapshot)
    (entry,) = store.list()
    assert store.read(entry) == b"12345678"
    (model / "blobs").rename(tmp_path / "old")
    (model / "blobs").symlink_to(precious.parent)
    precious.rename(precious.with_name("1234"))
    with pytest.raises(errors.ConflictError):
        store.read(entry)


@pytest.mark.parametrize("linked", ["snapshots", "commit"])
def test_a_snapshot_that_is_a_link_is_none(linked: str, tmp_path: Path) -> None:
    private = tmp_path / "private" / ("c" * 40)
    sources.write(private / "m.safetensors", [bf16("w", (64, 64))])
    model = tmp_path / "models--me--m"
    model.mkdir()
    if linked == "snapshots":
        (model / "snapshots").symlink_to(private.parent)
    else:
        (model / "snapshots").mkdir()
        (model / "snapshots" / ("c" * 40)).symlink_to(private)
    commands.run("convert", model, tmp_path / "t").error(2, model)
    assert not (tmp_path / "t").exists()


def convert_and_meanwhile(
    source: Path, target: Path, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> commands.Result:
    """Convert, and do something before the last file has its name: its bytes are on their way to the disk."""
    sync = AtomicWriter._sync

    def slow(writer: AtomicWriter) -> None:
        sync(writer)
        if writer.path.name == "a.df11":
            change()

    with monkeypatch.context() as patched:
        patched.setattr(AtomicWriter, "_sync", slow)
        return commands.run("convert", source, target)


@pytest.mark.parametrize("kind", ["new", "ours", "stale", "a file alone"])
def test_a_file_of_the_users_that_came_meanwhile_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    for name in ("a", "b"):
        sources.write(source / f"{name}.safetensors", [bf16(name, (64, 64))])
    if kind in ("ours", "stale"):
        commands.run("convert", source, target).fine()
        sources.write(source / "a.safetensors", [bf16("other", (64, 65))])
        (source / "b.safetensors").unlink()
    if kind == "a file alone":
        source, target = source / "a.safetensors", target / "a.df11"
        target.parent.mkdir()
    mine = (target.parent if kind == "a file alone" else target) / ("b.df11" if kind == "stale" else "a.df11")

    def change() -> None:
        mine.unlink(missing_ok=True)
        mine.write_bytes(b"mine")

    result = convert_and_meanwhile(source, target, change, monkeypatch)
    result.error(7, mine, "somebody else has changed this file in the meantime")
    assert mine.read_bytes() == b"mine"


def plant_link(path: Path, to: Path) -> None:
    path.hardlink_to(to)


def plant_pipe(path: Path, to: Path) -> None:
    del to
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [plant_link, plant_pipe])
def test_what_takes_the_place_of_the_journal_is_not_written_to(
    plant: Callable[[Path, Path], None], precious: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    sources.write(source / "a.safetensors", [bf16("a", (64, 64))])
    append = work.append

    def append_late(path: Path, marks: list[journal.Mark]) -> None:
        path.unlink()
        plant(path, precious)
        append(path, marks)

    monkeypatch.setattr(work, "append", append_late)
    commands.run("convert", source, target).error(7, target / ".df11-run", "has taken the place")
    assert precious.read_bytes() == b"precious"


def test_a_journal_with_one_name_many_times_is_read_at_once(tmp_path: Path) -> None:
    line = f"content 1 {'0' * 64} x\n".encode()
    (tmp_path / ".df11-run").write_bytes(b"run convert s 1\n" + line * 100_000 + line.replace(b"1", b"2", 1))
    assert [mark.size for mark in journal.read(tmp_path / ".df11-run")[1]["x"]] == [1, 2]
