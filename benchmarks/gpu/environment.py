"""The GPU that something was measured on."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks import machine

if TYPE_CHECKING:
    import torch


def describe(device: torch.device) -> dict[str, Any]:
    """The host, as ``benchmarks.machine`` tells it, and the device: name, size, driver, versions of what stands between."""
    import torch

    described = machine.describe()
    described["versions"]["torch"] = torch.__version__
    if device.type != "cuda":
        return {**described, "gpu": {"name": "none, the processor"}}
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
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip().split(", ")
        return dict(zip(fields, values, strict=False))
    return {}


def as_text(described: dict[str, Any]) -> str:
    """One paragraph for a report."""
    gpu = dict(described["gpu"])
    text = f"**{gpu.pop('name')}**"
    if "memory_bytes" in gpu:
        text += f", {gpu.pop('memory_bytes') / 2**30:.0f} GiB, {gpu.pop('cache_bytes') / 2**20:.0f} MiB of second-level cache"
    text += "".join(f", {name.replace('_', ' ')} {value}" for name, value in gpu.items())
    return f"{text}. {machine.as_text(described)}"


def short_name(described: dict[str, Any]) -> str:
    """For file names: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", described["gpu"]["name"].lower()).strip("-")
