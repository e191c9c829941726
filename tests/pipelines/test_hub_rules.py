"""The Hub's own words and rules: its messages are passed on, and its requests are followed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME
from df11.formats import errors
from df11.pipelines import transfer
from df11.storage import client as hub_client
from tests.support import commands, sources
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import HubServer, status
from tests.support.sources import tree_bytes

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))


@pytest.fixture
def source(hub: HubServer) -> Repository:
    repository = hub.create("lab/model")
    repository.commit(models.model(2))
    return repository


@pytest.fixture
def folder(source: Repository, tmp_path: Path) -> Path:
    """A converted folder."""
    df11.convert(source.checkout(tmp_path / "original"), tmp_path / "converted")
    return tmp_path / "converted"


def job(tmp_path: Path, more: str = "", source: str = "hf://lab/model", target: str = "hf://me/model-df11") -> Path:
    path = tmp_path / "job.toml"
    path.write_text(f'[[model]]\nsource = "{source}"\ntarget = "{target}"\n{more}\n[limits]\nwork = "work"\n')
    return path


# Its words


@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422, 429, 500, 503])
@pytest.mark.parametrize("form", ["header", "body"])
def test_its_message_is_in_the_line(code: int, form: str, hub: HubServer, source: Repository, tmp_path: Path) -> None:
    words = "Private storage limit reached: see hf.co/pricing"
    if form == "header":
        answer = status(code, {"X-Error-Message": words})
    else:
        answer = status(code, {"Content-Type": "application/json"}, body=json.dumps({"error": words}).encode())
    hub.inject("POST", "/api/repos/create", answer, times=99)
    result = commands.run("job", "run", "--quiet", job(tmp_path))
    assert result.code in (2, 3, 4, 5, 7)
    assert words in result.err
    assert source.head


def test_its_message_is_in_the_line_of_a_conflict(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.inject("POST", "/commit/", status(409, {"X-Error-Message": "the repository is being moved"}), times=99)
    commands.run("job", "run", "--quiet", job(tmp_path)).error(7, "the repository is being moved")
    assert source.head


def test_a_token_is_advised_only_where_it_may_help(
    hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.inject("POST", "/api/repos/create", status(403), times=99)
    assert "log in" not in commands.run("job", "run", "--quiet", job(tmp_path)).error(3, "403")
    hub.inject("POST", "/api/repos/create", status(401), times=99)
    monkeypatch.setenv("HF_TOKEN", "hf_refused")
    commands.run("job", "run", "--quiet", job(tmp_path)).error(3, "HF_TOKEN")
    assert source.head


def test_it_waits_as_long_as_it_is_asked_to(
    hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_client.time, "sleep", waits.append)
    hub.inject(
        "POST", "/commit/", status(429, {"Retry-After": "1800"}), times=1
    )  # After more, the client itself waits.
    result = commands.run("job", "run", job(tmp_path)).fine()
    assert waits == [1800.0]
    assert "1800 s" in result.err
    assert source.head


# Visibility


def created(hub: HubServer) -> list[dict[str, object]]:
    return [json.loads(one.body) for one in hub.requests if one.path.startswith("/api/repos/create")]


@pytest.mark.parametrize(("word", "asked"), [("", {}), ("private = true", {"private": True})])
def test_visibility_is_left_to_the_hub(
    word: str, asked: dict[str, bool], hub: HubServer, source: Repository, tmp_path: Path
) -> None:
    commands.run("job", "run", "--quiet", job(tmp_path, word)).fine()
    assert hub.repository("me/model-df11").private is bool(asked)
    assert source.head


def test_a_private_source_does_not_become_public_unasked(hub: HubServer, tmp_path: Path) -> None:
    hub.create("me/secret", private=True).commit(models.model(1))
    hub.create("me/open")
    line = commands.run("job", "run", "--quiet", job(tmp_path, "", "hf://me/secret", "hf://me/open"))
    line.error(2, "hf://me/secret", "public", "private = false")
    assert not [name for name in hub.repository("me/open").files() if name.endswith(".df11")]
    assert not hub.count("PUT|POST", "/upload/")
    commands.run("job", "run", "--quiet", job(tmp_path, source="hf://me/secret")).fine()
    assert hub.repository("me/model-df11").private
    commands.run("job", "run", "--quiet", job(tmp_path, "private = false", "hf://me/secret", "hf://me/open")).fine()
    hub.create("me/private-df11", private=True)
    commands.run("job", "run", "--quiet", job(tmp_path, "", "hf://me/secret", "hf://me/private-df11")).fine()


@pytest.mark.parametrize("manifest", ["its own", "of another conversion"])
def test_a_folder_of_a_private_source_does_not_become_public_unasked(
    manifest: str, hub: HubServer, tmp_path: Path
) -> None:
    secret = hub.create("me/secret", private=True)
    secret.commit(models.model(1))
    df11.convert("hf://me/secret", tmp_path / "a")
    if manifest != "its own":
        (tmp_path / "x.safetensors").write_bytes(models.shard(9))
        (container,) = (tmp_path / "a").glob("*.df11")
        df11.convert(tmp_path / "x.safetensors", container, force=True)
    commands.run("hub", "push", "--quiet", tmp_path / "a", "me/new").fine()
    assert hub.repository("me/new").private
    hub.create("me/open")
    commands.run("hub", "push", "--quiet", tmp_path / "a", "me/open").error(2, "private", "--public")
    assert not [name for name in hub.repository("me/open").files() if name.endswith(".df11")]
    # It goes with a folder that has been on the Hub.
    commands.run("hub", "pull", "--quiet", "me/new", tmp_path / "b").fine()
    commands.run("hub", "push", "--quiet", tmp_path / "b", "me/newer").fine()
    assert hub.repository("me/newer").private
    commands.run("hub", "push", "--quiet", "--public", tmp_path / "b", "me/open").fine()
    assert not hub.repository("me/open").private


def test_push_public_and_private(hub: HubServer, folder: Path) -> None:
    commands.run("hub", "push", folder, "me/a", "--private", "--public").error(2, "--private", "--public")
    commands.run("hub", "push", "--quiet", folder, "me/a", "--private").fine()
    commands.run("hub", "push", "--quiet", folder, "me/b", "--public").fine()
    assert hub.repository("me/a").private
    assert not hub.repository("me/b").private
    commands.run("hub", "push", "--quiet", folder, "me/b", "--private").error(2, "public")


# The model card


def test_the_hub_checks_the_model_card_before_anything_is_sent(
    hub: HubServer, source: Repository, tmp_path: Path
) -> None:
    reason = '"language[0]" must only contain lowercase characters'
    answer = json.dumps({"errors": [{"message": reason}], "warnings": []}).encode()
    hub.inject("POST", "/api/validate-yaml", status(400, {"Content-Type": "application/json"}, body=answer), times=9)
    line = commands.run("job", "run", "--quiet", job(tmp_path)).error(2, "README.md")
    assert "language[0]" in line
    assert "me/model-df11" not in hub.repositories
    assert source.head


@pytest.mark.parametrize("own", [None, b"# The transformer alone\n"])
def test_the_licence_of_a_folder_is_its_repositorys(own: bytes | None, hub: HubServer, tmp_path: Path) -> None:
    files = {f"transformer/{name}": data for name, data in models.model(1).items() if name != "README.md"}
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# m\n"
    hub.create("you/m").commit(files | {"README.md": card} | ({} if own is None else {"transformer/README.md": own}))
    commands.run("job", "run", "--quiet", job(tmp_path, source="hf://you/m/transformer", target="out")).fine()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in text


# Commits


def test_copied_files_travel_together(hub: HubServer, folder: Path) -> None:
    for number in range(70):
        (folder / f"{number:03}.png").write_bytes(b"\x89PNG" + bytes([number]) * 1_100_000)
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    assert hub.count("POST", "/commit/") <= 6
    assert hub.repository("me/m").files().keys() >= {f"{number:03}.png" for number in range(70)}


# Updates


def test_push_and_pull_cost_what_has_changed(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "pulled").fine()
    (folder / "config.json").write_text('{"new": 1}')
    for options in ([], ["--force"]):
        before = len(hub.requests)
        commands.run("hub", "push", "--quiet", folder, "me/m").fine()
        commands.run("hub", "pull", "--quiet", *options, "me/m", tmp_path / "pulled").fine()
        assert not [one for one in list(hub.requests)[before:] if ".df11" in one.path and one.sent > 20_000]
    assert (tmp_path / "pulled" / "config.json").read_text() == '{"new": 1}'
    assert tree_bytes(tmp_path / "pulled") == hub.repository("me/m").files()


def test_push_and_pull_remove_what_is_no_more(hub: HubServer, source: Repository, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "pulled").fine()
    (tmp_path / "pulled" / "mine.df11").write_bytes((folder / "model-00001-of-00002.df11").read_bytes())
    old = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    source.commit({"model.safetensors": models.shard(9), **dict.fromkeys(old)})
    df11.convert(source.checkout(tmp_path / "second"), folder)
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    wanted = {"model.df11"}
    assert {name for name in hub.repository("me/m").files() if "df11" in name and "manifest" not in name} - {
        name for name in hub.repository("me/m").files() if name.startswith("df11-plots/")
    } == wanted
    commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "pulled").fine()
    found = {path.name for path in (tmp_path / "pulled").glob("*.df11*")}
    assert found == wanted | {"mine.df11"}  # Files that no manifest names belong to somebody.


def test_include_and_exclude(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/m", "--exclude", "tokenizer/*").fine()
    assert not [name for name in hub.repository("me/m").files() if name.startswith("tokenizer")]
    commands.run("hub", "pull", "--quiet", "me/m", tmp_path / "some", "--include", "*00001*").fine()
    assert set(tree_bytes(tmp_path / "some")) == {"model-00001-of-00002.df11"}
    more = 'include = ["*.safetensors", "*.json"]\nexclude = ["tokenizer/*"]'
    commands.run("job", "run", "--quiet", job(tmp_path, more)).fine()
    names = set(hub.repository("me/model-df11").files())
    assert not {name for name in names if name.startswith("tokenizer") or name == "LICENSE"}
    assert {"config.json", "model.df11.index.json", "model-00001-of-00002.df11"} <= names


def test_a_missing_shard(hub: HubServer, source: Repository, folder: Path, tmp_path: Path) -> None:
    source.commit({"model-00002-of-00002.safetensors": None})
    for command in (["job", "plan"], ["job", "run", "--quiet"]):
        commands.run(*command, job(tmp_path)).error(4, "model-00002-of-00002.safetensors", "allow")
    assert "me/model-df11" not in hub.repositories
    commands.run("job", "run", "--quiet", job(tmp_path, "allow_missing = true")).fine()
    commands.run("hub", "pull", "--quiet", "me/model-df11", tmp_path / "pulled").error(4, "00002")
    commands.run("hub", "pull", "--quiet", "--allow-missing", "me/model-df11", tmp_path / "pulled").fine()
    (folder / "model-00002-of-00002.df11").unlink()
    commands.run("hub", "push", "--quiet", folder, "me/other").error(4, "00002")


# Names


def test_owner_and_name_are_enough(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", folder, "me/plain").fine()
    commands.run("hub", "pull", "--quiet", "me/plain", tmp_path / "pulled").fine()
    assert tree_bytes(tmp_path / "pulled") == hub.repository("me/plain").files()
    commands.run("convert", "lab/model", tmp_path / "out").error(4, "hf://lab/model")


# The application's client


def test_uploads_do_not_take_xet(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Xet's memory has no bound. It is on for everyone who imported the client earlier."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    commands.run("hub", "push", "--quiet", folder, "me/m").fine()
    assert not [one for one in hub.requests if "xet" in one.path]


CHANGES_NOTHING = """
import logging, os, sys
import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.utils import are_progress_bars_disabled

def state():
    client = get_session()
    return (
        dict(os.environ), logging.getLogger("huggingface_hub").level, logging.getLogger("df11").level,
        logging.getLogger("df11").handlers, are_progress_bars_disabled(), constants.HF_HUB_DISABLE_XET,
        str(client.timeout), dict(client.headers), logging.getLogger().level,
    )

before = state()
import df11, df11.runtime
from df11.pipelines import transfer
from df11.pipelines.job import read_job
assert state() == before, "importing"
transfer.push(sys.argv[1], "me/m")
transfer.pull("me/m", sys.argv[2])
assert state() == before, "working"
"""


def test_the_application_is_left_as_it_is(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    environment = {**commands.environment(), **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", CHANGES_NOTHING, folder, tmp_path / "pulled"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_retries_are_told_by_a_logger(hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.inject("POST", "/commit/", status(500), times=1)
    with caplog.at_level(logging.INFO, "df11"):
        transfer.push(folder, "me/m")
    (record,) = [record for record in caplog.records if record.name == "df11"]
    assert "500" in record.getMessage()
    assert isinstance(vars(record)["error"], errors.RetryLaterError)


# Names that the rule does not give back


def test_names_of_shards_survive_the_hub(hub: HubServer, tmp_path: Path) -> None:
    original = tmp_path / "original"
    sources.write(original / "a.sft", [sources.bf16("a", (600,))])
    (original / "m.sft.index.json").write_text(json.dumps({"weight_map": {"a": "a.sft"}}))
    df11.convert(original, tmp_path / "converted")
    commands.run("hub", "push", tmp_path / "converted", "me/pushed").fine()
    manifest = parquet.from_bytes(hub.repository("me/pushed").read(FILE_NAME), "")
    assert [row.source_file for row in manifest.files] == ["a.sft"]
    assert manifest.renamed == (("m.df11.index.json", "m.sft.index.json"),)
    commands.run("hub", "pull", "me/pushed", tmp_path / "pulled").fine()
    df11.verify(tmp_path / "pulled", original)
    df11.restore(tmp_path / "pulled", tmp_path / "back")
    assert tree_bytes(original).items() <= tree_bytes(tmp_path / "back").items()
    assert not list((tmp_path / "back").glob("*.safetensors*"))


def test_a_shard_that_gets_another_name_has_it_in_the_manifest(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = sources.file_bytes([sources.bf16("a", (600,))])
    source = hub.create("lab/other")
    path = job(tmp_path, source="hf://lab/other", target="hf://me/other")
    for name, other in (("a.sft", "a.safetensors"), ("a.safetensors", "a.sft")):
        source.commit({name: data, other: None} if other in source.files() else {name: data})
        commands.run("job", "run", path).fine()
        files = hub.repository("me/other").read(FILE_NAME)
        assert [row.source_file for row in parquet.from_bytes(files, "").files] == [name]
