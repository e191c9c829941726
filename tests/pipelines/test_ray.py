"""``--engine ray``: a real cluster of two nodes on this machine gives the same bytes, and survives a lost worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from df11.converter.manifest import FILE_NAME
from tests.support import commands, sources
from tests.support.hub import models
from tests.support.hub.server import HubServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub that the workers know from the start."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(here: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster."""
    command = [sys.executable, "-m", "tests.support.hub.ray_cluster"]
    env = {**commands.environment(), **here.environment(tmp_path_factory.mktemp("home"))}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env['PYTHONPATH']}"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=env
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, data in models.model(4, rows=20_000).items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "source"


def write_job(folder: Path, source: object, target: object, limits: str = "threads = 1") -> Path:
    path = folder / "job.toml"
    path.write_text(f'[[model]]\nsource = "{source}"\ntarget = "{target}"\n[limits]\n{limits}\n')
    return path


def start(
    folder: Path,
    source: object,
    target: object,
    cluster: str,
    env: dict[str, str] | None = None,
    limits: str = "threads = 1",
) -> subprocess.Popen[str]:
    command = [
        *commands.COMMAND,
        "job",
        "run",
        "--json",
        "--engine",
        "ray",
        str(write_job(folder, source, target, limits)),
    ]
    env = {**commands.environment(), **(env or {}), "RAY_ADDRESS": cluster}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def worker_on(name: str) -> int | None:
    """The process of a worker with a task."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::df11 " + name.encode()):
                return int(entry.name)
        except OSError:  # It has ended in the meantime.
            continue
    return None


def test_the_same_bytes_as_in_this_process(tmp_path: Path, source: Path, cluster: str) -> None:
    commands.run("job", "run", "--quiet", write_job(tmp_path, source, tmp_path / "plain")).fine()
    # More threads than any node has CPUs: a task asks for all that one has.
    result = commands.finish(start(tmp_path, source, tmp_path / "ray", cluster, limits="threads = 7")).fine()
    files = [event["file"] for event in result.events if event["event"] == "file"]
    assert files == [*(f"model-{number:05}-of-00004.df11" for number in (1, 2, 3, 4)), "tokenizer/tokenizer.json"]
    assert sources.tree_bytes(tmp_path / "ray") == sources.tree_bytes(tmp_path / "plain")


def test_a_worker_that_dies_costs_a_try(tmp_path: Path, source: Path, cluster: str) -> None:
    process = start(tmp_path, source, tmp_path / "ray", cluster)
    victim: list[int] = []

    def found() -> bool:
        if (pid := worker_on("model-00003")) is not None:
            os.kill(pid, signal.SIGSTOP)
            victim.append(pid)
        return bool(victim)

    commands.wait_until(found, process)
    assert not (tmp_path / "ray" / "model-00003-of-00004.df11").exists()  # It is at work on this one.
    os.kill(victim[0], signal.SIGKILL)
    commands.finish(process).fine()
    commands.run("verify", tmp_path / "ray", "--against", source).fine()
    assert len(list((tmp_path / "ray").glob("model-*.df11"))) == 4


def test_from_the_hub_to_the_hub(tmp_path: Path, here: HubServer, source: Path, cluster: str) -> None:
    """Workers upload; this process commits."""
    repository = here.create("lab/model")
    repository.commit({path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()})
    process = start(tmp_path, "hf://lab/model", "hf://me/model-df11", cluster, here.environment(tmp_path / "home"))
    commands.finish(process).fine()
    with_ray = here.repository("me/model-df11")
    commits = list(with_ray.history("main"))[::-1][1:5]
    assert [set(commit.paths) - {FILE_NAME} for commit in commits] == [
        {f"model-{number:05}-of-00004.df11"} for number in (1, 2, 3, 4)
    ]
    env = {**commands.environment(), **here.environment(tmp_path / "home")}
    commands.run_process("job", "run", write_job(tmp_path, "hf://lab/model", "hf://me/plain"), env=env).fine()
    assert models.comparable(here.repository("me/plain")) == models.comparable(with_ray)
    assert not here.leaks


def test_more_memory_than_any_node_has(tmp_path: Path, source: Path, cluster: str) -> None:
    result = commands.finish(start(tmp_path, source, tmp_path / "ray", cluster, limits='memory = "900TB"'))
    assert result.code == 6, result
    assert "no node of the Ray cluster" in result.err


def test_no_cluster(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = commands.run_process("job", "run", "--engine", "ray", write_job(tmp_path, source, tmp_path / "ray"))
    assert result.code == 5, result
    assert "no Ray cluster responds" in result.err
