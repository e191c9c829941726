"""Files of the Hub as they are read: by ranges, ahead, again from where it broke off; held to what the Hub lists."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import threading
import time
from pathlib import PurePosixPath

import numpy as np
import pytest

from df11.converter import ranges
from df11.converter.files import open_tree
from df11.converter.hub import HubFile, HubTree
from df11.converter.ranges import RangeReader
from df11.formats import errors
from df11.formats import hub as hub_client
from df11.formats.hub import Address
from df11.formats.writer import AtomicWriter
from tests.support import sources
from tests.support.hub.repository import Blob
from tests.support.hub.server import corrupt, cut, drip, hang, ignore_range, slow, status, truncated

PIECE = 10_000
DATA = np.random.default_rng(7).bytes(14 * PIECE + 123)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Small pieces, so that small files have many, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def file(hub) -> HubFile:
    """A file of DATA in LFS."""
    hub.create("me/m").commit({"sub/x.bin": DATA})
    (found,) = HubTree(Address.parse("hf://me/m/sub")).files
    return found


def read_all(reader, step=3_333) -> bytes:
    """Read in sequence."""
    out = np.empty(len(DATA), np.uint8)
    for start in range(0, len(DATA), step):
        reader.read(start, out[start : start + step])
    return out.tobytes()


@pytest.fixture
def reader(file):
    """Reads the file; sequential reading starts at 0."""
    reader = RangeReader(file.remote(), 0)
    yield reader
    reader.close()


def ranges_asked(hub, path="/cdn/") -> list[str]:
    return [request.headers["range"] for request in hub.requests if request.method == "GET" and path in request.path]


# Reading.


@pytest.mark.parametrize("step", [1_000, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, len(DATA)])
def test_in_sequence_each_byte_is_fetched_once(step, hub, reader):
    assert read_all(reader, step=step) == DATA
    asked = sorted(ranges_asked(hub), key=lambda text: int(text[6:].split("-")[0]))
    assert asked == [f"bytes={start}-{min(start + PIECE, len(DATA)) - 1}" for start in range(0, len(DATA), PIECE)]


def test_the_signed_address_is_used_again_and_gets_no_token(hub, reader):
    read_all(reader)
    # At most as many as go out before the first answer is there.
    assert 1 <= hub.count("GET", "/resolve/") <= ranges.PIECES
    assert all("authorization" in request.headers for request in hub.requests if "/resolve/" in request.path)
    assert not hub.leaks


def test_no_more_is_asked_for_than_fits(hub, reader):
    reader.read(0, np.empty(1, np.uint8))
    deadline = time.monotonic() + 30
    while len(ranges_asked(hub)) < ranges.PIECES and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(ranges_asked(hub)) == ranges.PIECES


def test_jumps_and_everything_between(reader):
    generator = np.random.default_rng(1)
    position = 0
    for _ in range(300):
        if generator.random() < 0.4:
            position = int(generator.integers(len(DATA)))
        size = min(int(generator.integers(1, 2 * PIECE)), len(DATA) - position)
        out = np.empty(size, np.uint8)
        reader.read(position, out)
        assert out.tobytes() == DATA[position : position + size]
        position = (position + size) % len(DATA)


def test_a_jump_fetches_just_what_is_asked_for(hub, reader):
    out = np.empty(7, np.uint8)
    reader.read(5 * PIECE + 3, out)
    assert out.tobytes() == DATA[5 * PIECE + 3 :][:7]
    assert ranges_asked(hub) == [f"bytes={5 * PIECE + 3}-{5 * PIECE + 9}"]


def test_memory_is_a_ring(reader):
    read_all(reader)
    reader.read(0, np.empty(100, np.uint8))
    reader.read(100, np.empty(4 * PIECE, np.uint8))
    held = [piece.buffer for piece in reader._held.values()]
    assert len(held) + reader._free.qsize() <= ranges.PIECES
    assert sum(buffer.nbytes for buffer in held) <= ranges.PIECES * PIECE


# Trouble on the way.

FAULTS = {
    "cut": cut(after=4_000),
    "cut before the body": cut(after=0),
    "truncated": truncated(by=6_000),
    "an error": status(500),
    "too many requests": status(429, {"Retry-After": "0"}),
    "wait until a date": status(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "an expired address": status(403),
    "a strange status": status(502),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("after", [0, 6])
def test_it_goes_on_where_it_broke_off(fault, after, hub, reader):
    hub.inject("GET", "/cdn/", fault, after=after)
    assert read_all(reader) == DATA
    # Nothing that had come was fetched again.
    assert sum(request.sent for request in hub.requests if request.cdn) == len(DATA)


def test_as_long_as_something_comes_it_goes_on(hub, reader):
    hub.inject("GET", "/cdn/", cut(after=900), times=80)
    assert read_all(reader) == DATA


@pytest.mark.parametrize(
    "fault",
    [cut(after=0), status(500), status(429, {"Retry-After": "0"}), status(403)],
    ids=["cut", "500", "429", "403"],
)
def test_it_gives_up(fault, hub, reader, file):
    hub.inject("GET", "/cdn/", fault, times=1000)
    with pytest.raises(errors.RetryLaterError) as caught:
        read_all(reader)
    assert caught.value.file == file.label
    assert caught.value.exit_code == 5


def test_after_an_address_has_expired_each_piece_gets_its_own(hub, file):
    # An address may hold for one range only: asking for a new one each time is then the only way.
    hub.inject("GET", "/cdn/", status(403), after=5)
    remote = file.remote()
    out = np.empty(PIECE, np.uint8)
    for index in range(12):
        remote.fetch(index * PIECE, out)
        assert out.tobytes() == DATA[index * PIECE :][:PIECE]
    assert hub.count("GET", "/resolve/") == 1 + 7


def test_the_wait_that_the_server_asks_for(monkeypatch, hub, file):
    waits = []
    monkeypatch.setattr(hub_client, "on_pause", lambda error, seconds: waits.append((str(error), seconds)))
    hub.inject("GET", "/cdn/", status(429, {"Retry-After": "17"}))
    hub.inject("GET", "/cdn/", status(429, {"RateLimit": '"resolvers";r=0;t=23'}))
    hub.inject("GET", "/cdn/", status(503, {"Retry-After": "99999"}))
    out = np.empty(len(DATA), np.uint8)

    class Never(threading.Event):
        def wait(self, timeout=None):
            del timeout
            return False

    file.remote().fetch(0, out, Never())
    assert out.tobytes() == DATA
    assert [seconds for _, seconds in waits] == [17, 23, hub_client.LONGEST_WAIT]
    assert "17 s" in waits[0][0]


def test_a_server_that_is_silent(monkeypatch, hub, reader):
    monkeypatch.setitem(hub_client.TIMEOUTS, "read", 0.05)
    hub.inject("GET", "/cdn/", hang, times=1000)
    with pytest.raises(errors.RetryLaterError, match="in time"):
        read_all(reader)


def test_a_server_that_is_slow_for_once(monkeypatch, hub, reader):
    monkeypatch.setitem(hub_client.TIMEOUTS, "read", 0.2)
    hub.inject("GET", "/cdn/", slow(1.0), times=2)
    assert read_all(reader) == DATA


def test_ranges_that_are_ignored(hub, reader):
    hub.inject("GET", "/cdn/", ignore_range, times=1000)
    assert read_all(reader) == DATA


def test_a_range_that_was_not_asked_for(hub, reader):
    hub.inject("GET", "/cdn/", status(206, {"Content-Range": f"bytes 5-9/{len(DATA)}"}, body=b"12345"), times=1000)
    with pytest.raises(errors.RetryLaterError, match="other bytes"):
        read_all(reader)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
@pytest.mark.parametrize("fault", [None, ignore_range])
def test_another_size_than_listed(size, fault, hub, file):
    if fault is not None:
        hub.inject("GET", "/cdn/", fault, times=1000)
    wrong = dataclasses.replace(file, size=size)
    with pytest.raises(errors.DifferenceError, match=f"another size .*expected {size} bytes, found {len(DATA)}"):
        wrong.read_bytes()


def test_a_file_that_is_shorter_than_where_it_is_read(hub, file):
    remote = dataclasses.replace(file, size=10 * len(DATA)).remote()
    with pytest.raises(errors.DifferenceError, match="another size"):
        remote.fetch(5 * len(DATA), np.empty(10, np.uint8))
    assert hub.requests[-1].status == 416


def test_who_waits_is_let_go(hub, reader):
    hub.inject("GET", "/cdn/", hang, times=1000)
    ended = []

    def read():
        try:
            reader.read(0, np.empty(PIECE, np.uint8))
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not ranges_asked(hub):
        time.sleep(0.01)
    reader.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(ended) == 1


# Content.


def writer_bytes(file, path):
    with AtomicWriter(path) as writer:
        file.copy_to(writer)
        writer.commit()
    return path.read_bytes()


def test_a_copy_is_held_to_its_sha256(hub, file, tmp_path):
    assert file.sha256 == hashlib.sha256(DATA).hexdigest()
    assert writer_bytes(file, tmp_path / "x") == DATA
    assert file.has_content(tmp_path / "x")
    hub.inject("GET", "/cdn/", corrupt(5), after=3)
    with pytest.raises(errors.DifferenceError, match=f"{file.label}.*SHA-256.*{file.sha256}"):
        writer_bytes(file, tmp_path / "y")
    assert not (tmp_path / "y").exists()
    (tmp_path / "z").write_bytes(DATA[:-1] + b"\0")
    assert not file.has_content(tmp_path / "z")
    (tmp_path / "z").write_bytes(DATA[:-1])
    assert not file.has_content(tmp_path / "z")


def test_a_git_file_is_held_to_its_blob_id(hub, tmp_path):
    hub.create("me/m").commit({"config.json": b'{"a": 1}'})
    file = next(file for file in HubTree(Address.parse("hf://me/m")).files if file.name.name == "config.json")
    assert file.sha256 is None
    assert file.read_bytes() == b'{"a": 1}'
    assert writer_bytes(file, tmp_path / "x") == b'{"a": 1}'
    assert file.has_content(tmp_path / "x")
    hub.inject("GET", "/resolve/", corrupt(3))
    with pytest.raises(errors.DifferenceError, match=f"{file.label}.*git blob.*{file.blob_id}"):
        file.read_bytes()


def test_an_empty_file(hub):
    hub.create("me/m").commit({"empty.txt": b""})
    (file,) = HubTree(Address.parse("hf://me/m/empty.txt")).files
    assert file.read_bytes() == b""
    assert not hub.count("GET", "/resolve/")


def test_a_large_file_is_not_held_in_memory(hub, file, monkeypatch):
    monkeypatch.setattr("df11.converter.hub.MAX_WHOLE_BYTES", len(DATA) - 1)
    with pytest.raises(errors.UsageError, match="too large"):
        file.read_bytes()
    assert not hub.count("GET", "/resolve/")


def test_a_source_in_git(hub, tmp_path):
    path = sources.write(tmp_path / "x.safetensors", [sources.bf16("a", (50, 100))])
    repository = hub.create("me/m")
    data = path.read_bytes()
    repository.apply("main", {"x.safetensors": Blob(len(data), hashlib.sha256(data).hexdigest(), data)}, "x")
    (file,) = HubTree(Address.parse("hf://me/m/x.safetensors")).files
    with file.open() as source:
        out = np.empty(10_000, np.uint8)
        source.read(0, out)
        assert out.tobytes() == data[-10_000:]
        assert source.sha256(lambda _: None) == sources.sha256(path)


@pytest.mark.parametrize("head", [10, 300, 1 << 20])
def test_a_header_of_any_size(head, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("df11.converter.hub.HEAD_BYTES", head)
    path = sources.write(
        tmp_path / "x.safetensors", [sources.bf16(f"tensor.{index}", (300,), index) for index in range(20)]
    )
    hub.create("me/m").commit({"x.safetensors": path})
    (file,) = HubTree(Address.parse("hf://me/m/x.safetensors")).files
    with file.open() as source:
        assert source.sha256(lambda _: None) == sources.sha256(path) == file.sha256


# Trees.


def test_a_tree_stays_on_its_commit(hub):
    repository = hub.create("me/m")
    first = repository.commit({"a.bin": DATA, "b/c.txt": b"1"})
    repository.tags["v1"] = first
    repository.branches["feature/x"] = first
    tree = open_tree("hf://me/m")
    repository.commit({"a.bin": None, "b/c.txt": b"2"})
    assert [(str(file.name), file.size) for file in tree.files] == [
        (".gitattributes", tree.files[0].size),
        ("a.bin", len(DATA)),
        ("b/c.txt", 1),
    ]
    assert tree.files[2].read_bytes() == b"1"
    assert tree.label == f"hf://me/m@{first}"
    assert tree.files[1].label == f"hf://me/m@{first}/a.bin"
    assert dataclasses.astuple(tree.origin) == ("me/m", first, "")
    for revision in ("v1", "feature%2Fx", first):
        assert open_tree(f"hf://me/m@{revision}").files == tree.files
    assert pickle.loads(pickle.dumps(tree.files[1])) == tree.files[1]


def test_folders_and_files_of_a_repository(hub):
    hub.create("me/m").commit({"a/x.txt": b"1", "a/b/y.txt": b"2", "ab/z.txt": b"3"})
    tree = open_tree("hf://me/m/a")
    assert not tree.is_file
    assert [file.name for file in tree.files] == [PurePosixPath("b/y.txt"), PurePosixPath("x.txt")]
    tree = open_tree("hf://me/m/a/b/y.txt")
    assert tree.is_file
    assert [file.name for file in tree.files] == [PurePosixPath("y.txt")]
    assert tree.origin.path == "a/b/y.txt"


def test_a_listing_of_many_pages(hub):
    hub.page_size = 7
    hub.create("me/m").commit({f"{index:03}.txt": b"%d" % index for index in range(40)})
    assert len(open_tree("hf://me/m").files) == 41
    assert hub.count("GET", "/tree/") == 6


def test_a_page_that_fails_is_asked_for_again(hub):
    hub.page_size = 7
    hub.create("me/m").commit({f"{index:03}.txt": b"%d" % index for index in range(40)})
    hub.inject("GET", "/tree/", status(500), after=2)
    assert len(open_tree("hf://me/m").files) == 41


def test_bookkeeping_is_left_out(hub):
    hub.create("me/m").commit(
        {".cache/x": b"1", "a/.git/y": b"2", ".x.df11.partial": b"3", ".x.df11.download": b"4", "a/b": b"5"}
    )
    assert [str(file.name) for file in open_tree("hf://me/m").files] == [".gitattributes", "a/b"]


@pytest.mark.parametrize("name", ["../x.txt", "a/../../x.txt", "/x.txt", "a//x.txt", "./x.txt", "a\\..\\x.txt", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(name, hub):
    hub.create("me/m").commit({name: b"evil"})
    with pytest.raises(errors.UsageError, match="no repository can have"):
        open_tree("hf://me/m")


def test_a_repository_that_was_renamed(hub):
    hub.create("me/old").commit({"x.bin": DATA, "y.txt": b"1"})
    hub.rename("me/old", "me/new")
    files = {file.name.name: file for file in open_tree("hf://me/old").files}
    assert files["x.bin"].read_bytes() == DATA
    assert files["y.txt"].read_bytes() == b"1"


def test_a_slow_line_is_no_error(hub, reader):
    hub.inject("GET", "/cdn/", drip(100_000), times=2)
    assert read_all(reader) == DATA
