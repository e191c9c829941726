"""Prefetching: whatever legal order the work on two streams is done in, each product sees its own weight."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from df11.runtime.prefetch import Prefetcher

CPU = torch.device("cpu")
SIZE = 4


class Stream:
    """Work in order: what it waits for, and what it does."""

    def __init__(self) -> None:
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def put(self, action: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, action))


class Event:
    """As in CUDA: waits for the last recording before the call to wait."""

    def __init__(self, works: bool) -> None:
        self.recorded = self.done = 0
        self.works = works

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def note() -> None:
            self.done = max(self.done, number)

        stream.put(note)

    def wait(self, stream: Stream) -> None:
        number = self.recorded if self.works else 0
        stream.put(lambda: None, lambda: self.done >= number)


class Streams:
    """Two streams for products and one side stream, which do nothing until ``run`` takes work from them at random.

    ``broken``: the number of an event that nobody waits for.
    """

    def __init__(self, seed: int, broken: int | None = None) -> None:
        self.mains, self._side = [Stream(), Stream()], Stream()
        self.now = self.mains[0]
        self.random = random.Random(seed)
        self.events = 0
        self.broken = broken
        self.is_usable = True

    def usable(self) -> bool:
        return self.is_usable

    def current(self) -> Stream:
        return self.now

    @contextmanager
    def side(self) -> Iterator[Stream]:
        before, self.now = self.now, self._side
        yield self._side
        self.now = before

    def event(self) -> Event:
        self.events += 1
        return Event(self.events - 1 != self.broken)

    def run(self) -> None:
        streams = [*self.mains, self._side]
        while any(stream.work for stream in streams):
            ready = [stream for stream in streams if stream.work and stream.work[0][0]()]
            assert ready, "a deadlock"
            self.random.choice(ready).work.popleft()[1]()


class Weight:
    """A weight whose record is a number, which comes by work on a stream."""

    elements = SIZE

    def __init__(self, number: int, streams: Streams) -> None:
        self.number, self.arrived = number, 0
        self.streams = streams
        streams.now.put(lambda: setattr(self, "arrived", number))

    def decode_ahead(self, out: torch.Tensor) -> None:
        # In two steps: a product between them would see it.
        self.streams.now.put(lambda: out.fill_(0))
        self.streams.now.put(lambda: out.fill_(self.arrived))


def drive(streams: Streams, seed: int, *, switching: bool) -> list[str]:
    """Six passes through six weights, some skipped, repeated, out of order or replaced. Returns what went wrong.

    ``switching``: products go to two streams, one per pass; it waits for the pass before, as users would have to make
    it.
    """
    rng, wrong = random.Random(seed), []
    weights = [Weight(number, streams) for number in range(1, 7)]
    prefetcher = Prefetcher(SIZE, CPU, streams)
    for turn in range(6):
        order = list(weights)
        if rng.random() < 0.5:
            order.pop(rng.randrange(6))
            order.insert(rng.randrange(5), rng.choice(weights))
        if switching:
            streams.now = streams.mains[turn % 2]
        for weight in order:
            if not switching and rng.random() < 0.2:
                weights[rng.randrange(6)] = Weight(rng.randrange(10, 200), streams)
            with prefetcher.weight(weight) as decoded:
                assert decoded is not None

                def product(decoded: torch.Tensor = decoded, expected: int = weight.number) -> None:
                    if not (decoded == expected).all():
                        wrong.append(f"{expected} sees {decoded.tolist()}")

                streams.now.put(product)
                streams.now.put(product)
    streams.run()
    return wrong


@pytest.mark.parametrize("switching", [False, True])
@pytest.mark.parametrize("seed", range(200))
def test_every_product_sees_its_weight(seed: int, switching: bool) -> None:
    assert not drive(Streams(seed), seed, switching=switching)


@pytest.mark.parametrize("broken", range(4))
def test_each_event_is_needed(broken: int) -> None:
    # Two of each buffer; without any of them, something goes wrong in some order.
    assert any(
        drive(Streams(seed, broken), seed, switching=switching) for seed in range(200) for switching in (False, True)
    )


def test_an_order_that_is_kept_is_learnt() -> None:
    streams = Streams(0)
    weights, prefetcher = [Weight(number, streams) for number in range(6)], Prefetcher(SIZE, CPU, streams)
    for weight in weights * 5:
        with prefetcher.weight(weight):
            pass
    assert prefetcher.misses == 7  # The first pass, and the step back to its start.
    assert prefetcher.hits == 23


def test_a_weight_that_is_gone_is_not_decoded() -> None:
    streams = Streams(0)
    weights, prefetcher = [Weight(number, streams) for number in range(3)], Prefetcher(SIZE, CPU, streams)
    for weight in weights * 2:
        with prefetcher.weight(weight):
            pass
    del weights[1], weight
    with prefetcher.weight(weights[0]):
        pass
    streams.run()


def test_who_is_served_otherwise() -> None:
    streams = Streams(0)
    one, other = Weight(1, streams), Weight(2, streams)
    with Prefetcher(SIZE - 1, CPU, streams).weight(one) as weight:
        assert weight is None  # Too large.
    prefetcher = Prefetcher(SIZE, CPU, streams)
    streams.is_usable = False
    with prefetcher.weight(one) as weight:
        assert weight is None
    streams.is_usable = True
    found: list[object] = []

    def run() -> None:
        with prefetcher.weight(other) as weight:
            found.append(weight)

    with prefetcher.weight(one) as weight:
        assert weight is not None
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with prefetcher.weight(other) as inner:
            assert inner is None  # Within the product of another one.
    assert found == [None]


def test_an_error_in_a_product_leaves_it_in_order() -> None:
    streams = Streams(0)
    prefetcher = Prefetcher(SIZE, CPU, streams)
    weights = [Weight(1, streams), Weight(2, streams)]
    with pytest.raises(ZeroDivisionError), prefetcher.weight(weights[0]):
        raise ZeroDivisionError
    with prefetcher.weight(weights[1]) as weight:
        assert weight is not None
    streams.run()
    assert prefetcher.scratch == 2 * 2 * SIZE
