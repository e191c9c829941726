"""The commands that faults are put into: what was there before, and what somebody changes meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.machine import Machine, lay_out, snapshot
from tests.support import sources
from tests.support.hub.repository import Repository
from tests.support.hub.server import HubServer
from tests.support.sources import bf16, f32

Files = Mapping[str, bytes | None]
Change = Callable[["World"], None]

SHARDS: Mapping[str, Mapping[str, int]] = {
    "old": {"a": 1, "b": 2, "gone": 3},
    "new": {"a": 11, "b": 2, "sub/c": 4},
    "newer": {"a": 21, "d": 22, "sub/c": 4},
}
"""Versions of a model: the seeds of its shards."""
THEIRS: Files = {"target/mine.txt": b"not df11's", "target/.mine.partial": b"mine, too", "target/sub/mine": b"and this"}


def model(version: str) -> dict[str, bytes]:
    """The files of a version of a model."""
    files, weights = {}, {}
    for name, seed in SHARDS[version].items():
        tensors = [bf16(f"{name}.weight", (12, 256), seed), f32(f"{name}.bias", (16,), seed)]
        files[f"{name}.safetensors"] = sources.file_bytes(tensors)
        weights |= {tensor.name: f"{name}.safetensors" for tensor in tensors}
    index = json.dumps({"metadata": {}, "weight_map": weights}, indent=1).encode()
    config = json.dumps({"architectures": ["Small"], "version": version}).encode()
    card = b"---\nlicense: mit\n---\n# A model, " + version.encode()
    return {**files, "model.safetensors.index.json": index, "config.json": config, "README.md": card}


def placed(folder: str, files: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Files in a folder."""
    return {f"{folder}/{name}": data for name, data in files.items()}


@dataclass(frozen=True)
class World:
    """Where a command runs: a folder, and a Hub."""

    machine: Machine
    hub: HubServer
    known: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Versions of the model that have been converted."""

    @property
    def root(self) -> Path:
        """The folder that it runs in."""
        return self.machine.root

    def put(self, files: Files) -> None:
        """Write files, others stay."""
        for name, data in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).unlink(missing_ok=True)
            if data is not None:
                (self.root / name).write_bytes(data)

    def replace(self, folder: str, files: Files) -> None:
        """Make a folder hold just these files."""
        lay_out(self.root / folder, files)

    def commit(self, repository: str, files: Mapping[str, bytes]) -> None:
        """Make a repository hold just these files."""
        there = self.hub.repositories.get(repository) or self.hub.create(repository)
        gone = {name: None for name in there.files() if name not in files and name != ".gitattributes"}
        there.commit({**files, **gone}, summary="Somebody's commit")

    def converted(self, version: str) -> dict[str, bytes]:
        """A version of the model, converted by a run that nothing disturbs."""
        if version in self.known:
            return self.known[version]
        before = snapshot(self.root)
        lay_out(self.root, placed("source", model(version)) | {"work": None})
        ended = self.machine.run(["convert", "source", "target", "--threads", "1"])
        assert ended.code == 0, ended
        self.known[version] = {name: data for name, data in snapshot(self.root / "target").items() if data is not None}
        lay_out(self.root, before)
        return self.known[version]

    def state(self) -> State:
        """All that is there now."""
        with self.hub.lock:
            kept = {name: _Kept.of(one) for name, one in self.hub.repositories.items()}
        return State(snapshot(self.root), kept)

    def set(self, state: State) -> None:
        """Go back to a state."""
        lay_out(self.root, state.files)
        with self.hub.lock:
            for name in set(self.hub.repositories) - set(state.repositories):
                del self.hub.repositories[name]
            for name, kept in state.repositories.items():
                kept.restore(self.hub.repositories.get(name) or self.hub.create(name))


@dataclass(frozen=True)
class _Kept:
    branches: dict[str, str]
    commits: dict[str, Any]
    objects: frozenset[str]

    @classmethod
    def of(cls, one: Repository) -> _Kept:
        return cls(dict(one.branches), dict(one._commits), frozenset(one.objects))

    def restore(self, one: Repository) -> None:
        one.branches, one._commits, one.objects = dict(self.branches), dict(self.commits), set(self.objects)


@dataclass(frozen=True)
class State:
    """Files below the folder, and repositories of the Hub."""

    files: dict[str, bytes | None]
    repositories: dict[str, _Kept] = field(repr=False)

    @property
    def heads(self) -> dict[str, dict[str, str]]:
        """The SHA-256 of all files of each repository."""
        heads = {name: kept.commits[kept.branches["main"]] for name, kept in self.repositories.items()}
        return {name: {path: blob.sha256 for path, blob in head.tree.items()} for name, head in heads.items()}


@dataclass(frozen=True)
class Scenario:
    """A command, what is there before it, and what its source may become."""

    name: str
    arguments: tuple[str, ...]
    prepare: Change
    change: Change | None = None
    """Gives the source other content. The same command must then still work after a fault."""
    is_kept: bool = True
    """Whether it must still work after it has ended well: what restore has finished is the user's."""

    @property
    def command(self) -> str:
        """The command, for the table."""
        return self.name.partition(":")[0]


ONE = ("--threads", "1")
JOB = """[[model]]
source = "{source}"
target = "{target}"
[limits]
threads = 1
work = "work"
"""


def _convert_file(world: World) -> None:
    world.put({"source/a.safetensors": model("old")["a.safetensors"], **THEIRS})


def _convert_file_again(world: World) -> None:
    old = world.converted("old")["a.df11"]
    world.put({"source/a.safetensors": model("new")["a.safetensors"], "target/a.df11": old, **THEIRS})


def _convert_folder(world: World) -> None:
    world.put(placed("source", model("new")) | THEIRS)


def _convert_nothing_there(world: World) -> None:
    world.put(placed("source", model("new")))


def _convert_folder_again(world: World) -> None:
    world.put(placed("target", world.converted("old")) | placed("source", model("new")) | THEIRS)


def _newer_source(world: World) -> None:
    world.replace("source", model("newer"))


def _restore_file(world: World) -> None:
    world.put({"source/a.df11": world.converted("old")["a.df11"], **THEIRS})


def _restore_file_again(world: World) -> None:
    _restore_file(world)
    world.put({"target/a.safetensors": b"another file, to be replaced"})


def _restore_folder(world: World) -> None:
    world.put(placed("source", world.converted("new")) | THEIRS)


def _newer_converted(world: World) -> None:
    world.replace("source", world.converted("newer"))


def _push(world: World) -> None:
    world.put(placed("source", world.converted("new")))


def _push_again(world: World) -> None:
    world.put(placed("source", world.converted("old")))
    ended = world.machine.run(["hub", "push", "source", "me/model", *ONE])
    assert ended.code == 0, ended
    world.replace("source", world.converted("new"))


def _pull(world: World) -> None:
    world.commit("lab/model", world.converted("new"))
    world.put(THEIRS)


def _pull_again(world: World) -> None:
    old = world.converted("old")
    world.commit("lab/model", old)
    world.put(placed("target", old) | THEIRS)
    world.commit("lab/model", world.converted("new"))


def _newer_on_hub(world: World) -> None:
    world.commit("lab/model", world.converted("newer"))


def _job(world: World) -> None:
    world.commit("lab/model", model("new"))
    world.put({"job.toml": JOB.format(source="hf://lab/model", target="hf://me/model").encode()})


def _job_again(world: World) -> None:
    world.commit("lab/model", model("old"))
    world.put({"job.toml": JOB.format(source="hf://lab/model", target="hf://me/model").encode()})
    ended = world.machine.run(["job", "run", "job.toml"])
    assert ended.code == 0, ended
    shutil.rmtree(world.root / "work")
    (world.root / "work").mkdir()
    world.commit("lab/model", model("new"))


def _job_folder(world: World) -> None:
    world.commit("lab/model", model("old"))
    world.put({"job.toml": JOB.format(source="hf://lab/model", target="target").encode()})
    ended = world.machine.run(["job", "run", "job.toml"])
    assert ended.code == 0, ended
    world.put(THEIRS)
    world.commit("lab/model", model("new"))


def _newer_model(world: World) -> None:
    world.commit("lab/model", model("newer"))


FOLDER = ("convert", "source", "target", *ONE)
SCENARIOS = (
    Scenario("convert a file", ("convert", "source/a.safetensors", "target/a.df11", *ONE), _convert_file),
    Scenario(
        "convert a file: again",
        ("convert", "source/a.safetensors", "target/a.df11", "--force", *ONE),
        _convert_file_again,
    ),
    Scenario("convert a folder", FOLDER, _convert_folder, _newer_source),
    Scenario("convert a folder: new", FOLDER, _convert_nothing_there, _newer_source),
    Scenario("convert a folder: again", FOLDER, _convert_folder_again, _newer_source),
    Scenario("restore a file", ("restore", "source/a.df11", "target/a.safetensors", *ONE), _restore_file),
    Scenario(
        "restore a file: again",
        ("restore", "source/a.df11", "target/a.safetensors", "--force", *ONE),
        _restore_file_again,
    ),
    Scenario(
        "restore a folder", ("restore", "source", "target", *ONE), _restore_folder, _newer_converted, is_kept=False
    ),
    Scenario(
        "export a folder",
        ("export", "--to", "safetensors", "source", "target", *ONE),
        _restore_folder,
        _newer_converted,
        is_kept=False,
    ),
    Scenario("hub push", ("hub", "push", "source", "me/model", *ONE), _push, _newer_converted),
    Scenario("hub push: again", ("hub", "push", "source", "me/model", *ONE), _push_again, _newer_converted),
    Scenario("hub pull", ("hub", "pull", "lab/model", "target", *ONE), _pull, _newer_on_hub),
    Scenario("hub pull: again", ("hub", "pull", "lab/model", "target", *ONE), _pull_again, _newer_on_hub),
    Scenario("job run", ("job", "run", "job.toml"), _job, _newer_model),
    Scenario("job run: again", ("job", "run", "job.toml"), _job_again, _newer_model),
    Scenario("job run: into a folder", ("job", "run", "job.toml"), _job_folder, _newer_model),
)
