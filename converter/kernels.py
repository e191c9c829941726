"""Typed calls of the encoding kernels, which are in C (``encode.c``)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from df11 import _kernels
from df11.formats.layout import BF16, Kind
from df11.formats.record import Bytes, Weights

LANE_OVERFLOW: Final = _kernels.LANE_OVERFLOW
NOT_SMALLER: Final = _kernels.NOT_SMALLER
ENCODE_SLACK: Final = _kernels.ENCODE_SLACK
"""Bytes beyond the end of a segment that encoding may write before it notices that a tile does not fit."""


@dataclass(frozen=True, slots=True)
class Code:
    """The code of a segment.

    ``section``: the code table section; ``bits``: of all codes and exceptions; ``filler``: a symbol.
    """

    alphabet_size: int
    section: Bytes
    bits: int
    filler: int


class Encoder:
    """The encoding kernels and their state, about 2 MB. One thread at a time: another gets a ValueError."""

    def __init__(self) -> None:
        self.handle = _kernels.new_encoder()
        """State for the C functions."""

    def build_code(self, weights: Weights, kind: Kind) -> Code:
        """Count the pairs of ``weights`` (2 to 2**24) and choose their code, which :meth:`encode_tiles` then uses.

        After :meth:`Sha256.update_counting`, ``weights`` must be the hashed ones: they are not counted again.
        """
        alphabet_size, section, bits, filler = _kernels.build_code(self.handle, weights, kind.code)
        return Code(alphabet_size, np.frombuffer(section, np.uint8), bits, filler)

    def exponents(self) -> npt.NDArray[np.int64]:
        """How often each exponent occurs in the last weights that :meth:`build_code` saw: i64 [256]."""
        return np.frombuffer(_kernels.exponents(self.handle), np.int64)

    def encode_tiles(
        self,
        weights: Weights,
        kind: Kind,
        left_out: int,
        code: Code,
        lane_bytes: int,
        sections: dict[str, int],
        end: int,
        out: Bytes,
    ) -> tuple[int, int]:
        """Encode all tiles of a segment into ``out``, from the tile descriptors on: (size of the segment, exceptions).

        ``left_out``: planes at the end that are not stored. ``end``: the size that the segment must stay below;
        ``out``: u8, at least ``end`` + ``ENCODE_SLACK``. The size is ``LANE_OVERFLOW`` if the lanes of a tile differ by
        more than ``lane_bytes`` can express, and ``NOT_SMALLER`` if ``end`` is reached.
        """
        return _kernels.encode_tiles(
            self.handle,
            weights,
            kind.code,
            left_out,
            code.filler,
            lane_bytes,
            sections["tiles_offset"],
            sections["lanes_offset"],
            sections["sign_mantissa_offset"],
            sections["stream_offset"],
            end,
            out,
        )


class Sha256:
    """SHA-256, as in hashlib. With the CPU's SHA instructions, it also counts pairs of BF16 weights for nothing."""

    def __init__(self, data: bytes = b"") -> None:
        self._hash = _kernels.new_sha256()
        self._fallback = hashlib.sha256() if self._hash is None else None
        self.update(data)

    def update(self, data: bytes | Bytes) -> None:
        """Append bytes."""
        self._append(data, None)

    def update_counting(self, data: Bytes, encoder: Encoder) -> None:
        """Append the bytes of the BF16 weights of ``encoder``'s next code, and count their pairs on the way."""
        self._append(data, encoder)

    def _append(self, data: bytes | Bytes, encoder: Encoder | None) -> None:
        if self._fallback is not None:
            self._fallback.update(data)
        elif self._hash is not None:
            _kernels.update_sha256(self._hash, data, None if encoder is None else encoder.handle)

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        if self._hash is not None:
            return _kernels.digest_sha256(self._hash).hex()
        assert self._fallback is not None
        return self._fallback.hexdigest()


def count_exponents(weights: Weights, kind: Kind = BF16) -> npt.NDArray[np.int64]:
    """How often each exponent occurs: i64 [256]."""
    counts = np.empty(256, np.int64)
    _kernels.count_exponents(weights, counts, kind.code)
    return counts


def cast_f32(source: npt.NDArray[np.uint32], out: Weights) -> bool:
    """Round F32 bits to BF16 bits as in SPEC.md, section 3; returns whether every value is exact."""
    return _kernels.cast_f32(source, out, True)


def narrow_f32(source: npt.NDArray[np.uint32], out: Weights) -> None:
    """Take the upper halves of F32 bits: BF16 bits, if all lower halves are zero."""
    _kernels.cast_f32(source, out, False)


def any_bits(weights: Bytes, kind: Kind) -> int:
    """The bits that are set in any of the weights in these bytes.

    If one of the last plane's is, others may be missing: the rest of the weights is then not looked at.
    """
    return _kernels.any_bits(weights, kind.code)
