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

from df11.formats import layout
from df11.runtime import gpu, kernels, operators
from tests.support.cuda.emulator import Library

KERNEL_TABLE = Path(__file__).with_name("decode_kernels.h")
STREAM = 0x5EED


class StandInForCupy:
    """What df11 uses of CuPy. Launches run at once, in random order. ``launches``: kernel, blocks, stream.

    ``devices``: the current devices, that of torch first. ``compiled``: kernels, by dtype and name.
    """

    def __init__(self, seed: int) -> None:
        self.launches: list[tuple[str, int, int]] = []
        self.cuda = SimpleNamespace(Device=self._device)
        self.devices = [0]
        self.compiled: set[tuple[str, str]] = set()
        self._seeds = itertools.count(seed)

    @contextmanager
    def _device(self, index: int) -> Iterator[None]:
        self.devices.append(index)
        yield
        self.devices.pop()

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> SimpleNamespace:  # noqa: N802 - CuPy's name
        assert code == kernels.SOURCE.read_text(encoding="utf-8")
        [kind] = [kind for kind in layout.KINDS.values() if options == kernels.nvrtc_options(kind)]
        library = Library(kernels.SOURCE, KERNEL_TABLE, [f"-DDF11_KIND={kind.code}"])

        def get_function(name: str) -> SimpleNamespace:
            def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], *, stream: Any) -> None:
                assert self.devices[-1] == 0
                self.launches.append((name, grid[0], stream.ptr))
                library.launch(name, grid[0], block[0], *arguments, seed=next(self._seeds))

            return SimpleNamespace(compile=lambda: self.compiled.add((kind.dtype, name)), kernel=launch)

        return SimpleNamespace(get_function=get_function)


def emulate(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[gpu.Gpu, StandInForCupy]:
    """Make CPU tensors decode on an emulated GPU with two multiprocessors, ready for BF16."""
    cupy = StandInForCupy(seed)
    monkeypatch.setattr(gpu, "check_device", lambda _device: None)
    monkeypatch.setattr(gpu, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(name="none", multi_processor_count=2)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cupy.devices[0])
    emulated = gpu.Gpu(torch.device("cpu", 0))
    emulated.prepare(layout.BF16)
    assert cupy.compiled == {("BF16", name) for name in kernels.THREADS}
    assert {name for name, _, _ in cupy.launches} == set(kernels.THREADS)
    cupy.launches.clear()
    monkeypatch.setattr(operators, "decoder_of", lambda _device: emulated)
    return emulated, cupy
