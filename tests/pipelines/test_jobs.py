"""Jobs from the Hub to the Hub, with the real client and a Hub on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME
from df11.formats import errors
from df11.pipelines.run import run_job
from df11.storage import client as hub_client
from tests.support import sources
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import Action, HubServer, corrupt, cut, landed, status, truncated

SOURCE, TARGET = "hf://lab/model", "hf://me/model-df11"
SHARDS = [f"model-{number:05}-of-00003" for number in (1, 2, 3)]


pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(hub_client, "LONGEST_WAIT", 0.0)


@pytest.fixture
def source(hub: HubServer) -> Repository:
    repository = hub.create("lab/model")
    repository.commit(models.model())
    return repository


class Events:
    """A log that keeps its events."""

    def __init__(self) -> None:
        self.list: list[dict[str, Any]] = []

    def __call__(self, event: str, **values: Any) -> None:
        self.list.append({"event": event, **values})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.list if one["event"] == event]


def run(
    tmp_path: Path, *, log: Any = lambda *_, **__: None, source: str = SOURCE, target: str = TARGET, **options: Any
) -> None:
    """Run a job of one model to success, or raise its error."""
    report = run_job(models.a_job(source, target, tmp_path / "work", **options), log=log)
    for _, error in report.failures:
        raise error
    assert len(report.models) == 1


def assert_complete(target: Repository, source: Repository, tmp_path: Path) -> None:
    """The target is a whole model, and the source's shards come back byte for byte. The work folder is empty."""
    files = target.files()
    folder = target.checkout(tmp_path / "pulled")
    df11.verify(folder)
    df11.restore(folder, tmp_path / "restored")
    restored = sources.tree_bytes(tmp_path / "restored")
    original = source.files()
    assert {name: restored[name] for name in models.source_files(source)} == models.source_files(source)
    assert restored["model.safetensors.index.json"] == original["model.safetensors.index.json"]
    for name in ("config.json", "tokenizer/tokenizer.json", "LICENSE"):
        assert files[name] == original[name]
    manifest = parquet.from_bytes(files[FILE_NAME], "manifest")
    assert [row.file for row in manifest.files] == [f"{name}.df11" for name in SHARDS]
    hashes = target.hashes()
    for row in manifest.files:
        assert row.sha256 == hashes[row.file]
        assert row.source_sha256 == source.hashes()[row.source_file]
    assert (manifest.origin.repository, manifest.origin.commit) == ("lab/model", source.head)
    assert not list((tmp_path / "work").rglob("*.df11*"))


def test_a_model_from_the_hub_to_the_hub(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    log = Events()
    run(tmp_path, log=log, private=True)
    target = hub.repository("me/model-df11")
    assert_complete(target, source, tmp_path)
    assert target.private
    # One commit per shard, and one for the large file; the rest, the index included, comes last.
    paths = [set(commit.paths) for commit in reversed(list(target.history("main")))][1:]
    assert [{path for path in changed if path != FILE_NAME} for changed in paths[:4]] == [
        {f"{name}.df11"} for name in SHARDS
    ] + [{"tokenizer/tokenizer.json"}]
    assert {"model.df11.index.json", "README.md", "config.json", "LICENSE"} <= paths[4]
    assert len(paths) == 5
    converted = log.of("file")
    assert [event["file"] for event in converted] == [*(f"{name}.df11" for name in SHARDS), "tokenizer/tokenizer.json"]
    assert set(converted[0]["seconds"]) == {"convert", "verify", "deliver"}
    assert log.of("checked") == [
        {"event": "checked", "target": TARGET, "files": len(target.files()) - 1}
    ]  # All but .gitattributes.


def test_the_card_says_what_it_is(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    run(tmp_path)
    card = hub.repository("me/model-df11").read("README.md").decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "lab/model"
    assert front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation"
    assert "df11" in front["tags"]
    assert source.hashes()[f"{SHARDS[0]}.safetensors"] in card
    for picture in re.findall(r"\]\((df11-plots/[^)]+)\)", card):
        assert picture in hub.repository("me/model-df11").files()


@pytest.mark.usefixtures("source")
def test_run_again_it_does_nothing(hub: HubServer, tmp_path: Path) -> None:
    run(tmp_path)
    target = hub.repository("me/model-df11")
    before, count = target.head, len(hub.requests)
    run(tmp_path)
    assert target.head == before
    again = hub.requests[count:]
    assert not [
        request for request in again if "safetensors" in request.path and "index" not in request.path and request.cdn
    ]
    assert not [request for request in again if request.method in ("POST", "PUT")]


def test_a_new_revision_costs_only_what_has_changed(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    run(tmp_path)
    source.commit({f"{SHARDS[1]}.safetensors": models.shard(2, rows=77)})
    log = Events()
    run(tmp_path, log=log)
    assert [event["file"] for event in log.of("file")] == [f"{SHARDS[1]}.df11"]
    assert_complete(hub.repository("me/model-df11"), source, tmp_path)


def test_shards_that_are_gone_are_removed(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    run(tmp_path)
    files = models.model(2)
    source.commit({**dict.fromkeys(models.model(3)), **files})
    run(tmp_path)
    names = {name for name in hub.repository("me/model-df11").files() if name.endswith(".df11")}
    assert names == {"model-00001-of-00002.df11", "model-00002-of-00002.df11"}


class Enough(Exception):  # noqa: N818 - not an error
    pass


def break_off(tmp_path: Path, commits: int) -> None:
    """Run the job up to this many commits."""
    made = 0

    def log(event: str, **_: Any) -> None:
        nonlocal made
        made += event == "commit"
        if made == commits:
            raise Enough

    with pytest.raises(Enough):
        run(tmp_path, log=log)


@pytest.mark.parametrize("commits", [1, 2])
def test_shards_that_are_gone_are_removed_by_a_job_that_goes_on(
    hub: HubServer, source: Repository, tmp_path: Path, commits: int
) -> None:
    run(tmp_path)
    source.commit({**dict.fromkeys(models.model(3)), **models.model(2)})
    break_off(tmp_path, commits)
    target = hub.repository("me/model-df11")
    assert {
        f"{name}.df11" for name in SHARDS
    } <= target.files().keys()  # The old model can be loaded until the new one is complete.
    run(tmp_path)
    assert {name for name in target.files() if name.endswith(".df11")} == {
        "model-00001-of-00002.df11",
        "model-00002-of-00002.df11",
    }
    assert len(parquet.from_bytes(target.read(FILE_NAME), "").files) == 2


def test_pictures_are_of_the_new_revision_also_of_a_job_that_goes_on(
    hub: HubServer, source: Repository, tmp_path: Path
) -> None:
    run(tmp_path)
    source.commit({f"{SHARDS[1]}.safetensors": models.shard(2, rows=770)})
    break_off(tmp_path, 1)  # The manifest is already that of the new revision.
    run(tmp_path)
    run(tmp_path, target="hf://me/whole")
    found, wanted = (models.comparable(hub.repository(name)) for name in ("me/model-df11", "me/whole"))
    assert found == wanted


def test_a_source_is_no_target(source: Repository, tmp_path: Path) -> None:
    for name, data in models.source_files(source).items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    for target in ("model", "model/df11"):
        with pytest.raises(errors.UsageError, match="lies in the source"):
            run(tmp_path, source=str(tmp_path / "model"), target=str(tmp_path / target))


def test_the_card_of_a_branch_names_the_repository(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    run(tmp_path, target=f"{TARGET}@draft")
    target = hub.repository("me/model-df11")
    card = target.files("draft")["README.md"].decode()
    assert 'from_pretrained("me/model-df11"' in card
    assert "@draft" not in card
    assert source.head


def test_a_revision_is_resolved_once(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    first = source.head

    def log(event: str, **_: Any) -> None:
        if event == "commit":
            source.commit({f"{SHARDS[2]}.safetensors": models.shard(9)})  # The source moves on while the job runs.

    run(tmp_path, log=log)
    manifest = parquet.from_bytes(hub.repository("me/model-df11").read(FILE_NAME), "")
    assert manifest.origin.commit == first
    assert manifest.files[2].source_sha256 == source.hashes(first)[f"{SHARDS[2]}.safetensors"]


def test_a_cast(hub: HubServer, tmp_path: Path) -> None:
    hub.create("lab/model").commit(models.model(2, "F32"))
    run(tmp_path, cast="bf16")
    manifest = parquet.from_bytes(hub.repository("me/model-df11").read(FILE_NAME), "")
    assert manifest.cast == "bf16"
    assert {row.dtype for row in manifest.tensors} == {"BF16", "I64"}
    before = hub.repository("me/model-df11").head
    run(tmp_path, cast="bf16")
    assert hub.repository("me/model-df11").head == before
    run(tmp_path)  # Without the cast, it is a different conversion.
    assert {row.dtype for row in parquet.from_bytes(hub.repository("me/model-df11").read(FILE_NAME), "").tensors} == {
        "F32",
        "I64",
    }


def test_several_shards_in_a_commit(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    run(tmp_path, shards_per_commit=3)
    target = hub.repository("me/model-df11")
    assert len(target.commits) == 4  # The first one, three shards, the large file, the rest.
    assert_complete(target, source, tmp_path)


def test_what_was_sent_before_an_error_is_committed(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.inject("GET", "/cdn/.*model-00003", status(500), after=1, times=99)  # After the plan has read its header.
    with pytest.raises(errors.RetryLaterError):
        run(tmp_path, shards_per_commit=9)
    assert {f"{SHARDS[0]}.df11", f"{SHARDS[1]}.df11", FILE_NAME} <= hub.repository("me/model-df11").files().keys()
    hub._rules.clear()
    log = Events()
    run(tmp_path, log=log, shards_per_commit=9)
    assert [event["file"] for event in log.of("file")] == [f"{SHARDS[2]}.df11", "tokenizer/tokenizer.json"]
    assert_complete(hub.repository("me/model-df11"), source, tmp_path)


@pytest.mark.usefixtures("source")
def test_many_small_files_do_not_come_at_once(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("df11.converter.apply.TOGETHER", 5_000)
    hub.repository("lab/model").commit({f"notes/{number}.txt": b"%d" % number * 1_000 for number in range(10)})
    run(tmp_path)
    target = hub.repository("me/model-df11")
    sizes = [
        sum(len(target.read(path)) for path in commit.paths if path.startswith("notes/")) for commit in target.commits
    ]
    assert sum(sizes) == 10_000
    assert max(sizes) <= 5_000
    before = target.head
    run(tmp_path)
    assert target.head == before


@pytest.mark.usefixtures("source")
def test_what_is_excluded_does_not_come(hub: HubServer, tmp_path: Path) -> None:
    run(tmp_path, exclude=("tokenizer/*", "LICENSE"))
    names = hub.repository("me/model-df11").files().keys()
    assert "config.json" in names
    assert not {"tokenizer/tokenizer.json", "LICENSE"} & names


def test_a_small_disk_takes_one_at_a_time(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    largest = max(len(data) for name, data in source.files().items() if name.endswith(".safetensors"))
    run(tmp_path, disk=2_200_000)
    assert largest < 2_200_000
    with pytest.raises(errors.BudgetError, match="disk budget") as caught:
        run(tmp_path, target="hf://me/other", disk=largest // 2)
    assert caught.value.exit_code == 6
    assert "me/other" not in hub.repositories


def test_folders(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    """From the Hub to a folder, and from a folder to the Hub."""
    run(tmp_path, target=str(tmp_path / "folder"))
    before = sources.tree_bytes(tmp_path / "folder")
    run(tmp_path, target=str(tmp_path / "folder"))
    assert sources.tree_bytes(tmp_path / "folder") == before
    original = source.checkout(tmp_path / "original")
    run(tmp_path, source=str(original))
    target = hub.repository("me/model-df11").files()
    for name in target:
        if name.endswith((".df11", ".json")):
            assert target[name] == before[name]


# Trouble. For each fault, the exit code at each place, or none if the job should survive it.

FAULTS: list[tuple[str, str, Action, int, int | None]] = [
    # The source.
    ("GET", "/api/models/lab/model", status(500), 1, None),
    ("GET", "/api/models/lab/model", status(503), 99, 5),
    ("GET", "/api/models/lab/model", status(429, {"Retry-After": "0"}), 2, None),
    ("GET", "/api/models/lab/model/tree", cut(after=100), 1, None),
    ("GET", "/cdn/.*00002", cut(after=1000), 2, None),
    ("GET", "/cdn/.*00002", truncated(by=100), 2, None),
    ("GET", "/cdn/.*00002", corrupt(offset=50_000), 99, 1),
    ("GET", "/cdn/.*00002", status(403), 1, None),
    ("GET", "/cdn/.*00002", status(500), 99, 5),
    ("GET", "lab/model/resolve/.*00002", status(401), 99, 3),
    ("GET", "lab/model/resolve/.*config.json", corrupt(offset=10), 1, 1),
    # The target.
    ("POST", "/api/repos/create", status(500), 1, None),
    ("POST", "/api/repos/create", status(403), 99, 3),
    ("POST", "/api/models/me/model-df11/preupload", status(500), 1, None),
    ("POST", "info/lfs/objects/batch", status(500), 1, None),
    ("POST", "info/lfs/objects/batch", status(403), 99, 3),
    ("PUT", "/upload/", status(500), 1, None),
    ("PUT", "/upload/", cut(after=1000), 1, None),
    ("POST", "/verify", status(500), 1, None),
    ("POST", "/api/models/me/model-df11/commit", status(500), 1, None),
    ("POST", "/api/models/me/model-df11/commit", landed(500), 1, None),
    ("POST", "/api/models/me/model-df11/commit", landed(None), 1, None),
    ("POST", "/api/models/me/model-df11/commit", status(429, {"Retry-After": "0"}), 1, None),
    ("POST", "/api/models/me/model-df11/commit", status(500), 99, 5),
    ("POST", "/api/models/me/model-df11/commit", status(412), 1, 7),
    ("POST", "/api/models/me/model-df11/commit", status(409), 1, 7),
    ("POST", "/api/models/me/model-df11/commit", status(403), 1, 3),
    ("POST", "/api/validate-yaml", status(500), 1, None),
    ("GET", "/api/models/me/model-df11/tree", status(500), 1, None),
]


# Each at the first request, and at the second one if there is one.
CASES = [
    (*fault, after)
    for fault in FAULTS
    for after in (0, 1)
    if not (after and fault[1] in ("/api/repos/create", "/api/validate-yaml"))
]


@pytest.mark.parametrize(("method", "pattern", "action", "times", "code", "after"), CASES)
def test_faults(
    hub: HubServer,
    source: Repository,
    tmp_path: Path,
    method: str,
    pattern: str,
    action: Action,
    times: int,
    code: int | None,
    after: int,
) -> None:
    hub.inject(method, pattern, action, times=times, after=after)
    try:
        run(tmp_path)
        met = None
    except errors.Df11Error as error:
        met = error
    assert (met and met.exit_code) == code, met
    if met is not None:
        assert "\n" not in str(met)
        assert "hf_test" not in str(met)
    assert not list((tmp_path / "work").rglob("*.df11*"))
    if "me/model-df11" in hub.repositories:  # Every file there is right, and an index comes only when all are.
        held = hub.repository("me/model-df11").files()
        for name, data in held.items():
            if name.endswith(".df11"):
                (tmp_path / "one.df11").write_bytes(data)
                df11.verify(tmp_path / "one.df11")
        assert "model.df11.index.json" not in held or all(f"{name}.df11" in held for name in SHARDS)
    hub._rules.clear()
    run(tmp_path)
    assert_complete(hub.repository("me/model-df11"), source, tmp_path)
