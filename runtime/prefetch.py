"""Decode the next weight while the product with this one runs.

Decoding takes a side stream and two buffers in turn. The order of the weights is learnt as the model runs. A buffer is
decoded into only after the product that last read it; a product waits until its buffer is ready. Anything out of order
is decoded on demand: calls from another thread, with gradients, or within a graph capture or a compilation.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

import torch

BUFFERS: Final = 2


class Streams(Protocol):
    """What prefetching needs of a device; ``CudaStreams`` is the real one."""

    def usable(self) -> bool:
        """Whether work may be put on a side stream now."""

    def current(self) -> Any:
        """The stream that the caller's work goes to."""

    def side(self) -> AbstractContextManager[Any]:
        """For ``with``: make the side stream the current one, and give it."""

    def event(self) -> Any:
        """An event with ``record(stream)`` and ``wait(stream)``: the stream waits for the latest recording, if any."""


class CudaStreams:
    """The streams of a CUDA device, and a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def usable(self) -> bool:
        """Not while a graph is captured: a capture must not leave work on another stream."""
        return not torch.cuda.is_current_stream_capturing()

    def current(self) -> torch.cuda.Stream:
        """torch's current stream on the device."""  # noqa: D403
        return torch.cuda.current_stream(self._device)

    @contextmanager
    def side(self) -> Iterator[torch.cuda.Stream]:
        """The side stream."""
        with torch.cuda.stream(self._side):
            yield self._side

    def event(self) -> torch.cuda.Event:
        """A CUDA event."""
        return torch.cuda.Event()


class PrefetchSource(Protocol):
    """A weight that can be decoded and never changes: a compressed tensor."""

    @property
    def elements(self) -> int:
        """Its weights."""

    def decode_ahead(self, out: torch.Tensor) -> None:
        """Launch its decoding on the current stream, into BF16 [elements]."""


class _Buffer:
    def __init__(self, memory: torch.Tensor, streams: Streams) -> None:
        self.memory = memory
        self.ready = streams.event()  # Recorded when it has been decoded into.
        self.free = streams.event()  # Recorded when its product has been launched.
        self.holds: weakref.ref[PrefetchSource] | None = None


class Prefetcher:
    """Two buffers of ``weights`` BF16 weights each on a device, and the learnt order of the sources."""

    def __init__(self, weights: int, device: torch.device, streams: Streams) -> None:
        self._streams = streams
        self._weights = weights
        self._buffers = [
            _Buffer(torch.empty(weights, dtype=torch.bfloat16, device=device), streams) for _ in range(BUFFERS)
        ]
        self._turn = 0
        self._next: weakref.WeakKeyDictionary[PrefetchSource, weakref.ref[PrefetchSource]] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[PrefetchSource] | None = None
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        current = streams.current()
        with streams.side() as side:
            for buffer in self._buffers:
                buffer.free.record(current)  # Work on this memory by its previous owner may still be running.
                if buffer.memory.is_cuda:
                    buffer.memory.record_stream(side)

    @property
    def scratch(self) -> int:
        """Bytes of the buffers."""
        return 2 * self._weights * BUFFERS

    @contextmanager
    def weight(self, source: PrefetchSource) -> Iterator[torch.Tensor | None]:
        """The decoded weight of a source, BF16 [elements]. Launch its use within ``with``, on the current stream.

        The buffer is reused afterwards. Gives None if the caller must decode the weight itself.
        """
        elements = source.elements
        if elements > self._weights or not self._streams.usable() or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            buffer = self._take(source, elements)
            try:
                yield buffer.memory[:elements]
            finally:
                buffer.free.record(self._streams.current())
            self._start_next(source)
        finally:
            self._lock.release()

    def _take(self, source: PrefetchSource, elements: int) -> _Buffer:
        current = self._streams.current()
        last = self._last() if self._last is not None else None
        if last is not None:
            self._next[last] = weakref.ref(source)
        self._last = weakref.ref(source)
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % BUFFERS
        buffer.ready.wait(current)  # Even if it holds another weight: that decoding must end before we overwrite it.
        if buffer.holds is not None and buffer.holds() is source:
            self.hits += 1
        else:
            self.misses += 1
            buffer.free.wait(current)
            source.decode_ahead(buffer.memory[:elements])
        buffer.holds = None  # Good for one product: a weight that is used again is decoded again.
        return buffer

    def _start_next(self, source: PrefetchSource) -> None:
        reference = self._next.get(source)
        following = reference() if reference is not None else None
        if following is None:
            return
        elements = following.elements
        buffer = self._buffers[self._turn]
        with self._streams.side() as side:
            buffer.free.wait(side)  # Recorded after the record has come and has been used once.
            following.decode_ahead(buffer.memory[:elements])
            buffer.ready.record(side)
        buffer.holds = weakref.ref(following)
