"""A safetensors file on the Hub as a source: in LFS or in git, with a header of any size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from df11.converter import source as source_module
from df11.converter.source import Source
from df11.formats import errors
from df11.storage.client import WAITS
from df11.storage.store import open_source
from tests.support import sources
from tests.support.hub.repository import Blob


@pytest.fixture(autouse=True)
def impatient(client, monkeypatch):
    """This process's client, which does not wait."""
    del client
    monkeypatch.setattr("df11.storage.client.WAITS", (0.0,) * len(WAITS))


def test_a_source_in_git(hub, tmp_path):
    path = sources.write(tmp_path / "x.safetensors", [sources.bf16("a", (50, 100))])
    repository = hub.create("me/m")
    data = path.read_bytes()
    repository.apply("main", {"x.safetensors": Blob(len(data), hashlib.sha256(data).hexdigest(), data)}, "x")
    store = open_source("hf://me/m/x.safetensors")
    (entry,) = store.list()
    assert entry.sha256 is None
    with Source(store.open(entry)) as source:
        out = np.empty(10_000, np.uint8)
        source.read(0, out)
        assert out.tobytes() == data[-10_000:]
        assert source.sha256(lambda _: None) == sources.sha256(path)
        assert (source.path, source.size) == (store.locate("x.safetensors"), len(data))


@pytest.mark.parametrize("head", [10, 300, 1 << 20])
def test_a_header_of_any_size(head, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "HEAD_BYTES", head)
    path = sources.write(
        tmp_path / "x.safetensors", [sources.bf16(f"tensor.{index}", (300,), index) for index in range(20)]
    )
    hub.create("me/m").commit({"x.safetensors": path})
    store = open_source("hf://me/m/x.safetensors")
    (entry,) = store.list()
    with Source(store.open(entry)) as source:
        assert source.sha256(lambda _: None) == sources.sha256(path) == entry.sha256
    with Source.local(path) as source:
        assert source.sha256(lambda _: None) == entry.sha256
    # A header that fits into the first read takes one request.
    fits = 8 + len(source.header.raw) <= head
    asked = [request.headers["range"] for request in hub.requests if request.cdn]
    assert asked[0] == f"bytes=0-{min(head, path.stat().st_size) - 1}"
    assert asked[1].startswith(f"bytes={source.header.data_start if fits else head}-")


def test_what_is_no_source_is_closed(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("df11.storage.file.LocalFile.close", lambda self: closed.append(self._file.close()))
    for data in (b"", b"\x08\0\0\0\0\0\0\0{not ", sources.file_bytes([sources.bf16("a", (5,))])[:-1]):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(errors.SafetensorsError):
            Source.local(tmp_path / "x.safetensors")
    assert len(closed) == 3
