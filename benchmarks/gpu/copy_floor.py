"""The floor under every decoder: a kernel that only reads the stored bytes and writes two bytes per weight.

No decoder can be faster than the memory. ``CopyFloor`` moves both amounts in the proportion of the decoder, evenly
mixed from the first tile to the last, with accesses of 16 bytes, adjacent within a warp, and several loads per thread
in flight. The loaded values are combined by exclusive or and stored, so that no load can be optimized away; ``model``
says what must come out.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.timing import Call, Timing, cupy_stream, time_kernel

VECTOR: Final = 16
"""Bytes per access."""
_LINE: Final = 8  # vectors in 128 bytes
_MOST_TILES: Final = 2**31 - 1

# A block writes a tile with UNROLL stores per thread. LOADS is the number of loads that a thread needs for its part of
# the stored bytes.
SOURCE: Final = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

#if STREAMING
#define LOAD(from) __ldcs(from)
#define STORE(to, value) __stcs(to, value)
#else
#define LOAD(from) __ldg(from)
#define STORE(to, value) (*(to) = (value))
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
copy_floor(const uint4* __restrict__ in, uint4* __restrict__ out, u64 in_vectors, u64 out_vectors, u32 tile_vectors,
           u32 tiles) {
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u64 first = (u64)tile * tile_vectors;
        const u64 last = min(first + tile_vectors, in_vectors);
        uint4 values[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const u64 at = first + i * THREADS + threadIdx.x;
            values[i] = at < last ? LOAD(in + at) : make_uint4(0, 0, 0, 0);
        }
        uint4 fold = values[0];
#pragma unroll
        for (int i = 1; i < LOADS; ++i) {
            fold.x ^= values[i].x;
            fold.y ^= values[i].y;
            fold.z ^= values[i].z;
            fold.w ^= values[i].w;
        }
        const u64 target = (u64)tile * (THREADS * UNROLL) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            if (target + i * THREADS < out_vectors) STORE(out + target + i * THREADS, fold);
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """``unroll``: 16-byte stores per thread and tile. ``threads``: per block. ``streaming``: no reuse expected.

    ``persistent``: as many blocks as fit on the GPU at once take tile after tile; otherwise there is a block per tile.
    """

    unroll: int = 4
    threads: int = 256
    streaming: bool = True
    persistent: bool = True


SHAPES: Final = tuple(
    itertools.starmap(Shape, itertools.product((1, 2, 4, 8), (256, 512), (True, False), (True, False)))
)
"""What ``tune`` tries."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch for given sizes.

    ``tiles``; ``tile_vectors``: vectors of 16 bytes read for a tile; ``loads``: of a thread for a tile.
    """

    tiles: int
    tile_vectors: int
    loads: int


def launch_for(stored_bytes: int, weights: int, shape: Shape) -> Launch:
    """Spread the reads over the tiles, each part in whole lines of 128 bytes.

    Sizes must be whole vectors: 16 bytes, 8 weights.
    """
    if stored_bytes <= 0 or weights <= 0 or stored_bytes % VECTOR or 2 * weights % VECTOR:
        raise ValueError(f"stored bytes must be a multiple of 16, weights one of 8, not {stored_bytes} and {weights}")
    tiles = -(-2 * weights // (VECTOR * shape.threads * shape.unroll))
    tile_vectors = -(-stored_bytes // (VECTOR * tiles * _LINE)) * _LINE
    if tiles > _MOST_TILES:
        raise ValueError(f"too many weights: {weights}")
    return Launch(tiles, tile_vectors, -(-tile_vectors // shape.threads))


def model(stored: npt.NDArray[np.uint8], weights: int, shape: Shape) -> npt.NDArray[np.uint16]:
    """What the kernel must write, u16 [weights], for these stored bytes."""
    launch = launch_for(stored.size, weights, shape)
    values = np.zeros((launch.tiles * launch.tile_vectors, VECTOR), np.uint8)
    values[: stored.size // VECTOR] = stored.reshape(-1, VECTOR)
    padded = np.zeros((launch.tiles, launch.loads * shape.threads, VECTOR), np.uint8)
    padded[:, : launch.tile_vectors] = values.reshape(launch.tiles, launch.tile_vectors, VECTOR)
    folds = np.bitwise_xor.reduce(padded.reshape(launch.tiles, launch.loads, shape.threads, VECTOR), axis=1)
    return np.repeat(folds[:, None], shape.unroll, axis=1).reshape(-1).view(np.uint16)[:weights]


class CopyFloor:
    """The kernel on a device (a torch device, its index or name)."""

    def __init__(self, device: Any = "cuda", shape: Shape | None = None) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._cupy: Any = importlib.import_module("cupy")
        device = self._torch.device(device)
        self.device: Any = self._torch.device(
            "cuda", self._torch.cuda.current_device() if device.index is None else device.index
        )
        self.shape = shape or Shape()
        self._launches: dict[tuple[int, int], tuple[Any, int, tuple[Any, ...]]] = {}

    def run(self, stored: Any, out: Any) -> None:
        """Read all of ``stored``, torch.uint8, and write all of ``out``, torch.bfloat16, on torch's current stream.

        Does not wait. Both must be contiguous and aligned to 16 bytes, as torch allocates them.
        """
        addresses = stored.data_ptr(), out.data_ptr()
        if any(address % VECTOR for address in addresses) or not stored.is_contiguous() or not out.is_contiguous():
            raise ValueError("buffers must be contiguous and aligned to 16 bytes")
        sizes = stored.numel(), out.numel()
        with self._cupy.cuda.Device(self.device.index), cupy_stream(self.device):
            if sizes not in self._launches:
                self._launches[sizes] = self._prepare(*sizes)
            kernel, blocks, numbers = self._launches[sizes]
            kernel((blocks,), (self.shape.threads,), (*addresses, *numbers))

    def _prepare(self, stored_bytes: int, weights: int) -> tuple[Any, int, tuple[Any, ...]]:
        shape, launch = self.shape, launch_for(stored_bytes, weights, self.shape)
        values = {
            "THREADS": shape.threads,
            "UNROLL": shape.unroll,
            "LOADS": launch.loads,
            "STREAMING": int(shape.streaming),
        }
        kernel = self._cupy.RawKernel(
            SOURCE, "copy_floor", tuple(f"-D{name}={value}" for name, value in values.items())
        )
        blocks = launch.tiles
        if shape.persistent:
            resident = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                kernel.kernel.ptr, shape.threads, 0
            )
            blocks = min(blocks, resident * self._torch.cuda.get_device_properties(self.device).multi_processor_count)
        numbers = (
            np.uint64(stored_bytes // VECTOR),
            np.uint64(2 * weights // VECTOR),
            np.uint32(launch.tile_vectors),
            np.uint32(launch.tiles),
        )
        return kernel, blocks, numbers


def tune(stored: Any, out: Any, repeats: int = 20) -> tuple[CopyFloor, dict[Shape, Timing]]:
    """Try every shape on these buffers; returns the fastest by its median, and all timings."""
    floors = {shape: CopyFloor(out.device, shape) for shape in SHAPES}
    timings = {shape: time_kernel(_call(floor, stored, out), repeats=repeats) for shape, floor in floors.items()}
    return floors[min(timings, key=lambda shape: timings[shape].median)], timings


def _call(floor: CopyFloor, stored: Any, out: Any) -> Call:
    return lambda: floor.run(stored, out)
