"""A GPU that is the processor: the runtime's own host code, and the real decode.cu run by the emulator, in this process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from df11.runtime import kernels
from df11.runtime.gpu import Gpu
from tests.cuda.emulator import Library

KERNEL_TABLE = Path(__file__).with_name("decode_kernels.h")


class EmulatedGpu(Gpu):
    """Launches at once, in the processor's memory; every launch with another order of threads. ``launches`` says what was launched."""

    def __init__(self, seed: int = 0, multiprocessors: int = 2) -> None:
        self.device = torch.device("cpu")
        self.multiprocessors = multiprocessors
        self.status = torch.zeros(1, dtype=torch.int32)
        self.launches: list[tuple[str, int]] = []
        self._library = Library(kernels.SOURCE, KERNEL_TABLE)
        self._seeds = itertools.count(seed)

    def _launch(self, name: str, blocks: int, *arguments: Any) -> None:
        self.launches.append((name, blocks))
        self._library.launch(name, blocks, kernels.THREADS[name], *arguments, seed=next(self._seeds))
