"""Timing on the GPU, and what the programs that are timed have in common.

Two ways, of which neither tells all:

* ``time_kernel``: one call between two events, after the second-level cache was overwritten. All that the call reads comes from memory; what
  it writes can stay in the cache, but first the bytes that the overwriting left there must go. An event pair with nothing between takes
  about as long as the shortest kernel: ``time_kernel(lambda _: None)`` says how long.
* ``time_graph``: many calls in one CUDA graph, one behind the other as in a model, without gaps of launching, which count for small sizes.
  The cache is cold if the calls rotate through so many buffers that it holds none until its turn: ``buffers_needed``.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from df11.runtime import gpu

CACHES: Final = 2
"""The second-level cache counts as emptied after so many times its bytes."""
_HEAD_START: Final = 200_000
"""Clock cycles, about 0.1 ms, for which the GPU waits, so that the calls are queued when their turn comes."""

Call = Callable[[int], object]
"""What is timed: gets the number of the buffers to use, 0 to rotation - 1, and starts work on torch's current stream without waiting for it."""


class MissingPeerError(RuntimeError):
    """A peer is not installed, or does not work on this machine; the text is one line."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, the least and the most of so many samples."""

    median: float
    minimum: float
    maximum: float
    samples: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Of the seconds of the samples."""
        values = sorted(seconds)
        return cls(statistics.median(values), values[0], values[-1], len(values))

    def bandwidth(self, size: int) -> float:
        """Bytes a second by the median, if a call moves ``size`` bytes."""
        return size / self.median


def time_kernel(function: Call, *, rotation: int = 1, warmup: int = 3, repeats: int = 50, flush: bool = True) -> Timing:
    """Time single calls with events; without ``flush`` on whatever the call before left in the cache."""
    torch: Any = importlib.import_module("torch")
    for i in range(warmup):
        function(i % rotation)
    cache = torch.empty(CACHES * cache_bytes() if flush else 0, dtype=torch.uint8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(pairs):
        if flush:
            cache.fill_(i & 255)
        torch.cuda._sleep(_HEAD_START)
        start.record()
        function(i % rotation)
        end.record()
    torch.cuda.synchronize()
    return Timing.of(start.elapsed_time(end) / 1e3 for start, end in pairs)


def time_graph(function: Call, *, rotation: int = 1, calls: int = 20, warmup: int = 3, repeats: int = 20) -> Timing:
    """Time calls in a graph: each sample is the mean of ``calls`` calls (rounded up to whole rotations), the next sample follows at once.

    The function must do the same at every call and neither wait for the GPU nor allocate with anything but torch.
    """
    torch: Any = importlib.import_module("torch")
    calls = -(-calls // rotation) * rotation
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(1, warmup)):
            function(i % rotation)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            function(i % rotation)
    graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return Timing.of(start.elapsed_time(end) / 1e3 / calls for start, end in pairs)


def cache_bytes() -> int:
    """Size of the second-level cache of the current device."""
    torch: Any = importlib.import_module("torch")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def buffers_needed(bytes_per_call: int, cache: int) -> int:
    """How many buffers a rotation must have, so that twice the cache is moved between two uses of one. ``bytes_per_call``: read and written."""
    return -(-CACHES * cache // bytes_per_call) + 1


def cupy_stream(device: Any) -> Any:
    """Torch's current stream of a torch device, for ``with``: what CuPy launches inside goes there. The device must be CuPy's current one."""
    return gpu.current_stream(importlib.import_module("cupy"), device)
