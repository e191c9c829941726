"""The benchmark: sections by name, one JSON file a run. ``python -m benchmarks.bench``, or ``make bench``.

Timings are of programs that take turns; quote the median of the ratios of pairs, with the least and the most. Nothing
here decides whether tests pass: machines differ. ``python -m benchmarks.compare`` says what changed between two files.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import harness, job, measure, omnigen2, peers, results, sections, synthetic
from benchmarks.harness import Board, Checkout, say
from benchmarks.sections import Bench

SECTIONS: Final[dict[str, Callable[[Bench], None]]] = {
    "start": sections.start,
    "cores": sections.cores,
    "convert": sections.convert,
    "sizes": sections.sizes,
    "memory": sections.memory,
    "job": job.job,
    "omnigen2": omnigen2.omnigen2,
}
DEFAULT: Final = ("start", "cores", "convert", "sizes", "memory")
SHARED_MEMORY: Final = Path("/dev/shm")
ROOM: Final = {"start": 3e8, "cores": 1e8, "convert": 16.5e9, "sizes": 1.6e9, "memory": 11e9, "job": 15e9}
"""Bytes that a section has in its folder at a time; all but the first are scaled by --size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code: 1 if one has failed."""
    options = _parse(arguments)
    measure.interrupt_on_signals()
    try:
        checkouts = harness.checkouts(options.against)
    except ValueError as error:
        say(str(error))
        return 2
    board = Board()
    found = peers.Peers()
    if not options.no_peers:
        try:
            found = peers.prepare()
        except RuntimeError as error:
            board.notes["peers"] = str(error)
            say(f"without peers: {error}")
    folder = options.folder or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir()))
    warm_up(folder, checkouts, found)
    now = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
    path = results.dated(options.save) if options.save else results.BUILD / now
    for name in options.sections:
        board.section = name
        needed = omnigen2.needed(options.scale) if name == "omnigen2" else int(ROOM[name] * max(options.size, 0.01))
        if (free := shutil.disk_usage(folder).free) < needed:
            board.notes[name] = f"{needed / 1e9:.1f} GB are needed in {folder.name}, {free / 1e9:.1f} GB are free"
            say(f"{board.notes[name]}; name another folder with --folder")
            continue
        with tempfile.TemporaryDirectory(prefix="df11-bench-", dir=folder) as work:
            limits = (options.size, options.scale, options.rounds, options.jobs)
            try:
                SECTIONS[name](Bench(board, Path(work), checkouts, found, *limits))
            except (measure.CommandError, FileNotFoundError) as error:
                board.notes[name] = str(error)
                say(f"{name} failed: {error}")
            except KeyboardInterrupt:
                say("interrupted; the files are removed")
                return 130
        # After each section, so that nothing is lost if the machine goes away.
        results.write(path, board.found, _machine(folder, found), notes=board.notes, **_about(options, checkouts))
    print(as_text(board))
    say(f"written: {path}")
    return 1 if any(name in board.notes for name in options.sections) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Measure df11 on this machine.")
    about = f"default: {' '.join(DEFAULT)}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; {about}")
    parser.add_argument("--against", metavar="PATH[:PYTHON]", help="another checkout, which takes turns with this one")
    parser.add_argument("--folder", type=Path, help="where to work (default: shared memory)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--size", type=float, default=1.0, help="what sizes are multiplied by (default: 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="that of the OmniGen2 stand-in (default: 1, 31 GB)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    parser.add_argument("--no-peers", action="store_true", help="df11 alone, nothing is installed")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/DATE-NAME.json (default: build/bench)")
    options = parser.parse_args(arguments)
    options.sections = options.sections or list(DEFAULT)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    return options


def warm_up(folder: Path, checkouts: list[Checkout], found: peers.Peers) -> None:
    """Convert a small file with every program: what is done once a machine, such as compiling, counts nowhere."""
    with tempfile.TemporaryDirectory(prefix="df11-bench-", dir=folder) as work:
        source, target = Path(work, "x.safetensors"), Path(work, "x.df11")
        synthetic.write_gaussian(source, 2_000_000)
        programs = [checkout.program("", "convert", source, target, "--quiet", output=target) for checkout in checkouts]
        for program in programs + found.lmzip("compress", "-q", source, target, output=target):
            harness.run(program)


def _machine(folder: Path, found: peers.Peers) -> dict[str, Any]:
    machine = results.describe(folder)
    return machine | {"versions": machine["versions"] | found.versions}


def _about(options: argparse.Namespace, checkouts: list[Checkout]) -> dict[str, Any]:
    about: dict[str, Any] = {"size": options.size, "rounds": options.rounds, "jobs": options.jobs}
    if len(checkouts) > 1:
        about["against"] = results.commit(checkouts[1].path)
    return about


def as_text(board: Board) -> str:
    """The figures for a terminal."""
    rows = []
    for result in board.found:
        digits = ",.0f" if result.unit in ("bytes", "files") else ".4g"
        ranges = f"{result.low:{digits}}..{result.high:{digits}}" if len(result.samples) > 1 else ""
        rows.append([f"{result.section}: {result.name}", f"{result.value:{digits}}", result.unit, ranges])
    notes = [f"{name}: {note}" for name, note in board.notes.items()]
    return "\n".join([results.table(["", "median", "", "range"], rows), *notes])


if __name__ == "__main__":
    sys.exit(main())
