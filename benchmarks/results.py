"""The one format of all results: what was measured, on which machine, with which versions. Every program here uses it.

A file is a JSON object: ``format``, 1; ``machine``, as returned by ``describe``; ``results``, a list of ``Result``; and
extras of a program: ``notes`` on what is missing, ``against``, the ``sections`` of the programs for a GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import df11

FORMAT: Final = 1
ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
"""For results that are committed."""
BUILD: Final = ROOT / "build" / "bench"
"""For results that are not, and for the peers' environment."""
MACHINE: Final = ("date", "commit", "cpu", "cores", "memory_bytes", "kernel", "versions")
"""What every description of a machine has."""
Better = Literal["lower", "higher"]
Samples = Sequence[float]


@dataclass(frozen=True, slots=True)
class Result:
    """One figure.

    ``unit``: "s", "GB/s", "MiB", "bytes", "files" or, for a ``ratio``, "x" (times as fast) or "of …" (a share).
    ``value`` is the one to quote, the median of the ``samples``; ``low`` and ``high`` are their minimum and maximum.
    Samples are in the order of time: those of two programs that took turns are pairs, and a ratio has a sample per
    pair. Programs that kept no samples have none.
    """

    section: str
    name: str
    unit: str
    better: Better
    ratio: bool
    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, section: str, name: str, unit: str, better: Better, samples: Samples, *, ratio: bool = False) -> Result:
        """The result of one or more samples."""
        value, low, high = statistics.median(samples), min(samples), max(samples)
        return cls(section, name, unit, better, ratio, value, low, high, tuple(samples))


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """A results file: all of it, and the results in it. Raises ValueError, or OSError, if it is not one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not results of format {FORMAT}")
    try:
        rows = [Result(**{**row, "samples": tuple(row["samples"])}) for row in content["results"]]
        _ = [content["machine"][key] for key in MACHINE]
        for row in rows:
            _ = row.value + row.low + row.high
    except (KeyError, TypeError) as error:
        raise ValueError(f"results or machine are invalid: {error}") from error
    return content, rows


def write(path: Path, found: Iterable[Result], machine: dict[str, Any], **more: Any) -> None:
    """Write a results file with a line per figure, so that a diff is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"format": FORMAT, "machine": machine, **more}, indent=1)
    rows = ",\n".join(f"  {json.dumps(_rounded(asdict(row)))}" for row in found)
    path.write_text(f'{head[:-2]},\n "results": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def _rounded(value: Any) -> Any:
    # Timings are kept to six digits; counts are whole numbers and kept exactly.
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dated(name: str, folder: Path = RESULTS) -> Path:
    """``<date>-<name>.json`` in the folder."""
    return folder / f"{datetime.date.today().isoformat()}-{name}.json"


def describe() -> dict[str, Any]:
    """Date, commit, CPU, cores, memory, operating system, versions."""
    versions = {"df11": df11.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "xxhash", "zstandard"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "commit": commit(ROOT),
        "versions": versions,
    }


def as_text(machine: dict[str, Any]) -> str:
    """One paragraph for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{machine['date']}. {hardware}, {machine['kernel']}. Commit {machine['commit']}. {versions}."


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def commit(checkout: Path) -> str:
    """The commit of a checkout, with ``-dirty`` if it was changed; "unknown" without git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, such as tmpfs or ext4."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, point, name = line.split()[:3]
            if len(point) >= len(best) and folder.resolve().is_relative_to(point):
                best, kind = point, name
    return kind


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces: the first aligned to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def pad(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))

    return "\n".join([pad(head), "  ".join("-" * width for width in widths), *map(pad, rows)])
