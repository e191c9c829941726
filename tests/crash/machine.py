"""Runs df11 with one fault in it, and reads what it did: the log of shim.c."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support import commands
from tests.support.cpu_kernels import tool

SHIM = Path(__file__).with_name("shim.c")
WRITING = ("create", "write", "mkdir", "truncate", "fsync", "rename", "chmod", "unlink", "rmdir", "link")
"""What a file system that has become read-only refuses."""
FILLING = ("create", "write", "mkdir")
"""What a full disk refuses."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which call."""

    mode: str = "watch"
    at: int = 0
    error: int = 0
    kinds: tuple[str, ...] = ()


NONE = Fault()


@dataclass(frozen=True)
class Call:
    """A call that was done, or failed."""

    number: int
    kind: str
    is_done: bool
    inode: int
    offset: int
    path: str
    other: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int | None
    """None: it had to be killed, because it hung."""
    output: str
    calls: tuple[Call, ...]


def build(folder: Path) -> Path:
    """Compile shim.c."""
    library = folder / "shim.so"
    if not library.exists() or library.stat().st_mtime < SHIM.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        command = [tool("cc", "gcc"), "-std=c11", "-O1", "-shared", "-fPIC", str(SHIM), "-o", str(library), "-ldl"]
        subprocess.run([*command, "-lpthread"], check=True)
    return library


def read_log(path: Path) -> tuple[Call, ...]:
    """The calls in a log."""
    data, calls, position = path.read_bytes(), [], 0
    while position < len(data):
        end = data.index(b"\n", position)
        number, kind, done, inode, offset, size, first, second = data[position:end].decode().split("\t")
        position = end + 1 + int(size)
        content = data[end + 1 : position]
        calls.append(Call(int(number), kind, done == "1", int(inode), int(offset), first, second, content))
    return tuple(calls)


class Machine:
    """Runs df11 in processes that are forked from one, in which faults can be set. ``root``: where it works."""

    def __init__(self, folder: Path, root: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.root = folder, root
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **commands.environment(),
            **environment,
            "TMPDIR": str(root / "work"),
            "MPLCONFIGDIR": str(folder / "matplotlib"),
        }
        self._runs = 0
        self._library = build(folder)
        self._worker = self._start()

    def _start(self) -> subprocess.Popen[str]:
        (self.root / "work").mkdir(parents=True, exist_ok=True)
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**self._environment, "LD_PRELOAD": str(self._library)},
        )
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        return worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait()
        assert self._worker.stdout is not None
        self._worker.stdout.close()

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        answer = json.loads(self._worker.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def start(self, arguments: Sequence[str], fault: Fault = NONE, *, broken: str = "") -> Run:
        """Start a command; ``broken``: a defect of tests/crash/broken.py to put into it."""
        self._runs += 1
        name = self.folder / f"run-{self._runs % 4}"
        answer = self._ask(
            do="start",
            arguments=list(arguments),
            root=str(self.root),
            output=f"{name}.txt",
            log=f"{name}.log",
            mode=fault.mode,
            at=fault.at,
            error=fault.error,
            kinds=list(fault.kinds),
            broken=broken,
            environment={},
        )
        return Run(self, answer["process"], name)

    def run(self, arguments: Sequence[str], fault: Fault = NONE, *, broken: str = "") -> Ended:
        """Run a command to its end."""
        ended = self.start(arguments, fault, broken=broken).wait()
        assert ended is not None
        return ended

    def ask(self, do: str, process: int) -> dict[str, Any]:
        """What has become of a process."""
        return self._ask(do=do, process=process)


@dataclass(frozen=True)
class Run:
    """A command that runs."""

    machine: Machine
    process: int
    name: Path

    def wait(self) -> Ended | None:
        """How it ended; None if it has stopped."""
        answer = self.machine.ask("wait", self.process)
        if "stopped" in answer:
            return None
        text = Path(f"{self.name}.txt").read_text(errors="replace")
        return Ended(answer.get("code"), text, read_log(Path(f"{self.name}.log")))

    def go_on(self) -> Ended:
        """How it ended, after it had stopped."""
        self.machine.ask("continue", self.process)
        ended = self.wait()
        assert ended is not None
        return ended


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Files with their contents, and folders (None), by their names below a folder."""
    found: dict[str, bytes | None] = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            found[str(Path(folder, name).relative_to(root))] = None
        for name in files:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def lay_out(root: Path, files: Mapping[str, bytes | None]) -> None:
    """Make a folder hold just these files and folders."""
    above = {str(parent) for name in files for parent in Path(name).parents}
    for folder, folders, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if str(path.relative_to(root)) not in files:
                path.unlink()
        for name in folders:
            path = Path(folder, name)
            if str(path.relative_to(root)) not in files.keys() | above:
                path.rmdir()
    root.mkdir(parents=True, exist_ok=True)
    for name, data in sorted(files.items()):
        path = root / name
        if data is None:
            path.mkdir(exist_ok=True, parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
