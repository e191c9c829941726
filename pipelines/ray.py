"""A Ray cluster whose workers do a job's tasks."""

from __future__ import annotations

import importlib
import os
import re
import socket
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from df11.converter.pipeline import give_memory_back
from df11.converter.settings import mebibytes
from df11.converter.source import Progress
from df11.converter.work import Done, Task, deliver, produce
from df11.formats import errors

TRIES: Final = 4
"""How often a task is started on a cluster: workers die, and networks fail."""
_PATIENCE: Final = 10.0
"""Seconds that a cluster's head may take to accept a connection."""


class OnRay:
    """Each file is a task on an existing Ray cluster, named by RAY_ADDRESS or by Ray's own configuration.

    A task asks for as many CPUs as it has threads, and for its memory. It is started again if its worker dies or its
    network fails. Workers need df11[jobs], and the Hub's token if the models need one. Local sources and targets must
    be shared folders.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory

    def run(self, tasks: Sequence[Task], progress: Progress) -> Generator[tuple[Task, Done]]:
        """See :class:`~df11.converter.engine.Engine`."""
        try:
            ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise errors.missing_extra("ray", "ray") from None
        with _connection(ray):
            remote = ray.remote(num_cpus=1, max_retries=TRIES - 1, retry_exceptions=[errors.RetryLaterError])(_work)
            tasks = [
                replace(task, settings=replace(task.settings, threads=min(task.settings.threads, self._cpus(ray))))
                for task in tasks
            ]
            options = [
                {"num_cpus": task.settings.threads, "memory": self._memory, "name": f"df11 {task.step.name}"}
                for task in tasks
            ]
            waiting = deque(
                (task, remote.options(**option).remote(task)) for task, option in zip(tasks, options, strict=True)
            )
            try:
                while waiting:
                    task, reference = waiting[0]
                    done = _result(ray, reference, task)
                    waiting.popleft()
                    progress(task.step.entry.size)
                    yield task, done
            finally:
                references = [reference for _, reference in waiting]
                _, unfinished = ray.wait(references, num_returns=len(references), timeout=0) if references else ([], [])
                for reference in unfinished:  # Never a finished task: Ray would abort.
                    ray.cancel(reference, force=True)

    def _cpus(self, ray: Any) -> int:
        # Of the largest node with enough memory: Ray would wait forever for a node larger than any.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = int(max((node.get("CPU", 0) for node in nodes if node.get("memory", 0) >= self._memory), default=0))
        if not cpus:
            most = int(max((node.get("memory", 0) for node in nodes), default=0))
            raise errors.BudgetError(
                "no node of the Ray cluster has CPUs and the memory of [limits]",
                expected=mebibytes(self._memory),
                found=mebibytes(most),
            )
        return cpus


def _work(task: Task) -> Done:
    give_memory_back()  # A worker does many tasks.
    return deliver(task, produce(task, lambda _: None))


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
        ) as error:  # Ray raises the last one if a cluster does not respond.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "start one with 'ray start --head', or set RAY_ADDRESS"
            raise errors.RetryLaterError(f"no Ray cluster responds ({reason})", hint=hint) from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str) -> None:
    # Ray itself would wait for minutes if nobody listens.
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
            file=task.label,
            hint="run the same command again",
        ) from None
    assert isinstance(done, Done)
    return done
