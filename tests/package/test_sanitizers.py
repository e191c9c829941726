"""The extension under ASan and UBSan: what it checks, what it calls, and every hostile record and checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support import cpu_kernels

ROOT = cpu_kernels.ROOT
SUITES = (
    *("tests/formats/test_record.py", "tests/formats/test_vectors.py", "tests/formats/test_cpu_kernels.py"),
    "tests/converter/dfloat11/test_kernels.py",
)


def run(*command: str | Path, **variables: str) -> str:
    """Run a command that must succeed; returns its standard output."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def test_the_tests_of_formats_pass_under_sanitizers(tmp_path):
    package = tmp_path / "df11"
    package.mkdir()
    for room in ("converter", "formats", "pipelines", "runtime", "storage"):
        (package / room).symlink_to(ROOT / room)
    for path in (ROOT / "src" / "df11").glob("*.py"):
        (package / path.name).symlink_to(path)
    extension = package / "_kernels.abi3.so"
    sources = [ROOT / "src" / "df11" / "_kernels.c", *cpu_kernels.SOURCES[1:]]
    options = [*cpu_kernels.SANITIZERS, "-std=c11", "-O1", "-fPIC", "-shared", "-DPy_LIMITED_API=0x030B0000"]
    cpu_kernels.tool("gcc", "gcc")
    run("gcc", *options, f"-I{sysconfig.get_path('include')}", *sources, "-o", extension)
    sanitized = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONMALLOC": "malloc",  # so that buffers have red zones
        "LD_PRELOAD": run("gcc", "-print-file-name=libasan.so").strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # those of the interpreter
    }
    where = run(sys.executable, "-c", "import df11._kernels as kernels; print(kernels.__file__)", **sanitized)
    assert where.strip() == str(extension)
    # Tests that run other processes gain nothing from it; two others take long and cover what the rest does.
    others = (
        "not (no_byte or hashing or questions or too_far or says_so"
        " or the_same_with_portable or many_tiles or legal_code)"
    )
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", others)
    out = run(sys.executable, "-m", "pytest", *options, *SUITES, **sanitized)
    assert " passed" in out
