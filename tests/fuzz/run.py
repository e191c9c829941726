"""Fuzz every target for a share of the time, one after another: python -m tests.fuzz.run [--seconds 60] [TARGET ...].

Prints a line for each, and writes build/reliability/fuzz.json. The exit status is 1 if anything failed; the inputs
that did are then in tests/fuzz/corpus, and the lines after the table say how to read one again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from tests.fuzz.registry import CORPUS, PROGRAMS, TARGETS
from tests.fuzz.tally import CURRENT, keep

OUT = CORPUS.parents[2] / "build" / "reliability"
PATIENCE = 120
"""Seconds that a process may take beyond its time: an input has 60, and compilers take some."""
MEMORY = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""What is freed goes back to the system; otherwise only the first input that takes much would be seen."""
ROW = "{:18} {:>9} {:>9} {:>6} {:>7} {:>9} {:>11}"


def fuzz(name: str, seconds: float) -> dict[str, Any]:
    """The result of one target."""
    folder = OUT / "fuzz" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    module = "guided" if name in TARGETS else "batches"
    command = [sys.executable, "-m", f"tests.fuzz.{module}", name, str(seconds), str(folder)]
    with (folder / "log").open("wb") as log:
        try:
            status: int | str = subprocess.run(
                command, env=os.environ | MEMORY, stdout=log, stderr=log, timeout=seconds + PATIENCE, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = "no end"
    said = (folder / "log").read_text(errors="replace")
    saved = folder / "result.json"
    result: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {"target": name, "failures": {}}
    if status != 0 or not saved.exists():
        current = folder / CURRENT
        where = keep(name, current.read_bytes()) if current.exists() else str(folder / "log")
        result["failures"][where] = f"the process ended with {status}; see {folder / 'log'}"
    edges = re.findall(r"cov: (\d+)", said)
    return result | {"edges": int(edges[-1]) if edges else None}


def main() -> int:
    """All targets, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join([*TARGETS, *PROGRAMS])}")
    options = parser.parse_args()
    names = options.targets or [*TARGETS, *PROGRAMS]
    show(ROW.format("target", "inputs", "accepted", "edges", "crashes", "slowest", "peak memory"))
    results = []
    for name in names:
        result = fuzz(name, options.seconds / len(names))
        results.append(result)
        slowest, memory = result.get("slowest_seconds", 0), result.get("most_memory_mib", 0)
        row = (name, result.get("inputs", 0), result.get("accepted", 0), result["edges"] or "-")
        measured = (f"{slowest:.2f} s", f"{memory:.0f} MiB") if name in TARGETS else ("-", "-")
        show(ROW.format(*row, len(result["failures"]), *measured))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "fuzz.json").write_text(json.dumps({"seconds": options.seconds, "targets": results}, indent=1) + "\n")
    for result in results:
        for path, what in result["failures"].items():
            show(f"\n{result['target']}: {what}")
            if path.startswith("tests"):
                show(f"  again: python -m tests.fuzz.replay {result['target']} {path}")
    return int(any(result["failures"] for result in results))


def show(line: str) -> None:
    """A line for the user, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
