"""Jobs, push and pull: nobody's files are replaced or removed, and nothing damaged is sent or kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import df11
from df11.converter import parquet, work
from df11.converter.manifest import FILE_NAME, FileRow
from df11.formats import errors
from df11.pipelines.transfer import pull, push
from df11.storage import client as hub_client
from df11.storage.atomic import AtomicWriter
from df11.storage.local import LocalStore
from tests.support import commands
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import HubServer
from tests.support.sources import tree_bytes

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "WAITS", (0.0,))


@pytest.fixture
def source(hub: HubServer) -> Repository:
    repository = hub.create("lab/model")
    repository.commit(models.model(2))
    return repository


@pytest.fixture
def folder(source: Repository, tmp_path: Path) -> Path:
    df11.convert(source.checkout(tmp_path / "original"), tmp_path / "converted")
    return tmp_path / "converted"


def job(tmp_path: Path, more: str = "", source: str = "hf://lab/model", target: str = "hf://me/model-df11") -> Path:
    path = tmp_path / "job.toml"
    path.write_text(f'[[model]]\nsource = "{source}"\ntarget = "{target}"\n{more}\n[limits]\nwork = "work"\n')
    return path


def test_a_forged_manifest_removes_nothing_of_the_users(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    target = hub.repository("me/m")
    manifest = parquet.from_bytes(target.read(FILE_NAME), "")
    forged = [FileRow(name, 10, None, "x.safetensors", 10, "0" * 64) for name in ("mine.df11", "link/deep.df11")]
    target.commit({FILE_NAME: parquet.to_bytes(dataclasses.replace(manifest, files=(*manifest.files, *forged)))})
    pulled, elsewhere = tmp_path / "pulled", tmp_path / "elsewhere"
    commands.run("hub", "pull", "--quiet", "me/m", pulled).fine()
    elsewhere.mkdir()
    (pulled / "link").symlink_to(elsewhere)
    mine = (folder / "model-00001-of-00002.df11").read_bytes()
    for path in (pulled / "mine.df11", elsewhere / "deep.df11"):
        path.write_bytes(mine)
    commands.run("hub", "pull", "--quiet", "me/m", pulled).fine()
    assert (pulled / "mine.df11").read_bytes() == (elsewhere / "deep.df11").read_bytes() == mine


def test_a_damaged_container_never_gets_its_name(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    name = "model-00002-of-00002.df11"
    damaged = bytearray((folder / name).read_bytes())
    damaged[-1000] ^= 1
    hub.repository("me/m").commit({name: bytes(damaged)})  # Its hash is the one that the Hub lists.
    for _ in range(2):
        result = commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "pulled")
        assert result.code in (1, 2)
        assert name in result.err
        assert not (tmp_path / "pulled" / name).exists()


def test_what_changes_between_proof_and_upload_is_not_sent(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = work.deliver

    def swapped(task: work.Task, done: work.Done) -> work.Done:
        data = bytearray(done.path.read_bytes())
        data[-1000] ^= 1
        done.path.write_bytes(data)
        return honest(task, done)

    monkeypatch.setattr("df11.converter.engine.deliver", swapped)
    commands.run("hub", "push", "--quiet", folder, "me/m").error(7, "changed")
    assert not [name for name in hub.repository("me/m").files() if name.endswith(".df11")]


def test_links_that_lead_out_are_not_uploaded(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "id_ed25519").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "id_ed25519")
    commands.run("hub", "push", "--quiet", folder, "me/m").error(2, "notes.txt", "leads out")
    assert "me/m" not in hub.repositories


def test_another_model_is_not_taken_for_an_update(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.create("lab/other").commit(models.model(1))
    df11.convert("hf://lab/model", tmp_path / "out")
    before = tree_bytes(tmp_path / "out")
    commands.run("convert", "hf://lab/other", tmp_path / "out").error(2, "another model", "hf://lab/model")
    commands.run("job", "run", "--quiet", job(tmp_path)).fine()
    commands.run("job", "run", "--quiet", job(tmp_path, source="hf://lab/other")).error(2, "another model")
    assert tree_bytes(tmp_path / "out") == before
    commands.run("convert", "hf://lab/other", tmp_path / "out", "--force").fine()
    assert source.head


def test_a_pull_follows_what_is_edited_on_the_hub(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    pulled = tmp_path / "pulled"
    for text in (None, b"# one\n", b"# two\n", b"# three\n"):
        if text is not None:
            hub.repository("me/m").commit({"README.md": text})
        commands.run("hub", "pull", "--quiet", "me/m", pulled).fine()
    assert (pulled / "README.md").read_bytes() == b"# three\n"
    (pulled / "README.md").write_text("# mine\n")
    hub.repository("me/m").commit({"README.md": b"# four\n"})
    commands.run("hub", "pull", "--quiet", "me/m", pulled).error(2, "README.md", "--force")


@pytest.mark.parametrize("command", ["pull", "job"])
def test_a_file_is_no_folder_to_fill(command: str, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("mine")
    if command == "pull":
        commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "home" / "file").error(2, "file")
    else:
        commands.run("job", "run", "--quiet", job(tmp_path, target="home/file")).error(2, "file")
    assert tree_bytes(tmp_path / "home") == {"file": b"mine"}
    assert hub.repositories


def test_a_job_into_a_folder_leaves_its_pictures_alone(source: Repository, tmp_path: Path) -> None:
    (tmp_path / "out" / "df11-plots").mkdir(parents=True)
    (tmp_path / "out" / "df11-plots" / "sizes.png").write_bytes(b"mine")
    commands.run("job", "run", "--quiet", job(tmp_path, target="out")).error(2, "sizes.png")
    assert tree_bytes(tmp_path / "out") == {"df11-plots/sizes.png": b"mine"}
    assert source.head


def test_a_job_with_another_cast_keeps_nothing_of_the_one_before(hub: HubServer, tmp_path: Path) -> None:
    hub.create("lab/f32").commit(models.model(2, "F32"))
    run = {"source": "hf://lab/f32", "target": "hf://me/f32-df11"}
    commands.run("job", "run", "--quiet", job(tmp_path, **run)).fine()
    commands.run("job", "run", "--quiet", job(tmp_path, 'cast = "bf16"\nexclude = ["*00001*"]', **run)).error(
        2, "another conversion"
    )
    commands.run("job", "run", "--quiet", job(tmp_path, 'cast = "bf16"', **run)).fine()
    manifest = parquet.from_bytes(hub.repository("me/f32-df11").read(FILE_NAME), "")
    assert {row.dtype for row in manifest.tensors} == {"BF16", "I64"}


def test_a_pull_that_was_killed_goes_on(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest comes last, and what the Hub no longer has goes, although the new manifest does not name it."""
    for name in ("a", "b"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / f"{name}.safetensors").write_bytes(models.shard(ord(name)))
    df11.convert(tmp_path / "both", tmp_path / "converted")
    remote = hub.create("me/m")
    remote.commit(tree_bytes(tmp_path / "converted"))
    pulled = tmp_path / "pulled"
    commands.run("hub", "pull", "--quiet", "me/m", pulled).fine()

    (tmp_path / "both" / "b.safetensors").unlink()
    (tmp_path / "both" / "c.safetensors").write_bytes(models.shard(99))
    df11.convert(tmp_path / "both", tmp_path / "converted")
    remote.commit({**tree_bytes(tmp_path / "converted"), "b.df11": None})
    named: list[str] = []
    commit = AtomicWriter.commit

    def committed(writer: AtomicWriter, *check: Callable[[], object]) -> None:
        commit(writer, *check)
        named.append(writer.path.name)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(AtomicWriter, "commit", committed)
        patch.setattr(LocalStore, "commit", lambda *_: 1 / 0)
        pull("me/m", pulled)
    assert named == ["c.df11", FILE_NAME]
    assert (pulled / "b.df11").exists()
    commands.run("hub", "pull", "--quiet", "me/m", pulled).fine()
    assert tree_bytes(pulled) == remote.files()


def test_a_container_that_is_removed_before_it_is_read(hub: HubServer, folder: Path) -> None:
    removed = folder / "model-00002-of-00002.df11"
    with pytest.raises(errors.ConflictError, match="removed in the meantime; run the same command again"):
        push(folder, "me/m", on_total=lambda _: removed.unlink())
    assert "model-00002-of-00002.df11" not in hub.repository("me/m").files()
