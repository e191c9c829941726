"""Shared by the tests of the runtime."""

from __future__ import annotations

import logging
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


@pytest.fixture(scope="module")
def quiet_libraries() -> Iterator[None]:
    """Neither log lines nor progress bars of transformers and diffusers."""
    import diffusers
    import transformers

    before = [(library, library.logging.get_verbosity()) for library in (diffusers, transformers)]
    for library, _ in before:
        library.logging.set_verbosity(logging.CRITICAL)
        library.logging.disable_progress_bar()
    yield
    for library, verbosity in before:
        library.logging.set_verbosity(verbosity)
        library.logging.enable_progress_bar()
