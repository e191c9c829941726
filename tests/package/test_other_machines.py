"""The CPU kernels on other machines: emulated on another kind of CPU, and refused where they would be wrong."""

from __future__ import annotations

import os
import subprocess

from tests.support import cpu_kernels


def test_aarch64_gives_the_same_bytes(tmp_path):
    compiler = cpu_kernels.tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    emulator = cpu_kernels.tool("qemu-aarch64", "qemu-user")
    program = cpu_kernels.build([compiler], tmp_path, "-O3", "-static")
    asked = cpu_kernels.questions(2)
    answers = cpu_kernels.run([emulator, program], [question for question, _ in asked])
    assert answers == b"".join(answer for _, answer in asked)


def test_a_big_endian_machine_is_refused_by_name(tmp_path):
    """Compiling for such a machine fails with the reason."""
    source = tmp_path / "kernels.c"
    source.write_text(f'#include "{cpu_kernels.ROOT}/formats/kernels.h"\n')
    compiler = os.environ.get("CC", "cc")
    swapped = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"]
    done = subprocess.run([compiler, "-fsyntax-only", *swapped, source], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "df11 needs a little-endian machine" in done.stderr
    subprocess.run([compiler, "-fsyntax-only", source], check=True)
