"""What a measurement was taken on, and where there is room for it."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import df11

_ROOT: Final = Path(__file__).parents[1]
_SHARED_MEMORY: Final = Path("/dev/shm")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, kernel, versions, date."""
    versions = {"df11": df11.__version__, "python": platform.python_version()}
    for name in ("numpy", "numba", "xxhash", "zstandard"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "commit": _commit(),
        "versions": versions,
    }


def as_text(machine: dict[str, Any]) -> str:
    """One paragraph for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{machine['date']}. {machine['cpu']}, {machine['cores']} cores, {memory}, {machine['kernel']}. Commit {machine['commit']}. {versions}."


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return int(_field("/proc/meminfo", "MemAvailable").split()[0] or 0) * 1024


def roomy_folder(chosen: Path | None, needed: int) -> Path:
    """The folder to work in: the chosen one, else shared memory if it has room for ``needed`` bytes, else the temporary folder.

    Ends the program if there is no room.
    """
    memory_ok = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > needed and available_memory() > needed + (2 << 30)
    folder = chosen or (_SHARED_MEMORY if memory_ok else Path(tempfile.gettempdir()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; name another folder with --dir")
    return folder


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, such as tmpfs or ext4."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, name = line.split()[:3]
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, kind = point, name
    return kind
