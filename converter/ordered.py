"""Run a function over items in threads; take the results in order, with a bounded amount of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from df11.formats.record import Scratch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(
    function: Callable[[Item, tuple[Scratch, ...]], Result], items: Iterable[Item], jobs: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item, scratch)) in order, from ``jobs`` threads.

    ``scratch`` is some memory that the result may live in: it is used again when the next result is asked for.
    """
    free = [tuple(Scratch() for _ in range(3)) for _ in range(jobs + 1)]
    waiting: deque[tuple[Item, tuple[Scratch, ...], Future[Result]]] = deque()
    executor = ThreadPoolExecutor(jobs, "df11-worker")
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
