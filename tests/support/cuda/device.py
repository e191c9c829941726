"""A GPU emulated on the CPU: all of the runtime's host code, and a stand-in for CuPy that runs the real decode.cu."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from df11.runtime import gpu, kernels, operators
from tests.support.cuda.emulator import Library

KERNEL_TABLE = Path(__file__).with_name("decode_kernels.h")
STREAM = 0x5EED


class StandInForCupy:
    """What df11 uses of CuPy. Launches run at once, in random order. ``launches``: kernel, blocks, stream."""

    def __init__(self, seed: int) -> None:
        self.launches: list[tuple[str, int, int]] = []
        # CuPy 14 has both of the last two, CuPy 13 only the last.
        stream = (
            SimpleNamespace(from_external=lambda handle: self._stream(handle.__cuda_stream__()[1]))
            if seed % 2
            else SimpleNamespace()
        )
        self.cuda = SimpleNamespace(Device=self._device, Stream=stream, ExternalStream=self._stream)
        self._current: list[int] = []
        self._library = Library(kernels.SOURCE, KERNEL_TABLE)
        self._seeds = itertools.count(seed)

    @contextmanager
    def _device(self, index: int) -> Iterator[None]:
        assert index == 0
        yield

    @contextmanager
    def _stream(self, pointer: int) -> Iterator[None]:
        self._current.append(pointer)
        yield
        self._current.pop()

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> SimpleNamespace:  # noqa: N802 - CuPy's name
        assert code == kernels.SOURCE.read_text(encoding="utf-8")
        assert options == kernels.NVRTC_OPTIONS

        def get_function(name: str) -> Any:
            def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
                self.launches.append((name, grid[0], self._current[-1]))
                self._library.launch(name, grid[0], block[0], *arguments, seed=next(self._seeds))

            launch.compile = lambda: None  # type: ignore[attr-defined]
            return launch

        return SimpleNamespace(get_function=get_function)


def emulate(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[gpu.Gpu, StandInForCupy]:
    """Make CPU tensors decode on an emulated GPU with two multiprocessors."""
    cupy = StandInForCupy(seed)
    monkeypatch.setattr(gpu, "check_device", lambda _device: None)
    monkeypatch.setattr(gpu, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(name="none", multi_processor_count=2)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=STREAM))
    emulated = gpu.Gpu(torch.device("cpu", 0))
    monkeypatch.setattr(operators, "decoder_of", lambda _device: emulated)
    return emulated, cupy
