"""Run a function over items in threads; yield the results in order, within a bounded amount of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from df11.formats.record import Scratch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(
    function: Callable[[Item, tuple[Scratch, ...]], Result], items: Iterable[Item], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item, scratch)) in order, computed by ``threads`` threads.

    ``scratch`` is memory that the result may use. It is reused once the next result is requested.
    """
    free = [tuple(Scratch() for _ in range(3)) for _ in range(threads + 1)]
    waiting: deque[tuple[Item, tuple[Scratch, ...], Future[Result]]] = deque()
    executor = ThreadPoolExecutor(threads, "df11-worker")
    try:
        for item in items:
            if not free:
                done, scratch, future = waiting.popleft()
                yield done, future.result()
                free.append(scratch)
            scratch = free.pop()
            waiting.append((item, scratch, executor.submit(function, item, scratch)))
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    finally:
        executor.shutdown(cancel_futures=True)
