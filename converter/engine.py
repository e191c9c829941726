"""What runs the tasks. Results come in the order of the tasks."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, wait
from typing import Final, Protocol

from df11.converter.source import Progress
from df11.converter.work import Done, Task, deliver, discard, produce

LONGEST_STOP: Final = 2.0
"""Seconds to wait for cancelled work: it checks between two batches, unless a server is silent."""


class Engine(Protocol):
    """Runs tasks."""

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[tuple[Task, Done]]:
        """Yield each task and its delivered result, in order. Raises a Df11Error. ``progress`` gets bytes of source."""
        ...


class Stopped(Exception):  # noqa: N818 - not an error
    """Nobody wants the result of this task any more."""


class InTurn:
    """One task after the other, in the caller's thread: for files written in place."""

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[tuple[Task, Done]]:
        """See :class:`Engine`."""
        for task in tasks:
            yield task, deliver(task, produce(task, progress))


class Overlapping:
    """A thread beside the caller's, which works on the next task while a result is delivered.

    ``ahead=False``: one after the other, if the disk has space for one file only.
    """

    def __init__(self, *, ahead: bool = True) -> None:
        self._ahead = ahead

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[tuple[Task, Done]]:
        """See :class:`Engine`. Closing this generator cancels unfinished tasks and removes their files."""
        stop = threading.Event()

        def advance(size: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(size)

        begun: deque[tuple[Task, Future[Done]]] = deque()
        rest = iter(tasks)

        def begin() -> None:
            begun.extend((task, _started(task, advance)) for task in itertools.islice(rest, 1))

        begin()
        try:
            while begun:
                done = begun[0][1].result()
                task, _ = begun.popleft()
                if self._ahead:  # At most two files, finished or growing, are on the disk.
                    begin()
                yield task, deliver(task, done)
                if not self._ahead:
                    begin()
        finally:
            stop.set()
            for task, future in begun:
                future.add_done_callback(functools.partial(_forget, task))
            wait([future for _, future in begun], LONGEST_STOP)


def _started(task: Task, progress: Progress) -> Future[Done]:
    # A daemon: a silent server must not delay an interrupted command.
    future: Future[Done] = Future()

    def work() -> None:
        try:
            future.set_result(produce(task, progress))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="df11-work", daemon=True).start()
    return future


def _forget(task: Task, future: Future[Done]) -> None:
    if future.exception() is None:
        discard(task)
