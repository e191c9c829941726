"""``df11 job``, ``df11 hub`` and ``df11 report`` as users run them."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

import df11
from df11.converter import parquet
from df11.converter.manifest import FILE_NAME
from df11.storage import client as hub_client
from df11.storage import limits
from tests.support import commands, sources
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import Action, HubServer, corrupt, hang, slow, status

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))


@pytest.fixture
def source(hub: HubServer) -> Repository:
    repository = hub.create("lab/model")
    repository.commit(models.model())
    return repository


def write_job(folder: Path, *models: tuple[str, str], more: str = "") -> Path:
    """A job file."""
    path = folder / "job.toml"
    text = "".join(f'[[model]]\nsource = "{source}"\ntarget = "{target}"\n' for source, target in models)
    path.write_text(f'{text}{more}\n[limits]\nthreads = 2\nwork = "work"\n')
    return path


def test_json_lines(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    result = commands.run("job", "run", "--json", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).fine()
    assert not result.err
    kinds = [event["event"] for event in result.events]
    assert kinds == ["plan", *["file", "commit"] * 4, "commit", "checked", "model", "done"]
    assert all(event["time"].endswith("+00:00") for event in result.events)
    plan, done = result.events[0], result.events[-1]
    assert plan["commit"] == source.head
    assert (done["models"], done["failed"]) == (1, 0)
    assert done["source_bytes"] == sum(map(len, models.source_files(source).values()))
    assert result.events[-2]["commit"] == hub.repository("me/model-df11").head


def test_words_for_people(source: Repository, tmp_path: Path) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    result = commands.run("job", "run", job).fine()
    assert not result.out
    assert "model-00002-of-00003.df11: converted" in result.err
    assert "read back, all as sent" in result.err
    assert not commands.run("job", "run", "--quiet", job).fine().err
    assert source.head


def test_a_plan_changes_nothing(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    result = commands.run("job", "plan", job).fine()
    assert f"hf://lab/model at commit {source.head} -> hf://me/model-df11" in result.out
    assert "model-00003-of-00003.df11: convert" in result.out
    assert "of disk" in result.out
    (plan,) = commands.run("job", "plan", "--json", job).fine().events
    assert {file["status"] for file in plan["files"]} == {"planned"}
    assert "me/model-df11" not in hub.repositories
    assert not (tmp_path / "work").exists()
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    commands.run("job", "run", job).fine()
    (plan,) = commands.run("job", "plan", "--json", job).fine().events
    assert {file["status"] for file in plan["files"] if file["kind"] == "convert"} == {"kept"}


def test_what_is_expected_comes_about(source: Repository, tmp_path: Path) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    (plan,) = commands.run("job", "plan", "--json", job).fine().events
    files = [event for event in commands.run("job", "run", "--json", job).fine().events if event["event"] == "file"]
    expected = {file["file"]: file["expected_bytes"] for file in plan["files"]}
    for file in files:
        assert file["output_bytes"] == pytest.approx(expected[file["file"]], rel=0.2) or file["output_bytes"] < 200_000
    assert plan["disk_bytes"] >= files[0]["output_bytes"] + files[1]["output_bytes"]
    assert source.head


def test_one_model_that_fails_does_not_stop_the_others(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    job = write_job(tmp_path, ("hf://lab/missing", "hf://me/a"), ("hf://lab/model", "hf://me/model-df11"))
    result = commands.run("job", "run", "--json", job)
    assert result.code == 4
    (error,) = [event for event in result.events if event["event"] == "error"]
    assert error["code"] == 4
    assert "hf://lab/missing" in error["message"]
    assert result.err.splitlines() == [f"df11: {error['message']}"]
    assert "model.df11.index.json" in hub.repository("me/model-df11").files()
    assert source.head


# Ownership, what the client is told, and the exit code.
DENIED = [
    ("hf://lab/gated", "hf://me/x", 3, "access"),
    ("hf://lab/private", "hf://me/x", 4, "private"),
    ("hf://lab/missing", "hf://me/x", 4, "missing"),
    ("hf://lab/model@nowhere", "hf://me/x", 4, "nowhere"),
    ("hf://lab/model/nowhere", "hf://me/x", 4, "nowhere"),
    ("hf://lab/model/tokenizer", "hf://me/x", 2, "no .safetensors file"),
    ("hf://lab/model/config.json", "hf://me/x", 2, "df11-convert"),
    ("hf://lab/model", "hf://lab/x", 3, "403"),
    ("hf://lab/model", "hf://me/weights", 2, "holds weights"),
]


@pytest.mark.parametrize(("where", "target", "code", "word"), DENIED)
def test_what_cannot_be(
    hub: HubServer, source: Repository, tmp_path: Path, where: str, target: str, code: int, word: str
) -> None:
    hub.create("lab/gated", gated=True).commit(models.model(1))
    hub.create("lab/private", private=True).commit(models.model(1))
    hub.create("me/weights").commit({"model.safetensors": models.shard(1)})
    before = {name: repository.head for name, repository in hub.repositories.items()}
    result = commands.run("job", "run", "--quiet", write_job(tmp_path, (where, target)))
    result.error(code, word)
    assert {name: repository.head for name, repository in hub.repositories.items()} == before
    assert source.head


def test_without_a_token(hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    commands.run("job", "plan", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).fine()
    commands.run("job", "run", "--quiet", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).error(
        3, "hf auth login"
    )
    assert "me/model-df11" not in hub.repositories
    assert source.head


def test_a_renamed_source(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.rename("lab/model", "lab/renamed")
    commands.run("job", "run", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).fine()
    manifest = parquet.from_bytes(hub.repository("me/model-df11").read(FILE_NAME), "")
    assert manifest.origin.commit == source.head


def test_a_public_repository_is_no_private_one(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.create("me/model-df11")
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"), more="private = true")
    commands.run("job", "run", "--quiet", job).error(2, "public")
    assert source.head


def test_the_card_is_checked_before_anything_is_done(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"), more='[model.card]\nlicense = "other"')
    commands.run("job", "run", "--quiet", job).error(2, "license_name")
    assert "me/model-df11" not in hub.repositories
    assert source.head


def test_an_index_that_is_none(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    source.commit({"model.safetensors.index.json": b"[]"})
    commands.run("job", "run", "--quiet", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).error(
        2, "not an index"
    )
    assert "me/model-df11" not in hub.repositories


def test_a_silent_server(hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TIMEOUTS", {"connect": 5.0, "read": 0.3, "write": 5.0, "pool": 5.0})
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    hub.inject("POST", "/commit/", hang, times=99)
    commands.run("job", "run", "--quiet", job).error(5, "did not respond in time")
    hub._rules.clear()
    hub.inject("GET", "/tree/", slow(0.1), times=5)
    commands.run("job", "run", "--quiet", job).fine()
    assert source.head


def test_no_network(source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    commands.run("job", "run", "--quiet", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).error(
        5, "hf://lab/model"
    )
    assert source.head


def test_retries_are_told(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    hub.inject("POST", "/commit/", status(500))
    result = commands.run("job", "run", "--json", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).fine()
    (retry,) = [event for event in result.events if event["event"] == "retry"]
    assert "500" in retry["message"]
    assert source.head


def test_the_second_job_on_a_target_stops(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    """On another machine, so with its own work folder: it notices when it commits."""
    other = tmp_path / "other"
    other.mkdir()
    second = write_job(other, ("hf://lab/model", "hf://me/model-df11"))
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    hub.create("me/model-df11")
    env = {**commands.environment(), **hub.environment(tmp_path / "home")}
    hub.inject("PUT", "/upload/", slow(3), after=1)  # The first job stands still before its second shard.
    first = subprocess.Popen(
        [*commands.COMMAND, "job", "run", "--json", str(job)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commands.wait_until(lambda: len(hub.repository("me/model-df11").commits) > 1, first)
    hub.inject("POST", "me/model-df11/commit/", slow(4), times=1)  # The second one is slower still.
    code = commands.run("job", "run", "--quiet", second)
    done = commands.finish(first)
    assert sorted([code.code, done.code]) == [0, 7], (code, done)
    loser = code.err if code.code else done.err
    assert "somebody else" in loser
    commands.run("job", "run", "--quiet", job).fine()
    hub.repository("me/model-df11").checkout(tmp_path / "pulled")
    df11.verify(tmp_path / "pulled")
    assert source.head


def test_two_jobs_on_one_machine(source: Repository, tmp_path: Path, hub: HubServer) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    env = {**commands.environment(), **hub.environment(tmp_path / "home")}
    hub.inject("PUT", "/upload/", slow(30), times=1)
    first = subprocess.Popen(
        [*commands.COMMAND, "job", "run", str(job)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    commands.wait_until(lambda: hub.count("PUT", "/upload/") > 0, first)
    commands.run("job", "run", "--quiet", job).error(7, "another job is writing to this target")
    first.kill()
    first.communicate()
    commands.run("job", "run", "--quiet", job).fine()
    assert source.head


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(
    hub: HubServer, source: Repository, tmp_path: Path, number: signal.Signals
) -> None:
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    env = {**commands.environment(), **hub.environment(tmp_path / "home")}
    hub.inject("PUT", "/upload/", slow(30), after=1)
    process = subprocess.Popen(
        [*commands.COMMAND, "job", "run", "--json", str(job)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    commands.wait_until(lambda: hub.count("PUT", "/upload/") > 1, process)
    process.send_signal(number)
    result = commands.finish(process)
    assert result.code == 130, result
    assert result.err.splitlines()[-1].startswith("df11: interrupted")
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.name != ".lock"]
    commands.run("job", "run", "--quiet", job).fine()
    assert source.head


@pytest.mark.parametrize("shard", ["00001", "00002"])
def test_interrupted_it_waits_for_no_silent_source(
    hub: HubServer, source: Repository, tmp_path: Path, shard: str
) -> None:
    """The source is read in another thread, whether it comes first or during the upload of the one before."""
    job = write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    env = {**commands.environment(), **hub.environment(tmp_path / "home")}
    hub.inject("GET", f"/cdn/.*{shard}", hang, after=2, times=99)  # Its header is read twice before.
    process = subprocess.Popen(
        [*commands.COMMAND, "job", "run", str(job)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    commands.wait_until(lambda: hub.count("GET", f"/cdn/.*{shard}") > 2, process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert commands.finish(process).code == 130
    assert time.monotonic() - started < 30  # A silent server gets a minute, and several tries.
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.name != ".lock"]
    assert source.head


@pytest.mark.parametrize("fault", [None, status(401), status(403), status(429), status(500), corrupt(5)])
def test_the_token_is_never_printed(
    hub: HubServer, source: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Action | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub.tokens["hf_secretsecretsecret"] = "me"
    if fault is not None:
        hub.inject("POST", "/commit/|/preupload/|/batch", fault, times=99)
    result = commands.run(
        "job", "run", "--json", "--debug", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))
    )
    assert (result.code == 0) is (fault is None)
    assert "secretsecret" not in result.out + result.err
    assert any("hf_secretsecretsecret" in request.headers.get("authorization", "") for request in hub.requests)
    assert source.head


def test_memory_does_not_grow_from_shard_to_shard(hub: HubServer, tmp_path: Path) -> None:
    shards = [
        sources.write_large(tmp_path / f"model-{number:05}-of-00006.safetensors", "BF16", 80 << 20, name=f"w{number}")
        for number in range(1, 7)
    ]
    hub.create("lab/large").commit({path.name: path for path in shards})
    assert (
        commands.peak_memory("job", "run", "--quiet", write_job(tmp_path, ("hf://lab/large", "hf://me/large-df11")))
        <= 300 << 20
    )
    assert len([name for name in hub.repository("me/large-df11").hashes() if name.endswith(".df11")]) == 6


# df11 hub push, df11 hub pull, df11 report


@pytest.fixture
def tree(source: Repository, tmp_path: Path) -> Path:
    """A converted folder."""
    df11.convert(source.checkout(tmp_path / "original"), tmp_path / "tree")
    return tmp_path / "tree"


def test_push_and_pull(hub: HubServer, source: Repository, tree: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", tree, "hf://me/model-df11", "--private").fine()
    target = hub.repository("me/model-df11")
    assert target.private
    found = target.files()
    for path in tree.rglob("*.df11"):
        assert found[path.relative_to(tree).as_posix()] == path.read_bytes()
    assert "base_model_relation" not in found["README.md"].decode()  # Nobody knows where this folder came from.
    before = target.head
    commands.run("hub", "push", tree, "hf://me/model-df11").fine()
    assert target.head == before
    done = commands.run("hub", "pull", "--json", "hf://me/model-df11", tmp_path / "pulled").fine().events[-1]
    assert (done["fetched"], done["kept"]) == (len(found), 0)
    assert sources.tree_bytes(tmp_path / "pulled") == found
    df11.restore(tmp_path / "pulled", tmp_path / "restored")
    for name, data in models.source_files(source).items():
        assert (tmp_path / "restored" / name).read_bytes() == data
    done = commands.run("hub", "pull", "--json", "hf://me/model-df11", tmp_path / "pulled").fine().events[-1]
    assert (done["fetched"], done["kept"]) == (0, len(found))


def test_what_a_job_has_made_can_be_pushed_elsewhere(hub: HubServer, source: Repository, tmp_path: Path) -> None:
    commands.run("job", "run", "--quiet", write_job(tmp_path, ("hf://lab/model", "hf://me/model-df11"))).fine()
    commands.run("hub", "pull", "--quiet", "hf://me/model-df11", tmp_path / "pulled").fine()
    commands.run("hub", "push", "--quiet", tmp_path / "pulled", "hf://me/copy").fine()
    first, second = (models.comparable(hub.repository(name)) for name in ("me/model-df11", "me/copy"))
    assert first == second
    assert "base_model: lab/model" in hub.repository("me/copy").read("README.md").decode()
    assert source.head


def test_a_cast_folder_without_a_manifest_is_pushed_twice(hub: HubServer, tmp_path: Path) -> None:
    for name, data in models.model(2, "F32").items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    df11.convert(tmp_path / "model", tmp_path / "cast", cast="bf16")
    (tmp_path / "cast" / FILE_NAME).unlink()
    commands.run("hub", "push", "--quiet", tmp_path / "cast", "hf://me/cast").fine()
    before = hub.repository("me/cast").head
    commands.run("hub", "push", "--quiet", tmp_path / "cast", "hf://me/cast").fine()
    assert hub.repository("me/cast").head == before


def test_a_damaged_folder_is_not_pushed(hub: HubServer, tree: Path) -> None:
    victim = sorted(tree.glob("*.df11"))[1]
    data = bytearray(victim.read_bytes())
    data[-3000] ^= 1
    victim.write_bytes(data)
    result = commands.run("hub", "push", tree, "hf://me/model-df11")
    assert result.code == 2
    assert victim.name in result.err
    held = hub.repository("me/model-df11").files() if "me/model-df11" in hub.repositories else {}
    assert victim.name not in held
    assert "model.df11.index.json" not in held


def test_a_damaged_download_is_not_kept(hub: HubServer, tree: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", tree, "hf://me/model-df11").fine()
    hub.inject("GET", "/cdn/.*00002", corrupt(40_000), times=9)
    commands.run("hub", "pull", "hf://me/model-df11", tmp_path / "pulled").error(1, "00002")
    assert not [path for path in (tmp_path / "pulled").rglob("*") if "00002" in path.name]
    hub._rules.clear()
    commands.run("hub", "pull", "--quiet", "hf://me/model-df11", tmp_path / "pulled").fine()


def test_pull_replaces_nothing_unasked(hub: HubServer, tree: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", tree, "hf://me/model-df11").fine()
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "config.json").write_text("mine")
    commands.run("hub", "pull", "hf://me/model-df11", tmp_path / "pulled").error(2, "already exists")
    commands.run("hub", "pull", "--quiet", "--force", "hf://me/model-df11", tmp_path / "pulled").fine()
    assert json.loads((tmp_path / "pulled" / "config.json").read_text())["model_type"] == "small"
    assert hub.repositories


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("push", "{}", "hf://me/x/sub"), 2, "without a folder"),
        (("push", "{}", "x"), 2, "hf://"),
        (("push", "{}/nothing", "hf://me/x"), 4, "nothing"),
        (("push", "{}/original", "hf://me/x"), 2, ".df11"),
        (("pull", "hf://lab/model", "{}/out"), 2, "no .df11 file"),
        (("pull", "lab", "{}/out"), 2, "hf://"),
        (("pull", "hf://lab/nothing", "{}/out"), 4, "lab/nothing"),
    ],
)
@pytest.mark.usefixtures("tree")
def test_wrong_use(tmp_path: Path, arguments: tuple[str, ...], code: int, word: str) -> None:
    commands.run("hub", *(argument.replace("{}", str(tmp_path)) for argument in arguments)).error(code, word)


def test_a_report(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "sizes.png").write_bytes(b"mine")
    commands.run("report", tree, "--output", tmp_path / "report").error(2, "sizes.png", "--force")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["sizes.png"]
    commands.run("report", tree, "--output", tmp_path / "report", "--force").fine()
    result = commands.run("report", tree, "--output", tmp_path / "report").fine()
    assert (tmp_path / "report" / "report.html").is_file()
    assert [Path(line).suffix for line in result.err.splitlines()].count(".png") >= 2


def test_a_report_of_a_repository(hub: HubServer, tree: Path, tmp_path: Path) -> None:
    commands.run("hub", "push", "--quiet", tree, "hf://me/model-df11").fine()
    before = len(hub.requests)
    commands.run("report", "hf://me/model-df11", "-o", tmp_path / "report").fine()
    assert not [one for one in hub.requests[before:] if ".df11" in one.path.partition("?")[0]]
    assert (tmp_path / "report" / "report.html").is_file()
