"""What the programs for a GPU have in common: the machine, sections that run one by one, results and report."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import results
from benchmarks.results import Better, Result
from df11 import runtime
from df11.formats import errors

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
"""A row of a section: ``what`` and ``name``; ``seconds``; ``timing``, if timed by events; ratios; more."""

_RATIOS: Final[dict[str, Better]] = {
    "of_floor": "higher",
    "times_dfloat11": "higher",
    "of_bf16": "lower",
    "of_products_alone": "lower",
    "of_safetensors": "lower",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the report: its title, the factor for its numbers, and their format."""

    title: str
    scale: float = 1
    format: str = ".3f"

    def cell(self, value: Any) -> str:
        """A cell; a dash for no value."""
        if value is None or isinstance(value, str):
            return value or "-"
        return f"{value * self.scale:{self.format}}"


@dataclass(frozen=True, slots=True)
class Report:
    """What belongs to one program: file name, title, a paragraph, the possible columns."""

    name: str
    title: str
    about: str
    columns: Mapping[str, Column]


def describe(device: torch.device) -> dict[str, Any]:
    """The host and the device: name, size, driver, and the versions of the software in between."""
    import torch

    described = results.describe()
    described["versions"]["torch"] = torch.__version__
    if device.type != "cuda":
        return {**described, "gpu": {"name": "none, the CPU"}}
    properties = torch.cuda.get_device_properties(device)
    cupy: Any = importlib.import_module("cupy")
    described["versions"] |= {
        "cupy": cupy.__version__,
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "CUDA of torch": torch.version.cuda,
    }
    return {
        **described,
        "gpu": {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            **_by_nvidia_smi(device),
        },
    }


def _by_nvidia_smi(device: torch.device) -> dict[str, str]:
    path = shutil.which("nvidia-smi")
    if path is None:
        return {}
    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    command = [path, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(fields, answer.strip().split(", "), strict=False))
    return {}


def as_text(described: dict[str, Any]) -> str:
    """One paragraph for a report."""
    gpu = dict(described["gpu"])
    text = f"**{gpu.pop('name')}**"
    if "memory_bytes" in gpu:
        sizes = gpu.pop("memory_bytes") / 2**30, gpu.pop("cache_bytes") / 2**20
        text += f", {sizes[0]:.0f} GiB, {sizes[1]:.0f} MiB of second-level cache"
    text += "".join(f", {name.replace('_', ' ')} {value}" for name, value in gpu.items())
    return f"{text}. {results.as_text(described)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with numbers aligned to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def save(name: str, machine: Row, text: str, folder: Path, found: Iterable[Result] = (), **more: Any) -> Path:
    """Write ``<date>-<name>-<device>.json`` and ``.md``; return the path of the latter."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["gpu"]["name"].lower()).strip("-")
    path = results.dated(f"{name}-{device}", folder)
    results.write(path, found, machine, **more)
    path = path.with_suffix(".md")
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


def refused(program: str, device: torch.device) -> int:
    """0 if the device can decode; otherwise the exit code, after saying why."""
    try:
        runtime.warm_up(device)
    except errors.Df11Error as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(report: Report, make: Callable[[], Any], names: Iterable[str], device: torch.device, folder: Path) -> int:
    """Run sections, methods of what ``make`` returns, and write the results: 1 if one failed or found a difference.

    A section's rows can have a number of ``differing`` values; ``missing`` of the object lists peers that are not
    there.
    """
    machine = describe(device)
    sections: dict[str, Row] = {}
    missing: dict[str, str] = {}
    path = folder
    for name in names:
        bench, start = make(), time.perf_counter()
        section: Row = {"about": (getattr(bench, name).__doc__ or "").split("\n")[0], "rows": [], "error": None}
        try:
            section["rows"] = getattr(bench, name)()
        except Exception as error:  # It is reported, and the other sections run.
            section["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.print_exc()
        missing |= getattr(bench, "missing", {})
        sections[name] = section
        print(f"{name}: {len(section['rows'])} rows, {time.perf_counter() - start:.0f} s", flush=True)
        # After each section, so that nothing is lost if the machine goes away.
        text = _as_markdown(report, machine, sections, missing)
        path = save(report.name, machine, text, folder, figures(sections), sections=sections, missing=missing)
        del bench
        if device.type == "cuda":
            importlib.import_module("torch").cuda.empty_cache()
    print(path.read_text(encoding="utf-8"))
    differs = any(row.get("differing") for section in sections.values() for row in section["rows"])
    return 1 if differs or any(section["error"] for section in sections.values()) else 0


def _as_markdown(report: Report, machine: dict[str, Any], sections: dict[str, Row], missing: dict[str, str]) -> str:
    parts = [f"# {report.title}", as_text(machine), report.about, *(f"Missing: {why}." for why in missing.values())]
    for name, section in sections.items():
        parts += [f"## {name}", section["about"]]
        if section["error"]:
            parts.append(f"**Failed**: {section['error']}")
        if rows := section["rows"]:
            keys = [key for key in report.columns if any(row.get(key) is not None for row in rows)]
            cells = [[report.columns[key].cell(row.get(key)) for key in keys] for row in rows]
            parts.append(markdown([report.columns[key].title for key in keys], cells))
    return "\n\n".join(parts)


def figures(sections: dict[str, Row]) -> list[Result]:
    """The rows in the format of all results. Rows with the same name are repetitions: their seconds are samples."""
    found = []
    for section, content in sections.items():
        groups: dict[str, list[Row]] = {}
        for row in content["rows"]:
            groups.setdefault(", ".join(filter(None, (row["what"], row.get("name")))), []).append(row)
        for name, rows in groups.items():
            result = Result.of(section, name, "s", "lower", [row["seconds"] for row in rows])
            if timing := rows[0].get("timing"):
                low, high = timing["minimum"], timing["maximum"]
                result = Result(section, name, "s", "lower", False, timing["median"], low, high)
            found.append(result)
            for key, better in _RATIOS.items():
                if ratios := [row[key] for row in rows if row.get(key) is not None]:
                    of = f"{name}: {key.replace('_', ' ')}"
                    found.append(Result.of(section, of, "x", better, ratios, ratio=True))
    return found
