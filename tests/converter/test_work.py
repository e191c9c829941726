"""The work on one file: a copy is what the Hub lists, and nothing is left if something goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest

from df11.converter.plan import Step
from df11.converter.settings import Settings
from df11.converter.work import Task, deliver, produce
from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import ranges
from df11.storage.entry import Entry
from df11.storage.local import LocalStore
from df11.storage.store import open_source
from tests.support.hub.server import corrupt

DATA = np.random.default_rng(7).bytes(140_123)
SETTINGS = Settings(1, 1 << 28, None, verify=True)


@pytest.fixture(autouse=True)
def small(client, monkeypatch):
    """Small ranges, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def store(hub):
    hub.create("me/m").commit({"x.bin": DATA, "config.json": b'{"a": 1}'})
    return open_source("hf://me/m")


def copy(store, name, target) -> Task:
    return Task(Step("copy", store.find(())[name], name), store, LocalStore(target), None, SETTINGS)


@pytest.mark.parametrize(("name", "data"), [("x.bin", DATA), ("config.json", b'{"a": 1}')])
def test_a_copy(name, data, store, tmp_path):
    task = pickle.loads(pickle.dumps(copy(store, name, tmp_path)))
    told = []
    done = deliver(task, produce(task, told.append))
    assert (tmp_path / name).read_bytes() == data
    assert sum(told) == len(data)
    assert done.entry.sha256 == hashlib.sha256(data).hexdigest()
    assert done.entry.same_content(task.step.entry)
    assert done.put.entry.name == name
    assert (done.row, done.tensors) == (None, ())


def test_a_copy_from_lfs_is_held_to_its_sha256(hub, store, tmp_path):
    task = copy(store, "x.bin", tmp_path)
    hub.inject("GET", "/cdn/", corrupt(5), after=3)
    expected = f"{store.locate('x.bin')}.*SHA-256.*{hashlib.sha256(DATA).hexdigest()}"
    with pytest.raises(errors.DifferenceError, match=expected):
        produce(task, lambda _: None)
    assert not any(tmp_path.glob("*x.bin*"))


def test_a_copy_from_git_is_held_to_its_blob_id(hub, store, tmp_path):
    task = copy(store, "config.json", tmp_path)
    hub.inject("GET", "/resolve/", corrupt(3))
    expected = f"{store.locate('config.json')}.*git blob.*{task.step.entry.blob_id}"
    with pytest.raises(errors.DifferenceError, match=expected):
        produce(task, lambda _: None)
    assert not any(tmp_path.glob("*config.json*"))


def test_a_file_that_appears_meanwhile_stays(store, tmp_path):
    (tmp_path / "config.json").write_bytes(b"mine")
    task = copy(store, "config.json", tmp_path)
    with pytest.raises(errors.ConflictError, match="somebody else has changed this file"):
        produce(task, lambda _: None)
    assert (tmp_path / "config.json").read_bytes() == b"mine"
    produce(dataclasses.replace(task, force=True), lambda _: None)
    assert (tmp_path / "config.json").read_bytes() == b'{"a": 1}'


def test_a_local_file_that_changes_meanwhile_is_not_copied(tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    task = Task(
        Step("copy", Entry("x.bin", len(DATA)), "x.bin"),
        LocalStore(tmp_path),
        LocalStore(tmp_path / "out"),
        None,
        SETTINGS,
    )

    def change(_: int) -> None:
        with (tmp_path / "x.bin").open("ab") as file:
            file.write(b"more")

    with pytest.raises(errors.ConflictError, match="source changed"):
        produce(task, change)
    assert not any((tmp_path / "out").iterdir())
