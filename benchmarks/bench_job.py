"""A Hub-to-Hub job on a model of 4 GB in 8 shards: time, peak memory, and what it has on the disk. ``python -m benchmarks.bench_job``.

The Hub is the one of the tests, in a process of its own on this machine: no network, so that what is measured is the job. Two cores do the
converting, the uploading and the Hub's hashing. For comparison: ``df11-convert`` of the same shards from and to the same disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, measure, report, synthetic, table, warm
from tests.support.hub.server import HubServer

SHARDS: Final = 8
BYTES: Final = 4_000_000_000
MEMORY_GOAL: Final = 300 << 20
DISK_GOAL: Final = 2
"""Output shards on the disk at a time."""
_SAMPLES: Final = 0.01
"""Seconds between two looks at the disk."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 1 if a goal is not kept, or a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_job", description="A job from the Hub to the Hub, both on this machine.")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to work; 15 GB are needed (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=BYTES, help="of the model (default: %(default)s)")
    parser.add_argument("--name", default="job", help="name of the results (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    measure.interrupt_on_signals()
    with tempfile.TemporaryDirectory(prefix="df11-job-", dir=options.dir) as folder:
        results = measure_all(Path(folder), options.bytes)
    results["machine"] = machine.describe()
    text = as_markdown(results)
    sys.stdout.write(text + "\n")
    say(f"written: {report.save(options.name, results, text, options.output)}")
    return 0 if results["peak_rss"] <= MEMORY_GOAL and results["most_files"] <= DISK_GOAL else 1


def say(text: str) -> None:
    """Tell people."""
    sys.stderr.write(f"bench_job: {text}\n")


def measure_all(folder: Path, size: int) -> dict[str, Any]:
    """Make the model, run the job, run it again, and convert the same shards locally."""
    warm.compile_kernels(folder)
    source = folder / "source"
    source.mkdir()
    say(f"making {size / 1e9:.1f} GB in {SHARDS} shards")
    for number in range(1, SHARDS + 1):
        synthetic.write_gaussian(source / f"model-{number:05}-of-{SHARDS:05}.safetensors", size // SHARDS)
    (source / "config.json").write_text("{}\n")
    say("df11-convert, from and to this disk")
    local = measure.run(measure.df11("convert", source, folder / "local", "--json", "--quiet"))
    shutil.rmtree(folder / "local")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, folder))
    process.start()
    try:
        env: dict[str, str] = here.recv()
        work = folder / "work"
        job = folder / "job.toml"
        job.write_text(f'[[model]]\nsource = "hf://lab/model"\ntarget = "hf://me/model-df11"\n[limits]\nwork = "{work}"\n')
        say("df11 job run")
        with Watcher(work) as watcher:
            first = measure.run(measure.df11("job", "run", "--json", job), env=env)
        say("df11 job run, once more")
        again = measure.run(measure.df11("job", "run", "--json", job), env=env)
    finally:
        here.send(None)
        process.join()
    events = [json.loads(line) for line in first.stdout.splitlines()]
    files = [event for event in events if event["event"] == "file"]
    (model,) = [event for event in events if event["event"] == "model"]
    return {
        "source_bytes": model["source_bytes"],
        "output_bytes": model["output_bytes"],
        "shards": SHARDS,
        "job": {"wall": first.wall, "cpu": first.cpu},
        "job_again": {"wall": again.wall, "peak_rss": again.peak_rss},
        "convert": {"wall": local.wall, "cpu": local.cpu, "peak_rss": local.peak_rss},
        "steps": {step: sum(event["seconds"].get(step, 0) for event in files) for step in ("convert", "verify", "deliver")},
        "peak_rss": max(first.peak_rss, again.peak_rss),
        "most_files": watcher.most_files,
        "most_bytes": watcher.most_bytes,
        "largest_output": max(event["output_bytes"] for event in files),
    }


def serve(pipe: Connection, folder: Path) -> None:
    """A Hub that has the model, until something comes through the pipe."""
    with HubServer(folder / "hub") as hub:
        hub.create("lab/model").commit({path.name: path for path in sorted((folder / "source").iterdir())})
        pipe.send(hub.environment(folder / "home"))
        pipe.recv()


class Watcher:
    """Looks at a folder again and again: the most files and bytes that were in it at a time."""

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
                    continue  # It is gone.
            self.most_files = max(self.most_files, len(sizes))
            self.most_bytes = max(self.most_bytes, sum(sizes))
            time.sleep(_SAMPLES)


def as_markdown(results: dict[str, Any]) -> str:
    """The report."""
    job, local, steps = results["job"], results["convert"], results["steps"]
    ratio = results["output_bytes"] / results["source_bytes"]
    rows = [
        ["peak memory of the job", f"{results['peak_rss'] / 2**20:.0f} MiB", f"{MEMORY_GOAL >> 20} MiB"],
        ["output shards on the disk at a time", str(results["most_files"]), str(DISK_GOAL)],
        ["bytes on the disk at a time", f"{results['most_bytes'] / 1e9:.3f} GB", f"two of {results['largest_output'] / 1e9:.3f} GB"],
        ["time against df11-convert on the same disk", f"{job['wall'] / local['wall']:.2f}", ""],
        ["time of a run that finds everything done, against the first", f"{results['job_again']['wall'] / job['wall']:.3f}", ""],
    ]
    return "\n".join(
        [
            f"# A job from the Hub to the Hub: {results['source_bytes'] / 1e9:.2f} GB of BF16 in {results['shards']} shards",
            "",
            f"{results['source_bytes']:,} -> {results['output_bytes']:,} bytes ({ratio:.4f}). The Hub is on this machine, in a process of its own,",
            "and takes part of its two cores: it reads, hashes and writes all that passes.",
            "",
            table.markdown(["", "measured", "goal"], rows),
            "",
            f"The job took {job['wall']:.1f} s ({job['cpu']:.1f} s of processor). Converting took {steps['convert']:.1f} s, verifying what is on",
            f"the disk {steps['verify']:.1f} s, and hashing and uploading {steps['deliver']:.1f} s, while the next one was converted.",
            f"`df11-convert` took {local['wall']:.1f} s, peak memory {local['peak_rss'] / 2**20:.0f} MiB.",
            "",
            machine.as_text(results["machine"]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
