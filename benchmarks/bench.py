"""The benchmark: sections by name, one JSON file per run. ``python -m benchmarks.bench``, or ``make bench``.

Programs are timed in turns; quote the median of the paired ratios, with the minimum and the maximum. No test depends on
timings: machines differ. ``python -m benchmarks.compare`` says what changed between two files.
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
from typing import Final

from benchmarks import dfloat11, dtypes, harness, job, measure, model, omnigen2, peers, results, sections, synthetic
from benchmarks.harness import Board, Checkout, say
from benchmarks.sections import Bench

SECTIONS: Final[dict[str, Callable[[Bench], None]]] = {
    "start": sections.start,
    "cores": sections.cores,
    "convert": sections.convert,
    "sizes": sections.sizes,
    "memory": sections.memory,
    "dtypes": dtypes.dtypes,
    "dfloat11": dfloat11.dfloat11,
    "model": model.model,
    "job": job.job,
    "omnigen2": omnigen2.omnigen2,
}
DEFAULT: Final = ("start", "cores", "convert", "sizes", "memory")
SHARED_MEMORY: Final = Path("/dev/shm")
ROOM: Final = {
    "start": 3e8,
    "cores": 2e8,
    "convert": 16.5e9,
    "sizes": 1.6e9,
    "memory": 11e9,
    "dtypes": 4e8,
    "dfloat11": 3e9,
    "model": 1e9,
    "job": 15e9,
}
"""Bytes that a section needs in its folder at a time; scaled by --size."""
ON_DISK: Final = ("job", "omnigen2")
"""Sections that measure a real disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code: 1 if one failed, 2 if none could start."""
    options = _parse(arguments)
    measure.interrupt_on_signals()
    board, found = Board(), peers.Peers()
    try:
        checkouts = harness.checkouts(options.against)
        if not options.no_peers:
            found = _peers(board)
        warm_up(checkouts, found)
    except (ValueError, measure.CommandError) as error:
        say(str(error))
        return 2
    now = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
    path = results.dated(options.save) if options.save else results.BUILD / now
    kinds: set[str] = set()
    for name in options.sections:
        board.section = name
        folder = _folder(board, name, options)
        if folder is None:
            continue
        kinds.add(results.file_system(folder))
        with tempfile.TemporaryDirectory(prefix="df11-bench-", dir=folder) as work:
            if folder == SHARED_MEMORY:
                measure.use_once(Path(work), int(ROOM[name] * options.size))
            limits = (options.size, options.scale, options.rounds, options.jobs)
            try:
                SECTIONS[name](Bench(board, Path(work), checkouts, found, *limits))
            except (measure.CommandError, FileNotFoundError) as error:
                board.notes[name] = str(error)
                say(f"{name} failed: {error}")
            except KeyboardInterrupt:
                say("interrupted; the files are removed")
                return 130
        machine = results.describe() | {"file_system": ", ".join(sorted(kinds))}
        machine["versions"] |= found.versions
        about = {name: getattr(options, name) for name in ("size", "rounds", "jobs")}
        if len(checkouts) > 1:
            about["against"] = results.commit(checkouts[1].path)
        # After each section, so that nothing is lost if the machine goes away.
        results.write(path, board.found, machine, notes=board.notes, **about)
        say(f"written: {path}")
    print(as_text(board))
    return 1 if any(name in board.notes for name in options.sections) else 0


def _peers(board: Board) -> peers.Peers:
    try:
        return peers.prepare()
    except RuntimeError as error:
        board.notes["peers"] = str(error)
        say(f"without peers: {error}")
        return peers.Peers()


def _folder(board: Board, section: str, options: argparse.Namespace) -> Path | None:
    # The folder of a section; None, and a note, if there is no room. Shared memory may have too few pages.
    needed = omnigen2.needed(options.scale) if section == "omnigen2" else int(ROOM[section] * max(options.size, 0.01))
    usual = [Path(tempfile.gettempdir())]
    if section not in ON_DISK and SHARED_MEMORY.is_dir():
        usual.insert(0, SHARED_MEMORY)
    folders = [options.folder] if options.folder else usual
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    if fitting := [folder for folder in folders if free[folder] >= needed]:
        return fitting[0]
    rooms = ", ".join(f"{room / 1e9:.1f} GB are free in {folder}" for folder, room in free.items())
    board.notes[section] = f"{needed / 1e9:.1f} GB are needed, {rooms}; name another folder with --folder"
    say(f"{section}: {board.notes[section]}")
    return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Measure df11 on this machine.")
    about = f"default: {' '.join(DEFAULT)}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; {about}")
    parser.add_argument(
        "--against", metavar="PATH[:PYTHON]", help="another checkout to compare with; it takes turns with this one"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: shared memory, if there is room)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--size", type=float, default=1.0, help="factor for all sizes (default: 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the OmniGen2 stand-in (default: 1, 31 GB)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    parser.add_argument("--no-peers", action="store_true", help="df11 alone; nothing is installed")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/DATE-NAME.json (default: build/bench)")
    options = parser.parse_args(arguments)
    options.sections = options.sections or list(DEFAULT)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    return options


def warm_up(checkouts: list[Checkout], found: peers.Peers) -> None:
    """Convert a small file with every program, so that one-time work, such as compiling, is counted nowhere."""
    with tempfile.TemporaryDirectory(prefix="df11-bench-") as work:
        source, target = Path(work, "x.safetensors"), Path(work, "x.df11")
        synthetic.write_gaussian(source, 2_000_000)
        command = ("convert", source, target, "--quiet")
        programs = [checkout.program("", *command, output=target) for checkout in checkouts]
        for program in programs + found.lmzip("compress", "-q", source, target, output=target):
            harness.run(program)


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
