"""The section ``job``: a Hub-to-Hub job on a model of 4 GB in 8 shards: time, peak memory, disk usage.

The Hub is the one of the tests, in another process on this machine: with no network involved, the job itself is
measured. That Hub takes part of the CPU time: it reads, hashes and writes everything that passes. For comparison:
``df11 convert`` of the same shards from and to the same disk.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from benchmarks import harness, measure
from benchmarks.sections import SHARDS, Bench, readable, write_shards

_SAMPLES: Final = 0.01
"""Seconds between two looks at the disk."""


def job(bench: Bench) -> None:
    """A job from the Hub to the Hub, both on this machine; and once more, with nothing left to do."""
    size = bench.bytes(4e9)
    case = f"{readable(size)} in {SHARDS} shards"
    checkout, board, folder = bench.checkouts[0], bench.board, bench.folder
    write_shards(folder / "source", size, SHARDS)
    local = harness.run(checkout.program("", "convert", folder / "source", folder / "local", "--quiet"))
    harness.remove(folder / "local")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, folder))
    process.start()
    try:
        env = checkout.env | here.recv()
        work, file = folder / "work", folder / "job.toml"
        models = '[[model]]\nsource = "hf://lab/model"\ntarget = "hf://me/model-df11"\n'
        file.write_text(f'{models}[limits]\nwork = "{work}"\n')
        command = checkout.program("", "job", "run", "--json", file).command
        harness.say(f"job: {case}")
        with Watcher(work) as watcher:
            first = measure.run(command, env)
        again = measure.run(command, env)
    finally:
        here.send(None)
        process.join()
    files = [event for event in measure.events(first.stdout) if event["event"] == "file"]
    board.add(f"{case}: df11 job", "s", "lower", [first.wall])
    board.add(f"{case}: df11 job, CPU time", "s", "lower", [first.cpu])
    board.add(f"{case}: df11 job, peak memory", "MiB", "lower", [max(first.peak_rss, again.peak_rss) / 2**20])
    board.add(f"{case}: df11 convert", "s", "lower", [local.wall])
    board.add(f"{case}: speed, df11 job / df11 convert", "x", "higher", [local.wall / first.wall], ratio=True)
    board.add(f"{case}: speed, nothing to do / df11 job", "x", "higher", [first.wall / again.wall], ratio=True)
    for step in ("convert", "verify", "deliver"):
        seconds = sum(event["seconds"].get(step, 0) for event in files)
        board.add(f"{case}: step {step}, all files", "s", "lower", [seconds])
    board.add(f"{case}: most files on the disk", "files", "lower", [watcher.most_files])
    largest = max(event["output_bytes"] for event in files)
    board.add(f"{case}: most bytes on the disk", "of the largest", "lower", [watcher.most_bytes / largest], ratio=True)


def _serve(pipe: Connection, folder: Path) -> None:
    # A Hub that has the model, until something comes through the pipe.
    from tests.support.hub.server import HubServer

    with HubServer(folder / "hub") as hub:
        hub.create("lab/model").commit({path.name: path for path in sorted((folder / "source").iterdir())})
        pipe.send(hub.environment(folder / "home"))
        pipe.recv()


class Watcher:
    """Watches a folder: the most files and bytes that were in it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most_files = self.most_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            sizes = []
            for path in self.folder.rglob("*"):
                try:
                    if path.is_file() and path.name != ".lock":
                        sizes.append(path.stat().st_size)
                except OSError:
                    continue  # It has been removed meanwhile.
            self.most_files = max(self.most_files, len(sizes))
            self.most_bytes = max(self.most_bytes, sum(sizes))
            time.sleep(_SAMPLES)
