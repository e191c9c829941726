"""Timing on the GPU, and what the timed programs have in common.

``time_kernel`` times one call between two events, after the second-level cache was overwritten. All that the call reads
comes from memory. What it writes can stay in the cache, but the dirty bytes there must be evicted first. A pair of
events with nothing in between takes about as long as the shortest kernel: ``time_kernel(lambda: None)`` tells how long.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

CACHES: Final = 2
"""The second-level cache counts as overwritten after this many times its size."""
_HEAD_START: Final = 4_000_000
"""Clock cycles, about 2 ms, for which the GPU waits at least, so that all of a call is queued when its turn comes."""
_FASTEST_CLOCK: Final = 3e9
"""Cycles per second: no GPU has more."""

Call = Callable[[], object]
"""What is timed: launches work on torch's current stream without waiting for it."""


class MissingPeerError(RuntimeError):
    """A peer is not installed, or does not work on this machine; the text is one line."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: median, minimum and maximum of this many samples."""

    median: float
    minimum: float
    maximum: float
    samples: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """From the seconds of the samples."""
        values = sorted(seconds)
        return cls(statistics.median(values), values[0], values[-1], len(values))

    def bandwidth(self, size: int) -> float:
        """Bytes per second by the median, if a call moves ``size`` bytes."""
        return size / self.median


def time_kernel(function: Call, *, warmup: int = 3, repeats: int = 50) -> Timing:
    """Time single calls with events.

    The GPU waits before each for three times as long as the host took to queue the slowest, or small calls would time
    the host. (A CUDA graph would do as well, but not every peer can be captured.)
    """
    torch: Any = importlib.import_module("torch")
    queueing = []
    for turn in range(warmup + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if turn >= warmup:  # The first ones may compile and allocate.
            queueing.append(time.perf_counter() - start)
    head_start = max(_HEAD_START, int(3 * max(queueing) * _FASTEST_CLOCK))
    cache = torch.empty(CACHES * cache_bytes(), dtype=torch.uint8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for i, (begin, end) in enumerate(pairs):
        cache.fill_(i & 255)
        torch.cuda._sleep(head_start)
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return Timing.of(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def cache_bytes() -> int:
    """Size of the second-level cache of the current device."""
    torch: Any = importlib.import_module("torch")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def cupy_stream(device: Any) -> Any:
    """For ``with``: CuPy launches on torch's current stream of the device, which must be CuPy's current device."""
    torch: Any = importlib.import_module("torch")
    cupy: Any = importlib.import_module("cupy")
    pointer = torch.cuda.current_stream(device).cuda_stream
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and later, where the other one is deprecated.
        return cupy.cuda.Stream.from_external(_Handle(pointer))
    return cupy.cuda.ExternalStream(pointer)


class _Handle:
    # A stream of another library, wrapped for CuPy.
    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer
