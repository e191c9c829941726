"""Checkpoints of DFloat11 on the Hub: imported while they are read, compared with an original that is there, too."""

from __future__ import annotations

import hashlib

import pytest

import df11
from df11.converter import parquet
from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import ranges
from tests.converter.dfloat11.test_import import PATTERNS, WANTED, arrays, block_files
from tests.support import commands, dfloat11, sources
from tests.support.sources import Tensor


@pytest.fixture(autouse=True)
def quick(client, monkeypatch):
    """Small pieces, so that small files have many, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1500)
    monkeypatch.setattr("df11.converter.source.HEAD_BYTES", 1000)
    monkeypatch.setattr("df11.converter.dfloat11.imported.WINDOW", 700)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def repository(hub, tmp_path):
    path = dfloat11.write(tmp_path / "in", block_files(), dfloat11.config(PATTERNS, _class_name="X"))
    made = hub.create("me/DF11")
    made.commit({file.name: file.read_bytes() for file in path.iterdir()} | {"README.md": b"# A model"}, summary="x")
    plain = [one for file in block_files().values() for one in file if one.name.endswith(("bias", "norm"))]
    tensors = [*(Tensor(name, *rest) for name, rest in WANTED.items()), *plain]
    files = {"a.safetensors": sources.file_bytes(tensors[:2]), "b.safetensors": sources.file_bytes(tensors[2:])}
    hub.create("me/original").commit(files, summary="x")
    return made


def test_import_and_proof(repository, hub, tmp_path):
    commands.run("convert", "hf://me/DF11", tmp_path / "out", "--shapes", "hf://me/original").fine()
    assert arrays(tmp_path / "out").items() >= WANTED.items()
    manifest = parquet.read(tmp_path / "out")
    assert (manifest.origin.repository, manifest.origin.commit) == ("me/DF11", repository.head)
    (row,) = manifest.files
    listed = {name: hashlib.sha256(repository.read(name)).hexdigest() for name in block_files()}
    assert {one.file: one.sha256 for one in row.made_from} == listed
    out = commands.run("verify", tmp_path / "out", "--against", "hf://me/original").fine()
    assert "equal to the source" in out.err
    del hub.requests[:]
    report = df11.convert("hf://me/DF11", tmp_path / "out", shapes="hf://me/original")
    assert [file.status for file in report.files] == ["skipped"]


@pytest.mark.parametrize("what", ["bit", "shape", "missing", "more"])
def test_an_original_that_differs(what, repository, hub, tmp_path):
    assert repository.head
    df11.convert("hf://me/DF11", tmp_path / "out", shapes="hf://me/original")
    tensors = {name: Tensor(name, *rest) for name, rest in WANTED.items()}
    tensors |= {one.name: one for file in block_files().values() for one in file if one.name.endswith(("bias", "norm"))}
    q = tensors["layers.3.attn.to_q.weight"]
    if what == "bit":
        tensors[q.name] = Tensor(q.name, q.dtype, q.shape, bytes([q.data[0] ^ 1]) + q.data[1:])
    elif what == "shape":
        tensors[q.name] = Tensor(q.name, q.dtype, q.shape[::-1], q.data)
    elif what == "missing":
        tensors["x"] = sources.bf16("x", (3,))
    else:
        del tensors["norm"]
    hub.create("me/other").commit({"m.safetensors": sources.file_bytes(list(tensors.values()))}, summary="x")
    with pytest.raises(errors.DifferenceError):
        df11.verify(tmp_path / "out", "hf://me/other")


def test_verify_against_any_source_on_the_hub(hub, tmp_path):
    data = sources.file_bytes([sources.bf16("a", (50, 100))])
    hub.create("me/m").commit({"sub/x.safetensors": data}, summary="x")
    df11.convert("hf://me/m", tmp_path / "out")
    assert df11.verify(tmp_path / "out", "hf://me/m").compared
    assert df11.verify(tmp_path / "out" / "sub" / "x.df11", "hf://me/m/sub/x.safetensors").compared
    hub.create("me/n").commit({"y.safetensors": data}, summary="x")
    with pytest.raises(errors.MissingError):
        df11.verify(tmp_path / "out", "hf://me/n")
