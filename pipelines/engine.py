"""Who works on the files of a job: this process, or the workers of a Ray cluster. Results come in the order of the tasks."""

from __future__ import annotations

import importlib
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol

from df11.converter.pipeline import give_memory_back, mebibytes
from df11.converter.source import Progress
from df11.formats import errors
from df11.pipelines.shards import Done, Staged, Task, deliver, discard, produce

TRIES: Final = 4
"""Times that a task is started on a cluster: workers die, and networks break."""

LONGEST_STOP: Final = 2.0
"""Seconds that the work ahead may take to end when nobody wants it any more: it notices between two pieces, unless a server is silent."""
_PATIENCE: Final = 10.0
"""Seconds that a cluster's head may take to accept a connection."""


class Engine(Protocol):
    """Works on tasks."""

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[Done]:
        """The outcome of each task, in their order; a Df11Error ends it. ``progress`` gets bytes of source."""
        ...


class Stopped(Exception):  # noqa: N818 - not an error
    """Nobody wants this task's outcome any more."""


class InProcess:
    """Converts one file while the one before is uploaded. ``overlap=False``: one after the other, where the disk has room for only one."""

    def __init__(self, *, overlap: bool = True) -> None:
        self._overlap = overlap

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[Done]:
        """See :class:`Engine`. What is unfinished when this generator is closed is given up and removed."""
        stop = threading.Event()

        def advance(size: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(size)

        ahead: Future[Staged] | None = None
        try:
            for number, task in enumerate(tasks):
                ahead = ahead or _started(task, advance)
                staged = ahead.result()
                following = tasks[number + 1 : number + 2] if self._overlap else []
                # From here on two finished or growing files can be on the disk, and no more.
                ahead = _started(following[0], advance) if following else None
                yield deliver(staged)
        finally:
            stop.set()
            if ahead is not None:
                ahead.add_done_callback(_forget)
                wait([ahead], LONGEST_STOP)


def _started(task: Task, progress: Progress) -> Future[Staged]:
    # In a daemon: a server that is silent when the command is interrupted must not hold it up.
    future: Future[Staged] = Future()

    def work() -> None:
        try:
            future.set_result(produce(task, progress))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="df11-job", daemon=True).start()
    return future


def _forget(future: Future[Staged]) -> None:
    if future.exception() is None:
        discard(future.result().task)


class OnRay:
    """Each file is a task of an existing Ray cluster, which the environment variable RAY_ADDRESS or Ray's own configuration names.

    A task asks for as many processors as it has threads and for its memory. One whose worker dies, or whose network fails, is started again.
    Workers need df11[jobs], and the Hub's token where one is needed; local sources and targets must be shared folders.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[Done]:
        """See :class:`Engine`."""
        try:
            ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise errors.missing_extra("ray", "ray") from None
        with _connection(ray):
            remote = ray.remote(num_cpus=1, max_retries=TRIES - 1, retry_exceptions=[errors.RetryLaterError])(_work)
            tasks = [
                replace(task, settings=replace(task.settings, jobs=min(task.settings.jobs, self._processors(ray))))
                for task in tasks
            ]
            options = [
                {"num_cpus": task.settings.jobs, "memory": self._memory, "name": f"df11 {task.name}"} for task in tasks
            ]
            waiting = deque(
                (task, remote.options(**option).remote(task)) for task, option in zip(tasks, options, strict=True)
            )
            try:
                while waiting:
                    task, reference = waiting[0]
                    done = _result(ray, reference, task)
                    waiting.popleft()
                    progress(task.file.size)
                    yield done
            finally:
                references = [reference for _, reference in waiting]
                _, unfinished = ray.wait(references, num_returns=len(references), timeout=0) if references else ([], [])
                for reference in unfinished:  # Never a task that has ended: Ray would abort.
                    ray.cancel(reference, force=True)

    def _processors(self, ray: Any) -> int:
        # Of the largest node that has the memory: Ray would wait for ever for one that is larger than all.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        processors = int(
            max((node.get("CPU", 0) for node in nodes if node.get("memory", 0) >= self._memory), default=0)
        )
        if not processors:
            most = int(max((node.get("memory", 0) for node in nodes), default=0))
            raise errors.BudgetError(
                "no node of the Ray cluster has processors and the memory of [limits]",
                expected=mebibytes(self._memory),
                found=mebibytes(most),
            )
        return processors


def _work(task: Task) -> Done:
    give_memory_back()  # A worker gets many tasks.
    return deliver(produce(task, lambda _: None))


@contextmanager
def _connection(ray: Any) -> Iterator[None]:
    ours = not ray.is_initialized()
    if ours:
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except (
            OSError,
            RuntimeError,
            ValueError,
            SystemExit,
        ) as error:  # The last is Ray's word for a cluster that does not answer.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "start one with 'ray start --head', or set RAY_ADDRESS"
            raise errors.RetryLaterError(f"no Ray cluster answers ({reason})", hint=hint) from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str) -> None:
    # Ray itself waits for minutes where nobody listens.
    match = re.fullmatch(r"([^/\[\]]+):(\d+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=_PATIENCE).close()


def _result(ray: Any, reference: Any, task: Task) -> Done:
    try:
        done = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, errors.Df11Error):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.RetryLaterError(
            f"the cluster gave up after {TRIES} tries ({reason})",
            file=task.file.label,
            hint="run the same command again",
        ) from None
    assert isinstance(done, Done)
    return done
