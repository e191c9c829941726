"""A folder, or one file, as a store."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from df11.formats import errors
from df11.storage import local
from df11.storage.address import Address
from df11.storage.entry import Entry
from df11.storage.hub import HubStore
from df11.storage.local import LocalStore
from df11.storage.store import Put, has_content, open_source, open_store, same_content


def fill(folder: Path, **files: bytes) -> Path:
    """Write files; ``__`` is a slash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill(tmp_path / "model", b=b"22", a__c=b"333", a__b__d=b"", ab=b"1")


# Listing and finding.


def test_a_folder(folder):
    store = open_source(folder)
    assert isinstance(store, LocalStore)
    assert store.list() == (Entry("a/b/d", 0), Entry("a/c", 3), Entry("ab", 1), Entry("b", 2))
    assert (store.is_file, store.label, store.root) == (False, str(folder), folder)
    assert (store.address, store.head, store.private, store.versioned) == (None, None, None, False)
    assert store.locate("a/c") == str(folder / "a/c")
    assert store.find(["a/c", "none", "ab", "a/none", "b/none"]) == {"a/c": Entry("a/c", 3), "ab": Entry("ab", 1)}
    assert store.find([]) == {}
    assert store.entry("ab") == Entry("ab", 1)
    with pytest.raises(errors.ConflictError, match=r"model/none: this file was removed in the meantime; run the same"):
        store.entry("none")


def test_a_file_alone(folder):
    store = open_source(folder / "a" / "c")
    assert store.list() == (Entry("c", 3),)
    assert (store.is_file, store.label, store.root) == (True, str(folder / "a/c"), folder / "a")
    assert store.locate("c") == str(folder / "a/c")
    assert store.read(store.list()[0]) == b"333"


def test_nothing_there(tmp_path):
    store = open_store(tmp_path / "none")
    assert not store.refresh()
    assert (store.list(), store.find(["x"])) == ((), {})
    with pytest.raises(errors.MissingError) as caught:
        open_source(tmp_path / "none")
    assert caught.value.file == str(tmp_path / "none")


@pytest.mark.parametrize(
    ("path", "hint"),
    [("owner/name", "hf://owner/name"), ("hf:/owner/name", "pull"), ("https://host/x", "hf://"), ("a/b/c", "path")],
)
def test_what_is_said_of_nothing(path, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.MissingError) as caught:
        open_source(Path(path))
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 300])
def test_a_name_that_no_file_can_have(name, folder):
    with pytest.raises(errors.Df11Error):
        open_source(name)
    assert LocalStore(folder).find([name, f"a/{name}", "ab"]) == {"ab": Entry("ab", 1)}


def test_a_file_where_a_folder_was(folder):
    store = LocalStore(folder / "new")
    (folder / "new").write_bytes(b"")
    with pytest.raises(errors.UsageError, match="not a folder"):
        store.list()


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "loop"])
def test_what_is_no_file_is_in_the_way(kind, folder):
    path = folder / "x"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("gone"),
        "loop": lambda: path.symlink_to("x"),
    }[kind]()
    with pytest.raises(errors.UsageError) as caught:
        LocalStore(folder).find(["x"])
    assert caught.value.file == str(path)


def test_bookkeeping_and_unfinished_downloads_are_left_out(folder):
    fill(folder, **{".git__x": b"1", "a__.cache__y": b"2", ".x.df11.partial": b"3", "a__w.safetensors.part": b"4"})
    (folder / "._link").symlink_to("gone")  # Not even looked at.
    store = LocalStore(folder)
    assert [entry.name for entry in store.list()] == ["a/b/d", "a/c", "ab", "b"]
    (remark,) = store.remarks
    assert remark.startswith("a/w.safetensors.part: ")


def test_names_are_sorted_as_text_not_as_paths(tmp_path):
    store = LocalStore(fill(tmp_path / "x", **{"a__z": b"", "a-b": b"", "a.b": b"", "a0": b""}))
    assert [entry.name for entry in store.list()] == ["a-b", "a.b", "a/z", "a0"]


# Links.


def test_links_are_followed(folder, tmp_path):
    (folder / "link").symlink_to(folder / "b")
    (folder / "folder").symlink_to(folder / "a", target_is_directory=True)
    store = LocalStore(folder)
    listed = {entry.name: entry for entry in store.list()}
    assert (listed["link"], listed["folder/c"]) == (Entry("link", 2), Entry("folder/c", 3))
    assert store.find(["link", "folder/c"]) == {name: listed[name] for name in ("link", "folder/c")}
    assert store.read(listed["link"]) == b"22"
    assert not store.refused
    (tmp_path / "to").symlink_to(folder, target_is_directory=True)
    assert LocalStore(tmp_path / "to").list() == store.list()


def test_links_that_lead_out_are_named_and_folders_not_looked_into(folder, tmp_path):
    fill(tmp_path / "other", e=b"55555")
    (folder / "a" / "out").symlink_to(tmp_path / "other" / "e")
    (folder / "folder").symlink_to(tmp_path / "other", target_is_directory=True)
    store = LocalStore(folder)
    assert Entry("a/out", 5) in store.list()
    assert not [entry for entry in store.list() if entry.name.startswith("folder")]
    assert list(store.refused) == ["a/out", "folder/"]
    for name, error in store.refused.items():
        assert isinstance(error, errors.UsageError)
        assert "leads out" in error.what
        assert f"--exclude '{name}'" in error.hint


def test_the_links_of_the_hubs_cache_are_its_own(tmp_path):
    root = tmp_path / "models--you--m"
    fill(root / "blobs", abc=b"1")
    for name in ("x", "sub/y"):
        link = root / "snapshots" / ("1" * 40) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / "blobs" / "abc")
    for path in (root, root / "snapshots" / ("1" * 40), root / "snapshots" / ("1" * 40) / "sub"):
        store = open_source(path)
        assert [entry.size for entry in store.list()] in ([1, 1], [1])
        assert not store.refused


@pytest.mark.parametrize("target", [".", "..", "../a"])
def test_a_link_to_a_folder_above_is_refused(target, folder):
    (folder / "a" / "loop").symlink_to(target, target_is_directory=True)
    with pytest.raises(errors.UsageError, match="link") as caught:
        LocalStore(folder).list()
    assert str(caught.value.file).startswith(str(folder / "a" / "loop"))


def test_a_link_that_leads_nowhere(folder):
    (folder / "a" / "x").symlink_to("gone")
    store = LocalStore(folder)
    assert "a/x" not in [entry.name for entry in store.list()]
    (error,) = store.refused.values()
    assert isinstance(error, errors.MissingError)
    assert error.file == str(folder / "a" / "x")


def test_two_links_to_one_folder_are_fine(folder):
    for name in ("one", "two"):
        (folder / name).symlink_to("a", target_is_directory=True)
    names = [entry.name for entry in LocalStore(folder).list()]
    assert names == ["a/b/d", "a/c", "ab", "b", "one/b/d", "one/c", "two/b/d", "two/c"]


# The Hub's cache.


def cache(folder: Path, *commits: str, main: str | None = None) -> Path:
    root = folder / "models--owner--name"
    fill(root / "blobs", f0=b"weights")
    for commit in commits:
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "x.safetensors").symlink_to("../../blobs/f0")
        (snapshot / "commit.txt").write_text(commit)
    if main is not None:
        fill(root / "refs", main=main.encode())
    return root


@pytest.mark.parametrize(
    ("commits", "main", "chosen"),
    [
        (["aaa"], None, "aaa"),
        (["aaa"], "aaa", "aaa"),
        (["aaa"], "zzz", "aaa"),  # The only one there is.
        (["aaa", "bbb", "ccc"], "bbb\n", "bbb"),
    ],
)
def test_a_folder_of_the_hubs_cache_means_its_snapshot(commits, main, chosen, tmp_path):
    root = cache(tmp_path / "hub", *commits, main=main)
    store = open_source(root)
    assert store.label == str(root)
    assert store.root == root / "snapshots" / chosen
    listed = {entry.name: entry for entry in store.list()}
    assert set(listed) == {"commit.txt", "x.safetensors"}
    assert store.read(listed["commit.txt"]) == chosen.encode()
    assert store.read(listed["x.safetensors"]) == b"weights"
    assert store.locate("x.safetensors") == str(root / "snapshots" / chosen / "x.safetensors")


@pytest.mark.parametrize(("commits", "main"), [([], None), (["aaa", "bbb"], None), (["aaa", "bbb"], "zzz")])
def test_a_folder_of_the_hubs_cache_without_a_choice(commits, main, tmp_path):
    root = cache(tmp_path, *commits, main=main)
    (root / "snapshots").mkdir(exist_ok=True)
    with pytest.raises(errors.UsageError, match=f"{len(commits)} snapshots") as caught:
        open_source(root)
    assert caught.value.file == str(root)
    assert ("download" in caught.value.hint) == (not commits)


def test_other_folders_are_what_they_are(tmp_path):
    fill(tmp_path / "models--owner--name", x=b"1")
    assert [entry.name for entry in open_source(tmp_path / "models--owner--name").list()] == ["x"]
    fill(tmp_path / "other", snapshots__aaa__x=b"1")
    assert [entry.name for entry in open_source(tmp_path / "other").list()] == ["snapshots/aaa/x"]


# Content.


def test_reading(folder):
    store = LocalStore(folder)
    (folder / "b").write_bytes(b"0123456789")
    (folder / "b").chmod(0o640)
    with store.open(Entry("b", 10)) as file:
        out = np.empty(4, np.uint8)
        file.read(3, out)
        assert out.tobytes() == b"3456"
        assert (file.label, file.size, store.mode(Entry("b", 10))) == (str(folder / "b"), 10, 0o640)
        with pytest.raises(errors.ConflictError, match="changed"):
            file.read(8, out)
    assert store.read(Entry("b", 10)) == b"0123456789"
    with pytest.raises(errors.ConflictError, match="changed"):
        store.read(Entry("b", 9))
    with pytest.raises(errors.DifferenceError):
        store.read(Entry.of("b", b"012345678x"))
    with pytest.raises(errors.MissingError):
        store.read(Entry("none", 1))


def test_a_large_file_is_not_read_as_a_whole(folder, monkeypatch):
    monkeypatch.setattr("df11.storage.store.MAX_WHOLE_BYTES", 2)
    assert LocalStore(folder).read(Entry("b", 2)) == b"22"
    with pytest.raises(errors.UsageError, match="too large"):
        LocalStore(folder).read(Entry("a/c", 3))


def test_hashes_are_computed_once(folder):
    store = LocalStore(folder)
    hashed = store.hashed(Entry("a/c", 3))
    assert hashed == Entry.of("a/c", b"333")
    (folder / "a" / "c").unlink()
    assert store.hashed(hashed) == hashed
    assert store.hashed(Entry("a/c", 3, "0" * 64)) == Entry("a/c", 3, "0" * 64)


def test_content_is_compared(folder, tmp_path):
    one, other = LocalStore(folder), LocalStore(fill(tmp_path / "other", b=b"22", c=b"23", d=b"222"))
    found = other.find(["b", "c", "d"])
    assert [same_content(one, Entry("b", 2), other, found[name]) for name in "bcd"] == [True, False, False]
    assert [has_content(other, found[name], Entry.of("b", b"22")) for name in "bcd"] == [True, False, False]
    # A different size: nothing is read. With a hash, the other file need not be read.
    (folder / "b").unlink()
    assert not same_content(one, Entry("b", 2), other, found["d"])
    assert same_content(one, Entry.of("b", b"22"), other, found["b"])


def test_which_stores_lie_in_which(folder, tmp_path):
    store = LocalStore(folder)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for inside in (folder, folder / "a", folder / "new" / "deep", tmp_path / "link" / "x", folder / "a" / ".."):
        assert store.contains(LocalStore(inside))
    for outside in (tmp_path, tmp_path / "model2", folder / ".." / "x"):
        assert not store.contains(LocalStore(outside))
    assert not LocalStore(folder / "b").contains(store)  # It is a file.
    assert not store.contains(HubStore(Address("me/m")))


# As a target.


def test_a_file_is_written_where_it_stays(tmp_path):
    store = LocalStore(tmp_path / "new" / "deep")
    store.create(private=None)
    assert store.refresh()
    store.create(private=True)
    root, path = store.place("a/x.df11", None)
    assert root == store.root
    assert path == tmp_path / "new" / "deep" / "a" / "x.df11"
    path.parent.mkdir()
    path.write_bytes(b"123")
    put = store.put("a/x.df11", path)
    assert put == Put(Entry("a/x.df11", 3), None)
    store.commit([put], [], "x")
    assert path.read_bytes() == b"123"
    with store.staging(tmp_path / "work", 1 << 60) as staging:
        assert staging is None
    assert not (tmp_path / "work").exists()
    assert store.staged_bytes(5) == 0
    assert store.original_card() is None


def test_what_is_in_memory_is_written_with_the_commit(folder):
    store = LocalStore(folder)
    puts = [store.put("new/x.json", b"{}"), store.put("b", b"other")]
    assert [put.entry for put in puts] == [Entry.of("new/x.json", b"{}"), Entry.of("b", b"other")]
    assert (folder / "b").read_bytes() == b"22"
    assert not (folder / "new").exists()
    store.commit(pickle.loads(pickle.dumps(puts)), ["ab", "a/none"], "x")
    assert (folder / "new" / "x.json").read_bytes() == b"{}"
    assert (folder / "b").read_bytes() == b"other"
    assert [entry.name for entry in store.list()] == ["a/b/d", "a/c", "b", "new/x.json"]


def test_first_what_goes_then_what_comes_in_order(folder, monkeypatch):
    # The manifest forgets only what is gone, and names only what exists.
    steps = []
    write, remove = local.write_bytes, local.remove

    def writing(path, data, **options):
        steps.append(path.name)
        write(path, data, **options)

    monkeypatch.setattr(local, "write_bytes", writing)
    monkeypatch.setattr(local, "remove", lambda path, root: (steps.append(f"-{path.name}"), remove(path, root)))
    store = LocalStore(folder)
    removed, puts = ["ab", "a/c"], [store.put(name, b"x") for name in ("z", "m", "b")]
    store.commit(puts, removed, "x")
    assert steps == ["-ab", "-c", "z", "m", "b"]


def test_a_commit_that_fails(folder):
    store = LocalStore(folder)
    for puts, removed in (
        ([store.put("b/x", b"1")], []),
        ([store.put("a", b"1")], []),
        ([], ["a"]),
        ([store.put("x" * 300, b"1")], []),
    ):
        with pytest.raises(errors.Df11Error) as caught:
            store.commit(puts, removed, "x")
        assert str(folder) in str(caught.value.file)
    assert [entry.name for entry in store.list()] == ["a/b/d", "a/c", "ab", "b"]


def test_stores_can_be_pickled(folder):
    for path in (folder, folder / "b", folder / "none"):
        store = LocalStore(path)
        store.list()
        there = pickle.loads(pickle.dumps(store))
        assert vars(there) == vars(store)
        assert there.list() == store.list()
        assert there.check_name("x")
        assert not there.check_name("")


def test_folders_in_folders_in_folders(tmp_path):
    folder = tmp_path / "model"
    (folder / "/".join(["a"] * 100)).mkdir(parents=True)
    (folder / "/".join(["a"] * 100) / "x").write_bytes(b"1")
    assert len(LocalStore(folder).list()) == 1
    (folder / "/".join(["a"] * 101)).mkdir()
    with pytest.raises(errors.UsageError, match="folders in folders in folders"):
        LocalStore(folder).list()


def test_what_a_cache_names_as_its_newest_commit_may_be_anything(tmp_path):
    model = tmp_path / "models--me--m"
    fill(model / "snapshots" / ("c" * 40), x=b"1")
    fill(model / "refs", main=b"\xff\xfe\n")
    assert open_source(model).list() == (Entry("x", 1),)
