"""What changed between two results files: ``python -m benchmarks.compare A.json B.json``, ``make bench-compare``.

A timing has changed for certain if the ranges of its samples do not overlap (and, with fewer than three samples, which
leave the noise unknown, if it changed by more than 3 %); a size, which does not vary, if it differs at all. A timing
has perhaps changed if its median moved by more than 3 %. With eight or more samples, the range is the middle half,
which a few outliers do not widen. The exit code is 0 whatever has changed, and 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import results
from benchmarks.results import Result

THRESHOLD: Final = 0.03
FEW: Final = 3
"""Fewer samples say nothing about the noise."""
MANY: Final = 8
"""From this many samples on, their middle half is the range."""
EXACT: Final = ("bytes", "files", "of BF16")
"""Units of what is counted rather than timed."""
TIMINGS: Final = ("s", "GB/s")
"""Units whose values mean nothing on another machine."""
SPEEDS: Final = (*TIMINGS, "x")
HARDWARE: Final = ("cpu", "gpu", "cores", "memory", "file_system")

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in both files, ``a`` and ``b``."""

    a: Result
    b: Result

    @property
    def relative(self) -> float:
        """The increase, as a share of the first value."""
        return self.b.value / self.a.value - 1 if self.a.value else float(self.b.value != 0)

    @property
    def certain(self) -> bool:
        """Whether the change is beyond the noise."""
        if self.a.unit in EXACT:
            return self.a.value != self.b.value
        (a_low, a_high), (b_low, b_high) = _range(self.a), _range(self.b)
        apart = b_low > a_high or b_high < a_low
        few = any(result.low == result.high or 0 < len(result.samples) < FEW for result in (self.a, self.b))
        return apart and not (few and abs(self.relative) <= THRESHOLD)

    @property
    def possible(self) -> bool:
        """Whether the median moved much although the ranges overlap."""
        return not self.certain and self.a.unit not in EXACT and abs(self.relative) > THRESHOLD

    @property
    def word(self) -> str:
        """Faster, slower, smaller or larger."""
        less = self.b.value < self.a.value
        if self.a.unit in SPEEDS:
            return "faster" if less == (self.a.better == "lower") else "slower"
        return "smaller" if less else "larger"

    def __str__(self) -> str:
        perhaps = "perhaps " if self.possible else ""
        values = f"{_number(self.a)} -> {_number(self.b)} {self.a.unit}"
        ranges = "; {:.4g}..{:.4g} -> {:.4g}..{:.4g}".format(*_range(self.a), *_range(self.b))
        ranges = "" if self.a.unit in EXACT else ranges
        return f"{perhaps + self.word:<15} {self.a.name}: {values} ({self.relative:+.1%}{ranges})"


def _number(result: Result) -> str:
    return f"{result.value:,.0f}" if result.unit in ("bytes", "files") else f"{result.value:.4g}"


def _range(result: Result) -> tuple[float, float]:
    if len(result.samples) < MANY:
        return result.low, result.high
    low, _, high = statistics.quantiles(result.samples, n=4)
    return low, high


def compare(a: Sequence[Result], b: Sequence[Result], *, other_machine: bool = False) -> list[str]:
    """The lines of the comparison. Between different machines only ratios are compared, not timings."""
    first, second = _by_key(a), _by_key(b)
    changes = [Change(result, second[key]) for key, result in first.items() if key in second]
    left_out = [change for change in changes if other_machine and change.a.unit in TIMINGS]
    changes = [change for change in changes if change not in left_out]
    lines: list[str] = []
    for section in dict.fromkeys(change.a.section for change in changes):
        said = [change for change in changes if change.a.section == section and (change.certain or change.possible)]
        said.sort(key=lambda change: (change.possible, not change.a.ratio))
        lines += [section, *(f"  {change}" for change in said)] if said else []
    counts = dict.fromkeys(("faster", "slower", "smaller", "larger"), 0)
    for change in changes:
        counts[change.word] += change.certain
    same = sum(not change.certain for change in changes)
    words = [f"{count} {word}" for word, count in counts.items() if count]
    lines.append(f"{', '.join([*words, f'{same} the same within the noise'])}.")
    if left_out:
        lines.append(f"Timings left out, as the machines differ: {len(left_out)}. Their ratios are above.")
    for name, mine, others in (("A", first, second), ("B", second, first)):
        if alone := [key for key in mine if key not in others]:
            lines += [f"Only in {name}:", *(f"  {section}: {what} ({unit})" for section, what, unit in alone)]
    return lines


def _by_key(found: Sequence[Result]) -> dict[Key, Result]:
    return {(result.section, result.name, result.unit): result for result in found}


def differences(a: dict[str, Any], b: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Where two descriptions differ: "cpu: A, B"."""
    return [f"{key}: {a.get(key)}, {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Say what changed from A to B.")
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    chosen = parser.parse_args(arguments)
    machines, found = [], []
    for name, path in (("A", chosen.a), ("B", chosen.b)):
        try:
            content, rows = results.read(path)
        except (OSError, ValueError) as error:
            print(f"compare: {path}: {error}", file=sys.stderr)
            return 2
        machines.append(content["machine"])
        found.append(rows)
        print(f"{name}: {content['machine']['date'][:10]}, commit {content['machine']['commit']}, {path}")
    # To the GiB: virtual machines of one kind differ by a few pages.
    rounded = [machine | {"memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB"} for machine in machines]
    hardware = differences(rounded[0], rounded[1], HARDWARE)
    if hardware:
        print(f"The machines differ. {'; '.join(hardware)}.")
    versions = [machine["versions"] | {"kernel": machine["kernel"]} for machine in machines]
    if changed := differences(versions[0], versions[1], sorted({*versions[0], *versions[1]})):
        print(f"Versions differ. {'; '.join(changed)}.")
    print("\n".join(compare(found[0], found[1], other_machine=bool(hardware))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
