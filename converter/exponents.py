"""How often exponents occur in a tensor: the counts, kept small, and their entropy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from df11.formats import layout

COUNTED_WEIGHTS: Final = 65_536
"""Smaller tensors have an entropy in their row of the manifest, but no counts."""

Counts = npt.NDArray[np.int64]
"""i64 [256]: how often each exponent occurs."""


@dataclass(frozen=True, slots=True)
class ExponentCounts:
    """How often each exponent occurs, in compact form: ``exponents``, u8 ascending; ``counts``, little-endian u64."""

    exponents: bytes
    counts: bytes

    @classmethod
    def of(cls, counts: Sequence[int] | Counts) -> Self:
        """From 256 counts."""
        array = np.asarray(counts, np.int64)
        present = np.flatnonzero(array)
        return cls(present.astype(np.uint8).tobytes(), array[present].astype("<u8").tobytes())

    def array(self) -> Counts:
        """All counts, i64 [256]."""
        counts = np.zeros(256, np.int64)
        counts[np.frombuffer(self.exponents, np.uint8)] = np.frombuffer(self.counts, "<u8")
        return counts

    def entropy(self) -> float:
        """Their entropy in bits."""
        return entropy(np.frombuffer(self.counts, "<u8").tolist())


def entropy(counts: Iterable[int]) -> float:
    """Shannon entropy of counts (not all zero), in bits.

    Rounded to 9 decimals: libraries for logarithms differ in the last bits.
    """
    present = [count for count in counts if count]
    total = sum(present)
    return round(max(math.log2(total) - math.fsum(count * math.log2(count) for count in present) / total, 0.0), 9)


Exponents = ExponentCounts | float | None
"""What a row says about exponents: counts, or for a small tensor only their entropy; None for a verbatim tensor
that is not BF16."""


def summarized(counts: Counts, weights: int) -> ExponentCounts | float:
    """What is kept of the counts of a tensor, or of part of one, with this many weights."""
    return ExponentCounts.of(counts) if weights >= COUNTED_WEIGHTS else entropy(counts.tolist())


def has_exponents(encoding: str, dtype: str, elements: int) -> bool:
    """Whether the row of a tensor has an entropy: it is a record, or BF16, not empty and not too large for a record."""
    return encoding == "df11" or (dtype == "BF16" and 0 < elements <= layout.MAX_RECORD_WEIGHTS)
