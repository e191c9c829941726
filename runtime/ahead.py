"""Decode the next weight while the product with this one runs: on a side stream, into two buffers in turn, in the order learnt as the model runs.

A buffer is decoded into when its last product has been launched and the stream waits for that; a product waits for its buffer. Whoever comes out
of order, in another thread, with gradients, within a graph or a compilation, is served as without all this.
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
    """What is needed of a device; ``CudaStreams`` is the real one."""

    def usable(self) -> bool:
        """Whether work may be put on a side stream now."""

    def current(self) -> Any:
        """The stream that the caller's work goes to."""

    def side(self) -> AbstractContextManager[Any]:
        """For ``with``: make the side stream the current one, and give it."""

    def event(self) -> Any:
        """An event with ``record(stream)`` and ``wait(stream)``: the stream waits for the last recording, if there was one."""


class CudaStreams:
    """A CUDA device's streams, one of its own among them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def usable(self) -> bool:
        """A captured graph must not leave work on another stream behind."""
        return not torch.cuda.is_current_stream_capturing()

    def current(self) -> torch.cuda.Stream:
        """torch's current stream of the device."""  # noqa: D403
        return torch.cuda.current_stream(self._device)

    @contextmanager
    def side(self) -> Iterator[torch.cuda.Stream]:
        """The side stream."""
        with torch.cuda.stream(self._side):
            yield self._side

    def event(self) -> torch.cuda.Event:
        """A CUDA event."""
        return torch.cuda.Event()


class Source(Protocol):
    """A weight that can be decoded: a compressed module."""

    def elements_ahead(self) -> int:
        """Its weights."""

    def state_ahead(self) -> object:
        """Something that differs after its record has been replaced, moved or changed."""

    def decode_ahead(self, out: torch.Tensor) -> None:
        """Start to decode it on the current stream, into BF16 [elements]."""


class _Buffer:
    def __init__(self, memory: torch.Tensor, streams: Streams) -> None:
        self.memory = memory
        self.ready = streams.event()  # It has been decoded into.
        self.free = streams.event()  # Its product has been launched.
        self.holds: tuple[int, object] | None = None


class Ahead:
    """Two buffers of ``weights`` BF16 weights each on a device, and which source comes after which."""

    def __init__(self, weights: int, device: torch.device, streams: Streams) -> None:
        self._streams = streams
        self._weights = weights
        self._buffers = [
            _Buffer(torch.empty(weights, dtype=torch.bfloat16, device=device), streams) for _ in range(BUFFERS)
        ]
        self._began = streams.event()
        self._turn = 0
        self._next: weakref.WeakKeyDictionary[Source, weakref.ref[Source]] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Source] | None = None
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        current = streams.current()
        with streams.side() as side:
            for buffer in self._buffers:
                buffer.free.record(current)  # Whoever had this memory before may still work with it.
                if buffer.memory.is_cuda:
                    buffer.memory.record_stream(side)

    @property
    def scratch(self) -> int:
        """Bytes of the buffers."""
        return 2 * self._weights * BUFFERS

    @contextmanager
    def weight(self, source: Source) -> Iterator[torch.Tensor | None]:
        """The decoded weight of a source, BF16 [elements], for work that is launched within ``with`` on the current stream.

        Afterwards its buffer is used again. None if it must be decoded otherwise.
        """
        elements = source.elements_ahead()
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

    def _take(self, source: Source, elements: int) -> _Buffer:
        current = self._streams.current()
        last = self._last() if self._last is not None else None
        if last is not None:
            self._next[last] = weakref.ref(source)
        self._last = weakref.ref(source)
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % BUFFERS
        buffer.ready.wait(current)  # Also where it holds another: that must be finished before it is overwritten.
        if buffer.holds == (id(source), source.state_ahead()):
            self.hits += 1
        else:
            self.misses += 1
            buffer.free.wait(current)
            source.decode_ahead(buffer.memory[:elements])
        buffer.holds = None  # For one product: a weight that is used again is decoded again.
        self._began.record(current)
        return buffer

    def _start_next(self, source: Source) -> None:
        reference = self._next.get(source)
        following = reference() if reference is not None else None
        if following is None:
            return
        elements = following.elements_ahead()
        buffer = self._buffers[self._turn]
        with self._streams.side() as side:
            self._began.wait(side)  # All that came before this product: records that were moved, for example.
            buffer.free.wait(side)
            following.decode_ahead(buffer.memory[:elements])
            buffer.ready.record(side)
        buffer.holds = (id(following), following.state_ahead())
