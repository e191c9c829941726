"""Downloads to the disk: they continue where an earlier run stopped, and are checked against the Hub's list."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import ranges
from df11.storage.atomic import temporary_path
from df11.storage.download import downloaded
from df11.storage.entry import Entry
from df11.storage.store import open_source
from tests.support.hub.server import corrupt, status

DATA = np.random.default_rng(7).bytes(50_123)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Small ranges, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))


@pytest.fixture
def store(hub):
    hub.create("me/m").commit({"x.safetensors": DATA})
    return open_source("hf://me/m/x.safetensors")


@pytest.fixture
def entry(store) -> Entry:
    (found,) = store.list()
    return found


@pytest.fixture
def target(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "x.df11"


def sent(hub) -> int:
    return sum(request.sent for request in hub.requests if request.cdn)


def test_it_is_beside_the_target_as_long_as_it_is_used(store, entry, target):
    with downloaded(store, entry, target, target.parent) as file:
        (path,) = target.parent.iterdir()
        assert path == temporary_path(target, "download") == target.with_name(".x.df11.download")
        assert path.read_bytes() == DATA
        assert path.stat().st_mode & 0o777 == 0o600
        assert (file.label, file.size) == (store.locate("x.safetensors"), len(DATA))
        assert file.memory == ranges.CLIENT_MEMORY
        assert b"".join(chunk.tobytes() for chunk in file.chunks()) == DATA
    assert not any(target.parent.iterdir())


@pytest.mark.parametrize("size", [0, 1, 10_000, 33_333, len(DATA)])
def test_it_goes_on_where_it_ended(size, hub, store, entry, target):
    temporary_path(target, "download").write_bytes(DATA[:size])
    with downloaded(store, entry, target, target.parent) as file:
        assert b"".join(chunk.tobytes() for chunk in file.chunks()) == DATA
    assert sent(hub) == len(DATA) - size


@pytest.mark.parametrize("left", [b"\0" * 20_000, DATA[1:], DATA + b"\0", b"\0" * len(DATA)])
def test_what_is_left_of_another_file_is_fetched_again(left, store, entry, target):
    temporary_path(target, "download").write_bytes(left)
    with downloaded(store, entry, target, target.parent) as file:
        assert b"".join(chunk.tobytes() for chunk in file.chunks()) == DATA
    assert not any(target.parent.iterdir())


@pytest.mark.parametrize("left", [b"", DATA[:20_000]])
def test_wrong_bytes_are_refused_and_removed(left, hub, store, entry, target):
    temporary_path(target, "download").write_bytes(left)
    hub.inject("GET", "/cdn/", corrupt(5), times=1000)
    with (
        pytest.raises(errors.DifferenceError, match=f"{store.locate('x.safetensors')}.*SHA-256.*{entry.sha256}"),
        downloaded(store, entry, target, target.parent),
    ):
        raise AssertionError
    assert not any(target.parent.iterdir())


def test_what_has_come_before_an_error_is_kept(hub, store, entry, target, monkeypatch):
    monkeypatch.setattr("df11.storage.file.CHUNK", 5_000)
    monkeypatch.setattr(ranges, "RANGES", 1)  # So that they arrive in order.
    hub.inject("GET", "/cdn/", status(500), times=1000, after=2)
    with pytest.raises(errors.RetryLaterError), downloaded(store, entry, target, target.parent):
        raise AssertionError
    assert temporary_path(target, "download").read_bytes() == DATA[:20_000]


def test_it_stays_if_its_use_fails(hub, store, entry, target):
    with pytest.raises(RuntimeError), downloaded(store, entry, target, target.parent):
        raise RuntimeError
    assert temporary_path(target, "download").read_bytes() == DATA
    before = sent(hub)
    with downloaded(store, entry, target, target.parent) as file:
        assert file.size == len(DATA)
    assert sent(hub) == before == len(DATA)


def test_a_second_one_is_refused(store, entry, target):
    with downloaded(store, entry, target, target.parent):
        with (
            pytest.raises(errors.ConflictError, match="another process") as caught,
            downloaded(store, entry, target, target.parent),
        ):
            raise AssertionError
        assert caught.value.file == str(temporary_path(target, "download"))
        assert temporary_path(target, "download").read_bytes() == DATA
    with downloaded(store, entry, target, target.parent):
        pass


def test_one_that_was_killed_goes_on(hub, store, entry, target, tmp_path):
    (tmp_path / "pickled").write_bytes(pickle.dumps((store, entry)))
    program = (
        "import os, pickle, sys; from pathlib import Path; from df11.storage.download import downloaded\n"
        "target = Path(sys.argv[2])\n"
        "with downloaded(*pickle.loads(Path(sys.argv[1]).read_bytes()), target, target.parent): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "pickled", target], check=False)
    assert killed.returncode == -9
    before = sent(hub)
    with downloaded(store, entry, target, target.parent) as file:
        assert b"".join(chunk.tobytes() for chunk in file.chunks()) == DATA
    assert sent(hub) == before


def test_a_link_under_its_name_is_refused(store, entry, target, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    temporary_path(target, "download").symlink_to(tmp_path / "mine")
    with pytest.raises(errors.Df11Error) as caught, downloaded(store, entry, target, target.parent):
        raise AssertionError
    assert caught.value.file == str(temporary_path(target, "download"))
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_missing_folder(store, entry, tmp_path):
    with pytest.raises(errors.MissingError), downloaded(store, entry, tmp_path / "none" / "x.df11", None):
        raise AssertionError


def test_the_listed_hash_decides(store, entry, target):
    other = Entry(entry.name, entry.size, hashlib.sha256(b"other").hexdigest())
    with (
        pytest.raises(errors.DifferenceError, match=hashlib.sha256(DATA).hexdigest()),
        downloaded(store, other, target, target.parent),
    ):
        raise AssertionError
    assert not any(target.parent.iterdir())
