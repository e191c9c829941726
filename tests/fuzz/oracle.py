"""What must hold for every input: only df11's own errors, in one line, within limits of time and memory."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from df11.formats import errors

MOST_SECONDS = 5.0
"""Of CPU time for one input: another program on the same machine must not fail it."""
SMALL = 1_000_000
"""Bytes of an input that is small."""
MOST_MEMORY = 256 << 20
"""Bytes that a small input may take."""
MOST_OF_A_MESSAGE = 3000
_NO_MEMORY = re.compile("malloc|MemoryError|cannot allocate|out of memory", re.IGNORECASE)
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Act = Callable[[bytes], None]


class Fault(Exception):  # noqa: N818 - found, not made
    """A promise that an input breaks."""


@dataclass(frozen=True)
class Target:
    """Something that reads a stranger's bytes.

    ``seeds`` are valid inputs; ``mutate`` makes another input that keeps most of the structure; ``act`` reads an input,
    and raises a Df11Error to refuse it, or a Fault for what it accepted wrongly.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    act: Act
    largest: int = 1 << 16
    """Bytes of an input."""


@dataclass(frozen=True)
class Verdict:
    """How an input was read. ``memory``: bytes at the peak, beyond those before."""

    accepted: bool
    seconds: float
    memory: int


def judge(act: Act, data: bytes) -> Verdict:
    """Read an input. Raises a Fault."""
    before, started = _start_of_peak(), time.process_time()
    accepted = False
    try:
        act(data)
        accepted = True
    except errors.Df11Error as error:
        _check_message(error)
    except Fault:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Fault(f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:500]) from error
    seconds, memory = time.process_time() - started, _peak() - before
    if seconds > MOST_SECONDS:
        raise Fault(f"it took {seconds:.1f} s")
    if memory > MOST_MEMORY and len(data) < SMALL:
        raise Fault(f"it took {memory >> 20} MiB")
    return Verdict(accepted, seconds, memory)


def _check_message(error: errors.Df11Error) -> None:
    text = str(error)
    if not text.isprintable() or len(text) >= MOST_OF_A_MESSAGE:
        raise Fault(f"the message of {type(error).__name__} has {len(text)} characters, or is not one printable line")
    if _NO_MEMORY.search(text):  # Nobody was asked first whether so much made sense.
        raise Fault(f"it asked for more memory than there was: {text[-200:]}")


def _start_of_peak() -> int:
    # Bytes that this process takes, from which on the peak is measured; zero where that cannot be done.
    if "pyarrow" in sys.modules:  # What Arrow keeps for later would hide what it takes.
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return 0
    return _peak()


def _peak() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", _STATUS.read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0
