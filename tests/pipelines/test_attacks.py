"""What a hostile Hub, a forged manifest, an odd job file or a careless user can do: nothing, and one line says so."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME, FileRow
from df11.pipelines.card import _front_matter
from df11.storage import client as hub_client
from df11.storage.store import open_store
from tests.support import commands
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import HubServer, hang, status

pytestmark = pytest.mark.usefixtures("client")

SOURCE, TARGET = "hf://lab/model", "hf://me/model-df11"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(hub_client, "WAITS", (0.0,))


@pytest.fixture
def source(hub: HubServer) -> Repository:
    repository = hub.create("lab/model")
    repository.commit(models.model(2))
    return repository


def write_job(
    folder: Path, source: str = SOURCE, target: str = TARGET, limits: str = 'threads = 2\nwork = "work"'
) -> Path:
    """A job file of one model."""
    path = folder / "job.toml"
    path.write_text(f'[[model]]\nsource = "{source}"\ntarget = "{target}"\n[limits]\n{limits}\n')
    return path


# A Hub that responds with rubbish.

RUBBISH = [
    ("GET", r"/api/models/{}(/revision/[^/]*)?(\?|$)", b"{}"),
    ("GET", r"/api/models/{}(/revision/[^/]*)?(\?|$)", b"[]"),
    ("GET", r"/api/models/{}(/revision/[^/]*)?(\?|$)", b'{"id": "a/b"}'),
    ("GET", r"/api/models/{}(/revision/[^/]*)?(\?|$)", b'{"id": "a/b", "sha": "main"}'),
    ("GET", r"/api/models/{}(/revision/[^/]*)?(\?|$)", b'{"id": "a/b", "sha": "a b\\n"}'),
    ("GET", "/{}/tree/", b"null"),
    ("GET", "/{}/tree/", b"[1]"),
    ("GET", "/{}/tree/", b'[{"type": "file", "path": "a.safetensors"}]'),
    ("GET", "/{}/tree/", b'[{"type": "file", "path": "a.safetensors", "oid": "x", "size": 5, "lfs": {}}]'),
]


@pytest.mark.parametrize("repository", ["lab/model", "me/model-df11"])
@pytest.mark.parametrize(("method", "pattern", "body"), RUBBISH)
def test_answers_of_another_shape(
    hub: HubServer, source: Repository, tmp_path: Path, repository: str, method: str, pattern: str, body: bytes
) -> None:
    hub.create("me/model-df11")
    hub.inject(
        method, pattern.format(repository), status(200, {"Content-Type": "application/json"}, body=body), times=99
    )
    commands.run("job", "run", "--quiet", write_job(tmp_path)).error(5, repository)
    assert source.head


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        ("/batch", b"{}"),
        ("/batch", b'{"objects": [{"error": {"code": 507}}]}'),
        ("/preupload/", b"{}"),
        ("/commit/", b'{"commitOid": 7, "commitUrl": "x"}'),
    ],
)
def test_uploads_answered_with_another_shape(
    hub: HubServer, source: Repository, tmp_path: Path, pattern: str, body: bytes
) -> None:
    hub.inject("POST", pattern, status(200, {"Content-Type": "application/json"}, body=body), times=99)
    commands.run("job", "run", "--quiet", write_job(tmp_path)).error(5)
    assert source.head


@pytest.mark.parametrize("place", ["variable", "variable with a line end", "file"])
def test_a_token_that_the_hub_repeats(
    hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    token = "hf_repeatedrepeatedrepeated"
    hub.tokens[token] = "me"
    monkeypatch.delenv("HF_TOKEN")
    if place == "file":
        (tmp_path / "hf-home").mkdir(exist_ok=True)
        (tmp_path / "hf-home" / "token").write_text(token)
    else:
        monkeypatch.setenv("HF_TOKEN", token if place == "variable" else f"{token}\n")
    hub.inject("POST", "/commit/", status(422, error_message=f"who is {token}?"), times=9)
    result = commands.run("job", "run", "--json", "--debug", write_job(tmp_path))
    assert result.code == 2
    assert "who is ***?" in result.err
    assert "repeated" not in result.out + result.err
    assert source.head


def test_merges_in_a_card_do_not_grow() -> None:
    layers = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30))
    started = time.monotonic()
    assert _front_matter(f"---\na0: &a0 {{x: 1}}\n{layers}---\n") == {}
    assert time.monotonic() - started < 10


# What a target holds.


@pytest.mark.parametrize("name", ["notes.txt", ".gitattributes", "README.md"])
def test_a_forged_manifest_removes_containers_only(
    hub: HubServer, source: Repository, tmp_path: Path, name: str
) -> None:
    commands.run("job", "run", "--quiet", write_job(tmp_path)).fine()
    target = hub.repository("me/model-df11")
    manifest = parquet.from_bytes(target.read(FILE_NAME), "")
    forged = dataclasses.replace(
        manifest, files=(*manifest.files, FileRow(name, 8, "0" * 64, "a.safetensors", 8, "0" * 64))
    )
    target.commit({"notes.txt": b"precious", FILE_NAME: parquet.to_bytes(forged)})
    commands.run("job", "run", "--quiet", write_job(tmp_path)).fine()
    assert name in target.files()
    assert parquet.from_bytes(target.read(FILE_NAME), "") == manifest
    assert source.head


def test_plots_of_the_source_are_not_ours(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    source.commit({"df11-plots/sizes.png": b"\x89PNG theirs", "df11-plots/more.png": b"\x89" * (2 << 20)})
    commands.run("job", "run", "--quiet", write_job(tmp_path)).fine()
    target = hub.repository("me/model-df11")
    before = target.head
    assert len(target.read("df11-plots/sizes.png")) > 1000
    assert "df11-plots/more.png" not in target.files()
    commands.run("job", "run", "--quiet", write_job(tmp_path)).fine()
    assert target.head == before


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.df11.index.json"])
def test_a_folder_with_somebodys_files(source: Repository, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("mine")
    commands.run("job", "run", "--quiet", write_job(tmp_path, target="folder")).error(2, name, "already exists")
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    assert source.head


def test_a_folder_follows_a_new_revision(source: Repository, tmp_path: Path) -> None:
    commands.run("job", "run", "--quiet", write_job(tmp_path, target="folder")).fine()
    name = "model-00002-of-00002"
    source.commit({f"{name}.safetensors": models.shard(2, rows=77), "config.json": b'{"new": 1}'})
    commands.run("job", "run", "--quiet", write_job(tmp_path, target="folder")).fine()
    with df11.open(tmp_path / "folder" / f"{name}.df11") as container:
        assert container.source.sha256 == source.hashes()[f"{name}.safetensors"]
    assert (tmp_path / "folder" / "config.json").read_bytes() == b'{"new": 1}'


# What a source or a model folder holds.


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two\nlines.json"])
def test_names_that_the_hub_does_not_take(hub: HubServer, source: Repository, tmp_path: Path, name: bytes) -> None:
    original = source.checkout(tmp_path / "original")
    (original / os.fsdecode(name)).write_bytes(b"x")
    shown = ascii(os.fsdecode(name)).strip("'")
    result = commands.run("job", "run", write_job(tmp_path, source="original")).fine()
    assert shown in result.err
    df11.convert(original, tmp_path / "tree", exclude=[os.fsdecode(name)])
    (tmp_path / "tree" / os.fsdecode(name)).write_bytes(b"x")
    assert shown in commands.run("hub", "push", tmp_path / "tree", "me/pushed").fine().err
    for repository in ("me/model-df11", "me/pushed"):  # One odd name does not block the files beside it.
        assert {"config.json", "model-00001-of-00002.df11"} <= set(hub.repository(repository).files())
    # Weights with such a name are not left out.
    (original / (os.fsdecode(name) + ".safetensors")).write_bytes(models.shard(3))
    commands.run("job", "run", "--quiet", write_job(tmp_path, source="original")).error(2, "this name")


def test_a_manifest_of_other_containers_is_not_believed(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    df11.convert(SOURCE, tree)
    manifest = (tree / FILE_NAME).read_bytes()
    hub.create("lab/other").commit({"model-00001-of-00002.safetensors": models.shard(8, "F32")})
    df11.convert("hf://lab/other", tree, cast="bf16", force=True)
    (tree / FILE_NAME).write_bytes(manifest)
    commands.run("hub", "push", "--quiet", tree, TARGET).fine()
    target = hub.repository("me/model-df11")
    assert "lab/model" not in target.read("README.md").decode()
    assert parquet.from_bytes(target.read(FILE_NAME), "").cast == "bf16"
    commands.run("hub", "push", "--quiet", tree, TARGET).fine()
    commands.run("hub", "pull", "--quiet", TARGET, tmp_path / "pulled").fine()
    assert source.head


# Missing things are noticed before anything is done.


@pytest.mark.parametrize("package", ["pyarrow", "matplotlib"])
def test_packages_that_are_needed_at_the_end(
    hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    tree = tmp_path / "tree"
    df11.convert(SOURCE, tree)
    commands.run("hub", "push", "--quiet", tree, "hf://me/pushed").fine()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    commands.run("job", "run", "--quiet", write_job(tmp_path)).error(2, package, "df11[jobs]")
    commands.run("hub", "push", tree, TARGET).error(2, package)
    assert "me/model-df11" not in hub.repositories
    if package == "pyarrow":
        commands.run("hub", "pull", "hf://me/pushed", tmp_path / "pulled").error(2, package)
        commands.run("convert", SOURCE, tmp_path / "again").error(2, package)
        assert not (tmp_path / "pulled").exists()
        assert not (tmp_path / "again").exists()
    assert source.head


def test_the_memory_is_looked_at_before(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    commands.run("job", "plan", write_job(tmp_path, limits='memory = "100MiB"')).error(
        6, "[limits] memory of at least", "100MiB"
    )
    line = commands.run("job", "run", "--quiet", write_job(tmp_path, limits='memory = "100MiB"')).error(
        6, "memory budget"
    )
    assert "me/model-df11" not in hub.repositories
    enough = line.partition("at least ")[2].partition(",")[0]
    commands.run("job", "run", "--quiet", write_job(tmp_path, limits=f'memory = "{enough}"\nwork = "work"')).fine()
    assert source.head


def test_a_folder_of_somebody_else_is_not_worked_in(source: Repository, tmp_path: Path) -> None:
    """Where everybody may write, a link may lie in the place of the job's files, and other files would be removed."""
    commands.run("job", "run", "--quiet", write_job(tmp_path)).fine()
    assert list((tmp_path / "work").iterdir()) == []  # Its folder goes with the job.
    with open_store(TARGET).staging(tmp_path / "work", 1) as folder:
        assert folder is not None
    (tmp_path / "precious" / "data").mkdir(parents=True)
    folder.symlink_to(tmp_path / "precious")
    source.commit({"config.json": b"{}"})
    commands.run("job", "run", "--quiet", write_job(tmp_path)).error(3, "somebody else")
    assert (tmp_path / "precious" / "data").is_dir()


def test_a_silent_server_does_not_hold_an_interrupted_job(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    env = {**commands.environment(), **hub.environment(tmp_path / "home")}
    hub.inject("GET", "/cdn/.*0000[12]", hang, times=99, after=2)  # The plan has read the headers.
    process = subprocess.Popen(
        [*commands.COMMAND, "job", "run", "--json", str(write_job(tmp_path))],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    commands.wait_until(lambda: hub.count("GET", "/cdn/.*0000[12]") > 2, process)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    result = commands.finish(process)
    assert result.code == 130, result
    assert result.err.splitlines()[-1].startswith("df11: interrupted")
    assert time.monotonic() - started < 30  # Not the minutes that its retries take.
    assert source.head
