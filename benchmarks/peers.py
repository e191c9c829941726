"""The programs that are compared, and the virtual environment of those that are not df11.

The peers get an environment of their own, made once below ``~/.cache/df11-benchmarks`` (or ``$DF11_BENCHMARK_CACHE``). A peer that cannot be
installed or imported is reported as missing. torch, which two of them import, must be a build for the CPU: only such a version is asked for,
so that pip never brings CUDA; ``$DF11_BENCHMARK_TORCH`` names another requirement, and pip's own settings say where to find it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import measure, synthetic
from benchmarks.safetensors_file import Tensor

TORCH: Final = "torch==2.13.0+cpu"
PLAIN: Final = ["numpy>=2", "safetensors>=0.4", "zstandard>=0.23"]
PEERS: Final = {"lmzip": ["lmzip==1.3.0"], "zipnn": ["zipnn==0.5.4"], "dfloat11": ["dfloat11==0.5.0", "dahuffman==0.4.2"]}
NEEDS_TORCH: Final = ("zipnn", "dfloat11")

_WORKER: Final = Path(__file__).with_name("peer_worker.py")

Command = Callable[[Path, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: its commands take a source and a target. ``memory``: peak memory as a multiple of the file, 0 where it is bounded."""

    name: str
    note: str
    compress: Command
    decompress: Command | None
    suffix: str
    verify: Callable[[Path], list[str]] | None = None
    memory: float = 0
    slow: bool = False
    """Slower than 200 MB/s: left out for files above a gigabyte."""


@dataclass(slots=True)
class Environment:
    """The peers' environment: its Python (None if it could not be made), versions, and why a peer is missing."""

    python: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def worker(self, *arguments: object) -> list[str]:
        """The command line of ``peer_worker.py``."""
        return [str(self.python), str(_WORKER), *map(str, arguments)]


def cache_folder() -> Path:
    """Where the environment is kept from one run to the next."""
    chosen = os.environ.get("DF11_BENCHMARK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "df11-benchmarks"


def prepare(report: Callable[[str], None]) -> Environment:
    """Make the environment, or find it, and see which peers can be run."""
    folder = cache_folder() / f"peers-{sys.version_info.major}.{sys.version_info.minor}"
    environment = Environment()
    python = folder / "bin" / "python"
    if not python.exists():
        report(f"making the peers' environment in {folder}")
        if problem := _run([sys.executable, "-m", "venv", str(folder)]):
            environment.missing = dict.fromkeys([*PEERS, "zstd"], f"no virtual environment: {problem}")
            return environment
    environment.python = python
    if problem := _install(python, PLAIN, dependencies=True):
        environment.missing["zstd"] = problem
    no_torch = _install(python, [os.environ.get("DF11_BENCHMARK_TORCH", TORCH)], dependencies=True)
    for name, requirements in PEERS.items():
        problem = _install(python, requirements, dependencies=False)
        if not problem and no_torch and name in NEEDS_TORCH:
            problem = f"it needs a torch for the CPU: {no_torch}"
        if not problem:
            problem = _try(environment, name)
        if problem:
            environment.missing[name] = problem
            report(f"{name} is missing: {problem}")
    answer = subprocess.run(environment.worker("versions"), capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        environment.versions = json.loads(answer.stdout)
    return environment


def _install(python: Path, requirements: list[str], *, dependencies: bool) -> str:
    # Empty if the requirements are there now, else the reason.
    options = ["--quiet", "--disable-pip-version-check", "--only-binary", ":all:"] + ([] if dependencies else ["--no-deps"])
    problem = _run([str(python), "-m", "pip", "install", *options, *requirements])
    if problem:  # a package without a wheel
        problem = _run([str(python), "-m", "pip", "install", *options[:2], *options[4:], *requirements]) if not dependencies else problem
    return problem


def _try(environment: Environment, name: str) -> str:
    # Empty if the peer works on a few weights.
    sample = cache_folder() / "sample.bin"
    sample.write_bytes(b"".join(synthetic.gaussian(Tensor("sample", "BF16", (256, 1024)))))
    problem = _run(environment.worker(f"{name}-core", sample, 1))
    sample.unlink()
    return problem


def _run(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode == 0:
        return ""
    lines = [line for line in (process.stderr or process.stdout).strip().splitlines() if "WARNING" not in line]
    errors = [line for line in lines if "ERROR" in line or "Error" in line]
    return (errors or lines or [f"exit code {process.returncode}"])[-1][-300:]


def tools(environment: Environment, jobs: int) -> list[Tool]:
    """Everything that can be run, df11 first. All use ``jobs`` threads where they can be told."""
    found = [
        Tool(
            name="df11",
            note="every record decoded and compared; SHA-256 of the source; XXH3 of all that is stored and decoded; restore proves the SHA-256",
            compress=lambda source, target: measure.df11("convert", source, target, "-j", jobs, "--quiet"),
            decompress=lambda source, target: measure.df11("restore", source, target, "-j", jobs, "--quiet"),
            suffix=".df11",
            verify=lambda path: measure.df11("verify", path, "-j", jobs, "--quiet"),
        ),
        Tool(
            name="df11 --no-verify",
            note="the same without decoding what is written",
            compress=lambda source, target: measure.df11("convert", source, target, "-j", jobs, "--no-verify", "--quiet"),
            decompress=None,
            suffix=".df11",
        ),
    ]
    python = environment.python
    if python and "lmzip" not in environment.missing:
        lmz = str(python.with_name("lmz"))
        found.append(_lmzip("lmzip", "rANS; CRC-32", lmz, ["-j", str(jobs)], []))
        found.append(_lmzip("lmzip --mapped", "its layout that can be read in blocks, as GPUs need it", lmz, ["-j", str(jobs)], ["--mapped"]))
    if python and "zipnn" not in environment.missing:
        found.append(_worker_tool(environment, "zipnn", "Huffman; no checksum; whole file in memory; imports torch", ".znn", memory=4))
    if python and "zstd" not in environment.missing:
        found.append(_worker_tool(environment, "zstd", "level 3, all cores to compress, its own checksum; knows nothing of BF16", ".zst"))
    if shutil.which("cp") and shutil.which("sync"):
        found.append(Tool("cp + fsync", "a copy", copy_command, None, ".copy"))
    return found


def _lmzip(name: str, note: str, program: str, threads: list[str], options: list[str]) -> Tool:
    return Tool(
        name=name,
        note=note,
        compress=lambda source, target: [program, "compress", "-f", "-q", *threads, *options, str(source), str(target)],
        decompress=lambda source, target: [program, "decompress", "-f", "-q", *threads, str(source), str(target)],
        suffix=".lmz",
        slow=bool(options),
    )


def _worker_tool(environment: Environment, name: str, note: str, suffix: str, memory: float = 0) -> Tool:
    return Tool(
        name=name,
        note=note,
        compress=lambda source, target: environment.worker(f"{name}-compress", source, target),
        decompress=lambda source, target: environment.worker(f"{name}-decompress", source, target),
        suffix=suffix,
        memory=memory,
    )


def copy_command(source: Path, target: Path) -> list[str]:
    """``cp`` of one file, and its bytes forced to the disk."""
    return ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(target)]


def names(found: Iterable[Tool]) -> str:
    """Names for people."""
    return ", ".join(tool.name for tool in found)
