"""Let df11 compile its kernels before anything is measured: the first run on a machine would pay for it, no later one does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import measure, safetensors_file, synthetic
from benchmarks.safetensors_file import Tensor


def compile_kernels(folder: Path) -> None:
    """Convert, verify and restore small BF16 and F32 files below ``folder``."""

    def fill(tensor: Tensor) -> Iterator[memoryview]:
        yield memoryview(synthetic.generator(tensor.name).standard_normal(tensor.elements, dtype=np.float32))

    with tempfile.TemporaryDirectory(dir=folder) as name:
        source, target, restored = (Path(name, folder) for folder in ("source", "target", "restored"))
        synthetic.write_gaussian(source / "bf16.safetensors", 2_000_000)
        safetensors_file.write(source / "f32.safetensors", [Tensor("weight", "F32", (1001, 1000))], fill)
        measure.run(measure.df11("convert", source, target, "--cast", "bf16", "--quiet"))
        measure.run(measure.df11("verify", target, "--against", source, "--quiet"))
        measure.run(measure.df11("restore", target / "bf16.df11", restored, "--quiet"))
