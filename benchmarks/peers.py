"""The programs that df11 is compared with, in their own environment: ``build/bench/peers-<Python>``, made once.

lmzip takes turns with df11. zipnn and zstd are there for their sizes alone: zipnn is much slower
(results/2026-11-23-cpu.md), and zstd does not know BF16.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import results
from benchmarks.harness import Program, say

PACKAGES: Final = ("lmzip==1.3.0", "zipnn==0.5.4", "zstandard", "numpy", "safetensors")

# zipnn imports torch for tensors. Its byte coder does not need it: a stand-in saves a gigabyte.
_ZIPNN: Final = """
import sys, pathlib, unittest.mock
sys.modules["torch"] = unittest.mock.MagicMock()
import zipnn
data = bytearray(pathlib.Path(sys.argv[1]).read_bytes())
coder = zipnn.ZipNN(bytearray_dtype=sys.argv[3], input_format="byte")
pathlib.Path(sys.argv[2]).write_bytes(coder.compress(data))
"""
_ZSTD: Final = """
import sys, zstandard
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    zstandard.ZstdCompressor(level=3, threads=-1, write_checksum=True).copy_stream(source, target)
"""
_VERSIONS: Final = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True)
class Peers:
    """The peers' Python, or None without one, and their versions."""

    python: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def lmzip(self, *arguments: object, output: Path | None = None) -> list[Program]:
        """A command of lmzip as a list; empty without lmzip."""
        if self.python is None:
            return []
        return [Program("lmzip", [str(self.python.with_name("lmz")), *map(str, arguments)], output)]

    def smallest(self, source: Path, target: Path, dtype: str | None = "bfloat16") -> list[Program]:
        """All programs that can tell the size of a file of a dtype, as zipnn calls it, compressed; None: no zipnn."""
        if self.python is None:
            return []
        programs = self.lmzip("compress", "-q", "-f", source, target, output=target)
        mapped = self.lmzip("compress", "-q", "-f", "--mapped", source, target)[0].command
        programs.append(Program("lmzip --mapped", mapped, target))
        for name, code in (("zipnn", _ZIPNN), ("zstd -3", _ZSTD))[dtype is None :]:
            programs.append(Program(name, [str(self.python), "-c", code, str(source), str(target), str(dtype)], target))
        return programs


def prepare() -> Peers:
    """Make or find the environment. Raises RuntimeError if that fails."""
    place = results.BUILD / f"peers-{sys.version_info.major}.{sys.version_info.minor}"
    python, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists() or ready.read_text() != " ".join(PACKAGES):
        say(f"making the peers' environment in {place}")
        _run([sys.executable, "-m", "venv", "--clear", str(place)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PACKAGES])
        ready.write_text(" ".join(PACKAGES))
    names = [package.partition("==")[0] for package in PACKAGES]
    return Peers(python, json.loads(_run([str(python), "-c", _VERSIONS, *names])))


def _run(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        lines = (process.stderr.strip() or process.stdout.strip() or "no output").splitlines()
        raise RuntimeError(f"{' '.join(command[:4])}: {lines[-1]}")
    return process.stdout
