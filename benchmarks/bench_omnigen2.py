"""A stand-in for the whole OmniGen2 checkpoint, 31.2 GB of F32, on a real disk. ``python -m benchmarks.bench_omnigen2``, ``make bench-omnigen2``.

Makes it, copies it (``cp`` + fsync), converts it with ``--cast bf16``, verifies the result on its own and against the source, restores a part,
and reports sizes, times and memory. Needs 44 GB of disk, which it asks for before it starts, and removes all it made however it ends.

31.2 GB do not fit into the memory of most machines. So that all steps meet the same conditions on any machine, every file that a step reads is
put out of the page cache first: all reads are from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, measure, peers, report, safetensors_file, synthetic, table, warm
from benchmarks.floor import Floor, measure_floor

GOAL_BYTES: Final = 10_550_000_000
"""What the containers of the real pipeline may take in all."""
OUTPUT_SHARE: Final = 0.37
"""Room for the containers, as a share of the F32 source; a third, and tables and headers."""
MARGIN: Final = 500_000_000
FLOOR_STEP: Final = 16
"""The floor is estimated from each 16th mebibyte of a tensor."""
EXACT_FLOOR_SCALE: Final = 0.1
"""Up to this scale the floor is counted from all weights."""
COMPONENTS: Final = ("transformer", "mllm", "vae")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_omnigen2", description="Convert a stand-in for the OmniGen2 checkpoint.")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to work, a real disk (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="size, 1 being the real one; less to try the benchmark (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of cp and of convert, in turns; the best counts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="threads of df11 (default: all cores)")
    parser.add_argument("--no-against", action="store_true", help="leave out the verification against the source")
    parser.add_argument("--name", default="omnigen2", help="name of the results (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    sizes = synthetic.omnigen2_bytes(options.scale)
    needed = sum(sizes.values()) + max(max(sizes.values()), int(OUTPUT_SHARE * sum(sizes.values()))) + MARGIN
    free = shutil.disk_usage(options.dir).free
    if free < needed:
        say(f"{needed / 1e9:.1f} GB are needed in {options.dir}, {free / 1e9:.1f} GB are free; name another folder with --dir")
        return 6
    measure.interrupt_on_signals()
    with tempfile.TemporaryDirectory(prefix="df11-omnigen2-", dir=options.dir) as folder:
        try:
            results = measure_all(Path(folder), options, sizes)
        except measure.CommandError as error:
            say(str(error))
            return 1
        except KeyboardInterrupt:
            say("interrupted; removing the files")
            return 130
    results["machine"] = machine.describe()
    text = as_markdown(results)
    print(text)
    say(f"written: {report.save(options.name, results, text, options.output)}")
    return 0


def measure_all(folder: Path, options: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    """All steps, one after the other."""
    source, target = folder / "omnigen2", folder / "omnigen2-df11"
    warm.compile_kernels(folder)
    say(f"making {sum(sizes.values()) / 1e9:.2f} GB")
    if synthetic.write_omnigen2(source, options.scale, say) != sizes:
        raise measure.CommandError("the stand-in has not the sizes it should have")
    results: dict[str, Any] = {
        "scale": options.scale,
        "jobs": options.jobs,
        "rounds": options.rounds,
        "file_system": machine.file_system(folder),
        "source_bytes": sum(sizes.values()),
        "steps": {},
    }
    convert = measure.df11("convert", source, target, "--cast", "bf16", "-j", options.jobs, "--json", "--quiet")
    events: list[dict[str, Any]] = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}: cp + fsync")
        record(results, "cp + fsync", copy_tree(source, list(sizes), folder / "copy"))
        say(f"round {number + 1} of {options.rounds}: convert")
        shutil.rmtree(target, ignore_errors=True)
        evict(source)
        taken = measure.run(convert)
        record(results, "convert", taken)
        events = measure.events(taken.stdout)
    results["components"] = [describe(component, source, target, options.scale) for component in COMPONENTS]
    results["stored_bytes"] = measure.stored_bytes(target, ".df11")
    results["inexact"] = {
        Path(event["source"]).relative_to(source).as_posix(): event.get("cast_tensors", 0) - event.get("exact_tensors", 0)
        for event in events
        if event["event"] == "file"
    }
    say("verify")
    evict(target)
    record(results, "verify", measure.run(measure.df11("verify", target, "-j", options.jobs, "--quiet")))
    if not options.no_against:
        say("verify --against")
        evict(target)
        evict(source)
        record(results, "verify --against", measure.run(measure.df11("verify", target, "--against", source, "-j", options.jobs, "--quiet")))
    restore_shard(results, source, target, folder / "restored.safetensors", options.jobs)
    return results


def record(results: dict[str, Any], step: str, taken: measure.Measured) -> None:
    """Keep what a run of a step took."""
    row = results["steps"].setdefault(step, {"wall": [], "cpu": [], "peak_rss": 0})
    row["wall"].append(taken.wall)
    row["cpu"].append(taken.cpu)
    row["peak_rss"] = max(row["peak_rss"], taken.peak_rss)


def copy_tree(source: Path, names: Sequence[str], target: Path) -> measure.Measured:
    """``cp`` and fsync, file by file; each copy is removed before the next, outside the time, so that little room is needed."""
    runs = []
    for name in names:
        evict(source / name)
        runs.append(measure.run(peers.copy_command(source / name, target)))
        target.unlink()
    return measure.Measured(sum(run.wall for run in runs), sum(run.cpu for run in runs), max(run.peak_rss for run in runs), "")


def evict(path: Path) -> None:
    """Force a file, or all files below a directory, to the disk and out of the page cache."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def describe(component: str, source: Path, target: Path, scale: float) -> dict[str, Any]:
    """Sizes of one component, and its floor."""
    floor: Floor = measure_floor(source / component, cast=True, every=FLOOR_STEP if scale > EXACT_FLOOR_SCALE else 1)
    evict(source / component)
    files = safetensors_file.files_below(source / component)
    return {
        "name": component,
        **asdict(floor),
        "source_bytes": sum(file.stat().st_size for file in files),
        "stored_bytes": measure.stored_bytes(target / component, ".df11"),
    }


def restore_shard(results: dict[str, Any], source: Path, target: Path, restored: Path, jobs: int) -> None:
    """Restore the first shard of the mllm, whose casts are exact, and compare its SHA-256 with that of the source."""
    name = next(file for file in synthetic.omnigen2()["files"] if file.startswith("mllm/"))
    say(f"restore {name}")
    container = (target / name).with_suffix(".df11")
    evict(container)
    record(results, "restore", measure.run(measure.df11("restore", container, restored, "-j", jobs, "--quiet")))
    results["restored"] = {"name": name, "bytes": restored.stat().st_size, "sha256": measure.sha256(restored)}
    if results["restored"]["sha256"] != measure.sha256(source / name):
        raise measure.CommandError(f"{name}: what was restored differs from the source")
    restored.unlink()


def as_markdown(results: dict[str, Any]) -> str:
    """The report."""
    weights = sum(row["weights"] for row in results["components"])
    bf16 = sum(row["bf16_bytes"] for row in results["components"])
    total = {
        "name": "all",
        "weights": weights,
        "bf16_bytes": bf16,
        "floor_bytes": sum(row["floor_bytes"] for row in results["components"]),
        "source_bytes": results["source_bytes"],
        "stored_bytes": results["stored_bytes"],
    }
    rows = [
        [
            row["name"],
            f"{row['source_bytes']:,}",
            f"{row['bf16_bytes']:,}",
            f"{row['stored_bytes']:,}",
            f"{row['stored_bytes'] / row['bf16_bytes']:.4f}",
            f"{8 * row['stored_bytes'] / row['weights']:.3f}",
            f"{8 * row['floor_bytes'] / row['weights']:.3f}",
        ]
        for row in [*results["components"], total]
    ]
    copy = min(results["steps"]["cp + fsync"]["wall"])
    restored = results["restored"]
    steps = []
    for name, step in results["steps"].items():
        seconds = min(step["wall"])
        relative = "-" if name == "restore" else f"{copy / seconds:.2f}"
        steps.append([name, f"{seconds:.1f}", relative, f"{min(step['cpu']):.1f}", f"{step['peak_rss'] / 2**20:.0f}"])
    inexact = ", ".join(f"{name} {count}" for name, count in results["inexact"].items() if count) or "none"
    goal = f"The goal for the real pipeline is {GOAL_BYTES / 1e9:.2f} GB; here it is {results['stored_bytes'] / 1e9:.3f} GB. "
    compared = "Both verifications found no difference." if "verify --against" in results["steps"] else "The verification found no damage."
    return "\n\n".join(
        [
            "# A stand-in for the OmniGen2 checkpoint",
            machine.as_text(results["machine"]),
            f"Names, shapes and file sizes are those on the Hub (scale {results['scale']:g}), the weights are random: exponents of about 2.64 bits, "
            "layers 1 to 5 of the mllm broader (layer 1 about 3.6). "
            f"`df11 convert --cast bf16`, {results['jobs']} threads, on {results['file_system']}. {goal if results['scale'] == 1 else ''}"
            f"{'Floor: estimated from a sample of each tensor. ' if results['scale'] > EXACT_FLOOR_SCALE else ''}"
            f"Tensors that the cast changed: {inexact}.",
            table.markdown(["component", "F32 bytes", "BF16 bytes", ".df11 bytes", "to BF16", "bits/weight", "floor"], rows),
            f"Whole processes; the best of {results['rounds']}. Cold: what a step reads was put out of the page cache before it. "
            "cp: file by file, each forced to the same disk. x cp: its time divided by this one's, so that above 1 is faster. "
            "convert decodes and compares everything.",
            table.markdown(["step", "s", "x cp", "CPU s", "peak MiB"], steps),
            f"{compared} Restored: {restored['name']}, {restored['bytes']:,} bytes, SHA-256 {restored['sha256']}, that of the source.",
        ]
    )


def say(line: str) -> None:
    """Tell people what goes on, on standard error."""
    print(f"bench-omnigen2: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
