"""Shared by the tests of the runtime."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """torch computes in one thread, here and in child processes.

    With layers this small, more threads only wait for each other: for minutes, if other programs run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    """A compiled function of torch's own is shared by tests, and may be compiled a few times only."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
