"""What a conversion may use: threads and memory, and how they are written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from df11.converter.cast import Cast
from df11.formats import errors

MOST_THREADS: Final = 1024
"""More than any machine can use; each takes some memory before it does anything."""

BASE_MEMORY: Final = 80 << 20
"""Bytes that the interpreter and its libraries take: up to 66 MiB measured."""
HEADER_MEMORY: Final = 15
"""Bytes for both headers, per byte of the source's: 13.6 measured on one name of 12 MB."""
SMALL_HEADER: Final = 4 << 20
"""Bytes of a header that is read under any budget, so that the answer can name all that its file needs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of a conversion. ``threads``: encoder threads; ``max_memory``: of the whole process, in bytes.

    ``keep``: patterns of tensors that ``cast`` leaves alone, as :func:`df11.converter.cast.expand` returns them.
    """

    threads: int
    max_memory: int
    cast: Cast
    verify: bool
    keep: tuple[str, ...] = ()


def thread_count(threads: int | None) -> int:
    """``threads`` if given, else the number of cores that this process may use."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise errors.UsageError("--threads", expected=f"at least 1 and at most {MOST_THREADS}", found=threads)
    return threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def parse_size(value: int | str) -> int:
    """Bytes of a size such as ``268435456``, ``"256MiB"`` or ``"2GB"``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", str(value).strip(), re.IGNORECASE)
    if not match:
        raise errors.UsageError("not a size", expected="such as 256MiB", found=value)
    number, unit, binary = match.groups()
    power = 0 if unit is None else "KMGT".index(unit.upper()) + 1
    return int(min(float(number), 1e15) * (1024 if binary else 1000) ** power)


def mebibytes(size: int) -> str:
    """A size as an option takes it, rounded up."""
    return f"{-(-size >> 20)}MiB"


def too_little_memory(path: str, needed: int, allowed: int) -> errors.BudgetError:
    """The error for a memory budget that is too small to convert a file; both in bytes."""
    what = "--max-memory is too small for this file"
    return errors.BudgetError(what, file=path, expected=f"at least {mebibytes(needed)}", found=mebibytes(allowed))
