"""Files of the Hub as they are read: by ranges, ahead, resumed after a break."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import limits, ranges
from df11.storage.address import Address
from df11.storage.ranges import RangeFile, RangeReader, RemoteFile
from tests.support.hub.server import cut, drip, hang, ignore_range, slow, status, truncated

RANGE = 10_000
DATA = np.random.default_rng(7).bytes(14 * RANGE + 123)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Small ranges, so that small files have many, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def address(hub) -> Address:
    """The address of a file of DATA in LFS, at its commit."""
    return Address("me/m", hub.create("me/m").commit({"sub/x.bin": DATA}), "sub/x.bin")


@pytest.fixture
def remote(address) -> RemoteFile:
    return RemoteFile(address, len(DATA))


def read_all(reader, step=3_333) -> bytes:
    """Read in sequence."""
    out = np.empty(len(DATA), np.uint8)
    for start in range(0, len(DATA), step):
        reader.read(start, out[start : start + step])
    return out.tobytes()


@pytest.fixture
def reader(remote):
    """Reads the file; sequential reading starts at 0."""
    reader = RangeReader(remote, 0)
    yield reader
    reader.close()


def ranges_asked(hub, path="/cdn/") -> list[str]:
    return [request.headers["range"] for request in hub.requests if request.method == "GET" and path in request.path]


# Reading.


@pytest.mark.parametrize("step", [1_000, RANGE - 1, RANGE, RANGE + 1, 5 * RANGE, len(DATA)])
def test_in_sequence_each_byte_is_fetched_once(step, hub, reader):
    assert read_all(reader, step=step) == DATA
    asked = sorted(ranges_asked(hub), key=lambda text: int(text[6:].split("-")[0]))
    assert asked == [f"bytes={start}-{min(start + RANGE, len(DATA)) - 1}" for start in range(0, len(DATA), RANGE)]


def test_the_signed_address_is_used_again_and_gets_no_token(hub, reader):
    read_all(reader)
    # At most as many as are sent before the first response arrives.
    assert 1 <= hub.count("GET", "/resolve/") <= ranges.RANGES
    assert all("authorization" in request.headers for request in hub.requests if "/resolve/" in request.path)
    assert not hub.leaks


def test_no_more_is_asked_for_than_fits(hub, reader):
    reader.read(0, np.empty(1, np.uint8))
    deadline = time.monotonic() + 30
    while len(ranges_asked(hub)) < ranges.RANGES and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(ranges_asked(hub)) == ranges.RANGES


def test_jumps_and_everything_between(reader):
    generator = np.random.default_rng(1)
    position = 0
    for _ in range(300):
        if generator.random() < 0.4:
            position = int(generator.integers(len(DATA)))
        size = min(int(generator.integers(1, 2 * RANGE)), len(DATA) - position)
        out = np.empty(size, np.uint8)
        reader.read(position, out)
        assert out.tobytes() == DATA[position : position + size]
        position = (position + size) % len(DATA)


def test_a_jump_fetches_just_what_is_asked_for(hub, reader):
    out = np.empty(7, np.uint8)
    reader.read(5 * RANGE + 3, out)
    assert out.tobytes() == DATA[5 * RANGE + 3 :][:7]
    assert ranges_asked(hub) == [f"bytes={5 * RANGE + 3}-{5 * RANGE + 9}"]


def test_memory_is_a_ring(reader):
    read_all(reader)
    reader.read(0, np.empty(100, np.uint8))
    reader.read(100, np.empty(4 * RANGE, np.uint8))
    held = [part.buffer for part in reader._held.values()]
    assert len(held) + reader._free.qsize() <= ranges.RANGES
    assert sum(buffer.nbytes for buffer in held) <= ranges.RANGES * RANGE


# As a file.


def test_a_file_is_fetched_ahead_only_from_where_it_is_expected(hub, address):
    with RangeFile(address, len(DATA)) as file:
        out = np.empty(9, np.uint8)
        file.read(4, out)
        assert out.tobytes() == DATA[4:13]
        file.expect(RANGE + 1)
        assert ranges_asked(hub) == ["bytes=4-12"]  # Until the first bytes from there are requested.
        file.read(RANGE + 1, out)
        assert out.tobytes() == DATA[RANGE + 1 :][:9]
        file.read(RANGE + 10, out)
        assert out.tobytes() == DATA[RANGE + 10 :][:9]
    assert f"bytes={RANGE + 1}-{2 * RANGE}" in ranges_asked(hub)


def test_nothing_is_fetched_ahead_beyond_where_reading_ends(hub, address):
    first, last = RANGE + 1, 3 * RANGE + 7
    with RangeFile(address, len(DATA)) as file:
        file.expect(first, last)
        out = np.empty(last - first, np.uint8)
        for start in range(0, len(out), 900):
            file.read(first + start, out[start : start + 900])
        assert out.tobytes() == DATA[first:last]
        ends = [int(asked.rpartition("-")[2]) for asked in ranges_asked(hub)]
        assert max(ends) == last - 1
        file.read(last - 5, out[:10])  # Whoever wants more gets it.
        assert out[:10].tobytes() == DATA[last - 5 : last + 5]
        file.read(last + 5, out[:10])
        assert out[:10].tobytes() == DATA[last + 5 : last + 15]


@pytest.mark.parametrize("start", [0, 1, RANGE, len(DATA) - 1, len(DATA)])
def test_the_chunks_of_a_file(start, hub, address, monkeypatch):
    monkeypatch.setattr("df11.storage.file.CHUNK", 3_333)
    with RangeFile(address, len(DATA)) as file:
        chunks = [chunk.tobytes() for chunk in file.chunks(start)]
    assert b"".join(chunks) == DATA[start:]
    assert all(len(chunk) == 3_333 for chunk in chunks[:-1])
    assert sum(request.sent for request in hub.requests if request.cdn) == len(DATA) - start


def test_what_a_file_says_of_itself(address):
    file = RangeFile(address, len(DATA))
    assert (file.label, file.size) == (str(address), len(DATA))
    assert file.memory >= ranges.RING_MEMORY
    error = file.changed("weight")
    assert isinstance(error, errors.DifferenceError)
    assert (error.file, error.tensor) == (str(address), "weight")
    file.check_unchanged()  # A commit does not change.
    file.stop()
    file.close()


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
    # Nothing that had arrived was fetched again.
    assert sum(request.sent for request in hub.requests if request.cdn) == len(DATA)


def test_as_long_as_something_comes_it_goes_on(hub, reader):
    hub.inject("GET", "/cdn/", cut(after=900), times=80)
    assert read_all(reader) == DATA


def test_a_byte_now_and_then_is_not_enough(hub, reader):
    hub.inject("GET", "/cdn/", cut(after=1), times=1000)
    with pytest.raises(errors.RetryLaterError):
        read_all(reader)
    assert hub.count("GET", "/cdn/") < 100


@pytest.mark.parametrize(
    "fault",
    [cut(after=0), status(500), status(429, {"Retry-After": "0"}), status(403)],
    ids=["cut", "500", "429", "403"],
)
def test_it_gives_up(fault, hub, reader, address):
    hub.inject("GET", "/cdn/", fault, times=1000)
    with pytest.raises(errors.RetryLaterError) as caught:
        read_all(reader)
    assert caught.value.file == str(address)
    assert caught.value.exit_code == 5


def test_after_an_address_has_expired_each_range_gets_its_own(hub, remote):
    # A signed URL may be for one range only: then each request needs a new one.
    hub.inject("GET", "/cdn/", status(403), after=5)
    out = np.empty(RANGE, np.uint8)
    for index in range(12):
        remote.fetch(index * RANGE, out)
        assert out.tobytes() == DATA[index * RANGE :][:RANGE]
    assert hub.count("GET", "/resolve/") == 1 + 7


def test_the_wait_that_the_server_asks_for(caplog, hub, remote):
    caplog.set_level(logging.INFO, "df11")
    hub.inject("GET", "/cdn/", status(429, {"Retry-After": "17"}))
    hub.inject("GET", "/cdn/", status(429, {"RateLimit": '"resolvers";r=0;t=23'}))
    hub.inject("GET", "/cdn/", status(503, {"Retry-After": "99999"}))
    out = np.empty(len(DATA), np.uint8)
    slept = []

    class Never(threading.Event):
        def wait(self, timeout=None):
            slept.append(timeout)
            return False

    remote.fetch(0, out, Never())
    assert out.tobytes() == DATA
    assert slept == [17, 23, hub_client.LONGEST_WAIT]
    assert [record.event for record in caplog.records] == ["retry"] * 3
    assert [record.seconds for record in caplog.records] == slept
    assert "17 s" in str(caplog.records[0].error)
    assert "17 s" in caplog.records[0].getMessage()


def test_a_server_that_is_silent(monkeypatch, hub, reader):
    monkeypatch.setitem(limits.TIMEOUTS, "read", 0.05)
    hub.inject("GET", "/cdn/", hang, times=1000)
    with pytest.raises(errors.RetryLaterError, match="in time"):
        read_all(reader)


def test_a_server_that_is_slow_for_once(monkeypatch, hub, reader):
    monkeypatch.setitem(limits.TIMEOUTS, "read", 0.2)
    hub.inject("GET", "/cdn/", slow(1.0), times=2)
    assert read_all(reader) == DATA


def test_a_slow_line_is_no_error(hub, reader):
    hub.inject("GET", "/cdn/", drip(100_000), times=2)
    assert read_all(reader) == DATA


def test_ranges_that_are_ignored(hub, reader):
    hub.inject("GET", "/cdn/", ignore_range, times=1000)
    assert read_all(reader) == DATA


def test_a_range_that_was_not_asked_for(hub, reader):
    hub.inject("GET", "/cdn/", status(206, {"Content-Range": f"bytes 5-9/{len(DATA)}"}, body=b"12345"), times=1000)
    with pytest.raises(errors.RetryLaterError, match="other bytes"):
        read_all(reader)


def test_a_file_that_is_shorter_than_where_it_is_read(hub, address):
    remote = RemoteFile(address, 10 * len(DATA))
    with pytest.raises(errors.DifferenceError, match="a different size"):
        remote.fetch(5 * len(DATA), np.empty(10, np.uint8))
    assert hub.requests[-1].status == 416


def test_who_waits_is_let_go(hub, reader):
    hub.inject("GET", "/cdn/", hang, times=1000)
    ended = []

    def read():
        try:
            reader.read(0, np.empty(RANGE, np.uint8))
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
