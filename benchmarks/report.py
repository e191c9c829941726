"""Write the results of ``benchmarks.bench`` as JSON and as Markdown."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, table

RESULTS: Final = Path(__file__).parent / "results"
REFERENCE: Final = "lmzip"
"""The peer that speeds are compared with: the best of those that keep every byte in bounded memory."""

Row = dict[str, Any]


def save(name: str, results: dict[str, Any], text: str, folder: Path = RESULTS) -> Path:
    """Write ``<date>-<name>.json`` and ``.md`` and return the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-{name}"
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    path = folder / f"{stem}.md"
    path.write_text(text + "\n")
    return path


def as_markdown(results: dict[str, Any]) -> str:
    """The report on all cases and cores."""
    rounds = results["rounds"]
    peers = ", ".join(f"{name} {version}" for name, version in results["peers"].items()) or "none"
    parts = [
        "# df11 and its peers on a CPU",
        machine.as_text(results["machine"]),
        f"Peers: {peers}." + "".join(f" Missing: {name} ({reason})." for name, reason in results["missing"].items()),
        f"Whole processes, start-up included, {results['jobs']} threads where a program can be told; files on {results['file_system']}. The best of "
        f"{rounds} runs of each, one tool after the other in each round (A B A B). MB = 10^6 bytes of the source. "
        f"x {REFERENCE}: its best time divided by this one's, so that above 1 is faster. "
        "Peak memory: resident, of the largest of the runs; pages of files that a program maps count. "
        "Ratio: bytes stored, everything included, to the tensors in BF16. "
        "Floor: entropy of the exponents taken singly, tensor by tensor, and 8 bits, with nothing for tables or offsets. "
        "Each tool's first restored file was compared with its source byte for byte. "
        "A star marks an extrapolation from a slice.",
        table.markdown(["tool", "what it does"], [[name, note] for name, note in results["tools"].items()]),
    ]
    for case in results["cases"]:
        parts += _case(case, [row for row in results["runs"] if row["case"] == case["name"]])
    if results["cores"]:
        parts += ["## Cores: one thread, weights in memory", results["core_method"], _cores(results["cores"])]
    return "\n\n".join(parts)


def best(row: Row | None) -> float | None:
    """Seconds of the best run."""
    return min(row["wall"]) if row and row["wall"] else None


def _find(rows: list[Row], tool: str, operation: str) -> Row | None:
    return next((row for row in rows if row["tool"] == tool and row["operation"] == operation), None)


def _case(case: Row, rows: list[Row]) -> list[str]:
    head = ["tool", "bytes", "ratio", "bits/weight", "compress s", "MB/s", f"x {REFERENCE}", "CPU s", "peak MiB"]
    floor = case["floor_bytes"]
    lines = [["floor", f"{floor:,.0f}", f"{floor / case['bf16_bytes']:.4f}", _bits(floor, case), *["-"] * 5]]
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    for tool in tools:
        row = _find(rows, tool, "compress")
        if row and row.get("skipped"):
            lines.append([tool, row["skipped"], *["-"] * 7])
        elif row:
            star = "*" if row.get("extrapolated") else ""
            size = [f"{row['bytes']:,}{star}", f"{row['bytes'] / case['bf16_bytes']:.4f}{star}", _bits(row["bytes"], case) + star]
            lines.append([tool, *size, *_speed(case, row, _find(rows, REFERENCE, "compress"))])
    parts = [f"## {case['title']}", f"{case['bytes']:,} bytes.", table.markdown(head, lines)]
    lines = []
    for operation in ("restore", "verify"):
        for tool in tools:
            if row := _find(rows, tool, operation):
                lines.append([tool, operation, *_speed(case, row, _find(rows, REFERENCE, operation))])
    if lines:
        parts.append(table.markdown(["tool", "", "s", "MB/s", f"x {REFERENCE}", "CPU s", "peak MiB"], lines))
    return parts


def _bits(size: float, case: Row) -> str:
    return f"{8 * size / case['weights']:.3f}"


def _speed(case: Row, row: Row, reference: Row | None) -> list[str]:
    seconds, other = best(row), best(reference)
    if seconds is None:
        return ["-"] * 5
    star = "*" if row.get("extrapolated") else ""
    ratio = f"{other / seconds:.2f}{star}" if other else "-"
    cpu = f"{min(row['cpu']):.2f}" if row["cpu"] else "-"
    peak = f"{row['peak_rss'] / 2**20:.0f}" if row["peak_rss"] else "-"
    return [f"{seconds:.2f}{star}", f"{case['bytes'] / 1e6 / seconds:.0f}{star}", ratio, cpu, peak]


def _cores(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        speeds = [f"{row['bytes'] / 1e9 / row[name]:.2f}" if row.get(name) else "-" for name in ("encode", "encode_verified", "decode")]
        if row["tool"] == "dfloat11":
            speeds = [f"{row['bytes'] / 1e9 / row['encode']:.4f}", "-", "-"]
        lines.append([f"{row['sample']}: {row['tool']}", f"{row['bytes'] / 1e6:.0f}", f"{row['stored'] / row['bytes']:.4f}", *speeds])
    return table.markdown(["sample", "MB", "ratio", "encode GB/s", "encode + verify GB/s", "decode GB/s"], lines)
