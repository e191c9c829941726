"""df11 and its peers on the same files in the same run. ``python -m benchmarks.bench``, or ``make bench``.

Whole processes (time, processor time, peak memory, size) on real and Gaussian weights, and the cores alone on one thread. Writes
``benchmarks/results/<date>-<name>.json`` and ``.md``. Nothing here decides whether tests pass: machines differ.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import core, machine, measure, peers, report, synthetic, warm
from benchmarks.floor import measure_floor
from benchmarks.peers import Environment, Tool

SLOW_LIMIT: Final = 1_000_000_000
"""Files above it are not given to slow tools."""
MEMORY_MARGIN: Final = 3 << 30
"""Memory that must remain when a tool holds the whole file."""
CORE_REPEATS: Final = 5
CORE_METHOD: Final = (
    "Best of two processes of {repeats} repeats each, the coders one after the other. df11: finished segments; encode makes both of its checksums, "
    "encode + verify also decodes and compares, decode checks both. lmzip: its 8 MiB chunks with CRC-32. zipnn: its byte interface, no checksum. "
    "dfloat11 0.5.0: its own encoder, a Python loop, on the slice given; it has no decoder for a CPU, and its speed and ratio are what the "
    "starred lines above extrapolate."
)


@dataclass(frozen=True, slots=True)
class Case:
    """A file to compress: about ``size`` bytes, written by ``make``; ``sample`` is what the cores are measured on."""

    name: str
    title: str
    size: int
    make: Callable[[Path], int]
    sample: str = "Gaussian"


def gaussian(name: str, title: str, size: int) -> Case:
    """A Gaussian file of the shape of a transformer."""
    return Case(name, f"{title}, Gaussian, BF16, shaped like a transformer", size, lambda path: synthetic.write_gaussian(path, size))


CASES: Final = [
    Case("minilm", "MiniLM-L6-v2, real weights rounded to BF16, 45 MB", 46_000_000, synthetic.write_minilm_bf16, "MiniLM"),
    gaussian("gaussian-517mb", "517 MB", 517_000_000),
    gaussian("gaussian-850mb", "0.85 GB", 850_000_000),
    gaussian("gaussian-4gb", "4 GB", 4_000_000_000),
    Case("single-1.2gb", "One tensor of 1.2 GB, Gaussian, BF16", 1_200_000_000, lambda path: synthetic.write_single_tensor(path, 1_200_000_000)),
]
QUICK: Final = [CASES[0], gaussian("gaussian-64mb", "64 MB", 64_000_000)]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Measure df11 against its peers on this machine.")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these files (default: all)")
    parser.add_argument("--quick", action="store_true", help="small files, one round: to see that everything runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool; the best counts (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="threads of each tool (default: all cores)")
    parser.add_argument("--dir", type=Path, help="where to work (default: shared memory if it has room, else the temporary folder)")
    parser.add_argument("--slice", type=int, default=16_000_000, help="bytes that dfloat11's encoder gets (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="measure df11 and cp only")
    parser.add_argument("--name", default="cpu", help="name of the results (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    cases = QUICK if options.quick else [case for case in CASES if not options.cases or case.name in options.cases]
    rounds = 1 if options.quick else options.rounds
    needed = int(2.8 * max(case.size for case in cases)) + 200_000_000
    base = machine.roomy_folder(options.dir, needed)
    measure.interrupt_on_signals()
    environment = Environment() if options.no_peers else peers.prepare(say)
    tools = peers.tools(environment, options.jobs)
    say(f"in {base}: {peers.names(tools)}")
    with tempfile.TemporaryDirectory(prefix="df11-bench-", dir=base) as folder:
        work = Path(folder)
        warm_up(work, tools)
        say("cores")
        slice_bytes = 1_000_000 if options.quick else options.slice
        repeats = 1 if options.quick else CORE_REPEATS
        cores = core.measure_cores(work, environment, repeats, slice_bytes)
        described, runs = [], []
        for case in cases:
            description, rows = run_case(case, tools, work, rounds)
            described.append(description)
            runs += rows + extrapolate(case, description, cores)
        kind = machine.file_system(work)
    results = {
        "machine": machine.describe(),
        "peers": environment.versions,
        "missing": environment.missing,
        "jobs": options.jobs,
        "rounds": rounds,
        "file_system": kind,
        "tools": {tool.name: tool.note for tool in tools},
        "cases": described,
        "runs": runs,
        "core_method": CORE_METHOD.format(repeats=repeats),
        "cores": cores,
    }
    text = report.as_markdown(results)
    print(text)
    say(f"written: {report.save(options.name, results, text, options.output)}")
    return 1 if any(row.get("failed") for row in runs) else 0


def warm_up(work: Path, tools: list[Tool]) -> None:
    """Run every tool once on a small file: compile df11's kernels, bring programs and libraries into memory."""
    warm.compile_kernels(work)
    source = work / "warm.safetensors"
    synthetic.write_gaussian(source, 4_000_000)
    for tool in tools:
        run_tool(tool, source, work, {}, check=False)
    source.unlink()


def run_case(case: Case, tools: list[Tool], work: Path, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make the file, and run every tool on it ``rounds`` times, one after the other in each round."""
    say(f"{case.name}: making the file")
    source = work / f"{case.name}.safetensors"
    size = case.make(source)
    floor = measure_floor(source)
    description = {
        "name": case.name,
        "title": case.title,
        "bytes": size,
        "bf16_bytes": floor.bf16_bytes,
        "weights": floor.weights,
        "floor_bytes": floor.floor_bytes,
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number in range(rounds):
        for tool in tools:
            say(f"{case.name}: round {number + 1} of {rounds}: {tool.name}")
            if reason := unfit(tool, size):
                rows[tool.name, "compress"] = row(tool.name, "compress", skipped=reason)
                continue
            if not rows.get((tool.name, "compress"), {}).get("failed"):
                run_tool(tool, source, work, rows, check=number == 0)
    source.unlink()
    return description, [{"case": case.name, **values} for values in rows.values()]


def unfit(tool: Tool, size: int) -> str:
    """Why a tool cannot be given a file of that size; empty if it can."""
    if tool.slow and size > SLOW_LIMIT:
        return "not run: slow"
    needed = int((tool.memory + 1.7) * size) + MEMORY_MARGIN
    if tool.memory and machine.available_memory() < needed:
        return f"not run: would need {tool.memory * size / 1e9:.0f} GB of memory"
    return ""


def row(tool: str, operation: str, **values: Any) -> dict[str, Any]:
    """An empty row of results."""
    return {"tool": tool, "operation": operation, "wall": [], "cpu": [], "peak_rss": 0, "bytes": 0, **values}


def run_tool(tool: Tool, source: Path, work: Path, rows: dict[tuple[str, str], dict[str, Any]], *, check: bool) -> None:
    """Compress, verify where there is such a command, restore; with ``check``, compare what was restored. A failure ends in the rows."""
    packed = work / f"packed{tool.suffix}"
    restored = work / f"restored-{source.name}"

    def operate(operation: str, command: list[str], output: Path | None) -> None:
        taken = measure.run(command)
        values = rows.setdefault((tool.name, operation), row(tool.name, operation))
        values["wall"].append(taken.wall)
        values["cpu"].append(taken.cpu)
        values["peak_rss"] = max(values["peak_rss"], taken.peak_rss)
        values["bytes"] = output.stat().st_size if output else 0

    try:
        operate("compress", tool.compress(source, packed), packed)
        if tool.verify:
            operate("verify", tool.verify(packed), None)
        if tool.decompress:
            operate("restore", tool.decompress(packed, restored), restored)
            if check and not filecmp.cmp(source, restored, shallow=False):
                raise measure.CommandError("what was restored differs from the source")
    except measure.CommandError as error:
        say(f"{tool.name} failed: {error}")
        rows[tool.name, "compress"] = row(tool.name, "compress", skipped=f"failed: {str(error)[:120]}".replace("\n", " "), failed=True)
    finally:
        packed.unlink(missing_ok=True)
        restored.unlink(missing_ok=True)


def extrapolate(case: Case, description: dict[str, Any], cores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for dfloat11: the whole file at the speed and ratio that its encoder reached on a slice."""
    rows = []
    for measured in cores:
        if measured["tool"] == "dfloat11" and measured["sample"] == case.sample:
            seconds = measured["encode"] * description["bytes"] / measured["bytes"]
            stored = round(measured["stored"] / measured["bytes"] * description["bf16_bytes"])
            rows.append({"case": case.name, **row("dfloat11", "compress", wall=[seconds], bytes=stored, extrapolated=True)})
    return rows


def say(line: str) -> None:
    """Tell people what goes on, on standard error."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
