"""What can be missing between a user and the GPU: each gives one clear line."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from df11 import runtime
from df11.formats import errors, layout, reference
from df11.runtime import gpu, kernels
from df11.runtime.kernels import DECODE, DECODE_SMALL, Range, worked
from tests.support.cuda.device import STREAM, emulate
from tests.support.cuda.emulator import Library
from tests.vectors import forge, make_kinds, worked_example

CUDA = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU, as seen by torch; each test breaks one thing."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(name="A GPU", multi_processor_count=132)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu, "_gpus", {})
    monkeypatch.setattr(gpu, "_is_installed", lambda name: name == "cupy-cuda12x")
    return SimpleNamespace(cupy=lambda module: monkeypatch.setitem(sys.modules, "cupy", module))


def refused(device: str | torch.device = "cuda") -> errors.Df11Error:
    with pytest.raises(errors.Df11Error) as caught:
        runtime.warm_up(device)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_gpus", {})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(refused())


@pytest.mark.usefixtures("a_gpu")
def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused()
    assert "no driver" in str(error)
    assert "device='cpu'" in str(error)


@pytest.mark.usefixtures("a_gpu")
def test_no_such_device() -> None:
    assert "there is no device cuda:1" in str(refused("cuda:1"))


@pytest.mark.usefixtures("a_gpu")
def test_too_old_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "A GPU is too old (expected compute capability 8.0 or higher, found 7.5)" in str(refused())


def test_no_cupy(a_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu.cupy(None)
    monkeypatch.setattr(gpu, "_is_installed", lambda _name: False)
    assert "'cupy' is not installed; run: pip install 'df11[cuda12]'" in str(refused())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "pip install 'df11[cuda13]'" in str(refused())


@pytest.mark.usefixtures("a_gpu")
def test_two_builds_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_is_installed", lambda name: name.startswith("cupy-cuda1"))
    error = refused()
    assert "cupy-cuda12x, cupy-cuda13x" in str(error)
    assert "uninstall" in str(error)


def test_cupy_cannot_be_imported(a_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "cupy":
                raise ImportError("libcudart.so.12: cannot open shared object file\nand more")

    a_gpu.cupy(ModuleType("cupy"))
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "CuPy cannot be imported: libcudart.so.12" in str(refused())


@pytest.mark.parametrize(
    ("log", "said", "remedy"),
    [
        ("nvrtc: error: invalid value for --gpu-architecture", "invalid value", "update the driver"),
        (
            'cuda_fp16.h(144): catastrophic error: cannot open source file "vector_types.h"',
            "vector_types.h",
            "no headers of CUDA: pip install 'cupy-cuda12x[ctk]>=14', or set CUDA_PATH",
        ),
        (
            "nvrtc: error: failed to open libnvrtc-builtins.so.12.9.",
            "builtins.so.12.9",
            "no libnvrtc-builtins: pip install 'cupy-cuda12x[ctk]>=14', or put its folder on LD_LIBRARY_PATH",
        ),
    ],
)
def test_kernels_that_do_not_compile(a_gpu: SimpleNamespace, log: str, said: str, remedy: str) -> None:
    def fail() -> None:
        raise RuntimeError(f"\n{log}\nmore")

    class Device:
        def __init__(self, _index: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    module = SimpleNamespace(get_function=lambda _name: SimpleNamespace(compile=fail))
    a_gpu.cupy(SimpleNamespace(RawModule=lambda **_: module, cuda=SimpleNamespace(Device=Device)))
    error = refused()
    assert isinstance(error, errors.DeviceError)
    assert "do not compile or load on A GPU" in str(error)
    assert said in str(error)
    assert remedy in str(error)


@pytest.mark.usefixtures("a_gpu")
def test_first_use_within_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "warm_up(device, dtype) first" in str(refused())


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    with (
        pytest.raises(
            errors.BudgetError, match=r"too little memory on cuda:0 \(expected 5,000 bytes, found 1,000 free\)"
        ),
        gpu.enough_memory(CUDA, 5000),
    ):
        raise torch.OutOfMemoryError
    assert errors.BudgetError.exit_code == 6
    with (
        pytest.raises(errors.BudgetError, match="too little memory on cpu"),
        gpu.enough_memory(torch.device("cpu"), 1 << 60),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), gpu.enough_memory(CUDA, 1):
        raise RuntimeError("something else")


def test_a_device_without_a_decoder() -> None:
    assert "cannot be decoded on the device mps" in str(refused("mps"))


def test_installed_builds_are_found_by_their_metadata() -> None:
    assert gpu._is_installed("numpy")
    assert not gpu._is_installed("cupy-cuda99x")
    assert metadata.version("numpy")


# The first use of a device. On the emulator, which checks that each kernel has been launched by then.


def test_each_kernel_decodes_the_worked_record_of_the_specification() -> None:
    assert worked.RECORDS["BF16"] == worked_example.RECORD
    assert worked.weights(layout.BF16) == worked_example.WEIGHTS
    assert len(worked_example.RECORD) == 512


@pytest.mark.parametrize("kind", make_kinds.KINDS, ids=lambda kind: kind.dtype)
def test_the_worked_record_of_each_other_kind(kind: layout.Kind) -> None:
    weights, record = worked.weights(kind), worked.RECORDS[kind.dtype]
    assert (weights, record) == (worked_example.other_weights(kind), worked_example.other_record(kind))
    assert reference.decode_record(record, 511, kind.dtype) == forge.u16s(weights, kind)
    assert len(record) < 2000


def test_kernels_are_compiled_and_proven_at_the_first_use_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, cupy = emulate(monkeypatch)
    record = torch.tensor(list(worked.RECORDS["F32"]), dtype=torch.uint8)
    out = torch.zeros(511, dtype=torch.int32)
    whole = Range(record.data_ptr(), len(record), 511, 1 << 21, 0, 511, out.data_ptr(), kind=layout.F32)
    for _ in range(2):
        emulated.decode([whole])
    assert cupy.compiled == {(dtype, name) for dtype in ("BF16", "F32") for name in kernels.THREADS}
    assert [name for name, _, _ in cupy.launches] == [*kernels.THREADS, DECODE, DECODE]
    assert out.numpy().view(np.uint32).tolist() == worked.weights(layout.F32)
    monkeypatch.setattr(emulated, "device", CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    emulated.prepare(layout.F32)
    with pytest.raises(errors.UsageError, match=r"warm_up\(device, dtype\) first"):
        emulated.prepare(layout.F16)


@pytest.mark.parametrize("kind", layout.KINDS.values(), ids=lambda kind: kind.dtype)
@pytest.mark.parametrize("kernel", kernels.THREADS)
@pytest.mark.parametrize("wrong", ["weights", "status"])
def test_a_device_that_decodes_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: layout.Kind, kernel: str, wrong: str
) -> None:
    emulated, _ = emulate(monkeypatch)
    emulated._functions.clear()
    launch = Library.launch

    def spoil(self: Library, name: str, grid: int, block: int, *arguments: Any, **options: Any) -> None:
        launch(self, name, grid, block, *arguments, **options)
        output = arguments[0]["range"]["output"][0, 0] if name != kernels.GATHER_ROWS else arguments[0]["output"][0]
        if name == kernel:
            ctypes.c_uint8.from_address(int(output) + 200 if wrong == "weights" else int(arguments[-1])).value ^= 1

    monkeypatch.setattr(Library, "launch", spoil)
    for _ in range(2):
        with pytest.raises(errors.DeviceError, match=rf"{kernel} decodes {kind.dtype} wrongly on none; use device='cp"):
            emulated.prepare(kind)
        emulated.status.zero_()


def test_a_device_first_used_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        emulated, _ = emulate(monkeypatch)
    emulated.status.fill_(4)
    with pytest.raises(errors.TileError):
        emulated.check_errors()
    emulated.check_errors()


def test_a_launch_is_on_torchs_stream_and_on_the_device_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, cupy = emulate(monkeypatch)
    record, out = torch.tensor(list(worked.RECORDS["BF16"]), dtype=torch.uint8), torch.zeros(257, dtype=torch.int16)
    whole = Range(record.data_ptr(), 512, 257, 1 << 21, 0, 257, out.data_ptr())
    for current in (0, 1):
        cupy.devices[0] = current
        emulated.decode([whole])
        assert cupy.devices == [current]
    assert cupy.launches == [(DECODE, 1, STREAM)] * 2


# Launches.


def a_range(first: int, last: int, segment_elements: int = 8192 * 4) -> Range:
    return Range(0x1000, 64, 300 * 8192 * 4, segment_elements, first, last, 0x2000)


def test_each_tile_has_its_block() -> None:
    # What decode.cu does with the numbers: block -> segment, tiles. Over all blocks, each tile of the range comes up
    # once.
    for segment_tiles in (1, 3, 4, 256):
        for tiles in (1, 2, 8, 32):
            for first, last in ((0, 1), (0, 8192), (5, 8193), (100_000, 300_000), (8192 * 3, 8192 * 9)):
                elements = segment_tiles * layout.TILE_WEIGHTS
                (table, count, per_block), blocks = kernels.pack([a_range(first, last, elements)], tiles)
                assert (count, per_block) == (1, tiles)
                assert table["range"][0, 0]["first_block"] == 0
                blocks_per_segment = -(-segment_tiles // tiles)  # The record has more tiles than a segment.
                covered = [
                    segment * segment_tiles + tile
                    for block in range(blocks)
                    for segment in [first // elements + block // blocks_per_segment]
                    for tile in range(
                        block % blocks_per_segment * tiles, min((block % blocks_per_segment + 1) * tiles, segment_tiles)
                    )
                ]
                assert len(covered) == len(set(covered))
                assert set(range(first // 8192, (last - 1) // 8192 + 1)) <= set(covered)
                assert blocks <= ((last - 1) // elements - first // elements + 1) * blocks_per_segment


def test_blocks_of_several_ranges_follow_one_another() -> None:
    (table, count, _), blocks = kernels.pack([a_range(0, 8192 * 8), a_range(5, 5), a_range(0, 1)], 2)
    assert count == 2
    assert table["range"][0]["first_block"][:2].tolist() == [0, 4]
    assert blocks == 6
    assert kernels.pack([a_range(7, 7)], 8)[1] == 0


@pytest.mark.parametrize("kernel", [DECODE, DECODE_SMALL])
def test_tiles_of_a_block(kernel: str) -> None:
    warps = kernels.THREADS[kernel] // 32
    chosen = [kernels.tiles_per_block(kernel, tiles, 132) for tiles in (1, 100, 3150, 12_700, 40_000, 10**6)]
    assert chosen == sorted(chosen)
    assert chosen[0] == warps
    assert chosen[-1] == 4 * warps
