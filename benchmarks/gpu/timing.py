"""Timing on the GPU, and what the programs that are timed have in common.

``time_kernel`` times one call between two events, after the second-level cache was overwritten. All that the call reads
comes from memory; what it writes can stay in the cache, but first the bytes that the overwriting left there must go. An
event pair with nothing between takes about as long as the shortest kernel: ``time_kernel(lambda: None)`` says how long.
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
_HEAD_START: Final = 4_000_000
"""Clock cycles, about 2 ms, for which the GPU waits, so that all of a call is queued when its turn comes: a host took
43 us for a launch, and 1.3 ms for the longest call, eleven launches."""

Call = Callable[[], object]
"""What is timed: starts work on torch's current stream without waiting for it."""


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


def time_kernel(function: Call, *, warmup: int = 3, repeats: int = 50) -> Timing:
    """Time single calls with events."""
    torch: Any = importlib.import_module("torch")
    for _ in range(warmup):
        function()
    cache = torch.empty(CACHES * cache_bytes(), dtype=torch.uint8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(pairs):
        cache.fill_(i & 255)
        torch.cuda._sleep(_HEAD_START)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return Timing.of(start.elapsed_time(end) / 1e3 for start, end in pairs)


def cache_bytes() -> int:
    """Size of the second-level cache of the current device."""
    torch: Any = importlib.import_module("torch")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def cupy_stream(device: Any) -> Any:
    """Torch's current stream of a torch device, for ``with``: what CuPy launches inside goes there. The device must be CuPy's current one."""
    return gpu.current_stream(importlib.import_module("cupy"), device)
