"""Conversions from the Hub: the same bytes as from a local folder, resumed unasked; for trouble, a line and a code."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME, Origin
from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import limits, ranges
from tests.support import commands, sources
from tests.support.hub.repository import Blob
from tests.support.hub.server import corrupt, cut, drip, hang, ignore_range, slow, status, truncated
from tests.support.sources import bf16, f32, random_tensor, tree_bytes

BOUND = 256 << 20
PIECE = 20_000


@pytest.fixture(autouse=True)
def quick(client, monkeypatch):
    """Small pieces, so that small shards have many, and no waiting."""
    del client
    monkeypatch.setattr(ranges, "RANGE_BYTES", PIECE)
    monkeypatch.setattr("df11.converter.source.HEAD_BYTES", 1_000)
    monkeypatch.setattr("df11.storage.file.CHUNK", PIECE // 2)
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


def model_files() -> dict[str, bytes]:
    """A pipeline: shards with an index, casts, tensors that are read twice, files in LFS and in git."""
    mixed = [
        random_tensor("noise", "BF16", (40_000,)),
        f32("f", (300, 50), 1),
        random_tensor("odd", "U8", (3,)),
        bf16("w", (100, 200), 2),
    ]
    shards = {
        "model-00001-of-00002.safetensors": mixed,
        "model-00002-of-00002.safetensors": [f32("e", (99, 77), 3, exact=True), bf16("z", (64, 64))],
    }
    index = {"weight_map": {tensor.name: name for name, tensors in shards.items() for tensor in tensors}}
    files = {f"transformer/{name}": sources.file_bytes(tensors) for name, tensors in shards.items()}
    files["transformer/model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    files["vae/x.safetensors"] = sources.file_bytes([bf16("v", (70_000,), 5)], metadata={"format": "pt"})
    return files | {
        "model_index.json": b"{}",
        "empty.txt": b"",
        "merges/big.bin": os.urandom(90_000),
        "vae/config.json": b'{"a": 1}',
    }


@pytest.fixture
def model(hub):
    """The repository me/m with a pipeline."""
    repository = hub.create("me/m")
    repository.commit(model_files())
    return repository


@pytest.fixture
def one(hub, tmp_path):
    """The repository me/one with one shard; returns its local copy."""
    path = sources.write(tmp_path / "one" / "x.safetensors", [bf16("a", (300, 200)), bf16("b", (150, 100), 1)])
    hub.create("me/one").commit({"x.safetensors": path})
    return path


def fetched(hub, name="") -> int:
    """The number of requests for the content of a file."""
    return hub.count("GET", f"/resolve/[^/]+/.*{name}$") + hub.count("GET", f"/cdn/.*filename=.*{name}&")


def nothing_under_a_final_name(folder):
    assert not [name for name in (tree_bytes(folder) if folder.exists() else {}) if not name.endswith(".download")]


def assert_same_conversion(mine, local):
    """The same bytes; only the manifests say where the sources came from."""
    found, wanted = tree_bytes(mine), tree_bytes(local)
    ours, theirs = (parquet.from_bytes(files.pop(FILE_NAME), FILE_NAME) for files in (found, wanted))
    assert found == wanted
    assert (ours.files, ours.tensors, ours.cast) == (theirs.files, theirs.tensors, theirs.cast)
    assert theirs.origin == Origin()
    assert ours.origin.repository is not None


# The same bytes.


@pytest.mark.parametrize(
    "options", [[], ["--cast", "bf16"], ["--max-disk", "1MB"], ["--jobs", "1", "--no-verify"]], ids=" ".join
)
def test_a_tree_is_as_converted_locally(options, model, tmp_path):
    cast = "bf16" if "bf16" in options else None
    df11.convert(model.checkout(tmp_path / "model"), tmp_path / "local", cast=cast)
    result = commands.run("convert", "hf://me/m", tmp_path / "out", "--json", *options).fine()
    assert_same_conversion(tmp_path / "out", tmp_path / "local")
    *files, done = result.events
    assert [file["source"] for file in files] == [
        f"hf://me/m@{model.head}/{name}"
        for name in (
            "transformer/model-00001-of-00002.safetensors",
            "transformer/model-00002-of-00002.safetensors",
            "vae/x.safetensors",
        )
    ]
    assert all(file["status"] == "converted" and "rows" not in file for file in files)
    assert (done["files"], done["copied"]) == (3, 6)
    df11.verify(tmp_path / "out", tmp_path / "model")


def test_a_folder_of_a_repository(model, tmp_path):
    df11.convert(model.checkout(tmp_path / "model") / "transformer", tmp_path / "local")
    df11.convert("hf://me/m/transformer", tmp_path / "out")
    assert_same_conversion(tmp_path / "out", tmp_path / "local")


def test_one_file_of_a_repository(one, tmp_path):
    df11.convert(one, tmp_path / "local.df11")
    (file,) = df11.convert("hf://me/one/x.safetensors", tmp_path / "out.df11").files
    assert (tmp_path / "out.df11").read_bytes() == (tmp_path / "local.df11").read_bytes()
    assert (file.status, file.source_sha256, file.tensors) == ("converted", sources.sha256(one), 2)


def test_the_way_back(model, tmp_path):
    df11.convert("hf://me/m", tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == model.files()


def test_a_revision_that_moves_on_meanwhile(model, tmp_path):
    before, head = model.checkout(tmp_path / "model"), model.head
    df11.convert(before, tmp_path / "local")

    def move_on(_):
        model.commit({"vae/x.safetensors": b"other", "vae/config.json": b"other", "empty.txt": None})

    report = df11.convert("hf://me/m@main", tmp_path / "out", on_total=move_on)
    assert_same_conversion(tmp_path / "out", tmp_path / "local")
    assert all(head in file.source for file in report.files)
    assert model.head != head


def test_a_shard_in_git(hub, tmp_path):
    data = sources.file_bytes([bf16("a", (50, 100))])
    repository = hub.create("me/m")
    repository.apply("main", {"x.safetensors": Blob(len(data), hashlib.sha256(data).hexdigest(), data)}, "x")
    for status_ in ("converted", "skipped"):
        (file,) = df11.convert("hf://me/m", tmp_path / "out", max_disk="1kB" if status_ == "skipped" else None).files
        assert file.status == status_
    with df11.open(tmp_path / "out" / "x.df11") as container:
        assert container.source.sha256 == hashlib.sha256(data).hexdigest()


def test_a_dry_run_reads_headers_only(hub, model, tmp_path):
    result = commands.run("convert", "hf://me/m", tmp_path / "out", "--dry-run").fine()
    assert len(result.out.splitlines()) == 3
    assert (
        f"hf://me/m@{model.head}/vae/x.safetensors -> {tmp_path / 'out' / 'vae' / 'x.df11'}: "
        f"{len(model.read('vae/x.safetensors')):,} bytes" in (result.out)
    )
    assert all(request.sent <= 1_000 for request in hub.requests if request.cdn)
    assert fetched(hub, "config.json") == 1  # Is it a checkpoint of DFloat11?
    assert not (tmp_path / "out").exists()


# Resuming.


def test_what_is_finished_is_kept_without_asking(hub, model, tmp_path):
    del model
    first = df11.convert("hf://me/m", tmp_path / "out")
    before = tree_bytes(tmp_path / "out")
    del hub.requests[:]
    report = df11.convert("hf://me/m", tmp_path / "out")
    assert [file.status for file in report.files] == ["skipped"] * 3
    assert [(file.source, file.source_sha256, file.tensors) for file in report.files] == [
        (file.source, file.source_sha256, file.tensors) for file in first.files
    ]
    assert tree_bytes(tmp_path / "out") == before
    assert not hub.count("GET", "/cdn/")
    assert fetched(hub, "index.json") == fetched(hub, ".gitattributes") == 1  # These are rewritten: to be compared.
    assert fetched(hub, "config.json") == 1  # Is it a checkpoint of DFloat11?
    assert fetched(hub) == 3
    (tmp_path / "out" / "vae" / "x.df11").unlink()
    report = df11.convert("hf://me/m", tmp_path / "out")
    assert [file.status for file in report.files] == ["skipped", "skipped", "converted"]
    assert not fetched(hub, "00002.safetensors")
    assert tree_bytes(tmp_path / "out") == before


def test_progress_counts_what_is_kept(model, tmp_path):
    del model
    for _ in range(2):
        totals, progress = [], []
        df11.convert("hf://me/m", tmp_path / "out", on_total=totals.append, on_progress=progress.append)
        assert sum(progress) == sum(totals) > 0


def test_what_is_finished_locally_is_kept(hub, one, tmp_path):
    df11.convert(one, tmp_path / "x.df11")
    (file,) = df11.convert("hf://me/one/x.safetensors", tmp_path / "x.df11").files
    assert file.status == "skipped"
    assert fetched(hub) == 2  # Its header, from where the Hub redirects to: is it a checkpoint of DFloat11?


def test_another_content_replaces_what_df11_has_written(hub, one, tmp_path):
    del one
    df11.convert("hf://me/one", tmp_path / "out")
    df11.convert("hf://me/one/x.safetensors", tmp_path / "x.df11")
    before = tree_bytes(tmp_path / "out")
    hub.repository("me/one").commit(
        {"x.safetensors": sources.file_bytes([bf16("a", (300, 200), 9), bf16("b", (150, 100), 1)])}
    )
    # Without a manifest, as beside a single file, nobody knows whose file it is.
    commands.run("convert", "hf://me/one/x.safetensors", tmp_path / "x.df11").error(2, "x.df11", "--force")
    commands.run("convert", "hf://me/one", tmp_path / "out").fine()
    assert tree_bytes(tmp_path / "out") != before
    df11.convert("hf://me/one", tmp_path / "fresh")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh")
    # What concerns the folder itself stays.
    (tmp_path / "out" / ".gitattributes").write_text("mine")
    commands.run("convert", "hf://me/one", tmp_path / "out").fine()
    assert (tmp_path / "out" / ".gitattributes").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--max-disk", "1GB"]], ids=["streamed", "downloaded"])
def test_killed_and_run_again(options, hub, tmp_path):
    paths = [sources.write_large(tmp_path / f"{name}.safetensors", "BF16", 30_000_000, name=name) for name in "ab"]
    hub.create("me/m").commit({path.name: path for path in paths})
    out = tmp_path / "out"
    hub.inject("GET", r"/cdn/.*filename=b\.", drip(12_000_000), times=1000)
    process = commands.start("convert", "hf://me/m", out, *options)
    partial = out / (".b.df11.download" if options else ".b.df11.partial")
    # After the first requests, which read headers.
    commands.wait_until(
        lambda: (out / "a.df11").exists() and partial.exists() and partial.stat().st_size > 2_000_000, process
    )
    process.kill()
    assert commands.finish(process).code == -signal.SIGKILL
    assert not (out / "b.df11").exists()
    had = partial.stat().st_size
    del hub._rules[:], hub.requests[:]
    (first, second) = df11.convert("hf://me/m", out, max_disk="1GB" if options else None).files
    assert (first.status, second.status) == ("skipped", "converted")
    assert not fetched(hub, "a.safetensors")
    starts = sorted(int(request.headers["range"][6:].split("-")[0]) for request in hub.requests if request.cdn)
    if options:
        assert starts[1] == had  # After that of the header.
    assert sorted(path.name for path in out.iterdir()) == [".gitattributes", "a.df11", "b.df11", FILE_NAME]
    for path in paths:
        assert df11.verify(out / f"{path.stem}.df11", path).compared


# Within a disk budget.


def test_a_budget_that_is_too_small(hub, model, tmp_path):
    largest = max(len(data) for name, data in model.files().items() if name.endswith(".safetensors"))
    line = commands.run("convert", "hf://me/m", tmp_path / "out", "--max-disk", largest - 1).error(
        6, "--max-disk", largest, largest - 1
    )
    assert line.startswith(f"df11: hf://me/m@{model.head}/")
    assert all(request.sent <= 1_000 for request in hub.requests if request.cdn)
    assert not (tmp_path / "out").exists()
    commands.run("convert", "hf://me/m", tmp_path / "out", "--max-disk", largest).fine()
    commands.run("convert", "hf://me/m", tmp_path / "out", "--max-disk", 1).fine()  # Nothing is left to download.


def test_a_budget_is_for_the_hub_only(one, tmp_path):
    commands.run("convert", one, tmp_path / "x.df11", "--max-disk", "1GB").error(2, "--max-disk", one)
    commands.run("convert", "hf://me/one", tmp_path / "out", "--max-disk", "much").error(2, "not a size")


@pytest.mark.parametrize("left", ["the beginning", "all", "another file", "too much"])
def test_a_download_goes_on(left, hub, one, tmp_path):
    data = one.read_bytes()
    partial = tmp_path / ".x.df11.download"
    partial.write_bytes(
        {"the beginning": data[:50_000], "all": data, "another file": b"x" * 50_000, "too much": data + b"x"}[left]
    )
    df11.convert("hf://me/one/x.safetensors", tmp_path / "x.df11", max_disk="1MB")
    assert df11.verify(tmp_path / "x.df11", one).compared
    assert not partial.exists()
    sent = sum(request.sent for request in hub.requests if request.cdn) - 2 * 1_000  # Its header, twice.
    assert (
        sent
        == {
            "the beginning": len(data) - 50_000,
            "all": 0,
            "another file": 2 * len(data) - 50_000,
            "too much": len(data),
        }[left]
    )


def test_wrong_bytes_on_the_disk(hub, one, tmp_path):
    hub.inject("GET", "/cdn/", corrupt(7), times=100, after=1)
    digest = sources.sha256(one)
    commands.run("convert", "hf://me/one", tmp_path / "out", "--max-disk", "1MB").error(
        1, "x.safetensors", f"expected {digest}", "found "
    )
    assert tree_bytes(tmp_path / "out") == {}


def test_two_downloads_of_one_file(one, tmp_path):
    del one
    with (tmp_path / ".x.df11.download").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        commands.run("convert", "hf://me/one/x.safetensors", tmp_path / "x.df11", "--max-disk", "1MB").error(
            7, ".x.df11.download"
        )


def test_a_download_that_fails_is_kept_for_the_next_try(hub, one, tmp_path):
    hub.inject("GET", "/cdn/", status(500), times=100, after=5)
    commands.run("convert", "hf://me/one", tmp_path / "out", "--max-disk", "1MB").error(5, "x.safetensors")
    nothing_under_a_final_name(tmp_path / "out")
    del hub._rules[:], hub.requests[:]
    commands.run("convert", "hf://me/one", tmp_path / "out", "--max-disk", "1MB").fine()
    assert sum(request.sent for request in hub.requests if request.cdn) < one.stat().st_size


# Trouble.


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("hf://me", 2, ["hf://owner/name"]),
        ("hf://datasets/me/m", 2, ["datasets/"]),
        ("hf://me/m/../x", 2, ["path"]),
        ("hf://me/none", 4, ["hf://me/none", "missing, or private"]),
        ("hf://you/private", 4, ["hf://you/private", "missing, or private"]),
        ("hf://me/m@nowhere", 4, ["hf://me/m@nowhere", "branch"]),
        ("hf://me/m/nowhere", 4, ["nowhere", "no such file or folder"]),
        ("hf://me/m/merges", 2, ["no .safetensors file"]),
        ("hf://me/m/model_index.json", 2, ["model_index.json", "safetensors"]),
        ("hf://you/gated", 3, ["hf://you/gated", "must be requested", "/you/gated"]),
    ],
)
def test_addresses_that_cannot_be_converted(address, code, words, hub, model, tmp_path):
    hub.create("you/private", private=True).commit({"x.safetensors": model.read("vae/x.safetensors")})
    hub.create("you/gated", gated=True).commit({"x.safetensors": model.read("vae/x.safetensors")})
    line = commands.run("convert", address, tmp_path / "out").error(code, *words)
    assert "hf_test" not in line
    assert not (tmp_path / "out").exists()


def test_without_a_token(hub, model, tmp_path, monkeypatch):
    hub.create("me/private", private=True).commit({"x.safetensors": model.read("vae/x.safetensors")})
    monkeypatch.delenv("HF_TOKEN")
    for name in ("private", "none"):
        commands.run("convert", f"hf://me/{name}", tmp_path / "out").error(4, "private", "no token", "hf auth login")
    commands.run("convert", "hf://me/m", tmp_path / "out").fine()


def test_a_token_that_is_not_accepted(model, tmp_path, monkeypatch):
    del model
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = commands.run("convert", "hf://me/m", tmp_path / "out", "--debug")
    assert result.code == 3
    assert "hf_secret" not in result.err + result.out
    assert "HF_TOKEN" in result.err.splitlines()[-1]


@pytest.mark.parametrize("token", ["hf_sécret", "hf_secret\x00", "hf_secret\x7f\x01"])
def test_a_token_that_cannot_be_sent(token, model, tmp_path, monkeypatch):
    del model
    if "\0" in token:  # An environment variable cannot hold it, but a file can.
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        (tmp_path / "token").write_text(token)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    line = commands.run("convert", "hf://me/m", tmp_path / "out").error(3, "token")
    assert "cret" not in line


@pytest.mark.parametrize(
    "where",
    [r"/api/models/me/m$|/revision/", "/tree/", r"/resolve/.*x\.safetensors", "/cdn/.*x.safetensors", "config.json"],
)
@pytest.mark.parametrize(
    ("fault", "code", "word"),
    [
        (status(401), 3, "401"),
        (status(403), 3, "403"),
        (status(404), 4, "404"),
        (status(429, {"Retry-After": "0"}), 5, "429"),
        (status(500), 5, "500"),
        (status(503), 5, "503"),
        (cut(after=0), 5, "broke off"),
        (hang, 5, "in time"),
        (slow(0.5), 5, "in time"),
    ],
    ids=["401", "403", "404", "429", "500", "503", "cut", "silent", "slow"],
)
def test_a_fault_that_stays(where, fault, code, word, hub, model, tmp_path, monkeypatch):
    if word == "in time":
        monkeypatch.setitem(limits.TIMEOUTS, "read", 0.1)
    if "/cdn/" in where and code == 3:
        code = 5  # For the storage, the URL has expired: a new one is requested.
    hub.inject("GET", where, fault, times=1000)
    result = commands.run("convert", "hf://me/m", tmp_path / "out")
    line = result.error(code, "hf://me/m")
    assert word in line or "ends too early" in line
    assert "hf_test" not in line
    assert "Signature" not in line
    assert model.head in line or "/api/" in where
    assert not [
        name
        for name in tree_bytes(tmp_path)
        if "out/vae/x.df11" in name or "partial" in name or name.endswith("out/model_index.json")
    ] or (where == "config.json")
    assert not [name for name in tree_bytes(tmp_path) if name.endswith("out/vae/config.json")]


@pytest.mark.parametrize("where", ["/api/models/", "/resolve/", "/cdn/"])
@pytest.mark.parametrize(
    "fault",
    [status(429, {"Retry-After": "0"}), status(500), cut(after=0), cut(after=15), truncated(by=10), hang],
    ids=["429", "500", "cut", "cut later", "truncated", "silent"],
)
def test_a_fault_that_passes(where, fault, hub, model, tmp_path, monkeypatch):
    if fault is hang:
        monkeypatch.setitem(limits.TIMEOUTS, "read", 0.5)
    df11.convert(model.checkout(tmp_path / "model"), tmp_path / "local")
    for after in (0, 3, 7):
        hub.inject("GET", where, fault, after=after)
    commands.run("convert", "hf://me/m", tmp_path / "out").fine()
    assert_same_conversion(tmp_path / "out", tmp_path / "local")


def test_ranges_that_are_ignored(hub, model, tmp_path):
    hub.inject("GET", "/cdn/|/resolve/", ignore_range, times=10_000)
    df11.convert(model.checkout(tmp_path / "model"), tmp_path / "local")
    df11.convert("hf://me/m", tmp_path / "out")
    assert_same_conversion(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize("after", [2, 3, 5])
def test_wrong_bytes_of_the_right_size(after, hub, one, tmp_path):
    hub.inject("GET", "/cdn/", corrupt(PIECE - 1), after=after)
    digest = sources.sha256(one)
    line = commands.run("convert", "hf://me/one", tmp_path / "out").error(
        1, "x.safetensors", "SHA-256", f"expected {digest}", "found "
    )
    assert hub.repository("me/one").head in line
    assert tree_bytes(tmp_path / "out") == {}
    commands.run("convert", "hf://me/one", tmp_path / "out").fine()


def test_bytes_that_are_other_ones_when_read_again(hub, tmp_path):
    # A tensor that coding does not make smaller is read twice.
    path = sources.write(tmp_path / "x.safetensors", [random_tensor("noise", "BF16", (300,)), bf16("w", (200, 300))])
    hub.create("me/m").commit({"x.safetensors": path})
    hub.inject("GET", "/cdn/", corrupt(5), after=2 + -(-path.stat().st_size // PIECE))
    commands.run("convert", "hf://me/m", tmp_path / "out").error(1, "noise", "second download")
    assert tree_bytes(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["merges/big.bin", "vae/config.json"])
def test_a_copy_with_wrong_bytes(name, hub, model, tmp_path):
    del model
    hub.inject("GET", f"/cdn/.*{Path(name).name}|/resolve/.*{name}", corrupt(5), times=1000)
    result = commands.run("convert", "hf://me/m", tmp_path / "out")
    if name.endswith("bin"):  # The first request for it is only redirected.
        result.error(1, name, "SHA-256")
    else:
        result.error(1, name, "git blob")
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("wrong", [-3, 3])
def test_a_size_that_is_not_the_listed_one(wrong, hub, one, tmp_path):
    repository = hub.repository("me/one")
    repository.apply("main", {"x.safetensors": Blob(one.stat().st_size + wrong, sources.sha256(one), None)}, "wrong")
    commands.run("convert", "hf://me/one", tmp_path / "out").error(1, "x.safetensors", "a different size")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt"])
def test_names_that_lead_out_of_the_target(name, hub, one, tmp_path):
    del one
    hub.repository("me/one").commit({name: b"evil"})
    commands.run("convert", "hf://me/one", tmp_path / "deep" / "out").error(2, "no repository can hold", "evil")
    assert not (tmp_path / "deep").exists()


def test_a_target_on_the_hub(one, tmp_path):
    commands.run("convert", one, "hf://me/out").error(2, "hf://me/out", "df11 job run", "df11 hub push")
    commands.run("convert", "hf://me/one", "hf://me/out").error(2, "hf://me/out")
    assert not list(tmp_path.glob("hf:*"))


def test_file_and_folder(one, tmp_path):
    del one
    (tmp_path / "file").write_text("mine")
    commands.run("convert", "hf://me/one", tmp_path / "file").error(2, "folder")
    commands.run("convert", "hf://me/one/x.safetensors", tmp_path).error(2, "file")


def test_the_hub_switched_off(one, tmp_path, monkeypatch):
    del one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commands.run("convert", "hf://me/one", tmp_path / "out").error(5, "HF_HUB_OFFLINE")


def test_nobody_there(one, tmp_path, monkeypatch):
    del one
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    commands.run("convert", "hf://me/one", tmp_path / "out").error(5, "hf://me/one", "no connection")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    commands.run("convert", "hf://me/one", tmp_path / "out").error(2, "HF_ENDPOINT")


def test_without_the_client(tmp_path):
    result = commands.run_without(["huggingface_hub"], tmp_path / "hidden", "convert", "hf://me/one", tmp_path / "out")
    result.error(2, "huggingface_hub", "pip install 'df11[hub]'")


def test_an_interrupt_does_not_wait_for_a_silent_server(hub, one, tmp_path):
    del one
    hub.inject("GET", "/cdn/", hang, times=100, after=2)
    process = commands.start("convert", "hf://me/one", tmp_path / "out")
    commands.wait_until(lambda: hub.count("GET", "/cdn/") > 2, process)
    process.send_signal(signal.SIGINT)
    commands.finish(process).error(130, "interrupted")
    assert tree_bytes(tmp_path / "out") == {}


def test_a_target_that_appears_meanwhile(one, tmp_path):
    del one
    with pytest.raises(errors.ConflictError):
        df11.convert(
            "hf://me/one/x.safetensors",
            tmp_path / "x.df11",
            on_progress=lambda _: (tmp_path / "x.df11").write_bytes(b"theirs"),
        )
    assert (tmp_path / "x.df11").read_bytes() == b"theirs"


# The manifest of another conversion.


def test_a_manifest_is_not_copied(hub, one, tmp_path):
    hub.repository("me/one").commit({FILE_NAME: b"of another conversion", "sub/config.json": b"{}"})
    df11.convert("hf://me/one", tmp_path / "out")
    assert set(tree_bytes(tmp_path / "out")) - {FILE_NAME} == {".gitattributes", "sub/config.json", "x.df11"}
    assert df11.verify(tmp_path / "out", one.parent).files == 1
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert set(tree_bytes(tmp_path / "back")) == {".gitattributes", "sub/config.json", "x.safetensors"}


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--max-disk", "1GB"]], ids=["streamed", "downloaded"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_memory_does_not_depend_on_the_shard(dtype, options, hub, tmp_path):
    path = sources.write_large(tmp_path / "x.safetensors", dtype, 300_000_000, sparse=dtype == "F32")
    hub.create("me/m").commit({"x.safetensors": path})
    assert commands.peak_memory("convert", "hf://me/m", tmp_path / "out", "--no-verify", *options) <= BOUND
    with df11.open(tmp_path / "out" / "x.df11") as container:
        assert (container.source.bytes, container.source.sha256) == (path.stat().st_size, sources.sha256(path))


@pytest.mark.slow
def test_the_client_counts_into_the_bound(hub, tmp_path):
    path = sources.write_large(tmp_path / "x.safetensors", "BF16", 100_000_000)
    hub.create("me/m").commit({"x.safetensors": path})
    line = commands.run("convert", "hf://me/m", tmp_path / "out", "--max-memory", "1MiB").error(6, "--max-memory")
    needed = int(line.split("at least ")[1].split("MiB")[0])
    there = int(
        commands.run("convert", path, tmp_path / "x.df11", "--max-memory", "1MiB")
        .error(6)
        .split("at least ")[1]
        .split("MiB")[0]
    )
    assert needed >= there + 40
    assert (
        commands.peak_memory("convert", "hf://me/m", tmp_path / "out", "--max-memory", f"{needed}MiB") <= needed << 20
    )


def test_f32_that_turns_out_not_to_be_bf16_is_read_again(hub, tmp_path):
    """Its first segment is fetched twice, while the reader is further ahead; what follows is not disturbed."""
    values = np.frombuffer(f32("", (2 * sources.SEGMENT,), exact=True).data, "<u4").copy()
    values[-7] |= 1
    late = sources.Tensor("late", "F32", values.shape, values.tobytes())
    tensors = [bf16("a", (300, 200)), late, *(bf16(f"after.{i}", (1000, 999), i) for i in range(5))]
    path = sources.write(tmp_path / "late" / "x.safetensors", tensors)
    hub.create("me/late").commit({"x.safetensors": path})
    df11.convert("hf://me/late/x.safetensors", tmp_path / "x.df11")
    df11.convert(path, tmp_path / "y.df11")
    assert (tmp_path / "x.df11").read_bytes() == (tmp_path / "y.df11").read_bytes()
    with df11.open(tmp_path / "x.df11") as container:
        assert (container.info("late").dtype, container.info("late").encoding) == ("F32", "df11")
