"""A job that is killed at any moment continues when run again: the same bytes, and no committed work done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.hub import models
from tests.support.hub.repository import Repository
from tests.support.hub.server import HubServer, Request

KILLS = 50
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.hub.job_process"])


def start(job: str, target: str, work: Path, env: dict[str, str]) -> ForkServerProcess:
    from tests.support.hub.job_process import work_on

    process = CONTEXT.Process(target=work_on, args=(job, target, work, env))
    process.start()
    return process


def finish(process: ForkServerProcess) -> None:
    process.join(commands.PATIENCE)
    assert process.exitcode == 0


def assert_nothing_was_done_twice(target: Repository, requests: list[Request]) -> None:
    """No shard was read again once a commit had shown its container."""
    for commit in target.commits:
        for path in commit.paths:
            if path.endswith(".df11"):
                shard = f"filename={path.removesuffix('.df11')}.safetensors"
                assert not [
                    one
                    for one in requests
                    if one.cdn and one.method == "GET" and shard in one.path and one.time > commit.time
                ], path


@pytest.mark.timeout(900)
def test_killed_at_random_moments(hub: HubServer, tmp_path: Path) -> None:
    hub.create("lab/model").commit(models.model(4, rows=4000))
    env = hub.environment(tmp_path / "home")
    finish(start("hf://lab/model", "hf://me/whole", tmp_path / "work", env))  # The first run also warms caches.
    started = time.monotonic()
    finish(start("hf://lab/model", "hf://me/whole-2", tmp_path / "work", env))
    duration = time.monotonic() - started
    wanted = models.comparable(hub.repository("me/whole"))

    randomness = random.Random(os.environ.get("DF11_TEST_SEED", "df11"))
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        before = len(hub.requests)
        name = f"me/killed-{rounds}"
        while True:
            process = start("hf://lab/model", f"hf://{name}", tmp_path / "work", env)
            process.join(randomness.uniform(0.02, 0.8) * duration)
            if process.exitcode is None and kills < KILLS:
                process.kill()
                process.join()
                kills += 1
                continue
            finish(process)
            break
        target = hub.repository(name)
        assert "README.md" in target.hashes()
        assert models.comparable(target) == wanted
        assert_nothing_was_done_twice(target, hub.requests[before:])
        assert list((tmp_path / "work").iterdir()) == []
