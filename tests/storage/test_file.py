"""Open files: the right bytes at any position, and an error if the file has changed."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.formats import errors
from df11.storage import file as file_module
from df11.storage.file import LocalFile, MemoryFile

DATA = np.random.default_rng(1).bytes(10_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("kind", ["local", "memory"])
@given(places=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 3000)), max_size=5))
def test_any_position(kind, path, places):
    with LocalFile(path) if kind == "local" else MemoryFile(DATA, "x") as file:
        for start, size in places:
            out = np.empty(min(size, len(DATA) - start), np.uint8)
            file.read(start, out)
            assert out.tobytes() == DATA[start : start + len(out)]


@pytest.mark.parametrize("start", [0, 1, 999, 1000, len(DATA) - 1, len(DATA)])
def test_chunks(start, path, monkeypatch):
    monkeypatch.setattr(file_module, "CHUNK", 1000)
    for file in (LocalFile(path), MemoryFile(DATA, "x")):
        with file:
            chunks = [chunk.tobytes() for chunk in file.chunks(start)]
        assert b"".join(chunks) == DATA[start:]
        assert all(len(chunk) == 1000 for chunk in chunks[:-1])


def test_what_files_say_of_themselves(path, tmp_path):
    with LocalFile(path) as file:
        assert (file.label, file.size, file.memory) == (str(path), len(DATA), 0)
    with LocalFile(path, label="hf://me/m/x") as file:
        assert file.label == "hf://me/m/x"
    with MemoryFile(b"123", "where/x") as file:
        assert (file.label, file.size, file.memory) == ("where/x", 3, 3)
    with pytest.raises(errors.MissingError):
        LocalFile(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(errors.UsageError, match=r"not a (regular )?file") as caught:
            LocalFile(odd)  # Without waiting for somebody to write.
        assert caught.value.file == str(odd)


def test_a_file_that_changes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(DATA)
    with LocalFile(path) as file:
        file.check_unchanged()
        os.utime(path, (1, 1))
        with pytest.raises(errors.ConflictError, match="source changed"):
            file.check_unchanged()
    with LocalFile(path) as file:
        os.truncate(path, 100)
        with pytest.raises(errors.ConflictError, match="source changed") as caught:
            file.read(50, np.empty(100, np.uint8))
        assert caught.value.file == str(path)
        with pytest.raises(errors.ConflictError):
            file.check_unchanged()
        assert file.changed("weight").tensor == "weight"


def test_short_reads_go_on(path, monkeypatch):
    honest = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, position: honest(file, [views[0][:3]], position))
    with LocalFile(path) as file:
        out = np.empty(100, np.uint8)
        file.read(7, out)
    assert out.tobytes() == DATA[7:107]


def test_many_threads(path):
    found = {}
    with LocalFile(path) as file:

        def read(start):
            out = np.empty(1000, np.uint8)
            for _ in range(50):
                file.read(start, out)
            found[start] = out.tobytes()

        threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 9000, 1000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {start: DATA[start : start + 1000] for start in range(0, 9000, 1000)}
