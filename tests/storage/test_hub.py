"""A repository as a store: it stays at its commit, checks the listed hashes, and loses nobody's change."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import ranges
from df11.storage.address import Address
from df11.storage.atomic import write_bytes
from df11.storage.entry import GIT_BYTES, Entry
from df11.storage.hub import HubStore
from df11.storage.local import LocalStore
from df11.storage.store import has_content, open_source, open_store
from tests.support.hub.server import corrupt, ignore_range, landed, status

DATA = np.random.default_rng(7).bytes(140_123)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Small ranges, so that small files have many, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def store(hub) -> HubStore:
    """A folder with one file of DATA in LFS."""
    hub.create("me/m").commit({"sub/x.bin": DATA})
    return open_source("hf://me/m/sub")


@pytest.fixture
def entry(store) -> Entry:
    (found,) = store.list()
    return found


def names(store) -> list[str]:
    return [entry.name for entry in store.list()]


# Listing.


def test_a_store_stays_on_its_commit(hub):
    repository = hub.create("me/m")
    first = repository.commit({"a.bin": DATA, "b/c.txt": b"1"})
    repository.tags["v1"] = first
    repository.branches["feature/x"] = first
    store = open_source("hf://me/m")
    repository.commit({"a.bin": None, "b/c.txt": b"2"})
    listed = store.list()
    assert [(entry.name, entry.size) for entry in listed] == [
        (".gitattributes", listed[0].size),
        ("a.bin", len(DATA)),
        ("b/c.txt", 1),
    ]
    assert store.find(["a.bin"])["a.bin"] == listed[1]
    assert store.read(listed[2]) == b"1"
    assert store.locate("") == f"hf://me/m@{first}"
    assert store.locate("a.bin") == f"hf://me/m@{first}/a.bin"
    assert (store.label, store.head, store.private) == ("hf://me/m", first, False)
    for revision in ("v1", "feature%2Fx", first):
        other = open_source(f"hf://me/m@{revision}")
        assert other.list() == listed
        assert other.locate("a.bin") == store.locate("a.bin")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        there = pickle.loads(pickle.dumps((store, listed[2]), protocol))
        assert there[1] == listed[2]
        assert there[0].list() == listed
        assert there[0].read(there[1]) == b"1"


def test_folders_and_files_of_a_repository(hub):
    hub.create("me/m").commit({"a/x.txt": b"1", "a/b/y.txt": b"2", "ab/z.txt": b"3"})
    store = open_source("hf://me/m/a")
    assert names(store) == ["b/y.txt", "x.txt"]
    assert not store.is_file
    store = open_source("hf://me/m/a/b/y.txt")
    assert names(store) == ["y.txt"]
    assert store.is_file
    assert store.read(store.list()[0]) == b"2"
    assert store.locate("y.txt") == f"hf://me/m@{store.head}/a/b/y.txt"
    assert store.address.path == "a/b/y.txt"


def test_a_listing_of_many_pages(hub):
    hub.page_size = 7
    hub.create("me/m").commit({f"{index:03}.txt": b"%d" % index for index in range(40)})
    store = open_source("hf://me/m")
    assert len(store.list()) == 41
    assert hub.count("GET", "/tree/") == 6
    store.find([])
    store.list()
    assert hub.count("GET", "/tree/") == 6  # A commit is listed once.


def test_a_page_that_fails_is_asked_for_again(hub):
    hub.page_size = 7
    hub.create("me/m").commit({f"{index:03}.txt": b"%d" % index for index in range(40)})
    hub.inject("GET", "/tree/", status(500), after=2)
    assert len(open_source("hf://me/m").list()) == 41


def test_bookkeeping_is_left_out(hub):
    hub.create("me/m").commit(
        {
            ".cache/x": b"1",
            "a/.git/y": b"2",
            ".x.df11.partial": b"3",
            ".x.df11.download": b"4",
            "a/b": b"5",
            "w.safetensors.part": b"6",
        }
    )
    store = open_source("hf://me/m")
    assert names(store) == [".gitattributes", "a/b"]
    (remark,) = store.remarks
    assert remark.startswith("w.safetensors.part: ")


@pytest.mark.parametrize("name", ["../x.txt", "a/../../x.txt", "/x.txt", "a//x.txt", "./x.txt"])
def test_names_that_lead_elsewhere_are_refused(name, hub):
    hub.create("me/m").commit({name: b"evil", "fine.txt": b""})
    with pytest.raises(errors.UsageError, match="no repository can hold"):
        open_source("hf://me/m").list()


@pytest.mark.parametrize("names", [("a", "a/b"), ("a.b/x", "a/b/c", "a/b/c/d/e", "a/b-c"), ("d/a", "d/a/b")])
def test_a_file_is_no_folder(names, hub):
    hub.create("me/m").commit(dict.fromkeys(names, b"x"))
    for place in ("hf://me/m", "hf://me/m/d") if names[0] == "d/a" else ("hf://me/m",):
        with pytest.raises(errors.UsageError, match=r"together.*a.* and '.*/"):
            open_source(place).list()


@pytest.mark.parametrize("name", ["a\\..\\x.txt", "a\nb", "x" * 256, "a/" + "é" * 128, "a/" * 500 + "a"])
def test_odd_names_are_left_out_and_told_of(name, hub):
    hub.create("me/m").commit({name: b"evil", "fine.txt": b""})
    store = open_source("hf://me/m")
    assert names(store) == [".gitattributes", "fine.txt"]
    (remark,) = store.remarks
    assert "left out" in remark
    assert errors.shortened(name) in remark
    assert len(remark.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "size"),
    [("elsewhere/x.txt", 1), ("subway/x.txt", 1), ("sub", 1), ("sub/x.txt", -1), ("sub/x.txt", None)],
)
def test_a_listing_that_no_folder_can_have_is_refused(path, size, store, monkeypatch):
    forged = SimpleNamespace(path=path, size=size, lfs=None, blob_id="0" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: [forged])
    with pytest.raises(errors.UsageError, match="no repository can hold") as caught:
        store.list()
    assert caught.value.file == store.locate("")


def test_a_repository_that_was_renamed(hub):
    hub.create("me/old").commit({"x.bin": DATA, "y.txt": b"1"})
    hub.rename("me/old", "me/new")
    store = open_source("hf://me/old")
    assert store.read(store.find(())["x.bin"]) == DATA
    assert store.read(store.find(())["y.txt"]) == b"1"


def test_nothing_there(hub):
    hub.create("me/m")
    for address in ("hf://me/none", "hf://me/m@none"):
        store = open_store(address)
        assert not store.refresh()
        assert (store.head, store.private, store.list(), store.find(["x"])) == (None, None, (), {})
        assert isinstance(pickle.loads(pickle.dumps(store)).missing(), errors.MissingError)
        with pytest.raises(errors.MissingError):
            open_source(address)
    with pytest.raises(errors.MissingError, match="no such file or folder"):
        open_source("hf://me/m/none").list()


# Content.


def test_a_file_in_lfs_is_held_to_its_sha256(hub, store, entry):
    assert entry == Entry("x.bin", len(DATA), hashlib.sha256(DATA).hexdigest())
    assert store.hashed(entry) == entry
    assert store.read(entry) == DATA
    hub.inject("GET", "/cdn/", corrupt(5))
    with pytest.raises(errors.DifferenceError, match=f"{store.locate('x.bin')}.*SHA-256.*{entry.sha256}"):
        store.read(entry)


def test_a_file_in_git_is_held_to_its_blob_id(hub):
    hub.create("me/m").commit({"config.json": b'{"a": 1}'})
    store = open_source("hf://me/m")
    entry = store.find(())["config.json"]
    assert entry == Entry("config.json", 8, None, Entry.of("", b'{"a": 1}').blob_id)
    assert store.read(entry) == b'{"a": 1}'
    for _ in range(2):  # Read whole, or as a file.
        hub.inject("GET", "/resolve/", corrupt(3))
    with pytest.raises(errors.DifferenceError, match=f"{store.locate('config.json')}.*git blob.*{entry.blob_id}"):
        store.read(entry)
    with pytest.raises(errors.DifferenceError, match="git blob"):
        store.open(entry)


@pytest.mark.parametrize("name", ["x.bin", "config.json"])
def test_content_is_compared_without_fetching(name, hub, tmp_path):
    hub.create("me/m").commit({"x.bin": DATA, "config.json": b'{"a": 1}'})
    store = open_source("hf://me/m")
    entry = store.find(())[name]
    data = {"x.bin": DATA, "config.json": b'{"a": 1}'}[name]
    local = LocalStore(tmp_path)
    for content, same in ((data, True), (data[:-1] + b"\0", False), (data[:-1], False), (data + b"\0", False)):
        (tmp_path / "z").write_bytes(content)
        assert has_content(local, local.find(["z"])["z"], entry) is same
    assert not hub.count("GET", "/resolve/")
    # The wanted hash is not the listed one: only then is the content needed.
    assert has_content(store, entry, Entry(name, len(data), hashlib.sha256(data).hexdigest()))
    assert hub.count("GET", "/resolve/") == (0 if entry.sha256 else 1)


def test_an_empty_file(hub):
    hub.create("me/m").commit({"empty.txt": b""})
    store = open_source("hf://me/m/empty.txt")
    (entry,) = store.list()
    assert store.read(entry) == b""
    assert not hub.count("GET", "/resolve/")


def test_a_large_file_is_not_held_in_memory(hub, store, entry, monkeypatch):
    monkeypatch.setattr("df11.storage.store.MAX_WHOLE_BYTES", len(DATA) - 1)
    with pytest.raises(errors.UsageError, match="too large"):
        store.read(entry)
    with pytest.raises(errors.UsageError, match="too large"):
        store.open(Entry("x.bin", 4 * GIT_BYTES + 1, None, "0" * 40))
    assert not hub.count("GET", "/resolve/")


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
@pytest.mark.parametrize("fault", [None, ignore_range])
def test_another_size_than_listed(size, fault, hub, store, entry):
    if fault is not None:
        hub.inject("GET", "/cdn/", fault, times=1000)
    wrong = dataclasses.replace(entry, size=size)
    with pytest.raises(errors.DifferenceError, match=f"a different size .*expected {size} bytes, found {len(DATA)}"):
        store.read(wrong)


# As a target


@pytest.fixture
def target(hub) -> HubStore:
    hub.create("me/t").commit({"old.txt": b"old"})
    store = open_store("hf://me/t")
    assert store.refresh()
    return store


def test_what_is_put_is_visible_with_the_commit(hub, target, tmp_path):
    repository = hub.repository("me/t")
    (tmp_path / "x.df11").write_bytes(DATA)
    (tmp_path / "small.txt").write_bytes(b"small")
    before = target.head
    puts = [
        target.put("a/x.df11", tmp_path / "x.df11"),
        target.put("small.txt", tmp_path / "small.txt"),
        target.put("b.json", b"{}"),
    ]
    assert [put.entry.name for put in puts] == ["a/x.df11", "small.txt", "b.json"]
    assert repository.head == before
    puts = pickle.loads(pickle.dumps(puts))  # They may have been put by another process.
    target.commit(puts, ["old.txt"], "A title")
    assert repository.head == target.head != before
    assert repository.commits[-1].parent == before
    assert repository.commits[-1].title == "A title"
    files = repository.files()
    del files[".gitattributes"]
    assert files == {"a/x.df11": DATA, "small.txt": b"small", "b.json": b"{}"}
    for put in puts:
        assert put.entry.same_content(target.find(())[put.entry.name])
        assert has_content(target, target.find(())[put.entry.name], Entry.of("", files[put.entry.name]))


def test_a_change_of_somebody_else_is_not_lost(hub, target):
    repository = hub.repository("me/t")
    other = repository.commit({"theirs.txt": b"1"})
    with pytest.raises(errors.ConflictError, match=f"somebody else.*{other}"):
        target.refresh()
    with pytest.raises(errors.ConflictError):
        target.commit([target.put("mine.txt", b"2")], [], "Mine")
    assert repository.head == other


@pytest.mark.parametrize("answer", [500, 412, None])
def test_a_commit_that_has_landed_is_not_made_again(answer, hub, target):
    repository = hub.repository("me/t")
    hub.inject("POST", "/commit/", landed(answer))
    target.commit([target.put("mine.txt", b"2")], [], "Mine")
    assert repository.read("mine.txt") == b"2"
    assert [commit.title for commit in repository.commits].count("Mine") == 1
    assert target.head == repository.head


def test_a_commit_that_has_not_landed_is_tried_again(hub, target):
    repository = hub.repository("me/t")
    hub.inject("POST", "/commit/", status(503), times=2)
    target.commit([target.put("mine.txt", b"2")], [], "Mine")
    assert repository.read("mine.txt") == b"2"
    assert target.head == repository.head


@pytest.mark.parametrize("private", [None, False, True])
@pytest.mark.parametrize("revision", ["", "@branch"])
def test_a_repository_is_created(private, revision, hub):
    store = open_store(f"hf://me/new{revision}")
    assert not store.refresh()
    store.create(private=private)
    assert store.private is hub.repository("me/new").private is bool(private)
    assert store.head == hub.repository("me/new").find(revision[1:] or "main").oid
    store.commit([store.put("x.txt", b"1")], [], "x")
    assert hub.repository("me/new").read("x.txt", revision[1:] or "main") == b"1"
    head = store.head
    store.create(private=private)  # It exists.
    assert store.head == head


def test_staging_is_for_one_process_and_empty(target, tmp_path):
    with target.staging(tmp_path / "work", 1) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert target.place("a.df11", folder / "00000") == (tmp_path / "work", folder / "00000" / "a.df11")
        (folder / "00000").mkdir()
        (folder / "00000" / "left.df11").write_bytes(b"x")
        with (
            pytest.raises(errors.ConflictError, match="another job"),
            open_store("hf://me/t").staging(tmp_path / "work", 1),
        ):
            pass
        assert (folder / "00000" / "left.df11").exists()
        with open_store("hf://me/other").staging(tmp_path / "work", 1) as other:
            assert other != folder
    assert list((tmp_path / "work").iterdir()) == []
    (folder / "00001").mkdir(parents=True)  # As a killed process leaves it.
    with target.staging(tmp_path / "work", 1) as again:
        assert again == folder
        assert not (folder / "00001").exists()
    with pytest.raises(errors.BudgetError, match="disk space"), target.staging(tmp_path / "work", 1 << 60):
        pass
    assert target.staged_bytes(5) == 5


def test_a_staging_folder_behind_a_link_is_refused(target, tmp_path):
    with target.staging(tmp_path / "work", 1) as folder:
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep").mkdir()
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(errors.NotAllowedError), target.staging(tmp_path / "work", 1):
        pass
    assert (tmp_path / "mine" / "keep").is_dir()


def test_a_staging_folder_that_becomes_a_link_removes_nothing_where_it_leads(target, tmp_path):
    (tmp_path / "mine" / "keep").mkdir(parents=True)
    with target.staging(tmp_path / "work", 1) as folder:
        (folder / "00000").mkdir()
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "mine")
        with pytest.raises(errors.UsageError, match="a link is in the way"):
            root, path = target.place("x", folder / "00000")
            write_bytes(path, b"x", root=root)
    assert (tmp_path / "mine" / "keep").is_dir()


def test_a_staging_folder_is_not_where_anybody_can_exchange_it(target, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    with pytest.raises(errors.NotAllowedError, match="anybody can exchange files"), target.staging(work, 1):
        pass
    work.chmod(0o1777)
    with target.staging(work, 1) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_which_stores_lie_in_which(tmp_path):
    store = HubStore(Address("me/m", None, "sub"))
    assert store.contains(HubStore(Address("Me/M")))
    assert not store.contains(HubStore(Address("me/m2")))
    assert not store.contains(LocalStore(tmp_path))
    assert not LocalStore(tmp_path).contains(store)
    assert store.check_name("a/b.txt")
    assert not store.check_name("a/../b.txt")
    assert not store.check_name("")


def test_the_card_of_the_repository_that_it_is_a_folder_of(hub):
    repository = hub.create("me/m")
    repository.commit({"README.md": b"# All of it", "sub/README.md": b"# A part", "sub/x.txt": b"1"})
    store = open_source("hf://me/m/sub")
    repository.commit({"README.md": b"# Later"})
    assert store.original_card() == b"# All of it"
    assert open_source("hf://me/m").original_card() is None  # Its own, which is listed.
    hub.create("me/none").commit({"sub/x.txt": b"1"})
    assert open_source("hf://me/none/sub").original_card() is None
