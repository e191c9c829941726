"""The table of docs/reliability.md, from what `make fuzz` and `make crash` have found: `make reliability` runs this.

Takes build/reliability/*.json, keeps it in results/reliability.json, and writes the table between two markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks import results

BUILD: Final = results.ROOT / "build" / "reliability"
KEPT: Final = results.RESULTS / "reliability.json"
PAGE: Final = results.ROOT / "docs" / "reliability.md"
START: Final = "<!-- make reliability: start -->"
END: Final = "<!-- make reliability: end -->"
_COUNTS: Final = ("points", "kills", "cuts", "faults", "changes", "writers", "bytes_lost", "hangs", "crashes")
_TITLES: Final = (
    "command",
    "points",
    "kills survived",
    "power cuts survived",
    "calls that failed",
    "sources changed",
    "second writers",
    "bytes lost",
    "hangs",
    "crashes",
)


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown: names to the left, numbers to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    cells = [[f"{cell:,}" if isinstance(cell, int | float) else str(cell) for cell in row] for row in [*lines, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def as_text(found: Mapping[str, Any]) -> str:
    """What was found, in Markdown."""
    parts = []
    if "crash" in found:
        parts += _crash(found["crash"])
    if "fuzz" in found:
        parts += _fuzz(found["fuzz"])
    return "\n\n".join(parts)


def _crash(found: Mapping[str, Any]) -> list[str]:
    commands = found["commands"]
    rows = [(f"`{name}`", *(one[key] for key in _COUNTS)) for name, one in commands.items()]
    total = ("all", *(sum(one[key] for one in commands.values()) for key in _COUNTS))
    bits = found["bits"]
    violations = sum(len(one["violations"]) for one in commands.values())
    step = found.get("step", 1)
    return [
        results.as_text(found["machine"]),
        *([f"One in {step} of all faults was tried, evenly."] if step > 1 else []),
        *([found["note"]] if "note" in found else []),
        table(_TITLES, [*rows, total]),
        f"{violations} of these ended otherwise than this page promises.",
        f"{bits['bits']:,} bits of a container were flipped, one at a time. `verify` noticed {bits['noticed']:,}. "
        f"{bits['free']} are in the name of the program that wrote the file, which says nothing about the content, and "
        f"{bits['same']} spell the same content in another way. {len(bits['missed'])} were missed.",
    ]


def _fuzz(found: Mapping[str, Any]) -> list[str]:
    targets = found["targets"]
    total, accepted = (sum(one[key] for one in targets) for key in ("inputs", "accepted"))
    rows = [(one["target"], one["inputs"], one["accepted"], len(one["failures"]), *_peak(one)) for one in targets]
    return [
        f"{total:,} malformed inputs were tried in {found['seconds']:,.0f} s; {accepted:,} turned out to be valid. "
        f"The worst took {max(one['most_memory_mib'] for one in targets):,.0f} MiB of memory, and "
        f"{max(one['slowest_seconds'] for one in targets):.1f} s.",
        table(("what reads them", "inputs tried", "valid", "failures", "peak MiB", "slowest, s"), rows),
    ]


def _peak(one: Mapping[str, Any]) -> tuple[object, object]:
    # Kernels take inputs in batches, in a process of their own.
    if not one["slowest_seconds"]:
        return "", ""
    return round(one["most_memory_mib"]), round(one["slowest_seconds"], 2)


def main() -> int:
    """Keep the results and write the page. Exit code 1 if there is nothing to keep."""
    found = {
        name: json.loads((BUILD / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("crash", "fuzz")
        if (BUILD / f"{name}.json").is_file()
    }
    if not found:
        print(f"nothing in {BUILD}: make fuzz, make crash", file=sys.stderr)
        return 1
    results.write(KEPT, [], results.describe(), **found)
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    assert start
    assert end
    PAGE.write_text(f"{before}{START}\n\n{as_text(found)}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
